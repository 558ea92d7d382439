"""Fits of barriers: h = log p₊/p₋ from positive and negative activations, all but the network by logistic regression.

Rows are scaled to length 1. Every kind but "mlp" is logistic regression on features φ(x̂), solved in the basis of their
Gram matrix K, where n rows need at most n coordinates however many features there are: w = Φᵀβ. For the quadratic
barrier K is the exact polynomial kernel (γ·x·y + c₀)² and β gives the polynomial itself,

    A = γ²·X̂ᵀ diag(β) X̂,   b = 2γc₀·X̂ᵀβ,   c = c₀²·Σβ,

so no feature is ever computed; above `EXACT` rows the kernel is taken on that many landmarks (Nyström).
C, and γ and c₀ with it, are chosen by the log-likelihood of held-out groups.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import finite_number, one_of
from .barrier import Barrier, BarrierInfo, Ridge, Sketch
from .extract import Activations
from .solvers import Field, integrate

KINDS = ("linear", "quadratic", "sketch", "rff", "mlp")
PUBLISHED = (0.1, 1.0)
"""γ and c₀ of ODESteer; its C is 1."""
EXACT = 2000
"""Up to this many rows a kernel is exact; above, Nyström with half as many landmarks."""
SEARCHED = 1000
"""Rows, drawn by group, on which settings are compared."""
FOLDS = 5
NEWTON = 50  # steps at most; five or six are usual
COMPONENTS = 8000  # of the count sketch
UNITS = {"rff": 128, "mlp": 32}  # ridge terms
MAX_RANK = 64
PROJECTION = 32  # of rff and mlp, where the rank is left to us
DISPLACEMENT = 0.005
"""Largest mean error of the displacement, as a share of it, that a cut of the rank may cause in fit; 1 % is promised."""
ANGLE, STEPS = 0.4, 10  # of the flow whose displacement is compared
STRENGTHS = tuple(10.0**e for e in range(-1, 7))
"""The grid of C, in units that make it comparable over kernels: of the kernel divided by its mean diagonal."""
RATIOS = (10.0, 1.0, 0.1)  # c₀/γ; with C it is all that the quadratic kernel depends on
WIDTHS = (0.5, 1.0, 2.0, 4.0)  # of the Gaussian kernel behind rff, in units of the median distance
DECAYS = (1e-3, 1e-2, 1e-1)  # of the network's weights
IDENTICAL = "fit_barrier: the two sides are identical, so no direction separates them"


def fit_barrier(
    pos: Any,
    neg: Any,
    kind: str = "linear",
    C: float | None = None,
    groups: Iterable[Any] | None = None,
    kernel: tuple[float, float] | None = None,
    rank: int | str = "auto",
    seed: int = 0,
) -> Barrier:
    """Fit h(a) = log p₊(a)/p₋(a) on two sets of activations; h sees a only through a/‖a‖.

    "linear" is logistic regression. "quadratic" is logistic regression with the polynomial kernel (γ·x·y + c₀)², exact,
    cut to the rank that leaves its flow as it is. "sketch" is the published way: the same kernel through a random count
    sketch of 8000 components, full rank. "rff" (random Fourier features) and "mlp" (one hidden layer beside a linear term)
    are fitted on a projection of the activations. The share of the classes in the data is taken out of h.

    Args:
        pos: Activations on the wanted side, (n, d): a tensor, or what `sf.collect` returns for one layer.
        neg: Activations on the other side, (m, d).
        kind: "linear", "quadratic", "sketch", "rff" or "mlp".
        C: Inverse strength of the L2 penalty, as in scikit-learn. None: chosen by held-out log-likelihood, but 1 for
            "sketch" and with the published kernel. For "mlp" its inverse is the weight decay.
        groups: One label per row, those of pos first: rows that share one (such as prompts with the same word) are held
            out together. None: every row by itself, or the rows of one text where `pos` and `neg` know their texts.
        kernel: (γ, c₀) of "quadratic" and "sketch"; None: chosen by held-out log-likelihood, or `PUBLISHED` = (0.1, 1) for
            "sketch".
        rank: k, at most 64 but for "sketch"; "auto": by the displacement error that the cut causes (quadratic), 32 (rff,
            mlp), d (sketch), 1 (linear).
        seed: Of folds, landmarks, hashes and random features.

    Returns:
        A `Barrier`, with held-out accuracy and log-likelihood in its `info`.

    Raises:
        TypeError, ValueError: a side has fewer than 2 rows, NaN or a zero row; widths, layers or models differ; the sides are
            identical; an argument does not fit the kind.
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
    data = _Data.of(pos, neg, groups, seed)
    one_of("fit_barrier", "kind", kind, KINDS)
    if C is not None and finite_number("fit_barrier", "C", C) <= 0:
        raise ValueError(
            f"fit_barrier: C is {C}; expected > 0, and finite: separable sides have no optimum without a penalty"
        )
    if kernel is not None and kind not in ("quadratic", "sketch"):
        raise ValueError(f"fit_barrier: kernel={kernel} is for quadratic and sketch; leave it away for {kind!r}")
    if kernel is not None:
        pair = kernel if isinstance(kernel, (tuple, list)) else ()
        numbers = tuple(finite_number("fit_barrier", "a number of kernel", value) for value in pair)
        if len(numbers) != 2 or numbers[0] <= 0 or numbers[1] < 0:
            raise ValueError(f"fit_barrier: kernel is {kernel}; expected (γ, c₀) with γ > 0 and c₀ >= 0")
        kernel = numbers[0], numbers[1]
    _check_rank(kind, rank, *data.x.shape)
    if C is None and (kind == "sketch" or kernel == PUBLISHED):
        C = 1.0
    fits: dict[str, Any] = {
        "linear": _linear, "quadratic": _quadratic, "sketch": _sketch, "rff": _fourier, "mlp": _network,
    }  # fmt: skip
    found: Barrier = fits[kind](data, C, kernel, rank)
    return found


