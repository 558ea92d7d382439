"""What a request reads, as a client says it; its scores on their way; and what is answered.

| field | meaning |
|---|---|
| `steer_read` | a probe's name, or a list of them; `[]` declines a default |
| `steer_read_positions` | a selector (`steerfast._positions`) for all of them; default: all |
| `steer_abort` | "probe>0.9", "probe<-2", or a list: the request ends at a token that is read and beyond; they are read, too |
| `steer_read_what` | "request" (default): how many tokens were read, their largest score, mean and last; "tokens": each, too |

Scores are told apart by the position of their token, so that tokens which a preempted request runs again are counted once, and a
missing one is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from steerfast._positions import EVER, Selector, allowed, parse, resolved

from .fields import LONGEST, PROBES, names_of, selector_of, short, steer_fields
from .pieces import Piece, pieces
from .probes import ProbeLibrary, ServedProbe
from .reading import Decoded, Found, Reader, Rows, Wanted

MOST_PROBES = 64
"""Probes that one request may name."""
_STALE = attrgetter("num_stale_output_tokens")  # of a request that was preempted while it ran
MOST_ASIDE = 64
"""Steps of the same requests that are put aside."""
MOST_NEW = 256
"""Steps whose scores an answer keeps as they came."""
CROSSED = "steer_abort: "
"""How the reason for which a request stops begins that has crossed a limit."""
ANSWERED = "steerfast"
"""The key under which an answer's `kv_transfer_params` hold the scores."""


class Limit(NamedTuple):
    """A request ends where a score is above a number, or below it."""

    probe: str
    above: bool
    level: float

    def __str__(self) -> str:
        return f"{self.probe}{'>' if self.above else '<'}{self.level:g}"

    @classmethod
    def parse(cls, value: Any) -> Limit:
        """What a client writes as "probe>0.9".

        Raises:
            ValueError: it is something else.
        """
        text = value if isinstance(value, str) and len(value) <= LONGEST else ""
        at = max(text.rfind(">"), text.rfind("<"))
        try:
            level = float(text[at + 1 :]) if at > 0 else math.nan
        except ValueError:
            level = math.nan
        if not math.isfinite(level):
            raise ValueError(
                f"steer: steer_abort is {short(value)}; expected a probe's name, > or <, and a finite number, such as 'toxic>0.9'"
            )
        return cls(text[:at].strip(), text[at] == ">", level)


@dataclass(frozen=True, eq=False)
class Reading:
    """What one request reads.

    Attributes:
        probes: In the order in which they were named.
        positions: A selector.
        by_token: Whether the answer says the score of every token.
        limits: Where the request ends.
    """

    probes: tuple[ServedProbe, ...]
    positions: str
    by_token: bool
    limits: tuple[Limit, ...] = ()

    @cached_property
    def selector(self) -> Selector:
        """Its positions as a tree."""
        return parse("steer: steer_read_positions", self.positions)

    @property
    def columns(self) -> int:
        """Numbers that it has for every token."""
        return sum(one.columns for one in self.probes)

    def first(self, prompt: int) -> int:
        """No position before this one is read, whatever the tokens are."""
        if self.selector.remembers:
            return 0
        where = pieces(self.selector, prompt)
        return where[0].first if where else EVER

    def crossed(self, first: int, scores: np.ndarray, ids: Sequence[int], prompt: int) -> tuple[Limit, int] | None:
        """The position of the first token of a step that is read and beyond a limit, and which limit that is.

        Args:
            first: Position of the first of these tokens.
            scores: What they have, float32 (tokens, columns).
            ids: The request's tokens, at least up to these.
            prompt: How many of them were given.
        """
        stop = first + len(scores)
        if self.selector.reads_tokens or self.selector.remembers:
            read = allowed(self.selector, ids[:stop], prompt).numpy()[first:]
        else:
            here = np.arange(first, stop)
            read = np.zeros(len(scores), dtype=bool)
            for piece in _pieces(self.positions, prompt):
                read |= (here >= piece.first) & (here < piece.stop)
        column = dict(
            zip((one.name for one in self.probes), accumulate(one.columns for one in self.probes), strict=True)
        )
        beyond = []
        for number, limit in enumerate(self.limits):
            found = scores[:, column[limit.probe] - 1]
            over = read & (found > limit.level if limit.above else found < limit.level)
            if over.any():
                beyond.append((first + int(over.argmax()), number))
        if not beyond:
            return None
        position, number = min(beyond)
        return self.limits[number], position

    def wanted(self, prompt: int) -> Wanted:
        """What a worker must know of it."""
        return Wanted(self.probes, self.first(prompt))


