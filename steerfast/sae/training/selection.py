"""Which latents of a batch are active: the k best of a row, the best of a batch, those above a threshold; exactly.

The pre-activations (n, F) never exist at once, only those of a part of the rows. Where the processor multiplies bfloat16
faster, the k best are looked for in two passes: a product in bfloat16 names 7/4·k candidates of a row, whose values are computed
anew in float32. What bfloat16 can err is bounded, by 2⁻⁷·‖c‖·‖w‖ at most, so a row is known to be right or done again in float32.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .distributed import Alone

_ELEMENTS = 1 << 21  # of the pre-activations at once: 8 MB, which stays in a processor's cache
_BFLOAT16 = 2.0**-8  # relative error of rounding to bfloat16
_WEIGHTS = (
    1 << 23
)  # elements of the weights that exist in bfloat16 at once: 16 MB, and as much where the product orders them anew
_ROWS = 1024  # of the weights that are rounded at once
_LEAST_ROWS = 64  # fewer rows do not pay for rounding the weights


@dataclass(frozen=True)
class Latents:
    """Latents of a batch, in the order of the rows.

    Attributes:
        rows: The row of each, int64 (m,), ascending.
        features: Its feature, int64 (m,).
        values: Its activation, (m,); 0 where it is not active after all.
        count: n, the rows of the batch.
    """

    rows: Tensor
    features: Tensor
    values: Tensor
    count: int

    @property
    def starts(self) -> Tensor:
        """Where each row begins, int64 (n,)."""
        return torch.searchsorted(self.rows, torch.arange(self.count, device=self.rows.device))

    def within(self, first: int, last: int) -> Latents:
        """Those of the features first to last, exclusive."""
        kept = (self.features >= first) & (self.features < last)
        return Latents(self.rows[kept], self.features[kept], self.values[kept], self.count)


@dataclass(frozen=True)
class Encoder:
    """What makes pre-activations: h = W_enc·c + b_enc.

    Attributes:
        centred: c, the rows of a batch as the encoder takes them, (n, d).
        w_enc: (F, d), the features of this process.
        b_enc: (F,).
    """

    centred: Tensor
    w_enc: Tensor
    b_enc: Tensor

    def parts(self) -> Iterator[tuple[int, Tensor]]:
        """The first row of a part, and the pre-activations of its rows, (rows, F)."""
        start = 0
        for part in self.centred.split(max(1, _ELEMENTS // len(self.w_enc))):
            yield start, torch.addmm(self.b_enc, part, self.w_enc.T)
            start += len(part)

    def above(self, least: Tensor | float) -> Iterator[Latents]:
        """The pre-activations that exceed a threshold, one or one per feature, a part of the rows at a time."""
        for start, pre in self.parts():
            rows, features = (pre > least).nonzero(as_tuple=True)
            yield Latents(rows + start, features, pre[rows, features], len(self.centred))


def best_of_rows(encoder: Encoder, k: int) -> Latents:
    """The k largest of relu(h) of each row; k entries a row, unsorted."""
    values, features = top(encoder, k, screened=_pays(encoder, k))
    rows = torch.arange(len(values), device=values.device).repeat_interleave(k)
    return Latents(rows, features.flatten(), values.flatten(), len(values))


def best_of_batch(encoder: Encoder, count: int, split: Alone) -> tuple[Latents, float]:
    """The `count` largest positive h of the batch over all processes, and the least of them; 0: there are fewer."""
    pool = _joined([], len(encoder.centred), encoder.centred)
    least = 0.0
    for start, pre in encoder.parts():
        rows, features = (pre > least).nonzero(as_tuple=True)
        found = Latents(rows + start, features, pre[rows, features], pool.count)
        pool = _joined([pool, found], pool.count, encoder.centred)
        if len(pool.values) > 2 * count:
            least = float(Alone().largest(pool.values, count))
            pool = _at_least(pool, least)
            least *= 1 - 1e-6  # `>` finds its equals, too
    least = float(split.largest(pool.values, count))
    return _at_least(pool, least), least


def above(encoder: Encoder, least: Tensor | float) -> Latents:
    """The pre-activations that exceed a threshold, one or one per feature."""
    return _joined(list(encoder.above(least)), len(encoder.centred), encoder.centred)


def top(encoder: Encoder, k: int, *, screened: bool) -> tuple[Tensor, Tensor]:
    """The k largest of relu(h) of each row, unsorted: values (n, k), int64 features (n, k)."""
    if screened:
        return _screened(encoder, k)
    found = [_best(pre, k) for _, pre in encoder.parts()]
    return torch.cat([values for values, _ in found]).clamp_(min=0), torch.cat([features for _, features in found])


def dots(starts: Tensor, features: Tensor, w: Tensor, rows: Tensor) -> Tensor:
    """rows[i]·w[features[j]] of the entries j of each row i, (m,), without an (m, d) tensor; `starts` says where a row begins."""
    if w.device.type == "cpu":
        ends = torch.cat([starts, starts.new_tensor([len(features)])])
        _quietly()
        nothing, size = w.new_zeros(len(features)), (len(rows), len(w))
        entries = torch.sparse_csr_tensor(ends, features, nothing, size, device="cpu", check_invariants=False)
        return torch.sparse.sampled_addmm(entries, rows, w.T, beta=0.0).values()
    with torch.enable_grad():  # what a sum over bags passes back to its weights
        leaf = torch.ones(len(features), dtype=w.dtype, device=w.device, requires_grad=True)
        out = embedding_bag(features, w, starts, per_sample_weights=leaf, mode="sum")
    return torch.autograd.grad(out, leaf, rows)[0]


@functools.cache
def _quietly() -> None:
    """Have torch say once, and unheard, that its sparse tensors are in beta."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor([0], [], [], (0, 1), device="cpu", check_invariants=False)


