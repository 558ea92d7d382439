"""Fits of barriers: h = log p₊/p₋ from positive and negative activations, all but the network by logistic regression.

Rows are scaled to length 1, or all alike to a typical length of 1. Every kind but "mlp" is logistic regression on features φ(x̂),
solved in the basis of their Gram matrix K, where n rows need at most n coordinates however many features there are: w = Φᵀβ. For
the quadratic barrier K is the exact polynomial kernel (γ·x·y + c₀)² and β gives the polynomial itself,

    A = γ²·X̂ᵀ diag(β) X̂,   b = 2γc₀·X̂ᵀβ,   c = c₀²·Σβ,

so no feature is ever computed; above `EXACT` rows the kernel is taken on that many landmarks (Nyström).
The defaults are those that steer best as far as that is measured: the published constants, on rows that keep their lengths.
Those of the highest log-likelihood of held-out groups predict better and steer worse; and on the sphere a flow loses what the
difference of the sides has along the row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import finite_number, one_of
from steerfast.ops.backends import in_full_precision

from .barrier import Barrier, Sketch
from .data import Data, not_flat, seeded
from .kernels import EXACT, Kernel, Strength, choose, linear_weights, product, regress, weak
from .projected import fit_fourier, fit_network
from .rank import check_rank, cut_rank

KINDS = ("linear", "quadratic", "sketch", "rff", "mlp")
PUBLISHED = (0.1, 1.0)
"""γ and c₀ of ODESteer; its C is 1."""
RULES = ("steer", "likelihood")
TUNED = ("linear", "quadratic")
"""Kinds that have both rules."""
COMPONENTS = 8000  # of the count sketch
RATIOS = (10.0, 1.0, 0.1)  # c₀/γ; with C it is all that the quadratic kernel depends on


def fit_barrier(
    pos: Any,
    neg: Any,
    kind: str = "linear",
    C: float | None = None,
    groups: Iterable[Any] | None = None,
    kernel: tuple[float, float] | str = "steer",
    rank: int | str = "auto",
    seed: int = 0,
    raw: bool | None = None,
) -> Barrier:
    """Fit h(a) = log p₊(a)/p₋(a) on two sets of activations; h sees a as it is (raw), or only through a/‖a‖.

    "linear" is logistic regression. "quadratic" is logistic regression with the polynomial kernel (γ·x·y + c₀)², exact,
    cut to the rank that leaves its flow as it is. "sketch" is the published way: the same kernel through a random count
    sketch of 8000 components, full rank. "rff" (random Fourier features) and "mlp" (one hidden layer beside a linear term)
    are fitted on a projection of the activations. The share of the classes in the data is taken out of h.

    Args:
        pos: Activations on the wanted side, (n, d): a tensor, or what `sf.collect` returns for one layer.
        neg: Activations on the other side, (m, d).
        kind: "linear", "quadratic", "sketch", "rff" or "mlp".
        C: Inverse strength of the L2 penalty, as in scikit-learn, for rows of typical length 1. None: with kernel="steer" 10/n
            on n rows, at most 1, for "linear" and "quadratic"; 1 for "sketch" and the pair (0.1, 1); else chosen by held-out
            log-likelihood. For "mlp" its inverse is the weight decay.
        groups: One label per row, those of pos first: rows that share one (such as prompts with the same word) are held
            out together. None: every row by itself, or the rows of one text where `pos` and `neg` know their texts.
        kernel: γ and c₀ of "quadratic" and "sketch": the pair itself (on the sphere); or, for "linear" too, a rule: "steer",
            the published constants `PUBLISHED` = (0.1, 1) and a small C, whose flow moves a model more at equal damage
            (docs/quality.md); "likelihood" (not for "sketch"), those of the highest held-out log-likelihood, whose h is
            calibrated: for a probe or a gate.
        rank: k, at most 64 but for "sketch"; "auto": by the displacement error that the cut causes (quadratic), 32 (rff,
            mlp), d (sketch), 1 (linear).
        seed: Of folds, landmarks, hashes and random features.
        raw: Fit on rows that keep their lengths, in units of the typical one, instead of rows of length 1: the flow then moves
            along a row too, where one on the sphere cannot. None: raw for "linear" and "quadratic" with kernel="steer", else on
            the sphere. Not for "sketch". A row of more than three times the typical length counts as one of three, with a
            warning: a few of them would outweigh all others.

    Returns:
        A `Barrier`, with held-out accuracy and log-likelihood in its `info`, and the distance between the means of the sides: the
        length of a path, T, that carries over layers and models.

    Raises:
        TypeError, ValueError: a side is no floating point, has fewer than 2 rows, NaN or a zero row; widths, layers or models
            differ; the sides are identical; an argument does not fit the kind.
        ModuleNotFoundError: scikit-learn is not installed.

    Reference:
        Zhao et al. 2026, ODESteer (arXiv:2602.17560); Pham & Pagh 2013, polynomial kernels by count sketches; Rahimi & Recht
        2007, random features.

    Example:
        >>> import torch, steerfast as sf
        >>> pos, neg = torch.tensor([[1.0, 0.2], [1.0, -0.2]]), torch.tensor([[-1.0, 0.2], [-1.0, -0.2]])
        >>> bool((sf.fit_barrier(pos, neg)(pos) > 0).all())
        True
    """
    data = Data.of(pos, neg, groups, seed)
    one_of("fit_barrier", "kind", kind, KINDS)
    if C is not None and finite_number("fit_barrier", "C", C) <= 0:
        raise ValueError(
            f"fit_barrier: C is {C}; expected > 0, and finite: separable sides have no optimum without a penalty"
        )
    constants = _constants(kind, kernel)
    raw = _is_raw(kind, kernel, raw)
    rank = check_rank(kind, rank, *data.x.shape)
    strength: Strength = C
    if C is None and kind in TUNED and kernel == "steer":
        strength = weak
    elif C is None and constants == PUBLISHED:
        strength = 1.0
    fits: dict[str, Any] = {
        "linear": _linear, "quadratic": _quadratic, "sketch": _sketch, "rff": fit_fourier, "mlp": fit_network,
    }  # fmt: skip
    found = _exactly(data.x, fits[kind], data.scaled(raw), strength, constants, rank)
    if raw:
        found = _of_lengths(found, float(data.origin.typical_norm or 1.0))
    rows = data.bounded
    distance = float((rows[data.labels].mean(0) - rows[~data.labels].mean(0)).norm())
    return replace(found, info=replace(found.info, distance=distance), origin=data.origin)


@in_full_precision
def _exactly(_: Tensor, fit: Callable[..., Barrier], *arguments: Any) -> Barrier:
    """A fit under autocast, too: a matrix of products in 16 bits has no factors."""
    return fit(*arguments)


def _is_raw(kind: str, kernel: Any, raw: Any) -> bool:
    """Whether rows keep their lengths."""
    if raw is None:
        return kind in TUNED and isinstance(kernel, str) and kernel == "steer"
    if not isinstance(raw, bool):
        raise TypeError(f"fit_barrier: raw is {raw!r}; expected True, False or None")
    if raw and kind == "sketch":
        raise ValueError(
            "fit_barrier: raw=True, but the sketch is the published way, on the sphere; take kind='quadratic'"
        )
    return raw


def _of_lengths(found: Barrier, unit: float) -> Barrier:
    """The raw barrier of rows as they are, from one of rows in units of a length."""
    ridge = None if found.ridge is None else replace(found.ridge, directions=found.ridge.directions / unit)
    return replace(found, eigenvalues=found.eigenvalues / unit**2, bias=found.bias / unit, ridge=ridge, raw=True)


def _constants(kind: str, kernel: Any) -> tuple[float, float] | None:
    """γ and c₀; None: there are none, or they are to be chosen."""
    rules = RULES if kind in TUNED else RULES[:1]
    if isinstance(kernel, str):
        one_of("fit_barrier", "kernel", kernel, rules)
        return PUBLISHED if kernel == "steer" and kind in ("quadratic", "sketch") else None
    if kind not in ("quadratic", "sketch"):
        known = " or ".join(map(repr, rules))
        raise ValueError(f"fit_barrier: kernel={kernel!r} is for quadratic and sketch; {kind!r} takes {known}")
    pair = kernel if isinstance(kernel, (tuple, list)) else ()
    numbers = tuple(finite_number("fit_barrier", "a number of kernel", value) for value in pair)
    if len(numbers) != 2 or numbers[0] <= 0 or numbers[1] < 0:
        raise ValueError(
            f"fit_barrier: kernel is {kernel!r}; expected (γ, c₀) with γ > 0 and c₀ >= 0, or {' or '.join(map(repr, RULES))}"
        )
    return numbers[0], numbers[1]


# --- the kinds ---------------------------------------------------------------------------------------------------------


def _linear(data: Data, C: Strength, kernel: None, rank: int | str) -> Barrier:
    _, C, held = choose(data, [None], lambda _, rows: rows @ rows.T, C)
    w, intercept = linear_weights(data.x, data.labels, C)
    length = not_flat(w)
    h = data.x.double() @ w + intercept
    info = data.info("linear", held, h, {"C": C})
    return Barrier(
        (w / length)[None],
        torch.zeros(1, dtype=torch.float32, device="cpu"),
        torch.tensor([length], dtype=torch.float32, device="cpu"),
        intercept - data.prior,
        info,
    )


def _quadratic(data: Data, C: Strength, kernel: tuple[float, float] | None, rank: int | str) -> Barrier:
    kernels = [(1.0 / ratio, 1.0) for ratio in RATIOS] if kernel is None else [kernel]
    (gamma, coef0), C, held = choose(data, kernels, lambda k, rows: (k[0] * (rows @ rows.T) + k[1]) ** 2, C)
    order = torch.randperm(len(data.x), generator=seeded(data.seed))
    landmarks = data.x if len(data.x) <= EXACT else data.x[order[: EXACT // 2]]
    found = Kernel(lambda a, b: (gamma * (a @ b.T) + coef0) ** 2, data.x, landmarks)
    w, intercept = regress(found.coordinates, data.labels, C)
    beta = found.dual(w)
    span = torch.linalg.qr(landmarks.T)[0]  # (d, r) holds A and b
    inside = landmarks.double() @ span.double()
    A = gamma**2 * (inside.T * beta) @ inside
    b = 2 * gamma * coef0 * (inside.T @ beta)
    not_flat(torch.cat([A.flatten(), b]))
    h = found.coordinates.double() @ w + intercept
    offset = coef0**2 * float(beta.sum()) + intercept - data.prior
    cut, eigenvalues, bias = cut_rank(A, b, data.x[order[:128]] @ span, rank, data.raw)
    info = data.info("quadratic", held, h, {"C": C, "gamma": gamma, "coef0": coef0})
    return Barrier(_orthonormal(cut @ span.double().T), eigenvalues, bias, offset, info)


def _sketch(data: Data, C: float | None, kernel: tuple[float, float], rank: int | str) -> Barrier:
    C = 1.0 if C is None else C
    gamma, coef0 = kernel
    d = data.x.shape[1]
    generator = seeded(data.seed)
    hashes = torch.randint(0, COMPONENTS, (2, d + 1), generator=generator, dtype=torch.int32, device="cpu")
    signs = (2 * torch.randint(0, 2, (2, d + 1), generator=generator, device="cpu") - 1).to(torch.int8)
    empty = Sketch(hashes, signs, torch.zeros(COMPONENTS, dtype=torch.float32, device="cpu"), gamma, coef0)
    features = torch.cat([empty.features(part) for part in data.x.split(1024)])
    _, C, held = choose(data, [None], lambda _, rows: (f := empty.features(rows)) @ f.T, C)
    if len(features) <= EXACT:
        found = Kernel(product, features, features)
        w, intercept = regress(found.coordinates, data.labels, C)
        w = features.double().T @ found.dual(w)
    else:
        w, intercept = regress(features, data.labels, C)
    not_flat(w)
    sketch = Sketch(hashes, signs, w.float(), gamma, coef0)
    A, b, c = sketch.quadratic()
    order = torch.randperm(len(data.x), generator=seeded(data.seed))
    cut, eigenvalues, bias = cut_rank(A, b, data.x[order[:128]], d if rank == "auto" else rank)
    h = features.double() @ w + intercept
    settings = {"C": C, "gamma": gamma, "coef0": coef0, "components": COMPONENTS, "seed": data.seed}
    info = data.info("sketch", held, h, settings)
    return Barrier(_orthonormal(cut), eigenvalues, bias, c + intercept - data.prior, info, sketch=sketch)


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows that are orthonormal up to rounding, made so in float64."""
    q, r = torch.linalg.qr(rows.double().T)
    return (q * r.diagonal().sign()).T
