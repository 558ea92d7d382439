"""The slots of a bank on a CPU, decoded into the few calls that each needs.

What has been decoded is kept with the bytes that said so: they are compared before it is used again, so that a change of the bank
is seen at once, however it was written.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerfast._checks import FLOATS

from .slots import ADD, HINGE, PUSH, ROTATE, Tables
from .torch_backend import TINY

SHARED = 4
"""From so many rows per owner on every owner has products of its own; below, one batched product serves all."""
REMEMBERED = 1 << 14
"""Bytes of a table of a bank, at 32 a row, up to which the slots of a whole batch, of no more rows, are remembered by them."""
KEPT = 1 << 11
"""Bytes of the numbers of a slot up to which what they say is kept for every bank: those of 63 directions."""

Act = Callable[[Tensor], Tensor]
_bytes_at = ctypes.string_at
_unpacked = struct.Struct("8i").unpack


class How(NamedTuple):
    """g = share · act(Bx), and whether the length of the row is restored; the act may write into what it is given."""

    share: float
    act: Act | None = None
    keep_norm: bool = False


class Ready(NamedTuple):
    """A slot of a bank, ready to be applied."""

    how: How | None  # None: of another mode, or its numbers differ in what a few calls cannot say
    across: Tensor | None  # Bᵀ, (d, k); None: nothing is projected
    lift: Tensor  # C, (k, d)
    mode: int
    pair: tuple[Tensor, Tensor] | None  # b and c, (d,), of a slot of one direction; the same object where they are one


class Step(NamedTuple):
    """A slot of a bank beside others: where its rows stand, and what it does with what they project."""

    rank: int
    project: int
    lift: int
    start: int
    mode: int
    how: How | None


class Batch(NamedTuple):
    """Hinges of one rank, a slot for each row: where their rows stand, and what they do with what these project."""

    rank: int
    project: list[int] | None  # None: the rows of the lift
    lift: list[int]
    start: list[int]
    how: How | None  # None: it is not the same for all
    keep_norm: bool
    is_run: bool  # whether the rows of the lifts follow one after another


class Steps(NamedTuple):
    """The slots of the rows of a batch."""

    idle: int  # rows of none
    found: list[tuple[int, int]]  # a slot's number and how many rows it has, in the order of these numbers
    batch: Batch | None  # of all rows, in that order, where one batched product serves


class _Known(NamedTuple):
    """A slot that has been decoded, and the memory that said so."""

    header: ctypes.Array[ctypes.c_char]
    numbers: ctypes.Array[ctypes.c_char]
    was: tuple[bytes, bytes]
    step: Step
    ready: Ready


class Reader:
    """Reads the slots of one bank, and keeps them; it holds the memory of the directions, but no object of a table.

    Args:
        bank: Its tables, readable: rows of eight numbers.
        end: Called when the table of headers is no more.
    """

    def __init__(self, bank: Tables, end: Callable[[object], object]) -> None:
        vectors, coefficients, slots = bank
        self.width = vectors.shape[1]
        self._tables = weakref.ref(vectors), weakref.ref(coefficients), weakref.ref(slots, end)
        self._forms = _forms(*bank)
        self._known: dict[int, _Known] = {}

    def is_of(self, bank: Tables) -> bool:
        """Whether these are the tables, still in their places, and of the form that they had there."""
        vectors, coefficients, slots = bank
        a, b, c = self._tables
        return a() is vectors and b() is coefficients and c() is slots and self._forms == _forms(*bank)

    def ready(self, bank: Tables, owner: int) -> Ready | None:
        """A slot; None where the bank has no such one, an empty one, or one that points outside its tables."""
        known = self._known.get(owner)
        if known is not None and (known.header.raw, known.numbers.raw) == known.was:
            return known.ready
        vectors, coefficients, slots = bank
        if not 0 <= owner < slots.shape[0]:
            return None
        header = _memory(self._forms[2] + 32 * owner, 32)
        first = header.raw  # read once: another thread may write meanwhile
        _, rank, project, lift, start, *_ = _unpacked(first)
        if not _fits(first, vectors.shape[0], coefficients.shape[0]):
            return None
        numbers = _memory(self._forms[1] + 32 * start, 32 + 32 * rank)
        was = first, numbers.raw
        step, rows = _decoded(*was), vectors.data  # a view of the table itself would keep it
        across = None if step.mode == ADD else rows[project : project + rank].T
        pair = None
        if rank == 1 and across is not None:
            one = rows[lift]
            pair = one if project == lift else rows[project], one
        ready = Ready(step.how, across, rows[lift : lift + rank], step.mode, pair)
        self._known[owner] = _Known(header, numbers, was, step, ready)
        return ready

    def steps(self, bank: Tables, owners: list[int]) -> Steps | None:
        """The slots of several rows, in the order of their numbers, and how many rows each has."""
        vectors, coefficients, slots = bank
        if 32 * max(slots.shape[0], len(owners)) <= REMEMBERED:
            headers, mine = _bytes_at(self._forms[2], 32 * slots.shape[0]), tuple(owners)
            span = _span(headers, mine, vectors.shape[0], coefficients.shape[0])
            if span is None:
                return None
            first, rows = span
            if 32 * rows <= REMEMBERED:
                return _remembered(headers, _bytes_at(self._forms[1] + 32 * first, 32 * rows), first, mine)
        return _counted(owners, lambda owner: self._step(bank, owner))

    def _step(self, bank: Tables, owner: int) -> Step | None:
        return None if self.ready(bank, owner) is None else self._known[owner].step


_readers: dict[int, Reader] = {}  # by the object of the table of headers


def reader_of(bank: Tables) -> Reader | None:
    """What reads the slots of a bank; None where its tables are not those of a bank on a CPU, or of more than 32 bits."""
    key = id(bank[2])
    reader = _readers.get(key)
    if reader is not None and reader.is_of(bank):
        return reader
    if not all(table.dim() == 2 and table.is_cpu and table.layout is torch.strided for table in bank):
        return None
    vectors, *tables = bank
    if not vectors.shape[1] or vectors.dtype not in FLOATS:
        return None
    for table, dtype in zip(tables, (torch.float32, torch.int32), strict=True):
        if table.dtype is not dtype or table.shape[1] != 8 or not table.is_contiguous() or table.is_neg():
            return None
    # bound now: when Python ends, a bank may go after the names of this module; pop takes the reference for its default
    forget = functools.partial(_readers.pop, key)
    reader = _readers[key] = Reader(bank, forget)
    return reader


def _forms(vectors: Tensor, coefficients: Tensor, slots: Tensor) -> tuple[Any, ...]:
    """Where the tables of a bank stand, and what else of them can change in place but their contents."""
    places = vectors.data_ptr(), coefficients.data_ptr(), slots.data_ptr()
    return *places, coefficients.shape, slots.shape, vectors.shape, vectors.stride(), vectors.dtype


def _memory(address: int, size: int) -> ctypes.Array[ctypes.c_char]:
    """Bytes as they stand there, whenever they are looked at."""
    return (ctypes.c_char * size).from_address(address)


def _fits(header: bytes, directions: int, size: int) -> bool:
    """Whether a slot is not empty and lies within tables of so many rows."""
    _, rank, project, lift, start, *_ = _unpacked(header)
    last = directions - rank
    return rank > 0 and 0 <= start < size - rank and 0 <= project <= last and 0 <= lift <= last


@functools.lru_cache(maxsize=256)
def _span(headers: bytes, owners: tuple[int, ...], directions: int, size: int) -> tuple[int, int] | None:
    """First row and number of the rows of coefficients that hold these slots; None where one does not fit the bank."""
    ends = []
    for owner in set(owners) - {-1}:
        header = headers[32 * owner : 32 * owner + 32]
        if owner < 0 or not header or not _fits(header, directions, size):
            return None
        _, rank, _, _, start, *_ = _unpacked(header)
        ends.append((start, start + 1 + rank))
    first = min(start for start, _ in ends)
    return first, max(stop for _, stop in ends) - first


@functools.lru_cache(maxsize=256)
def _remembered(headers: bytes, numbers: bytes, first: int, owners: tuple[int, ...]) -> Steps | None:
    def step(owner: int) -> Step:
        header = headers[32 * owner : 32 * owner + 32]
        _, rank, _, _, start, *_ = _unpacked(header)
        begin = 32 * (start - first)
        return _decoded(header, numbers[begin : begin + 32 + 32 * rank])

    return _counted(owners, step)


def _counted(owners: Sequence[int], step_of: Callable[[int], Step | None]) -> Steps | None:
    counts, found = Counter(owners), []
    for owner in sorted(counts):
        step = None if owner == -1 else step_of(owner)
        if step is None and owner != -1:
            return None
        if step is not None:
            found.append((owner, counts[owner], step))
    kinds = {(s.rank, s.project == s.lift, s.mode, s.how is None or s.how.keep_norm) for _, _, s in found}
    serves = len(kinds) == 1 and found[0][2].mode == HINGE and len(owners) - counts[-1] < SHARED * len(found)
    batch = _batch([step for _, count, step in found for _ in range(count)]) if serves else None
    return Steps(counts[-1], [(owner, count) for owner, count, _ in found], batch)


def _batch(steps: list[Step]) -> Batch:
    first, lift = steps[0], [step.lift for step in steps]
    project = None if first.project == first.lift else [step.project for step in steps]
    how = first.how if all(step.how is first.how for step in steps) else None
    keep_norm = first.how is not None and first.how.keep_norm
    return Batch(
        first.rank, project, lift, [step.start for step in steps], how, keep_norm, stand_together(lift, first.rank)
    )


def stand_together(first: list[int], rank: int) -> bool:
    """Whether rows that begin there, so many each, follow one after another."""
    return first == list(range(first[0], first[0] + rank * len(first), rank))


def _decoded(header: bytes, numbers: bytes) -> Step:
    mode, rank, project, lift, start, _, keep_norm, _ = _unpacked(header)
    how = _how_kept if len(numbers) <= KEPT else _how
    return Step(rank, project, lift, start, mode, how(mode, bool(keep_norm), numbers))


def _how(mode: int, keep_norm: bool, numbers: bytes) -> How | None:
    """What the rows of coefficients of a slot say."""
    constants, *table = struct.iter_unpack("8f", numbers)
    columns = tuple(zip(*table, strict=True))
    how = None
    if mode == HINGE:
        how = _hinge(constants[2], columns)
    elif mode == PUSH:
        bias = None if not any(columns[0]) else _tensor(columns[0])
        how = How(constants[2] * constants[3], functools.partial(_pushed, _tensor(constants[3]), bias))
    elif mode == ROTATE and constants[4] == 0:
        angle = constants[2] * constants[3]
        axis = _tensor((math.cos(angle), math.sin(angle)))
        how = How(1.0, lambda y: torch.linalg.vector_norm(y, dim=-1, keepdim=True).mul(axis).sub_(y))
    elif mode == ADD:
        how = How(constants[2])
    return how and how._replace(keep_norm=keep_norm)


_how_kept = functools.lru_cache(maxsize=4096)(_how)  # one object for equal numbers


def _hinge(gain: float, columns: tuple[tuple[float, ...], ...]) -> How:
    """What `torch_backend.hinge` makes of these numbers, without the terms that are nothing."""
    if all(len(set(column)) == 1 for column in columns):
        how = _shared_hinge(*(column[0] for column in columns))
        if how is not None:
            return how._replace(share=gain * how.share)
    c0, c1, c2, c3, c4, c5, c6, c7 = (_tensor(column) if any(column) else None for column in columns)
    terms: list[Act] = []
    if c1 is not None:
        terms.append(c1.mul)
    for size, knot in ((c2, c3), (c4, c5)):
        if size is not None:
            terms.append(functools.partial(_bent, size, knot))
    if c6 is not None:
        terms.append(lambda y: (y > (0 if c7 is None else c7)).to(y.dtype).mul_(c6))
    return How(gain, functools.partial(_summed, terms, c0))


def _shared_hinge(c0: float, c1: float, c2: float, c3: float, c4: float, c5: float, c6: float, c7: float) -> How | None:
    """A hinge whose directions share their numbers, as a multiple of one or two calls; None where it takes more."""
    if c6 != 0:
        return None
    if c0 == c3 and c1 == -1 and c2 == 1 and (c4 == 0 or (c4 == -1 and c3 <= c5)):
        low, high = _tensor(c3), _tensor(math.inf if c4 == 0 else c5)
        return How(1.0, lambda y: y.clamp(low, high).sub_(y))
    if c2 == 0:
        c2, c3, c4 = c4, c5, 0.0
    if c4 == 0 and c2 == 0 and abs(c1) > 1e-3:
        return How(c1, offset_by(c0 / c1))
    if c4 == 0 and c1 == 0 and abs(c2) > 1e-3:
        return How(c2, bent(c3, c0 / c2))
    return None


def offset_by(number: float) -> Act | None:
    """y + number; None: y itself."""
    if number == 0:
        return None
    offset = _tensor(number)
    return lambda y: y.add_(offset)


def bent(knot: float, number: float) -> Act:
    """relu(y - knot) + number."""
    if knot == 0 and number == 0:
        return torch.relu_
    before, after = _tensor(knot), _tensor(number)
    if knot == 0:
        return lambda y: y.relu_().add_(after)
    return lambda y: y.sub_(before).relu_().add_(after)


def _tensor(numbers: float | tuple[float, ...]) -> Tensor:
    """Kept beside the slot: a number that a call is given anew costs more than the call."""
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def _bent(size: Tensor, knot: Tensor | None, y: Tensor) -> Tensor:
    """size · relu(y - knot)."""
    return (torch.relu(y) if knot is None else torch.relu_(y - knot)).mul_(size)


def _summed(terms: list[Act], offset: Tensor | None, y: Tensor) -> Tensor:
    total = terms[0](y) if terms else torch.zeros_like(y)
    for term in terms[1:]:
        total.add_(term(y))
    return total if offset is None else total.add_(offset)


def _pushed(target: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """v/Σv of the deficit v = relu(m - relu(y + b)): `torch_backend.push` of strength 1/m."""
    short = torch.relu_(target - (y if bias is None else y.add_(bias)).relu_())
    return short.div_(short.sum(-1, keepdim=True).clamp_min_(TINY))
