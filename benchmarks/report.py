"""From raw rows to one HTML page that needs nothing beside it, and the PNGs in it.

python benchmarks/report.py [ROWS …] --out FOLDER
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bars
import pictures
from lab.pairs import AGAIN, OURS, interval, is_calm, paired
from results import FOLDER, Row, newest, read

from steerfast.files.replace import replace_file

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b2733; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.7rem }
h2 { margin-top: 2.4rem; border-bottom: 1px solid #d5dbe1; padding-bottom: .3rem }
img { max-width: 100% }
figure { margin: 1rem 0 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th { text-align: left; background: #f2f5f8 }
td, th { padding: .25rem .6rem; border-bottom: 1px solid #e6eaee; vertical-align: top }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
.met { color: #1d7a45 } .MISSED { color: #b3261e; font-weight: 600 } .none { color: #7b8794 }
.pair { display: flex; flex-wrap: wrap; gap: 1rem } .pair figure { flex: 1 1 28rem; margin: 0 }
p.note { color: #52606d }
"""
PLACES = {"cuda": "GPU", "cpu": "CPU", "tiny": "Rehearsal: no figure counts"}


def page(every: Sequence[Row], quality: Sequence[Path], folder: Path) -> str:
    """The page of these rows; its pictures are written into a folder, too. Those of the quality study are taken as they are."""
    parts, rows = [], newest(every)
    for place, title in PLACES.items():
        mine = [row for (_, p), row in rows.items() if p == place]
        if mine:
            parts += _place(place, title, mine, folder)
    shown = [_verdict(v) for v in sorted(bars.verdicts(every), key=lambda v: v.outcome == "not measured yet")]
    parts += ["<h2>Bars: wanted, measured, met or not</h2>", _table(bars.HEAD, shown, numbers=())]
    for path in quality:
        picture = base64.b64encode(path.read_bytes()).decode()
        parts.append(f"<h2>Effect against damage: {html.escape(path.stem)}</h2>")
        parts.append(f'<figure><img alt="{html.escape(path.stem)}" src="data:image/png;base64,{picture}"></figure>')
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>steerfast: measurements</title><style>{STYLE}</style>\n<h1>steerfast: measurements</h1>\n"
        '<p class="note">Ratios are paired by round and given with 95 % bootstrap intervals. A floor is what the machine\'s own '
        f"copy and matrix product, measured in the same run, allow. How to read this: docs/method.md.</p>\n{body}</html>\n"
    )


def _place(place: str, title: str, rows: list[Row], folder: Path) -> list[str]:
    devices = sorted({row["run"]["device"] for row in rows})
    parts = [f"<h2>{html.escape(title)}: {html.escape(', '.join(devices))}</h2>", f"<p>{_origin(rows)}</p>"]
    timed = sorted(
        (row for row in rows if row.get("times", {}).get(OURS)), key=lambda row: (row.get("suite", ""), row["case"])
    )
    figures: dict[str, Any] = {
        "roofline": pictures.roofline(timed),
        "peers": pictures.ratios([row for row in timed if not row["case"].startswith("scaling")]),
        "overhead": pictures.overhead(timed),
    }
    parts += [_picture(f"{name}-{place}", figure, folder) for name, figure in figures.items() if figure is not None]
    scalings = pictures.scalings(timed)
    if scalings:
        drawn = [
            _picture(f"scaling-{place}-{name.replace(' ', '-').replace('=', '')}", figure, folder)
            for name, (figure, _) in scalings.items()
        ]
        parts += [f"<h3>Scaling</h3><div class='pair'>{''.join(drawn)}</div>"]
    pictures.close([f for f in figures.values() if f is not None] + [f for f, _ in scalings.values()])
    parts += ["<h3>Cases</h3>", _cases([row for row in timed if not row["case"].startswith("scaling")])]
    missing = sorted({f"{name}: {reason}" for row in rows for name, reason in row.get("missing", {}).items()})
    if missing:
        parts += ["<p>Not measured:</p><ul>", *(f"<li>{html.escape(line)}</li>" for line in missing), "</ul>"]
    return parts


def _origin(rows: list[Row]) -> str:
    """Versions, commits and dates behind a place."""
    run = max((row["run"] for row in rows), key=lambda run: run["date"])
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    dates = sorted({row["run"]["date"][:10] for row in rows})
    commits = sorted({str(row["run"]["commit"])[:10] + ("+" if row["run"]["changed"] else "") for row in rows})
    quick = sum(bool(row["run"].get("quick")) for row in rows)
    text = f"{versions}; driver {run['driver'] or 'none'}; threads {run['threads']}"
    text += f"; commit {', '.join(commits)}; {' to '.join(dates)}"
    return html.escape(text) + (f"; <b>{quick} of {len(rows)} cases from a quick run</b>" if quick else "")


def _cases(rows: Sequence[Row]) -> str:
    """One line per case: time, rates, share of the floor, ratio to each peer."""
    head = ["case", "ms", "GB/s", "GFLOP/s", "of peak", "noise", "peers: their time over ours"]
    lines = []
    for row in rows:
        taken = pictures.seconds(row)
        peers = [
            f"{html.escape(name)} {interval(paired(row, name, OURS))[0]:.2f}×"
            + ("" if is_calm(row, name, OURS) else " <i>(busy)</i>")
            for name in row["times"]
            if name not in (OURS, AGAIN)
        ]
        known = "floor" in row and row["operations"]
        lines.append([
            html.escape(row["case"]) + ("" if is_calm(row, OURS) else " <i>(busy)</i>"), f"{1e3 * taken:.4g}",
            f"{row['bytes'] / taken / 1e9:.1f}" if known else "", f"{row['operations'] / taken / 1e9:.1f}" if known else "",
            f"{row['floor'] / taken:.0%}" if known else "",
            f"{interval(paired(row, AGAIN, OURS))[0] - 1:+.1%}" if AGAIN in row["times"] else "", ", ".join(peers),
        ])  # fmt: skip
    return _table(head, lines, numbers=(1, 2, 3, 4, 5))


def _verdict(verdict: bars.Verdict) -> list[str]:
    cells = [html.escape(cell) for cell in bars.cells(verdict)]
    kind = "none" if verdict.value is None else verdict.outcome
    return [*cells[:-1], f'<span class="{kind}">{cells[-1]}</span>']


def _table(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="n">{c}</td>' if i in numbers else f"<td>{c}</td>" for i, c in enumerate(line))
        + "</tr>\n"
        for line in lines
    )
    return f"<table><tr>{top}</tr>\n{body}</table>"


def _picture(name: str, figure: Any, folder: Path) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    replace_file(folder / f"{name}.png", buffer.getvalue())
    code = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{html.escape(name)}" src="data:image/png;base64,{code}"></figure>'


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=Path, nargs="*", default=[FOLDER], help="files or folders of rows")
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help="(default: benchmarks/results)")
    options = parser.parse_args(argv)
    rows = read(options.rows)
    if not newest(rows):
        print("report: no measured rows; run `make bench` first", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    quality = sorted({path for source in options.rows if source.is_dir() for path in source.glob("quality*.png")})
    file = options.out / "report.html"
    replace_file(file, page(rows, quality, options.out).encode())
    print(f"{len(newest(rows))} cases: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
