"""What every intervention is, and the checks and tables that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from steerfast._checks import ORTHONORMAL, direction_rows, no_gradient, tensor_of
from steerfast.ops import torch_backend
from steerfast.ops.slots import Slot

ROUNDED = 1e-6
"""Deviation from orthonormal rows that rounding to float32 explains."""

OFFSET, SLOPE, BEND, KNOT, BEND2, KNOT2, JUMP, EDGE = range(8)
"""Columns of a hinge: g = offset + slope·y + bend·relu(y - knot) + bend2·relu(y - knot2) + jump·[y > edge]."""

DEPENDENT = 1e-4
"""A row whose part outside the span of the earlier rows is shorter than this share of it counts as dependent."""


class HasVector(Protocol):
    """Anything that carries a vector (d,), such as a direction from `steerfast.extract`."""

    vector: Tensor


Directions = Tensor | HasVector


Program = Callable[[Tensor, Tensor | float], Tensor]
"""(x (..., d), scale: a number or one per row, (n,)) -> x'; a row of scale 0 is returned bit for bit."""


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

    @property
    def place(self) -> tuple[str, int] | None:
        """(site, layer) where it belongs, if it knows."""
        return None

    @property
    def model(self) -> str | None:
        """Class of the one model that it fits; None: any of its width."""
        return None

    @property
    def by_token(self) -> tuple[Intervention | None, ...]:
        """What it does to the prompt's real token 0, 1, … and to no other (None: nothing); (): to every token the same."""
        return ()

    @property
    def trained(self) -> tuple[str, ...]:
        """The fields that require a gradient: live tensors, read anew by every forward pass; no copy is kept of them."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        return tuple(name for name, value in tensors if isinstance(value, Tensor) and value.requires_grad)

    def slot(self) -> Slot:
        """The intervention as float32 CPU tensors (live ones as they are); B and C are the same object where C = B."""
        raise TypeError(f"{type(self).__name__} does not say how it edits the stream")

    def program(self, device: torch.device) -> Program | None:
        """What runs an edit that fits no slot, its tensors on that device; None: its slot says all."""
        return partial(_edit_live, self) if self.trained else None

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


def intervention_type(owner: str, name: str) -> type[Intervention]:
    """The class of an intervention by its name: one of ours, imported where it lives, or a subclass defined elsewhere.

    Raises:
        ValueError: there is none of this name.
    """
    import steerfast

    if name not in Intervention.registry and name in steerfast.__all__:
        getattr(steerfast, name)
    if name not in Intervention.registry:
        raise ValueError(
            f"{owner}: unknown intervention {name!r}; known are {', '.join(sorted(Intervention.registry))}"
        )
    return Intervention.registry[name]


def orthonormal(owner: str, name: str, rows: Tensor) -> Tensor:
    """An orthonormal basis (m, d) of the span of m independent rows; a single row keeps its direction."""
    count, width = rows.shape
    if count > width:
        raise ValueError(f"{owner}: {name} has {count} rows of width {width}; at most {width} can be independent")
    wide = rows.double()
    if (
        wide @ wide.T - torch.eye(count, dtype=wide.dtype, device="cpu")
    ).abs().max() <= ROUNDED:  # already a basis: what was saved comes back as it was
        return rows
    basis, triangle = torch.linalg.qr((wide / wide.norm(dim=1, keepdim=True)).T)
    diagonal = triangle.diagonal()
    weakest = int(diagonal.abs().argmin())
    if diagonal[weakest].abs() < DEPENDENT:
        raise ValueError(
            f"{owner}: row {weakest} of {name} lies in the span of the rows before it (only {diagonal[weakest].abs():.1e} "
            "of its length is outside); remove it"
        )
    return (basis * diagonal.sign()).T.float().contiguous()


def check_orthonormal(owner: str, name: str, rows: Tensor) -> None:
    """Refuse rows that are not orthonormal, and say by how much."""
    deviation = (
        (rows.double() @ rows.double().T - torch.eye(rows.shape[0], dtype=torch.float64, device="cpu"))
        .abs()
        .max()
        .item()
    )
    if rows.shape[0] > rows.shape[1] or deviation > ORTHONORMAL:
        raise ValueError(
            f"{owner}: the rows of {name} are not orthonormal (their products deviate from the identity by {deviation:.1e}); "
            "orthonormalise them first, for instance with torch.linalg.qr"
        )


def untrained(owner: str, edit: Intervention) -> None:
    """Refuse an intervention with live tensors where copies of them are kept."""
    if names := edit.trained:
        raise ValueError(
            f"{owner}: {', '.join(names)} of {edit!r} requires a gradient, which would not reach it, because a copy is kept "
            f"here; build the intervention from {names[0]}.detach()"
        )


def live_rows(
    owner: str, name: str, value: Directions, *, one: bool = False, zero: bool = False, gaps: bool = False
) -> Tensor:
    """`direction_rows`; but a tensor that requires a gradient stays the one that was given. `zero`: it may begin at zero."""
    given = getattr(value, "vector", value)
    if not isinstance(given, Tensor) or not given.requires_grad:
        return direction_rows(owner, name, value, one=one, gaps=gaps)
    now = given.detach()
    direction_rows(owner, name, torch.ones_like(now) if zero and not now.any() else now, one=one, gaps=gaps)
    return given


def live_table(owner: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`float_table`; but a tensor that requires a gradient stays the one that was given."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return float_table(owner, name, value, shape)
    float_table(owner, name, value.detach(), shape)
    return value


def beside(tensor: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The others on the device and in the dtype of a live tensor."""
    return tuple(other.to(tensor.device, tensor.dtype) for other in others)


