"""How a method of vLLM is found by the name of its seam, and how an addition stands in front of it."""

from __future__ import annotations

import functools
import importlib
import sys
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


def spare_llvmlite() -> None:
    """Let an engine start in a process that has loaded numba, as steerfast does on a CPU.

    vLLM 0.32 for CPUs then looks through what all modules hold, by `vars`, and llvmlite's library has a function of every name,
    `__dict__` too: from now on of none that begins with two underscores.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    if "__getattr__" in vars(library := type(getattr(ffi, "lib", None))):
        wrap(library, "__getattr__", _public)


def _public(original: Callable[..., Any], library: Any, name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"{type(library).__name__} has no {name}")
    return original(library, name)
