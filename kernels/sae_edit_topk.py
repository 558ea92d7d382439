"""Edit up to eight features of a Top-K SAE and keep its error, without its Top-K: x + scale · Σₘ (t(fₘ) - fₘ) · W_dec[m].

Feature m is among the k selected of a row iff it is positive and fewer than k features exceed it, where NaN exceeds all and
a tie goes to the lower index. So three launches do: the pre-activations of the m features, by the tile of the encoder that
any feature passes through; the encoder's product, whose tiles count for each row and feature what exceeds it; the edit, with
t(f) = clip(t₀f + t₁, t₂, t₃). Bytes: reads |w|·F·d once per group of rows and |x|·n·d from L2, as `sae_encode`, and writes 8·m
a token in place of 8·(F/128)·k'. A count that has reached k decides for good, so a tile whose rows are all decided is not
computed: most features of most rows are decided by a few tiles. The counts are whole numbers, their order of arrival changes
nothing. A row of scale 0 keeps its bits; one whose own list names a feature outside [-1, F) becomes NaN. Gao et al. 2024
(arXiv:2406.04093).
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ._launch import choose, flatten, kernel, on_device, power_of_two
from .sae_edit import WARPS, WIDTH, change
from .sae_tiles import place, product_arguments, tile_bits

COUNT_WARPS = 8
OWN_N = 64  # rows of the tile that holds the features' own pre-activations
NEVER = 0x7FFFFFFE  # what nothing exceeds: stands for a feature that is not positive, or not there


@kernel
def _own_kernel(
    x_ptr, stride_x_n,
    w_ptr, stride_w_f, stride_w_d,
    b_ptr,
    features_ptr, stride_features_n,
    own_ptr, counts_ptr,
    N, F, D, COUNT,
    M: tl.constexpr, ROWS: tl.constexpr, NEVER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """What lies above the bits of each of the M features less one; each row of a tile has M columns of its own."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    inside, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_F)
    offs_n = first + inside
    row, m = columns // M, columns % M
    mask = (row < ROWS) & (first + row < N)
    feature = tl.load(features_ptr + (first + row) * stride_features_n + m, mask=mask & (m < COUNT), other=-1)
    there = (feature >= 0) & (feature < F)
    bits = tile_bits(
        x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, (inside < ROWS) & (offs_n < N),
        tl.where(there, feature, 0), there, D, BLOCK_D, WIDEN,
    )  # fmt: skip
    own = tl.sum(tl.where(inside[:, None] == row[None, :], bits, 0), axis=0)
    out = (first + row) * M + m
    tl.store(own_ptr + out, tl.where(own > 0, own - 1, NEVER), mask=mask)
    tl.store(counts_ptr + out, tl.zeros((BLOCK_F,), tl.int32), mask=mask)


