"""What the features of an SAE do on real text: how often and how strongly they fire, on which words, and in which passages.

A document is read in contexts of its own, each begun with the beginning-of-text token where the tokenizer has one. Special
tokens and the first position of a context are left out: their norm is many times that of text. Documents go to one of two
sides by the hash of their text, so that equal documents are on one side, whatever the order: from the *training* side come
words, passages to be shown and all that a score fits; the *held-out* side is only ever scored.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, instance_of, whole_number
from steerfast.models.collect import read_batch
from steerfast.models.layers import evaluating
from steerfast.models.limits import Limits
from steerfast.models.points import Point
from steerfast.models.texts import TextReader

from .belonging import point_of
from .counting import Firings, PassageSample, Sample, Text, TopPassages, WordCounts
from .model import SAE
from .words import token_words

_FORWARD_TOKENS = 2048
_WINDOW = 256  # contexts that are sorted by length together
_LOWEST, _HIGHEST, _PER_OCTAVE = -10, 16, 2  # of the histogram: powers of 2


@dataclass(frozen=True)
class ObserveConfig:
    """How a corpus is read.

    Args:
        context: Tokens of a forward, beginning-of-text included.
        passage: Tokens of a passage that is scored; contexts are cut into whole ones.
        held_out: Share of the documents that words and thresholds never see.
        tokens: Tokens that are read at most; None: all.
        top: Strongest passages kept per feature, of the training side.
        before, after: Tokens shown around the peak of such a passage.
        sample: Passages kept per side for the score, at most; a uniform sample of those that were read.
        pairs: (feature, word) pairs in memory at most, 16 bytes each; over it the rarest are forgotten.

    Raises:
        TypeError, ValueError: a number is out of range.
    """

    context: int = 128
    passage: int = 16
    held_out: float = 0.3
    tokens: int | None = None
    top: int = 6
    before: int = 16
    after: int = 8
    sample: int = 20_000
    pairs: int = 1 << 24

    def __post_init__(self) -> None:
        for name, least in {
            "context": 8,
            "passage": 2,
            "top": 1,
            "before": 0,
            "after": 0,
            "sample": 1,
            "pairs": 1,
        }.items():
            object.__setattr__(self, name, whole_number("ObserveConfig", name, getattr(self, name), least))
        if self.tokens is not None:
            object.__setattr__(self, "tokens", whole_number("ObserveConfig", "tokens", self.tokens, 1))
        if self.passage >= self.context:
            raise ValueError(f"ObserveConfig: passage is {self.passage}; expected less than context, {self.context}")
        if not 0 < finite_number("ObserveConfig", "held_out", self.held_out) < 1:
            raise ValueError(f"ObserveConfig: held_out is {self.held_out}; expected a share between 0 and 1")


@dataclass(frozen=True)
class Passage:
    """A piece of text around the token on which a feature fires most.

    Attributes:
        tokens: What each token shows.
        activations: The feature's, one per token.
        peak: Which token is the strongest.
    """

    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int

    def __str__(self) -> str:
        return "".join(self.tokens)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What the features of an SAE do on a corpus; made by `observe`.

    Attributes:
        about: Model, place, width and how the corpus was read, for messages and files.
        tokens: Rows that were seen.
        documents: (training side, held-out side).
        fired: int64 (F,), rows on which a feature is active.
        edges: float32 (bins + 1,), bounds of the histogram: half octaves, the first and the last open.
        histogram: int64 (F, bins), active rows by activation.
        words: Words of the training side by number, as they were written; the first is "", which none is.
        word_tokens: int64 (words,), tokens of the training side that end in each.
        word_counts: int64 (3, pairs): feature, word, how often the one fires on the other; by feature and word. Firings on
            tokens that end in no word, and on pairs that were forgotten, stand at word 0.
        forgotten: Pairs that were dropped to stay within `ObserveConfig.pairs`.
        training, held_out: Samples of passages of each side.
        top: The strongest passages, as kept; `passages` shows them.
    """

    about: dict[str, Any]
    tokens: int
    documents: tuple[int, int]
    fired: Tensor = field(repr=False)
    edges: Tensor = field(repr=False)
    histogram: Tensor = field(repr=False)
    words: tuple[str, ...] = field(repr=False)
    word_tokens: np.ndarray = field(repr=False)
    word_counts: np.ndarray = field(repr=False)
    forgotten: int
    training: Sample = field(repr=False)
    held_out: Sample = field(repr=False)
    top: TopPassages = field(repr=False)

    def __len__(self) -> int:
        return len(self.fired)

    @property
    def density(self) -> Tensor:
        """float32 (F,), the share of rows on which a feature is active."""
        return self.fired.float() / self.tokens

    def passages(self, feature: int) -> tuple[Passage, ...]:
        """The passages of the training side in which a feature fires most, strongest first; none if it never fires."""
        shown = []
        for (context, column), levels in zip(self.top.where[feature].tolist(), self.top.levels[feature], strict=True):
            if context < 0:
                continue
            text = self.top.texts[context]
            first, behind = max(0, column - self.top.before), min(len(text.bounds) - 1, column + self.top.after + 1)
            start = first - (column - self.top.before)
            values = tuple(levels[start : start + behind - first].tolist())
            shown.append(Passage(text.pieces(first, behind), values, column - first))
        return tuple(shown)


