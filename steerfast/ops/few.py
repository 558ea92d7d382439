"""Euler's steps for a few rows on a CPU, in NumPy: what `solvers.integrate` does, where the number of calls is the cost."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .solvers import EULER, OUTSIDE, SMALL, Field, Scheme, drift, follow, needs_grad

NEAR = 1e-8
"""A row is nearly stationary where the gradient along the sphere has less than this share of the gradient's square."""


def are_few(x: Tensor, basis: Tensor, field: Field, path: tuple[Tensor | float, ...], steps: int, how: Scheme) -> bool:
    """Whether `few_eulers` serves: Euler at low rank, a handful of CPU rows, one dtype, no gradient; quadratic, or a velocity."""
    return (
        how.plain
        and (field.outputs is not None or field.directions is None)
        and x.is_cpu
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == basis.dtype == field.eigenvalues.dtype == field.bias.dtype
        and basis.shape[0] < basis.shape[1]
        and 0 < x.shape[0] * max(basis.shape[0], steps) <= SMALL
        and not torch.compiler.is_compiling()
        and not needs_grad(x, basis, field.eigenvalues, field.bias, *path)
    )


@np.errstate(all="ignore")  # what is not finite comes from rows in doubt, or from NaN
def few_eulers(x: Tensor, basis: Tensor, field: Field, path: tuple[Tensor | float, ...], steps: int) -> Tensor:
    """Rows x (n, d) after Euler steps on a quadratic barrier or a velocity, over T + angle·‖x‖ with (T, angle) = path.

    The steps in NumPy, for a single row all of it: the number of calls is what it costs. With z = y/r, u = 2λ∘z + b̃,
    s = z·u and t = (ε/r)/√(u·u - s²) a step is z ← (r/r')·((1 - ts)·z + t·u), and r² grows by ε²: in float64, where the
    difference loses nothing.
    """
    if field.outputs is not None:
        return _few_drifts(x, basis, field, path, steps)
    if field.raw:
        return _few_raw(x, basis, field, path, steps)
    eigenvalues, bias = field.eigenvalues.numpy(force=True), field.bias.numpy(force=True)
    wide = eigenvalues.astype(np.float64), bias.astype(np.float64)
    if x.shape[0] == 1:
        moved = _eulers_of_one(
            x.numpy(force=True)[0], basis.numpy(force=True), *wide, float(path[0]), float(path[1]), steps
        )
        if moved is not None:
            return torch.from_numpy(moved[None])
    T, angle = (p.detach().numpy().reshape(-1) if isinstance(p, Tensor) else p for p in path)
    start, norm = (x @ basis.T).numpy(), torch.linalg.vector_norm(x, dim=-1).numpy()
    length = T + angle * norm
    alpha, y, doubt = _eulers_of_several(start, norm, *wide, length / steps, steps)
    if doubt.any():  # these rows alone, so that no row depends on the rows beside it
        there = start[doubt], norm[doubt][:, None], Field(eigenvalues, bias), length[doubt][:, None]
        alpha[doubt], y[doubt] = follow(np, *there, steps, EULER)
    g = (y - alpha * start).astype(start.dtype)
    out = (torch.from_numpy(g) @ basis).addcmul_(torch.from_numpy((alpha - 1).astype(start.dtype)), x).add_(x)
    moves = g.any(1) & (length != 0)
    return out if moves.all() else torch.where(torch.from_numpy(moves)[:, None], out, x)  # even the sign of a zero


