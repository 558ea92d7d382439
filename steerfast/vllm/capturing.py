"""Rows of the stream on their way out of an engine's steps: a ring per device, which a graph writes and a thread empties.

Which token of the running batch is written where stands in a buffer that never moves, one line per point, written before the
step: a graph that was captured once follows whatever it holds. What nobody asks for goes into a few spare rows behind the ring. A
step reserves its part of the ring before it runs; where that has no room, the step's rows are given up, counted, and nobody
waits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .pieces import Piece
from .table import Owner, RowTable

_SPARE = 64
"""Rows behind the ring that take what nobody asks for: more than one, so that a device does not write one address n times."""


class Ring:
    """Room for rows that are written in one order and given back in the same one.

    Args:
        rows: How many.
        width: d.
        dtype: Of the stream.
        device: Of the stream.
    """

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self.buffer = torch.zeros(rows + _SPARE, width, dtype=dtype, device=device)
        self._written = self._given_back = 0
        self._changing = threading.Lock()

    def reserve(self, count: int) -> int | None:
        """The first of `count` rows, counted from the ring's beginning without end; None: they have no room."""
        with self._changing:
            if self._written - self._given_back + count > self.rows:
                return None
            self._written += count
            return self._written - count

    def give_back(self, count: int) -> None:
        """The oldest rows that are reserved are free again."""
        with self._changing:
            self._given_back += count

    def take(self, first: int, count: int) -> Tensor:
        """A copy of reserved rows on the host."""
        at, stop = first % self.rows, first % self.rows + count
        parts = [self.buffer[at : min(stop, self.rows)], self.buffer[: max(stop - self.rows, 0)]]
        whole = torch.cat([part for part in parts if len(part)] or [self.buffer[:0]])
        return whole.cpu()


class Step(NamedTuple):
    """A step whose rows wait in the ring.

    Attributes:
        names: The requests of the batch, in order; "" for one that captures nothing.
        lost: Requests whose rows had no room, and how many these may be.
        wants: bool (lines, points), on the host: where the tokens of a request are captured; the last line is nobody's.
        parts: On the device: the line of each token's request, or -1, its position, its id, and the first token of each request.
        first: Of the reserved rows, and
        reserved: their number.
        done: Recorded behind the step; None on a CPU.
    """

    names: Sequence[str]
    lost: Mapping[str, int]
    wants: np.ndarray
    parts: tuple[Tensor, Tensor, Tensor, Tensor]
    first: int
    reserved: int
    done: Any


