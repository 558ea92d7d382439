"""Nulls: what the same method does where there is nothing to find, beside which an effect stands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

DRAWS = 20
"""Draws of each kind; with 20 an effect that none of them reaches has a probability of at most 1/21 by chance."""
LEVEL = 0.05
"""An effect beats its null if at most this share of the draws of either kind did as well."""


@dataclass(frozen=True)
class Null:
    """An effect, and those of control vectors: larger is better.

    Attributes:
        effect: What was found, on what was held out.
        shuffled: The effect of the same method fitted on shuffled labels, draw by draw.
        random: The effect of random directions of the same dose.
    """

    effect: float
    shuffled: tuple[float, ...]
    random: tuple[float, ...]

    @classmethod
    def of(cls, effect: float, shuffled: Iterable[float], random: Iterable[float]) -> Null:
        """From any numbers; a draw without a number (its fit failed) is left out."""
        sides = [tuple(float(v) for v in side if not math.isnan(v)) for side in (shuffled, random)]
        return cls(float(effect), *sides)

    @property
    def shares(self) -> tuple[float, float]:
        """Share of the shuffled draws, and of the random directions, that did as well or better; NaN without draws."""
        return _share(self.effect, self.shuffled), _share(self.effect, self.random)

    @property
    def beaten(self) -> bool:
        """Whether there is an effect, and it is better than nearly all draws of either kind."""
        return self.effect > 0 and all(share <= LEVEL for share in self.shares if share == share)

    def numbers(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return {"effect": self.effect, "shuffled": list(self.shuffled), "random": list(self.random)}

    @classmethod
    def restore(cls, numbers: Mapping[str, Any]) -> Null:
        """The inverse of `numbers`."""
        return cls.of(numbers["effect"], numbers["shuffled"], numbers["random"])

    def __str__(self) -> str:
        kinds = (("fits on shuffled labels", self.shuffled), ("random directions", self.random))
        counts = [f"{sum(v >= self.effect for v in side)} of {len(side)} {name}" for name, side in kinds if side]
        said = f"{' and '.join(counts) or 'no controls'} did as well"
        return said if self.beaten else f"{said}: it does not beat its null"


def _share(effect: float, draws: tuple[float, ...]) -> float:
    return sum(v >= effect for v in draws) / len(draws) if draws else math.nan
