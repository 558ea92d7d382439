"""`sae_edit_topk` on PyTorch: features of a Top-K SAE edited by counting what exceeds them, without its Top-K."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import in_full_precision, transformed
from .torch_backend import widened
from .torch_encode import SAE_BLOCK, SAE_CELLS, SAE_GROUP, pre_activations, sae_encode

FIRST, GROWTH = 512, 4
"""Features that are looked at first, and how many times as many each time after: most rows are done after a few hundred."""


@in_full_precision
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
    """x + scale · Σₘ (t(fₘ) - fₘ) · W_dec[m]; fₘ is what `sae_encode` finds for feature m, 0 where it is not among the k."""
    return edited(x, activations(x, w_enc, b_enc, k, features), features, table, w_dec, scale)


@in_full_precision
def activations(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int, features: Tensor) -> Tensor:
    """(n, m): what `sae_encode` finds for a few features, (m,) of every row or (n, m), each row's own.

    Rows leave the walk over the dictionary as soon as k features exceed each of theirs; most do in its first block.
    """
    # a transform may hide the values that decide when a row is done; of one row a single product is the sooner done
    if transformed() or x.numel() <= x.shape[-1]:
        return found(*sae_encode(x, w_enc, b_enc, k), columns(features))
    flat = widened(x.reshape(-1, x.shape[-1]))
    return _selected(flat.to(torch.promote_types(flat.dtype, w_enc.dtype)), w_enc, b_enc, k, features)


def columns(features: Tensor) -> list[Tensor]:
    """Features (m,) or (n, m) as `found` takes them: m of (1, 1) or of (n, 1)."""
    rows = features if features.dim() == 2 else features[None]
    return [*rows.split(1, dim=1)]


def found(values: Tensor, indices: Tensor, columns: list[Tensor], nothing: Tensor | None = None) -> Tensor:
    """(n, m): the value beside each feature among the encoded, 0 where it is not there; differentiable in the values.

    `nothing` is a zero of the values' dtype that is there already.
    """
    if values.dim() != 2:
        values, indices = values.reshape(-1, values.shape[-1]), indices.reshape(-1, indices.shape[-1])
    zero = values.new_zeros(()) if nothing is None else nothing
    each = [torch.where(indices == column, values, zero).sum(1, keepdim=True) for column in columns]
    return each[0] if len(each) == 1 else torch.cat(each, 1)


def edited(x: Tensor, f: Tensor, features: Tensor, table: Tensor, w_dec: Tensor, scale: Tensor | None) -> Tensor:
    """x + scale · Σₘ (t(fₘ) - fₘ) · W_dec[m] for activations (n, m).

    In a row's own list -1 is none, and a feature that there is not makes the row NaN.
    """
    g = torch.clamp(table[..., 0] * f + table[..., 1], table[..., 2], table[..., 3]) - f
    dtype = torch.promote_types(torch.promote_types(x.dtype, w_dec.dtype), torch.float32)
    if features.dim() == 1:
        delta = g.to(dtype) @ w_dec.to(dtype)
    else:
        there = (features >= 0) & (features < w_dec.shape[0])
        g = torch.where(features == -1, 0, torch.where(there, g, torch.nan)).to(dtype)
        places = torch.where(there, features, 0).long()
        # beside no feature row 0 of the decoder, which g turns into nothing or into NaN
        terms = (
            own[:, None] * w_dec[place].to(dtype) for own, place in zip(g.unbind(1), places.unbind(1), strict=True)
        )
        delta = sum(terms, torch.zeros((), dtype=dtype, device=x.device))
    wide = x if x.dtype == torch.float64 else x.float()
    delta = delta.view(x.shape)
    if scale is None:
        return (wide + delta).to(x.dtype)
    weight = scale.view(*x.shape[:-1], 1)
    return torch.where(weight == 0, x, (wide + weight * delta).to(x.dtype))


def _selected(flat: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int, features: Tensor) -> Tensor:
    """(n, m): relu of each feature's pre-activation, 0 where k features or more exceed it or come before it in a tie."""
    own, total = _own(flat, w_enc, b_enc, features), w_enc.shape[0]
    keys, numbers = _keys(own), features.expand(own.shape)
    counts, rows, least = torch.zeros_like(keys), *_undecided(own, keys > 0)
    most = max(SAE_BLOCK, SAE_CELLS // len(flat) // SAE_GROUP * SAE_GROUP)
    start, width = 0, FIRST
    while start < total and len(rows):
        block, all_of_them = slice(start, start + width), len(rows) == len(flat)
        part = flat if all_of_them else flat[rows]
        pre = pre_activations(part, w_enc[block], None if b_enc is None else b_enc[block])
        few = slice(None) if all_of_them else rows
        more = _exceeding(pre, least[few], keys[few], numbers[few], start)
        if more is not None:
            counts[few] += more
            rows, least = _undecided(own, (keys > 0) & (counts < k))
        start, width = start + width, min(GROWTH * width, most)
    return torch.where(counts < k, own, 0)


def _undecided(own: Tensor, undecided: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of the rows with an undecided feature, and of every row, (n, 1), what a block is looked through for."""
    # NaN, too, is looked for among the largest
    least = torch.where(undecided & (own > 0), own, torch.inf).amin(1, keepdim=True)
    return undecided.any(1).nonzero().flatten(), least


def _own(flat: Tensor, w_enc: Tensor, b_enc: Tensor | None, features: Tensor) -> Tensor:
    """(n, m): relu of the features' pre-activations; 0 where there is no such feature."""
    places = features.clamp(0, w_enc.shape[0] - 1).long()
    if features.dim() == 1:
        pre = flat @ w_enc[places].to(flat.dtype).T
    else:
        each = [(flat * w_enc[place].to(flat.dtype)).sum(1, keepdim=True) for place in places.unbind(1)]
        pre = each[0] if len(each) == 1 else torch.cat(each, 1)
    return torch.where(places == features, torch.relu(pre if b_enc is None else pre + b_enc[places].to(flat.dtype)), 0)


def _keys(pre: Tensor) -> Tensor:
    """Whole numbers that order as relu(pre) does, with NaN of either sign on top."""
    kind, most = (torch.int64, 0x7FF8 << 48) if pre.dtype == torch.float64 else (torch.int32, 0x7FC00000)
    keys = pre.view(kind).clamp(min=0)
    return keys.masked_fill_(pre.isnan(), most)


def _exceeding(pre: Tensor, least: Tensor, keys: Tensor, features: Tensor, start: int) -> Tensor | None:
    """(n, m): how many features of a block lie above each row's own, or equal it and come before it; None: none that count.

    Maxima of 32 neighbours are compared first, as in `sae_encode`: few lie above a feature that may still be selected.
    """
    rest = -pre.shape[1] % SAE_GROUP
    groups = (torch.nn.functional.pad(pre, (0, rest)) if rest else pre).view(pre.shape[0], -1, SAE_GROUP)
    row, group = (groups.amax(2) < least).logical_not_().nonzero(as_tuple=True)
    if not len(row):
        return None
    entries = _keys(groups[row, group])[:, :, None]
    columns = torch.arange(start, start + SAE_GROUP, device=pre.device) + (SAE_GROUP * group)[:, None]
    mine, ahead = keys[row][:, None], columns[:, :, None] - features[row][:, None]
    above = ((entries > mine) & (ahead != 0)) | ((entries == mine) & (ahead < 0))  # its own sum may round another way
    return torch.zeros_like(keys).index_add_(0, row, above.sum(1, dtype=keys.dtype))
