"""What happens at one place of the model in one step: what is read there, and the edits that the row table names.

One opaque op per place, `steerfast::engine_edit_`, knows its place by a name, finds the rest in the engine's forward
context, and so survives torch.compile and CUDA graphs: everything that changes between steps is in buffers. On a GPU it
is one kernel. On a CPU the owners are sorted, and what is added to each token is gathered, only when the table has
changed: while a batch decodes, additions of any number of different vectors and strengths are one sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerfast import ops
from steerfast._checks import MAX_SLOTS_PER_ROW
from steerfast.bank import Bank
from steerfast.edits.base import Intervention
from steerfast.ops import compiled_cpu, torch_backend
from steerfast.ops.backends import backend_of
from steerfast.ops.slots import ADD, needs
from steerfast.probes.encoder import Encodes

from .capturing import Captures
from .gating import Gates
from .programs import Group, Programs, StreamRows, fits_no_slot
from .reading import Readers
from .table import RowTable

CONTEXT = "steerfast"
"""The name under which the engine's forward context holds the `Places` of its model."""

KEPT = 512
"""Up to so many tokens, those of decoding batches, what is added to each is kept from step to step; n · d floats a place."""

# what a slot is at a place: empty, an addition, another of the bank, none of it
_NONE, _SUM, _OTHER, _PROGRAM = range(4)


class Owned(NamedTuple):
    """The tokens of one column of the row table that have an owner at a place; None stands for all tokens."""

    summed: tuple[Tensor | None, Tensor] | None  # tokens, and what is added to each (m, d)
    others: list[tuple[int, Tensor | None, Tensor]]  # slot, tokens, weights (m, 1)
    programs: list[tuple[Group, Tensor | None, Any]]  # what acts, tokens, and what it needs to know of these


