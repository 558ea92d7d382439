"""What a plan does to answers: multiple choice scored by likelihood, and how varied free text stays.

matching   share of questions whose matching answers are together likelier than the others; for A/B that is the choice
mass       mean share of the probability of all answers that the matching ones have (MC2 of TruthfulQA)
first      share of questions whose best answer is likelier than every answer that does not match (MC1 of TruthfulQA)
log_odds   mean log Σ p(matching) - log Σ p(others), in nats
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, instance_of, positive_integer, whole_number
from steerfast._null import DRAWS, Null
from steerfast.barriers.data import seeded
from steerfast.edits.base import Intervention
from steerfast.edits.conditions import When
from steerfast.edits.linear import Add
from steerfast.files.text import rows_of, text_of
from steerfast.hooks.columns import places_of
from steerfast.hooks.steer import steer
from steerfast.models.collect import collect
from steerfast.models.layers import evaluating, find_layers, home
from steerfast.models.limits import Limits
from steerfast.models.texts import TextReader, short_text
from steerfast.place import Place
from steerfast.plan import Plan, as_plan

from .sweep_scores import Dose, Scored, log_likelihoods, typical_change

GRAMS = (1, 2, 3)
TRUTHFUL = "Q: {question}\nA:"
"""The prompt of TruthfulQA's questions, without the examples in front that its authors give."""
_PAIR = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
"""What a pair of CAA holds."""
_FORMS = (
    f"CAA's pairs (JSON: a list of {', '.join(_PAIR)}) or TruthfulQA (CSV: Question, Best Answer, Correct Answers, Incorrect "
    "Answers)"
)


@dataclass(frozen=True)
class Choice:
    """A question with answers.

    Args:
        prompt: What stands before an answer: a string, or a chat that ends with the user.
        matching: Answers that have the property, as they follow the prompt; the first is the best.
        others: Answers that have it not.

    Raises:
        TypeError, ValueError: no prompt, or a side without answers.
    """

    prompt: Any
    matching: tuple[str, ...]
    others: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("Choice: prompt is empty; give the question")
        for name in ("matching", "others"):
            answers = getattr(self, name)
            if isinstance(answers, str) or not answers or not all(isinstance(a, str) and a for a in answers):
                raise TypeError(f"Choice: {name} is {answers!r}; expected several answers, one at least")
            object.__setattr__(self, name, tuple(answers))


@dataclass(frozen=True)
class ChoiceScores:
    """How a model answers; the numbers are those of this module.

    Attributes:
        count: Questions.
        matching, mass, first, log_odds: Means over them.
        null: The change of `log_odds` by the plan beside that by random directions at the same places and under the same
            conditions, as long as the median change of the rows that the plan moves there; None: nothing was moved, or drawn.
    """

    count: int
    matching: float
    mass: float
    first: float
    log_odds: float
    null: Null | None = None

    @classmethod
    def of(cls, scores: Sequence[tuple[Tensor, Tensor]]) -> ChoiceScores:
        """From log p of the (matching, other) answers of each question, float64; the best answer first."""
        gaps = torch.stack([right.logsumexp(0) - wrong.logsumexp(0) for right, wrong in scores])
        first = [float(right[0] > wrong.max()) for right, wrong in scores]
        return cls(
            len(scores), float((gaps > 0).double().mean()), float(gaps.sigmoid().mean()), sum(first) / len(first),
            float(gaps.mean()),
        )  # fmt: skip

    def __str__(self) -> str:
        return (
            f"matching {self.matching:.1%}, mass {self.mass:.3f}, first {self.first:.1%}, log-odds {self.log_odds:+.2f} "
            f"({self.count} questions)"
        )


@dataclass(frozen=True)
class TextScores:
    """What a model writes.

    Attributes:
        texts: Continuations of the prompts.
        distinct: n to the share of the n-grams of words of all texts together that are distinct; NaN without any.
        repetition: Share of the word pairs of a text that it has had before, mean over the texts.
    """

    texts: tuple[str, ...]
    distinct: dict[int, float]
    repetition: float

    @classmethod
    def of(cls, texts: Iterable[str]) -> TextScores:
        """From the texts."""
        kept = tuple(texts)
        each = [1 - share for text in kept if (share := distinct([text], 2)) == share]
        return cls(kept, {n: distinct(kept, n) for n in GRAMS}, sum(each) / len(each) if each else 0.0)

    def __str__(self) -> str:
        shares = ", ".join(f"distinct-{n} {share:.3f}" for n, share in self.distinct.items())
        return f"{shares}, repetition {self.repetition:.3f} ({len(self.texts)} texts)"