def _few_drifts(x: Tensor, basis: Tensor, field: Field, path: tuple[Tensor | float, ...], steps: int) -> Tensor:
    """Rows after Euler steps along a velocity, in float64; an affine one is a matrix, and a step one product."""
    step = _lengths(x, path) / steps
    parts = (field.directions, field.outputs, field.phases, field.bias)
    omega, eta, phases, bias = [v.numpy(force=True).astype(np.float64) for v in parts]
    start = y = _coordinates(x, basis)
    if field.act == "identity":
        matrix, constant = omega.T @ eta, phases @ eta + bias
        if isinstance(step, float):  # the same matrix for all rows, and with a 1 behind y the constant is a row of it
            rank = len(bias)
            wide = np.eye(rank + 1)
            wide[:rank, :rank] += step * matrix
            wide[rank, :rank] = step * constant
            y = np.ones((len(start), rank + 1))
            y[:, :rank] = start
            for _ in range(steps):
                y = y.dot(wide)
            y = y[:, :rank]
        else:
            for _ in range(steps):
                y = y + step * (y @ matrix + constant)
    else:
        y = drift(np, y, Field(None, bias, directions=omega, phases=phases, act=field.act, outputs=eta), step, steps)
    return _moved(x, basis, y - start)


def _few_raw(x: Tensor, basis: Tensor, field: Field, path: tuple[Tensor | float, ...], steps: int) -> Tensor:
    """Rows after Euler steps on a raw quadratic barrier, in float64; a linear one is a single step."""
    length = _lengths(x, path)
    double, bias = (v.numpy(force=True).astype(np.float64) for v in (2 * field.eigenvalues, field.bias))
    start = y = _coordinates(x, basis)
    if not double.any():
        steps = 1
    step = length / steps
    y = y + 0 * step  # a length that is NaN stays so where h stands still, too
    if len(y) == 1:  # sums as plain floats, in place: the number of calls is what it costs
        size, one, u = float(np.asarray(step).item()), y[0].copy(), np.empty(len(bias))
        for _ in range(steps):
            np.multiply(one, double, u)
            u += bias
            square = float(u.dot(u))
            u *= size / math.sqrt(square) if square > 0 else 0.0 * square
            one += u
        return _moved(x, basis, one[None] - start)
    for _ in range(steps):
        u = y * double
        u += bias
        size = np.sqrt(np.einsum("nk,nk->n", u, u))[:, None]
        y = y + np.where(size > 0, step / size, 0.0 * size) * u
    return _moved(x, basis, y - start)


def _lengths(x: Tensor, path: tuple[Tensor | float, ...]) -> Any:
    """T + angle·‖x‖ of every row, (n, 1); or T alone, where all have the same."""
    T, angle = (p.numpy(force=True).reshape(-1, 1) if isinstance(p, Tensor) else p for p in path)
    if isinstance(angle, np.ndarray) or angle:
        T = T + angle * torch.linalg.vector_norm(x, dim=-1, keepdim=True).numpy()
    return T


def _coordinates(x: Tensor, basis: Tensor) -> Any:
    """Qᵀx of rows in float64; of one row all of it in NumPy, since the number of calls is what it costs."""
    one = x.shape[0] == 1
    y = basis.numpy(force=True).dot(x.numpy(force=True)[0])[None] if one else (x @ basis.T).numpy()
    return y.astype(np.float64)


def _moved(x: Tensor, basis: Tensor, g: Any) -> Tensor:
    """x + Qg of rows; one that stays keeps even the sign of a zero."""
    rows = x.numpy(force=True)
    g = g.astype(rows.dtype)
    if len(rows) == 1:
        return torch.from_numpy((g[0].dot(basis.numpy(force=True)) + rows[0] if g.any() else rows[0].copy())[None])
    out = (torch.from_numpy(g) @ basis).add_(x)
    moves = g.any(1)
    return out if moves.all() else torch.where(torch.from_numpy(moves)[:, None], out, x)


