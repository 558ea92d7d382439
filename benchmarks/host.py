"""Host time of the kernels' launch path, without a GPU: microseconds of CPU time a call, beside a bare Triton launch.

    python -m benchmarks.host               all cases
    python -m benchmarks.host add_ hook     those whose names begin so

Kernels are compiled for an H100 and launched at a driver that does nothing, so that the C code of a launch (2 to 3 µs) is in
neither number. `ours` is a call of the library; `bare` is Triton's own `kernel[grid](...)` of the launches that this call
makes, with the very arguments. Every call gets another x; the number of tokens goes through 1, 17 and 4096, and the bank changes.
Rounds of both alternate; the ratio is the median of the rounds. `torch` is the same call on the PyTorch backend with one
token, for which nothing is launched. Wanted: a ratio of at most 1.5.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

import steerfast as sf
from steerfast.hooks.dispatcher import Dispatcher
from steerfast.ops import calls

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from families import build
from stub import stub_driver

WIDTH, CALLS, ROUNDS = 4096, 300, 15
TOKENS = (1, 17, 4096)
Call = Callable[[torch.Tensor], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="what the names of the cases begin with; all by default")
    wanted = tuple(parser.parse_args().names)
    torch.set_num_threads(1)
    print(f"{'case':<34}{'launches':>9}{'ours':>8}{'bare':>8}{'ratio':>7}{'torch':>8}")
    with torch.no_grad():
        for name, case in CASES.items():
            if not wanted or name.startswith(wanted):
                show(name, case)


def show(name: str, case: Callable[[Call | None], Any]) -> None:
    """One line: the call on the kernels, the bare launches, the call on PyTorch."""
    with stub_driver(lambda launch: None), kernels_chosen():
        launches, ours, bare = case(race)
    torch_time = case(alone)
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    print(f"{name:<34}{launches:>9.2g}{min(ours):>8.1f}{min(bare):>8.1f}{ratio:>7.2f}{torch_time:>8.1f}", flush=True)


def race(call: Call, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> tuple[float, list[float], list[float]]:
    """(launches a call, µs of ours, µs of its bare launches), a pair for each round."""
    inputs = list(streams(width, dtype))
    launches: list[tuple[JITFunction[Any], Any, dict[str, Any]]] = []

    def catch(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        launches.append((kernel, grid, {**dict(zip(kernel.arg_names, args, strict=False)), **arguments}))

    with mock.patch.object(JITFunction, "run", catch):
        for x in inputs:
            call(x)

    def bare() -> None:
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)

    def ours() -> None:
        for x in inputs:
            call(x)

    pairs = [(burst(ours), burst(bare)) for _ in range(ROUNDS + 2)][2:]
    return len(launches) / CALLS, [a for a, _ in pairs], [b for _, b in pairs]


def alone(call: Call, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16) -> float:
    """µs of a call on PyTorch with one token."""
    x = torch.zeros(1, width, dtype=dtype)

    def ours() -> None:
        for _ in range(CALLS):
            call(x)

    return min(burst(ours) for _ in range(5))


def burst(run: Callable[[], None]) -> float:
    """µs of CPU time for each of `CALLS` calls."""
    start = time.thread_time_ns()
    run()
    return (time.thread_time_ns() - start) / CALLS / 1000


def streams(width: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Streams of changing sizes at changing places; nothing of them is ever written."""
    memory = torch.empty((max(TOKENS) + CALLS) * width, dtype=dtype)
    for i, n in zip(range(CALLS), cycle(TOKENS), strict=False):
        yield memory[i * width :][: n * width].view(n, width)


@contextmanager
def kernels_chosen() -> Iterator[None]:
    """Ops on CPU tensors take the kernels, compiled and not interpreted."""
    for module in ("add", "subspace", "similarity", "sae_decode", "sae_edit", "sae_encode"):
        calls.kernels(module)
    calls.interpreted()
    sf.use_backend("triton")
    try:
        with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):  # the backend asks; Triton has asked already
            yield
    finally:
        sf.use_backend("auto")


