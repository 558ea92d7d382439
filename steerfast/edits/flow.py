"""Flows: steering as an ODE along a barrier's gradient, or along a velocity field."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast import ops
from steerfast._checks import check_stream, finite_number, one_of, path_length, set_field, step_count
from steerfast.barriers.barrier import Barrier
from steerfast.barriers.velocity import VelocityField
from steerfast.ops import torch_backend
from steerfast.ops.backends import backend_of
from steerfast.ops.slots import FLOW, SOLVE, Slot
from steerfast.ops.solvers import Field, Scheme, pack, scheme
from steerfast.ops.tableaus import SOLVERS

from .base import Intervention, Program, constants_row


@dataclass(frozen=True, eq=False, repr=False)
class Flow(Intervention):
    """Follow a barrier's gradient, da/dt = ∇h/‖∇h‖, or a velocity field, da/dt = v, over [0, T].

    Steps are taken on k + 1 numbers and lifted once, whichever it is.

    Args:
        barrier: h, from `fit_barrier` or made by hand; or v, from `fit_velocity` or made by hand.
        angle: T/‖a‖ of each row: an angle in radians on the sphere, a share of the row's length for a raw barrier. Exactly
            one of angle and T; a velocity field takes T.
        T: Length of the path in units of the stream; of a velocity field the time. A strength given to `steer` multiplies T or
            the angle; a negative one follows -∇h, or the field back in time.
        steps: Number of steps; of "adaptive" the number of attempts.
        method: A name of `steerfast.ops.tableaus.SOLVERS`: "euler", "one-step", "geodesic" (exponential Euler), "midpoint",
            "heun", "ralston", "ssp3", "rk4" or "adaptive" (ssp3 with Heun inside as the measure of its error).
        level: Stop where h reaches it (under a negative strength: falls to it); a step that would pass it is shortened to
            where the slope of h says that it lies, so a single step is one of Newton's and may stop short. None: go all the way;
            a velocity field has no h.
        tolerance: Of "adaptive": local error of a step, as a share of ‖a‖.
        keep_norm: Give every row its old length back afterwards.

    Squares of lengths are taken in float32: a row longer than 1.8e19 may become NaN, one shorter than 1e-24 may not move.

    Raises:
        TypeError, ValueError: not exactly one of angle and T, a negative or non-finite length, steps out of range, an unknown
            method, "geodesic" with a raw barrier, a tolerance that is not positive; of a velocity field an angle, a level or
            "geodesic".

    Reference:
        Zhao et al. 2026, ODESteer (arXiv:2602.17560); stopping at a level is the barrier function's own use in control.

    Example:
        >>> import torch, steerfast as sf
        >>> h = sf.Barrier(torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.ones(1))
        >>> sf.Flow(h, angle=0.4)
        Flow(rank 1, angle=0.4, T=None, steps=10, method='euler')
    """

    barrier: Barrier | VelocityField
    _: KW_ONLY
    angle: float | None = None
    T: float | None = None
    steps: int = 10
    method: str = "euler"
    level: float | None = None
    tolerance: float = 1e-4
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.barrier, Barrier | VelocityField):
            raise TypeError(
                f"Flow: barrier must come from fit_barrier or fit_velocity; got {type(self.barrier).__name__}"
            )
        path_length("Flow", self.T, self.angle)
        for name in ("T", "angle"):
            if getattr(self, name) is not None:
                set_field(self, name, finite_number("Flow", name, getattr(self, name)))
        set_field(self, "steps", step_count("Flow", self.steps))
        one_of("Flow", "method", self.method, tuple(SOLVERS))
        if isinstance(self.barrier, VelocityField):
            self._check_time()
        elif SOLVERS[self.method].geodesic and self.barrier.raw:
            raise ValueError(
                f"Flow: method {self.method!r} follows great circles, but the barrier is raw; use 'euler', or "
                "fit it with raw=False"
            )
        if self.level is not None:
            object.__setattr__(self, "level", finite_number("Flow", "level", self.level))
        if finite_number("Flow", "tolerance", self.tolerance) <= 0:
            raise ValueError(f"Flow: tolerance is {self.tolerance}; expected > 0")

    def _check_time(self) -> None:
        """Refuse what only a barrier can follow."""
        if self.angle is not None or self.level is not None:
            name, what = ("angle", "runs for a time") if self.angle is not None else ("level", "has no h")
            raise ValueError(f"Flow: {name} is given, but a velocity field {what}; give T alone")
        if SOLVERS[self.method].geodesic:
            raise ValueError(
                f"Flow: method {self.method!r} follows great circles, but a velocity field does not; use 'euler'"
            )

    @classmethod
    def odesteer(cls, barrier: Barrier, *, T: float) -> Flow:
        """The published preset: ten Euler steps of T/10, with the sketch barrier, at `positions="last"` of a plan.

        Args:
            barrier: From `fit_barrier(pos, neg, kind="sketch")`.
            T: Length of the path in units of the stream; a multiple of `barrier.origin.typical_norm` carries over models.

        Raises:
            ValueError: the barrier is of another kind.

        Reference:
            Zhao et al. 2026, ODESteer (arXiv:2602.17560).
        """
        if isinstance(barrier, VelocityField) or (isinstance(barrier, Barrier) and barrier.sketch is None):
            kind = barrier.info.kind or "hand-made"
            raise ValueError(
                f"Flow.odesteer: the barrier is {kind}; the published one is fit_barrier(…, kind='sketch')"
            )
        return cls(barrier, T=T, steps=10, method="euler")

    @property
    def width(self) -> int:
        """d, the width of the stream that it edits."""
        return self.barrier.width

    @property
    def solver(self) -> Scheme:
        """The solver's stages and where it stops."""
        return scheme(self.method, float(self.tolerance), math.inf if self.level is None else self.level)

    def slot(self) -> Slot:
        """Rows Q, λ and b̃ per direction, and what else the solver and the barrier need."""
        rows, barrier = self.barrier.basis, self.barrier
        T, angle = path_length("Flow", self.T, self.angle)
        table = torch.zeros(rows.shape[0], 8, dtype=torch.float32, device="cpu")
        field, how = field_of(barrier), self.solver
        table[:, 0], table[:, 1] = field.eigenvalues, field.bias
        constants, extra = constants_row(T, angle), pack(field, how)
        mode = FLOW if extra is None else SOLVE
        if extra is None:
            constants[3] = float(field.raw)
        return Slot(mode, how.count(self.steps), self.keep_norm, rows, rows, constants, table, extra)

    def program(self, device: torch.device) -> Program | None:
        """A full-rank barrier on a GPU runs by itself: two matrix products serve it better than a slot."""
        return self.alone(device) if device.type == "cuda" and self.barrier.rank == self.width else None

    def alone(self, device: torch.device) -> Program:
        """The flow by itself, through the op: (x, scale) -> x'."""
        slot = self.slot()
        numbers, header = slot.numbers.to(device), slot.header().tensor(device)

        def run(x: Tensor, scale: Tensor | float) -> Tensor:
            basis = self.barrier.basis_as(x.device, x.dtype)
            weights = None
            if isinstance(scale, Tensor) or scale != 1.0:
                weights = torch.as_tensor(scale, dtype=torch.float32, device=device).expand(x.numel() // x.shape[-1])
            return ops.subspace(x, basis, numbers, header, None, weights, slot.modes, slot.rank)

        return run

    def tensors(self) -> dict[str, Tensor]:
        """Those of the barrier or field."""
        return self.barrier.tensors()

    def numbers(self) -> dict[str, Any]:
        """The path, the solver, and the barrier's numbers."""
        names = ("angle", "T", "steps", "method", "level", "tolerance", "keep_norm")
        what = "velocity" if isinstance(self.barrier, VelocityField) else "barrier"
        return {**{name: getattr(self, name) for name in names}, what: self.barrier.numbers()}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> Flow:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        rest = dict(numbers)
        if "velocity" in rest:
            return cls(VelocityField.restore(tensors, rest.pop("velocity")), **rest)
        return cls(Barrier.restore(tensors, rest.pop("barrier")), **rest)

    def __repr__(self) -> str:
        level = "" if self.level is None else f", level={self.level}"
        kept = ", keep_norm=True" if self.keep_norm else ""
        path = f"angle={self.angle}, T={self.T}, steps={self.steps}"
        return f"Flow(rank {self.barrier.rank}, {path}, method={self.method!r}{level}{kept})"


def flow(
    x: Tensor,
    barrier: Barrier | VelocityField,
    *,
    angle: float | None = None,
    T: float | None = None,
    steps: int = 10,
    method: str = "euler",
    level: float | None = None,
    tolerance: float = 1e-4,
) -> Tensor:
    """Follow a barrier's gradient, da/dt = ∇h/‖∇h‖, or a velocity field, da/dt = v, from every row of x over [0, T].

    Args:
        x: Residual stream, (..., d).
        barrier: h, of width d; or a velocity field v.
        angle: T/‖a‖ of each row, on the sphere in radians. Exactly one of angle and T.
        T: Length of the path in units of x; of a velocity field the time.
        steps: Number of steps, ≥ 1.
        method: The solver, as in `Flow`.
        level: Stop where h reaches it, as in `Flow`; None: go all the way.
        tolerance: Of method "adaptive".

    Returns:
        A new tensor (..., d) of the dtype of x. A row at a stationary point of h does not move, nor a zero row but along a raw
        barrier or a velocity, where that is not 0. On a CPU one row, a few rows and many take three ways through the same
        steps, so the last bit of a row may depend on their number.

    Raises:
        TypeError, ValueError: the barrier has another width, or an argument does not fit; the message names it.

    Reference:
        Zhao et al. 2026, ODESteer (arXiv:2602.17560).

    Example:
        >>> import torch, steerfast as sf
        >>> h = sf.Barrier.linear(torch.tensor([1.0, 0.0]), raw=True)
        >>> sf.flow(torch.tensor([[3.0, 4.0]]), h, T=0.5)
        tensor([[3.5000, 4.0000]])
    """
    check_stream("flow", x)
    edit = Flow(barrier, angle=angle, T=T, steps=steps, method=method, level=level, tolerance=tolerance)
    if barrier.width != x.shape[-1]:
        raise ValueError(
            f"flow: the barrier has width {barrier.width} and x {x.shape[-1]}; fit it at this layer of this model"
        )
    if backend_of(x) == "torch" and not torch.compiler.is_compiling():
        how, field = edit.solver, field_of(barrier).map(lambda v: v.to(x.device))
        return torch_backend.flow(
            x, barrier.basis.to(x.device), field, path_length("flow", T, angle), how.count(steps), how
        )
    return edit.alone(x.device)(x, 1.0)


def field_of(barrier: Barrier | VelocityField) -> Field:
    """The barrier, or the velocity, in the coordinates of its basis."""
    if isinstance(barrier, VelocityField):
        return barrier.field
    plain = Field(barrier.eigenvalues, barrier.bias, barrier.offset, barrier.raw)
    if (ridge := barrier.ridge) is None:
        return plain
    return plain._replace(directions=ridge.directions, phases=ridge.phases, weights=ridge.weights, act=ridge.activation)
