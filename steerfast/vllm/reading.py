"""What probes find in an engine's steps: one table of scores per device, and the rows of it that requests have asked for.

The op of a place writes the columns of its probes for every token of the batch: on a CPU only where a request of the running
step reads, on a GPU, whose graph may be captured, always. A step's rows leave the device together, without a wait, and go to the
scheduler beside what was sampled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerfast.probes.probe import Probe

from .probes import PlaceReader, ServedProbe


class Wanted(NamedTuple):
    """What one request reads: these probes, from a position on."""

    probes: tuple[ServedProbe, ...]
    first: int

    @property
    def columns(self) -> list[int]:
        """Their columns of the table of scores, one probe after the other."""
        return [probe.column + i for probe in self.probes for i in range(probe.columns)]


Rows = tuple[str, int, np.ndarray]
"""A request, the position of its first token of a step that it reads, and the scores, float32 (tokens, columns)."""


class Readers:
    """All probes of a model on one device.

    Args:
        served: What requests may name.
        loaded: The probes themselves.
        tokens: How many tokens a batch can have, padding included.
        device: Where the model runs.
    """

    def __init__(
        self, served: Mapping[str, ServedProbe], loaded: Mapping[str, Probe], tokens: int, device: torch.device
    ) -> None:
        self.scores = torch.zeros(tokens, sum(one.columns for one in served.values()), device=device)
        self._at: dict[tuple[str, bool], PlaceReader] = {}
        groups: dict[tuple[str, bool], dict[str, Probe]] = {}
        for name, one in served.items():
            groups.setdefault((f"{one.place.site}.{one.place.layer}", one.after), {})[name] = loaded[name]
        for where, probes in groups.items():
            self._at[where] = PlaceReader(probes, served, device)
        self._always = device.type != "cpu"
        self._read: frozenset[tuple[str, bool]] = frozenset(self._at) if self._always else frozenset()
        self.reading = bool(self._read)
        """Whether some place is to be read in the running step."""
        self._wanted: dict[str, Wanted] = {}
        self._running: Step | None = None

    def __len__(self) -> int:
        return len(self._wanted)

    def start(self, request: str, wanted: Wanted) -> None:
        """A request that reads arrives."""
        self._wanted[request] = wanted

    def end(self, request: str) -> None:
        """A request has left; nothing happens if it did not read."""
        self._wanted.pop(request, None)

    def begin(
        self,
        requests: Iterable[str],
        starts: Tensor,
        positions: Tensor,
        tokens: int,
        gated: frozenset[tuple[str, bool]] = frozenset(),
    ) -> None:
        """A step begins; arguments as of `RowTable.fill`, and the places that the gates of its requests read."""
        if not self._wanted and not gated:
            if self.reading:
                self._show(None, gated)
            return
        here = [(i, name, self._wanted[name]) for i, name in enumerate(requests) if name in self._wanted]
        self._show(Step(here, starts, positions, tokens) if here else None, gated)

    def write(self, x: Tensor, hidden: Tensor | None, place: str, after: bool) -> None:
        """What the probes of a place find in the stream x (n, d), or in hidden + x."""
        where = place, after
        if where in self._read:
            stream = x.float() if hidden is None else hidden.float() + x.float()
            self._at[where].write(stream, self.scores[: len(x)])

    def take(self) -> Taken | None:
        """What the requests of the step that has run have read; None: no request of it reads."""
        running, self._running = self._running, None
        if running is None:
            return None
        return Taken(running, self.scores)

    def _show(self, running: Step | None, gated: frozenset[tuple[str, bool]]) -> None:
        self._running = running
        if not self._always:
            probes = () if running is None else (one for _, _, wanted in running.here for one in wanted.probes)
            self._read = gated.union((f"{one.place.site}.{one.place.layer}", one.after) for one in probes)
            self.reading = bool(self._read)


class Step(NamedTuple):
    """A running step: its requests that read, with their number in the batch, and where its tokens stand."""

    here: Sequence[tuple[int, str, Wanted]]
    starts: Tensor
    positions: Tensor
    tokens: int


class Taken:
    """The scores of one step on their way to the host.

    Args:
        step: What has run.
        scores: The table that its probes have written, which the next step writes anew.
    """

    def __init__(self, step: Step, scores: Tensor) -> None:
        self._here = step.here
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
        found: list[Rows] = []
        for i, request, wanted in self._here:
            first, stop = int(starts[i]), int(starts[i + 1])
            skipped = min(max(wanted.first - int(positions[first]), 0), stop - first)
            rows = scores[first + skipped : stop, wanted.columns]
            found.append((request, int(positions[first]) + skipped, np.ascontiguousarray(rows)))
        return found


def _sent(part: Tensor) -> Tensor:
    host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
    return host.copy_(part, non_blocking=True)
