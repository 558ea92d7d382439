"""A velocity field fitted by the model's own gradients: the way that helps most for what it breaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, positive_integer, seed_number, whole_number
from steerfast._null import DRAWS, Null
from steerfast.barriers.data import seeded
from steerfast.barriers.velocity import VelocityField, VelocityInfo
from steerfast.edits.flow import flow

from .lessons import Edit, Lesson, Pupil, split
from .natural import Gradients, Metric, log_odds

RANK, DAMPING = 3, (3.0, 1.0)
"""Defaults: terms, and shares of the mean eigenvalues."""
DAMAGE = 0.1
"""Nats per held-out neutral token that a time of 1 costs: KL(unsteered ‖ steered)."""
STRIDE, LONGEST = 1.5, 1e6
"""Factor between two times at which that cost is looked for, and how far from the expected one."""
NEAR, TRIES = 0.99, 12
"""A time is near enough that costs this share of it or more, and how many times are tried between two that enclose it."""


@torch.inference_mode(False)
def fit_velocity(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[tuple[str, str, str]],
    layer: int,
    *,
    neutral: Iterable[str] | None = None,
    rank: int = RANK,
    damping: tuple[float, float] = DAMPING,
    seed: int = 0,
    draws: int = DRAWS,
) -> VelocityField:
    """Fit an affine velocity field at a block's output that turns a model from unwanted to wanted continuations.

    Of all edits a ↦ a + M·(a, 1) of low rank it is the one that raises log p(wanted) − log p(unwanted) fastest for a given
    damage to neutral text, to first and second order: the natural gradient

        M ∝ F⁻¹ G Σ⁻¹,   G = mean over examples of Σ ∇(log p)·(a, 1)ᵀ,   F: Fisher information,   Σ: mean of (a, 1)(a, 1)ᵀ

    with G summed over the tokens that are edited, the last of the prompt and every later one, with the minus sign for unwanted
    continuations; F and Σ on neutral text, each with a share of its mean eigenvalue added. M is cut to its leading terms in the
    metric of F and Σ. The model's weights stay as they are.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        examples: (prompt, wanted, unwanted), strings; mind the leading space of a continuation. Of ten or more every fifth is
            held out.
        layer: Decoder block, 0-based, negative from the end.
        neutral: Texts that are to stay as likely as they are; None: 48 texts that the model writes itself.
        rank: Terms of M; the field has at most twice that rank.
        damping: Shares of the mean eigenvalue that are added to F and Σ.
        seed: Of what is drawn.
        draws: Fields of exchanged sides, and random directions, each paced to the same damage, that the gain of held-out
            pairs stands beside in `info.null`; 0: none. Gradients are taken once: a draw costs a few passes over held-out texts.

    Returns:
        The field, paced so that a time of 1 costs 0.1 nats, KL(unsteered ‖ steered), per token of held-out neutral text along
        ten Euler steps; for `sf.Flow(field, T=1.0)` at positions "last". Its `info` holds what held-out pairs gain, the
        damage, and the null.

    Raises:
        TypeError, ValueError: no examples, one that is not three strings or has a text without tokens, neutral texts too
            short, an unknown layer, rank > d, damping that is not positive, draws < 0, or no text to begin with where the model
            is to write.

    Reference:
        Amari 1998, Natural gradient works efficiently in learning; Martens and Grosse 2015, K-FAC (arXiv:1503.05671), for the
        factors F and Σ.

    Example:
        >>> pairs = [("The film was", " a joy.", " a bore."), ("My day was", " lovely.", " awful.")]
        >>> neutral = ["The library opens at nine and closes at five.", "Water boils sooner on a mountain than at the coast."]
        >>> field = sf.fit_velocity(model, tokenizer, pairs, 12, neutral=neutral, rank=1)
        >>> plan = sf.Plan({12: sf.Flow(field, T=1.0)}, positions="last")
    """
    owner = "fit_velocity"
    rank, shares, seed = _numbers(owner, rank, damping, seed, Pupil(owner, model, layer).width)
    whole_number(owner, "draws", draws, 0)
    gradients = Gradients.of(owner, model, tokenizer, examples, layer, neutral, seed)
    count = len(gradients.lessons)
    held = split(list(range(count)))[1]
    signs = [0.0 if i in held else 1.0 for i in range(count)]
    with gradients.pupil.taught():
        field, damage = natural_field(gradients, signs, rank, shares)
        gain = _Gain(gradients, [gradients.lessons[i] for i in held])
        nats = gain(field)
        null = _null(gradients, signs, rank, shares, gain, nats, draws, seed) if draws and held else None
    settings = {
        "rank": float(rank),
        "damping_fisher": shares[0],
        "damping_rows": shares[1],
        "examples": float(count - len(held)),
    }
    return replace(field, info=VelocityInfo("natural", nats, damage, settings, null))


def natural_field(
    gradients: Gradients, signs: Sequence[float], rank: int = RANK, shares: tuple[float, float] = DAMPING
) -> tuple[VelocityField, float]:
    """The natural gradient's field of examples with these signs, paced, and the damage over a time of 1.

    Raises:
        ValueError: the examples pull nowhere, or no time costs enough.
    """
    field, speed = _natural(gradients.metric, gradients.pull(signs), rank, shares)
    return _paced(gradients, replace(field, origin=gradients.pupil.origin), speed)


class _Gain:
    """By how much the log-odds of held-out examples rise over a time of 1."""

    def __init__(self, gradients: Gradients, held: Sequence[Lesson]) -> None:
        self.pupil, self.held = gradients.pupil, held
        self.before = log_odds(self.pupil, held, None)

    def __call__(self, field: VelocityField) -> float:
        return log_odds(self.pupil, self.held, _edit(field, 1.0)) - self.before


def _null(
    gradients: Gradients, signs: Sequence[float], rank: int, shares: tuple[float, float], gain: _Gain, nats: float,
    draws: int, seed: int,
) -> Null:  # fmt: skip
    """What fields do whose examples have a random half of their sides exchanged, and random directions, at the same damage."""
    generator = seeded(seed)
    taught = [i for i, sign in enumerate(signs) if sign]
    half = len(taught) // 2
    shuffled, random = [], []
    for _ in range(draws):
        order = torch.randperm(len(taught), generator=generator, device="cpu").tolist()
        turned = [0.0] * len(signs)  # of an odd number one stays out: as many are kept as exchanged
        for place, i in enumerate(order[: 2 * half]):
            turned[taught[i]] = -1.0 if place < half else 1.0
        shuffled.append(_tried(lambda: natural_field(gradients, turned, rank, shares)[0], gain))  # noqa: B023
        drawn = torch.randn(len(gradients.metric.mean), generator=generator, device="cpu", dtype=torch.float64)
        random.append(_tried(lambda: _shift(gradients, drawn / drawn.norm()), gain))  # noqa: B023
    return Null.of(nats, shuffled, random)


def _tried(make: Callable[[], VelocityField], gain: _Gain) -> float:
    """The gain of a control; NaN if it comes to nothing."""
    try:
        return gain(make())
    except ValueError:
        return math.nan


def _shift(gradients: Gradients, direction: Tensor) -> VelocityField:
    """The constant field along a direction (d,), paced."""
    none = torch.zeros(1, 1, device="cpu")
    field = VelocityField(
        direction[None], torch.ones(1, device="cpu"), none, none[0], none, origin=gradients.pupil.origin
    )
    return _paced(gradients, field, math.sqrt(float(direction @ gradients.metric.fisher @ direction)))[0]


def _numbers(owner: str, rank: Any, damping: Any, seed: Any, width: int) -> tuple[int, tuple[float, float], int]:
    """Checked numbers of a fit."""
    rank, seed = positive_integer(owner, "rank", rank), seed_number(owner, seed)
    if rank > width:
        raise ValueError(f"{owner}: rank is {rank} and the stream has width {width}; expected at most that")
    if isinstance(damping, (str, bytes)) or not isinstance(damping, Sequence) or len(damping) != 2:
        raise TypeError(
            f"{owner}: damping is {damping!r}; expected two numbers, for the Fisher information and the rows"
        )
    fisher, rows = (finite_number(owner, "damping", value) for value in damping)
    if fisher <= 0 or rows <= 0:
        raise ValueError(f"{owner}: damping is {damping!r}; expected two numbers > 0")
    return rank, (fisher, rows), seed


def _natural(metric: Metric, pull: Tensor, rank: int, shares: tuple[float, float]) -> tuple[VelocityField, float]:
    """F⁻¹GΣ⁻¹ cut to its leading terms, as a field; and the root of twice what a time of 1 costs by F and Σ, in nats a token."""
    d = len(metric.mean)
    one = torch.eye(d, dtype=torch.float64, device="cpu")
    fisher = metric.fisher + shares[0] * metric.fisher.trace() / d * one
    covariance = metric.covariance + shares[1] * metric.covariance.trace() / d * one
    left, right = _inverse_root(fisher), torch.block_diag(_inverse_root(covariance), one[:1, :1])
    u, s, vh = torch.linalg.svd(left @ pull @ right)
    count = min(rank, int((s > 1e-9 * s[0]).sum()))
    if not bool(s.isfinite().all()) or count == 0:
        raise ValueError(
            "fit_velocity: the examples pull nowhere, or to numbers that are not finite; check the continuations"
        )
    written, read = (left @ u[:, :count] * s[:count]).T, vh[:count] @ right  # (r, d), (r, d + 1)
    basis = _span(torch.cat([written, read[:, :-1]]))
    phases = read[:, -1] - read[:, :-1] @ metric.mean
    omega, eta = read[:, :-1] @ basis.T, written @ basis.T
    return VelocityField(basis, basis.new_zeros(len(basis)), omega, phases, eta), float(s[:count].norm())


def _inverse_root(matrix: Tensor) -> Tensor:
    """A^(-1/2) of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=1e-300).rsqrt()) @ vectors.T


