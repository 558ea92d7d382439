"""The quick roads of the PyTorch backend: plain CPU tensors of which nobody asks a gradient, in few calls.

What they compute is what `torch_backend` computes. Each returns None where it does not serve, and that one runs. Rows of 16 bits
are widened, edited and rounded a block at a time, while they lie in the cache: nothing of the size of x is allocated but the
output, whose memory's first touch already costs more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steerfast._checks import FLOATS

from . import compiled_cpu
from .backends import apart, backend_of, exactly, is_plain
from .slots import ROTATE, Eight, Tables
from .torch_backend import VANISHED, hinge
from .torch_slots import Batch, How, Reader, Ready, reader_of, stand_together

BLOCK = 1 << 18
"""Numbers of a block: a megabyte in float32."""
TURNED = 32
"""From so many rows on xBᵀ costs less as (Bxᵀ)ᵀ: a library of products packs its larger operand once."""
NARROW = 640
"""Rows of fewer numbers cost less as xBᵀ, unless they lie in the cache."""
FEW = 4
"""From so many rows on a library of products sums an edit before it adds x; below, it rounds every term to x's precision."""

_boundary = torch.tensor(1 / VANISHED, device="cpu")
_one = torch.tensor(1.0, device="cpu")


def is_elementwise(x: Tensor, vector: Tensor, other: Tensor | None = None) -> bool:
    """Whether x (..., d) and vectors (d,) are CPU tensors of one floating dtype: PyTorch's own arithmetic then rounds once."""
    if type(x) is not Tensor or type(vector) is not Tensor or torch.compiler.is_compiling():
        return False
    dtype, shape, width = x.dtype, x.shape, vector.shape
    if vector.dtype is not dtype or len(width) != 1 or not shape or not shape[-1] == width[0] > 0:
        return False
    if not (x.is_cpu and vector.is_cpu and (dtype is torch.float32 or dtype in FLOATS)) or backend_of(x) != "torch":
        return False
    return other is None or (type(other) is Tensor and other.dtype is dtype and other.shape == width and other.is_cpu)


def hinged(
    x: Tensor,
    directions: Tensor,
    numbers: Callable[[float, int], Eight],
    how: Callable[[float, int], How],
    number: float,
    in_place: bool = False,
) -> Tensor | None:
    """x + share · act(xBᵀ)B of a number, with the rows B = directions; what it does as eight numbers, and in few calls.

    It looks at everything itself, but for rows of x that share memory.
    """
    if not is_plain(x, directions) or backend_of(x) != "torch":
        return None
    shape, of_rows, dtype, kind = x.shape, directions.shape, x.dtype, directions.dtype
    count = of_rows[0] if len(of_rows) == 2 else 1
    if not (shape and of_rows and len(of_rows) <= 2 and shape[-1] == of_rows[-1] and shape[-1] and directions.is_cpu):
        return None
    if not (dtype is kind is torch.float32 or (dtype in FLOATS and kind in FLOATS)):
        return None
    if in_place and not apart(x, directions):
        return None
    out = compiled_cpu.hinged(x, directions, count, numbers, number, in_place)
    # `how` is asked here: what is kept must be no mode's tensor
    return exactly(_hinged, x, directions, how(number, count), in_place) if out is None else out


def _hinged(x: Tensor, directions: Tensor, how: How, in_place: bool) -> Tensor | None:
    if directions.dim() == 1:
        if x.numel() == directions.shape[0]:
            return _single(x, (directions, directions), how, None, in_place)
        directions = directions[None]
    return _edited(x, directions.T, directions, how, None, in_place)


def _single(x: Tensor, pair: tuple[Tensor, Tensor], how: How, scale: Tensor | None, in_place: bool) -> Tensor | None:
    """A single row after an edit of one direction, x + scale · share · act(x·b)·c: a product of two vectors, and one sum."""
    dtype, (b, c) = x.dtype, pair
    wide = x if dtype is torch.float32 else x.float()
    row = b if b.dtype is torch.float32 else b.float()
    lift = row if c is b else c if c.dtype is torch.float32 else c.float()
    y = (wide if wide.dim() == 2 else wide.reshape(1, -1)).mv(row)
    if how.act is not None:
        y = how.act(y)
    if scale is not None:
        y = y.mul_(scale.view(1))
    if wide is x:
        return x.addcmul_(y, lift, value=how.share) if in_place else x.addcmul(y, lift, value=how.share).contiguous()
    wide.addcmul_(y, lift, value=how.share)
    return x.copy_(wide) if in_place else _narrow(wide, dtype)


