"""The outcomes of the zoo as a committed table, `tests/data/zoo.json`, and as a page for people, `docs/models.md`."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TABLE, PAGE = HERE / "data" / "zoo.json", HERE.parent / "docs" / "models.md"

RANKS = {"right": 3, "refused": 2, "not comparable": 1, "does not build": 1, "raised": 0, "wrong": -1}
BAD = ("wrong", "raised")
"""What no pair should be: silently something else, and an error that is not steerfast's."""


def word(outcome: str) -> str:
    """right, refused, wrong, raised, not comparable or does not build."""
    return outcome.partition(":")[0]


def reason(outcome: str) -> str:
    return outcome.partition(": ")[2]


def worse(old: str | None, new: str) -> bool:
    """Whether a check went down; a pair that the table does not know may be anything but wrong or raised."""
    if old is None:
        return word(new) in BAD
    if word(old) == word(new) == "right":
        return _layers(new) < _layers(old)
    return RANKS[word(new)] < RANKS[word(old)]


def _layers(outcome: str) -> int:
    """In how many layers a site is right; all, if nothing is said."""
    found = re.search(r"(\d+) of \d+ layers", outcome)
    return int(found.group(1)) if found else 10**6


def load() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def entry(found: dict[str, Any]) -> dict[str, str]:
    """The outcomes of one pair; one entry for a pair of which there is one thing to say."""
    outcomes: dict[str, str] = found["outcomes"]
    return {"every check": next(iter(outcomes.values()))} if len(set(outcomes.values())) == 1 else outcomes


def spread(one: dict[str, str], checks: Iterable[str]) -> dict[str, str]:
    """The reverse of `entry`."""
    return dict.fromkeys(checks, one["every check"]) if "every check" in one else one


def write(results: dict[str, Any], mappings: dict[str, str], version: str) -> None:
    """Write the table and the page."""
    pairs = {f"{mapping} {name}": entry(results[name]) for name, mapping in mappings.items()}
    table = {"transformers": version, "pairs": pairs}
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(table), encoding="utf-8")


def totals(pairs: dict[str, dict[str, str]], checks: Iterable[str]) -> dict[str, Counter[str]]:
    """How many pairs have which outcome, by check."""
    return {check: Counter(word(spread(one, checks)[check]) for one in pairs.values()) for check in checks}


# --- the page --------------------------------------------------------------------------------------------------------------

INTRO = """# Models

What steerfast does with every architecture of transformers {version} that has a text decoder: {count} pairs of a model type and a
class, each tried on a tiny model with random weights by a test that asks nothing of steerfast (`tests/zoo_oracle.py`): plain
hooks on the decoder blocks, in an uncached loop, say what a steered model must compute. This page is written by
`python tests/zoo.py --write`, and a test holds it to the table that the test suite runs against, `tests/data/zoo.json`.

A model with real weights behaves as its architecture does; `steerfast check MODEL` proves it on yours.

| sign | meaning |
|---|---|
| ✓ | right: equal to the plain hooks, to 1e-3 in float32 |
| ✓ n/m | right in n of the m blocks; refused by name in the others |
| a number | refused, before anything is edited, by an error that says why: the note of that number |
| – | nothing to compare with: the unsteered model does not do it on ids alone |
| ✗ | **not right yet**: see [what is wrong](#what-is-wrong) |

*residual* is `resid_pre` and `resid_post` of every block, negative layers and a batch of which one row is steered;
*generate* is positions all, prompt, generated and last with the model's cache, with the count of `stats()`;
*padding* is a batch with left padding; *collect* reads texts of two lengths in one batch.
Removing the handle restores every model bit for bit{removal}.
"""

COLUMNS: dict[str, tuple[str, ...]] = {
    "residual": ("resid_post", "resid_pre", "rows", "negative layer"),
    "attn_out": ("attn_out",),
    "mlp_out": ("mlp_out",),
    "generate": ("generate all", "generate prompt", "generate generated", "generate last", "stats"),
    "padding": ("padding",),
    "collect": ("collect",),
}
FAMILIES = {"causal": "Language models", "image": "Image and text to text", "seq2seq": "Speech and encoder-decoders"}


