"""The flow of a barrier on the k + 1 numbers that move, by any solver: what `steerfast_kernels.solve` does on a GPU.

h(a) depends on a only through z = Qᵀa and ‖a‖, so ∇h lies in span(Q, a) and the whole trajectory in span(Q, a₀):

    a = α·a₀ + Q(y - α·y₀),   ‖a‖² = ‖y‖² + α²(‖a₀‖² - ‖y₀‖²)

The state (y, α) is closed, and any Runge-Kutta scheme that runs on it is that scheme in all d dimensions, exactly. Where
nothing lies outside span(Q), as far as rounding can tell, α says nothing: it is 1, and y is all.
A velocity of z = Qᵀa within span(Q) is the same with α = 1.
`follow` does every solver and field. It takes PyTorch tensors or, for a handful of rows on a CPU, NumPy arrays: an
operation of NumPy costs a third of one of PyTorch where the numbers are few. `few.few_eulers` is its fast twin for the
commonest case.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backends import transformed
from .tableaus import SOLVERS

SMALL = 1 << 13
"""Up to this many coordinates a flow on the CPU runs in NumPy."""
OUTSIDE = 8.0
"""Times the precision: the share of ‖a₀‖² that must lie outside span(Q) to count; the kernels have 1e-6, that of float32."""
STILL = 8.0
"""Times the precision: a gradient along the sphere of less than this share of the gradient is rounding; the kernels have 1e-6."""


ACTS = (("tanh", False), ("cos", False), ("identity", True), ("tanh", True))
"""(φ, whether it belongs to a velocity), by the number that a slot holds."""


class Field(NamedTuple):
    """What a flow follows, in the coordinates of its basis.

    A barrier h(z) = zᵀΛz + b̃ᵀz + Σⱼ wⱼ·φ(ωⱼᵀz + βⱼ) + c, by its gradient at speed 1; or, where there are `outputs`, the
    velocity dz/dt = b̃ + Σⱼ φ(ωⱼᵀz + βⱼ)·ηⱼ of z = Qᵀa as it is (raw).
    """

    eigenvalues: Any  # (k,)
    bias: Any  # (k,)
    offset: float = 0.0
    raw: bool = False
    directions: Any = None  # ω, (m, k); None: no ridge terms
    phases: Any = None  # β, (m,)
    weights: Any = None  # w, (m,)
    act: str = "cos"  # φ: "cos" or "tanh" of a barrier, "identity" or "tanh" of a velocity
    outputs: Any = None  # η, (m, k); None: a barrier

    def map(self, change: Callable[[Tensor], Any]) -> Field:
        """The same barrier with every tensor changed."""
        return Field._make(change(v) if isinstance(v, Tensor) else v for v in self)


class Scheme(NamedTuple):
    """How a flow is followed: a solver by its stages, and where to stop.

    stages holds (p, m, b) of every stage: how it is reached (`Tableau`), and its weight in the step.
    """

    stages: tuple[tuple[float, float, float], ...] = ((0.0, 0.0, 1.0),)
    geodesic: bool = False
    order: int = 0  # of the step-size control; 0: fixed steps
    factor: float = 0.0  # of the local error (`Tableau.factor`)
    tolerance: float = 0.0  # of the local error, as a share of ‖a₀‖
    level: float = math.inf  # the flow stops where h reaches it
    single: bool = False  # one step, whatever is asked for

    @property
    def plain(self) -> bool:
        """Whether it is Euler, all the way."""
        return len(self.stages) == 1 and not self.geodesic and self.level == math.inf

    def count(self, steps: int) -> int:
        """How many steps are taken where `steps` are asked for."""
        return 1 if self.single else steps


EULER = Scheme()


@functools.cache
def scheme(method: str, tolerance: float = 1e-4, level: float = math.inf) -> Scheme:
    """The scheme of a method of `SOLVERS`."""
    solver = SOLVERS[method]
    tableau = solver.tableau
    stages = tuple((p, m, b) for (p, m), b in zip(tableau.paths(), tableau.b, strict=True))
    if not solver.adaptive:
        return Scheme(stages, solver.geodesic, level=level, single=solver.single)
    return Scheme(stages, False, tableau.order, tableau.factor(), tolerance, level)


def scheme_rows(field: Field, how: Scheme) -> list[list[float]]:
    """Further rows of a slot that hold its solver: what is common, the ridge terms in short, then p, m, b of every stage.

    Row 0: number of stages, geodesic, order, tolerance, level, raw (2: a velocity), offset, 0. Row 1: number of ridge terms,
    φ as in `ACTS`, factor. Empty for Euler on a quadratic barrier, whose row of constants says whether it is raw.
    """
    units = 0 if field.directions is None else field.directions.shape[0]
    if how.plain and not units and field.outputs is None:
        return []
    raw, moving = (field.raw, False) if field.outputs is None else (2, True)
    first = [len(how.stages), how.geodesic, how.order, how.tolerance, how.level, raw, field.offset]
    rows = [first, [units, ACTS.index((field.act, moving)), how.factor], *how.stages]
    return [[*map(float, row), *[0.0] * (8 - len(row))] for row in rows]


def pack(field: Field, how: Scheme) -> Tensor | None:
    """The rows of a slot that say what its numbers per direction do not: (e, 8); None for Euler on a quadratic barrier.

    Those of `scheme_rows`, then ⌈(k + 2)/8⌉ rows w, β, ω₁ … ω_k of every ridge term; of a velocity as many more of it, with
    η in the place of ω.
    """
    numbers = scheme_rows(field, how)
    if not numbers:
        return None
    rows = torch.tensor(numbers, dtype=torch.float32, device="cpu")
    if field.directions is None or not field.directions.shape[0]:
        return rows
    scalars = torch.stack([field.weights, field.phases], 1)
    parts = [field.directions] if field.outputs is None else [field.directions, field.outputs]
    padded = [torch.nn.functional.pad(torch.cat([scalars, v], 1), (0, -(v.shape[1] + 2) % 8)) for v in parts]
    return torch.cat([rows, torch.cat(padded, 1).reshape(-1, 8)])


def unpack(table: Tensor, extra: Tensor | None, raw: bool = False) -> tuple[Field, Scheme]:
    """The inverse of `pack`, with λ and b̃ from the slot's numbers per direction (k, 8), and `raw` where there are no rows."""
    if extra is None:
        return Field(table[:, 0], table[:, 1], raw=raw), EULER
    (count, geodesic, order, tolerance, level, is_raw, offset, _), (units, code, factor, *_) = extra[:2].tolist()
    act, moving = ACTS[int(code)]
    stages = int(count)
    how = Scheme(
        tuple((p, m, b) for p, m, b, *_ in extra[2 : 2 + stages].tolist()),
        bool(geodesic),
        int(order),
        factor,
        tolerance,
        level,
    )
    plain = Field(table[:, 0], table[:, 1], offset, bool(is_raw), act=act)
    if not units:
        return plain, how
    rows = extra[2 + stages :].reshape(int(units), 1 + moving, -1)
    omega, outputs = rows[:, 0], rows[:, 1, 2 : 2 + table.shape[0]] if moving else None
    found = plain._replace(directions=omega[:, 2 : 2 + table.shape[0]], phases=omega[:, 1], weights=omega[:, 0])
    return found._replace(outputs=outputs), how


