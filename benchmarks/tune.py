"""Choose block sizes, warps and stages on this GPU, offline, and write them as the table of its device class.

    python benchmarks/tune.py [--only NAME] [--out FILE]

Every knob is a constant of a kernel's file and meets the alternatives on the case that it matters for. An
alternative is taken where its answer is right and it is faster by more than noise: the whole 95 % interval of its paired ratio
lies below 1. One knob at a time, each with what was chosen before it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pprint
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lab import cases, sae_cases
from lab.case import Case, Within
from lab.clock import REHEARSAL, DeviceClock, HostClock, measure_peaks
from lab.pairs import OURS, Race, interval, paired
from setting import AT, FEATURES, INTERPRETED, PLACE, TINY, K, pick

import steerfast as sf
from steerfast.files.replace import replace_file

FILE = Path(__file__).parents[1] / "kernels" / "_tuned.py"
FEW, MANY, RANK = pick(64, 1, 2), pick(8192, 2, 3), pick(64, 64, 17)


@dataclass(frozen=True)
class Knob:
    """A constant of a kernel's file. In a table of (limit, value) one entry is tuned: that which serves `size`."""

    name: str  # "add.BLOCK_D"
    values: tuple[Any, ...]
    case: Callable[[], Case]
    size: int | None = None

    def read(self) -> Any:
        module, constant = self.name.split(".")
        return getattr(importlib.import_module(f"steerfast_kernels.{module}"), constant)

    def write(self, value: Any) -> None:
        module, constant = self.name.split(".")
        setattr(importlib.import_module(f"steerfast_kernels.{module}"), constant, value)

    def alternatives(self) -> list[Any]:
        """The whole constants that differ from the present one by one of the values."""
        now = self.read()
        if self.size is None:
            return [value for value in self.values if value != now]
        at = next((i for i, (limit, _) in enumerate(now) if self.size <= limit), len(now) - 1)
        return [[*now[:at], (now[at][0], value), *now[at + 1 :]] for value in self.values if value != now[at][1]]


def amplify(n: int, k: int) -> Callable[[], Case]:
    return lambda: cases.subspace(AT, n, "amplify", k)


def encode(n: int) -> Callable[[], Case]:
    return lambda: sae_cases.sae_encode(AT, n, FEATURES, K)


def decode(n: int) -> Callable[[], Case]:
    return lambda: sae_cases.sae_decode(AT, n, FEATURES, K)


LARGE = pick(4096, 64, 2)
KNOBS = [
    Knob("add.BLOCK_D", (512, 1024, 2048, 4096), lambda: cases.add(AT, MANY)),
    Knob("add.NORM_WARPS", (4, 8, 16), lambda: cases.add_rms_norm(AT, MANY), AT.d),
    Knob("subspace_rows.WARPS", (4, 8, 16), amplify(MANY, 8), AT.d),
    Knob("subspace_rows.CHUNK", (1, 2, 4, 8), amplify(MANY, 8), AT.d),
    Knob("subspace_split.PROJECT_COLUMNS", (256, 512, 1024), amplify(FEW, RANK)),
    Knob("subspace_split.PROJECT_STEP", ((32, 4), (64, 4), (64, 8), (128, 8)), amplify(FEW, RANK), RANK),
    Knob("subspace_split.LIFT", ((64, 4), (128, 4), (128, 8), (256, 8)), amplify(FEW, RANK), RANK),
    Knob("subspace_tiles.TILE_ROWS", (32, 64, 128), amplify(MANY, 32), MANY),
    Knob("subspace_tiles.TILE_STEP", ((32, 4), (64, 4), (64, 8), (128, 8)), amplify(MANY, 32), 32),
    Knob("subspace_tiles.TILE_STEP", ((32, 4), (32, 8), (64, 4), (64, 8)), amplify(MANY, RANK), RANK),
    Knob("subspace_tiles.TILE_STAGES", (2, 3, 4), amplify(MANY, RANK)),
    Knob("flow.WARPS", (4, 8, 16, 32), lambda: cases.flow(AT, MANY, AT.d), AT.d),
    Knob("sae_tiles.TILES", ((64, 4, 3), (64, 4, 4), (64, 8, 3)), encode(FEW), FEW),
    Knob("sae_tiles.TILES", ((128, 8, 3), (128, 8, 4), (256, 8, 4), (256, 16, 3), (256, 16, 4)), encode(LARGE), LARGE),
    Knob("sae_tiles.GROUP", (1024, 2048, 4096, 8192), encode(LARGE)),
    Knob("sae_decode.WIDTH", (128, 256, 512), decode(FEW), FEW),
    Knob("sae_decode.WIDTH", (512, 1024, 2048), decode(LARGE), LARGE),
    Knob("sae_decode.CHUNK", (4, 8, 16), decode(LARGE)),
    Knob("sae_decode.WARPS", (2, 4, 8), decode(LARGE)),
]


