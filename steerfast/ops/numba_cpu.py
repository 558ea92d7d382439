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
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

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
PITCH = MOST + TILE
"""From one row's y to the next; what is behind it is 0."""

_exact = {"fastmath": {"contract"}, "error_model": "numpy"}
_in_lanes = {"fastmath": {"contract", "reassoc"}, "error_model": "numpy"}
_zero = np.float32(0)
_HALF, _WHOLE = np.uint16(0), np.int32(0)
_half = np.uint32(16)


def _entry(numbers: int) -> Callable[..., Any]:
    """Compile now, for float32 and for bfloat16 (as uint16), what takes so many whole numbers; it runs without holding Python."""
    arguments = [types.int64] * numbers
    signatures = [types.int64(kind, *arguments) for kind in (types.float32, types.uint16)]

    def compiled(function: Any) -> Any:
        try:
            return njit(signatures, nogil=True, cache=True, **_exact)(function)
        except RuntimeError:  # no folder can be written
            return njit(signatures, nogil=True, **_exact)(function)

    return compiled


# --- numbers and rows in memory ---------------------------------------------------------------------------------------------


def _reinterpreted(source, target, to: Callable[[Any, Any], Any]):
    @intrinsic
    def cast(context, value):
        return target(source), lambda context, builder, signature, values: to(builder, values[0])

    return cast


_as_float = _reinterpreted(types.uint32, types.float32, lambda builder, v: builder.bitcast(v, ir.FloatType()))
_as_bits = _reinterpreted(types.float32, types.uint32, lambda builder, v: builder.bitcast(v, ir.IntType(32)))
_places = {
    kind: _reinterpreted(types.int64, types.CPointer(kind), lambda builder, v, bits=bits: builder.inttoptr(v, bits.as_pointer()))
    for kind, bits in ((types.float32, ir.FloatType()), (types.uint16, ir.IntType(16)), (types.int32, ir.IntType(32)))
}
_float_at, _half_at, _whole_at = _places.values()


def _row(kind, address: int, n: int):
    """n numbers of this kind that stand there."""


def _bytes(kind):
    """Of a number of x."""


def _wide(number):
    """A number of x as float32."""


def _narrow(kind, number):
    """A float32 as a number of x: rounded to the nearest, ties to even."""


@overload(_row)
def _row_of(kind, address, n):
    if kind == types.float32:
        return lambda kind, address, n: carray(_float_at(address), (n,))
    if kind == types.uint16:
        return lambda kind, address, n: carray(_half_at(address), (n,))
    return lambda kind, address, n: carray(_whole_at(address), (n,))


@overload(_bytes)
def _bytes_of(kind):
    return (lambda kind: 4) if kind == types.float32 else (lambda kind: 2)


@overload(_wide)
def _wide_of(number):
    if number == types.float32:
        return lambda number: number
    return lambda number: _as_float(np.uint32(number) << _half)


@overload(_narrow)
def _narrow_of(kind, number):
    if kind == types.float32:
        return lambda kind, number: number

    def to_nearest(kind, number):
        bits = _as_bits(number)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> _half) & np.uint32(1))) >> _half
        return np.uint16(rounded) if number == number else np.uint16(0x7FC0)

    return to_nearest


# --- one row, or a chunk of it ----------------------------------------------------------------------------------------------


@njit(**_exact)
def _eight(first, step, count, n):
    """Eight rows, `step` bytes apart; those beyond `count` are the last once more."""
    last = count - 1
    b0, b1 = _row(_zero, first, n), _row(_zero, first + min(1, last) * step, n)
    b2, b3 = _row(_zero, first + min(2, last) * step, n), _row(_zero, first + min(3, last) * step, n)
    b4, b5 = _row(_zero, first + min(4, last) * step, n), _row(_zero, first + min(5, last) * step, n)
    b6, b7 = _row(_zero, first + min(6, last) * step, n), _row(_zero, first + min(7, last) * step, n)
    return b0, b1, b2, b3, b4, b5, b6, b7


@njit(**_in_lanes)
def _dots(kind, at, first, step, count, n, to):
    """y += the products of a row with up to eight directions."""
    x, y = _row(kind, at, n), _row(_zero, to, TILE)
    b0, b1, b2, b3, b4, b5, b6, b7 = _eight(first, step, count, n)
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = _zero
    for j in range(n):
        v = _wide(x[j])
        s0 += v * b0[j]
        s1 += v * b1[j]
        s2 += v * b2[j]
        s3 += v * b3[j]
        s4 += v * b4[j]
        s5 += v * b5[j]
        s6 += v * b6[j]
        s7 += v * b7[j]
    for i, s in enumerate((s0, s1, s2, s3, s4, s5, s6, s7)):
        if i < count:
            y[i] += s


