"""The compiled road of the CPU backend: kernels of numba where that is installed, for plain tensors of 32 bits and of bfloat16.

Each function returns None where it does not serve, and PyTorch's calls run. Numba is imported at the first edit that it could
serve, or by `sf.warmup`; its kernels are compiled then, once for a machine.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .backends import backend_of, is_plain, note_write
from .slots import Eight
from .tables import hinge_tables

ALONE = 1 << 19
"""Numbers of x up to which one thread edits them: it takes 0.1 to 0.3 ms, and another is awake after 0.05."""
PARTS = 4
"""Parts of the rows for each thread: one that another program holds up leaves the rest to the others."""

BLOCK = 16
"""Rows that a kernel takes together."""

_ABSENT = 0, 0
_FLOAT, _HALF = np.float32(0), np.uint16(0)  # what tells the kernels the dtype of x: bfloat16 is read as whole numbers


@functools.cache
def kernels() -> ModuleType | None:
    """The compiled kernels; None without numba, or, with a warning, where it fails."""
    try:
        if importlib.util.find_spec("numba") is None:
            return None
        return importlib.import_module(".numba_cpu", __package__)
    except Exception as error:  # whatever a broken or too old installation does
        warnings.warn(
            f"steerfast: numba is installed but cannot compile the kernels of the CPU backend ({type(error).__name__}: {error}); "
            'PyTorch alone runs them. pip install -U "steerfast[cpu]" may help, or pip uninstall numba',
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def hinged(
    x: Tensor, directions: Tensor, count: int, numbers: Callable[[float, int], Eight], number: float, in_place: bool
) -> Tensor | None:
    """x + act(xBᵀ)B, with the rows B = directions, so many, for the eight numbers of a number; tensors of at most 32 bits."""
    compiled = kernels()
    if compiled is None:
        return None
    rows = directions if directions.dim() == 2 else directions[None]
    place = _place(rows)
    if place is None:
        return None
    at, tables = _slot(count, numbers, number)
    return _run(compiled.edit, x, x.shape, (*place, count, *at), None, None, in_place, (directions, tables))


@functools.lru_cache(maxsize=256)
def _slot(rank: int, numbers: Callable[[float, int], Eight], number: float) -> tuple[tuple[int, ...], Any]:
    """The numbers and the header of a bank of one slot: where they stand, and they."""
    with torch.inference_mode(False):
        coefficients, slots = hinge_tables(rank, numbers(number, rank), torch.device("cpu"))
    return (coefficients.data_ptr(), coefficients.shape[0], slots.data_ptr(), 1), (coefficients, slots)


def subspace(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    in_place: bool = False,
) -> Tensor | None:
    """`torch_cpu.subspace`, one slot for each row, for whatever `ops.subspace` is given outside a compiler's trace.

    It looks at everything itself: of a single row, to look twice costs as much as the kernel.
    """
    compiled = kernels()
    if compiled is None or coefficients is None or slots is None:
        return None
    if not is_plain(x, vectors, coefficients, scale) or backend_of(x) != "torch":
        return None
    if type(slots) is not Tensor or (rows is not None and type(rows) is not Tensor):  # whole numbers take no gradient
        return None
    shape, of_rows, numbers, headers = x.shape, vectors.shape, coefficients.shape, slots.shape
    if not (
        shape
        and len(of_rows) == len(numbers) == len(headers) == 2
        and numbers[1] == headers[1] == 8
        and coefficients.dtype is torch.float32
        and slots.dtype is torch.int32
        and shape[-1] == of_rows[1]
        and coefficients.is_contiguous()
        and slots.is_contiguous()
        and vectors.is_cpu
        and coefficients.is_cpu
        and slots.is_cpu
    ):
        return None
    place = _place(vectors)
    if place is None:
        return None
    table = (*place, of_rows[0], coefficients.data_ptr(), numbers[0], slots.data_ptr(), headers[0])
    return _run(compiled.edit, x, shape, table, rows, scale, in_place, (vectors, coefficients, slots))


def add(x: Tensor, bank: Tensor, rows: Tensor, scale: Tensor | None, in_place: bool) -> Tensor | None:
    """`torch_cpu.add`: one vector of bank (S, d) for each row."""
    compiled = kernels()
    if compiled is None or bank.dtype is not x.dtype or (place := _place(bank)) is None:
        return None
    at, step, _ = place
    return _run(compiled.add, x, x.shape, (at, step, bank.shape[0]), rows, scale, in_place, bank)


def _place(rows: Tensor) -> tuple[int, int, int] | None:
    """Of a table of directions: its address, the bytes from one row to the next, and whether it is bfloat16."""
    dtype, (step, beside) = rows.dtype, rows.stride()
    if beside != 1 or rows.is_neg():
        return None
    if dtype is torch.float32:
        return rows.data_ptr(), 4 * step, 0
    return (rows.data_ptr(), 2 * step, 1) if dtype is torch.bfloat16 else None


def _run(
    kernel: Any,
    x: Tensor,
    shape: torch.Size,
    table: tuple[int, ...],
    rows: Tensor | None,
    scale: Tensor | None,
    in_place: bool,
    bank: object,
) -> Tensor | None:
    """A kernel on the rows of x, by one thread or by as many as PyTorch takes; `bank` is what has the memory of the table."""
    dtype = x.dtype
    if dtype is torch.float32:
        kind, size = _FLOAT, 4
    elif dtype is torch.bfloat16:
        kind, size = _HALF, 2
    else:
        return None
    d = shape[-1]
    if not d:
        return None
    step = d * size
    dense = x.is_contiguous()
    if dense:
        n = shape[0] if len(shape) == 2 else x.numel() // d
    elif len(shape) == 2 and x.stride(1) == 1:
        n, step = shape[0], x.stride(0) * size
    else:
        return None
    owners = strengths = _ABSENT
    if rows is not None:
        if rows.dtype is not torch.int32 or not rows.is_cpu or not _is_column(rows.shape, n):
            return None
        owners = rows.data_ptr(), rows.stride()[0]
    if scale is not None:
        if scale.dtype is not torch.float32 or scale.is_neg() or not scale.is_cpu or not _is_column(scale.shape, n):
            return None
        if rows is not None and rows.shape != scale.shape:
            return None
        strengths = scale.data_ptr(), scale.stride()[0]
    first = x.data_ptr()
    if (
        not (n and first and table[0]) or x.is_neg()
    ):  # nothing, no memory, or a view that negates: PyTorch knows what then
        return None
    if in_place:
        if x.is_inference() and not torch.is_inference_mode_enabled():  # PyTorch refuses, and says why
            return None
        out = x
    else:
        out = torch.empty_like(x) if dense else torch.empty_like(x, memory_format=torch.contiguous_format)
    arguments = (
        kind, first, step, out.data_ptr(), step if in_place else d * size, n, d, size, *table, *owners, *strengths, 0, n
    )  # fmt: skip
    alone = n * d <= ALONE or torch.get_num_threads() == 1
    if kernel(*arguments) if alone else _together(kernel, arguments[:-2], n, (x, out, rows, scale, bank)):
        return None
    if in_place:
        note_write(x)
    return out


def _is_column(shape: torch.Size, n: int) -> bool:
    """(n,) or (n, 1)."""
    return shape == (n,) or shape == (n, 1)


def _together(kernel: Any, arguments: tuple[Any, ...], n: int, owners: object) -> int:
    """Rows in parts, which this thread and others take until none is left; it does not wait for one that has not begun.

    A kernel knows only addresses. Each thread holds the owners of that memory, since this one may be interrupted meanwhile.
    """
    threads = torch.get_num_threads()
    size = BLOCK * -(-n // (BLOCK * PARTS * threads))
    parts = deque((begin, min(begin + size, n)) for begin in range(0, n, size))

    done: SimpleQueue[int | BaseException] = SimpleQueue()
    count = len(parts)

    def take(_: object) -> None:
        while parts:
            try:
                part = parts.popleft()
            except IndexError:  # another thread took the last one
                return
            try:
                done.put(kernel(*arguments, *part))
            except BaseException as error:
                done.put(error)
                raise

    try:
        for _ in range(min(threads, count) - 1):
            _pool(threads - 1).submit(take, owners)
    except (
        RuntimeError
    ):  # no thread can be started, or Python ends: what was asked would wait for one, and hold its memory
        _pool.cache_clear()
    try:
        take(owners)
        return max(_status(done.get()) for _ in range(count))
    finally:
        parts.clear()


def _status(found: int | BaseException) -> int:
    if isinstance(found, BaseException):
        raise found
    return found


@functools.lru_cache(maxsize=1)
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, "steerfast")


if hasattr(os, "register_at_fork"):  # threads do not follow a process into its child
    os.register_at_fork(after_in_child=_pool.cache_clear)
