"""Every op once more as its formula: slow, plain, in float64, and for the tests of both backends alone.

Each function takes the arguments of the op of its name and reads from top to bottom as what that op means. Tensors of any
dtype and device come in; the sums are taken in float64 on the CPU, or in another dtype by `naive`, which is how a test
learns what rounding alone may cost. Nothing here is imported from `steerfast`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

_dtype = torch.float64

PARALLEL = 1e-4  # below this sine two directions leave no plane to turn in
VANISHED = 1e-5  # of less than this share of its length a row is not stretched back


@contextmanager
def arithmetic(dtype: torch.dtype) -> Iterator[None]:
    """Take the sums in another dtype than float64."""
    global _dtype
    before, _dtype = _dtype, dtype
    try:
        yield
    finally:
        _dtype = before


def naive(
    formula: Callable[..., Any], x: Tensor, *args: Any, within: torch.dtype = torch.float32, **kwargs: Any
) -> Any:
    """The formula in another arithmetic, rounded once to the dtype of x: what rounding alone may cost."""
    with arithmetic(within):
        found = formula(x, *args, **kwargs)
    return tuple(part.to(x.dtype) for part in found) if isinstance(found, tuple) else found.to(x.dtype)


def number(value: Any) -> Any:
    """A tensor in the dtype of the arithmetic, on the CPU; anything else as it is."""
    return value.detach().to("cpu", _dtype) if isinstance(value, Tensor) else value


def rows_of(x: Tensor) -> Tensor:
    """(n, d)."""
    return number(x).reshape(-1, x.shape[-1])


def owners(rows: Tensor | None, scale: Tensor | None, n: int) -> Iterator[list[tuple[int, Any]]]:
    """For each of n rows, whom it names, left to right, and how strongly; -1 names nobody."""
    for i in range(n):
        names = [0] if rows is None else rows[i].reshape(-1).tolist()
        weights = [1.0] * len(names) if scale is None else number(scale)[i].reshape(-1)
        yield [(owner, weight) for owner, weight in zip(names, weights, strict=True) if owner != -1]


# --- the stream -------------------------------------------------------------------------------------------------------


def add(x: Tensor, vectors: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x + scale · vectors[rows]; a row that names a vector outside the bank is NaN."""
    bank, out = rows_of(vectors), rows_of(x).clone()
    for i, named in enumerate(owners(rows, scale, len(out))):
        for owner, weight in named:
            out[i] = out[i] + weight * bank[owner] if 0 <= owner < len(bank) else torch.nan
    return out.view(x.shape)


def ablate(x: Tensor, basis: Tensor) -> Tensor:
    """x - VVᵀx, V = basis.T."""
    v = rows_of(basis)
    return number(x) - (number(x) @ v.T) @ v


def amplify(x: Tensor, features: Tensor, alpha: float = 1.0) -> Tensor:
    """x + α · relu(xS)Sᵀ, S = features.T."""
    s = rows_of(features)
    return number(x) + alpha * torch.relu(number(x) @ s.T) @ s


def calibrate(x: Tensor, features: Tensor, beta: float = 1.0) -> Tensor:
    """x - relu(xS)Sᵀ + β · mean(S), S = features.T."""
    s = rows_of(features)
    return number(x) - torch.relu(number(x) @ s.T) @ s + beta * s.mean(0)


