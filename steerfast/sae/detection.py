"""Whether explanations are true: what a feature does on held-out documents, foretold from its words alone.

*Detection*: does the feature fire anywhere in this passage? The words that a passage shares with the explanation are looked
up, and

    score = Σ over its tokens of -log(1 - p(c|w)),   w the first of the feature's words that the token's word is

the expected number of firings as long as p is small, is compared with a threshold. How often the feature fires on each word,
and the threshold, come from the training side; passages are whole, of equal length, and *all* held-out ones count, strong and
weak firings alike. The accuracy is balanced, (share of firing passages found + share of others left out)/2: 0.5 for an
explanation that says nothing.

*Intruder*: four passages in which the feature fires, one from each quarter of its activations, and one in which it does not;
the one with the lowest score is named the odd one out. Ties share. 0.2 for an explanation that says nothing.

Reference: detection and intruder scores with a language model for a judge: Paulo et al. 2024 (arXiv:2410.13928).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfast._checks import instance_of, seed_number, whole_number
from steerfast.files.replace import replace_file
from steerfast.place import median_of

from .counting import Sample
from .evidence import Evidence
from .explanation import Explanations
from .words import Lexicon

_PARTS = 5  # of a feature's held-out firings, by activation
_SHOWN = 4  # firing passages beside an intruder
_SURE = 0.99  # p(c|w) at most
_PRIOR = 0.5  # tokens of a word that fire as often as any other, added to those that were seen


@dataclass(frozen=True, eq=False)
class Detection:
    """How well the words of each feature foretell where it fires; made by `detect`. Features that were not scored are NaN.

    Attributes:
        accuracy: float32 (F,), balanced accuracy of detection on held-out passages; chance is 0.5.
        recall: float32 (F, 5), share of the firing passages that are found, by fifths of activation, the weakest first.
        intruder: float32 (F,), share of intruders found; chance is 0.2.
        firings: int64 (F,), held-out passages in which a feature fires.
        passages: (training, held-out) passages.
        least: Firing and other held-out passages that a feature needs to be scored.
    """

    accuracy: Tensor = field(repr=False)
    recall: Tensor = field(repr=False)
    intruder: Tensor = field(repr=False)
    firings: Tensor = field(repr=False)
    passages: tuple[int, int]
    least: int

    @property
    def scored(self) -> Tensor:
        """bool (F,): which features were scored."""
        return ~self.accuracy.isnan()

    def summary(self) -> dict[str, Any]:
        """Numbers over the features that were scored, ready for JSON."""
        accuracy, intruder = self.accuracy[self.scored].double(), self.intruder[self.scored].double()
        share = torch.tensor([0.1, 0.25, 0.5, 0.75, 0.9], dtype=torch.float64)
        return {
            "features": int(self.scored.sum()),
            "passages": list(self.passages),
            "detection_median": median_of(accuracy),
            "detection_mean": float(accuracy.mean()),
            "detection_quantiles": dict(
                zip(("10", "25", "50", "75", "90"), accuracy.quantile(share).tolist(), strict=True)
            ),
            "detection_at_least_0.75": float((accuracy >= 0.75).double().mean()),
            "recall_by_fifth": self.recall[self.scored].double().mean(0).tolist(),
            "intruder_median": median_of(intruder),
            "intruder_mean": float(intruder.mean()),
        }

    def __str__(self) -> str:
        found = self.summary()
        return (
            f"detection   median {found['detection_median']:.3f}, mean {found['detection_mean']:.3f}, "
            f"{found['detection_at_least_0.75']:.0%} at least 0.75   (chance 0.5)\n"
            f"intruder    median {found['intruder_median']:.3f}, mean {found['intruder_mean']:.3f}   (chance 0.2)\n"
            f"scored      {found['features']} features that fire in {self.least} or more of {self.passages[1]} held-out passages"
        )

    def save(self, file: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
        """Write the summary and what is told about it as JSON, whole or not at all."""
        path = Path(file)
        replace_file(path, (json.dumps({**(about or {}), **self.summary()}, indent=2) + "\n").encode())
        return path


def detect(
    explanations: Explanations, evidence: Evidence, *, least: int = 20, trials: int = 50, seed: int = 0
) -> Detection:
    """Score explanations by what their words foretell on the held-out documents of a corpus; no judge is asked.

    Args:
        explanations: Of either form, `sf.explain` or `explain_use`; with the latter, of this evidence.
        evidence: What `observe` returned.
        least: Held-out passages, firing ones and others, that a feature needs to be scored.
        trials: Intruders per feature.
        seed: Which passages are drawn for them.

    Returns:
        Two scores per feature, a `Detection`.

    Raises:
        ValueError: another number of features; no passage on one of the sides; no feature fires often enough.
    """
    instance_of("detect", "explanations", explanations, Explanations, "sf.explain(…)")
    instance_of("detect", "evidence", evidence, Evidence, "sf.sae.observe(…)")
    least, trials = whole_number("detect", "least", least, _SHOWN), whole_number("detect", "trials", trials, 1)
    if len(explanations) != len(evidence):
        raise ValueError(
            f"detect: {len(explanations)} features are explained, {len(evidence)} were observed; of the same SAE?"
        )
    sides = (evidence.training.passages, evidence.held_out.passages)
    if not all(sides):
        raise ValueError(
            f"detect: {sides[0]} training and {sides[1]} held-out passages of {evidence.about['passage']} tokens; give more "
            "documents, longer ones, or tell them apart (for text: what empty lines separate, or title=)"
        )
    counts = np.diff(evidence.held_out.bounds)
    scored = (counts >= least) & (sides[1] - counts >= least) & (np.diff(evidence.training.bounds) > 0)
    scored &= np.diff(evidence.training.bounds) < sides[0]
    if not scored.any():
        raise ValueError(
            f"detect: of {sides[1]} held-out passages no feature fires in {least} and not in {least}; read more of the corpus"
        )
    words = _Words(explanations, evidence)
    accuracy = np.full(len(evidence), np.nan, dtype=np.float32)
    recall, intruder = np.full((len(evidence), _PARTS), np.nan, dtype=np.float32), accuracy.copy()
    generator = np.random.default_rng(seed_number("detect", seed))
    for feature in np.flatnonzero(scored).tolist():
        training, held_out = words.scores(feature)
        threshold = _threshold(training, evidence.training.firing(feature)[0])
        fires, values = evidence.held_out.firing(feature)
        on = held_out[fires[np.argsort(values, kind="stable")]]  # the weakest first
        off = np.delete(held_out, fires)
        accuracy[feature] = ((on > threshold).mean() + (off <= threshold).mean()) / 2
        recall[feature] = [float((part > threshold).mean()) for part in np.array_split(on, _PARTS)]
        intruder[feature] = _intruder(on, off, trials, generator)
    accuracies, recalls, intruders, firings = map(torch.from_numpy, (accuracy, recall, intruder, counts))
    return Detection(accuracies, recalls, intruders, firings, sides, least)


class _Words:
    """The scores of passages by the words of one feature after another."""

    def __init__(self, explanations: Explanations, evidence: Evidence) -> None:
        self._explanations, self._evidence = explanations, evidence
        lexicon = Lexicon.of(evidence.words)
        self._lexicon, self._names = lexicon, {name: number for number, name in enumerate(lexicon.names)}
        feature, self._word, self._count = evidence.word_counts
        self._bounds = np.searchsorted(feature, np.arange(len(evidence) + 1))
        self._where = [_Postings.of(sample, len(evidence.words)) for sample in (evidence.training, evidence.held_out)]

    def scores(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """The score of every passage, (training, held-out)."""
        words, weights = self._weights(feature)
        training, held_out = (postings.sums(words, weights) for postings in self._where)
        return training, held_out

    def _weights(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """The corpus's words that the feature's words stand for, and what each says."""
        part = slice(self._bounds[feature], self._bounds[feature + 1])
        tokens = self._evidence.word_tokens
        fired = np.zeros(len(tokens))
        fired[self._word[part]] = self._count[part]
        base = fired.sum() / max(int(tokens.sum()), 1)
        taken, words, weights = np.zeros(len(tokens), dtype=bool), [], []
        for name in self._explanations.words[feature]:
            number = self._names.get(name if name in self._names else name.strip().casefold())
            if number is None:
                continue
            members = self._lexicon.words_of(number)
            members = members[~taken[members]]
            taken[members] = True
            rate = (fired[members].sum() + _PRIOR * base) / (tokens[members].sum() + _PRIOR)
            words.append(members)
            weights.append(np.full(len(members), -np.log1p(-min(rate, _SURE))))
        if not words:
            return np.empty(0, np.int64), np.empty(0)
        return np.concatenate(words), np.concatenate(weights)


@dataclass(frozen=True)
class _Postings:
    """Which passages of a sample hold each word.

    Attributes:
        passages: Their number.
        bounds, passage: Word -> its passages, one entry per token.
    """

    passages: int
    bounds: np.ndarray
    passage: np.ndarray

    @classmethod
    def of(cls, sample: Sample, words: int) -> _Postings:
        order = np.argsort(sample.word, kind="stable")
        bounds = np.searchsorted(sample.word[order], np.arange(words + 1))
        return cls(sample.passages, bounds, sample.word_passage[order])

    def sums(self, words: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """The sum of the weights of each passage's tokens."""
        first, sizes = self.bounds[words], self.bounds[words + 1] - self.bounds[words]
        at = np.repeat(first - np.concatenate([[0], sizes.cumsum()])[:-1], sizes) + np.arange(sizes.sum())
        return np.bincount(self.passage[at], weights=np.repeat(weights, sizes), minlength=self.passages)


def _threshold(scores: np.ndarray, fires: np.ndarray) -> float:
    """The threshold of best balanced accuracy: passages above it are said to fire."""
    gain = np.full(len(scores), -1 / (len(scores) - len(fires)))
    gain[fires] = 1 / len(fires)
    some = np.flatnonzero(scores > 0)  # to say that all fire is worth nothing, and most passages share no word
    values, group = np.unique(scores[some], return_inverse=True)
    above = np.bincount(group, weights=gain[some], minlength=1)[::-1].cumsum()[
        ::-1
    ]  # this value and all above said to fire
    best = int(above.argmax())
    if above[best] <= 0:
        return float(scores.max())
    return float(values[best] + (values[best - 1] if best else 0.0)) / 2


def _intruder(on: np.ndarray, off: np.ndarray, trials: int, generator: np.random.Generator) -> float:
    """The share of trials in which the passage that does not fire has the lowest score; a tie counts as its share."""
    quarters = [part[generator.integers(len(part), size=trials)] for part in np.array_split(on, _SHOWN)]
    odd = off[generator.integers(len(off), size=trials)]
    others = np.stack(quarters)
    ties = 1 + (others == odd).sum(0)
    return float(np.where((others >= odd).all(0), 1 / ties, 0).mean())