def observe(
    sae: SAE,
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    config: ObserveConfig | None = None,
    *,
    progress: Callable[[str], None] | None = None,
) -> Evidence:
    """Read a corpus once and keep what its features do there, within bounded memory: see `ObserveConfig` and `counting`.

    Args:
        sae: With a place, (site, layer).
        model: The `transformers` model that it belongs to. The forward stops after the layer.
        tokenizer: Its tokenizer, a fast one.
        documents: Texts, such as `sf.sae.read_documents(path)`; they are read one after another.
        config: How they are read.
        progress: Called with a line of text now and then.

    Returns:
        What was seen, an `Evidence`.

    Raises:
        TypeError: documents is one string, or one of them is none.
        ValueError: no place, another width, a token that the model does not know; no token to read; activations are NaN or Inf.

    Warns:
        UserWarning: the SAE comes from a model of another family.

    Example:
        >>> from steerfast.place import Origin
        >>> sae = sf.SAE(torch.eye(576), torch.eye(576), k=4, origin=Origin(place=("resid_post", 0)))
        >>> seen = sf.sae.observe(sae, model, tokenizer, true_statements, sf.sae.ObserveConfig(passage=4))
        >>> round(float(seen.density.sum()), 3)  # k features per row
        4.0
    """
    if isinstance(documents, str):
        raise TypeError("observe: documents must be several texts, got one string; put it into a list")
    instance_of("observe", "sae", sae, SAE, "sf.SAE.load(path)")
    config = ObserveConfig() if config is None else config
    instance_of("observe", "config", config, ObserveConfig, "sf.sae.ObserveConfig(tokens=1_000_000)")
    layer, point = point_of("observe", sae, model)
    network: Any = getattr(model, "_orig_mod", model)
    wide = sae.to(dtype=torch.float32)  # the same numbers; rows are not rounded to the 16 bits of its file
    gathering = _Gathering(wide, config)
    source = _contexts(TextReader.of(tokenizer, "observe"), documents, config)
    limits = Limits("observe", network)
    with evaluating(network):
        for number, batch in enumerate(_batches(source)):
            for context in batch:
                limits.check(f"document {context.document}", context.ids)
            gathering.add(batch, _rows(network, layer, point, batch))
            if progress is not None and number % 16 == 0:
                progress(f"read {gathering.tokens} tokens of {sum(gathering.documents)} documents")
    about = {"model": type(network).__name__, "place": sae.place, "d": sae.d, **vars(config)}
    return gathering.done(about)


@dataclass(frozen=True)
class _Context:
    """Tokens of one document that are read in one forward.

    Attributes:
        document: Its number.
        held_out: Which side it is on.
        draw: Two numbers to draw lots with, from the document's text and the context's place in it.
        ids: With beginning-of-text.
        words: What word each ends in, "" where none, and at tokens that do not count.
        counts: Which tokens count, bool.
        text: What they show.
    """

    document: int
    held_out: bool
    draw: tuple[int, int]
    ids: list[int]
    words: list[str]
    counts: list[bool]
    text: Text


def _contexts(reader: TextReader, documents: Iterable[str], config: ObserveConfig) -> Iterator[_Context]:
    special = set(reader.tokenizer.all_special_ids)
    bos = reader.tokenizer.bos_token_id
    front = [] if bos is None else [bos]
    left = config.tokens
    for document, text in enumerate(documents):
        if not isinstance(text, str):
            raise TypeError(f"observe: document {document} is {type(text).__name__}; expected strings")
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
        held_out = int.from_bytes(digest[:8], "big") < config.held_out * 2**64
        ids, spans = reader.located(text)
        if ids[:1] == front:
            ids, spans = ids[1:], spans[1:]
        words = token_words(text, spans)
        room = config.context - len(front)
        for start in range(0, len(ids), room):
            part = slice(start, start + (room if left is None else min(room, left)))
            chosen = ids[part]
            if not chosen:
                return
            left = None if left is None else left - len(chosen)
            counts = [False] * len(front) + [token not in special for token in chosen]
            counts[0] = False
            bounds = _bounds(spans[part], spans[start - 1][1] if start else 0)
            shown = Text(
                text[bounds[0] : bounds[-1]], np.array([bounds[0]] * len(front) + bounds, np.int32) - bounds[0]
            )
            draw = (int.from_bytes(digest[8:16], "big"), start)
            yield _Context(document, held_out, draw, front + chosen, [""] * len(front) + words[part], counts, shown)


def _bounds(spans: list[tuple[int, int]], first: int) -> list[int]:
    """Where each token's text begins and the last one ends: every character belongs to one token."""
    bounds = [first]
    for _, behind in spans:
        bounds.append(max(bounds[-1], behind))
    return bounds


