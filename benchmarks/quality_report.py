"""The table, the picture and the summary of a file of `quality.py`.

    python benchmarks/quality_report.py [--against METHOD] FILE …
    python benchmarks/quality_report.py --into docs/quality.md

The second makes anew what stands in a document between `<!-- tables FILE METHOD -->` or `<!-- counts FILE METHOD -->` and
`<!-- end -->`, from files beside the results; METHOD is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from quality_methods import METHODS
from quality_scores import repetition
from quality_tradeoff import Interval, Run, Summary, at_damage, compare, reach, read

from steerfast._null import Null
from steerfast.files.replace import replace_file

DAMAGES = (0.1, 0.3)  # nats per token: perplexity 11 % and 35 % higher
AGAINST = "caa"
RANDOM = "random"  # the null of random directions, beside those that bear a method's name
POINTS = 25  # of a curve that is drawn
LEAST = 0.005  # nats of a difference: less is shown as 0.00
TRUSTED = 0.65  # accuracy on held-out texts from which a classifier's verdict is shown
LABELS = {key: method.label for key, method in METHODS.items()} | {"sae": "SAE amplification"}

RESULTS = Path(__file__).parent / "results"
MARKED = re.compile(r"<!-- (tables|counts) (\S+) (\S+) -->.*?<!-- end -->", re.DOTALL)

Written = tuple[list[float], list[float] | None]  # repetition and classifier by strength, from the unsteered model on


def report(path: Path, against: str = AGAINST) -> None:
    """Print the tables of a file, each method beside one of them, and draw its picture beside the file."""
    found, known = read_file(path, against)
    print(f"{tables(found, known, against)}\n\n{overall(known, against)}")
    if against == AGAINST:
        picture(found, known, path.with_suffix(".png"))
    print(f"\npicture: {path.with_suffix('.png')}")


def into(document: Path) -> None:
    """Make the tables of a document anew, and the pictures of their files."""

    def made(match: re.Match[str]) -> str:
        what, name, against = match.groups()
        found, known = read_file(RESULTS / name, against)
        if against == AGAINST:
            picture(found, known, (RESULTS / name).with_suffix(".png"))
        text = f"{tables(found, known, against)}\n\n" if what == "tables" else ""
        return f"<!-- {what} {name} {against} -->\n\n{text}{overall(known, against)}\n\n<!-- end -->"

    text = document.read_text(encoding="utf-8")
    replace_file(document, MARKED.sub(made, text).encode())


def read_file(path: Path, against: str) -> tuple[dict[str, Any], dict[str, list[dict[str, Summary]]]]:
    """A file, and by concept what every method reaches at both damages beside one of them."""
    found = json.loads(path.read_text(encoding="utf-8"))
    measured = [concept for concept in found["concepts"] if any(row["concept"] == concept for row in found["rows"])]
    return found, {concept: [summaries(found, concept, most, against) for most in DAMAGES] for concept in measured}


def tables(found: Mapping[str, Any], known: Mapping[str, Sequence[dict[str, Summary]]], against: str) -> str:
    """A table for each concept."""
    return "\n\n".join(table(concept, found, one, against) for concept, one in known.items())


def runs_of(found: Mapping[str, Any], concept: str, what: str = "odds") -> dict[str, list[Run]]:
    """Method -> its runs, of the training sets that every method has seen; the effect is the gain of "odds" or "wanted"."""
    base, tokens = found["concepts"][concept]["unsteered"], np.array(found["concepts"][concept]["tokens"], dtype=float)
    rows: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in found["rows"]:
        if row["concept"] == concept:
            rows[row["method"], row["seed"]].append(row)
    methods = [key for key in LABELS if any(method == key for method, _ in rows)]
    seeds = sorted(set.intersection(*({s for m, s in rows if m == key} for key in methods))) if methods else []
    if not seeds or AGAINST not in methods:
        raise ValueError(
            f"quality: {concept!r} has no training set that all methods, {AGAINST} among them, have seen; run on"
        )
    runs = {}
    for key in methods:
        parts = [sorted(rows[key, seed], key=lambda row: row["strength"]) for seed in seeds]
        runs[key] = [
            Run(
                np.array([row[what] for row in part]) - np.array(base[what]),
                (np.array(base["reference"]) - np.array([row["reference"] for row in part])) / tokens,
                tokens / tokens.sum(),
            )
            for part in parts
        ]
    return runs


def summaries(
    found: Mapping[str, Any], concept: str, most: float, against: str = AGAINST, what: str = "odds"
) -> dict[str, Summary]:
    """What every method reaches at a damage."""
    return compare(runs_of(found, concept, what), found["concepts"][concept]["groups"], most, against)


def written(found: Mapping[str, Any], concept: str, key: str) -> Written | None:
    """Repetition and the classifier's log-odds by strength, as changes from the unsteered model; None: nothing was written."""
    base = found["concepts"][concept]["unsteered"]
    rows = [r for r in found["rows"] if r["concept"] == concept and r["method"] == key and r["seed"] == 0]
    rows = sorted(rows, key=lambda row: row["strength"])
    if "texts" not in base or not rows:
        return None
    again = [float(np.mean([repetition(text) for text in row["texts"]])) for row in [base, *rows]]
    trusted = (found["concepts"][concept]["classifier accuracy"] or 0) >= TRUSTED
    verdict = [float(np.mean(row["classifier"])) for row in [base, *rows]] if trusted else None
    return again, None if verdict is None else [v - verdict[0] for v in verdict]