@kernel
def _count_kernel(
    x_ptr, stride_x_n,
    w_ptr, stride_w_f, stride_w_d,
    b_ptr,
    features_ptr, stride_features_n,
    own_ptr, counts_ptr,
    N, F, D, TILES_F, K, COUNT,
    M: tl.constexpr, NEVER: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    i_n, i_f = place(N, TILES_F, BLOCK_N, GROUP)
    first, inside = i_n.to(tl.int64) * BLOCK_N, tl.arange(0, BLOCK_N)
    offs_n = first + inside
    mask_n = offs_n < N
    offs_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    own_ptr += first * M
    counts_ptr += first * M
    features_ptr += first * stride_features_n
    undecided = tl.zeros((BLOCK_N,), tl.int32)
    for m in range(COUNT):
        own = tl.load(own_ptr + m + inside * M, mask=mask_n, other=NEVER)
        count = tl.load(counts_ptr + m + inside * M, mask=mask_n, other=0)
        undecided += ((own < NEVER) & (count < K)).to(tl.int32)
    if tl.max(undecided, axis=0) > 0:
        bits = tile_bits(
            x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, mask_n, offs_f, offs_f < F, D,
            BLOCK_D, WIDEN,
        )  # fmt: skip
        for m in range(COUNT):
            own = tl.load(own_ptr + m + inside * M, mask=mask_n, other=NEVER)
            feature = tl.load(features_ptr + m + inside * stride_features_n, mask=mask_n, other=-1)
            # features before it win a tie, those behind lose it; only its own tile holds some of both
            if tl.max((feature // BLOCK_F == i_f).to(tl.int32), axis=0) > 0:
                behind = (offs_f[None, :] >= feature[:, None]).to(tl.int32)
                exceeds = (bits > own[:, None] + behind) & (offs_f[None, :] != feature[:, None])
                above = tl.sum(exceeds.to(tl.int32), axis=1)
            else:
                least = own + (feature < i_f * BLOCK_F).to(tl.int32)
                above = tl.sum((bits > least[:, None]).to(tl.int32), axis=1)
            tl.atomic_add(counts_ptr + m + inside * M, above, mask=above > 0)


@kernel
def _edit_topk_kernel(
    x_ptr, stride_x_n,
    own_ptr, counts_ptr,
    features_ptr, stride_features_n,
    table_ptr, stride_table_n,
    w_ptr, stride_w_m,
    scale_ptr,
    out_ptr, stride_out_n,
    F, D, K, COUNT,
    M: tl.constexpr, NEVER: tl.constexpr, BY_FEATURE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    features_ptr += i_n * stride_features_n
    table_ptr += i_n * stride_table_n
    delta = tl.zeros((BLOCK_D,), tl.float32)
    for m in range(COUNT):
        own = tl.load(own_ptr + i_n * M + m)
        selected = (own < NEVER) & (tl.load(counts_ptr + i_n * M + m) < K)
        f = tl.where(selected, own + 1, 0).to(tl.float32, bitcast=True)
        g = change(f, table_ptr + 4 * m)
        if BY_FEATURE:
            feature = tl.load(features_ptr + m)
            there = (feature >= 0) & (feature < F)
            g = tl.where(there, g, tl.where(feature == -1, 0.0, float("nan")))
            row_ptr = w_ptr + tl.where(there, feature, 0).to(tl.int64) * stride_w_m
        else:
            row_ptr = w_ptr + m * stride_w_m
        w = tl.load(row_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
        delta += g * w
    x = tl.load(x_ptr + i_n * stride_x_n + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + i_n)
        out = tl.where(scale == 0, x, x + scale * delta)
    else:
        out = x + delta
    tl.store(out_ptr + i_n * stride_out_n + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)


def sae_edit_topk(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    features: Tensor,
    table: Tensor,
    w_dec: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """The edited rows (..., d) in the dtype of x.

    features (m,), table (m, 4) and w_dec (m, d); or, apart for each row, features (n, m), table (n, m, 4) and w_dec (F, d).
    """
    # with more rows a tile of float32 weights would spill while it counts, and so would one of 16 warps
    arguments, programs = product_arguments(x, w_enc, b_enc, rows=0 if x.dtype == w_enc.dtype else OWN_N)
    arguments["num_warps"] = min(arguments["num_warps"], COUNT_WARPS)
    n, d, count = arguments["N"], arguments["D"], features.shape[-1]
    out = torch.empty(n, d, dtype=x.dtype, device=x.device)
    if not n:
        return out.view(x.shape)
    m = power_of_two(count)
    own, counts = (torch.empty(n, m, dtype=torch.int32, device=x.device) for _ in range(2))
    by_row = features.dim() == 2
    shared: dict[str, Any] = {
        "features_ptr": features.contiguous(), "stride_features_n": count if by_row else 0,
        "own_ptr": own, "counts_ptr": counts, "M": m, "COUNT": count, "NEVER": NEVER,
    }  # fmt: skip
    few, _ = product_arguments(x, w_enc, b_enc, rows=OWN_N)
    few.pop("GROUP"), few.pop("TILES_F")
    rows = min(few["BLOCK_N"], few["BLOCK_F"] // m)
    weights, block_d = flatten(w_dec), min(choose(WIDTH, n), power_of_two(d))
    with on_device(x):
        _own_kernel[(-(-n // rows),)](**few, **shared, ROWS=rows)
        _count_kernel[(programs,)](**arguments, **shared, K=k)
        _edit_topk_kernel[(n, -(-d // block_d))](
            **shared,
            x_ptr=arguments["x_ptr"], stride_x_n=arguments["stride_x_n"],
            table_ptr=table.contiguous(), stride_table_n=4 * count if by_row else 0,
            w_ptr=weights, stride_w_m=weights.stride(0),
            scale_ptr=None if scale is None else scale.reshape(-1),
            out_ptr=out, stride_out_n=out.stride(0),
            F=arguments["F"], D=d, K=k,
            BY_FEATURE=by_row, BLOCK_D=block_d, num_warps=WARPS,
        )  # fmt: skip
    return out.view(x.shape)
