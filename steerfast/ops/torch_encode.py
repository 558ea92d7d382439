"""The selection of an SAE's encoder on PyTorch: Top-K and threshold, walking blocks of features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backends import in_full_precision, transformed
from .torch_backend import widened

SAE_BLOCK, SAE_GROUP = 4096, 32  # features walked at a time by many rows, and those that share a maximum
SAE_CELLS = (
    1 << 21
)  # pre-activations at a time where rows are few: a block costs 20 calls, and each may wait for a thread
SAE_DIRECT = 1 << 17  # pre-activations of which torch.topk finds the largest sooner than maxima of groups do
SAE_WIDENED = 1 << 20  # numbers of an encoder that are widened at a time


@in_full_precision
def sae_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Top-K of relu(x W_encᵀ + b_enc), walking blocks of features: the matrix (n, F) never exists."""
    values, indices, _ = _walk(x, w_enc, b_enc, None, k)
    return values, indices


@in_full_precision
def sae_encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """f = h·[h > θ], h = x W_encᵀ + b_enc, as sorted lists of what is not zero, and their lengths.

    A row with more than `capacity` active features is NaN throughout: its count says what it needs.
    """
    values, indices, active = _walk(x, w_enc, b_enc, threshold, capacity)
    counts = sum(active, torch.zeros(x.numel() // x.shape[-1], dtype=torch.int64, device=x.device))
    counts = counts.int().view(x.shape[:-1])
    over = (counts > capacity)[..., None]
    return values.masked_fill(over, torch.nan), indices.masked_fill(over, 0), counts


def _walk(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor | None, k: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The k largest positive entries of each row above the threshold, (..., k) twice; of each block how many there are, (n,).

    Blocks are walked in the order of their features, so that an entry that only equals the k-th value so far has lost its
    tie already; few entries of a block survive that comparison, and only these are sorted (stably).
    """
    flat = widened(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
    flat = _as(flat, torch.promote_types(flat.dtype, w_enc.dtype))
    n, features, shape = flat.shape[0], w_enc.shape[0], (*x.shape[:-1], k)
    if transformed():
        values, indices, counts = _sorted(flat, w_enc, b_enc, threshold, k)
        return values.view(shape), indices.int().view(shape), [counts]
    best, active = None, []
    width = max(SAE_BLOCK, SAE_CELLS // max(n, 1) // SAE_GROUP * SAE_GROUP)
    for start in range(0, features if n else 0, width):
        some = slice(start, start + width) if width < features else None
        pre = pre_activations(flat, _part(w_enc, some), None if b_enc is None else _part(b_enc, some))
        if threshold is not None:
            silent = pre <= _part(threshold, some).to(flat.dtype)  # NaN is active
            active.append(pre.shape[1] - silent.sum(1))
            pre = pre.masked_fill_(silent, 0)
        direct = _best(pre, k) if n * features <= SAE_DIRECT else None
        best = _merge(*(best or _nothing(flat, k)), pre, start) if direct is None else direct
    values, indices = best or _nothing(flat, k)
    values, indices = values.contiguous(), indices.int()
    return (values, indices, active) if x.dim() == 2 else (values.view(shape), indices.view(shape), active)


def _part(table: Tensor, some: slice | None) -> Tensor:
    """Some rows of a table, or itself: a view costs as much as a small sum."""
    return table if some is None else table[some]


def _nothing(flat: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best of no features."""
    return flat.new_zeros(len(flat), k), torch.zeros(len(flat), k, dtype=torch.int64, device=flat.device)


def pre_activations(flat: Tensor, w_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    """A block of pre-activations; of an encoder of another dtype some rows are widened at a time."""
    step = max(SAE_GROUP, SAE_WIDENED // flat.shape[1])
    if w_enc.dtype == flat.dtype or w_enc.shape[0] <= step:
        return _product(flat, w_enc, b_enc)
    pre = flat.new_empty(flat.shape[0], w_enc.shape[0])
    for start in range(0, w_enc.shape[0], step):
        some = slice(start, start + step)
        pre[:, some] = _product(flat, w_enc[some], None if b_enc is None else b_enc[some])
    return pre


def _product(flat: Tensor, w_enc: Tensor, b_enc: Tensor | None) -> Tensor:
    return linear(flat, _as(w_enc, flat.dtype), None if b_enc is None else _as(b_enc, flat.dtype))


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, which costs a call of PyTorch even where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _sorted(
    flat: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor | None, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `_walk` finds, from the whole matrix (n, F) and without a look at its values, which a transform may hide."""
    pre = flat @ w_enc.to(flat.dtype).T
    pre = pre if b_enc is None else pre + b_enc.to(flat.dtype)
    if threshold is not None:
        pre = torch.where(pre <= threshold.to(flat.dtype), 0, pre)
    pre = torch.where(pre <= 0, 0, pre)
    values, indices = (part[:, :k] for part in pre.sort(dim=1, descending=True, stable=True))
    return values, torch.where(values == 0, 0, indices), (pre != 0).sum(1)


def _best(pre: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """The k largest positive entries of rows by torch.topk; None where entries are equal, or NaN, whose order it leaves open."""
    values, indices = pre.topk(min(k + 1, pre.shape[1]))
    least = torch.inf
    for row in values.tolist():  # of a few numbers sooner than by calls of PyTorch
        if row[0] != row[0] or (_repeats(row) and _repeats([value for value in row if value > 0])):
            return None
        least = min(least, row[k - 1])
    values, indices = values[:, :k], indices[:, :k]
    if least > 0:
        return values, indices
    nothing = values <= 0
    return values.masked_fill(nothing, 0), indices.masked_fill(nothing, 0)


def _repeats(numbers: list[float]) -> bool:
    return len(set(numbers)) < len(numbers)


def _merge(values: Tensor, indices: Tensor, pre: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """The running best of each row, (n, k), with those entries of a block of pre-activations that beat its last one.

    Maxima of 32 neighbours are compared first: one cheap pass leaves little to look at. NaN beats every number, as in
    torch.topk.
    """
    n, k = values.shape
    if rest := pre.shape[1] % SAE_GROUP:
        pre = torch.nn.functional.pad(pre, (0, SAE_GROUP - rest))
    groups = pre.view(n, -1, SAE_GROUP)
    most, last = groups.amax(2), values[:, -1:].nan_to_num(nan=torch.inf)
    if start == 0 and most.shape[1] > k:
        # as many groups reach the k-th maximum as there are places, so that what lies below it has lost: last is just below
        last = torch.nextafter(most.topk(k).values[:, -1:], last.new_tensor(-torch.inf)).clamp_(min=0)
    row, group = (most <= last).logical_not_().nonzero(as_tuple=True)
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
