"""Project → act → lift for few tokens and a large rank: columns of d are split across programs.

Few tiles of tokens leave most of a GPU idle, and one program that reads all of B and C alone takes longer than a launch.
First launch: partial sums of y and ‖x‖² per split of d. Second: each program adds the partial sums in one fixed order (so
the result does not depend on timing), acts on all of y, and lifts its own columns. Third, only where a length may be
restored: the rows that want it are scaled.

Bytes: B and C once per tile of 16 tokens, the partial sums 4·k per token and split, x twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import MIN_STEP, Edit, choose, fitting, kernel, power_of_two, stride, tile_bytes
from ._tuned import tuned
from .act import KEEP_NORM, act, restore
from .owners import leave_rows, owners_of
from .subspace_tiles import TILE_RANK, store_probe, tile_moved, tile_project

SPLIT_ROWS = 1024  # up to this many tokens: 16 tiles of 64 would occupy an eighth of an H200
BLOCK_N = 16  # the smallest tile of a tensor-core product
PROJECT_COLUMNS = 512  # of d per program of the first launch: 64 kB of B at k = 64
# (largest k, (columns of d per product, warps)) of the first launch, and (largest k, (columns per program, warps)) of the
# second: y and g stay in registers, and a tile of C in shared memory
PROJECT_STEP = [(64, (64, 4)), (512, (32, 8))]
STAGES = 3
LIFT = [(64, (128, 4)), (128, (64, 4)), (512, (32, 8))]


@kernel
def _split_project_kernel(
    x_ptr, stride_x_n,
    hidden_ptr, stride_hidden_n,
    y_ptr, stride_y_s, stride_y_n,
    square_ptr, stride_square_s,
    vectors_ptr, stride_v,
    slots_ptr, S,
    rows_ptr, stride_rows_n,
    N, D,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_s = tl.program_id(1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    owner, _ = owners_of(slots_ptr, S, rows_ptr, stride_rows_n, None, 0, offs_n, mask_n)
    first, last = i_s * COLUMNS, tl.minimum((i_s + 1) * COLUMNS, D)
    slot = tl.max(owner, axis=0)
    while slot >= 0:
        head_ptr = slots_ptr + slot * 8
        mine = owner == slot
        mask_k = offs_k < tl.load(head_ptr + 1)
        b_ptr = vectors_ptr + tl.load(head_ptr + 2).to(tl.int64) * stride_v
        y, square = tile_project(
            x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mine, offs_k, mask_k,
            first, last, BLOCK_D,
        )  # fmt: skip
        place = i_s * stride_y_s + offs_n[:, None] * stride_y_n + offs_k[None, :]
        tl.store(y_ptr + place, y, mask=mine[:, None])
        tl.store(square_ptr + i_s * stride_square_s + offs_n, square, mask=mine)
        owner = tl.where(mine, -1, owner)
        slot = tl.max(owner, axis=0)


@kernel
def _split_lift_kernel(
    x_ptr, stride_x_n,
    hidden_ptr, stride_hidden_n,
    out_ptr, stride_out_n,
    probe_ptr, stride_probe_n, K,
    y_ptr, stride_y_s, stride_y_n,
    square_ptr, stride_square_s,
    moved_ptr, stride_moved_n,
    after_ptr, stride_after_s,
    vectors_ptr, stride_v,
    coefficients_ptr,
    slots_ptr, S,
    rows_ptr, stride_rows_n,
    scale_ptr, stride_scale_n,
    N, D, SPLITS,
    MODES: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_c = tl.program_id(1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = i_c * COLUMNS + tl.arange(0, COLUMNS)
    mask_d = offs_d < D
    owner, weight = owners_of(slots_ptr, S, rows_ptr, stride_rows_n, scale_ptr, stride_scale_n, offs_n, mask_n)
    first, last = i_c * COLUMNS, tl.minimum((i_c + 1) * COLUMNS, D)
    leave_rows(x_ptr, stride_x_n, out_ptr, stride_out_n, owner, offs_n, mask_n, first, last, IN_PLACE, COLUMNS)
    y = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    square = tl.zeros((BLOCK_N,), tl.float32)
    for i_s in range(SPLITS):
        place = i_s * stride_y_s + offs_n[:, None] * stride_y_n + offs_k[None, :]
        y += tl.load(y_ptr + place, mask=(owner >= 0)[:, None], other=0.0)
        square += tl.load(square_ptr + i_s * stride_square_s + offs_n, mask=owner >= 0, other=0.0)
    slot = tl.max(owner, axis=0)
    while slot >= 0:
        head_ptr = slots_ptr + slot * 8
        mine = owner == slot
        mask_k = offs_k < tl.load(head_ptr + 1)
        c_ptr = vectors_ptr + tl.load(head_ptr + 3).to(tl.int64) * stride_v
        constants_ptr = coefficients_ptr + tl.load(head_ptr + 4).to(tl.int64) * 8
        if probe_ptr is not None:
            if i_c == 0:
                store_probe(probe_ptr, stride_probe_n, K, y, head_ptr, offs_n, mine, offs_k, mask_k)
        strength = weight * tl.load(constants_ptr + 2)
        alpha, unit, g = act(y, square, strength, head_ptr, constants_ptr, offs_k, mask_k, MODES)
        moved, half = tile_moved(
            x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, head_ptr, c_ptr, stride_v, g, alpha, unit,
            offs_n, mine, offs_k, mask_k, offs_d, D, MODES,
        )  # fmt: skip
        mask = mine[:, None] & mask_d[None, :]
        written = mask
        if KEEP_NORM & MODES:
            keeps = mine & (tl.zeros_like(owner) + tl.load(head_ptr + 6) != 0)
            kept = mask & keeps[:, None]
            tl.store(moved_ptr + offs_n[:, None] * stride_moved_n + offs_d[None, :], moved, mask=kept)
            after = tl.sum(tl.where(mask_d[None, :], moved * moved, 0.0), axis=1)
            tl.store(after_ptr + i_c * stride_after_s + offs_n, after, mask=keeps)
            written = mask & (keeps == 0)[:, None]
        out = (moved - half).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_n[:, None] * stride_out_n + offs_d[None, :], out, mask=written)
        owner = tl.where(mine, -1, owner)
        slot = tl.max(owner, axis=0)


@kernel
def _split_restore_kernel(
    hidden_ptr, stride_hidden_n,
    out_ptr, stride_out_n,
    square_ptr, stride_square_s,
    moved_ptr, stride_moved_n,
    after_ptr, stride_after_s,
    slots_ptr, S,
    rows_ptr, stride_rows_n,
    D, SPLITS, CHUNKS, COLUMNS: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    slot = tl.full((), 0, tl.int32)
    if rows_ptr is not None:
        slot = tl.load(rows_ptr + i_n * stride_rows_n)
    inside = (slot >= 0) & (slot < S)
    rank = tl.load(slots_ptr + slot * 8 + 1, mask=inside, other=0)
    keeps = tl.load(slots_ptr + slot * 8 + 6, mask=inside, other=0)
    if (rank > 0) & (keeps != 0):
        before = 0.0
        for i_s in range(SPLITS):
            before += tl.load(square_ptr + i_s * stride_square_s + i_n)
        after = 0.0
        for i_c in range(CHUNKS):
            after += tl.load(after_ptr + i_c * stride_after_s + i_n)
        mask_d = offs_d < D
        out = restore(before, after) * tl.load(moved_ptr + i_n * stride_moved_n + offs_d, mask=mask_d, other=0.0)
        if hidden_ptr is not None:
            out -= tl.load(hidden_ptr + i_n * stride_hidden_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        tl.store(out_ptr + i_n * stride_out_n + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


def launch_split(edit: Edit) -> None:
    """One slot per token: a column of the tables."""
    x, rank = edit.x, edit.max_rank
    n, d = x.shape
    block_k = power_of_two(rank, TILE_RANK)
    project_columns = tuned("subspace_split.PROJECT_COLUMNS", PROJECT_COLUMNS, x)
    step, project_warps = choose(tuned("subspace_split.PROJECT_STEP", PROJECT_STEP, x), rank)
    lift_columns, lift_warps = choose(tuned("subspace_split.LIFT", LIFT, x), rank)
    choices = [(step, STAGES), (step, 2), (MIN_STEP, 2)]
    step, stages = fitting(choices, lambda one: tile_bytes(edit, BLOCK_N, block_k, *one), x)
    lift_columns = fitting([lift_columns, MIN_STEP], lambda one: tile_bytes(edit, BLOCK_N, block_k, one, 1, True), x)
    splits, chunks, tiles = triton.cdiv(d, project_columns), triton.cdiv(d, lift_columns), triton.cdiv(n, BLOCK_N)
    restores = bool(edit.modes & KEEP_NORM.value)
    y = torch.empty(splits, n, block_k, dtype=torch.float32, device=x.device)
    square = torch.empty(splits, n, dtype=torch.float32, device=x.device)
    moved = torch.empty(n if restores else 0, d, dtype=torch.float32, device=x.device)
    after = torch.empty(chunks if restores else 0, n, dtype=torch.float32, device=x.device)
    reads, writes = edit.reads(), edit.writes()
    sums = {
        "y_ptr": y, "stride_y_s": y.stride(0), "stride_y_n": y.stride(1),
        "square_ptr": square, "stride_square_s": square.stride(0),
    }  # fmt: skip
    lengths = {
        "moved_ptr": moved, "stride_moved_n": moved.stride(0),
        "after_ptr": after, "stride_after_s": after.stride(0),
    }  # fmt: skip
    _split_project_kernel[(tiles, splits)](
        **reads, **sums,
        N=n, BLOCK_N=BLOCK_N, BLOCK_D=step, BLOCK_K=block_k, COLUMNS=project_columns,
        num_warps=project_warps, num_stages=stages,
    )  # fmt: skip
    _split_lift_kernel[(tiles, chunks)](
        **reads, **writes, **sums, **lengths,
        N=n, SPLITS=splits, BLOCK_N=BLOCK_N, BLOCK_K=block_k, COLUMNS=lift_columns, num_warps=lift_warps,
    )  # fmt: skip
    if restores:
        _split_restore_kernel[(n, chunks)](
            **lengths, square_ptr=square, stride_square_s=square.stride(0),
            hidden_ptr=edit.hidden, stride_hidden_n=stride(edit.hidden, 0),
            out_ptr=edit.out, stride_out_n=edit.out.stride(0),
            slots_ptr=edit.bank[2], S=edit.bank[2].shape[0], rows_ptr=edit.rows, stride_rows_n=stride(edit.rows, 0),
            D=d, SPLITS=splits, CHUNKS=chunks, COLUMNS=lift_columns, num_warps=4,
        )  # fmt: skip
