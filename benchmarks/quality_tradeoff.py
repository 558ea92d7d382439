"""Trade-off curves: effect at equal damage, with bootstrap intervals. Numbers in, numbers out.

A run holds, for every strength, the effect on each held-out item and the damage to each reference text. Its curve starts at the
unsteered model, (0, 0). The strength at which damage D is reached first is found on the straight line between two measured
strengths; what a method does *at damage D* is read there. A curve that never reaches D is read at its last strength.
Intervals resample groups of items, reference texts and runs together, for all methods alike, so that differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
GRID = 10  # damages between 0 and the largest over which an area is taken


class Interval(NamedTuple):
    """An estimate with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Run:
    """One method fitted on one training set, at S strengths: changes against the unsteered model.

    `effects` (S, items), in nats; `losses` (S, texts), in nats per token, with the texts' share of all tokens in `weights`.
    """

    effects: Array
    losses: Array
    weights: Array

    def curve(self, items: Array, texts: Array) -> tuple[Array, Array]:
        """(damage, effect) by strength, from the origin, with how often each item and text counts."""
        share = self.weights * texts
        damage = self.losses @ share / share.sum()
        effect = self.effects @ items / items.sum()
        return np.concatenate([[0.0], damage]), np.concatenate([[0.0], effect])


def reach(damage: Array, most: float) -> tuple[int, float]:
    """(i, t): damage `most` is reached first a share t of the way from strength i to i + 1; never: the last strength."""
    above = np.nonzero(damage > most)[0]
    if len(above) == 0:
        return len(damage) - 1, 0.0
    i = int(above[0]) - 1
    return i, float((most - damage[i]) / (damage[i + 1] - damage[i]))


def read(values: Array, where: tuple[int, float]) -> float:
    """A value between two strengths."""
    i, t = where
    return float(values[i] if t == 0.0 else (1 - t) * values[i] + t * values[i + 1])


def at_damage(runs: Sequence[Run], items: Array, texts: Array, most: float) -> float:
    """Mean effect of the runs at equal damage."""
    curves = [run.curve(items, texts) for run in runs]
    return float(np.mean([read(effect, reach(damage, most)) for damage, effect in curves]))


def area(runs: Sequence[Run], items: Array, texts: Array, most: float) -> float:
    """Mean effect over all damages up to `most`."""
    curves = [run.curve(items, texts) for run in runs]
    grid = most * np.arange(1, GRID + 1) / GRID
    return float(np.mean([read(effect, reach(damage, d)) for damage, effect in curves for d in grid]))


@dataclass(frozen=True)
class Summary:
    """What one method reaches at a damage, and how that differs from the method it is compared with."""

    effect: Interval
    difference: Interval
    area: Interval
    reached: float  # mean damage at which it was read


def compare(
    runs: Mapping[str, Sequence[Run]],
    groups: Sequence[str],
    most: float,
    against: str,
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, Summary]:
    """Effect at damage `most` of every method, its paired difference from `against`, and the area below its curve.

    Every method has its runs in the same order of training sets; `groups` names the group of each item.
    """
    names, index = np.unique(np.array(groups), return_inverse=True)
    texts = len(runs[against][0].weights)
    count = len(runs[against])
    random = np.random.default_rng(seed)
    draws: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    ones = np.ones(len(groups)), np.ones(texts)
    for _ in range(rounds):
        items = np.bincount(random.integers(len(names), size=len(names)), minlength=len(names))[index].astype(float)
        weights = np.bincount(random.integers(texts, size=texts), minlength=texts).astype(float)
        chosen = random.integers(count, size=count)
        for name, all_runs in runs.items():
            part = [all_runs[i] for i in chosen]
            draws[name].append((at_damage(part, items, weights, most), area(part, items, weights, most)))
    base = at_damage(runs[against], *ones, most)
    found = {}
    for name, all_runs in runs.items():
        effect, below = at_damage(all_runs, *ones, most), area(all_runs, *ones, most)
        drawn, other = np.array(draws[name]), np.array(draws[against])
        found[name] = Summary(
            _interval(effect, drawn[:, 0]),
            _interval(effect - base, drawn[:, 0] - other[:, 0]),
            _interval(below, drawn[:, 1]),
            float(np.mean([read(d, reach(d, most)) for d, _ in (run.curve(*ones) for run in all_runs)])),
        )
    return found


def _interval(value: float, draws: Array) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(value, float(low), float(high))