def _eulers_of_one(row: Any, q: Any, eigenvalues: Any, bias: Any, T: float, angle: float, steps: int) -> Any:
    """The row moved, its sums as plain floats: with z, λ∘z and b̃ in one table a step is three products.

    None where that is in doubt: nearly stationary, next to nothing outside the span, or beyond all numbers.
    """
    start = q.dot(row)
    r2 = float(row.dot(row))
    step = (T + angle * math.sqrt(r2)) / steps
    if not r2 - float(start.dot(start)) > OUTSIDE * float(np.finfo(row.dtype).eps) * r2:
        return None
    if step == 0:
        return row.copy()  # even the sign of a zero
    one, two, weights = np.empty((3, len(bias))), np.empty((3, len(bias))), np.empty(3)
    one[2] = two[2] = bias
    (table, z, bent), other = (one, one[0], one[1]), (two, two[0], two[1])
    factors = weights.data
    inverse, alpha, start = r2**-0.5, 1.0, start.astype(np.float64)
    np.multiply(start, inverse, z)
    zb, bb = float(z.dot(bias)), float(bias.dot(bias))
    for _ in range(steps):
        np.multiply(z, eigenvalues, bent)
        half, quarter, ub = table.dot(bent).tolist()
        s, uu = 2.0 * half + zb, 4.0 * quarter + bb
        gap = uu + 4.0 * ub - s * s
        if not gap > NEAR * uu:
            return None
        turn = step * inverse * gap**-0.5
        keep = 1.0 - turn * s
        alpha *= keep
        r2 += step * step
        before, inverse = inverse, r2**-0.5
        if not inverse > 0:
            return None
        shrink = inverse / before
        keep, turn = keep * shrink, turn * shrink
        factors[0], factors[1], factors[2] = keep, 2.0 * turn, turn
        zb = keep * zb + 2.0 * turn * ub + turn * bb
        weights.dot(table, other[1])
        (table, z, bent), other = other, (table, z, bent)
    out = (z / inverse - alpha * start).astype(row.dtype).dot(q)
    out += (alpha - 1.0) * row
    out += row
    return out


def _eulers_of_several(
    start: Any, norm: Any, eigenvalues: Any, bias: Any, step: Any, steps: int
) -> tuple[Any, Any, Any]:
    """(α, y, doubt) of rows, coordinates first, so that one small product gives all sums, and another all factors and terms."""
    n, k = start.shape
    double, bb = 2 * eigenvalues, bias.dot(bias)
    sums = np.zeros((2, 2 * k + 1))  # of z², z and 1: s and u·u
    sums[0, :k], sums[0, k:-1] = double, bias
    sums[1, :k], sums[1, k:-1], sums[1, -1] = double * double, 2 * double * bias, bb
    spread = np.zeros((2 * k, 2))
    spread[:k, 0], spread[:k, 1], spread[k:, 0] = double, 1, bias
    both, change = _aligned(2 * k + 1, n), _aligned(2 * k, n)
    both[-1] = 1
    weights, found = np.empty((2, n)), np.empty((steps, 2, n))
    square, z, factor, term = both[:k], both[k:-1], change[:k], change[k:]
    turn, keep = weights
    inverse = (norm.astype(np.float64) ** 2 + np.arange(steps + 1)[:, None] * (step * step)) ** -0.5
    shrink, alpha, bent = inverse[1:] / inverse[:-1], np.ones(n), np.empty(n)
    np.multiply(start.T, inverse[0], z)
    for both_sums, ratio, share in zip(found, shrink, step * inverse[1:], strict=True):
        np.multiply(z, z, square)
        sums.dot(both, both_sums)
        s, gap = both_sums
        np.multiply(s, s, bent)
        gap -= bent
        np.power(gap, -0.5, turn)
        turn *= share
        np.multiply(turn, s, keep)
        np.subtract(ratio, keep, keep)
        alpha *= keep
        spread.dot(weights, change)
        z *= factor
        z += term
    norm2 = norm * norm
    sure = norm2 - np.einsum("nk,nk->n", start, start) > OUTSIDE * np.finfo(start.dtype).eps * norm2
    doubt = ~(sure & (found[:, 1].min(0) > NEAR * (np.max(double * double) + bb)))
    alpha *= inverse[0] / inverse[-1]
    return alpha[:, None], np.ascontiguousarray((z / inverse[-1]).T), doubt


def _aligned(*shape: int) -> Any:
    """An empty array that begins on a cache line, as PyTorch's do and NumPy's do not: a step is then a seventh faster."""
    return torch.empty(shape, dtype=torch.float64, device="cpu").numpy()
