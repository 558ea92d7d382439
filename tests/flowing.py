"""Barriers of every kind with random numbers, and a flow that knows nothing of the small space: for every test of flows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import steerfast as sf
from steerfast.barriers.barrier import Ridge
from steerfast.ops import backends as _backends
from steerfast.ops.solvers import Tableau

KINDS = ("linear", "raw", "quadratic", "full", "rff", "mlp")


def orthonormal(rank: int, d: int, seed: int = 0) -> Tensor:
    """Orthonormal rows (rank, d) that are exact in every dtype: blocks of a Hadamard matrix of order 4; d is a multiple of 4."""
    block = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    rows = torch.block_diag(*[block] * (d // 4))
    order = torch.randperm(d, generator=torch.Generator().manual_seed(seed))
    return rows[order][:rank].contiguous()


def barrier(kind: str, d: int, rank: int = 3, seed: int = 0) -> sf.Barrier:
    """A barrier of width d."""
    rank = {"linear": 1, "raw": 1, "full": d}.get(kind, rank)
    generator = torch.Generator().manual_seed(seed + 1)
    bias = torch.randn(rank, generator=generator)
    eigenvalues = torch.randn(rank, generator=generator) if kind in ("quadratic", "full") else torch.zeros(rank)
    ridge = None
    if kind in ("rff", "mlp"):
        omega = 2 * torch.randn(5, rank, generator=generator)
        numbers = torch.randn(2, 5, generator=generator)
        ridge = Ridge(omega, numbers[0], numbers[1] / 2, "cos" if kind == "rff" else "tanh")
    return sf.Barrier(orthonormal(rank, d, seed), eigenvalues, bias, 0.25, ridge=ridge, raw=kind == "raw")


def by_reference(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A call on the PyTorch backend, whatever the test has chosen."""
    chosen = _backends._chosen or "auto"
    sf.use_backend("torch")
    try:
        return function(*args, **kwargs)
    finally:
        sf.use_backend(chosen)


def unit_gradient(h: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """∇h/‖∇h‖ by autograd, in all d dimensions."""
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        gradient = torch.autograd.grad(h(leaf).sum(), leaf)[0]
    return gradient / gradient.norm(dim=-1, keepdim=True)


def runge_kutta(h: sf.Barrier, a: Tensor, length: Tensor, steps: int, tableau: Tableau) -> Tensor:
    """A Runge-Kutta scheme by its textbook formula, in all d dimensions."""
    step = length / steps
    for _ in range(steps):
        slopes: list[Tensor] = []
        for row in tableau.a:
            slopes.append(unit_gradient(h, a + step * sum((w * k for w, k in zip(row, slopes, strict=True)), 0 * a)))
        a = a + step * sum(w * k for w, k in zip(tableau.b, slopes, strict=True))
    return a


def great_circles(h: sf.Barrier, a: Tensor, length: Tensor, steps: int) -> Tensor:
    """Steps along the great circle that the gradient points to, in all d dimensions."""
    for _ in range(steps):
        r = a.norm(dim=-1, keepdim=True)
        t = length / steps / r
        a = torch.cos(t) * a + r * torch.sin(t) * unit_gradient(h, a)
    return a


def slerp(a: Tensor, v: Tensor, angle: float) -> Tensor:
    """Rows turned towards v by an angle, on the great circle through both."""
    r = a.norm(dim=-1, keepdim=True)
    unit, goal = a / r, v / v.norm()
    tangent = goal - (unit @ goal)[:, None] * unit
    return r * (math.cos(angle) * unit + math.sin(angle) * tangent / tangent.norm(dim=-1, keepdim=True))
