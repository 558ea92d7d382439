"""Power laws: time = c · size^p, with at most one bend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Law(NamedTuple):
    """Exponents of a power law below and above its bend; bend None: one exponent serves."""

    below: float
    above: float
    bend: float | None

    def __str__(self) -> str:
        if self.bend is None:
            return f"∝ size^{self.below:.2f}"
        return f"∝ size^{self.below:.2f}, from {self.bend:,.0f} on size^{self.above:.2f}"


def fit(sizes: Sequence[float], values: Sequence[float]) -> Law:
    """Least squares in logarithms: one line, or two that meet, where that halves the residual and turns by more than 0.25.

    Raises:
        ValueError: fewer than two sizes, or a number that is not positive.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2 or min(*sizes, *values) <= 0:
        raise ValueError(f"fit: got sizes {list(sizes)} and values {list(values)}; expected two or more, all positive")
    x, y = [math.log(s) for s in sizes], [math.log(v) for v in values]
    slope, single = _hinge(x, y, None)[1:]
    candidates = sorted(set(x))[1:-1]
    if len(candidates) >= 2:
        fine = [a + (b - a) * i / 8 for a, b in itertools.pairwise(candidates) for i in range(9)]
        best = min(((_hinge(x, y, b), b) for b in fine), key=lambda found: found[0][2])
        (below, above, residual), bend = best
        if residual < 0.5 * single and abs(above - below) > 0.25:
            return Law(below, above, math.exp(bend))
    return Law(slope, slope, None)


def _hinge(x: Sequence[float], y: Sequence[float], bend: float | None) -> tuple[float, float, float]:
    """(slope below, slope above, residual) of a + p·min(x, b) + q·max(x - b, 0); one line where there is no bend."""
    if bend is None:
        rows = [[1.0, v] for v in x]
    else:
        rows = [[1.0, min(v, bend), max(v - bend, 0.0)] for v in x]
    found = _solve(rows, y)
    residual = sum(
        (sum(a * b for a, b in zip(row, found, strict=True)) - v) ** 2 for row, v in zip(rows, y, strict=True)
    )
    return found[1], found[-1], residual


def _solve(rows: list[list[float]], y: Sequence[float]) -> list[float]:
    import numpy as np

    return [float(v) for v in np.linalg.lstsq(np.array(rows), np.array(y), rcond=None)[0]]
