"""Logistic regression on a kernel, its settings chosen by held-out log-likelihood."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .data import UNKNOWN, Data, Held

EXACT = 2000
"""Up to this many rows a kernel is exact; above, Nyström with half as many landmarks."""
NEWTON = 50  # steps at most; five or six are usual
WEIGHT = 10.0
"""C times the number of rows, by the rule for steering: more would turn a fit from the mean difference to what separates."""
STRENGTHS = tuple(10.0**e for e in range(-1, 7))
"""The grid of C, in units that make it comparable over kernels: of the kernel divided by its mean diagonal."""


Strength = float | Callable[[int], float] | None
"""C: a number, a rule by the number of rows, or to be chosen."""


# --- logistic regression on a kernel -----------------------------------------------------------------------------------


def product(a: Tensor, b: Tensor) -> Tensor:
    """The plain kernel, x·y."""
    return a @ b.T


class Kernel:
    """Coordinates of rows in which a kernel is the plain product: L with L·Lᵀ = K, from landmarks (all rows: exact)."""

    def __init__(self, gram: Callable[[Tensor, Tensor], Tensor], rows: Tensor, landmarks: Tensor) -> None:
        self.landmarks = landmarks
        square = gram(landmarks, landmarks).double()
        self.scale = float(square.diagonal().mean())
        values, vectors = torch.linalg.eigh(square / self.scale)
        kept = values > values[-1].clamp(min=1e-12) * 1e-8
        self._to = (vectors[:, kept] * values[kept].rsqrt()) / math.sqrt(self.scale)
        self.coordinates = gram(rows, landmarks) @ self._to.to(rows.dtype)  # (n, r)

    def dual(self, w: Tensor) -> Tensor:
        """β over the landmarks, such that the function is Σⱼ βⱼ·K(·, xⱼ)."""
        return self._to @ w.double()


def weak(rows: int) -> float:
    """C of the rule for steering, on so many rows."""
    return min(1.0, WEIGHT / rows)


def regress(features: Tensor, labels: Tensor, C: float) -> tuple[Tensor, float]:
    """(w, intercept) of logistic regression with the penalty ‖w‖²/2C, by Newton's method.

    scikit-learn's default stops early: by a tenth, and at a large C by half, from the minimum.
    """
    how = "newton-cholesky" if features.shape[1] <= EXACT else "newton-cg"
    solver = scikit_learn()(C=C, max_iter=500, solver=how, tol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold of separable data may stop early; its held-out likelihood shows it
        found = solver.fit(features.double().numpy(), labels.numpy())
    return torch.from_numpy(found.coef_[0]).double(), float(found.intercept_[0])


def held_out(data: Data, folds: Sequence[Any], odds: Sequence[Tensor]) -> Held:
    """What the log-odds of the rows that each fold holds out are worth.

    A row is on its side by them; where the share of the classes is to be taken out, without that of the rows fitted.
    """
    if not folds:
        return UNKNOWN
    z = torch.cat(list(odds)).double()
    shares = [data.take(fold[0]).prior if data.balanced else 0.0 for fold in folds]
    border = torch.cat([torch.full_like(part, share, dtype=z.dtype) for part, share in zip(odds, shares, strict=True)])
    y = torch.cat([data.labels[fold[1]] for fold in folds])
    each = torch.nn.functional.logsigmoid(torch.where(y, z, -z))
    error = float(each.std()) / math.sqrt(len(each))
    return Held(float(each.mean()), float(((z > border) == y).double().mean()), error, area_under_roc(z, y))


def area_under_roc(scores: Tensor, labels: Tensor) -> float:
    """The chance that a positive scores above a negative, a tie counted half (Mann and Whitney); NaN without both."""
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2).double()[place]
    pos = int(labels.sum())
    pairs = pos * (len(labels) - pos)
    return float((ranks[labels].sum() - pos * (pos + 1) / 2) / pairs) if pairs else math.nan


def linear_weights(rows: Tensor, labels: Tensor, C: float) -> tuple[Tensor, float]:
    """(w, intercept) of logistic regression on the rows themselves, (n, d), with the penalty ‖w‖²/2C: float64 (d,)."""
    if rows.shape[1] <= len(rows):
        return regress(rows, labels, C)
    basis, coordinates = torch.linalg.qr(rows.double().T)  # w lies in what the rows span
    w, intercept = regress(coordinates.T, labels, C)
    return basis @ w, intercept


def choose(
    data: Data, kernels: Sequence[Any], gram: Callable[[Any, Tensor], Tensor], C: Strength
) -> tuple[Any, float, Held]:
    """The kernel and C with the best held-out log-likelihood, and that; what is given is not searched, C may be a rule.

    All folds and all C share one Gram matrix, and each C starts where the one before it ended.
    """
    part = data.searched()
    if not part.folds:  # nothing can be held out: the published penalty
        return kernels[0], 1.0 if C is None else C(len(data.x)) if callable(C) else C, UNKNOWN
    tried: list[tuple[Any, float, Held]] = []
    for kernel in kernels:
        K = gram(kernel, part.x.double())
        strengths = [s / float(K.diagonal().mean()) for s in STRENGTHS] if C is None else [C]
        paths = [
            _dual_path(
                K[fitted][:, fitted], part.labels[fitted], [s(len(fitted)) if callable(s) else s for s in strengths]
            )
            for fitted, _ in part.folds
        ]
        for i, strength in enumerate(strengths):
            odds = [
                K[held][:, fitted] @ path[i][0] + path[i][1]
                for (fitted, held), path in zip(part.folds, paths, strict=True)
            ]
            found = strength(len(data.x)) if callable(strength) else strength
            tried.append((kernel, found, held_out(part, part.folds, odds)))
    return max(tried, key=lambda found: found[2])


def _dual_path(K: Tensor, labels: Tensor, strengths: Sequence[float]) -> list[tuple[Tensor, float]]:
    """(β, intercept) of kernel logistic regression, f = Kβ + intercept, for each C in turn.

    Newton on C·Σ log(1 + exp(∓f)) + βᵀKβ/2 in its n dual coordinates: one Cholesky factor of I + √W·K·√W a step, where W is
    C·p(1 - p) (Rasmussen & Williams 2006, algorithm 3.1, with a free intercept).
    """
    target, sign = labels.double(), 2 * labels.double() - 1
    beta, intercept = torch.zeros(len(K), dtype=K.dtype, device=K.device), float(torch.logit(target.mean()))
    found = []
    for C in strengths:

        def loss(beta: Tensor, inside: Tensor, intercept: float, C: float = C) -> float:
            misses = torch.nn.functional.softplus(-sign * (inside + intercept)).sum()
            return float(misses + beta @ inside / (2 * C)) / len(K)

        inside = K @ beta  # f without its intercept
        now = loss(beta, inside, intercept)
        for _ in range(NEWTON):
            f = inside + intercept
            p = torch.sigmoid(f)
            weight = (C * p * (1 - p)).clamp(min=1e-12 * C)
            root = weight.sqrt()
            factor = torch.linalg.cholesky(
                (K * root).mul_(root[:, None]).add_(torch.eye(len(K), dtype=K.dtype, device=K.device))
            )
            right = torch.stack([C * (target - p) + weight * f, weight], 1)
            solved = right - root[:, None] * torch.cholesky_solve(root[:, None] * (K @ right), factor)
            goal = float(solved[:, 0].sum() / solved[:, 1].sum())  # the intercept at which Σβ = 0
            step, turn = solved[:, 0] - goal * solved[:, 1] - beta, goal - intercept
            bent, share = K @ step, 1.0
            while (
                new := loss(beta + share * step, inside + share * bent, intercept + share * turn)
            ) > now and share > 1e-3:
                share /= 2
            beta, inside, intercept = beta + share * step, inside + share * bent, intercept + share * turn
            gain, now = now - new, new
            if gain < 1e-10 * new:
                break
        found.append((beta, intercept))
    return found


def scikit_learn(owner: str = "fit_barrier") -> Any:
    """Its LogisticRegression, or an error that says how to install it."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f'{owner} needs scikit-learn: pip install "steerfast[demo]"') from None
    return LogisticRegression
