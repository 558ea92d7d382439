"""Interventions: small immutable objects that say what is done to the residual stream, validated on construction.

Each one is a slot of a bank (see `steerfast.reference`): rows B to project on, rows C to lift with, eight numbers per
direction. A new method is a new class of a few lines here, not a new kernel. Tensors are kept as float32 on the CPU;
a bank rounds them to the dtype of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ._checks import direction_rows, finite_number, one_of
from .barrier import Barrier
from .reference import ADD, FLOW, HINGE, Slot

DEPENDENT = 1e-4
"""A row whose part outside the span of the earlier rows is shorter than this share of it counts as dependent."""


class HasVector(Protocol):
    """Anything that carries a vector (d,), such as a direction from `steerfast.extract`."""

    vector: Tensor


Directions = Tensor | HasVector


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of all interventions: an edit of rows of the stream that fits one slot."""

    registry: ClassVar[dict[str, type[Intervention]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Intervention.registry[cls.__name__] = cls

    @property
    def width(self) -> int:
        """d, the width of the stream that it edits."""
        return self.slot().lift.shape[-1]

    def slot(self) -> Slot:
        """The intervention as float32 CPU tensors; B and C are the same object where C = B."""
        raise TypeError(f"{type(self).__name__} does not say how it edits the stream")

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def numbers(self) -> dict[str, Any]:
        """The fields that are not tensors, by name."""
        return {f.name: value for f in fields(self) if not isinstance(value := getattr(self, f.name), Tensor)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> Intervention:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        return cls(**tensors, **numbers)

    def __repr__(self) -> str:
        shapes = [f"{name}: {'×'.join(map(str, value.shape))}" for name, value in self.tensors().items()]
        return f"{type(self).__name__}({', '.join([*shapes, *(f'{k}={v!r}' for k, v in self.numbers().items())])})"


@dataclass(frozen=True, eq=False, repr=False)
class Add(Intervention):
    """Add a steering vector: x + c·v.

    Args:
        vector: v, (d,), or an object with `.vector`.
        strength: c. With unit v its unit is the length of the residual stream.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: v is not one finite non-zero row, or c is not finite.

    Reference:
        Turner et al. 2023, Activation Addition (arXiv:2308.10248); Rimsky et al. 2024, CAA (arXiv:2312.06681).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Add(torch.tensor([1.0, 0.0]), strength=4.0)
        Add(vector: 2, strength=4.0, keep_norm=False)
    """

    vector: Directions
    strength: float = 1.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _set(self, "vector", direction_rows("Add", "vector", self.vector, one=True)[0])
        _set(self, "strength", finite_number("Add", "strength", self.strength))

    def slot(self) -> Slot:
        rows = _tensor(self.vector)[None]
        return Slot(ADD, 0, self.keep_norm, rows, rows, _constants(strength=self.strength), _table(1))


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Remove a direction, or the span of several: x - VVᵀx with V an orthonormal basis of the rows.

    Args:
        direction: One direction (d,) or m independent ones (m, d), of any length.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: not finite, zero, more rows than d, or rows that depend on each other.

    Reference:
        Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Ablate(torch.tensor([3.0, 0.0]))
        Ablate(direction: 1×2, keep_norm=False)
    """

    direction: Directions
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _set(self, "direction", orthonormal("Ablate", "direction", direction_rows("Ablate", "direction", self.direction)))

    def slot(self) -> Slot:
        rows = _tensor(self.direction)
        return Slot(HINGE, 0, self.keep_norm, rows, rows, _constants(), _table(rows.shape[0], slope=-1.0))


@dataclass(frozen=True, eq=False, repr=False)
class Amplify(Intervention):
    """Amplify features where they are active: x + α · relu(xS)Sᵀ, S = features.T.

    Args:
        features: One feature (d,) or m of them (m, d), for instance decoder rows of an SAE.
        alpha: α. -1 erases the active part only if the features are orthogonal: 150 random directions kept 47 %.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: not finite, zero rows, or α is not finite.

    Reference:
        Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Amplify(torch.eye(2), alpha=0.5)
        Amplify(features: 2×2, alpha=0.5, keep_norm=False)
    """

    features: Directions
    alpha: float = 1.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _set(self, "features", direction_rows("Amplify", "features", self.features))
        _set(self, "alpha", finite_number("Amplify", "alpha", self.alpha))

    def slot(self) -> Slot:
        rows = _tensor(self.features)
        return Slot(HINGE, 0, self.keep_norm, rows, rows, _constants(), _table(rows.shape[0], bend=self.alpha))


@dataclass(frozen=True, eq=False, repr=False)
class Calibrate(Intervention):
    """Replace the active part of features by a fixed one: x - relu(xS)Sᵀ + β · mean(S), S = features.T.

    Args:
        features: One feature (d,) or m of them (m, d), for instance decoder rows of an SAE.
        beta: β, the multiple of the features' mean that is put in.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: not finite, zero rows, or β is not finite.

    Reference:
        Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Calibrate(torch.eye(2), beta=2.0)
        Calibrate(features: 2×2, beta=2.0, keep_norm=False)
    """

    features: Directions
    beta: float = 1.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        _set(self, "features", direction_rows("Calibrate", "features", self.features))
        _set(self, "beta", finite_number("Calibrate", "beta", self.beta))

    def slot(self) -> Slot:
        rows = _tensor(self.features)
        table = _table(rows.shape[0], offset=self.beta / rows.shape[0], bend=-1.0)
        return Slot(HINGE, 0, self.keep_norm, rows, rows, _constants(), table)


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
        return Slot(FLOW, self.steps, False, rows, rows, _constants(T, angle), table)

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
        return cls(Barrier(**tensors, **rest.pop("barrier")), **rest)

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
        raise ValueError(f"{owner}: {name} is {value}; expected >= 0 (to steer the other way, swap the barrier's sides)")
    return (value, 0.0) if angle is None else (0.0, value)


def orthonormal(owner: str, name: str, rows: Tensor) -> Tensor:
    """An orthonormal basis (m, d) of the span of m independent rows; a single row keeps its direction."""
    count, width = rows.shape
    if count > width:
        raise ValueError(f"{owner}: {name} has {count} rows of width {width}; at most {width} can be independent")
    wide = rows.double()
    basis, triangle = torch.linalg.qr((wide / wide.norm(dim=1, keepdim=True)).T)
    diagonal = triangle.diagonal()
    weakest = int(diagonal.abs().argmin())
    if diagonal[weakest].abs() < DEPENDENT:
        raise ValueError(
            f"{owner}: row {weakest} of {name} lies in the span of the rows before it (only {diagonal[weakest].abs():.1e} "
            "of its length is outside); remove it"
        )
    return (basis * diagonal.sign()).T.float().contiguous()


def _constants(T: float = 0.0, angle: float = 0.0, strength: float = 1.0) -> Tensor:
    return torch.tensor([T, angle, strength, 0.0, 0.0, 0.0, 0.0, 0.0])


def _table(rank: int, offset: float = 0.0, slope: float = 0.0, bend: float = 0.0, knot: float = 0.0) -> Tensor:
    """The same hinge for every direction: g = offset + slope·y + bend·relu(y - knot)."""
    return torch.tensor([[offset, slope, bend, knot, 0.0, 0.0, 0.0, 0.0]]).repeat(rank, 1)


def _tensor(value: Directions) -> Tensor:
    """A field that __post_init__ has made a tensor."""
    return value  # type: ignore[return-value]


def _set(target: object, name: str, value: Any) -> None:
    object.__setattr__(target, name, value)