def rows_of(value: Directions) -> Tensor:
    """A field that holds one row (d,) or several (m, d), as rows."""
    tensor = as_tensor(value)
    return tensor.reshape(-1, tensor.shape[-1])


def _edit_live(edit: Intervention, x: Tensor, scale: Tensor | float) -> Tensor:
    """The edit by its tensors as they are now, differentiable in them: a `Program`."""
    slot = edit.slot()
    gain = scale * float(slot.constants[2])
    if not isinstance(gain, Tensor):
        return torch_backend.edit(x, _on(slot, x.device), gain)
    moved = torch_backend.edit(x, _on(slot, x.device), gain[:, None])
    return torch.where((gain == 0).view(*x.shape[:-1], 1), x, moved)


def _on(slot: Slot, device: torch.device) -> Slot:
    lift = slot.lift.to(device)
    return slot._replace(
        project=lift if slot.project is slot.lift else slot.project.to(device),
        lift=lift,
        constants=slot.constants.to(device),
        coefficients=slot.coefficients.to(device),
    )


def float_table(owner: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A finite float32 CPU tensor of one shape."""
    no_gradient(owner, name, value)
    try:
        table = tensor_of(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{owner}: {name} must be a tensor of shape {shape}; got {type(value).__name__}") from None
    if tuple(table.shape) != shape or not table.is_floating_point():
        raise ValueError(
            f"{owner}: {name} has shape {tuple(table.shape)} and dtype {table.dtype}; expected {shape}, floating"
        )
    table = table.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not table.isfinite().all():
        raise ValueError(f"{owner}: {name} holds NaN or Inf")
    return table


def unit_row(owner: str, direction: Directions, name: str = "direction") -> Tensor:
    """One direction (d,), scaled to length 1."""
    row = direction_rows(owner, name, direction, one=True)[0].double()
    return (row / row.norm()).float()


def constants_row(T: float = 0.0, angle: float = 0.0, strength: float = 1.0) -> Tensor:
    """A slot's row of constants; c₃ … c₇ are the mode's own."""
    return torch.tensor([T, angle, strength, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float32, device="cpu")


def hinge_rows(rank: int, offset: float = 0.0, slope: float = 0.0, bend: float = 0.0, knot: float = 0.0) -> Tensor:
    """The same hinge for every direction: g = offset + slope·y + bend·relu(y - knot)."""
    return torch.tensor([[offset, slope, bend, knot, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float32, device="cpu").repeat(
        rank, 1
    )


def as_tensor(value: Any) -> Tensor:
    """A field that __post_init__ has made a tensor."""
    return value


def set_field(target: object, name: str, value: Any) -> None:
    """Set a field of a frozen object, from its __post_init__."""
    object.__setattr__(target, name, value)