def read_probes(given: Mapping[str, Any] | None, library: ProbeLibrary, default: Reading | None) -> Reading | None:
    """What a request reads; `default` where it does not speak of reading.

    Raises:
        ValueError: an unknown probe, a malformed value; the message says what was expected.
    """
    fields = {name: value for name, value in steer_fields(given).items() if name in PROBES}
    if not fields:
        return default
    if "steer_read" not in fields and "steer_abort" not in fields:
        raise ValueError(f"steer: {next(iter(fields))} is given without steer_read; name the probes it is about")
    ends = fields.get("steer_abort", [])
    ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
    if len(ends) > MOST_PROBES:
        raise ValueError(f"steer: steer_abort has {len(ends)} limits; at most {MOST_PROBES} are possible")
    limits = tuple(Limit.parse(text) for text in ends)
    names = dict.fromkeys(names_of("steer_read", "probe", fields.get("steer_read", []), MOST_PROBES))
    names |= dict.fromkeys(limit.probe for limit in limits)
    probes = tuple(_served(name, library) for name in names)
    positions = selector_of("steer_read_positions", fields.get("steer_read_positions", "all"))
    try:
        resolved(parse("steer: steer_read_positions", positions), None)
    except ValueError:
        raise ValueError(
            f"steer: {short(positions)} names special tokens, and a probe does not say which they are; name them with ids:"
        ) from None
    what = fields.get("steer_read_what", "request")
    if what not in ("request", "tokens"):
        raise ValueError(f"steer: steer_read_what is {short(what)}; expected 'request' or 'tokens'")
    for probe in probes:
        if probe.pairs and what != "tokens":
            raise ValueError(
                f"steer: {short(probe.name)} selects other features for every token; read it with steer_read_what='tokens'"
            )
    for limit in limits:
        one = library.probes[limit.probe]
        if one.names is not None or one.pairs:
            raise ValueError(
                f"steer: steer_abort: {short(one.name)} gives several numbers per token; name a probe with one"
            )
    return Reading(probes, positions, what == "tokens", limits) if probes else None


@lru_cache(maxsize=4096)
def _pieces(positions: str, prompt: int) -> tuple[Piece, ...]:
    return pieces(parse("steer: steer_read_positions", positions), prompt)


def check_read(reading: Reading, ids: Sequence[int] | None, prompt: int) -> None:
    """Refuse what only a request's prompt shows.

    Raises:
        ValueError: an index that it does not have, or token ids that it does not show.
    """
    if ids is None and reading.selector.reads_tokens:
        raise ValueError(
            f"steer: {short(reading.positions)} looks at token ids, and this prompt is given as embeddings; send tokens"
        )
    try:
        allowed(reading.selector, range(prompt), prompt)
    except ValueError as reason:
        raise ValueError(f"steer: {short(reading.positions)}: {reason}") from None


def _served(name: str, library: ProbeLibrary) -> ServedProbe:
    if name in library.refused:
        raise ValueError(f"steer: the probe {short(name)} cannot be read: {library.refused[name]}")
    if name not in library.probes:
        raise ValueError(f"steer: there is no probe {short(name)}; this engine has {len(library.probes)} probes")
    return library.probes[name]