def _batches(source: Iterator[_Context]) -> Iterator[list[_Context]]:
    """Contexts of about equal length together, so that little is padded."""
    while window := list(islice(source, _WINDOW)):
        window.sort(key=lambda context: len(context.ids), reverse=True)
        while window:
            count = max(1, _FORWARD_TOKENS // len(window[0].ids))
            yield window[:count]
            window = window[count:]


def _rows(model: Any, layer: int, point: Point, batch: list[_Context]) -> Tensor:
    """The stream at the tokens of a batch, float32, one after another."""
    rows = torch.cat(read_batch(model, {layer: point}, [context.ids for context in batch], "all")[layer])
    counts = torch.tensor([counted for context in batch for counted in context.counts])
    bad = counts & ~rows.isfinite().all(1)
    if bool(bad.any()):
        owner = np.repeat([context.document for context in batch], [len(context.ids) for context in batch])
        dtype = next(model.parameters()).dtype
        raise ValueError(
            f"observe: activations of document {owner[int(bad.nonzero()[0])]} are NaN or Inf; check the model ({dtype}) or load "
            "it in float32"
        )
    return rows


class _Gathering:
    """The sums of `observe`, batch by batch."""

    def __init__(self, sae: SAE, config: ObserveConfig) -> None:
        self.sae, self.config = sae, config
        self.tokens, self.contexts = 0, 0
        self.documents = (0, 0)
        bins = (_HIGHEST - _LOWEST) * _PER_OCTAVE
        self.edges = torch.exp2(torch.linspace(_LOWEST, _HIGHEST, bins + 1))
        self.histogram = torch.zeros(sae.features, bins, dtype=torch.int64)
        self.words = WordCounts(config.pairs)
        self.top = TopPassages(sae.features, config.top, config.before, config.after)
        self.samples = (PassageSample(config.sample), PassageSample(config.sample))

    def add(self, batch: list[_Context], rows: Tensor) -> None:
        counts = np.array([counted for context in batch for counted in context.counts])
        sizes = [len(context.ids) for context in batch]
        held_out = np.repeat([context.held_out for context in batch], sizes)
        place = np.stack(
            [np.repeat(np.arange(len(batch)), sizes), np.concatenate([np.arange(size) for size in sizes])], 1
        )
        fired = self._fired(rows, counts)
        self._count(fired)
        words = self.words.number([word for context in batch for word in context.words])
        self.words.add(fired, words, counts & ~held_out)
        numbered = place + np.array([self.contexts, 0])
        texts = {self.contexts + i: context.text for i, context in enumerate(batch)}
        window = np.where(
            counts & ~held_out, place[:, 0] * self.config.context + place[:, 1] // self.config.passage, -1
        )
        self.top.add(fired, window, numbered, texts)
        for side in (False, True):
            self._offer(batch, side, counts, fired, words)
        self.tokens += int(counts.sum())
        self.contexts += len(batch)
        for context in batch:
            if context.draw[1] == 0:
                sides = self.documents
                self.documents = (sides[0] + (not context.held_out), sides[1] + context.held_out)

    def _fired(self, rows: Tensor, counts: np.ndarray) -> Firings:
        chosen = np.flatnonzero(counts)
        values, indices = (part.cpu() for part in self.sae.topk(rows[chosen].to(self.sae.w_enc)))
        row, column = (values > 0).nonzero(as_tuple=True)
        return Firings(chosen[row.numpy()], indices[row, column].long().numpy(), values[row, column].float().numpy())

    def _count(self, fired: Firings) -> None:
        bins = self.histogram.shape[1]
        cell = (torch.bucketize(torch.from_numpy(fired.value), self.edges, right=True) - 1).clamp(0, bins - 1)
        where = torch.from_numpy(fired.feature) * bins + cell
        self.histogram.view(-1).index_add_(0, where, torch.ones_like(where))

    def _offer(self, batch: list[_Context], side: bool, counts: np.ndarray, fired: Firings, words: np.ndarray) -> None:
        """Cut one side of a batch into whole passages, and offer them to its sample."""
        length, passage, at = self.config.passage, np.full(len(counts), -1), 0
        lots: list[float] = []
        texts: list[str] = []
        for context in batch:
            real = np.flatnonzero(context.counts) if context.held_out == side else np.empty(0, np.int64)
            for number, start in enumerate(range(0, len(real) - length + 1, length)):
                some = real[start : start + length]
                passage[at + some] = len(lots)
                lots.append(float(np.random.default_rng([*context.draw, number]).random()))
                texts.append("".join(context.text.pieces(some[0], some[-1] + 1)))
            at += len(context.ids)
        if lots:
            self.samples[side].add(lots, texts, fired, passage, words)

    def done(self, about: dict[str, Any]) -> Evidence:
        if self.tokens == 0:
            raise ValueError("observe: the corpus has no token that counts; give documents of more than one token")
        self.top.forget()
        feature, word, count = self.words.done()
        training, held_out = (sample.done(self.sae.features) for sample in self.samples)
        words = tuple(self.words.numbers)
        return Evidence(
            about, self.tokens, self.documents, self.histogram.sum(1), self.edges, self.histogram, words,
            self.words.tokens[: len(words)], np.stack([feature, word, count]), self.words.forgotten, training, held_out, self.top,
        )  # fmt: skip
