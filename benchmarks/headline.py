"""The figures that matter most on a GPU, one after another, each printed as soon as it is known beside what was predicted.

    python benchmarks/headline.py [KEY …] [--out FOLDER] [--seconds 170]

The cases are those of lab/goals.py; predictions come from results/static.json. Each is checked, then timed in a few rounds
beside a copy of as many bytes, eager PyTorch and what its goal names. A case that fails is named, and one that ends the process
or hangs costs that process alone: the next one goes on behind it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import products
import torch
from lab import cases
from lab.case import Case, Function, NotHere, Stream
from lab.clock import REHEARSAL, Clock, DeviceClock, Effort, HostClock, Peaks, measure_peaks
from lab.goals import GOALS, Goal, N
from lab.pairs import AGAIN, OURS, Race, interval, paired, times
from lab.rows import Row, append_row, circumstances, file_of
from setting import INTERPRETED, PLACE, TINY, pick

import steerfast as sf
from steerfast import ops
from steerfast.ops.slots import HINGE

RESULTS = Path(__file__).parent / "results"
PREDICTED = RESULTS / "static.json"
EFFORT = REHEARSAL if TINY else Effort(rounds=9, seconds=2.0, compile=False)
CASE_SECONDS = pick(30, 60, 60)  # after which a case is taken for a hang
COPY = "copy of its bytes"
EAGER = ("eager", "all dimensions")  # the first that a case has
LEFT_OUT = {
    "naive chain", "torch.compile", "one slot", "amplify, eager", "euler, 10 steps", "euler, same steps", "eager, rounded",
}  # fmt: skip
HEAD = f"{'case':28}{'predicted µs':>16}{'µs':>10}{'of floor':>10}{'of copy':>9}{'eager':>8}{'noise':>7}"
LEGEND = (
    "µs: ours, inside a graph. of floor: over the bytes or operations at the speeds above. of copy: over a copy of as many "
    "bytes, which is itself slow where they are few. eager: its time over ours. noise: ours a second time over ours."
)
BEGIN = "\N{BULLET} "  # before the key of a case that a child begins
GRAPHS = {"add in a block": Goal(cases.add_in_a_block, N), "add in a block n=64": Goal(cases.add_in_a_block, 64)}
"""Cases of a compiler's graph, whose code is not known before it runs: no prediction."""
HOST_CALLS, HOST_ROUNDS = pick(200, 20, 1), pick(15, 3, 1)


def at() -> Stream:
    """The stream of this place; each goal says how wide."""
    return Stream(pick("cuda", "cpu", "cpu"), pick(torch.bfloat16, torch.float32, torch.float16), 0)


def case_of(key: str) -> Case:
    """A goal at the size of this place, with the baselines that the headline takes."""
    goal = {**GOALS, **GRAPHS}[key]
    case = (goal if PLACE == "cuda" else goal.tiny()).case(at())
    more = {COPY: lambda: _copy(case.bytes)} if case.bytes >= 1 << 16 else {}
    if key.startswith("encode") and "mixed" not in key:
        more |= products.tiles()
    if key.startswith("nobody"):
        more |= products.empty()
    kept = [
        {name: maker for name, maker in some.items() if name not in LEFT_OUT} for some in (case.peers, case.yardsticks)
    ]
    return replace(case, peers=kept[0], yardsticks={**kept[1], **more})


