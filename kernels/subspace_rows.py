"""Project → act → lift, one program per token with the whole row in registers: any mix of slots, small ranks.

Bytes a token: reads |x|·d (and |hidden|·d of a split stream) and its owners' B and C (from L2), writes |x|·d.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import Edit, choose, kernel, power_of_two, stride
from ._tuned import tuned
from .act import ADD, AFFINE, COUPLED, HINGE, KEEP_NORM, bent, couple, hinge_numbers, mode_of, restore

# (largest d, warps) where many tokens have one edit of one mode and few directions: each thread then has many elements, so
# that little is said twice; and the warps elsewhere, whose few tokens are quickest when a row is spread over many threads
WARPS = [(4096, 4), (8192, 8), (16384, 16)]
WARPS_OF_FEW = [(576, 4), (1024, 8), (16384, 16)]
MANY_DIRECTIONS = 16  # from here on a thread of 16 warps has too few registers for all of y
WARPS_OF_MANY = [(576, 4), (8192, 8), (16384, 16)]
# (largest d, directions read together): one reduction serves them all, and C is on its way meanwhile
LIGHT = 3  # directions of an edit that threads with many elements serve
CHUNK = [(1024, 8), (4096, 4), (8192, 2), (16384, 1)]


@triton.jit
def _project(x, b_ptr, rank, stride_v, offs_d, mask_d, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """y = Bx of one row, all of it, as (BLOCK_K,)."""
    offs_c = tl.arange(0, CHUNK)
    offs_k = tl.arange(0, BLOCK_K)
    y = tl.zeros((BLOCK_K,), tl.float32)
    for j in range(0, rank, CHUNK):
        offs_j = j + offs_c
        mask = (offs_j < rank)[:, None] & mask_d[None, :]
        b = tl.load(b_ptr + offs_j[:, None].to(tl.int64) * stride_v + offs_d[None, :], mask=mask, other=0.0)
        part = tl.sum(b.to(tl.float32) * x[None, :], axis=1)  # (CHUNK,)
        if BLOCK_K <= 16:
            y += tl.sum(tl.where(offs_k[:, None] == offs_j[None, :], part[None, :], 0.0), axis=1)
        else:  # the same with directions along the lanes: of many, Triton 3.6 would have each thread hold all
            y += tl.sum(tl.where(offs_j[:, None] == offs_k[None, :], part[:, None], 0.0), axis=0)
    return y


@triton.jit
def _lift(g, c_ptr, rank, stride_v, offs_d, mask_d, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """C·g of one row, with all of g at hand as (BLOCK_K,)."""
    offs_c = tl.arange(0, CHUNK)
    offs_k = tl.arange(0, BLOCK_K)
    delta = tl.zeros(offs_d.shape, tl.float32)
    for j in range(0, rank, CHUNK):
        offs_j = j + offs_c
        mask = (offs_j < rank)[:, None] & mask_d[None, :]
        c = tl.load(c_ptr + offs_j[:, None].to(tl.int64) * stride_v + offs_d[None, :], mask=mask, other=0.0)
        if BLOCK_K <= 16:
            part = tl.sum(tl.where(offs_k[:, None] == offs_j[None, :], g[:, None], 0.0), axis=0)  # (CHUNK,)
        else:
            part = tl.sum(tl.where(offs_j[:, None] == offs_k[None, :], g[None, :], 0.0), axis=1)
        delta += tl.sum(c.to(tl.float32) * part[:, None], axis=0)
    return delta


@triton.jit
def _hinge_delta(x, b_ptr, c_ptr, coef_ptr, probe_ptr, K, rank, stride_v, offs_d, mask_d, CHUNK: tl.constexpr):
    """C·hinge(Bx) of one row: every direction is projected, bent and lifted while its rows are in registers."""
    offs_c = tl.arange(0, CHUNK)
    delta = tl.zeros(offs_d.shape, tl.float32)
    for j in range(0, rank, CHUNK):
        offs_j = j + offs_c
        mask_j = offs_j < rank
        mask = mask_j[:, None] & mask_d[None, :]
        span = offs_j[:, None].to(tl.int64) * stride_v + offs_d[None, :]
        b = tl.load(b_ptr + span, mask=mask, other=0.0)
        c = tl.load(c_ptr + span, mask=mask, other=0.0)
        c0, c1, c2, c3, c4, c5, c6, c7 = hinge_numbers(coef_ptr, offs_j, mask_j)
        y = tl.sum(b.to(tl.float32) * x[None, :], axis=1)  # (CHUNK,)
        if probe_ptr is not None:
            tl.store(probe_ptr + offs_j, y, mask=mask_j & (offs_j < K))
        g = bent(y, c0, c1, c2, c3, c4, c5, c6, c7)
        delta += tl.sum(c.to(tl.float32) * g[:, None], axis=0)
    return delta


@kernel
def _rows_kernel(
    x_ptr, stride_x_n,
    hidden_ptr, stride_hidden_n,
    out_ptr, stride_out_n,
    probe_ptr, stride_probe_n, stride_probe_p, K,
    vectors_ptr, stride_v,
    coefficients_ptr,
    slots_ptr, S,
    rows_ptr, stride_rows_n, stride_rows_p,
    scale_ptr, stride_scale_n, stride_scale_p,
    D, P: tl.constexpr,
    MODES: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    if IN_PLACE:
        if rows_ptr is not None:
            named = False
            for p in tl.static_range(P):
                named = named | (tl.load(rows_ptr + i_n * stride_rows_n + p * stride_rows_p) != -1)
            if not named:  # nothing to do: not even x is read
                return
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    original = tl.load(x_ptr + i_n * stride_x_n + offs_d, mask=mask_d, other=0.0)
    x = original.to(tl.float32)
    if hidden_ptr is not None:
        x += tl.load(hidden_ptr + i_n * stride_hidden_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    whole = x
    edited = i_n < 0
    for p in range(P):  # a loop, not P copies: those of all modes take a minute to compile
        slot = tl.full((), 0, tl.int32)
        if rows_ptr is not None:
            slot = tl.load(rows_ptr + i_n * stride_rows_n + p * stride_rows_p)
        seen_ptr = probe_ptr
        if probe_ptr is not None:
            seen_ptr = probe_ptr + i_n * stride_probe_n + p * stride_probe_p
        inside = (slot >= 0) & (slot < S)
        stray = (slot != -1) & ~inside
        x = tl.where(stray, float("nan"), x)
        edited = edited | stray
        head_ptr = slots_ptr + slot * 8
        # all of the header at once: each load that waits for another costs as much as the row itself
        rank = tl.load(head_ptr + 1, mask=inside, other=0)
        b_ptr = vectors_ptr + tl.load(head_ptr + 2, mask=inside, other=0).to(tl.int64) * stride_v
        c_ptr = vectors_ptr + tl.load(head_ptr + 3, mask=inside, other=0).to(tl.int64) * stride_v
        constants_ptr = coefficients_ptr + tl.load(head_ptr + 4, mask=inside, other=0).to(tl.int64) * 8
        if rank > 0:
            mode = mode_of(head_ptr, MODES)
            weight = tl.load(constants_ptr + 2)
            if scale_ptr is not None:
                weight *= tl.load(scale_ptr + i_n * stride_scale_n + p * stride_scale_p)
            delta = tl.zeros((BLOCK_D,), tl.float32)
            if ADD & MODES:
                if mode == ADD:
                    delta = weight * tl.load(c_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            if AFFINE & MODES:
                if mode == AFFINE:
                    slope = tl.load(c_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
                    delta = weight * (slope * x + tl.load(c_ptr + stride_v + offs_d, mask=mask_d, other=0.0))
            if HINGE & MODES:
                if mode == HINGE:
                    delta = weight * _hinge_delta(
                        x, b_ptr, c_ptr, constants_ptr + 8, seen_ptr, K, rank, stride_v, offs_d, mask_d, CHUNK
                    )
            if COUPLED & MODES:
                if (mode != ADD) & (mode != HINGE) & (mode != AFFINE):
                    offs_k = tl.arange(0, BLOCK_K)
                    y = _project(x, b_ptr, rank, stride_v, offs_d, mask_d, BLOCK_K, CHUNK)
                    if probe_ptr is not None:
                        tl.store(seen_ptr + offs_k, y, mask=(offs_k < rank) & (offs_k < K))
                    norm = tl.sqrt(tl.sum(x * x, axis=0)) + tl.zeros((1,), tl.float32)
                    gain = weight + tl.zeros((1,), tl.float32)
                    alpha, g = couple(y[None, :], norm, gain, head_ptr, constants_ptr, offs_k, offs_k < rank, MODES)
                    lift = _lift(tl.sum(g, axis=0), c_ptr, rank, stride_v, offs_d, mask_d, BLOCK_K, CHUNK)
                    rest = tl.sum(alpha, axis=0) - 1.0
                    delta = tl.where(rest == 0, 0.0, rest * x) + lift  # an infinite entry stays one
            moved = x + delta
            if KEEP_NORM & MODES:
                if tl.load(head_ptr + 6) != 0:
                    moved *= restore(tl.sum(x * x, axis=0), tl.sum(moved * moved, axis=0))
            x = moved
            edited = rank > 0
    if hidden_ptr is not None:
        x = original.to(tl.float32) + (x - whole)
    if IN_PLACE:
        tl.store(out_ptr + i_n * stride_out_n + offs_d, x.to(original.dtype), mask=offs_d < tl.where(edited, D, 0))
    else:
        out = tl.where(edited, x.to(original.dtype), original)
        tl.store(out_ptr + i_n * stride_out_n + offs_d, out, mask=mask_d)


def is_light(edit: Edit) -> bool:
    """Whether sums of vectors keep up with memory: few directions, and one mode that needs no more than its own of them."""
    kinds = edit.modes & ~KEEP_NORM.value
    return edit.max_rank <= LIGHT and kinds & (kinds - 1) == 0 and not kinds & COUPLED.value


def launch_rows(edit: Edit) -> None:
    """Every slot of every token in one launch."""
    x, rank = edit.x, power_of_two(edit.max_rank)
    n, d = x.shape
    warps = tuned("subspace_rows.WARPS_OF_FEW", WARPS_OF_FEW, x)
    if is_light(edit):
        warps = tuned("subspace_rows.WARPS", WARPS, x)
    elif rank >= MANY_DIRECTIONS:
        warps = tuned("subspace_rows.WARPS_OF_MANY", WARPS_OF_MANY, x)
    chunk = choose(tuned("subspace_rows.CHUNK", CHUNK, x), d)
    _rows_kernel[(n,)](
        **edit.reads(), **edit.writes(),
        stride_probe_p=stride(edit.probe, 1), stride_rows_p=stride(edit.rows, 1), stride_scale_p=stride(edit.scale, 1),
        P=1 if edit.rows is None else edit.rows.shape[1],
        BLOCK_D=power_of_two(d), BLOCK_K=rank, CHUNK=min(chunk, rank), num_warps=choose(warps, d),
    )  # fmt: skip
