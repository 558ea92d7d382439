"""Sparse decode: Σⱼ values[j] · W_dec[indices[j]] + b_dec.

Bytes a token: reads |w|·k·d gathered rows and 8·k of values and indices, writes |w|·d. One program per token and block
of d, so that a single token still fills many programs; a row of W_dec beside a zero value is not read. A row whose
index lies outside [0, F) beside a value becomes NaN: no stray read, no wait for the host. Gao et al. 2024
(arXiv:2406.04093).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import choose, flatten, on_device, power_of_two

WIDTH = [(64, 256), (1 << 62, 1024)]  # (largest n, columns per program): few tokens want many programs
CHUNK = 8  # rows of W_dec in flight per step
WARPS = 4


@triton.jit
def _decode_kernel(
    values_ptr, stride_values_n,
    indices_ptr, stride_indices_n,
    w_ptr, stride_w_f,
    b_ptr,
    out_ptr, stride_out_n,
    F, D, K,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    parts = tl.zeros((CHUNK, BLOCK_D), tl.float32)
    for j in range(0, K, CHUNK):
        offs_k = j + tl.arange(0, CHUNK)
        mask_k = offs_k < K
        value = tl.load(values_ptr + i_n * stride_values_n + offs_k, mask=mask_k, other=0.0).to(tl.float32)
        index = tl.load(indices_ptr + i_n * stride_indices_n + offs_k, mask=mask_k, other=0)
        active = value != 0
        inside = (index >= 0) & (index < F)
        value = tl.where(active & ~inside, float("nan"), value)
        mask = (active & inside)[:, None] & mask_d[None, :]
        w = tl.load(w_ptr + index[:, None].to(tl.int64) * stride_w_f + offs_d[None, :], mask=mask, other=0.0)
        parts += value[:, None] * w.to(tl.float32)
    out = tl.sum(parts, axis=0)
    if b_ptr is not None:
        out += tl.load(b_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    tl.store(out_ptr + i_n * stride_out_n + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


def sae_decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """The reconstruction (..., d) in the dtype of w_dec."""
    flat, places, weights = flatten(values), flatten(indices), flatten(w_dec)
    bias = None if b_dec is None else b_dec.contiguous()
    (n, k), (features, d) = flat.shape, weights.shape
    out = torch.empty(n, d, dtype=weights.dtype, device=weights.device)
    if n:
        block_d = min(choose(WIDTH, n), power_of_two(d))
        with on_device(weights):
            _decode_kernel[(n, triton.cdiv(d, block_d))](
                values_ptr=flat, stride_values_n=flat.stride(0),
                indices_ptr=places, stride_indices_n=places.stride(0),
                w_ptr=weights, stride_w_f=weights.stride(0),
                b_ptr=bias,
                out_ptr=out, stride_out_n=out.stride(0),
                F=features, D=d, K=k,
                BLOCK_D=block_d, CHUNK=min(CHUNK, power_of_two(k)), num_warps=WARPS,
            )  # fmt: skip
    return out.view(*values.shape[:-1], d)
