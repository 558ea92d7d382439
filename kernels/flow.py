"""The flow of a barrier, da/dt = ∇h/‖∇h‖, on the k + 1 numbers that move: every step of every solver in registers.

`euler` and `integrate` are device functions of the subspace kernels: they read and write no row of the stream. `flow`
serves full-rank barriers, k = d: z = Qx by a matrix product, all steps on z in one kernel (reads 4d and writes |x|d bytes
a token), x + Qᵀ(z_T - z₀) by another product. `steerfast.ops.solvers.integrate` is the same in PyTorch.
Paper: ODESteer, arXiv:2602.17560.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import choose, kernel, power_of_two, stride
from ._tuned import tuned

# (largest d, warps) of the full-rank kernel: one program per row. No solver spills up to d = 4096; beyond it all but Euler do on
# sm_90, 184 bytes, and 32 warps, of 64 registers, spill no less
WARPS = [(1024, 4), (2048, 8), (1 << 62, 16)]
INF = tl.constexpr(float("inf"))


@triton.jit
def _sin(x):
    """Sine to 1e-7 for |x| < 1e4: the series on [-π/2, π/2]. The built-in one carries a table for huge angles, and spills."""
    n = tl.floor(x * 0.3183098861837907 + 0.5)
    r = x - n * 3.140625 - n * 9.67653589793e-4  # π in two parts, the first exact in a product
    r = tl.minimum(tl.maximum(r, -1.5707964), 1.5707964)  # an absurd angle stays finite
    z = r * r
    poly = (((-2.5052108e-8 * z + 2.7557319e-6) * z - 1.9841270e-4) * z + 8.3333333e-3) * z - 1.6666667e-1
    odd = n - 2.0 * tl.floor(0.5 * n)
    return (1.0 - 2.0 * odd) * (r + r * z * poly)


@triton.jit
def _cos(x):
    return _sin(x + 1.5707963267948966)


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
        bent = tl.where(cosine > 0, -_sin(inside), 4 * bent * (1 - bent))  # tanh' by the logistic function
        u += (w * bent)[:, None] * omega[None, :]
    return u


@triton.jit
def _height(z, lam, bias, offset, ridge_ptr, units, stride, cosine, offs_k, mask_k):
    """h, (BLOCK_N,)."""
    h = tl.sum(z * (lam[None, :] * z + bias[None, :]), axis=1) + offset
    for j in range(units):
        w, _, inside = _ridge(z, ridge_ptr + j * stride, offs_k, mask_k)
        h += w * tl.where(cosine > 0, _cos(inside), 2 * tl.sigmoid(2 * inside) - 1)
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
    speed = tl.where(speed > 1e-12 * s * s, speed, 0.0)  # less is rounding
    unit = tl.where((speed > 0) & (inverse > 0), tl.rsqrt(speed), 0.0)
    return unit[:, None] * tangent, -unit * turn * alpha, inverse, tl.sqrt(speed)


@triton.jit
def _outside(y, norm):
    """What lies outside the span, if that is more than rounding, and α at the start: 0, which stays 0, if it is not."""
    square = norm * norm
    rest = square - tl.sum(y * y, axis=1)
    rest = tl.where(rest > 1e-6 * square, rest, 0.0)
    return rest, tl.where(rest > 0, 1.0, 0.0)


@triton.jit
def euler(y, norm, c_ptr, offs_k, mask_k, length, steps):
    """All steps of Euler on a quadratic barrier: α (BLOCK_N,) and y at the end (BLOCK_N, BLOCK_K)."""
    lam = tl.load(c_ptr + offs_k * 8, mask=mask_k, other=0.0)
    bias = tl.load(c_ptr + offs_k * 8 + 1, mask=mask_k, other=0.0)
    rest, alpha = _outside(y, norm)
    step = length / steps
    for _ in range(steps):
        dy, dalpha, _, _ = _slope(y, alpha, rest, 0.0, lam, bias, c_ptr, 0, 0, 0.0, offs_k, mask_k)
        y += step[:, None] * dy
        alpha += step * dalpha
    return tl.where(rest == 0.0, 1.0, alpha), y


@triton.jit
def integrate(y, norm, c_ptr, rank, offs_k, mask_k, length, steps):
    """All steps of any solver on any barrier, as `euler` returns them.

    c_ptr are the slot's numbers per direction; the rows of `steerfast.ops.solvers.pack` follow them.
    """
    lam = tl.load(c_ptr + offs_k * 8, mask=mask_k, other=0.0)
    bias = tl.load(c_ptr + offs_k * 8 + 1, mask=mask_k, other=0.0)
    e_ptr = c_ptr + rank * 8
    stages = tl.load(e_ptr).to(tl.int32)
    geodesic, order, tolerance = tl.load(e_ptr + 1), tl.load(e_ptr + 2), tl.load(e_ptr + 3)
    level, raw, offset = tl.load(e_ptr + 4), tl.load(e_ptr + 5), tl.load(e_ptr + 6)
    units, cosine, factor = tl.load(e_ptr + 8).to(tl.int32), tl.load(e_ptr + 9), tl.load(e_ptr + 10)
    ridge_ptr = e_ptr + (2 + stages) * 8
    stride = (rank + 9) // 8 * 8

    rest, alpha = _outside(y, norm)
    sign = tl.where(length < 0, -1.0, 1.0)  # a negative length follows -∇h: sizes are compared without their sign
    left = sign * length
    even = left / steps
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
            h = _height(y * inverse[:, None], lam, bias, offset, ridge_ptr, units, stride, cosine, offs_k, mask_k)
            slant = speed * inverse
            room = tl.where(slant > 0, tl.maximum(sign * (level - h), 0.0) / slant, 0.0)
            step = tl.minimum(step, room)
        move = sign * step
        b = tl.load(e_ptr + 18)
        sum_y, sum_alpha = b * dy, b * dalpha
        for j in range(1, stages):
            s_ptr = e_ptr + (2 + j) * 8
            p, m, b = tl.load(s_ptr), tl.load(s_ptr + 1), tl.load(s_ptr + 2)
            there = y + move[:, None] * (p * dy + m * sum_y)
            dy, dalpha, _, _ = _slope(
                there, alpha + move * (p * dalpha + m * sum_alpha), rest,
                raw, lam, bias, ridge_ptr, units, stride, cosine, offs_k, mask_k,
            )  # fmt: skip
            sum_y, sum_alpha = sum_y + b * dy, sum_alpha + b * dalpha
        keep = tl.full(norm.shape, 1.0, tl.float32)
        reach = move
        if geodesic > 0:
            angle = tl.where(speed > 0, move * inverse, 0.0)
            half = _sin(0.5 * angle)
            keep = 1.0 - 2.0 * half * half  # the cosine, to the last place where it is near 1
            reach = tl.where(inverse > 0, _sin(angle) / tl.where(inverse > 0, inverse, 1.0), 0.0)
        if order > 0:
            off_y, off_alpha = dy - sum_y, dalpha - sum_alpha
            error = factor * step * tl.sqrt(tl.sum(off_y * off_y, axis=1) + off_alpha * off_alpha * rest)
            allowed = tolerance * norm
            fits = (error <= allowed) | (step <= floor)
            ratio = allowed / tl.where(error > 0, error, allowed * 1e-3 + 1e-30)
            growth = 0.9 * tl.exp2(tl.log2(tl.maximum(ratio, 1e-30)) / order)
            size = step * tl.minimum(tl.maximum(growth, 0.2), 5.0)
            reach = tl.where(fits, reach, 0.0)
            left -= sign * reach
        y = keep[:, None] * y + reach[:, None] * sum_y
        alpha = keep * alpha + reach * sum_alpha
    return tl.where(rest == 0.0, 1.0, alpha), y


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
                    _, z = euler(z, inside, c_ptr + 8, offs_d, mask_d, length, tl.load(head_ptr + 5))
            else:
                _, z = euler(z, inside, c_ptr + 8, offs_d, mask_d, length, tl.load(head_ptr + 5))
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
