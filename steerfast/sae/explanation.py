"""What the features of an SAE mean: the words of a fixed vocabulary that carry most information about each of them.

With e_c the model's final norm of feature c's decoder row and e_w the mean output-embedding row of a word's tokens,

    z = e_c·e_w,   p(w|c) = softmax of z over words,   p(c|w) = softmax of z over features,

a feature is explained by the words with the largest pointwise term of the mutual information, p(w|c)·log(p(c|w)/p(c)) with
p(c) = 1/F: what the feature promotes, and promotes more than other features do. z is walked in blocks of features: twice
F·V·d products, and never an F×V matrix.

Reference: Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).
"""

from __future__ import annotations

import json
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import one_of, whole_number
from steerfast.files.replace import replace_file
from steerfast.models.layers import find_layers
from steerfast.models.texts import TextReader

from .model import SAE

SCHEMA = 1
RANKINGS = ("information", "released")
_ELEMENTS = 1 << 24  # of z at once: 64 MB
_NORM = re.compile(r"norm|^ln(_|$)|(_|^)ln\d*$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Explanations:
    """The words of every feature, best first; made by `explain`.

    Attributes:
        words: Feature -> its words.
        scores: float32 (F, number of words), what they are ranked by, in nats.
        ranking: "information" or "released".
        vocabulary: Number of words that there were to choose from.
        about: Model, place and width, for messages and files.
    """

    words: tuple[tuple[str, ...], ...] = field(repr=False)
    scores: Tensor = field(repr=False)
    ranking: str
    vocabulary: int
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, feature: int) -> tuple[str, ...]:
        return self.words[feature]

    def table(self, features: Iterable[int] | None = None) -> str:
        """Lines of a feature, its score and its words.

        Args:
            features: Which ones, in which order; None: the twenty that say most, by the score of their first word.
        """
        chosen = self.scores[:, 0].topk(min(20, len(self))).indices.tolist() if features is None else list(features)
        lines = [f"{'feature':>8}  {'nats':>8}  words"]
        lines += [f"{i:>8}  {self.scores[i, 0]:>8.4f}  {', '.join(self.words[i])}" for i in chosen]
        return "\n".join(lines)

    def find(self, words: str | Iterable[str], least: int = 1) -> list[int]:
        """Features that are explained by some of these words, those that say it loudest first.

        Args:
            words: A word or several; capitals do not matter.
            least: How many of the words must be among a feature's own.

        Returns:
            The features, by the sum of the scores of the words that were found.

        Raises:
            ValueError: no word is given.
        """
        wanted = {word.strip().lower() for word in ([words] if isinstance(words, str) else words)} - {""}
        if not wanted:
            raise ValueError("Explanations.find: words is empty; give at least one word")
        found: list[tuple[float, int]] = []
        for feature, own in enumerate(self.words):
            hits = [place for place, word in enumerate(own) if word.lower() in wanted]
            if len({own[place].lower() for place in hits}) >= least:
                found.append((-float(self.scores[feature, hits].sum()), feature))
        return [feature for _, feature in sorted(found)]

    def save(self, file: str | os.PathLike[str]) -> Path:
        """Write everything as JSON, whole or not at all."""
        path = Path(file)
        content = {
            "schema": SCHEMA,
            "ranking": self.ranking,
            "vocabulary": self.vocabulary,
            "about": self.about,
            "words": self.words,
            "scores": [[float(f"{score:.9g}") for score in row] for row in self.scores.tolist()],
        }
        replace_file(path, json.dumps(content, ensure_ascii=False).encode())
        return path

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> Explanations:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is something else, or damaged.
        """
        path = Path(file)
        if not path.is_file():
            raise FileNotFoundError(
                f"Explanations.load: {path} does not exist; make it with sf.explain(...).save(file)"
            )
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
            scores = torch.tensor(content["scores"], dtype=torch.float32)
            words = tuple(tuple(map(str, row)) for row in content["words"])
            if scores.shape != (len(words), len(words[0])) or {len(row) for row in words} != {len(words[0])}:
                raise ValueError(f"{len(words)} features of unequal length, or scores of shape {tuple(scores.shape)}")
            return cls(words, scores, content["ranking"], int(content["vocabulary"]), content["about"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"Explanations.load: {path} is no file of explanations ({error})") from error

    def to_html(self, file: str | os.PathLike[str], usage: Usage | None = None, limit: int = 500) -> Path:
        """Write a page of features with their words and, with `usage`, an activation histogram and the top contexts.

        Args:
            file: The page; it needs no other file and no network.
            usage: What `observe` returned.
            limit: Features on the page: the most informative ones.

        Returns:
            The file.
        """
        from .page import page

        path = Path(file)
        replace_file(path, page(self, usage, limit).encode())
        return path


@dataclass(frozen=True, eq=False)
class Usage:
    """How the features are used on a text; made by `observe`.

    Attributes:
        tokens: Rows that were seen.
        density: float32 (F,), the share of rows on which a feature is active.
        edges: float32 (bins + 1,), the bounds of the histogram's bins, in the unit of the activations.
        histogram: int64 (F, bins), active rows by activation.
        contexts: Feature -> its strongest contexts, each (activation, text before, token, text after).
    """

    tokens: int
    density: Tensor = field(repr=False)
    edges: Tensor = field(repr=False)
    histogram: Tensor = field(repr=False)
    contexts: tuple[tuple[tuple[float, str, str, str], ...], ...] = field(repr=False)


def explain(
    sae: SAE,
    model: nn.Module,
    tokenizer: Any,
    vocabulary: Sequence[str] | None = None,
    words: int = 10,
    *,
    ranking: str = "information",
) -> Explanations:
    """Explain every feature by the words of a vocabulary that carry most information about it.

        p(w|c)·log(p(c|w)/p(c)),   z = norm(W_dec[c])·mean(W_out[tokens of w])

    Args:
        sae: The features are its decoder rows.
        model: The `transformers` model that it belongs to; its final norm and output embedding are used.
        tokenizer: Its tokenizer.
        vocabulary: Words; None: the 10,000 commonest tokens that are whole words (`vocabulary_of`).
        words: Words per feature.
        ranking: "information"; or "released", p(w|c)·log p(c|w), which is never above 0 and tends to 0 for words that the feature
            has nothing to do with: it puts irrelevant words first, and is here to be compared with.

    Returns:
        The words and their scores, an `Explanations`.

    Raises:
        ValueError: widths do not fit; fewer words than asked for; an unknown ranking; no final norm or output embedding.

    Reference:
        Wu et al. 2025 (arXiv:2502.15576).

    Example:
        >>> words = ["music", "war", "water"]
        >>> tokens = [tokenizer(f" {word}")["input_ids"][0] for word in words]
        >>> rows = model.get_output_embeddings().weight[tokens].detach()  # features that point at one word each
        >>> sf.explain(sf.SAE(rows, rows, k=1), model, tokenizer, words, words=1).words
        (('music',), ('war',), ('water',))
    """
    one_of("explain", "ranking", ranking, RANKINGS)
    names = vocabulary_of(tokenizer) if vocabulary is None else list(dict.fromkeys(word.strip() for word in vocabulary))
    words = whole_number("explain", "words", words)
    if not 1 <= words <= len(names):
        raise ValueError(f"explain: words is {words}; expected 1 to {len(names)}, the size of the vocabulary")
    output, norm = _head(model)
    if output.shape[1] != sae.d:
        raise ValueError(f"explain: {sae} has width {sae.d}, the model {output.shape[1]}; is it another model's?")
    with torch.no_grad():
        features = norm(sae.w_dec.to(output.device, output.dtype)).float()
        meanings = _word_rows(tokenizer, names, output)
        scores, places = _rank(features, meanings, words, ranking)
    chosen = tuple(tuple(names[place] for place in row) for row in places.tolist())
    about = {"model": type(model).__name__, "place": sae.place, "d": sae.d}
    return Explanations(chosen, scores.cpu(), ranking, len(names), about)


def vocabulary_of(tokenizer: Any, limit: int = 10_000) -> list[str]:
    """Return tokens that are whole words: three letters or more after a space, in the order of their numbers.

    A byte-pair tokenizer numbers its tokens by how early they were merged, so the first ones are the commonest; rarer ones
    are often pieces of words.

    Args:
        tokenizer: Of any family whose tokens carry the space before them.
        limit: Words at most.

    Raises:
        ValueError: no token begins with a space.
    """
    words: dict[str, None] = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        word = text.strip()
        if text.startswith(" ") and len(word) >= 3 and word.isalpha() and unicodedata.is_normalized("NFC", word):
            words.setdefault(word)
        if len(words) == limit:
            break
    if not words:
        raise ValueError("explain: this tokenizer has no tokens that begin with a space; give a vocabulary of words")
    return list(words)


def observe(sae: SAE, cache: Any, tokenizer: Any, contexts: int = 5, bins: int = 24) -> Usage:
    """Return how features are used on the texts of an `ActivationCache`: densities, histograms and top contexts.

    Args:
        sae: The SAE.
        cache: Activations at its place, with the tokens that they were read at.
        tokenizer: For the texts of the contexts.
        contexts: Strongest ones per feature.
        bins: Of the histogram, equally wide from 0 to the largest activation seen in the first shard.

    Raises:
        ValueError: the cache has another width than the SAE.

    Example:
        >>> cache = sf.sae.cache_activations(model, tokenizer, true_statements, ("resid_post", 0), "cache", context=8)
        >>> usage = observe(sf.SAE(torch.eye(576), torch.eye(576), k=4), cache, tokenizer)
        >>> usage.tokens == len(cache), round(float(usage.density.sum()), 3)  # k features per row
        (True, 4.0)
    """
    if cache.info.d != sae.d:
        raise ValueError(
            f"observe: the cache has rows of width {cache.info.d}, {sae} has {sae.d}; is it another model's?"
        )
    edges: Tensor | None = None
    histogram = torch.zeros(sae.features, bins, dtype=torch.int64)
    best = torch.zeros(sae.features, contexts)
    where = torch.full((sae.features, contexts, 2), -1, dtype=torch.int64)  # shard, row
    for shard in range(len(cache.counts)):
        values, indices = (part.cpu() for part in sae.topk(cache.read(shard).to(sae.w_enc)))
        if edges is None:
            edges = torch.linspace(0, max(float(values.max()), 1e-6), bins + 1)
        row, column = (values > 0).nonzero(as_tuple=True)
        value, feature = values[row, column], indices[row, column].long()
        cell = (torch.bucketize(value, edges) - 1).clamp(0, bins - 1)
        histogram.view(-1).index_add_(0, feature * bins + cell, torch.ones_like(cell))
        _keep_best(best, where, value, feature, row, shard)
    assert edges is not None  # a cache has a shard
    density = histogram.sum(1).float() / len(cache)
    return Usage(len(cache), density, edges, histogram, _texts(cache, tokenizer, best, where))


def _rank(features: Tensor, meanings: Tensor, words: int, ranking: str) -> tuple[Tensor, Tensor]:
    """The best words of every feature: scores and places in the vocabulary, (F, words)."""
    count = len(features)
    over_features = torch.full((len(meanings),), -torch.inf, device=features.device)  # log Σ_c exp z
    for _, z in _blocks(features, meanings):
        over_features = torch.logaddexp(over_features, z.logsumexp(0))
    scores, places = [], []
    for _, z in _blocks(features, meanings):
        log_c = z - over_features  # log p(c|w)
        p_w = z.softmax(1)
        gain = log_c + math.log(count) if ranking == "information" else log_c
        best = (p_w * gain).topk(words, dim=1)
        scores.append(best.values)
        places.append(best.indices)
    return torch.cat(scores), torch.cat(places)


def _blocks(features: Tensor, meanings: Tensor) -> Iterator[tuple[int, Tensor]]:
    step = max(1, _ELEMENTS // len(meanings))
    for start in range(0, len(features), step):
        yield start, features[start : start + step] @ meanings.T


def _word_rows(tokenizer: Any, names: list[str], output: Tensor) -> Tensor:
    """e_w, float32 (V, d): the mean output-embedding row of a word's tokens, as it stands inside a text."""
    rows, reader = [], TextReader.of(tokenizer, "explain")
    for start in range(0, len(names), 4096):
        part = [f" {name}" for name in names[start : start + 4096]]
        tokens = reader.own(part)
        if empty := [name for name, ids in zip(part, tokens, strict=True) if not ids]:
            raise ValueError(f"explain: the word {empty[0].strip()!r} has no tokens; remove it from the vocabulary")
        flat = torch.tensor([token for ids in tokens for token in ids], device=output.device)
        offsets = torch.tensor([0, *[len(ids) for ids in tokens[:-1]]], device=output.device).cumsum(0)
        rows.append(nn.functional.embedding_bag(flat, output.float(), offsets, mode="mean"))
    return torch.cat(rows)


