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
CHUNK = 512
"""Numbers of a row that are taken at a time: those of eight directions fill half of the first cache."""
MOST = 64
"""Directions of a slot; of more, a library's products cost less."""
TILE = 8
"""Directions that share one reading of x."""

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


@njit(**_in_lanes)
def _dots(kind, at, first, step, count, n, y):
    """y += the products of a row with up to eight directions, `step` bytes apart; those beyond `count` are the last once more."""
    x, last = _row(kind, at, n), count - 1
    b0, b1 = _row(_zero, first, n), _row(_zero, first + min(1, last) * step, n)
    b2, b3 = _row(_zero, first + min(2, last) * step, n), _row(_zero, first + min(3, last) * step, n)
    b4, b5 = _row(_zero, first + min(4, last) * step, n), _row(_zero, first + min(5, last) * step, n)
    b6, b7 = _row(_zero, first + min(6, last) * step, n), _row(_zero, first + min(7, last) * step, n)
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
def _square(kind, at, n):
    """Squared length, in float64."""
    x, s = _row(kind, at, n), 0.0
    for j in range(n):
        v = np.float64(_wide(x[j]))
        s += v * v
    return s


@njit(**_exact)
def _sum(w, begins, g, first, step, count, n):
    """w += g·C of up to eight directions, or = where it begins."""
    last = count - 1
    c0, c1 = _row(_zero, first, n), _row(_zero, first + min(1, last) * step, n)
    c2, c3 = _row(_zero, first + min(2, last) * step, n), _row(_zero, first + min(3, last) * step, n)
    c4, c5 = _row(_zero, first + min(4, last) * step, n), _row(_zero, first + min(5, last) * step, n)
    c6, c7 = _row(_zero, first + min(6, last) * step, n), _row(_zero, first + min(7, last) * step, n)
    g0, g1, g2, g3 = g[0], g[1], g[2], g[3]
    g4 = g[4]
    g5 = g[5] if count > 5 else _zero
    g6 = g[6] if count > 6 else _zero
    g7 = g[7] if count > 7 else _zero
    for j in range(n):
        before = _zero if begins else w[j]
        w[j] = before + (
            g0 * c0[j] + g1 * c1[j] + g2 * c2[j] + g3 * c3[j] + g4 * c4[j] + g5 * c5[j] + g6 * c6[j] + g7 * c7[j]
        )


@njit(**_exact)
def _sum_one(w, begins, g, first, n):
    c = _row(_zero, first, n)
    for j in range(n):
        w[j] = (_zero if begins else w[j]) + g * c[j]


@njit(**_exact)
def _plus(kind, w, at, n):
    """w += x."""
    x = _row(kind, at, n)
    for j in range(n):
        w[j] += _wide(x[j])


@njit(**_exact)
def _store(kind, w, ratio, at, n):
    out = _row(kind, at, n)
    for j in range(n):
        out[j] = _narrow(kind, ratio * w[j])


@njit(**_exact)
def _copy(kind, at, to, n):
    x, out = _row(kind, at, n), _row(kind, to, n)
    for j in range(n):
        out[j] = x[j]


@njit(**_exact)
def _widen(kind, at, w, n):
    x = _row(kind, at, n)
    for j in range(n):
        w[j] = _wide(x[j])


@njit(**_exact)
def _add(kind, at, weight, vector, to, n):
    x, v, out = _row(kind, at, n), _row(kind, vector, n), _row(kind, to, n)
    if at == to:  # said apart: memory that may overlap would be taken number by number
        for j in range(n):
            out[j] = _narrow(kind, _wide(out[j]) + weight * _wide(v[j]))
    else:
        for j in range(n):
            out[j] = _narrow(kind, _wide(x[j]) + weight * _wide(v[j]))


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
def _relu(number):
    return _zero if number < _zero else number


@njit(**_exact)
def _hinge(y, c):
    """`torch_backend.hinge` of one number, without the terms that are nothing."""
    g = c[0]
    if c[1] != _zero:
        g += c[1] * y
    if c[2] != _zero:
        g += c[2] * _relu(y - c[3])
    if c[4] != _zero:
        g += c[4] * _relu(y - c[5])
    if c[6] != _zero:
        g += c[6] if y > c[7] else _zero
    return g


