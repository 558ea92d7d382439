"""Reading raw rows: one JSON object a line, the newest of each case and place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lab.pairs import KINDS

Row = dict[str, Any]
FOLDER = Path(__file__).parent / "results"


def read(paths: Iterable[Path]) -> list[Row]:
    """All rows of files and folders, oldest run first. A line that a crash cut short is named and skipped.

    What `sae_training.py` writes is read as rows, too.
    """
    rows = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; give a file of rows or a folder of them")
        for file in _files(path) if path.is_dir() else [path]:
            if file.suffix == ".json":
                rows += FOREIGN[file.name.partition("-")[0]](json.loads(file.read_text(encoding="utf-8")))
                continue
            for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                try:
                    row = json.loads(text)
                    row["case"], row["run"]["place"], row["run"]["date"]
                except (ValueError, KeyError, TypeError):
                    print(f"{file.name}, line {number}: no row; skipped", file=sys.stderr)
                else:
                    rows.append(row)
    return sorted(rows, key=lambda row: row["run"]["date"])


def _files(folder: Path) -> list[Path]:
    return sorted(
        f
        for f in folder.iterdir()
        if f.suffix == ".jsonl" or (f.suffix == ".json" and f.name.partition("-")[0] in FOREIGN)
    )


def _sae_training(found: Row) -> list[Row]:
    """Seconds of a training step of each trainer."""
    times = {"ours" if name == "steerfast" else name: taken for name, taken in found["seconds"].items()}
    return [{**_row("sae trainer", "training steps", times, found, "cpu"), "missing": found["missing"]}]


def _row(case: str, suite: str, times: dict[str, list[float]], found: Row, place: str) -> Row:
    run = {
        "place": place, "device": found["processor"], "date": found["date"] + "T00:00:00+00:00", "commit": found.get("commit"),
        "changed": None, "versions": found["versions"], "driver": None, "threads": 1, "quick": False,
    }  # fmt: skip
    return {"case": case, "suite": suite, "status": "ok", "times": times, "missing": {}, "run": run}


FOREIGN: dict[str, Callable[[Row], list[Row]]] = {"sae_training.json": _sae_training}


def measured(row: Row) -> bool:
    """Whether a row holds at least one whole round, or a value."""
    return row.get("status") in ("ok", "interrupted") and bool(row.get("times", {}).get("ours") or row.get("values"))


def newest(rows: Iterable[Row]) -> dict[tuple[str, str], Row]:
    """(case, place) -> its newest measured row. A thorough run counts before a quick one, whatever its date.

    The rows of one series are one measurement: their rounds add up.
    """
    found: dict[tuple[str, str], Row] = {}
    for row in filter(measured, rows):
        key = row["case"], row["run"]["place"]
        before = found.get(key)
        if before is None or before["run"].get("quick") or not row["run"].get("quick"):
            found[key] = row if before is None or not _same_series(before, row) else _together(before, row)
    return found


def _same_series(before: Row, row: Row) -> bool:
    series = row["run"].get("series")
    return series is not None and series == before["run"].get("series")


def _together(before: Row, row: Row) -> Row:
    """The newer row with the rounds of both, of the names that both have."""
    kinds = [kind for kind in KINDS if kind in before and kind in row]
    added = {
        kind: {name: before[kind][name] + taken for name, taken in row[kind].items() if name in before[kind]}
        for kind in kinds
    }
    missing = {**before.get("missing", {}), **row.get("missing", {})}
    return {**row, **added, "missing": missing}
