"""LinEAS: affine maps of several layers, learned together so that activations on one side are distributed as on the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, instance_of, one_of, seed_number, whole_numbers
from steerfast.barriers.data import seeded
from steerfast.edits.fitted import FitInfo
from steerfast.edits.linear import Affine
from steerfast.models.collect import Activations, collect
from steerfast.models.layers import evaluating, find_layers, home
from steerfast.models.limits import Limits
from steerfast.models.texts import TextReader, short_text
from steerfast.place import typical_norm_of
from steerfast.plan import Plan

from .lessons import frozen, steps_and_rate
from .linear import paired_quantiles

POOLS = ("mean", "last")
BATCH = 8
"""Texts of each side in a step."""


@dataclass(frozen=True)
class LinEAS:
    """How affine maps of several layers are trained.

    Args:
        penalty: λ₁: leaves coordinates alone that gain less than this.
        group_penalty: λ_G: leaves layers alone.
        pool: What stands for a text: "mean" or "last" of its tokens. Every token is edited.
        steps: How many, on eight texts of each side.
        lr: The learning rate.

    Raises:
        TypeError, ValueError: a number out of range, or an unknown pool.
    """

    penalty: float = 0.0
    group_penalty: float = 0.0
    pool: str = "mean"
    steps: int = 200
    lr: float = 0.01

    def __post_init__(self) -> None:
        one_of("LinEAS", "pool", self.pool, POOLS)
        steps_and_rate("LinEAS", self.steps, self.lr)
        for name in ("penalty", "group_penalty"):
            if finite_number("LinEAS", name, getattr(self, name)) < 0:
                raise ValueError(f"LinEAS: {name} is {getattr(self, name)}; expected >= 0")


@torch.inference_mode(False)
def fit_lineas(
    model: nn.Module,
    tokenizer: Any,
    positive: Iterable[str],
    negative: Iterable[str],
    layers: Any,
    site: str = "resid_post",
    settings: LinEAS | None = None,
    seed: int = 0,
) -> Plan:
    """Train w ⊙ x + b at several layers together, so that negative texts have the activations of positive ones (LinEAS).

        loss = Σ over layers and coordinates of W₂²(edited negative, positive)
               + λ₁·(‖w − 1‖₁ + ‖c‖₁) + λ_G·√d·(‖w − 1‖₂ + ‖c‖₂) per layer

    The activations of a layer are those that the edits before it and there have made, pooled over the tokens of each text; W₂²
    in one dimension is the mean squared difference of the sorted values. Each coordinate is measured in standard deviations σ
    of both sides there, and turns about its negative mean μ, x ↦ x + (w − 1)(x − μ) + σc, so that one learning rate serves all:
    b = σc − (w − 1)μ. Steps are those of the paper: down the gradient (of length √d per layer at most), then the proximal step of
    both penalties. A layer that they empty is left out of the plan.

    Args:
        model: A `transformers` causal language model; its weights stay as they are.
        tokenizer: Its tokenizer.
        positive: Texts with the property, 2 at least; 32 are enough in the paper.
        negative: Texts without it; they need not be paired.
        layers: Decoder blocks, 0-based, as of `collect`.
        site: Where, as of `collect`.
        settings: A `LinEAS`; None: no penalties, 200 steps.
        seed: Of the order of the texts.

    Returns:
        A `Plan` of an `Affine` per layer, each knowing its origin and, in `info.closed`, the share of W₂² that all of them
        together close at its layer on held-out texts (every fifth of each side, of ten or more; NaN if none was held out).

    Raises:
        TypeError, ValueError: fewer than 2 texts on a side, an unknown layer or site, a negative penalty, the loss diverges, or
            the penalties empty every layer.

    Reference:
        Rodriguez et al. 2025, LinEAS (arXiv:2503.10679).

    Example:
        >>> plan = sf.fit_lineas(model, tokenizer, kind, rude, [8, 12, 16], settings=sf.LinEAS(penalty=1e-3))  # doctest: +SKIP
    """
    owner = "fit_lineas"
    settings = LinEAS() if settings is None else settings
    instance_of(owner, "settings", settings, LinEAS, "sf.LinEAS(penalty=1e-3)")
    seed = seed_number(owner, seed)
    pool = settings.pool
    found = find_layers(model, owner)
    chosen = sorted({found.resolve(layer, owner) for layer in whole_numbers(owner, "layers", layers, found.count)})
    reader = TextReader.of(tokenizer, owner)
    texts = [_texts(owner, name, side) for name, side in (("positive", positive), ("negative", negative))]
    held = [side[::5] if len(side) >= 10 else [] for side in texts]
    taught = [[text for i, text in enumerate(side) if not out or i % 5] for side, out in zip(texts, held, strict=True)]
    collected = [collect(model, reader, side, chosen, pool, site, progress=False) for side in taught]
    maps = {layer: _Map(*(rows[layer] for rows in collected)) for layer in chosen}
    run = _Pass(getattr(model, "_orig_mod", model), reader, {at: found.point(at, site, owner) for at in chosen}, pool)
    with frozen(run.model), evaluating(model), run.edited(maps), torch.enable_grad():
        _train(owner, run, maps, taught[1], collected[0], settings, seeded(seed))
    closed = {}
    if held[0] and held[1]:
        with evaluating(model):
            target = collect(model, reader, held[0], chosen, pool, site, progress=False)
            closed = _closed(run, maps, held[1], target)
    edits = {}
    for layer in chosen:
        if (pair := maps[layer].weights()) is not None:
            info = FitInfo("lineas", closed.get(layer, math.nan), positives=len(taught[0]), negatives=len(taught[1]))
            edits[site, layer] = Affine(*pair).known_from(collected[1].origin(layer), info)
    if not edits:
        raise ValueError(f"{owner}: the penalties leave no coordinate of any layer changed; make them smaller")
    return Plan(edits, model=getattr(model, "_orig_mod", model))


def wasserstein(a: Tensor, b: Tensor) -> Tensor:
    """W₂² of the columns of a (n, d) and b (m, d), (d,): ∫₀¹ (Q_a(u) − Q_b(u))² du, differentiable in both."""
    share, first, second = paired_quantiles(a, b)
    return (share * (first - second).square()).sum(0)


def shrink(x: Tensor, penalty: float, group_penalty: float) -> Tensor:
    """The proximal step of penalty·‖x‖₁ + group_penalty·‖x‖₂: soft threshold, then a shorter vector."""
    thresholded = x.sign() * (x.abs() - penalty).clamp(min=0)
    length = thresholded.norm()
    return thresholded * (1 - group_penalty / length.clamp(min=1e-30)).clamp(min=0)


class _Map:
    """An affine map in units of a layer's coordinates: x ↦ x + v ⊙ (x − μ) + σ ⊙ c."""

    def __init__(self, positive: Tensor, negative: Tensor) -> None:
        rows = torch.cat([positive, negative])
        self.size = rows.std(0).clamp(min=1e-6 * typical_norm_of(rows))
        self.middle = negative.mean(0)
        self.v, self.c = (torch.zeros_like(self.size).requires_grad_() for _ in range(2))

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.affine()
        return (x.float() * weight.to(x.device) + bias.to(x.device)).to(x.dtype)

    def affine(self) -> tuple[Tensor, Tensor]:
        """(w, b)."""
        return 1 + self.v, self.size * self.c - self.v * self.middle

    def loss(self, edited: Tensor, target: Tensor) -> Tensor:
        """Σ over the coordinates of W₂², in squared standard deviations."""
        return wasserstein(edited.float().cpu() / self.size, target / self.size).sum()

    def shrink(self, settings: LinEAS) -> None:
        """The proximal step behind a step of the optimizer."""
        group = settings.group_penalty * math.sqrt(len(self.v))
        for part in (self.v, self.c):
            part.copy_(shrink(part, settings.lr * settings.penalty, settings.lr * group))

    def weights(self) -> tuple[Tensor, Tensor] | None:
        """(w, b); None: it changes nothing."""
        weight, bias = (part.detach() for part in self.affine())
        return (weight, bias) if bool(self.v.any()) or bool(self.c.any()) else None


