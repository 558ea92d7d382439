"""Kernels of the CPU backend for numba, the optional compiler: importing this module compiles them, or reads what was compiled.

They take addresses, so that a call costs no more than its whole numbers, and so that bfloat16, which numba has not, is read as
the upper half of a float32. Blocks of rows that stay in the cache are projected on eight directions at a time, and lifted: x
comes from memory once. Everything is summed in float32 and rounded once. Numbers of a row never meet those of another.

The only liberties of the compiler are to sum over the width in lanes, and to fuse a product with its sum: rows of NaN or of
infinities say so as ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types

from . import numba_memory
from .numba_cache import compiled
from .numba_memory import copied, prefetch, read, whole, write
from .slots import ADD, HINGE, PUSH, ROTATE
from .torch_backend import VANISHED

ROWS = 16
"""Rows of a block: they stay in the second cache beside the directions."""
CHUNK = 768
"""Numbers of a row that are taken at a time: those of eight directions fill three quarters of the first cache."""
MOST = 64
"""Directions of a slot; of more, a library's products cost less."""
TILE = 8
"""Directions that share one reading of x."""
MANY = 64
"""From so many rows on, all of one slot of more directions than two tiles, a library's products cost less."""
LINE = 64
"""Bytes of a line of the caches."""
PITCH = MOST + TILE
"""From one row's y to the next; what is behind it is 0."""

_exact = {"fastmath": {"contract"}, "error_model": "numpy"}
_in_lanes = {"fastmath": {"contract", "reassoc"}, "error_model": "numpy"}
_ZERO = np.float32(0)
_HALF = np.uint16(0)


def _entry(numbers: int) -> Callable[..., Any]:
    """Compile now, for float32 and for bfloat16 (as uint16), what takes so many whole numbers; it runs without holding Python."""
    arguments = [types.int64] * numbers
    signatures = [types.int64(kind, *arguments) for kind in (types.float32, types.uint16)]
    return compiled(signatures, (ADD, HINGE, PUSH, ROTATE, VANISHED), (numba_memory.__file__,), nogil=True, **_exact)


# --- one row, or a chunk of it ----------------------------------------------------------------------------------------------


@njit(**_exact)
def _eight(first, step, count):
    """Where eight rows begin, `step` bytes apart; those beyond `count` are the last once more."""
    last = count - 1
    return (
        first, first + min(1, last) * step, first + min(2, last) * step, first + min(3, last) * step,
        first + min(4, last) * step, first + min(5, last) * step, first + min(6, last) * step, first + min(7, last) * step,
    )  # fmt: skip


@njit(**_exact)
def _at(rows, j):
    """Number j of eight rows."""
    r0, r1, r2, r3, r4, r5, r6, r7 = rows
    return (
        read(_ZERO, r0, j), read(_ZERO, r1, j), read(_ZERO, r2, j), read(_ZERO, r3, j),
        read(_ZERO, r4, j), read(_ZERO, r5, j), read(_ZERO, r6, j), read(_ZERO, r7, j),
    )  # fmt: skip


@njit(**_in_lanes)
def _dots(kind, x, z, first, step, count, n, y, u):
    """y += the products of row x with up to eight directions, u those of row z: a direction is loaded once for both."""
    rows = _eight(first, step, count)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = _ZERO
    t0 = t1 = t2 = t3 = t4 = t5 = t6 = t7 = _ZERO
    for j in range(n):
        v, w = read(kind, x, j), read(kind, z, j)
        c0, c1, c2, c3, c4, c5, c6, c7 = _at(rows, j)
        s0, t0 = s0 + v * c0, t0 + w * c0
        s1, t1 = s1 + v * c1, t1 + w * c1
        s2, t2 = s2 + v * c2, t2 + w * c2
        s3, t3 = s3 + v * c3, t3 + w * c3
        s4, t4 = s4 + v * c4, t4 + w * c4
        s5, t5 = s5 + v * c5, t5 + w * c5
        s6, t6 = s6 + v * c6, t6 + w * c6
        s7, t7 = s7 + v * c7, t7 + w * c7
    _collect(y, count, (s0, s1, s2, s3, s4, s5, s6, s7))
    _collect(u, count, (t0, t1, t2, t3, t4, t5, t6, t7))


