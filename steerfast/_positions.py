"""The language of `positions=`: one flat string, the same in hooks and in an engine, as a small frozen tree.

| selector | positions of a row, padding never among them |
|---|---|
| `all` `prompt` `generated` `last` | all; below P, the prompt's length; from P on; from the last prompt token on |
| `-1` `5`, `0:8` `-4:` | an index or a slice of the prompt's real tokens |
| `ids:5,7` | whose input token is one of these |
| `special` | whose input token is a special one; the plan says which these are |
| `after:ids:5` | behind the first of these tokens |
| `between:ids:5..7` | from each 5 to the next 7, both included; to the end where no 7 follows |

`!` negates one selector, `&` binds before `|`; there are no brackets. A position sees the tokens up to itself and no later
one, so that a selector means the same in one pass over a text and token by token.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

WORDS = ("all", "prompt", "generated", "last")
GRAMMAR = (
    "all, prompt, generated, last, special, an index (-1), a window (0:8), ids:5,7, after:ids:5 or between:ids:5..7, "
    "joined by ! & |"
)
EVER = 2**31 - 1
"""Beyond the last position of any row, and the largest number in a selector."""
_NUMBER = re.compile(r"-?[0-9]{1,10}")
_WINDOW = re.compile(r"(-?[0-9]{1,10})?:(-?[0-9]{1,10})?")
_TOKENS = r"[0-9]{1,10}(?:,[0-9]{1,10})*"
_IDS = re.compile(rf"(ids|after:ids):({_TOKENS})")
_BETWEEN = re.compile(rf"between:ids:({_TOKENS})\.\.({_TOKENS})")


@dataclass(frozen=True)
class Word:
    """All, prompt, generated or last."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Index:
    """One of the prompt's real tokens."""

    at: int

    def __str__(self) -> str:
        return str(self.at)


@dataclass(frozen=True)
class Window:
    """A slice of the prompt's real tokens."""

    first: int | None
    stop: int | None

    def __str__(self) -> str:
        return f"{'' if self.first is None else self.first}:{'' if self.stop is None else self.stop}"


@dataclass(frozen=True)
class Ids:
    """Every position whose input token is one of these."""

    ids: tuple[int, ...]

    def __str__(self) -> str:
        return f"ids:{_joined(self.ids)}"


@dataclass(frozen=True)
class Special:
    """Every position whose input token is a special one; `resolved` says which those are."""

    def __str__(self) -> str:
        return "special"


@dataclass(frozen=True)
class After:
    """Every position behind the first of these tokens."""

    ids: tuple[int, ...]

    def __str__(self) -> str:
        return f"after:ids:{_joined(self.ids)}"


@dataclass(frozen=True)
class Between:
    """From each opening token to the next closing one, both included."""

    opens: tuple[int, ...]
    closes: tuple[int, ...]

    def __str__(self) -> str:
        return f"between:ids:{_joined(self.opens)}..{_joined(self.closes)}"


Leaf = Word | Index | Window | Ids | Special | After | Between


@dataclass(frozen=True)
class Factor:
    """A leaf, or all positions but its own."""

    leaf: Leaf
    negated: bool = False

    def __str__(self) -> str:
        return f"{'!' if self.negated else ''}{self.leaf}"


@dataclass(frozen=True)
class Selector:
    """Any of several terms, each of which is all of several factors."""

    terms: tuple[tuple[Factor, ...], ...]

    def __str__(self) -> str:
        return " | ".join(" & ".join(map(str, term)) for term in self.terms)

    @property
    def leaves(self) -> frozenset[Leaf]:
        """The leaves, each once."""
        return frozenset(factor.leaf for term in self.terms for factor in term)

    @property
    def needs_length(self) -> bool:
        """Whether it asks where the prompt ends, or where its real tokens are."""
        return any(isinstance(leaf, (Word, Index, Window)) and leaf != ALL for leaf in self.leaves)

    @property
    def needs_end(self) -> bool:
        """Whether it means other tokens of a text where more of it is the prompt; a place counted from the start does not."""
        counted = [leaf for leaf in self.leaves if isinstance(leaf, (Word, Index, Window)) and leaf != ALL]
        return any(not isinstance(leaf, Index) or leaf.at < 0 for leaf in counted)

    @property
    def reads_tokens(self) -> bool:
        """Whether it looks at token ids."""
        return any(isinstance(leaf, (Ids, Special, After, Between)) for leaf in self.leaves)

    @property
    def remembers(self) -> bool:
        """Whether it looks at the ids of earlier tokens, too."""
        return any(isinstance(leaf, (After, Between)) for leaf in self.leaves)


