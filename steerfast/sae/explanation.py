"""What the features of an SAE mean: the words of a fixed vocabulary that carry most information about each of them.

With e_c the model's final norm of feature c's decoder row and e_w the mean output-embedding row of a word's tokens,

    z = e_c·e_w,   p(w|c) = softmax of z over words,   p(c|w) = softmax of z over features,

a feature is explained by the words with the largest pointwise term of the mutual information, p(w|c)·log(p(c|w)/p(c)) with
p(c) = 1/F: what the feature promotes, and promotes more than other features do. z is walked in blocks of features: twice
F·V·d products, and never an F×V matrix.

Reference: Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).
"""

from __future__ import annotations

import copy
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

from steerfast._checks import instance_of, one_of, whole_number
from steerfast.files.replace import replace_file
from steerfast.models.layers import find_layers
from steerfast.models.texts import WORD, TextReader
from steerfast.ops.backends import in_full_precision

from .belonging import warn_of_another_model
from .model import SAE
from .words import names_of

SCHEMA = 1
RANKINGS = ("information", "released")
_ELEMENTS = 1 << 24  # of z at once: 64 MB
_NORM = re.compile(r"norm|^ln(_|$)|(_|^)ln\d*$", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Explanations:
    """The words of every feature, best first; made by `explain`, from weights, or `explain_use`, from a corpus.

    Attributes:
        words: Feature -> its words; a feature that little is known of has fewer.
        scores: float32 (F, number of words), what they are ranked by, in nats; 0 where there is no word.
        ranking: "information" or "released" of `explain`, "use" of `explain_use`.
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
            words: A word or several; capitals do not matter. A family of words, such as `publ*`, is found by any of its words.
            least: How many of the words must be among a feature's own.

        Returns:
            The features, by the sum of the scores of the words that were found.

        Raises:
            ValueError: no word is given.
        """
        wanted = {word.strip().lower() for word in ([words] if isinstance(words, str) else words)} - {""}
        if not wanted:
            raise ValueError("Explanations.find: words is empty; give at least one word")
        names = wanted | {name for word in wanted for name in names_of(word, ("word", "ending", "beginning"))}
        found: list[tuple[float, int]] = []
        for feature, own in enumerate(self.words):
            hits = [place for place, word in enumerate(own) if word.lower() in names]
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
            if scores.dim() != 2 or len(scores) != len(words) or max(map(len, words)) > scores.shape[1]:
                raise ValueError(f"{len(words)} features, and scores of shape {tuple(scores.shape)}")
            return cls(words, scores, content["ranking"], int(content["vocabulary"]), content["about"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"Explanations.load: {path} is no file of explanations ({error})") from error


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
        ValueError: widths do not fit; an empty word, or fewer words than asked for; an unknown ranking; no final norm or output
            embedding.

    Reference:
        Wu et al. 2025 (arXiv:2502.15576).

    Example:
        >>> words = ["music", "war", "water"]
        >>> tokens = [tokenizer(f" {word}")["input_ids"][0] for word in words]
        >>> rows = model.get_output_embeddings().weight[tokens].detach()  # features that point at one word each
        >>> sf.explain(sf.SAE(rows, rows, k=1), model, tokenizer, words, words=1).words
        (('music',), ('war',), ('water',))
    """
    instance_of("explain", "sae", sae, SAE, "sf.SAE.load(path)")
    one_of("explain", "ranking", ranking, RANKINGS)
    given = vocabulary_of(tokenizer) if vocabulary is None else [word.strip() for word in vocabulary]
    if "" in given:
        raise ValueError(f"explain: word {given.index('')} of the vocabulary is empty; leave it out")
    names = list(dict.fromkeys(given))
    words = whole_number("explain", "words", words)
    if not 1 <= words <= len(names):
        raise ValueError(f"explain: words is {words}; expected 1 to {len(names)}, the size of the vocabulary")
    output, norm = final_head("explain", model)
    if output.shape[1] != sae.w_dec.shape[1]:
        raise ValueError(
            f"explain: {sae} writes rows of width {sae.w_dec.shape[1]}, the model has {output.shape[1]}; is it another model's?"
        )
    warn_of_another_model("explain", sae, type(model).__name__)
    with torch.no_grad():
        features = normed_rows(sae, norm, output.device)
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
    # behind another token: of Llama 2's kind a text that is alone loses the space that its first token begins with
    before = TextReader.of(tokenizer, "explain").bare(WORD)
    start = len(tokenizer.decode(before))
    for token in range(len(tokenizer)):
        text = tokenizer.decode([*before, token])[start:]
        word = text.strip()
        if text.startswith(" ") and len(word) >= 3 and word.isalpha() and unicodedata.is_normalized("NFC", word):
            words.setdefault(word)
        if len(words) == limit:
            break
    if not words:
        raise ValueError("explain: this tokenizer has no tokens that begin with a space; give a vocabulary of words")
    return list(words)


@in_full_precision
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
        part = names[start : start + 4096]
        tokens = reader.each_following(WORD, [f" {name}" for name in part])
        if empty := [name for name, ids in zip(part, tokens, strict=True) if not ids]:
            raise ValueError(f"explain: the word {empty[0]!r} has no tokens; remove it from the vocabulary")
        flat = torch.tensor([token for ids in tokens for token in ids], device=output.device)
        offsets = torch.tensor([0, *[len(ids) for ids in tokens[:-1]]], device=output.device).cumsum(0)
        rows.append(nn.functional.embedding_bag(flat, output.float(), offsets, mode="mean"))
    return torch.cat(rows)


def normed_rows(sae: SAE, norm: nn.Module, device: torch.device) -> Tensor:
    """e_c, float32 (F, d): the norm of the decoder rows, neither rounded to the 16 bits that the model may be stored in."""
    return copy.deepcopy(norm).float()(sae.w_dec.to(device).float())


def final_head(owner: str, model: Any) -> tuple[Tensor, nn.Module]:
    """The output embedding (V, d), and the norm before it, found behind the list of blocks."""
    found = find_layers(model, owner)
    embedding = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if embedding is None or getattr(embedding, "weight", None) is None:
        raise ValueError(f"{owner}: {found.name} has no output embedding; give the causal language model, not its base")
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
        raise ValueError(f"{owner}: {found.name} shows {len(behind)} final norms beside its blocks; expected one")
    return embedding.weight.detach(), behind[0]