def _edited(
    x: Tensor, across: Tensor | None, lift: Tensor, how: How, scale: Tensor | None, in_place: bool = False
) -> Tensor | None:
    """x + scale · share · act(x·across)·lift; scale is (n, 1), and without a projection the act is 1."""
    if x.dim() == 2 and x.dtype is torch.float32 is lift.dtype and x.numel() <= 4 * BLOCK:
        return _moved(x, across, lift, how, scale, x if in_place else None)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    dtype = flat.dtype
    if lift.dtype is not torch.float32:
        narrow, lift = lift, lift.float()
        if across is not None:
            across = lift.T if across.data_ptr() == narrow.data_ptr() else across.float()
    if in_place and x.dim() != 2 and not x.is_contiguous():
        return None
    n, d = flat.shape
    wide = dtype is torch.float32
    if wide and (n * d <= 4 * BLOCK or across is None):
        out = _moved(flat, across, lift, how, scale, flat if in_place else None)
        return x if in_place else out if x.dim() == 2 else out.view(x.shape)
    if not in_place and n * d <= 2 * BLOCK:
        out = _narrow(_moved(flat.float(), across, lift, how, scale, near=True), dtype)
        return out if x.dim() == 2 else out.view(x.shape)
    out = x if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
    step = max(1, BLOCK // d)
    into = (out if x.dim() == 2 else out.view(-1, d)).split(step)
    weights = (None,) * len(into) if scale is None else scale.split(step)
    for block, target, weight in zip(flat.split(step), into, weights, strict=True):
        rows = block.float()
        moved = _moved(rows, across, lift, how, weight, target if wide else rows, near=not wide)
        if not wide:
            target.copy_(moved)
    return out


def _moved(
    x: Tensor,
    across: Tensor | None,
    lift: Tensor,
    how: How,
    scale: Tensor | None,
    out: Tensor | None = None,
    near: bool = False,
) -> Tensor:
    """These rows, perhaps into x itself; `near`: they lie in the cache."""
    before = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if how.keep_norm else None
    share, act, n = how.share, how.act, x.shape[0]
    if across is None:
        moved = (
            torch.add(x, lift, alpha=share, out=out)
            if scale is None
            else torch.addcmul(x, scale, lift, value=share, out=out)
        )
        return moved if before is None else _with_norm(moved, before)
    rank = lift.shape[0]
    turns = n >= TURNED and rank > 1 and (near or x.shape[1] >= NARROW)
    y = torch.mm(across.T, x.T).T if turns else torch.mm(x, across)
    if act is not None:
        y = act(y)
    if scale is not None:
        y.mul_(scale)
    if rank == 1:
        moved = torch.addcmul(x, y, lift, value=share, out=out)
    elif n < FEW:
        delta = torch.mm(y, lift)
        moved = torch.add(x, delta, alpha=share, out=delta if out is None else out)
    else:
        moved = torch.addmm(x, y, lift, alpha=share, out=out)
    return moved if before is None else _with_norm(moved, before)


def _with_norm(out: Tensor, before: Tensor) -> Tensor:
    """out with the lengths that x had, as `torch_backend.restore_norm` gives them back."""
    ratio = before.div_(torch.linalg.vector_norm(out, dim=-1, keepdim=True))
    return out.mul_(torch.where(ratio < _boundary, ratio, _one))  # a zero row has no ratio


def add(x: Tensor, vectors: Tensor, rows: Tensor, scale: Tensor | None, in_place: bool = False) -> Tensor | None:
    """x + scale · vectors[rows] where every row of x has one vector, or none; it looks at all but rows that share memory."""
    if not is_plain(x, vectors, scale) or type(rows) is not Tensor or backend_of(x) != "torch":
        return None
    shape, of_rows, size = x.shape, vectors.shape, x.numel()
    if not (size and shape and of_rows and len(of_rows) <= 2 and shape[-1] == of_rows[-1] and vectors.is_cpu):
        return None
    if x.dtype not in FLOATS or vectors.dtype not in FLOATS or not _are_columns(rows, scale, size // shape[-1]):
        return None
    if in_place and not apart(x, vectors, scale):
        return None
    bank = vectors if len(of_rows) == 2 else vectors[None]
    out = compiled_cpu.add(x, bank, rows, scale, in_place)
    return exactly(_add, x, bank, rows if rows.dim() == 1 else rows[:, 0], scale, in_place) if out is None else out


def _are_columns(rows: Tensor | None, scale: Tensor | None, n: int) -> bool:
    """Whether a slot and a strength are given for each of n rows, or for all in common."""
    if rows is not None:
        shape = rows.shape
        if not (rows.dtype is torch.int32 and rows.is_cpu and not rows.is_neg() and (shape == (n,) or shape == (n, 1))):
            return False
        return scale is None or (scale.dtype is torch.float32 and scale.is_cpu and scale.shape == shape)
    return scale is None or (
        scale.dtype is torch.float32 and scale.is_cpu and (scale.shape == (n,) or scale.shape == (n, 1))
    )


def _add(x: Tensor, bank: Tensor, owners: Tensor, scale: Tensor | None, in_place: bool) -> Tensor | None:
    least, most = _ends(owners)
    if least < -1 or most >= bank.shape[0]:
        return None
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    scale = None if scale is None else scale.reshape(-1, 1)
    into = x.view(-1, x.shape[-1]) if in_place and x.is_contiguous() else None
    if least == -1:
        mine = (owners >= 0).nonzero()[:, 0]
        moved = _added(flat[mine], bank, owners[mine], None if scale is None else scale[mine])
        out = flat.clone(memory_format=torch.contiguous_format) if into is None else into
        out.index_copy_(0, mine, moved)
    else:
        out = _added(flat, bank, owners, scale, into)
    if in_place:
        return x.copy_(out.view(x.shape)) if into is None else x
    return out if x.dim() == 2 else out.view(x.shape)


def _ends(owners: Tensor) -> tuple[int, int]:
    """The least and the largest number of a column."""
    if owners.shape[0] <= 32:
        numbers = owners.tolist()
        return min(numbers), max(numbers)
    least, most = owners.aminmax()
    return int(least.item()), int(most.item())


def _added(x: Tensor, bank: Tensor, owners: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
    """x (n, d) plus its vectors, a block at a time."""
    n, d = x.shape
    if bank.shape[0] <= n and (scale is not None or bank.dtype is not x.dtype):
        bank = bank.float()
    step = max(1, BLOCK // d)
    if n <= step:
        return _plus(x, bank.index_select(0, owners), scale, out)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    weights = (None,) * -(-n // step) if scale is None else scale.split(step)
    for block, target, own, weight in zip(x.split(step), out.split(step), owners.split(step), weights, strict=True):
        _plus(block, bank.index_select(0, own), weight, target)
    return out


def _plus(x: Tensor, picked: Tensor, scale: Tensor | None, out: Tensor | None) -> Tensor:
    """x + scale · picked in float32, rounded once; may write into picked."""
    if scale is None and picked.dtype is x.dtype:
        return torch.add(x, picked, out=out)
    picked = picked.float()
    if x.dtype is torch.float32:
        into = picked if out is None else out
        return torch.add(x, picked, out=into) if scale is None else torch.addcmul(x, scale, picked, out=into)
    wide = x.float()
    wide = wide.add_(picked) if scale is None else wide.addcmul_(picked, scale)
    return _narrow(wide, x.dtype) if out is None else out.copy_(wide)


def _narrow(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """`wide.to(dtype)` of 16 bits, by the methods that read no arguments: of few rows these are a third of the time."""
    return wide.bfloat16() if dtype is torch.bfloat16 else wide.half()


def subspace(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    in_place: bool = False,
) -> Tensor | None:
    """Project → act → lift where every row has one slot, or none, by whichever road serves."""
    if in_place and not (is_plain(x, vectors) and apart(x, vectors, coefficients, scale)):
        return None
    out = compiled_cpu.subspace(x, vectors, coefficients, slots, rows, scale, in_place)
    return subspace_by_calls(x, vectors, coefficients, slots, rows, scale, in_place) if out is None else out


def subspace_by_calls(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    in_place: bool = False,
) -> Tensor | None:
    """`subspace` by PyTorch's calls, for whatever `ops.subspace` is given outside a trace.

    It looks at everything itself: of a single row, to look twice costs as much as the edit.
    """
    if not is_plain(x, vectors, coefficients, scale) or backend_of(x) != "torch":
        return None
    if coefficients is None or type(slots) is not Tensor or (rows is not None and type(rows) is not Tensor):
        return None
    bank = vectors, coefficients, slots
    shape, reader, size = x.shape, reader_of(bank), x.numel()
    if reader is None or not (size and shape and shape[-1] == reader.width and x.dtype in FLOATS):
        return None
    if not _are_columns(rows, scale, size // shape[-1]):
        return None
    return exactly(_subspace, x, bank, reader, rows, scale, in_place)


def _subspace(
    x: Tensor, bank: Tables, reader: Reader, rows: Tensor | None, scale: Tensor | None, in_place: bool
) -> Tensor | None:
    owner = 0
    if rows is not None:
        rows = rows if rows.dim() == 1 else rows[:, 0]
        owners = rows.tolist() if rows.stride(0) else rows[:1].tolist()
        owner = owners[0]
        if owners.count(owner) != len(owners):
            out = _by_owners(x.reshape(-1, x.shape[-1]), bank, reader, rows, owners, scale)
            return None if out is None else x.copy_(out.view(x.shape)) if in_place else out.view(x.shape)
    ready = reader.ready(bank, owner)
    return None if ready is None else _with_slot(x, ready, scale, in_place)


def _with_slot(x: Tensor, ready: Ready, scale: Tensor | None, in_place: bool = False) -> Tensor | None:
    """Every row after one slot."""
    how, across, lift, mode, pair = ready
    if how is None or (scale is not None and mode == ROTATE):
        return None
    if pair is not None and x.numel() == lift.shape[1] and not how.keep_norm:
        return _single(x, pair, how, scale, in_place)
    return _edited(x, across, lift, how, None if scale is None else scale.reshape(-1, 1), in_place)


def _by_owners(
    flat: Tensor, bank: Tables, reader: Reader, rows: Tensor, owners: list[int], scale: Tensor | None
) -> Tensor | None:
    """Rows of several slots, in the order of their owners: of each its own products, or one batched product of all."""
    steps = reader.steps(bank, owners)
    if steps is None:
        return None
    weights = None if scale is None else scale.reshape(-1, 1)
    place = None
    if owners != sorted(owners):
        place = rows.argsort(stable=True)
        flat = flat.index_select(0, place)
        weights = None if weights is None else weights.index_select(0, place)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    start = steps.idle
    if start:
        out[:start] = flat[:start]
    if steps.batch is not None:
        parts = (
            (flat, out, weights)
            if not start
            else (flat[start:], out[start:], None if weights is None else weights[start:])
        )
        _batched(bank, steps.batch, *parts)
        return out if place is None else torch.empty_like(out).index_copy_(0, place, out)
    for owner, count in steps.found:
        some, ready = slice(start, start + count), reader.ready(bank, owner)
        moved = None if ready is None else _with_slot(flat[some], ready, None if weights is None else weights[some])
        if moved is None:
            return None
        out[some] = moved
        start += count
    return out if place is None else torch.empty_like(out).index_copy_(0, place, out)


def _batched(bank: Tables, batch: Batch, flat: Tensor, out: Tensor, scale: Tensor | None) -> None:
    """Every row with its own directions, (b, k, d): read where they stand, or gathered a block at a time."""
    size, vectors = len(batch.lift), bank[0]
    if batch.is_run and vectors.dtype is torch.float32:
        _batched_block(bank, batch, flat, out, scale)
        return
    block = max(1, 2 * BLOCK // (flat.shape[1] * batch.rank))
    for some in (slice(begin, begin + block) for begin in range(0, size, block)):
        part = batch._replace(
            project=None if batch.project is None else batch.project[some],
            lift=batch.lift[some],
            start=batch.start[some],
        )
        _batched_block(bank, part, flat[some], out[some], None if scale is None else scale[some])


def _batched_block(bank: Tables, batch: Batch, flat: Tensor, out: Tensor, scale: Tensor | None) -> None:
    x, how = flat.float(), batch.how
    lift = _directions(bank[0], batch.lift, batch.rank)
    project = lift if batch.project is None else _directions(bank[0], batch.project, batch.rank)
    y = torch.bmm(x[:, None], project.mT)[:, 0]  # the other way round it takes 10 times as long
    if how is None:
        y = _own_hinges(y, bank[1], batch.start)
    elif how.act is not None:
        y = how.act(y)
    if scale is not None:
        y.mul_(scale)
    share, into = 1.0 if how is None else how.share, out if out.dtype is torch.float32 else x
    if batch.keep_norm:
        before = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if batch.rank == 1:
        torch.addcmul(x, y, lift[:, 0], value=share, out=into)
    else:
        torch.add(x, torch.bmm(y[:, None], lift)[:, 0], alpha=share, out=into)
    if batch.keep_norm:
        _with_norm(into, before)
    if into is not out:
        out.copy_(into)


def _own_hinges(y: Tensor, coefficients: Tensor, starts: list[int]) -> Tensor:
    """Every row (k,) by the numbers of its own slot, whose constants stand in these rows."""
    rank = y.shape[1]
    first = torch.tensor(starts, device="cpu")
    places = (first[:, None] + torch.arange(1, rank + 1, device="cpu")).view(-1)
    gains = coefficients[:, 2].index_select(0, first)
    return hinge(y.reshape(-1), coefficients.index_select(0, places)).view(y.shape).mul_(gains[:, None])


def _directions(vectors: Tensor, first: list[int], rank: int) -> Tensor:
    """The rows of several slots, (b, k, d) in float32: a view where they stand together."""
    if stand_together(first, rank):
        found = vectors[first[0] : first[-1] + rank]
    else:
        places = torch.tensor(first, device="cpu")
        if rank > 1:
            places = (places[:, None] + torch.arange(rank, device="cpu")).view(-1)
        found = vectors.index_select(0, places)
    return found.float().view(len(first), rank, -1)