@njit(**_exact)
def _collect(y, count, sums):
    for i, s in enumerate(sums):
        if i < count:
            write(_ZERO, y, i, read(_ZERO, y, i) + s)


@njit(**_in_lanes)
def _dot(kind, x, b, n):
    s = _ZERO
    for j in range(n):
        s += read(kind, x, j) * read(_ZERO, b, j)
    return s


@njit(**_in_lanes)
def _length(kind, x, n):
    """Of a row, as PyTorch takes it: the squares add up in float64."""
    s = 0.0
    for j in range(n):
        v = np.float64(read(kind, x, j))
        s += v * v
    return math.sqrt(s)


@njit(**_exact)
def _tile(g, i):
    """Eight numbers from g[i] on."""
    return _at(_eight(g, 4, TILE), i)


@njit(**_exact)
def _weighed(g, c):
    """The sum of eight numbers, each times its weight."""
    g0, g1, g2, g3, g4, g5, g6, g7 = g
    c0, c1, c2, c3, c4, c5, c6, c7 = c
    return g0 * c0 + g1 * c1 + g2 * c2 + g3 * c3 + g4 * c4 + g5 * c5 + g6 * c6 + g7 * c7


@njit(**_exact)
def _mixed(g, c, j):
    """g·C at one place."""
    return _weighed(g, _at(c, j))


@njit(**_exact)
def _sum(w, begins, g, c, n):
    """w += g·C of eight directions, or = where it begins."""
    for j in range(n):
        write(_ZERO, w, j, (_ZERO if begins else read(_ZERO, w, j)) + _mixed(g, c, j))


@njit(**_exact)
def _sum_one(w, begins, g, c, n):
    for j in range(n):
        write(_ZERO, w, j, (_ZERO if begins else read(_ZERO, w, j)) + g * read(_ZERO, c, j))


@njit(**_exact)
def _lifted(kind, x, out, g, c, n):
    """x + g·C of eight directions. Memory that may overlap is taken number by number, so x in its place is said apart."""
    if x == out:
        for j in range(n):
            write(kind, out, j, read(kind, out, j) + _mixed(g, c, j))
    else:
        for j in range(n):
            write(kind, out, j, read(kind, x, j) + _mixed(g, c, j))


@njit(**_exact)
def _both_lifted(kind, x, z, out, to, g, h, c, n):
    """`_lifted` of two rows, x with g and z with h: a direction is loaded once for both."""
    if x == out and z == to:
        for j in range(n):
            some = _at(c, j)
            write(kind, out, j, read(kind, out, j) + _weighed(g, some))
            write(kind, to, j, read(kind, to, j) + _weighed(h, some))
    else:
        for j in range(n):
            some = _at(c, j)
            write(kind, out, j, read(kind, x, j) + _weighed(g, some))
            write(kind, to, j, read(kind, z, j) + _weighed(h, some))


@njit(**_exact)
def _plus(kind, x, w, n):
    """w += x."""
    for j in range(n):
        write(_ZERO, w, j, read(_ZERO, w, j) + read(kind, x, j))


@njit(**_exact)
def _add(kind, x, weight, of, vector, out, n):
    """x + weight · vector, a vector of that kind."""
    if x == out:
        for j in range(n):
            write(kind, out, j, read(kind, out, j) + weight * read(of, vector, j))
    else:
        for j in range(n):
            write(kind, out, j, read(kind, x, j) + weight * read(of, vector, j))


@njit(**_exact)
def _scaled(kind, w, ratio, out, n):
    for j in range(n):
        write(kind, out, j, ratio * read(_ZERO, w, j))


@njit(**_exact)
def _widen(x, w, n):
    for j in range(n):
        write(_ZERO, w, j, read(_HALF, x, j))


