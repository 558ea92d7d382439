"""The stream itself: what a client may ask to have written down, and how much of it the operator allows.

| field | meaning |
|---|---|
| `steer_capture` | a layer, a place such as "mlp_out.12", or a list of them; a number is resid_post of that layer |
| `steer_capture_positions` | a selector (`steerfast._positions`) for all of them; default: all |
| `steer_capture_edits` | "before" (default): the stream before the edits of its place; "after": behind them |
| `steer_capture_dtype` | of the rows on disk, "bfloat16" (default) or "float32" |

The operator names the folder, the places and the bounds. Of what a client says nothing becomes a path: a place is one of a list.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from steerfast._positions import EVER, Selector, Window, parse, resolved
from steerfast.place import Place
from steerfast.sae.cache import DTYPES

from .fields import CAPTURES, selector_of, short, steer_fields
from .pieces import Piece, most_pieces, pieces
from .plans import read_place
from .table import WIDTH

FOLDER = "STEERFAST_CAPTURE"
_PLACE = re.compile(r"([a-z_]+)\.(-?\d{1,5})\Z")
_DEFAULTS = {
    "STEERFAST_CAPTURE_TOKENS": 4096,
    "STEERFAST_CAPTURE_BYTES": 10 << 30,
    "STEERFAST_CAPTURE_RING": 256 << 20,
    "STEERFAST_CAPTURE_MEMORY": 1 << 30,
}


class Point(NamedTuple):
    """What a client names, and where an engine reads it: a place, and before or behind the edits there.

    The stream is the same before and behind the edits of a place that no plan edits.
    """

    named: Place
    place: Place
    after: bool


@dataclass(frozen=True)
class CaptureSettings:
    """What the operator allows.

    Attributes:
        folder: Where the shards are written.
        places: What may be captured.
        layers: Of the model.
        width: d of its stream.
        size: Bytes of a number of the stream.
        tokens: Positions that one request may ask for.
        batch: Tokens that a step can have.
        room: Bytes that the files below the folder may take.
        ring: Bytes of the buffer on the device.
        memory: Bytes of host memory for the rows of running requests and of shards that are not full.
        edited: Places that some plan edits.
        entered: The layers, but the first, that some plan edits at resid_pre.
    """

    folder: Path
    places: frozenset[Place]
    layers: int
    width: int
    size: int
    tokens: int
    batch: int
    room: int
    ring: int
    memory: int
    edited: frozenset[Place] = frozenset()
    entered: frozenset[int] = frozenset()

    @classmethod
    def read(
        cls, model: tuple[int, int, int], batch: int, edited: Collection[Place], entered: Collection[int]
    ) -> CaptureSettings | None:
        """What the environment says; None where it names no folder.

        Args:
            model: Layers, d, and bytes of a number of the stream.
            batch: Tokens that a step can have.
            edited: Places that some plan edits.
            entered: The layers, but the first, that some plan edits at resid_pre.

        Raises:
            ValueError: a setting that is none; the message names it.
        """
        folder = os.environ.get(FOLDER)
        if not folder:
            return None
        layers, width, size = model
        tokens, room, ring, memory = (_bound(name) for name in _DEFAULTS)
        made = cls(
            folder=Path(folder),
            places=frozenset(),
            layers=layers,
            width=width,
            size=size,
            tokens=tokens,
            batch=batch,
            room=room,
            ring=ring,
            memory=memory,
            edited=frozenset(edited),
            entered=frozenset(entered),
        )
        text = os.environ.get("STEERFAST_CAPTURE_PLACES")
        names: list[Any] = list(range(layers)) if text is None else [name.strip() for name in text.split(",")]
        try:
            chosen = frozenset(made._place(int(n) if str(n).isdecimal() else n) for n in names)
            for place in chosen:
                read_place(place.site, place.layer, True, layers, ())
        except ValueError as reason:
            raise ValueError(f"STEERFAST_CAPTURE_PLACES is {text!r}: {reason}") from None
        if made.rows < 1:
            raise ValueError(
                f"STEERFAST_CAPTURE_RING is {made.ring}; expected at least the {width * size} bytes of a row"
            )
        return replace(made, places=chosen)

    @property
    def rows(self) -> int:
        """Rows that the buffer on the device holds."""
        return self.ring // (self.width * self.size)

    @cached_property
    def points(self) -> tuple[tuple[Place, bool], ...]:
        """Everything that a request may capture, as the engine reads it, in a fixed order."""
        found: set[tuple[Place, bool]] = set()
        for place in self.places:
            for after in (False, True):
                try:
                    found.add(self.point(place, after)[1:])
                except ValueError:
                    continue  # between the edits of two places; whoever asks for it is told so
        return tuple(sorted(found))

    def point(self, named: Place, after: bool) -> Point:
        """Where an engine reads a place.

        Raises:
            ValueError: nothing can be read between the edits there.
        """
        place, behind = read_place(named.site, named.layer, after, self.layers, self.entered)
        return Point(named, place, behind and place in self.edited)

    def below(self, name: str) -> CaptureSettings:
        """The same, in a folder of that folder."""
        return replace(self, folder=self.folder / name)

    def used(self) -> int:
        """Bytes of the files below the folder."""
        return sum(file.stat().st_size for file in self.folder.rglob("[0-9]*.safetensors"))

    def _place(self, name: Any) -> Place:
        found = _PLACE.match(name) if isinstance(name, str) else None
        whole = isinstance(name, int) and not isinstance(name, bool)
        if found is None and not whole:
            raise ValueError(
                f"steer: steer_capture names {short(name)}; expected a layer, or a place such as 'mlp_out.12'"
            )
        site, layer = ("resid_post", name) if found is None else (found[1], int(found[2]))
        if not -self.layers <= layer < self.layers:
            raise ValueError(
                f"steer: steer_capture: layer {short(layer)} is out of range; this model has {self.layers} layers, "
                f"0 to {self.layers - 1}"
            )
        return Place(site, layer % self.layers)

    def place(self, name: Any) -> Place:
        """A client's layer or place.

        Raises:
            ValueError: it is none, or none of those that the operator allows.
        """
        place = self._place(name)
        if place not in self.places:
            raise ValueError(
                f"steer: steer_capture: {short(f'{place.site}.{place.layer}')} is not captured by this engine, which offers "
                f"{len(self.places)} places; its operator names them in STEERFAST_CAPTURE_PLACES"
            )
        return place


@dataclass(frozen=True, eq=False)
class Capture:
    """What one request has written down.

    Attributes:
        points: Where it is read.
        positions: A selector.
        after: Whether it is the stream behind the edits of its place.
        dtype: Of the rows on disk.
    """

    points: tuple[Point, ...]
    positions: str
    after: bool
    dtype: str

    @cached_property
    def selector(self) -> Selector:
        """Its positions as a tree."""
        return parse("steer: steer_capture_positions", self.positions)

    def pieces(self, prompt: int) -> tuple[Piece, ...]:
        """The positions that are captured, given the prompt's length in tokens."""
        return pieces(self.selector, prompt)

    def first(self, prompt: int) -> int:
        """No position before this one is captured, whatever the tokens are."""
        where = self.pieces(prompt)
        return where[0].first if where else EVER

    def most(self, prompt: int, length: int) -> int:
        """How many of the first `length` positions it can capture, whatever the tokens are."""
        return sum(max(min(piece.stop, length) - piece.first, 0) for piece in self.pieces(prompt))


