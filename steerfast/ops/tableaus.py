"""The ways to follow a flow: explicit Runge-Kutta schemes whose stages need one slope and one sum, and their names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Tableau:
    """The coefficients of an explicit Runge-Kutta scheme, checked: lower triangular, and of the order that it claims.

    Attributes:
        a: Row i holds the weights of the slopes before stage i, so stage 0 has none.
        b: Weights of the slopes in the step, Σb = 1.
        order: Of the step, 1 to 4.
        error: Weights of the slopes in the local error, b - b̂ of an embedded scheme; () if there is none.

    Raises:
        ValueError: shapes do not fit, the order conditions do not hold, or a stage cannot be reached as below.

    A stage must be reached from the slope before it and from the step so far, y + ε(pᵢ·kᵢ₋₁ + mᵢ·Σⱼ bⱼkⱼ), and the error be
    f·(last slope - Σⱼ bⱼkⱼ): then one slope and one sum are all that is kept, however many stages there are, and k = 64
    coordinates stay in registers.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    error: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        stages = len(self.b)
        if [len(row) for row in self.a] != list(range(stages)) or len(self.error) not in (0, stages):
            raise ValueError(
                f"Tableau: rows of lengths {[len(r) for r in self.a]} for {stages} stages; expected 0, 1, 2, …"
            )
        if bad := [name for name, value in self.conditions().items() if abs(value) > 1e-14]:
            raise ValueError(f"Tableau: order {self.order} is claimed, but {bad[0]} does not hold")
        self.paths()
        if self.error:
            last = [float(i == stages - 1) for i in range(stages)]
            factor = self.factor()
            off = [e - factor * (one - b) for e, one, b in zip(self.error, last, self.b, strict=True)]
            if max(map(abs, off)) > 1e-14:
                raise ValueError(f"Tableau: the error {self.error} is no multiple of the last slope minus the step")

    def conditions(self) -> dict[str, float]:
        """The order conditions up to the claimed order, each as left side minus right side."""
        a, b = np.zeros((len(self.b), len(self.b))), np.array(self.b)
        for i, row in enumerate(self.a):
            a[i, :i] = row
        c = a.sum(1)
        every = [
            (1, "Σb = 1", b.sum() - 1),
            (2, "b·c = 1/2", b @ c - 1 / 2),
            (3, "b·c² = 1/3", b @ c**2 - 1 / 3),
            (3, "b·Ac = 1/6", b @ a @ c - 1 / 6),
            (4, "b·c³ = 1/4", b @ c**3 - 1 / 4),
            (4, "b·(c ∘ Ac) = 1/8", b @ (c * (a @ c)) - 1 / 8),
            (4, "b·Ac² = 1/12", b @ a @ c**2 - 1 / 12),
            (4, "b·AAc = 1/24", b @ a @ a @ c - 1 / 24),
        ]
        return {name: float(value) for order, name, value in every if order <= self.order}

    def factor(self) -> float:
        """f of the local error f·(last slope - Σ b·k); 0 where the scheme has none."""
        return self.error[-1] / (1 - self.b[-1]) if self.error else 0.0

    def paths(self) -> list[tuple[float, float]]:
        """(p, m) of every stage: its weight of the slope before it, and of the step so far."""
        found = [(0.0, 0.0)]
        for i in range(1, len(self.b)):
            before, b = self.a[i][:-1], self.b[:i]
            ratios = [x / w if w else (0.0 if x == 0 else math.nan) for x, w in zip(before, b, strict=False)]
            m = next((r for r, w in zip(ratios, b, strict=False) if w), 0.0)
            if any(math.isnan(r) or (w and abs(r - m) > 1e-14) for r, w in zip(ratios, b, strict=False)):
                raise ValueError(f"Tableau: stage {i} needs slopes older than the one before it")
            found.append((self.a[i][-1] - m * self.b[i - 1], m))
        return found


@dataclass(frozen=True)
class Solver:
    """A way to follow a flow.

    Attributes:
        tableau: The scheme.
        geodesic: Its slope is followed along the great circle that it points to: exact norm, exact angle.
        adaptive: Steps are as long as the local error allows; `steps` is then the number of attempts.
        single: Always one step, whatever `steps` says.
    """

    tableau: Tableau
    geodesic: bool = False
    adaptive: bool = False
    single: bool = False


_EULER = Tableau(a=((),), b=(1.0,), order=1)
_SSP3 = Tableau(
    a=((), (1.0,), (1 / 4, 1 / 4)), b=(1 / 6, 1 / 6, 2 / 3), order=3, error=(-1 / 3, -1 / 3, 2 / 3)
)  # the third-order scheme of Shu and Osher with Heun's, its first two stages, inside
SOLVERS = {
    "euler": Solver(_EULER),
    "one-step": Solver(_EULER, single=True),
    "geodesic": Solver(_EULER, geodesic=True),  # exponential Euler on the sphere
    "midpoint": Solver(Tableau(a=((), (1 / 2,)), b=(0.0, 1.0), order=2)),
    "heun": Solver(Tableau(a=((), (1.0,)), b=(1 / 2, 1 / 2), order=2)),
    "ralston": Solver(Tableau(a=((), (2 / 3,)), b=(1 / 4, 3 / 4), order=2)),
    "rk4": Solver(
        Tableau(a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), order=4),
    ),
    "ssp3": Solver(_SSP3),
    "adaptive": Solver(_SSP3, adaptive=True),
}
"""Every way to follow a flow, by the name that `Flow(method=)` takes."""
