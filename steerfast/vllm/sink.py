"""The scores of all requests in a file of the operator's, written beside the answers by a thread that nobody waits for.

    STEERFAST_SCORES=/var/log/scores.jsonl     one line per request and number
    STEERFAST_SCORES=/data/scores.parquet      a folder; each part has one row per request and number

Both have the same fields:

| field | meaning |
|---|---|
| `time` | when the request ended, seconds since 1970 |
| `request` | its name, as its answer has it |
| `prompt` | its prompt's length in tokens |
| `probe`, `name` | whose number it is, and what it is called; null where the probe gives one |
| `positions`, `scores` | of the tokens that were read; a score that is not finite is null |
| `features` | of a probe that selects features: which one each score is of, `name` being its rank; null otherwise |

What waits for the thread is bounded. Beyond that, and where the disk takes no more, scores are dropped and counted.
"""

from __future__ import annotations

import atexit
import importlib
import io
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steerfast.files.replace import replace_file

from .scores import ProbeScores, plain

SINK = "STEERFAST_SCORES"
MOST_WAITING = 1 << 22
"""Numbers that may wait for the thread: 16 MB."""
_PART_NUMBERS, _PART_SECONDS = 1 << 20, 30.0  # with which a part of Parquet is written

Count = Callable[[str, float], object]
Record = dict[str, Any]


class ScoreSink:
    """What writes scores, and the thread that does it.

    Args:
        write: Called by the thread with records, as they come, and with none once in a while; the last time with True. Gives how
            many numbers it has written, piece by piece.
        count: Called with a counter's name and an amount.
        say: Called with a line for the log where something cannot be written.
    """

    def __init__(
        self, write: Callable[[list[Record], bool], Iterator[int]], count: Count, say: Callable[[str], object]
    ) -> None:
        self._write, self._count, self._say = write, count, say
        self._waiting: deque[tuple[float, str, int, list[ProbeScores]]] = deque()
        self._size = 0
        self._open = 0  # numbers that the thread has taken and neither written nor dropped
        self._changing = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="steerfast-scores", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, request: str, prompt: int, found: Sequence[ProbeScores]) -> None:
        """What a request has read; never waits for the file."""
        size = sum(one.values.size for one in found)
        with self._changing:
            fits = not self._closed and self._size + size <= MOST_WAITING
            if fits:
                self._waiting.append((time.time(), request, prompt, list(found)))
                self._size += size
                self._changing.notify()
        if not fits:
            self._count("scores_dropped", size)

    def close(self) -> None:
        """Write what waits, and stop. A second time does nothing."""
        with self._changing:
            self._closed = True
            self._changing.notify()
        self._thread.join(60.0)

    def _run(self) -> None:
        while True:
            with self._changing:
                if not self._waiting and not self._closed:
                    self._changing.wait(_PART_SECONDS / 10)
                taken, self._waiting = list(self._waiting), deque()
                last = self._closed
            self._settle([record for one in taken for record in records(*one)], last)
            with self._changing:
                self._size -= sum(one.values.size for *_, found in taken for one in found)
            if last:
                return

    def _settle(self, new: list[Record], last: bool) -> None:
        self._open += sum(len(record["scores"]) for record in new)
        try:
            for written in self._write(new, last):
                self._open -= written
                self._count("scores_written", written)
        except OSError as reason:
            self._say(f"steerfast: {SINK}: {self._open} scores could not be written: {reason}")
            self._count("scores_dropped", self._open)
            self._open = 0


def records(when: float, request: str, prompt: int, found: Sequence[ProbeScores]) -> Iterator[Record]:
    """What a request has read, one record per number of a probe."""
    for one in found:
        if not len(one.positions):
            continue
        columns = one.values.shape[1] // (2 if one.pairs else 1)
        names = [str(i) for i in range(columns)] if one.pairs else list(one.names or (None,))
        for i, name in enumerate(names):
            yield {
                "time": when,
                "request": request,
                "prompt": prompt,
                "probe": one.probe,
                "name": name,
                "positions": one.positions,
                "scores": one.values[:, i],
                "features": one.values[:, columns + i].astype(np.int64) if one.pairs else None,
            }


def open_sink(count: Count, say: Callable[[str], object]) -> ScoreSink | None:
    """The sink that the environment names; None where it names none.

    Args:
        count: Called with a counter's name and an amount.
        say: Called with a line for the log where something cannot be written.

    Raises:
        ValueError: a file of another ending, or one that cannot be written.
        ImportError: Parquet, and pyarrow is not installed.
    """
    text = os.environ.get(SINK)
    if not text:
        return None
    path = Path(text)
    try:
        if path.suffix == ".jsonl":
            return ScoreSink(_Lines(path), count, say)
        if path.suffix == ".parquet":
            return ScoreSink(_Parts(path), count, say)
    except OSError as reason:
        raise ValueError(f"{SINK} is {text!r}, which cannot be written: {reason}") from None
    raise ValueError(f"{SINK} is {text!r}; expected a file that ends in .jsonl, or a folder that ends in .parquet")


class _Lines:
    """JSON lines, appended: several processes may do so, since a line is written at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def __call__(self, new: list[Record], last: bool) -> Iterator[int]:
        for record in new:
            line = json.dumps({name: _plain(value) for name, value in record.items()}, ensure_ascii=False) + "\n"
            content = line.encode()
            done = os.write(self._file, content)
            if done < len(content):
                raise OSError(f"the disk took {done} of {len(content)} bytes")
            yield len(record["scores"])


class _Parts:
    """Parquet, a part per million numbers or half a minute, each written whole or not at all."""

    def __init__(self, folder: Path) -> None:
        try:
            self._arrow = importlib.import_module("pyarrow")
            self._parquet = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise ImportError(
                f"{SINK}={folder} needs pyarrow; pip install steerfast[parquet], or name a .jsonl file"
            ) from None
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._held, self._number, self._since = folder, list[Record](), 0, 0.0
        self._begun = f"{time.time_ns()}-{os.getpid()}"
        arrow = self._arrow
        self._schema = arrow.schema(
            {
                "time": arrow.float64(),
                "request": arrow.string(),
                "prompt": arrow.int32(),
                "probe": arrow.string(),
                "name": arrow.string(),
                "positions": arrow.list_(arrow.int32()),
                "scores": arrow.list_(arrow.float32()),
                "features": arrow.list_(arrow.int64()),
            }
        )

    def __call__(self, new: list[Record], last: bool) -> Iterator[int]:
        if new and not self._held:
            self._since = time.monotonic()
        self._held += new
        count = sum(len(record["scores"]) for record in self._held)
        old = time.monotonic() - self._since > _PART_SECONDS
        if not self._held or not (last or old or count > _PART_NUMBERS):
            return
        held, self._held = self._held, []
        rows = [{name: _listed(value) for name, value in record.items()} for record in held]
        into = io.BytesIO()
        self._parquet.write_table(self._arrow.Table.from_pylist(rows, self._schema), into)
        replace_file(self._folder / f"{self._begun}-{self._number:05d}.parquet", into.getvalue())
        self._number += 1
        yield count


def _plain(value: Any) -> Any:
    return plain(value) if isinstance(value, np.ndarray) else value


def _listed(value: Any) -> Any:
    """An array as a list, null for what is not finite, as in JSON."""
    if not isinstance(value, np.ndarray):
        return value
    return [one if math.isfinite(one) else None for one in value.tolist()]
