"""What a client may say of plans: flat fields in `SamplingParams.extra_args`, or `vllm_xargs` over HTTP, and nothing else.

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

from steerfast._positions import Selector, allowed, parse, resolved

from .fields import FIELDS, PLANS, names_of, selector_of, short, steer_fields
from .pieces import Piece, Span, most_pieces, pieces, spans_of
from .plans import Library, ServedPlan
from .table import SPANS

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

    def acting(self, prompt: int) -> list[Piece]:
        """The same of each of the plan's interventions, where they differ: one after the other, not disjoint."""
        by_token = {Piece(0, min(tokens, prompt)) for tokens in self.served.columns if tokens}
        return [*sorted(by_token), *(() if all(self.served.columns) else self.pieces(prompt))]

    def count(self, ids: Sequence[int], computed: int, prompt: int) -> int:
        """How many of the first `computed` tokens it acts on."""
        where = self.pieces(prompt)
        if any(piece.ids or piece.spans for piece in where):
            return int(allowed(self.selector, ids[:computed], prompt).sum())
        return sum(max(min(piece.stop, computed) - piece.first, 0) for piece in where)


def read(given: Mapping[str, Any] | None, library: Library, default: tuple[Part, ...] = ()) -> tuple[Part, ...]:
    """The plans that a request asks for; `default` where it does not speak of steering.

    Raises:
        ValueError: an unknown field or plan, a malformed value; the message says what was expected.
    """
    fields = steer_fields(given)
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ValueError(f"steer: unknown field {short(unknown[0])}; the fields are {', '.join(FIELDS)}")
    fields = {name: value for name, value in fields.items() if name in PLANS}
    if not fields:
        return default
    if "steer" not in fields:
        raise ValueError(f"steer: {next(iter(fields))} is given without steer; name the plans it is about")
    names = names_of("steer", "plan", fields["steer"], library.width)
    strengths = _strengths(fields.get("steer_strength", 1.0), len(names))
    positions = fields.get("steer_positions")
    if positions is not None:
        positions = selector_of("steer_positions", positions)
    parts = tuple(
        Part(served := _served(name, library), strength, _positions(served, positions))
        for name, strength in zip(names, strengths, strict=True)
    )
    applied = sum(len(part.served.columns) for part in parts)
    if applied > library.width:
        raise ValueError(
            f"steer: these plans apply {applied} interventions to a token; at most {library.width} are possible: name fewer, or "
            "start the engine with a larger STEERFAST_COLUMNS"
        )
    for part in parts:
        _check_followed(part)
    _check_order(parts)
    spans = frozenset[Span]().union(*(spans_of(part.selector) for part in parts))
    if len(spans) > SPANS:
        raise ValueError(
            f"steer: the positions name {len(spans)} different after: and between:; at most {SPANS} can be followed in a request"
        )
    columns = sum(1 if tokens else _most_pieces(part.selector) for part in parts for tokens in part.served.columns)
    if columns > library.width:
        split = max(parts, key=lambda part: _most_pieces(part.selector))
        raise ValueError(
            f"steer: {short(split.positions)} may fall into {_most_pieces(split.selector)} pieces, each of which takes the room "
            f"of an intervention: {columns} in all, at most {library.width} are possible (STEERFAST_COLUMNS)"
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
                f"steer: {short(part.positions)} looks at token ids, and this prompt is given as embeddings; send tokens"
            )
        try:
            part.pieces(length)
        except ValueError as reason:
            raise ValueError(f"steer: {short(part.positions)}: {reason}") from None


SALT = "steerfast:"
"""What the cache salts of steered requests begin with."""


def salt(given: str | None, parts: tuple[Part, ...], prompt: int) -> str:
    """The cache salt of a request: its own, and what acts on it where.

    As it is, it lets only those share keys and values who are steered alike to the end, prompts of one length where that matters.
    `key_of` takes it apart, so that blocks are shared as far as the same acts on them.
    """
    acts = [
        [
            (part.served.fingerprint, part.strength, prompt if part.served.gated else None),
            [(first, stop, json.dumps(what, default=str)) for first, stop, *what in part.acting(prompt)],
        ]
        for part in parts
        if part.strength
    ]
    return SALT + json.dumps([given, acts])


def key_of(salt: str, start: int, stop: int) -> tuple[str | None, str | None]:
    """A request's own salt, and what acts on positions [start, stop) of it; None for neither."""
    given, acts = _salted(salt)
    here = []
    for who, where in acts:
        inside = [(max(a, start) - start, min(b, stop) - start, what) for a, b, what in where if a < stop and b > start]
        if inside:
            here.append((who, tuple(inside)))
    return given, _digest(tuple(here)) if here else None


@lru_cache(maxsize=1024)
def _salted(salt: str) -> tuple[str | None, list[tuple[tuple[Any, ...], list[Any]]]]:
    given, acts = json.loads(salt.removeprefix(SALT))
    return given, [(tuple(who), where) for who, where in acts]


@lru_cache(maxsize=4096)
def _digest(acting: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps(acting).encode()).hexdigest()


def _check_followed(part: Part) -> None:
    try:
        _ = part.selector
    except ValueError as reason:
        raise ValueError(f"steer: the plan {short(part.served.name)}: {reason}") from None


def _check_order(parts: Sequence[Part]) -> None:
    for at, part in enumerate(parts):
        for other in parts[at + 1 :]:
            layer = part.served.overtakes(other.served)
            if layer is not None:
                raise ValueError(
                    f"steer: {short(part.served.name)} edits resid_pre {layer + 1}, which comes behind resid_post {layer} that "
                    f"{short(other.served.name)} edits, and inside vLLM both act at once, in the order in which they are named: "
                    f"name {short(part.served.name)} last, or make one plan of both"
                )


@lru_cache(maxsize=1024)
def _most_pieces(selector: Selector) -> int:
    return most_pieces(selector)


def _strengths(value: Any, count: int) -> list[float]:
    values = list(value) if isinstance(value, (list, tuple)) else [value] * count
    if len(values) != count:
        raise ValueError(f"steer: steer_strength has {len(values)} numbers for {count} plans; give one per plan")
    return [_strength(number) for number in values]


def _strength(value: Any) -> float:
    # The bound is compared before the conversion, which a whole number of 400 digits would not survive.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"steer: steer_strength is {short(value)}; expected a number")
    if (isinstance(value, float) and not math.isfinite(value)) or not -LARGEST_STRENGTH <= value <= LARGEST_STRENGTH:
        raise ValueError(
            f"steer: steer_strength is {short(value)}; expected a finite number, at most {LARGEST_STRENGTH:g} in size"
        )
    return float(value)


def _served(name: str, library: Library) -> ServedPlan:
    if name in library.refused:
        raise ValueError(f"steer: the plan {short(name)} cannot be used: {library.refused[name]}")
    if name not in library.plans:
        raise ValueError(f"steer: there is no plan {short(name)}; this engine has {len(library.plans)} plans")
    return library.plans[name]


def _positions(served: ServedPlan, positions: str | None) -> str:
    chosen = served.positions if positions is None else positions
    if chosen is None:
        raise ValueError(
            f"steer: the plan {short(served.name)} has a mask as its positions, which a server does not follow; give "
            "steer_positions"
        )
    if served.by_token and chosen != "all":
        raise ValueError(
            f"steer: the plan {short(served.name)} adds a row of its own to each of a prompt's first tokens, so "
            f"steer_positions={short(positions)} cannot be followed; leave them out"
        )
    return chosen
