"""The pictures of a report, each a function from rows to a figure; None where nothing of its kind was measured."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import matplotlib
from lab.pairs import AGAIN, OURS, interval, paired, times

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from fits import Law, fit
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from results import Row

INK, QUIET = "#1f3a5f", "#9aa5b1"
COLOURS = [
    "#1f6fb4",
    "#d1622b",
    "#2f8f5b",
    "#8a4fa3",
    "#b3892f",
    "#c23b5a",
    "#3f8f9e",
    "#6b6b6b",
    "#7a9a2e",
    "#a0522d",
    "#4b5fc7",
    "#b0679b",
]
SCALING = re.compile(r"scaling (?P<axis>[^,]+), (?P<what>.+) = \d+")
plt.rcParams.update({
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "axes.titlesize": 11, "axes.titleweight": "bold", "legend.frameon": False, "figure.dpi": 130, "savefig.bbox": "tight",
})  # fmt: skip


def seconds(row: Row) -> float:
    """Median seconds of ours."""
    return interval(times(row, OURS))[0]


def family(case: str) -> str:
    """The op of a case: its name up to the first size."""
    return re.split(r" (?:\w+=|\d)", case)[0]


def roofline(rows: Iterable[Row]) -> Figure | None:
    """Operations per second against operations per byte, below what the machine was seen to do."""
    ops = [row for row in rows if row.get("operations") and row.get("suite") in OPS]
    if not ops:
        return None
    figure, axes = plt.subplots(figsize=(8.5, 5.2))
    names = sorted({family(row["case"]) for row in ops})
    for name, colour in zip(names, _cycle(len(names)), strict=True):
        mine = [row for row in ops if family(row["case"]) == name]
        x = [row["operations"] / row["bytes"] for row in mine]
        y = [row["operations"] / seconds(row) for row in mine]
        axes.loglog(x, y, "o", ms=5, color=colour, label=name, alpha=0.85)
    copy, product = (sorted(row[key] for row in ops)[len(ops) // 2] for key in ("copy", "product"))
    low, high = axes.get_xlim()
    high = max(high, 4 * product / copy)
    grid = [low * (high / low) ** (i / 200) for i in range(201)]
    axes.loglog(grid, [min(copy * g, product) for g in grid], color=INK, lw=1.6, label="measured copy and product")
    axes.set(
        xlim=(low, high), xlabel="operations per byte that must move (FLOP / byte)", ylabel="operations per second (FLOP/s)",
        title=f"Roofline: copy {copy / 1e9:,.0f} GB/s, product {product / 1e9:,.0f} GFLOP/s",
    )  # fmt: skip
    axes.legend(fontsize=8, ncol=2, loc="lower right")
    return figure


UNCHECKED = (
    "published way",
    "published way, by hand",
    "hotwire, in place",
)  # other libraries' work that is no other way to the same numbers
OPS = ("add", "add_rms_norm", "subspace", "sae_encode", "sae_decode", "flow", "training")


def ratios(rows: Iterable[Row]) -> Figure | None:
    """Time of each peer over ours, with its interval; right of 1 we are faster."""
    ops = [row for row in rows if row.get("suite") in OPS and len(row["times"]) > 2]
    if not ops:
        return None
    bars = [
        (row, peer)
        for row in ops
        for peer in row["times"]
        if (peer in row.get("errors", {}) and peer != OURS) or peer in UNCHECKED
    ]
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(8.5, 1.2 + 0.19 * len(bars)))
    peers = sorted({peer for _, peer in bars})
    colours = dict(zip(peers, _cycle(len(peers)), strict=True))
    for i, (row, peer) in enumerate(bars):
        middle, low, high = interval(paired(row, peer, OURS))
        axes.plot([low, high], [i, i], color=colours[peer], lw=2, alpha=0.6)
        axes.plot(middle, i, "o", ms=4.5, color=colours[peer])
    for peer in peers:
        axes.plot([], [], "o", color=colours[peer], label=peer)
    axes.axvline(1, color=INK, lw=1)
    shown = [row["case"] if i == 0 or bars[i - 1][0] is not row else "" for i, (row, _) in enumerate(bars)]
    axes.set_yticks(range(len(bars)), shown, fontsize=7)
    axes.set(
        xscale="log", xlabel="time of the peer over ours (right of 1: ours is faster)", title="Peers, paired in one run"
    )
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}×"))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.35 / figure.get_figheight() * 1.6), ncol=5)
    return figure


def scalings(rows: Iterable[Row]) -> dict[str, tuple[Figure, Law]]:
    """One picture per varied size: time and memory against it, with the fitted law of time."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if match := SCALING.fullmatch(row["case"]):
            found[f"{match['what']} against {match['axis']}"].append(row)
    return {name: _scaling(name, points) for name, points in sorted(found.items()) if len(points) > 1}