# --- rows of a bank ---------------------------------------------------------------------------------------------------------


@njit(**_exact)
def _serves(header, directions, size):
    """Whether a slot is empty, or of a mode that is served and within the tables of its bank."""
    mode, rank, project, lift, start = header
    if rank == 0:
        return True
    if not (mode in (HINGE, PUSH) or (mode == ROTATE and rank == 2) or (mode == ADD and rank == 1)):
        return False
    last = directions - rank
    return 0 < rank <= MOST and 0 <= project <= last and 0 <= lift <= last and 0 <= start < size - rank


@njit(**_exact)
def _header(table, slot):
    """Mode, rank, first row of B and of C, and of the numbers."""
    at = table + 32 * slot
    return whole(at, 0), whole(at, 1), whole(at, 2), whole(at, 3), whole(at, 4)


@njit(**_exact)
def _relu(number):
    return _ZERO if number < _ZERO else number


@njit(**_exact)
def _hinge(y, m, rank, c):
    """`torch_backend.hinge` of m rows, without the terms that are nothing."""
    for k in range(rank):
        c0, c1, c2, c3, c4, c5, c6, c7 = _tile(c, 8 * k + 8)
        for r in range(m):
            v, g = read(_ZERO, y, r * PITCH + k), c0
            if c1 != _ZERO:
                g += c1 * v
            if c2 != _ZERO:
                g += c2 * _relu(v - c3)
            if c4 != _ZERO:
                g += c4 * _relu(v - c5)
            if c6 != _ZERO:
                g += c6 if v > c7 else _ZERO
            write(_ZERO, y, r * PITCH + k, g)


@njit(**_exact)
def _push(y, rank, c, weight):
    """`torch_backend.push` of one row."""
    target, total = read(_ZERO, c, 3), _ZERO
    for k in range(rank):
        short = _relu(target - _relu(read(_ZERO, y, k) + read(_ZERO, c, 8 * k + 8)))
        write(_ZERO, y, k, short)
        total += short
    _times(y, rank, weight * target / total if total > _ZERO else _ZERO)


@njit(**_exact)
def _rotate(y, c, weight):
    """`torch_backend.rotate` of one row."""
    y0, y1 = np.float64(read(_ZERO, y, 0)), np.float64(read(_ZERO, y, 1))
    length, angle = math.sqrt(y0 * y0 + y1 * y1), np.float64(weight * read(_ZERO, c, 3))
    turns = read(_ZERO, c, 4) == _ZERO or y0 > 0
    write(_ZERO, y, 0, np.float32(length * math.cos(angle) - y0 if turns else 0.0))
    write(_ZERO, y, 1, np.float32(length * math.sin(angle) - y1 if turns else 0.0))


@njit(**_exact)
def _times(y, rank, weight):
    for k in range(rank):
        write(_ZERO, y, k, weight * read(_ZERO, y, k))


@njit(**_exact)
def _project(kind, x, z, y, u, both, rank, first, step, n):
    """y += Bx and, of both rows, u += Bz."""
    for i in range(0, rank, TILE):
        count = min(TILE, rank - i)
        if count > TILE // 2:
            _dots(kind, x, z, first + i * step, step, count, n, y + 4 * i, u + 4 * i)
            continue
        for one in range(i, i + count):
            write(_ZERO, y, one, read(_ZERO, y, one) + _dot(kind, x, first + one * step, n))
            if both:
                write(_ZERO, u, one, read(_ZERO, u, one) + _dot(kind, z, first + one * step, n))


@njit(**_exact)
def _lift(w, g, rank, first, step, n):
    """w = g·C; behind the numbers of g stand zeros."""
    for i in range(0, rank, TILE):
        count = min(TILE, rank - i)
        if count > TILE // 2:
            _sum(w, i == 0, _tile(g, i), _eight(first + i * step, step, count), n)
        else:
            for one in range(i, i + count):
                _sum_one(w, one == 0, read(_ZERO, g, one), first + one * step, n)


