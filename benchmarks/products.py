"""Kernels of the benchmarks' own: the encoder's product on its tiles, without the selection, and one that does nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from lab.case import Function, NotHere
from torch import Tensor

from steerfast_kernels import sae_tiles

BLOCK_F = sae_tiles.BLOCK_F


@triton.jit(do_not_specialize=["N"])
def _product_kernel(
    x_ptr, w_ptr, out_ptr, N, F, D,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The largest entry of every row in every tile of xWᵀ: one number a tile, so that storing costs nothing."""
    tiles = tl.cdiv(F, BLOCK_F)
    program, per_group = tl.program_id(0), GROUP * tiles
    first = program // per_group * GROUP
    size = tl.minimum(tl.cdiv(N, BLOCK_N) - first, GROUP)
    i_n, i_f = first + program % per_group % size, program % per_group // size
    offs_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_f = i_f.to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    for d in range(0, D, BLOCK_D):
        mask_d = offs_d + d < D
        x = tl.load(
            x_ptr + offs_n[:, None] * D + d + offs_d[None, :], mask=(offs_n < N)[:, None] & mask_d[None, :], other=0.0
        )
        w = tl.load(
            w_ptr + offs_f[None, :] * D + d + offs_d[:, None], mask=(offs_f < F)[None, :] & mask_d[:, None], other=0.0
        )
        acc = tl.dot(x, w, acc, input_precision="ieee")
    tl.store(out_ptr + offs_n * tiles + i_f, tl.max(acc, axis=1), mask=offs_n < N)


def product(x: Tensor, w: Tensor) -> Tensor:
    """The tile-wise maxima of x Wᵀ, (n, tiles), for contiguous 16-bit x (n, d) and W (F, d)."""
    (n, d), features = x.shape, w.shape[0]
    (block_n, warps, stages), step = sae_tiles.tiling_of(x, w, n)
    tiles, group = triton.cdiv(features, BLOCK_F), max(sae_tiles.GROUP // block_n, 1)
    out = torch.empty(n, tiles, device=x.device)
    _product_kernel[(triton.cdiv(n, block_n) * tiles,)](
        x_ptr=x, w_ptr=w, out_ptr=out, N=n, F=features, D=d,
        BLOCK_N=block_n, BLOCK_F=BLOCK_F, BLOCK_D=step, GROUP=group, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def tiles() -> dict[str, Callable[[], Function]]:
    """The product as a yardstick of `sae_encode`, on a GPU and under the interpreter; checked here once."""

    def make() -> Function:
        import setting

        if setting.PLACE == "cpu":
            raise NotHere("a Triton product needs a GPU")
        x, w = setting.AT.rows(3), setting.AT.rows(2 * BLOCK_F)
        true = (x.float() @ w.float().T).view(3, 2, BLOCK_F).amax(2)
        if not torch.allclose(product(x, w), true, rtol=1e-3, atol=1e-2):
            raise NotHere("red: the product on tiles is wrong")
        return lambda x, w, b: product(x, w)

    return {"product on tiles": make}


@triton.jit(do_not_specialize=["N"])
def _empty_kernel(x_ptr, out_ptr, a_ptr, b_ptr, N, D, s0, s1, s2, s3, s4, s5, s6, s7, BLOCK: tl.constexpr):
    return


def empty() -> dict[str, Callable[[], Function]]:
    """The launch of a kernel that does nothing as a yardstick, on a GPU and under the interpreter."""

    def make() -> Function:
        import setting

        if setting.PLACE == "cpu":
            raise NotHere("a Triton launch needs a GPU")
        return lambda x, *_: launch_nothing(x)

    return {"empty kernel": make}


def launch_nothing(x: Tensor) -> None:
    """One program of one warp, with as many arguments as a kernel of ours has."""
    d = x.shape[-1]
    _empty_kernel[(1,)](
        x_ptr=x, out_ptr=x, a_ptr=x, b_ptr=x, N=x.shape[0], D=d, s0=d, s1=d, s2=d, s3=d, s4=d, s5=d, s6=d, s7=d, BLOCK=64,
        num_warps=1,
    )  # fmt: skip
