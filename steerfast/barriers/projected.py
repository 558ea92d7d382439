"""Barriers on a projection of the activations: random Fourier features and a small network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .barrier import Barrier, Ridge
from .data import UNKNOWN, Data, Held, not_flat, seeded
from .kernels import STRENGTHS, Kernel, choose, held_out, product, regress

UNITS = {"rff": 128, "mlp": 32}  # ridge terms
PROJECTION = 32  # of rff and mlp, where the rank is left to us
WIDTHS = (0.5, 1.0, 2.0, 4.0)  # of the Gaussian kernel behind rff, in units of the median distance
DECAYS = (1e-3, 1e-2, 1e-1)  # of the network's weights


def fit_fourier(data: Data, C: float | None, kernel: None, rank: int | str) -> Barrier:
    """The barrier of random Fourier features (rff) on a projection of the activations."""
    project = _Projection.choose(data, rank)
    omega = torch.randn(UNITS["rff"], project.rank, generator=seeded(data.seed), dtype=torch.float32, device="cpu")
    phases = 2 * math.pi * torch.rand(UNITS["rff"], generator=seeded(data.seed), dtype=torch.float32, device="cpu")
    unit = math.sqrt(2 / UNITS["rff"])

    def features(at: _Projected, rows: Tensor, width: float) -> Tensor:
        return unit * torch.cos(at(rows) @ (omega[:, : len(at.basis)] / (width * at.distance)).T + phases)

    def held(width: float, strength: float) -> Held:
        def fit(fitted: Tensor, out: Tensor, at: _Projected) -> Tensor:
            w, intercept = regress(features(at, part.x[fitted], width), part.labels[fitted], strength)
            return features(at, part.x[out], width).double() @ w + intercept

        return held_out(part, folds, [fit(*fold) for fold in folds])

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
    w, intercept = regress(found, data.labels, C)
    not_flat(w)
    directions = omega[:, : len(at.basis)] / (width * at.distance * at.size)
    ridge = Ridge(directions, phases - directions @ at.middle, unit * w.float(), "cos")
    info = data.info("rff", scores[width, C], found.double() @ w + intercept, {"C": C, "width": width * at.distance})
    flat = torch.zeros(len(at.basis), dtype=torch.float32, device="cpu")
    return Barrier(at.basis, flat, flat, intercept - data.prior, info, ridge)


def fit_network(data: Data, C: float | None, kernel: None, rank: int | str) -> Barrier:
    """The barrier of a small network (mlp) on a projection of the activations."""
    project = _Projection.choose(data, rank)

    def held(decay: float) -> Held:
        def fit(fitted: Tensor, out: Tensor, at: _Projected) -> Tensor:
            return _forward(at(part.x[out]), _train(at(part.x[fitted]), part.labels[fitted], decay, data.seed))

        return held_out(part, folds, [fit(*fold) for fold in folds])

    part = data.searched()
    folds = project.folds(part)
    scores = {decay: held(decay) for decay in (DECAYS if C is None else (1 / C,))}
    decay = max(scores, key=lambda key: scores[key][0]) if folds else max(scores)
    at = project(data)
    z = at(data.x)
    parameters = _train(z, data.labels, decay, data.seed)
    omega, phases, weights, slope, intercept = parameters
    directions = omega / at.size
    not_flat(torch.cat([(weights[:, None] * directions).flatten(), slope]).double())
    ridge = Ridge(directions, phases - directions @ at.middle, weights, "tanh")
    info = data.info("mlp", scores[decay], _forward(z, parameters), {"C": 1 / decay})
    offset = float(intercept) - float(slope @ at.middle) / at.size - data.prior
    return Barrier(
        at.basis, torch.zeros(len(at.basis), dtype=torch.float32, device="cpu"), slope / at.size, offset, info, ridge
    )


def _train(z: Tensor, labels: Tensor, decay: float, seed: int) -> list[Tensor]:
    """(ω, β, w, slope, intercept) of slope·z + Σ w·tanh(ωz + β) + intercept, by L-BFGS on all rows."""
    units, k = UNITS["mlp"], z.shape[1]
    generator = seeded(seed)
    omega = torch.randn(units, k, generator=generator, dtype=torch.float32, device="cpu")
    phases = torch.randn(units, generator=generator, dtype=torch.float32, device="cpu") / 2
    parameters = [omega, phases, *(torch.zeros(shape, dtype=torch.float32, device="cpu") for shape in (units, k, ()))]
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
    def choose(cls, data: Data, rank: int | str) -> _Projection:
        """The rank that is asked for, and the linear barrier's C by held-out log-likelihood."""
        n, d = data.x.shape
        C = choose(data, [None], lambda _, rows: rows @ rows.T, None)[1]
        return cls(min(PROJECTION, n, d) if rank == "auto" else int(rank), C)

    def folds(self, data: Data) -> list[tuple[Tensor, Tensor, _Projected]]:
        """The folds of the data, each with its own projection."""
        return [(fitted, out, self(data.take(fitted))) for fitted, out in data.folds]

    def __call__(self, data: Data) -> _Projected:
        """The projection of these rows."""
        part = data.searched()
        kernel = Kernel(product, part.x, part.x)
        linear = kernel.dual(regress(kernel.coordinates, part.labels, self.C)[0]) @ part.x.double()
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
