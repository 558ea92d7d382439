"""The estimator of flows."""

from __future__ import annotations

from steerfast._checks import finite_number
from steerfast.barriers.fit import fit_barrier
from steerfast.edits.flow import Flow

from .sides import Sides

COINCIDE = 1e-6
"""Of the typical length: means that are nearer than this are the same but for rounding."""


def flow(
    sides: Sides,
    kind: str = "quadratic",
    angle: float | None = None,
    T: float | None = None,
    norms: float | None = None,
    steps: int = 10,
    method: str = "euler",
    level: float | None = None,
    kernel: str = "steer",
    raw: bool | None = None,
) -> Flow:
    """A barrier h = log p₊/p₋ of the two sides, and the flow along its gradient; `info` of the barrier tells how good it is.

    Args:
        sides: Both sides.
        kind: Of the barrier, as in `fit_barrier`.
        angle: Length of the path as a share of the row's, on the sphere in radians.
        T: Length in units of the stream. Without any length the distance between the means of the sides, by which the mean
            difference would move a row.
        norms: Length in multiples of the typical activation's norm.
        steps: As of `Flow`.
        method: As of `Flow`.
        level: As of `Flow`.
        kernel: The rule for the barrier's constants, as in `fit_barrier`.
        raw: Of the barrier, as in `fit_barrier`; None: on the sphere for "geodesic", which follows its great circles.

    Raises:
        ValueError: more than one length, none where the means coincide, and what `fit_barrier` and `Flow` refuse.

    Reference:
        Zhao et al. 2026, ODESteer (arXiv:2602.17560).
    """
    data = sides.data
    given = {name: value for name, value in (("angle", angle), ("T", T), ("norms", norms)) if value is not None}
    if len(given) > 1:
        raise ValueError(f"{sides.owner}: got {' and '.join(given)}; give one length")
    if norms is not None:
        T = finite_number(sides.owner, "norms", norms) * float(data.origin.typical_norm or 0.0)
    x, labels = data.x, data.labels
    groups = [*data.groups[labels].tolist(), *data.groups[~labels].tolist()]
    if raw is None and method == "geodesic":
        raw = False
    barrier = fit_barrier(x[labels], x[~labels], kind, groups=groups, kernel=kernel, seed=data.seed, raw=raw)
    if not given:
        T = barrier.info.distance
        if COINCIDE * float(data.origin.typical_norm or 0.0) >= T:
            raise ValueError(f"{sides.owner}: the means of the two sides coincide; give a length: angle, T or norms")
    return Flow(barrier, angle=angle, T=T, steps=steps, method=method, level=level)
