"""Times every op on a GPU against its byte floor, eager PyTorch and torch.compile; the table comes last.

    python benchmarks/gpu.py FOLDER [--only sae] [--deadline 235] [--once] [--tiny]

A case is checked against float64 before it is timed: where the check is red, no time appears. All times are of CUDA
graphs that call the op on several input sets in turn, medians over replays: time on the device, without the host. The
floor is the larger of bytes over copy bandwidth and operations over the rate of a matrix product, both measured in the
same run. Small inputs (n ≤ 64) lie in L2, as they do in a model; large ones are rotated through more memory than L2
holds. Raw rows are appended to FOLDER/gpu.jsonl as they are measured, so that an interrupt keeps them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import steerfast as sf

Inputs = tuple[Tensor, ...]
Row = dict[str, Any]
ROTATE_BYTES, MOST_SETS, REPLAYS, CALLS = 256 << 20, 32, 25, 20


@dataclass(frozen=True)
class Case:
    """One op at one size: what it must move and compute, how to call it, and what it must equal."""

    name: str
    n: int
    bytes: float
    flops: float
    make: Callable[[], Tensor]  # a fresh x
    fixed: Inputs  # what every call shares: vectors, weights
    ours: Callable[..., Any]
    eager: Callable[..., Any]  # the same in plain PyTorch, as a user would write it
    check: Callable[[Case, Tensor], float]  # error as a share of what is allowed


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run: the real one, or the rehearsal."""

    device: str
    dtype: torch.dtype
    d: int
    few: int
    many: int
    ranks: tuple[int, ...]
    features: int
    k: int
    encode_rows: tuple[int, ...]


REAL = Sizes("cuda", torch.bfloat16, 4096, 64, 8192, (8, 16, 32, 64), 65536, 32, (1, 16, 4096))
ONCE = Sizes("cuda", torch.bfloat16, 1000, 5, 70, (8, 64), 5000, 32, (3,))
TINY = Sizes("cpu", torch.float16, 40, 2, 3, (2, 16), 300, 5, (1, 2))


def amplify(x: Tensor, s: Tensor) -> Tensor:
    return x + 0.5 * torch.relu(x @ s.T) @ s


def ablate(x: Tensor, v: Tensor) -> Tensor:
    return x - (x @ v.T) @ v


def calibrate(x: Tensor, s: Tensor) -> Tensor:
    return x - torch.relu(x @ s.T) @ s + 2.0 * s.mean(0)


def flow(x: Tensor, q: Tensor, lam: Tensor, bias: Tensor) -> Tensor:
    """Ten Euler steps in d dimensions, as published; float32 throughout for 16-bit x."""
    a = x.double() if x.dtype == torch.float64 else x.float()
    q = q.to(a.dtype)
    step = 0.04 * a.norm(dim=-1, keepdim=True)
    for _ in range(10):
        norm = a.norm(dim=-1, keepdim=True)
        point = a / norm
        u = (2 * lam * (point @ q.T) + bias) @ q
        tangent = u - (point * u).sum(-1, keepdim=True) * point
        a = a + step * tangent / tangent.norm(dim=-1, keepdim=True)
    return a.to(x.dtype)


