"""Which attention heads tell two sides apart, and the shift along each of them: inference-time intervention."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import finite_number, positive_integer, warn_user, whole_number
from steerfast._null import DRAWS, Null
from steerfast.barriers.data import Data, seeded
from steerfast.edits.fitted import FitInfo
from steerfast.edits.linear import Add
from steerfast.models.collect import Activations
from steerfast.place import Place
from steerfast.plan import Plan
from steerfast.probes.fit import data_by_layer

from .sides import shuffle

SHARE = 0.05
"""Of all heads are chosen; 48 of 1024 in the paper."""
STEPS = 25  # of Newton at most


@dataclass(frozen=True)
class HeadFit:
    """The chosen heads and the plan that shifts them.

    Attributes:
        plan: An `Add` at ("head_out", L) of each layer with a chosen head.
        chosen: (layer, head), best first.
        accuracy: Layer to the held-out accuracy of the probe of each head, float64 (heads,); NaN if nothing was held out.
        null: Mean accuracy of the chosen heads beside that of heads chosen alike on shuffled labels. There are no random
            directions in it: `random` is empty.
    """

    plan: Plan
    chosen: tuple[tuple[int, int], ...]
    accuracy: dict[int, Tensor]
    null: Null | None

    def __repr__(self) -> str:
        best = ", ".join(f"{layer}.{head} {float(self.accuracy[layer][head]):.2f}" for layer, head in self.chosen[:3])
        return f"HeadFit({len(self.chosen)} heads in {len(self.plan.edits)} layers; best: {best})"


def fit_heads(
    positive: Mapping[int, Tensor],
    negative: Mapping[int, Tensor],
    heads: int,
    *,
    count: int | None = None,
    alpha: float = 15.0,
    groups: Iterable[Any] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> HeadFit:
    """Choose the attention heads whose outputs tell two sides apart, and shift each along its mean difference (ITI).

        x_h + α·σ_h·θ_h,   θ_h = difference of the means, at length 1,   σ_h = standard deviation of θ_hᵀx_h on both sides

    Heads are ranked by the accuracy of a logistic regression on their output for rows that were held out, in five folds; the
    penalty is ‖s·w‖²/2 with s the root mean square of the head's centred rows.

    Args:
        positive: Activations with the property at site "head_out", layer -> (n, heads·w), such as
            `sf.collect(…, site="head_out")` returns.
        negative: Activations without it, (m, heads·w), the same layers.
        heads: Attention heads of a layer, `model.config.num_attention_heads`.
        count: How many are chosen, of all layers together; None: 5 % of them.
        alpha: α, in standard deviations.
        groups: As of `sf.fit`.
        seed: Of the folds and draws.
        draws: Selections on shuffled labels that the accuracy stands beside; 0: none.

    Returns:
        A `HeadFit`; its `plan` is ready, and each edit in it knows place, typical norm and, in `info`, the number of rows.

    Raises:
        TypeError, ValueError: no dicts of layers; a width that `heads` does not divide; more heads than there are; a side has
            fewer than 2 rows, NaN or a zero row.
        ModuleNotFoundError: scikit-learn is not installed.

    Warns:
        UserWarning: the rows are too few to hold some out; the heads are ranked by the length of their mean difference in σ.

    Reference:
        Li et al. 2023, Inference-Time Intervention (arXiv:2306.03341).

    Example:
        >>> pos = sf.collect(model, tokenizer, kind_texts, slice(None), site="head_out")  # doctest: +SKIP
        >>> neg = sf.collect(model, tokenizer, rude_texts, slice(None), site="head_out")  # doctest: +SKIP
        >>> found = sf.fit_heads(pos, neg, model.config.num_attention_heads, count=24)  # doctest: +SKIP
        >>> with sf.steer(model, found.plan):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    owner = "fit_heads"
    if not isinstance(positive, Mapping):
        raise TypeError(f"{owner}: positive is a {type(positive).__name__}; expected layer -> activations at head_out")
    if isinstance(positive, Activations) and positive.site != "head_out":
        raise ValueError(f'{owner}: the activations are of {positive.site}; collect with site="head_out"')
    heads, alpha = positive_integer(owner, "heads", heads), finite_number(owner, "alpha", alpha)
    whole_number(owner, "draws", draws, 0)
    layers = data_by_layer(owner, positive, negative, groups, seed)
    first = next(iter(layers.values()))
    for layer, data in layers.items():
        if data.x.shape[1] % heads:
            raise ValueError(f"{owner}: layer {layer} has width {data.x.shape[1]}, which {heads} heads do not divide")
    total = heads * len(layers)
    count = max(1, round(SHARE * total)) if count is None else positive_integer(owner, "count", count)
    if count > total:
        raise ValueError(f"{owner}: count is {count} and there are {total} heads")
    accuracy = _accuracies(layers, heads)
    ranks = accuracy if first.folds else {layer: _shift(data, heads)[1] for layer, data in layers.items()}
    if not first.folds:
        warn_user(f"{owner}: the {len(first.x)} rows are too few, or in too few groups, to hold some out; give more")
    chosen = _best(ranks, count)
    null = _null(layers, heads, count, _mean(accuracy, chosen), draws) if first.folds and draws else None
    return HeadFit(_plan(layers, heads, chosen, alpha), chosen, accuracy, null)


