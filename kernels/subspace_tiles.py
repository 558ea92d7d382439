"""Project → act → lift, one program per tile of tokens with tensor-core products: large ranks on long runs of tokens.

Bytes a token: reads 2·|x|·d (the second time from L2; a third time where a length is restored), writes |x|·d; B and C once
per tile and owner (from L2). The distinct owners of a tile are walked one after another, so one owner costs one pass.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl

from ._launch import MIN_STEP, Edit, choose, fitting, kernel, power_of_two, tile_bytes, warps_of
from ._tuned import tuned
from .act import AFFINE, KEEP_NORM, act, mode_of, restore
from .owners import leave_rows, owners_of

TILE_RANK = 16  # from this rank on a product on tensor cores beats sums of vectors
TILE_ROWS = [(64, 64), (128, 32), (512, 16)]  # (largest k, rows per tile): y stays in registers
# (largest k, (columns of d per step, warps of 32 lanes)): at k = 64 a step of 64 columns spills 280 bytes on sm_80 with 4
# warps; 8 waves of gfx942, which have 64 lanes, leave too few registers to each, and every solver spills 31
TILE_STEP = [(32, (64, 4)), (512, (32, 8))]
TILE_STAGES = 3


@triton.jit
def tile_project(
    x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mask_n, offs_k, mask_k,
    first, last, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(y, ‖x‖²) of a tile over columns first to last: (BLOCK_N, BLOCK_K) and (BLOCK_N,)."""
    y = tl.zeros((offs_n.shape[0], offs_k.shape[0]), tl.float32)
    square = tl.zeros(offs_n.shape, tl.float32)
    for d in range(first, last, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < last
        mask = mask_n[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :], mask=mask, other=0.0)
        mask_b = mask_k[None, :] & mask_d[:, None]
        b = tl.load(b_ptr + offs_k[None, :] * stride_v + offs_d[:, None], mask=mask_b, other=0.0)
        y = tl.dot(x, b, y, input_precision="ieee")
        wide = x.to(tl.float32)
        if hidden_ptr is not None:  # the halves apart: their sum would be rounded to 16 bits before the product
            half = tl.load(hidden_ptr + offs_n[:, None] * stride_hidden_n + offs_d[None, :], mask=mask, other=0.0)
            y = tl.dot(half, b, y, input_precision="ieee")
            wide += half.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    return y, square


@triton.jit
def _split_dot(g, c):
    """g·C with float32 g and 16-bit C: two products carry the leading 16 bits of g and what they leave out."""
    if c.dtype == tl.float32:
        return tl.dot(g, c, input_precision="ieee")
    high = g.to(c.dtype)
    low = (g - high.to(tl.float32)).to(c.dtype)
    return tl.dot(low, c, tl.dot(high, c))


