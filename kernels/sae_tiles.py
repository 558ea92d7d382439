"""A tile of relu(x W_encᵀ + b_enc), as every kernel of an encoder takes it: which rows, in which precision, in which order.

Bytes of a tile: |x|·rows·d and |w|·128·d from L2. Two tensors of one 16-bit dtype meet on tensor cores, two of float32 in
float32. Where they differ, each is split into bfloat16 parts that sum to it exactly (float32 into three, float16 into two) and
the products of the parts meet on tensor cores: two of them for a pair of 16-bit dtypes, three for bfloat16 beside float32,
five for float16 beside float32, which leave out the two lowest parts' own: at most 2⁻²⁷ of |x|·|w|. All but the first are
summed apart, since they are 2⁻⁸ of it or less: so the sum rounds as often as that of one 16-bit pair. Modelled with sums of 16
in float64, d = 4096, plain, badly scaled and cancelling weights, the error is 0.03 to 0.41 of that of a float32 product
summed in order; how a tensor core rounds inside is unproven here. Float16 parts would be two in place of three, but the low
ones underflow below 2⁻²⁴ and the high one overflows above 65504; bfloat16 has the exponents of float32. What that costs:
weights below 2⁻¹¹⁰ lose their low parts, and a weight of 3.39e38 or more, or Inf in a row, becomes NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _device
from ._launch import choose, flatten
from ._tuned import tuned

Tiling = tuple[int, int, int]  # rows per tile, warps, stages
# (largest n, tiling); 64 is the fewest rows of Hopper's matrix instruction, which takes one operand from shared memory and leaves
# room for more rows: 256 of them take 6.3 kB of L2 a row and tile where 128 take 8.4, and hold 125 registers
TILES: list[tuple[int, Tiling]] = [(64, (64, 4, 3)), (128, (128, 8, 3)), (1 << 62, (256, 16, 4))]
TILES_MIXED: list[tuple[int, Tiling]] = [(64, (64, 8, 8)), (1 << 62, (128, 8, 5))]
# where there is none; they fit 99 kB
TILES_OTHERS: list[tuple[int, Tiling]] = [(64, (64, 8, 3)), (1 << 62, (128, 8, 3))]
TILES_MIXED_OTHERS: list[tuple[int, Tiling]] = [(1 << 62, (64, 8, 4))]
TILES_FLOAT32: list[tuple[int, Tiling]] = [
    (1 << 62, (64, 8, 2))
]  # no tensor cores: the products' operands stay in registers
BLOCK_F = 128  # features per tile; fixed, since it decides which candidates exist
BLOCK_D, BLOCK_D_MIXED, BLOCK_D_FLOAT32 = 64, 32, 16
GROUP = 4096  # rows whose blocks share one pass over W_enc: at d = 4096 they take 32 MB of L2


@triton.jit
def place(N, TILES_F, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """(row block, tile) of this program: the row blocks of a group first, so that a tile of W_enc is read once for them."""
    i = tl.program_id(0)
    blocks = tl.cdiv(N, BLOCK_N)
    first = i // (GROUP * TILES_F) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    inside = i % (GROUP * TILES_F)
    return first + inside % size, inside // size


@triton.jit
def _parts(v):
    """Three bfloat16 numbers that sum to each number of v; those that are zero by its dtype are never computed."""
    rest = v.to(tl.float32)
    first = v.to(tl.bfloat16)
    rest -= first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    return first, second, (rest - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(x, w, sum, WIDEN: tl.constexpr):
    if WIDEN:  # the interpreter multiplies the bit patterns of bfloat16
        return tl.dot(x.to(tl.float32), w.to(tl.float32), sum, input_precision="ieee")
    else:
        return tl.dot(x, w, sum, input_precision="ieee")


@triton.jit
def _dot_in_parts(x, w, high, low, WIDEN: tl.constexpr):
    """high + low + x·w for two dtypes, of which one at least has 16 bits."""
    x1, x2, x3 = _parts(x)
    w1, w2, w3 = _parts(w)
    high = _dot(x1, w1, high, WIDEN)
    if w.dtype != tl.bfloat16:
        low = _dot(x1, w2, low, WIDEN)
    if w.dtype == tl.float32:
        low = _dot(x1, w3, low, WIDEN)
    if x.dtype != tl.bfloat16:
        low = _dot(x2, w1, low, WIDEN)
    if x.dtype == tl.float32:
        low = _dot(x3, w1, low, WIDEN)
    if x.dtype != tl.bfloat16 and w.dtype != tl.bfloat16:
        low = _dot(x2, w2, low, WIDEN)
    return high, low


@triton.jit
def tile_bits(
    x_ptr, stride_x_n, w_ptr, stride_w_f, stride_w_d, b_ptr, offs_n, mask_n, offs_f, mask_f, D,
    BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """relu(xWᵀ + b) of one tile as the bits of float32, which order as int32 do; NaN, of either sign, lies on top."""
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :]
    w_ptrs = w_ptr + offs_f[None, :].to(tl.int64) * stride_w_f + offs_d[:, None].to(tl.int64) * stride_w_d
    if x_ptr.dtype.element_ty == w_ptr.dtype.element_ty:
        pre = tl.zeros((offs_n.shape[0], offs_f.shape[0]), tl.float32)
        for d in range(0, D, BLOCK_D):
            mask_d = offs_d < D - d
            x = tl.load(x_ptrs + d, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_f[None, :] & mask_d[:, None], other=0.0)
            pre = _dot(x, w, pre, WIDEN)
            w_ptrs += BLOCK_D * stride_w_d
    else:
        high = tl.zeros((offs_f.shape[0], offs_n.shape[0]), tl.float32)
        low = tl.zeros((offs_f.shape[0], offs_n.shape[0]), tl.float32)
        for d in range(0, D, BLOCK_D):
            mask_d = offs_d < D - d
            x = tl.load(x_ptrs + d, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_f[None, :] & mask_d[:, None], other=0.0)
            high, low = _dot_in_parts(tl.trans(w), tl.trans(x), high, low, WIDEN)
            w_ptrs += BLOCK_D * stride_w_d
        pre = tl.trans(high + low)
    if b_ptr is not None:
        pre += tl.load(b_ptr + offs_f, mask=mask_f, other=0.0).to(tl.float32)[None, :]
    bits = tl.where(pre > 0, pre.to(tl.int32, bitcast=True), 0)
    bits = tl.where(pre == pre, bits, 0x7FC00000)
    return tl.where(mask_f[None, :], bits, 0)  # (rows, features)


@triton.jit
def best(bits, i_f, BLOCK_F: tl.constexpr):
    """The largest entry of each row: its place in the tile and its key; key 0 where nothing positive is left."""
    value, place = tl.max(bits, axis=1, return_indices=True, return_indices_tie_break_left=True)
    index = i_f * BLOCK_F + place
    key = (value.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return place, tl.where(value > 0, key, 0)


WIDEN = not isinstance(tile_bits, triton.JITFunction)


def tiling_of(x: Tensor, w_enc: Tensor, n: int) -> tuple[Tiling, int]:
    """How n rows of x are cut into tiles, and the columns of a step."""
    if x.dtype == w_enc.dtype == torch.float32:
        return choose(TILES_FLOAT32, n), BLOCK_D_FLOAT32
    hopper = _device.device_of(x).wgmma
    if x.dtype == w_enc.dtype:
        return choose(tuned("sae_tiles.TILES", TILES if hopper else TILES_OTHERS, x), n), BLOCK_D
    return choose(tuned("sae_tiles.TILES_MIXED", TILES_MIXED if hopper else TILES_MIXED_OTHERS, x), n), BLOCK_D_MIXED


def product_arguments(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, rows: int = 0) -> tuple[dict[str, Any], int]:
    """What a kernel over tiles of the product is launched with, and how many tiles there are; rows: as for so many."""
    flat = flatten(x)
    (n, d), features = flat.shape, w_enc.shape[0]
    (block_n, warps, stages), step = tiling_of(flat, w_enc, rows or n)
    tiles = -(-features // BLOCK_F)
    arguments = dict(  # noqa: C408  keywords read as the kernel's signature
        x_ptr=flat, stride_x_n=flat.stride(0),
        w_ptr=w_enc, stride_w_f=w_enc.stride(0), stride_w_d=w_enc.stride(1),
        b_ptr=None if b_enc is None else b_enc.contiguous(),
        N=n, F=features, D=d, TILES_F=tiles,
        BLOCK_N=block_n, BLOCK_F=BLOCK_F, BLOCK_D=step, GROUP=max(tuned("sae_tiles.GROUP", GROUP, x) // block_n, 1), WIDEN=WIDEN,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return arguments, -(-n // block_n) * tiles
