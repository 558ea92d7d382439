"""The words of a text, and the families of words that explanations speak of besides single words.

A word is a run of letters and digits (with the apostrophes inside it) or one other visible character. Explanations tell words
apart without regard to capitals, and may name a family:

    publ*  *ing  [number]  [4 digits]  [Capital]  [CAPITALS]

Writing without spaces between words has no words in this sense: a run of it counts as one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("word", "ending", "beginning", "shape")
"""What an explanation may be made of, from the special to the general."""
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*|[^\s\w]|_")
_ENDINGS, _BEGINNINGS = (4, 3, 2), (6, 5, 4, 3)
_REST = 2  # letters that a word has besides such a beginning or ending


def token_words(text: str, spans: Sequence[tuple[int, int]]) -> list[str]:
    """The word that each token ends in, as it stands in the text; "" for a token of spaces.

    Args:
        text: The text.
        spans: Of its tokens: (first character, behind the last), in order.
    """
    words = [found.span() for found in _WORD.finditer(text)]
    found, at = [], 0
    for first, behind in spans:
        last = first + len(text[first:behind].rstrip()) - 1
        while at + 1 < len(words) and words[at][1] <= last:
            at += 1
        inside = last >= first and at < len(words) and words[at][0] <= last < words[at][1]
        found.append(text[slice(*words[at])] if inside else "")
    return found


def names_of(word: str, kinds: Iterable[str] = KINDS) -> list[str]:
    """What an explanation may call a word, from the special to the general.

    Example:
        >>> names_of("Published")
        ['published', '*shed', '*hed', '*ed', 'publis*', 'publi*', 'publ*', 'pub*', '[Capital]']
    """
    low, chosen, names = word.casefold(), set(kinds), []
    if "word" in chosen:
        names.append(low)
    if word.isalpha():
        if "ending" in chosen:
            names += [f"*{low[-n:]}" for n in _ENDINGS if len(low) >= n + _REST]
        if "beginning" in chosen:
            names += [f"{low[:n]}*" for n in _BEGINNINGS if len(low) >= n + _REST]
    return names + (_shapes(word) if "shape" in chosen else [])


def _shapes(word: str) -> list[str]:
    if len(word) > 1 and word.isalpha():
        shapes = {"[Capital]": word[0].isupper() and word[1:].islower(), "[CAPITALS]": word.isupper()}
        return [name for name, holds in shapes.items() if holds]
    if not any(map(str.isdigit, word)):
        return []
    return ([f"[{len(word)} digits]"] if word.isdigit() and len(word) > 1 else []) + ["[number]"]


@dataclass(frozen=True, eq=False)
class Lexicon:
    """The words of a corpus and the names that they go by, each by its number.

    Attributes:
        names: Names, all of a kind before those of the next.
        member_ptr, members: Name -> its words: members[member_ptr[i] : member_ptr[i + 1]].
        name_ptr, name_of: Word -> its names.
    """

    names: tuple[str, ...]
    member_ptr: np.ndarray
    members: np.ndarray
    name_ptr: np.ndarray
    name_of: np.ndarray

    @classmethod
    def of(cls, words: Sequence[str], kinds: Iterable[str] = KINDS) -> Lexicon:
        """The lexicon of words that are numbered from 0, names of a kind by the alphabet; "" has no name."""
        in_order = sorted(enumerate(words), key=lambda numbered: (numbered[1].casefold(), numbered[1]))
        numbers: dict[str, int] = {}
        pairs: list[tuple[int, int]] = []
        for kind in [kind for kind in KINDS if kind in set(kinds)]:
            for word, text in in_order:
                if text:
                    pairs += [(word, numbers.setdefault(name, len(numbers))) for name in names_of(text, (kind,))]
        word, name = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        member_ptr, members = _lists(name, word, len(numbers))
        name_ptr, name_of = _lists(word, name, len(words))
        return cls(tuple(numbers), member_ptr, members, name_ptr, name_of)

    def words_of(self, name: int) -> np.ndarray:
        """The words that go by a name."""
        return self.members[self.member_ptr[name] : self.member_ptr[name + 1]]


def _lists(key: np.ndarray, value: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Values by key, as bounds and one list."""
    order = np.argsort(key, kind="stable")
    return np.concatenate([[0], np.bincount(key, minlength=count).cumsum()]), value[order]
