"""Who owns the rows of a tile, and what becomes of rows that no slot of the bank owns: device functions of the subspace kernels.

A row of -1, or of an empty slot, keeps its bits. A row that names a slot outside the bank becomes NaN: no stray read, no
wait for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owners_of(slots_ptr, S, rows_ptr, stride_rows_n, scale_ptr, stride_scale_n, offs_n, mask_n):
    """The slot that owns each row of a tile, -1 for none or an empty one, -2 for none of the bank; the scale of each row."""
    if rows_ptr is None:
        owner = tl.where(mask_n, 0, -1)
    else:
        owner = tl.load(rows_ptr + offs_n * stride_rows_n, mask=mask_n, other=-1)
    inside = (owner >= 0) & (owner < S)
    rank = tl.load(slots_ptr + owner * 8 + 1, mask=inside, other=0)
    owner = tl.where(rank > 0, owner, tl.where(inside | (owner == -1), -1, -2))
    weight = tl.full(owner.shape, 1.0, tl.float32)
    if scale_ptr is not None:
        weight = tl.load(scale_ptr + offs_n * stride_scale_n, mask=mask_n, other=1.0)
    return owner, weight


@triton.jit
def leave_rows(
    x_ptr, stride_x_n, out_ptr, stride_out_n, owner, offs_n, mask_n, first, last, limit,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows whose owner is below `limit`: 0 for all without an edit, bit for bit, -1 for those of no slot, which become NaN."""
    left = mask_n & (owner < limit)
    if tl.max(left.to(tl.int32), axis=0) > 0:
        for d in range(first, last, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            mask = left[:, None] & (offs_d < last)[None, :]
            x = tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :], mask=mask)
            x = tl.where((owner < -1)[:, None], float("nan"), x)
            tl.store(out_ptr + offs_n[:, None] * stride_out_n + offs_d[None, :], x, mask=mask)


@triton.jit
def next_owner(owner, slot, times):
    """Owners of a tile without `slot` and those behind it, `times` of them in all, and the next in line: -1 if none is."""
    for _ in range(times):
        owner = tl.where(owner == slot, -1, owner)
        slot = tl.max(owner, axis=0)
    return owner, slot
