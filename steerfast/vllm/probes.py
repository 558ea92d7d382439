"""The probes that an engine reads: read once from a directory, known by name, each with its columns of a table of scores."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfast._checks import as_tensor
from steerfast.files import container
from steerfast.files.shelf import Shelf
from steerfast.ops.backends import in_full_precision
from steerfast.place import Place
from steerfast.probes import FeatureProbe, LinearProbe, LogisticProbe, Probe, SimilarityProbe, TopKProbe

from .plans import Library, Widths, public, read_place
from .roster import Roster


@dataclass(frozen=True)
class ServedProbe:
    """What a server must know of a probe to answer requests.

    Attributes:
        name: Name of its folder.
        place: Where its hook is, (site, layer).
        after: Whether it sees the stream after the edits there.
        column: Its first column in the table of scores.
        columns: How many it has: numbers per token; of a pair the values, then as many indices.
        names: What its numbers are called; None: it gives one.
        pairs: Whether it says which features it has selected.
    """

    name: str
    place: Place
    after: bool
    column: int
    columns: int
    names: tuple[str, ...] | None = None
    pairs: bool = False


@dataclass(frozen=True)
class ProbeLibrary:
    """All probes of a directory, and why some of them cannot be read.

    Attributes:
        probes: By name, sorted.
        refused: Name to the reason why no request may name it.
    """

    probes: dict[str, ServedProbe] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> int:
        """Of the table of scores."""
        return sum(served.columns for served in self.probes.values())


def load_probes(
    directory: str | os.PathLike[str],
    width: int,
    layers: int,
    plans: Library,
    *,
    heads: int = 0,
    saes: Shelf | None = None,
) -> tuple[ProbeLibrary, dict[str, Probe]]:
    """Read every probe of a directory, for a model of that width and number of layers in which these plans are served.

    `heads` is the width of head_out; 0: nothing is read there. A probe that is damaged or does not fit is refused
    by name; the others are served. SAEs that probes name are looked for on `saes`, or where STEERFAST_SAES says.

    Raises:
        ValueError: there is no such directory, it holds no probe, or another process of this engine has found other probes.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"STEERFAST_PROBES: {str(root)!r} is not a directory; expected one with a folder per probe")
    widths = Widths(width, heads)
    served: dict[str, ServedProbe] = {}
    refused: dict[str, str] = {}
    loaded: dict[str, Probe] = {}
    saes, column = Shelf("Probe.load") if saes is None else saes, 0
    roster = Roster("STEERFAST_PROBES", root, container.PROBE.text_name)
    for folder in roster.folders:
        name = folder.name
        try:
            probe = Probe.load(folder, saes)
            place, after = _fit(probe, widths, layers, plans)
        except (ValueError, TypeError, OSError) as reason:
            roster.check(folder)
            refused[name] = public(str(reason), root)
            continue
        roster.check(folder)
        columns = 2 * int(probe.k or 0) if isinstance(probe, TopKProbe) else len(probe.names or (0,))
        loaded[name] = probe
        served[name] = ServedProbe(name, place, after, column, columns, probe.names or None, probe.pairs)
        column += columns
    if not served and not refused:
        raise ValueError(f"STEERFAST_PROBES: {str(root)!r} holds no probe; save one with probe.save(directory / name)")
    return ProbeLibrary(served, refused), loaded


def _fit(probe: Probe, widths: Widths, layers: int, plans: Library) -> tuple[Place, bool]:
    """Where an engine reads a probe, and whether after the edits there; or the reason why it cannot."""
    if probe.place is None:
        raise ValueError("it does not say where it is read; save it with place=, a layer or (site, layer)")
    site, layer = probe.place
    if probe.width != (width := widths.at(site)):
        raise ValueError(f"it has width {probe.width}; this model has {width}")
    return read_place(site, layer, probe.after, layers, plans.entered)


