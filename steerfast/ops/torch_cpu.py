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
from .backends import apart, backend_of, in_full_precision, is_plain
from .slots import ROTATE, Eight, Tables
from .torch_backend import VANISHED, hinge
from .torch_slots import How, Reader, Ready, Step, reader_of

BLOCK = 1 << 18
"""Numbers of a block: a megabyte in float32."""
TURNED = 32
"""From so many rows on xBᵀ costs less as (Bxᵀ)ᵀ: a library of products packs its larger operand once."""
FEW = 4
"""From so many rows on a library of products sums an edit before it adds x; below, it rounds every term to x's precision."""

_boundary = torch.tensor(1 / VANISHED, device="cpu")
_one = torch.tensor(1.0, device="cpu")


def is_elementwise(x: Tensor, *vectors: Tensor) -> bool:
    """Whether x (..., d) and vectors (d,) are CPU tensors of one floating dtype: PyTorch's own arithmetic then rounds once."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or not x.is_cpu or backend_of(x) != "torch":
        return False
    width, dtype = x.shape[-1:], x.dtype
    for vector in vectors:
        if type(vector) is not Tensor or vector.dtype is not dtype or vector.shape != width or not vector.is_cpu:
            return False
    return dtype in FLOATS and width != () and width[0] > 0


def hinged(
    x: Tensor,
    directions: Tensor,
    numbers: Callable[[float], Eight],
    how: Callable[[float], How],
    number: float,
    in_place: bool = False,
) -> Tensor | None:
    """x + share · act(xBᵀ)B of a number, with the rows B = directions; what it does as eight numbers, and in few calls."""
    if not is_plain(x, directions) or (in_place and not apart(x, directions)):
        return None
    out = compiled_cpu.hinged(x, directions, numbers, number, in_place)
    # `how` is asked here: what is kept must be no mode's tensor
    return _hinged(x, directions, how(number), in_place) if out is None else out


@in_full_precision
def _hinged(x: Tensor, directions: Tensor, how: How, in_place: bool) -> Tensor | None:
    rows = directions if directions.dim() == 2 else directions[None]
    return _edited(x, rows.T, rows, how, None, in_place)


def _edited(
    x: Tensor, across: Tensor | None, lift: Tensor, how: How, scale: Tensor | None, in_place: bool = False
) -> Tensor | None:
    """x + scale · share · act(x·across)·lift; scale is (n, 1), and without a projection the act is 1."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    dtype = flat.dtype
    if lift.dtype is not torch.float32:
        narrow, lift = lift, lift.float()
        if across is not None:
            across = lift.T if across.data_ptr() == narrow.data_ptr() else across.float()
    if in_place and x.dim() != 2 and not x.is_contiguous():
        return None
    if dtype is torch.float32:
        out = _moved(flat, across, lift, how, scale, flat if in_place else None)
        return x if in_place else out if x.dim() == 2 else out.view(x.shape)
    n, d = flat.shape
    if not in_place and n * d <= 2 * BLOCK:
        out = _narrow(_moved(flat.float(), across, lift, how, scale), dtype)
        return out if x.dim() == 2 else out.view(x.shape)
    out = x if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
    step = max(1, BLOCK // d)
    into = (out if x.dim() == 2 else out.view(-1, d)).split(step)
    weights = (None,) * len(into) if scale is None else scale.split(step)
    for block, target, weight in zip(flat.split(step), into, weights, strict=True):
        wide = block.float()
        target.copy_(_moved(wide, across, lift, how, weight, wide))
    return out


def _moved(
    x: Tensor, across: Tensor | None, lift: Tensor, how: How, scale: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """These rows, perhaps into x itself."""
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
    y = torch.mm(x, across) if n < TURNED or rank == 1 else torch.mm(across.T, x.T).T
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
    """x + scale · vectors[rows] where every row of x has one vector, or none."""
    if (rows.dim() == 2 and rows.shape[1] != 1) or not is_plain(x, vectors, rows, scale) or not x.numel():
        return None
    if in_place and not apart(x, vectors, scale):
        return None
    bank = vectors if vectors.dim() == 2 else vectors[None]
    out = compiled_cpu.add(x, bank, rows, scale, in_place)
    return _add(x, bank, rows if rows.dim() == 1 else rows[:, 0], scale, in_place) if out is None else out


@in_full_precision
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
    """Project → act → lift where every row has one slot, or none."""
    if rows is not None and rows.dim() == 2 and rows.shape[1] != 1:
        return None
    if not is_plain(x, vectors, coefficients, slots, rows, scale) or not x.numel():
        return None
    if in_place and not apart(x, vectors, scale):
        return None
    out = compiled_cpu.subspace(x, vectors, coefficients, slots, rows, scale, in_place)
    return _subspace(x, (vectors, coefficients, slots), rows, scale, in_place) if out is None else out


@in_full_precision
def _subspace(x: Tensor, bank: Tables, rows: Tensor | None, scale: Tensor | None, in_place: bool) -> Tensor | None:
    reader, owner = reader_of(bank), 0
    if reader is None:
        return None
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
    how, across, lift, mode = ready
    if how is None or (scale is not None and mode == ROTATE):
        return None
    return _edited(x, across, lift, how, None if scale is None else scale.reshape(-1, 1), in_place)


def _by_owners(
    flat: Tensor, bank: Tables, reader: Reader, rows: Tensor, owners: list[int], scale: Tensor | None
) -> Tensor | None:
    """Rows of several slots, in the order of their owners: of each its own products, or one batched product of all."""
    steps = reader.steps(bank, owners)
    if steps is None:
        return None
    weights = None if scale is None else scale.reshape(-1, 1)
    ordered, place = rows.sort(stable=True)
    if sorts := ordered.tolist() != owners:
        flat = flat.index_select(0, place)
        weights = None if weights is None else weights.index_select(0, place)
    out = torch.empty_like(flat, memory_format=torch.contiguous_format)
    start = steps.idle
    if start:
        out[:start] = flat[:start]
    if steps.every is not None:
        _batched(flat[start:], out[start:], bank, steps.every, None if weights is None else weights[start:])
        return torch.empty_like(out).index_copy_(0, place, out) if sorts else out
    for owner, count in steps.found:
        some, ready = slice(start, start + count), reader.ready(bank, owner)
        moved = None if ready is None else _with_slot(flat[some], ready, None if weights is None else weights[some])
        if moved is None:
            return None
        out[some] = moved
        start += count
    return torch.empty_like(out).index_copy_(0, place, out) if sorts else out


def _batched(flat: Tensor, out: Tensor, bank: Tables, steps: list[Step], scale: Tensor | None) -> None:
    """Hinges of one rank, every row with its own directions, (b, k, d): read where they stand, or gathered a block at a time."""
    vectors, first = bank[0], steps[0]
    together = vectors.dtype is torch.float32 and _stand_together([step.lift for step in steps], first.rank)
    block = len(steps) if together else max(1, 2 * BLOCK // (flat.shape[1] * first.rank))
    how = first.how if all(step.how is first.how for step in steps) else None
    for begin in range(0, len(steps), block):
        part, some = steps[begin : begin + block], slice(begin, begin + block)
        lift = _directions(vectors, [step.lift for step in part], first.rank)
        project = lift if first.project == first.lift else _directions(vectors, [s.project for s in part], first.rank)
        x = flat[some].float()
        y = torch.bmm(x[:, None], project.mT)[:, 0]  # the other way round it takes 10 times as long
        if how is None:
            y = _own_hinges(y, bank[1], [step.start for step in part])
        elif how.act is not None:
            y = how.act(y)
        if scale is not None:
            y.mul_(scale[some])
        moved = torch.bmm(y[:, None], lift)[:, 0]
        torch.add(x, moved, alpha=1.0 if how is None else how.share, out=moved)
        if first.how is not None and first.how.keep_norm:
            _with_norm(moved, torch.linalg.vector_norm(x, dim=-1, keepdim=True))
        out[some] = moved


def _own_hinges(y: Tensor, coefficients: Tensor, starts: list[int]) -> Tensor:
    """Every row (k,) by the numbers of its own slot, whose constants stand in these rows."""
    rank = y.shape[1]
    first = torch.tensor(starts, device="cpu")
    places = (first[:, None] + torch.arange(1, rank + 1, device="cpu")).view(-1)
    gains = coefficients[:, 2].index_select(0, first)
    return hinge(y.reshape(-1), coefficients.index_select(0, places)).view(y.shape).mul_(gains[:, None])


def _stand_together(first: list[int], rank: int) -> bool:
    """Whether rows that begin there, so many each, follow one after another."""
    return first == list(range(first[0], first[0] + rank * len(first), rank))


def _directions(vectors: Tensor, first: list[int], rank: int) -> Tensor:
    """The rows of several slots, (b, k, d) in float32: a view where they stand together."""
    if _stand_together(first, rank):
        found = vectors[first[0] : first[-1] + rank]
    else:
        places = torch.tensor(first, device="cpu")
        if rank > 1:
            places = (places[:, None] + torch.arange(rank, device="cpu")).view(-1)
        found = vectors.index_select(0, places)
    return found.float().view(len(first), rank, -1)