@njit(**_in_lanes)
def _dot(kind, at, first, n):
    x, b, s = _row(kind, at, n), _row(_zero, first, n), _zero
    for j in range(n):
        s += _wide(x[j]) * b[j]
    return s


@njit(**_in_lanes)
def _length(kind, at, n):
    """Of a row, as PyTorch takes it: the squares add up in float64."""
    x, s = _row(kind, at, n), 0.0
    for j in range(n):
        v = np.float64(_wide(x[j]))
        s += v * v
    return math.sqrt(s)


@njit(**_exact)
def _mixed(g, c, j):
    return (
        g[0] * c[0][j] + g[1] * c[1][j] + g[2] * c[2][j] + g[3] * c[3][j]
        + g[4] * c[4][j] + g[5] * c[5][j] + g[6] * c[6][j] + g[7] * c[7][j]
    )  # fmt: skip


@njit(**_exact)
def _sum(to, begins, g, first, step, count, n):
    """w += g·C of up to eight directions, or = where it begins."""
    w, c = _row(_zero, to, n), _eight(first, step, count, n)
    for j in range(n):
        w[j] = (_zero if begins else w[j]) + _mixed(g, c, j)


@njit(**_exact)
def _sum_one(to, begins, g, first, n):
    w, c = _row(_zero, to, n), _row(_zero, first, n)
    for j in range(n):
        w[j] = (_zero if begins else w[j]) + g * c[j]


@njit(**_exact)
def _lifted(kind, at, to, g, first, step, count, n):
    """x + g·C of up to eight directions. Memory that may overlap is taken number by number, so x in its place is said apart."""
    x, out, c = _row(kind, at, n), _row(kind, to, n), _eight(first, step, count, n)
    if at == to:
        for j in range(n):
            out[j] = _narrow(kind, _wide(out[j]) + _mixed(g, c, j))
    else:
        for j in range(n):
            out[j] = _narrow(kind, _wide(x[j]) + _mixed(g, c, j))


@njit(**_exact)
def _add(kind, at, weight, of, vector, to, n):
    """x + weight · vector, a vector of that kind."""
    x, v, out = _row(kind, at, n), _row(of, vector, n), _row(kind, to, n)
    if at == to:
        for j in range(n):
            out[j] = _narrow(kind, _wide(out[j]) + weight * _wide(v[j]))
    else:
        for j in range(n):
            out[j] = _narrow(kind, _wide(x[j]) + weight * _wide(v[j]))


@njit(**_exact)
def _plus(kind, at, to, n):
    """w += x."""
    x, w = _row(kind, at, n), _row(_zero, to, n)
    for j in range(n):
        w[j] += _wide(x[j])


@njit(**_exact)
def _store(kind, of, ratio, to, n):
    w, out = _row(_zero, of, n), _row(kind, to, n)
    for j in range(n):
        out[j] = _narrow(kind, ratio * w[j])


@njit(**_exact)
def _copy(kind, at, to, n):
    x, out = _row(kind, at, n), _row(kind, to, n)
    for j in range(n):
        out[j] = x[j]


@njit(**_exact)
def _widen(kind, at, to, n):
    x, w = _row(kind, at, n), _row(_zero, to, n)
    for j in range(n):
        w[j] = _wide(x[j])


# --- rows of a bank ---------------------------------------------------------------------------------------------------------


@njit(**_exact)
def _serves(header, directions, size):
    """Whether a slot is empty, or of a mode that is served and within the tables of its bank."""
    mode, rank, last = header[0], header[1], directions - header[1]
    if rank == 0:
        return True
    if not (mode == HINGE or mode == PUSH or (mode == ROTATE and rank == 2) or (mode == ADD and rank == 1)):
        return False
    inside = 0 <= header[2] <= last and 0 <= header[3] <= last
    return inside and 0 < rank <= MOST and 0 <= header[4] < size - rank


@njit(**_exact)
def _tile(g, i):
    return g[i], g[i + 1], g[i + 2], g[i + 3], g[i + 4], g[i + 5], g[i + 6], g[i + 7]


@njit(**_exact)
def _relu(number):
    return _zero if number < _zero else number


