"""What a client may say: flat fields in `SamplingParams.extra_args`, or `vllm_xargs` over HTTP, and nothing else.

| field | meaning |
|---|---|
| `steer` | a plan's name, or a list of them, applied left to right; `[]`: this request is not steered |
| `steer_strength` | a number, or one per plan, multiplying every edit of that plan (for a flow its T); default 1 |
| `steer_positions` | a selector (`steerfast._positions`) for all of them; default: what each plan says |

Names are looked up among the plans that the server has loaded: no path and nothing executable crosses the wire.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from steerfast._checks import MAX_SLOTS_PER_ROW
from steerfast._positions import Selector, allowed, parse, resolved

from .pieces import Piece, most_pieces, pieces
from .plans import Library, ServedPlan

FIELDS = ("steer", "steer_strength", "steer_positions")
LONGEST = 500
"""Characters of a selector, and"""
MOST = 8
"""its parts: what a client sends is read in some milliseconds."""
LARGEST_STRENGTH = 65504.0  # the largest float16: beyond it some engine dtype overflows


@dataclass(frozen=True, eq=False)
class Part:
    """One plan of a request, with its strength and positions."""

    served: ServedPlan
    strength: float
    positions: str

    @property
    def selector(self) -> Selector:
        """Its positions as a tree, what the plan calls special among them."""
        return resolved(parse("steer: steer_positions", self.positions), self.served.special)

    def pieces(self, prompt: int) -> tuple[Piece, ...]:
        """The positions it acts on, given the prompt's length in tokens."""
        if all(self.served.columns):
            return (Piece(0, min(self.served.by_token, prompt)),)
        return pieces(self.selector, prompt)

    def count(self, ids: Sequence[int], computed: int, prompt: int) -> int:
        """How many of the first `computed` tokens it acts on."""
        where = self.pieces(prompt)
        if any(piece.ids for piece in where):
            return int(allowed(self.selector, ids[:computed], prompt).sum())
        return sum(max(min(piece.stop, computed) - piece.first, 0) for piece in where)