ALL = Word("all")
T = TypeVar("T")


def parse(owner: str, text: str) -> Selector:
    """The tree of a selector.

    Args:
        owner: What the text was given as, for the message.
        text: The selector.

    Raises:
        ValueError: the text is no selector; the message repeats it and lists the grammar.
    """
    try:
        return _parsed(text)
    except ValueError as reason:
        raise ValueError(f"{owner} is {_short(text)}{reason}; expected {GRAMMAR}") from None


@lru_cache(maxsize=1024)
def _parsed(text: str) -> Selector:
    return Selector(tuple(tuple(_factor(factor, text) for factor in term.split("&")) for term in text.split("|")))


def _factor(given: str, text: str) -> Factor:
    bare = given.strip()
    atom = bare.lstrip("! \t\n")
    return Factor(_leaf(re.sub(r"\s*([,:])\s*", r"\1", atom), text), bare[: len(bare) - len(atom)].count("!") % 2 == 1)


def _leaf(atom: str, text: str) -> Leaf:
    if atom in WORDS:
        return Word(atom)
    if atom == "special":
        return Special()
    if _NUMBER.fullmatch(atom):
        return Index(_number(atom))
    if found := _WINDOW.fullmatch(atom):
        first, stop = (None if end is None else _number(end) for end in found.groups())
        return Window(first, stop)
    if found := _IDS.fullmatch(atom):
        return (Ids if found[1] == "ids" else After)(_tokens(found[2]))
    if found := _BETWEEN.fullmatch(atom):
        opens, closes = _tokens(found[1]), _tokens(found[2])
        if both := sorted({*opens} & {*closes}):
            raise ValueError(f", where {both[0]} both opens and closes")
        return Between(opens, closes)
    raise ValueError(
        "" if atom == text.strip() else f", where {_short(atom)} is no selector" if atom else ", where one is missing"
    )


def _number(text: str) -> int:
    if not -EVER <= (number := int(text)) <= EVER:
        raise ValueError(f", where {number} is beyond any position")
    return number


def _tokens(text: str) -> tuple[int, ...]:
    """Token ids, each once, in order: equal sets are equal text."""
    return tuple(sorted({_number(number) for number in text.split(",")}))


def _joined(ids: Iterable[int]) -> str:
    return ",".join(map(str, ids))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


# --- what a user passes ------------------------------------------------------------------------------------------------


def normal(owner: str, value: Any) -> str | tuple[int, ...] | Tensor:
    """Positions as given, in one of three forms: a selector as it is written here, a tuple of indices, a bool mask.

    Raises:
        TypeError, ValueError: they are of no such form.
    """
    if isinstance(value, str):
        return str(parse(owner, value))
    if isinstance(value, slice):
        return _window(owner, value)
    if isinstance(value, np.ndarray):
        value = (
            torch.from_numpy(value)
            if value.dtype == np.bool_
            else value.tolist()
            if value.dtype.kind in "iu"
            else value
        )
    if isinstance(value, Tensor):
        if value.dtype == torch.bool and value.dim() in (1, 2):
            return value.detach().cpu().clone()
        if value.dtype == torch.bool or value.is_floating_point() or value.is_complex() or value.dim() > 1:
            raise TypeError(
                f"{owner} as a mask must be bool, (tokens,) or (batch, tokens); got {value.dtype} {tuple(value.shape)}"
            )
        value = value.tolist()
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return (int(value),)
    if isinstance(value, Sequence) and value and all(_whole(one) for one in value):
        return tuple(int(one) for one in value)
    raise TypeError(f"{owner} is {_short(value)}; expected a list of whole numbers, a bool mask, or one of {GRAMMAR}")


