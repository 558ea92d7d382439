"""What is running: the calls that stand on this thread's stack, looked at only where the bookkeeping of passes cannot say."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType

from torch import nn

_CALL = nn.Module._call_impl.__code__
_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "steerfast")


def is_inside(module: nn.Module) -> bool:
    """Whether the forward of a module is running in this thread."""
    return any(_is_forward_of(frame, module) for frame in _frames())


def is_called(module: nn.Module) -> bool:
    """Whether a module is running in this thread and was called itself: its `forward` alone runs none of its hooks."""
    return any(frame.f_code is _CALL and frame.f_locals.get("self") is module for frame in _frames())


def is_in_its_generate(model: nn.Module) -> bool:
    """Whether the running pass is one that `generate` of this model runs, and not one that somebody runs within it."""
    generate = getattr(type(model), "generate", None)
    code = None if generate is None else getattr(inspect.unwrap(generate), "__code__", None)
    ours = True  # nothing but libraries between the pass and its caller
    for frame in _frames():
        if frame.f_code is code and frame.f_locals.get("self") is model:
            return ours
        if _is_forward_of(frame, model):
            ours = True
        elif str(frame.f_globals.get("__name__")).partition(".")[0].removesuffix("_modules") not in _LIBRARIES:
            ours = False
    return False


def _is_forward_of(frame: FrameType, module: nn.Module) -> bool:
    return "forward" in frame.f_code.co_name and frame.f_locals.get("self") is module


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