def null_effects(found: Mapping[str, Any], concept: str, key: str, most: float) -> list[float]:
    """The effects of a null's draws at a damage, or at their last strength below it."""
    base = np.array(found["concepts"][concept]["unsteered"]["odds"])
    effects = []
    for row in found.get("nulls", ()):
        if row["concept"] == concept and row["method"] == key:
            damage = np.array([0.0, *(one["damage"] for one in row["curve"])])
            effect = np.array([0.0, *(float(np.mean(np.array(one["odds"]) - base)) for one in row["curve"])])
            effects.append(read(effect, reach(damage, most)))
    return effects


def did_as_well(found: Mapping[str, Any], concept: str, key: str, most: float) -> str:
    """How many shuffled fits and random directions did as well as the first training set of a method, at a damage."""
    run = runs_of(found, concept)[key][0]
    ones = np.ones(run.effects.shape[1]), np.ones(run.losses.shape[1])
    damage, effect = run.curve(*ones)
    kinds = [null_effects(found, concept, name, most) for name in (key, RANDOM)]
    null = Null.of(read(effect, reach(damage, most)), *kinds)
    counts = [f"{sum(v >= null.effect for v in side)} of {len(side)}" if side else "–" for side in kinds]
    return ", ".join(counts) + ("" if null.beaten else " (no better)")


def reaches(one: Summary, most: float) -> bool:
    """Whether a method was read at that damage, and not at its last strength below it: only then is damage equal."""
    return one.reached > 0.99 * most


def side(difference: Interval) -> int:
    """1, -1: better, worse beyond the interval; 0: not told apart, or by less than tables show."""
    if abs(difference.value) < LEAST:
        return 0
    return (difference.low > 0) - (difference.high < 0)


def table(concept: str, found: Mapping[str, Any], known: Sequence[dict[str, Summary]], against: str = AGAINST) -> str:
    """A table of one concept in Markdown, methods in their own order; bold: the interval of the difference excludes 0."""
    low, high = known
    found_base = {most: one[against] for most, one in zip(DAMAGES, known, strict=True)}
    runs = runs_of(found, concept)
    ones = np.ones(len(found["concepts"][concept]["groups"])), np.ones(len(found["concepts"][concept]["tokens"]))
    seeds = len(runs[against])
    parts = "wanted" in found["concepts"][concept]["unsteered"]
    wanted = summaries(found, concept, DAMAGES[0], against, "wanted") if parts else None
    nulled = any(row["concept"] == concept for row in found.get("nulls", ()))
    accuracy = found["concepts"][concept]["classifier accuracy"]
    verdict = "none" if accuracy is None else f"{accuracy:.0%} right on held-out texts"
    other = "CAA" if against == AGAINST else LABELS[against]
    lines = [
        f"**{concept}** ({len(ones[0])} held-out pairs, {len(ones[1])} neutral texts, {seeds} training sets; "
        f"classifier: {verdict})",
        "",
        f"| method | effect at damage {DAMAGES[0]} | minus {other} | effect at damage {DAMAGES[1]} | minus {other} "
        f"| mean up to {DAMAGES[1]} | classifier at {DAMAGES[1]} | repetition at {DAMAGES[1]} |"
        + (f" of the effect at {DAMAGES[0]}: the wanted text |" if parts else "")
        + (f" nulls as good at {DAMAGES[1]}: shuffled, random |" if nulled else ""),
        "|---|---|---|---|---|---|---|---|" + parts * "---|" + nulled * "---|",
    ]
    for key in low:
        words = written(found, concept, key)
        where = reach(runs[key][0].curve(*ones)[0], DAMAGES[1])
        verdict = "–" if words is None or words[1] is None else f"{read(np.array(words[1]), where):+.2f}"
        again = "–" if words is None else f"{read(np.array(words[0]), where):.2f}"
        cells = [LABELS[key]]
        for most, one in zip(DAMAGES, (low[key], high[key]), strict=True):
            short = "" if reaches(one, most) else f" (damage {one.reached:.2f})"
            difference = one.difference
            sure = key != against and side(difference) != 0
            shown = f"**{difference}**" if sure else str(difference)
            if key == against or not (reaches(one, most) and reaches(found_base[most], most)):
                shown = "–"
            cells += [f"{one.effect}{short}", shown]
        more = [] if wanted is None else [str(wanted[key].effect)]
        more += [did_as_well(found, concept, key, DAMAGES[1])] if nulled else []
        lines.append(f"| {' | '.join([*cells, str(high[key].area), verdict, again, *more])} |")
    return "\n".join(lines)