def _scaling(name: str, rows: list[Row]) -> tuple[Figure, Law]:
    rows = sorted(rows, key=lambda row: row["memory"]["size"])
    sizes, taken = [row["memory"]["size"] for row in rows], [interval(times(row, OURS)) for row in rows]
    law = fit(sizes, [t[0] for t in taken])
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    middle, low, high = ([1e3 * t[i] for t in taken] for i in range(3))
    axes.fill_between(sizes, low, high, color=COLOURS[0], alpha=0.2)
    axes.loglog(sizes, middle, "o-", color=COLOURS[0], label="time")
    if rows[0]["operations"]:
        axes.loglog(sizes, [1e3 * row["floor"] for row in rows], "--", color=QUIET, lw=1, label="floor")
    if law.bend is not None:
        axes.axvline(law.bend, color=QUIET, lw=0.8, ls=":")
    axes.set(xlabel=name.rpartition(" against ")[2], ylabel="ms per call", title=f"{name}: {law}")
    axes.title.set_fontsize(9)
    lines, labels = axes.get_legend_handles_labels()
    memory = [
        (s, row["memory"]["ours"] / 1e6) for s, row in zip(sizes, rows, strict=True) if row["memory"].get("ours", 0) > 0
    ]
    if len(memory) > 1:
        right = axes.twinx()
        right.loglog(*zip(*memory, strict=True), "s-", ms=4, color=COLOURS[1], lw=1, label="peak memory of a call")
        amounts = [amount for _, amount in memory]
        right.set_ylim(min(amounts) / 3, max(amounts) * 3)  # a constant must look like one
        right.set_ylabel("MB", color=COLOURS[1])
        _plain(right.yaxis)
        right.grid(visible=False)
        more = right.get_legend_handles_labels()
        lines, labels = lines + more[0], labels + more[1]
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis)
    axes.legend(lines, labels, fontsize=8, loc="upper left")
    return figure, law


def overhead(rows: Iterable[Row]) -> Figure | None:
    """Steered over unsteered, end to end."""
    whole = [row for row in rows if "unsteered" in row["times"] and not row["case"].startswith("scaling")]
    bars = [(row, arm) for row in whole for arm in row["times"] if arm not in ("unsteered", AGAIN)]
    if not bars:
        return None
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + 0.27 * len(bars)))
    for i, (row, arm) in enumerate(bars):
        middle, low, high = interval(paired(row, arm, "unsteered"))
        colour = COLOURS[0] if arm == OURS else QUIET
        axes.plot([low, high], [i, i], color=colour, lw=2.5, alpha=0.6)
        axes.plot(middle, i, "o", ms=6, color=colour)
    axes.axvline(1, color=INK, lw=1)
    axes.set_yticks(range(len(bars)), [f"{row['case']}: {arm}" for row, arm in bars], fontsize=8)
    axes.set(xlabel="time over the same model unsteered (1: no overhead)", title="End to end")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def _plain(axis: Any) -> None:
    """Numbers as people write them, at the decades, and between them where there are few."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 100 * low else (1,), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else f"{v:.2g}"))
    axis.set_minor_formatter(FuncFormatter(lambda v, _: ""))


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def close(figures: Iterable[Any]) -> None:
    """Give the memory of figures back."""
    for figure in figures:
        plt.close(figure)
