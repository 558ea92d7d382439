"""What a steered model does: log-likelihoods of given texts, and texts of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import steerfast as sf
from quality_concepts import Concept

TOKENS = 16  # generated
REFERENCE_PROMPT = 6  # tokens of a reference text that count as its prompt
ROWS = 32  # a forward pass


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


@torch.inference_mode()
def log_likelihoods(model: nn.Module, texts: Sequence[Text], plan: sf.Plan | None, strength: float) -> list[float]:
    """Σ log p of the scored tokens of each text, in nats."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))  # little padding
    scores = [0.0] * len(texts)
    for first in range(0, len(order), ROWS):
        chosen = order[first : first + ROWS]
        batch = [texts[i] for i in chosen]
        ids = nn.utils.rnn.pad_sequence([torch.tensor(text.ids) for text in batch], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(text.ids) for text in batch])[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if plan is None:
            logits: Tensor = model(**inputs).logits
        else:
            with sf.steer(model, plan, strength, prompt_length=[text.start for text in batch]):
                logits = model(**inputs).logits
        for i, row, text in zip(chosen, logits, batch, strict=True):
            span = row[text.start - 1 : len(text.ids) - 1].float().log_softmax(-1)
            scores[i] = float(span.gather(1, torch.tensor(text.ids[text.start :])[:, None]).double().sum())
    return scores


@torch.inference_mode()
def generate(
    model: Any, tokenizer: Any, openings: Sequence[str], plan: sf.Plan | None, strengths: Sequence[float]
) -> list[list[str]]:
    """Greedy continuations of the openings at every strength, all in one batch, a list per strength."""
    prompts = [tokenizer(text)["input_ids"] for text in openings]
    longest, pad = max(map(len, prompts)), tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
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
    pairs = list(zip(words, words[1:], strict=False))
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