class PlaceReader:
    """All probes that read one place at one time: one product for those that are rows of a matrix, then each of the others.

    Args:
        probes: What is read, by name.
        served: Their columns.
        device: Of the stream.
    """

    def __init__(self, probes: Mapping[str, Probe], served: Mapping[str, ServedProbe], device: torch.device) -> None:
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        self.columns = frozenset(served[name].column for name in probes)
        """The first column of each."""
        self.plain = all(map(is_row, probes.values()))
        self.width = next(iter(probes.values())).width
        self.watches = any(name.startswith(GATE) for name in probes)
        self._finish: list[tuple[slice, slice, Callable[[Tensor, Tensor], Tensor]]] = []
        self._others: list[tuple[slice, Callable[[Tensor, Any], None]]] = []
        self._on_host = device.type == "cpu"
        reached = 0
        for name, probe in probes.items():
            columns = slice(served[name].column, served[name].column + served[name].columns)
            rows = _as_rows(probe, device)
            if rows is None:
                self._others.append((columns, _numbers(probe, device)))
                continue
            weights.append(rows[0])
            biases.append(rows[1])
            self._finish.append((columns, slice(reached, reached + len(rows[0])), rows[2]))
            reached += len(rows[0])
        self._weight = torch.cat(weights).T.contiguous().to(device) if weights else None
        self._bias = torch.cat(biases).to(device) if biases else None

    @in_full_precision
    def write(self, x: Tensor, scores: Tensor) -> None:
        """What the probes find in x, float32 (n, d), into their columns of scores, float32 (n, columns)."""
        table: Any = scores.numpy() if self._on_host else scores  # NumPy's small calls cost a tenth
        if self._weight is not None and self._bias is not None:
            found = torch.addmm(self._bias, x, self._weight)
            for columns, rows, finish in self._finish:
                part = finish(found[:, rows], x)
                table[:, columns] = part.numpy() if self._on_host else part
        for columns, write in self._others:
            write(x, table[:, columns])


def _as_rows(probe: Probe, device: torch.device) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]] | None:
    """(W (m, d), b (m,), what makes the scores of Wx + b and x); None: it is no product with rows."""
    if isinstance(probe, LinearProbe):
        weight = as_tensor(probe.weight)
        bias = probe.bias if isinstance(probe.bias, Tensor) else torch.full((1,), float(probe.bias))
        return weight.reshape(-1, probe.width), bias, _as_it_is
    if isinstance(probe, LogisticProbe):
        return as_tensor(probe.weight)[None], torch.full((1,), probe.bias), _probability
    if isinstance(probe, SimilarityProbe) and probe.kind == "projection":
        rows = as_tensor(probe.direction)
        return rows, torch.zeros(len(rows)), _share
    if isinstance(probe, FeatureProbe) and probe.sae.threshold is not None and probe.sae.normalisation == "none":
        threshold = probe.sae.threshold.to(device)
        return probe.sae.weight, probe.sae.bias, lambda found, x: torch.where(found <= threshold, 0, found)
    return None


def _as_it_is(found: Tensor, x: Tensor) -> Tensor:
    return found


def _probability(found: Tensor, x: Tensor) -> Tensor:
    return torch.sigmoid(found)


