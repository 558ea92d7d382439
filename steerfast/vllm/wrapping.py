"""How a method of vLLM is found by the name of its seam, and how an addition stands in front of it."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str, addition: Callable[..., Any]) -> None:
    """Let `addition(original, self, ...)` stand for a method; once."""
    original = getattr(owner, name)
    if getattr(original, "steerfast", False):
        return

    @functools.wraps(original)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return addition(original, self, *args, **kwargs)

    wrapped.steerfast = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def resolve(seam: str) -> Any:
    """What stands at `module:name`."""
    module, _, name = seam.partition(":")
    return getattr(importlib.import_module(module), name)


def logger() -> Any:
    """Where vLLM writes what its plugins say."""
    from vllm.logger import init_logger

    return init_logger("vllm.steerfast")
