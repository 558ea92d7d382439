"""What is kept of a corpus while it streams by, each part within a bound of its own.

WordCounts      how often a feature fires on a word: sparse sums; over the bound, the rarest pairs are forgotten
TopPassages     the strongest passages of every feature: a few per feature
PassageSample   whole passages with what fires in them: a uniform sample
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_WORDS = 1 << 18  # words that are told apart; those met later are not counted
_SHIFT = 18  # a pair's key is feature · 2^18 + word


@dataclass(frozen=True)
class Firings:
    """The active features of a batch of tokens, one entry per (token, feature).

    Attributes:
        row: Token of the batch.
        feature: Its feature.
        value: The activation, above 0.
    """

    row: np.ndarray
    feature: np.ndarray
    value: np.ndarray

    def of(self, keep: np.ndarray) -> Firings:
        """Those of some tokens: keep is bool, one entry per token of the batch."""
        chosen = keep[self.row]
        return Firings(self.row[chosen], self.feature[chosen], self.value[chosen])

    def strongest(self, group: np.ndarray) -> Firings:
        """The strongest firing of each feature in each group of tokens, by group and feature.

        Args:
            group: Group of each token; -1: none.
        """
        inside = self.of(group >= 0)
        order = np.lexsort((-inside.value, inside.feature, group[inside.row]))
        row, feature = inside.row[order], inside.feature[order]
        first = np.ones(len(order), dtype=bool)
        first[1:] = (np.diff(group[row]) != 0) | (np.diff(feature) != 0)
        return Firings(row[first], feature[first], inside.value[order][first])


@dataclass(frozen=True)
class Text:
    """The text of a context, and where its tokens stand.

    Attributes:
        text: Of all its tokens.
        bounds: int32 (tokens + 1,): token i is text[bounds[i] : bounds[i + 1]].
    """

    text: str
    bounds: np.ndarray

    def pieces(self, first: int, behind: int) -> tuple[str, ...]:
        """What some tokens show."""
        return tuple(self.text[self.bounds[i] : self.bounds[i + 1]] for i in range(first, behind))


class WordCounts:
    """Numbers of the words, and how often each occurs and each feature fires on it.

    Word 0 is what has no number: tokens that end in no word, and words beyond the bound. It counts like any other, so that the
    counts of a feature add up to its firings.

    Args:
        pairs: (feature, word) pairs in memory at most, 16 bytes each, beside one with word 0 for each feature; over it those with
            the lowest counts become firings on word 0, and begin at 0 if they come again.
    """

    def __init__(self, pairs: int) -> None:
        self.numbers: dict[str, int] = {"": 0}
        self.tokens = np.zeros(_WORDS, dtype=np.int64)
        self.forgotten = 0
        self._limit = pairs
        self._keys, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._fresh: list[np.ndarray] = []
        self._waiting = 0

    def number(self, words: list[str]) -> np.ndarray:
        """The numbers of words; 0 for "" and for words beyond the bound."""
        known = self.numbers
        room = _WORDS - len(known)
        for word in dict.fromkeys(words):
            if word not in known and room > 0:
                known[word] = len(known)
                room -= 1
        return np.array([known.get(word, 0) for word in words], dtype=np.int64)

    def add(self, fired: Firings, words: np.ndarray, counted: np.ndarray) -> None:
        """Count the tokens of a batch that count, and what fires on them; words by token."""
        self.tokens += np.bincount(words[counted], minlength=_WORDS)
        some = fired.of(counted)
        self._fresh.append((some.feature.astype(np.int64) << _SHIFT) + words[some.row])
        self._waiting += len(some.row)
        if self._waiting > max(self._limit // 2, 1):
            self._merge()

    def done(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(feature, word, count), by feature and word."""
        self._merge()
        return self._keys >> _SHIFT, self._keys & (_WORDS - 1), self._counts

    def _merge(self) -> None:
        fresh, counts = np.unique(np.concatenate([np.empty(0, np.int64), *self._fresh]), return_counts=True)
        self._fresh, self._waiting = [], 0
        keys, counts = _summed(np.concatenate([self._keys, fresh]), np.concatenate([self._counts, counts]))
        told = keys & (_WORDS - 1) > 0
        if int(told.sum()) > self._limit:
            least = np.partition(counts[told], -self._limit - 1)[-self._limit - 1]
            lost = told & (counts <= least)
            self.forgotten += int(lost.sum())
            keys, counts = _summed(np.where(lost, keys & -_WORDS, keys), counts)
        self._keys, self._counts = keys, counts


