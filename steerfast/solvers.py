"""The flow of a barrier of low rank, on the k + 1 numbers that move: the specification of `steerfast_kernels.flow`."""

from __future__ import annotations

import torch
from torch import Tensor


def integrate(y: Tensor, norm: Tensor, c: Tensor, length: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Euler steps of da/dt = ∇h/‖∇h‖ for h(a) = x̂ᵀQΛQᵀx̂ + b̃ᵀQᵀx̂, x̂ = a/‖a‖, on the coordinates (Qᵀa, α).

    The trajectory stays in span(Q, a₀): a = α·a₀ + Q(y - α·y₀), so k + 1 numbers are all that moves
    (exact: h depends on a only through Qᵀa and ‖a‖).
    λ = c[:, 0], b̃ = c[:, 1]. y is (n, k); norm = ‖a₀‖ and length = T are (n, 1).
    Returns (α, y) after the last step; at a stationary point or a zero row nothing moves.
    """
    step = length / steps
    alpha = torch.ones_like(norm)
    rest = (norm * norm - (y * y).sum(-1, keepdim=True)).clamp(min=0)  # what lies outside span(Q), never negative
    for _ in range(steps):
        outside = alpha * alpha * rest
        square = (y * y).sum(-1, keepdim=True) + outside
        inverse = torch.where(square > 0, torch.rsqrt(square), 0)
        point = y * inverse
        u = 2 * c[:, 0] * point + c[:, 1]
        s = (point * u).sum(-1, keepdim=True)
        tangent = u - s * point
        speed = (tangent * tangent).sum(-1, keepdim=True) + s * s * outside * inverse * inverse
        q = torch.where((speed > 0) & (square > 0), step * torch.rsqrt(speed), 0)
        shrink = 1 - q * s * inverse
        y, alpha = shrink * y + q * u, shrink * alpha
    return alpha, y