def steer_fields(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields that speak of steering, known or not."""
    return {key: value for key, value in (given or {}).items() if str(key).startswith("steer")}


def read(given: Mapping[str, Any] | None, library: Library, default: tuple[Part, ...] = ()) -> tuple[Part, ...]:
    """The plans that a request asks for; `default` where it does not speak of steering.

    Raises:
        ValueError: an unknown field or plan, a malformed value; the message says what was expected.
    """
    fields = steer_fields(given)
    if not fields:
        return default
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ValueError(f"steer: unknown field {_short(unknown[0])}; the fields are {', '.join(FIELDS)}")
    if "steer" not in fields:
        raise ValueError(f"steer: {next(iter(fields))} is given without steer; name the plans it is about")
    names = _names(fields["steer"])
    strengths = _strengths(fields.get("steer_strength", 1.0), len(names))
    positions = fields.get("steer_positions")
    if positions is not None:
        positions = _selector(positions)
    parts = tuple(
        Part(served := _served(name, library), strength, _positions(served, positions))
        for name, strength in zip(names, strengths, strict=True)
    )
    applied = sum(len(part.served.columns) for part in parts)
    if applied > MAX_SLOTS_PER_ROW:
        raise ValueError(
            f"steer: these plans apply {applied} interventions to a token; at most {MAX_SLOTS_PER_ROW} are possible: name fewer"
        )
    for part in parts:
        _check_followed(part)
    columns = sum(1 if tokens else _most_pieces(part.selector) for part in parts for tokens in part.served.columns)
    if columns > MAX_SLOTS_PER_ROW:
        split = max(parts, key=lambda part: _most_pieces(part.selector))
        raise ValueError(
            f"steer: {_short(split.positions)} may fall into {_most_pieces(split.selector)} pieces, each of which takes the room "
            f"of an intervention: {columns} in all, at most {MAX_SLOTS_PER_ROW} are possible"
        )
    return parts


def check_prompt(parts: tuple[Part, ...], ids: Sequence[int] | None, length: int) -> None:
    """Refuse what only a request's prompt shows.

    Raises:
        ValueError: an index that it does not have, or token ids that it does not show.
    """
    for part in parts:
        if ids is None and part.selector.reads_tokens:
            raise ValueError(
                f"steer: {_short(part.positions)} looks at token ids, and this prompt is given as embeddings; send tokens"
            )
        try:
            part.pieces(length)
        except ValueError as reason:
            raise ValueError(f"steer: {_short(part.positions)}: {reason}") from None


def salt(given: str | None, parts: tuple[Part, ...], prompt: int) -> str:
    """The key under which the engine may share this request's keys and values: its own salt and all that steers it."""
    steering = [(p.served.fingerprint, p.strength, p.positions, min(p.served.by_token, prompt)) for p in parts]
    return "steerfast:" + hashlib.sha256(json.dumps([given, steering]).encode()).hexdigest()


def _selector(value: Any) -> str:
    """A client's positions as a selector is written."""
    if not isinstance(value, str) or len(value) > LONGEST:
        raise ValueError(
            f"steer: steer_positions is {_short(value)}; expected one selector, up to {LONGEST} characters"
        )
    selector = parse("steer: steer_positions", value)
    if len(selector.leaves) > MOST:
        raise ValueError(f"steer: steer_positions joins {len(selector.leaves)} selectors; at most {MOST} are possible")
    return str(selector)


def _check_followed(part: Part) -> None:
    try:
        selector = part.selector
    except ValueError as reason:
        raise ValueError(f"steer: the plan {_short(part.served.name)}: {reason}") from None
    if selector.remembers:
        raise ValueError(
            f"steer: {_short(part.positions)} must know the tokens before each one, which is not kept inside vLLM; name "
            "tokens with ids:, or use sf.steer"
        )


@lru_cache(maxsize=1024)
def _most_pieces(selector: Selector) -> int:
    return most_pieces(selector)


def _names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"steer: steer is {_short(value)}; expected a plan's name or a list of names")
    if len(names) > MAX_SLOTS_PER_ROW:
        raise ValueError(f"steer: steer names {len(names)} plans; at most {MAX_SLOTS_PER_ROW} can act on a token")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"steer: a plan's name is {_short(name)}; expected text")
    return list(names)


def _strengths(value: Any, count: int) -> list[float]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"steer: steer_strength has {len(values)} numbers for {count} plans; give one per plan")
    return [_strength(number) for number in values]


def _strength(value: Any) -> float:
    # The bound is compared before the conversion, which a whole number of 400 digits would not survive.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"steer: steer_strength is {_short(value)}; expected a number")
    if (isinstance(value, float) and not math.isfinite(value)) or not -LARGEST_STRENGTH <= value <= LARGEST_STRENGTH:
        raise ValueError(
            f"steer: steer_strength is {_short(value)}; expected a finite number, at most {LARGEST_STRENGTH:g} in size"
        )
    return float(value)


def _served(name: str, library: Library) -> ServedPlan:
    if name in library.refused:
        raise ValueError(f"steer: the plan {_short(name)} cannot be used: {library.refused[name]}")
    if name not in library.plans:
        raise ValueError(f"steer: there is no plan {_short(name)}; this engine has {len(library.plans)} plans")
    return library.plans[name]


def _positions(served: ServedPlan, positions: str | None) -> str:
    chosen = served.positions if positions is None else positions
    if chosen is None:
        raise ValueError(
            f"steer: the plan {_short(served.name)} has a mask as its positions, which a server does not follow; give "
            "steer_positions"
        )
    if served.by_token and chosen != "all":
        raise ValueError(
            f"steer: the plan {_short(served.name)} adds a row of its own to each of a prompt's first tokens, so "
            f"steer_positions={_short(positions)} cannot be followed; leave them out"
        )
    return chosen


def _short(value: Any) -> str:
    """A client's value in a message: never longer than a line, whatever was sent."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