def _copy(size: float) -> Function:
    """A copy that reads and writes so many bytes in all, from as much memory as the inputs of a case rotate through."""
    half = int(size) // 2
    count = max(1, min(32, (256 << 20) // half)) if PLACE == "cuda" else 1
    sources = [torch.randint(0, 255, (half,), dtype=torch.uint8, device=at().device) for _ in range(count)]
    out, turn = torch.empty_like(sources[0]), itertools.cycle(sources)
    return lambda *_: out.copy_(next(turn))


def predictions() -> tuple[dict[str, tuple[float, float]], str]:
    """Case -> the shortest and the longest time that the static model gives it, in seconds; and of which code."""
    found = json.loads(PREDICTED.read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["predicted_seconds"]]
    spans = {row["case"]: (row["predicted_seconds"]["short"], row["predicted_seconds"]["long"]) for row in rows}
    return spans, f"commit {found['run']['commit'][:9]}, triton {found['run']['triton']}"


def line(key: str, row: Row, predicted: tuple[float, float] | None) -> str:
    """One row of the printed table."""
    span = "–" if predicted is None else f"{1e6 * predicted[0]:.4g} … {1e6 * predicted[1]:.4g}"
    if row["status"] != "ok":
        return f"{key:28}{span:>16}  {row['status']}: {row.get('error') or row.get('missing', {}).get(OURS, '')}"
    seconds, eager = interval(times(row, OURS))[0], next((name for name in EAGER if name in row["times"]), "")
    ratios = ((OURS, COPY, 9), (eager, OURS, 8), (AGAIN, OURS, 7))
    cells = [
        f"{interval(paired(row, a, b))[0]:{width}.2f}" if {a, b} <= row["times"].keys() else f"{'–':>{width}}"
        for a, b, width in ratios
    ]
    floor = f"{seconds / row['floor']:10.2f}" if row.get("floor", 0) > 1e-7 else f"{'–':>10}"
    notes = [f"not captured: {', '.join(row['uncaptured'])}"] if row.get("uncaptured") else []
    notes += [f"{name}: {why}" for name, why in row.get("missing", {}).items()]
    shown = {OURS, AGAIN, COPY, eager}
    notes += [f"{name} {interval(paired(row, name, OURS))[0]:.2f}" for name in row["times"] if name not in shown]
    return f"{key:28}{span:>16}{1e6 * seconds:10.2f}{floor}{''.join(cells)}  {'; '.join(notes)}".rstrip()


def _add_alone(at: Stream) -> Function:
    vector = at.rows(1)[0]
    return lambda x: ops.add_(x, vector)


def _subspace_alone(at: Stream, k: int) -> Function:
    bank = sf.Bank(at.d, 1, 2 * k, at.dtype, at.device)
    bank.register(sf.Amplify(at.basis(k).float(), -0.5))
    return lambda x: ops.subspace_(x, *bank.tensors, modes=HINGE, max_rank=k)


def _encode_alone(at: Stream) -> Function:
    w = at.dictionary(pick(4096, 300, 130))
    return lambda x: ops.sae_encode(x, w, None, 5)


def _decode_alone(at: Stream) -> Function:
    w, values = at.dictionary(64), torch.rand(1, 32, device=at.device)
    indices = torch.arange(32, device=at.device).int()[None]
    return lambda x: ops.sae_decode(values, indices, w)


HOST: dict[str, Callable[[Stream], Function]] = {
    "host add_": _add_alone,
    "host subspace_ k=8": lambda at: _subspace_alone(at, 8),
    "host subspace_ k=64": lambda at: _subspace_alone(at, 64),
    "host sae_encode": _encode_alone,
    "host sae_decode": _decode_alone,
}
"""Ops on one token, whose time is the host's."""


def host_row(key: str) -> Row:
    """Host time of a call, beside the launch of a kernel that does nothing; the device does not keep it waiting."""
    stream, taken = replace(at(), d=pick(4096, 64, 40)), dict[str, list[float]]()
    x, ours = stream.rows(1), HOST[key](stream)
    arms = {OURS: ours, AGAIN: ours, "bare launch": products.empty()["empty kernel"]()}
    for function in arms.values():
        function(x)
    for _ in range(HOST_ROUNDS):
        for name, function in arms.items():
            taken.setdefault(name, []).append(_queued(partial(function, x)))
    return {"case": f"{key} n=1", "status": "ok", "clock": "wall time of the host", "times": taken}


def _queued(call: Callable[[], Any]) -> float:
    """Seconds of the host for each of some calls, until they are queued."""
    begin = time.perf_counter()
    for _ in range(HOST_CALLS):
        call()
    taken = time.perf_counter() - begin
    if PLACE == "cuda":
        torch.cuda.synchronize()
    return taken / HOST_CALLS


class Child:
    """The process that measures: it says which case it begins, so that whoever waits knows where it ended."""

    def __init__(self, out: Path, series: str) -> None:
        self.clock: Clock = DeviceClock() if PLACE == "cuda" else HostClock()
        self.origin = {**circumstances(PLACE), "quick": True, "series": series}
        self.file = file_of(out, self.origin)
        self.peaks: dict[torch.dtype, Peaks] = {}
        self.predicted, _ = predictions()

    def measure(self, key: str) -> Row:
        """The row of a case."""
        if key in HOST:
            return host_row(key)
        case = case_of(key)
        if case.dtype not in self.peaks:
            self.peaks[case.dtype] = peaks = measure_peaks(self.clock, case.dtype, EFFORT)
            print(f"copy {peaks.copy / 1e9:.1f} GB/s, {case.dtype} product {peaks.product / 1e12:.3f} TFLOP/s")
        race = Race(case, self.clock, self.peaks[case.dtype], EFFORT)
        if not race.red:
            race.run()
        return race.row

    def keep(self, key: str) -> bool:
        """Measure a case, print and keep its row; False where the device is of no use any more."""
        begin, before = time.perf_counter(), _compiled()
        torch.manual_seed(0)  # so that a case is the same alone
        try:
            row, sound = self.measure(key), True
        except NotHere as reason:
            row, sound = {"case": key, "status": "not here", "error": str(reason)}, True
        except Exception as error:
            row, sound = {"case": key, "status": "failed", "error": _one_line(error)}, _is_sound()
        row |= {"suite": "headline", "key": key, "seconds": round(time.perf_counter() - begin, 2), "run": self.origin}
        late = _compiled() - before
        print(
            line(key, row, self.predicted.get(row["case"])) + (f"  ({late} compiled late)" if late else ""), flush=True
        )
        append_row(self.file, row)
        return sound


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _is_sound() -> bool:
    """Whether the device still works: after a fault nothing does in this process."""
    try:
        if PLACE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def _compiled() -> int:
    """Entries of Triton's cache, where a GPU's kernels go there."""
    if PLACE != "cuda":
        return 0
    folder = Path(os.environ.get("TRITON_CACHE_DIR", Path.home() / ".triton" / "cache"))
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0


def child(keys: Sequence[str], out: Path, series: str, end: float) -> int:
    """Measure these cases, one after another."""
    if PLACE == "cuda" or INTERPRETED:
        sf.use_backend("triton")
    here = Child(out, series)
    with torch.no_grad():
        for i, key in enumerate(keys):
            if time.time() > end:
                print(f"out of time: {', '.join(keys[i:])}", flush=True)
                return 0
            print(BEGIN + key, flush=True)
            signal.alarm(CASE_SECONDS)  # its default action ends the process, even where the device hangs
            sound = here.keep(key)
            signal.alarm(0)
            if not sound:
                return 3
    return 0


def lines_of(keys: Sequence[str], out: Path, series: str, end: float) -> Iterator[str]:
    """What children print; each begins behind the case that ended the one before it."""
    left = list(keys)
    while left:
        command = [
            sys.executable,
            __file__,
            *left,
            "--child",
            "--series",
            series,
            "--until",
            str(end),
            "--out",
            str(out),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            begun = None
            for text in process.stdout:
                if text.startswith(BEGIN):
                    begun = text.removeprefix(BEGIN).strip()
                else:
                    yield text.rstrip("\n")
        if process.returncode == 0:
            return
        if begun is None:
            yield f"the process ended before its first case (exit {process.returncode})"
            return
        if process.returncode != 3:
            hung = process.returncode == -signal.SIGALRM
            why = f"took more than {CASE_SECONDS} s" if hung else f"ended its process (exit {process.returncode})"
            yield f"{begun:28}  {why}"
        left = left[left.index(begun) + 1 :]


KEYS = (*GOALS, *GRAPHS, *HOST)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("keys", nargs="*", metavar="KEY", help="(default: all)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER", help="for the rows"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no further case begins")
    for internal in ("--series", "--until"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        return child(options.keys, options.out, options.series, float(options.until))
    if PLACE == "cpu":
        print("headline: no GPU here; STEERFAST_BENCH=tiny TRITON_INTERPRET=1 rehearses", file=sys.stderr)
        return 2
    if unknown := set(options.keys) - set(KEYS):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; known are {', '.join(KEYS)}")
    origin, failed = circumstances(PLACE), 0
    print(
        f"{origin['device']}, torch {torch.__version__}, commit {origin['commit']}; predicted for an H200 by {predictions()[1]}"
    )
    print(HEAD, flush=True)
    for text in lines_of(options.keys or KEYS, options.out, origin["date"], time.time() + options.seconds):
        failed += any(f"  {word}" in text for word in ("failed: ", "red: ", "took more than", "ended its process"))
        print(text, flush=True)
    print(LEGEND)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
