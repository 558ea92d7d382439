"""Interventions fitted by one call, from two sides of activations."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from steerfast._checks import one_of, warn_user, whole_number
from steerfast._null import DRAWS
from steerfast.barriers.data import Data
from steerfast.barriers.kernels import scikit_learn
from steerfast.edits.base import Intervention
from steerfast.edits.fitted import FitInfo
from steerfast.models.collect import check_same_origin
from steerfast.place import common_origin, place_of
from steerfast.probes.fit import data_by_layer

from .fits import features, flow, linear, rotations
from .fits.held_out import Make, held_out
from .fits.sides import Sides

ESTIMATORS: dict[str, Callable[..., Intervention]] = {
    "add": linear.add,
    "ablate": linear.ablate,
    "affine_ablate": linear.affine_ablate,
    "clamp": linear.clamp,
    "affine": linear.affine,
    "rotate": rotations.rotate,
    "spherical": rotations.spherical,
    "householder": rotations.householder,
    "flow": flow.flow,
    "edit_features": features.edit_features,
    "amplify": features.amplify,
    "calibrate": features.calibrate,
    "deficit_push": features.deficit_push,
}
"""Method -> estimator: (sides, settings by name) -> intervention. A new one is offered, and tested, by being listed."""
ELSEWHERE = {
    "heads": "chosen from the outputs of all heads; use sf.fit_heads",
    "lineas": "trained on a model; use sf.fit_lineas",
    "loreft": "trained on a model; use sf.fit_loreft",
    "refusal": "selected on a model; use sf.tools.select_refusal",
    "reft_r1": "trained on a model; use sf.fit_vector with sf.ReFTr1()",
    "reps": "trained on a model; use sf.fit_vector with sf.RePS()",
    "vector": "trained on a model; use sf.fit_vector",
    "velocity": "fitted by a model's gradients; use sf.fit_velocity",
}
"""What is not fitted on activations of one place, and what fits it."""
PAIRED = ("householder",)
"""Methods that take row i of one side against row i of the other."""


def fit(
    method: str,
    positive: Any,
    negative: Any,
    /,
    layer: int | None = None,
    *,
    groups: Iterable[Any] | None = None,
    seed: int = 0,
    draws: int = DRAWS,
    **settings: Any,
) -> Intervention:
    """Fit an intervention on activations with a property and without it, ready to use.

    | method | estimate | settings |
    |---|---|---|
    | "add" | mean difference (CAA, arXiv:2312.06681) | strength, keep_norm |
    | "ablate" | mean difference (arXiv:2406.11717) | keep_norm |
    | "affine_ablate" | class means (ACE, arXiv:2411.09003) | alpha, keep_norm |
    | "clamp" | quantiles of the positive side along the mean difference (arXiv:2601.10387) | low, high, keep_norm |
    | "affine" | optimal transport of each coordinate (Linear-AcT, arXiv:2410.23054) | keep_norm |
    | "rotate" | plane of several layers' candidates (Angular Steering, arXiv:2510.26243) | degrees, adaptive |
    | "spherical" | antipodal prototypes (arXiv:2602.08169) | alpha, beta, kappa |
    | "householder" | linear probe and angle net, on pairs (HPR, arXiv:2409.10053) | hidden, C, steps |
    | "flow" | barrier (ODESteer, arXiv:2602.17560) | kind, angle, T, norms, steps, method, level, kernel, raw |
    | "edit_features" | contrast of an SAE's mean activations (arXiv:2503.00177) | sae, count, tau, mode |
    | "amplify" | the same features' decoder rows (arXiv:2502.15576) | sae, count, tau, alpha |
    | "calibrate", "deficit_push" | and how active they are on the positive side (arXiv:2502.15576) | sae, count, tau |

    Each is a function of its own in `steerfast.directions.fits`, whose docstring has the formula. Trained on a
    model are LoReFTs (`sf.fit_loreft`), vectors (`sf.fit_vector`: ReFT-r1, RePS) and affine maps of several layers
    (`sf.fit_lineas`: LinEAS); velocity fields are fitted by its gradients (`sf.fit_velocity`). The heads of ITI are chosen by
    `sf.fit_heads`, a condition is fitted by `sf.fit_condition`.

    Args:
        method: A name of the table.
        positive: Activations with the property, (n, d): a tensor, or layer -> tensor, such as `sf.collect` returns.
        negative: Activations without it, (m, d), the same layers and site.
        layer: Which of several layers; of tensors the layer that they come from, if that is to be kept.
        groups: One label per row, those of `positive` first: rows that share one are held out together. None: every row by
            itself, or the rows of one text where the sides know their texts.
        seed: Of the folds, and of what an estimator draws.
        draws: Fits on shuffled labels, and random directions, that the held-out figure stands beside in `info.null`; 0: none.
        settings: Of the method, by name.

    Returns:
        The intervention: its `origin` holds place, model and typical norm of the activations, so that `sf.Plan([…])` finds its
        place; its `info` (a `FitInfo`) what the same fit does to rows that it has not seen, in five folds,
        beside its null: as many draws of either kind, one fold each.

    Raises:
        TypeError, ValueError: an unknown method, layer or setting; a side is no floating point, has fewer than 2 rows, NaN or
            a zero row; widths, layers or models differ; the sides, or their means, do not differ; fewer rows than the method has
            directions.
        ModuleNotFoundError: scikit-learn is not installed.

    Warns:
        UserWarning: the rows are too few, or too alike, to hold some out.

    Example:
        >>> pos = sf.collect(model, tokenizer, kind_texts, layers=[14])
        >>> neg = sf.collect(model, tokenizer, rude_texts, layers=[14])
        >>> edit = sf.fit("affine_ablate", pos, neg)
        >>> edit.origin.place.layer, edit.info.method
        (14, 'affine_ablate')
        >>> plan = sf.Plan([edit])
    """
    whole_number("fit", "draws", draws, 0)
    make, sides = prepare(method, positive, negative, layer, groups, seed, settings)
    edit, owner = make(sides), sides.owner
    closed, dose, null = held_out(make, sides, draws)
    data = sides.data
    if math.isnan(closed):
        warn_user(
            f"{owner}: the {len(data.x)} rows are too few, or in too few groups, to hold some out, or the sides that were held "
            "out have one mean; give more"
        )
    positives = int(data.labels.sum())
    info = FitInfo(method, closed, dose, positives, len(data.x) - positives, len(data.groups.unique()), null=null)
    origin = common_origin(owner, [data.origin, replace(edit.origin, typical_norm=None)])
    return edit.known_from(replace(origin, position=data.origin.position), info)


def prepare(
    method: str,
    positive: Any,
    negative: Any,
    layer: int | None = None,
    groups: Iterable[Any] | None = None,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> tuple[Make, Sides]:
    """The estimator with its settings, and the checked sides, as of `fit`: `make(sides)` is the intervention."""
    if method in ELSEWHERE:
        raise ValueError(f"fit: {method!r} is {ELSEWHERE[method]}")
    name = one_of("fit", "method", method, tuple(ESTIMATORS))
    make = partial(ESTIMATORS[name], **_known(name, dict(settings or {})))
    scikit_learn("fit")
    sides = _sides(f"fit: {name}", positive, negative, layer, groups, seed)
    if name in PAIRED:
        if isinstance(positive, Mapping):
            check_same_origin(f"fit: {name}", positive, negative, paired=True)
        sides = replace(sides, data=_by_pair(sides.data, groups is None))
    return make, sides


def settings_of(method: str) -> tuple[str, ...]:
    """The names of a method's settings."""
    return tuple(inspect.signature(ESTIMATORS[method]).parameters)[1:]


