"""The k largest of a row's keys as values and features: first among all that the tiles kept, again among what was hidden.

A key is the bits of a float32 above its inverted index, so that keys order by value and ties by the lower index. Bytes a row:
reads 8 per key, writes 8·k of values and indices and 8·k of keys. One program per row; a row that no repair touched is left as
it is by the second selection.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import kernel

SELECT, SELECT_WARPS = 1024, 4  # keys of a row that are sorted at a time: 8 per thread


@triton.jit
def _largest(keys_ptr, COUNT, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr):
    """The BLOCK_K largest of a row of keys, largest first; no key is negative."""
    offs_c = tl.arange(0, BLOCK_C)
    best = tl.zeros((BLOCK_K,), tl.int64)
    for c in range(0, COUNT, BLOCK_C):
        keys = tl.load(keys_ptr + c + offs_c, mask=offs_c < COUNT - c, other=0)
        # of two descending runs, the larger of each and its mirror image are the best of both
        best = tl.sort(tl.maximum(best, tl.flip(tl.topk(keys, BLOCK_K, 0), 0)), 0, descending=True)
    return best


@triton.jit
def index_of(key):
    """The feature of a key."""
    return 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def store(key, values_ptr, indices_ptr, mask):
    """Keys as values and indices; value 0 and index 0 where there is none."""
    tl.store(values_ptr, (key >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=mask)
    tl.store(indices_ptr, tl.where(key > 0, index_of(key), 0), mask=mask)


@kernel
def select_kernel(
    keys_ptr, stride_keys_n,
    found_ptr, stride_found_n,
    values_ptr, indices_ptr,
    flags_ptr,
    TILES_F, K,
    PER_TILE: tl.constexpr, BLOCK_F: tl.constexpr, REPAIR_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The k largest of what the tiles kept, and a flag for each tile that may hide more."""
    i_n = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    keys_ptr += i_n * stride_keys_n
    best = _largest(keys_ptr, TILES_F * PER_TILE, BLOCK_C, BLOCK_K)
    store(best, values_ptr + i_n * K + offs_k, indices_ptr + i_n * K + offs_k, mask_k)
    if flags_ptr is not None:
        tl.store(found_ptr + i_n * stride_found_n + offs_k, best, mask=mask_k)
        # a tile whose last kept key is above the k-th may hide more; that key is then one of these
        kth = tl.sum(tl.where(offs_k == K - 1, best, 0), axis=0)
        tile = index_of(best) // BLOCK_F
        last = tl.load(keys_ptr + tile * PER_TILE + PER_TILE - 1, mask=mask_k & (best > kth), other=0)
        tl.store(flags_ptr + i_n // REPAIR_N * TILES_F + tile, 1, mask=last > kth)


@kernel
def select_again_kernel(
    found_ptr, stride_found_n,
    used_ptr,
    values_ptr, indices_ptr,
    K, HIDDEN,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The k largest of those and of what a repair has found for the row; nothing where it found nothing."""
    i_n = tl.program_id(0).to(tl.int64)
    used = tl.load(used_ptr + i_n)
    if used > 0:
        offs_k = tl.arange(0, BLOCK_K)
        best = _largest(found_ptr + i_n * stride_found_n, K + used * HIDDEN, BLOCK_C, BLOCK_K)
        store(best, values_ptr + i_n * K + offs_k, indices_ptr + i_n * K + offs_k, offs_k < K)
