"""What a fit does to rows that it has not seen, and what it does where there is nothing to find."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfast._checks import warn_user
from steerfast._null import Null
from steerfast.barriers.data import seeded
from steerfast.edits.base import Intervention
from steerfast.edits.linear import Ablate

from .sides import Sides

Make = Callable[[Sides], Intervention]
"""An estimator with its settings."""


@dataclass(frozen=True)
class Moved:
    """What an edit does to the held-out rows of a fold.

    Attributes:
        gap, left: Squared distance of the two sides' means before and after.
        doses: ‖x' − x‖/‖x‖ of the rows that were edited.
    """

    gap: float
    left: float
    doses: Tensor

    @classmethod
    def of(cls, x: Tensor, moved: Tensor, positive: Tensor, edited: Tensor) -> Moved:
        """From rows (n, d), the same rows edited, and which of them are positive and which were edited."""
        moved = torch.where(edited[:, None], moved, x).double()
        x = x.double()
        gap = float((x[positive].mean(0) - x[~positive].mean(0)).square().sum())
        left = float((moved[positive].mean(0) - moved[~positive].mean(0)).square().sum())
        return cls(gap, left, ((moved - x).norm(dim=1) / x.norm(dim=1))[edited])

    @property
    def closed(self) -> float:
        """Share of the gap that is closed."""
        return 1 - self.left / self.gap if self.gap else math.nan


def held_out(make: Make, sides: Sides, draws: int) -> tuple[float, float, Null | None]:
    """(share of the squared distance of held-out means that the edit closes, mean dose, null); NaN if nothing can be held out.

    Each draw of the null is made on one fold, the folds in turn: the method fitted on shuffled labels of the rows that are
    fitted there, and a random direction of the fit's own dose, row by row. Its figure is that of all folds, less what it falls
    short of the fit on its own fold.
    """
    done: list[tuple[tuple[Tensor, Tensor], Moved]] = []
    failed: list[str] = []
    for fold in sides.data.folds:
        if _usable(sides, fold):
            try:
                moved = _moved(make, sides, fold)
            except ValueError as reason:
                failed.append(str(reason))
                continue
            if moved.gap:  # where the held-out means are one, nothing can be closed
                done.append((fold, moved))
    if failed:
        warn_user(
            f"{failed[0]} (in {len(failed)} of {len(sides.data.folds)} folds, which the held-out figures leave out)"
        )
    if not done:
        return math.nan, math.nan, None
    closed = 1 - sum(one.left for _, one in done) / sum(one.gap for _, one in done)
    dose = float(torch.cat([one.doses for _, one in done]).mean())
    return closed, dose, _null(make, sides, done, closed, draws) if draws else None


def _usable(sides: Sides, fold: tuple[Tensor, Tensor]) -> bool:
    """Whether both sides are on both parts of a fold."""
    part, positive = (sides.data.labels[rows] for rows in fold)
    return min(int(part.sum()), int((~part).sum())) >= 2 and 0 < int(positive.sum()) < len(positive)


def _moved(make: Make, sides: Sides, fold: tuple[Tensor, Tensor], generator: torch.Generator | None = None) -> Moved:
    """What the fit of one part of a fold does to the other; with a generator: the fit on shuffled labels."""
    fitted, held = fold
    taught = sides.take(fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        edit = make(taught if generator is None else taught.shuffled(generator))
    x, positive = sides.data.x[held], sides.data.labels[held]
    edited = torch.ones_like(positive) if isinstance(edit, Ablate) else ~positive
    return Moved.of(x, edit.apply(x), positive, edited)


def _null(make: Make, sides: Sides, done: list[tuple[tuple[Tensor, Tensor], Moved]], closed: float, draws: int) -> Null:
    generator = seeded(sides.data.seed)
    shuffled, random = [], []
    for draw in range(draws):
        fold, own = done[draw % len(done)]
        try:
            shuffled.append(closed - own.closed + _moved(make, sides, fold, generator).closed)
        except ValueError:  # the shuffled sides do not differ, or no feature does: nothing is found
            shuffled.append(closed - own.closed)
        random.append(closed - own.closed + _random(sides, fold[1], own, generator).closed)
    return Null.of(closed, shuffled, random)


def _random(sides: Sides, held: Tensor, own: Moved, generator: torch.Generator) -> Moved:
    """The same rows moved along one random direction, each by as much as the fit moved it."""
    x, positive = sides.data.x[held], sides.data.labels[held]
    edited = torch.ones_like(positive) if len(own.doses) == len(positive) else ~positive
    drawn = torch.randn(x.shape[1], generator=generator, device="cpu", dtype=torch.float32)
    size = torch.zeros(len(x), device="cpu", dtype=torch.float32)
    size[edited] = own.doses.float() * x[edited].norm(dim=1)
    return Moved.of(x, x + size[:, None] * drawn / drawn.norm(), positive, edited)
