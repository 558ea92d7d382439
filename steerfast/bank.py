"""The bank: the slots of one place in the model, in buffers whose addresses never change.

Layout and meaning of the three tensors are written down in `steerfast.ops.slots`. They are views of one block of
memory, which on a GPU has a twin on the host: registering, replacing and releasing write the twin, and the bytes that
changed go over in one copy when the tensors are next asked for. The device therefore sees all of a change or nothing
of it, between two steps, whatever a captured graph is doing. Rows are handed out first-fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from steerfast.edits.base import Intervention, slot_in
from steerfast.ops.slots import Slot, needs, slot_at

ALIGNED = 16  # bytes: what a vectorised load wants


class Bank:
    """Slots of all methods for one layer and site.

    Args:
        width: d, the width of the stream.
        slots: How many interventions fit.
        directions: How many rows of B and C fit in all; None: 4 per slot, at least 64.
        coefficients: How many rows of eight numbers fit; None: one per slot and eight per direction.
        dtype: Storage dtype of the rows, usually that of the stream.
        device: Where the buffers live.
        rank: The largest rank that a slot may have, for kernels compiled once; None: any, and `max_rank` follows the slots.

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
        coefficients: int | None = None,
        rank: int | None = None,
    ) -> None:
        directions = max(64, 4 * slots) if directions is None else directions
        device = torch.device(device)
        rows = slots + 8 * directions if coefficients is None else coefficients
        self._device = _Buffers.of(width, slots, directions, rows, dtype, device, pinned=False)
        pinned = device.type == "cuda"
        twin = None if device.type == "cpu" else _Buffers.of(width, slots, directions, rows, dtype, "cpu", pinned)
        self._host = self._device if twin is None else twin
        self.vectors, self.coefficients, self.slots = self._device.views
        self._vector_rows = Runs(directions)
        self._coefficient_rows = Runs(rows)
        self._rank = rank
        self._occurring = (0, 0)  # the modes of the registered slots, or-ed, and their largest rank: every call asks
        self._held: dict[int, _Held] = {}
        self._dirty: tuple[int, int] | None = None  # the bytes of the twin that the device has not seen
        self._copied: torch.cuda.Event | None = None  # set while the device may still be reading the twin

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """(vectors, coefficients, slots), as `ops.subspace` takes them, up to date."""
        if not torch.compiler.is_compiling():
            self.commit()
        return self.vectors, self.coefficients, self.slots

    @property
    def width(self) -> int:
        """d, the width of the stream."""
        return self.vectors.shape[1]

    @property
    def modes(self) -> int:
        """The modes of the registered slots, or-ed, with KEEP_NORM where one of them restores a length."""
        return self._occurring[0]

    @property
    def max_rank(self) -> int:
        """The largest rank that a slot has, or may have where the bank was built for one."""
        return self._occurring[1] if self._rank is None else self._rank

    def register(self, intervention: Intervention, slot: int | None = None) -> int:
        """Put an intervention into a free slot (or into the named one), held once, and return the slot's number.

        Raises:
            ValueError: another width, the named slot is taken or out of range.
            RuntimeError: the bank is full; nothing has been changed.
        """
        spec = self._fits(intervention)
        if slot is None:
            slot = next((i for i in range(self.slots.shape[0]) if i not in self._held), None)
            if slot is None:
                raise RuntimeError(f"Bank.register: all {self.slots.shape[0]} slots are taken; release one")
        if not 0 <= slot < self.slots.shape[0] or slot in self._held:
            raise ValueError(f"Bank.register: slot {slot} is taken or outside 0 to {self.slots.shape[0] - 1}")
        self._held[slot] = self._store(slot, spec, holders=1)
        self._count([self._held[slot].view], *self._occurring)
        return slot

    def replace(self, slot: int, intervention: Intervention) -> None:
        """Give a registered slot another content, of any method and rank; its holders keep it.

        Raises:
            ValueError: the slot is not registered, or the intervention has another width.
            RuntimeError: the new rows do not fit; the slot is what it was.
        """
        spec, old = self._fits(intervention), self._registered("replace", slot)
        self._give(old)
        try:
            self._held[slot] = self._store(slot, spec, old.holders)
        except RuntimeError:
            self._vector_rows.take_at(*old.vector_rows)
            self._coefficient_rows.take_at(*old.coefficient_rows)
            raise
        self._count([held.view for held in self._held.values()])

    def hold(self, slot: int) -> None:
        """One more holder of a slot: it takes one more `release` to empty it.

        Raises:
            ValueError: the slot is not registered.
        """
        self._registered("hold", slot).holders += 1

    def release(self, slot: int) -> None:
        """Give up one reference; the last one empties the slot and hands its rows back. Tokens that still name it are left alone.

        Raises:
            ValueError: the slot is not registered.
        """
        held = self._registered("release", slot)
        held.holders -= 1
        if held.holders:
            return
        del self._held[slot]
        self._write(self._host.slots, slot, 1, 0)
        self._give(held)
        self._count([held.view for held in self._held.values()])

    def view(self, slot: int) -> Slot:
        """A registered slot as views of the buffers."""
        self.commit()
        return self._held[slot].view

    def strength(self, slot: int) -> float:
        """The strength of a slot, known on the host."""
        return self._held[slot].strength

    def set_strength(self, slot: int, strength: float) -> None:
        """Change the strength of a slot: one float is written, no address changes."""
        held = self._registered("set_strength", slot)
        row = held.coefficient_rows[0]
        constants = self._host.coefficients[row].clone()
        constants[2] = strength
        self._write(self._host.coefficients, row, 1, constants)
        held.strength = strength

    def commit(self) -> None:
        """Send what has changed since the last commit to the device: one copy, none if nothing has. No-op on the CPU."""
        if self._dirty is None:
            return
        first, last = self._dirty
        self._dirty = None
        if self._host is self._device:
            return
        self._device.block[first:last].copy_(self._host.block[first:last], non_blocking=True)
        if self._host.block.is_pinned():
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(self._device.block.device))

    def _count(self, slots: list[Slot], modes: int = 0, most: int = 0) -> None:
        for slot in slots:
            modes, most = modes | slot.modes, max(most, slot.rank)
        self._occurring = modes, most

    def _registered(self, method: str, slot: int) -> _Held:
        if slot not in self._held:
            raise ValueError(f"Bank.{method}: slot {slot} is not registered")
        return self._held[slot]

    def _fits(self, intervention: Intervention) -> Slot:
        """The slot of an intervention in this bank's dtype, or the reason why it has none here."""
        if not isinstance(intervention, Intervention):
            raise TypeError(
                f"Bank.register: expected an intervention such as sf.Add(v); got {type(intervention).__name__}"
            )
        spec = slot_in("Bank.register", self.vectors.dtype, intervention)
        if spec.lift.shape[-1] != self.width:
            raise ValueError(
                f"Bank.register: {intervention!r} has width {spec.lift.shape[-1]}; this bank has {self.width}"
            )
        if self._rank is not None and spec.rank > self._rank:
            raise ValueError(
                f"Bank.register: {intervention!r} has rank {spec.rank}; this bank was built for rank <= {self._rank} "
                "(rank= of prepare, or of Bank)"
            )
        return spec

    def _store(self, slot: int, spec: Slot, holders: int) -> _Held:
        """Write a slot whose number is free; a bank without room for it is left as it is."""
        rows, numbers = spec.size
        first = self._vector_rows.take(rows, "directions")
        try:
            start = self._coefficient_rows.take(numbers, "coefficients")
        except RuntimeError:
            self._vector_rows.give(first, rows)
            raise
        header = spec.header(first, start)
        self._write(self._host.vectors, first, rows, spec.directions)
        self._write(self._host.coefficients, start, numbers, spec.numbers)
        self._write(self._host.slots, slot, 1, header.tensor())
        view = slot_at(self.vectors, self.coefficients, header)
        return _Held(view, float(spec.constants[2]), (first, rows), (start, numbers), holders)

    def _give(self, held: _Held) -> None:
        self._vector_rows.give(*held.vector_rows)
        self._coefficient_rows.give(*held.coefficient_rows)

    def _write(self, table: Tensor, row: int, count: int, value: Tensor | int) -> None:
        """Write rows of one of the twin's tables and remember which bytes that were."""
        if self._copied is not None:  # the last commit may still be reading the twin
            self._copied.synchronize()
            self._copied = None
        table[row : row + count] = value
        size = table.element_size()
        first = (int(table.storage_offset()) + row * table.shape[1]) * size
        last = first + count * table.shape[1] * size
        low, high = (first, last) if self._dirty is None else self._dirty
        self._dirty = min(first, low), max(last, high)