def overall(known: Mapping[str, Sequence[dict[str, Summary]]], against: str = AGAINST) -> str:
    """How often, over concepts and damages, a method is better or worse than another beyond its interval."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for most, found in ((most, one) for both in known.values() for most, one in zip(DAMAGES, both, strict=True)):
        for key, one in found.items():
            if not (reaches(one, most) and reaches(found[against], most)):
                continue
            counts[key][1 - side(one.difference)] += 1
    lines = [
        f"| against {LABELS[against]}, all concepts, both damages | better | no difference | worse |",
        "|---|---|---|---|",
    ]
    lines += [f"| {LABELS[key]} | {' | '.join(map(str, n))} |" for key, n in counts.items() if key != against]
    return "\n".join(lines)


def picture(found: Mapping[str, Any], known: Mapping[str, Sequence[dict[str, Summary]]], path: Path) -> None:
    """Above: effect against damage; below: effect at equal damage with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    concepts, most = list(known), DAMAGES[1]
    figure, axes = plt.subplots(2, len(concepts), figsize=(2 + 4.6 * len(concepts), 9.5), squeeze=False)
    for column, concept in enumerate(concepts):
        above, below = axes[0, column], axes[1, column]
        runs, found_here = runs_of(found, concept), known[concept][-1]
        for i, (key, all_runs) in enumerate(runs.items()):
            ones = np.ones(all_runs[0].effects.shape[1]), np.ones(all_runs[0].losses.shape[1])
            damage = np.linspace(0.0, min(1.0, *(run.curve(*ones)[0].max() for run in all_runs)), POINTS)
            effect = [at_damage(all_runs, *ones, float(most)) for most in damage]
            style = {"color": plt.get_cmap("tab20")(i), "marker": "os^vDP*X<>ph"[i % 12], "ms": 5, "markevery": 3}
            flow = LABELS[key].startswith("ODE") or key.startswith("natural")
            above.plot(damage, effect, ls="-" if flow else "--", lw=1.4, label=LABELS[key], **style)
            one = found_here[key].effect
            below.plot([one.low, one.high], [i, i], color=style["color"], lw=2.2)
            below.plot(one.value, i, **style)
        band(above, found, concept)
        above.axvline(most, color="#9aa5b1", lw=0.8, ls=":")
        above.set(title=concept, xlabel="damage (nats per neutral token)", xlim=(-0.03, 1.0))
        below.set(xlabel=f"effect at damage {most} or last strength below (nats)")
        below.axvline(found_here[AGAINST].effect.value, color="#9aa5b1", lw=0.8, ls=":")
        below.set_yticks(range(len(runs)), [LABELS[key] for key in runs] if column == 0 else [""] * len(runs))
        below.invert_yaxis()
        for one in (above, below):
            one.grid(alpha=0.25)
            one.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("effect: gain in log-odds (nats)")
    lines, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="lower center", ncol=min(4, 1 + len(concepts)), frameon=False, fontsize=9)
    layer = found["run"]["layer"]
    where = "every layer" if layer == "all" else f"layer {layer}"
    figure.suptitle(f"{found['run']['model']}, {where}: effect against damage")
    figure.tight_layout(rect=(0, 0.07, 1, 0.98))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def band(axis: Any, found: Mapping[str, Any], concept: str) -> None:
    """What random directions do at each damage, from the least of them to the most."""
    damages = np.linspace(0.0, DAMAGES[-1], 13)
    drawn = np.array([null_effects(found, concept, RANDOM, most) for most in damages])
    if drawn.size:
        label = f"random directions ({drawn.shape[1]})"
        axis.fill_between(damages, drawn.min(1), drawn.max(1), color="#9aa5b1", alpha=0.35, lw=0, label=label)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--into", type=Path, metavar="DOCUMENT", help="make its tables anew")
    parser.add_argument("--against", default=AGAINST, choices=list(LABELS), help="default: %(default)s")
    args = parser.parse_args(argv)
    if not args.files and args.into is None:
        parser.error("name files of quality.py, or a document with --into")
    for path in args.files:
        report(path, args.against)
    if args.into is not None:
        into(args.into)


if __name__ == "__main__":
    main(sys.argv[1:])