@njit(**_exact)
def _hinge(y, m, rank, c):
    """`torch_backend.hinge` of m rows, without the terms that are nothing."""
    for k in range(rank):
        c0, c1, c2, c3, c4, c5, c6, c7 = _tile(c, 8 * k + 8)
        for r in range(m):
            at = r * PITCH + k
            v, g = y[at], c0
            if c1 != _zero:
                g += c1 * v
            if c2 != _zero:
                g += c2 * _relu(v - c3)
            if c4 != _zero:
                g += c4 * _relu(v - c5)
            if c6 != _zero:
                g += c6 if v > c7 else _zero
            y[at] = g


@njit(**_exact)
def _act(mode, rank, y, c, weight):
    """One row's y becomes g; c holds the slot's constants, and then eight numbers of each direction."""
    if mode == HINGE:
        for i in range(rank):
            y[i] *= weight
    elif mode == PUSH:
        total = _zero
        for i in range(rank):
            y[i] = _relu(c[3] - _relu(y[i] + c[8 * i + 8]))
            total += y[i]
        share = weight * c[3] / total if total > _zero else _zero
        for i in range(rank):
            y[i] *= share
    elif mode == ROTATE:
        length, angle = math.sqrt(np.float64(y[0]) ** 2 + np.float64(y[1]) ** 2), np.float64(weight * c[3])
        turns = c[4] == _zero or y[0] > _zero
        y[0] = np.float32(length * math.cos(angle) - y[0]) if turns else _zero
        y[1] = np.float32(length * math.sin(angle) - y[1]) if turns else _zero
    else:
        y[0] = weight


@njit(**_exact)
def _project(kind, at, to, rank, first, step, n):
    """y += Bx."""
    y = _row(_zero, to, rank)
    for i in range(0, rank, TILE):
        count = min(TILE, rank - i)
        if count > TILE // 2:
            _dots(kind, at, first + i * step, step, count, n, to + 4 * i)
        else:
            for one in range(i, i + count):
                y[one] += _dot(kind, at, first + one * step, n)


@njit(**_exact)
def _lift(to, of, rank, first, step, n):
    """w = g·C; behind the numbers of g stand zeros."""
    g = _row(_zero, of, rank)
    for i in range(0, rank, TILE):
        count = min(TILE, rank - i)
        if count > TILE // 2:
            _sum(to, i == 0, _tile(g, i), first + i * step, step, count, n)
        else:
            for one in range(i, i + count):
                _sum_one(to, one == 0, g[one], first + one * step, n)


@njit(**_exact)
def _widened(first, step, rank, d, to):
    """Where rows of bfloat16 stand in float32 now."""
    for i in range(rank):
        _widen(_HALF, first + i * step, to + 4 * d * i, d)
    return to


@njit(**_exact)
def _ordered(owners, rows_step, n, slots):
    """The numbers of rows, those of each owner one after another."""
    order = np.empty(n, np.int64)
    starts = np.zeros(slots + 2, np.int64)
    for i in range(n):
        starts[owners[i * rows_step] + 2] += 1
    for slot in range(1, slots + 2):
        starts[slot] += starts[slot - 1]
    for i in range(n):
        owner = owners[i * rows_step] + 1
        order[starts[owner]] = i
        starts[owner] += 1
    return order


@njit(**_exact)
def _place(array):
    return np.int64(array.ctypes.data)


@njit(**_exact)
def _kept(y, w, wide):
    """An array lives until it is last mentioned, whoever has its address."""
    return y.shape[0] + w.shape[0] + wide.shape[0]


@njit(**_exact)
def _edit_block(kind, order, begin, m, places, slot, basis, strengths, scratch):
    """A few rows after one slot: projected chunk by chunk, so that the directions stay in the first cache, and lifted so."""
    x, x_step, out, out_step, d = places
    mode, rank, keep_norm, numbers = slot
    across, lift, step = basis
    scale, scale_step = strengths
    y_at, w = scratch
    item, c, scales = _bytes(kind), _row(_zero, numbers, 8 + 8 * rank), _row(_zero, scale, 1)
    y = _row(_zero, y_at, m * PITCH)
    y[:] = _zero
    if mode != ADD:
        for j in range(0, d, CHUNK):
            for r in range(m):
                at = x + order[begin + r] * x_step + j * item
                _project(kind, at, y_at + 4 * r * PITCH, rank, across + 4 * j, step, min(CHUNK, d - j))
    if mode == HINGE:
        _hinge(y, m, rank, c)
    for r in range(m):
        weight = c[2] * (scales[order[begin + r] * scale_step] if scale else np.float32(1))
        _act(mode, rank, _row(_zero, y_at + 4 * r * PITCH, rank), c, weight)
    span = d if keep_norm else CHUNK
    for j in range(0, d, span):
        n = min(span, d - j)
        for r in range(m):
            i, ratio = order[begin + r], np.float32(1)
            at = x + i * x_step + j * item
            to, g = out + i * out_step + j * item, y_at + 4 * r * PITCH
            if rank == 1 and not keep_norm:
                _add(kind, at, y[r * PITCH], _zero, lift + 4 * j, to, n)
            elif TILE // 2 < rank <= TILE and not keep_norm:
                _lifted(kind, at, to, _tile(y, r * PITCH), lift + 4 * j, step, rank, n)
            else:
                _lift(w, g, rank, lift + 4 * j, step, n)
                _plus(kind, at, w, n)
                if keep_norm:
                    before, after = _length(kind, at, n), _length(_zero, w, n)
                    ratio = np.float32(before / after) if after > VANISHED * before else ratio
                _store(kind, w, ratio, to, n)


