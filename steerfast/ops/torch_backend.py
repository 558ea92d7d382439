"""The backend of PyTorch: every op without Triton, on any device, differentiable; fast where that costs no exactness.

Inputs of 16 and 32 bits are computed in float32 and rounded once at the end; float64 stays float64. What an op means is
written down in its public function, and as a formula in `tests/reference.py`, which holds both backends to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .backends import in_full_precision, transformed
from .few import are_few, few_eulers
from .slots import ADD, AFFINE, FLOW, HINGE, PUSH, ROTATE, SLERP, SOLVE, Slot, slot_of
from .solvers import EULER, Field, Scheme, integrate, unpack

SAE_ROWS = 256  # 16-bit decoder rows that are widened at a time: in float32 they stay in the cache
TINY = 1e-30  # stands in for the length of a zero row

SINE = 1e-4
"""Below this sine two directions count as parallel: no plane is left to turn in."""

VANISHED = 1e-5
"""A row of which less than this share of its length is left has vanished: what remains is the rounding of float32."""


def add(x: Tensor, vectors: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x + scale · vectors[rows]; a row whose entries are all -1 is copied bit for bit, one beyond the bank becomes NaN."""
    bank = vectors.reshape(-1, vectors.shape[-1])
    flat = widened(x.reshape(-1, x.shape[-1]))
    if rows is None and bank.shape[0]:
        weight = 1.0 if scale is None else scale.reshape(-1, 1).to(flat.dtype)
        return (flat + weight * bank[:1].to(flat.dtype)).to(x.dtype).view_as(x)
    table = _table(rows, flat)
    weights = None if scale is None else _columns(scale).to(flat.dtype)
    inside, out = _inside(table, bank), flat
    # the common case on a CPU, without six passes to leave rows alone
    every = x.is_cpu and type(x) is Tensor and bool(inside.all())
    chosen = table if every else torch.where(inside, table, 0)
    for column in range(table.shape[1] if bank.shape[0] else 0):
        delta = bank.index_select(0, chosen[:, column]).to(flat.dtype)
        if weights is not None:
            delta = weights[:, column, None] * delta
        out = out + delta if every else torch.where(inside[:, column, None], out + delta, out)
    out = out.to(x.dtype)
    if not every:
        out = torch.where(inside.any(1, keepdim=True), out, x.reshape(flat.shape))
        out = out.masked_fill((~inside & (table != -1)).any(1, keepdim=True), torch.nan)
    return out.view_as(x)