def loreft(x: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """x + Rᵀ(Wx + b - Rx)."""
    x, R, W, b = number(x), number(R), number(W), number(b)
    return x + (x @ W.T + b - x @ R.T) @ R


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """w ⊙ x + b."""
    return number(weight) * number(x) + number(bias)


def similarity(x: Tensor, basis: Tensor, kind: str = "projection") -> Tensor:
    """cos(x, WᵀWx) for orthonormal rows W, or cos(x, tanh(WᵀWx)); 0 for a zero row."""
    x, w = number(x), rows_of(basis)
    image = (x @ w.T) @ w
    image = torch.tanh(image) if kind == "tanh" else image
    lengths = x.norm(dim=-1) * image.norm(dim=-1)
    return torch.where((x == 0).all(-1), 0, (x * image).sum(-1) / lengths)


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    vectors: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """(stream / √(mean(stream²) + eps) · gain, stream), stream = hidden + residual + scale · vectors[rows], as it is stored."""
    stream = add(number(hidden) + number(residual), vectors, rows, scale)
    return rms_norm(stream.to(residual.dtype), weight, eps, unit_offset), stream


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:
    """x / √(mean(x²) + eps) · gain; the gain is the weight, or 1 + weight."""
    x, gain = number(x), number(weight) + (1 if unit_offset else 0)
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


# --- flows ------------------------------------------------------------------------------------------------------------


class Butcher(NamedTuple):
    """A Runge-Kutta scheme by its tableau."""

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]


class Walk(NamedTuple):
    """How a flow is followed."""

    scheme: Butcher
    great_circle: bool = False
    order: float = 0  # of the step-size control; 0: even steps
    error: float = 0.0  # the local error is this times (last slope - step's slope)
    tolerance: float = 1e-4
    level: float = math.inf
    single: bool = False  # one step, whatever is asked for


