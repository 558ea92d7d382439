"""`steerfast bench`: every op on this machine, beside eager PyTorch and torch.compile, against the machine's own peak.

A case says which bytes it must move and which operations it must do; its floor is the larger of the two at the speed of
a copy and of a matrix product measured in the same run. An answer is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

import torch

from .bench_cases import (
    SHORT,
    Stream,
    add,
    add_rms_norm,
    edit_features,
    flow,
    sae_decode,
    sae_encode,
    subspace,
)  # fmt: skip
from .timing import (
    AGAIN,
    OURS,
    QUICK,
    Case,
    Clock,
    Effort,
    NotHere,
    Peaks,
    Race,
    Row,
    append_row,
    circumstances,
    clock_here,
    interval,
    is_calm,
    measure_peaks,
    paired,
    times,
)  # fmt: skip

DESCRIPTION = (
    "Time every op on this machine. Each is checked against float64, then timed beside eager PyTorch and torch.compile, "
    "and set against the floor that this machine's own copy and matrix product allow."
)
EXAMPLE = "steerfast bench\nsteerfast bench --only flow --out rows.jsonl"


def standard(at: Stream) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Every op at a few sizes, as (what, how to build it): cases are large, so each is built when its turn comes."""
    gpu = at.device == "cuda"
    few, many, features, tokens = (16, 8192, 65536, 4096) if gpu else (1, 256, 16384, 256)
    for n in (few, many):
        yield f"add {n}", partial(add, at, n)
    yield f"add_rms_norm {many}", partial(add_rms_norm, at, many)
    for method, k in (("ablate", 1), ("amplify", 16), ("amplify", 64), ("calibrate", 8), ("loreft", 8)):
        yield f"{method} {k}", partial(subspace, at, many, method, k)
    for n in (few, many):
        yield f"flow {n}", partial(flow, at, n, 64)
    yield "edit_features", partial(edit_features, at, few, features)
    for n in (few, tokens):
        yield f"sae_encode {n}", partial(sae_encode, at, n, features, 32)
    for n in (few, tokens):
        yield f"sae_decode {n}", partial(sae_decode, at, n, features, 32)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `steerfast bench` takes to its parser."""
    parser.add_argument("--only", default="", metavar="TEXT", help="ops whose name contains this, such as flow or sae")
    parser.add_argument("--width", type=int, metavar="D", help="width of the stream (default: 4096 on a GPU, else 576)")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, help="(default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds; intervals are wider")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append the raw rows to this file, one JSON a line")


def run(args: argparse.Namespace) -> int:
    """`steerfast bench`: measure, print a table, exit with 1 if an answer was wrong."""
    clock = clock_here()
    gpu = clock.device == "cuda"
    if args.width is not None and args.width < 1:
        raise ValueError(f"--width: got {args.width}; expected at least 1")
    if not gpu:
        _say("no GPU here: the PyTorch backend on one thread of the CPU is timed, not the kernels", sys.stderr)
        torch.set_num_threads(1)  # the clock counts the CPU time of all threads
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    at = Stream(clock.device, dtype, args.width or (4096 if gpu else 576))
    effort = QUICK if args.quick else clock.thorough
    origin, rows, begin = circumstances(clock.device), [], time.monotonic()
    _say(f"{origin['device']}, torch {torch.__version__}, {clock.name}")
    with torch.no_grad():
        peaks = measure_peaks(clock, dtype, effort)
        _say(f"copy {peaks.copy / 1e9:.1f} GB/s, {SHORT[dtype]} product {peaks.product / 1e9:.0f} GFLOP/s\n\n{HEAD}")
        for name, build in standard(at):
            if args.only not in name:
                continue
            row = _measured(name, build, clock, peaks, effort)
            rows.append({**row, "run": origin})
            _say(line(row))
            if args.out is not None:
                append_row(args.out, rows[-1])
    if not rows:
        raise ValueError(f"--only: no op has {args.only!r} in its name")
    _say(f"\n{LEGEND}\n{time.monotonic() - begin:.0f} s")
    for row in rows:
        for peer, reason in row["missing"].items():
            _say(f"not measured: {peer} in {row['case']}: {reason}", sys.stderr)
    return int(any(row["status"] == "red" for row in rows))


def _measured(name: str, build: Callable[[], Case], clock: Clock, peaks: Peaks, effort: Effort) -> Row:
    try:
        race = Race(build(), clock, peaks, effort)
    except NotHere as reason:
        return {"case": name, "status": "not here", "missing": {OURS: str(reason)}}
    if not race.red:
        race.run()
    return race.row


HEAD = f"{'case':44}{'ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'of peak':>9}{'eager':>8}{'compile':>9}{'noise':>7}"
LEGEND = (
    "of peak: the floor, by the copy and the product above, over the time. eager, compile: their time over ours, paired. "
    "noise: ours a second time over ours. busy: some of it was measured on a disturbed core."
)


def line(row: Row) -> str:
    """One row of the table."""
    if row["status"] != "ok":
        return f"{row['case']:44}{row['status']}: {row['missing'].get(OURS, '')}"
    seconds = interval(times(row, OURS))[0]
    cells = [
        f"{interval(paired(row, peer, OURS))[0]:{width}.2f}" if peer in row["times"] else f"{'-':>{width}}"
        for peer, width in (("eager", 8), ("torch.compile", 9), (AGAIN, 7))
    ]
    rates = f"{row['bytes'] / seconds / 1e9:8.1f}{row['operations'] / seconds / 1e9:9.1f}"
    shown = [peer for peer in (OURS, "eager", "torch.compile", AGAIN) if peer in row["times"]]
    busy = "" if all(is_calm(row, OURS, peer) for peer in shown) else "  busy"
    return f"{row['case']:44}{1e3 * seconds:10.4f}{rates}{row['floor'] / seconds:9.0%}{''.join(cells)}{busy}"


def _say(line: str, to: TextIO | None = None) -> None:
    (to or sys.stdout).write(line + "\n")
    (to or sys.stdout).flush()
