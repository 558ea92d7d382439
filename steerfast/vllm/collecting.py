"""A thread beside an engine that empties the ring of captured rows, waits for a request's end and writes its rows into shards.

A request is written whole or not at all: one whose rows had no room at some step, one that was hung up, and one that no longer
fits among the operator's bytes is given up, and its rows are counted.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerfast.sae.cache import DTYPES, CacheInfo
from steerfast.sae.growing import Context, GrowingCache

from .capture import Capture, CaptureSettings
from .capturing import Ring, Step

CONTEXT = 256
"""Tokens of a context: a longer text is cut, a shorter one is filled up with token 0."""
SHARD = 512
"""Contexts of a shard."""
PAUSE = 2.0
"""Seconds after which what has ended is on disk at the latest."""
WAITING = 1024
"""Steps that may wait for the thread; a further one loses its rows."""

Count = Callable[[str, float], object]


class Begin(NamedTuple):
    """A request that captures arrives: its name, what it asks for and its prompt."""

    request: str
    capture: Capture
    prompt: Sequence[int]


class End(NamedTuple):
    """A request has left; the rows of its first tokens are kept: further ones were drafts that its text does not have.

    Where its last token should stand a draft may have run that was not accepted: `last` tells them apart; -1: it is not known.
    """

    request: str
    tokens: int
    last: int = -1


@dataclass
class _Pending:
    """A request in flight: its tokens, and its rows by point and step, each with its positions."""

    capture: Capture
    tokens: np.ndarray
    rows: dict[int, list[tuple[np.ndarray, Tensor]]] = field(default_factory=dict)
    lost: int = 0
    reached: int = 0

    def say(self, first: int, ids: np.ndarray) -> None:
        """The tokens at positions from `first` on."""
        stop = first + len(ids)
        if stop > len(self.tokens):
            self.tokens = np.concatenate([self.tokens, np.zeros(max(stop - len(self.tokens), CONTEXT), dtype=np.int32)])
        self.tokens[first:stop] = ids

    def run(self, first: int, ids: np.ndarray) -> int:
        """These tokens have run, the first of them at a position. Returns the bytes that are free again."""
        free = self.forget(first) if first < self.reached else 0
        self.say(first, ids)
        self.reached = first + len(ids)
        return free

    def forget(self, first: int) -> int:
        """Positions from here on run again: what they had goes. Returns the bytes that are free again."""
        free = 0
        for parts in self.rows.values():
            while parts and parts[-1][0][-1] >= first:
                positions, rows = parts.pop()
                free += rows.nbytes
                kept = int(np.searchsorted(positions, first))
                if kept:
                    parts.append((positions[:kept], rows[:kept].clone()))
                    free -= parts[-1][1].nbytes
        return free

    def cut(self, tokens: int, last: int) -> None:
        """Its text has so many tokens, of which `last` is the last one; -1: whatever it is."""
        at = tokens - 1
        another = last >= 0 and at < self.reached and self.tokens[at] != last
        self.forget(at if another else tokens)
        self.tokens = self.tokens[:tokens]
        if another:
            self.tokens[at] = last

    def drop(self) -> int:
        """All rows go. Returns their number."""
        count = sum(len(positions) for parts in self.rows.values() for positions, _ in parts)
        self.rows.clear()
        return count

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for parts in self.rows.values() for _, rows in parts)


class _Share(NamedTuple):
    """The rows of a step that one point has: where they begin, up to which of them each request reaches, and their positions."""

    point: int
    first: int
    reached: list[int]
    positions: np.ndarray


def _shares(asked: np.ndarray, positions: np.ndarray, bounds: list[int]) -> list[_Share]:
    """Of a step's tokens, bool (tokens, points)."""
    shares, first = [], 0
    for point in asked.any(0).nonzero()[0].tolist():
        mine = asked[:, point]
        reached = np.concatenate([[0], np.cumsum(mine)])[bounds].tolist()
        shares.append(_Share(point, first, reached, positions[mine]))
        first += reached[-1]
    return shares


