"""`make bars`: every number that the project set itself, what was measured, on what, met or not.

    python benchmarks/bars.py [ROWS …] [--measured] [--markdown]

The bars are rows of bars.csv: issue, place (cuda, cpu), case (its exact name), what is compared, limit, and the words of the
bar. What is compared is one of

    time: A           seconds per call of A: ours or a baseline, by its name in the row
    over: A | B       time of A over time of B, paired by round
    best: A | B | …   time of A over that of the fastest of the others
    above: A | B      time of A minus time of B, in seconds, paired by round
    floor             ours over the floor of the case: its bytes and operations at the measured copy and product
    beyond: CASE      ours over the floor, less what the median of another case is over its own
    beside: X         ours less X times the floor, in seconds
    copy              bytes of the case per second, over the measured copy
    memory: A | B     memory that a call of A takes over that of B, or over a size that the case states
    value: KEY        a figure that the case names
    added: KEY        one that the steps of an engine name, round by round

A bar without a row is "not measured yet", and so is one whose calls should have been captured in a graph and could not be.
Where several processors have measured a case, the worse one decides; rows that are more than a week older than the newest of
them are history. Exit code 1 where a measured bar is missed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lab.pairs import interval, paired, pairs, times
from results import FOLDER, Row, newest, read

TABLE = Path(__file__).with_name("bars.csv")
HISTORY = datetime.timedelta(days=7)


class Bar(NamedTuple):
    """One number wanted, and where it is measured."""

    issue: str
    place: str
    case: str
    measure: str
    limit: str  # "<= 1.15" or ">= 50"
    words: str


class Verdict(NamedTuple):
    """What a bar came to: met, missed or not measured yet."""

    bar: Bar
    outcome: str
    value: tuple[float, float, float] | None = None  # the median and its 95 % interval
    device: str = ""
    date: str = ""


def bars() -> list[Bar]:
    """The table of bars."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [Bar(**row) for row in csv.DictReader(file)]


def rank(words: set[str], place: str) -> int:
    """The number of the first bar of a place whose case has all of these words; behind the last where none has."""
    cases = [set(bar.case.split()) for bar in bars() if bar.place == place]
    return next((i for i, case in enumerate(cases) if words <= case), len(cases))


Rows = dict[tuple[str, str], Row]


def samples(row: Row, measure: str, rows: Rows | None = None) -> list[float]:
    """What a row says about a measure, round by round; KeyError where it, or one of `rows` that is meant, says nothing."""
    kind, _, rest = measure.partition(":")
    names = [name.strip() for name in rest.split("|")]
    timed = ["ours"] if kind in ("floor", "beyond", "beside", "copy") else [] if kind in ("memory", "value") else names
    if failed := [name for name in timed if name in row.get("uncaptured", {})]:
        raise KeyError(f"not captured: {', '.join(failed)}")
    if kind == "time":
        return times(row, names[0])
    if kind == "over":
        return paired(row, names[0], names[1])
    if kind == "best":
        return max((paired(row, names[0], other) for other in names[1:]), key=statistics.median)
    if kind == "above":
        return [a - b for a, b in pairs(row, names[0], names[1])]
    if kind == "floor":
        return [t / row["floor"] for t in times(row, "ours")]
    if kind == "beyond":
        other = statistics.median(samples((rows or {})[rest.strip(), row["run"]["place"]], "floor"))
        return [share - other for share in samples(row, "floor")]
    if kind == "beside":
        return [t - float(rest) * row["floor"] for t in times(row, "ours")]
    if kind == "copy":
        return [row["bytes"] / t / row["copy"] for t in times(row, "ours")]
    if kind == "memory":
        return [row["memory"][names[0]] / row["memory"][names[1]]]
    if kind == "value":
        return [float(row["values"][names[0]])]
    if kind == "added":
        return list(row["added"][rest.strip()])
    raise ValueError(f"bars: unknown measure {measure!r}; see the head of this file")


def judge(bar: Bar, rows: Rows) -> Verdict:
    """Compare the newest row of a bar's case with its limit."""
    row = rows.get((bar.case, bar.place))
    try:
        values = samples(row, bar.measure, rows) if row else []
    except KeyError:
        values = []
    if row is None or not values:
        return Verdict(bar, "not measured yet")
    value, (sign, limit) = interval(values), bar.limit.split()
    met = value[0] <= float(limit) if sign == "<=" else value[0] >= float(limit)
    return Verdict(bar, "met" if met else "MISSED", value, row["run"]["device"], row["run"]["date"][:10])


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """What every bar came to, on the worse of the devices that measured it."""
    devices = sorted({row["run"]["device"] for row in rows})
    tables = [newest(row for row in rows if row["run"]["device"] == device) for device in devices]
    return [_worst(bar, [judge(bar, table) for table in tables]) for bar in bars()]


def _worst(bar: Bar, found: Sequence[Verdict]) -> Verdict:
    measured = {verdict: verdict.value[0] for verdict in found if verdict.value is not None}
    if not measured:
        return Verdict(bar, "not measured yet")
    days = {verdict: datetime.date.fromisoformat(verdict.date) for verdict in measured}
    recent = [verdict for verdict in measured if max(days.values()) - days[verdict] <= HISTORY]
    return (max if bar.limit.startswith("<=") else min)(recent, key=measured.__getitem__)


def number(value: float) -> str:
    """Three figures, without an exponent between a thousandth and a million."""
    if abs(value) >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 or value == 0 else f"{value:.2e}"


def cells(verdict: Verdict) -> list[str]:
    """A row of the printed table."""
    bar, value = verdict.bar, verdict.value
    shown = "" if value is None else f"{number(value[0])} ({number(value[1])} … {number(value[2])})"
    return [
        bar.issue,
        bar.words,
        bar.limit.replace("<=", "≤").replace(">=", "≥"),
        shown,
        verdict.device or bar.place,
        verdict.outcome,
    ]


HEAD = ["issue", "wanted", "limit", "measured (95 % interval)", "on", "outcome"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=Path, nargs="*", default=[FOLDER], help="files or folders of rows")
    parser.add_argument("--measured", action="store_true", help="only what the rows say something about")
    parser.add_argument("--markdown", action="store_true", help="a table for a document")
    options = parser.parse_args(argv)
    found = verdicts(read(options.rows))
    if options.measured:
        found = [verdict for verdict in found if verdict.value is not None]
    table = [HEAD, *map(cells, found)]
    if options.markdown:
        table.insert(1, ["---"] * len(HEAD))
        print("\n".join("| " + " | ".join(row) + " |" for row in table))
    else:
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    counts: dict[str, Any] = {
        name: sum(v.outcome == name for v in found) for name in ("met", "MISSED", "not measured yet")
    }
    print(f"\n{len(found)} bars: " + ", ".join(f"{count} {name}" for name, count in counts.items()))
    return int(counts["MISSED"] > 0)


if __name__ == "__main__":
    sys.exit(main())
