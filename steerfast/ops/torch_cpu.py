"""The quick roads of the PyTorch backend: plain CPU tensors of which nobody asks a gradient, block by block in the cache.

What they compute is what `torch_backend` computes. Each returns None where it does not serve, and that one runs. A block of rows
is widened, edited and rounded while it lies in the cache: nothing of the size of x is allocated but the output, whose memory's
first touch already costs more than the arithmetic.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from steerfast._checks import FLOATS

from .backends import in_full_precision, transformed
from .slots import ADD, HINGE, PUSH, ROTATE, Tables
from .torch_backend import VANISHED, hinge

BLOCK = 1 << 17
"""Numbers of a block: half a megabyte in float32."""
TURNED = 16
"""From so many rows on xBᵀ costs less as (Bxᵀ)ᵀ: a library of products packs its larger operand once."""
SHARED = 4
"""From so many rows per owner on every owner has products of its own; below, one batched product serves all."""
REMEMBERED = 1 << 14
"""Bytes of a table of a bank up to which the slots of a whole batch are remembered by them."""
WIDE = (torch.float32, torch.float64)

Act = Callable[[Tensor], Tensor]
_modes = torch._C._len_torch_dispatch_stack
_bytes_at = ctypes.string_at
_unpacked = struct.Struct("8i").unpack


def is_plain(x: Tensor, *others: Tensor | None) -> bool:
    """Whether these, beside each other, are plain CPU tensors: no subclass, mode or transform, no gradient asked of them."""
    if type(x) is not Tensor or not x.is_cpu:
        return False
    for tensor in others:
        if tensor is not None and type(tensor) is not Tensor:
            return False
    if torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in (x, *others)):
        return False
    return not (transformed() or _modes())


def is_elementwise(x: Tensor, *vectors: Tensor) -> bool:
    """Whether x (..., d) and vectors (d,) are CPU tensors of one floating dtype: PyTorch's own arithmetic then rounds once."""
    if type(x) is not Tensor or torch.compiler.is_compiling() or not x.is_cpu:
        return False
    width, dtype = x.shape[-1:], x.dtype
    for vector in vectors:
        if type(vector) is not Tensor or vector.dtype is not dtype or vector.shape != width or not vector.is_cpu:
            return False
    return dtype in FLOATS and width != () and width[0] > 0


class How(NamedTuple):
    """g = share · act(Bx), and whether the length of the row is restored; the act may write into what it is given."""

    share: float
    act: Act | None = None
    keep_norm: bool = False


@in_full_precision
def hinged(x: Tensor, directions: Tensor, how: How, in_place: bool = False) -> Tensor | None:
    """x + share · act(xBᵀ)B, with the rows B = directions."""
    if not is_plain(x, directions):
        return None
    rows = directions if directions.dim() == 2 else directions[None]
    return _edited(x, rows, rows, how, None, in_place)


def _edited(
    x: Tensor, project: Tensor | None, lift: Tensor, how: How, scale: Tensor | None, in_place: bool = False
) -> Tensor | None:
    """x + scale · share · act(x·projectᵀ)·lift; scale is (n, 1), and without a projection the act is 1."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    dtype = flat.dtype
    if lift.dtype is not dtype or dtype not in WIDE:
        if dtype is torch.float64 or lift.dtype is torch.float64:
            return None
        same, lift = project is lift, lift.float()
        project = lift if same else None if project is None else project.float()
    if in_place and x.dim() != 2 and not x.is_contiguous():
        return None
    wide, (n, d) = dtype in WIDE, flat.shape
    if n * d <= 2 * BLOCK and (wide or not in_place):
        out = _moved(flat if wide else flat.float(), project, lift, how, scale, flat if in_place else None)
        out = out if wide else out.to(dtype)
        return x if in_place else out if x.dim() == 2 else out.view(x.shape)
    out = x if in_place else torch.empty_like(x, memory_format=torch.contiguous_format)
    step = max(1, BLOCK // d)
    into = (out if x.dim() == 2 else out.view(-1, d)).split(step)
    weights = (None,) * len(into) if scale is None else scale.split(step)
    for block, target, weight in zip(flat.split(step), into, weights, strict=True):
        if wide:
            _moved(block, project, lift, how, weight, block if in_place else target)
        else:
            target.copy_(_moved(block.float(), project, lift, how, weight))
    return out


def _moved(
    x: Tensor, project: Tensor | None, lift: Tensor, how: How, scale: Tensor | None, out: Tensor | None = None
) -> Tensor:
    """One block, perhaps into x itself. The edit is summed before x is added: addmm would round every term to x's precision."""
    before = torch.linalg.vector_norm(x, dim=-1, keepdim=True) if how.keep_norm else None
    if project is None:
        moved = (
            torch.add(x, lift, alpha=how.share, out=out)
            if scale is None
            else torch.addcmul(x, scale, lift, value=how.share, out=out)
        )
    else:
        y = linear(x, project) if x.shape[0] < TURNED else torch.mm(project, x.T).T
        if how.act is not None:
            y = how.act(y)
        if scale is not None:
            y.mul_(scale)
        if lift.shape[0] == 1:
            moved = torch.addcmul(x, y, lift, value=how.share, out=out)
        else:
            delta = torch.mm(y, lift) if out is None or out is x else torch.mm(y, lift, out=out)
            moved = torch.add(x, delta, alpha=how.share, out=delta if out is None else out)
    return moved if before is None else _with_norm(moved, before)