class Captures:
    """What a model's requests capture on one device.

    Args:
        points: Everything that may be captured: (place as its hook is called, behind the edits there).
        ring: Where the rows go.
        tokens: How many tokens a batch can have, padding included.
    """

    def __init__(self, points: Sequence[tuple[str, bool]], ring: Ring, tokens: int) -> None:
        device = ring.buffer.device
        self._points = {point: number for number, point in enumerate(points)}
        self._ring = ring
        self._on_host = device.type == "cpu"
        self._table = RowTable(tokens, device, (0, 0))
        self._spare = ring.rows + torch.arange(tokens, device=device) % _SPARE
        self._into = self._spare.repeat(len(points), 1)  # a graph reads it
        self._picked: dict[int, tuple[Tensor, Tensor]] = {}  # on the host: point -> tokens, and where they go
        self._lines: dict[str, int] = {}
        self._free: list[int] = []
        self._wants = np.zeros((1, len(points)), dtype=bool)  # a line per request, and a last one for nobody
        self._wants_there = torch.zeros(1, len(points), dtype=torch.bool, device=device)
        self._asked: dict[str, tuple[tuple[Piece, ...], int]] = {}  # a request's positions and its number of points
        self._running: Step | None = None
        self._reached = 0  # tokens of `_into` that may go somewhere
        self.active = not self._on_host
        """Whether some place is to be looked at in the running step; on a GPU, whose graph may be captured, always."""

    def __len__(self) -> int:
        return len(self._asked)

    def __contains__(self, request: str) -> bool:
        return request in self._asked

    def start(self, request: str, places: Iterable[tuple[str, bool]], where: tuple[Piece, ...]) -> None:
        """A request arrives that captures these places at these positions."""
        numbers = sorted({self._points[place] for place in places})
        wants = self._wants.copy()  # steps under way keep theirs
        if not self._free:
            self._free = list(range(2 * len(wants) - 1, len(wants) - 2, -1))
            wants = np.concatenate([wants, np.zeros((len(wants) + 1, wants.shape[1]), dtype=bool)])
        line = self._lines[request] = self._free.pop()
        wants[line] = False
        wants[line, numbers] = True
        there = torch.from_numpy(wants)
        device = self._wants_there.device
        self._wants_there = there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there
        self._wants = wants
        self._table.put(request, [Owner(line, 1.0, *piece) for piece in where])
        self._asked[request] = where, len(numbers)

    def end(self, request: str) -> None:
        """A request has left; nothing happens if it captured nothing."""
        if self._asked.pop(request, None) is not None:
            self._free.append(self._lines.pop(request))
            self._table.drop(request)

    def begin(
        self,
        requests: Iterable[str],
        batch: tuple[Tensor, Tensor, int, Tensor],
        scheduled: Mapping[str, tuple[int, int]],
        late: bool = False,
    ) -> None:
        """Before a batch runs: reserve room and write down which token goes where.

        Args:
            requests: Its requests, in order.
            batch: Where each begins, the positions, how many tokens there are, and their ids, as `RowTable.fill` takes them.
            scheduled: Of requests that capture: first position and number of tokens of this step, as the scheduler has them.
            late: Nobody could collect its rows in time.
        """
        starts, positions, tokens, ids = batch
        self._running = None
        names = [name if name in self._asked else "" for name in requests] if self._asked else []
        if not any(names):
            self._rest()
            return
        bounds = {name: self._bound(name, *scheduled.get(name, (0, 0))) for name in names if name}
        count = sum(bounds.values())
        first = None if late else self._ring.reserve(count)
        self._table.fill(names, starts, positions, tokens, ids)
        line = self._table.rows[:tokens].amax(1)
        lost = {name: bound for name, bound in bounds.items() if bound and first is None}
        if first is None:
            line, first, count = torch.full_like(line, -1), 0, 0
        self._send(line, tokens, first, count)
        parts = line, positions[:tokens].clone(), ids[:tokens].clone(), starts[: len(names) + 1].clone()
        self._running = Step(names, lost, self._wants, parts, first, count, None)

    def write(self, x: Tensor, hidden: Tensor | None, place: str, after: bool) -> None:
        """Take what is asked for of the stream x (n, d), or of hidden + x."""
        point = self._points.get((place, after))
        if point is None:
            return
        if self._on_host:
            if point in self._picked:
                tokens, into = self._picked[point]
                rows = x.index_select(0, tokens)
                rows = rows if hidden is None else rows + hidden.index_select(0, tokens)
                self._ring.buffer.index_copy_(0, into, rows.to(self._ring.buffer.dtype))
            return
        stream = x if hidden is None else hidden + x
        self._ring.buffer.index_copy_(0, self._into[point, : len(x)], stream.to(self._ring.buffer.dtype))

    def take(self) -> Step | None:
        """The step that has run, to be collected; None: no request of it captures."""
        running, self._running = self._running, None
        if running is None or self._ring.buffer.device.type == "cpu":
            return running
        done = torch.cuda.Event()
        done.record()
        return running._replace(done=done)

    def _bound(self, name: str, first: int, count: int) -> int:
        """How many rows a request may take of its tokens [first, first + count)."""
        where, points = self._asked[name]
        return points * sum(max(min(p.stop, first + count) - max(p.first, first), 0) for p in where)

    def _rest(self) -> None:
        if self._on_host:
            self.active, self._picked = False, {}
        elif self._reached:
            self._into[:, : self._reached] = self._spare[: self._reached]
        self._reached = 0

    def _send(self, line: Tensor, tokens: int, first: int, count: int) -> None:
        """Write down where the rows go: those of one point behind those of another, each in the order of the batch."""
        asked = self._wants_there[line.long()].T  # (points, tokens); -1, the last line, is nobody's
        if self._on_host:
            self._picked, at = {}, first
            for point in asked.any(1).nonzero().flatten().tolist():
                here = asked[point].nonzero().flatten()[: max(first + count - at, 0)]
                self._picked[point] = here, (at + torch.arange(len(here))) % self._ring.rows
                at += len(here)
            self.active = bool(self._picked)
            return
        flat = asked.reshape(-1)
        order = flat.cumsum(0)
        # More than the scheduler announced is never written over what another step has reserved.
        goes = (flat & (order <= count)).view_as(asked)
        into = (first - 1 + order).remainder(self._ring.rows).view_as(asked)
        self._into[:, :tokens] = torch.where(goes, into, self._spare[:tokens])
        if self._reached > tokens:
            self._into[:, tokens : self._reached] = self._spare[tokens : self._reached]
        self._reached = tokens
