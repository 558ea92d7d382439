"""What every intervention is, and the checks and tables that they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from steerfast import ops
from steerfast._checks import (
    Directions,
    as_tensor,
    check_stream,
    direction_rows,
    finite_number,
    float_table,
    set_field,
)
from steerfast.ops import torch_backend
from steerfast.ops.backends import backend_of
from steerfast.ops.slots import Slot, constants, hinge
from steerfast.place import NOWHERE, Origin, common_origin

from .fitted import FitInfo

OFFSET, SLOPE, BEND, KNOT, BEND2, KNOT2, JUMP, EDGE = range(8)
"""Columns of a hinge: g = offset + slope·y + bend·relu(y - knot) + bend2·relu(y - knot2) + jump·[y > edge]."""

# Fields that say where an intervention comes from, not what it does.
_KNOWN = ("origin", "info")

Program = Callable[[Tensor, Tensor | float], Tensor]
"""(x (..., d), scale: a number or one per row, (n,)) -> x'; a row of scale 0 is returned bit for bit."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of all interventions: an edit of rows of the stream that fits one slot.

    Attributes:
        origin: Where the direction, the barrier or the SAE comes from that it was given, as far as that is known.
        info: How it was fitted: what `sf.fit` knows; None: it was made by hand.
    """

    origin: Origin = field(default=NOWHERE, kw_only=True)
    info: FitInfo | None = field(default=None, kw_only=True)

    registry: ClassVar[dict[str, type[Intervention]]] = {}

    def __init_subclass__(cls, listed: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if listed:  # among those that a file may name
            Intervention.registry[cls.__name__] = cls

    @property
    def width(self) -> int:
        """d, the width of the stream that it edits."""
        return self.slot().lift.shape[-1]

    @property
    def everywhere(self) -> bool:
        """Whether a direction of one place is meant for any: a removal is, as published; what adds is not."""
        return False

    def __post_init__(self) -> None:
        given = [getattr(self, f.name) for f in fields(self) if f.name not in _KNOWN]
        several = [item for value in given for item in (value if isinstance(value, (list, tuple)) else [value])]
        found = [one for item in several if isinstance(one := getattr(item, "origin", None), Origin)]
        if found:
            set_field(self, "origin", common_origin(type(self).__name__, found))

    def known_from(self, origin: Origin, info: FitInfo | None = None) -> Intervention:
        """The same edit with an origin, and with what is known of its fit: of a file, or of what it was made from."""
        known = copy(self)
        set_field(known, "origin", origin)
        set_field(known, "info", info)
        return known

    def known(self) -> dict[str, Any]:
        """What is known of its making, ready for JSON; the inverse is `with_known`."""
        found: dict[str, Any] = {} if self.origin == NOWHERE else {"origin": self.origin.numbers()}
        return found if self.info is None else {**found, "info": self.info.numbers()}

    def with_known(self, numbers: Mapping[str, Any]) -> Intervention:
        """The same edit with what a file says of its making; an origin that the file does not name stays its own."""
        origin = Origin.restore(numbers["origin"]) if "origin" in numbers else self.origin
        return self.known_from(origin, FitInfo.restore(numbers["info"]) if "info" in numbers else None)

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

    def apply(self, x: Tensor, strength: Tensor | float = 1.0) -> Tensor:
        """Edit activations as in a steered model: the same backend, dtypes and numbers, without the model.

        Bit for bit where the model gives all rows one plan; where rows have plans of their own, and in a float64 model at a
        strength that float32 does not hold, the last bits may differ.

        Args:
            x: Activations, (..., d), floating. The edit's rows are rounded to its dtype, as to that of a model.
            strength: What `steer` takes: multiplies the edit (for a flow its path, for a rotation its angle), on top of
                the strength of its own. A number, or a float32 tensor (...,) with one per row.

        Returns:
            A new tensor (..., d) of the dtype and on the device of x, differentiable in x. A row of strength 0 is
            returned bit for bit.

        Raises:
            TypeError, ValueError: x is no floating tensor of this width, the edit does not fit its dtype, or a strength
                is not finite or has another shape.

        Example:
            >>> import torch, steerfast as sf
            >>> sf.Add(torch.tensor([1.0, 0.0]), strength=2.0).apply(torch.zeros(1, 2))
            tensor([[2., 0.]])
        """
        owner = f"{type(self).__name__}.apply"
        check_stream(owner, x)
        if x.shape[-1] != self.width:
            raise ValueError(f"{owner}: x has width {x.shape[-1]} and {self!r} has {self.width}")
        scale = row_strengths(owner, strength, x) if isinstance(strength, Tensor) else strength
        if not isinstance(scale, Tensor):
            scale = finite_number(owner, "strength", scale)
            if scale == 0:
                return x.clone()
        if (program := self.program(x.device)) is not None:
            return program(x, scale)
        slot = slot_in(owner, x.dtype, self).to(x.device)
        if not isinstance(scale, Tensor):
            if backend_of(x) == "torch":
                return run_slot(slot, float(slot.constants[2]), x, scale).view_as(x)
            scale = x.new_full((x.numel() // x.shape[-1],), scale, dtype=torch.float32)
        rows = torch.where(scale == 0, -1, 0).int()
        return ops.subspace(x, *slot.tables(), rows, scale, slot.modes, slot.rank)

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def numbers(self) -> dict[str, Any]:
        """The fields that are not tensors, by name, but for what is known of its making."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _KNOWN}
        return {name: value for name, value in found.items() if not isinstance(value, Tensor)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> Intervention:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        arguments: dict[str, Any] = {**tensors, **numbers}
        return cls(**arguments)

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


def slot_in(owner: str, dtype: torch.dtype, intervention: Intervention) -> Slot:
    """The slot of an intervention with its rows in a dtype.

    Raises:
        TypeError: the intervention has no slot.
        ValueError: a row overflows or vanishes in that dtype.
    """
    untrained(owner, intervention)
    given = intervention.slot()
    narrow = given.to(given.lift.device, dtype)
    for part, wide in ((narrow.lift, given.lift), (narrow.project, given.project)):
        vanished = (part == 0).all(1) & (wide != 0).any(1)
        if not part.isfinite().all() or vanished.any():
            raise ValueError(
                f"{owner}: {intervention!r} does not fit {dtype}: a row overflows or vanishes there; "
                "scale the vector towards length 1 and put its size into the strength"
            )
    return narrow


def row_strengths(owner: str, strength: Tensor, x: Tensor) -> Tensor:
    """A strength for every row of x (..., d), as a list of rows (n,)."""
    if strength.shape != x.shape[:-1] or strength.dtype != torch.float32 or strength.device != x.device:
        raise ValueError(
            f"{owner}: strength is {strength.dtype} {tuple(strength.shape)} on {strength.device}; expected a number, or "
            f"torch.float32 {tuple(x.shape[:-1])} on {x.device}, one per row of x"
        )
    if strength.device.type != "meta" and not bool(strength.isfinite().all()):
        raise ValueError(f"{owner}: strength holds NaN or Inf; expected a finite number per row")
    return strength.reshape(-1)


def run_slot(slot: Slot, strength: float, x: Tensor, scale: Tensor | float) -> Tensor:
    """A slot on the backend of PyTorch, with the strength that it has: a `Program` but for its first two arguments."""
    if not isinstance(scale, Tensor):
        return torch_backend.edit(slot, x, strength * scale)
    moved = torch_backend.edit(slot, x, strength * scale[:, None])
    return torch.where((scale == 0).view(*x.shape[:-1], 1), x, moved)


def _edit_live(edit: Intervention, x: Tensor, scale: Tensor | float) -> Tensor:
    """The edit by its tensors as they are now, differentiable in them: a `Program`."""
    slot = edit.slot()
    return run_slot(slot.to(x.device), float(slot.constants[2]), x, scale)


def unit_row(owner: str, direction: Directions, name: str = "direction") -> Tensor:
    """One direction (d,), scaled to length 1."""
    row = direction_rows(owner, name, direction, one=True)[0].double()
    return (row / row.norm()).float()


def constants_row(T: float = 0.0, angle: float = 0.0, strength: float = 1.0) -> Tensor:
    """A slot's row of constants, (8,); c₃ … c₇ are the mode's own."""
    return torch.tensor(constants(T, angle, strength), dtype=torch.float32, device="cpu")


def hinge_rows(rank: int, offset: float = 0.0, slope: float = 0.0, bend: float = 0.0, knot: float = 0.0) -> Tensor:
    """The same hinge for every direction, (rank, 8): g = offset + slope·y + bend·relu(y - knot)."""
    return torch.tensor([hinge(offset, slope, bend, knot)], dtype=torch.float32, device="cpu").repeat(rank, 1)
