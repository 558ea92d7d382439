"""Compare two results: has anything become slower, beyond noise?

    python benchmarks/compare.py OLD NEW            files or folders of rows; exit code 1 on a regression
    python benchmarks/compare.py --repeat A B       two runs of the same code: how far did the ratios move?

Two runs see two machines, if only because one was busy. So a case is not compared by its seconds but by its ratio to a
baseline that it was paired with: q = (ours / baseline in NEW) / (ours / baseline in OLD), where the baseline is the same code
both times. q gets a 99 % bootstrap interval over the rounds of both runs; the calm ones where both runs had enough, otherwise
all of both. It is a regression where the whole interval lies above 1 by more than the noise: what ours measured a second time
differed from ours, in either run, at the far end of its own interval.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from lab.pairs import AGAIN, OURS, interval, is_calm, paired
from lab.rows import append_row
from results import Row, newest, read

BASELINES = ("eager", "naive chain", "all dimensions", "bare hooks", "hook that adds", "unsteered", "dense")
RESAMPLES = 2000
CONFIDENCE = 0.99


class Change(NamedTuple):
    """What became of one case."""

    case: str
    place: str
    baseline: str
    ratio: float
    low: float
    high: float
    noise: float

    @property
    def outcome(self) -> str:
        if self.low > 1 + self.noise:
            return "SLOWER"
        return "faster" if self.high < 1 / (1 + self.noise) else "same"


def anchor(old: Row, new: Row) -> str | None:
    """The first baseline that was timed in both."""
    return next((b for b in BASELINES if b in old.get("times", {}) and b in new.get("times", {})), None)


def noise(row: Row) -> float:
    """By how much the same function, timed twice in a round, was seen to differ from itself."""
    if len(row["times"].get(AGAIN, [])) < 2:
        return math.inf  # nothing tells noise from change
    _, low, high = interval(paired(row, AGAIN, OURS), CONFIDENCE)
    return max(high - 1, 1 / low - 1, 0.0)


def change(old: Row, new: Row, baseline: str) -> Change:
    """The change of a case, as its ratio to a baseline, with its interval; over all rounds where one run was disturbed."""
    if not (is_calm(old, OURS, baseline) and is_calm(new, OURS, baseline)):
        old, new = _undivided(old), _undivided(new)
    before, after = paired(old, OURS, baseline), paired(new, OURS, baseline)
    draw = random.Random(0)
    medians = sorted(
        statistics.median(draw.choices(after, k=len(after))) / statistics.median(draw.choices(before, k=len(before)))
        for _ in range(RESAMPLES)
    )
    tail = int((1 - CONFIDENCE) / 2 * RESAMPLES)
    return Change(
        new["case"], new["run"]["place"], baseline, statistics.median(after) / statistics.median(before),
        medians[tail], medians[-1 - tail], max(noise(old), noise(new)),
    )  # fmt: skip


def _undivided(row: Row) -> Row:
    """A row of which all rounds count."""
    return {key: value for key, value in row.items() if key != "calm"}


def compare(old: dict[tuple[str, str], Row], new: dict[tuple[str, str], Row]) -> tuple[list[Change], list[str]]:
    """Changes of the cases of both, on one kind of device; and what could not be compared, with the reason."""
    changes, without = [], []
    for key, row in new.items():
        before = old.get(key)
        if before is None:
            without.append(f"{row['case']}: not in the old result")
        elif before["run"]["device"] != row["run"]["device"]:
            without.append(f"{row['case']}: {before['run']['device']} then, {row['run']['device']} now")
        elif (baseline := anchor(before, row)) is None:
            without.append(f"{row['case']}: no baseline was timed in both")
        else:
            changes.append(change(before, row, baseline))
    without += [f"{case}: not in the new result" for case, place in old.keys() - new.keys()]
    return changes, without


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--repeat", action="store_true", help="the same code twice: report the largest move of a ratio")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --repeat: keep the largest move as a row")
    options = parser.parse_args(argv)
    old, new = newest(read([options.old])), newest(read([options.new]))
    changes, without = compare(old, new)
    print(f"{'case':52}{'baseline':>16}{'new/old':>9}{'99 % interval':>17}{'noise':>8}")
    for c in sorted(changes, key=lambda c: -c.ratio):
        print(f"{c.case:52}{c.baseline:>16}{c.ratio:9.3f}{c.low:9.3f} … {c.high:5.3f}{c.noise:8.1%}  {c.outcome}")
    for reason in without:
        print(f"not compared: {reason}")
    if not changes:
        print("compare: no case is in both results; measure the same suites twice", file=sys.stderr)
        return 2
    if options.repeat:
        moves = {c: max(c.ratio, 1 / c.ratio) - 1 for c in changes}
        worst, middle = max(changes, key=lambda c: moves[c]), statistics.median(moves.values())
        calm = [
            moves[c] for c in changes if all(is_calm(rows[c.case, c.place], OURS, c.baseline) for rows in (old, new))
        ]
        print(
            f"the ratios of {len(changes)} pairs moved by at most {moves[worst]:.1%} ({worst.case}, to {worst.baseline}), "
            f"half of them by less than {middle:.1%}"
            + (
                f"; the {len(calm)} that had the core's full speed both times, by at most {max(calm):.1%}"
                if calm
                else ""
            )
        )
        if options.out is not None:
            run = next(iter(new.values()))["run"]
            values = {
                "largest_move": moves[worst],
                "median_move": middle,
                "pairs": len(changes),
                "calm_pairs": len(calm),
            }
            values |= {"largest_calm_move": max(calm)} if calm else {}
            append_row(
                options.out,
                {"case": "repeat", "status": "ok", "values": values, "run": run},
            )
        return 0
    slower = [c for c in changes if c.outcome == "SLOWER"]
    print(f"{len(changes)} compared, {len(slower)} slower beyond noise")
    return int(bool(slower))


if __name__ == "__main__":
    sys.exit(main())