@triton.jit
def tile_moved(
    x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, head_ptr, c_ptr, stride_v, g, alpha, unit,
    offs_n, mask_n, offs_k, mask_k, offs_d, D, MODES: tl.constexpr,
):  # fmt: skip
    """x' and hidden (zero for a stream in one tensor) of a tile, in float32: s·x + unit·(C·g)."""
    mask_d = offs_d < D
    mask = mask_n[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    half = tl.zeros_like(x)
    if hidden_ptr is not None:
        half = tl.load(hidden_ptr + offs_n[:, None] * stride_hidden_n + offs_d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    x += half
    mask_c = mask_k[:, None] & mask_d[None, :]
    c = tl.load(c_ptr + offs_k[:, None] * stride_v + offs_d[None, :], mask=mask_c, other=0.0)
    delta = (alpha - 1.0)[:, None] * x + unit[:, None] * _split_dot(g, c)
    if AFFINE & MODES:
        if mode_of(head_ptr, MODES) == AFFINE:
            slope = tl.load(c_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            bias = tl.load(c_ptr + stride_v + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            delta = unit[:, None] * (slope[None, :] * x + bias[None, :])
    return x + delta, half


@triton.jit
def _tile_slot(
    x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, probe_ptr, stride_probe_n, K,
    vectors_ptr, stride_v, coefficients_ptr, head_ptr, offs_n, mask_n, weight, D,
    MODES: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One slot on the rows of a tile that it owns: project (pass 1), act in registers, lift (pass 2, x from L2)."""
    rank = tl.load(head_ptr + 1)
    b_ptr = vectors_ptr + tl.load(head_ptr + 2).to(tl.int64) * stride_v
    c_ptr = vectors_ptr + tl.load(head_ptr + 3).to(tl.int64) * stride_v
    constants_ptr = coefficients_ptr + tl.load(head_ptr + 4).to(tl.int64) * 8
    weight *= tl.load(constants_ptr + 2)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < rank
    y, square = tile_project(
        x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mask_n, offs_k, mask_k, 0, D, BLOCK_D
    )
    if probe_ptr is not None:
        store_probe(probe_ptr, stride_probe_n, K, y, head_ptr, offs_n, mask_n, offs_k, mask_k)
    alpha, unit, g = act(y, square, weight, head_ptr, constants_ptr, offs_k, mask_k, MODES)
    gain = tl.full(weight.shape, 1.0, tl.float32)
    if KEEP_NORM & MODES:
        if tl.load(head_ptr + 6) != 0:
            after = tl.zeros(weight.shape, tl.float32)
            for d in range(0, D, BLOCK_D):
                moved, half = tile_moved(
                    x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, head_ptr, c_ptr, stride_v, g, alpha, unit,
                    offs_n, mask_n, offs_k, mask_k, d + tl.arange(0, BLOCK_D), D, MODES,
                )  # fmt: skip
                after += tl.sum(moved * moved, axis=1)
            gain = restore(square, after)
    for d in range(0, D, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        moved, half = tile_moved(
            x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, head_ptr, c_ptr, stride_v, g, alpha, unit,
            offs_n, mask_n, offs_k, mask_k, offs_d, D, MODES,
        )  # fmt: skip
        mask = mask_n[:, None] & (offs_d < D)[None, :]
        out = (gain[:, None] * moved - half).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs_n[:, None] * stride_out_n + offs_d[None, :], out, mask=mask)


@triton.jit
def store_probe(probe_ptr, stride_probe_n, K, y, head_ptr, offs_n, mask_n, offs_k, mask_k):
    """What a slot projected, its first K numbers; nothing for ADD (1) and AFFINE (128), which project nothing."""
    mode = tl.zeros_like(offs_k) + tl.load(head_ptr)
    seen = mask_n[:, None] & (mask_k & (offs_k < K) & (mode != 1) & (mode != 128))[None, :]
    tl.store(probe_ptr + offs_n[:, None] * stride_probe_n + offs_k[None, :], y, mask=seen)


@kernel
def _tiles_kernel(
    x_ptr, stride_x_n,
    hidden_ptr, stride_hidden_n,
    out_ptr, stride_out_n,
    probe_ptr, stride_probe_n, K,
    vectors_ptr, stride_v,
    coefficients_ptr,
    slots_ptr, S,
    rows_ptr, stride_rows_n,
    scale_ptr, stride_scale_n,
    N, D,
    MODES: tl.constexpr, IN_PLACE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    owner, weight = owners_of(slots_ptr, S, rows_ptr, stride_rows_n, scale_ptr, stride_scale_n, offs_n, mask_n)
    leave_rows(x_ptr, stride_x_n, out_ptr, stride_out_n, owner, offs_n, mask_n, 0, D, IN_PLACE, BLOCK_D)
    slot = tl.max(owner, axis=0)
    while slot >= 0:  # once per distinct owner of the tile
        _tile_slot(
            x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, probe_ptr, stride_probe_n, K,
            vectors_ptr, stride_v, coefficients_ptr, slots_ptr + slot * 8, offs_n, owner == slot, weight, D,
            MODES, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        owner = tl.where(owner == slot, -1, owner)
        slot = tl.max(owner, axis=0)


def launch_tiles(edit: Edit) -> None:
    """One slot per token: a column of the tables."""
    x, rank = edit.x, edit.max_rank
    block_n, block_k = choose(tuned("subspace_tiles.TILE_ROWS", TILE_ROWS, x), rank), power_of_two(rank, TILE_RANK)
    step, warps = choose(tuned("subspace_tiles.TILE_STEP", TILE_STEP, x), rank)
    stages = tuned("subspace_tiles.TILE_STAGES", TILE_STAGES, x)
    choices = [(step, stages), (step, 2), (MIN_STEP, 2), (MIN_STEP, 1)]
    need = partial(tile_bytes, edit, block_n, block_k)
    block_d, stages = fitting(choices, lambda one: max(need(*one), need(*one, lifts=True)), x)
    _tiles_kernel[(triton.cdiv(x.shape[0], block_n),)](
        **edit.reads(), **edit.writes(),
        N=x.shape[0], BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_K=block_k,
        num_warps=warps_of(warps, x), num_stages=stages,
    )  # fmt: skip
