"""Flows: steering as an ODE along a barrier's gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import finite_number, one_of
from .barrier import Barrier
from .interventions import Intervention, constants_row
from .reference import FLOW, Slot


@dataclass(frozen=True, eq=False, repr=False)
class Flow(Intervention):
    """Follow a barrier's gradient: da/dt = ∇h/‖∇h‖ over [0, T], in Euler steps taken on k + 1 numbers and lifted once.

    Args:
        barrier: h, from `fit_barrier`.
        angle: T/‖a‖ of each row, in radians. Exactly one of angle and T.
        T: Length of the path in units of the stream.
        steps: Number of steps.
        method: "euler".

    Raises:
        TypeError, ValueError: not exactly one of angle and T, a negative or non-finite length, steps < 1.

    Reference:
        ODESteer, which sees activation steering as an ODE along a barrier function.

    Example:
        >>> import torch, steerfast as sf
        >>> h = sf.Barrier(torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.ones(1))
        >>> sf.Flow(h, angle=0.4)
        Flow(rank 1, angle=0.4, T=None, steps=10, method='euler')
    """

    barrier: Barrier
    angle: float | None = None
    T: float | None = None
    steps: int = 10
    method: str = "euler"

    def __post_init__(self) -> None:
        if not isinstance(self.barrier, Barrier):
            raise TypeError(f"Flow: barrier must come from fit_barrier; got {type(self.barrier).__name__}")
        path_length("Flow", self.T, self.angle)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"Flow: steps is {self.steps!r}; expected a whole number >= 1")
        one_of("Flow", "method", self.method, ("euler",))

    def slot(self) -> Slot:
        rows, barrier = self.barrier.basis, self.barrier
        T, angle = path_length("Flow", self.T, self.angle)
        table = torch.zeros(rows.shape[0], 8)
        table[:, 0], table[:, 1] = barrier.eigenvalues, barrier.bias
        return Slot(FLOW, self.steps, False, rows, rows, constants_row(T, angle), table)

    def tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self.barrier, name) for name in ("basis", "eigenvalues", "bias")}

    def numbers(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in ("angle", "T", "steps", "method")},
            "barrier": {name: getattr(self.barrier, name) for name in ("offset", "typical_norm", "accuracy")},
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> Flow:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        rest = dict(numbers)
        parts: dict[str, Any] = {**tensors, **rest.pop("barrier")}
        return cls(Barrier(**parts), **rest)

    def __repr__(self) -> str:
        rank = self.barrier.basis.shape[0]
        return f"Flow(rank {rank}, angle={self.angle}, T={self.T}, steps={self.steps}, method={self.method!r})"


def path_length(owner: str, T: float | None, angle: float | None) -> tuple[float, float]:
    """(absolute length, multiple of ‖a‖) of a path that is given in one of the two ways."""
    if (T is None) == (angle is None):
        raise ValueError(f"{owner}: got T={T} and angle={angle}; give exactly one of them")
    name, value = ("T", T) if angle is None else ("angle", angle)
    value = finite_number(owner, name, value)
    if value < 0:
        raise ValueError(
            f"{owner}: {name} is {value}; expected >= 0 (to steer the other way, swap the barrier's sides)"
        )
    return (value, 0.0) if angle is None else (0.0, value)