class _Pass:
    """A model whose layers are edited by maps, and what it then shows of a text at each of them."""

    def __init__(self, model: nn.Module, reader: TextReader, points: dict[int, Any], pool: str) -> None:
        self.model, self.reader, self.points, self.pool = model, reader, points, pool
        self.limits = Limits(reader.owner, model)
        self.seen: dict[int, Tensor] = {}

    @contextmanager
    def edited(self, maps: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Edit while the block lasts."""

        def hook(layer: int) -> Any:
            def edit(x: Tensor) -> Tensor:
                self.seen[layer] = maps[layer](x)
                return self.seen[layer]

            return edit

        with ExitStack() as stack:
            for layer, point in self.points.items():
                stack.callback(point.attach(hook(layer)).remove)
            yield

    def __call__(self, texts: Sequence[str]) -> dict[int, Tensor]:
        """Layer to the pooled activations of the texts, (n, d); each text runs by itself, without padding."""
        rows: dict[int, list[Tensor]] = {layer: [] for layer in self.points}
        for text in texts:
            own = self.reader.ids(text)
            self.limits.check(short_text(text), own)
            ids = torch.tensor([own], device=home(self.model))
            self.model(input_ids=ids, attention_mask=torch.ones_like(ids))
            for layer, x in self.seen.items():
                rows[layer].append(x[0].float().mean(0) if self.pool == "mean" else x[0, -1].float())
        return {layer: torch.stack(found) for layer, found in rows.items()}


def _train(
    owner: str, model: _Pass, maps: dict[int, _Map], texts: list[str], target: Activations, settings: LinEAS, generator: Any
) -> None:  # fmt: skip
    """Gradient descent on the distances, with the proximal step of the penalties behind each step."""
    optimizer = torch.optim.SGD([part for one in maps.values() for part in (one.v, one.c)], lr=settings.lr)
    count = len(next(iter(target.values())))
    for step in range(settings.steps):
        mine = torch.randperm(len(texts), generator=generator, device="cpu")[:BATCH].tolist()
        other = torch.randperm(count, generator=generator, device="cpu")[:BATCH]
        optimizer.zero_grad()
        edited = model([texts[i] for i in mine])
        loss = torch.stack([one.loss(edited[layer], target[layer][other]) for layer, one in maps.items()]).sum()
        if not bool(loss.isfinite()):
            raise ValueError(f"{owner}: the loss is {float(loss.detach())} in step {step + 1}; take a smaller lr")
        loss.backward()
        for one in maps.values():
            for part in (one.v, one.c):
                nn.utils.clip_grad_norm_(part, math.sqrt(len(part)))
        optimizer.step()
        with torch.no_grad():
            for one in maps.values():
                one.shrink(settings)


@torch.no_grad()
def _closed(model: _Pass, maps: dict[int, _Map], held: list[str], target: Activations) -> dict[int, float]:
    """Layer to the share of W₂² of held-out texts that the edits close."""
    with model.edited(maps):
        after = model(held)
    with model.edited(dict.fromkeys(maps, lambda x: x)):
        before = model(held)
    return {
        layer: 1 - float(one.loss(after[layer], target[layer]) / one.loss(before[layer], target[layer]))
        for layer, one in maps.items()
    }


def _texts(owner: str, name: str, given: Any) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{owner}: {name} must be several texts, got {given!r}; put them into a list")
    found = list(given)
    if len(found) < 2 or not all(isinstance(text, str) and text for text in found):
        raise ValueError(f"{owner}: {name} holds {len(found)} texts; expected at least 2, with content")
    return found
