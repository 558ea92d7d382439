"""What probes find in an engine's steps: one table of scores per device, and the rows of it that requests have asked for.

The op of a place writes the columns of its probes for every token of the batch: on a CPU only where a request of the running
step reads, on a GPU, whose graph may be captured, always. A step's rows leave the device together, without a wait, and go to the
scheduler beside what was sampled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerfast.probes.probe import Probe

from .probes import GATE, Later, PlaceReader, ServedProbe, is_row, units

KEPT = 128
"""Up to so many tokens, those of decoding batches, the stream of a place may be kept until a step has run."""
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
        self._now: dict[Where, list[PlaceReader]] = dict(self._units) if self._always else {}
        self._later: dict[Where, int] = {}  # the number of each place in `_shelf`
        self._shelf: Later | None = None
        self._shelves: dict[tuple[Where, ...], Later] = {}
        self.at = frozenset(place for place, _ in self._now)
        """The places that are to be read in the running step."""
        self._readers: dict[str, Reader] = {}
        self._running: Step | None = None
        self._batch: tuple[list[str], frozenset[tuple[str, bool]]] | None = (
            None  # that stands in `_here`, and its gates
        )
        self._here: list[tuple[int, Reader]] = []

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
                self._now, self._later, self.at, self._batch = {}, {}, frozenset(), None
            return
        batch = list(requests), gated
        if batch != self._batch:  # otherwise it decodes, as in the step before
            self._batch = batch
            self._here = [(i, self._readers[name]) for i, name in enumerate(batch[0]) if name in self._readers]
            if not self._always:
                self._choose(gated)
        if self._later and tokens > KEPT:
            self._choose(gated, later=False)
            self._batch = None
        if self._here:
            self._running = Step(self._here, starts, positions, tokens, tokens == len(batch[0]))

    def _choose(self, gated: frozenset[Where], later: bool = True) -> None:
        """What is to be read where, for the requests of a step and for gates; `later`: when it has run, where that does."""
        columns = {column for _, reader in self._here for column in reader.columns}
        self._now, kept = {}, []
        for where in gated.union(*(reader.places for _, reader in self._here)):
            for unit in self._units[where]:
                watched = unit.watches and where in gated
                if not watched and not unit.columns & columns:
                    continue
                if later and unit.plain and not watched:
                    kept.append(where)
                else:
                    self._now.setdefault(where, []).append(unit)
        self.at = frozenset(place for place, _ in (*self._now, *kept))
        self._later = {where: i for i, where in enumerate(sorted(kept))}
        self._shelf = self._later_of(tuple(self._later)) if kept else None

    def _later_of(self, places: tuple[Where, ...]) -> Later:
        if places not in self._shelves:
            if len(self._shelves) >= MOST_SHELVES:
                self._shelves.clear()
            chosen = [{n: p for n, p in self._probes[where].items() if is_row(p) and n[0] != GATE} for where in places]
            self._shelves[places] = Later(chosen, self._served)
        return self._shelves[places]

    def write(self, x: Tensor, hidden: Tensor | None, place: str, after: bool) -> None:
        """What the probes of a place find in the stream x (n, d), or in hidden + x."""
        where = place, after
        if self._shelf is not None and where in self._later:
            self._shelf.keep(self._later[where], x, hidden)
        if where in self._now:
            stream = x.float() if hidden is None else x.float() + hidden
            for unit in self._now[where]:
                unit.write(stream, self.scores[: len(x)])

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


class Step(NamedTuple):
    """A running step: its requests that read, with their number in the batch, and where its tokens stand.

    Most steps decode: `single` says that every request has one token.
    """

    here: Sequence[tuple[int, Reader]]
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
        self._here, self._single = step.here, step.single
        parts = scores[: step.tokens], step.positions[: step.tokens], step.starts
        self._done: torch.cuda.Event | None = None
        if scores.device.type == "cuda":
            self._parts = tuple(_sent(part) for part in parts)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._parts = tuple(part.clone() for part in parts)

    def rows(self) -> list[Rows]:
        """What each request has read; waits until the device has sent it. A request that reads nothing here has no tokens."""
        if self._done is not None:
            self._done.synchronize()
        scores, positions, starts = (part.numpy() for part in self._parts)
        asked = {reader.columns for _, reader in self._here}
        picked = {columns: scores[:, columns] for columns in asked}  # many requests read the same
        if self._single:
            where = positions.tolist()
            return [
                (name, where[i], picked[columns][i : i + 1])
                if where[i] >= first
                else (name, where[i] + 1, picked[columns][:0])
                for i, (name, first, columns, _) in self._here
            ]
        bounds = starts[: self._here[-1][0] + 2].tolist()
        begin = positions[bounds[:-1]].tolist()
        found: list[Rows] = []
        for i, reader in self._here:
            first, stop = bounds[i], bounds[i + 1]
            skipped = min(max(reader.first - begin[i], 0), stop - first)
            found.append((reader.name, begin[i] + skipped, picked[reader.columns][first + skipped : stop]))
        return found


def _sent(part: Tensor) -> Tensor:
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return host.copy_(part, non_blocking=True)
