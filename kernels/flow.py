"""The flow of a barrier of low rank, on the k + 1 numbers that move: every step of it in registers.

A device function of the subspace kernel: it reads and writes no row of the stream. The specification is
`steerfast.solvers.integrate`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _flow_step(y, alpha, rest, lam, bias, step):
    """One Euler step of the flow on rows of coordinates: y (BLOCK_N, BLOCK_K), alpha, rest and step (BLOCK_N,)."""
    outside = alpha * alpha * rest
    square = tl.sum(y * y, axis=1) + outside
    inverse = tl.where(square > 0, tl.rsqrt(square), 0.0)
    point = y * inverse[:, None]
    u = 2 * lam[None, :] * point + bias[None, :]
    s = tl.sum(point * u, axis=1)
    tangent = u - s[:, None] * point
    speed = tl.sum(tangent * tangent, axis=1) + s * s * outside * inverse * inverse
    q = tl.where((speed > 0) & (square > 0), step * tl.rsqrt(speed), 0.0)
    shrink = 1 - q * s * inverse
    return shrink[:, None] * y + q[:, None] * u, shrink * alpha


@triton.jit
def integrate(y, norm, c_ptr, offs_k, mask_k, length, steps):
    """All steps: returns α (BLOCK_N,) and the lift's numbers g = y_N - α·y₀ (BLOCK_N, BLOCK_K)."""
    lam = tl.load(c_ptr + offs_k * 8, mask=mask_k, other=0.0)
    bias = tl.load(c_ptr + offs_k * 8 + 1, mask=mask_k, other=0.0)
    start = y
    alpha = tl.full(norm.shape, 1.0, tl.float32)
    rest = tl.maximum(norm * norm - tl.sum(y * y, axis=1), 0.0)
    step = length / steps
    for _ in range(steps):
        y, alpha = _flow_step(y, alpha, rest, lam, bias, step)
    return alpha, y - alpha[:, None] * start
