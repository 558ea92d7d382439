"""f = h·[h > θ], h = x W_encᵀ + b_enc, as sorted lists without the (n, F) matrix: JumpReLU, BatchTopK at inference, ReLU.

Bytes: reads |w|·F·d once per group of rows and |x|·n·d from L2, writes 8 bytes per active feature, where the full matrix
takes 2·n·F or more. Each tile of features appends its active entries as int64 keys (float32 bits, inverted index) to
their rows: it counts them, takes room for all of them with one atomic per row, and hands them over largest first, so a
tile without any costs the product alone. The order of arrival varies, the sorted keys do not. A row that needs more than
`capacity` becomes NaN with its true count: nothing is cut off in silence, and nothing waits for the host. A row does not
depend on its batch-mates, as in `sae_encode`. Rajamanoharan et al. 2024 (arXiv:2407.14435).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._launch import kernel, on_device
from .sae_encode import _best, _place, _tile_bits, product_arguments


@kernel
def _threshold_kernel(
    x_ptr, stride_x_n,
    w_ptr, stride_w_f, stride_w_d,
    b_ptr,
    threshold_ptr,
    keys_ptr,
    counts_ptr,
    N, F, D, TILES_F, CAPACITY,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    i_n, i_f = _place(N, TILES_F, BLOCK_N, GROUP)
    offs_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bits = _tile_bits(
        x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, mask_n, i_f, F, D, BLOCK_F, BLOCK_D
    )
    offs_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    threshold = tl.load(threshold_ptr + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)
    silent = bits.to(tl.float32, bitcast=True) <= threshold[None, :]  # NaN is active
    bits = tl.where(silent | ~mask_n[:, None], 0, bits)
    active = tl.sum((bits > 0).to(tl.int32), axis=1)
    most = tl.max(active, axis=0)
    if most > 0:
        start = tl.atomic_add(counts_ptr + offs_n, active, mask=active > 0)
        places = tl.arange(0, BLOCK_F)[None, :]
        out_ptrs = keys_ptr + offs_n * CAPACITY + start
        for j in range(most):
            place, key = _best(bits, i_f, BLOCK_F)
            tl.store(out_ptrs + j, key, mask=(j < active) & (start + j < CAPACITY))
            bits = tl.where(places == place[:, None], 0, bits)


def sae_encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(values float32, indices int32), both (..., capacity), and counts int32 (...); too many active: NaN and the count."""
    arguments, grid = product_arguments(x, w_enc, b_enc)
    n = arguments["N"]
    keys = torch.zeros(n, capacity, dtype=torch.int64, device=x.device)
    counts = torch.zeros(n, dtype=torch.int32, device=x.device)
    if n:
        with on_device(x):
            _threshold_kernel[grid](
                **arguments, threshold_ptr=threshold.contiguous(), keys_ptr=keys, counts_ptr=counts, CAPACITY=capacity
            )
        keys = keys.sort(dim=1, descending=True).values
    over = (counts > capacity)[:, None]
    values = (keys >> 32).to(torch.int32).view(torch.float32).masked_fill(over, torch.nan)
    indices = torch.where((keys > 0) & ~over, 0x7FFFFFFF - (keys & 0x7FFFFFFF), 0).to(torch.int32)
    shape = (*x.shape[:-1], capacity)
    return values.view(shape), indices.view(shape), counts.view(x.shape[:-1])
