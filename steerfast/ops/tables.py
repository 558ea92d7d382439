"""Tables of a bank of one slot, from numbers that the host knows: filled on the device, so that no copy waits for it.

A number reaches the device as an argument of a kernel that fills, which a CUDA graph captures like any other. Tables are kept for
calls with the same numbers on the same stream, whose order is the order of their filling, their use and the next use of their
memory. A graph that is being captured takes tables that are there, which are then kept for good, or else fills its own anew each
time it runs; those are of its memory and no other call sees them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from .slots import AFFINE, FLOW, HINGE, SOLVE, Eight, Header, constants
from .solvers import Field, Scheme, scheme_rows

Made = TypeVar("Made")
KEPT = 256  # tables that a maker keeps before it begins anew


class Kept(Generic[Made]):
    """A function of numbers and a device whose tables are kept.

    Args:
        make: Makes tables from hashable arguments, of which the last is the device.
    """

    def __init__(self, make: Callable[..., Made]) -> None:
        self._make = make
        self._of_stream: dict[tuple[Any, ...], Made] = {}  # by arguments and stream
        self._of_graphs: dict[tuple[Any, ...], Made] = {}  # by arguments

    def __call__(self, *arguments: Any) -> Made:
        """The tables, on the current stream of the device."""
        if torch.compiler.is_compiling():  # a graph of a compiler keeps what it makes
            return self._make(*arguments)
        stream, device = 0, arguments[-1]
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return self._for_graph(arguments)
            stream = torch.cuda.current_stream(device).cuda_stream
        key = (*arguments, stream)
        found = self._of_stream.get(key)
        return self._new(key) if found is None else found

    def _new(self, key: tuple[Any, ...]) -> Made:
        made = self._filled(key[:-1])
        if any(
            isinstance(one, Tensor) and type(one) is not Tensor
            for one in (made if isinstance(made, tuple) else (made,))
        ):
            return made  # of a mode that makes no memory, such as FakeTensorMode: no other call can use them
        if len(self._of_stream) >= KEPT:
            self._of_stream.clear()
        self._of_stream[key] = made
        return made

    def _for_graph(self, arguments: tuple[Any, ...]) -> Made:
        """Tables that some stream has filled before the capture began, or those that the graph will fill."""
        if arguments not in self._of_graphs:
            there = [made for key, made in list(self._of_stream.items()) if key[:-1] == arguments]
            if not there:
                return self._filled(arguments)
            self._of_graphs[arguments] = there[0]
        return self._of_graphs[arguments]

    def _filled(self, arguments: tuple[Any, ...]) -> Made:
        if not torch.is_inference_mode_enabled():
            return self._make(*arguments)
        with torch.inference_mode(False):  # a later gradient can use them
            return self._make(*arguments)


def filled(rows: Sequence[tuple[int, Sequence[float]]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows of eight numbers, each given with how often it stands there, as (m, 8)."""
    table = torch.zeros(sum(count for count, _ in rows), 8, dtype=dtype, device=device)
    start = 0
    for count, numbers in rows:
        block = table[start : start + count]
        for column, number in enumerate(numbers):
            if number != 0:
                block[:, column].fill_(number)
        start += count
    return table


def with_numbers(table: Tensor, numbers: dict[tuple[int, int, int], float], device: torch.device) -> Tensor:
    """A table in which the numbers (first row, last row, column) are 0, with them: a launch for each that is not 0.

    The same table where all are 0, else a new one.
    """
    for place, number in numbers.items():
        if number != 0:
            table = torch.add(table, marked(table.shape[0], *place, table.dtype, device), alpha=number)
    return table


@Kept
def marked(size: int, first: int, last: int, column: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, 8): 1 in rows `first` to `last` of a column, 0 elsewhere."""
    table = torch.zeros(size, 8, dtype=dtype, device=device)
    table[first : last + 1, column].fill_(1)
    return table


@Kept
def header(slot: Header, device: torch.device) -> Tensor:
    """`slots` of a bank of one slot."""
    return filled([(1, slot)], torch.int32, device)


@Kept
def plain(rank: int, extra: tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The coefficients of a slot whose directions have no numbers yet, with further rows."""
    return filled([(1, constants()), (rank, ()), *((1, numbers) for numbers in extra)], dtype, device)


@Kept
def hinge_tables(rank: int, numbers: Eight, device: torch.device) -> tuple[Tensor, Tensor]:
    """(coefficients, slots) of one slot whose directions share their eight numbers."""
    places = {(1, rank, column): number for column, number in enumerate(numbers)}
    table = with_numbers(plain(rank, (), torch.float32, device), places, device)
    return table, header(Header(HINGE, rank), device)


@Kept
def affine_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(coefficients, slots) of one elementwise affine map."""
    return filled([(3, constants())], torch.float32, device), header(Header(AFFINE, 2), device)


@Kept
def loreft_tables(rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(constants, slots) of one LoReFT: B in the first rows of vectors, C in the next."""
    return filled([(1, constants())], dtype, device), header(Header(HINGE, rank, lift=rank), device)


@Kept
def flow_tables(rank: int, steps: int, how: Scheme, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """(coefficients, slots) of one flow; the numbers of its path and, in rows 1 to `rank`, of its barrier are 0."""
    extra = tuple(map(tuple, scheme_rows(Field(None, None), how)))
    mode = FLOW if how.plain else SOLVE
    return plain(rank, extra, dtype, device), header(
        Header(mode, rank, steps=how.count(steps), extra=len(extra)), device
    )
