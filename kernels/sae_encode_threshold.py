"""f = h·[h > θ], h = x W_encᵀ + b_enc, as sorted lists without the (n, F) matrix: JumpReLU, BatchTopK at inference, ReLU.

Bytes: reads |w|·F·d once per group of rows and |x|·n·d from L2, writes 8 bytes per active feature, where the full matrix
takes 2·n·F or more. Each tile of features appends its active entries as int64 keys (float32 bits, inverted index) to
their rows: it counts them, takes room for all of them with one atomic per row, and places each by a prefix sum over the
tile, so a tile without any costs the product alone. The order of arrival varies, the sorted keys do not. A second launch
sorts each row in registers and writes values and indices; above 1024 of them PyTorch sorts in between. A row that needs more than
`capacity` becomes NaN with its true count: nothing is cut off in silence, and nothing waits for the host. A row does not
depend on its batch-mates, as in `sae_encode`. Rajamanoharan et al. 2024 (arXiv:2407.14435).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._launch import kernel, on_device, power_of_two
from .sae_select import SELECT, SELECT_WARPS, store
from .sae_tiles import place, product_arguments, tile_bits


@kernel
def _threshold_kernel(
    x_ptr, stride_x_n,
    w_ptr, stride_w_f, stride_w_d,
    b_ptr,
    threshold_ptr,
    keys_ptr,
    counts_ptr,
    N, F, D, TILES_F, CAPACITY,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    i_n, i_f = place(N, TILES_F, BLOCK_N, GROUP)
    offs_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    bits = tile_bits(
        x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, mask_n, offs_f, offs_f < F, D, BLOCK_D, WIDEN
    )
    threshold = tl.load(threshold_ptr + offs_f, mask=offs_f < F, other=0.0).to(tl.float32)
    silent = bits.to(tl.float32, bitcast=True) <= threshold[None, :]  # NaN is active
    bits = tl.where(silent | ~mask_n[:, None], 0, bits)
    # a lane of Hopper's accumulator holds columns 8i + 2q and 8i + 2q + 1 of a row: each q is searched by itself
    bits = tl.permute(tl.reshape(bits, (BLOCK_N, BLOCK_F // 8, 4, 2)), (0, 2, 1, 3))
    bits = tl.reshape(bits, (BLOCK_N, 4, BLOCK_F // 4))
    active = tl.sum((bits > 0).to(tl.int32), axis=2)  # (BLOCK_N, 4)
    most = tl.max(tl.max(active, axis=1), axis=0)
    if most > 0:
        rows = offs_n[:, None]
        quarter = i_f * BLOCK_F + 2 * tl.arange(0, 4)[None, :]
        start = tl.atomic_add((counts_ptr + rows) + tl.zeros_like(quarter), active, mask=active > 0)
        places = tl.arange(0, BLOCK_F // 4)[None, None, :]
        for j in range(most):
            value, taken = tl.max(bits, axis=2, return_indices=True)
            index = quarter + taken // 2 * 8 + taken % 2
            key = (value.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
            tl.store(keys_ptr + rows * CAPACITY + start + j, key, mask=(j < active) & (start + j < CAPACITY))
            bits = tl.where(places == taken[:, :, None], 0, bits)


@kernel
def _sort_kernel(
    keys_ptr,
    counts_ptr,
    values_ptr, indices_ptr,
    CAPACITY,
    SORTED: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CAPACITY
    count = tl.load(counts_ptr + i_n)
    offs = i_n * CAPACITY + offs_c
    if count > CAPACITY:
        tl.store(values_ptr + offs, tl.full((BLOCK_C,), float("nan"), tl.float32), mask=mask_c)
        tl.store(indices_ptr + offs, tl.zeros((BLOCK_C,), tl.int32), mask=mask_c)
    else:
        keys = tl.load(keys_ptr + offs, mask=offs_c < count, other=0)
        if not SORTED:
            keys = tl.sort(keys, 0, descending=True)
        store(keys, values_ptr + offs, indices_ptr + offs, mask_c)


def sae_encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(values float32, indices int32), both (..., capacity), and counts int32 (...); too many active: NaN and the count."""
    arguments, programs = product_arguments(x, w_enc, b_enc)
    n, rows, device = arguments["N"], x.shape[:-1], x.device
    values = torch.empty(*rows, capacity, dtype=torch.float32, device=device)
    indices = torch.empty(*rows, capacity, dtype=torch.int32, device=device)
    counts = torch.zeros(rows, dtype=torch.int32, device=device)
    if not n:
        return values, indices, counts
    room = torch.zeros if capacity > SELECT else torch.empty
    keys = room(n, capacity, dtype=torch.int64, device=device)
    with on_device(x):
        _threshold_kernel[(programs,)](
            **arguments, threshold_ptr=threshold.contiguous(), keys_ptr=keys, counts_ptr=counts, CAPACITY=capacity
        )
        if capacity > SELECT:
            keys = keys.sort(dim=1, descending=True).values
        block_c = min(power_of_two(capacity, at_least=2), SELECT)
        _sort_kernel[(n, -(-capacity // block_c))](
            keys_ptr=keys, counts_ptr=counts,
            values_ptr=values, indices_ptr=indices,
            CAPACITY=capacity,
            SORTED=capacity > SELECT, BLOCK_C=block_c, num_warps=SELECT_WARPS,
        )  # fmt: skip
    return values, indices, counts
