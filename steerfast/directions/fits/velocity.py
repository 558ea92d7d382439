"""A velocity field fitted by the model's own gradients: the way that helps most for what it breaks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, positive_integer, whole_number
from steerfast.barriers.data import seeded
from steerfast.barriers.velocity import VelocityField, VelocityInfo
from steerfast.edits.flow import flow
from steerfast.models.layers import evaluating
from steerfast.models.texts import TextReader

from .lessons import Lesson, Pupil, read_lessons, split

SAMPLES, TOKENS, BATCH = 48, 48, 16
"""Neutral texts that the model writes where none are given, their length in tokens, and how many it writes at a time."""
OPENING = 5
"""Tokens of a neutral text that count as its prompt; the edit begins at the last of them."""
SIGNS = 8
"""Random signs for each neutral text: that many draws of the Fisher information."""
HELD = 6
"""Of so many neutral texts one is held out, to measure the damage on."""
DAMAGE = 0.1
"""Nats per held-out neutral token that a time of 1 costs: KL(unsteered ‖ steered)."""
STRIDE, LONGEST = 1.5, 1e6
"""Factor between two times at which that cost is looked for, and how far from the expected one."""
HALVINGS = 8
"""Halvings of the interval in which it is found."""


def fit_velocity(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[tuple[str, str, str]],
    layer: int,
    *,
    neutral: Iterable[str] | None = None,
    rank: int = 3,
    damping: tuple[float, float] = (3.0, 1.0),
    seed: int = 0,
) -> VelocityField:
    """Fit an affine velocity field at a block's output that turns a model from unwanted to wanted continuations.

    Of all edits a ↦ a + M·(a, 1) of low rank it is the one that raises log p(wanted) − log p(unwanted) fastest for a given
    damage to neutral text, to first and second order: the natural gradient

        M ∝ F⁻¹ G Σ⁻¹,   G = mean over examples of Σ ∇(log p)·(a, 1)ᵀ,   F: Fisher information,   Σ: mean of (a, 1)(a, 1)ᵀ

    with G summed over the tokens that are edited, the last of the prompt and every later one, with the minus sign for unwanted
    continuations; F and Σ on neutral text, each with a share of its mean eigenvalue added. M is cut to its leading terms in the
    metric of F and Σ. The model's weights stay as they are.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        examples: (prompt, wanted, unwanted), strings; mind the leading space of a continuation. Of ten or more every fifth is
            held out.
        layer: Decoder block, 0-based, negative from the end.
        neutral: Texts that are to stay as likely as they are; None: 48 texts that the model writes itself.
        rank: Terms of M; the field has at most twice that rank.
        damping: Shares of the mean eigenvalue that are added to F and Σ.
        seed: Of what is drawn.

    Returns:
        The field, paced so that a time of 1 costs 0.1 nats, KL(unsteered ‖ steered), per token of held-out neutral text along
        ten Euler steps; for `sf.Flow(field, T=1.0)` at positions "last". Its `info` holds what held-out pairs gain, and the
        damage.

    Raises:
        TypeError, ValueError: no examples, one that is not three strings or has a text without tokens, neutral texts too
            short, an unknown layer, rank > d, damping that is not positive, or no text to begin with where the model is to write.

    Reference:
        Amari 1998, Natural gradient works efficiently in learning; Martens and Grosse 2015, K-FAC (arXiv:1503.05671), for the
        factors F and Σ.

    Example:
        >>> pairs = [("The film was", " a joy.", " a bore."), ("My day was", " lovely.", " awful.")]
        >>> neutral = ["The library opens at nine and closes at five.", "Water boils sooner on a mountain than at the coast."]
        >>> field = sf.fit_velocity(model, tokenizer, pairs, 12, neutral=neutral, rank=1)
        >>> plan = sf.Plan({12: sf.Flow(field, T=1.0)}, positions="last")
    """
    owner = "fit_velocity"
    reader = TextReader.of(tokenizer, owner)
    pairs = read_lessons(owner, reader, examples, contrast=True)
    pupil = Pupil(owner, model, layer)
    rank, shares, seed = _numbers(owner, rank, damping, seed, pupil.width)
    generator = seeded(seed)
    texts = _neutral(owner, pupil.model, tokenizer, reader, neutral, seed)
    held_texts, texts = texts[::HELD], [text for i, text in enumerate(texts) if i % HELD]
    taught, held = split(pairs)
    with pupil.taught():
        metric = _metric(pupil, texts, generator)
        field, speed = _natural(metric, _pull(pupil, taught), rank, shares)
        field = replace(field, origin=pupil.origin)
        field, damage = _paced(pupil, field, held_texts, math.sqrt(2 * DAMAGE) / speed)
        before, after = (_odds(pupil, held, edit) for edit in (None, _edit(field, 1.0)))
    settings = {
        "rank": float(rank),
        "damping_fisher": shares[0],
        "damping_rows": shares[1],
        "examples": float(len(taught)),
    }
    return replace(field, info=VelocityInfo("natural", after - before, damage, settings))


class _Metric(NamedTuple):
    """What neutral text says: the Fisher information, the mean row, and the rows' covariance, in float64."""

    fisher: Tensor  # (d, d)
    mean: Tensor  # (d,)
    covariance: Tensor  # (d, d)


