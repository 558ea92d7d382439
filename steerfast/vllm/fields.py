"""The flat fields that a client may send, and how a name, a list of them and a selector are read from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerfast._positions import parse

PLANS = ("steer", "steer_strength", "steer_positions")
"""What a request says of plans, and"""
PROBES = ("steer_read", "steer_read_positions", "steer_read_what", "steer_abort")
"""of probes, and"""
CAPTURES = ("steer_capture", "steer_capture_positions", "steer_capture_edits", "steer_capture_dtype")
"""of the stream itself."""
FIELDS = PLANS + PROBES + CAPTURES
LONGEST = 500
"""Characters of a selector, and"""
MOST = 8
"""its parts: what a client sends is read in some milliseconds."""


def steer_fields(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields that speak of steering, known or not."""
    return {key: value for key, value in (given or {}).items() if str(key).startswith("steer")}


def names_of(field: str, what: str, value: Any, most: int) -> list[str]:
    """A name or a list of names.

    Args:
        field: Where it stands.
        what: What is named, in a word.
        value: What the client sent.
        most: How many names there may be.

    Raises:
        ValueError: it is something else.
    """
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)):
        raise ValueError(f"steer: {field} is {short(value)}; expected a {what}'s name or a list of names")
    if len(names) > most:
        raise ValueError(f"steer: {field} names {len(names)} {what}s; at most {most} can act on a token")
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"steer: a {what}'s name is {short(name)}; expected text")
    return list(names)


def selector_of(field: str, value: Any) -> str:
    """A client's positions as a selector is written.

    Raises:
        ValueError: they are none, or longer than what is read.
    """
    if not isinstance(value, str) or len(value) > LONGEST:
        raise ValueError(f"steer: {field} is {short(value)}; expected one selector, up to {LONGEST} characters")
    found = parse(f"steer: {field}", value)
    if len(found.leaves) > MOST:
        raise ValueError(f"steer: {field} joins {len(found.leaves)} selectors; at most {MOST} are possible")
    return str(found)


def short(value: Any) -> str:
    """A client's value in a message: never longer than a line, whatever was sent."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."