def read_capture(given: Mapping[str, Any] | None, settings: CaptureSettings | None) -> Capture | None:
    """What a request has captured; None where it does not speak of it.

    Raises:
        ValueError: the operator has named no folder, a place that is not offered, a malformed value.
    """
    fields = {name: value for name, value in steer_fields(given).items() if name in CAPTURES}
    if not fields:
        return None
    if settings is None:
        raise ValueError(
            f"steer: {next(iter(fields))}: this engine captures nothing; its operator names a folder in {FOLDER}"
        )
    if "steer_capture" not in fields:
        raise ValueError(f"steer: {next(iter(fields))} is given without steer_capture; name the layers it is about")
    named = fields["steer_capture"]
    layers = list(named) if isinstance(named, (list, tuple)) else [named]
    if len(layers) > 2 * len(settings.places):
        raise ValueError(f"steer: steer_capture names {len(layers)} places; this engine offers {len(settings.places)}")
    places = tuple(dict.fromkeys(settings.place(name) for name in layers))
    if not places:
        raise ValueError("steer: steer_capture is an empty list; name a layer, or leave it out")
    after = _one_of("steer_capture_edits", fields, ("before", "after")) == "after"
    dtype = _one_of("steer_capture_dtype", fields, ("bfloat16", *sorted(DTYPES.keys() - {"bfloat16"})))
    return Capture(_points(places, after, settings), _positions(fields), after, dtype)


