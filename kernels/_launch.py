"""What every launcher needs: flat views of x, tables as (n, P), the device of the launch, sizes of blocks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import _device, _prepared

T = TypeVar("T")
MIN_STEP = 16  # columns of d in the smallest product
HERE = nullcontext()

# A kernel that a launcher starts. Triton would compile it anew for a size of 1, for a multiple of 16 and for any other: not
# for what changes from one step of a model to the next, nor for the place of a column in its table
kernel = _prepared.kernel(
    do_not_specialize=[
        "N", "S", "stride_rows_n", "stride_rows_p", "stride_scale_n", "stride_scale_p",
    ],
    do_not_specialize_on_alignment=["rows_ptr", "scale_ptr"],
)  # fmt: skip


class Edit(NamedTuple):
    """A call of the subspace op as its kernels take it: the stream as (n, d), tables as (n, P) or absent."""

    x: Tensor
    hidden: Tensor | None  # the other half of a split stream
    out: Tensor  # may be x itself
    probe: Tensor | None  # (n, P, max_rank), gets y
    bank: tuple[Tensor, Tensor, Tensor]
    rows: Tensor | None
    scale: Tensor | None
    modes: int
    max_rank: int

    def column(self, p: int) -> Edit:
        """Column p of the tables, on what the columns before it have written."""
        rows, scale = (None if table is None else table[:, p : p + 1] for table in (self.rows, self.scale))
        probe = None if self.probe is None else self.probe[:, p : p + 1]
        return self._replace(x=self.x if p == 0 else self.out, probe=probe, rows=rows, scale=scale)

    def reads(self) -> dict[str, Any]:
        """Arguments of every kernel that projects."""
        vectors, _, slots = self.bank
        return {
            "x_ptr": self.x, "stride_x_n": self.x.stride(0),
            "hidden_ptr": self.hidden, "stride_hidden_n": stride(self.hidden, 0),
            "vectors_ptr": vectors, "stride_v": vectors.stride(0),
            "slots_ptr": slots, "S": slots.shape[0], "rows_ptr": self.rows, "stride_rows_n": stride(self.rows, 0),
            "D": self.x.shape[1],
        }  # fmt: skip

    def writes(self) -> dict[str, Any]:
        """Arguments of every kernel that acts and lifts."""
        return {
            "out_ptr": self.out, "stride_out_n": self.out.stride(0),
            "probe_ptr": self.probe, "stride_probe_n": stride(self.probe, 0), "K": self.max_rank,
            "coefficients_ptr": self.bank[1],
            "scale_ptr": self.scale, "stride_scale_n": stride(self.scale, 0),
            "MODES": self.modes, "IN_PLACE": self.x.data_ptr() == self.out.data_ptr(),
        }  # fmt: skip


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the device of x."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return HERE
    return torch.cuda.device(x.device)


def flatten(x: Tensor) -> Tensor:
    """x as (n, d) with a unit stride along d; a view wherever one exists, x itself where it is one."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def columns(table: Tensor) -> Tensor:
    """A row table or its scales as (n, P)."""
    return table if table.dim() == 2 else table[:, None]


def stride(table: Tensor | None, axis: int) -> int:
    """The stride of a table that may be absent; 0 of its columns where it has one entry a row, (n,)."""
    return 0 if table is None or axis == table.dim() else table.stride(axis)


def width(table: Tensor | None) -> int:
    """P, the columns of a row table; one where it is (n,) or absent."""
    return 1 if table is None or table.dim() == 1 else table.shape[1]


def written(out: Tensor, x: Tensor, flat: Tensor) -> Tensor:
    """`out` as (n, d), where x is `flat`."""
    return flat if out is x and flat.data_ptr() == x.data_ptr() else out.view(-1, out.shape[-1])


def power_of_two(size: int, at_least: int = 1) -> int:
    """The smallest block that covers `size`."""
    return max(1 << (size - 1).bit_length() if size > 1 else 1, at_least)


def blocks_of(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def choose(table: list[tuple[int, T]], size: int) -> T:
    """The value beside the first limit that is not below `size`; the last entry serves every larger size."""
    return next((value for limit, value in table if size <= limit), table[-1][1])


def warps_of(count: int, x: Tensor) -> int:
    """As many threads as `count` warps of 32 lanes have: some waves of AMD have 64."""
    return count * 32 // _device.device_of(x).lanes


def tile_bytes(edit: Edit, block_n: int, block_k: int, step: int, stages: int, lifts: bool = False) -> int:
    """Shared memory that products of a tile of the stream take, at most: x and B of each stage but that in registers.

    A lift has g and C on their way into the product instead, and x and C of one stage less.
    """
    rows = block_n * (1 if edit.hidden is None else 2)
    size = step * edit.x.element_size()
    if not lifts:
        return max(stages - 1, 1) * (rows + block_k) * size
    ahead = max(stages - 2, 0) * (rows + block_k) + (rows if stages > 1 else 0)
    return 4 * block_n * block_k + (block_k + ahead) * size


def fitting(choices: list[T], need: Callable[[T], int], x: Tensor) -> T:
    """The first choice that needs no more bytes of shared memory than the device of x has; the last is the smallest."""
    room = _device.device_of(x).shared
    return next((one for one in choices if need(one) <= room), choices[-1])
