"""Fits of conditions: the direction, the layer and the threshold that tell two sides of prompts apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import one_of, warn_user
from steerfast.barriers.data import Data
from steerfast.probes.fit import data_by_layer
from steerfast.probes.rows import SIMILARITIES, SimilarityProbe

from .conditions import Condition
from .fitted import ConditionInfo, LayerFit


@dataclass(frozen=True)
class Cut:
    """The best threshold of one layer: its score, how far the nearest rows are from each other there, and the condition."""

    f1: float
    gap: float
    condition: Condition


def fit_condition(
    positive: Any,
    negative: Any,
    *,
    similarity: str = "projection",
    groups: Iterable[Any] | None = None,
    seed: int = 0,
) -> Condition:
    """Fit a condition that positive prompts meet and negative ones do not: its direction, layer, threshold and side.

    On each layer the direction is the first principal component of both sides' rows, centred on the middle of the two means;
    θ and the side that acts have the best F1 of all thresholds between two rows. The layer with the best F1 is taken, of
    equals the one whose held-out F1 is best.

    Args:
        positive: Activations of prompts that are to meet it, layer -> (n, d), such as `sf.collect` returns at position "last".
        negative: Activations of the others, layer -> (m, d), the same layers and site.
        similarity: As of `Condition`.
        groups: As of `fit_probe`.
        seed: Of the folds.

    Returns:
        A `Condition` whose probe knows its place, with F1 and the table of layers in its `info`.

    Raises:
        TypeError, ValueError: the sides are no dicts of layers, or as of `fit_probe`; no threshold tells any two rows apart.
        ModuleNotFoundError: scikit-learn is not installed.

    Warns:
        UserWarning: the rows are too few to hold some out.

    Reference:
        Lee et al. 2024, Programming Refusal with Conditional Activation Steering (arXiv:2409.05907).

    Example:
        >>> asked = sf.collect(model, tokenizer, kind_texts, layers=[5, 10])
        >>> other = sf.collect(model, tokenizer, rude_texts, layers=[5, 10])
        >>> condition = sf.fit_condition(asked, other)
        >>> condition.probe.place.layer in (5, 10)
        True
    """
    one_of("fit_condition", "similarity", similarity, SIMILARITIES)
    for name, side in (("positive", positive), ("negative", negative)):
        if not isinstance(side, Mapping):
            raise TypeError(
                f"fit_condition: {name} is a {type(side).__name__}; expected a dict of layer -> activations, such as "
                "sf.collect returns"
            )
    layers = data_by_layer("fit_condition", positive, negative, groups, seed)
    cuts = {layer: _cut(data, data, similarity) for layer, data in layers.items()}
    found = {layer: cut for layer, cut in cuts.items() if cut is not None}
    if not found:
        raise ValueError(
            f"fit_condition: all rows have one {similarity} similarity with the direction of their layer, so no threshold tells "
            "them apart: the sides are identical, or all rows lie along one line"
        )
    held, overall = _held_out(layers, similarity)
    table = tuple(
        LayerFit(layer, cut.condition.threshold, cut.condition.above, cut.f1, held.get(layer, math.nan))
        for layer, cut in found.items()
    )
    best = max(
        table, key=lambda row: (row.f1, -1.0 if math.isnan(row.held_out_f1) else row.held_out_f1, found[row.layer].gap)
    )
    first = next(iter(layers.values()))
    if math.isnan(overall):
        warn_user(
            f"fit_condition: the {len(first.x)} rows are too few, or in too few groups, to hold some out; give more examples"
        )
    positives = int(first.labels.sum())
    groups_of = len(first.groups.unique())
    info = ConditionInfo(best.f1, overall, positives, len(first.x) - positives, groups_of, table)
    chosen = found[best.layer].condition
    return Condition(chosen.probe, chosen.threshold, chosen.above, info=info)


def _held_out(layers: Mapping[int, Data], similarity: str) -> tuple[dict[int, float], float]:
    """F1 of each layer on the rows that each fold holds out, and F1 where each fold chooses its layer."""
    first = next(iter(layers.values()))
    if not first.folds:
        return {}, math.nan
    truth = torch.cat([first.labels[held] for _, held in first.folds])
    decided: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    chosen = []
    for fitted, held in first.folds:
        cuts = {layer: _cut(data.take(fitted), data, similarity) for layer, data in layers.items()}
        for layer, cut in cuts.items():
            met = (
                torch.zeros(len(held), dtype=torch.bool, device="cpu")
                if cut is None
                else cut.condition(layers[layer].x[held])
            )
            decided[layer].append(met)
        best = max(cuts, key=lambda layer: (-1.0, 0.0) if (cut := cuts[layer]) is None else (cut.f1, cut.gap))
        chosen.append(decided[best][-1])
    return {layer: f1_of(torch.cat(met), truth) for layer, met in decided.items()}, f1_of(torch.cat(chosen), truth)


def _cut(data: Data, whole: Data, similarity: str) -> Cut | None:
    """The best condition on the rows of one layer; None: all have one score."""
    direction = contrast_component(data.x[data.labels], data.x[~data.labels])
    probe = SimilarityProbe(direction, similarity, origin=whole.origin)
    scores = probe(data.x).clamp(*probe.bounds)  # a cosine may end an ulp beyond 1, where no threshold lies
    found = best_threshold(scores, data.labels)
    if found is None:
        return None
    threshold, above, gap = found
    condition = Condition(probe, threshold, above)
    return Cut(f1_of(condition(data.x), data.labels), gap, condition)


def contrast_component(positive: Tensor, negative: Tensor) -> Tensor:
    """The first principal component of both sides, centred on the middle of their means, each side with equal weight: (d,)."""
    p, n = positive.double(), negative.double()
    middle = (p.mean(0) + n.mean(0)) / 2
    rows = torch.cat([(p - middle) / math.sqrt(len(p)), (n - middle) / math.sqrt(len(n))])
    if len(rows) > rows.shape[1]:
        return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1].float()
    component = rows.T @ torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -1]
    return (component / component.norm()).float()


def best_threshold(scores: Tensor, labels: Tensor) -> tuple[float, bool, float] | None:
    """(θ, above, gap) of the best F1 over all thresholds between two scores; of equals the one in the widest gap.

    Args:
        scores: float32 (n,).
        labels: bool (n,): which are to meet the condition.

    Returns:
        θ, a float32 number that no score between the two meets on the wrong side; None: all scores are equal.
    """
    ordered, order = scores.sort()
    hits = labels[order].double().cumsum(0)
    total, below = hits[-1], torch.arange(1, len(scores), dtype=torch.float64, device="cpu")
    gaps = ordered[1:].double() - ordered[:-1].double()
    above_f1 = 2 * (total - hits[:-1]) / (len(scores) - below + total)
    below_f1 = 2 * hits[:-1] / (below + total)
    f1 = torch.where(gaps > 0, torch.stack([above_f1, below_f1]), -1.0)
    if not len(gaps) or not bool((gaps > 0).any()):
        return None
    side, at = divmod(int(torch.where(f1 >= f1.max() - 1e-12, gaps, -1.0).argmax()), len(gaps))
    low, high, above = float(ordered[at]), float(ordered[at + 1]), side == 0
    middle = float(torch.tensor((low + high) / 2, dtype=torch.float32, device="cpu"))
    theta = (low if middle >= high else middle) if above else (high if middle <= low else middle)
    return theta, above, float(gaps[at])


def f1_of(met: Tensor, labels: Tensor) -> float:
    """F1 of decisions, bool (n,)."""
    found = int((met & labels).sum())
    return 2 * found / max(int(met.sum()) + int(labels.sum()), 1)