def logistic(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(w, b) of logistic regressions with penalty ‖w‖²/2, all at once, by Newton's method; no step leads uphill.

    Args:
        x: float64 (h, n, d), a regression for each of the h.
        labels: bool (n,), the same for all.

    Returns:
        float64 (h, d) and (h,).
    """
    h, n, d = x.shape
    rows = torch.cat([x, x.new_ones(h, n, 1)], 2)
    y, w = labels.to(x.dtype), x.new_zeros(h, d + 1)
    penalty = torch.ones(d + 1, dtype=x.dtype, device="cpu")
    penalty[-1] = 0
    sign = 1 - 2 * y

    def loss(w: Tensor) -> Tensor:
        misses = torch.nn.functional.softplus(sign * (rows @ w[..., None])[..., 0]).sum(1)
        return misses + (penalty * w * w).sum(1) / 2

    now = loss(w)
    for _ in range(STEPS):
        p = torch.sigmoid((rows @ w[..., None])[..., 0])
        slope = ((p - y)[:, None] @ rows)[:, 0] + penalty * w
        weight = (p * (1 - p)).clamp(min=1e-12)
        bend = (rows * weight[..., None]).transpose(1, 2) @ rows + torch.diag(penalty)
        step = torch.linalg.solve(bend, slope)
        while bool((uphill := loss(w - step) > now * (1 + 1e-12)).any()):
            step[uphill] /= 2
        w = w - step
        now = loss(w)
        if float(step.abs().max()) < 1e-9 * (1 + float(w.abs().max())):
            break
    return w[:, :-1], w[:, -1]


def _accuracies(layers: Mapping[int, Data], heads: int) -> dict[int, Tensor]:
    """Layer to the share of held-out rows on their side, by head."""
    folds = next(iter(layers.values())).folds  # the rows are the same in every layer
    return {layer: _accuracy(data, heads, folds) for layer, data in layers.items()}


def _accuracy(data: Data, heads: int, folds: list[tuple[Tensor, Tensor]]) -> Tensor:
    x = data.x.double().unflatten(1, (heads, -1)).transpose(0, 1)  # (heads, n, w)
    right, seen = torch.zeros(heads, dtype=torch.float64, device="cpu"), 0
    for fitted, held in folds:
        middle = x[:, fitted].mean(1, keepdim=True)
        size = (x[:, fitted] - middle).square().mean((1, 2), keepdim=True).sqrt().clamp(min=1e-30)
        w, b = logistic((x[:, fitted] - middle) / size, data.labels[fitted])
        scores = (((x[:, held] - middle) / size) @ w[..., None])[..., 0] + b[:, None]
        right += ((scores > 0) == data.labels[held]).double().sum(1)
        seen += len(held)
    return right / seen if seen else right.fill_(math.nan)


def _best(ranks: Mapping[int, Tensor], count: int) -> tuple[tuple[int, int], ...]:
    """(layer, head) of the largest; of equals the first."""
    every = [(-float(value), layer, head) for layer, row in ranks.items() for head, value in enumerate(row)]
    return tuple((layer, head) for _, layer, head in sorted(every)[:count])


def _mean(accuracy: Mapping[int, Tensor], chosen: Iterable[tuple[int, int]]) -> float:
    found = [float(accuracy[layer][head]) for layer, head in chosen]
    return sum(found) / len(found)


def _null(layers: Mapping[int, Data], heads: int, count: int, effect: float, draws: int) -> Null:
    """The mean accuracy of heads that are chosen alike on shuffled labels."""
    first = next(iter(layers.values()))
    generator = seeded(first.seed)
    found = []
    for _ in range(draws):
        order = shuffle(first, generator)
        mixed = {layer: replace(data, x=data.x[order], groups=data.groups[order]) for layer, data in layers.items()}
        accuracy = _accuracies(mixed, heads)
        found.append(_mean(accuracy, _best(accuracy, count)))
    return Null.of(effect, found, ())


def _shift(data: Data, heads: int) -> tuple[Tensor, Tensor]:
    """(σ·θ (heads, w), length of the mean difference in σ (heads,)), float64."""
    x = data.x.double().unflatten(1, (heads, -1))
    gap = x[data.labels].mean(0) - x[~data.labels].mean(0)
    length = gap.norm(dim=1)
    direction = torch.where(length[:, None] > 0, gap / length[:, None], 0.0)
    deviation = (x * direction).sum(-1).std(0)
    return direction * deviation[:, None], torch.where(deviation > 0, length / deviation, 0.0)


def _plan(layers: Mapping[int, Data], heads: int, chosen: Iterable[tuple[int, int]], alpha: float) -> Plan:
    edits = {}
    picked: dict[int, list[int]] = {}
    for layer, head in chosen:
        picked.setdefault(layer, []).append(head)
    for layer in sorted(picked):
        data = layers[layer]
        mask = torch.zeros(heads, 1, dtype=torch.float64, device="cpu")
        mask[picked[layer]] = 1
        positives = int(data.labels.sum())
        info = FitInfo(
            "heads", positives=positives, negatives=len(data.x) - positives, groups=len(data.groups.unique())
        )
        place = Place("head_out", layer)
        vector = (_shift(data, heads)[0] * mask).flatten().float()
        edits[place] = Add(vector, alpha).known_from(replace(data.origin, place=place), info)
    return Plan(edits)
