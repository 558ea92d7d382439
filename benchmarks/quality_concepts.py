"""What `quality.py` steers: concepts with pairs to fit on and pairs of other groups to judge by.

A pair is a prompt with a wanted and an unwanted continuation. The project's own concepts lie in `quality_data/`; `public` reads
Anthropic's behaviour pairs as CAA uses them, TruthfulQA and XSTest from a folder that the user names.
"""

from __future__ import annotations

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

OWN = Path(__file__).parent / "quality_data"
NAMES = ("sentiment", "truth", "formality")
OPENINGS = 8  # of a public set: the first held-out prompts


@dataclass(frozen=True)
class Pair:
    """A prompt with two continuations, each with its leading space; pairs of one group share words or a topic."""

    group: str
    prompt: str
    wanted: str
    unwanted: str


@dataclass(frozen=True)
class Concept:
    """A concept: no group of `test` is in `train`; `classifier` holds (wanted, unwanted) texts that are in neither."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    openings: tuple[str, ...]
    classifier: tuple[tuple[str, ...], tuple[str, ...]] | None = None

    def sampled(self, seed: int, share: float = 0.75) -> list[int]:
        """Indices of the training pairs of a random share of the groups."""
        groups = sorted({pair.group for pair in self.train})
        kept = set(random.Random(seed).sample(groups, max(2, round(share * len(groups)))))
        return [i for i, pair in enumerate(self.train) if pair.group in kept]


def own(name: str) -> Concept:
    """A concept written for the project."""
    text = json.loads((OWN / f"{name}.json").read_text(encoding="utf-8"))
    train, test = (tuple(Pair(**pair) for pair in text[part]) for part in ("train", "test"))
    sides = text["classifier"]
    return Concept(name, train, test, tuple(text["openings"]), (tuple(sides["wanted"]), tuple(sides["unwanted"])))


def reference() -> tuple[str, ...]:
    """Texts about nothing in particular: how likely they stay is how little is damaged."""
    return tuple(json.loads((OWN / "reference.json").read_text(encoding="utf-8")))


def public(folder: Path, pairs: int | None) -> list[Concept]:
    """The public sets that a folder holds, at most `pairs` training pairs and half as many held-out ones of each; None: all."""
    found = []
    for path in sorted(folder.glob("caa/*/train.json")):
        train, test = (_behaviour(path.with_name(f"{part}.json"))[:most] for part, most in _sizes(pairs).items())
        found.append(_concept(path.parent.name, train, test))
    for name, read in (("TruthfulQA.csv", _truthful), ("xstest_prompts.csv", _safe)):
        if (folder / name).is_file():
            with (folder / name).open(encoding="utf-8", newline="") as file:
                found.append(_held_out(Path(name).stem, read(list(csv.DictReader(file))), pairs))
    if not found:
        raise FileNotFoundError(
            f"quality: {folder} holds none of caa/*/train.json, TruthfulQA.csv, xstest_prompts.csv; name their folder"
        )
    return found


def _behaviour(path: Path) -> list[Pair]:
    """CAA's pairs; both texts end in the letter of the answer, where CAA reads its vector. Every question is a group."""
    return [
        Pair(
            f"{path.stem} {i}",
            f"{one['question'].strip()}\n\nAnswer:",
            f" {one['answer_matching_behavior'].strip().rstrip(')')}",
            f" {one['answer_not_matching_behavior'].strip().rstrip(')')}",
        )
        for i, one in enumerate(json.loads(path.read_text(encoding="utf-8")))
    ]


def _truthful(table: list[dict[str, str]]) -> list[Pair]:
    """The best answer against the first incorrect one, by category."""
    return [
        Pair(
            row["Category"],
            f"Q: {row['Question']}\nA:",
            f" {row['Best Answer']}",
            f" {row['Incorrect Answers'].split(';')[0].strip()}",
        )
        for row in table
    ]


def _safe(table: list[dict[str, str]]) -> list[Pair]:
    """Safe prompts that look unsafe: an answer that helps against one that declines, by type of prompt."""
    return [
        Pair(
            row["type"], f"User: {row['prompt']}\nAssistant:", " Sure, I can help with that.", " Sorry, I cannot help."
        )
        for row in table
        if row["label"] == "safe"
    ]


def _sizes(pairs: int | None) -> dict[str, int | None]:
    """Most pairs of each part."""
    return {"train": pairs, "test": None if pairs is None else pairs // 2}


def _held_out(name: str, pairs: list[Pair], most: int | None) -> Concept:
    """A third of the groups is held out; pairs are drawn evenly from what is there."""
    groups = sorted({pair.group for pair in pairs})
    held = set(random.Random(0).sample(groups, len(groups) // 3))
    parts = [[pair for pair in pairs if (pair.group in held) is side] for side in (False, True)]
    train, test = (
        random.Random(0).sample(part, len(part) if size is None else min(size, len(part)))
        for part, size in zip(parts, _sizes(most).values(), strict=True)
    )
    return _concept(name, train, test)


def _concept(name: str, train: list[Pair], test: list[Pair]) -> Concept:
    return Concept(name, tuple(train), tuple(test), tuple(dict.fromkeys(pair.prompt for pair in test))[:OPENINGS])
