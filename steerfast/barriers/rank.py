"""The rank of a barrier, cut by what the cut does to the displacement of its flow."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from steerfast._checks import one_of, whole_number
from steerfast.ops.solvers import Field, integrate

MAX_RANK = 64
DISPLACEMENT = 0.005
"""Largest mean error of the displacement, as a share of it, that a cut of the rank may cause in fit; 1 % is promised."""
ANGLE, STEPS = 0.4, 10  # of the flow whose displacement is compared


# --- rank --------------------------------------------------------------------------------------------------------------


def cut_rank(A: Tensor, b: Tensor, sample: Tensor, rank: int | str, raw: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, λ, b̃) of h = xᵀAx + bᵀx within a subspace that holds b and the eigenvectors of largest |λ|: Q is (k, r).

    "auto" takes the smallest of 1, 2, 3, 5, 9, … whose flow, raw or on the sphere, moves the sampled points as the full one does.
    """
    values, vectors = torch.linalg.eigh(A)
    vectors = vectors[:, values.abs().argsort(descending=True)]
    full = min(len(b), MAX_RANK)
    if rank != "auto":
        return _within(A, b, vectors, int(rank))
    start = sample.double()
    true = _displacement(A, b, torch.eye(len(b), dtype=torch.float64, device=b.device), start, raw)
    size = true.norm(dim=1).clamp(min=1e-12)
    for k in sorted({min(r, full) for r in (1, 2, 3, 5, 9, 17, 25, 33, 49, full)}):
        found = _within(A, b, vectors, k)
        error = ((_displacement(A, b, found[0], start, raw) - true).norm(dim=1) / size).mean()
        if error <= DISPLACEMENT:
            return found
    warnings.warn(
        f"fit_barrier: at rank {full} the flow still misses its displacement by {float(error):.1%} of it",
        UserWarning,
        stacklevel=5,
    )
    return found


def _within(A: Tensor, b: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    length = b.norm()
    first = [b / length] if length > 1e-9 * A.abs().max() else []
    if rank == len(b):
        return vectors.T, ((vectors.T @ A) * vectors.T).sum(1), vectors.T @ b
    stack = torch.stack([*first, *vectors.T[:rank]], dim=1)
    q = torch.linalg.qr(stack)[0][:, :rank]
    values, turned = torch.linalg.eigh(q.T @ A @ q)
    q = q @ turned
    return q.T, values, q.T @ b


def _displacement(A: Tensor, b: Tensor, q: Tensor, start: Tensor, raw: bool) -> Tensor:
    """What the flow of the barrier within span(q) adds to points."""
    values, turned = torch.linalg.eigh(q @ A @ q.T)
    q = turned.T @ q
    y = start @ q.T
    norm = torch.linalg.vector_norm(start, dim=1, keepdim=True)
    alpha, moved = integrate(y, norm, Field(values, q @ b, raw=raw), ANGLE * norm, STEPS)
    return (alpha - 1) * start + (moved - alpha * y) @ q


# --- what goes in ------------------------------------------------------------------------------------------------------


def check_rank(kind: str, rank: int | str, n: int, d: int) -> int | str:
    """The rank as given; refused if it is one that a kind cannot have on n rows of width d."""
    if isinstance(rank, str):
        return one_of("fit_barrier", "rank", rank, ("auto",))
    rank = whole_number("fit_barrier", "rank", rank, 1)
    most = {"linear": 1, "sketch": d}.get(kind, min(MAX_RANK, d, n))
    if rank > most:
        raise ValueError(
            f"fit_barrier: rank is {rank}; expected at most {most} for a {kind} barrier of width {d} on {n} rows"
        )
    return rank
