"""Top-K of relu(x W_encᵀ + b_enc) without the (n, F) matrix: values sorted by size, ties to the lower index.

Bytes: reads |w|·F·d once per group of rows and |x|·n·d from L2, writes 8·n·(F/128)·k' candidates, where the full matrix
takes 2·n·F or more. Every tile of features keeps its best k' per row as int64 keys (float32 bits, inverted index). The
selection of the best k candidates is exact unless a tile's k'-th key lies above the k-th of them: then that tile may
hide more. At most (k - 1) // k' tiles per row can, so a second kernel over the same grid looks at each once more, adds
what it hid to a buffer of that size, and the selection is repeated. Nothing waits for the host. A row does not depend
on its batch-mates: blocks of 64 and 128 rows sum over d in the same order. Gao et al. 2024 (arXiv:2406.04093).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import choose, flatten, kernel, on_device, power_of_two
from ._tuned import tuned

# (largest n, (rows per tile, warps)); 64 is the fewest rows of Hopper's matrix instruction
TILES = [(64, (64, 4)), (1 << 62, (128, 8))]
TILES_FLOAT32 = [(1 << 62, (64, 8))]  # no tensor cores: the products' operands stay in registers
BLOCK_F = 128  # features per tile; fixed, since it decides which candidates exist
BLOCK_D, STAGES = 64, 3
BLOCK_D_FLOAT32, STAGES_FLOAT32 = 16, 2
GROUP = 32  # row blocks that share one pass over W_enc: 32 · 128 rows of x at d = 4096 take 32 MB of L2
PER_TILE = 4  # k': the fewest keys that a tile keeps
SELECT, SELECT_WARPS = 1024, 4  # keys of a row that are sorted at a time: 8 per thread
HEADROOM = 16  # a tile keeps at least 16 times its mean share k·128/F of the winners, so that a repair stays rare


@triton.jit
def _place(N, TILES_F, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row block, tile) of this program: the row blocks of a group first, so that a tile of W_enc is read once for them."""
    i = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    first = i // (GROUP * TILES_F) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inside = i % (GROUP * TILES_F)
    return first + inside % size, inside // size