def _with_norm(out: Tensor, before: Tensor) -> Tensor:
    """out with the lengths that x had, as `torch_backend.restore_norm` gives them back."""
    after = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
    return out.mul_(torch.where(after > VANISHED * before, before / after, 1))


@in_full_precision
def add(x: Tensor, vectors: Tensor, rows: Tensor, scale: Tensor | None, in_place: bool = False) -> Tensor | None:
    """x + scale · vectors[rows] where every row of x has one vector, or none."""
    if (rows.dim() == 2 and rows.shape[1] != 1) or not is_plain(x, vectors, rows, scale) or not x.numel():
        return None
    dtype = x.dtype if x.dtype in WIDE else torch.float32
    owners = rows if rows.dim() == 1 else rows[:, 0]
    bank = vectors if vectors.dim() == 2 else vectors[None]
    least, most = _ends(owners)
    if least < -1 or most >= bank.shape[0] or (bank.dtype is torch.float64) != (dtype is torch.float64):
        return None
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if scale is not None:
        scale = scale.reshape(-1, 1).to(dtype)
    into = x.view(-1, x.shape[-1]) if in_place and x.is_contiguous() else None
    if least == -1:
        mine = (owners >= 0).nonzero()[:, 0]
        moved = _added(flat[mine], bank, owners[mine], None if scale is None else scale[mine], dtype)
        out = flat.clone(memory_format=torch.contiguous_format) if into is None else into
        out.index_copy_(0, mine, moved)
    else:
        out = _added(flat, bank, owners, scale, dtype, into)
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


