"""What a steered model does: log-likelihoods of given texts, and texts of its own."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from quality_concepts import Concept
from torch import Tensor

import steerfast as sf
from steerfast.models.layers import find_layers

TOKENS = 16  # generated
REFERENCE_PROMPT = 6  # tokens of a reference text that count as its prompt


@dataclass(frozen=True)
class Text:
    """Token ids; those from `start` on are scored, and steered from the one before them on."""

    ids: tuple[int, ...]
    start: int


def pair_texts(tokenizer: Any, concept: Concept) -> list[Text]:
    """Wanted and unwanted continuation of each held-out pair in turn."""
    found = []
    for pair in concept.test:
        prompt = tokenizer(pair.prompt)["input_ids"]
        for continuation in (pair.wanted, pair.unwanted):
            tail = tokenizer(continuation, add_special_tokens=False)["input_ids"]
            found.append(Text((*prompt, *tail), len(prompt)))
    return found


def reference_texts(tokenizer: Any, texts: Sequence[str]) -> list[Text]:
    """Neutral texts behind a prompt of a few of their own tokens."""
    return [Text(tuple(tokenizer(text)["input_ids"]), REFERENCE_PROMPT) for text in texts]


class Batch:
    """Texts whose unsteered part is computed once.

    That is all but the last prompt token and the continuation, since steering at "last" never edits it, and of these the blocks
    up to `layer`, if no edit is below its output (-1: none). Logits are made of the scored tokens alone. A model whose upper
    blocks take more from the lower ones than the stream, such as their keys, has none of its blocks left out.
    """

    @torch.inference_mode()
    def __init__(self, model: Any, texts: Sequence[Text], layer: int = -1) -> None:
        self.model, self.texts, self.layer = model, texts, layer
        if min(text.start for text in texts) < 2:
            raise ValueError("quality: a prompt has one token; expected at least two, one of them read before the edit")
        self.prompt = max(text.start for text in texts)
        self.lengths = [len(text.ids) - text.start for text in texts]
        longest = max(self.lengths)
        rows = [
            [0] * (self.prompt - text.start) + list(text.ids) + [0] * (longest - length)
            for text, length in zip(texts, self.lengths, strict=True)
        ]
        self.ids = torch.tensor(rows)
        padding = torch.tensor([self.prompt - text.start for text in texts])[:, None]
        places = torch.arange(self.ids.shape[1])[None]
        self.mask = (places >= padding).long()  # what follows a continuation is never looked back at
        self.positions = (places - padding).clamp(min=0)
        self.scored = torch.arange(longest)[None] < torch.tensor(self.lengths)[:, None]
        self.blocks = find_layers(model, "quality").blocks[: layer + 1]
        self.kept: list[Any] = []
        self.cache: Any = self._forward(slice(0, self.prompt - 1), None, logits_to_keep=1).past_key_values
        for block in self.blocks[-1:]:
            with block.register_forward_hook(lambda _, __, out: self.kept.append(copy.deepcopy(out))):
                plain = self._logits()
            if not self._is_replayed(plain):
                self.blocks = ()

    def _forward(self, span: slice, cache: Any, **given: Any) -> Any:
        return self.model(
            input_ids=self.ids[:, span], attention_mask=self.mask[:, : span.stop], position_ids=self.positions[:, span],
            past_key_values=cache, use_cache=True, **given,
        )  # fmt: skip

    def _logits(self) -> Tensor:
        """Of the scored tokens of one text after another."""
        head = self.model.get_output_embeddings()
        with head.register_forward_pre_hook(lambda _, args: (args[0][self.scored][None],)):
            span = slice(self.prompt - 1, self.ids.shape[1] - 1)
            logits: Tensor = self._forward(span, copy.deepcopy(self.cache)).logits[0]
        return logits

    def _is_replayed(self, plain: Tensor) -> bool:
        """Whether the logits are the same if the lower blocks compute nothing."""
        try:
            with self._known(None):
                return torch.equal(self._logits(), plain)
        except (
            AttributeError,
            KeyError,
            RuntimeError,
            TypeError,
        ):  # of a block that asks for what a lower one would have left
            return False

    @contextmanager
    def _known(self, plan: sf.Plan | None) -> Iterator[None]:
        """Blocks up to `layer`, if no edit is below its output or reads there, only hand on what the last of them gave before."""
        edits = {} if plan is None else plan.edits
        above = all(site == "resid_post" and at >= self.layer for site, at in edits)
        reads = any(isinstance(edit, sf.When) for chain in edits.values() for edit in chain)
        blocks = self.blocks if above and not reads else ()
        try:
            for block in blocks:
                block.forward = lambda *_, **__: copy.deepcopy(self.kept[0])
            yield
        finally:
            for block in blocks:
                del block.forward

    @torch.inference_mode()
    def log_likelihoods(self, plan: sf.Plan | None, strength: float = 1.0) -> list[float]:
        """Σ log p of the scored tokens of each text, in nats."""
        with self._known(plan):
            if plan is None:
                logits = self._logits()
            else:
                with sf.steer(self.model, plan, strength, prompt_length=self.prompt):
                    logits = self._logits()
        wanted = self.ids[:, self.prompt :][self.scored]
        own = logits.float().log_softmax(-1).gather(1, wanted[:, None])[:, 0].double()
        return [float(part.sum()) for part in own.split(self.lengths)]


def batches(model: Any, texts: Sequence[Text], layer: int = -1, rows: int = 24) -> list[tuple[list[int], Batch]]:
    """The texts, with their indices, by length of what is computed anew each time; no edit is below the output of `layer`."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids) - texts[i].start)
    parts = [order[i : i + rows] for i in range(0, len(order), rows)]
    return [(part, Batch(model, [texts[i] for i in part], layer)) for part in parts]