def _head(model: Any) -> tuple[Tensor, nn.Module]:
    """The output embedding (V, d), and the norm before it, found behind the list of blocks."""
    found = find_layers(model, "explain")
    embedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embedding is None or getattr(embedding, "weight", None) is None:
        raise ValueError(f"explain: {found.name} has no output embedding; give the causal language model, not its base")
    parent, _, blocks = found.path.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    norms = [
        (number, module)
        for number, (name, module) in enumerate(children)
        if _NORM.search(name) and getattr(getattr(module, "weight", None), "shape", None) == (found.d,)
    ]
    place = [name for name, _ in children].index(blocks)
    behind = [module for number, module in norms if number > place] or [
        module for _, module in norms
    ]  # BLOOM has one before
    if len(behind) != 1:
        raise ValueError(f"explain: {found.name} shows {len(behind)} final norms beside its blocks; expected one")
    return embedding.weight.detach(), behind[0]


def _keep_best(best: Tensor, where: Tensor, value: Tensor, feature: Tensor, row: Tensor, shard: int) -> None:
    """Merge a shard's activations into the strongest of every feature, in place."""
    contexts = best.shape[1]
    order = value.argsort(descending=True, stable=True)
    order = order[feature[order].argsort(stable=True)]  # by feature, the strongest first
    feature, value, row = feature[order], value[order], row[order]
    count = torch.bincount(feature, minlength=len(best))
    place = torch.arange(len(feature)) - (count.cumsum(0) - count)[feature]
    keep = place < contexts
    feature, value, row, place = feature[keep], value[keep], row[keep], place[keep]
    more = torch.zeros_like(best).index_put_((feature, place), value)
    there = torch.full_like(where, -1)
    there[feature, place] = torch.stack([torch.full_like(row, shard), row], 1)
    joined, order = torch.cat([best, more], 1).sort(dim=1, descending=True, stable=True)
    best.copy_(joined[:, :contexts])
    both = torch.cat([where, there], 1)
    where.copy_(both.gather(1, order[:, :contexts, None].expand(-1, -1, 2)))


def _texts(
    cache: Any, tokenizer: Any, best: Tensor, where: Tensor
) -> tuple[tuple[tuple[float, str, str, str], ...], ...]:
    """The texts of the strongest contexts, twelve tokens before and four after."""
    found: list[list[tuple[float, str, str, str]]] = [[] for _ in range(len(best))]
    for shard in range(len(cache.counts)):
        tokens, positions = cache.contexts(shard)
        for feature, place in (where[..., 0] == shard).nonzero().tolist():
            context, column = divmod(int(positions[where[feature, place, 1]]), tokens.shape[1])
            row = tokens[context].tolist()
            pieces = row[max(1, column - 12) : column], row[column : column + 1], row[column + 1 : column + 5]
            before, token, after = (tokenizer.decode(piece) for piece in pieces)
            found[feature].append((float(best[feature, place]), before, token, after))
    return tuple(tuple(sorted(texts, key=lambda text: -text[0])) for texts in found)