def tune(knob: Knob, measure: Callable[[Case], Race]) -> Any | None:
    """The alternative that wins beyond noise, or None."""
    case, options = knob.case(), {repr(value): value for value in knob.alternatives()}

    def within(value: Any) -> Callable[[], Within]:
        return lambda: Within(case.ours, lambda: setting(knob, value))

    makers = {name: within(value) for name, value in options.items()}
    race = measure(replace(case, peers=makers, yardsticks={}, slack=1.0))
    if race.red:
        raise RuntimeError(f"tune: {case.name} is wrong before anything is tuned; run the tests first")
    race.run()
    best, lowest = None, 1.0
    for name, value in options.items():
        if name in race.row["missing"]:
            print(f"  {name}: {race.row['missing'][name]}")
            continue
        middle, low, high = interval(paired(race.row, name, OURS))
        print(f"  {name}: {middle:.3f} ({low:.3f} … {high:.3f}) of {knob.read()!r}")
        if high < 1 and middle < lowest:
            best, lowest = value, middle
    return best


@contextmanager
def setting(knob: Knob, value: Any) -> Iterator[None]:
    """The kernel's constant has another value inside."""
    before = knob.read()
    knob.write(value)
    try:
        yield
    finally:
        knob.write(before)


def write_table(file: Path, device: str, choices: dict[str, Any]) -> None:
    """Put the choices of a device class into the table of a file, beside those of other classes."""
    text = FILE.read_text(encoding="utf-8") if not file.exists() else file.read_text(encoding="utf-8")
    start, end = _table(text)
    table: dict[str, dict[str, Any]] = ast.literal_eval(text[start:end])
    table[device] = {**table.get(device, {}), **choices}
    replace_file(file, (text[:start] + pprint.pformat(table, width=110, sort_dicts=True) + text[end:]).encode())


def _table(text: str) -> tuple[int, int]:
    """Where the literal of TABLE stands."""
    head = re.search(r"^TABLE: .* = ", text, re.MULTILINE)
    if head is None:
        raise ValueError("tune: the file has no line that begins with 'TABLE: '; give kernels/_tuned.py")
    tail = re.compile(r"\n\n\ndef ").search(text, head.end())
    return head.end(), tail.start() if tail else len(text.rstrip())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", metavar="NAME", help="knobs whose name contains this")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="(default: kernels/_tuned.py)")
    options = parser.parse_args(argv)
    if PLACE == "cpu" or (TINY and not INTERPRETED):
        print("tune: no GPU here; STEERFAST_BENCH=tiny TRITON_INTERPRET=1 rehearses", file=sys.stderr)
        return 2
    sf.use_backend("triton")
    effort, clock = (REHEARSAL, HostClock()) if TINY else (replace(DeviceClock.thorough, seconds=4.0), DeviceClock())
    torch.manual_seed(0)
    peaks = measure_peaks(clock, AT.dtype, effort)
    chosen: dict[str, Any] = {}
    with torch.no_grad():
        for knob in KNOBS:
            if options.only not in knob.name:
                continue
            print(f"{knob.name}{'' if knob.size is None else f' at {knob.size}'}", flush=True)
            best = tune(knob, lambda case: Race(case, clock, peaks, effort))
            if best is not None:
                knob.write(best)
                chosen[knob.name] = best
    if PLACE == "cuda":
        from steerfast_kernels._tuned import device_class

        device = device_class(0)
    else:
        device = "rehearsal"
    if chosen and not (TINY and options.out == FILE):
        write_table(options.out, device, chosen)
    print(f"{device}: {len(chosen)} of {len(KNOBS)} knobs changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