EULER = Butcher(((),), (1.0,))
SSP3 = Butcher(((), (1.0,), (1 / 4, 1 / 4)), (1 / 6, 1 / 6, 2 / 3))
WALKS = {
    "euler": Walk(EULER),
    "one-step": Walk(EULER, single=True),
    "geodesic": Walk(EULER, great_circle=True),
    "midpoint": Walk(Butcher(((), (1 / 2,)), (0.0, 1.0))),
    "heun": Walk(Butcher(((), (1.0,)), (1 / 2, 1 / 2))),
    "ralston": Walk(Butcher(((), (2 / 3,)), (1 / 4, 3 / 4))),
    "rk4": Walk(Butcher(((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6))),
    "ssp3": Walk(SSP3),
    "adaptive": Walk(SSP3, order=3, error=2.0),  # Heun's step, inside it, is off by 2·(last slope - step's slope)
}


class Barrier(NamedTuple):
    """h(z) = zᵀΛz + b̃ᵀz + Σⱼ wⱼφ(ωⱼᵀz + βⱼ) + c in the coordinates z of a basis; raw: of x itself, not of x/‖x‖."""

    eigenvalues: Tensor
    bias: Tensor
    offset: float = 0.0
    raw: bool = False
    terms: tuple[Tensor, Tensor, Tensor] | None = None  # w (m,), β (m,), ω (m, k)
    cosine: bool = True  # φ = cos; else tanh

    def height(self, z: Tensor) -> Tensor:
        """h, a number."""
        h = z @ (self.eigenvalues * z) + self.bias @ z + self.offset
        if self.terms is None:
            return h
        w, beta, omega = self.terms
        inside = omega @ z + beta
        return h + w @ (torch.cos(inside) if self.cosine else torch.tanh(inside))

    def gradient(self, z: Tensor) -> Tensor:
        """∂h/∂z, (k,)."""
        u = 2 * self.eigenvalues * z + self.bias
        if self.terms is None:
            return u
        w, beta, omega = self.terms
        inside = omega @ z + beta
        return u + (w * (-torch.sin(inside) if self.cosine else 1 - torch.tanh(inside) ** 2)) @ omega


class Velocity(NamedTuple):
    """dz/dt = b + Σⱼ φ(ωⱼᵀz + βⱼ)·ηⱼ in the coordinates z of a basis."""

    bias: Tensor
    omega: Tensor  # (m, k)
    beta: Tensor  # (m,)
    eta: Tensor  # (m, k)
    bent: bool  # φ = tanh; else the identity

    raw = True

    def gradient(self, z: Tensor) -> Tensor:
        """dz/dt, (k,)."""
        inside = self.omega @ z + self.beta
        return self.bias + (torch.tanh(inside) if self.bent else inside) @ self.eta


def flow(
    x: Tensor,
    basis: Tensor,
    eigenvalues: Tensor,
    bias: Tensor,
    *,
    angle: float | None = None,
    T: float | None = None,
    steps: int = 10,
    method: str = "euler",
) -> Tensor:
    """da/dt = ∇h/‖∇h‖ in all d dimensions, over [0, T] or over angle·‖a‖."""
    barrier, q = Barrier(number(eigenvalues), number(bias)), rows_of(basis)
    flat = rows_of(x)
    moved = [follow(a, q, barrier, (T or 0.0) + (angle or 0.0) * a.norm(), steps, WALKS[method]) for a in flat]
    return torch.stack(moved).view(x.shape) if moved else number(x)


def follow(a: Tensor, q: Tensor, barrier: Barrier | Velocity, length: Any, steps: int, walk: Walk) -> Tensor:
    """One row a (d,) at the end of its path; a negative length follows -∇h, or the velocity back in time.

    `steps` of an adaptive walk are attempts.
    """

    def slope(a: Tensor) -> tuple[Tensor, Tensor]:
        """(∇h/‖∇h‖, ‖∇h‖) in d dimensions; zero at a stationary point."""
        r = torch.ones(()).to(a) if barrier.raw else a.norm()
        if r == 0:
            return torch.zeros_like(a), r
        unit = a / r
        gradient = barrier.gradient(q @ unit) @ q
        along = 0 if barrier.raw else unit @ gradient
        gradient = gradient - along * unit
        size = gradient.norm()
        if isinstance(barrier, Velocity):  # at its own speed
            return gradient, size
        if size <= 8 * torch.finfo(a.dtype).eps * abs(float(along)):  # what is left is rounding
            return torch.zeros_like(a), 0 * r
        return gradient / size, size / r

    sign, start = (-1.0 if length < 0 else 1.0), a.norm()
    length = abs(length)
    steps = 1 if walk.single else steps
    left, size = length, length / steps
    for i in range(steps):
        first, speed = slope(a)
        step, floor = length / steps, left / (steps - i)
        if walk.order:
            step = min(max(size, floor), left)
        if walk.level < math.inf:  # no farther than where the slope says that the level lies
            point = a if barrier.raw or start == 0 else a / a.norm()
            below = sign * (walk.level - barrier.height(q @ point))
            step = min(step, max(below / speed, 0 * step)) if speed > 0 else 0 * step
        move = sign * step
        if walk.great_circle:
            r = a.norm()
            a = torch.cos(move / r) * a + r * torch.sin(move / r) * first if speed > 0 else a
            continue
        slopes = [first]
        for weights in walk.scheme.a[1:]:
            slopes.append(slope(a + move * sum(w * k for w, k in zip(weights, slopes, strict=True)))[0])
        whole = sum(w * k for w, k in zip(walk.scheme.b, slopes, strict=True))
        if not walk.order:
            a = a + move * whole
            continue
        off, allowed = walk.error * step * (slopes[-1] - whole).norm(), walk.tolerance * start
        if off <= allowed or step <= floor:
            a, left = a + move * whole, left - step
        size = step * min(max(0.9 * float(allowed / max(off, 1e-30)) ** (1 / walk.order), 0.2), 5)
    return a


# --- the bank ---------------------------------------------------------------------------------------------------------


def subspace(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Each row after the slots that it names, left to right; NaN after a number that is neither a slot's nor -1."""
    return _by_slots(x, number(vectors), number(coefficients), slots, rows, scale, 0)[0]


def subspace_probe(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    max_rank: int,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', y): y = Bᵀx as each slot saw it, the first `max_rank` numbers, zero where it projects nothing."""
    return _by_slots(x, number(vectors), number(coefficients), slots, rows, scale, max_rank)


def subspace_split(hidden: Tensor, residual: Tensor, *bank_and_tables: Any) -> Tensor:
    """residual + δ(hidden + residual)."""
    x = number(hidden) + number(residual)
    return number(residual) + subspace(x, *bank_and_tables) - x


def _by_slots(
    x: Tensor, vectors: Tensor, coefficients: Tensor, slots: Tensor, rows: Any, scale: Any, max_rank: int
) -> tuple[Tensor, Tensor]:
    out = rows_of(x).clone()
    columns = 1 if rows is None or rows.dim() == 1 else rows.shape[1]
    y = out.new_zeros(len(out), columns, max_rank)
    for i in range(len(out)):
        for column in range(columns):
            owner = 0 if rows is None else int(rows.view(len(out), columns)[i, column])
            if owner == -1:
                continue
            if not 0 <= owner < len(slots):
                out[i] = torch.nan
                continue
            weight = 1.0 if scale is None else number(scale).view(len(out), columns)[i, column]
            slot = Slot.read(vectors, coefficients, slots[owner].tolist())
            seen = slot.projection(out[i])[:max_rank]
            y[i, column, : len(seen)] = seen
            out[i] = slot.edit(out[i], weight)
    return out.view(x.shape), y


ADD, HINGE, FLOW, ROTATE, PUSH, SLERP, REFLECT, AFFINE, SOLVE = 1, 2, 4, 8, 16, 32, 64, 128, 512


class Slot(NamedTuple):
    """One slot of a bank; `steerfast.ops.slots` has the layout."""

    mode: int
    b: Tensor  # (k, d)
    c: Tensor  # (k, d)
    numbers: Tensor  # (8,)
    table: Tensor  # (k, 8)
    extra: Tensor  # (e, 8)
    steps: int
    keep_norm: int

    @classmethod
    def read(cls, vectors: Tensor, coefficients: Tensor, header: list[int]) -> Slot:
        """The slot with this row of eight whole numbers."""
        mode, rank, project, lift, start, steps, keep_norm, extra = header
        numbers, table, more = coefficients[start : start + 1 + rank + extra].split([1, rank, extra])
        b, c = vectors[project : project + rank], vectors[lift : lift + rank]
        return cls(mode, b, c, numbers[0], table, more, steps, keep_norm)

    def projection(self, x: Tensor) -> Tensor:
        """y = Bᵀx, (k,); nothing of a slot that adds or scales, or that is empty."""
        return self.b @ x if self.mode not in (ADD, AFFINE) else x[:0]

    def edit(self, x: Tensor, weight: Any) -> Tensor:
        """A row x (d,) after the slot; the weight multiplies its own strength."""
        if not len(self.c):
            return x
        new = self._acts()[self.mode](x, self.b @ x, weight * self.numbers[2])
        if self.keep_norm and new.norm() > VANISHED * x.norm():
            new = new * (x.norm() / new.norm())
        return new

    def _acts(self) -> dict[int, Callable[[Tensor, Tensor, Any], Tensor]]:
        """(x, y, weight) -> x', by mode."""
        return {
            ADD: lambda x, y, w: x + w * self.c[0],
            AFFINE: lambda x, y, w: x + w * (self.c[0] * x + self.c[1]),
            HINGE: lambda x, y, w: x + w * self.hinge(y) @ self.c,
            ROTATE: lambda x, y, w: x + self.rotate(y, w) @ self.c,
            PUSH: lambda x, y, w: x + self.push(y, w) @ self.c,
            SLERP: self.slerp,
            REFLECT: self.reflect,
            FLOW: self.flow,
            SOLVE: self.flow,
        }

    def hinge(self, y: Tensor) -> Tensor:
        """g = c₀ + c₁y + c₂·relu(y - c₃) + c₄·relu(y - c₅) + c₆·[y > c₇], direction by direction."""
        c0, c1, c2, c3, c4, c5, c6, c7 = self.table.T
        return c0 + c1 * y + c2 * torch.relu(y - c3) + c4 * torch.relu(y - c5) + c6 * (y > c7)

    def rotate(self, y: Tensor, w: Any) -> Tensor:
        """‖y‖(cos t, sin t) - y, t = w·c₃; with c₄ = 1 only where y₁ > 0."""
        t = w * self.numbers[3]
        if self.numbers[4] == 1 and y[0] <= 0:
            return 0 * y
        return y.norm() * torch.stack([torch.cos(t), torch.sin(t)]) - y

    def push(self, y: Tensor, w: Any) -> Tensor:
        """w·m·v/Σv, v = relu(m - relu(y + b)), m = c₃; nothing where no feature falls short."""
        m = self.numbers[3]
        v = torch.relu(m - torch.relu(y + self.table[:, 0]))
        return w * m * v / v.sum() if v.sum() > 0 else 0 * v

    def slerp(self, x: Tensor, y: Tensor, w: Any) -> Tensor:
        """‖x‖·slerp(x̂, μ_T; t), t = α(δ - β)/(1 - β) where δ = p_H - p_T > β; p = softmax(κ·cos), α = w·c₃, β = c₄, κ = c₅."""
        target, (alpha, beta, kappa), r = self.c[0], self.numbers[3:6], x.norm()
        if r == 0:
            return x
        p_target, p_avoid = torch.softmax(kappa * (y / r).clamp(-1, 1), 0)
        delta = p_avoid - p_target
        omega = torch.acos((y[0] / r).clamp(-1, 1))
        if delta <= beta or torch.sin(omega) <= PARALLEL:
            return x
        t = (w * alpha * (delta - beta) / (1 - beta)).clamp(max=1)
        return (torch.sin((1 - t) * omega) * x + torch.sin(t * omega) * r * target) / torch.sin(omega)

    def reflect(self, x: Tensor, y: Tensor, w: Any) -> Tensor:
        """x turned by γ = w·π·σ(w₂ᵀrelu(W₁x + b₁) + c₃) towards its image x - 2(v̂ᵀx)v̂, where v̂ᵀx + c₄ < 0."""
        v, r = self.c[0], x.norm()
        if r == 0 or y[0] + self.numbers[4] >= 0:
            return x
        image = x - 2 * y[0] * v
        phi = 2 * torch.asin((y[0].abs() / r).clamp(max=1))  # the angle between the two
        if torch.sin(phi) <= PARALLEL:
            return x
        score = torch.relu(y[1:] + self.table[1:, 0]) @ self.table[1:, 1] + self.numbers[3]
        gamma = w * math.pi * torch.sigmoid(score)
        return (torch.sin(phi - gamma) * x + torch.sin(gamma) * image) / torch.sin(phi)

    def flow(self, x: Tensor, y: Tensor, w: Any) -> Tensor:
        """The flow of a barrier over w·(T + angle·‖x‖); further rows say which barrier and how."""
        length = w * (self.numbers[0] + self.numbers[1] * x.norm())
        barrier, walk = Barrier(self.table[:, 0], self.table[:, 1], raw=bool(self.numbers[3])), WALKS["euler"]
        if self.mode == SOLVE:
            barrier, walk = self._barrier(), self._walk()
        moved = follow(x, self.c, barrier, length, self.steps, walk)
        return x if length == 0 else moved

    def _barrier(self) -> Barrier:
        offset, raw = float(self.extra[0, 6]), bool(self.extra[0, 5])
        terms, cosine = int(self.extra[1, 0]), bool(self.extra[1, 1])
        found = None
        if terms:
            table = self.extra[2 + int(self.extra[0, 0]) :].reshape(terms, -1)
            found = table[:, 0], table[:, 1], table[:, 2 : 2 + len(self.c)]
        return Barrier(self.table[:, 0], self.table[:, 1], offset, raw, found, cosine)

    def _walk(self) -> Walk:
        """Stage i is reached by pᵢ times the slope before it and mᵢ times the step so far: a row of a tableau."""
        stages, great_circle, order, tolerance, level = self.extra[0, :5].tolist()
        p, m, b = self.extra[2 : 2 + int(stages), :3].T.tolist()
        a = tuple(tuple(m[i] * b[j] + p[i] * (j == i - 1) for j in range(i)) for i in range(int(stages)))
        return Walk(Butcher(a, tuple(b)), bool(great_circle), order, float(self.extra[1, 2]), tolerance, level)


# --- sparse autoencoders ----------------------------------------------------------------------------------------------


def sae_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(x W_encᵀ + b_enc), ties to the lower feature; value 0 and index 0 where too few are active."""
    return _largest(torch.relu(pre_activations(x, w_enc, b_enc)), k)


def sae_encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, indices, counts) of h·[h > θ], the largest first; a row with more than `capacity` of them is NaN, at 0."""
    h = pre_activations(x, w_enc, b_enc)
    f = torch.where(h > number(threshold), h, 0)
    counts = (f > 0).sum(-1).int()
    values, indices = _largest(f, capacity)
    over = (counts > capacity)[..., None]
    return torch.where(over, torch.nan, values), torch.where(over, 0, indices), counts


def pre_activations(x: Tensor, w_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """h = x W_encᵀ + b_enc, (..., F)."""
    return number(x) @ number(w_enc).T + (0 if b_enc is None else number(b_enc))


def _largest(f: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = f.sort(dim=-1, descending=True, stable=True)
    return values[..., :k], torch.where(values > 0, indices, 0)[..., :k].int()


def sae_decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Σⱼ values[j] · W_dec[indices[j]] + b_dec."""
    values, w = number(values), number(w_dec)
    out = sum(values[..., j, None] * w[indices[..., j].long().cpu()] for j in range(values.shape[-1]))
    return out + (0 if b_dec is None else number(b_dec))


def sae_add(x: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, scale: Tensor | None = None) -> Tensor:
    """x + scale · Σⱼ values[j] · W_dec[indices[j]]."""
    weight = 1 if scale is None else number(scale).view(*x.shape[:-1], 1)
    return number(x) + weight * sae_decode(values, indices, w_dec)


def sae_edit(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    features: Tensor,
    table: Tensor,
    w_dec: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """x + scale · Σₘ (t(fₘ) - fₘ) · W_dec[m], t(f) = clip(t₀f + t₁, t₂, t₃); fₘ is the value beside feature m, or 0."""
    weight = 1 if scale is None else number(scale).view(*x.shape[:-1], 1)
    out = number(x)
    for feature, (t0, t1, least, most), row in zip(features.tolist(), number(table), number(w_dec), strict=True):
        f = torch.where(indices.cpu() == feature, number(values), 0).sum(-1, keepdim=True)
        t = torch.clamp(t0 * f + t1, least, most)
        out = out + weight * (t - f) * row
    return out


def sae_edit_topk(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    features: Tensor,
    table: Tensor,
    w_dec: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """`sae_edit` of what `sae_encode` finds, a row at a time where each has features (n, m), table (n, m, 4) and all of w_dec."""
    values, indices = sae_encode(x, w_enc, b_enc, k)
    if features.dim() == 1:
        return sae_edit(x, values, indices, features, table, w_dec, scale)
    rows = []
    for i, row in enumerate(x.reshape(-1, 1, x.shape[-1])):
        mine = features[i] != -1
        encoded = (part.reshape(-1, k)[i : i + 1] for part in (values, indices))
        weight = None if scale is None else scale[i : i + 1]
        rows.append(sae_edit(row, *encoded, features[i, mine], table[i, mine], w_dec[features[i, mine].long()], weight))
    return torch.cat(rows).view(x.shape) if rows else number(x)