def _known(method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, all of them known to the method and none missing."""
    names = settings_of(method)
    unknown = [name for name in settings if name not in names]
    if unknown:
        raise TypeError(f"fit: {method!r} has no setting {unknown[0]!r}; it has {', '.join(names)}")
    if "sae" in names and "sae" not in settings:
        raise TypeError(f"fit: {method!r} edits features of an SAE; give it as sae=, such as sf.SAE.load gives")
    return settings


def _sides(
    owner: str, positive: Any, negative: Any, layer: int | None, groups: Iterable[Any] | None, seed: int
) -> Sides:
    """Both sides of one layer, and of those beside it."""
    layers = data_by_layer(owner, positive, negative, groups, seed)
    if not isinstance(positive, Mapping):
        (data,) = layers.values()
        if layer is None:
            return Sides(data, layers)
        place = place_of(owner, layer)
        return Sides(replace(data, origin=replace(data.origin, place=place)), {place.layer: data})
    if layer is None and len(layers) > 1:
        raise ValueError(f"{owner}: the sides hold layers {sorted(layers)}; name one with layer=")
    chosen = next(iter(layers)) if layer is None else whole_number(owner, "layer", layer)
    if chosen not in layers:
        raise ValueError(f"{owner}: layer is {layer}; the sides hold layers {sorted(layers)}")
    return Sides(layers[chosen], layers)


def _by_pair(data: Data, alone: bool) -> Data:
    """The rows with each pair held out as a whole; `alone`: and with no other one, but for those of its texts."""
    count = int(data.labels.sum())
    if 2 * count != len(data.x):  # no pairs: the estimator says so
        return data
    if alone:
        return replace(data, groups=data.groups[:count].repeat(2))
    apart = (data.groups[:count] != data.groups[count:]).nonzero().flatten().tolist()
    if apart:
        raise ValueError(f"{data.owner}: row {apart[0]} of pos and of neg are a pair, but in two groups; give them one")
    return data
