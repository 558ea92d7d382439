"""Steering vectors trained on a model: by the language-model objective, as ReFT-r1, or by preference (RePS)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from steerfast._checks import finite_number, positive_integer, seed_number
from steerfast._null import DRAWS, Null
from steerfast.barriers.data import seeded
from steerfast.edits.fitted import FitInfo
from steerfast.edits.linear import Add
from steerfast.models.texts import TextReader

from .lessons import Edit, Lesson, Pupil, descend, read_lessons, split, steps_and_rate, warn_of_no_gain

STARTS = 8
"""That are tried: a vector that comes to be active nowhere (ReFT-r1) has no gradient any more."""


class Objective(Protocol):
    """What a vector is trained for."""

    @property
    def method(self) -> str:
        """Its name in `FitInfo`."""

    @property
    def contrast(self) -> bool:
        """Whether examples have an unwanted continuation."""

    @property
    def unit(self) -> bool:
        """Whether the vector is held at length 1."""

    def loss(self, pupil: Pupil, w: Tensor, lesson: Lesson, progress: float, draw: float) -> Tensor:
        """The loss of one example; `progress`, from 0 to 1, is how far training is, `draw` in [0, 1) a number by chance."""

    def strength(self, pupil: Pupil, w: Tensor, lessons: list[Lesson]) -> float:
        """The strength that the trained vector is given; 0: it came to do nothing, and another start is to be tried."""


@dataclass(frozen=True)
class LMObjective:
    """x + w, trained on the mean cross entropy of the wanted continuation's tokens.

    Reference:
        The steering vectors of Wu et al. 2025, AxBench (arXiv:2501.17148).
    """

    method = "vector"
    contrast = False
    unit = False

    def loss(self, pupil: Pupil, w: Tensor, lesson: Lesson, progress: float, draw: float) -> Tensor:
        """-mean log p(wanted)."""
        return -pupil.log_likelihoods(lesson.prompt, lesson.wanted, lambda x: x + w.to(x.dtype)).mean()

    def strength(self, pupil: Pupil, w: Tensor, lessons: list[Lesson]) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class ReFTr1:
    """Detect and steer with one unit vector: a = relu(xᵀw) per token, x + mean(the k largest a)·w in training.

        loss = -mean log p(wanted) + λ·(share of training done)·mean of the other a

    a is read behind the first token of each text, whose norm is many times that of the others. Steering afterwards adds m·w at
    every token, m the largest a on the examples. A start from which every a comes to be 0, so that nothing more is learned, is
    drawn anew, seven times at most.

    Args:
        top: k.
        penalty: λ.

    Reference:
        Wu et al. 2025, AxBench (arXiv:2501.17148), with the schedule of λ of its released code, which leaves out the first
        token, too.
    """

    top: int = 8
    penalty: float = 0.005
    method = "reft_r1"
    contrast = False
    unit = True

    def __post_init__(self) -> None:
        positive_integer("ReFTr1", "top", self.top)
        finite_number("ReFTr1", "penalty", self.penalty)

    def loss(self, pupil: Pupil, w: Tensor, lesson: Lesson, progress: float, draw: float) -> Tensor:
        """The formula of the class."""
        rest: list[Tensor] = []

        def edit(x: Tensor) -> Tensor:
            largest, others = self.read(x[0], w)
            rest.append(others)
            return x + (largest * w).to(x.dtype)

        likelihood = pupil.log_likelihoods(lesson.prompt, lesson.wanted, edit).mean()
        return self.penalty * progress * rest[0].cpu() - likelihood

    def read(self, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """(mean of the k largest a, sum of the others over their number) of rows x (tokens, d) of a text."""
        active = _active(x, w)
        largest = active.topk(min(self.top, len(active))).values
        return largest.mean(), (active.sum() - largest.sum()) / len(active)

    def strength(self, pupil: Pupil, w: Tensor, lessons: list[Lesson]) -> float:
        """m, the largest a on the examples."""
        found: list[float] = []

        def keep(x: Tensor) -> Tensor:
            found.append(float(_active(x[0], w).max()))
            return x

        with torch.no_grad():
            for lesson in lessons:
                pupil.log_likelihoods(lesson.prompt, lesson.wanted, keep)
        return max(found)


def _active(x: Tensor, w: Tensor) -> Tensor:
    """a = relu(xᵀw) of rows x (tokens, d) of a text behind its first, float32 (tokens - 1,)."""
    return torch.relu(x[1:].float() @ w)


@dataclass(frozen=True)
class RePS:
    """Reference-free preference steering, in both directions, y_w the wanted and y_u the unwanted continuation.

        Δ₊ = β₊/|y_w|·log p(y_w) - 1/|y_u|·log p(y_u),   steered by x + f·w, f drawn from the factors
        Δ₋ = β₋/|y_u|·log p(y_u) - 1/|y_w|·log p(y_w),   steered by x - relu(xᵀw)/‖w‖²·w
        loss = -log σ(Δ₊) - log σ(Δ₋)

    with β₊ = max(log p₀(y_u) - log p₀(y_w), 1) and β₋ = max(log p₀(y_w) - log p₀(y_u), 1) of the unsteered model.

    Args:
        factors: f; the middle one is the strength of the returned vector.

    Reference:
        Wu et al. 2025, Improved Representation Steering for Language Models (arXiv:2505.20809).
    """

    factors: tuple[float, ...] = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0)
    method = "reps"
    contrast = True
    unit = False

    def __post_init__(self) -> None:
        factors = tuple(finite_number("RePS", "factors", value) for value in self.factors)
        if not factors or min(factors) <= 0:
            raise ValueError(f"RePS: factors is {self.factors}; expected numbers > 0, one at least")
        object.__setattr__(self, "factors", factors)

    def loss(self, pupil: Pupil, w: Tensor, lesson: Lesson, progress: float, draw: float) -> Tensor:
        """The formula of the class."""
        factor = self.factors[int(draw * len(self.factors))]
        with torch.no_grad():
            plain = self._both(pupil, lesson, None)
        up = self._both(pupil, lesson, lambda x: x + (factor * w).to(x.dtype))
        down = self._both(pupil, lesson, lambda x: nulled(x, w))
        gap = float(plain[0].sum() - plain[1].sum())
        plus = preference(up[0], up[1], max(-gap, 1.0))
        minus = preference(down[1], down[0], max(gap, 1.0))
        return -logsigmoid(plus) - logsigmoid(minus)

    def _both(self, pupil: Pupil, lesson: Lesson, edit: Edit | None) -> tuple[Tensor, Tensor]:
        return (
            pupil.log_likelihoods(lesson.prompt, lesson.wanted, edit),
            pupil.log_likelihoods(lesson.prompt, lesson.unwanted, edit),
        )

    def strength(self, pupil: Pupil, w: Tensor, lessons: list[Lesson]) -> float:
        """The middle factor."""
        return sorted(self.factors)[len(self.factors) // 2]


def nulled(x: Tensor, w: Tensor) -> Tensor:
    """x - relu(xᵀw)/‖w‖²·w."""
    rows = x.float()
    return (rows - (torch.relu(rows @ w) / w.square().sum().clamp(min=1e-20))[..., None] * w).to(x.dtype)


def preference(better: Tensor, worse: Tensor, beta: float) -> Tensor:
    """β·mean(better) - mean(worse) of log-likelihoods by token."""
    return beta * better.mean() - worse.mean()


@torch.inference_mode(False)
def fit_vector(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[tuple[str, ...]],
    layer: int,
    objective: Objective | None = None,
    *,
    steps: int = 100,
    lr: float = 0.02,
    seed: int = 0,
) -> Add:
    """Train a steering vector at a block's output so that a model continues prompts as in examples.

    Adam moves w (d,), four examples a step; every token is edited. The model's weights stay as they are.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        examples: (prompt, continuation), strings; of `RePS` (prompt, wanted, unwanted). Mind the leading space of a continuation.
            Of ten or more every fifth is held out.
        layer: Decoder block, 0-based, negative from the end.
        objective: What is trained for: `sf.LMObjective()` (None), `sf.ReFTr1()` or `sf.RePS()`.
        steps: Steps of Adam.
        lr: Its learning rate.
        seed: Of the start, the order of the examples and the factors.

    Returns:
        An `Add` of the vector; its `origin` holds the model and the place, its `info.nats` by how many nats a token of held-out
        wanted continuations became likelier, beside that of 20 random vectors of the same length in `info.null`.

    Raises:
        TypeError, ValueError: no examples, one of another form or without tokens, an unknown layer, a number out of range, or
            the training diverges.

    Example:
        >>> edit = sf.fit_vector(model, tokenizer, [("The weather is", " purple")], 12, sf.ReFTr1(), steps=2)
        >>> plan = sf.Plan([edit])
    """
    owner = "fit_vector"
    goal: Objective = LMObjective() if objective is None else objective
    if isinstance(goal, type) or not all(
        hasattr(goal, name) for name in ("method", "contrast", "unit", "loss", "strength")
    ):
        raise TypeError(
            f"{owner}: objective must be one such as sf.LMObjective(), sf.ReFTr1() or sf.RePS(); got {goal!r}"
        )
    steps, lr = steps_and_rate(owner, steps, lr)
    seed = seed_number(owner, seed)
    pupil = Pupil(owner, model, layer)
    taught, held = split(read_lessons(owner, model, TextReader.of(tokenizer, owner), examples, goal.contrast))
    generator = seeded(seed)
    w = torch.empty(pupil.width, dtype=torch.float32, device=pupil.device).requires_grad_()

    def loss(step: int, part: list[int]) -> Tensor:
        draws = torch.rand(len(part), generator=generator, device="cpu", dtype=torch.float32).tolist()
        found = [goal.loss(pupil, w, taught[i], step / steps, draw) for i, draw in zip(part, draws, strict=True)]
        return torch.stack(found).mean()

    with pupil.taught():
        for _ in range(STARTS):
            start = torch.randn(pupil.width, generator=generator, device="cpu", dtype=torch.float32)
            with torch.no_grad():
                w.copy_(start / start.norm())
            descend(owner, [w], loss, len(taught), steps, lr, generator, (lambda: _unit(w)) if goal.unit else None)
            vector = w.detach()
            if strength := goal.strength(pupil, vector, taught):
                break
        else:
            raise ValueError(
                f"{owner}: from {STARTS} starts the vector came to be active on no token of the examples, so that nothing was "
                "learned; give more examples, or a smaller lr"
            )
        nats, null = _held_out(pupil, strength * vector, held, generator)
    warn_of_no_gain(owner, nats)
    info = FitInfo(goal.method, positives=len(taught), groups=len(taught), nats=nats, null=null)
    return Add(vector.float().cpu(), strength, origin=pupil.origin, info=info)


def _unit(w: Tensor) -> None:
    w /= w.norm()


def _held_out(
    pupil: Pupil, vector: Tensor, held: list[Lesson], generator: torch.Generator
) -> tuple[float, Null | None]:
    """(nats a token that held-out continuations became likelier, the same of random vectors)."""
    if not held:
        return math.nan, None
    before = pupil.nats(held, None)

    def gain(v: Tensor) -> float:
        return pupil.nats(held, lambda x: x + v.to(x.dtype)) - before

    nats = gain(vector)
    drawn = [
        torch.randn(len(vector), generator=generator, device="cpu", dtype=torch.float32).to(vector.device)
        for _ in range(DRAWS)
    ]
    return nats, Null.of(nats, (), [gain(v * vector.norm() / v.norm()) for v in drawn])