@dataclass(frozen=True)
class _Data:
    """Checked activations: rows of length 1 in float32, positives first."""

    x: Tensor  # (n, d)
    labels: Tensor  # (n,) bool
    groups: Tensor  # (n,) int64
    typical_norm: float
    origin: dict[str, Any]
    seed: int

    @classmethod
    def of(cls, pos: Any, neg: Any, groups: Iterable[Any] | None, seed: int) -> _Data:
        (first, pos_texts), (second, neg_texts) = _origin(pos), _origin(neg)
        origins = first, second
        sides = [_activations("pos", pos), _activations("neg", neg)]
        if sides[0].shape[1] != sides[1].shape[1]:
            raise ValueError(
                f"fit_barrier: pos has width {sides[0].shape[1]} and neg {sides[1].shape[1]}; both must come from one layer"
            )
        for name in ("layer", "site", "model"):
            if None not in (a := [origin.get(name) for origin in origins]) and a[0] != a[1]:
                raise ValueError(
                    f"fit_barrier: pos comes from {name} {a[0]!r} and neg from {a[1]!r}; expected one {name}"
                )
        few = next(((name, len(side)) for name, side in zip(("pos", "neg"), sides, strict=True) if len(side) < 2), None)
        if few is not None:
            raise ValueError(f"fit_barrier: {few[0]} has {few[1]} row(s); expected at least 2 on each side")
        prints = [sorted(hash(row.tobytes()) for row in side.numpy()) for side in sides]
        if prints[0] == prints[1]:
            raise ValueError(IDENTICAL)
        x = torch.cat(sides)
        if groups is not None:
            names: list[Any] = list(groups.tolist() if isinstance(groups, Tensor) else groups)
        elif pos_texts is not None and neg_texts is not None:
            names = [(0, t) for t in pos_texts.tolist()] + [(1, t) for t in neg_texts.tolist()]
        else:
            names = list(range(len(x)))
        if len(names) != len(x):
            raise ValueError(
                f"fit_barrier: groups has {len(names)} labels; expected {len(x)}, one per row of pos and then of neg"
            )
        codes = {name: i for i, name in enumerate(dict.fromkeys(names))}
        if groups is not None and len(codes) < 2:
            raise ValueError(
                "fit_barrier: all rows are in one group, so none can be held out; give two groups at least"
            )
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return cls(
            x / norms,
            torch.arange(len(x)) < len(sides[0]),
            torch.tensor([codes[name] for name in names]),
            float(norms.double().mean()),
            {
                name: next((o[name] for o in origins if o.get(name) is not None), None)
                for name in ("layer", "site", "model")
            },
            seed,
        )

    @property
    def prior(self) -> float:
        """log n₊/n₋, the share of the classes in a fitted log-odds."""
        share = float(self.labels.double().mean())
        return math.log(share / (1 - share))

    def take(self, index: Tensor) -> _Data:
        """Some of the rows."""
        return _Data(self.x[index], self.labels[index], self.groups[index], self.typical_norm, self.origin, self.seed)

    def searched(self) -> _Data:
        """At most `SEARCHED` rows, whole groups as far as they fit, in random order of the groups.

        Each class has its share of them, and where it is rare a twentieth, or all that there is of it.
        """
        if len(self.x) <= SEARCHED:
            return self
        order = torch.randperm(int(self.groups.max()) + 1, generator=_generator(self.seed))[self.groups].argsort(
            stable=True
        )
        side = self.labels[order]
        count = torch.stack([(~side).sum(), side.sum()])  # of the negatives and the positives
        rare = int(count.argmin())
        kept = min(int(count[rare]), max(SEARCHED * int(count[rare]) // len(side), SEARCHED // 20))
        place = torch.where(side, side.cumsum(0), (~side).cumsum(0))  # from 1, within its class
        return self.take(order[place <= torch.where(side == bool(rare), kept, SEARCHED - kept)])

    @functools.cached_property
    def folds(self) -> list[tuple[Tensor, Tensor]]:
        """(fitted, held out) rows; none where the groups are too few for both classes to be in every part."""
        from sklearn.model_selection import StratifiedGroupKFold

        count = min(FOLDS, *(len(self.groups[self.labels == side].unique()) for side in (True, False)))
        if count < 2:
            return []
        parts = StratifiedGroupKFold(count, shuffle=True, random_state=self.seed).split(
            self.x, self.labels, self.groups
        )
        found = [(torch.from_numpy(fitted), torch.from_numpy(held)) for fitted, held in parts]
        return [(f, h) for f, h in found if 0 < int(self.labels[f].sum()) < len(f) and len(h)]

    def info(self, kind: str, held: _Held, h: Tensor, settings: dict[str, float]) -> BarrierInfo:
        """What is known after a fit; h are the fitted log-odds of the rows."""
        separable = bool(((h > 0) == self.labels).all())
        if math.isnan(held.log_likelihood):
            what, so = (
                ("separable and too few", "the size of h is set by the penalty alone")
                if separable
                else ("too few, or in too few groups,", "the settings are the defaults and the accuracy is unknown")
            )
            warnings.warn(
                f"fit_barrier: the {len(self.x)} rows are {what} to hold some out, so {so}; give more examples",
                UserWarning,
                stacklevel=4,
            )
        return BarrierInfo(
            kind, **self.origin, typical_norm=self.typical_norm, log_likelihood=held.log_likelihood, accuracy=held.accuracy,
            separable=separable, settings=settings,
        )  # fmt: skip


# --- logistic regression on a kernel -----------------------------------------------------------------------------------


def _product(a: Tensor, b: Tensor) -> Tensor:
    return a @ b.T


class _Kernel:
    """Coordinates of rows in which a kernel is the plain product: L with L·Lᵀ = K, from landmarks (all rows: exact)."""

    def __init__(self, gram: Callable[[Tensor, Tensor], Tensor], rows: Tensor, landmarks: Tensor) -> None:
        self.landmarks = landmarks
        square = gram(landmarks, landmarks).double()
        self.scale = float(square.diagonal().mean())
        values, vectors = torch.linalg.eigh(square / self.scale)
        kept = values > values[-1].clamp(min=1e-12) * 1e-8
        self._to = (vectors[:, kept] * values[kept].rsqrt()) / math.sqrt(self.scale)
        self.coordinates = gram(rows, landmarks) @ self._to.to(rows.dtype)  # (n, r)

    def dual(self, w: Tensor) -> Tensor:
        """β over the landmarks, such that the function is Σⱼ βⱼ·K(·, xⱼ)."""
        return self._to @ w.double()


def _regress(features: Tensor, labels: Tensor, C: float) -> tuple[Tensor, float]:
    """(w, intercept) of logistic regression with the penalty ‖w‖²/2C."""
    LogisticRegression = _scikit_learn()
    narrow = features.shape[1] <= max(EXACT, 64)
    solver = LogisticRegression(C=C, solver="newton-cholesky" if narrow else "lbfgs", max_iter=500)
    wide = features.double() if narrow else features
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fold of separable data may stop early; its held-out likelihood says so
        found = solver.fit(wide.numpy(), labels.numpy())
    return torch.from_numpy(found.coef_[0]).double(), float(found.intercept_[0])


class _Held(NamedTuple):
    """What held-out rows say of a fit: mean log-likelihood, share on the right side, standard error of that mean."""

    log_likelihood: float
    accuracy: float
    error: float


UNKNOWN = _Held(math.nan, math.nan, math.nan)


def _held_out(data: _Data, folds: Sequence[Any], odds: Sequence[Tensor]) -> _Held:
    """What the log-odds of the rows that each fold holds out are worth."""
    if not folds:
        return UNKNOWN
    z = torch.cat(list(odds)).double()
    y = torch.cat([data.labels[fold[1]] for fold in folds])
    each = torch.nn.functional.logsigmoid(torch.where(y, z, -z))
    return _Held(float(each.mean()), float(((z > 0) == y).double().mean()), float(each.std()) / math.sqrt(len(each)))


def _choose(
    data: _Data, kernels: Sequence[Any], gram: Callable[[Any, Tensor], Tensor], C: float | None
) -> tuple[Any, float, _Held]:
    """The kernel and C with the best held-out log-likelihood, and that; what is given is not searched.

    All folds and all C share one Gram matrix, and each C starts where the one before it ended.
    """
    part = data.searched()
    if not part.folds:  # nothing can be held out: the published penalty
        return kernels[0], 1.0 if C is None else C, UNKNOWN
    tried: list[tuple[Any, float, _Held]] = []
    for kernel in kernels:
        K = gram(kernel, part.x.double())
        strengths = [C] if C is not None else [s / float(K.diagonal().mean()) for s in STRENGTHS]
        paths = [_dual_path(K[fitted][:, fitted], part.labels[fitted], strengths) for fitted, _ in part.folds]
        for i, strength in enumerate(strengths):
            odds = [
                K[held][:, fitted] @ path[i][0] + path[i][1]
                for (fitted, held), path in zip(part.folds, paths, strict=True)
            ]
            tried.append((kernel, strength, _held_out(part, part.folds, odds)))
    return max(tried, key=lambda found: found[2])


def _dual_path(K: Tensor, labels: Tensor, strengths: Sequence[float]) -> list[tuple[Tensor, float]]:
    """(β, intercept) of kernel logistic regression, f = Kβ + intercept, for each C in turn.

    Newton on C·Σ log(1 + exp(∓f)) + βᵀKβ/2 in its n dual coordinates: one Cholesky factor of I + √W·K·√W a step, where W is
    C·p(1 - p) (Rasmussen & Williams 2006, algorithm 3.1, with a free intercept).
    """
    target, sign = labels.double(), 2 * labels.double() - 1
    beta, intercept = torch.zeros(len(K), dtype=K.dtype), float(torch.logit(target.mean()))
    found = []
    for C in strengths:

        def loss(beta: Tensor, inside: Tensor, intercept: float, C: float = C) -> float:
            misses = torch.nn.functional.softplus(-sign * (inside + intercept)).sum()
            return float(misses + beta @ inside / (2 * C)) / len(K)

        inside = K @ beta  # f without its intercept
        now = loss(beta, inside, intercept)
        for _ in range(NEWTON):
            f = inside + intercept
            p = torch.sigmoid(f)
            weight = (C * p * (1 - p)).clamp(min=1e-12 * C)
            root = weight.sqrt()
            factor = torch.linalg.cholesky((K * root).mul_(root[:, None]).add_(torch.eye(len(K), dtype=K.dtype)))
            right = torch.stack([C * (target - p) + weight * f, weight], 1)
            solved = right - root[:, None] * torch.cholesky_solve(root[:, None] * (K @ right), factor)
            goal = float(solved[:, 0].sum() / solved[:, 1].sum())  # the intercept at which Σβ = 0
            step, turn = solved[:, 0] - goal * solved[:, 1] - beta, goal - intercept
            bent, share = K @ step, 1.0
            while (
                new := loss(beta + share * step, inside + share * bent, intercept + share * turn)
            ) > now and share > 1e-3:
                share /= 2
            beta, inside, intercept = beta + share * step, inside + share * bent, intercept + share * turn
            gain, now = now - new, new
            if gain < 1e-4 * new:
                break
        found.append((beta, intercept))
    return found


# --- the kinds ---------------------------------------------------------------------------------------------------------


def _linear(data: _Data, C: float | None, kernel: None, rank: int | str) -> Barrier:
    _, C, held = _choose(data, [None], lambda _, rows: rows @ rows.T, C)
    if len(data.x) <= EXACT:
        found = _Kernel(_product, data.x, data.x)
        w, intercept = _regress(found.coordinates, data.labels, C)
        w = data.x.double().T @ found.dual(w)
    else:
        w, intercept = _regress(data.x, data.labels, C)
    length = _not_flat(w)
    h = data.x.double() @ w + intercept
    info = data.info("linear", held, h, {"C": C})
    return Barrier((w / length)[None], torch.zeros(1), torch.tensor([length]), intercept - data.prior, info)


def _quadratic(data: _Data, C: float | None, kernel: tuple[float, float] | None, rank: int | str) -> Barrier:
    kernels = [(1.0 / ratio, 1.0) for ratio in RATIOS] if kernel is None else [kernel]
    (gamma, coef0), C, held = _choose(data, kernels, lambda k, rows: (k[0] * (rows @ rows.T) + k[1]) ** 2, C)
    order = torch.randperm(len(data.x), generator=_generator(data.seed))
    landmarks = data.x if len(data.x) <= EXACT else data.x[order[: EXACT // 2]]
    found = _Kernel(lambda a, b: (gamma * (a @ b.T) + coef0) ** 2, data.x, landmarks)
    w, intercept = _regress(found.coordinates, data.labels, C)
    beta = found.dual(w)
    span = torch.linalg.qr(landmarks.T)[0]  # (d, r) holds A and b
    inside = landmarks.double() @ span.double()
    A = gamma**2 * (inside.T * beta) @ inside
    b = 2 * gamma * coef0 * (inside.T @ beta)
    _not_flat(torch.cat([A.flatten(), b]))
    h = found.coordinates.double() @ w + intercept
    offset = coef0**2 * float(beta.sum()) + intercept - data.prior
    cut, eigenvalues, bias = _cut(A, b, data.x[order[:128]] @ span, rank)
    info = data.info("quadratic", held, h, {"C": C, "gamma": gamma, "coef0": coef0})
    return Barrier(_orthonormal(cut @ span.double().T), eigenvalues, bias, offset, info)


def _sketch(data: _Data, C: float | None, kernel: tuple[float, float] | None, rank: int | str) -> Barrier:
    assert C is not None  # 1 unless given
    gamma, coef0 = PUBLISHED if kernel is None else kernel
    d = data.x.shape[1]
    generator = _generator(data.seed)
    hashes = torch.randint(0, COMPONENTS, (2, d + 1), generator=generator, dtype=torch.int32)
    signs = (2 * torch.randint(0, 2, (2, d + 1), generator=generator) - 1).to(torch.int8)
    empty = Sketch(hashes, signs, torch.zeros(COMPONENTS), gamma, coef0)
    features = torch.cat([empty.features(part) for part in data.x.split(1024)])
    _, C, held = _choose(data, [None], lambda _, rows: (f := empty.features(rows)) @ f.T, C)
    if len(features) <= EXACT:
        found = _Kernel(_product, features, features)
        w, intercept = _regress(found.coordinates, data.labels, C)
        w = features.double().T @ found.dual(w)
    else:
        w, intercept = _regress(features, data.labels, C)
    _not_flat(w)
    sketch = Sketch(hashes, signs, w.float(), gamma, coef0)
    A, b, c = sketch.quadratic()
    order = torch.randperm(len(data.x), generator=_generator(data.seed))
    cut, eigenvalues, bias = _cut(A, b, data.x[order[:128]], d if rank == "auto" else rank)
    h = features.double() @ w + intercept
    settings = {"C": C, "gamma": gamma, "coef0": coef0, "components": COMPONENTS, "seed": data.seed}
    info = data.info("sketch", held, h, settings)
    return Barrier(_orthonormal(cut), eigenvalues, bias, c + intercept - data.prior, info, sketch=sketch)


def _fourier(data: _Data, C: float | None, kernel: None, rank: int | str) -> Barrier:
    project = _Projection.choose(data, rank)
    omega = torch.randn(UNITS["rff"], project.rank, generator=_generator(data.seed))
    phases = 2 * math.pi * torch.rand(UNITS["rff"], generator=_generator(data.seed))
    unit = math.sqrt(2 / UNITS["rff"])

    def features(at: _Projected, rows: Tensor, width: float) -> Tensor:
        return unit * torch.cos(at(rows) @ (omega[:, : len(at.basis)] / (width * at.distance)).T + phases)

    def held(width: float, strength: float) -> _Held:
        def fit(fitted: Tensor, out: Tensor, at: _Projected) -> Tensor:
            w, intercept = _regress(features(at, part.x[fitted], width), part.labels[fitted], strength)
            return features(at, part.x[out], width).double() @ w + intercept

        return _held_out(part, folds, [fit(*fold) for fold in folds])

    part = data.searched()
    folds = project.folds(part)
    tried = [(width, strength) for width in WIDTHS for strength in (STRENGTHS if C is None else [C])]
    scores = {pair: held(*pair) for pair in tried} if folds else {(1.0, C or 1.0): UNKNOWN}
    best = max(scores.values())
    # the widest kernel that chance alone may have put behind the best: a narrow one is noise a few widths away from its rows,
    # where flows start, and sides that are easy to separate do not tell the two apart
    widest = max(width for (width, _), found in scores.items() if not found[0] < best[0] - best.error)
    width, C = max((pair for pair in scores if pair[0] == widest), key=lambda pair: scores[pair])
    at = project(data)
    found = features(at, data.x, width)
    w, intercept = _regress(found, data.labels, C)
    _not_flat(w)
    directions = omega[:, : len(at.basis)] / (width * at.distance * at.size)
    ridge = Ridge(directions, phases - directions @ at.middle, unit * w.float(), "cos")
    info = data.info("rff", scores[width, C], found.double() @ w + intercept, {"C": C, "width": width * at.distance})
    flat = torch.zeros(len(at.basis))
    return Barrier(at.basis, flat, flat, intercept - data.prior, info, ridge)


def _network(data: _Data, C: float | None, kernel: None, rank: int | str) -> Barrier:
    project = _Projection.choose(data, rank)

    def held(decay: float) -> _Held:
        def fit(fitted: Tensor, out: Tensor, at: _Projected) -> Tensor:
            return _forward(at(part.x[out]), _train(at(part.x[fitted]), part.labels[fitted], decay, data.seed))

        return _held_out(part, folds, [fit(*fold) for fold in folds])

    part = data.searched()
    folds = project.folds(part)
    scores = {decay: held(decay) for decay in (DECAYS if C is None else (1 / C,))}
    decay = max(scores, key=lambda key: scores[key][0]) if folds else max(scores)
    at = project(data)
    z = at(data.x)
    parameters = _train(z, data.labels, decay, data.seed)
    omega, phases, weights, slope, intercept = parameters
    directions = omega / at.size
    _not_flat(torch.cat([(weights[:, None] * directions).flatten(), slope]).double())
    ridge = Ridge(directions, phases - directions @ at.middle, weights, "tanh")
    info = data.info("mlp", scores[decay], _forward(z, parameters), {"C": 1 / decay})
    offset = float(intercept) - float(slope @ at.middle) / at.size - data.prior
    return Barrier(at.basis, torch.zeros(len(at.basis)), slope / at.size, offset, info, ridge)


def _train(z: Tensor, labels: Tensor, decay: float, seed: int) -> list[Tensor]:
    """(ω, β, w, slope, intercept) of slope·z + Σ w·tanh(ωz + β) + intercept, by L-BFGS on all rows."""
    units, k = UNITS["mlp"], z.shape[1]
    generator = _generator(seed)
    omega = torch.randn(units, k, generator=generator)
    phases = torch.randn(units, generator=generator) / 2
    parameters = [omega, phases, torch.zeros(units), torch.zeros(k), torch.zeros(())]
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.LBFGS(parameters, max_iter=100, line_search_fn="strong_wolfe")
    target, penalised = labels.float(), [parameters[0], parameters[2], parameters[3]]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(_forward(z, parameters), target)
        loss = loss + sum(((p * p).sum() for p in penalised), z.new_zeros(())) * (decay / (2 * len(z)))
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return [parameter.detach() for parameter in parameters]


def _forward(z: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    omega, phases, weights, slope, intercept = parameters
    return z @ slope + torch.tanh(z @ omega.T + phases) @ weights + intercept


@dataclass(frozen=True)
class _Projected:
    """Coordinates (Qᵀx - middle)/size of rows, of mean 0 and mean square 1 where they were taken."""

    basis: Tensor  # (k, d)
    middle: Tensor  # (k,)
    size: float
    distance: float  # median distance of two rows, in these coordinates

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows @ self.basis.T - self.middle) / self.size


@dataclass(frozen=True)
class _Projection:
    """How rff and mlp reduce activations: the linear barrier's direction, the mean, and the leading principal components.

    The first of these has seen the labels, so a fold takes all of them from the rows that it fits.
    """

    rank: int
    C: float

    @classmethod
    def choose(cls, data: _Data, rank: int | str) -> _Projection:
        """The rank that is asked for, and the linear barrier's C by held-out log-likelihood."""
        n, d = data.x.shape
        C = _choose(data, [None], lambda _, rows: rows @ rows.T, None)[1]
        return cls(min(PROJECTION, n, d) if rank == "auto" else int(rank), C)

    def folds(self, data: _Data) -> list[tuple[Tensor, Tensor, _Projected]]:
        """The folds of the data, each with its own projection."""
        return [(fitted, out, self(data.take(fitted))) for fitted, out in data.folds]

    def __call__(self, data: _Data) -> _Projected:
        """The projection of these rows."""
        part = data.searched()
        kernel = _Kernel(_product, part.x, part.x)
        linear = kernel.dual(_regress(kernel.coordinates, part.labels, self.C)[0]) @ part.x.double()
        rows = part.x.double()
        mean = rows.mean(0)
        components = torch.linalg.svd(rows - mean, full_matrices=False)[2]
        candidates = torch.cat([linear[None] / linear.norm(), mean[None] / mean.norm(), components])
        q, r = torch.linalg.qr(candidates[: len(rows) + 2].T)
        basis = q[:, r.diagonal().abs() > 1e-6][:, : self.rank].T.float()
        z = data.x @ basis.T
        middle = z.mean(0)
        size = float((z - middle).square().sum(1).mean().sqrt().clamp(min=1e-6))
        pairs = torch.pdist((part.x[:500] @ basis.T - middle) / size)
        return _Projected(basis, middle, size, float(pairs.median().clamp(min=1e-6)))


# --- rank --------------------------------------------------------------------------------------------------------------


def _cut(A: Tensor, b: Tensor, sample: Tensor, rank: int | str) -> tuple[Tensor, Tensor, Tensor]:
    """(Q, λ, b̃) of h = xᵀAx + bᵀx within a subspace that holds b and the eigenvectors of largest |λ|: Q is (k, r).

    "auto" takes the smallest of 1, 2, 3, 5, 9, … whose flow moves the sampled points as the full one does.
    """
    values, vectors = torch.linalg.eigh(A)
    vectors = vectors[:, values.abs().argsort(descending=True)]
    full = min(len(b), MAX_RANK)
    if rank != "auto":
        return _within(A, b, vectors, int(rank))
    start = sample.double()
    true = _displacement(A, b, torch.eye(len(b), dtype=torch.float64), start)
    size = true.norm(dim=1).clamp(min=1e-12)
    for k in sorted({min(r, full) for r in (1, 2, 3, 5, 9, 17, 25, 33, 49, full)}):
        found = _within(A, b, vectors, k)
        error = ((_displacement(A, b, found[0], start) - true).norm(dim=1) / size).mean()
        if error <= DISPLACEMENT:
            return found
    warnings.warn(
        f"fit_barrier: at rank {full} the flow still misses its displacement by {float(error):.1%} of it",
        UserWarning,
        stacklevel=5,
    )
    return found


def _within(A: Tensor, b: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    length = b.norm()
    first = [b / length] if length > 1e-9 * A.abs().max() else []
    if rank == len(b):
        return vectors.T, ((vectors.T @ A) * vectors.T).sum(1), vectors.T @ b
    stack = torch.stack([*first, *vectors.T[:rank]], dim=1)
    q = torch.linalg.qr(stack)[0][:, :rank]
    values, turned = torch.linalg.eigh(q.T @ A @ q)
    q = q @ turned
    return q.T, values, q.T @ b


def _displacement(A: Tensor, b: Tensor, q: Tensor, start: Tensor) -> Tensor:
    """What the flow of the barrier within span(q) adds to points on the sphere."""
    values, turned = torch.linalg.eigh(q @ A @ q.T)
    q = turned.T @ q
    y = start @ q.T
    norm = torch.linalg.vector_norm(start, dim=1, keepdim=True)
    alpha, moved = integrate(y, norm, Field(values, q @ b), ANGLE * norm, STEPS)
    return (alpha - 1) * start + (moved - alpha * y) @ q


# --- what goes in ------------------------------------------------------------------------------------------------------


def _check_rank(kind: str, rank: int | str, n: int, d: int) -> None:
    if rank == "auto":
        return
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f'fit_barrier: rank is {rank!r}; expected "auto" or a whole number >= 1')
    most = {"linear": 1, "sketch": d}.get(kind, min(MAX_RANK, d, n))
    if rank > most:
        raise ValueError(
            f"fit_barrier: rank is {rank}; expected at most {most} for a {kind} barrier of width {d} on {n} rows"
        )


def _origin(value: Any) -> tuple[dict[str, Any], Tensor | None]:
    if not isinstance(value, Activations) or len(value) != 1:
        return {}, None
    return {"layer": next(iter(value)), "site": value.site, "model": value.model}, value.text_index


def _activations(name: str, value: Any) -> Tensor:
    if isinstance(value, dict):
        if len(value) != 1:
            raise ValueError(f"fit_barrier: {name} holds {len(value)} layers; pass one of them, such as acts[14]")
        value = next(iter(value.values()))
    rows = torch.as_tensor(value).detach().float().cpu()
    if rows.dim() != 2 or rows.shape[0] == 0:
        raise ValueError(f"fit_barrier: {name} has shape {tuple(rows.shape)}; expected (n, d) with n >= 1")
    bad = (~rows.isfinite()).any(1) | (rows == 0).all(1)
    if bad.any():
        raise ValueError(f"fit_barrier: row {int(bad.nonzero()[0])} of {name} is zero or holds NaN or Inf; remove it")
    return rows


def _not_flat(w: Tensor) -> float:
    """The length of the fitted weights; sides that no direction separates are an error."""
    length = float(w.norm())
    if not length > 1e-9:
        raise ValueError(IDENTICAL)
    return length


def _orthonormal(rows: Tensor) -> Tensor:
    """Rows that are orthonormal up to rounding, made so in float64."""
    q, r = torch.linalg.qr(rows.double().T)
    return (q * r.diagonal().sign()).T


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _scikit_learn() -> Any:
    try:
        from sklearn.linear_model import LogisticRegression
    except ModuleNotFoundError:
        raise ModuleNotFoundError('fit_barrier needs scikit-learn: pip install "steerfast[demo]"') from None
    return LogisticRegression
