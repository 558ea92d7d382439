"""Barriers of every kind with random numbers, and flows in all dimensions, which know nothing of the small space."""

from __future__ import annotations

import math
from collections.abc import Callable

import reference
import torch
from torch import Tensor

import steerfast as sf
from steerfast.barriers.barrier import Ridge

KINDS = ("linear", "raw", "bent", "quadratic", "full", "rff", "mlp")
RAW = ("raw", "bent")
"""Without the sphere: linear, quadratic."""


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
    eigenvalues = torch.randn(rank, generator=generator) if kind in ("bent", "quadratic", "full") else torch.zeros(rank)
    ridge = None
    if kind in ("rff", "mlp"):
        omega = 2 * torch.randn(5, rank, generator=generator)
        numbers = torch.randn(2, 5, generator=generator)
        ridge = Ridge(omega, numbers[0], numbers[1] / 2, "cos" if kind == "rff" else "tanh")
    return sf.Barrier(orthonormal(rank, d, seed), eigenvalues, bias, 0.25, ridge=ridge, raw=kind in RAW)


def velocity(activation: str, d: int, rank: int = 3, seed: int = 0) -> sf.VelocityField:
    """A velocity field of width d whose matrix is not symmetric."""
    generator = torch.Generator().manual_seed(seed + 2)
    omega, eta = torch.randn(2, 4, rank, generator=generator) / 2
    bias, phases = torch.randn(rank, generator=generator), torch.randn(4, generator=generator)
    return sf.VelocityField(orthonormal(rank, d, seed), bias, omega, phases, eta, activation)


def formula(h: sf.Barrier | sf.VelocityField) -> reference.Barrier | reference.Velocity:
    """A barrier or velocity as the reference takes it."""
    if isinstance(h, sf.VelocityField):
        names = ("bias", "directions", "phases", "outputs")
        return reference.Velocity(*(reference.number(getattr(h, name)) for name in names), h.activation == "tanh")
    ridge = h.ridge
    terms = None if ridge is None else tuple(map(reference.number, (ridge.weights, ridge.phases, ridge.directions)))
    cosine = ridge is None or ridge.activation == "cos"
    return reference.Barrier(*map(reference.number, (h.eigenvalues, h.bias)), h.offset, h.raw, terms, cosine)


def by_hand(x: Tensor, edit: sf.Flow, scale: float = 1.0) -> Tensor:
    """Rows (n, d) after a flow, followed in all d dimensions."""
    level = math.inf if edit.level is None else edit.level
    walk = reference.WALKS[edit.method]._replace(level=level, tolerance=edit.tolerance)
    q, h, out = reference.rows_of(edit.barrier.basis), formula(edit.barrier), []
    for a in reference.rows_of(x):
        length = scale * (edit.T or 0.0) + scale * (edit.angle or 0.0) * a.norm()
        moved = reference.follow(a, q, h, length, edit.steps, walk)
        out.append(moved * (a.norm() / moved.norm()) if edit.keep_norm else moved)
    return torch.stack(out).view(x.shape)


def unit_gradient(h: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
    """∇h/‖∇h‖ by autograd, in all d dimensions."""
    with torch.enable_grad():
        leaf = a.detach().requires_grad_()
        gradient = torch.autograd.grad(h(leaf).sum(), leaf)[0]
    return gradient / gradient.norm(dim=-1, keepdim=True)


def slerp(a: Tensor, v: Tensor, angle: float) -> Tensor:
    """Rows turned towards v by an angle, on the great circle through both."""
    r = a.norm(dim=-1, keepdim=True)
    unit, goal = a / r, v / v.norm()
    tangent = goal - (unit @ goal)[:, None] * unit
    return r * (math.cos(angle) * unit + math.sin(angle) * tangent / tangent.norm(dim=-1, keepdim=True))
