"""The one hook of a layer and site: it owns the bank of its place and applies the slots that own the tokens of a pass."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerfast import ops
from steerfast._checks import MAX_SLOTS_PER_ROW
from steerfast.bank import Bank, fitting
from steerfast.edits.base import Intervention, Program, run_slot, untrained
from steerfast.models.points import Point
from steerfast.models.proof import shape_refusal
from steerfast.ops import compiled_cpu, torch_backend
from steerfast.ops.backends import backend_of
from steerfast.ops.slots import ALL_MODES
from steerfast.place import Place

from .bookkeeping import bookkeeping, is_mapped
from .call import Call
from .fixed import FixedProbe
from .frames import is_called
from .passes import Passes
from .positions import Pass
from .recomputing import Act, backward_pass, plainly_recorded, runs_hooks_again
from .records import Recorder

Tables = tuple[Tensor, Tensor]
"""(rows, scale) of the tokens of a pass."""

SPREADS = 32
"""Numbers of tokens whose tables a place keeps at hand: those of a batch that is decoded, and of its last prompts."""


class _Found(NamedTuple):
    """What a pass does here; replaced whole, so that two threads never see half of it."""

    now: Pass | None
    direct: list[tuple[Program, float]]  # called with a number: the slots' own strengths are in it
    table: Tables | None
    spread: dict[int, Tables]  # tokens -> a table of one row, seen as that of so many


_NOTHING = _Found(None, [], None, {})


class Dispatcher:
    """Applies the edits of one layer and site to the tokens that they own."""

    def __init__(self, passes: Passes, place: Place, point: Point, block: nn.Module, bank: Bank, fixed: bool) -> None:
        self.passes = passes
        self.place = place
        self.point = point
        self.block = block
        self.bank = bank
        self.fixed = fixed
        self.edits: dict[int, Intervention] = {}
        self._found = _NOTHING
        if fixed and (not place[0].startswith("resid") or runs_hooks_again(point.module)):
            passes.recomputing.prepared_inside = True
        self._programs: dict[int, Program] = {}  # of the edits that fit no slot
        self._recorders: set[int] = set()  # of these, the slots of recorders
        self.judges = False  # whether a condition is read here
        self.probes: list[FixedProbe] = []  # of a prepared model, those that are read here
        self.edited = True  # whether a prepared place has room for edits
        self.hook: RemovableHandle = self.attach()

    def put(self, edits: dict[int, Intervention], slots: int) -> None:
        """Register interventions under their slot numbers, all or none; the bank has room for `slots` numbers."""
        device = self.bank.vectors.device
        programs = {slot: run for slot, edit in edits.items() if (run := edit.program(device)) is not None}
        for edit in edits.values() if self.fixed else ():
            untrained("steer, a prepared model", edit)
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
            slotted = self._slotted({**self.edits, **edits}, {**self._programs, **programs})
            self.bank = fitting(slotted, self.bank, slots)
        self._programs.update(programs)
        self._recorders |= {slot for slot, edit in edits.items() if isinstance(edit, Recorder)}
        self.edits.update(edits)
        self.bank.commit()  # a compiled graph reads the buffers directly
        self._found = _NOTHING

    def take(self, slots: Sequence[int]) -> None:
        """Release the slots that are here."""
        gone = [slot for slot in slots if self.edits.pop(slot, None) is not None]
        held = [slot for slot in gone if self._programs.pop(slot, None) is None]
        self._recorders -= set(gone)
        if self.fixed:
            for slot in held:
                self.bank.release(slot)
        elif held:  # not in place: a backward pass may still need the old one
            self.bank = fitting(self._slotted(self.edits, self._programs), self.bank, 0)
        self.bank.commit()
        self._found = _NOTHING

    @property
    def storage(self) -> tuple[torch.dtype, torch.device]:
        """dtype and device of the bank."""
        return self.bank.vectors.dtype, self.bank.vectors.device

    def convert(self, dtype: torch.dtype, device: torch.device) -> None:
        """The weights of its block have another dtype now, or lie elsewhere: so does what it edits with, made anew.

        Raises:
            RuntimeError: it is a prepared model's, whose graph holds the buffers.
            ValueError: an edit overflows in this dtype.
        """
        if self.fixed:
            was = " on ".join(map(str, self.storage))
            raise RuntimeError(
                f"steer: the model was prepared in {was}, and {self.point.path} is {dtype} on {device} now; convert and move a "
                "model first, then call prepare (unprepare takes back the one before)"
            )
        programs = {slot: run for slot, edit in self.edits.items() if (run := edit.program(device)) is not None}
        like = Bank(self.point.width, self.bank.slots.shape[0], 0, dtype, device)
        self.bank, self._programs = fitting(self._slotted(self.edits, programs), like, 0), programs
        self._found = _NOTHING

    @staticmethod
    def _slotted(edits: dict[int, Intervention], programs: dict[int, Program]) -> dict[int, Intervention]:
        return {slot: edit for slot, edit in edits.items() if slot not in programs}

    def attach(self) -> RemovableHandle:
        """Hook the module of this place."""
        return self.point.attach(self, prepend=self.point.kind == "post")

    def __call__(self, x: Tensor) -> Tensor | None:
        """The steered stream, or None where no row is steered."""
        if self.fixed and torch.compiler.is_compiling():  # one graph for all threads: what it gathers from is shared
            now = self.passes.traced  # of the same graph; of an eager pass where only the blocks are compiled
            self._note(x, after=False)
            found, steered = self._look(now, x, None), x
            if found.table is not None:
                steered = self._by_table(x, *self._open(*_beside(x, found.table, now)), [], {}, self.bank)
            elif found.direct:
                steered = _directly(found.direct, x)
            self._note(steered, after=True)
            return None if steered is x else steered
        call = self.passes.threads.call
        thread = call.thread
        if thread.region is not None:
            return thread.region.edit(self, x)
        doubtful = backward_pass() != thread.task or (thread.tracked and not plainly_recorded())
        if doubtful and not self.passes.recomputing.runs_anew(self.point.path):
            return None
        if not call.running and self.passes.attachments:
            if is_called(self.passes.decoder):  # this pass began before the handle came
                return None
            raise RuntimeError(
                f"steer: {self.point.path} runs outside a pass of its decoder, so whose tokens these are cannot be said; call "
                "the model, or its decoder as a whole (the decoder itself: its forward alone runs no hook)"
            )
        found = self._found
        if (
            found.now is call.now and not self.judges and not self.probes
        ):  # what every pass but the first of its kind comes to
            call.ran.add(self)
        else:
            found = self._decide(x, call)
        if found.table is not None:
            rows, scale = self._tables(x, found, found.table, call)
            columns, margins = self._columns(call.now, rows), self.passes.margins(call.now)
            steered = self._by_table(x, rows, scale, columns, self._programs, self.bank, margins)
        else:
            steered = _directly(found.direct, x)
        if self.judges:
            self._judge(steered, call, after=True)
        self._note(steered, after=True)
        return None if steered is x else steered  # who only reads leaves the model's own tensor

    def act(self, x: Tensor) -> Act | None:
        """What this pass does here, for a backward pass to repeat whatever has changed by then; None: nothing."""
        call = self.passes.threads.call
        found = self._decide(x, call)
        if found.table is not None:
            rows, scale = self._tables(x, found, found.table, call)
            columns, programs, bank = self._columns(call.now, rows), dict(self._programs), self.bank
            margins = self.passes.margins(call.now)
            return lambda x: self._by_table(x, rows, scale, columns, programs, bank, margins)
        return partial(_directly, found.direct) if found.direct else None

    def rehearse(self, tokens: int) -> None:
        """Launch what a pass over so many tokens can launch here, on zeros that no slot owns; on PyTorch, only compile."""
        x = self.bank.vectors.new_zeros(tokens, self.point.width)
        if backend_of(x) == "torch":
            if x.is_cpu:
                compiled_cpu.kernels()
            return
        fixed = self.passes.fixed
        most = fixed.columns if fixed is not None else min(self.passes.width, MAX_SLOTS_PER_ROW)
        rows, scale = x.new_full((tokens, most), -1, dtype=torch.int32), x.new_ones(tokens, most, dtype=torch.float32)
        for columns in range(1, most + 1):  # those that no row of a pass names are cut off
            self._by_slots(x, rows[:, :columns], scale[:, :columns], self.bank)
        for slot, run in self._programs.items():
            if slot not in self._recorders:
                run(x, torch.zeros_like(scale[:, 0]))
        for when, place in self.passes.conditions.values():
            if place == self.place:
                when.condition.probe.program(x.device)(x)

    def _decide(self, x: Tensor, call: Call) -> _Found:
        call.ran.add(self)
        found = self._found
        if found.now is not call.now:
            found = self._found = self._look(call.now, x, call)
        if self.judges:
            self._judge(x, call, after=False)
        self._note(x, after=False)
        return found

    def _note(self, x: Tensor, after: bool) -> None:
        """The probes of a prepared model look at the stream."""
        fixed = self.passes.fixed
        if self.probes and fixed is not None and (fixed.text.window is not None or self.passes.attachments):
            fixed.text.note(self.probes, x, after)

    def _open(self, rows: Tensor, scale: Tensor) -> Tables:
        """The tables of a prepared model without what its gates have shut."""
        fixed = self.passes.fixed
        return (rows if fixed is None or not fixed.text.opens else fixed.text.close(rows)), scale

    def _judge(self, x: Tensor, call: Call, after: bool) -> None:
        if call.now.owners != () or call.gates.asks:
            call.gates.judge(self.place, x, call.scored, after)

    def _look(self, now: Pass, x: Tensor, call: Call | None) -> _Found:
        """Decide once per pass, and once for all equal passes: nothing, a table, or the same slots for every token."""
        if now.rows is not None and now.scale is not None:
            table = (now.rows, now.scale) if (self.fixed and self.edited) or self.edits else None
            found = _Found(now, [], table, {})
        else:
            here = [(slot, weight) for slot, weight in now.owners or () if slot in self.edits]
            if here and (backend_of(x) == "torch" or self._programs.keys() >= {slot for slot, _ in here}):
                found = _Found(now, self._effects(here, x.dtype), None, {})
            else:
                found = _Found(now, [], self.passes.broadcast(now) if here else None, {})
        if call is not None and (found.table is not None or found.direct or self.judges):
            self._check_shape(x, *call.shape)
        return found

    def _effects(self, owners: Sequence[tuple[int, float]], dtype: torch.dtype) -> list[tuple[Program, float]]:
        """What some slots do to a row, one after the other; neighbours in 16 bits round once, as they do by a table."""
        found = [(slot in self._programs, self._effect(slot, weight)) for slot, weight in owners]
        if dtype.itemsize > 2 or len(found) < 2:
            return [effect for _, effect in found]
        effects: list[tuple[Program, float]] = []
        for alone, group in groupby(found, key=itemgetter(0)):
            several = [effect for _, effect in group]
            parts = [several[part] for part in _parts(len(several))]
            effects += several if alone else [(partial(_widely, part), 1.0) for part in parts]
        return effects

    def _effect(self, slot: int, weight: float) -> tuple[Program, float]:
        """What a slot does to a row, and how strongly."""
        if slot in self._programs:
            return self._programs[slot], weight
        return partial(torch_backend.edit, self.bank.view(slot)), self.bank.strength(slot) * weight

    def _check_shape(self, x: Tensor, rows: int, tokens: int) -> None:
        """Refuse a stream that is not (rows, tokens, width), before anything of it is edited."""
        if x.dim() == 2 and x.shape[0] == rows * tokens:  # OPT's MLP sees the tokens of all rows as one list
            return
        wrong = shape_refusal(tuple(x.shape), rows, tokens, self.point.width)
        if wrong and x.dim() == 3 and x.shape[0] == rows and x.shape[-1] == self.point.width:
            wrong += "; this layer reorders or splits its tokens, which per-token steering cannot follow"
        if wrong:
            raise RuntimeError(f"steer: {self.point.path} {wrong}")

    def _tables(self, x: Tensor, found: _Found, table: Tables, call: Call) -> Tables:
        """The tables of this pass beside x, without what a condition has shut."""
        rows, scale = _beside(x, table, call.now) if call.now.owners is None else _spread(x, found.spread, table)
        if self.fixed:
            return self._open(rows, scale)
        return (call.gates.close(rows, self.edits) if call.gates else rows), scale

    def _columns(self, now: Pass, rows: Tensor) -> list[tuple[int, int]]:
        """(column, slot) of the programs here; of all edits where torch.vmap maps over the rows."""
        wanted = self.edits if is_mapped(rows) else self._programs
        return sorted(self.passes.columns(now, wanted)) if wanted else []

    def _by_table(
        self,
        x: Tensor,
        rows: Tensor,
        scale: Tensor,
        columns: list[tuple[int, int]],
        programs: dict[int, Program],
        bank: Bank,
        margins: tuple[int, int] = (0, 0),
    ) -> Tensor:
        if columns and is_mapped(rows):
            return self._by_masks(x, rows, scale, columns, programs, bank)
        first, end = margins[0], rows.shape[1] - margins[1]
        for column, slot in columns:
            if first < (upto := min(column, end)):
                x = self._by_slots(x, rows[:, first:upto], scale[:, first:upto], bank)
            x = programs[slot](x, torch.where(rows[:, column] == slot, scale[:, column], 0))
            # a slot for other rows may stand beside a program's, which is empty
            first = max(first, min(column, end))
        whole = first == 0 and end == rows.shape[1]
        if whole:
            return self._by_slots(x, rows, scale, bank)
        return x if first >= end else self._by_slots(x, rows[:, first:end], scale[:, first:end], bank)

    def _by_masks(
        self,
        x: Tensor,
        rows: Tensor,
        scale: Tensor,
        columns: list[tuple[int, int]],
        programs: dict[int, Program],
        bank: Bank,
    ) -> Tensor:
        """Where torch.vmap maps over what a condition decided, no host can read the table: each slot on every token."""
        for column, slot in columns:
            run = programs.get(slot) or partial(run_slot, bank.view(slot), bank.strength(slot))
            x = run(x, torch.where(rows[:, column] == slot, scale[:, column], 0))
        return x

    def _by_slots(self, x: Tensor, rows: Tensor, scale: Tensor, bank: Bank) -> Tensor:
        modes = ALL_MODES if self.fixed else bank.modes
        if not modes:  # programs alone
            return x
        if torch.compiler.is_compiling() and self._is_last_sum(x):
            x = x.clone(memory_format=torch.contiguous_format)
            for part in _parts(rows.shape[1]):
                ops.subspace_(x, *bank.tensors, rows[:, part], scale[:, part], modes, bank.max_rank)
            return x
        if 0 < rows.shape[1] <= MAX_SLOTS_PER_ROW:
            return ops.subspace(x, *bank.tensors, rows, scale, modes, bank.max_rank)
        for part in _parts(rows.shape[1]):
            x = ops.subspace(x, *bank.tensors, rows[:, part], scale[:, part], modes, bank.max_rank)
        return x

    def _is_last_sum(self, x: Tensor) -> bool:
        """Whether x is a block's last sum in a graph for kernels: a copy of it costs nothing, and is written into.

        The compiler writes the sum into the copy at once, so that rows without an edit are not moved a second time. Of a
        matrix product (the other sites) it would make a copy, and PyTorch's in-place twin moves every row.
        """
        return self.place[0] == "resid_post" and x.is_cuda and not torch.is_grad_enabled()


def _parts(columns: int) -> list[slice]:
    """Columns of a table in calls that take so many."""
    return [slice(first, first + MAX_SLOTS_PER_ROW) for first in range(0, columns, MAX_SLOTS_PER_ROW)]


def _spread(x: Tensor, known: dict[int, Tables], table: Tables) -> Tables:
    """A table of one row as that of the tokens of x, beside it, and kept at hand."""
    count = x.numel() // x.shape[-1]
    tables = known.get(count)
    if tables is None or tables[0].device != x.device:
        if len(known) >= SPREADS:
            known.clear()
        tables = known[count] = _repeated(table, count, x.device)
    return tables


@bookkeeping
def _repeated(table: Tables, count: int, device: torch.device) -> Tables:
    rows, scale = (part.expand(count, -1).to(device) for part in table)
    return rows, scale


def _beside(x: Tensor, table: Tables, now: Pass) -> Tables:
    """The tables of a pass on the device of x, a row for each of its tokens."""
    count, (rows, scale) = x.numel() // x.shape[-1], table
    if now.owners is not None:  # one row for every token
        rows, scale = rows.expand(count, -1), scale.expand(count, -1)
    return rows.to(x.device), scale.to(x.device)


def _widely(edits: list[tuple[Program, float]], x: Tensor, scale: Tensor | float) -> Tensor:
    """Edits of a stream in 16 bits, rounded once behind the last; `scale` is in theirs."""
    return _directly(edits, x.float()).to(x.dtype)


def _directly(edits: list[tuple[Program, float]], x: Tensor) -> Tensor:
    for run, gain in edits:
        x = run(x, gain)
    return x
