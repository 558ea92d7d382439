"""Edit a few features of an encoded row and keep its error: x + scale · Σₘ (t(fₘ) - fₘ) · W_dec[m].

fₘ is the value beside feature m among the k selected, 0 where it is not there; t(f) = clip(t₀f + t₁, t₂, t₃).
Bytes a token: reads |x|·d, 8·k of values and indices and (from L2) |w|·m·d, writes |x|·d; encode, edit and decode done one
by one would move 2·|w|·k·d more. One program per token and block of d: the k values are compared with m numbers in
registers. A row of scale 0 keeps its bits. Bricken et al. 2023, Towards Monosemanticity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import choose, flatten, kernel, on_device, power_of_two

WIDTH = [(64, 256), (1 << 62, 1024)]  # (largest n, columns per program): few tokens want many programs
WARPS = 4


@triton.jit
def change(f, table_ptr):
    """t(f) - f of one feature; NaN, the mark of an overflow, stays."""
    t = tl.load(table_ptr) * f + tl.load(table_ptr + 1)
    t = tl.maximum(t, tl.load(table_ptr + 2), propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(t, tl.load(table_ptr + 3), propagate_nan=tl.PropagateNan.ALL) - f


@kernel
def _edit_kernel(
    x_ptr, stride_x_n,
    values_ptr, stride_values_n,
    indices_ptr, stride_indices_n,
    features_ptr,
    table_ptr,
    w_ptr, stride_w_m,
    scale_ptr,
    out_ptr, stride_out_n,
    D, K, M,
    BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    offs_k = tl.arange(0, BLOCK_K)
    value = tl.load(values_ptr + i_n * stride_values_n + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    index = tl.load(indices_ptr + i_n * stride_indices_n + offs_k, mask=offs_k < K, other=-1)
    delta = tl.zeros((BLOCK_D,), tl.float32)
    w_ptrs = w_ptr + offs_d
    for m in range(M):
        found = (index == tl.load(features_ptr + m)).to(tl.float32)
        f = tl.sum(value * found, axis=0)  # a product: NaN, the mark of an overflow, reaches the row
        delta += change(f, table_ptr + 4 * m) * tl.load(w_ptrs, mask=mask_d, other=0.0).to(tl.float32)
        w_ptrs += stride_w_m
    x = tl.load(x_ptr + i_n * stride_x_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + i_n)
        out = tl.where(scale == 0, x, x + scale * delta)
    else:
        out = x + delta
    tl.store(out_ptr + i_n * stride_out_n + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


def sae_edit(
    x: Tensor, values: Tensor, indices: Tensor, features: Tensor, table: Tensor, w_dec: Tensor, scale: Tensor | None
) -> Tensor:
    """The edited rows (..., d) in the dtype of x; features (m,), table (m, 4), w_dec (m, d), scale (n,) or (n, 1)."""
    rows, flat, places, weights = flatten(x), flatten(values), flatten(indices), flatten(w_dec)
    (n, d), k = rows.shape, flat.shape[1]
    out = torch.empty(n, d, dtype=x.dtype, device=x.device)
    if n:
        block_d = min(choose(WIDTH, n), power_of_two(d))
        with on_device(x):
            _edit_kernel[(n, -(-d // block_d))](
                x_ptr=rows, stride_x_n=rows.stride(0),
                values_ptr=flat, stride_values_n=flat.stride(0),
                indices_ptr=places, stride_indices_n=places.stride(0),
                features_ptr=features.contiguous(),
                table_ptr=table.contiguous(),
                w_ptr=weights, stride_w_m=weights.stride(0),
                scale_ptr=None if scale is None else scale.reshape(-1),
                out_ptr=out, stride_out_n=out.stride(0),
                D=d, K=k, M=weights.shape[0],
                BLOCK_D=block_d, BLOCK_K=power_of_two(k), num_warps=WARPS,
            )  # fmt: skip
    return out.view(x.shape)
