"""Project → act → lift by tiles of tokens with tensor-core products, in two launches: many tokens, or rank 16 to 64.

`subspace_project` reads x and leaves g, a few numbers a token; `subspace_lift` reads x again and writes. Tokens are walked in
runs that stay in L2 between the two, where little of B and C is read for each (small ranks); at larger ranks tiles have to be
tall, and one run of all tokens moves less.
Bytes a token: reads |x|·d (and again, from L2 within a run), writes |x|·d; once more from L2 where a length is restored.
"""

from __future__ import annotations

import torch

from . import _device
from ._launch import MIN_STEP, Edit, choose, fitting, power_of_two, stride, tile_bytes, warps_of, width
from ._tuned import tuned
from .act import KEEP_NORM, SOLVE
from .subspace_lift import lift_kernel
from .subspace_project import project_kernel

TILE_RANK = 16  # directions of the smallest product
SPLIT_ROWS = 512  # up to this many tokens columns are split: their 32 tiles would occupy a quarter of an H200
SPLIT_COLUMNS = 512  # of d per program of the first launch, where they are split
OWNER_ROWS = 128  # up to this many tokens, programs of their own walk the owners of a tile
OWNER_PROGRAMS = 4
# (largest k, bytes of the stream in a run, and half of what is written elsewhere): what an L2 of 50 MB keeps until the lift
RUN = [(32, 36 << 20), (64, 1 << 62)]
# (largest k, rows of a tile of the first launch by n): at least one tile an SM, of many rows where B is much of what is read
ROWS = [
    (16, [(4224, 16), (8448, 32), (1 << 62, 64)]),
    (64, [(2112, 16), (4224, 32), (1 << 62, 64)]),
]
SPLIT_STREAM_ROWS = 64  # of the second launch, which then holds both halves
SOLVER_ROWS = {32: 32, 64: 16}  # lanes of a warp -> rows: a solver of higher order holds tiles of its own in registers
# (largest k, (columns of d in each of two sums of a step, stages, warps)) of the first launch
STEP = [(32, (64, 6, 4)), (64, (64, 4, 8))]
# (largest k, (rows, columns of a step, stages, warps)) of the second
LIFT = [(16, (64, 64, 4, 4)), (64, (128, 64, 3, 4))]
LIFT_COLUMNS = 512  # of d per program
# without tensor cores a product's operands stand in registers: fewer rows and columns, and loads that run ahead of them
LIFT_FLOAT32 = [(64, (32, 64, 2, 8))]
# (largest k, (columns per program, warps)) of the second where columns are split: it acts, so that y and g stand in registers too
SPLIT_LIFT = [(32, (128, 8)), (64, (128, 4))]
SPLIT_LIFT_FLOAT32 = [(64, (64, 8))]


