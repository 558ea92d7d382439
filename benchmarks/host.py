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
from functools import partial
from itertools import count as count_up
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

WIDTH, CALLS, ROUNDS = 1024, 300, 15
TOKENS = (1, 17, 4096)
Op = Callable[..., object]
Others = Callable[[int, int], tuple[Any, ...]]
"""(number of the call, tokens) -> what the op gets beside x."""
Measure = Callable[[Op, Others, int, torch.dtype], Any]


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


def show(name: str, case: Callable[[Measure], Any]) -> None:
    """One line: the call on the kernels, the bare launches, the call on PyTorch."""
    with stub_driver(lambda launch: None), kernels_chosen():
        launches, ours, bare = case(race)
    torch_time = case(alone)
    ratio = statistics.median(a / b for a, b in zip(ours, bare, strict=True))
    print(f"{name:<34}{launches:>9.2g}{min(ours):>8.1f}{min(bare):>8.1f}{ratio:>7.2f}{torch_time:>8.1f}", flush=True)


def race(op: Op, others: Others, width: int, dtype: torch.dtype) -> tuple[float, list[float], list[float]]:
    """(launches a call, µs of ours, µs of its bare launches), a pair for each round."""
    launches: list[tuple[JITFunction[Any], Any, dict[str, Any]]] = []

    def catch(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **arguments: Any) -> None:
        launches.append((kernel, grid, {**dict(zip(kernel.arg_names, args, strict=False)), **arguments}))

    def bare() -> None:
        for kernel, grid, arguments in launches:
            kernel[grid](**arguments)

    def ours(inputs: list[tuple[Any, ...]]) -> None:
        for arguments in inputs:
            op(*arguments)

    def made() -> list[tuple[Any, ...]]:
        return [(x, *others(i, len(x))) for i, x in enumerate(streams(width, dtype))]

    with mock.patch.object(JITFunction, "run", catch):
        ours(made())
    pairs = [(burst(ours, made()), burst(bare)) for _ in range(ROUNDS + 2)][2:]
    return len(launches) / CALLS, [a for a, _ in pairs], [b for _, b in pairs]


def alone(op: Op, others: Others, width: int, dtype: torch.dtype) -> float:
    """µs of a call on PyTorch with one token."""

    def ours(inputs: list[tuple[Any, ...]]) -> None:
        for arguments in inputs:
            op(*arguments)

    def made() -> list[tuple[Any, ...]]:
        return [(torch.zeros(1, width, dtype=dtype), *others(i, 1)) for i in range(CALLS)]

    return min(burst(ours, made()) for _ in range(7))


def burst(run: Callable[..., None], *inputs: Any) -> float:
    """µs of CPU time for each of `CALLS` calls."""
    start = time.thread_time_ns()
    run(*inputs)
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


def case(op: Op, make: Callable[[], Others]) -> Callable[[Measure], Any]:
    """A case of an op; `make` sets up what it gets beside x."""
    return lambda measure: measure(op, make(), WIDTH, torch.bfloat16)


def added(tables: bool) -> Others:
    banks = [torch.zeros(8, WIDTH, dtype=torch.bfloat16) for _ in range(5)]
    if not tables:
        return lambda i, n: (banks[i % 5],)
    rows = {n: torch.zeros(n, 1, dtype=torch.int32) for n in TOKENS}
    return lambda i, n: (banks[i % 5], rows[n], torch.ones_like(rows[n], dtype=torch.float32))


def banked(rank: int, **how: Any) -> Others:
    banks = []
    for seed in range(5):
        bank = sf.Bank(WIDTH, 4, 4 * rank, torch.bfloat16)
        generator = torch.Generator().manual_seed(seed)
        bank.register(sf.Amplify(torch.randn(rank, WIDTH, generator=generator), **how))
        banks.append((*bank.tensors, None, None, bank.modes, rank))
    return lambda i, n: banks[i % 5]


def directed(count: int = 1, number: Callable[[int], tuple[float, ...]] = lambda i: ()) -> Others:
    banks, turns = [torch.randn(count, WIDTH).bfloat16() for _ in range(5)], count_up(1)
    return lambda i, n: (banks[i % 5], *number(next(turns)))


def flowing(angle: Callable[[int], float]) -> Others:
    basis, numbers = torch.linalg.qr(torch.randn(WIDTH, 8))[0].T.bfloat16().contiguous(), torch.ones(8)
    turns = count_up(1)
    return lambda i, n: (basis, numbers, numbers, angle(next(turns)))


def flow_(x: torch.Tensor, basis: torch.Tensor, eigenvalues: torch.Tensor, bias: torch.Tensor, angle: float) -> None:
    sf.ops.flow_(x, basis, eigenvalues, bias, angle=angle)


def split_(x: torch.Tensor, *bank: Any) -> None:
    sf.ops.subspace_split_(x, x, *bank[:5], bank[5:])


def normed(x: torch.Tensor, vectors: torch.Tensor, rows: torch.Tensor, scale: torch.Tensor) -> None:
    sf.ops.add_rms_norm(x, x, vectors[0], vectors, rows, scale)


def hooked(*edits: Any) -> Callable[[Measure], Any]:
    """A case of the hook: a real model runs, and inside of its pass the hook of one layer is called on other streams."""

    def hook(measure: Measure) -> Any:
        model, found, true = build("llama"), [], Dispatcher.__call__

        def called(self: Dispatcher, x: torch.Tensor) -> torch.Tensor | None:
            if not found:
                found.append(measure(partial(true, self), lambda i, n: (), x.shape[-1], x.dtype))
            return true(self, x)

        with sf.steer(model, {1: list(edits)}), mock.patch.object(Dispatcher, "__call__", called):
            model(torch.ones(1, 1, dtype=torch.long), use_cache=False)
        return found[0]

    return hook


V = torch.linspace(-1, 1, 48)
CASES: dict[str, Callable[[Measure], Any]] = {
    "add_": case(sf.ops.add_, lambda: added(False)),
    "add_ rows scale": case(sf.ops.add_, lambda: added(True)),
    "add": case(sf.ops.add, lambda: added(False)),
    "subspace_ k=8": case(sf.ops.subspace_, lambda: banked(8, alpha=0.5)),
    "subspace_ k=64": case(sf.ops.subspace_, lambda: banked(64, alpha=0.5)),
    "subspace_ k=64 keep_norm": case(sf.ops.subspace_, lambda: banked(64, alpha=0.5, keep_norm=True)),
    "subspace_split_ k=8": case(split_, lambda: banked(8, alpha=0.5)),
    "add_rms_norm": case(normed, lambda: added(True)),
    "ablate_ k=1": case(sf.ops.ablate_, directed),
    "amplify_ k=8": case(sf.ops.amplify_, lambda: directed(8, lambda i: (0.5,))),
    "amplify_ k=8, another alpha": case(sf.ops.amplify_, lambda: directed(8, lambda i: (float(i),))),
    "calibrate_ k=8, another beta": case(sf.ops.calibrate_, lambda: directed(8, lambda i: (float(i),))),
    "flow_ k=8": case(flow_, lambda: flowing(lambda i: 0.4)),
    "flow_ k=8, another angle": case(flow_, lambda: flowing(lambda i: i * 1e-6)),
    "similarity": case(sf.ops.similarity, directed),
    "hook Add": hooked(sf.Add(V, 2.0)),
    "hook Add, Ablate": hooked(sf.Add(V, 2.0), sf.Ablate(V)),
}  # fmt: skip

if __name__ == "__main__":
    main()