class Notes:
    """Reasons by number, each once; what differs only by class, layer, site or number is one reason."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def number(self, outcome: str, class_name: str) -> int:
        return self.numbers.setdefault(_general(reason(outcome), class_name), len(self.numbers) + 1)


def _general(text: str, class_name: str) -> str:
    """A refusal without the names and numbers of one model."""
    text = re.sub(r"^(steer|collect|check|prepare): ", "", text.replace(class_name, "the model"))
    text = re.sub(r"site '\w+' of layer \d+ in an? \w+ \(the model\)", "the site", text)
    text = re.sub(r"; use resid_pre or resid_post.*$", "", text)
    text = re.sub(r"\b(layer|block) \d+\b", r"a \1", re.sub(r"\b[\w.]+\.layers?\.\d+\b", "a layer", text))
    text = re.sub(r"positions='\w+'", "such positions", text)
    text = re.sub(r"(?<![\w.])\d+(?![\w.])", "n", text)
    return text.replace("|", "\\|")


def _cell(outcomes: list[str], notes: Notes, class_name: str) -> str:
    words = {word(one) for one in outcomes}
    if words & set(BAD):
        return "✗"
    refused = [one for one in outcomes if word(one) == "refused"]
    numbers = ", ".join(str(number) for number in sorted({notes.number(one, class_name) for one in refused}))
    right = [one for one in outcomes if word(one) == "right"]
    if not right:
        return numbers or "–"
    if refused:
        return f"✓ in part, {numbers}"
    layers = [found.group(1, 2) for one in right if (found := re.search(r"(\d+) of (\d+) layers", one))]
    return f"✓ {layers[0][0]}/{layers[0][1]}" if layers else "✓"


def page(table: dict[str, Any]) -> str:
    """The text of docs/models.md."""
    checks = next(list(one) for one in table["pairs"].values() if "every check" not in one)
    pairs = {name: spread(one, checks) for name, one in table["pairs"].items()}
    built = {name: one for name, one in pairs.items() if word(one[checks[0]]) != "does not build"}
    notes, bad = Notes(), []
    lines: list[str] = []
    for mapping, title in FAMILIES.items():
        lines += [
            "",
            f"## {title}",
            "",
            f"| type | class | {' | '.join(COLUMNS)} |",
            "|---|---|" + "---|" * len(COLUMNS),
        ]
        closed: dict[int, list[str]] = {}
        for name, one in built.items():
            of, kind, class_name = name.split()
            if of != mapping:
                continue
            cells = [_cell([one[check] for check in parts], notes, class_name) for parts in COLUMNS.values()]
            bad += [(kind, class_name, check, outcome) for check, outcome in one.items() if word(outcome) in BAD]
            if len(set(cells)) == 1 and cells[0].isdigit():
                closed.setdefault(int(cells[0]), []).append(kind)
            else:
                lines.append(f"| {kind} | {class_name} | {' | '.join(cells)} |")
        if closed:
            lines += ["", "Refused altogether:", ""]
            lines += [f"- note {number}: {', '.join(kinds)}" for number, kinds in sorted(closed.items())]
    unrestored = sum(word(one["removal"]) in BAD for one in built.values())
    lines += ["", "## What is refused", "", "The errors, without the names and numbers of one model.", ""]
    lines += [f"{number}. {text}" for text, number in notes.numbers.items()]
    lines += ["", "## What is wrong", ""]
    lines += _wrong(bad)
    absent = [(name.split(), reason(one[checks[0]])) for name, one in pairs.items() if name not in built]
    lines += ["", "## What was not tried", "", "No tiny model of these could be made.", ""]
    lines += [f"- {kind}, {class_name}: {_short(why)}" for (_, kind, class_name), why in absent]
    removal = f", {unrestored} excepted" if unrestored else ""
    intro = INTRO.format(version=table["transformers"], count=len(pairs), removal=removal)
    return intro + "\n".join(lines) + "\n"


def _wrong(bad: list[tuple[str, str, str, str]]) -> list[str]:
    if not bad:
        return ["Nothing that is known."]
    lines = ["| type | class | check | what happens |", "|---|---|---|---|"]
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for kind, class_name, check, outcome in bad:
        grouped.setdefault((kind, class_name, outcome), []).append(check)
    for (kind, class_name, outcome), found in grouped.items():
        lines.append(f"| {kind} | {class_name} | {', '.join(found)} | {_short(outcome)} |")
    return lines


def _short(text: str) -> str:
    text = text.replace("|", "\\|")
    return text if len(text) <= 160 else text[:157] + "..."
