"""What every launcher needs: flat views of x, tables as (n, P), the device of the launch, sizes of blocks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
import triton
from torch import Tensor

T = TypeVar("T")


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def flatten(x: Tensor) -> Tensor:
    """x as (n, d) with a unit stride along d; a view wherever one exists."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def columns(table: Tensor) -> Tensor:
    """A row table or its scales as (n, P)."""
    return table if table.dim() == 2 else table[:, None]


def stride(table: Tensor | None, axis: int) -> int:
    """The stride of a table that may be absent."""
    return 0 if table is None else table.stride(axis)


def power_of_two(size: int, at_least: int = 1) -> int:
    """The smallest block that covers `size`."""
    return max(triton.next_power_of_2(size), at_least)


def choose(table: list[tuple[int, T]], size: int) -> T:
    """The value beside the first limit that is not below `size`; the last entry serves every larger size."""
    return next((value for limit, value in table if size <= limit), table[-1][1])
