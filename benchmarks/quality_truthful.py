"""TruthfulQA as ODESteer's authors use it: fitted on one half of the questions, judged on the other, and the other way round.

    python benchmarks/quality_truthful.py TruthfulQA.csv [--model PATH] [--layer N] [--questions 200] [--out FILE]

Methods are fitted on the last tokens of "question + answer", correct against incorrect, and steer the last prompt token and
every token after it; strengths are in units of the typical length of a row. MC1 and MC2 are those of the set's authors, without
the examples that they put in front. The damage is that of `quality.py`, on its neutral texts. Every configuration is on disk
before the next begins, and an interrupted run continues. Texts that a judge would have to read are not part of it.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from quality import HERE, activations, load
from quality_concepts import Concept, Pair, reference
from quality_methods import METHODS
from quality_scores import Text, batches, log_likelihoods, reference_texts

import steerfast as sf
from steerfast.files.replace import replace_file
from steerfast.models.layers import find_layers
from steerfast.tools.evaluate import Choice, ChoiceScores, read_choices

CHOSEN = ("caa", "affine", "default-linear", "default", "published", "sketch", "iti")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions_file", type=Path, metavar="TruthfulQA.csv")
    parser.add_argument("--model", help="folder or GGUF file of another model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--layer", type=int, help="0-based (default: the middle one)")
    parser.add_argument("--questions", type=int, help="judged questions of each half (default: all)")
    parser.add_argument("--methods", nargs="+", default=CHOSEN, choices=[*METHODS], help=f"default: {' '.join(CHOSEN)}")
    parser.add_argument("--out", type=Path, help="default: results/quality-truthfulqa-MODEL.json")
    args = parser.parse_args(argv)
    model, tokenizer, name = load(args.model)
    layer = find_layers(model, "quality").count // 2 - 1 if args.layer is None else args.layer
    out = args.out or HERE / "results" / f"quality-truthfulqa-{name}.json"
    run = {"model": name, "layer": layer, "questions": args.questions}
    rows = _known(out, run)
    texts = reference_texts(tokenizer, reference())
    neutral, tokens = batches(model, texts, layer), sum(len(text.ids) - text.start for text in texts)
    plain = sum(log_likelihoods(neutral, None))
    for half, (fitted, judged) in enumerate(halves(args.questions_file, args.questions)):
        concept = Concept("truthfulqa", fitted, (), ())
        sample = asked = None
        for method, strength in [("", 0.0), *((key, s) for key in args.methods for s in METHODS[key].strengths)]:
            where = {"half": half, "method": method, "strength": strength}
            if any(all(row[key] == value for key, value in where.items()) for row in rows):
                continue
            plan = None
            if method:
                sample = sample or activations(model, tokenizer, concept, [layer], heads="iti" in args.methods)
                plan = sf.Plan(METHODS[method].edits(sample), positions="last", model=model)
            asked = asked or batches(model, [text for one in judged for text in answers(tokenizer, one)], layer)
            scores = asdict(score(judged, log_likelihoods(asked, plan, strength)))
            damage = (plain - sum(log_likelihoods(neutral, plan, strength))) / tokens
            rows.append(
                {**where, **{key: scores[key] for key in ("count", "first", "mass", "log_odds")}, "damage": damage}
            )
            _keep(out, run, rows)
            print(f"half {half}  {METHODS[method].label if method else 'unsteered'}  {strength:g}", flush=True)
    print(table(rows))


def halves(path: Path, most: int | None) -> Iterator[tuple[tuple[Pair, ...], list[Choice]]]:
    """Twice (pairs to fit on, questions to judge by), the categories divided between the two, the roles exchanged."""
    with path.open(encoding="utf-8", newline="") as lines:
        categories = [row["Category"] for row in csv.DictReader(lines)]
    questions = read_choices(path)
    names = sorted(set(categories))
    first = set(random.Random(0).sample(names, len(names) // 2))
    parts = [[i for i, name in enumerate(categories) if (name in first) is side] for side in (True, False)]
    for fit, judge in (parts, parts[::-1]):
        pairs = tuple(
            Pair(categories[i], questions[i].prompt, questions[i].matching[0], questions[i].others[0]) for i in fit
        )
        kept = judge if most is None else random.Random(0).sample(judge, min(most, len(judge)))
        yield pairs, [questions[i] for i in sorted(kept)]


def answers(tokenizer: Any, question: Choice) -> list[Text]:
    """The matching answers behind the prompt, then the others."""
    head = tokenizer(question.prompt)["input_ids"]
    tails = (tokenizer(one, add_special_tokens=False)["input_ids"] for one in (*question.matching, *question.others))
    return [Text((*head, *tail), len(head)) for tail in tails]


def score(questions: Sequence[Choice], found: Sequence[float]) -> ChoiceScores:
    """From log p of the answers of one question after another."""
    given, parts = iter(found), []
    for one in questions:
        sides = ([next(given) for _ in side] for side in (one.matching, one.others))
        parts.append(tuple(torch.tensor(side, dtype=torch.float64) for side in sides))
    return ChoiceScores.of(parts)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Both halves together, each question counting once."""
    lines = ["| method | strength | damage | MC1 | MC2 | log-odds |", "|---|---|---|---|---|---|"]
    for key in dict.fromkeys((row["method"], row["strength"]) for row in rows):
        same = [row for row in rows if (row["method"], row["strength"]) == key]
        total = sum(row["count"] for row in same)
        damage, first, mass, odds = (
            math.fsum(row[name] * row["count"] for row in same) / total
            for name in ("damage", "first", "mass", "log_odds")
        )
        label = METHODS[key[0]].label if key[0] else "unsteered"
        lines.append(f"| {label} | {key[1]:g} | {damage:.3f} | {first:.3f} | {mass:.3f} | {odds:+.2f} |")
    return "\n".join(lines)


def _known(path: Path, run: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run that was interrupted."""
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["run"] | {"torch": None} != run | {"torch": None}:
        raise ValueError(f"quality: {path} holds another run ({found['run']}); choose another --out")
    rows: list[dict[str, Any]] = found["rows"]
    return rows


def _keep(path: Path, run: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    head = json.dumps({"kind": "steerfast.truthfulqa", "run": run | {"torch": torch.__version__}})[:-1]
    body = ",\n".join(json.dumps(row, allow_nan=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, f'{head},\n"rows": [\n{body}\n]}}\n'.encode())


if __name__ == "__main__":
    main()