def special_ids(owner: str, value: Any) -> tuple[int, ...] | None:
    """The ids of special tokens: given, or those of a tokenizer, chat markers that it marks as special among them.

    Raises:
        TypeError, ValueError: it is neither a tokenizer nor a list of ids, or there are none.
    """
    if value is None:
        return None
    source = getattr(value, "tokenizer", value)  # of a processor
    if hasattr(source, "all_special_ids"):
        added = getattr(source, "added_tokens_decoder", {})
        ids = [
            *source.all_special_ids,
            *(number for number, token in added.items() if getattr(token, "special", False)),
        ]
    else:
        ids = value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value
        ids = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else [None]
        if not all(_whole(one) and one >= 0 for one in ids):
            raise TypeError(f"{owner} is {_short(value)}; expected a tokenizer or a list of token ids")
    if not ids:
        raise ValueError(f"{owner} names no token; leave it out, or list the ids")
    return tuple(sorted({int(one) for one in ids}))


def resolved(selector: Selector, special: tuple[int, ...] | None) -> Selector:
    """The selector with `special` read as these ids.

    Raises:
        ValueError: it names `special`, and its ids are not given.
    """
    if Special() not in selector.leaves:
        return selector
    if special is None:
        raise ValueError(
            f'positions={str(selector)!r} names "special", and a model does not say which tokens are (chat markers, for one): '
            "give the plan special=, a tokenizer or the ids"
        )
    known = Ids(special)
    return Selector(
        tuple(tuple(Factor(known, f.negated) if f.leaf == Special() else f for f in term) for term in selector.terms)
    )


def as_selector(positions: tuple[int, ...]) -> Selector:
    """Indices as a selector."""
    return Selector(tuple((Factor(Index(at)),) for at in dict.fromkeys(positions)))


def _window(owner: str, given: slice) -> str:
    if given.step not in (None, 1):
        raise ValueError(f"{owner} is {given}; a window has no step: list the positions, or give a bool mask")
    try:
        first, stop = (None if end is None else operator.index(end) for end in (given.start, given.stop))
    except TypeError:
        raise TypeError(f"{owner} is {given}; a window has whole numbers as its ends") from None
    return str(parse(owner, str(Window(first, stop))))


