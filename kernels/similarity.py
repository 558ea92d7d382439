"""Similarity of a row with a subspace: ‖Wx‖/‖x‖, or cos(x, tanh(WᵀWx)).

Bytes a token: reads |x|·d, and W (from L2) once or, squashed, twice; writes 4. Lee et al. 2024 (CAST).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._launch import flatten, kernel, on_device, power_of_two

WARPS = 8


@kernel
def _similarity_kernel(
    x_ptr, stride_x_n,
    out_ptr,
    w_ptr, stride_w,
    K, D,
    SQUASH: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    x = tl.load(x_ptr + i_n * stride_x_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    inside = 0.0
    image = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(K):
        w = tl.load(w_ptr + j * stride_w + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        y = tl.sum(w * x, axis=0)
        inside += y * y
        if SQUASH:
            image += y * w
    square = tl.sum(x * x, axis=0)
    if SQUASH:
        image = 2.0 * tl.sigmoid(2.0 * image) - 1.0
        found = tl.sum(x * image, axis=0) / tl.sqrt(square * tl.sum(image * image, axis=0))
        found = tl.where((found != found) & (square == square) & (square < float("inf")), 0.0, found)
    else:
        found = tl.where(square == 0, 0.0, tl.sqrt(inside / square))
    tl.store(out_ptr + i_n, found)


def similarity(x: Tensor, basis: Tensor, squash: bool) -> Tensor:
    """float32 (...,): the similarity of every row of x (..., d) with the orthonormal rows of basis."""
    flat, rows = flatten(x), flatten(basis)
    out = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if flat.numel():
        with on_device(x):
            _similarity_kernel[(flat.shape[0],)](
                x_ptr=flat, stride_x_n=flat.stride(0), out_ptr=out,
                w_ptr=rows, stride_w=rows.stride(0), K=rows.shape[0], D=flat.shape[1],
                SQUASH=squash, BLOCK_D=power_of_two(flat.shape[1]), num_warps=WARPS,
            )  # fmt: skip
    return out
