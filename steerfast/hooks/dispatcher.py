"""The one hook of a layer and site: it owns the bank of its place and applies the slots that own the tokens of a pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from steerfast import ops
from steerfast._checks import MAX_SLOTS_PER_ROW
from steerfast.bank import Bank, fitting
from steerfast.edits.base import Intervention, Program
from steerfast.models.layers import Point
from steerfast.ops import torch_backend
from steerfast.ops.backends import backend_of
from steerfast.ops.slots import ALL_MODES, Slot

from .gates import Place
from .passes import Passes
from .positions import Pass


class Dispatcher:
    """Applies the edits of one layer and site to the tokens that they own."""

    def __init__(self, passes: Passes, place: Place, point: Point, bank: Bank, fixed: bool) -> None:
        self.passes = passes
        self.place = place
        self.point = point
        self.bank = bank
        self.fixed = fixed
        self.edits: dict[int, Intervention] = {}
        self._seen: Pass | None = None
        self._programs: dict[int, Program] = {}  # of the edits that fit no slot
        self._direct: list[tuple[Slot | Program, float]] = []
        self._table: tuple[Tensor, Tensor] | None = None
        self.judges = False  # whether a condition is read here
        self.hook: RemovableHandle = point.attach(self, prepend=point.kind == "post")

    def put(self, edits: dict[int, Intervention], slots: int) -> None:
        """Register interventions under their slot numbers, all or none; the bank has room for `slots` numbers."""
        device = self.bank.vectors.device
        programs = {slot: run for slot, edit in edits.items() if (run := edit.program(device)) is not None}
        if self.fixed and programs:
            raise ValueError(f"steer: {edits[min(programs)]!r} fits no slot, so a prepared model cannot take it up")
        if self.fixed:
            done: list[int] = []
            try:
                for slot, edit in edits.items():
                    self.bank.register(edit, slot)
                    done.append(slot)
            except BaseException:
                for slot in done:
                    self.bank.release(slot)
                raise
        else:
            others = {**self._programs, **programs}
            slotted = {slot: edit for slot, edit in {**self.edits, **edits}.items() if slot not in others}
            self.bank = fitting(slotted, self.bank, slots)
        self._programs.update(programs)
        self.edits.update(edits)
        self.bank.commit()  # a compiled graph reads the buffers and asks nobody
        self._seen = None

    def take(self, slots: Sequence[int]) -> None:
        """Release the slots that are here."""
        for slot in slots:
            if self.edits.pop(slot, None) is not None and self._programs.pop(slot, None) is None:
                self.bank.release(slot)
        self.bank.commit()
        self._seen = None

    def __call__(self, x: Tensor) -> Tensor | None:
        """The steered stream, or None where nothing of it is."""
        now = self.passes.now
        if now is not self._seen:
            self._look(now, x)
        if self.judges and now.owners != ():
            self.passes.gates.judge(self.place, x)
        if self._table is not None:
            return self._by_table(x, *self._table)
        for edit, gain in self._direct:
            x = edit(x, gain) if callable(edit) else torch_backend.edit(x, edit, gain)
        return x if self._direct else None

    def _look(self, now: Pass, x: Tensor) -> None:
        """Decide once per pass, and once for all equal passes: nothing, a table, or the same slots for every token."""
        self._direct, self._table = [], None
        self._seen = None if self.fixed or torch.compiler.is_compiling() else now  # a compiled graph would guard on it
        if now.rows is not None and now.scale is not None:
            self._table = (now.rows, now.scale) if self.fixed or self.edits else None
            return
        here = [(slot, weight) for slot, weight in now.owners or () if slot in self.edits]
        if here and backend_of(x) == "torch":
            self._direct = [
                (self._programs[slot], weight)
                if slot in self._programs
                else (self.bank.view(slot), self.bank.strength(slot) * weight)
                for slot, weight in here
            ]
        elif here:
            self._table = self.passes.broadcast(now)

    def _by_table(self, x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        count = x.numel() // x.shape[-1]
        if self.passes.now.owners is not None:  # one row for every token
            rows, scale = rows.expand(count, -1), scale.expand(count, -1)
        if rows.shape[0] != count:
            raise RuntimeError(
                f"steer: {self.point.path} handles {count} tokens in a pass of {rows.shape[0]}; this layer "
                "reorders or splits its tokens, which per-token steering cannot follow"
            )
        rows, scale = rows.to(x.device), scale.to(x.device)
        if self.passes.gates:
            rows = self.passes.gates.close(rows, self.edits)
        if not self._programs:
            return self._by_slots(x, rows, scale)
        first = 0
        for column, slot in sorted(self.passes.columns(self._programs)):
            x = self._by_slots(x, rows[:, first:column], scale[:, first:column])
            x = self._programs[slot](x, torch.where(rows[:, column] == slot, scale[:, column], 0))
            first = column  # a slot for other rows may stand here; a program's own is empty
        return self._by_slots(x, rows[:, first:], scale[:, first:])

    def _by_slots(self, x: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
        modes = ALL_MODES if self.fixed else self.bank.modes
        if not modes:  # programs alone
            return x
        for first in range(0, rows.shape[1], MAX_SLOTS_PER_ROW):
            part = slice(first, first + MAX_SLOTS_PER_ROW)
            x = ops.subspace(x, *self.bank.tensors, rows[:, part], scale[:, part], modes, self.bank.max_rank)
        return x