class Desk:
    """The scheduler's side: scores that have come from the workers and not gone to the front end yet.

    They go there with a request's last output; where the front end itself may end a request, with each. While the same requests
    decode, a step's scores are put aside as they came, and are sorted by request many steps at once.
    """

    def __init__(self) -> None:
        self._new: dict[str, list[tuple[int, bytes]]] = {}
        self._told: set[str] = set()  # requests of which the front end knows what they read
        self._left: list[str] | None = None  # while outputs are made: what has left, and still has an output to go with
        self._steps: list[Decoded] = []  # put aside
        self._readers: tuple[Reader, ...] = ()  # of these steps, and
        self._following: dict[str, Any] = {}  # these requests as the scheduler has them, whose next step may come, too
        self.readings: dict[str, Reading] = {}
        """What the requests read of which something has come."""
        self.hasty: set[str] = set()
        """Those of them that the front end may end, at a text: what they read goes there with each output."""

    def __len__(self) -> int:
        return len(self._told | self._new.keys() | self._following.keys() | self.readings.keys())

    def note(self, rows: Rows) -> None:
        """What a request has read in a step."""
        request, first, scores = rows
        self._new.setdefault(request, []).append((first, scores.tobytes()))

    def follow(self, found: Found, requests: Mapping[str, Any]) -> None:
        """A step has come whose requests go on: none of them has to be looked at before something about them changes."""
        if isinstance(found, Decoded) and len(found.readers) == len(requests):
            self._readers, self._following = found.readers, dict(requests)

    def put_aside(self, found: Found) -> bool:
        """What the requests that are followed have read in a further step; False: it is another step, to be noted."""
        goes_on = self._following and isinstance(found, Decoded) and found.readers == self._readers
        if not goes_on or any(map(_STALE, self._following.values())):
            self._settle()
            self._following = {}
            return False
        self._steps.append(found)  # type: ignore[arg-type]
        if len(self._steps) >= MOST_ASIDE:
            self._settle()
        return True

    def cut(self, request: str, rows: int, columns: int) -> None:
        """The last rows of what came last are of tokens that the text does not have."""
        first, scores = self._new[request].pop()
        self._new[request].append((first, scores[: max(len(scores) - 4 * rows * columns, 0)]))

    def message(self, request: str, reading: Reading) -> dict[str, Any] | None:
        """What the next output of a request carries to the front end."""
        self._settle()
        new = self._new.pop(request, None)
        if new is None:
            return None
        if request in self._told:
            return {"rows": new}
        self._told.add(request)
        return {"rows": new, "reading": _flat(reading)}

    @contextmanager
    def open(self) -> Iterator[list[str]]:
        """While outputs are made: a request that leaves, which is in this list then, still has one."""
        left = self._left = []
        try:
            yield left
        finally:
            self._left = None
            for request in left:
                self.end(request)

    def end(self, request: str) -> None:
        """A request has left."""
        if self._left is not None:
            self._left.append(request)
            return
        if request in self._following:
            self._settle()
            self._following = {}
        self.readings.pop(request, None)
        self.hasty.discard(request)
        self._new.pop(request, None)
        self._told.discard(request)

    def _settle(self) -> None:
        """Sort what has been put aside by request."""
        steps, self._steps = self._steps, []
        if not steps:
            return
        positions = np.stack([step.positions for step in steps])
        if (np.diff(positions, axis=0) != 1).any():
            for step in steps:
                for rows in step:
                    self.note(rows)
            return
        scores = np.stack([step.scores for step in steps], 1)  # (requests, steps, columns)
        for reader, first, found in zip(self._readers, positions[0].tolist(), scores, strict=True):
            skipped = min(max(reader.first - first, 0), len(steps))
            self.note((reader.name, first + skipped, found[skipped:, steps[0].of(reader)]))


def _flat(reading: Reading) -> dict[str, Any]:
    probes = [(one.name, one.columns, one.names, one.pairs) for one in reading.probes]
    return {"probes": probes, "positions": reading.positions, "by_token": reading.by_token}


class ProbeScores(NamedTuple):
    """All that one request has read of one probe.

    Attributes:
        probe: Its name.
        names: What its numbers are called; None: it gives one.
        pairs: Whether `values` has the scores of selected features, then as many indices.
        positions: Of the tokens that were read, rising; none if a score was missing.
        values: float32 (tokens, columns).
    """

    probe: str
    names: Sequence[str] | None
    pairs: bool
    positions: np.ndarray
    values: np.ndarray


