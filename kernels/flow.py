"""The flow of a barrier, da/dt = ∇h/‖∇h‖, on the k + 1 numbers that move: every step of every solver in registers.

`integrate` is a device function of the subspace kernels: it reads and writes no row of the stream. `flow` serves
full-rank barriers, k = d: z = Qx by a matrix product, all steps on z in one kernel (reads 4d and writes |x|d bytes a
token), and x + Qᵀ(z_T - z₀) by another. The specification is `steerfast.solvers.integrate`.
Paper: ODESteer, arXiv:2602.17560.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import choose, flatten, on_device, power_of_two

WARPS = [(1024, 4), (2048, 8), (1 << 62, 16)]  # (largest d, warps) of the full-rank kernel: one program per row
INF = tl.constexpr(float("inf"))


@triton.jit
def _ridge(z, row_ptr, offs_k, mask_k):
    """(w, ω, ωᵀz + β) of one ridge term."""
    omega = tl.load(row_ptr + 2 + offs_k, mask=mask_k, other=0.0)
    inside = tl.sum(z * omega[None, :], axis=1) + tl.load(row_ptr + 1)
    return tl.load(row_ptr), omega, inside


@triton.jit
def _gradient(z, lam, bias, ridge_ptr, units, stride, cosine, offs_k, mask_k):
    """∂h/∂z."""
    u = 2 * lam[None, :] * z + bias[None, :]
    for j in range(units):
        w, omega, inside = _ridge(z, ridge_ptr + j * stride, offs_k, mask_k)
        bent = tl.sigmoid(2 * inside)
        bent = tl.where(cosine > 0, -tl.sin(inside), 4 * bent * (1 - bent))  # tanh' by the logistic function
        u += (w * bent)[:, None] * omega[None, :]
    return u


@triton.jit
def _height(z, lam, bias, offset, ridge_ptr, units, stride, cosine, offs_k, mask_k):
    """h, (BLOCK_N,)."""
    h = tl.sum(z * (lam[None, :] * z + bias[None, :]), axis=1) + offset
    for j in range(units):
        w, _, inside = _ridge(z, ridge_ptr + j * stride, offs_k, mask_k)
        h += w * tl.where(cosine > 0, tl.cos(inside), 2 * tl.sigmoid(2 * inside) - 1)
    return h


@triton.jit
def _slope(y, alpha, rest, raw, lam, bias, ridge_ptr, units, stride, cosine, offs_k, mask_k):
    """(dy/dt, dα/dt, 1/‖a‖, ‖a‖·‖∇h‖); zero slopes where h is stationary. A raw barrier has 1 for ‖a‖."""
    outside = alpha * alpha * rest
    square = tl.sum(y * y, axis=1) + outside
    inverse = tl.where(raw > 0, 1.0, tl.where(square > 0, tl.rsqrt(square), 0.0))
    z = y * inverse[:, None]
    u = _gradient(z, lam, bias, ridge_ptr, units, stride, cosine, offs_k, mask_k)
    s = tl.where(raw > 0, 0.0, tl.sum(z * u, axis=1))
    tangent = u - s[:, None] * z
    turn = s * inverse
    speed = tl.sum(tangent * tangent, axis=1) + turn * turn * outside
    unit = tl.where((speed > 0) & (inverse > 0), tl.rsqrt(speed), 0.0)
    return unit[:, None] * tangent, -unit * turn * alpha, inverse, tl.sqrt(speed)


@triton.jit
def integrate(y, norm, c_ptr, rank, offs_k, mask_k, length, steps, extra):
    """All steps: returns α (BLOCK_N,) and the lift's numbers g = y_N - α·y₀ (BLOCK_N, BLOCK_K).

    c_ptr are the slot's numbers per direction, `extra` the rows that follow them (`steerfast.solvers.pack`); none: Euler.
    """
    lam = tl.load(c_ptr + offs_k * 8, mask=mask_k, other=0.0)
    bias = tl.load(c_ptr + offs_k * 8 + 1, mask=mask_k, other=0.0)
    e_ptr = c_ptr + rank * 8
    more = extra > 0
    stages = tl.load(e_ptr, mask=more, other=1.0).to(tl.int32)
    geodesic = tl.load(e_ptr + 1, mask=more, other=0.0)
    order = tl.load(e_ptr + 2, mask=more, other=0.0)
    tolerance = tl.load(e_ptr + 3, mask=more, other=0.0)
    level = tl.load(e_ptr + 4, mask=more, other=INF)
    raw = tl.load(e_ptr + 5, mask=more, other=0.0)
    offset = tl.load(e_ptr + 6, mask=more, other=0.0)
    units = tl.load(e_ptr + 8, mask=more, other=0.0).to(tl.int32)
    cosine = tl.load(e_ptr + 9, mask=more, other=0.0)
    ridge_ptr = e_ptr + (2 + stages) * 8
    stride = (rank + 9) // 8 * 8

    start = y
    alpha = tl.full(norm.shape, 1.0, tl.float32)
    rest = tl.maximum(norm * norm - tl.sum(y * y, axis=1), 0.0)
    even = length / steps
    left = length
    size = even
    for i in range(steps):
        dy, dalpha, inverse, speed = _slope(
            y, alpha, rest, raw, lam, bias, ridge_ptr, units, stride, cosine, offs_k, mask_k
        )
        step = even
        floor = left / (steps - i)  # at least this much now, so that the last attempt arrives
        if order > 0:
            step = tl.minimum(tl.maximum(size, floor), left)
        if level < INF:
            h = _height(
                y * inverse[:, None], lam, bias, offset, ridge_ptr, units, stride, cosine, offs_k, mask_k
            )
            slant = speed * inverse
            room = tl.where(slant > 0, tl.maximum(level - h, 0.0) / slant, 0.0)
            step = tl.minimum(step, room)
        b = tl.load(e_ptr + 18, mask=more, other=1.0)
        e = tl.load(e_ptr + 19, mask=more, other=0.0)
        sum_y, sum_alpha = b * dy, b * dalpha
        off_y, off_alpha = e * dy, e * dalpha
        for j in range(1, stages):
            s_ptr = e_ptr + (2 + j) * 8
            p, m = tl.load(s_ptr), tl.load(s_ptr + 1)
            b, e = tl.load(s_ptr + 2), tl.load(s_ptr + 3)
            there = y + step[:, None] * (p * dy + m * sum_y)
            dy, dalpha, _, _ = _slope(
                there, alpha + step * (p * dalpha + m * sum_alpha), rest,
                raw, lam, bias, ridge_ptr, units, stride, cosine, offs_k, mask_k,
            )  # fmt: skip
            sum_y, sum_alpha = sum_y + b * dy, sum_alpha + b * dalpha
            off_y, off_alpha = off_y + e * dy, off_alpha + e * dalpha
        keep = tl.full(norm.shape, 1.0, tl.float32)
        reach = step
        if geodesic > 0:
            angle = tl.where(speed > 0, step * inverse, 0.0)
            keep = tl.cos(angle)
            reach = tl.where(inverse > 0, tl.sin(angle) / tl.where(inverse > 0, inverse, 1.0), 0.0)
        if order > 0:
            error = step * tl.sqrt(tl.sum(off_y * off_y, axis=1) + off_alpha * off_alpha * rest)
            allowed = tolerance * norm
            fits = (error <= allowed) | (step <= floor)
            ratio = allowed / tl.where(error > 0, error, allowed * 1e-3 + 1e-30)
            growth = 0.9 * tl.exp2(tl.log2(tl.maximum(ratio, 1e-30)) / order)
            size = step * tl.minimum(tl.maximum(growth, 0.2), 5.0)
            reach = tl.where(fits, reach, 0.0)
            left -= reach
        y = keep[:, None] * y + reach[:, None] * sum_y
        alpha = keep * alpha + reach * sum_alpha
    return alpha, y - alpha[:, None] * start


@triton.jit
def _flow_kernel(
    z_ptr, stride_z_n,
    norm_ptr,
    scale_ptr,
    g_ptr, stride_g_n,
    coefficients_ptr,
    D, STEPS, EXTRA,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_n = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    z = tl.load(z_ptr + i_n * stride_z_n + offs_d, mask=mask_d, other=0.0)[None, :]
    norm = tl.load(norm_ptr + i_n) + tl.zeros((1,), tl.float32)
    weight = tl.load(coefficients_ptr + 2)
    if scale_ptr is not None:
        weight *= tl.load(scale_ptr + i_n)
    length = weight * (tl.load(coefficients_ptr) + tl.load(coefficients_ptr + 1) * norm)
    inside = tl.sqrt(tl.sum(z * z, axis=1))  # nothing lies outside the span, not even rounding
    alpha, g = integrate(z, inside, coefficients_ptr + 8, D, offs_d, mask_d, length, STEPS, EXTRA)
    g += (alpha - 1.0)[:, None] * z
    tl.store(g_ptr + i_n * stride_g_n + offs_d, tl.sum(g, axis=0).to(g_ptr.dtype.element_ty), mask=mask_d)


def flow(
    x: Tensor, basis: Tensor, coefficients: Tensor, steps: int, extra: int, scale: Tensor | None, out: Tensor
) -> Tensor:
    """Write the moved x into `out`; coefficients are one slot's rows: constants, λ and b̃ per direction, `extra` more."""
    flat = flatten(x)
    if flat.numel() == 0:
        return out
    d = flat.shape[1]
    wide = flat.dtype == torch.float32 or not flat.is_cuda
    z = flat.float() @ basis.float().T if wide else torch.mm(flat, basis.T, out_dtype=torch.float32)
    norm = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32)
    g = torch.empty_like(flat, memory_format=torch.contiguous_format)
    with on_device(x):
        _flow_kernel[(flat.shape[0],)](
            z_ptr=z, stride_z_n=z.stride(0),
            norm_ptr=norm, scale_ptr=scale,
            g_ptr=g, stride_g_n=g.stride(0),
            coefficients_ptr=coefficients,
            D=d, STEPS=steps, EXTRA=extra,
            BLOCK_D=power_of_two(d), num_warps=choose(WARPS, d),
        )  # fmt: skip
    moved = torch.addmm(flat.float(), g.float(), basis.float()).to(flat.dtype) if wide else torch.addmm(flat, g, basis)
    out.view(-1, d).copy_(moved)
    return out
