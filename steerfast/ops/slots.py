"""Slots of a bank: the modes, the layout of the three tables, and how one slot is written into them and read from them.

Every intervention is a *slot*: k projection rows B, k lift rows C and a few numbers. A bank is three tensors
that hold all slots of one place in the model, at addresses that never change:

    vectors       (R, d)  storage dtype   the rows of every B and C, one after another; a slot with C = B stores them once
    coefficients  (M, 8)  float32         per slot one row of constants, then one row per direction
    slots         (S, 8)  int32           per slot: mode, rank, project, lift, coefficients, steps, keep_norm, extra

`project` and `lift` are the first row of B and C in `vectors`, `coefficients` is the row of the slot's constants
(T, angle, strength, c₃ … c₇). `extra` further rows of coefficients may follow those of the directions. Modes ADD and
AFFINE project nothing: the edit of ADD is the single row C, that of AFFINE is C₀ ⊙ x + C₁. A slot of rank 0 is empty and
edits nothing. A row table says who edits which token:

    rows          (n,) or (n, P) int32    slots applied to that token, left to right; -1 = none; else outside 0 to S - 1: NaN
    scale         like rows, float32      multiplies the edit δ (for a flow: T), on top of the slot's own strength

One table serves every layer: a plan takes the same slot numbers in the bank of every layer, and where it has no edit
the slot is empty. So a batch's owners are decided once per forward pass, not once per layer, and a strength is changed
by writing one float. All three tensors and the table keep their addresses while contents change, which is what CUDA
graphs and torch.compile need.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

ADD, HINGE, FLOW, ROTATE, PUSH, SLERP, REFLECT, AFFINE = 1, 2, 4, 8, 16, 32, 64, 128
KEEP_NORM = 256  # not a mode, but announced with them: some slot restores the length of its rows
SOLVE = 512  # a flow with further rows: another solver than Euler, a level, ridge terms, a velocity
ALL_MODES = ADD | HINGE | FLOW | ROTATE | PUSH | SLERP | REFLECT | AFFINE | KEEP_NORM | SOLVE

Tables = tuple[Tensor, Tensor, Tensor]
"""(vectors, coefficients, slots) of a bank."""

Eight = tuple[float, float, float, float, float, float, float, float]


def constants(T: float = 0.0, angle: float = 0.0, strength: float = 1.0) -> Eight:
    """A slot's row of constants; c₃ … c₇ are the mode's own: of FLOW c₃ is 1 where the barrier is raw."""
    return (T, angle, strength, 0.0, 0.0, 0.0, 0.0, 0.0)


def hinge(offset: float = 0.0, slope: float = 0.0, bend: float = 0.0, knot: float = 0.0) -> Eight:
    """A direction's row of a hinge: g = offset + slope·y + bend·relu(y - knot)."""
    return (offset, slope, bend, knot, 0.0, 0.0, 0.0, 0.0)


class Header(NamedTuple):
    """One row of `slots`: what a slot is, and where its rows stand."""

    mode: int
    rank: int
    project: int = 0
    lift: int = 0
    start: int = 0
    steps: int = 0
    keep_norm: int = 0
    extra: int = 0

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """As a table of one slot, int32 (1, 8)."""
        return torch.tensor([list(self)], dtype=torch.int32, device=device)


class Slot(NamedTuple):
    """One row of a bank, as views of its tensors; or what would be written there."""

    mode: int
    steps: int
    keep_norm: bool
    project: Tensor  # (k, d); the object that `lift` is where C = B
    lift: Tensor  # (k, d)
    constants: Tensor  # (8,)
    coefficients: Tensor  # (k, 8)
    extra: Tensor | None = None  # (e, 8), what a mode needs beyond eight numbers per direction

    @property
    def rank(self) -> int:
        """k, the number of directions."""
        return self.lift.shape[0]

    @property
    def modes(self) -> int:
        """Its mode, with KEEP_NORM where it restores lengths."""
        return self.mode | (KEEP_NORM if self.keep_norm else 0)

    @property
    def directions(self) -> Tensor:
        """Its rows of `vectors`: those of B and then those of C, once where they are the same."""
        return self.lift if self.project is self.lift else torch.cat([self.project, self.lift])

    @property
    def numbers(self) -> Tensor:
        """Its rows of `coefficients`."""
        return torch.cat([self.constants[None], self.coefficients] + ([] if self.extra is None else [self.extra]))

    @property
    def size(self) -> tuple[int, int]:
        """How many rows of `vectors` and of `coefficients` it takes."""
        extra = 0 if self.extra is None else self.extra.shape[0]
        return self.rank * (1 if self.project is self.lift else 2), 1 + self.rank + extra

    def header(self, first: int = 0, start: int = 0) -> Header:
        """Its row of `slots`, with its directions from row `first` on and its numbers from row `start` on."""
        rows, numbers = self.size
        last = first + rows - self.rank
        extra = numbers - 1 - self.rank
        return Header(self.mode, self.rank, first, last, start, self.steps, int(self.keep_norm), extra)

    def tables(self) -> Tables:
        """A bank of this slot alone, as `ops.subspace` takes it."""
        return self.directions, self.numbers, self.header().tensor(self.lift.device)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Slot:
        """The slot on a device; `dtype` is that of its directions, whose numbers stay as they are."""
        lift = self.lift.to(device, dtype)
        return self._replace(
            project=lift if self.project is self.lift else self.project.to(device, dtype),
            lift=lift,
            constants=self.constants.to(device),
            coefficients=self.coefficients.to(device),
            extra=None if self.extra is None else self.extra.to(device),
        )


def slot_of(vectors: Tensor, coefficients: Tensor, slots: Tensor, index: int) -> Slot:
    """Slot number `index` of a bank."""
    return slot_at(vectors, coefficients, Header(*slots[index].tolist()))


def slot_at(vectors: Tensor, coefficients: Tensor, header: Header) -> Slot:
    """The slot with this header, as views of a bank's tensors."""
    mode, rank, project, lift, start, steps, keep_norm, extra = header
    end = start + 1 + rank
    rows = vectors[lift : lift + rank]
    return Slot(
        mode=mode,
        steps=steps,
        keep_norm=bool(keep_norm),
        project=rows if project == lift else vectors[project : project + rank],
        lift=rows,
        constants=coefficients[start],
        coefficients=coefficients[start + 1 : end],
        extra=coefficients[end : end + extra] if extra else None,
    )


def needs(slots: Iterable[Slot], most: int | None = None) -> tuple[int, int]:
    """Rows of `vectors` and of `coefficients` that hold these slots, or whichever `most` of them."""
    sizes = [slot.size for slot in slots]
    directions, numbers = (sorted((size[part] for size in sizes), reverse=True)[:most] for part in (0, 1))
    return sum(directions), sum(numbers)