class Answer:
    """The front end's side: all scores of one request.

    Args:
        reading: What the first message says of it.
    """

    def __init__(self, reading: Mapping[str, Any]) -> None:
        self._probes = [tuple(one) for one in reading["probes"]]
        self._columns = sum(columns for _, columns, *_ in self._probes)
        self._selector = parse("steer: steer_read_positions", reading["positions"])
        self._by_token = bool(reading["by_token"])
        self._scores = np.zeros((0, self._columns), dtype=np.float32)
        self._known = np.zeros(0, dtype=bool)
        self.found: list[ProbeScores] = []
        """By probe, once it is finished."""
        self._new: list[tuple[int, bytes]] = []

    def add(self, rows: Sequence[tuple[int, bytes]]) -> None:
        """Scores of tokens at positions [first, …); one that is known already is not counted twice."""
        self._new += rows  # every request of every step comes by
        if len(self._new) >= MOST_NEW:
            self._settle()

    def _settle(self) -> None:
        """Put what has come where it belongs."""
        new_rows, self._new = self._new, []
        for first, data in new_rows:
            found = np.frombuffer(data, dtype=np.float32).reshape(-1, self._columns)
            stop = first + len(found)
            if stop > len(self._known):
                room = max(stop, 2 * len(self._known), 64)
                more = room - len(self._known)
                self._scores = np.concatenate([self._scores, np.zeros((more, self._columns), dtype=np.float32)])
                self._known = np.concatenate([self._known, np.zeros(more, dtype=bool)])
            new = ~self._known[first:stop]
            self._scores[first:stop][new] = found[new]
            self._known[first:stop] = True

    def finish(
        self, ids: Sequence[int], prompt: int, crossed: bool = False
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What is answered, ready for JSON, and all scores that were read of each probe with one number per token.

        Args:
            ids: The tokens of prompt and generation; where none was generated, the request ended in its prompt, with what is
                known.
            prompt: How many of them were given.
            crossed: The last one has crossed a limit, and counts; otherwise it does not, even where it was a draft that has run.
        """
        self._settle()
        known = self._known.nonzero()[0]
        reached = int(known[-1]) + 1 if len(known) else 0
        run = len(ids) - (not crossed) if len(ids) > prompt else min(reached, prompt)
        where = allowed(self._selector, ids[:run], prompt).numpy().nonzero()[0]
        missing = len(np.setdiff1d(where, known, assume_unique=True))
        where = where[:0] if missing else where
        answer: dict[str, Any] = {}
        single: dict[str, np.ndarray] = {}
        at = 0
        for name, columns, names, pairs in self._probes:
            values = self._scores[where, at : at + columns]
            at += columns
            self.found.append(ProbeScores(name, names, pairs, where, values))
            if missing:
                answer[name] = {"tokens": 0, "missing": missing}
            elif pairs:
                answer[name] = _selected(values)
            else:
                answer[name] = _reduced(values if names else values[:, 0], names)
                if self._by_token:
                    answer[name]["scores"] = plain(values if names else values[:, 0])
            if not pairs and not names:
                single[name] = values[:, 0]
            if self._by_token and not missing:
                answer[name]["positions"] = where.tolist()
        return answer, single


def _reduced(values: np.ndarray, names: Sequence[str] | None) -> dict[str, Any]:
    """The three numbers of a request, each of them a list where a probe has several; null where nothing was read."""
    found: dict[str, Any] = {"tokens": len(values)}
    if names:
        found["names"] = list(names)
    with np.errstate(all="ignore"):
        reductions = (values.max(0), values.mean(0, dtype=np.float64), values[-1]) if len(values) else (None,) * 3
    for name, number in zip(("max", "mean", "last"), reductions, strict=True):
        found[name] = None if number is None else plain(np.asarray(number))
    return found


def _selected(values: np.ndarray) -> dict[str, Any]:
    half = values.shape[1] // 2
    features = values[:, half:].astype(np.int64).tolist()
    return {"tokens": len(values), "scores": plain(values[:, :half]), "features": features}


def plain(values: np.ndarray) -> Any:
    """Numbers as JSON has them: null for what is not finite."""
    if np.isfinite(values).all():
        return values.tolist()
    if not values.ndim:
        return None
    return [
        plain(value) if isinstance(value, np.ndarray) else value if math.isfinite(value) else None
        for value in (values if values.ndim > 1 else values.tolist())
    ]