def op(make: Callable[[], Call], **how: Any) -> Callable[[Any], Any]:
    """A case of an op: `make` sets the banks up."""
    return lambda measure: measure(make(), **how)


def added(tables: bool) -> Call:
    banks = cycle([torch.zeros(8, WIDTH, dtype=torch.bfloat16) for _ in range(5)])
    rows = {n: torch.zeros(n, 1, dtype=torch.int32) for n in TOKENS}
    scale = {n: torch.ones(n, 1) for n in TOKENS}
    if not tables:
        return lambda x: sf.ops.add_(x, next(banks))
    return lambda x: sf.ops.add_(x, next(banks), rows[len(x)], scale[len(x)])


def banked(rank: int, **how: Any) -> Call:
    made = []
    for seed in range(5):
        bank = sf.Bank(WIDTH, 4, 4 * rank, torch.bfloat16)
        generator = torch.Generator().manual_seed(seed)
        bank.register(sf.Amplify(torch.randn(rank, WIDTH, generator=generator), **how))
        made.append(bank.tensors)
    banks, modes = cycle(made), bank.modes
    return lambda x: sf.ops.subspace_(x, *next(banks), modes=modes, max_rank=rank)


def directed(function: Callable[..., Any], count: int = 1, *numbers: Iterator[Any]) -> Call:
    banks = cycle([torch.randn(count, WIDTH).bfloat16() for _ in range(5)])
    return lambda x: function(x, next(banks), *(next(number) for number in numbers))


def flowing(angles: Iterator[float]) -> Call:
    basis, numbers = torch.linalg.qr(torch.randn(WIDTH, 8))[0].T.bfloat16().contiguous(), torch.ones(8)
    return lambda x: sf.ops.flow_(x, basis, numbers, numbers, angle=next(angles))


def hooked(*edits: list[Any], **how: Any) -> Callable[[Any], Any]:
    """A case of the hook: a real model runs, and inside of its pass the hook of one layer is called on other streams."""

    def case(measure: Any) -> Any:
        model, found, true = build("llama"), [], Dispatcher.__call__

        def called(self: Dispatcher, x: torch.Tensor) -> torch.Tensor | None:
            if not found:
                found.append(measure(lambda x: true(self, x), x.shape[-1], x.dtype))
            return true(self, x)

        with (
            sf.steer(model, [sf.Plan({1: edit}, **how) for edit in edits] if len(edits) > 1 else {1: edits[0]}),
            mock.patch.object(Dispatcher, "__call__", called),
        ):
            model(torch.ones(max(len(edits), 1), 1, dtype=torch.long), use_cache=False)
        return found[0]

    return case


V = torch.linspace(-1, 1, 48)
CASES: dict[str, Callable[[Any], Any]] = {
    "add_": op(lambda: added(False)),
    "add_ rows scale": op(lambda: added(True)),
    "subspace_ k=8": op(lambda: banked(8, alpha=0.5)),
    "subspace_ k=64": op(lambda: banked(64, alpha=0.5)),
    "subspace_ k=64 keep_norm": op(lambda: banked(64, alpha=0.5, keep_norm=True)),
    "ablate_ k=1": op(lambda: directed(sf.ops.ablate_)),
    "amplify_ k=8": op(lambda: directed(sf.ops.amplify_, 8, cycle([0.5]))),
    "amplify_ k=8, another alpha": op(lambda: directed(sf.ops.amplify_, 8, iter(range(10**9)))),
    "calibrate_ k=8, another beta": op(lambda: directed(sf.ops.calibrate_, 8, iter(range(10**9)))),
    "flow_ k=8": op(lambda: flowing(cycle([0.4]))),
    "flow_ k=8, another angle": op(lambda: flowing(x / 1e9 for x in range(10**9))),
    "similarity": op(lambda: directed(sf.ops.similarity)),
    "hook Add": hooked([sf.Add(V, 2.0)]),
    "hook Add, Ablate": hooked([sf.Add(V, 2.0), sf.Ablate(V)]),
}  # fmt: skip

if __name__ == "__main__":
    main()
