"""What the features of an SAE mean, by the words that they fire on: mutual information estimated from real activations.

With p(w|c) the share of a feature's N firings that happen on word w, and p(w) the word's share of all tokens, words are ranked
by the same pointwise term as in `explanation`, with half a firing taken off inside the logarithm,

    p(w|c)·log((p(w|c) - 1/2N)/p(w)),    p(w|c)/p(w) = p(c|w)/p(c)

since a few firings on a rare word are weak evidence, and on what the feature does instead of what its decoder row points at. The
words of a feature are chosen one after another, each by what it says of the firings that the ones before it leave unexplained,
so that ten words say ten things. Besides single words there are families (`words`): a feature of past tenses is `*ed`, not ten
verbs.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from steerfast._checks import instance_of, one_of, whole_number

from .evidence import Evidence
from .explanation import Explanations
from .words import KINDS, Lexicon

_FEW = 0.5  # taken off a count: what fires twice on a rare word is weak evidence
_LEAST = 2  # firings that a word needs


def explain_use(evidence: Evidence, words: int = 10, *, kinds: Iterable[str] = KINDS) -> Explanations:
    """Explain every feature by the words that it fires on, twice at least, of the training side of a corpus.

        p(w|c)·log((p(w|c) - 1/2N)/p(w)),   N = firings of feature c, N·p(w|c) of them on word w, p(w) of all tokens are w

    The second word is ranked by what the first one leaves of the N·p(w|c) firings and of the tokens, and so on.

    Args:
        evidence: What `observe` returned.
        words: Words per feature at most; a feature that fires rarely has fewer, one that never fires has none.
        kinds: What may be named: "word", and the families "ending" (`*ed`), "beginning" (`publ*`) and "shape" (`[number]`).

    Returns:
        The words, best first, with their terms in nats: `Explanations` with the ranking "use".

    Raises:
        ValueError: words is less than 1, an unknown kind, or no document was on the training side.

    Example:
        >>> from steerfast.place import Origin
        >>> sae = sf.SAE(torch.eye(576), torch.eye(576), k=4, origin=Origin(place=("resid_post", 0)))
        >>> seen = sf.sae.observe(sae, model, tokenizer, true_statements, sf.sae.ObserveConfig(passage=4))
        >>> len(sf.sae.explain_use(seen, words=3))
        576
    """
    instance_of("explain_use", "evidence", evidence, Evidence, "sf.sae.observe(…)")
    words = whole_number("explain_use", "words", words, 1)
    chosen = [one_of("explain_use", "kinds", kind, KINDS) for kind in kinds]
    if not evidence.documents[0]:
        raise ValueError(
            f"explain_use: all {sum(evidence.documents)} documents are held out; give more of them (for text: what empty lines "
            "separate, or title=)"
        )
    lexicon = Lexicon.of(evidence.words, chosen)
    choosing = _Choosing(evidence, lexicon)
    found = [choosing.words(feature, words) for feature in range(len(evidence))]
    scores = torch.zeros(len(evidence), words)
    for feature, row in enumerate(found):
        scores[feature, : len(row)] = torch.tensor([score for _, score in row])
    names = tuple(tuple(name for name, _ in row) for row in found)
    return Explanations(names, scores, "use", len(lexicon.names), dict(evidence.about))


class _Choosing:
    """The words of one feature after another."""

    def __init__(self, evidence: Evidence, lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        feature, self._word, self._count = evidence.word_counts
        self._bounds = np.searchsorted(feature, np.arange(len(evidence) + 1))
        self._word_tokens = evidence.word_tokens.astype(np.float64)
        self._all = max(self._word_tokens.sum(), 1.0)
        self._totals = self._by_name(np.arange(len(self._word_tokens)), self._word_tokens)

    def words(self, feature: int, count: int) -> list[tuple[str, float]]:
        """(name, nats) of a feature's words, best first."""
        part = slice(self._bounds[feature], self._bounds[feature + 1])
        word, fired = self._word[part], self._count[part].astype(np.float64)
        all_fired = fired.sum()
        if not all_fired:
            return []
        of_word = np.zeros(len(self._word_tokens))
        of_word[word] = fired
        hits, totals, taken = self._by_name(word, fired), self._totals.copy(), np.zeros(len(of_word), dtype=bool)
        some = np.flatnonzero(hits >= _LEAST)
        found: list[tuple[str, float]] = []
        while len(found) < count and len(some):
            share = hits[some] / all_fired
            ratio = (hits[some] - _FEW) / np.maximum(totals[some], 1) * self._all / all_fired
            score = np.where(hits[some] >= _LEAST, share * np.log(np.maximum(ratio, 1e-9)), -np.inf)
            best = int(score.argmax())  # of equals the special one, which has the lower number
            if score[best] <= 0:
                break
            name = int(some[best])
            found.append((self._lexicon.names[name], float(score[best])))
            members = self._lexicon.words_of(name)
            members = members[~taken[members]]
            taken[members] = True
            hits -= self._by_name(members, of_word[members])
            totals -= self._by_name(members, self._word_tokens[members])
        return found

    def _by_name(self, words: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Sums of values over the words that go by each name."""
        first, behind = self._lexicon.name_ptr[words], self._lexicon.name_ptr[words + 1]
        sizes = behind - first
        at = np.repeat(first - np.concatenate([[0], sizes.cumsum()[:-1]]), sizes) + np.arange(sizes.sum())
        return np.bincount(
            self._lexicon.name_of[at], weights=np.repeat(values, sizes), minlength=len(self._lexicon.names)
        )
