"""The estimator of flows."""

from __future__ import annotations

from steerfast._checks import finite_number
from steerfast.barriers.fit import fit_barrier
from steerfast.edits.flow import Flow

from .sides import Sides


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
        angle: Length of the path as a share of the row's, on the sphere in radians; 0.4 if none is given.
        T: Length in units of the stream.
        norms: Length in multiples of the typical activation's norm.
        steps: As of `Flow`.
        method: As of `Flow`.
        level: As of `Flow`.
        kernel: The rule for the barrier's constants, as in `fit_barrier`.
        raw: Of the barrier, as in `fit_barrier`; None: on the sphere for "geodesic", which follows its great circles.

    Raises:
        ValueError: more than one length, and what `fit_barrier` and `Flow` refuse.

    Reference:
        Zhao et al. 2026, ODESteer (arXiv:2602.17560).
    """
    data = sides.data
    given = {name: value for name, value in (("angle", angle), ("T", T), ("norms", norms)) if value is not None}
    if len(given) > 1:
        raise ValueError(f"{sides.owner}: got {' and '.join(given)}; give one length")
    if norms is not None:
        T = finite_number(sides.owner, "norms", norms) * float(data.origin.typical_norm or 0.0)
    angle = 0.4 if not given else angle
    x, labels = data.x, data.labels
    groups = [*data.groups[labels].tolist(), *data.groups[~labels].tolist()]
    if raw is None and method == "geodesic":
        raw = False
    barrier = fit_barrier(x[labels], x[~labels], kind, groups=groups, kernel=kernel, seed=data.seed, raw=raw)
    return Flow(barrier, angle=angle, T=T, steps=steps, method=method, level=level)