def _whole(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_floating_point() and value.dtype != torch.bool
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


# --- what a selector says ----------------------------------------------------------------------------------------------


def evaluate(selector: Selector, value_of: Callable[[Leaf], T]) -> T:
    """The selector over anything that knows & | ~, such as bool tensors; every leaf is asked for once."""
    values = {leaf: value_of(leaf) for leaf in sorted(selector.leaves, key=str)}
    result = None
    for term in selector.terms:
        part = None
        for factor in term:
            value: Any = values[factor.leaf]
            value = ~value if factor.negated else value
            part = value if part is None else part & value
        result = part if result is None else result | part
    return result  # type: ignore[return-value]  # there is a term, and a factor in each


def beyond(selector: Selector) -> Selector | bool:
    """What is left of it for generated tokens, where all that the prompt decides is known: a constant, or what tokens say."""
    terms = []
    for term in selector.terms:
        kept = []
        for factor in term:
            if isinstance(factor.leaf, (Ids, Special, After, Between)):
                kept.append(factor)
            elif (factor.leaf in _GOES_ON) == factor.negated:
                break  # never
        else:
            if not kept:
                return True
            terms.append(tuple(kept))
    return Selector(tuple(terms)) if terms else False


_GOES_ON = {ALL, Word("generated"), Word("last")}


def out_of_range(selector: Selector, count: int) -> int | None:
    """An index that a prompt of `count` real tokens does not have."""
    indices = (leaf.at for leaf in selector.leaves if isinstance(leaf, Index))
    return next((at for at in sorted(indices) if not -count <= at < count), None)


def placed(leaf: Leaf, real: Tensor, start: int, length: int, front: int = 0) -> Tensor:
    """bool (length + 1,): where a leaf holds that the prompt decides; the last entry stands for every later position.

    Args:
        leaf: A word, an index within the prompt, or a window.
        real: The positions of the prompt's real tokens, in order.
        start: The first generated position.
        length: How many positions are told apart.
        front: How many of them stand in front of the prompt.
    """
    here = torch.arange(length + 1, device="cpu")
    if isinstance(leaf, Word):
        last = int(real[-1]) if real.numel() else start
        first = {"all": 0, "prompt": 0, "generated": start, "last": last}[leaf.name]
        if leaf.name == "prompt":
            return (here >= front) & (here < start) & (here < length)
        return (here >= first) | (here == length)
    chosen = torch.zeros(length + 1, dtype=torch.bool, device="cpu")
    if isinstance(leaf, Index):
        chosen[real[leaf.at]] = True
    elif isinstance(leaf, Window):
        chosen[real[leaf.first : leaf.stop]] = True
    return chosen


def spans(opens: Tensor, closes: Tensor | None, before: Tensor) -> tuple[Tensor, Tensor]:
    """Where a span is open, given where one may begin and end.

    Args:
        opens: bool (batch, tokens), where a span begins.
        closes: Where one ends; None: nowhere.
        before: bool (batch,), whether one is open before the first token.

    Returns:
        (before each token, behind each token): whether a span is open, bool (batch, tokens).
    """
    if closes is None:
        behind = (opens.long().cumsum(1) > 0) | before[:, None]
    elif opens.shape[1] == 1:
        behind = opens | (before[:, None] & ~closes)
    else:
        here = torch.arange(1, opens.shape[1] + 1, device=opens.device).expand_as(opens)
        opened = torch.where(opens, here, before[:, None].long() - 1).cummax(1).values
        behind = opened > torch.where(closes, here, -1).cummax(1).values
    return torch.cat([before[:, None], behind[:, :-1]], 1), behind


def told(
    leaf: Ids | After | Between, among: Callable[[tuple[int, ...]], Tensor], before: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Where a leaf holds that token ids decide, and whether it is open behind each token.

    Args:
        leaf: Which one.
        among: Gives bool (batch, tokens): whose id is among these; padding never is.
        before: bool (batch,), whether the leaf is open before the first token; `Ids` asks for none.
    """
    if isinstance(leaf, Ids):
        return among(leaf.ids), None
    if before is None:
        raise RuntimeError(f"{leaf} cannot be told without the tokens before")
    if isinstance(leaf, After):
        return spans(among(leaf.ids), None, before)
    opens = among(leaf.opens)
    inside, behind = spans(opens, among(leaf.closes), before)
    return inside | opens, behind


def allowed(selector: Selector, ids: Sequence[int], prompt: int) -> Tensor:
    """bool (tokens,): the positions that a selector names in a text without padding, of which `prompt` tokens were given.

    Raises:
        ValueError: an index that the prompt does not have.
    """
    if (outside := out_of_range(selector, prompt)) is not None:
        raise ValueError(f"position {outside} is out of range; the prompt has {prompt} tokens, 0 to {prompt - 1}")
    tokens, real = torch.as_tensor(ids, dtype=torch.int64)[None], torch.arange(prompt, device="cpu")

    def value_of(leaf: Leaf) -> Tensor:
        if isinstance(leaf, (Word, Index, Window)):
            return placed(leaf, real, prompt, max(prompt, len(ids)))[: len(ids)]
        if isinstance(leaf, Special):
            raise ValueError(f"{selector} is not resolved")
        nothing = torch.zeros(1, dtype=torch.bool, device="cpu")
        return told(leaf, lambda wanted: torch.isin(tokens, torch.tensor(wanted, device="cpu")), nothing)[0][0]

    return evaluate(selector, value_of)