def _added(
    x: Tensor, bank: Tensor, owners: Tensor, scale: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """x (n, d) plus its vectors, a block at a time."""
    n, d = x.shape
    if bank.dtype is not dtype and (bank.shape[0] <= n) and not (scale is None and bank.dtype is x.dtype):
        bank = bank.to(dtype)
    step = max(1, BLOCK // d)
    if n <= step:
        return _plus(x, bank.index_select(0, owners), scale, dtype, out)
    out = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
    weights = (None,) * -(-n // step) if scale is None else scale.split(step)
    for block, target, own, weight in zip(x.split(step), out.split(step), owners.split(step), weights, strict=True):
        _plus(block, bank.index_select(0, own), weight, dtype, target)
    return out


def _plus(x: Tensor, picked: Tensor, scale: Tensor | None, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """x + scale · picked in this dtype, rounded once; may write into picked."""
    if scale is None and picked.dtype is x.dtype:
        return torch.add(x, picked, out=out)
    picked = picked.to(dtype)
    if x.dtype is dtype:
        into = picked if out is None else out
        return torch.add(x, picked, out=into) if scale is None else torch.addcmul(x, scale, picked, out=into)
    if scale is not None:
        picked.mul_(scale)
    picked.add_(x)
    return picked.to(x.dtype) if out is None else out.copy_(picked)


class _Step(NamedTuple):
    """A slot of a bank, decoded: where its rows stand, and what it does with what they project."""

    rank: int
    project: int
    lift: int
    start: int
    mode: int
    how: How | None  # None: of another mode, or its numbers differ in what a few calls cannot say


class _Steps(NamedTuple):
    """The slots of the rows of a batch."""

    idle: int  # rows of none
    found: list[tuple[int, _Step]]  # number of rows, in the order of the slots
    every: list[_Step] | None  # of each row, in that order, where one batched product serves


@in_full_precision
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
    if (
        not is_plain(x, vectors, coefficients, slots, rows, scale)
        or not _is_readable(coefficients, torch.float32)
        or not _is_readable(slots, torch.int32)
        or (scale is not None and x.dtype is torch.float64)
        or not x.numel()
    ):
        return None
    bank = vectors, coefficients, slots
    if rows is None:
        return _by_one(x, bank, 0, scale, in_place)
    if rows.dim() == 2 and rows.shape[1] != 1:
        return None
    rows = rows if rows.dim() == 1 else rows[:, 0]
    owners = rows.tolist() if rows.stride(0) else rows[:1].tolist()
    if owners.count(owners[0]) == len(owners):
        return _by_one(x, bank, owners[0], scale, in_place)
    steps = _steps_of(bank, owners)
    if steps is None:
        return None
    out = _by_owners(x.reshape(-1, x.shape[-1]), bank, rows, owners, steps, scale)
    return None if out is None else x.copy_(out.view(x.shape)) if in_place else out.view(x.shape)


def _is_readable(table: Tensor, dtype: torch.dtype) -> bool:
    """Whether the memory of a table is rows of eight such numbers."""
    return table.dtype is dtype and table.is_cpu and table.is_contiguous()


def _step_of(bank: Tables, owner: int) -> _Step | None:
    """A slot, decoded; what has been decoded is found again by its numbers, so that a change of the bank is seen at once."""
    vectors, coefficients, slots = bank
    if not 0 <= owner < slots.shape[0]:
        return None
    header = _bytes_at(slots.data_ptr() + 32 * owner, 32)
    _, rank, project, lift, start, *_ = _unpacked(header)
    last = vectors.shape[0] - rank
    if not (rank > 0 and 0 <= start < coefficients.shape[0] - rank and 0 <= project <= last and 0 <= lift <= last):
        return None
    return _decoded(header, _bytes_at(coefficients.data_ptr() + 32 * start, 32 + 32 * rank))


def _steps_of(bank: Tables, owners: list[int]) -> _Steps | None:
    """The slots of several rows, in the order of their numbers, and how many rows each has."""
    vectors, coefficients, slots = bank
    if 32 * slots.shape[0] <= REMEMBERED:
        headers, mine = _bytes_at(slots.data_ptr(), 32 * slots.shape[0]), tuple(owners)
        span = _span(headers, mine, vectors.shape[0], coefficients.shape[0])
        if span is None:
            return None
        first, rows = span
        if 32 * rows <= REMEMBERED:
            return _remembered(headers, _bytes_at(coefficients.data_ptr() + 32 * first, 32 * rows), first, mine)
    return _counted(owners, lambda owner: _step_of(bank, owner))


@functools.lru_cache(maxsize=256)
def _span(headers: bytes, owners: tuple[int, ...], directions: int, size: int) -> tuple[int, int] | None:
    """First row and number of the rows of coefficients that hold these slots; None where one does not fit the bank."""
    ends = []
    for owner in set(owners) - {-1}:
        header = headers[32 * owner : 32 * owner + 32]
        if owner < 0 or not header:
            return None
        _, rank, project, lift, start, *_ = _unpacked(header)
        last = directions - rank
        if not (rank > 0 and 0 <= start < size - rank and 0 <= project <= last and 0 <= lift <= last):
            return None
        ends.append((start, start + 1 + rank))
    first = min(start for start, _ in ends)
    return first, max(stop for _, stop in ends) - first


@functools.lru_cache(maxsize=256)
def _remembered(headers: bytes, numbers: bytes, first: int, owners: tuple[int, ...]) -> _Steps | None:
    def step(owner: int) -> _Step:
        header = headers[32 * owner : 32 * owner + 32]
        _, rank, _, _, start, *_ = _unpacked(header)
        begin = 32 * (start - first)
        return _decoded(header, numbers[begin : begin + 32 + 32 * rank])

    return _counted(owners, step)


def _counted(owners: Sequence[int], step_of: Callable[[int], _Step | None]) -> _Steps | None:
    counts, found = Counter(owners), []
    for owner in sorted(counts):
        step = None if owner == -1 else step_of(owner)
        if step is None and owner != -1:
            return None
        if step is not None:
            found.append((counts[owner], step))
    kinds = {(s.rank, s.project == s.lift, s.mode, s.how is None or s.how.keep_norm) for _, s in found}
    batched = len(kinds) == 1 and found[0][1].mode == HINGE and len(owners) - counts[-1] < SHARED * len(found)
    every = [step for count, step in found for _ in range(count)] if batched else None
    return _Steps(counts[-1], found, every)


@functools.lru_cache(maxsize=4096)
def _decoded(header: bytes, numbers: bytes) -> _Step:
    mode, rank, project, lift, start, _, keep_norm, _ = _unpacked(header)
    return _Step(rank, project, lift, start, mode, _how(mode, bool(keep_norm), numbers))


@functools.lru_cache(maxsize=4096)
def _how(mode: int, keep_norm: bool, numbers: bytes) -> How | None:
    """What the rows of coefficients of a slot say: one object for equal numbers."""
    constants, *table = struct.iter_unpack("8f", numbers)
    columns = tuple(zip(*table, strict=True))
    how = None
    if mode == HINGE:
        how = _hinge_of(constants[2], columns)
    elif mode == PUSH:
        bias = _number(columns[0])
        how = How(constants[2], lambda y: _pushed(y, constants[3], bias))
    elif mode == ROTATE and constants[4] == 0:
        angle = constants[2] * constants[3]
        axis = torch.tensor([math.cos(angle), math.sin(angle)], device="cpu")
        how = How(1.0, lambda y: torch.linalg.vector_norm(y, dim=-1, keepdim=True).mul(axis).sub_(y))
    elif mode == ADD:
        how = How(constants[2])
    return how and how._replace(keep_norm=keep_norm)


def _number(column: tuple[float, ...]) -> float | Tensor:
    """What all directions share, or a number for each."""
    return column[0] if len(set(column)) == 1 else torch.tensor(column, device="cpu")


def _is_zero(column: float | Tensor) -> bool:
    return isinstance(column, float) and column == 0


def _hinge_of(gain: float, columns: tuple[tuple[float, ...], ...]) -> How:
    """What `torch_backend.hinge` makes of these numbers, without the terms that are nothing."""
    c0, c1, c2, c3, c4, c5, c6, c7 = map(_number, columns)
    if _is_zero(c4) and _is_zero(c6) and isinstance(c0, float):
        if _is_zero(c2) and isinstance(c1, float) and abs(c1) > 1e-3:
            offset = c0 / c1
            return How(gain * c1, (lambda y: y.add_(offset)) if offset else None)
        if _is_zero(c1) and isinstance(c2, float) and isinstance(c3, float) and abs(c2) > 1e-3:
            return How(gain * c2, _bend(c3, c0 / c2))
    terms: list[Act] = []
    if not _is_zero(c1):
        terms.append(lambda y: y * c1)
    for size, knot in ((c2, c3), (c4, c5)):
        if not _is_zero(size):
            terms.append(functools.partial(_bent, size, knot))
    if not _is_zero(c6):
        terms.append(lambda y: (y > c7).to(y.dtype).mul_(c6))
    return How(gain, lambda y: _summed([term(y) for term in terms] or [torch.zeros_like(y)], c0))


def _bent(size: float | Tensor, knot: float | Tensor, y: Tensor) -> Tensor:
    """size · relu(y - knot)."""
    return torch.relu_(y - knot).mul_(size)


def _summed(terms: list[Tensor], offset: float | Tensor) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total.add_(term)
    return total if _is_zero(offset) else total.add_(offset)


def _bend(knot: float, offset: float) -> Act:
    """relu(y - knot) + offset."""

    def act(y: Tensor) -> Tensor:
        y = (y.sub_(knot) if knot else y).relu_()
        return y.add_(offset) if offset else y

    return act


def _pushed(y: Tensor, target: float, bias: float | Tensor) -> Tensor:
    """`torch_backend.push` of strength 1."""
    short = torch.relu_(target - (y if _is_zero(bias) else y.add_(bias)).relu_())
    total = short.sum(-1, keepdim=True)
    return short.mul_(torch.where(total > 0, target / total, 0))


def _by_one(x: Tensor, bank: Tables, owner: int, scale: Tensor | None, in_place: bool) -> Tensor | None:
    """Every row after one slot."""
    step = _step_of(bank, owner)
    return None if step is None else _with_step(x, bank, step, scale, in_place)


def _with_step(x: Tensor, bank: Tables, step: _Step, scale: Tensor | None, in_place: bool = False) -> Tensor | None:
    """Rows after a slot: in few calls, or a block at a time as the general road edits them."""
    rank, project, lift, _, mode, how = step
    vectors = bank[0]
    if how is None or (scale is not None and mode == ROTATE):
        return None
    rows = vectors if vectors.shape[0] == rank else vectors[lift : lift + rank]
    other = None if mode == ADD else rows if project == lift else vectors[project : project + rank]
    return _edited(x, other, rows, how, None if scale is None else scale.reshape(-1, 1), in_place)


def _by_owners(
    flat: Tensor, bank: Tables, rows: Tensor, owners: list[int], steps: _Steps, scale: Tensor | None
) -> Tensor | None:
    """Rows of several slots, in the order of their owners: of each its own products, or one batched product of all."""
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
        if not _batched(flat[start:], out[start:], bank, steps.every, None if weights is None else weights[start:]):
            return None
        return torch.empty_like(out).index_copy_(0, place, out) if sorts else out
    for count, step in steps.found:
        some = slice(start, start + count)
        moved = _with_step(flat[some], bank, step, None if weights is None else weights[some])
        if moved is None:
            return None
        out[some] = moved
        start += count
    return torch.empty_like(out).index_copy_(0, place, out) if sorts else out


def _batched(flat: Tensor, out: Tensor, bank: Tables, steps: list[_Step], scale: Tensor | None) -> bool:
    """Hinges of one rank, every row with its own directions, (b, k, d): read where they stand, or gathered a block at a time."""
    vectors, first = bank[0], steps[0]
    if flat.dtype is torch.float64 or vectors.dtype is torch.float64:
        return False
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
    return True


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