@njit(**_exact)
def _act(mode, rank, y, c, weight):
    """y becomes g; c holds the slot's constants, and then eight numbers of each direction."""
    if mode == HINGE:
        for i in range(rank):
            y[i] = weight * _hinge(y[i], c[8 * i + 8 : 8 * i + 16])
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
def _lift(w, g, rank, first, step, n):
    """w = g·C."""
    for i in range(0, rank, TILE):
        count = min(TILE, rank - i)
        if count > TILE // 2:
            _sum(w, i == 0, g[i:], first + i * step, step, count, n)
        else:
            for one in range(i, i + count):
                _sum_one(w, one == 0, g[one], first + one * step, n)


@njit(**_exact)
def _project(kind, at, y, rank, first, step, n):
    """y += Bx."""
    for i in range(0, rank, TILE):
        count = min(TILE, rank - i)
        if count > TILE // 2:
            _dots(kind, at, first + i * step, step, count, n, y[i:])
        else:
            for one in range(i, i + count):
                y[one] += _dot(kind, at, first + one * step, n)


@njit(**_exact)
def _widened(first, step, rows):
    """Where rows of bfloat16 stand in float32 now."""
    for i in range(rows.shape[0]):
        _widen(_HALF, first + i * step, rows[i], rows.shape[1])
    return np.int64(rows.ctypes.data)


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
def _edit_block(places, some, header, c, basis, strengths, buffers):
    """A few rows after one slot: projected chunk by chunk, so that the directions stay in the first cache, and lifted so."""
    kind, x, x_step, out, out_step, d = places
    across, lift, step = basis
    scaled, scales, scale_step = strengths
    y, w = buffers
    mode, rank, keep_norm = header[0], np.int64(header[1]), header[6] != 0
    m, item = some.shape[0], _bytes(kind)
    y[:m, :rank] = _zero
    if mode != ADD:
        for j in range(0, d, CHUNK):
            for r in range(m):
                _project(kind, x + some[r] * x_step + j * item, y[r], rank, across + 4 * j, step, min(CHUNK, d - j))
    for r in range(m):
        _act(mode, rank, y[r], c, c[2] * (scales[some[r] * scale_step] if scaled else np.float32(1)))
    span = d if keep_norm else CHUNK
    for j in range(0, d, span):
        for r in range(m):
            n, at = min(span, d - j), x + some[r] * x_step + j * item
            _lift(w[:n], y[r], rank, lift + 4 * j, step, n)
            ratio = np.float32(1)
            if keep_norm:
                before = math.sqrt(_square(kind, at, n))
                _plus(kind, w, at, n)
                after = math.sqrt(_square(_zero, np.int64(w.ctypes.data), n))
                ratio = np.float32(before / after) if after > VANISHED * before else ratio
            else:
                _plus(kind, w, at, n)
            _store(kind, w, ratio, out + some[r] * out_step + j * item, n)


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
    buffers = np.empty((ROWS, MOST), np.float32), np.empty(d, np.float32)
    while begin < end:
        owner = np.int64(owners[order[begin] * rows_step]) if rows else 0
        stop = begin + 1 if rows else end
        while stop < end and owners[order[stop] * rows_step] == owner:
            stop += 1
        header = table[8 * owner : 8 * owner + 8].copy() if owner >= 0 else np.zeros(8, np.int32)
        if header[1] == 0:
            for i in order[begin:stop]:
                if x != out:
                    _copy(kind, x + i * x_step, out + i * out_step, d)
        elif not _serves(header, directions, size):  # written by another thread meanwhile
            return 1
        else:
            rank, same = np.int64(header[1]), header[2] == header[3]
            across, lift = vectors + header[2] * vectors_step, vectors + header[3] * vectors_step
            step = vectors_step
            wide = np.empty((rank if same else 2 * rank, d) if narrow else (1, 1), np.float32)
            if narrow:
                step = 4 * d
                across = _widened(across, vectors_step, wide[:rank]) if header[0] != ADD else 0
                lift = across if same and header[0] != ADD else _widened(lift, vectors_step, wide[-rank:])
            c = _row(_zero, numbers + 32 * np.int64(header[4]), 8 + 8 * rank)
            places = (kind, x, x_step, out, out_step, d)
            for first in range(begin, stop, ROWS):
                some = order[first : min(first + ROWS, stop)]
                _edit_block(places, some, header, c, (across, lift, step), (scale != 0, scales, scale_step), buffers)
        begin = stop
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
            _add(kind, at, weight, bank + owner * bank_step, to, d)
        elif at != to:
            _copy(kind, at, to, d)
    return 0
