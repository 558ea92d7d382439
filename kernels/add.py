"""Add: x + scale · vectors[rows]; and the same between a residual add and the RMSNorm after it.

Bytes a token: `add` reads |x|·d and one vector per owner (from L2) and writes |x|·d; `add_rms_norm` reads and writes
2·|x|·d. A token whose entries are all -1 is not written in place and copied bit for bit out of place; one that names a
vector outside the bank becomes NaN. Turner et al. 2023
(ActAdd), Rimsky et al. 2024 (CAA), Zhang & Sennrich 2019 (RMSNorm).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._launch import blocks_of, choose, flatten, kernel, on_device, power_of_two, stride, width, written
from ._tuned import tuned

BLOCK_D = 1024  # columns per program: enough programs for a few rows, 16 bytes per thread and load in bf16
NORM_WARPS = [(1024, 4), (4096, 8), (16384, 16)]  # (largest d, warps): a whole row in registers


@triton.jit
def _vector(vectors_ptr, stride_v, slot, S, offs_d, D):
    """A row of the bank in float32, NaN for a number outside it: no stray read, no wait for the host."""
    inside = (slot >= 0) & (slot < S)
    row_ptr = vectors_ptr + slot.to(tl.int64) * stride_v
    vector = tl.load(row_ptr + offs_d, mask=offs_d < tl.where(inside, D, 0), other=0.0)
    return tl.where(inside, vector.to(tl.float32), float("nan"))


@kernel
def _add_kernel(
    x_ptr, stride_x_n,
    out_ptr, stride_out_n,
    vectors_ptr, stride_v,
    rows_ptr, stride_rows_n, stride_rows_p,
    scale_ptr, stride_scale_n, stride_scale_p,
    S, D, P: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK_D: tl.constexpr,
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
        vector = _vector(vectors_ptr, stride_v, slot, S, offs_d, D)
        x = tl.where(slot == -1, x, x + weight * vector)
        edited = edited | (slot != -1)
    if IN_PLACE:
        tl.store(out_ptr + i_n * stride_out_n + offs_d, x.to(original.dtype), mask=mask_d & edited)
    else:
        out = tl.where(edited, x.to(original.dtype), original)
        tl.store(out_ptr + i_n * stride_out_n + offs_d, out, mask=mask_d)


def add(x: Tensor, vectors: Tensor, rows: Tensor | None, scale: Tensor | None, out: Tensor) -> Tensor:
    """Write x + scale · vectors[rows] into `out`, which may be x itself; rows None: vector 0 for every token."""
    flat, bank = flatten(x), flatten(vectors)
    result = written(out, x, flat)
    n, d = flat.shape
    if n == 0:
        return out
    block_d = min(tuned("add.BLOCK_D", BLOCK_D, x), power_of_two(d))
    with on_device(x):
        _add_kernel[(n, blocks_of(d, block_d))](
            x_ptr=flat, stride_x_n=flat.stride(0),
            out_ptr=result, stride_out_n=result.stride(0),
            vectors_ptr=bank, stride_v=bank.stride(0),
            rows_ptr=rows, stride_rows_n=stride(rows, 0), stride_rows_p=stride(rows, 1),
            scale_ptr=scale, stride_scale_n=stride(scale, 0), stride_scale_p=stride(scale, 1),
            S=bank.shape[0], D=d, P=width(rows), IN_PLACE=flat.data_ptr() == result.data_ptr(),
            BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return out


@kernel
def _add_rms_norm_kernel(
    hidden_ptr, stride_hidden_n,
    residual_ptr, stride_residual_n,
    normed_ptr, stream_ptr,
    weight_ptr,
    vectors_ptr, stride_v,
    rows_ptr, stride_rows_n, stride_rows_p,
    scale_ptr, stride_scale_n, stride_scale_p,
    S, D, eps, OFFSET: tl.constexpr, P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    x = tl.load(residual_ptr + i_n * stride_residual_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    x += tl.load(hidden_ptr + i_n * stride_hidden_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for p in tl.static_range(P):
        slot = tl.full((), 0, tl.int32)
        if rows_ptr is not None:
            slot = tl.load(rows_ptr + i_n * stride_rows_n + p * stride_rows_p)
        gain = 1.0
        if scale_ptr is not None:
            gain = tl.load(scale_ptr + i_n * stride_scale_n + p * stride_scale_p)
        vector = _vector(vectors_ptr, stride_v, slot, S, offs_d, D)
        x = tl.where(slot == -1, x, x + gain * vector)
    stream = x.to(stream_ptr.dtype.element_ty)
    tl.store(stream_ptr + i_n * D + offs_d, stream, mask=mask_d)
    x = stream.to(tl.float32)  # the norm of what is stored
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32) + OFFSET
    normed = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * weight
    tl.store(normed_ptr + i_n * D + offs_d, normed.to(normed_ptr.dtype.element_ty), mask=mask_d)


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    vectors: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    eps: float,
    unit_offset: bool,
    normed: Tensor,
    stream: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write stream = hidden + residual + scale · vectors[rows] and its RMSNorm into two contiguous tensors."""
    half, flat, bank = flatten(hidden), flatten(residual), flatten(vectors)
    if flat.numel() == 0:
        return normed, stream
    n, d = flat.shape
    with on_device(residual):
        _add_rms_norm_kernel[(n,)](
            hidden_ptr=half, stride_hidden_n=half.stride(0),
            residual_ptr=flat, stride_residual_n=flat.stride(0),
            normed_ptr=normed, stream_ptr=stream, weight_ptr=weight.contiguous(),
            vectors_ptr=bank, stride_v=bank.stride(0),
            rows_ptr=rows, stride_rows_n=stride(rows, 0), stride_rows_p=stride(rows, 1),
            scale_ptr=scale, stride_scale_n=stride(scale, 0), stride_scale_p=stride(scale, 1),
            S=bank.shape[0], D=d, eps=eps, OFFSET=1.0 if unit_offset else 0.0, P=width(rows),
            BLOCK_D=power_of_two(d), num_warps=choose(tuned("add.NORM_WARPS", NORM_WARPS, residual), d),
        )  # fmt: skip
    return normed, stream