def integrate(
    y: Tensor, norm: Tensor, field: Field, length: Tensor, steps: int, how: Scheme = EULER
) -> tuple[Tensor, Tensor]:
    """Follow da/dt = ∇h/‖∇h‖ over a path of the given length, or a velocity over a time, in coordinates.

    Args:
        y: y₀ = Qᵀa₀, (n, k).
        norm: ‖a₀‖, (n, 1).
        field: The barrier, or the velocity.
        length: T, (n, 1); where it is negative the row follows -∇h, down to the level; or the velocity back in time.
        steps: Number of steps; of an adaptive solver the number of attempts.
        how: The solver, and the level at which it stops.

    Returns:
        (α, y) at the end, (n, 1) and (n, k). At a stationary point, and from a zero row, nothing moves.
    """
    parts = (y, norm, field.eigenvalues, field.bias, length)
    if y.numel() > SMALL or not y.is_cpu or needs_grad(*parts) or torch.compiler.is_compiling():
        return follow(torch, y, norm, field, length, steps, how)
    arrays = field.map(lambda v: v.detach().numpy())
    start, size, path = (v.detach().numpy() for v in (y, norm, length.expand(norm.shape)))
    with np.errstate(all="ignore"):  # as PyTorch does
        alpha, moved = follow(np, start, size, arrays, path, steps, how)
    return torch.from_numpy(alpha), torch.from_numpy(moved)


