"""The specification: every kernel once more in plain PyTorch, same name, same order.

Written to be read and to be differentiated. Inputs of 16 and 32 bits are computed in float32 and rounded once at the
end; float64 stays float64, so that a test can ask for the true value.

The bank. Every intervention is a *slot*: k projection rows B, k lift rows C and a few numbers. A bank is three tensors
that hold all slots of one place in the model, at addresses that never change:

    vectors       (R, d)  storage dtype   the rows of every B and C, one after another; a slot with C = B stores them once
    coefficients  (M, 8)  float32         per slot one row of constants, then one row per direction
    slots         (S, 8)  int32           per slot: mode, rank, project, lift, coefficients, steps, keep_norm, 0

`project` and `lift` are the first row of B and C in `vectors`, `coefficients` is the row of the slot's constants
(T, angle, strength, c₃, c₄, 0, 0, 0). Mode ADD projects nothing: its edit is the single row C. A slot of rank 0 is empty
and edits nothing. A row table says who edits which token:

    rows          (n,) or (n, P) int32    slots applied to that token, left to right; -1 = none; ≥ S is undefined
    scale         like rows, float32      multiplies the edit δ (for a flow: T), on top of the slot's own strength

One table serves every layer: a plan takes the same slot numbers in the bank of every layer, and where it has no edit
the slot is empty. So a batch's owners are decided once per forward pass, not once per layer, and a strength is changed
by writing one float. All three tensors and the table keep their addresses while contents change, which is what CUDA
graphs and torch.compile need.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ADD, HINGE, FLOW, ROTATE, PUSH = 1, 2, 4, 8, 16
ALL_MODES = ADD | HINGE | FLOW | ROTATE | PUSH
SAE_BLOCK, SAE_GROUP = 4096, 32  # features walked at a time, and those that share a maximum


VANISHED = 1e-5
"""A row of which less than this share of its length is left has vanished: what remains is the rounding of float32."""


class Slot(NamedTuple):
    """One row of a bank, as views of its tensors."""

    mode: int
    steps: int
    keep_norm: bool
    project: Tensor  # (k, d)
    lift: Tensor  # (k, d)
    constants: Tensor  # (8,)
    coefficients: Tensor  # (k, 8)


def add(x: Tensor, vectors: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x + scale · vectors[rows]; a row whose entries are all -1 is copied bit for bit."""
    bank = vectors.reshape(-1, vectors.shape[-1])
    flat = _wide(x.reshape(-1, x.shape[-1]))
    if rows is None:
        weight = 1.0 if scale is None else scale.reshape(-1, 1).to(flat.dtype)
        return (flat + weight * bank[:1].to(flat.dtype)).to(x.dtype).view(x.shape)
    table, weights = _columns(rows), None if scale is None else _columns(scale).to(flat.dtype)
    out = flat
    for column in range(table.shape[1]):
        owned = table[:, column] >= 0
        delta = bank[table[:, column].clamp(min=0)].to(flat.dtype)
        if weights is not None:
            delta = weights[:, column, None] * delta
        out = torch.where(owned[:, None], out + delta, out)
    return torch.where((table >= 0).any(1, keepdim=True), out.to(x.dtype), x.reshape(flat.shape)).view(x.shape)


def ablate(x: Tensor, basis: Tensor) -> Tensor:
    """x - VVᵀx, with orthonormal rows V = basis."""
    flat, rows = _rows(x), _rows(basis)
    return _lift(flat, -(flat @ rows.T), rows).to(x.dtype).view(x.shape)


def amplify(x: Tensor, features: Tensor, alpha: float) -> Tensor:
    """x + α · relu(xS)Sᵀ, with S = features.T."""
    flat, rows = _rows(x), _rows(features)
    return _lift(flat, alpha * torch.relu(flat @ rows.T), rows).to(x.dtype).view(x.shape)