@njit(**_exact)
def _edit_block(kind, order, ahead, places, slot, basis, strengths, scratch):
    """A few rows after one slot: projected chunk by chunk, so that the directions stay in the first cache, and lifted so.

    Rows that come later (`ahead`) are asked for meanwhile: the processor's own prefetch falls behind on short runs of memory, of
    one or two directions alone it does not.
    """
    x, x_step, out, out_step, d, item = places
    mode, rank, keep_norm, c = slot
    m = order.shape[0]
    across, lift, step = basis
    scale, scale_step = strengths
    y, w = scratch
    for i in range((m + 1) * PITCH):
        write(_ZERO, y, i, _ZERO)
    short = rank > TILE // 4
    chunk = (
        CHUNK if short else CHUNK * TILE // max(rank, 1)
    )  # one or two directions fit into the first cache in longer runs
    if mode != ADD:
        for j in range(0, d, chunk):
            # the last of an odd number stands in for its second, whose products are not asked for
            for r in range(0, m, 2):
                both = r + 1 < m
                for later in ahead[r : r + 2] if short else ahead[:0]:
                    start = x + later * x_step + j * item
                    for line in range(start, start + item * min(chunk, d - j), LINE):
                        prefetch(line)
                one, two = x + order[r] * x_step + j * item, x + order[r + both] * x_step + j * item
                own = y + 4 * r * PITCH
                _project(kind, one, two, own, own + 4 * PITCH, both, rank, across + 4 * j, step, min(chunk, d - j))
    if mode == HINGE:
        _hinge(y, m, rank, c)
    for r in range(m):
        own, weight = y + 4 * r * PITCH, read(_ZERO, c, 2)
        if scale:
            weight *= read(_ZERO, scale, order[r] * scale_step)
        if mode == HINGE:
            _times(own, rank, weight)
        elif mode == PUSH:
            _push(own, rank, c, weight)
        elif mode == ROTATE:
            _rotate(own, c, weight)
        else:
            write(_ZERO, own, 0, weight)
    span = d if keep_norm else chunk
    pairs = m - m % 2 if TILE // 2 < rank <= TILE and not keep_norm else 0
    for j in range(0, d, span):
        n, first = min(span, d - j), lift + 4 * j
        for r in range(0, pairs, 2):
            at, to, g = x + order[r] * x_step + j * item, out + order[r] * out_step + j * item, y + 4 * r * PITCH
            two, there = x + order[r + 1] * x_step + j * item, out + order[r + 1] * out_step + j * item
            _both_lifted(kind, at, two, to, there, _tile(g, 0), _tile(g, PITCH), _eight(first, step, rank), n)
        for r in range(pairs, m):
            at, to, g = x + order[r] * x_step + j * item, out + order[r] * out_step + j * item, y + 4 * r * PITCH
            if rank == 1 and not keep_norm:
                _add(kind, at, read(_ZERO, g, 0), _ZERO, first, to, n)
            elif TILE // 2 < rank <= TILE and not keep_norm:
                _lifted(kind, at, to, _tile(g, 0), _eight(first, step, rank), n)
            else:
                _lift(w, g, rank, first, step, n)
                _plus(kind, at, w, n)
                ratio = np.float32(1)
                if keep_norm:
                    before, after = _length(kind, at, n), _length(_ZERO, w, n)
                    ratio = np.float32(before / after) if after > VANISHED * before else ratio
                _scaled(kind, w, ratio, to, n)


@njit(**_exact)
def _ordered(own, slots):
    """The numbers of rows, those of each owner one after another."""
    order, starts = np.empty(own.shape[0], np.int64), np.zeros(slots + 2, np.int64)
    for owner in own:
        starts[owner + 2] += 1
    for slot in range(1, slots + 2):
        starts[slot] += starts[slot - 1]
    for i, owner in enumerate(own):
        order[starts[owner + 1]] = i
        starts[owner + 1] += 1
    return order


@njit(**_exact)
def _place(array):
    return np.int64(array.ctypes.data)


