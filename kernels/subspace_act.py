"""From y to what a lift needs, a tile of tokens at a time: s, unit and g of each, in numbers that a product takes.

Where y is in partial sums, `act_kernel` adds them in one fixed order, acts and leaves g: a launch of its own between the two
products of a large rank, so that neither has to hold all directions at once.
Bytes a token: 4·k of y and split, 2·2·k of g in 16 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import kernel
from .act import COUPLED, KEEP_NORM, act
from .owners import next_owner, owners_of


@triton.jit
def store_probe(probe_ptr, stride_probe_n, K, y, head_ptr, offs_n, mask_n, offs_k, mask_k):
    """What a slot projected, its first K numbers; nothing for ADD (1) and AFFINE (128), which project nothing."""
    mode = tl.zeros_like(offs_k) + tl.load(head_ptr)
    seen = mask_n[:, None] & (mask_k & (offs_k < K) & (mode != 1) & (mode != 128))[None, :]
    tl.store(probe_ptr + offs_n[:, None] * stride_probe_n + offs_k[None, :], y, mask=seen)


@triton.jit
def added(first_ptr, step, mask, parts):
    """Partial sums of a tile, one after another."""
    total = tl.load(first_ptr, mask=mask, other=0.0)
    for i_s in range(1, parts):
        total += tl.load(first_ptr + i_s * step, mask=mask, other=0.0)
    return total


@triton.jit
def leave_g(
    y, square, weight, head_ptr, coefficients_ptr, probe_ptr, stride_probe_n, K, g_ptr, numbers_ptr, N,
    offs_n, mine, offs_k, mask_k, MODES: tl.constexpr,
):  # fmt: skip
    """Act on the rows of a tile that are `mine`, and store their s, unit and g of all directions."""
    if probe_ptr is not None:
        store_probe(probe_ptr, stride_probe_n, K, y, head_ptr, offs_n, mine, offs_k, mask_k)
    constants_ptr = coefficients_ptr + tl.load(head_ptr + 4).to(tl.int64) * 8
    strength = weight * tl.load(constants_ptr + 2)
    alpha, unit, g = act(y, square, strength, head_ptr, constants_ptr, offs_k, mask_k, MODES)
    tl.store(numbers_ptr + offs_n, alpha, mask=mine)
    tl.store(numbers_ptr + N + offs_n, unit, mask=mine)
    place = offs_n[:, None] * offs_k.shape[0] + offs_k[None, :]
    high = g.to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + place, high, mask=mine[:, None])
    if g_ptr.dtype.element_ty != tl.float32:  # 16 bits in two parts: the leading ones and what they leave out
        size = N.to(tl.int64) * offs_k.shape[0]
        tl.store(g_ptr + size + place, (g - high.to(tl.float32)).to(high.dtype), mask=mine[:, None])


@kernel
def act_kernel(
    probe_ptr, stride_probe_n, K,
    coefficients_ptr,
    slots_ptr, S,
    rows_ptr, stride_rows_n,
    scale_ptr, stride_scale_n,
    y_ptr, g_ptr, numbers_ptr, square_ptr,  # as `project_kernel` has and leaves them
    N,
    PARTS: tl.constexpr, MODES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g of a tile, from its partial sums."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    owner, weight = owners_of(slots_ptr, S, rows_ptr, stride_rows_n, scale_ptr, stride_scale_n, offs_n, mask_n)
    owned = owner >= 0
    slot = tl.max(owner, axis=0)
    if slot >= 0:
        place = offs_n[:, None] * BLOCK_K + offs_k[None, :]
        y = added(y_ptr + place, N.to(tl.int64) * BLOCK_K, owned[:, None], PARTS)
        square = tl.zeros((BLOCK_N,), tl.float32)
        if (COUPLED | KEEP_NORM) & MODES:
            square = added(square_ptr + offs_n, N, owned, PARTS)
            tl.store(square_ptr + offs_n, square, mask=owned)  # in place of the first part: what a lift restores
        while slot >= 0:  # once per distinct owner of the tile
            head_ptr = slots_ptr + slot * 8
            leave_g(
                y, square, weight, head_ptr, coefficients_ptr, probe_ptr, stride_probe_n, K, g_ptr, numbers_ptr, N,
                offs_n, owner == slot, offs_k, offs_k < tl.load(head_ptr + 1), MODES,
            )  # fmt: skip
            owner, slot = next_owner(owner, slot, 1)