def _pays(encoder: Encoder, k: int) -> bool:
    """Whether a product in bfloat16 is worth its second pass."""
    rows, w = encoder.centred, encoder.w_enc
    if w.device.type != "cpu" or w.dtype != torch.float32 or len(rows) < _LEAST_ROWS or len(w) < 16 * k:
        return False
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def _screened(encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    """`top` by candidates: the best 7/4·k groups of a product in bfloat16, then float32."""
    centred, w, b = encoder.centred, encoder.w_enc, encoder.b_enc
    rounded = centred.to(torch.bfloat16)
    found, bound, lost_w = _candidates(rounded, w, b.to(torch.bfloat16), k + (3 * k + 3) // 4)
    starts = found.starts
    exact = dots(starts, found.features, w, centred) + b[found.features]
    place = torch.arange(len(exact), device=w.device) - starts[found.rows]
    side_by_side = exact.new_full((len(centred), int(place.max()) + 1), -torch.inf)
    side_by_side[found.rows, place] = exact
    values, places = side_by_side.topk(k, dim=1, sorted=False)
    features = found.features[starts[:, None] + places]
    length, lost = (torch.linalg.vector_norm(rows, dim=1) for rows in (centred, centred - rounded))
    widest = torch.linalg.vector_norm(w, dim=1).max()
    # the rows and the weights are rounded, then the bias and the score; 1 % for the order of summation
    error = 1.01 * (lost * widest + (length + lost) * lost_w + _BFLOAT16 * (b.abs().max() + bound.abs()))
    unsure = (values.amin(1) < bound + error).nonzero().flatten()
    if len(unsure):
        again = top(Encoder(centred[unsure], w, b), k, screened=False)
        values[unsure], features[unsure] = again
    return values.clamp_(min=0), features


def _candidates(rows: Tensor, w: Tensor, b: Tensor, count: int) -> tuple[Latents, Tensor, Tensor]:
    """What reaches the count-th largest maximum of a group in a product in bfloat16, at least `count` of each row; what the
    others have at most, float32 (n,); and what a row of the weights lost by rounding, at most. A block of features at a time.
    """
    parts, leading, lost = [], [], []
    size = max(_WEIGHTS // w.shape[1], 4 * count)
    for first in range(0, len(w), size):
        small, lost_here = _rounded(w[first : first + size])
        bias, start, best = b[first : first + size], 0, []
        for part in rows.split(max(1, _ELEMENTS // len(small))):
            largest, found = _reaching(torch.addmm(bias, part, small.T), min(count, len(small)))
            parts.append(Latents(found.rows + start, found.features + first, found.values, len(rows)))
            best.append(largest)
            start += len(part)
        leading.append(torch.cat(best))
        lost.append(lost_here)
    joined = _joined(parts, len(rows), rows)
    bound = leading[0].amin(1)
    if len(leading) > 1:
        bound = torch.cat(leading, dim=1).topk(count, dim=1).values[:, -1]
        kept = (~(joined.values < bound[joined.rows])).nonzero().flatten()  # NaN is kept here, too
        kept = kept[joined.rows[kept].argsort(stable=True)]
        joined = Latents(joined.rows[kept], joined.features[kept], joined.values[kept], len(rows))
    return joined, bound.float(), torch.stack(lost).max()


def _reaching(pre: Tensor, count: int) -> tuple[Tensor, Latents]:
    """The `count` largest maxima of groups of a row, (n, count), and all that is not below the least of them."""
    grouped = pre.view(len(pre), _groups(pre.shape[1], count), -1)
    column = _in_order(maxima := grouped.amax(1)).topk(count, sorted=False).indices
    largest = maxima.gather(1, column)
    inside = grouped.gather(2, column[:, None].expand(-1, grouped.shape[1], -1)).flatten(1)
    # NaN is kept, so that training that diverged is seen
    rows, place = (~(inside < largest.amin(1, keepdim=True))).nonzero(as_tuple=True)
    features = place // count * grouped.shape[2] + column[rows, place % count]
    return largest, Latents(rows, features, inside[rows, place], len(pre))


def _in_order(values: Tensor) -> Tensor:
    """Integers in the order of the values in bfloat16: the largest of integers are found in less time."""
    bits = values.view(torch.int16)
    return bits ^ (bits >> 15 & 0x7FFF)


def _rounded(w: Tensor) -> tuple[Tensor, Tensor]:
    """W in bfloat16, and the length of what a row lost by that, at most."""
    small, lost = torch.empty_like(w, dtype=torch.bfloat16), []
    for part, into in zip(w.split(_ROWS), small.split(_ROWS), strict=True):
        into.copy_(part)
        lost.append(torch.linalg.vector_norm(part - into, dim=1).max())
    return small, torch.stack(lost).max()


def _best(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, unsorted: values and int64 places, (n, k).

    They lie in the k groups of the largest maxima; finding these first takes a third of the time of one topk over all.
    """
    features, groups = pre.shape[1], _groups(pre.shape[1], k)
    if groups == 1:
        best, place = pre.topk(k, dim=1, sorted=False)
        return best, place
    grouped = pre.view(len(pre), groups, -1)
    column = grouped.amax(1).topk(k, sorted=False).indices  # (n, k)
    inside = grouped.gather(2, column[:, None].expand(-1, groups, -1)).flatten(1)  # (n, groups·k)
    best, place = inside.topk(k, sorted=False)
    return best, place // k * (features // groups) + column.gather(1, place % k)


def _groups(features: int, k: int) -> int:
    """How many features have one maximum between them."""
    return next((g for g in (16, 8, 4, 2) if features % g == 0 and features // g >= 4 * k), 1)


def _joined(parts: list[Latents], count: int, like: Tensor) -> Latents:
    """Latents of one after another, with the rows in order."""
    none = torch.empty(0, dtype=torch.int64, device=like.device)
    rows = torch.cat([none, *(part.rows for part in parts)])
    features = torch.cat([none, *(part.features for part in parts)])
    return Latents(rows, features, torch.cat([like.new_empty(0), *(part.values for part in parts)]), count)


def _at_least(latents: Latents, least: float) -> Latents:
    kept = (latents.values >= least) & (latents.values > 0)
    return Latents(latents.rows[kept], latents.features[kept], latents.values[kept], latents.count)
