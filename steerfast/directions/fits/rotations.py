"""Estimators of the rotations."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, positive_integer
from steerfast.barriers.data import Data, not_flat, seeded
from steerfast.barriers.kernels import linear_weights
from steerfast.directions.direction import ROUNDING
from steerfast.edits.rotations import Householder, Rotate, Spherical

from .sides import Sides

HIDDEN = 16
"""Hidden units of the angle net, at most."""


def rotate(sides: Sides, degrees: float | None = None, adaptive: bool = False) -> Rotate:
    """The steering plane of Angular Steering: b₁ the candidate of this layer, b₂ what all candidates vary along most.

    The candidate of a layer is the difference of the two sides' mean directions there, each of length 1. b₂ is the first
    principal component of the candidates of all layers that were given (centred), without its part along b₁, and points to
    where the rows of this layer lie.

    Args:
        sides: Both sides, of two layers at least.
        degrees: t, the angle from b₁ that rows are set to; 0 is most of the property, 180 least. None: that of the positive
            mean.
        adaptive: As of `Rotate`.

    Raises:
        ValueError: one layer only, or candidates that vary only along b₁.

    Reference:
        Vu & Nguyen 2025, Angular Steering (arXiv:2510.26243).
    """
    if len(sides.layers) < 2:
        raise ValueError(
            f"{sides.owner}: the plane is made of the candidates of several layers, and {len(sides.layers)} was given; collect "
            "more, such as layers=range(8, 20), and name one with layer="
        )
    candidates = torch.stack([_candidate(data) for data in sides.layers.values()])
    first = _candidate(sides.data)
    first = first / first.norm()
    _, sizes, components = torch.linalg.svd(candidates - candidates.mean(0), full_matrices=False)
    second = components[0] - (components[0] @ first) * first
    if not float(sizes[0]) > ROUNDING * float(candidates.norm()) or not float(second.norm()) > ROUNDING:
        raise ValueError(f"{sides.owner}: the candidates of the layers vary along one line only; collect more layers")
    second = second / second.norm()
    if float(second @ sides.data.x.double().mean(0)) < 0:
        second = -second
    plane = torch.stack([first, second])
    if degrees is None:
        along, across = (plane @ sides.positive.mean(0)).tolist()
        degrees = math.degrees(math.atan2(across, along))
    return Rotate(plane.float(), degrees, adaptive)


def _candidate(data: Data) -> Tensor:
    """The difference of both sides' mean directions, each of length 1: float64 (d,)."""
    unit = nn.functional.normalize(data.x.double(), dim=1)
    means = [nn.functional.normalize(unit[side].mean(0), dim=0) for side in (data.labels, ~data.labels)]
    found = means[0] - means[1]
    if not float(found.norm()) > ROUNDING:
        raise ValueError(
            f"{data.owner}: the mean directions of pos and neg do not differ; check the texts and position"
        )
    return found


def spherical(sides: Sides, alpha: float = 0.15, beta: float = 0.1, kappa: float = 20.0) -> Spherical:
    """Antipodal prototypes from the contrast of the means: μ_T = v/‖v‖, μ_H = −μ_T, v = mean(positive) − mean(negative).

    Args:
        sides: Both sides.
        alpha: As of `Spherical`; the default is that of the released code, whose runs take 0.6 and 0.7.
        beta: As of `Spherical`; −0.15 and 0.4 in those runs.
        kappa: As of `Spherical`.

    Reference:
        You et al. 2026, Spherical Steering (arXiv:2602.08169).
    """
    return Spherical(sides.difference, None, alpha, beta, kappa)


def householder(sides: Sides, hidden: int | None = None, C: float = 1.0, steps: int = 300) -> Householder:
    """A linear probe without a bias, and a net that predicts from a row the angle to its positive partner.

    The probe is logistic regression, penalty ‖s·v‖²/2C with s the root mean square of the rows. The net γ = π·σ(w₂ᵀrelu(W₁x +
    b₁) + b₂) is trained on all rows, by the mean squared error to the angle between the row and the positive row of its pair,
    which for positive rows is 0.

    Args:
        sides: Both sides, pairs: row i of one against row i of the other.
        hidden: Units of the net, h; None: 16, or as many as there are rows.
        C: Inverse strength of the probe's penalty.
        steps: Steps of Adam on all rows at once.

    Raises:
        ValueError: the sides are no pairs, or have fewer rows than the net has units; C is not positive.

    Reference:
        Pham & Nguyen 2024, Householder Pseudo-Rotation (arXiv:2409.10053); the paper's net is deeper.
    """
    positive, negative = sides.positive, sides.negative
    x = torch.cat([positive, negative])
    if len(positive) != len(negative):
        raise ValueError(
            f"{sides.owner}: needs pairs, and pos has {len(positive)} rows and neg {len(negative)}; give a negative row for "
            "each positive one"
        )
    hidden = min(HIDDEN, len(x)) if hidden is None else positive_integer(sides.owner, "hidden", hidden)
    if hidden > len(x):
        raise ValueError(
            f"{sides.owner}: hidden is {hidden} and there are {len(x)} rows; give more rows, or fewer units"
        )
    C = finite_number(sides.owner, "C", C)
    if C <= 0:
        raise ValueError(f"{sides.owner}: C is {C}; expected > 0")
    size = x.square().mean().sqrt()
    # beside their mirror images, with the other label and half the weight each, the rows have a fit whose intercept is zero
    mirrored, labels = torch.cat([x, -x]) / size, sides.data.labels
    normal, _ = linear_weights(mirrored, torch.cat([labels, ~labels]), C / 2)
    not_flat(normal, sides.owner)
    angles = torch.cat([torch.zeros(len(positive), dtype=x.dtype, device="cpu"), angle_between(negative, positive)])
    steps = positive_integer(sides.owner, "steps", steps)
    W1, b1, w2, b2 = angle_net(x / size, angles, hidden, steps, sides.data.seed)
    return Householder(normal.float(), (W1 / size).float(), b1.float(), w2.float(), float(b2))


def angle_between(a: Tensor, b: Tensor) -> Tensor:
    """Angles of the rows of a and b in radians, (n,)."""
    a, b = nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1)
    return 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))


def angle_net(x: Tensor, angles: Tensor, hidden: int, steps: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W₁, b₁, w₂, b₂) of γ = π·σ(w₂ᵀrelu(W₁x + b₁) + b₂), by Adam on the mean squared error to angles (n,).

    It begins at their mean.
    """
    drawn = torch.randn(hidden, x.shape[1] + 1, generator=seeded(seed), dtype=x.dtype, device="cpu")
    share = (angles.mean() / math.pi).clamp(1e-3, 1 - 1e-3)
    W1, w2 = drawn[:, 1:] / math.sqrt(x.shape[1]), drawn[:, 0] / math.sqrt(hidden)
    net = [W1, torch.zeros_like(w2), 0.1 * w2, torch.logit(share)]
    with torch.enable_grad():
        net = [part.requires_grad_() for part in net]
        optimizer = torch.optim.Adam(net, lr=0.01)
        for _ in range(steps):
            optimizer.zero_grad()
            found = math.pi * torch.sigmoid(torch.relu(x @ net[0].T + net[1]) @ net[2] + net[3])
            nn.functional.mse_loss(found, angles).backward()
            optimizer.step()
    W1, b1, w2, b2 = (part.detach() for part in net)
    return W1, b1, w2, b2