@triton.jit
def _tile_bits(
    x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, mask_n, i_f, F, D,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """relu(xWᵀ + b) of one tile as the bits of float32, which order as int32 do; NaN, of either sign, lies on top."""
    offs_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    mask_f = offs_f < F
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :]
    w_ptrs = w_ptr + offs_f[None, :].to(tl.int64) * stride_w_f + offs_d[:, None].to(tl.int64) * stride_w_d
    pre = tl.zeros((offs_n.shape[0], BLOCK_F), tl.float32)
    for d in range(0, D, BLOCK_D):
        mask_d = offs_d < D - d
        x = tl.load(x_ptrs + d, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=mask_f[None, :] & mask_d[:, None], other=0.0)
        if x.dtype != w.dtype:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        pre = tl.dot(x, w, pre, input_precision="ieee")
        w_ptrs += BLOCK_D * stride_w_d
    if b_ptr is not None:
        pre += tl.load(b_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
    bits = tl.where(pre > 0, pre.to(tl.int32, bitcast=True), 0)
    bits = tl.where(pre == pre, bits, 0x7FC00000)
    return tl.where(mask_f[None, :], bits, 0)  # (BLOCK_N, BLOCK_F)


@triton.jit
def _best(bits, i_f, BLOCK_F: tl.constexpr):
    """The largest entry of each row: its place in the tile and its key; key 0 where nothing positive is left."""
    value, place = tl.max(bits, axis=1, return_indices=True, return_indices_tie_break_left=True)
    index = i_f * BLOCK_F + place
    key = (value.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return place, tl.where(value > 0, key, 0)


@kernel
def _encode_kernel(
    x_ptr, stride_x_n,
    w_ptr, stride_w_f, stride_w_d,
    b_ptr,
    keys_ptr,
    N, F, D, TILES_F,
    PER_TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    i_n, i_f = _place(N, TILES_F, BLOCK_N, GROUP)
    offs_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    bits = _tile_bits(
        x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, mask_n, i_f, F, D, BLOCK_F, BLOCK_D
    )
    places = tl.arange(0, BLOCK_F)[None, :]
    out_ptrs = keys_ptr + (offs_n * TILES_F + i_f) * PER_TILE
    for j in range(PER_TILE):
        place, key = _best(bits, i_f, BLOCK_F)
        tl.store(out_ptrs + j, key, mask=mask_n)
        bits = tl.where(places == place[:, None], 0, bits)


@kernel
def _repair_kernel(
    x_ptr, stride_x_n,
    w_ptr, stride_w_f, stride_w_d,
    b_ptr,
    keys_ptr,
    found_ptr, stride_found_n,
    used_ptr,
    N, F, D, TILES_F, K, HIDDEN,
    PER_TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    i_n, i_f = _place(N, TILES_F, BLOCK_N, GROUP)
    offs_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    kth = tl.load(found_ptr + offs_n * stride_found_n + K - 1, mask=mask_n, other=0)
    kept_ptrs = keys_ptr + (offs_n * TILES_F + i_f) * PER_TILE
    flagged = mask_n & (tl.load(kept_ptrs + PER_TILE - 1, mask=mask_n, other=0) > kth)
    if tl.max(flagged.to(tl.int32), axis=0) > 0:
        bits = _tile_bits(
            x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, flagged, i_f, F, D, BLOCK_F, BLOCK_D
        )
        places = tl.arange(0, BLOCK_F)[None, :]
        for j in range(PER_TILE):
            kept = tl.load(kept_ptrs + j, mask=flagged, other=0)
            place = 0x7FFFFFFF - (kept & 0x7FFFFFFF).to(tl.int32) - i_f * BLOCK_F
            bits = tl.where(places == place[:, None], 0, bits)
        slot = tl.atomic_add(used_ptr + offs_n, 1, mask=flagged)  # any order: the keys are a set
        out_ptrs = found_ptr + offs_n * stride_found_n + K + slot * HIDDEN
        for j in range(HIDDEN):
            place, key = _best(bits, i_f, BLOCK_F)
            tl.store(out_ptrs + j, key, mask=flagged & (key > kth))
            bits = tl.where(places == place[:, None], 0, bits)


@kernel
def _select_kernel(
    keys_ptr, stride_keys_n,
    out_ptr, stride_out_n,
    COUNT, K,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_c, offs_k = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_K)
    best = tl.zeros((BLOCK_K,), tl.int64)
    for c in range(0, COUNT, BLOCK_C):
        keys = tl.load(keys_ptr + i_n * stride_keys_n + c + offs_c, mask=offs_c < COUNT - c, other=0)
        # of two descending runs, the larger of each and its mirror image are the best of both
        best = tl.sort(tl.maximum(best, tl.flip(tl.topk(keys, BLOCK_K, 0), 0)), 0, descending=True)
    tl.store(out_ptr + i_n * stride_out_n + offs_k, best, mask=offs_k < K)


def select(keys: Tensor, k: int) -> Tensor:
    """The k largest keys of each row, (n, k), largest first; no key is negative."""
    n, count = keys.shape
    out = torch.empty(n, k, dtype=torch.int64, device=keys.device)
    block_k = power_of_two(k, at_least=2)
    _select_kernel[(n,)](
        keys_ptr=keys, stride_keys_n=keys.stride(0),
        out_ptr=out, stride_out_n=out.stride(0),
        COUNT=count, K=k,
        BLOCK_C=max(block_k, min(power_of_two(count), SELECT)), BLOCK_K=block_k, num_warps=SELECT_WARPS,
    )  # fmt: skip
    return out


def plan(features: int, k: int) -> tuple[int, int, int, int]:
    """(tiles, keys that each keeps, winners that one can still hide, tiles per row that can hide any)."""
    tiles = triton.cdiv(features, BLOCK_F)
    per_tile = min(power_of_two(max(PER_TILE, triton.cdiv(HEADROOM * k, tiles))), BLOCK_F)
    hidden = max(min(k, BLOCK_F) - per_tile, 0)
    return tiles, per_tile, hidden, (k - 1) // per_tile if hidden else 0


def product_arguments(x: Tensor, w_enc: Tensor, b_enc: Tensor | None) -> tuple[dict[str, Any], tuple[int]]:
    """What a kernel over tiles of the product is launched with, and its grid."""
    flat = flatten(x)
    (n, d), features = flat.shape, w_enc.shape[0]
    exact = flat.dtype == w_enc.dtype and flat.dtype != torch.float32
    block_n, warps = choose(tuned("sae_encode.TILES", TILES, x) if exact else TILES_FLOAT32, n)
    tiles = triton.cdiv(features, BLOCK_F)
    arguments = dict(  # noqa: C408  keywords read as the kernel's signature
        x_ptr=flat, stride_x_n=flat.stride(0),
        w_ptr=w_enc, stride_w_f=w_enc.stride(0), stride_w_d=w_enc.stride(1),
        b_ptr=None if b_enc is None else b_enc.contiguous(),
        N=n, F=features, D=d, TILES_F=tiles,
        BLOCK_N=block_n, BLOCK_F=BLOCK_F, BLOCK_D=BLOCK_D if exact else BLOCK_D_FLOAT32,
        GROUP=tuned("sae_encode.GROUP", GROUP, x),
        num_warps=warps, num_stages=STAGES if exact else STAGES_FLOAT32,
    )  # fmt: skip
    return arguments, (triton.cdiv(n, block_n) * tiles,)


def sae_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """(values float32, indices int32), both (..., k); value 0 and index 0 where fewer than k features are active."""
    arguments, grid = product_arguments(x, w_enc, b_enc)
    n = arguments["N"]
    tiles, per_tile, hidden, slots = plan(w_enc.shape[0], k)
    keys = torch.empty(n, tiles * per_tile, dtype=torch.int64, device=x.device)
    found = torch.zeros(n, k + slots * hidden, dtype=torch.int64, device=x.device)
    if n:
        arguments |= {"keys_ptr": keys, "PER_TILE": per_tile}
        with on_device(x):
            _encode_kernel[grid](**arguments)
            found[:, :k] = select(keys, k)
            if slots:
                used = torch.zeros(n, dtype=torch.int32, device=x.device)
                _repair_kernel[grid](
                    **arguments, found_ptr=found, stride_found_n=found.stride(0), used_ptr=used, K=k, HIDDEN=hidden
                )
                found = select(found, k)
    values = (found >> 32).to(torch.int32).view(torch.float32)
    indices = torch.where(found > 0, 0x7FFFFFFF - (found & 0x7FFFFFFF), 0).to(torch.int32)
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)