def distinct(texts: Iterable[str], n: int) -> float:
    """Distinct n-grams of words over all of them, in several texts; NaN where there are none.

    Reference:
        Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models (arXiv:1510.03055).
    """
    grams = [
        tuple(words[i : i + n]) for text in texts if (words := text.lower().split()) for i in range(len(words) - n + 1)
    ]
    return len(set(grams)) / len(grams) if grams else float("nan")


def evaluate_choices(
    model: nn.Module,
    tokenizer: Any,
    choices: Iterable[Choice],
    plan: Plan | None = None,
    strength: float = 1.0,
    draws: int = DRAWS,
    batch_size: int = 16,
) -> ChoiceScores:
    """Score multiple choice by the likelihood of the answers, Σ log p of their tokens, under a plan.

    Args:
        model: A transformers causal language model, not steered.
        tokenizer: Its tokenizer.
        choices: The questions, such as `read_choices` gives.
        plan: What the model is steered with; None: nothing.
        strength: As of `steer`.
        draws: Random directions that stand in for the plan, for the null; 0: none.
        batch_size: Answers per forward.

    Returns:
        A `ChoiceScores`.

    Raises:
        TypeError, ValueError: no questions, one without tokens or longer than the model reads, or a plan that does not fit it.

    Reference:
        Rimsky et al. 2024, CAA (arXiv:2312.06681), for A/B; Lin et al. 2022, TruthfulQA (arXiv:2109.07958), for MC1 and MC2.

    Example:
        >>> ab = sf.tools.Choice("Is it day? (A) Yes (B) No Answer:", (" (A)",), (" (B)",))
        >>> sf.tools.evaluate_choices(model, tokenizer, [ab]).count
        1
    """
    owner = "evaluate_choices"
    strength = finite_number(owner, "strength", strength)
    whole_number(owner, "draws", draws, 0)
    questions = list(choices)
    if not questions:
        raise ValueError(f"{owner}: choices is empty; give at least one")
    for one in questions:
        instance_of(owner, "each of choices", one, Choice, 'sf.tools.Choice("Is it day?", (" Yes",), (" No",))')
    plan = None if plan is None else as_plan(owner, plan)
    reader = TextReader.of(tokenizer, owner)
    asked = _Asked(
        model,
        questions,
        [_sequences(model, reader, one) for one in questions],
        positive_integer(owner, "batch_size", batch_size),
    )
    with evaluating(model):
        found = asked(plan, strength)
        if plan is None or not draws:
            return found
        plain = asked(None, 1.0).log_odds
        controls = _controls(model, reader, plan, strength, questions, draws)
        if not controls:
            return found
        effects = [asked(control, 1.0).log_odds - plain for control in controls]
    null = Null.of(found.log_odds - plain, (), effects)
    return ChoiceScores(found.count, found.matching, found.mass, found.first, found.log_odds, null)