def check_capture(
    capture: Capture, settings: CaptureSettings, ids: Sequence[int] | None, length: tuple[int, int], samples: int = 1
) -> None:
    """Refuse what only a request's prompt shows, and what is beyond its bounds.

    Args:
        capture: What it asks for.
        settings: What is allowed.
        ids: Its prompt; None if it is given as embeddings.
        length: Tokens of its prompt, and the most that prompt and generation can have.
        samples: How many answers it asks for.

    Raises:
        ValueError: an index that the prompt does not have, embeddings, more samples than one, or more than is allowed.
    """
    if ids is None:
        raise ValueError(
            "steer: steer_capture writes the tokens beside the rows, and this prompt is given as embeddings; send tokens"
        )
    if samples != 1:
        raise ValueError(
            f"steer: steer_capture with n={samples} would capture the prompt {samples} times; ask for one sample"
        )
    prompt, most = length
    for leaf in capture.selector.leaves:
        if isinstance(leaf, Window) and not range(*slice(leaf.first, leaf.stop).indices(prompt)):
            raise ValueError(
                f"steer: steer_capture_positions: the window {leaf} lies outside this prompt, which has {prompt} tokens"
            )
    try:
        asked = capture.most(prompt, most - 1)  # the last token of a text is never run
    except ValueError as reason:
        raise ValueError(f"steer: steer_capture_positions: {short(capture.positions)}: {reason}") from None
    if asked > settings.tokens:
        raise ValueError(
            f"steer: steer_capture may take {asked} tokens of this request, {prompt} of prompt and up to {most - prompt} new "
            f"ones; this engine captures at most {settings.tokens} of one: name fewer positions, or lower max_tokens"
        )
    if not asked:
        raise ValueError(f"steer: steer_capture_positions: {short(capture.positions)} names no token of this request")
    count = len(capture.points)
    if count * min(asked, settings.batch) > settings.rows:
        raise ValueError(
            f"steer: steer_capture may take {count * min(asked, settings.batch)} rows in one step ({count} places); this engine "
            f"has room for {settings.rows}: name fewer places or positions"
        )
    needed, room = count * asked * settings.width * DTYPES[capture.dtype].itemsize, settings.room - settings.used()
    if needed > room:
        raise ValueError(f"steer: steer_capture may take {needed} bytes; this engine has room for {max(room, 0)}")


def _points(places: Sequence[Place], after: bool, settings: CaptureSettings) -> tuple[Point, ...]:
    try:
        return tuple(settings.point(place, after) for place in places)
    except ValueError as reason:
        raise ValueError(f"steer: steer_capture: {reason}") from None


def _positions(fields: Mapping[str, Any]) -> str:
    positions = selector_of("steer_capture_positions", fields.get("steer_capture_positions", "all"))
    found = parse("steer: steer_capture_positions", positions)
    try:
        resolved(found, None)
    except ValueError:
        raise ValueError(
            f"steer: {short(positions)} names special tokens, which are not known here; name them with ids:"
        ) from None
    if found.remembers:
        raise ValueError(
            f"steer: {short(positions)} must know the tokens before each one, which is not kept inside vLLM; name tokens "
            "with ids:"
        )
    if most_pieces(found) > WIDTH:
        raise ValueError(
            f"steer: {short(positions)} may fall into {most_pieces(found)} pieces; at most {WIDTH} are possible"
        )
    return positions


def _one_of(field: str, fields: Mapping[str, Any], known: tuple[str, ...]) -> str:
    value = fields.get(field, known[0])
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"steer: {field} is {short(value)}; expected {' or '.join(map(repr, known))}")
    return value


def _bound(name: str) -> int:
    text = os.environ.get(name, str(_DEFAULTS[name]))
    if not text.isdecimal() or not int(text):
        raise ValueError(f"{name} is {text!r}; expected a whole number of at least 1")
    return int(text)
