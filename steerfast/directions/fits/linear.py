"""Estimators of the linear interventions."""

from __future__ import annotations

import torch
from torch import Tensor

from steerfast._checks import finite_number
from steerfast.directions.direction import ROUNDING
from steerfast.edits.linear import Ablate, Add, Affine, AffineAblate, Clamp

from .sides import Sides

_COLUMNS = 512  # coordinates that are sorted at once


def add(sides: Sides, strength: float = 1.0, keep_norm: bool = False) -> Add:
    """x + c·v, v = mean(positive) − mean(negative): at c = 1 the negative mean goes to the positive one.

    Args:
        sides: Both sides.
        strength: c.
        keep_norm: As of `Add`.

    Reference:
        Rimsky et al. 2024, CAA (arXiv:2312.06681).
    """
    return Add(sides.difference, strength, keep_norm)


def ablate(sides: Sides, keep_norm: bool = False) -> Ablate:
    """x − v̂v̂ᵀx, v = mean(positive) − mean(negative).

    Args:
        sides: Both sides.
        keep_norm: As of `Ablate`.

    Reference:
        Arditi et al. 2024, refusal direction (arXiv:2406.11717).
    """
    return Ablate(sides.difference, keep_norm)


def affine_ablate(sides: Sides, alpha: float = 1.0, keep_norm: bool = False) -> AffineAblate:
    """x − v̂v̂ᵀ(x − μ₋) + α·v, v = μ₊ − μ₋ the difference of the class means.

    Args:
        sides: Both sides.
        alpha: α, where along v every row ends: 1 at the positive mean, 0 at the negative one.
        keep_norm: As of `AffineAblate`.

    Reference:
        Marshall et al. 2024, Refusal in LLMs is an Affine Function (arXiv:2411.09003).
    """
    v = sides.difference
    baseline = float(v / v.norm() @ sides.negative.mean(0))
    return AffineAblate(v, baseline, finite_number(sides.owner, "alpha", alpha) * float(v.norm()), keep_norm)


def clamp(sides: Sides, low: float | None = 0.25, high: float | None = None, keep_norm: bool = False) -> Clamp:
    """clip(v̂ᵀx) to quantiles of the positive side, v = mean(positive) − mean(negative).

    Args:
        sides: Both sides.
        low: Quantile of the positive projections, 0 to 1, below which no row stays; None: no lower bound.
        high: Quantile above which none stays; None: no upper bound.
        keep_norm: As of `Clamp`.

    Raises:
        ValueError: a quantile is not between 0 and 1; neither is given, or low > high.

    Reference:
        Lu et al. 2026, The Assistant Axis (arXiv:2601.10387): a bound at the 25th percentile of the projections.
    """
    low, high = (_share(sides.owner, name, value) for name, value in (("low", low), ("high", high)))
    if low is not None and high is not None and low > high:
        raise ValueError(f"{sides.owner}: low is {low} and high {high}; expected quantiles low <= high")
    v = sides.difference
    projections = sides.positive @ (v / v.norm())
    bounds = [None if share is None else float(projections.quantile(share)) for share in (low, high)]
    return Clamp(v, bounds[0], bounds[1], keep_norm)


def _share(owner: str, name: str, share: float | None) -> float | None:
    if share is None:
        return None
    share = finite_number(owner, name, share)
    if not 0 <= share <= 1:
        raise ValueError(f"{owner}: {name} is {share}; expected a quantile of the positive side, 0 to 1, or None")
    return share


def affine(sides: Sides, keep_norm: bool = False) -> Affine:
    """w ⊙ x + b, coordinate by coordinate the least squares of the optimal transport from the negative to the positive side.

        w, b = argmin ∫₀¹ (Q₊(u) − w·Q₋(u) − b)² du,   Q the quantile function of a coordinate on one side

    In one dimension the optimal transport pairs equal quantiles: with as many rows on both sides the i-th smallest values. A
    coordinate that is constant on the negative side is moved by the difference of the means. The paper fits layer after layer
    on a model that is steered in the layers before: collect under `sf.steer` for that.

    Args:
        sides: Both sides.
        keep_norm: As of `Affine`.

    Reference:
        Rodriguez et al. 2025, Controlling Language and Diffusion Models by Transporting Activations, Linear-AcT
        (arXiv:2410.23054).
    """
    parts = zip(sides.negative.split(_COLUMNS, 1), sides.positive.split(_COLUMNS, 1), strict=True)
    weights, biases = zip(*(transport(source, target) for source, target in parts), strict=True)
    return Affine(torch.cat(weights).float(), torch.cat(biases).float(), keep_norm)


def transport(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(w, b), each (d,), of the map that takes the columns of source (n, d) to those of target (m, d), as in `affine`."""
    share, a, b = paired_quantiles(source, target)
    mean_a, mean_b = (share * a).sum(0), (share * b).sum(0)
    spread, common = (share * (a - mean_a) ** 2).sum(0), (share * (a - mean_a) * (b - mean_b)).sum(0)
    constant = spread <= (ROUNDING * a.abs().amax(0)) ** 2
    weight = torch.where(constant, 1.0, common / torch.where(constant, 1.0, spread))
    return weight, mean_b - weight * mean_a


def paired_quantiles(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal transport of each column of a (n, d) to that of b (m, d): (share (k, 1), values of a and of b (k, d)).

    A share of the mass moves from the one value to the other; with n = m the i-th smallest values are paired. Differentiable.
    """
    n, m = len(a), len(b)
    # Both quantile functions are constant between two of the edges i/n and j/m, here in units of 1/nm.
    edges = torch.unique(torch.cat([m * torch.arange(n + 1, device="cpu"), n * torch.arange(m + 1, device="cpu")]))
    share = edges.diff().to(a.dtype)[:, None] / (n * m)
    return share, a.sort(0).values[edges[:-1] // m], b.sort(0).values[edges[:-1] // n]