@njit(**_exact)
def _kept(*arrays):
    """An array lives until it is last mentioned, whoever has its address."""


@_entry(21)
def edit(
    kind, x, x_step, out, out_step, n, d, item, vectors, vectors_step, narrow, directions, numbers, size, headers, slots,
    owners, owners_step, scale, scale_step, begin, end,
):  # fmt: skip
    """`ops.subspace` of rows that have one slot each, or none: those from `begin` to `end` in the order of their owners.

    Addresses, steps between rows (of x, out and vectors in bytes) and sizes, of a number of x in bytes; owners and scale may
    be 0, `narrow`: vectors are bfloat16. 0: done; 1: not served, and nothing was written.
    """
    own = np.empty(n if owners else 0, np.int64)  # read once: another thread may write meanwhile
    known, changes = 0, 0
    for i in range(n if owners else 1):
        owner = whole(owners, i * owners_step) if owners else 0
        if i == 0 or owner != known:
            changes += 1
            if owner < -1 or owner >= slots or (owner >= 0 and not _serves(_header(headers, owner), directions, size)):
                return 1
            known = owner
        if owners:
            own[i] = owner
    if n >= MANY and changes == 1 and known >= 0 and _header(headers, known)[1] > 2 * TILE:
        return 1
    order = _ordered(own, slots) if changes > 1 else np.arange(n)
    y, w, wide = np.empty((ROWS + 1) * PITCH, np.float32), np.empty(d, np.float32), np.empty(0, np.float32)
    while begin < end:
        owner = own[order[begin]] if owners else 0
        stop = begin + 1 if owners else end
        while stop < end and own[order[stop]] == owner:
            stop += 1
        header = _header(headers, owner) if owner >= 0 else (0, 0, 0, 0, 0)
        mode, rank, project, lift, start = header
        if not _serves(header, directions, size):  # written by another thread meanwhile
            return 1
        across, lift, step = vectors + project * vectors_step, vectors + lift * vectors_step, vectors_step
        if narrow and rank:
            if wide.shape[0] < 2 * rank * d:
                wide = np.empty(2 * rank * d, np.float32)
            first = _place(wide)
            second = first if across == lift else first + 4 * rank * d
            for i in range(rank):
                _widen(lift + i * step, second + 4 * i * d, d)
                if second != first and mode != ADD:
                    _widen(across + i * step, first + 4 * i * d, d)
            across, lift, step = first, second, 4 * d
        slot = mode, rank, rank > 0 and whole(headers, 8 * owner + 6) != 0, numbers + 32 * start
        for block in range(begin, stop, ROWS):
            some, ahead = order[block : min(block + ROWS, stop)], order[block + ROWS : min(block + 2 * ROWS, end)]
            if rank:
                _edit_block(
                    kind, some, ahead, (x, x_step, out, out_step, d, item), slot, (across, lift, step),
                    (scale, scale_step), (_place(y), _place(w)),
                )  # fmt: skip
            else:
                for i in some:
                    copied(x + i * x_step, out + i * out_step, d * item)
        begin = stop
    _kept(y, w, wide)
    return 0


@_entry(16)
def add(
    kind, x, x_step, out, out_step, n, d, item, bank, bank_step, vectors, owners, owners_step, scale, scale_step, begin, end
):  # fmt: skip
    """x + scale · bank[owners] of rows that have one vector each, or none; the bank is of x's kind. Arguments as of `edit`."""
    for i in range(n):
        if not -1 <= whole(owners, i * owners_step) < vectors:
            return 1
    for i in range(begin, end):
        at, to, owner = x + i * x_step, out + i * out_step, whole(owners, i * owners_step)
        if 0 <= owner < vectors:  # written by another thread meanwhile: not followed
            weight = read(_ZERO, scale, i * scale_step) if scale else np.float32(1)
            _add(kind, at, weight, kind, bank + owner * bank_step, to, d)
        else:
            copied(at, to, d * item)
    return 0
