"""Fits of probes: logistic regression on activations, as they are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from steerfast._checks import finite_number, one_of, warn_user
from steerfast.barriers.data import Data, identical, labels_of, not_flat
from steerfast.barriers.kernels import choose, linear_weights, scikit_learn
from steerfast.models.collect import Activations, check_same_origin
from steerfast.place import place_of

from .info import ProbeInfo
from .rows import LogisticProbe

Probes: TypeAlias = (
    Any  # a LogisticProbe, or for several layers dict[int, LogisticProbe]: the data decide, no type can say it
)


def fit_probe(
    positive: Any, negative: Any, *, C: float | str = 1.0, groups: Iterable[Any] | None = None, seed: int = 0
) -> Probes:
    """Fit a probability that a row is of the positive side: p = σ(x·w + b), by logistic regression.

        penalty ‖s·w‖²/2C,   s = root mean square of the centred activations

    The activations are centred and divided by the one number s for the fit, so `C` means the same whatever their unit; w and b
    are in the original unit. The probability is that of rows which are as often positive as the given ones.

    Args:
        positive: Activations with the property, (n, d): a tensor, or layer -> tensor, such as `sf.collect` returns.
        negative: Activations without it, (m, d), the same layers and site.
        C: Inverse strength of the L2 penalty, as in scikit-learn; "auto": of a grid the one with the best held-out
            log-likelihood.
        groups: One label per row, those of `positive` first: rows that share one (such as prompts with the same word) are held
            out together. None: every row by itself, or the rows of one text where the sides know their texts.
        seed: Of the folds.

    Returns:
        A `LogisticProbe`, which knows its place where the activations do; of several layers a dict of layer -> probe. Its
        `info` holds what held-out rows say (five folds, of 1000 rows at most), and `info.best_layer`.

    Raises:
        TypeError, ValueError: a side is no floating point, has fewer than 2 rows, NaN or a zero row; widths, layers or models
            differ, or the numbers of rows of two layers; the sides are identical; C is not positive.
        ModuleNotFoundError: scikit-learn is not installed.

    Warns:
        UserWarning: the rows are too few to hold some out.

    Reference:
        Alain & Bengio 2016, linear classifier probes (arXiv:1610.01644).

    Example:
        >>> pos = sf.collect(model, tokenizer, true_statements, layers=[6, 12])
        >>> neg = sf.collect(model, tokenizer, false_statements, layers=[6, 12])
        >>> probes = sf.fit_probe(pos, neg)
        >>> best = probes[probes[6].info.best_layer]
    """
    scikit_learn("fit_probe")
    if isinstance(C, str):
        one_of("fit_probe", "C", C, ("auto",))
        strength = None
    else:
        strength = finite_number("fit_probe", "C", C)
        if strength <= 0:
            raise ValueError(f'fit_probe: C is {C}; expected > 0, or "auto"')
    sides = data_by_layer("fit_probe", positive, negative, groups, seed)
    if None in sides:
        return _fitted(sides[None], strength)
    found = {layer: _fitted(data, strength) for layer, data in sides.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    likelihoods = {layer: probe.info.log_likelihood for layer, probe in found.items()}
    known = {layer: value for layer, value in likelihoods.items() if not math.isnan(value)}
    best = max(known, key=lambda layer: known[layer]) if known else None
    return {layer: replace(probe, info=replace(probe.info, best_layer=best)) for layer, probe in found.items()}


def data_by_layer(owner: str, positive: Any, negative: Any, groups: Iterable[Any] | None, seed: int) -> dict[Any, Data]:
    """Layer -> both sides there, checked, with their origin; two tensors are those of layer None.

    Raises:
        TypeError, ValueError: as `fit_probe` says; one side only is a dict; the layers have not the same rows.
    """
    if not isinstance(positive, Mapping) and not isinstance(negative, Mapping):
        return {None: Data.of(positive, negative, groups, seed, owner)}
    if not (isinstance(positive, Mapping) and isinstance(negative, Mapping)):
        raise TypeError(
            f"{owner}: positive is a {type(positive).__name__} and negative a {type(negative).__name__}; give both as "
            "activations or both as tensors"
        )
    check_same_origin(owner, positive, negative, paired=False)
    groups = None if groups is None else labels_of(owner, groups)  # read once: it may be a generator
    found: dict[Any, Data] = {}
    for layer in positive:
        pos, neg = (one.only(layer) if isinstance(one, Activations) else one[layer] for one in (positive, negative))
        data = Data.of(pos, neg, groups, seed, f"{owner}: layer {layer}")
        place = data.origin.place or place_of(owner, layer)
        found[layer] = replace(data, origin=replace(data.origin, place=place))
    counts = {layer: (int(data.labels.sum()), int((~data.labels).sum())) for layer, data in found.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(
            f"{owner}: the numbers of rows of pos and of neg differ from layer to layer, {counts}; collect all layers on the "
            "same texts"
        )
    return found


def _fitted(data: Data, C: float | None) -> LogisticProbe:
    """Logistic regression on one layer; C None: chosen."""
    x = data.x.double()
    middle = x.mean(0)
    size = (x - middle).square().mean().sqrt()
    if not size > 0:
        raise identical(data.owner)
    scaled = replace(data, x=((x - middle) / size).float())
    _, C, held = choose(scaled, [None], lambda _, rows: rows @ rows.T, C)
    w, intercept = linear_weights(scaled.x, scaled.labels, C)
    not_flat(w, data.owner)
    weight = (w / size).float()
    bias = intercept - float(weight.double() @ middle)
    separable = bool(((x @ weight.double() + bias > 0) == data.labels).all())
    if math.isnan(held.log_likelihood):
        warn_user(
            f"{data.owner}: the {len(x)} rows are too few, or in too few groups, to hold some out; give more examples"
        )
    positives = int(data.labels.sum())
    counts = {"positives": positives, "negatives": len(x) - positives, "groups": len(data.groups.unique())}
    info = ProbeInfo(held.accuracy, held.auroc, held.log_likelihood, **counts, separable=separable, C=C)
    return LogisticProbe(weight, bias, info, origin=data.origin)
