"""Project → act → lift in three launches: product, act, product. Of a large rank, or of too few tokens to fill a device whole.

The first product leaves partial sums, so that its tiles can be tall and B is read seldom; `act_kernel` leaves g once for all
columns of d; the second product keeps g of its tile on chip up to 256 directions, and walks through g and C beyond.
Bytes a token: reads |x|·d twice (once more beyond 256 directions), writes |x|·d; B and C once per tile of 16 to 128 tokens; 4·k
of y a split; 2·2·k of g, again for every 128 to 1024 columns of d.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _device
from ._launch import Edit, blocks_of, choose, fitting, power_of_two, stride, warps_of
from ._tuned import tuned
from .act import KEEP_NORM
from .subspace_act import act_kernel
from .subspace_lift import lift_kernel
from .subspace_project import project_kernel

LEAST = 16  # directions of the smallest product
OWNER_ROWS, OWNER_PROGRAMS = 128, 4  # up to so many tokens, programs of their own walk the owners of a tile
ACT_NUMBERS, ACT_ROWS = 4096, 16  # of a tile between the products
# (most tokens, rows of a tile): of few tokens many owners, and programs enough for an H200; of many as little of B as can be
ROWS = [(256, 16), (4224, 64), (1 << 62, 128)]
# (most tokens, parts of d and of the directions together) of the first product, for an H200's 132 SMs
PARTS = [(512, 8), (4224, 4), (1 << 62, 2)]
FEW = 64  # directions of which tiles have four warps: two or three in an SM fill each other's waits
FEW_PARTS = [(2112, 8), (1 << 62, 4)]
SPLIT_STREAM_ROWS = 64  # of the second product, which then holds both halves
# of a tile of the first product at most, where four warps multiply together or not
DIRECTIONS = {True: 256, False: 128}
# (largest k, (columns of a step, stages)) of the first product
STEP = [(64, (64, 6)), (128, (64, 4)), (512, (64, 3))]
LESS = [(64, 2), (32, 2), (16, 2)]  # where shared memory is small


class Lift(NamedTuple):
    """A tile of the second product."""

    rows: int
    step: int  # columns
    stages: int
    directions: int = 0  # of a step; 0: all of them at once
    columns: int = 0  # of a program; 0: one step

    def bytes(self, width: int, size: int) -> int:
        """Shared memory that it takes at most: g in two parts of 16 bits or one of 32, C, and x of the steps ahead."""
        parts = 2 if size == 2 else 1
        if self.directions:
            return self.stages * self.directions * (parts * self.rows + self.step) * size
        return (parts * self.rows * width + self.stages * (width + self.rows) * self.step) * size


# (largest k, tile as in `Lift`) of the second product
LIFT = [
    (64, (64, 64, 2, 0, 256)),
    (128, (128, 64, 3, 0, 512)),
    (256, (128, 64, 2, 0, 1024)),
    (512, (128, 256, 3, 64, 0)),
]
LESS_LIFT = [Lift(64, 128, 3, 64), Lift(128, 128, 2, 32), Lift(64, 64, 2, 16)]
LIFT_COLUMNS = [(256, 128), (4224, 256), (1 << 62, 1024)]  # (most tokens, columns of a program at most)
FEW_LIFT_COLUMNS = [(512, 128), (1 << 62, 256)]
FLOAT32_ROWS, FLOAT32_STEP, FLOAT32_LIFT = 64, (32, 2), Lift(64, 64, 2, 32)  # no tensor cores


def launch_wide(edit: Edit) -> None:
    """Every column of the tables, one after another."""
    for p in range(1 if edit.rows is None else edit.rows.shape[1]):
        _launch(edit.column(p))


def _launch(edit: Edit) -> None:
    x, width = edit.x, power_of_two(edit.max_rank, LEAST)
    (n, d), device = x.shape, x.device
    block_n, block_k, columns, step = _first_product(edit, width)
    lift, lift_columns = _second_product(edit, width, block_n)
    splits, blocks = blocks_of(d, columns), blocks_of(d, lift_columns)
    restores = bool(edit.modes & KEEP_NORM.value)
    parts = 1 if x.dtype == torch.float32 else 2
    y = torch.empty(splits, n, width, dtype=torch.float32, device=device)
    square = torch.empty(splits, n, dtype=torch.float32, device=device)
    acts = _acts(edit) | {
        "g_ptr": torch.empty(parts, n, width, dtype=x.dtype, device=device),
        "numbers_ptr": torch.empty(2, n, dtype=torch.float32, device=device), "square_ptr": square,
    }  # fmt: skip
    after = torch.empty(blocks, n, dtype=torch.float32, device=device) if restores else None
    programs = OWNER_PROGRAMS if n <= OWNER_ROWS and edit.rows is not None else 1
    warps = warps_of(8 if block_n > 16 and width > FEW else 4, x)
    project_kernel[(blocks_of(n, block_n), splits * (width // block_k), programs)](
        **edit.reads(), y_ptr=y, square_ptr=square, N=n, COLUMNS=columns, MODES=edit.modes, SUMS=1,
        BLOCK_N=block_n, BLOCK_D=step[0], BLOCK_K=block_k, WIDTH=width, num_warps=warps, num_stages=step[1],
    )  # fmt: skip
    act_n = min(ACT_NUMBERS // width, ACT_ROWS)
    act_kernel[(blocks_of(n, act_n),)](
        **acts, y_ptr=y, PARTS=splits, BLOCK_N=act_n, BLOCK_K=width, num_warps=warps_of(8, x)
    )
    for measures in (True, False) if restores else (False,):
        lift_kernel[(blocks_of(n, lift.rows), blocks, programs)](
            **edit.reads() | acts, out_ptr=edit.out, stride_out_n=edit.out.stride(0), y_ptr=None, after_ptr=after,
            SPLITS=1, IN_PLACE=x.data_ptr() == edit.out.data_ptr(), MEASURES=measures,
            BLOCK_N=lift.rows, BLOCK_K=width, BLOCK_D=lift.step, COLUMNS=lift_columns,
            STAGES=1 if lift.directions else lift.stages, STEP_K=lift.directions, num_warps=warps, num_stages=lift.stages,
        )  # fmt: skip


def _first_product(edit: Edit, width: int) -> tuple[int, int, int, tuple[int, int]]:
    """Rows and directions of a tile, columns of d for each, and (columns of a step, stages)."""
    x, wide = edit.x, edit.x.dtype == torch.float32
    n, d = x.shape
    rows = choose(tuned("subspace_wide.ROWS", ROWS, x), n)
    rows = min(rows, FLOAT32_ROWS) if wide else rows
    directions = min(width, DIRECTIONS[_device.device_of(x).wgmma and not wide])
    table = tuned("subspace_wide.FEW_PARTS", FEW_PARTS, x) if width <= FEW else tuned("subspace_wide.PARTS", PARTS, x)
    parts = max(1, choose(table, n) * directions // width)
    first = FLOAT32_STEP if wide else choose(tuned("subspace_wide.STEP", STEP, x), edit.max_rank)
    halves = 1 if edit.hidden is None else 2

    def need(step: tuple[int, int]) -> int:
        return step[0] * step[1] * (halves * rows + directions) * x.element_size()

    return rows, directions, blocks_of(d, 64 * parts) * 64, fitting([first, *LESS], need, x)


def _second_product(edit: Edit, width: int, rows: int) -> tuple[Lift, int]:
    """A tile, and the columns of a program."""
    x = edit.x
    first = Lift(*choose(tuned("subspace_wide.LIFT", LIFT, x), edit.max_rank))
    if width <= FEW:
        most = choose(tuned("subspace_wide.FEW_LIFT_COLUMNS", FEW_LIFT_COLUMNS, x), x.shape[0])
    else:
        most = choose(tuned("subspace_wide.LIFT_COLUMNS", LIFT_COLUMNS, x), x.shape[0])
    if x.dtype == torch.float32:
        first = FLOAT32_LIFT
    if edit.hidden is not None:
        rows = min(rows, SPLIT_STREAM_ROWS)
    tile = fitting([first, *LESS_LIFT], lambda one: _at(one, rows, most, width).bytes(width, x.element_size()), x)
    tile = _at(tile, rows, most, width)
    return tile, tile.columns or tile.step


def _at(tile: Lift, rows: int, columns: int, width: int) -> Lift:
    """A tile of no more rows, columns and directions than these."""
    return tile._replace(
        rows=min(tile.rows, rows), step=min(tile.step, columns), columns=min(tile.columns, columns),
        directions=min(tile.directions, width),
    )  # fmt: skip


def _acts(edit: Edit) -> dict[str, Any]:
    """Arguments of every kernel that knows who owns a row and what becomes of y."""
    slots: Tensor = edit.bank[2]
    return {
        "probe_ptr": edit.probe, "stride_probe_n": stride(edit.probe, 0), "K": edit.max_rank,
        "coefficients_ptr": edit.bank[1], "slots_ptr": slots, "S": slots.shape[0],
        "rows_ptr": edit.rows, "stride_rows_n": stride(edit.rows, 0),
        "scale_ptr": edit.scale, "stride_scale_n": stride(edit.scale, 0), "N": edit.x.shape[0], "MODES": edit.modes,
    }  # fmt: skip