class _Buffers(NamedTuple):
    """The three tables of a bank as views of one block of bytes."""

    block: Tensor  # uint8
    vectors: Tensor
    coefficients: Tensor
    slots: Tensor

    @property
    def views(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.vectors, self.coefficients, self.slots

    @classmethod
    def of(
        cls,
        width: int,
        slots: int,
        directions: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str,
        pinned: bool,
    ) -> _Buffers:
        vectors = directions * width * dtype.itemsize
        first = -(-vectors // ALIGNED) * ALIGNED  # coefficients and headers are rows of 32 bytes, aligned by themselves
        second = first + rows * 32
        block = torch.zeros(second + slots * 32, dtype=torch.uint8, device=device, pin_memory=pinned)
        return cls(
            block,
            block[:vectors].view(dtype).view(directions, width),
            block[first:second].view(torch.float32).view(rows, 8),
            block[second:].view(torch.int32).view(slots, 8),
        )


def fitting(interventions: dict[int, Intervention], like: Bank, slots: int) -> Bank:
    """A bank of `slots` slots that holds exactly these interventions, with the width, dtype and device of another."""
    directions, numbers = needs(intervention.slot() for intervention in interventions.values())
    slots = max(slots, like.slots.shape[0])
    bank = Bank(like.width, slots, directions, like.vectors.dtype, like.vectors.device, numbers)
    for slot, intervention in interventions.items():
        bank.register(intervention, slot)
    return bank


@dataclass(slots=True)
class _Held:
    """What the host remembers of a registered slot."""

    view: Slot
    strength: float
    vector_rows: tuple[int, int]
    coefficient_rows: tuple[int, int]
    holders: int


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
            f"{what} where they are set aside: in prepare, or in Bank"
        )

    def take_at(self, start: int, length: int) -> None:
        """Take a run that is known to be free."""
        for i, (begin, room) in enumerate(self.free):
            if begin <= start and start + length <= begin + room:
                parts = [(begin, start - begin), (start + length, begin + room - start - length)]
                self.free[i : i + 1] = [part for part in parts if part[1]]
                return
        if length:
            raise RuntimeError(f"steerfast: {length} numbers from {start} on are not free")

    def give(self, start: int, length: int) -> None:
        """Hand a run back."""
        merged: list[tuple[int, int]] = []
        for begin, room in sorted([*self.free, (start, length)]):
            if merged and merged[-1][0] + merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            else:
                merged.append((begin, room))
        self.free = merged