def launch_tiles(edit: Edit) -> None:
    """Every column of the tables, one after another: one slot per token at a time."""
    n, d = edit.x.shape
    run = choose(tuned("subspace_tiles.RUN", RUN, edit.x), edit.max_rank)
    halves = (2 if edit.hidden is None else 4) + (0 if edit.x.data_ptr() == edit.out.data_ptr() else 1)
    # of several columns each finds nobody in most tokens: what a run saves is less than its launches cost
    runs = -(-n * d * edit.x.element_size() * halves // (2 * run)) if width(edit.rows) == 1 else 1
    size = -(-n // (64 * runs)) * 64 if runs > 1 else n
    for first in range(0, n, size):
        part = edit if runs == 1 else edit.between(first, min(first + size, n))
        for p in range(1 if edit.rows is None else edit.rows.shape[1]):
            _launch(part.column(p))


def _launch(edit: Edit) -> None:
    x, rank, device = edit.x, edit.max_rank, edit.x.device
    n, d = x.shape
    block_k = power_of_two(rank, TILE_RANK)
    split = n <= tuned("subspace_tiles.SPLIT_ROWS", SPLIT_ROWS, x)
    part = tuned("subspace_tiles.SPLIT_COLUMNS", SPLIT_COLUMNS, x) if split else d
    splits, programs = -(-d // part), OWNER_PROGRAMS if n <= OWNER_ROWS and edit.rows is not None else 1
    block_n = choose(choose(ROWS, rank), n)
    if edit.modes & SOLVE.value:
        block_n = min(block_n, SOLVER_ROWS[_device.device_of(x).lanes])
    step, stages, warps = choose(tuned("subspace_tiles.STEP", STEP, x), rank)
    wide = x.dtype == torch.float32
    if split:
        lifts = SPLIT_LIFT_FLOAT32 if wide else tuned("subspace_tiles.SPLIT_LIFT", SPLIT_LIFT, x)
        lift_columns, lift_warps = choose(lifts, rank)
        lift_n, lift_step, lift_stages = block_n, lift_columns, 2 if wide else 1
    else:
        lift_columns = tuned("subspace_tiles.LIFT_COLUMNS", LIFT_COLUMNS, x)
        tiles = LIFT_FLOAT32 if wide else tuned("subspace_tiles.LIFT", LIFT, x)
        lift_n, lift_step, lift_stages, lift_warps = choose(tiles, rank)
        lift_n = lift_n if edit.hidden is None else min(lift_n, SPLIT_STREAM_ROWS)
    steps = [(step, stages, 2), (step, 2, 2), (MIN_STEP, 2, 2), (MIN_STEP, 2, 1)]
    step, stages, sums = fitting(steps, lambda one: tile_bytes(edit, block_n, block_k, one[2] * one[0], one[1]), x)
    steps = [(lift_step, lift_stages), (lift_step, 1), (MIN_STEP, 1)]
    lift_step, lift_stages = fitting(steps, lambda one: tile_bytes(edit, lift_n, block_k, *one, lifts=True), x)
    blocks = -(-d // lift_columns)
    restores = bool(edit.modes & KEEP_NORM.value)

    y, g, numbers, after = None, None, None, None
    square = torch.empty(splits, n, dtype=torch.float32, device=device)
    if split:
        y = torch.empty(splits, n, block_k, dtype=torch.float32, device=device)
    else:
        parts = 1 if wide else 2
        g = torch.empty(parts, n, block_k, dtype=x.dtype, device=device)
        numbers = torch.empty(2, n, dtype=torch.float32, device=device)
    if restores:
        after = torch.empty(blocks, n, dtype=torch.float32, device=device)
    shared = edit.reads() | {
        "coefficients_ptr": edit.bank[1], "scale_ptr": edit.scale, "stride_scale_n": stride(edit.scale, 0),
        "probe_ptr": edit.probe, "stride_probe_n": stride(edit.probe, 0), "K": rank,
        "y_ptr": y, "g_ptr": g, "numbers_ptr": numbers, "square_ptr": square, "N": n, "MODES": edit.modes,
    }  # fmt: skip
    project_kernel[(-(-n // block_n), splits, programs)](
        **shared, COLUMNS=part, ACTS=not split, SUMS=sums,
        BLOCK_N=block_n, BLOCK_D=step, BLOCK_K=block_k, WIDTH=block_k, num_warps=warps_of(warps, x), num_stages=stages,
    )  # fmt: skip
    for measures in (True, False) if restores else (False,):
        lift_kernel[(-(-n // lift_n), blocks, programs)](
            **shared, out_ptr=edit.out, stride_out_n=edit.out.stride(0), after_ptr=after,
            SPLITS=splits, IN_PLACE=x.data_ptr() == edit.out.data_ptr(), MEASURES=measures,
            BLOCK_N=lift_n, BLOCK_K=block_k, BLOCK_D=lift_step, COLUMNS=lift_columns, STAGES=lift_stages,
            STEP_K=0, num_warps=warps_of(lift_warps, x),
        )  # fmt: skip
