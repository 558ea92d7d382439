"""Add: x + scale · vectors[rows].

Bytes a token: reads |x|·d and one vector per owner (from L2), writes |x|·d. A token whose entries are all -1 is not
written in place and copied bit for bit out of place. Turner et al. 2023 (ActAdd), Rimsky et al. 2024 (CAA).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import columns, flatten, on_device, power_of_two, stride

BLOCK_D = 1024  # columns per program: enough programs for a few rows, 16 bytes per thread and load in bf16


@triton.jit
def _add_kernel(
    x_ptr, stride_x_n,
    out_ptr, stride_out_n,
    vectors_ptr, stride_v,
    rows_ptr, stride_rows_n, stride_rows_p,
    scale_ptr, stride_scale_n, stride_scale_p,
    D, P: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    original = tl.load(x_ptr + i_n * stride_x_n + offs_d, mask=mask_d, other=0.0)
    x = original.to(tl.float32)
    edited = tl.full((), 0, tl.int1)
    for p in tl.static_range(P):
        slot = tl.full((), 0, tl.int32)
        if rows_ptr is not None:
            slot = tl.load(rows_ptr + i_n * stride_rows_n + p * stride_rows_p)
        weight = 1.0
        if scale_ptr is not None:
            weight = tl.load(scale_ptr + i_n * stride_scale_n + p * stride_scale_p)
        owned = slot >= 0
        vector_ptr = vectors_ptr + tl.maximum(slot, 0).to(tl.int64) * stride_v
        vector = tl.load(vector_ptr + offs_d, mask=mask_d, other=0.0)
        x = tl.where(owned, x + weight * vector.to(tl.float32), x)
        edited = edited | owned
    if IN_PLACE:
        tl.store(out_ptr + i_n * stride_out_n + offs_d, x.to(original.dtype), mask=mask_d & edited)
    else:
        out = tl.where(edited, x.to(original.dtype), original)
        tl.store(out_ptr + i_n * stride_out_n + offs_d, out, mask=mask_d)


def add(x: Tensor, vectors: Tensor, rows: Tensor | None, scale: Tensor | None, out: Tensor) -> Tensor:
    """Write x + scale · vectors[rows] into `out`, which may be x itself; rows None: vector 0 for every token."""
    flat, result, bank = flatten(x), out.view(-1, out.shape[-1]), flatten(vectors)
    rows = None if rows is None else columns(rows)
    scale = None if scale is None else columns(scale)
    if flat.numel() == 0:
        return out
    n, d = flat.shape
    block_d = min(BLOCK_D, power_of_two(d))
    with on_device(x):
        _add_kernel[(n, triton.cdiv(d, block_d))](
            x_ptr=flat, stride_x_n=flat.stride(0),
            out_ptr=result, stride_out_n=result.stride(0),
            vectors_ptr=bank, stride_v=bank.stride(0),
            rows_ptr=rows, stride_rows_n=stride(rows, 0), stride_rows_p=stride(rows, 1),
            scale_ptr=scale, stride_scale_n=stride(scale, 0), stride_scale_p=stride(scale, 1),
            D=d, P=1 if rows is None else rows.shape[1], IN_PLACE=flat.data_ptr() == result.data_ptr(),
            BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out
