"""Flows on the k + 1 numbers that move, da/dt = ∇h/‖∇h‖ of a barrier or a velocity: every step of every solver in registers.

Device functions of the subspace kernels and of `flow.py`: they read a slot's numbers and no row of the stream.
`steerfast.ops.solvers.integrate` is the same in PyTorch. Paper: ODESteer, arXiv:2602.17560.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .angles import cos, sin

INF = tl.constexpr(float("inf"))


@triton.jit
def _ridge(z, row_ptr, offs_k, mask_k):
    """(w, ω, ωᵀz + β) of one ridge term."""
    omega = tl.load(row_ptr + 2 + offs_k, mask=mask_k, other=0.0)
    inside = tl.sum(z * omega[None, :], axis=1) + tl.load(row_ptr + 1)
    return tl.load(row_ptr), omega, inside


@triton.jit
def _gradient(z, lam, bias, ridge_ptr, units, stride, act, offs_k, mask_k):
    """∂h/∂z; of a velocity (act > 1: identity, tanh) dz/dt, whose η lie half a stride behind ω.

    ω is read again for a barrier: a branch would cost registers, and what is read is in the cache.
    """
    u = 2 * lam[None, :] * z + bias[None, :]
    shift = tl.where(act > 1, stride // 2, 0)
    for j in range(units):
        row_ptr = ridge_ptr + j * stride
        w, _, inside = _ridge(z, row_ptr, offs_k, mask_k)
        bent = tl.sigmoid(2 * inside)
        slope = tl.where(act > 0, -sin(inside), 4 * bent * (1 - bent))  # tanh' by the logistic function
        bent = tl.where(act > 1, tl.where(act > 2, 2 * bent - 1, inside), slope)
        eta = tl.load(row_ptr + shift + 2 + offs_k, mask=mask_k, other=0.0)
        u += (w * bent)[:, None] * eta[None, :]
    return u


@triton.jit
def _height(z, lam, bias, offset, ridge_ptr, units, stride, act, offs_k, mask_k):
    """h, (BLOCK_N,)."""
    h = tl.sum(z * (lam[None, :] * z + bias[None, :]), axis=1) + offset
    for j in range(units):
        w, _, inside = _ridge(z, ridge_ptr + j * stride, offs_k, mask_k)
        h += w * tl.where(act > 0, cos(inside), 2 * tl.sigmoid(2 * inside) - 1)
    return h


@triton.jit
def _slope(y, alpha, rest, raw, lam, bias, ridge_ptr, units, stride, act, offs_k, mask_k):
    """(dy/dt, dα/dt, 1/‖a‖, ‖a‖·‖∇h‖); zero slopes where h is stationary. Raw: 1 for ‖a‖; a velocity (2): at its own speed."""
    outside = alpha * alpha * rest
    square = tl.sum(y * y, axis=1) + outside
    inverse = tl.where(raw > 0, 1.0, tl.where(square > 0, tl.rsqrt(square), 0.0))
    z = y * inverse[:, None]
    u = _gradient(z, lam, bias, ridge_ptr, units, stride, act, offs_k, mask_k)
    s = tl.where(raw > 0, 0.0, tl.sum(z * u, axis=1))
    tangent = u - s[:, None] * z
    turn = s * inverse
    speed = tl.sum(tangent * tangent, axis=1) + turn * turn * outside
    speed = tl.where(speed > 1e-12 * s * s, speed, 0.0)  # less is rounding
    unit = tl.where((speed > 0) & (inverse > 0), tl.rsqrt(speed), 0.0)
    unit = tl.where(raw > 1, 1.0, unit)
    return unit[:, None] * tangent, -unit * turn * alpha, inverse, tl.sqrt(speed)


@triton.jit
def _outside(y, norm):
    """What lies outside the span, if that is more than rounding, and α at the start: 0, which stays 0, if it is not."""
    square = norm * norm
    rest = square - tl.sum(y * y, axis=1)
    rest = tl.where(rest > 1e-6 * square, rest, 0.0)
    return rest, tl.where(rest > 0, 1.0, 0.0)


@triton.jit
def euler(y, norm, raw, c_ptr, offs_k, mask_k, length, steps):
    """All steps of Euler on a quadratic barrier, raw (1) or not (0): α (BLOCK_N,) and y at the end (BLOCK_N, BLOCK_K)."""
    lam = tl.load(c_ptr + offs_k * 8, mask=mask_k, other=0.0)
    bias = tl.load(c_ptr + offs_k * 8 + 1, mask=mask_k, other=0.0)
    rest, alpha = _outside(y, norm)
    step = length / steps
    for _ in range(steps):
        dy, dalpha, _, _ = _slope(y, alpha, rest, raw, lam, bias, c_ptr, 0, 0, 0.0, offs_k, mask_k)
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
    units, act, factor = tl.load(e_ptr + 8).to(tl.int32), tl.load(e_ptr + 9), tl.load(e_ptr + 10)
    ridge_ptr = e_ptr + (2 + stages) * 8
    stride = (rank + 9) // 8 * 8
    if act > 1:
        stride *= 2

    rest, alpha = _outside(y, norm)
    sign = tl.where(length < 0, -1.0, 1.0)  # a negative length follows -∇h: sizes are compared without their sign
    left = sign * length
    even = left / steps
    size = even
    for i in range(steps):
        dy, dalpha, inverse, speed = _slope(
            y, alpha, rest, raw, lam, bias, ridge_ptr, units, stride, act, offs_k, mask_k
        )
        step = even
        floor = left / (steps - i)  # at least this much now, so that the last attempt arrives
        if order > 0:
            step = tl.minimum(tl.maximum(size, floor), left)
        if level < INF:
            h = _height(y * inverse[:, None], lam, bias, offset, ridge_ptr, units, stride, act, offs_k, mask_k)
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
                raw, lam, bias, ridge_ptr, units, stride, act, offs_k, mask_k,
            )  # fmt: skip
            sum_y, sum_alpha = sum_y + b * dy, sum_alpha + b * dalpha
        keep = tl.full(norm.shape, 1.0, tl.float32)
        reach = move
        if geodesic > 0:
            angle = tl.where(speed > 0, move * inverse, 0.0)
            half = sin(0.5 * angle)
            keep = 1.0 - 2.0 * half * half  # the cosine, to the last place where it is near 1
            reach = tl.where(inverse > 0, sin(angle) / tl.where(inverse > 0, inverse, 1.0), 0.0)
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