def log_likelihoods(
    parts: Sequence[tuple[list[int], Batch]], plan: sf.Plan | None, strength: float = 1.0
) -> list[float]:
    """Of all texts, in their own order."""
    scores = {i: v for index, batch in parts for i, v in zip(index, batch.log_likelihoods(plan, strength), strict=True)}
    return [scores[i] for i in range(len(scores))]


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, openings: Sequence[str], plan: sf.Plan | None, strengths: Sequence[float]
) -> list[list[str]]:
    """Greedy continuations of the openings at every strength, all in one batch, a list per strength."""
    prompts = [tokenizer(text)["input_ids"] for text in openings]
    longest, pad = (
        max(map(len, prompts)),
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    ids = torch.tensor([[pad] * (longest - len(one)) + one for one in prompts]).repeat(len(strengths), 1)
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in prompts]).repeat(len(strengths), 1)
    options = {"attention_mask": mask, "max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": pad}
    if plan is None:
        out = model.generate(ids, **options)
    else:
        each = [s for s in strengths for _ in openings]
        with sf.steer(model, [plan] * len(each), each):
            out = model.generate(ids, **options)
    texts = tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
    return [texts[i : i + len(openings)] for i in range(0, len(texts), len(openings))]


def repetition(text: str) -> float:
    """Share of the word pairs of a text that it has had before."""
    words = text.lower().split()
    pairs = list(itertools.pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


class WordClassifier:
    """Logistic regression on the words and word pairs of texts that no method has seen."""

    def __init__(self, wanted: Sequence[str], unwanted: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import CountVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        words = CountVectorizer(ngram_range=(1, 2), binary=True, token_pattern=r"[\w']+|[!?]")
        self._fitted = make_pipeline(words, LogisticRegression(C=10.0, max_iter=1000))
        self._fitted.fit([*wanted, *unwanted], [1] * len(wanted) + [0] * len(unwanted))

    def __call__(self, texts: Sequence[str]) -> list[float]:
        """Log-odds of the wanted class."""
        return [float(v) for v in self._fitted.decision_function(list(texts))]

    def accuracy(self, concept: Concept) -> float:
        """Share of the held-out continuations that it puts on their side."""
        wanted = self([pair.wanted for pair in concept.test])
        unwanted = self([pair.unwanted for pair in concept.test])
        return (sum(v > 0 for v in wanted) + sum(v <= 0 for v in unwanted)) / (2 * len(wanted))
