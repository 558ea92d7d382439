"""Barriers: h(a) = log p₊(a)/p₋(a), fitted on positive and negative activations, whose gradient a flow follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import finite_number, one_of

KINDS = ("linear",)
ORTHONORMAL = 1e-3
"""Largest entry of |QQᵀ - I| that still counts as an orthonormal basis in float32."""


@dataclass(frozen=True, eq=False)
class Barrier:
    """A barrier of low rank on the unit sphere: h(a) = x̂ᵀQΛQᵀx̂ + b̃ᵀQᵀx̂ + c, x̂ = a/‖a‖, Q = basis.T.

    Attributes:
        basis: Orthonormal rows (k, d), float32.
        eigenvalues: Λ's diagonal, (k,); zero for a linear barrier.
        bias: b̃, (k,).
        offset: c.
        typical_norm: Mean ‖a‖ of the activations that it was fitted on; 0 if unknown.
        accuracy: Share of the fitted activations on the right side of h = 0; 0 if unknown.

    Raises:
        ValueError: shapes do not fit, a number is not finite, or the basis is not orthonormal.
    """

    basis: Tensor
    eigenvalues: Tensor
    bias: Tensor
    offset: float = 0.0
    typical_norm: float = 0.0
    accuracy: float = 0.0

    def __post_init__(self) -> None:
        for name in ("basis", "eigenvalues", "bias"):
            if not isinstance(getattr(self, name), Tensor):
                raise TypeError(f"Barrier: {name} must be a tensor; got {type(getattr(self, name)).__name__}")
        rank = self.basis.shape[0] if self.basis.dim() == 2 else 0
        if rank == 0 or self.eigenvalues.shape != (rank,) or self.bias.shape != (rank,):
            raise ValueError(
                f"Barrier: basis {tuple(self.basis.shape)}, eigenvalues {tuple(self.eigenvalues.shape)} and bias "
                f"{tuple(self.bias.shape)} do not fit; expected (k, d), (k,) and (k,)"
            )
        for name in ("basis", "eigenvalues", "bias"):
            value = getattr(self, name).detach().to("cpu", torch.float32, copy=True).contiguous()
            if not value.isfinite().all():
                raise ValueError(f"Barrier: {name} holds NaN or Inf")
            object.__setattr__(self, name, value)
        deviation = (self.basis.double() @ self.basis.double().T - torch.eye(rank)).abs().max().item()
        if deviation > ORTHONORMAL:
            raise ValueError(f"Barrier: the rows of basis are not orthonormal (QQᵀ deviates from I by {deviation:.1e})")

    def __call__(self, a: Tensor) -> Tensor:
        """h of activations (..., d), as (...,), in float32 or, for float64 activations, in float64."""
        a = a if a.dtype == torch.float64 else a.float()
        y = (a / a.norm(dim=-1, keepdim=True)) @ self.basis.to(a).T
        return (y * y) @ self.eigenvalues.to(a) + y @ self.bias.to(a) + self.offset


def fit_barrier(pos: Any, neg: Any, kind: str = "linear", C: float = 1.0) -> Barrier:
    """Fit h = log p₊/p₋ on two sets of activations.

    "linear" is logistic regression on activations scaled to unit length: h(a) = wᵀa/‖a‖ + c.

    Args:
        pos: Activations on the wanted side, (n, d): a tensor, or what `sf.collect` returns for one layer.
        neg: Activations on the other side, (m, d).
        kind: "linear".
        C: Inverse strength of the L2 penalty on w, as in scikit-learn; separable data needs a finite one.

    Returns:
        A `Barrier`.

    Raises:
        ValueError: a side is empty, holds NaN or a zero row, or the sides have different widths.
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> import torch, steerfast as sf
        >>> pos, neg = torch.tensor([[1.0, 0.2], [1.0, -0.2]]), torch.tensor([[-1.0, 0.2], [-1.0, -0.2]])
        >>> bool((sf.fit_barrier(pos, neg)(pos) > 0).all())
        True
    """
    one_of("fit_barrier", "kind", kind, KINDS)
    if finite_number("fit_barrier", "C", C) <= 0:
        raise ValueError(f"fit_barrier: C is {C}; expected > 0")
    pos, neg = _activations("pos", pos), _activations("neg", neg)
    if pos.shape[1] != neg.shape[1]:
        raise ValueError(
            f"fit_barrier: pos has width {pos.shape[1]} and neg {neg.shape[1]}; both must come from one layer"
        )
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError:
        raise ModuleNotFoundError('fit_barrier needs scikit-learn: pip install "steerfast[demo]"') from None
    rows = torch.cat([pos, neg]).double()
    norms = rows.norm(dim=1)
    labels = torch.cat([torch.ones(len(pos)), torch.zeros(len(neg))]).long()
    model = LogisticRegression(C=C, max_iter=2000).fit((rows / norms[:, None]).numpy(), labels.numpy())
    w = torch.from_numpy(model.coef_[0])
    if not w.norm() > 0:
        raise ValueError("fit_barrier: the two sides are identical, so no direction separates them")
    basis, bias = (w / w.norm())[None], w.norm()[None]
    found = Barrier(basis, torch.zeros(1), bias, float(model.intercept_[0]), float(norms.mean()))
    accuracy = ((found(rows) > 0).long() == labels).double().mean().item()
    return Barrier(found.basis, found.eigenvalues, found.bias, found.offset, found.typical_norm, accuracy)


def _activations(name: str, value: Any) -> Tensor:
    if isinstance(value, dict):
        if len(value) != 1:
            raise ValueError(f"fit_barrier: {name} holds {len(value)} layers; pass one of them, such as acts[14]")
        value = next(iter(value.values()))
    rows = torch.as_tensor(value).detach().float().cpu()
    if rows.dim() != 2 or rows.shape[0] == 0:
        raise ValueError(f"fit_barrier: {name} has shape {tuple(rows.shape)}; expected (n, d) with n >= 1")
    bad = (~rows.isfinite()).any(1) | (rows == 0).all(1)
    if bad.any():
        raise ValueError(f"fit_barrier: row {int(bad.nonzero()[0])} of {name} is zero or holds NaN or Inf; remove it")
    return rows