@in_full_precision
def hinged(x: Tensor, directions: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """x + act(xBᵀ)B, with the rows B = directions."""
    flat, rows = _rows(x), _rows(directions)
    if flat.dtype is not rows.dtype:
        flat, rows = flat.double(), rows.double()
    return _lift(flat, act(flat @ rows.T), rows).to(x.dtype).view_as(x)


@in_full_precision
def flow(
    x: Tensor, basis: Tensor, field: Field, length: tuple[float, float], steps: int, how: Scheme = EULER
) -> Tensor:
    """Steps of da/dt = ∇h/‖∇h‖ over T = length[0] + length[1]·‖a‖, for h(a) = field(Qᵀx̂), x̂ = a/‖a‖, Q = basis.T."""
    if x.dim() == 2 and basis.dim() == 2 and are_few(x, basis, field, length, steps, how):
        return few_eulers(x, basis, field, length, steps)
    flat = _rows(x)
    rows = basis.reshape(-1, basis.shape[-1]).to(flat.dtype)
    return _follow(flat, rows, field, length, steps, how).to(x.dtype).view_as(x)


def subspace(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Project → act → lift with the slots of a bank: x' = s·x + C·g, (s, g) = act(Bᵀx, ‖x‖); NaN beyond the bank."""
    flat = x.reshape(-1, x.shape[-1])
    out, table = widened(flat), _table(rows, flat)
    weights = None if scale is None else _columns(scale).to(out.dtype)
    whole = False  # whether a slot has edited every row
    for column in range(table.shape[1]):
        for owner, mine in _owners(table[:, column]):
            if not 0 <= owner < slots.shape[0]:
                out = out.masked_fill((table[:, column] == owner)[:, None], torch.nan)
                whole = whole or mine is None
                continue
            slot = slot_of(vectors, coefficients, slots, owner)
            if slot.lift.shape[0] == 0:
                continue
            gain = slot.constants[2].to(out.dtype)
            if mine is None:
                whole = True
                out = _edit(out, slot, gain if weights is None else gain * weights[:, column, None])
            else:
                weight = gain if weights is None else gain * weights[mine, column, None]
                moved = _edit(out[mine], slot, weight)
                out = out.index_copy(0, mine, moved) if out is flat else out.index_copy_(0, mine, moved)
    out = out.to(x.dtype)
    return (out if whole else torch.where(_edited(table, slots), out, flat)).view_as(x)


@in_full_precision
def subspace_probe(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    max_rank: int,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(x', y): `subspace`, and what it projected, y = Bᵀx as (n, P, max_rank): its first numbers, zero beyond a slot's rank."""
    flat = x.reshape(-1, x.shape[-1])
    table, weights = _table(rows, flat), None if scale is None else _columns(scale)
    wide = widened(flat)
    y = wide.new_zeros(*table.shape, max_rank)
    for column in range(table.shape[1]):
        for owner, mine in _owners(table[:, column]):
            if not 0 <= owner < slots.shape[0]:
                continue
            slot = slot_of(vectors, coefficients, slots, owner)
            if slot.mode not in (ADD, AFFINE) and slot.lift.shape[0]:
                index = slice(None) if mine is None else mine
                seen = slot.project[:max_rank]
                y[index, column, : seen.shape[0]] = wide[index] @ seen.to(wide.dtype).T
        weight = None if weights is None else weights[:, column]
        wide = subspace(wide, vectors, coefficients, slots, table[:, column], weight)
    return torch.where(_edited(table, slots), wide.to(x.dtype), flat).view_as(x), y


def subspace_split(
    hidden: Tensor,
    residual: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """residual + δ(hidden + residual): `subspace` on a stream that is carried as two tensors."""
    h, r = _rows(hidden), _rows(residual)
    moved = subspace(h + r, vectors, coefficients, slots, rows, scale) - (h + r)
    flat = residual.reshape(r.shape)
    edited = _edited(_table(rows, flat), slots)
    return torch.where(edited, (r + moved).to(residual.dtype), flat).view_as(residual)


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
    """(normed, stream): stream = hidden + residual + scale · vectors[rows], normed = stream / rms(stream) · weight."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32)) + residual
    stream = add(wide, vectors, rows, scale).to(residual.dtype)
    x = stream.to(wide.dtype)
    gain = weight.to(wide.dtype) + (1.0 if unit_offset else 0.0)
    normed = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * gain
    return normed.to(residual.dtype), stream


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """w ⊙ x + b, elementwise."""
    wide = _rows(x)
    return (wide * weight.to(wide.dtype) + bias.to(wide.dtype)).to(x.dtype).view_as(x)


@in_full_precision
def similarity(x: Tensor, basis: Tensor, squash: bool) -> Tensor:
    """‖Wx‖/‖x‖ = |cos(x, proj_W x)| for orthonormal rows W; squashed: cos(x, tanh(WᵀWx)). A zero row has similarity 0."""
    wide, rows = _rows(x), widened(basis.reshape(-1, basis.shape[-1]))
    y = wide @ rows.to(wide.dtype).T
    norm = torch.linalg.vector_norm(wide, dim=-1)
    if squash:
        image = torch.tanh(y @ rows.to(wide.dtype))
        found = (wide * image).sum(-1) / (norm * torch.linalg.vector_norm(image, dim=-1))
    else:
        found = torch.linalg.vector_norm(y, dim=-1) / norm
    return torch.where(found.isnan() & wide.isfinite().all(-1), 0, found).view(x.shape[:-1])


def rotate(y: Tensor, c: Tensor, scale: Tensor | float) -> Tensor:
    """g = ‖y‖(cos t, sin t) - y with t = scale·c₃: the two coordinates y (n, 2) get the angle t; c₄ = 1: only where y₁ > 0."""
    angle = scale * c[3]
    axis = torch.stack([torch.cos(angle), torch.sin(angle)], dim=-1).reshape(-1, 2)
    g = torch.linalg.vector_norm(y, dim=-1, keepdim=True) * axis - y
    return torch.where((c[4] == 0) | (y[:, :1] > 0), g, 0)


def push(y: Tensor, c: Tensor, bias: Tensor, scale: Tensor | float) -> Tensor:
    """g = scale·m·v/Σv with the deficit v = relu(m - relu(y + b)), m = c₃; nothing where no feature falls short."""
    short = torch.relu(c[3] - torch.relu(y + bias))
    total = short.sum(-1, keepdim=True)
    return torch.where(total > 0, scale * c[3] / total, 0) * short


def slerp(y: Tensor, norm: Tensor, c: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """(s, g) that turn a row towards μ_T by the share t of the angle ω between them, its length kept.

    y = (μ_Tᵀx, μ_Hᵀx), δ = tanh(κ(cos_H - cos_T)/2) = p_H - p_T, t = α(δ - β)/(1 - β) where δ > β and 0 elsewhere, with
    α = scale·c₃, β = c₄, κ = c₅. x' = sin((1 - t)ω)/sin ω · x + ‖x‖ sin(tω)/sin ω · μ_T; a row that has no way to turn
    (zero, or on the axis of μ_T) stays.
    """
    cos = (y / norm.clamp(min=TINY)).clamp(-1, 1)
    doubt = torch.tanh(c[5] * (cos[:, 1:] - cos[:, :1]) / 2)
    t = (scale * c[3] * (doubt - c[4]) / (1 - c[4])).clamp(max=1)
    omega = torch.acos(cos[:, :1])
    sine = torch.sin(omega)
    turns = (doubt > c[4]) & (sine > SINE) & (norm > 0)
    s = torch.where(turns, torch.sin((1 - t) * omega) / sine, 1)
    g = torch.where(turns, norm * torch.sin(t * omega) / sine, 0)
    return s, torch.cat([g, torch.zeros_like(g)], dim=1)


def reflect(y: Tensor, norm: Tensor, c: Tensor, table: Tensor, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """(s, g) that turn a row on the negative side of v̂ towards its mirror image by the angle γ that a small net predicts.

    y₀ = v̂ᵀx, γ = scale·π·σ(w₂ᵀrelu(y₁… + b₁) + b₂) with b₁ = table[:, 0], w₂ = table[:, 1], b₂ = c₃, φ the angle between
    x and its image x - 2y₀v̂: x' = sin(φ - γ)/sin φ · x + sin γ/sin φ · image. Rows with y₀ + c₄ ≥ 0, and rows that their
    own image leaves no plane to turn in, stay.
    """
    hidden = torch.relu(y[:, 1:] + table[1:, 0])
    gamma = scale * math.pi * torch.sigmoid((hidden * table[1:, 1]).sum(-1, keepdim=True) + c[3])
    lean = (y[:, :1] / norm.clamp(min=TINY)).clamp(-1, 1)  # -sin(φ/2)
    phi = 2 * torch.asin(lean.abs())
    sine = torch.sin(phi)
    turns = (y[:, :1] + c[4] < 0) & (sine > SINE)
    near, far = torch.sin(phi - gamma) / sine, torch.sin(gamma) / sine
    g = torch.where(turns, -2 * y[:, :1] * far, 0)
    return torch.where(turns, near + far, 1), torch.nn.functional.pad(g, (0, y.shape[1] - 1))


def edit(slot: Slot, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """One slot on every row of x (..., d); scale is strength and all: a number, or one per row, (n, 1)."""
    if (
        slot.mode == ADD
        and not slot.keep_norm
        and isinstance(scale, float)
        and x.dtype == slot.lift.dtype == torch.float32
    ):
        return torch.add(x, slot.lift, alpha=scale)  # not in 16 bits, where PyTorch rounds alpha too
    return _edit(_rows(x), slot, scale).to(x.dtype).view_as(x)


def hinge(y: Tensor, c: Tensor) -> Tensor:
    """g = c₀ + c₁y + c₂·relu(y - c₃) + c₄·relu(y - c₅) + c₆·[y > c₇], elementwise over directions: (n, k) -> (n, k).

    Ablate, amplify, calibrate, clamp, affine and SAE feature edits are each one choice of the eight numbers.
    """
    c0, c1, c2, c3, c4, c5, c6, c7 = c.unbind(-1)
    g = torch.addcmul(c0, c1, y)
    g = torch.addcmul(g, c2, torch.relu(y - c3))
    g = torch.addcmul(g, c4, torch.relu(y - c5))
    return torch.addcmul(g, c6, (y > c7).to(y.dtype))


@in_full_precision
def sae_decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Σⱼ values[j] · W_dec[indices[j]] + b_dec, a block of rows at a time."""
    out = _gather_sum(values, indices, w_dec)
    if b_dec is not None:
        out = out + b_dec.to(out.dtype)
    return out.to(w_dec.dtype)


@in_full_precision
def sae_add(x: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, scale: Tensor | None = None) -> Tensor:
    """x + scale · Σⱼ values[j] · W_dec[indices[j]], rounded once; a row of scale 0 is copied bit for bit."""
    delta = _gather_sum(values, indices, w_dec)
    if scale is None:
        return (widened(x) + delta).to(x.dtype)
    weight = scale.view(*x.shape[:-1], 1)
    return torch.where(weight == 0, x, (widened(x) + weight * delta).to(x.dtype))


@in_full_precision
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
    values, indices = values.reshape(-1, values.shape[-1]), indices.reshape(-1, indices.shape[-1])
    f = torch.stack([(values * (indices == feature)).sum(1) for feature in features], 1)
    g = torch.clamp(table[:, 0] * f + table[:, 1], table[:, 2], table[:, 3]) - f
    delta = (g.to(widened(w_dec).dtype) @ widened(w_dec)).view_as(x)
    if scale is None:
        return (widened(x) + delta).to(x.dtype)
    weight = scale.view(*x.shape[:-1], 1)
    return torch.where(weight == 0, x, (widened(x) + weight * delta).to(x.dtype))


@in_full_precision
def _edit(x: Tensor, slot: Slot, scale: Tensor | float) -> Tensor:
    lift = slot.lift.to(x.dtype)
    if slot.mode == ADD:
        out = torch.add(x, lift, alpha=scale) if isinstance(scale, float) else x + scale * lift  # x is wide here
    elif slot.mode == AFFINE:
        out = x + scale * (lift[0] * x + lift[1])
    elif slot.mode in (FLOW, SOLVE):
        T, angle = scale * slot.constants[0].to(x.dtype), scale * slot.constants[1].to(x.dtype)
        table, extra = slot.coefficients.to(x.dtype), None if slot.extra is None else slot.extra.to(x.dtype)

        def end(raw: bool) -> Tensor:
            field, how = unpack(table, extra, raw)
            return _follow(x, lift, field, (T, angle), slot.steps, how)

        if slot.mode == FLOW and transformed():  # whether it is raw is a number that may differ over a batch of banks
            out = torch.where(slot.constants[3] > 0, end(True), end(False))
        else:
            out = end(slot.mode == FLOW and bool(slot.constants[3]))
    else:
        y, table = x @ slot.project.to(x.dtype).T, slot.coefficients.to(x.dtype)
        if slot.mode == HINGE:
            out = _lift(x, scale * hinge(y, table), lift)
        else:
            s, g = _couple(x, y, slot, table, scale)
            out = _lift(x, g, lift, None if s is None else torch.where(s == 1, 0, (s - 1) * x))
    return restore_norm(out, x) if slot.keep_norm else out


def _couple(x: Tensor, y: Tensor, slot: Slot, table: Tensor, scale: Tensor | float) -> tuple[Tensor | None, Tensor]:
    """(s, g) of the modes that need all of y; s None stands for 1."""
    constants = slot.constants.to(x.dtype)
    if slot.mode == ROTATE:
        return None, rotate(y, constants, scale)
    if slot.mode == PUSH:
        return None, push(y, constants, table[:, 0], scale)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if slot.mode == SLERP:
        return slerp(y, norm, constants, scale)
    return reflect(y, norm, constants, table, scale)


def _follow(
    x: Tensor, basis: Tensor, field: Field, path: tuple[Tensor | float, Tensor | float], steps: int, how: Scheme
) -> Tensor:
    """Rows x at the end of their flow over T + angle·‖x‖, (T, angle) = path."""
    if not field.eigenvalues.dtype == field.bias.dtype == x.dtype:
        field = field.map(lambda v: v.to(x.dtype))
    if are_few(x, basis, field, path, steps, how):
        return few_eulers(x, basis, field, path, steps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y, length = x @ basis.T, path[0] + path[1] * norm
    if basis.shape[0] == x.shape[1]:  # full rank: nothing lies outside the span, not even rounding
        inside = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        out = _lift(x, integrate(y, inside, field, length, steps, how)[1] - y, basis)
    else:
        alpha, end = integrate(y, norm, field, length, steps, how)
        out = _lift(x, end - alpha * y, basis, (alpha - 1) * x)
    return torch.where(out == x, x, out)  # a path of no length keeps even the sign of a zero


def _lift(x: Tensor, g: Tensor, lift: Tensor, more: Tensor | None = None) -> Tensor:
    """x + (g·C + more). The edit is summed before x is added: addmm would round every term to the precision of x."""
    delta = g @ lift
    return (delta if more is None else delta.add_(more)).add_(x)


def restore_norm(out: Tensor, x: Tensor) -> Tensor:
    """out with the length of x; a row that an edit took away all but completely is not stretched from its rounding noise."""
    before, after = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (x, out))
    return torch.where(after > VANISHED * before, out * (before / after), out)


def _gather_sum(values: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
    """Σⱼ values[j] · W_dec[indices[j]] in the dtype of the arithmetic."""
    k, d = values.shape[-1], w_dec.shape[-1]
    flat, places = values.reshape(-1, k), indices.reshape(-1, k)
    dtype = torch.promote_types(torch.promote_types(values.dtype, w_dec.dtype), torch.float32)
    if transformed():
        out = (flat[:, None].to(dtype) @ w_dec[places.long()].to(dtype))[:, 0]
    elif w_dec.dtype == dtype:
        out = torch.nn.functional.embedding_bag(places, w_dec, per_sample_weights=flat.to(dtype), mode="sum")
    else:
        step = SAE_ROWS // k or 1
        blocks = zip(flat.split(step), places.split(step), strict=True)
        rows = ((v[:, None], w_dec.index_select(0, i.reshape(-1)).view(-1, k, d)) for v, i in blocks)
        out = torch.cat([torch.bmm(v.to(dtype), w.to(dtype))[:, 0] for v, w in rows])
    return out.view(*values.shape[:-1], d)


def _owners(column: Tensor) -> list[tuple[int, Tensor | None]]:
    """The numbers but -1 in one column of a row table, each with the tokens it owns (None: all of them)."""
    if column.stride(0) == 0 or column.shape[0] == 1:
        owners = column[:1].tolist()
    else:
        owners = sorted(set(column.tolist()))
    if len(owners) == 1:
        return [(owner, None) for owner in owners if owner != -1]
    return [(owner, (column == owner).nonzero().flatten()) for owner in owners if owner != -1]


def _edited(table: Tensor, slots: Tensor) -> Tensor:
    """bool (n, 1): rows that some slot edits, or that name one that the bank does not have."""
    inside = _inside(table, slots)
    ranks = torch.nn.functional.pad(slots[:, 1], (0, 1))[torch.where(inside, table, slots.shape[0]).long()]
    return torch.where(inside, ranks > 0, table != -1).any(1, keepdim=True)


def _inside(table: Tensor, bank: Tensor) -> Tensor:
    """bool (n, P): entries that name a row of the bank."""
    return (table >= 0) & (table < bank.shape[0])


def _table(rows: Tensor | None, flat: Tensor) -> Tensor:
    """The row table as (n, P); without one, slot 0 for every row."""
    if rows is None:
        return torch.zeros(1, 1, dtype=torch.int32, device=flat.device).expand(flat.shape[0], 1)
    return _columns(rows)


def _columns(table: Tensor) -> Tensor:
    return table if table.dim() == 2 else table[:, None]


def _rows(x: Tensor) -> Tensor:
    """x as (n, d) in the dtype of the arithmetic."""
    return widened(x.reshape(-1, x.shape[-1]))


def widened(x: Tensor) -> Tensor:
    """x in the dtype of the arithmetic: 16 bits as float32."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