def _span(rows: Tensor) -> Tensor:
    """Orthonormal rows of the span of rows (m, d)."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    _, s, vh = torch.linalg.svd(unit, full_matrices=False)
    return vh[s > 1e-6 * s[0]]


def _edit(field: VelocityField, T: float) -> Edit:
    """The flow over a time, on rows."""
    return lambda x: flow(x, field, T=T)


def _paced(gradients: Gradients, field: VelocityField, speed: float) -> tuple[VelocityField, float]:
    """The field in units in which a time of 1 costs `DAMAGE`, and what it does cost; a time t is expected to cost (t·speed)²/2.

    The search walks from there in small steps, so that it ends at the first time that costs so much: far behind it ten Euler
    steps may diverge, and the cost go anywhere.
    """

    def damage(T: float) -> float:
        cost = float(gradients.damage(_edit(field, T)).mean())
        return cost if math.isfinite(cost) else math.inf

    start = time = math.sqrt(2 * DAMAGE) / max(speed, 1e-30)
    low = high = (time, damage(time))
    while high[1] < DAMAGE:
        if high[0] > LONGEST * start:
            raise ValueError(
                f"fit_velocity: even {LONGEST:g} times the expected path costs less than {DAMAGE} nats a token of neutral "
                "text; check the examples and the neutral texts"
            )
        time = STRIDE * high[0]
        low, high = high, (time, damage(time))
    while low[1] >= DAMAGE:
        if low[0] < start / LONGEST:
            raise ValueError(
                f"fit_velocity: even a {LONGEST:g}th of the expected path costs {DAMAGE} nats a token of neutral text, or more; "
                "check the examples and the neutral texts"
            )
        time = low[0] / STRIDE
        low, high = (time, damage(time)), low
    for _ in range(TRIES):
        if low[1] >= NEAR * DAMAGE:
            break
        time = _between(low, high)
        cost = damage(time)
        low, high = ((time, cost), high) if cost < DAMAGE else (low, (time, cost))
    return replace(field, outputs=low[0] * field.outputs, bias=low[0] * field.bias), low[1]


def _between(low: tuple[float, float], high: tuple[float, float]) -> float:
    """The time between two (time, cost) at which a power law through them costs just less than `DAMAGE`."""
    share = 0.5
    if low[1] > 0 and math.isfinite(high[1]):
        share = math.log((1 + NEAR) / 2 * DAMAGE / low[1]) / math.log(high[1] / low[1])
    return low[0] * (high[0] / low[0]) ** min(max(share, 0.05), 0.95)
