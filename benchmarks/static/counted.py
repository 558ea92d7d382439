"""Bytes and trips by counting: the kernels run under Triton's interpreter, and their loads and stores are written down.

    TRITON_INTERPRET=1 python -m static.counted NAME …      (from benchmarks/; prints one JSON object)

A launch of thousands of programs is not interpreted whole: two neighbours from its middle run, and what they did on average
is what each did. What both touch is shared. Their results are not stored: all that a later launch reads of them is zero, so its
rare branches stay shut (no repair after an encode).
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import numpy as np
import torch
from interpreted import quicken, roomy
from triton.runtime import interpreter

from .cases import EVERY
from .constants import SECTOR
from .launches import as_on_a_gpu, kernels_chosen
from .lines import is_kernel, statement


class Program:
    """What one program of a launch did."""

    def __init__(self) -> None:
        self.moved: Counter[tuple[str, str]] = Counter()  # (tensor, read or write) -> bytes in whole sectors
        self.sectors: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
        self.touched: list[
            tuple[tuple[str, str], np.ndarray]
        ] = []  # the same, in the order in which they were asked for
        self.lines: Counter[tuple[str, int]] = Counter()  # (file, line) -> times reached
        self.calls: Counter[str] = Counter()  # function -> times entered
        self.accesses: dict[str, dict[str, Any]] = {}  # statement -> tensor and bytes of one load or store

    def distinct(self, key: tuple[str, str]) -> np.ndarray:
        return np.unique(np.concatenate(self.sectors[key]))

    def statements(self) -> dict[str, int]:
        """Statement -> times run. One that spans lines reaches its first again after each call inside: the least counts."""
        found: dict[str, int] = {}
        for (file, line), times in self.lines.items():
            this = statement(file, line)
            if not this.head and not this.definition:
                found[this.name] = min(times, found.get(this.name, times))
        return found


class Watch:
    """Sees every load, store and statement of the programs that run."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.spans = [(name, t.data_ptr(), t.data_ptr() + _reach(t)) for name, t in tensors.items()]
        self.program = Program()

    def access(self, kind: str, pointers: Any, mask: np.ndarray) -> None:
        mask = np.broadcast_to(np.asarray(mask, dtype=bool), np.shape(pointers.data))
        addresses = np.asarray(pointers.data)[mask].astype(np.uint64).ravel()
        if addresses.size:
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            name = next((n for n, first, last in self.spans if first <= addresses[0] < last), "elsewhere")
            sectors = np.unique(addresses // SECTOR)
            self.program.moved[name, kind] += SECTOR * len(sectors)
            self.program.sectors[name, kind].append(sectors)
            self.program.touched.append(((name, kind), sectors))
            frame = sys._getframe(2)
            while frame is not None and not is_kernel(frame.f_code.co_filename):
                frame = frame.f_back
            if frame is not None:
                seen = {"tensor": name, "kind": kind, "bytes": int(size * len(np.unique(addresses)))}
                where = statement(frame.f_code.co_filename, frame.f_lineno).name
                before = self.program.accesses.get(where, seen)
                self.program.accesses[where] = max(before, seen, key=lambda access: access["bytes"])

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not is_kernel(frame.f_code.co_filename):
            return None
        self.program.calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
        return self._line

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.program.lines[frame.f_code.co_filename, frame.f_lineno] += 1
        return self._line


def _reach(t: torch.Tensor) -> int:
    """Bytes from the first element of a view to behind its last."""
    if t.numel() == 0:
        return 0
    return (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1) * t.element_size()


def count(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The launches of a call: grid, tensors, and what a program did."""
    quicken()
    found: list[dict[str, Any]] = []

    def sampled(kernel: Any, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        grid = (*grid, 1, 1)[:3]
        middle = math.prod(grid) // 2
        middle += (
            grid[0] // 2 - middle % grid[0]
        )  # not at the border of the first axis, where a tile may be all but empty
        programs = [_run(kernel, grid, i, arguments, Watch(tensors)) for i in {middle, max(middle - 1, 0)}]
        found.append(_summary(kernel, grid, tensors, programs))

    with (
        kernels_chosen(),
        mock.patch.object(interpreter.InterpretedFunction, "run", sampled),
        mock.patch.object(torch, "empty", _zeros),
    ):
        roomy(call)
    return found


def _zeros(*shape: Any, **options: Any) -> torch.Tensor:
    """Memory that nobody wrote would decide which branches run."""
    return torch.zeros(*shape, **options)


def _run(kernel: Any, grid: tuple[int, ...], i: int, arguments: dict[str, Any], watch: Watch) -> Program:
    """Interpret program i of a grid, numbered in the order in which a GPU starts them."""
    builder, kind = interpreter.interpreter_builder, interpreter.InterpreterBuilder
    x, y, z = i % grid[0], i // grid[0] % grid[1], i // (grid[0] * grid[1])
    load, rmw = kind.create_masked_load, kind.create_atomic_rmw
    set_index, set_size = builder.set_grid_idx, builder.set_grid_dim

    def seen_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        watch.access("read", pointers, mask.data)
        return load(self, pointers, mask, *rest)

    def seen_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> None:
        watch.access(
            "write", pointers, mask.data
        )  # not stored: two programs' results among zeros would be no usual input

    def seen_rmw(self: Any, op: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        watch.access("write", pointers, mask.data)
        return rmw(self, op, pointers, value, mask, *rest)

    with (
        mock.patch.object(kind, "create_masked_load", seen_load),
        mock.patch.object(kind, "create_masked_store", seen_store),
        mock.patch.object(kind, "create_atomic_rmw", seen_rmw),
        mock.patch.object(builder, "set_grid_dim", side_effect=lambda *_: set_size(*grid)),
        mock.patch.object(builder, "set_grid_idx", side_effect=lambda *_: set_index(x, y, z)),
        np.errstate(all="ignore"),
    ):
        before = sys.gettrace()
        sys.settrace(watch.trace)
        try:
            interpreter.GridExecutor(kernel.rewrite(), kernel.arg_names, (1, 1, 1))(**arguments)
        finally:
            sys.settrace(before)
    return watch.program


def _summary(
    kernel: Any, grid: tuple[int, ...], tensors: dict[str, torch.Tensor], programs: list[Program]
) -> dict[str, Any]:
    keys = sorted({key for program in programs for key in program.moved})
    shared = {key for key in keys if _shared(programs, key)}
    again = _reuse(programs[0], shared)
    return {
        "kernel": kernel.__name__,
        "grid": grid,
        "tensors": {
            f"{name} {kind}": {
                "reads": kind == "read",
                "from": tensors[name].data_ptr() if name in tensors else 0,
                "size": _reach(tensors[name]) if name in tensors else 0,
                "moved": _mean(p.moved[name, kind] for p in programs),
                "distinct": _mean(_distinct(p, (name, kind)) for p in programs),
                "shared": (name, kind) in shared,
                "again": again[name, kind],
            }
            for name, kind in keys
        },
        "lines": programs[0].statements(),
        "calls": programs[0].calls,
        "accesses": programs[0].accesses,
    }


def _reuse(program: Program, shared: set[tuple[str, str]]) -> dict[tuple[str, str], list[tuple[int, int]]]:
    """What a program reads again of its own, for each tensor: (bytes of its own memory touched meanwhile, bytes).

    What all programs share stays in L2 and is left out.
    """
    own = [(key, sectors) for key, sectors in program.touched if key not in shared]
    found: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    places = np.unique(np.concatenate([sectors for _, sectors in own])) if own else np.empty(0)
    last = np.full(len(places), -1)
    alive = np.zeros(len(own) + 1, dtype=np.int64)  # sectors that were last touched at each time
    for now, (key, sectors) in enumerate(own):
        here = np.searchsorted(places, sectors)
        times, counts = np.unique(last[here], return_counts=True)
        for before, count in zip(times.tolist(), counts.tolist(), strict=True):
            if before >= 0:
                found[key][SECTOR * int(alive[before + 1 : now].sum())] += SECTOR * count
                alive[before] -= count
        last[here] = now
        alive[now] += len(here)
    return defaultdict(list, {key: sorted(each.items()) for key, each in found.items()})


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _distinct(program: Program, key: tuple[str, str]) -> int:
    return SECTOR * len(program.distinct(key)) if key in program.sectors else 0


def _shared(row: list[Program], key: tuple[str, str]) -> bool:
    """Whether neighbours touch the same sectors for the greater part."""
    touched = [p.distinct(key) for p in row if key in p.sectors]
    return len(touched) > 1 and len(np.unique(np.concatenate(touched))) < 0.75 * sum(map(len, touched))


def main(names: list[str]) -> None:
    print(json.dumps({name: count(as_on_a_gpu(EVERY[name]())) for name in names}))


if __name__ == "__main__":
    main(sys.argv[1:])