class Collector:
    """The thread, and what it has.

    Args:
        settings: What the operator allows.
        points: As `Captures` has them.
        ring: Where steps put their rows.
        model: Class name of the model, for the caches.
        count: Called with a counter's name and an amount.
        say: Called with a line for the log where a shard cannot be written.
    """

    def __init__(
        self,
        settings: CaptureSettings,
        points: Sequence[tuple[str, bool]],
        ring: Ring,
        model: str,
        count: Count,
        say: Callable[[str], object],
    ) -> None:
        self._settings, self._ring, self._model, self._count, self._say = settings, ring, model, count, say
        self._numbers = {point: number for number, point in enumerate(points)}
        self._pending: dict[str, _Pending] = {}
        self._caches: dict[str, GrowingCache] = {}
        self._held = 0  # bytes of rows of requests in flight
        self._used = settings.used()
        self._since: float | None = None  # when the first context was added that is not on disk
        self._stream: Any = None
        self._inbox: queue.SimpleQueue[Begin | End | Step | threading.Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="steerfast-capture", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether the thread is so far behind that a step must not wait for it."""
        return self._inbox.qsize() >= WAITING or not self._thread.is_alive()

    def put(self, message: Begin | End | Step) -> None:
        """Tell the thread; never waits."""
        if self._thread.is_alive():
            self._inbox.put(message)

    def drain(self, seconds: float = 60.0) -> bool:
        """Wait until everything told so far is on disk; False: it took longer."""
        done = threading.Event()
        self._inbox.put(done)
        return done.wait(seconds)

    def close(self) -> None:
        """Write what has ended, and stop. Requests in flight are given up. A second time does nothing."""
        if self._thread.is_alive():
            self._inbox.put(None)
            self._thread.join(60.0)

    # --- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                message = self._inbox.get(timeout=None if self._since is None else PAUSE / 4)
            except queue.Empty:
                self._write()
                continue
            if isinstance(message, Begin):
                self._begin(message)
            elif isinstance(message, End):
                self._end(message)
            elif isinstance(message, Step):
                self._step(message)
            else:
                self._write(now=True)
                if message is None:
                    for request in [*self._pending]:
                        self._end(End(request, 0))
                    return
                message.set()
            self._write()

    def _begin(self, message: Begin) -> None:
        if message.request not in self._pending:
            self._pending[message.request] = _Pending(message.capture, np.asarray(message.prompt, dtype=np.int32))

    def _step(self, step: Step) -> None:
        rows, line, positions, ids, bounds = self._fetch(step)
        for name, count in step.lost.items():
            self._lose(name, count)
        shares = _shares(step.wants[line], positions, bounds)
        firsts = positions[np.minimum(bounds[:-1], len(positions) - 1)].tolist()
        wide: dict[str, Tensor] = {}
        for i, name in enumerate(step.names):
            pending = self._pending.get(name) if name else None
            if pending is None or bounds[i] == bounds[i + 1]:
                continue
            self._held -= pending.run(firsts[i], ids[bounds[i] : bounds[i + 1]])
            dtype = pending.capture.dtype
            if dtype not in wide:
                wide[dtype] = rows.to(DTYPES[dtype])
            for share in shares:
                here = slice(share.reached[i], share.reached[i + 1])
                if here.start == here.stop:
                    continue
                part = wide[dtype][share.first + here.start : share.first + here.stop]
                if pending.lost or len(part) < here.stop - here.start:  # shorter: more than was announced
                    self._lose(name, here.stop - here.start)
                    continue
                self._held += part.nbytes
                pending.rows.setdefault(share.point, []).append((share.positions[here], part))
            if self._held > self._settings.memory:
                self._lose(name, 0)

    def _fetch(self, step: Step) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray, list[int]]:
        """A step's rows on the host, and what its tokens are; its part of the ring is free again."""
        if step.done is None:
            return self._copy(step)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._ring.buffer.device)
        with torch.cuda.stream(self._stream):
            step.done.wait()
            return self._copy(step)

    def _copy(self, step: Step) -> tuple[Tensor, np.ndarray, np.ndarray, np.ndarray, list[int]]:
        line, positions, ids, starts = (part.cpu().numpy() for part in step.parts)
        taken = min(int(step.wants[line].sum()), step.reserved)
        rows = self._ring.take(step.first, taken)
        self._ring.give_back(step.reserved)
        return rows, line, positions, ids.astype(np.int32), starts.tolist()

    def _lose(self, name: str, count: int) -> None:
        """A request will not be written: it has lost a row, at least."""
        pending = self._pending.get(name)
        if pending is None:
            return
        self._held -= pending.nbytes
        dropped = pending.drop() + count
        pending.lost += max(dropped, 1)
        self._count("capture_dropped", dropped)

    def _end(self, message: End) -> None:
        pending = self._pending.pop(message.request, None)
        if pending is None:
            return
        self._held -= pending.nbytes
        if message.tokens:
            pending.cut(message.tokens, message.last)
        count, size = sum(len(p) for parts in pending.rows.values() for p, _ in parts), pending.nbytes
        if not message.tokens or pending.lost:
            self._count("capture_dropped", count)
            return
        if self._used + size > self._settings.room:
            self._count("capture_dropped", count)
            return
        written = 0
        try:
            for point in pending.capture.points:
                parts = pending.rows.get(self._numbers[f"{point.place.site}.{point.place.layer}", point.after])
                if parts:
                    self._add(self._cache(pending.capture, point.named), message.request, pending.tokens, parts)
                    written += sum(len(positions) for positions, _ in parts)
        except (OSError, ValueError) as reason:
            self._say(f"steerfast: {count - written} captured rows could not be written: {reason}")
        self._used += size
        self._count("captured", written)
        self._count("capture_dropped", count - written)

    def _add(
        self, cache: GrowingCache, request: str, tokens: np.ndarray, parts: list[tuple[np.ndarray, Tensor]]
    ) -> None:
        positions, rows = np.concatenate([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        for number in np.unique(positions // CONTEXT).tolist():
            first = number * CONTEXT
            mine = positions // CONTEXT == number
            text = np.zeros(CONTEXT, dtype=np.int32)
            text[: len(tokens[first : first + CONTEXT])] = tokens[first : first + CONTEXT]
            where = torch.from_numpy((positions[mine] - first).astype(np.int32))
            cache.add(Context(torch.from_numpy(text), where, rows[torch.from_numpy(mine)], (request, first)))
            self._since = self._since or time.monotonic()

    def _cache(self, capture: Capture, place: Any) -> GrowingCache:
        name = f"{place.site}.{place.layer}.{'after' if capture.after else 'before'}.{capture.dtype}"
        if name not in self._caches:
            size = self._settings.width
            info = CacheInfo(self._model, place.site, place.layer, size, capture.dtype, CONTEXT, 0, SHARD, "")
            self._caches[name] = GrowingCache(self._settings.folder / name, info)
        return self._caches[name]

    def _write(self, now: bool = False) -> None:
        if self._since is None or (not now and time.monotonic() - self._since < PAUSE):
            return
        self._since = None
        for cache in self._caches.values():
            try:
                cache.write()
            except OSError as reason:  # tried again after the next pause
                self._since = time.monotonic()
                self._say(f"steerfast: a shard below {cache.directory} could not be written: {reason}")
