"""`python -m benchmarks.static`: what the kernels need, move and issue, and what that predicts; no GPU takes part.

    python -m benchmarks.static [NAME …] [--targets sm_90 gfx942] [--json] [--hold]
    python -m benchmarks.static --published [--json]

--published sets kernels whose times others measured beside what is predicted for them, and says by how much that misses.
--json keeps all of it as benchmarks/results/static.json; --hold writes the counts that tests/test_static.py holds, for sm_90 and
the Triton version that runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton
from lab.rows import circumstances

from .cases import CASES
from .cases import HELD as KEPT
from .constants import DEFAULT, TARGETS, Range
from .model import Row, as_json, binds, count_all, rows, time_of
from .published import PUBLISHED, SOURCE, miss

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "static.json"
HELD = ROOT / "tests" / "data" / "static.json"
COUNTS = (
    "case", "target", "kernel", "grid", "regs", "stack", "shared", "per SM", "flight kB", "access", "tensor",
    "cycles/tok", "L2 B/tok", "DRAM B/tok",
)  # fmt: skip
OTHERS = ROOT / "benchmarks" / "results" / "static-published.json"
MISSES = ("case", "published as", "measured µs", "measured bound", "PREDICTED µs", "bound by", "miss")
TIMES = ("case", "launches", "torch", "floor µs", "PREDICTED µs", "of floor", "bound by")


def table(head: tuple[str, ...], lines: list[tuple[object, ...]]) -> str:
    """Columns as wide as their widest cell."""
    cells = [head, *(tuple(map(str, line)) for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(f"{x:<{w}}" for x, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def counts_of(row: Row) -> list[tuple[object, ...]]:
    """A line for each launch; what repeats is said once."""
    lines = []
    for kernel in dict.fromkeys(row.kernels):
        walk, needs, times = kernel.walk, kernel.resources, row.kernels.count(kernel)
        name = kernel.name.strip("_").removesuffix("_kernel") + (f" ×{times}" if times > 1 else "")
        per_token = [kernel.l2 / row.tokens, kernel.memory.long / row.tokens]
        read = ("–", "–", kernel.tensor or "–", "–")
        if walk is not None:
            cycles = walk.cycles * kernel.programs / row.tokens
            read = (f"{kernel.in_flight / 1024:.0f}", walk.narrowest or "–", kernel.tensor or "–", f"{cycles:.0f}")
        held = f"{kernel.resident} of {needs.programs}"
        head = row.case, row.target, name, "×".join(map(str, kernel.grid))
        lines.append(
            (*head, needs.registers, needs.stack, needs.shared, held, *read, *(f"{each:.0f}" for each in per_token))
        )
    return lines


def time_of_row(row: Row) -> tuple[object, ...]:
    """A line of predictions."""
    assert row.predicted is not None
    short, long = row.predicted
    return (
        row.case, len(row.kernels), sum(row.beside.values()), f"{1e6 * row.floor:.1f}", f"{1e6 * short:.1f} … {1e6 * long:.1f}",
        f"{short / row.floor:.2f} … {long / row.floor:.2f}", binds(row),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.static", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"short names of cases: {', '.join(CASES)}")
    parser.add_argument("--targets", nargs="+", default=DEFAULT, choices=TARGETS)
    parser.add_argument("--published", action="store_true", help="kernels of others, whose times are known")
    parser.add_argument("--json", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    parser.add_argument("--hold", action="store_true", help=f"write {HELD.relative_to(ROOT)}")
    options = parser.parse_args(argv)
    if unknown := set(options.names) - set(CASES):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; known are {', '.join(CASES)}")
    if options.published:
        return beside_published(options.json)
    names = options.names or list(CASES)
    counted = count_all(names)
    found = {name: rows(name, counted[name], options.targets) for name in names}
    every = [row for each in found.values() for row in each]
    print(f"triton {triton.__version__}. Counts, read from the machine code and the interpreter:\n")
    print(table(COUNTS, [line for row in every for line in counts_of(row)]))
    timed = [row for row in every if row.predicted is not None]
    if timed:
        print("\nPredictions for an H200, in no way measured; the constants are assumed (how far off: --published):\n")
        print(table(TIMES, [time_of_row(row) for row in timed]))
    if options.json:
        run = {"triton": triton.__version__, "commit": circumstances("predicted")["commit"]}
        text = json.dumps(
            {"what": "predicted, not measured", "run": run, "rows": [as_json(row) for row in every]}, indent=1
        )
        RESULTS.write_text(text + "\n", encoding="utf-8")
    if options.hold:
        hold({name: next(row for row in found[name] if row.target == "sm_90") for name in names if name in KEPT})
    return 0


def misses(names: Iterable[str] = PUBLISHED) -> list[dict[str, Any]]:
    """What was measured and what is predicted, without the launch, of published kernels."""
    found = []
    counted = count_all(names)
    for name in names:
        one = PUBLISHED[name]
        row = rows(name, counted[name], ["sm_90"])[0]
        predicted = Range(*(round(1e6 * end, 1) for end in time_of(row.kernels[0])))
        found.append({
            "case": name, "published_as": one.kernel, "measured_microseconds": one.microseconds, "measured_bound": one.bound,
            "predicted_microseconds": predicted._asdict(), "bound_by": binds(row),
            "miss": round(miss(one.microseconds, predicted), 2),
        })  # fmt: skip
    return found


def beside_published(keep: bool) -> int:
    """Print the table of misses, and keep it."""
    found = misses()
    lines = []
    for row in found:
        predicted = "{short:.0f} … {long:.0f}".format(**row["predicted_microseconds"])
        lines.append((*list(row.values())[:4], predicted, row["bound_by"], row["miss"]))
    print(table(MISSES, lines))
    if keep:
        text = json.dumps({"triton": triton.__version__, "source": SOURCE, "rows": found}, indent=1, ensure_ascii=False)
        OTHERS.write_text(text + "\n", encoding="utf-8")
    return 0


def hold(found: dict[str, Row]) -> None:
    """Keep the counts of this Triton version; those of others stand."""
    held = json.loads(HELD.read_text(encoding="utf-8")) if HELD.exists() else {}
    held.setdefault(triton.__version__, {}).update({name: row.counts() for name, row in found.items()})
    HELD.write_text(json.dumps(held, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
