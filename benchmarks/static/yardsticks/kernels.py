"""Plain kernels of kinds whose times others have published, in our own words and with the same blocks: see ../published.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    """x + y, a block of elements a program."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + tl.load(y_ptr + offs, mask=mask), mask=mask)


@triton.jit
def softmax_kernel(x_ptr, out_ptr, D, BLOCK: tl.constexpr):
    """Softmax of a row: one pass for its maximum and its sum, one that reads it again and writes."""
    start = tl.program_id(0).to(tl.int64) * D
    largest = -float("inf")
    total = 0.0
    for d in tl.range(0, D, BLOCK):
        offs = d + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start + offs, mask=offs < D, other=-float("inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(before, tl.max(x, axis=0))
        total = total * tl.exp(before - largest) + tl.sum(tl.exp(x - largest), axis=0)
    for d in tl.range(0, D, BLOCK):
        offs = d + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + start + offs, mask=offs < D, other=-float("inf"))
        out = tl.exp(x.to(tl.float32) - largest) / total
        tl.store(out_ptr + start + offs, out.to(x.dtype), mask=offs < D)


@triton.jit
def softmax_backward_kernel(grad_ptr, out_ptr, grad_x_ptr, D, BLOCK: tl.constexpr):
    """The gradient of a row's softmax: one pass for the product of the two, one that reads both again and writes."""
    start = tl.program_id(0).to(tl.int64) * D
    product = 0.0
    for d in tl.range(0, D, BLOCK):
        offs = d + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + start + offs, mask=offs < D, other=0.0).to(tl.float32)
        product += tl.sum(grad * tl.load(out_ptr + start + offs, mask=offs < D, other=0.0).to(tl.float32), axis=0)
    for d in tl.range(0, D, BLOCK):
        offs = d + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + start + offs, mask=offs < D, other=0.0)
        out = tl.load(out_ptr + start + offs, mask=offs < D, other=0.0)
        grad_x = out.to(tl.float32) * (grad.to(tl.float32) - product)
        tl.store(grad_x_ptr + start + offs, grad_x.to(grad.dtype), mask=offs < D)


@triton.jit
def product_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One of a batch of products, (M, K) times (K, N), a block of it a program; the batch is the grid's first axis."""
    i_b = tl.program_id(0).to(tl.int64)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr += i_b * M * K
    b_ptr += i_b * K * N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_a = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        mask_b = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        a = tl.load(a_ptr + offs_m[:, None] * K + offs_k[None, :], mask=mask_a, other=0.0)
        b = tl.load(b_ptr + offs_k[:, None] * N + offs_n[None, :], mask=mask_b, other=0.0)
        total = tl.dot(a, b, total)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    out_ptr += i_b * M * N + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out_ptr, total.to(out_ptr.dtype.element_ty), mask=mask)
