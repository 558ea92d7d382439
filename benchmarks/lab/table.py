"""The table of a run: a line for each row, with its baselines."""

from __future__ import annotations

from .pairs import AGAIN, OURS, interval, is_calm, paired, times
from .rows import Row

HEAD = f"{'case':44}{'ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'of peak':>9}{'eager':>8}{'compile':>9}{'noise':>7}"
LEGEND = (
    "of peak: the floor, by the copy and the product above, over the time. eager, compile: their time over ours, paired. "
    "noise: ours a second time over ours. busy: some of it was measured on a disturbed core. "
    "not captured: launches from the host, where a graph was to be measured; no bar takes these times."
)


def line(row: Row) -> str:
    """One row of the table."""
    if row["status"] != "ok":
        return f"{row['case']:44}{row['status']}: {row['missing'].get(OURS, '')}"
    seconds = interval(times(row, OURS))[0]
    cells = [
        f"{interval(paired(row, name, OURS))[0]:{width}.2f}" if name in row["times"] else f"{'-':>{width}}"
        for name, width in (("eager", 8), ("torch.compile", 9), (AGAIN, 7))
    ]
    rates = f"{row['bytes'] / seconds / 1e9:8.1f}{row['operations'] / seconds / 1e9:9.1f}"
    shown = [name for name in (OURS, "eager", "torch.compile", AGAIN) if name in row["times"]]
    busy = "" if all(is_calm(row, OURS, name) for name in shown) else "  busy"
    if uncaptured := row.get("uncaptured"):
        busy += f"  not captured: {', '.join(uncaptured)}"
    return f"{row['case']:44}{1e3 * seconds:10.4f}{rates}{row['floor'] / seconds:9.0%}{''.join(cells)}{busy}"