@_entry(20)
def edit(
    kind, x, x_step, out, out_step, n, d, vectors, vectors_step, narrow, directions, numbers, size, headers, slots, rows,
    rows_step, scale, scale_step, begin, end,
):  # fmt: skip
    """`ops.subspace` of rows that have one slot each, or none: those from `begin` to `end` in the order of their owners.

    Addresses, steps between rows (of x, out and vectors in bytes) and sizes; rows and scale may be 0, `narrow`: vectors are
    bfloat16. 0: done; 1: not served, and nothing was written.
    """
    table = _row(_WHOLE, headers, 8 * slots)
    owners, scales = _row(_WHOLE, rows, n * rows_step), _row(_zero, scale, n * scale_step)
    known = np.int64(-1)
    for i in range(n if rows else 1):
        owner = np.int64(owners[i * rows_step]) if rows else 0
        if owner != known:
            if owner < -1 or owner >= slots or (owner >= 0 and not _serves(table[8 * owner :], directions, size)):
                return 1
            known = owner
    order = _ordered(owners, rows_step, n, slots) if rows else np.arange(n)
    y, w, wide = np.empty(ROWS * PITCH, np.float32), np.empty(d, np.float32), np.empty(0, np.float32)
    places, strengths = (x, x_step, out, out_step, d), (scale, scale_step)
    scratch = _place(y), _place(w)
    while begin < end:
        owner = np.int64(owners[order[begin] * rows_step]) if rows else 0
        stop = begin + 1 if rows else end
        while stop < end and owners[order[stop] * rows_step] == owner:
            stop += 1
        if owner == -1 or table[8 * owner + 1] == 0:
            for i in order[begin:stop]:
                if x != out:
                    _copy(kind, x + i * x_step, out + i * out_step, d)
            begin = stop
            continue
        header = table[8 * owner : 8 * owner + 8].copy()
        if not _serves(header, directions, size):  # written by another thread meanwhile
            return 1
        mode, rank = header[0], np.int64(header[1])
        across, lift, step = vectors + header[2] * vectors_step, vectors + header[3] * vectors_step, vectors_step
        if narrow:
            if wide.shape[0] < 2 * rank * d:
                wide = np.empty(2 * rank * d, np.float32)
            same, step = across == lift, 4 * d
            if mode != ADD:
                across = _widened(across, vectors_step, rank, d, _place(wide))
            lift = across if same and mode != ADD else _widened(lift, vectors_step, rank, d, _place(wide) + rank * step)
        slot, basis = (mode, rank, header[6] != 0, numbers + 32 * np.int64(header[4])), (across, lift, step)
        for first in range(begin, stop, ROWS):
            _edit_block(kind, order, first, min(ROWS, stop - first), places, slot, basis, strengths, scratch)
        begin = stop
    _kept(y, w, wide)
    return 0


@_entry(15)
def add(
    kind, x, x_step, out, out_step, n, d, bank, bank_step, vectors, rows, rows_step, scale, scale_step, begin, end
):
    """x + scale · bank[rows] of rows that have one vector each, or none; the bank is of x's kind. Arguments as of `edit`."""
    owners, scales = _row(_WHOLE, rows, n * rows_step), _row(_zero, scale, n * scale_step)
    for i in range(n):
        if owners[i * rows_step] < -1 or owners[i * rows_step] >= vectors:
            return 1
    for i in range(begin, end):
        at, to, owner = x + i * x_step, out + i * out_step, np.int64(owners[i * rows_step])
        if owner >= 0:
            weight = scales[i * scale_step] if scale else np.float32(1)
            _add(kind, at, weight, kind, bank + owner * bank_step, to, d)
        elif at != to:
            _copy(kind, at, to, d)
    return 0
