"""Top-K of relu(x W_encᵀ + b_enc) without the (n, F) matrix: values sorted by size, ties to the lower index.

Bytes: reads |w|·F·d once per group of rows and |x|·n·d from L2, writes 8·n·(F/128)·k' candidates, where the full matrix
takes 2·n·F or more. Every tile of features keeps its best k' per row as int64 keys (float32 bits, inverted index). The
selection of the best k candidates is exact unless a tile's k'-th key lies above the k-th of them: then that tile may
hide more. At most (k - 1) // k' tiles per row can; the selection flags them, a third launch computes the flagged ones once
more, in blocks of 64 rows, and adds what they hid to a buffer of that size, and a fourth selects again where it did. Each
launch prepares what the next ones count in, so that nothing else runs and nothing waits for the host. A row does not
depend on its batch-mates: blocks of 64, 128 and 256 rows sum over d in the same order, by the same instruction on
sm_80, sm_90 and sm_120; on sm_100 and AMD the instructions of a tile follow its size, and that they round alike is unproven.
Gao et al. 2024 (arXiv:2406.04093).
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._launch import kernel, on_device, power_of_two
from .sae_select import SELECT, SELECT_WARPS, select_again_kernel, select_kernel
from .sae_tiles import BLOCK_F, best, place, product_arguments, tile_bits

PER_TILE = 4  # k': the fewest keys that a tile keeps
HEADROOM = 16  # a tile keeps at least 16 times its mean share k·128/F of the winners, so that a repair stays rare
REPAIR_N = 64  # rows of a block that is repaired: the fewest of any tile
LOOK = 4  # flags that one program of the repair looks at


@kernel
def _encode_kernel(
    x_ptr, stride_x_n,
    w_ptr, stride_w_f, stride_w_d,
    b_ptr,
    keys_ptr,
    flags_ptr, used_ptr,
    N, F, D, TILES_F,
    PER_TILE: tl.constexpr, REPAIR_N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    i_n, i_f = place(N, TILES_F, BLOCK_N, GROUP)
    offs_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_f = i_f * BLOCK_F + tl.arange(0, BLOCK_F)
    if flags_ptr is not None:
        blocks = i_n.to(tl.int64) * (BLOCK_N // REPAIR_N) + tl.arange(0, BLOCK_N // REPAIR_N)
        tl.store(flags_ptr + blocks * TILES_F + i_f, 0, mask=blocks * REPAIR_N < N)
        if i_f == 0:
            tl.store(used_ptr + offs_n, 0, mask=mask_n)
    bits = tile_bits(
        x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, mask_n, offs_f, offs_f < F, D, BLOCK_D, WIDEN
    )
    places = tl.arange(0, BLOCK_F)[None, :]
    out_ptrs = keys_ptr + (offs_n * TILES_F + i_f) * PER_TILE
    for j in range(PER_TILE):
        taken, key = best(bits, i_f, BLOCK_F)
        tl.store(out_ptrs + j, key, mask=mask_n)
        bits = tl.where(places == taken[:, None], 0, bits)


@kernel
def _repair_kernel(
    x_ptr, stride_x_n,
    w_ptr, stride_w_f, stride_w_d,
    b_ptr,
    keys_ptr,
    flags_ptr, used_ptr,
    found_ptr, stride_found_n,
    N, F, D, TILES_F, K, HIDDEN,
    PER_TILE: tl.constexpr, LOOK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    first, total = tl.program_id(0).to(tl.int64) * LOOK, tl.cdiv(N, BLOCK_N).to(tl.int64) * TILES_F
    offs = first + tl.arange(0, LOOK)
    if tl.max(tl.load(flags_ptr + offs, mask=offs < total, other=0), axis=0) > 0:
        for i in range(first, tl.minimum(first + LOOK, total)):
            if tl.load(flags_ptr + i) > 0:
                i_f = (i % TILES_F).to(tl.int32)
                offs_n, offs_f = i // TILES_F * BLOCK_N + tl.arange(0, BLOCK_N), i_f * BLOCK_F + tl.arange(0, BLOCK_F)
                mask_n = offs_n < N
                kth = tl.load(found_ptr + offs_n * stride_found_n + K - 1, mask=mask_n, other=0)
                kept_ptrs = keys_ptr + (offs_n * TILES_F + i_f) * PER_TILE
                hides = mask_n & (tl.load(kept_ptrs + PER_TILE - 1, mask=mask_n, other=0) > kth)
                bits = tile_bits(
                    x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, hides, offs_f, offs_f < F, D,
                    BLOCK_D, WIDEN,
                )  # fmt: skip
                places = tl.arange(0, BLOCK_F)[None, :]
                for j in range(PER_TILE):
                    taken = 0x7FFFFFFF - (tl.load(kept_ptrs + j, mask=hides, other=0) & 0x7FFFFFFF).to(tl.int32)
                    bits = tl.where(places == taken[:, None] - i_f * BLOCK_F, 0, bits)
                slot = tl.atomic_add(used_ptr + offs_n, 1, mask=hides)  # any order: the keys are a set
                out_ptrs = found_ptr + offs_n * stride_found_n + K + slot * HIDDEN
                for j in range(HIDDEN):
                    taken, key = best(bits, i_f, BLOCK_F)
                    tl.store(out_ptrs + j, tl.where(key > kth, key, 0), mask=hides)
                    bits = tl.where(places == taken[:, None], 0, bits)


def plan(features: int, k: int) -> tuple[int, int, int, int]:
    """(tiles, keys that each keeps, winners that one can still hide, tiles per row that can hide any)."""
    tiles = -(-features // BLOCK_F)
    per_tile = min(power_of_two(max(PER_TILE, -(-HEADROOM * k // tiles))), BLOCK_F)
    hidden = max(min(k, BLOCK_F) - per_tile, 0)
    return tiles, per_tile, hidden, (k - 1) // per_tile if hidden else 0


def sae_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """(values float32, indices int32), both (..., k); value 0 and index 0 where fewer than k features are active."""
    arguments, programs = product_arguments(x, w_enc, b_enc)
    n, device = arguments["N"], x.device
    tiles, per_tile, hidden, slots = plan(w_enc.shape[0], k)
    values = torch.empty(*x.shape[:-1], k, dtype=torch.float32, device=device)
    indices = torch.empty(*x.shape[:-1], k, dtype=torch.int32, device=device)
    if not n:
        return values, indices
    keys = torch.empty(n, tiles * per_tile, dtype=torch.int64, device=device)
    found, flags, used = None, None, None
    looks = -(-n // REPAIR_N) * tiles
    if slots:
        found = torch.empty(n, k + slots * hidden, dtype=torch.int64, device=device)
        flags = torch.empty(looks, dtype=torch.int32, device=device)
        used = torch.empty(n, dtype=torch.int32, device=device)
    arguments |= {"keys_ptr": keys, "flags_ptr": flags, "used_ptr": used, "PER_TILE": per_tile}
    block_k = power_of_two(k, at_least=2)
    out = {"values_ptr": values, "indices_ptr": indices, "K": k, "BLOCK_K": block_k, "num_warps": SELECT_WARPS}
    with on_device(x):
        _encode_kernel[(programs,)](**arguments, REPAIR_N=REPAIR_N)
        select_kernel[(n,)](
            keys_ptr=keys, stride_keys_n=keys.stride(0),
            found_ptr=found, stride_found_n=0 if found is None else found.stride(0),
            flags_ptr=flags,
            TILES_F=tiles, PER_TILE=per_tile, BLOCK_F=BLOCK_F, REPAIR_N=REPAIR_N,
            BLOCK_C=max(block_k, min(power_of_two(keys.shape[1]), SELECT)), **out,
        )  # fmt: skip
        if found is not None:
            few, _ = product_arguments(x, w_enc, b_enc, rows=REPAIR_N)
            few |= {name: arguments[name] for name in ("keys_ptr", "flags_ptr", "used_ptr", "PER_TILE")}
            few.pop("GROUP")
            _repair_kernel[(-(-looks // LOOK),)](
                **few, found_ptr=found, stride_found_n=found.stride(0), K=k, HIDDEN=hidden, LOOK=LOOK
            )
            select_again_kernel[(n,)](
                found_ptr=found, stride_found_n=found.stride(0),
                used_ptr=used,
                HIDDEN=hidden,
                BLOCK_C=max(block_k, min(power_of_two(k + hidden), SELECT)), **out,
            )  # fmt: skip
    return values, indices
