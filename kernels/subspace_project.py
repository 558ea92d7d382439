"""First half of project → act → lift by tiles: y = xBᵀ and ‖x‖² of a tile of tokens, on tensor cores.

Where few tokens leave most of a GPU idle, or a rank is large, columns of d and directions are split across programs, which leave
partial sums; what follows adds them and acts.
Bytes: x once per part of the directions, B once per tile and owner (from L2), 4·k a token and split for the sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._launch import kernel
from .act import COUPLED, KEEP_NORM
from .owners import next_owner, owners_of


@triton.jit
def _step(
    x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mask_n, offs_k, mask_k, offs_d, mask_d,
    y, square, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Sums over one block of columns, added to what there is of y and of the squares."""
    mask = mask_n[:, None] & mask_d[None, :]
    x = tl.load(x_ptr + offs_n[:, None] * stride_x_n + offs_d[None, :], mask=mask, other=0.0)
    mask_b = mask_k[None, :] & mask_d[:, None]
    b = tl.load(b_ptr + offs_k[None, :] * stride_v + offs_d[:, None], mask=mask_b, other=0.0)
    y = tl.dot(x, b, y, input_precision="ieee")
    half = x
    if hidden_ptr is not None:  # the halves apart: their sum would be rounded to 16 bits before the product
        half = tl.load(hidden_ptr + offs_n[:, None] * stride_hidden_n + offs_d[None, :], mask=mask, other=0.0)
        y = tl.dot(half, b, y, input_precision="ieee")
    if LENGTHS:
        wide = x.to(tl.float32)
        if hidden_ptr is not None:
            wide += half.to(tl.float32)
        square += tl.sum(wide * wide, axis=1)
    return y, square


@triton.jit
def project(
    x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mask_n, offs_k, mask_k,
    first, last, LENGTHS: tl.constexpr, SUMS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(y, ‖x‖² where it is asked for) of a tile over columns first to last: (BLOCK_N, BLOCK_K) and (BLOCK_N,)."""
    y = tl.zeros((offs_n.shape[0], offs_k.shape[0]), tl.float32)
    odd = tl.zeros((offs_n.shape[0], offs_k.shape[0]), tl.float32)  # two sums: of one, each product waits for the last
    square = tl.zeros(offs_n.shape, tl.float32)
    for d in range(first, last, SUMS * BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        y, square = _step(
            x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mask_n, offs_k, mask_k,
            offs_d, offs_d < last, y, square, LENGTHS,
        )  # fmt: skip
        if SUMS == 2:
            offs_d += BLOCK_D
            odd, square = _step(
                x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mask_n, offs_k, mask_k,
                offs_d, offs_d < last, odd, square, LENGTHS,
            )  # fmt: skip
    if SUMS == 2:
        y += odd
    return y, square


@kernel
def project_kernel(
    x_ptr, stride_x_n,
    hidden_ptr, stride_hidden_n,
    vectors_ptr, stride_v,
    slots_ptr, S,
    rows_ptr, stride_rows_n,
    y_ptr,  # float32 (splits, N, WIDTH)
    square_ptr,  # float32 (splits, N)
    N, D, COLUMNS,
    MODES: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Partial sums of a tile, a part of the columns and BLOCK_K of the directions."""
    i_s, i_k = tl.program_id(1) // (WIDTH // BLOCK_K), tl.program_id(1) % (WIDTH // BLOCK_K)
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    owner, _ = owners_of(slots_ptr, S, rows_ptr, stride_rows_n, None, 0, offs_n, mask_n)
    first, last = i_s * COLUMNS, tl.minimum((i_s + 1) * COLUMNS, D)
    place = i_s * N.to(tl.int64) * WIDTH + offs_n[:, None] * WIDTH + offs_k[None, :]
    owner, slot = next_owner(owner, tl.max(owner, axis=0), tl.program_id(2))
    while slot >= 0:  # once per distinct owner of the tile
        head_ptr = slots_ptr + slot * 8
        mine = owner == slot
        mask_k = offs_k < tl.load(head_ptr + 1)
        b_ptr = vectors_ptr + tl.load(head_ptr + 2).to(tl.int64) * stride_v
        y, square = project(
            x_ptr, stride_x_n, hidden_ptr, stride_hidden_n, b_ptr, stride_v, offs_n, mine, offs_k, mask_k,
            first, last, (COUPLED | KEEP_NORM) & MODES, SUMS, BLOCK_D,
        )  # fmt: skip
        if (COUPLED | KEEP_NORM) & MODES:
            tl.store(square_ptr + i_s * N + offs_n, square, mask=mine)
        tl.store(y_ptr + place, y, mask=mine[:, None])
        owner, slot = next_owner(owner, slot, tl.num_programs(2))