def evaluate_text(
    model: nn.Module, tokenizer: Any, prompts: Iterable[str], plan: Plan | None = None, strength: float = 1.0, tokens: int = 64
) -> TextScores:  # fmt: skip
    """Continue prompts greedily under a plan, and measure how varied the texts are.

    Args:
        model: A transformers causal language model, not steered.
        tokenizer: Its tokenizer.
        prompts: Beginnings; each runs by itself.
        plan: What the model is steered with; None: nothing.
        strength: As of `steer`.
        tokens: New tokens of each.

    Returns:
        A `TextScores`.

    Raises:
        TypeError, ValueError: no prompts, one without tokens, or with its new ones more than the model reads.
    """
    owner = "evaluate_text"
    tokens = positive_integer(owner, "tokens", tokens)
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given:
        raise ValueError(f"{owner}: prompts is empty; give at least one")
    reader, limits = TextReader.of(tokenizer, owner), Limits(owner, model)
    heads = [_head(reader, prompt) for prompt in given]
    for text, head in heads:
        limits.check(short_text(text), head)
        limits.check_length(
            f"{short_text(text)} with {tokens} new tokens", len(head) + tokens - 1
        )  # the last is not read
    device = home(model)
    texts = []
    for _, head in heads:
        ids = torch.tensor([head], dtype=torch.long, device=device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "do_sample": False}
        if getattr(model.generation_config, "pad_token_id", None) is None:
            options["pad_token_id"] = 0
        with evaluating(model), torch.no_grad():
            if plan is None:
                out = model.generate(ids, **options)  # type: ignore[operator]
            else:
                with steer(model, plan, strength):
                    out = model.generate(ids, **options)  # type: ignore[operator]
        texts.append(reader.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return TextScores.of(texts)


def read_choices(path: str | os.PathLike[str], tokenizer: Any = None, limit: int | None = None) -> list[Choice]:
    """Questions of a file: A/B pairs of CAA (JSON), or TruthfulQA (CSV).

    Args:
        path: CAA's file, a list of objects with question, answer_matching_behavior and answer_not_matching_behavior; or
            TruthfulQA's, with columns Question, Best Answer, Correct Answers and Incorrect Answers.
        tokenizer: If it has a chat template, CAA's questions are put into it.
        limit: The first so many; None: all.

    Raises:
        FileNotFoundError, ValueError: no such file, neither form, no questions, or one without a text that it needs.
    """
    file, hint = Path(path).expanduser(), "give a file of questions"
    most = None if limit is None else positive_integer("read_choices", "limit", limit)
    if file.suffix.lower() == ".csv":
        rows: Any = rows_of("read_choices", file, hint)
    else:
        try:
            rows = json.loads(text_of("read_choices", file, hint))
        except json.JSONDecodeError as error:
            raise ValueError(f"read_choices: {file} is not JSON ({error}); expected CAA's pairs, or a CSV") from None
    if not isinstance(rows, list) or not rows:
        got = "no questions" if isinstance(rows, list) else f"one {type(rows).__name__}"
        raise ValueError(f"read_choices: {file} holds {got}; expected {_FORMS}")
    chat = bool(getattr(tokenizer, "chat_template", None))
    named = [(f"question {number} of {file}", row) for number, row in enumerate(rows[:most], 1)]
    return [_truthful(*one) if file.suffix.lower() == ".csv" else _pair(*one, chat) for one in named]


def _field(where: str, row: Any, name: str) -> str:
    """A text of a question, which has content."""
    text = row.get(name) if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        got = f"{text!r} as" if isinstance(row, dict) and name in row else "no"
        raise ValueError(f"read_choices: {where} has {got} {name!r}; expected {_FORMS}, with content")
    return text


def _pair(where: str, row: Any, chat: bool) -> Choice:
    question, *answers = (_field(where, row, name) for name in _PAIR)
    if chat:
        return Choice([{"role": "user", "content": question}], (answers[0].strip(),), (answers[1].strip(),))
    prompt = f"{question}\n\nAnswer:"
    return Choice(prompt, (f" {answers[0].strip()}",), (f" {answers[1].strip()}",))


def _truthful(where: str, row: Any) -> Choice:
    question, best, wrong = (_field(where, row, name) for name in ("Question", "Best Answer", "Incorrect Answers"))
    best = _closed(best)
    correct = [best, *(a for a in map(_closed, row.get("Correct Answers", "").split(";")) if a and a != best)]
    others = [a for a in map(_closed, wrong.split(";")) if a]
    if not others:
        raise ValueError(
            f"read_choices: {where} has no answer in 'Incorrect Answers', but {wrong!r}; give one at least"
        )
    return Choice(TRUTHFUL.replace("{question}", question.strip()), tuple(correct), tuple(others))


def _closed(answer: str) -> str:
    """An answer as it follows the prompt, with a full stop; "" stays so."""
    text = answer.strip()
    return f" {text}{'' if text.endswith('.') else '.'}" if text else ""


@dataclass(frozen=True)
class _Asked:
    """Questions whose answers are tokens already."""

    model: nn.Module
    choices: list[Choice]
    sequences: list[list[Scored]]
    batch_size: int

    def __call__(self, plan: Plan | None, strength: float) -> ChoiceScores:
        flat = [one for part in self.sequences for one in part]
        found = torch.tensor(
            log_likelihoods(self.model, flat, [Dose(plan, strength)] * len(flat), self.batch_size),
            dtype=torch.float64,
            device="cpu",
        )
        parts = found.split([len(part) for part in self.sequences])
        sizes = [len(choice.matching) for choice in self.choices]
        return ChoiceScores.of([(part[:size], part[size:]) for part, size in zip(parts, sizes, strict=True)])


def _head(reader: TextReader, prompt: Any) -> tuple[str, list[int]]:
    """A prompt, a string or a chat, as text, and its token ids."""
    if isinstance(prompt, str):
        text, ids = prompt, reader.beginning(prompt)
    else:
        text = reader.chat(prompt, f"the prompt {short_text(prompt)}")
        ids = reader.bare(text)
    if not ids:
        raise ValueError(f"{reader.owner}: the prompt {prompt!r} has no tokens; give it content")
    return text, ids


def _sequences(model: nn.Module, reader: TextReader, choice: Choice) -> list[Scored]:
    (text, head), found, limits = _head(reader, choice.prompt), [], Limits(reader.owner, model)
    for answer in (*choice.matching, *choice.others):
        tail = reader.following(text, answer)
        if not tail:
            raise ValueError(f"{reader.owner}: the answer {answer!r} has no tokens; give it content")
        limits.check(short_text(text + answer), (*head, *tail))
        found.append(Scored((*head, *tail), len(head)))
    return found


def _controls(
    model: nn.Module, reader: TextReader, plan: Plan, strength: float, choices: Sequence[Choice], draws: int
) -> list[Plan]:
    """Plans that add a random direction wherever the plan edits, under its conditions, as far as it moves rows there.

    None where the plan moves no row.
    """
    edits = places_of(plan, find_layers(model, reader.owner), reader.owner)
    texts = [choice.prompt for choice in choices[:: max(1, len(choices) // 8)]]
    parts = {place: _parts(chain, _stream(model, reader, texts, place), strength) for place, chain in edits.items()}
    generator = seeded(0)
    found = []
    for _ in range(draws):
        drawn = {place: [part.control(generator) for part in several] for place, several in parts.items() if several}
        if drawn:
            found.append(Plan(drawn, plan.positions, plan.model, plan.special))
    return found


def _stream(model: nn.Module, reader: TextReader, texts: Sequence[Any], place: Place) -> Tensor:
    """What the unsteered model has at a place, at every token, (n, d)."""
    site, layer = place
    return collect(model, reader, texts, [layer], "all", site, progress=False)[layer]


@dataclass(frozen=True)
class _Part:
    """Edits of a place that one random direction stands in for.

    Attributes:
        edit: The edit that says whether there is a condition; of several without one the last.
        width: d.
        lengths: Median change of the rows that are moved; of an edit with rows of its own for a prompt's first tokens of each.
    """

    edit: Intervention
    width: int
    lengths: tuple[float, ...]

    def control(self, generator: torch.Generator) -> Intervention:
        """An addition of random directions of these lengths, under the edit's condition."""
        drawn = torch.randn(len(self.lengths), self.width, generator=generator, device="cpu")
        rows = drawn / drawn.norm(dim=1, keepdim=True) * torch.tensor(self.lengths, device="cpu")[:, None]
        added = Add(rows if self.edit.by_token else rows[0])
        return replace(self.edit, then=added) if isinstance(self.edit, When) else added


def _parts(chain: tuple[Intervention, ...], x: Tensor, strength: float) -> list[_Part]:
    """The parts of a chain that move rows x: all of it, or each edit by itself where one has a condition or rows of its own."""
    alone = any(isinstance(edit, When) or edit.by_token for edit in chain)
    found = []
    for several in [(edit,) for edit in chain] if alone else [chain]:
        edit, before = several[-1], x
        if edit.by_token:
            ways = [x if row is None else row.apply(x, strength) for row in edit.by_token]
        else:
            for one in several:
                x = (one.then if isinstance(one, When) else one).apply(x, strength)
            ways = [x]
        lengths = tuple(typical_change(before, way) for way in ways)
        if any(lengths):
            found.append(_Part(edit, before.shape[1], lengths))
    return found