def _share(found: Tensor, x: Tensor) -> Tensor:
    """‖Wx‖/‖x‖, and 0 of a row of zeros, as `ops.stream.similarity` has it."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.linalg.vector_norm(found, dim=-1, keepdim=True) / torch.where(length == 0, 1, length)


def _numbers(probe: Probe, device: torch.device) -> Callable[[Tensor, Any], None]:
    """What writes what a probe finds in x into float32 columns: of a tensor, on a CPU of an array."""
    program = probe.program(device)
    there = Tensor.numpy if device.type == "cpu" else Tensor.detach

    def run(x: Tensor, scores: Any) -> None:
        found = program(x)
        if isinstance(found, tuple):
            half = scores.shape[1] // 2
            scores[:, :half] = there(found[0])
            scores[:, half:] = there(found[1])  # whole numbers up to 2²⁴ are exact
        else:
            scores[:] = there(found.reshape(scores.shape))

    return run


def units(probes: Mapping[str, Probe]) -> list[list[str]]:
    """Names of probes of one place that are read together or not at all: those behind gates, those of one product, each other."""
    plain = [name for name, probe in probes.items() if is_row(probe)]
    watched = [name for name in plain if name.startswith(GATE)]
    rest = [[name] for name in probes if name not in plain]
    return [group for group in (watched, [name for name in plain if name not in watched], *rest) if group]


def _rows(probe: Any) -> Tensor:
    return as_tensor(probe.weight).reshape(-1, probe.width)


def is_row(probe: Any) -> bool:
    """Whether it is one product with rows, and at most a function of each number behind it."""
    return isinstance(probe, (LinearProbe, LogisticProbe))


GATE = "/"
"""How the name of a probe begins that belongs to a condition; no folder has such a name."""


class Room:
    """Memory on the host that grows and is used again."""

    def __init__(self) -> None:
        self._parts: dict[tuple[torch.dtype, int], Tensor] = {}

    def of(self, shape: tuple[int, ...], dtype: torch.dtype, number: int = 0) -> Tensor:
        """A tensor in the memory of this dtype and number, whatever stands there."""
        count, part = math.prod(shape), self._parts.get((dtype, number))
        if part is None or len(part) < count:
            with torch.inference_mode(False):  # what is made inside could not be written to outside
                part = self._parts[dtype, number] = torch.empty(count, dtype=dtype)
        return part[:count].view(shape)


class Later:
    """Places whose probes are all products with rows: the stream of each is kept, and read when the step has run, in one product.

    Between the layers of a model every call is slow, since nothing of it is in a cache: two remain there of ten.

    Args:
        places: The probes of each, by name.
        served: Their columns.
        room: For what is kept, one for all of these of which one is used at a time.
    """

    def __init__(self, places: Sequence[Mapping[str, Probe]], served: Mapping[str, ServedProbe], room: Room) -> None:
        parts = [[(name, _rows(one), one) for name, one in probes.items()] for probes in places]
        most = max(sum(len(weight) for _, weight, _ in part) for part in parts)
        weights = torch.zeros(len(parts), parts[0][0][1].shape[1], most)
        biases = torch.zeros(len(parts), 1, most)
        at: dict[bool, list[tuple[int, int, int]]] = {
            False: [],
            True: [],
        }  # whether it is a probability: place, row, column
        for i, part in enumerate(parts):
            reached = 0
            for name, weight, probe in part:
                rows = slice(reached, reached + len(weight))
                bias: Any = probe.bias  # type: ignore[attr-defined]
                weights[i, :, rows], biases[i, 0, rows] = weight.T, torch.as_tensor(bias)
                column = served[name].column
                at[isinstance(probe, LogisticProbe)] += [(i, reached + j, column + j) for j in range(len(weight))]
                reached = rows.stop
        self._at = {kind: np.array(found).T for kind, found in at.items() if found}
        self._weight, self._bias = weights.numpy(), biases.numpy()
        self._room = room
        self._count = 0  # of the tokens that there is room for
        self._none = self._kept = self._wide = torch.empty(0)
        self._views: list[Tensor] = []  # of each place: the two halves of its stream, one after the other
        self._halves = self._found = np.empty(0)

    def keep(self, i: int, x: Tensor, hidden: Tensor | None) -> None:
        """The stream of a place: x (n, d), or hidden + x, which are added up later: this is one copy."""
        if x.shape[0] != self._count:
            self._make_room(x)
        torch.cat((x, self._none if hidden is None else hidden), out=self._views[i])

    def write(self, scores: Tensor) -> None:
        """What all of them find, into scores, float32 (n, columns)."""
        self._wide.copy_(self._kept)
        stream = np.add(self._halves[:, 0], self._halves[:, 1], out=self._halves[:, 0])
        # NumPy's product of many narrow matrices takes a tenth of PyTorch's.
        found = np.matmul(stream, self._weight, out=self._found)
        found += self._bias
        table = scores.numpy()
        for probability, (place, row, column) in self._at.items():
            values = found[place, : len(table), row]  # (columns, n)
            if probability:
                torch.sigmoid_(torch.from_numpy(values))
            table[:, column] = values.T

    def _make_room(self, x: Tensor) -> None:
        count, width, places = *x.shape, len(self._weight)
        self._kept = self._room.of((places, 2, count, width), x.dtype)
        self._wide = self._room.of((places, 2, count, width), torch.float32, 1)
        self._halves = self._wide.numpy()
        self._found = np.empty((places, count, self._weight.shape[2]), dtype=np.float32)
        self._none = x.new_zeros(count, width)
        self._views = [*self._kept.view(places, 2 * count, width)]
        self._count = count
