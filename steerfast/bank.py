"""The bank: the slots of one place in the model, in buffers whose addresses never change.

Layout and meaning of the three tensors are written down in `steerfast.reference`. Rows of `vectors` and `coefficients`
are handed out first-fit; a slot is written completely before its header makes it visible, and a released slot is empty
before its rows are handed out again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .interventions import Intervention
from .reference import Slot


class Bank:
    """Slots of all methods for one layer and site.

    Args:
        width: d, the width of the stream.
        slots: How many interventions fit.
        directions: How many rows of B and C fit in all; None: 4 per slot, at least 64.
        dtype: Storage dtype of the rows, usually that of the stream.
        device: Where the buffers live.

    Example:
        >>> import torch, steerfast as sf
        >>> bank = sf.Bank(width=2, slots=4)
        >>> slot = bank.register(sf.Add(torch.tensor([1.0, 0.0]), strength=2.0))
        >>> sf.ops.subspace(torch.zeros(1, 2), *bank.tensors, rows=torch.tensor([slot], dtype=torch.int32))
        tensor([[2., 0.]])
    """

    def __init__(
        self,
        width: int,
        slots: int = 32,
        directions: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        directions = max(64, 4 * slots) if directions is None else directions
        self.vectors = torch.zeros(directions, width, dtype=dtype, device=device)
        self.coefficients = torch.zeros(directions + slots, 8, dtype=torch.float32, device=device)
        self.slots = torch.zeros(slots, 8, dtype=torch.int32, device=device)
        self._vector_rows = Runs(directions)
        self._coefficient_rows = Runs(directions + slots)
        self._held: dict[int, _Held] = {}

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(vectors, coefficients, slots), as `ops.subspace` takes them."""
        return self.vectors, self.coefficients, self.slots

    @property
    def width(self) -> int:
        """d, the width of the stream."""
        return self.vectors.shape[1]

    @property
    def modes(self) -> int:
        """The modes of the registered slots, or-ed."""
        modes = 0
        for held in self._held.values():
            modes |= held.view.mode
        return modes

    @property
    def max_rank(self) -> int:
        """The largest rank of a registered slot."""
        return max((held.view.lift.shape[0] for held in self._held.values()), default=0)

    def register(self, intervention: Intervention, slot: int | None = None) -> int:
        """Put an intervention into a free slot (or into the named one) and return the slot's number.

        Raises:
            ValueError: another width, the named slot is taken or out of range.
            RuntimeError: the bank is full; nothing has been changed.
        """
        spec = intervention.slot()
        if spec.lift.shape[-1] != self.width:
            raise ValueError(
                f"Bank.register: {intervention!r} has width {spec.lift.shape[-1]}; this bank has {self.width}"
            )
        if slot is None:
            slot = next((i for i in range(self.slots.shape[0]) if i not in self._held), None)
            if slot is None:
                raise RuntimeError(f"Bank.register: all {self.slots.shape[0]} slots are taken; release one")
        if not 0 <= slot < self.slots.shape[0] or slot in self._held:
            raise ValueError(f"Bank.register: slot {slot} is taken or outside 0 to {self.slots.shape[0] - 1}")
        stored = [spec.lift] if spec.project is spec.lift else [spec.project, spec.lift]
        stored = [part.to(self.vectors) for part in stored]
        for part in stored:
            if not part.isfinite().all() or (part == 0).all(1).any():
                raise ValueError(
                    f"Bank.register: {intervention!r} does not fit {self.vectors.dtype}: a row overflows or vanishes there; "
                    "scale the vector towards length 1 and put its size into the strength"
                )
        rank, rows = spec.lift.shape[0], sum(part.shape[0] for part in stored)
        project = self._vector_rows.take(rows, "directions")
        try:
            constants = self._coefficient_rows.take(1 + rank, "coefficients")
        except RuntimeError:
            self._vector_rows.give(project, rows)
            raise
        self.vectors[project : project + rows] = torch.cat(stored)
        self.coefficients[constants] = spec.constants.to(self.coefficients)
        self.coefficients[constants + 1 : constants + 1 + rank] = spec.coefficients.to(self.coefficients)
        lift = project + rows - rank
        header = [spec.mode, rank, project, lift, constants, spec.steps, int(spec.keep_norm), 0]
        self.slots[slot] = torch.tensor(header, dtype=torch.int32).to(self.slots)
        view = spec._replace(
            project=self.vectors[project : project + rank],
            lift=self.vectors[lift : lift + rank],
            constants=self.coefficients[constants],
            coefficients=self.coefficients[constants + 1 : constants + 1 + rank],
        )
        self._held[slot] = _Held(view, float(spec.constants[2]), (project, rows), (constants, 1 + rank))
        return slot

    def release(self, slot: int) -> None:
        """Empty a slot and hand its rows back; tokens that still name it are left alone."""
        held = self._held.pop(slot, None)
        if held is None:
            raise ValueError(f"Bank.release: slot {slot} is not registered")
        self.slots[slot] = 0
        self._vector_rows.give(*held.vector_rows)
        self._coefficient_rows.give(*held.coefficient_rows)

    def view(self, slot: int) -> Slot:
        """A registered slot as views of the buffers."""
        return self._held[slot].view

    def strength(self, slot: int) -> float:
        """The strength of a slot, known on the host."""
        return self._held[slot].strength

    def set_strength(self, slot: int, strength: float) -> None:
        """Change the strength of a slot: one float is written, no address changes."""
        held = self._held[slot]
        held.view.constants[2] = strength
        held.strength = strength


def fitting(interventions: dict[int, Intervention], like: Bank, slots: int) -> Bank:
    """A bank of `slots` slots that holds exactly these interventions, with the width, dtype and device of another."""
    rows = sum(
        spec.lift.shape[0] * (1 if spec.project is spec.lift else 2)
        for spec in (i.slot() for i in interventions.values())
    )
    bank = Bank(like.width, max(slots, like.slots.shape[0]), rows, like.vectors.dtype, like.vectors.device)
    for slot, intervention in interventions.items():
        bank.register(intervention, slot)
    return bank


class _Held:
    """What the host remembers of a registered slot."""

    __slots__ = ("coefficient_rows", "strength", "vector_rows", "view")

    def __init__(
        self, view: Slot, strength: float, vector_rows: tuple[int, int], coefficient_rows: tuple[int, int]
    ) -> None:
        self.view = view
        self.strength = strength
        self.vector_rows = vector_rows
        self.coefficient_rows = coefficient_rows


class Runs:
    """First-fit allocation of runs of numbers below `size`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.free = [(0, size)] if size else []  # (start, length), sorted, never touching

    def take(self, length: int, what: str) -> int:
        """The first number of a free run, which is now taken."""
        for i, (start, room) in enumerate(self.free):
            if room >= length:
                self.free[i : i + 1] = [(start + length, room - length)] if room > length else []
                return start
        raise RuntimeError(
            f"steerfast: no {length} neighbouring {what} are free (capacity {self.size}); release something or ask for more "
            "when the bank is built"
        )

    def give(self, start: int, length: int) -> None:
        """Hand a run back."""
        merged: list[tuple[int, int]] = []
        for begin, room in sorted([*self.free, (start, length)]):
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((begin, room))
        self.free = merged