class EditedPlace:
    """One layer and site: its bank, sized for the plans that may be loaded into it.

    Args:
        edits: Every intervention that may stand here.
        slots: How many may stand here at once.
        width: d.
        dtype: Of the stream.
        device: Of the stream.
    """

    def __init__(
        self, edits: Sequence[Intervention], slots: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        alone = [edit for edit in edits if fits_no_slot(edit, device)]
        self.programs = Programs(alone, slots, dtype, device) if alone else None
        apart = {id(edit) for edit in alone}
        specs = [edit.slot() for edit in edits if id(edit) not in apart]
        self.modes = self.rank = 0  # what may ever occur: a captured graph cannot be told later
        for spec in specs:
            self.modes |= spec.modes
            self.rank = max(self.rank, spec.rank)
        directions, numbers = needs(specs, slots)
        self.bank = Bank(width, slots, directions, dtype, device, numbers)
        if device.type == "cpu":
            compiled_cpu.kernels()  # now, and not at the first request
        self._loaded: dict[int, Intervention] = {}
        self._kind = np.zeros(slots + 1, dtype=np.int8)  # the last entry stands for -1, no slot
        self._row = np.zeros(slots + 1, dtype=np.int64)
        self._strength = np.zeros(slots + 1, dtype=np.float32)
        self._owned: list[Owned] = []
        self._step = -1  # of the table that `_owned` belongs to
        self._rows: np.ndarray | None = None  # and what is left of its rows, where gates take some out

    def load(self, slot: int, edit: Intervention) -> None:
        """Put an intervention into a free slot. What is loaded moves together where free rows lie scattered."""
        self._step = -1
        if self.programs is not None and fits_no_slot(edit, self.bank.vectors.device):
            self.programs.load(slot, edit)
            self._kind[slot], self._strength[slot] = _PROGRAM, 1.0
            return
        try:
            self.bank.register(edit, slot)
        except RuntimeError:
            for other in self._loaded:
                self.bank.release(other)
            for other, loaded in (self._loaded | {slot: edit}).items():
                self.bank.register(loaded, other)
        self._loaded[slot] = edit
        for held in self._loaded:
            view = self.bank.view(held)
            plain = view.modes == ADD
            self._kind[held] = _SUM if plain else _OTHER
            self._row[held] = view.lift.storage_offset() // view.lift.shape[1]
            self._strength[held] = self.bank.strength(held)

    def seal(self) -> None:
        """Nothing will come or go any more: the plans' own copies are let go, the bank has what it needs."""
        self._loaded.clear()

    def unload(self, slot: int) -> None:
        """Empty a slot; nothing happens if nothing stands there."""
        if self._loaded.pop(slot, None) is not None:
            self.bank.release(slot)
        elif self.programs is None or not self.programs.unload(slot):
            return
        self._kind[slot] = _NONE
        self._step = -1

    def acts(self, slots: np.ndarray) -> bool:
        """Whether one of these slots has an edit here."""
        return bool(self._kind[slots].any())

    def owned(self, table: RowTable, rows: Tensor | None = None) -> list[Owned]:
        """The owners of a batch at this place, column by column of its table, or of these rows in their stead."""
        left = None if rows is None else rows.numpy()
        if self._step == table.step and _equal(left, self._rows):
            return self._owned
        whole = table.rows[: table.tokens].numpy() if left is None else left
        found = self._sort(whole, table.scale[: table.tokens].numpy())
        self._owned, self._step, self._rows = (found, table.step, left) if table.tokens <= KEPT else ([], -1, None)
        return found

    def _sort(self, rows: np.ndarray, scale: np.ndarray) -> list[Owned]:
        found = []
        kinds = self._kind[rows]
        for column in range(rows.shape[1]):
            kind = kinds[:, column]
            if not kind.any():
                continue
            slots, weights = rows[:, column], scale[:, column] * self._strength[rows[:, column]]
            summed, others = None, []
            if (kind == _SUM).any():
                tokens = (kind == _SUM).nonzero()[0]
                vectors = self.bank.vectors.index_select(0, torch.from_numpy(self._row[slots[tokens]]))
                summed = _tokens(tokens, len(rows)), vectors.float().mul_(torch.from_numpy(weights[tokens, None]))
            for slot in np.unique(slots[kind == _OTHER]):
                tokens = (slots == slot).nonzero()[0]
                others.append((int(slot), _tokens(tokens, len(rows)), torch.from_numpy(weights[tokens, None])))
            programs: list[tuple[Group, Tensor | None, Any]] = []
            if self.programs is not None and (kind == _PROGRAM).any():
                tokens = ((kind == _PROGRAM) & (weights != 0)).nonzero()[0]
                each = self.programs.wanted(slots[tokens], weights[tokens])
                programs = [(group, _tokens(tokens[its], len(rows)), wanted) for group, its, wanted in each]
            found.append(Owned(summed, others, programs))
        return found


class Places:
    """All places of a model, the row table that they share, what reads there, and what that holds back."""

    def __init__(
        self,
        places: dict[str, EditedPlace],
        table: RowTable,
        readers: Readers | None = None,
        gates: Gates | None = None,
    ) -> None:
        self.places = places
        self.table = table
        self.readers = Readers({}, {}, 0, table.rows.device) if readers is None else readers
        self.gates = gates
        self.captures: Captures | None = None
        self._on_host = table.rows.device.type == "cpu"
        self._step = -1  # of the table that `_acting` belongs to
        self._acting = frozenset(places)

    def forget(self) -> None:
        """Edits have come or gone."""
        self._step = -1

    def edit_(self, stream: Tensor, hidden: Tensor | None, place: str) -> None:
        """Read and edit stream (..., d) in place; with hidden the stream is hidden + stream, and only `stream` is written."""
        # Between two layers nothing of ours is in a cache: on a CPU every word here costs a microsecond in a step.
        readers, captures = self.readers, self.captures
        captured, reads = captures is not None and captures.active, place in readers.at
        if self._on_host and self.table.step != self._step:
            self._choose()
        edited = place in self._acting
        if not captured and (not reads or (place in readers.kept and stream.dim() == 2)):
            if reads:
                readers.kept[place](stream, hidden)
            if edited:
                self._edit_(stream, hidden, place, None)
            return
        rows, other = _flat(stream), None if hidden is None else _flat(hidden)
        for after in (False, True):
            if after and not captured and (place, after) not in readers.where:
                break
            with Encodes() as read:
                readers.write(rows, other, place, after)
            if reads and self.gates is not None and self.gates.active:
                self.gates.judge(readers.scores[: rows.shape[0]], place, after)
            if captured and captures is not None:
                captures.write(rows, other, place, after)
            if edited and not after:
                self._edit_(stream, hidden, place, read)

    def _choose(self) -> None:
        """On a CPU only places are edited where a row of the table has an edit; a kernel finds that itself."""
        slots = np.unique(self.table.rows[: self.table.tokens].numpy())
        self._acting = frozenset(name for name, place in self.places.items() if place.acts(slots))
        self._step = self.table.step

    def _edit_(self, stream: Tensor, hidden: Tensor | None, place: str, read: Encodes | None) -> None:
        stream, hidden = _flat(stream), None if hidden is None else _flat(hidden)
        table, count = self.table, stream.shape[0]
        if count > table.rows.shape[0]:
            raise RuntimeError(f"steerfast: {place} handles {count} tokens; the engine announced {table.rows.shape[0]}")
        here = self.places[place]
        if self._on_host and backend_of(stream) == "torch":
            self._edit_on_host(stream, hidden, place, read)
            return
        rows, scale = table.rows[:count], table.scale[:count]
        if self.gates is not None:
            rows = self.gates.close(rows, place)
        if here.programs is None:
            for first in range(0, rows.shape[1], MAX_SLOTS_PER_ROW):
                part = slice(first, first + MAX_SLOTS_PER_ROW)
                _by_slots(stream, hidden, here, rows[:, part], scale[:, part])
            return
        for column in range(rows.shape[1]):
            part = slice(column, column + 1)
            _by_slots(stream, hidden, here, rows[:, part], scale[:, part])
            _by_programs(stream, hidden, here.programs, rows[:, column], scale[:, column], None if column else read)

    def _columns(self, name: str, place: EditedPlace) -> list[Owned]:
        """Who acts at a place: what the table says, without those whose gate is shut."""
        if self.gates is None or not self.gates.active:
            return place.owned(self.table)
        rows = self.table.rows[: self.table.tokens]
        open_rows = self.gates.close(rows, name)
        return place.owned(self.table, None if open_rows is rows else open_rows)

    def _edit_on_host(self, stream: Tensor, hidden: Tensor | None, name: str, read: Encodes | None) -> None:
        place = self.places[name]
        count = self.table.tokens
        columns = self._columns(name, place)
        if not columns:
            return
        if count < len(stream):
            stream, hidden = stream[:count], None if hidden is None else hidden[:count]
            read = None if read is None else read.among(slice(count))
        summed, others, programs = columns[0]
        if len(columns) == 1 and summed is not None and not (others or programs):
            _add_(stream, *summed)
        elif len(columns) == 1 and summed is None and not others and len(programs) == 1:
            ((group, tokens, wanted),) = programs
            known = read if read is None or tokens is None else read.among(tokens)
            _add_(stream, tokens, group.added(StreamRows(stream, hidden, tokens), wanted, known))
        else:
            _edit_columns_(stream, hidden, place, columns, read)


def _edit_columns_(
    stream: Tensor, hidden: Tensor | None, place: EditedPlace, columns: list[Owned], read: Encodes | None
) -> None:
    """On a CPU, edits of several kinds, or one after the other: in float32, rounded once."""
    wide = stream.float()
    owned = torch.zeros(len(stream), dtype=torch.bool)
    for summed, others, programs in columns:
        if summed is not None:
            tokens, delta = summed
            _add_(wide, tokens, delta)
            owned[_all(tokens)] = True
        for slot, tokens, weights in others:
            x = StreamRows(wide, hidden, tokens)()
            edited = torch_backend.edit(place.bank.view(slot), x, weights)
            if hidden is None:
                wide[_all(tokens)] = edited
            else:
                _add_(wide, tokens, edited - x)
            owned[_all(tokens)] = True
        for group, tokens, wanted in programs:
            fresh = read and not bool(owned[_all(tokens)].any())
            known = (read if tokens is None else read.among(tokens)) if read and fresh else None
            _add_(wide, tokens, group.added(StreamRows(wide, hidden, tokens), wanted, known))
            owned[_all(tokens)] = True
    if bool(owned.all()):
        stream.copy_(wide)
    else:
        stream[owned] = wide[owned].to(stream.dtype)


def _add_(stream: Tensor, tokens: Tensor | None, delta: Tensor) -> None:
    """Add to some rows of a stream, summed in float32 and rounded once; None: to all of them."""
    if tokens is None:
        stream.add_(delta)
    else:
        stream.index_copy_(0, tokens, stream.index_select(0, tokens).float().add_(delta).to(stream.dtype))


def _by_slots(stream: Tensor, hidden: Tensor | None, here: EditedPlace, rows: Tensor, scale: Tensor) -> None:
    """Edit the stream by the slots of a place's bank, which was committed before the step."""
    if not here.modes:
        return
    bank = here.bank.vectors, here.bank.coefficients, here.bank.slots
    if hidden is None:
        ops.subspace_(stream, *bank, rows, scale, here.modes, here.rank)
    else:
        ops.subspace_split_(hidden, stream, *bank, rows, scale, (here.modes, here.rank))


def _by_programs(
    stream: Tensor, hidden: Tensor | None, programs: Programs, slots: Tensor, scale: Tensor, read: Encodes | None
) -> None:
    """Edit the stream by what fits no slot of its bank, one column of the row table."""
    x = stream if hidden is None else stream.float() + hidden.float()
    moved = programs.edit(x, slots, torch.where(slots >= 0, scale, 0), read)
    if hidden is None:
        stream.copy_(moved)
    else:
        delta = moved - x
        stream.copy_(torch.where(delta == 0, stream, (stream.float() + delta).to(stream.dtype)))


def _tokens(tokens: np.ndarray, count: int) -> Tensor | None:
    return None if len(tokens) == count else torch.from_numpy(tokens)


def _flat(stream: Tensor) -> Tensor:
    """(n, d) of what vLLM's backend for models of transformers has as (1, n, d)."""
    return stream if stream.dim() == 2 else stream.view(-1, stream.shape[-1])


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


def _all(tokens: Tensor | None) -> Any:
    return slice(None) if tokens is None else tokens


def _engine_edit_(stream: Tensor, hidden: Tensor | None, place: str) -> None:
    _context()[CONTEXT].edit_(stream, hidden, place)


def _no_engine() -> dict[str, Any]:
    raise RuntimeError("steerfast::engine_edit_ runs inside an engine's forward pass only")


_context: Callable[[], dict[str, Any]] = _no_engine


def find_places_with(context: Callable[[], dict[str, Any]]) -> None:
    """Tell the op how to reach the dict in which the running engine keeps its `Places` under CONTEXT."""
    global _context
    _context = context


class Direct(torch._ops.OpOverload):
    """The op as hooks and compiled code call it: its function, unless what it is called with is being traced.

    PyTorch's dispatch of an op that Python implements takes 6 µs between two layers, several times what the function takes that
    finds nothing to do; and no key but the device's has a kernel here. Whether something traces is asked by a private name of
    PyTorch: a release without it dispatches.
    """

    def __call__(self, stream: Tensor, hidden: Tensor | None, place: str) -> None:
        """Read and edit the stream at a place."""
        if type(stream) is Tensor and _modes is not None and not _modes():
            _context()[CONTEXT].edit_(stream, hidden, place)
        else:
            super().__call__(stream, hidden, place)


_modes: Callable[[], int] | None = getattr(torch._C, "_len_torch_dispatch_stack", None)
_library = torch.library.Library("steerfast", "FRAGMENT")
_library.define("engine_edit_(Tensor(a!) stream, Tensor? hidden, str place) -> ()")
for _key in ("CPU", "CUDA"):
    _library.impl("engine_edit_", _engine_edit_, _key)
torch.library.register_fake("steerfast::engine_edit_", lambda *_: None, lib=_library)
if _modes is not None:
    torch.ops.steerfast.engine_edit_.default.__class__ = Direct
