"""A selector as an engine keeps it: disjoint pieces of a request's positions, each with the tokens that it looks for.

A row table gathers four columns of a few numbers per request, so a selector has to be brought into that form when the request
arrives. Between the ends of its windows all that the prompt decides is constant; what is left of it there is a set of
token ids, or all but these.
"""

from __future__ import annotations

from typing import NamedTuple

from steerfast._positions import EVER, Ids, Index, Leaf, Selector, Window, Word, out_of_range


class Piece(NamedTuple):
    """Positions [first, stop) whose token is among some ids, or is not; no ids and not among them: every token."""

    first: int
    stop: int
    ids: tuple[int, ...] = ()
    among: bool = False


def pieces(selector: Selector, prompt: int) -> tuple[Piece, ...]:
    """A selector as disjoint pieces in order, for a text without padding of which `prompt` tokens were given.

    Raises:
        ValueError: an index that the prompt does not have, or a leaf that must know earlier tokens.
    """
    if selector.remembers:
        raise ValueError(f"{str(selector)!r} must know the tokens before each one")
    if (outside := out_of_range(selector, prompt)) is not None:
        raise ValueError(f"position {outside} is out of range; this prompt has {prompt} tokens, 0 to {prompt - 1}")
    return _pieces(selector, prompt)


def most_pieces(selector: Selector) -> int:
    """How many pieces a selector can have, whatever the prompt's length."""
    front, back = {0}, {0, 1}  # the ends that are counted from either side; of the words 0, P - 1 and P
    for leaf in selector.leaves:
        ends: tuple[int | None, ...] = (leaf.at, leaf.at + 1) if isinstance(leaf, Index) else ()
        ends = (leaf.first, leaf.stop) if isinstance(leaf, Window) else ends
        front |= {end for end in ends if end is not None and end >= 0}
        back |= {-end for end in ends if end is not None and end <= 0}
    # The order of all ends changes only where one that is counted from the front meets one from the back.
    lengths = {one + other + step for one in front for other in back for step in (-1, 0, 1)}
    return max(len(_pieces(selector, length)) for length in lengths if length > 0)


def _pieces(selector: Selector, prompt: int) -> tuple[Piece, ...]:
    named = {leaf: set(leaf.ids) for leaf in selector.leaves if isinstance(leaf, Ids)}
    ends = {0, max(prompt - 1, 0), prompt}
    ranges: dict[Leaf, range] = {}
    for leaf in selector.leaves - named.keys():
        ranges[leaf] = _range(leaf, prompt)
        ends |= {ranges[leaf].start, ranges[leaf].stop}
    kinds: dict[frozenset[Leaf], list[int]] = {frozenset(): []}  # the leaves that name a token, to these tokens
    for token in sorted(set().union(*named.values())):
        kinds.setdefault(frozenset(leaf for leaf, ids in named.items() if token in ids), []).append(token)
    found: list[Piece] = []
    bounds = sorted(end for end in ends if end < EVER)
    for first, stop in zip(bounds, [*bounds[1:], EVER], strict=True):
        on = {leaf for leaf, where in ranges.items() if first in where}
        acts = {
            kind: any(all((f.leaf in on or f.leaf in kind) != f.negated for f in term) for term in selector.terms)
            for kind in kinds
        }
        among = not acts[frozenset()]  # most tokens are in no list
        ids = tuple(sorted(token for kind, tokens in kinds.items() if acts[kind] == among for token in tokens))
        if among and not ids:
            continue
        if found and found[-1][1:] == (first, ids, among):
            first = found.pop().first
        found.append(Piece(first, stop, ids, among))
    return tuple(found)


def _range(leaf: Leaf, prompt: int) -> range:
    """The positions of a leaf that the prompt decides."""
    if isinstance(leaf, Index):
        at = leaf.at if leaf.at >= 0 else prompt + leaf.at
        return range(at, at + 1) if 0 <= at < prompt else range(0)
    if isinstance(leaf, Window):
        return range(*slice(leaf.first, leaf.stop).indices(prompt))
    first = {"all": 0, "prompt": 0, "generated": prompt, "last": max(prompt - 1, 0)}
    if not isinstance(leaf, Word):
        raise ValueError(f"{leaf} is decided by tokens")
    return range(first[leaf.name], prompt if leaf.name == "prompt" else EVER)
