"""What a sweep measures of a steered model: effect on continuations of prompts, and perplexity of neutral texts.

Rows of several plans share a batch, one plan and one strength per row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.hooks.steer import steer
from steerfast.models.layers import home, refuse_rows
from steerfast.models.limits import Limits
from steerfast.models.texts import TextReader, short_text
from steerfast.place import median_of
from steerfast.plan import Plan

NEUTRAL = (
    "The bridge was built in the nineteenth century and connects the two halves of the town.",
    "Water boils at a lower temperature in the mountains, because the air pressure is lower there.",
    "She put the letters on the table, took off her coat and opened the window.",
    "The train leaves at half past eight and arrives in the capital shortly before noon.",
    "To make the dough, mix flour, water and a little salt, and let it rest for an hour.",
    "The committee meets twice a year and publishes its minutes within a month.",
)
"""Texts about nothing in particular, for the perplexity where a user names none."""


@dataclass(frozen=True)
class Question:
    """What is measured.

    Args:
        prompts: Beginnings of texts.
        wanted: Continuations that steering should make likelier, as they follow a prompt: usually with a leading space.
        unwanted: Continuations that it should make less likely.
        neutral: Texts whose perplexity tells the damage.

    Raises:
        TypeError, ValueError: a field is one text instead of several, or has none.
    """

    prompts: tuple[str, ...]
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    neutral: tuple[str, ...] = NEUTRAL

    def __post_init__(self) -> None:
        for name in ("prompts", "wanted", "unwanted", "neutral"):
            object.__setattr__(self, name, texts_of("Question", name, getattr(self, name)))


@dataclass(frozen=True)
class Scored:
    """Token ids, of which those from `start` on are scored."""

    ids: tuple[int, ...]
    start: int


def sequences_of(model: nn.Module, reader: TextReader, question: Question) -> list[Scored]:
    """Prompts with each continuation, prompt by prompt, then the neutral texts; what the model cannot read is refused."""
    found, limits = [], Limits(reader.owner, model)
    for prompt in question.prompts:
        head = _filled("prompts", prompt, reader.beginning(prompt))
        for continuation in (*question.wanted, *question.unwanted):
            tail = _filled("wanted and unwanted", continuation, reader.following(prompt, continuation))
            limits.check(short_text(prompt + continuation), (*head, *tail))
            found.append(Scored((*head, *tail), len(head)))
    for text in question.neutral:
        ids = _filled("neutral", text, reader.ids(text))
        if len(ids) < 2:
            raise ValueError(f"sweep: {text!r} in neutral has one token; perplexity needs at least two")
        limits.check(short_text(text), ids)
        found.append(Scored(ids, 1))
    return found


def _filled(name: str, text: str, ids: list[int]) -> tuple[int, ...]:
    if not ids:
        raise ValueError(f"sweep: {text!r} in {name} has no tokens; remove it or give it content")
    return tuple(ids)


@dataclass(frozen=True)
class Dose:
    """A plan with the strength that it is steered with; without a plan nothing is done."""

    plan: Plan | None = None
    strength: float = 1.0


def measure(
    model: nn.Module, sequences: list[Scored], question: Question, doses: Sequence[Dose], batch_size: int
) -> Iterator[tuple[float, float]]:
    """(effect, perplexity) under each dose; rows of several doses run together."""
    jobs = [(dose, sequence) for dose in doses for sequence in sequences]
    scores = log_likelihoods(model, [job[1] for job in jobs], [job[0] for job in jobs], batch_size)
    for i in range(len(doses)):
        yield _effect_and_perplexity(sequences, question, scores[i * len(sequences) : (i + 1) * len(sequences)])


def log_likelihoods(
    model: nn.Module, sequences: Sequence[Scored], doses: Sequence[Dose], batch_size: int
) -> list[float]:
    """Σ log p of the scored tokens of each sequence, in nats, under its own dose."""
    refuse_rows(model, "sweep")
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))  # little padding
    scores = [0.0] * len(sequences)
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        batch = _forward(model, [sequences[i] for i in rows], [doses[i] for i in rows])
        for i, score in zip(rows, batch, strict=True):
            scores[i] = score
    return scores


@torch.no_grad()
def _forward(model: nn.Module, batch: list[Scored], doses: list[Dose]) -> list[float]:
    """Σ log p of the scored tokens of each row of one batch."""
    device = home(model)
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s.ids, device="cpu") for s in batch], batch_first=True)
    mask = (
        torch.arange(ids.shape[1], device="cpu") < torch.tensor([len(s.ids) for s in batch], device="cpu")[:, None]
    ).long()
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    if any(dose.plan is not None for dose in doses):
        starts = [sequence.start for sequence in batch]
        with steer(model, [dose.plan for dose in doses], [dose.strength for dose in doses], starts):
            logits: Tensor = model(**inputs).logits
    else:
        logits = model(**inputs).logits
    scores = []
    for row, sequence in enumerate(batch):
        span = slice(sequence.start - 1, len(sequence.ids) - 1)
        likelihoods = logits[row, span].float().log_softmax(-1)
        targets = torch.tensor(sequence.ids[sequence.start :], device=logits.device)
        scores.append(likelihoods.gather(1, targets[:, None]).double().sum())
    return torch.stack(scores).tolist()


def _effect_and_perplexity(sequences: list[Scored], question: Question, scores: list[float]) -> tuple[float, float]:
    per_prompt = len(question.wanted) + len(question.unwanted)
    split = len(question.prompts) * per_prompt
    odds = torch.tensor(scores[:split], dtype=torch.float64, device="cpu").view(-1, per_prompt)
    wanted, unwanted = odds[:, : len(question.wanted)], odds[:, len(question.wanted) :]
    tokens = sum(len(s.ids) - s.start for s in sequences[split:])
    loss = -sum(scores[split:]) / tokens
    return float((wanted.logsumexp(1) - unwanted.logsumexp(1)).mean()), math.exp(min(loss, 700.0))


def several(owner: str, name: str, values: Any) -> tuple[Any, ...]:
    """Several values, one at least; one text is none."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{owner}: {name} must be several values, got {values!r}; put it into a list")
    found = tuple(values)
    if not found:
        raise ValueError(f"{owner}: {name} is empty; give at least one")
    return found


def typical_change(x: Tensor, moved: Tensor) -> float:
    """Median length of the change of the rows (n, d) that an edit moves; 0 if it moves none."""
    change = (moved - x).norm(dim=1)
    return median_of(change[change > 0]) if bool((change > 0).any()) else 0.0


def texts_of(owner: str, name: str, values: Any) -> tuple[str, ...]:
    """Several texts with content."""
    found = several(owner, name, values)
    for text in found:
        if not isinstance(text, str) or not text:
            raise TypeError(f"{owner}: {name} holds {text!r}; expected texts with content")
    return found
