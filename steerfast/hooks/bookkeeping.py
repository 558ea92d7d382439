"""Bookkeeping beside a forward pass: tables, counts and latches are numbers of ours and never part of anybody's graph.

A model may run in inference mode, while a gradient is recorded, or inside a transform of `torch.func`. Tensors that we keep
beyond the pass must not remember any of it: one made in inference mode could not take part in a gradient later, one made
inside a transform is dead when the transform ends, and writing into one of ours there is an error of PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])


def bookkeeping(function: Function) -> Function:
    """A function whose tensors are plain ones, in whatever mode it is called."""

    @functools.wraps(function)
    def plainly(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad(), torch._C._DisableFuncTorch():
            return function(*args, **kwargs)

    return cast(Function, plainly)


def refuse_tracing() -> None:
    """Refuse a tracer that would record one pass and replay its plan, its positions and its padding for every input."""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]  # public, but not re-exported
        raise RuntimeError(
            "steer: torch.jit.trace (and an ONNX export by it) would freeze this pass's plan and positions into the trace; "
            "trace the model unsteered, use bake for weights that hold the edit, or prepare and torch.compile"
        )


def is_mapped(value: Any) -> bool:
    """Whether torch.vmap maps over a tensor: it has no one value that the host could read."""
    return isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(settled(value))


def settled(value: Tensor) -> Tensor:
    """A decision, which has no gradient, as the plain tensor that it is; one that torch.vmap maps over stays as it is."""
    functorch, found = torch._C._functorch, value
    while functorch.is_functorch_wrapped_tensor(found):
        if functorch.is_batchedtensor(found):
            return value
        found = functorch.get_unwrapped(found)
    return found