def _summed(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each key once, in order, with the sum of its counts."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.concatenate([[True], np.diff(keys) != 0])) if len(keys) else np.empty(0, np.int64)
    return keys[starts], np.add.reduceat(counts, starts) if len(starts) else counts


class TopPassages:
    """The strongest windows of every feature, one per passage.

    Args:
        features: F.
        top: Windows per feature.
        before, after: Tokens of a window around its peak.
    """

    def __init__(self, features: int, top: int, before: int, after: int) -> None:
        self.before, self.after = before, after
        self.values = np.zeros((features, top), dtype=np.float32)
        self.where = np.full((features, top, 2), -1, dtype=np.int64)  # context, column of the peak
        self.levels = np.zeros((features, top, before + 1 + after), dtype=np.float32)
        self.texts: dict[int, Text] = {}

    def add(self, fired: Firings, passage: np.ndarray, place: np.ndarray, texts: dict[int, Text]) -> None:
        """Merge a batch.

        Args:
            fired: What fires in it.
            passage: Passage of each token, -1: none.
            place: (tokens, 2): context and column.
            texts: The texts of the batch's contexts.
        """
        best = fired.strongest(passage)
        top = self.values.shape[1]
        order = np.lexsort((-best.value, best.feature))
        feature, value, row = best.feature[order], best.value[order], best.row[order]
        starts = np.searchsorted(feature, feature)  # the first of each feature
        rank = np.arange(len(feature)) - starts
        keep = (rank < top) & (value > self.values[feature, -1])
        feature, value, row, rank = feature[keep], value[keep], row[keep], rank[keep]
        if not len(feature):
            return
        seen, group = np.unique(feature, return_inverse=True)
        fresh = np.zeros((len(seen), top), dtype=np.float32)
        fresh[group, rank] = value
        where = np.full((len(seen), top, 2), -1, dtype=np.int64)
        where[group, rank] = place[row]
        levels = np.zeros((len(seen), top, self.levels.shape[2]), dtype=np.float32)
        levels[group, rank] = self._around(fired, feature, place, row)
        joined = np.concatenate([self.values[seen], fresh], 1)
        chosen = np.argsort(-joined, axis=1, kind="stable")[:, :top]
        lines = np.arange(len(seen))[:, None]
        self.values[seen] = joined[lines, chosen]
        self.where[seen] = np.concatenate([self.where[seen], where], 1)[lines, chosen]
        self.levels[seen] = np.concatenate([self.levels[seen], levels], 1)[lines, chosen]
        self.texts |= {number: texts[number] for number in np.unique(place[row, 0]).tolist()}
        if len(self.texts) > 4 * len(self.values) + 1024:
            self.forget()

    def forget(self) -> None:
        """Let go of the texts that no window shows any more."""
        shown = set(np.unique(self.where[..., 0]).tolist())
        self.texts = {number: text for number, text in self.texts.items() if number in shown}

    def _around(self, fired: Firings, feature: np.ndarray, place: np.ndarray, row: np.ndarray) -> np.ndarray:
        """What a feature does on the tokens around a row of the same context."""
        count = len(place)
        keys = fired.feature.astype(np.int64) * count + fired.row
        order = np.argsort(keys)
        near = row[:, None] + np.arange(-self.before, self.after + 1)
        inside = (near >= 0) & (near < count)
        near = near.clip(0, count - 1)
        inside &= place[near, 0] == place[row, 0][:, None]
        inside &= place[near, 1] - place[row, 1][:, None] == np.arange(-self.before, self.after + 1)
        wanted = feature[:, None].astype(np.int64) * count + near
        found = np.searchsorted(keys, wanted, sorter=order).clip(0, len(keys) - 1)
        hit = inside & (keys[order[found]] == wanted)
        return np.where(hit, fired.value[order[found]], 0)


@dataclass(frozen=True)
class Sample:
    """A uniform sample of whole passages, and what fires in them.

    Attributes:
        passages: Their number.
        texts: What each shows.
        word_passage, word: One entry per token of a passage: the passage, the word's number.
        bounds: (F + 1,), where the entries of each feature begin in the next two.
        passage, value: One entry per (feature, passage) that fires, by feature: the passage, the strongest activation in it.
    """

    passages: int
    texts: tuple[str, ...]
    word_passage: np.ndarray
    word: np.ndarray
    bounds: np.ndarray
    passage: np.ndarray
    value: np.ndarray

    def firing(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """Passages in which a feature fires, and how strongly at most."""
        part = slice(self.bounds[feature], self.bounds[feature + 1])
        return self.passage[part], self.value[part]


class PassageSample:
    """A uniform sample of passages from a stream: those with the lowest of random numbers.

    Args:
        size: Passages at most.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, int, str, np.ndarray, np.ndarray, np.ndarray]] = []
        self._seen = 0

    def add(
        self, lottery: list[float], texts: list[str], fired: Firings, passage: np.ndarray, words: np.ndarray
    ) -> None:
        """Offer the passages of a batch, numbered from 0.

        Args:
            lottery: A random number per passage.
            texts: What each shows.
            fired: What fires in the batch.
            passage: Of each token, -1 where none.
            words: The number of each token's word.
        """
        best = fired.strongest(passage)
        at = np.searchsorted(passage[best.row], np.arange(len(lottery) + 1))
        rows = np.flatnonzero(passage >= 0)
        rows = rows[np.argsort(passage[rows], kind="stable")]
        ends = np.searchsorted(passage[rows], np.arange(len(lottery) + 1))
        for number, drawn in enumerate(lottery):
            self._seen += 1
            if len(self._heap) == self._size and -drawn <= self._heap[0][0]:
                continue
            part = slice(at[number], at[number + 1])
            kept = words[rows[ends[number] : ends[number + 1]]].astype(np.int32)
            entry = (
                -drawn, self._seen, texts[number], kept,
                best.feature[part].astype(np.int32), best.value[part].astype(np.float32),
            )  # fmt: skip
            (heapq.heappush if len(self._heap) < self._size else heapq.heappushpop)(self._heap, entry)

    def done(self, features: int) -> Sample:
        """The sample, in the order of the stream."""
        kept = sorted(self._heap, key=lambda entry: entry[1])
        words, word_passage = _joined(entry[3] for entry in kept)
        feature, passage = _joined(entry[4] for entry in kept)
        value, _ = _joined(entry[5] for entry in kept)
        order = np.argsort(feature, kind="stable")
        bounds = np.searchsorted(feature[order], np.arange(features + 1))
        texts = tuple(entry[2] for entry in kept)
        return Sample(len(kept), texts, word_passage, words, bounds, passage[order], value[order])


def _joined(parts: Iterator[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Arrays end to end, and of which one each entry is."""
    listed = list(parts)
    if not listed:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(listed), np.repeat(np.arange(len(listed)), [len(part) for part in listed])
