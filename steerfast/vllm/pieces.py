"""A selector as an engine keeps it: disjoint pieces of a request's positions, each with the tokens that it looks for.

A row table gathers some columns of a few numbers per request, so a selector has to be brought into that form when the request
arrives. Between the ends of its windows all that the prompt decides is constant; what is left of it there, inside and outside
of the spans that earlier tokens open and close, is a set of token ids, or all but these.
"""

from __future__ import annotations

from typing import NamedTuple

from steerfast._positions import EVER, After, Between, Ids, Index, Leaf, Selector, Window, Word, out_of_range

Span = After | Between


class Piece(NamedTuple):
    """Positions [first, stop) whose token is among some ids, or is not; no ids and not among them: every token.

    And of these only what lies inside the spans that say True, and outside of those that say False.
    """

    first: int
    stop: int
    ids: tuple[int, ...] = ()
    among: bool = False
    spans: tuple[tuple[Span, bool], ...] = ()


def pieces(selector: Selector, prompt: int) -> tuple[Piece, ...]:
    """A selector as disjoint pieces in order, for a text without padding of which `prompt` tokens were given.

    Raises:
        ValueError: an index that the prompt does not have.
    """
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


def spans_of(selector: Selector) -> frozenset[Span]:
    """The leaves that must know the tokens before each one."""
    return frozenset(leaf for leaf in selector.leaves if isinstance(leaf, (After, Between)))


def _pieces(selector: Selector, prompt: int) -> tuple[Piece, ...]:
    named = {leaf: set(leaf.ids) for leaf in selector.leaves if isinstance(leaf, Ids)}
    spans = sorted(spans_of(selector), key=str)
    ends = {0, max(prompt - 1, 0), prompt}
    ranges: dict[Leaf, range] = {}
    for leaf in selector.leaves - named.keys() - set(spans):
        ranges[leaf] = _range(leaf, prompt)
        ends |= {ranges[leaf].start, ranges[leaf].stop}
    kinds: dict[frozenset[Leaf], list[int]] = {frozenset(): []}  # the leaves that name a token, to these tokens
    for token in sorted(set().union(*named.values())):
        kinds.setdefault(frozenset(leaf for leaf, ids in named.items() if token in ids), []).append(token)
    found: list[Piece] = []
    bounds = sorted(end for end in ends if end < EVER)
    for first, stop in zip(bounds, [*bounds[1:], EVER], strict=True):
        on = frozenset(leaf for leaf, where in ranges.items() if first in where)
        for ids, among, inside in _looked(selector, on, kinds, spans):
            before = next((one for one in found if one[1:] == (first, ids, among, inside)), None)
            if before is not None:
                found.remove(before)
            found.append(Piece(first if before is None else before.first, stop, ids, among, inside))
    return tuple(found)


_Looked = list[tuple[tuple[int, ...], bool, tuple[tuple[Span, bool], ...]]]


def _looked(
    selector: Selector, on: frozenset[Leaf], kinds: dict[frozenset[Leaf], list[int]], spans: list[Span]
) -> _Looked:
    """(ids, among, spans) of what acts where the prompt's part is decided: no two of them at once on a token."""
    if spans:
        span, *others = spans
        inside, outside = (_looked(selector, leaves, kinds, others) for leaves in (on | {span}, on))
        if inside == outside:
            return inside
        each = ((part, (span, where)) for where, parts in ((True, inside), (False, outside)) for part in parts)
        return [(ids, among, (more, *rest)) for (ids, among, rest), more in each]
    acts = {
        kind: any(all((f.leaf in on or f.leaf in kind) != f.negated for f in term) for term in selector.terms)
        for kind in kinds
    }
    among = not acts[frozenset()]  # most tokens are in no list
    ids = tuple(sorted(token for kind, tokens in kinds.items() if acts[kind] == among for token in tokens))
    return [] if among and not ids else [(ids, among, ())]


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
