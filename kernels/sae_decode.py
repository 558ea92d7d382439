"""Sparse decode, Σⱼ values[j] · W_dec[indices[j]] + b_dec, and the same sum added to the stream, x + scale · Σⱼ.

Bytes a token: reads |w|·k·d gathered rows and 8·k of values and indices (and |x|·d where it is added), writes |w|·d.
One program per token and block of d, so that a single token still fills many programs; a row of W_dec beside a zero value
is not read. A row whose index lies outside [0, F) beside a value becomes NaN: no stray read, no wait for the host. A row
of scale 0 keeps its bits. Gao et al. 2024 (arXiv:2406.04093).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._launch import blocks_of, choose, flatten, kernel, on_device, power_of_two
from ._tuned import tuned

WIDTH = [(64, 256), (1 << 62, 1024)]  # (largest n, columns per program): few tokens want many programs
CHUNK = 8  # rows of W_dec in flight per step
WARPS = 4


@kernel
def _decode_kernel(
    values_ptr, stride_values_n,
    indices_ptr, stride_indices_n,
    w_ptr, stride_w_f,
    b_ptr,
    x_ptr, stride_x_n,
    scale_ptr,
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
    if x_ptr is not None:
        x = tl.load(x_ptr + i_n * stride_x_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + i_n)
            out = tl.where(scale == 0, x, x + scale * out)
        else:
            out += x
    tl.store(out_ptr + i_n * stride_out_n + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


def sae_decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """The reconstruction (..., d) in the dtype of w_dec."""
    out = torch.empty(*values.shape[:-1], w_dec.shape[1], dtype=w_dec.dtype, device=w_dec.device)
    return _launch(values, indices, w_dec, None if b_dec is None else b_dec.contiguous(), None, None, out)


def sae_add(x: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale · reconstruction, (..., d) in the dtype of x; scale (n,) or (n, 1)."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _launch(values, indices, w_dec, None, flatten(x), None if scale is None else scale.reshape(-1), out)


def _launch(
    values: Tensor,
    indices: Tensor,
    w_dec: Tensor,
    bias: Tensor | None,
    x: Tensor | None,
    scale: Tensor | None,
    out: Tensor,
) -> Tensor:
    flat, places, weights, rows = flatten(values), flatten(indices), flatten(w_dec), out.view(-1, out.shape[-1])
    (n, k), (features, d) = flat.shape, weights.shape
    if n:
        block_d = min(choose(tuned("sae_decode.WIDTH", WIDTH, weights), n), power_of_two(d))
        with on_device(weights):
            _decode_kernel[(n, blocks_of(d, block_d))](
                values_ptr=flat, stride_values_n=flat.stride(0),
                indices_ptr=places, stride_indices_n=places.stride(0),
                w_ptr=weights, stride_w_f=weights.stride(0),
                b_ptr=bias,
                x_ptr=x, stride_x_n=0 if x is None else x.stride(0),
                scale_ptr=scale,
                out_ptr=rows, stride_out_n=rows.stride(0),
                F=features, D=d, K=k,
                BLOCK_D=block_d, CHUNK=min(tuned("sae_decode.CHUNK", CHUNK, weights), power_of_two(k)),
                num_warps=tuned("sae_decode.WARPS", WARPS, weights),
            )  # fmt: skip
    return out
