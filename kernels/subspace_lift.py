"""Second half of project → act → lift by tiles: x' = s·x + unit·(C·g) on blocks of tokens × columns, on tensor cores.

Where the first half left partial sums, each program adds them in one fixed order, so that the result does not depend on
timing, and acts. Where a slot restores lengths the kernel is launched twice: for the squared lengths of the moved rows, then
to write them.
Bytes: x once, C once per tile and owner and g once per block (from L2), writes x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import kernel
from .act import AFFINE, COUPLED, KEEP_NORM, act, mode_of, restore
from .owners import leave_rows, next_owner, owners_of
from .subspace_act import added, store_probe


@triton.jit
def _product(
    g_ptr, size, c_ptr, stride_v, offs_n, mask_n, offs_d, mask_d, rank, WIDTH: tl.constexpr, STEP_K: tl.constexpr
):
    """C·g of a block, in steps of directions, of which neither g nor C is kept."""
    lift = tl.zeros((offs_n.shape[0], offs_d.shape[0]), tl.float32)
    for k in range(0, WIDTH, STEP_K):
        offs_k = k + tl.arange(0, STEP_K)
        c = tl.load(
            c_ptr + offs_k[:, None] * stride_v + offs_d[None, :],
            mask=(offs_k < rank)[:, None] & mask_d[None, :],
            other=0.0,
        )
        part_ptr = g_ptr + offs_n[:, None] * WIDTH + offs_k[None, :]
        lift = tl.dot(tl.load(part_ptr, mask=mask_n[:, None], other=0.0), c, lift, input_precision="ieee")
        if c.dtype != tl.float32:
            lift = tl.dot(tl.load(part_ptr + size, mask=mask_n[:, None], other=0.0), c, lift)
    return lift


@triton.jit
def _walk(
    x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, c_ptr, stride_v,
    high, low, g_ptr, size, alpha, unit, gain, offs_n, mask_n, offs_k, rank, first, last,
    backwards, IS_AFFINE: tl.constexpr, MEASURES: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    STEP_K: tl.constexpr,
):  # fmt: skip
    """Write x' of a tile from column first to last, or from last to first; or, where it MEASURES, only sum its squares.

    x' = gain·(s·x + unit·(C·g)), g in two parts where C has 16 bits, or gain·(x + unit·(C₀ ⊙ x + C₁)).
    """
    after = tl.zeros(alpha.shape, tl.float32)
    turn = first + first + (last - first - 1) // BLOCK_D * BLOCK_D
    for d in tl.range(first, last, BLOCK_D, num_stages=STAGES):
        offs_d = tl.where(backwards, turn - d, d) + tl.arange(0, BLOCK_D)
        mask_d = offs_d < last
        mask = mask_n[:, None] & mask_d[None, :]
        if STEP_K > 0 and not IS_AFFINE:
            lift = _product(g_ptr, size, c_ptr, stride_v, offs_n, mask_n, offs_d, mask_d, rank, offs_k.shape[0], STEP_K)
        x = tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
        half = tl.zeros_like(x)
        if hidden_ptr is not None:
            half = tl.load(hidden_ptr + offs_n[:, None] * stride_hidden_n + offs_d[None, :], mask=mask, other=0.0).to(
                tl.float32
            )
        x += half
        if IS_AFFINE:
            slope = tl.load(c_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            bias = tl.load(c_ptr + stride_v + offs_d, mask=mask_d, other=0.0).to(tl.float32)
            moved = x + unit[:, None] * (slope[None, :] * x + bias[None, :])
        else:
            if STEP_K == 0:
                mask_c = (offs_k < rank)[:, None] & mask_d[None, :]
                c = tl.load(c_ptr + offs_k[:, None] * stride_v + offs_d[None, :], mask=mask_c, other=0.0)
                lift = tl.dot(high, c, input_precision="ieee")
                if c.dtype != tl.float32:
                    lift = tl.dot(low, c, lift)
            moved = alpha[:, None] * x + unit[:, None] * lift
        if MEASURES:
            after += tl.sum(tl.where(mask_d[None, :], moved * moved, 0.0), axis=1)
        else:
            out = (gain[:, None] * moved - half).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + offs_n[:, None] * stride_out_n + offs_d[None, :], out, mask=mask)
    return after


@triton.jit
def walk(
    x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, c_ptr, stride_v,
    high, low, g_ptr, size, alpha, unit, gain, offs_n, mask_n, offs_k, rank, first, last, mode,
    backwards, MODES: tl.constexpr, MEASURES: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    STEP_K: tl.constexpr,
):  # fmt: skip
    """`_walk` of a slot of this mode."""
    if (AFFINE & MODES) and mode == AFFINE:
        after = _walk(
            x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, c_ptr, stride_v,
            high, low, g_ptr, size, alpha, unit, gain, offs_n, mask_n, offs_k, rank, first, last,
            backwards, True, MEASURES, BLOCK_D, STAGES, STEP_K,
        )  # fmt: skip
    else:
        after = _walk(
            x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, c_ptr, stride_v,
            high, low, g_ptr, size, alpha, unit, gain, offs_n, mask_n, offs_k, rank, first, last,
            backwards, False, MEASURES, BLOCK_D, STAGES, STEP_K,
        )  # fmt: skip
    return after


@kernel
def lift_kernel(
    x_ptr, stride_x_n,
    hidden_ptr, stride_hidden_n,
    out_ptr, stride_out_n,
    probe_ptr, stride_probe_n, K,
    vectors_ptr, stride_v,
    coefficients_ptr,
    slots_ptr, S,
    rows_ptr, stride_rows_n,
    scale_ptr, stride_scale_n,
    y_ptr, g_ptr, numbers_ptr, square_ptr,  # as the first half leaves them
    after_ptr,  # float32 (blocks of columns, N): squared lengths of moved rows, or absent
    N, D,
    SPLITS: tl.constexpr, MODES: tl.constexpr, IN_PLACE: tl.constexpr, MEASURES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
    STEP_K: tl.constexpr,  # directions of a step; 0: g of the tile is kept, and all of them are one
):  # fmt: skip
    """A tile of tokens × columns of x', or the squared lengths of its rows."""
    i_c = tl.program_id(1)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    first, last = i_c * COLUMNS, tl.minimum((i_c + 1) * COLUMNS, D)
    owner, weight = owners_of(slots_ptr, S, rows_ptr, stride_rows_n, scale_ptr, stride_scale_n, offs_n, mask_n)
    owned = owner >= 0
    place = offs_n[:, None] * BLOCK_K + offs_k[None, :]
    size = N.to(tl.int64) * BLOCK_K
    if not MEASURES:
        if tl.program_id(2) == 0:
            leave_rows(
                x_ptr,
                stride_x_n,
                out_ptr,
                stride_out_n,
                owner,
                offs_n,
                mask_n,
                first,
                last,
                -1 if IN_PLACE else 0,
                BLOCK_D,
            )
    owner, slot = next_owner(owner, tl.max(owner, axis=0), tl.program_id(2))
    if slot >= 0:
        square = tl.zeros((BLOCK_N,), tl.float32)
        if (COUPLED | KEEP_NORM) & MODES:
            square = added(square_ptr + offs_n, N, owned, SPLITS)
        if g_ptr is None:
            y = added(y_ptr + place, size, owned[:, None], SPLITS)
        while slot >= 0:  # once per distinct owner of the tile
            head_ptr = slots_ptr + slot * 8
            mine = owner == slot
            mode = mode_of(head_ptr, MODES)
            rank = tl.load(head_ptr + 1)
            mask_k = offs_k < rank
            c_ptr = vectors_ptr + tl.load(head_ptr + 3).to(tl.int64) * stride_v
            if g_ptr is None:
                constants_ptr = coefficients_ptr + tl.load(head_ptr + 4).to(tl.int64) * 8
                if probe_ptr is not None:
                    if (i_c == 0) & (not MEASURES):
                        store_probe(probe_ptr, stride_probe_n, K, y, head_ptr, offs_n, mine, offs_k, mask_k)
                strength = weight * tl.load(constants_ptr + 2)
                alpha, unit, g = act(y, square, strength, head_ptr, constants_ptr, offs_k, mask_k, MODES)
                high = g.to(vectors_ptr.dtype.element_ty)
                low = (g - high.to(tl.float32)).to(high.dtype)
            else:
                alpha = tl.load(numbers_ptr + offs_n, mask=mine, other=1.0)
                unit = tl.load(numbers_ptr + N + offs_n, mask=mine, other=0.0)
                high = alpha  # unused where g is read in steps
                if STEP_K == 0:
                    high = tl.load(g_ptr + place, mask=mine[:, None], other=0.0)
                low = high
                if STEP_K == 0 and vectors_ptr.dtype.element_ty != tl.float32:
                    low = tl.load(g_ptr + size + place, mask=mine[:, None], other=0.0)
            gain = tl.full(alpha.shape, 1.0, tl.float32)
            stop = last
            if KEEP_NORM & MODES:
                keep = tl.load(head_ptr + 6)
                if MEASURES:
                    stop = tl.where(keep != 0, last, first)
                elif keep != 0:
                    gain = restore(square, added(after_ptr + offs_n, N, mine, tl.num_programs(1)))
            after = walk(
                x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, out_ptr, stride_out_n, c_ptr, stride_v,
                high, low, g_ptr, size, alpha, unit, gain, offs_n, mine, offs_k, rank, first, stop, mode,
                False, MODES, MEASURES, BLOCK_D, STAGES, STEP_K,
            )  # fmt: skip
            if MEASURES:
                tl.store(after_ptr + i_c * N + offs_n, after, mask=mine)
            owner, slot = next_owner(owner, slot, tl.num_programs(2))