def calibrate(x: Tensor, features: Tensor, beta: float) -> Tensor:
    """x - relu(xS)Sᵀ + β · mean(S), with S = features.T."""
    flat, rows = _rows(x), _rows(features)
    return _lift(flat, beta / rows.shape[0] - torch.relu(flat @ rows.T), rows).to(x.dtype).view(x.shape)


def flow(
    x: Tensor, basis: Tensor, eigenvalues: Tensor, bias: Tensor, length: tuple[float, float], steps: int
) -> Tensor:
    """Euler steps of da/dt = ∇h/‖∇h‖, h(a) = x̂ᵀQΛQᵀx̂ + b̃ᵀQᵀx̂, x̂ = a/‖a‖, Q = basis.T, over T = length[0] + length[1]·‖a‖."""
    coefficients = torch.zeros(basis.shape[0], 8, dtype=eigenvalues.dtype, device=x.device)
    coefficients[:, 0], coefficients[:, 1] = eigenvalues, bias
    constants = coefficients.new_tensor([*length, 0, 0, 0, 0, 0, 0])
    return edit(x, Slot(FLOW, steps, False, basis, basis, constants, coefficients))


def subspace(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Project → act → lift with the slots of a bank: x' = s·x + C·g, (s, g) = act(Bᵀx, ‖x‖)."""
    flat = x.reshape(-1, x.shape[-1])
    out = _wide(flat)
    table = slots.new_zeros(1, 1).expand(flat.shape[0], 1) if rows is None else _columns(rows)
    weights = None if scale is None else _columns(scale).to(out.dtype)
    for column in range(table.shape[1]):
        for owner, mine in _owners(table[:, column]):
            slot = slot_of(vectors, coefficients, slots, owner)
            if slot.lift.shape[0] == 0:
                continue
            gain = slot.constants[2].to(out.dtype)
            if mine is None:
                out = _edit(out, slot, gain if weights is None else gain * weights[:, column, None])
            else:
                weight = gain if weights is None else gain * weights[mine, column, None]
                out = out.index_copy(0, mine, _edit(out[mine], slot, weight))
    edited = ((table >= 0) & (slots[table.clamp(min=0).long(), 1] > 0)).any(1, keepdim=True)
    return torch.where(edited, out.to(x.dtype), flat).view(x.shape)


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


def edit(x: Tensor, slot: Slot, scale: Tensor | float = 1.0) -> Tensor:
    """One slot on every row of x (..., d); scale is strength and all: a number, or one per row, (n, 1)."""
    if (
        slot.mode == ADD
        and not slot.keep_norm
        and isinstance(scale, float)
        and x.dtype == slot.lift.dtype == torch.float32
    ):
        return torch.add(x, slot.lift, alpha=scale)  # not in 16 bits, where PyTorch rounds alpha too
    return _edit(_rows(x), slot, scale).to(x.dtype).view(x.shape)


def hinge(y: Tensor, c: Tensor) -> Tensor:
    """g = c₀ + c₁y + c₂·relu(y - c₃) + c₄·relu(y - c₅) + c₆·[y > c₇], elementwise over directions: (n, k) -> (n, k).

    Ablate, amplify, calibrate, clamp, affine and SAE feature edits are each one choice of the eight numbers.
    """
    bend = c[:, 2] * torch.relu(y - c[:, 3]) + c[:, 4] * torch.relu(y - c[:, 5])
    return c[:, 0] + c[:, 1] * y + bend + c[:, 6] * (y > c[:, 7])


def integrate(y: Tensor, norm: Tensor, c: Tensor, length: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Euler steps of da/dt = ∇h/‖∇h‖ for h(a) = x̂ᵀQΛQᵀx̂ + b̃ᵀQᵀx̂, x̂ = a/‖a‖, on the coordinates (Qᵀa, α).

    The trajectory stays in span(Q, a₀): a = α·a₀ + Q(y - α·y₀), so k + 1 numbers are all that moves
    (exact: h depends on a only through Qᵀa and ‖a‖).
    λ = c[:, 0], b̃ = c[:, 1]. y is (n, k); norm = ‖a₀‖ and length = T are (n, 1).
    Returns (α, y) after the last step; at a stationary point or a zero row nothing moves.
    """
    step = length / steps
    alpha = torch.ones_like(norm)
    rest = (norm * norm - (y * y).sum(-1, keepdim=True)).clamp(min=0)  # what lies outside span(Q), never negative
    for _ in range(steps):
        outside = alpha * alpha * rest
        square = (y * y).sum(-1, keepdim=True) + outside
        inverse = torch.where(square > 0, torch.rsqrt(square), 0)
        point = y * inverse
        u = 2 * c[:, 0] * point + c[:, 1]
        s = (point * u).sum(-1, keepdim=True)
        tangent = u - s * point
        speed = (tangent * tangent).sum(-1, keepdim=True) + s * s * outside * inverse * inverse
        q = torch.where((speed > 0) & (square > 0), step * torch.rsqrt(speed), 0)
        shrink = 1 - q * s * inverse
        y, alpha = shrink * y + q * u, shrink * alpha
    return alpha, y


def sae_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Top-K of relu(x W_encᵀ + b_enc), walking blocks of features: the matrix (n, F) never exists.

    Blocks are walked in the order of their features, so that an entry that only equals the k-th value so far has lost its
    tie already; few entries of a block survive that comparison, and only these are sorted (stably).
    """
    flat = _wide(x.reshape(-1, x.shape[-1]))
    flat = flat.to(torch.promote_types(flat.dtype, w_enc.dtype))
    n, features = flat.shape[0], w_enc.shape[0]
    values, indices = flat.new_zeros(n, k), torch.zeros(n, k, dtype=torch.int64, device=x.device)
    start, width = 0, 256  # narrow at first: the k-th value rises fast
    while start < features and n:
        stop = min(start + width, features)
        rows = w_enc[start:stop].to(flat.dtype)
        pre = flat @ rows.T if b_enc is None else torch.addmm(b_enc[start:stop].to(flat.dtype), flat, rows.T)
        values, indices = _merge(values, indices, pre, start)
        start, width = stop, min(2 * width, SAE_BLOCK)
    shape = (*x.shape[:-1], k)
    return values.contiguous().view(shape), indices.to(torch.int32).view(shape)


def sae_decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Σⱼ values[j] · W_dec[indices[j]] + b_dec, a block of rows at a time."""
    k, d = values.shape[-1], w_dec.shape[-1]
    flat, places = values.reshape(-1, k), indices.reshape(-1, k)
    dtype = torch.promote_types(torch.promote_types(values.dtype, w_dec.dtype), torch.float32)
    if w_dec.dtype == dtype:
        out = torch.nn.functional.embedding_bag(places, w_dec, per_sample_weights=flat.to(dtype), mode="sum")
    else:
        blocks = zip(flat.split(SAE_BLOCK // k or 1), places.split(SAE_BLOCK // k or 1), strict=True)
        out = torch.cat([torch.bmm(v[:, None].to(dtype), w_dec[i].to(dtype))[:, 0] for v, i in blocks])
    if b_dec is not None:
        out = out + b_dec.to(dtype)
    return out.to(w_dec.dtype).view(*values.shape[:-1], d)


def slot_of(vectors: Tensor, coefficients: Tensor, slots: Tensor, index: int) -> Slot:
    """Slot number `index` of a bank."""
    mode, rank, project, lift, start, steps, keep_norm, _ = slots[index].tolist()
    return Slot(
        mode=mode,
        steps=steps,
        keep_norm=bool(keep_norm),
        project=vectors[project : project + rank],
        lift=vectors[lift : lift + rank],
        constants=coefficients[start],
        coefficients=coefficients[start + 1 : start + 1 + rank],
    )


def _edit(x: Tensor, slot: Slot, scale: Tensor | float) -> Tensor:
    lift = slot.lift.to(x.dtype)
    if slot.mode == ADD:
        out = torch.add(x, lift, alpha=scale) if isinstance(scale, float) else x + scale * lift  # x is wide here
    elif slot.mode == HINGE:
        g = hinge(x @ slot.project.to(x.dtype).T, slot.coefficients.to(x.dtype))
        out = _lift(x, scale * g, lift)
    elif slot.mode == FLOW:
        constants = slot.constants.to(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        start = x @ slot.project.to(x.dtype).T
        length = scale * (constants[0] + constants[1] * norm)
        alpha, y = integrate(start, norm, slot.coefficients.to(x.dtype), length, slot.steps)
        out = _lift(x, y - alpha * start, lift, (alpha - 1) * x)
    else:
        constants, y = slot.constants.to(x.dtype), x @ slot.project.to(x.dtype).T
        g = (
            rotate(y, constants, scale)
            if slot.mode == ROTATE
            else push(y, constants, slot.coefficients[:, 0].to(x.dtype), scale)
        )
        out = _lift(x, g, lift)
    return _restore_norm(out, x) if slot.keep_norm else out


def _lift(x: Tensor, g: Tensor, lift: Tensor, more: Tensor | None = None) -> Tensor:
    """x + (g·C + more). The edit is summed before x is added: addmm would round every term to the precision of x."""
    delta = g @ lift
    return (delta if more is None else delta.add_(more)).add_(x)


def _restore_norm(out: Tensor, x: Tensor) -> Tensor:
    """out with the length of x; a row that an edit took away all but completely is not stretched from its rounding noise."""
    before, after = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (x, out))
    return torch.where(after > VANISHED * before, out * (before / after), out)


def _merge(values: Tensor, indices: Tensor, pre: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The running best of each row, (n, k), with those entries of a block of pre-activations that beat its last one.

    Maxima of 32 neighbours are compared first: one cheap pass leaves little to look at. NaN beats every number, as in
    torch.topk.
    """
    n, k = values.shape
    groups = torch.nn.functional.pad(pre, (0, -pre.shape[1] % SAE_GROUP)).view(n, -1, SAE_GROUP)
    last = values[:, -1:].nan_to_num(nan=torch.inf)
    row, group = (groups.amax(2) <= last).logical_not_().nonzero(as_tuple=True)
    entries = groups[row, group]
    which, place = (entries <= last[row]).logical_not_().nonzero(as_tuple=True)
    entries, row, column = entries[which, place], row[which], group[which] * SAE_GROUP + place
    count = torch.bincount(row, minlength=n)
    slot = torch.arange(row.numel(), device=row.device) - (count.cumsum(0) - count)[row]
    width = int(count.max())
    more = values.new_zeros(n, width).index_put((row, slot), entries)
    where = indices.new_zeros(n, width).index_put((row, slot), column + start)
    merged, order = torch.cat([values, more], 1).sort(dim=1, descending=True, stable=True)
    return merged[:, :k], torch.cat([indices, where], 1).gather(1, order[:, :k])


def _owners(column: Tensor) -> list[tuple[int, Tensor | None]]:
    """The slots named in one column of a row table, each with the tokens it owns (None: all of them)."""
    if column.stride(0) == 0 or column.shape[0] == 1:
        owners = column[:1].tolist()
        return [(owner, None) for owner in owners if owner >= 0]
    return [(owner, (column == owner).nonzero().flatten()) for owner in column.unique().tolist() if owner >= 0]


def _columns(table: Tensor) -> Tensor:
    return table if table.dim() == 2 else table[:, None]


def _rows(x: Tensor) -> Tensor:
    """x as (n, d) in the dtype of the arithmetic."""
    return _wide(x.reshape(-1, x.shape[-1]))


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