def _numbers(owner: str, rank: Any, damping: Any, seed: Any, width: int) -> tuple[int, tuple[float, float], int]:
    """Checked numbers of a fit."""
    rank, seed = positive_integer(owner, "rank", rank), whole_number(owner, "seed", seed, 0)
    if rank > width:
        raise ValueError(f"{owner}: rank is {rank} and the stream has width {width}; expected at most that")
    if isinstance(damping, (str, bytes)) or not isinstance(damping, Sequence) or len(damping) != 2:
        raise TypeError(
            f"{owner}: damping is {damping!r}; expected two numbers, for the Fisher information and the rows"
        )
    fisher, rows = (finite_number(owner, "damping", value) for value in damping)
    if fisher <= 0 or rows <= 0:
        raise ValueError(f"{owner}: damping is {damping!r}; expected two numbers > 0")
    return rank, (fisher, rows), seed


def _neutral(
    owner: str, model: Any, tokenizer: Any, reader: TextReader, neutral: Any, seed: int
) -> list[tuple[int, ...]]:
    """Token ids of neutral texts, each longer than its opening."""
    if neutral is None:
        return _written(owner, model, tokenizer, seed)
    if isinstance(neutral, (str, bytes)) or not isinstance(neutral, Iterable):
        raise TypeError(f"{owner}: neutral is {neutral!r}; expected a list of texts, or None")
    texts = [tuple(reader.beginning(text)) for text in neutral]
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
    device = next(model.parameters()).device
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
def _pull(pupil: Pupil, lessons: Sequence[Lesson]) -> Callable[[Tensor], Tensor]:
    """mean ↦ G (d, d + 1): the mean over examples of Σ ∇(log p(wanted) - log p(unwanted))·(a - mean, 1)ᵀ."""
    rows, gradients = [], []
    for one in lessons:
        for continuation, sign in ((one.wanted, 1.0), (one.unwanted, -1.0)):
            at, logits = _rows(pupil, [*one.prompt, *continuation], len(one.prompt))
            follows = torch.tensor(continuation, device=logits.device)[:, None]
            (gradient,) = torch.autograd.grad(logits.gather(1, follows).sum(), at)
            rows.append(at.detach().double().cpu())
            gradients.append(sign * gradient.double().cpu())
    a, g = torch.cat(rows), torch.cat(gradients)

    def pull(mean: Tensor) -> Tensor:
        return g.T @ torch.cat([a - mean, a.new_ones(len(a), 1)], 1) / len(lessons)

    return pull


@torch.enable_grad()
def _metric(pupil: Pupil, texts: Sequence[Sequence[int]], generator: torch.Generator) -> _Metric:
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
        for i in range(SIGNS):
            drawn = torch.multinomial(chances, 1, generator=generator)
            signs = torch.randint(0, 2, (len(chances),), generator=generator, device="cpu") * 2.0 - 1.0
            total = (logits.gather(1, drawn.to(logits.device))[:, 0] * signs.to(logits.device)).sum()
            (gradient,) = torch.autograd.grad(total, at, retain_graph=i < SIGNS - 1)
            shift = gradient.double().sum(0).cpu()
            fisher = fisher + torch.outer(shift, shift) / len(chances)
    a = torch.cat(rows)
    mean = a.mean(0)
    return _Metric(fisher / (SIGNS * len(texts)), mean, (a - mean).T @ (a - mean) / len(a))


