"""The flow of a full-rank barrier, k = d, by the solvers of `solve.py`.

z = Qx by a matrix product, all steps on z in one kernel (reads 4d and writes |x|d bytes a token), x + Qᵀ(z_T - z₀) by another
product. Paper: ODESteer, arXiv:2602.17560.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ._launch import choose, kernel, power_of_two, stride
from ._tuned import tuned
from .solve import euler, integrate

# (largest d, warps) of the full-rank kernel: one program per row. No solver spills up to d = 4096; beyond it all but Euler do on
# sm_90, 184 bytes, and 32 warps, of 64 registers, spill no less
WARPS = [(1024, 4), (2048, 8), (1 << 62, 16)]


@kernel
def _flow_kernel(
    z_ptr, stride_z_n,
    norm_ptr,
    coefficients_ptr,
    slots_ptr, S,
    rows_ptr, stride_rows_n, stride_rows_p,
    scale_ptr, stride_scale_n, stride_scale_p,
    g_ptr, stride_g_n,
    owned_ptr,
    D, P: tl.constexpr, SOLVES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    z_ptr += i_n * stride_z_n
    z = tl.load(z_ptr + offs_d, mask=mask_d, other=0.0)[None, :]
    norm = tl.load(norm_ptr + i_n) + tl.zeros((1,), tl.float32)
    owned = 0
    stray = tl.full((), 0, tl.int1)
    for p in tl.static_range(P):
        slot = tl.full((), 0, tl.int32)
        if rows_ptr is not None:
            slot = tl.load(rows_ptr + i_n * stride_rows_n + p * stride_rows_p)
        head_ptr = slots_ptr + slot * 8
        stray = stray | (slot < -1) | (slot >= S)
        if tl.load(head_ptr + 1, mask=(slot >= 0) & (slot < S), other=0) > 0:
            c_ptr = coefficients_ptr + tl.load(head_ptr + 4).to(tl.int64) * 8
            weight = tl.load(c_ptr + 2)
            if scale_ptr is not None:
                weight *= tl.load(scale_ptr + i_n * stride_scale_n + p * stride_scale_p)
            inside = tl.sqrt(tl.sum(z * z, axis=1))  # nothing lies outside the span, not even rounding
            length = weight * (tl.load(c_ptr) + tl.load(c_ptr + 1) * tl.where(owned == 0, norm, inside))
            if SOLVES:
                if tl.load(head_ptr + 7) > 0:
                    _, z = integrate(z, inside, c_ptr + 8, D, offs_d, mask_d, length, tl.load(head_ptr + 5))
                else:
                    _, z = euler(
                        z, inside, tl.load(c_ptr + 3), c_ptr + 8, offs_d, mask_d, length, tl.load(head_ptr + 5)
                    )
            else:
                _, z = euler(z, inside, tl.load(c_ptr + 3), c_ptr + 8, offs_d, mask_d, length, tl.load(head_ptr + 5))
            owned = 1
    tl.store(owned_ptr + i_n, owned | stray)
    start = tl.load(z_ptr + offs_d, mask=mask_d, other=0.0)  # again: no register holds it across the steps
    g = tl.where(stray, float("nan"), tl.sum(z, axis=0) - start).to(g_ptr.dtype.element_ty)
    tl.store(g_ptr + i_n * stride_g_n + offs_d, g, mask=mask_d)


def flow(
    x: Tensor,
    basis: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    solves: bool,
) -> Tensor:
    """The moved rows of x (n, d), where one slot of a bank has all its d vectors; `solves`: not Euler alone."""
    n, d = x.shape
    if x.is_cuda and x.dtype != torch.float32:
        z = torch.mm(x, basis.T, out_dtype=torch.float32)
    else:
        z = x.float() @ basis.float().T
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    g = torch.empty(n, d, dtype=x.dtype, device=x.device)
    owned = torch.empty(n, dtype=torch.int32, device=x.device)
    _flow_kernel[(n,)](
        z_ptr=z, stride_z_n=z.stride(0),
        norm_ptr=norm,
        coefficients_ptr=coefficients, slots_ptr=slots, S=slots.shape[0],
        rows_ptr=rows, stride_rows_n=stride(rows, 0), stride_rows_p=stride(rows, 1),
        scale_ptr=scale, stride_scale_n=stride(scale, 0), stride_scale_p=stride(scale, 1),
        g_ptr=g, stride_g_n=g.stride(0),
        owned_ptr=owned,
        D=d, P=1 if rows is None else rows.shape[1], SOLVES=solves, BLOCK_D=power_of_two(d),
        num_warps=choose(tuned("flow.WARPS", WARPS, x), d),
    )  # fmt: skip
    if x.is_cuda:  # one product that adds in float32 and rounds once
        moved = torch.addmm(x, g, basis)
    else:
        moved = (x.float() + g.float() @ basis.float()).to(x.dtype)
    return torch.where((owned == 0)[:, None] | (moved == x), x, moved)