def follow(xp: Any, y: Any, norm: Any, field: Field, length: Any, steps: int, how: Scheme) -> tuple[Any, Any]:
    """`integrate` with the operations of `xp`, PyTorch or NumPy."""
    if field.outputs is not None and how.plain:
        return 1 + 0 * norm, drift(xp, y, field, length / steps, steps)
    size2 = norm * norm
    rest = size2 - _dot(y, y)  # what lies outside span(Q)
    some = rest > OUTSIDE * xp.finfo(y.dtype).eps * size2
    rest = xp.where(some, rest, 0 * rest)
    alpha = xp.where(some, 1 + 0 * norm, 0 * norm)  # 0 stays 0
    compared = how.order > 0 or how.level < math.inf
    if compared:  # a negative length follows -∇h: sizes are compared without their sign
        sign = xp.where(length < 0, -xp.ones_like(length), xp.ones_like(length))
        length = sign * length
    even = length / steps
    if how.order:
        left, size, unit = length, even, how.tolerance * norm
    for i in range(steps):
        dy, dalpha, inverse, speed = _slope(xp, y, alpha, rest, field)
        step = even
        if how.order:
            floor = left / (steps - i)  # at least this much now, so that the last attempt arrives
            step = xp.minimum(xp.maximum(size, floor), left)
        if how.level < math.inf:
            below = sign * (how.level - _height(xp, y * inverse, field))
            room = below / xp.where(speed > 0, speed * inverse, math.inf)
            step = xp.minimum(step, xp.where(room > 0, room, 0 * room))
        move = sign * step if compared else step
        if how.geodesic:
            angle = xp.where(speed > 0, move * inverse, 0 * move)
            turn, reach = xp.cos(angle), xp.sin(angle) / xp.where(inverse > 0, inverse, 1 + 0 * inverse)
            y, alpha = turn * y + reach * dy, turn * alpha + reach * dalpha
            continue
        if len(how.stages) == 1:
            y, alpha = y + move * dy, alpha + move * dalpha
            continue
        sum_y, sum_alpha = how.stages[0][2] * dy, how.stages[0][2] * dalpha
        for p, m, b in how.stages[1:]:
            there = y + move * (p * dy + m * sum_y), alpha + move * (p * dalpha + m * sum_alpha)
            dy, dalpha, _, _ = _slope(xp, *there, rest, field)
            sum_y, sum_alpha = sum_y + b * dy, sum_alpha + b * dalpha
        new_y, new_alpha = y + move * sum_y, alpha + move * sum_alpha
        if how.order:
            off_y, off_alpha = dy - sum_y, dalpha - sum_alpha
            error = how.factor * step * xp.sqrt(_dot(off_y, off_y) + off_alpha * off_alpha * rest)
            fits = (error <= unit) | (step <= floor)
            growth = 0.9 * (unit / xp.where(error > 0, error, unit * 1e-3 + 1e-30)) ** (1 / how.order)
            size = step * xp.where(growth < 0.2, 0.2 + 0 * growth, xp.where(growth > 5, 5 + 0 * growth, growth))
            new_y, new_alpha = xp.where(fits, new_y, y), xp.where(fits, new_alpha, alpha)
            left = xp.where(fits, left - step, left)
        y, alpha = new_y, new_alpha
    return xp.where(some, alpha, 1 + 0 * alpha), y


def drift(xp: Any, y: Any, field: Field, step: Any, steps: int) -> Any:
    """y after Euler steps along a velocity."""
    directions, act = field.directions.T, xp.tanh if field.act == "tanh" else None
    for _ in range(steps):
        inside = y @ directions + field.phases
        y = y + step * ((inside if act is None else act(inside)) @ field.outputs + field.bias)
    return y


def _slope(xp: Any, y: Any, alpha: Any, rest: Any, field: Field) -> tuple[Any, Any, Any, Any]:
    """(dy/dt, dα/dt, 1/‖a‖, ‖a‖·‖∇h‖) of the flow at a point; zero slopes where h is stationary. Raw: 1 for ‖a‖.

    A velocity is taken as fast as it is, and not at speed 1.
    """
    if field.raw:
        inverse, z = 1.0 + 0 * alpha, y
        u = _gradient(xp, z, field)
        square = _dot(u, u)
        if field.outputs is not None:
            return u, 0 * alpha, inverse, xp.sqrt(square)
        unit = 1 / xp.sqrt(xp.where(square > 0, square, math.inf))
        return unit * u, 0 * alpha, inverse, xp.sqrt(square)
    outside = alpha * alpha * rest
    square = _dot(y, y) + outside
    inverse = 1 / xp.sqrt(xp.where(square > 0, square, math.inf))
    z = y * inverse
    u = _gradient(xp, z, field)
    s = _dot(z, u)
    tangent = u - s * z
    turn = s * inverse
    square = _dot(tangent, tangent) + turn * turn * outside
    still = (STILL * xp.finfo(y.dtype).eps * s) ** 2
    square = xp.where(square > still, square, 0 * still)
    unit = 1 / xp.sqrt(xp.where((square > 0) & (inverse > 0), square, math.inf))
    return unit * tangent, -unit * turn * alpha, inverse, xp.sqrt(square)


def _gradient(xp: Any, z: Any, field: Field) -> Any:
    """∂h/∂z, or the velocity."""
    u = 2 * field.eigenvalues * z + field.bias
    if field.directions is None:
        return u
    inside = z @ field.directions.T + field.phases
    if field.outputs is not None:
        return u + (xp.tanh(inside) if field.act == "tanh" else inside) @ field.outputs
    if field.act == "cos":
        return u - (field.weights * xp.sin(inside)) @ field.directions
    bent = xp.tanh(inside)
    return u + (field.weights * (1 - bent * bent)) @ field.directions


def _height(xp: Any, z: Any, field: Field) -> Any:
    """h, (n, 1)."""
    h = _dot(z, field.eigenvalues * z + field.bias) + field.offset
    if field.directions is None:
        return h
    inside = z @ field.directions.T + field.phases
    bent = xp.cos(inside) if field.act == "cos" else xp.tanh(inside)
    return h + (bent @ field.weights)[:, None]


def _dot(u: Any, v: Any) -> Any:
    """Σ u·v over the coordinates, (n, 1)."""
    return (u * v).sum(-1, keepdims=True)


def needs_grad(*parts: Tensor | float) -> bool:
    """Whether someone asks for a gradient, or a transform looks on."""
    if transformed():
        return True
    return torch.is_grad_enabled() and any(isinstance(part, Tensor) and part.requires_grad for part in parts)
