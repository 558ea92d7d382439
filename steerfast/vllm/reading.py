"""What probes find in an engine's steps: one table of scores per device, and the rows of it that requests have asked for.

The op of a place writes the columns of its probes for every token of the batch: on a CPU only where a request of the running
step reads, on a GPU, whose graph may be captured, always. A step's rows leave the device together, without a wait, and go to the
scheduler beside what was sampled.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerfast.probes.probe import Probe

from .probes import GATE, Later, PlaceReader, Room, ServedProbe, is_row, units

KEPT = 128
"""Up to so many tokens, those of decoding batches, the stream of a place may be kept until a step has run."""
MOST_KEPT = 1 << 24
"""Numbers of all places that are kept at most, of 12 bytes each in bfloat16."""
MOST_SHELVES = 32
Where = tuple[str, bool]
"""A place by name, and whether after the edits there."""


class Wanted(NamedTuple):
    """What one request reads: these probes, from a position on."""

    probes: tuple[ServedProbe, ...]
    first: int

    @property
    def columns(self) -> tuple[int, ...]:
        """Their columns of the table of scores, one probe after the other."""
        return tuple(probe.column + i for probe in self.probes for i in range(probe.columns))

    @property
    def places(self) -> frozenset[tuple[str, bool]]:
        """Where they are read, and whether after the edits there."""
        return frozenset((f"{one.place.site}.{one.place.layer}", one.after) for one in self.probes)


class Reader(NamedTuple):
    """A request that reads, as every step needs it."""

    name: str
    first: int
    columns: tuple[int, ...]
    places: frozenset[tuple[str, bool]]


Rows = tuple[str, int, np.ndarray]
"""A request, the position of its first token of a step that it reads, and the scores, float32 (tokens, columns)."""
Found = Iterable[Rows]
"""What a step has read: a list, or `Decoded`."""


class Readers:
    """All probes of a model on one device.

    Args:
        served: What requests may name.
        loaded: The probes themselves.
        tokens: How many tokens a batch can have, padding included.
        device: Where the model runs.
        here: The places that this stage of a pipeline has; None: there is one stage.
    """

    def __init__(
        self,
        served: Mapping[str, ServedProbe],
        loaded: Mapping[str, Probe],
        tokens: int,
        device: torch.device,
        here: Collection[tuple[str, int]] | None = None,
    ) -> None:
        self.scores = torch.zeros(tokens, sum(one.columns for one in served.values()), device=device)
        self._always = device.type != "cpu"
        self._served = served
        self._probes: dict[Where, dict[str, Probe]] = {}
        for name, one in served.items():
            if here is None or one.place in here:
                self._probes.setdefault((f"{one.place.site}.{one.place.layer}", one.after), {})[name] = loaded[name]
        self._units = {  # of each place, what is read together; on a GPU all of it, always
            where: [
                PlaceReader({name: probes[name] for name in names}, served, device)
                for names in ([[*probes]] if self._always else units(probes))
            ]
            for where, probes in self._probes.items()
        }
        widths = [unit.width for units_here in self._units.values() for unit in units_here if unit.plain]
        self._width = max(widths, key=widths.count, default=0)  # of what may be read together when a step has run
        self._now: dict[Where, list[PlaceReader]] = dict(self._units) if self._always else {}
        self._later: dict[Where, int] = {}  # the number of each place in `_shelf`
        self._shelf: Later | None = None
        self._shelves: dict[tuple[Where, ...], Later] = {}
        self._room, self._most = Room(), 0  # tokens of a step whose streams are kept at most
        self.kept: dict[str, Callable[[Tensor, Tensor | None], None]] = {}
        """Places of the running step where nothing is to be done but to keep the stream before the edits, and how."""
        self.where = frozenset(self._now)
        """What is to be read in the running step: a place, and whether after its edits."""
        self.at = frozenset(place for place, _ in self.where)
        """The places of these."""
        self._readers: dict[str, Reader] = {}
        self._running: Step | None = None
        self._batch: tuple[list[str], frozenset[tuple[str, bool]]] | None = (
            None  # that stands in `_here`, and its gates
        )
        self._here = Here([])

    def __len__(self) -> int:
        return len(self._readers)

    def start(self, request: str, wanted: Wanted) -> None:
        """A request that reads arrives."""
        self._readers[request] = Reader(request, wanted.first, wanted.columns, wanted.places & self._units.keys())
        self._batch = None

    def end(self, request: str) -> None:
        """A request has left; nothing happens if it did not read."""
        if self._readers.pop(request, None) is not None:
            self._batch = None

    def begin(
        self,
        requests: Iterable[str],
        starts: Tensor,
        positions: Tensor,
        tokens: int,
        gated: frozenset[tuple[str, bool]] = frozenset(),
    ) -> None:
        """A step begins; arguments as of `RowTable.fill`, and the places that the gates of its requests read."""
        self._running = None
        if not self._readers and not gated:
            if self.at and not self._always:
                self._now, self._later, self.kept, self._batch = {}, {}, {}, None
                self.where, self.at = frozenset(), frozenset()
            return
        batch = list(requests), gated
        if batch != self._batch:  # otherwise it decodes, as in the step before
            self._batch = batch
            self._here = Here([(i, self._readers[name]) for i, name in enumerate(batch[0]) if name in self._readers])
            if not self._always:
                self._choose(gated)
        if self._later and tokens > self._most:
            self._choose(gated, later=False)
            self._batch = None
        if self._here.readers:
            self._running = Step(self._here, starts, positions, tokens, tokens == len(batch[0]))

    def _choose(self, gated: frozenset[Where], later: bool = True) -> None:
        """What is to be read where, for the requests of a step and for gates; `later`: when it has run, where that does."""
        readers, columns = self._here.readers, self._here.columns
        self._now, kept = {}, []
        for where in gated.union(*(reader.places for reader in readers)):
            for unit in self._units[where]:
                watched = unit.watches and where in gated
                if not watched and unit.columns.isdisjoint(columns):
                    continue
                if later and unit.plain and unit.width == self._width and not watched:
                    kept.append(where)
                else:
                    self._now.setdefault(where, []).append(unit)
        self.where = frozenset((*self._now, *kept))
        self.at = frozenset(place for place, _ in self.where)
        self._later = {where: i for i, where in enumerate(sorted(kept))}
        shelf = self._shelf = self._later_of(tuple(self._later)) if kept else None
        self.kept = {}
        if shelf is not None:
            self._most = min(KEPT, MOST_KEPT // (len(kept) * self._width))
            busy = {place for place, _ in self._now} | {place for place, after in kept if after}
            self.kept = {at[0]: partial(shelf.keep, i) for at, i in self._later.items() if at[0] not in busy}

    def _later_of(self, places: tuple[Where, ...]) -> Later:
        if places not in self._shelves:
            if len(self._shelves) >= MOST_SHELVES:
                self._shelves.clear()
            chosen = [{n: p for n, p in self._probes[where].items() if is_row(p) and n[0] != GATE} for where in places]
            self._shelves[places] = Later(chosen, self._served, self._room)
        return self._shelves[places]

    def write(self, x: Tensor, hidden: Tensor | None, place: str, after: bool) -> None:
        """What the probes of a place find in the stream x (n, d), or in hidden + x."""
        where = place, after
        if self._shelf is not None and where in self._later:
            self._shelf.keep(self._later[where], x, hidden)
        if where in self._now:
            stream = x.float() if hidden is None else x.float() + hidden
            for unit in self._now[where]:
                unit.write(stream, self.scores[: x.shape[0]])

    def take(self) -> Taken | None:
        """What the requests of the step that has run have read; None: no request of it reads."""
        running, self._running = self._running, None
        if running is None:
            return None
        self._settle(running.tokens)
        return Taken(running, self.scores)

    def hand_on(self) -> Tensor | None:
        """The table after the step that has run, (tokens, columns), for a later stage, which answers."""
        running, self._running = self._running, None
        if running is None:
            return None
        self._settle(running.tokens)
        return self.scores[: running.tokens]

    def receive(self, scores: Tensor) -> None:
        """What earlier stages have read in a step, before it runs here."""
        self.scores[: len(scores)] = scores

    def _settle(self, tokens: int) -> None:
        if self._later and self._shelf is not None:
            self._shelf.write(self.scores[:tokens])


class Here:
    """The requests of a batch that read, as long as it is the same.

    Args:
        asked: They, each with its number in the batch.
    """

    def __init__(self, asked: Sequence[tuple[int, Reader]]) -> None:
        self.asked = asked
        self.readers = tuple(reader for _, reader in asked)
        self.columns = tuple(sorted({column for reader in self.readers for column in reader.columns}))
        """Of the table of scores: what any of them reads."""
        self._index = np.array([i for i, _ in asked], dtype=np.int64)
        self._grid = np.ix_(self._index, np.array(self.columns, dtype=np.int64))

    def decoded(self, scores: np.ndarray, positions: np.ndarray) -> Decoded:
        """What they have read in a step in which every request has one token."""
        return Decoded(self.readers, self.columns, positions[self._index], scores[self._grid])

    def rows(self, scores: np.ndarray, positions: np.ndarray, starts: np.ndarray) -> list[Rows]:
        """What each of them has read in another step. A request that reads nothing in it has no tokens."""
        bounds = starts[: self.asked[-1][0] + 2].tolist()
        picked = {columns: scores[: bounds[-1], columns] for columns in {one.columns for one in self.readers}}
        begin = positions[bounds[:-1]].tolist()
        found: list[Rows] = []
        for i, reader in self.asked:
            first, stop = bounds[i], bounds[i + 1]
            skipped = min(max(reader.first - begin[i], 0), stop - first)
            found.append((reader.name, begin[i] + skipped, picked[reader.columns][first + skipped : stop]))
        return found


class Decoded:
    """What requests have read in a step in which each has one token.

    Args:
        readers: These requests.
        columns: Of the table of scores, rising: all that any of them reads.
        positions: int64 (requests,).
        scores: float32 (requests, columns).
    """

    __slots__ = ("columns", "positions", "readers", "scores")

    def __init__(
        self, readers: tuple[Reader, ...], columns: tuple[int, ...], positions: np.ndarray, scores: np.ndarray
    ) -> None:
        self.readers, self.columns, self.positions, self.scores = readers, columns, positions, scores

    def __iter__(self) -> Iterator[Rows]:
        """As of `Here.rows`."""
        for reader, at, scores in zip(self.readers, self.positions.tolist(), self.scores, strict=True):
            skipped = int(at < reader.first)
            yield reader.name, at + skipped, scores[None, self.of(reader)][skipped:]

    def of(self, reader: Reader) -> np.ndarray:
        """Where among the columns those of one request stand."""
        return np.searchsorted(self.columns, reader.columns)


class Step(NamedTuple):
    """A running step: its requests that read, and where its tokens stand.

    Most steps decode: `single` says that every request has one token.
    """

    here: Here
    starts: Tensor
    positions: Tensor
    tokens: int
    single: bool


class Taken:
    """The scores of one step on their way to the host.

    Args:
        step: What has run.
        scores: The table that its probes have written, which the next step writes anew.
    """

    def __init__(self, step: Step, scores: Tensor) -> None:
        self._step = step
        self._done: torch.cuda.Event | None = None
        self._found: Found | None = None
        if not scores.is_cuda:
            self._found = self._sorted(scores, step.positions, step.starts)
            return
        self._parts = _sent(scores[: step.tokens]), _sent(step.positions[: step.tokens]), _sent(step.starts)
        self._done = torch.cuda.Event()
        self._done.record()

    def rows(self) -> Found:
        """What each request has read; waits until the device has sent it."""
        if self._found is None and self._done is not None:
            self._done.synchronize()
            self._found = self._sorted(*self._parts)
        return self._found or ()

    def _sorted(self, scores: Tensor, positions: Tensor, starts: Tensor) -> Found:
        here = self._step.here
        if self._step.single:
            return here.decoded(scores.numpy(), positions.numpy())
        return here.rows(scores.numpy(), positions.numpy(), starts.numpy())


def _sent(part: Tensor) -> Tensor:
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return host.copy_(part, non_blocking=True)
