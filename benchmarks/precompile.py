"""Compile the kernels that headline.py and once.py launch, many at a time, into one cache; nothing runs on a GPU.

    python benchmarks/precompile.py [NAME …] [--processes 16] [--capability 90]

A kernel is launched through Triton's own code, on a driver that knows the GPU's architecture and nothing else, and stops short
of the device: so a later process finds it under the key that it looks for, in TRITON_CACHE_DIR. A GPU need not be present.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parent))

import once
import products
import torch
import triton
from lab.case import Case
from lab.goals import FEATURES, GOALS, TOKENS
from static.cases import AT, CASES, Blank
from static.launches import Launch, as_on_a_gpu, launches_of
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia


class Absent:
    """A driver of a GPU that is not asked anything but what it is."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Filled(Blank):
    """A stream with dictionaries that a plan accepts: no row of theirs is zero."""

    def dictionary(self, features: int) -> torch.Tensor:
        return torch.ones(features, self.d, dtype=self.dtype)


class Compiled(NamedTuple):
    """What became of the launches of a case."""

    name: str
    launches: int
    seconds: float
    error: str = ""


LONGEST = ("nobody", "all modes")  # kernels that know every mode take the longest, so they begin first
YARDSTICKS: dict[str, Callable[[], object]] = {
    "product on tiles": lambda: products.product(AT.rows(TOKENS), AT.dictionary(FEATURES)),
    "empty kernel": lambda: products.launch_nothing(AT.rows(1)),
}


def names() -> list[str]:
    """Everything that there is to compile: the goals, what is measured beside them, every op once at each width."""
    return [*GOALS, *YARDSTICKS, *(f"once d={d} {i}" for d in once.WIDTHS for i in range(once.COUNT))]


def calls(name: str) -> Iterator[Callable[[], object]]:
    """The calls of a name, to be caught on their way to the device."""
    if name in YARDSTICKS:
        yield YARDSTICKS[name]
    elif name in GOALS:
        yield as_on_a_gpu(CASES[name]())
    else:
        width, number = name.removeprefix("once d=").split()
        case: Case = list(once.every(Filled("cpu", torch.bfloat16, int(width)), *once.SIZES))[int(number)]()
        yield as_on_a_gpu(case)


def compile_one(name: str) -> Compiled:
    """Compile what a name launches."""
    begin, found = time.perf_counter(), list[Launch]()
    try:
        for call in calls(name):
            found += launches_of(call, f"sm_{triton.runtime.driver.active.get_current_target().arch}")[0]
        compiled = [launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments) for launch in found]
        for kernel in compiled:
            _finish(kernel)
    except Exception as error:
        return Compiled(name, len(found), time.perf_counter() - begin, f"{type(error).__name__}: {error}"[:200])
    return Compiled(name, len(found), time.perf_counter() - begin)


def _finish(kernel: Any) -> None:
    """Build what starts the kernel, too, where this version of Triton has a C module for each signature."""
    if torch.cuda.is_available() and hasattr(nvidia, "make_launcher"):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)


def _begin(capability: int) -> None:
    """A process of the pool."""
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Absent(capability))


def compile_all(wanted: Iterable[str], processes: int, capability: int) -> Iterator[Compiled]:
    """Each name as it is done."""
    wanted = sorted(wanted, key=lambda name: not name.startswith(LONGEST))
    with ProcessPoolExecutor(processes, get_context("spawn"), _begin, (capability,)) as pool:
        running = {pool.submit(compile_one, name): name for name in wanted}
        for done in as_completed(running):
            try:
                yield done.result()
            except Exception as error:  # the process is gone, and the pool with it
                yield Compiled(running[done], 0, 0.0, f"{type(error).__name__}: {error}"[:200])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="(default: all)")
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument(
        "--capability", type=int, metavar="N", help="compute capability, such as 90 (default: this GPU's)"
    )
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(names()):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(names())}")
    if options.capability is None and not torch.cuda.is_available():
        parser.error("there is no GPU here to compile for; say which one is meant, such as --capability 90")
    capability = options.capability or int("{}{}".format(*torch.cuda.get_device_capability()))
    begin, failed, launches = time.perf_counter(), list[Compiled](), 0
    wanted = options.names or names()
    for one in compile_all(wanted, options.processes, capability):
        launches += one.launches
        print(f"{one.name:32}{one.launches:3} launches{one.seconds:7.1f} s  {one.error}", flush=True)
        if one.error:
            failed.append(one)
    taken = time.perf_counter() - begin
    print(
        f"{len(wanted)} cases, {launches} launches in {taken:.1f} s by {options.processes} processes; {len(failed)} failed"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