def _natural(
    metric: _Metric, pull: Callable[[Tensor], Tensor], rank: int, shares: tuple[float, float]
) -> tuple[VelocityField, float]:
    """F⁻¹GΣ⁻¹ cut to its leading terms, as a field; and the root of twice what a time of 1 costs by F and Σ, in nats a token."""
    d = len(metric.mean)
    one = torch.eye(d, dtype=torch.float64, device="cpu")
    fisher = metric.fisher + shares[0] * metric.fisher.trace() / d * one
    covariance = metric.covariance + shares[1] * metric.covariance.trace() / d * one
    left, right = _inverse_root(fisher), torch.block_diag(_inverse_root(covariance), one[:1, :1])
    u, s, vh = torch.linalg.svd(left @ pull(metric.mean) @ right)
    count = min(rank, int((s > 1e-9 * s[0]).sum()))
    if not bool(s.isfinite().all()) or count == 0:
        raise ValueError(
            "fit_velocity: the examples pull nowhere, or to numbers that are not finite; check the continuations"
        )
    written, read = (left @ u[:, :count] * s[:count]).T, vh[:count] @ right  # (r, d), (r, d + 1)
    basis = _span(torch.cat([written, read[:, :-1]]))
    phases = read[:, -1] - read[:, :-1] @ metric.mean
    omega, eta = read[:, :-1] @ basis.T, written @ basis.T
    return VelocityField(basis, basis.new_zeros(len(basis)), omega, phases, eta), float(s[:count].norm())


def _inverse_root(matrix: Tensor) -> Tensor:
    """A^(-1/2) of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=1e-300).rsqrt()) @ vectors.T


def _span(rows: Tensor) -> Tensor:
    """Orthonormal rows of the span of rows (m, d)."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    _, s, vh = torch.linalg.svd(unit, full_matrices=False)
    return vh[s > 1e-6 * s[0]]


def _edit(field: VelocityField, T: float) -> Callable[[Tensor], Tensor]:
    """The flow over a time, on rows."""
    return lambda x: flow(x, field, T=T)


def _paced(
    pupil: Pupil, field: VelocityField, texts: Sequence[Sequence[int]], time: float
) -> tuple[VelocityField, float]:
    """The field in units in which a time of 1 costs `DAMAGE`, and what it does cost; `time` is where that is expected.

    The search walks from there in small steps, so that it ends at the first time that costs so much: far behind it ten Euler
    steps may diverge, and the cost go anywhere.
    """

    def damage(T: float) -> float:
        cost = float(torch.cat([_divergence(pupil, ids, _edit(field, T)) for ids in texts]).mean())
        return cost if math.isfinite(cost) else math.inf

    low = high = time
    if damage(time) < DAMAGE:
        while damage(high) < DAMAGE:
            low, high = high, STRIDE * high
            if high > LONGEST * time:
                raise ValueError(
                    f"fit_velocity: even {LONGEST:g} times the expected path costs less than {DAMAGE} nats a token of neutral "
                    "text; check the examples and the neutral texts"
                )
    else:
        while damage(low) >= DAMAGE:
            low, high = low / STRIDE, low
    for _ in range(HALVINGS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if damage(middle) < DAMAGE else (low, middle)
    return replace(field, outputs=low * field.outputs, bias=low * field.bias), damage(low)


@torch.no_grad()
def _divergence(pupil: Pupil, ids: Sequence[int], edit: Callable[[Tensor], Tensor]) -> Tensor:
    """KL(unsteered ‖ steered) of each token of a neutral text after its opening."""
    p, q = (_chances(pupil, ids, OPENING, way) for way in (None, edit))
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).cpu()


def _odds(pupil: Pupil, lessons: Sequence[Lesson], edit: Callable[[Tensor], Tensor] | None) -> float:
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
def _likelihood(pupil: Pupil, ids: Sequence[int], start: int, edit: Callable[[Tensor], Tensor] | None) -> Tensor:
    """log p of each token from `start` on, edited from the token before them on."""
    rows = _chances(pupil, ids, start, edit)
    return rows.gather(1, torch.tensor(list(ids[start:]), device=rows.device)[:, None])[:, 0].cpu()


def _chances(pupil: Pupil, ids: Sequence[int], start: int, edit: Callable[[Tensor], Tensor] | None) -> Tensor:
    """log p of all that may stand at each place from `start` on, edited from the token before them on."""

    def late(x: Tensor) -> Tensor:
        return x if edit is None else torch.cat([x[:, : start - 1], edit(x[:, start - 1 :])], 1)

    return pupil.logits(ids, late)[start - 1 : -1].float().log_softmax(-1)
