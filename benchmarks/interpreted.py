"""Triton's interpreter, in less time, and to the same bits.

The xor of an axis, which every step of a sort asks for, it takes number by number. Whenever one function calls another, it looks
through all that `triton.language` holds for what it has to replace, which a third of its time goes into. And CPython keeps the
frames of its calls in chunks of 16 kB, mapped when a call needs one and unmapped when it returns: a loop whose calls lie across
the end of a chunk spends more than half of its time there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_apply = interpreter.ReduceOps.apply_impl
_launch = interpreter.GridExecutor.__call__


def quicken() -> None:
    """From here on this process takes xor in one call, keeps the names, and launches from a frame with room behind it."""
    interpreter.ReduceOps.apply_impl = _apply_impl
    interpreter.GridExecutor.__call__ = lambda *args, **kwargs: roomy(_launch, *args, **kwargs)
    for owner in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        _builtins(owner)
    interpreter._patch_builtin = _patch_builtin


def _apply_impl(self: Any, values: tuple[Any, ...]) -> Any:
    if self.combine_fn is not tl.standard._xor_combine or self.axis is None:
        return _apply(self, values)
    (value,) = values
    return [self.to_tensor(np.bitwise_xor.reduce(value.handle.data, self.axis, keepdims=self.keep_dims), value.dtype)]


def roomy(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function from a frame of a megabyte, whose chunk has as much again for what it calls."""
    return function(*args, **kwargs)


roomy.__code__ = roomy.__code__.replace(co_stacksize=1 << 17)


@functools.cache
def _builtins(owner: Any) -> tuple[str, ...]:
    """The names of what the interpreter replaces in a module or class; none of it is replaced yet."""
    return tuple(name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member))


def _patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
    for name in _builtins(owner):
        member = getattr(owner, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(owner, name, member, builder, scope)
