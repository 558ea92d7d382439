"""What a model's own gradients say of examples and of neutral text, kept so that many fits can be made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerfast.barriers.data import seeded
from steerfast.models.layers import evaluating, home
from steerfast.models.limits import Limits
from steerfast.models.texts import TextReader, short_text

from .lessons import Edit, Lesson, Pupil, read_lessons

SAMPLES, TOKENS, BATCH = 48, 48, 16
"""Neutral texts that the model writes where none are given, their length in tokens, and how many it writes at a time."""
OPENING = 5
"""Tokens of a neutral text that count as its prompt; the edit begins at the last of them."""
SIGNS = 8
"""Random signs for each neutral text: that many draws of the Fisher information."""
HELD = 6
"""Of so many neutral texts one is held out, to measure the damage on."""
ROOM = 1 << 30
"""Bytes that the unsteered model's numbers on these may take while fits are paced."""

CHECK = "check the text, and the model's weights and dtype"
NOISE = 1e-5
"""Share of the lengths of all pulls below which their sum is rounding."""


class Metric(NamedTuple):
    """What neutral text says: the Fisher information, the mean row, and the rows' covariance, in float64."""

    fisher: Tensor  # (d, d)
    mean: Tensor  # (d,)
    covariance: Tensor  # (d, d)


class Gradients:
    """The gradients of examples and the metric of neutral text, computed once for all labels; `pull` while the pupil is taught.

    Attributes:
        pupil: The model, and where it is edited.
        lessons: The examples.
        metric: Of the neutral texts that are not held out.
        held: Neutral texts that are, as token ids.
    """

    def __init__(self, pupil: Pupil, lessons: Sequence[Lesson], neutral: Sequence[tuple[int, ...]], seed: int) -> None:
        self.pupil, self.lessons, self.held = pupil, lessons, neutral[::HELD]
        fitted = [text for i, text in enumerate(neutral) if i % HELD]
        self._known: dict[int, tuple[Tensor, Tensor]] = {}
        self._unsteered: dict[int, Tensor] = {}
        with pupil.taught():
            self.metric = fisher_metric(pupil, fitted, seeded(seed))

    @classmethod
    def of(
        cls, owner: str, model: nn.Module, tokenizer: Any, examples: Any, layer: int, neutral: Any = None, seed: int = 0
    ) -> Gradients:
        """Of texts; the arguments are those of `fit_velocity`."""
        reader = TextReader.of(tokenizer, owner)
        lessons = read_lessons(owner, model, reader, examples, contrast=True)
        pupil = Pupil(owner, model, layer)
        return cls(pupil, lessons, neutral_texts(owner, pupil.model, reader, neutral, seed), seed)

    def pull(self, signs: Sequence[float]) -> Tensor:
        """G (d, d + 1): the mean over examples of Σ ∇(log p(wanted) - log p(unwanted))·(a - mean, 1)ᵀ.

        Args:
            signs: Of each example 1, -1 to exchange its sides, or 0 to leave it out.

        Raises:
            ValueError: what the examples pull cancels out, or is not finite.
        """
        rows, gradients = [], []
        for i, sign in enumerate(signs):
            if sign:
                a, g = self._of(i)
                rows.append(a - self.metric.mean)
                gradients.append(sign * g)
        a, g = torch.cat(rows), torch.cat(gradients)
        a = torch.cat([a, a.new_ones(len(a), 1)], 1)
        total = g.T @ a
        if not float(total.norm()) > NOISE * float((g.norm(dim=1) * a.norm(dim=1)).sum()):
            raise ValueError(
                f"{self.pupil.owner}: the examples pull nowhere, since what they pull cancels out, or to numbers that are not "
                "finite; check the continuations"
            )
        return total / len(rows)

    @torch.no_grad()
    def damage(self, edit: Edit) -> Tensor:
        """KL(unsteered ‖ steered) of each token of the held-out neutral texts after their openings.

        Raises:
            ValueError: the unsteered model's own numbers are not finite.
        """
        found = []
        for i, ids in enumerate(self.held):
            p, q = self._chances(i), _chances(self.pupil, ids, OPENING, edit)
            found.append(torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).cpu())
        return torch.cat(found)

    def _of(self, i: int) -> tuple[Tensor, Tensor]:
        if i not in self._known:
            self._known[i] = pull_of(self.pupil, self.lessons[i])
        return self._known[i]

    def _chances(self, i: int) -> Tensor:
        """log p of the unsteered model on a held-out neutral text, kept where there is room: every pacing asks for it again."""
        if i in self._unsteered:
            return self._unsteered[i]
        found = _chances(self.pupil, self.held[i], OPENING, None)
        if bool(found.isnan().any()):
            raise ValueError(f"{self.pupil.owner}: the model's numbers on a neutral text are not finite; {CHECK}")
        if found.nbytes + sum(kept.nbytes for kept in self._unsteered.values()) <= ROOM:
            self._unsteered[i] = found
        return found


def neutral_texts(owner: str, model: Any, reader: TextReader, neutral: Any, seed: int) -> list[tuple[int, ...]]:
    """Token ids of neutral texts, each longer than its opening."""
    if neutral is None:
        return _written(owner, model, reader.tokenizer, seed)
    if isinstance(neutral, (str, bytes)) or not isinstance(neutral, Iterable):
        raise TypeError(f"{owner}: neutral is {neutral!r}; expected a list of texts, or None")
    given = list(neutral)
    odd = next((text for text in given if not isinstance(text, str)), None)
    if odd is not None:
        raise TypeError(f"{owner}: neutral holds {odd!r}; expected texts, each one string")
    texts, limits = [tuple(reader.beginning(text)) for text in given], Limits(owner, model)
    for text, ids in zip(given, texts, strict=True):
        limits.check(short_text(text), ids)
    if len(texts) < 2 or min(map(len, texts)) <= OPENING:
        shortest = min(map(len, texts), default=0)
        raise ValueError(
            f"{owner}: {len(texts)} neutral texts, the shortest of {shortest} tokens; expected two or more, each of more than "
            f"{OPENING}"
        )
    return texts


@contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """Seeded draws on the CPU and on one device; no other device's random numbers move, as `torch.manual_seed` would have it."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _written(owner: str, model: Any, tokenizer: Any, seed: int) -> list[tuple[int, ...]]:
    """Texts that the model writes from its first token on, sampled; the caller's random numbers stay where they are."""
    known = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    first = next((i for i in known if i is not None), None)
    if first is None or not hasattr(model, "generate"):
        raise ValueError(f"{owner}: this model has no first token to write texts from; give neutral=, a list of texts")
    device = home(model)
    start = torch.full((BATCH, 1), first, device=device)
    options = {
        "attention_mask": torch.ones_like(start), "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "pad_token_id": first,
    }  # fmt: skip
    found = []
    with evaluating(model), _drawing(device, seed):
        for _ in range(SAMPLES // BATCH):
            found += [tuple(row) for row in model.generate(start, **options).tolist()]
    return found


def _rows(pupil: Pupil, ids: Sequence[int], start: int) -> tuple[Tensor, Tensor]:
    """The stream at the tokens from `start` - 1 on as a leaf (t, d), and log p of all that may follow each, (t, vocabulary)."""
    kept: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        kept.append(x[0, start - 1 : -1].detach().float().requires_grad_())
        return torch.cat([x[0, : start - 1], kept[0].to(x.dtype), x[0, -1:]])[None]

    logits = pupil.logits(ids, leaf)[start - 1 : -1].float().log_softmax(-1)
    return kept[0], logits


@torch.enable_grad()
def pull_of(pupil: Pupil, one: Lesson) -> tuple[Tensor, Tensor]:
    """The rows of an example that are edited, and ∇(log p(wanted) - log p(unwanted)) there, each (t, d) in float64."""
    rows, gradients = [], []
    for continuation, sign in ((one.wanted, 1.0), (one.unwanted, -1.0)):
        at, logits = _rows(pupil, [*one.prompt, *continuation], len(one.prompt))
        follows = torch.tensor(continuation, device=logits.device)[:, None]
        (gradient,) = torch.autograd.grad(logits.gather(1, follows).sum(), at)
        rows.append(at.detach().double().cpu())
        gradients.append(sign * gradient.double().cpu())
    return torch.cat(rows), torch.cat(gradients)


@torch.enable_grad()
def fisher_metric(pupil: Pupil, texts: Sequence[Sequence[int]], generator: torch.Generator) -> Metric:
    """The Fisher information of a shift that all tokens of a neutral text share, per token, and the rows there.

    With random signs e the gradient of Σ e·log p(token), tokens drawn from the model, has the sum of all tokens' Fisher
    information as the mean of its outer product.
    """
    fisher: Any = 0.0
    rows = []
    for ids in texts:
        at, logits = _rows(pupil, ids, OPENING)
        rows.append(at.detach().double().cpu())
        chances = logits.detach().exp().cpu()
        if not bool(chances.isfinite().all()):
            raise ValueError(f"{pupil.owner}: the model's numbers on a neutral text are not finite; {CHECK}")
        for i in range(SIGNS):
            drawn = torch.multinomial(chances, 1, generator=generator)
            signs = torch.randint(0, 2, (len(chances),), generator=generator, device="cpu") * 2.0 - 1.0
            total = (logits.gather(1, drawn.to(logits.device))[:, 0] * signs.to(logits.device)).sum()
            (gradient,) = torch.autograd.grad(total, at, retain_graph=i < SIGNS - 1)
            shift = gradient.double().sum(0).cpu()
            fisher = fisher + torch.outer(shift, shift) / len(chances)
    a = torch.cat(rows)
    mean = a.mean(0)
    found = Metric(fisher / (SIGNS * len(texts)), mean, (a - mean).T @ (a - mean) / len(a))
    if not (float(found.fisher.trace()) > 0 and float(found.covariance.trace()) > 0):
        raise ValueError(
            f"{pupil.owner}: {len(texts)} neutral texts with {len(a)} rows in all say nothing of the stream; give more or longer "
            "ones"
        )
    return found


def log_odds(pupil: Pupil, lessons: Sequence[Lesson], edit: Edit | None) -> float:
    """Mean log p(wanted) - log p(unwanted) of examples; NaN without any."""
    if not lessons:
        return math.nan
    found = [
        _likelihood(pupil, [*one.prompt, *way], len(one.prompt), edit).sum() * sign
        for one in lessons
        for way, sign in ((one.wanted, 1.0), (one.unwanted, -1.0))
    ]
    return float(torch.stack(found).sum()) / len(lessons)


@torch.no_grad()
def _likelihood(pupil: Pupil, ids: Sequence[int], start: int, edit: Edit | None) -> Tensor:
    """log p of each token from `start` on, edited from the token before them on."""
    rows = _chances(pupil, ids, start, edit)
    return rows.gather(1, torch.tensor(list(ids[start:]), device=rows.device)[:, None])[:, 0].cpu()


def _chances(pupil: Pupil, ids: Sequence[int], start: int, edit: Edit | None) -> Tensor:
    """log p of all that may stand at each place from `start` on, edited from the token before them on."""

    def late(x: Tensor) -> Tensor:
        return x if edit is None else torch.cat([x[:, : start - 1], edit(x[:, start - 1 :])], 1)

    return pupil.logits(ids, late)[start - 1 : -1].float().log_softmax(-1)