def dense_top_k(x: Tensor, w: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return torch.relu(x @ w.T + b).topk(k)


def gather_sum(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    return torch.einsum("nk,nkd->nd", values.to(w.dtype), w[indices.long()])


def share(got: Tensor, true: Tensor, naive: Tensor) -> float:
    """Largest error as a share of what is allowed: twice the formula's own in this dtype, plus one unit in the last place."""
    unit = true.abs().max() * torch.finfo(got.dtype).eps
    allowed = 2 * (naive.double() - true).abs().max() + unit
    return ((got.double() - true).abs().max() / allowed).item()


def same_as_formula(case: Case, x: Tensor) -> float:
    x = x[:512]
    true = case.eager(x.double(), *(t.double() for t in case.fixed))
    return share(case.ours(x, *case.fixed), true, case.eager(x, *case.fixed))


def cases(size: Sizes) -> Iterator[Callable[[], Case]]:
    """The cases, each built when its turn comes."""
    device, dtype, d = size.device, size.dtype, size.d
    item, narrow = dtype.itemsize, torch.float32

    def stream(n: int) -> Callable[[], Tensor]:
        return lambda: torch.randn(n, d, device=device).to(dtype)

    def basis(k: int) -> Tensor:
        return torch.linalg.qr(torch.randn(d, k, device=device))[0].T.contiguous().to(dtype)

    def add(n: int) -> Case:
        bank = torch.randn(8, d, device=device).to(dtype)
        rows = torch.randint(0, 8, (n,), device=device, dtype=torch.int32)
        scale = torch.rand(n, device=device)
        return Case(
            "add", n, 2 * n * d * item + 8 * n, 2 * n * d, stream(n), (bank, scale),
            lambda x, bank, scale: sf.ops.add(x, bank, rows[: len(x)], scale[: len(x)]),
            lambda x, bank, scale: (x + scale[: len(x), None] * bank[rows[: len(x)]]).to(x.dtype),
            same_as_formula,
        )  # fmt: skip

    def subspace(name: str, n: int, k: int, ours: Callable[..., Any], eager: Callable[..., Any], *more: Tensor) -> Case:
        bytes_, flops = 2 * n * d * item + k * d * item, 4 * n * d * k
        return Case(f"{name} k={k}", n, bytes_, flops, stream(n), (basis(k), *more), ours, eager, same_as_formula)

    def flow_case(n: int, k: int) -> Case:
        lam, bias = torch.randn(2, k, device=device, dtype=narrow)
        ours = lambda x, q, lam, bias: sf.ops.flow(x, q, lam, bias, angle=0.4, steps=10)  # noqa: E731
        return subspace("flow 10 steps", n, k, ours, flow, lam, bias)

    def dictionary() -> tuple[Tensor, Tensor]:
        w = torch.empty(size.features, d, device=device, dtype=dtype)
        for part in w.split(8192):
            part.copy_(torch.randn(part.shape, device=device) / math.sqrt(d))
        return w, (0.1 * torch.randn(size.features, device=device)).to(dtype)

    def encode(n: int) -> Case:
        w, b = dictionary()
        return Case(
            f"sae_encode k={size.k}", n, item * (w.numel() + n * d) + 8 * n * size.k, 2 * n * w.numel(), stream(n), (w, b),
            lambda x, w, b: sf.ops.sae_encode(x, w, b, size.k), lambda x, w, b: dense_top_k(x, w, b, size.k), exact_top_k,
        )  # fmt: skip

    def decode(n: int) -> Case:
        w, _ = dictionary()
        values = torch.rand(n, size.k, device=device)

        def places() -> Tensor:
            return torch.randint(0, size.features, (n, size.k), device=device, dtype=torch.int32)

        def check(case: Case, x: Tensor) -> float:
            some = slice(0, 64)
            true = torch.einsum("nk,nkd->nd", values[some].double(), w[x[some].long()].double())
            naive = gather_sum(values[some], x[some], w)
            return share(sf.ops.sae_decode(values[some], x[some], w), true, naive)

        return Case(
            f"sae_decode k={size.k}", n, item * (n * size.k * d + n * d) + 8 * n * size.k, 2 * n * size.k * d, places, (w,),
            lambda x, w: sf.ops.sae_decode(values, x, w), lambda x, w: gather_sum(values, x, w), check,
        )  # fmt: skip

    few, many = size.few, size.many
    for n in (1, few, many):
        yield lambda n=n: add(n)
    for n in (1, few, many):
        yield lambda n=n: subspace("ablate", n, 1, sf.ops.ablate, ablate)
    for k in size.ranks:
        for n in (few, many):
            yield lambda n=n, k=k: subspace("amplify", n, k, lambda x, s: sf.ops.amplify(x, s, 0.5), amplify)
    yield lambda: subspace("calibrate", many, size.ranks[0], lambda x, s: sf.ops.calibrate(x, s, 2.0), calibrate)
    for n in (1, few, many):
        yield lambda n=n: flow_case(n, size.ranks[-1])
    for n in size.encode_rows:
        yield lambda n=n: encode(n)
    for n in size.encode_rows:
        yield lambda n=n: decode(n)


def exact_top_k(case: Case, x: Tensor) -> float:
    """Nothing left out is larger than the smallest selected, up to twice the rounding of a float32 product."""
    x, (w, b) = x[:16], case.fixed
    values, indices = case.ours(x, w, b)
    wide, naive = [], []
    for rows, bias in zip(w.split(8192), b.split(8192), strict=True):
        wide.append(torch.relu(x.double() @ rows.double().T + bias.double()))
        naive.append(torch.relu(x.float() @ rows.float().T + bias.float()))
    true = torch.cat(wide, 1)
    tolerance = 2 * (torch.cat(naive, 1) - true).abs().max() + true.max() * torch.finfo(torch.float32).eps
    error = (values - true.gather(1, indices.long())).abs().max()
    if (values.diff(dim=1) > 0).any() or (indices.sort(dim=1).values.diff(dim=1) == 0).any():
        return math.inf
    left_out = true.scatter(1, indices.long(), 0).amax(1) - values[:, -1]
    return max((error / tolerance).item(), (left_out.max() / (2 * tolerance)).item())


class Clock:
    """Median device time of a call: CUDA graphs over rotating inputs. In the rehearsal one call and the host's clock."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, function: Callable[..., Any], sets: list[Inputs]) -> tuple[float, list[float]]:
        """(seconds per call, all samples)."""
        if self.device == "cpu":
            start = time.perf_counter()
            function(*sets[0])
            return time.perf_counter() - start, []
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for inputs in sets[:3]:
                function(*inputs)
            torch.cuda.synchronize()
            start = time.perf_counter()
            function(*sets[0])
            torch.cuda.synchronize()
            one = time.perf_counter() - start
        calls = max(1, min(CALLS, int(0.05 / one)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(calls):
                function(*sets[i % len(sets)])
        graph.replay()
        samples = []
        for _ in range(REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3 / calls)
        return statistics.median(samples), samples


def ceilings(size: Sizes, clock: Clock) -> tuple[float, float]:
    """(bytes per second of a large copy, read plus written; operations per second of a large matrix product)."""
    large, side = (1 << 30, 8192) if size.device == "cuda" else (1 << 12, 32)
    source = torch.randint(0, 255, (large,), device=size.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * large / clock(target.copy_, [(source,)])[0]
    a, b = (torch.randn(side, side, device=size.device).to(size.dtype) for _ in range(2))
    return bandwidth, 2 * side**3 / clock(torch.mm, [(a, b)])[0]


def facts(device: str) -> Row:
    """What every row says about its origin."""

    def ask(*command: str) -> str:
        try:
            return subprocess.run(
                command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, interpreter",
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if device == "cuda"
        else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": ask("git", "rev-parse", "HEAD"),
        "changed": ask("git", "status", "--porcelain", "--untracked-files=no") != "",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def measure(case: Case, clock: Clock, ceiling: tuple[float, float], compile_too: bool) -> Row:
    """One row: the check, and, where it is green, the times."""
    row: Row = {"case": case.name, "n": case.n, "bytes": case.bytes, "flops": case.flops}
    first = case.make()
    row["error_share"] = case.check(case, first)
    if not row["error_share"] <= 1:
        return {**row, "status": "RED"}
    own = first.numel() * first.element_size()
    count = min(MOST_SETS, max(2, ROTATE_BYTES // own)) if clock.device == "cuda" else 1
    sets = [(x, *case.fixed) for x in [first, *(case.make() for _ in range(count - 1))]]
    row["floor_s"] = max(case.bytes / ceiling[0], case.flops / ceiling[1])
    row["ours_s"], row["samples"] = clock(case.ours, sets)
    row["ours_again_s"], _ = clock(case.ours, sets)  # what it differs by is the noise
    peers = {"eager": lambda: case.eager}
    if compile_too:
        backend = "inductor" if clock.device == "cuda" else "eager"
        peers["compile"] = lambda: torch.compile(case.eager, fullgraph=True, dynamic=False, backend=backend)
    for name, peer in peers.items():
        try:
            row[f"{name}_s"], _ = clock(peer(), sets)
        except Exception as error:  # a peer that fails is a fact about the peer; ours stays measured
            row[f"{name}_error"] = f"{type(error).__name__}: {error}"[:300]
    return {**row, "status": "ok"}


def table(rows: list[Row], missing: list[str], ceiling: tuple[float, float] | None) -> str:
    """The short table that is printed last."""
    lines = []
    if ceiling:
        lines.append(f"copy {ceiling[0] / 1e12:.2f} TB/s, matrix product {ceiling[1] / 1e12:.0f} TFLOP/s")
    lines.append(
        f"{'case':22}{'n':>6}{'us':>10}{'floor':>9}{'x floor':>9}{'GB/s':>7}{'eager':>8}{'compile':>9}{'again':>7}"
    )
    for row in rows:
        head = f"{row['case']:22}{row['n']:6}"
        if row["status"] != "ok":
            lines.append(
                f"{head}  {row['status']}: error {row.get('error_share', math.nan):.3g} of what is allowed {row.get('error', '')}"
            )
            continue
        ours = row["ours_s"]
        peers = "".join(
            f"{row[key] / ours:{width}.2f}" if key in row else f"{'-':>{width}}"
            for key, width in (("eager_s", 8), ("compile_s", 9))
        )
        lines.append(
            f"{head}{ours * 1e6:10.1f}{row['floor_s'] * 1e6:9.1f}{ours / row['floor_s']:9.2f}"
            f"{row['bytes'] / ours / 1e9:7.0f}{peers}{row['ours_again_s'] / ours:7.2f}"
        )
    lines.append("eager and compile: their time over ours. again: ours measured a second time, over the first")
    if missing:
        lines.append(f"MISSING, not measured: {', '.join(missing)}")
    return "\n".join(lines)


def run_once(size: Sizes) -> int:
    """Every op once, checked, nothing timed: for a memory checker."""
    red = 0
    for build in cases(size):
        case = build()
        share_ = case.check(case, case.make())
        red += not share_ <= 1
        print(f"{case.name} n={case.n}: error {share_:.3g} of what is allowed")
    print(f"{red} red")
    return int(red > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no further case starts")
    parser.add_argument("--once", action="store_true", help="run and check each op once at odd sizes; time nothing")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU under the interpreter")
    options = parser.parse_args()
    size = TINY if options.tiny else ONCE if options.once else REAL
    if size.device == "cuda" and not torch.cuda.is_available():
        print("gpu.py: no GPU here; --tiny rehearses the run without one (set TRITON_INTERPRET=1)", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    sf.use_backend("triton")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if options.once:
        return run_once(size)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    start, origin, clock = time.monotonic(), facts(size.device), Clock(size.device)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    missing: list[str] = []
    ceiling = None
    planned = list(cases(size))
    position = 0
    try:
        ceiling = ceilings(size, clock)
        with (options.folder / "gpu.jsonl").open("a") as file, torch.no_grad():
            for position, build in enumerate(planned):  # noqa: B007  # where an interrupt found us
                case = build()
                name = f"{case.name} n={case.n}"
                spent = time.monotonic() - start
                if options.only not in name:
                    continue
                if spent > options.deadline:
                    missing.append(name)
                    continue
                try:
                    row = measure(case, clock, ceiling, compile_too=spent < 0.75 * options.deadline)
                except Exception as error:  # one case must not cost the others
                    row = {
                        "case": case.name,
                        "n": case.n,
                        "status": "FAILED",
                        "error": f"{type(error).__name__}: {error}"[:300],
                    }
                    missing.append(name)
                rows.append(row)
                file.write(json.dumps({**row, "copy": ceiling[0], "matmul": ceiling[1], **origin}) + "\n")
                file.flush()
                print(f"{name}: {row['status']}, {time.monotonic() - start:.0f} s", flush=True)
                del case
                if size.device == "cuda":
                    torch.cuda.empty_cache()
    except KeyboardInterrupt:
        missing.append(f"interrupted at case {position + 1} of {len(planned)}")
    text = "\n".join([" ".join(f"{key} {value}" for key, value in origin.items()), table(rows, missing, ceiling)])
    (options.folder / "gpu.txt").write_text(text + "\n")
    print(text)
    return int(bool(missing) or any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
