"""Project → act → lift by tiles of tokens with tensor-core products: many tokens, or rank 16 to 64.

One launch edits tiles of whole tokens, column after column of the tables (`subspace_whole`). Few tokens of one column leave most
of a GPU idle that way, so there columns of d are split across programs: `subspace_project` reads x and leaves partial sums,
`subspace_lift` adds them, acts, reads x again and writes; once more between where a length is restored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import _device
from ._launch import MIN_STEP, Edit, blocks_of, choose, fitting, power_of_two, stride, tile_bytes, warps_of, width
from ._tuned import tuned
from .act import KEEP_NORM, SOLVE
from .subspace_lift import lift_kernel
from .subspace_project import project_kernel
from .subspace_whole import whole_kernel

TILE_RANK = 16  # directions of the smallest product
SPLIT_ROWS = 512  # up to this many tokens columns are split: their 32 tiles would occupy a quarter of an H200
SPLIT_COLUMNS = 512  # of d per program of the first launch, where they are split
SPLIT_TILE = 16  # rows
OWNER_ROWS = 128  # up to this many tokens, programs of their own walk the owners of a tile
OWNER_PROGRAMS = 4
SPLIT_STREAM_ROWS = 32  # of a tile that holds both halves of a stream
SOLVER_ROWS = {32: 32, 64: 16}  # lanes of a warp -> rows: a solver of higher order holds tiles of its own in registers
SOLVER_STEP = 64  # columns of a lift beside it
# (largest k, (columns of d in each of two sums of a step, stages, warps)) of the first of two launches
STEP = [(32, (64, 6, 4)), (64, (64, 4, 8))]
# (largest k, (columns per program, warps)) of the second: it acts, so that y and g stand in registers too
SPLIT_LIFT = [(32, (128, 8)), (64, (128, 4))]
SPLIT_LIFT_FLOAT32 = [(64, (64, 8))]


class Tile(NamedTuple):
    """Whole tokens that a program edits."""

    rows: int
    step: int  # columns of d in each of two sums
    stages: int
    lift_step: int  # columns
    lift_stages: int
    warps: int


FEW_TILE_ROWS = 2112  # up to so many tokens a tile an SM
# (largest k, tile)
FEW_TILES = [(8, Tile(16, 64, 12, 128, 6, 4)), (32, Tile(16, 64, 6, 128, 4, 4)), (64, Tile(16, 64, 6, 128, 4, 8))]
# of more tokens tiles that an L2 of 50 MB keeps from one reading of x to the next, of more rows where B and C are much of that
TILES = [(8, Tile(16, 64, 12, 128, 6, 4)), (32, Tile(32, 64, 6, 64, 4, 4)), (64, Tile(64, 128, 3, 128, 3, 8))]
# without tensor cores a product's operands stand in registers: fewer rows and columns, and loads that run ahead of them
TILES_FLOAT32 = [(64, Tile(32, 64, 4, 64, 2, 8))]


def launch_tiles(edit: Edit) -> None:
    """Every column of the tables."""
    n = edit.x.shape[0]
    if width(edit.rows) == 1 and n <= tuned("subspace_tiles.SPLIT_ROWS", SPLIT_ROWS, edit.x):
        _launch_split(edit)
    else:
        _launch_whole(edit)


def _launch_whole(edit: Edit) -> None:
    x, rank = edit.x, edit.max_rank
    n, block_k = x.shape[0], power_of_two(rank, TILE_RANK)
    if x.dtype == torch.float32:
        tiles = TILES_FLOAT32
    elif n <= tuned("subspace_tiles.FEW_TILE_ROWS", FEW_TILE_ROWS, x):
        tiles = tuned("subspace_tiles.FEW_TILES", FEW_TILES, x)
    else:
        tiles = tuned("subspace_tiles.TILES", TILES, x)
    tile = Tile(*choose(tiles, rank))
    rows, stages, lift_step = tile.rows, tile.stages, tile.lift_step
    if edit.modes & SOLVE.value:
        rows, lift_step = min(rows, SOLVER_ROWS[_device.device_of(x).lanes]), min(lift_step, SOLVER_STEP)
    if edit.hidden is not None:
        rows, stages = min(rows, SPLIT_STREAM_ROWS), 2 * stages // 3  # a step then holds both halves
    step, stages, sums = _first_step(edit, rows, block_k, tile.step, stages)
    lift_step, lift_stages = _second_step(edit, rows, block_k, lift_step, tile.lift_stages)
    whole_kernel[(blocks_of(n, rows),)](
        **edit.reads(), **edit.writes(), N=n,
        stride_probe_p=stride(edit.probe, 1), stride_rows_p=stride(edit.rows, 1), stride_scale_p=stride(edit.scale, 1),
        P=width(edit.rows), SUMS=sums, BLOCK_N=rows, BLOCK_D=step, BLOCK_K=block_k,
        LIFT_D=lift_step, STAGES=lift_stages, num_warps=warps_of(tile.warps, x), num_stages=stages,
    )  # fmt: skip


def _launch_split(edit: Edit) -> None:
    x, rank, device = edit.x, edit.max_rank, edit.x.device
    n, d = x.shape
    block_k = power_of_two(rank, TILE_RANK)
    part = tuned("subspace_tiles.SPLIT_COLUMNS", SPLIT_COLUMNS, x)
    splits, programs = blocks_of(d, part), OWNER_PROGRAMS if n <= OWNER_ROWS and edit.rows is not None else 1
    step, stages, warps = choose(tuned("subspace_tiles.STEP", STEP, x), rank)
    step, stages, sums = _first_step(edit, SPLIT_TILE, block_k, step, stages)
    wide = x.dtype == torch.float32
    lifts = SPLIT_LIFT_FLOAT32 if wide else tuned("subspace_tiles.SPLIT_LIFT", SPLIT_LIFT, x)
    columns, lift_warps = choose(lifts, rank)
    lift_step, lift_stages = _second_step(edit, SPLIT_TILE, block_k, columns, 2 if wide else 1)
    tiles, blocks, restores = blocks_of(n, SPLIT_TILE), blocks_of(d, columns), bool(edit.modes & KEEP_NORM.value)
    shared = edit.reads() | {
        "y_ptr": torch.empty(splits, n, block_k, dtype=torch.float32, device=device),
        "square_ptr": torch.empty(splits, n, dtype=torch.float32, device=device), "N": n,
    }  # fmt: skip
    after = torch.empty(blocks, n, dtype=torch.float32, device=device) if restores else None
    project_kernel[(tiles, splits, programs)](
        **shared, COLUMNS=part, MODES=edit.modes, SUMS=sums,
        BLOCK_N=SPLIT_TILE, BLOCK_D=step, BLOCK_K=block_k, WIDTH=block_k, num_warps=warps_of(warps, x), num_stages=stages,
    )  # fmt: skip
    for measures in (True, False) if restores else (False,):
        lift_kernel[(tiles, blocks, programs)](
            **shared, **edit.writes(), g_ptr=None, numbers_ptr=None, after_ptr=after, SPLITS=splits, MEASURES=measures,
            BLOCK_N=SPLIT_TILE, BLOCK_K=block_k, BLOCK_D=lift_step, COLUMNS=columns, STAGES=lift_stages,
            STEP_K=0, num_warps=warps_of(lift_warps, x),
        )  # fmt: skip


def _first_step(edit: Edit, rows: int, block_k: int, step: int, stages: int) -> tuple[int, int, int]:
    """Columns of each sum, stages and sums of a product's step, as the shared memory of the device of x allows."""
    steps = [(step, stages, 2), (step, 2, 2), (MIN_STEP, 2, 2), (MIN_STEP, 2, 1)]
    return fitting(steps, lambda one: tile_bytes(edit, rows, block_k, one[2] * one[0], one[1]), edit.x)


def _second_step(edit: Edit, rows: int, block_k: int, step: int, stages: int) -> tuple[int, int]:
    """The same of a lift: columns and stages, two where a warp has 64 lanes: its scalar registers hold the steps ahead."""
    stages = stages if _device.device_of(edit.x).lanes == 32 else min(stages, 2)
    steps = [(step, stages), (step, 1), (MIN_STEP, 1)]
    return fitting(steps, lambda one: tile_bytes(edit, rows, block_k, *one, lifts=True), edit.x)
