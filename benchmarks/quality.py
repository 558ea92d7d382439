"""Does it pay? What steering methods buy (effect) at the price of what they break (damage), on a real model.

    python benchmarks/quality.py [--quick] [--seeds 3] [--data DIR [--pairs N]] [--model PATH] [--out FILE]
        [--fields | --everywhere]

For every concept, method, training set and strength, on held-out pairs and neutral texts, steered at one layer from the last
prompt token on:

    effect      change of log p(wanted | prompt) - log p(unwanted | prompt), in nats, by the model itself
    classifier  change of the log-odds that a bag-of-words classifier, fitted on other texts, gives to what the model writes
    damage      change of -log p per token of neutral texts, in nats: 0.1 is a perplexity 11 % higher
    repetition  share of the word pairs of a written text that it has had before

The model writes for the first training set only. Beside that set's effects stand two nulls (`--nulls`): the same method
fitted with the sides of a random half of the groups exchanged, and random directions, at the strengths up to damage 0.3. Where
the least strength of a curve damages more than 0.05, halves of it are measured too, so that no effect is read between it and
nothing. Every configuration is on disk before the next begins: a run that was interrupted continues, also with more seeds or
nulls. The table, a picture and a summary are made from the file at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import quality_report
import torch
from quality_concepts import NAMES, Concept, own, public, reference
from quality_methods import FIELDS, GAINS, METHODS, Method, Sample, everywhere, random_direction, sae
from quality_report import DAMAGES, RANDOM
from quality_scores import Batch, WordClassifier, batches, generate, log_likelihoods, pair_texts, reference_texts

import steerfast as sf
from steerfast._null import DRAWS
from steerfast.files.replace import replace_file
from steerfast.models import demo as demo_model
from steerfast.models.layers import find_layers

SCHEMA = 1
FINE, HALVES = DAMAGES[0] / 2, 8
"""What the least strength of a curve may damage, and how often it is halved to get there."""
HERE = Path(__file__).parent
PAIRS = 60  # of a public set that methods are fitted on
QUICK = {"train": 0.75, "test": 12, "texts": 6, "strengths": 3}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="one training set, half the texts, nothing written: minutes"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="training sets, each of 3/4 of the groups (default: %(default)s)"
    )
    parser.add_argument(
        "--concepts", nargs="+", default=None, help=f"default: {' '.join(NAMES)}, or all sets of --data"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=None,
        choices=[*METHODS, "sae"],
        help="default: all but velocity fields, or those of --fields",
    )
    parser.add_argument(
        "--nulls", type=int, default=None, help=f"draws of each kind of null (default: {DRAWS}; --quick: none)"
    )
    parser.add_argument("--data", type=Path, help="folder of public sets (caa/, TruthfulQA.csv, xstest_prompts.csv)")
    parser.add_argument(
        "--pairs", type=int, default=PAIRS, help="training pairs of a public set; 0: all (default: %(default)s)"
    )
    parser.add_argument("--model", help="folder or GGUF file of another model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--layer", type=int, help="0-based (default: the middle one)")
    parser.add_argument("--everywhere", action="store_true", help="every layer edited, each by its own fit")
    parser.add_argument(
        "--fields",
        action="store_true",
        help="CAA and affine ablation beside velocity fields, of which each takes minutes to fit",
    )
    parser.add_argument("--sae", help="folder of an SAE of that layer, for SAE amplification")
    parser.add_argument(
        "--out", type=Path, help="default: results/quality[-velocity]-MODEL[-everywhere][-data][-quick][-whole].json"
    )
    args = parser.parse_args(argv)
    if args.pairs < 0 or (args.data is None and args.pairs != PAIRS):
        parser.error(
            f"--pairs is {args.pairs}; expected training pairs of the public sets in --data, 0 for all of them"
        )
    if args.fields and (args.everywhere or args.methods):
        parser.error(
            "--fields names its methods itself, and fits them to one layer; leave --methods and --everywhere out"
        )
    model, tokenizer, name = load(args.model)
    count = find_layers(model, "quality").count
    layers = range(count) if args.everywhere else [count // 2 - 1 if args.layer is None else args.layer]
    concepts = [own(n) for n in NAMES] if args.data is None else public(args.data, args.pairs or None)
    if args.concepts is not None:
        unknown = set(args.concepts) - {c.name for c in concepts}
        if unknown:
            parser.error(f"unknown concept {min(unknown)!r}; there are {', '.join(c.name for c in concepts)}")
        concepts = [c for c in concepts if c.name in args.concepts]
    usual = ("caa", "affine", *FIELDS) if args.fields else [key for key in METHODS if key not in FIELDS]
    methods = {key: METHODS[key] for key in args.methods or usual if key != "sae"}
    if args.sae is not None:
        methods["sae"] = Method("SAE amplification", sae(args.sae), GAINS)
    if args.everywhere:
        methods = everywhere(methods)
    if not methods:
        parser.error(f"none of {', '.join(args.methods)} is left to be measured; see --sae, and --everywhere")
    texts, seeds = reference(), args.seeds
    if args.quick:
        concepts, methods, texts = quick(concepts, methods, texts)
        seeds = 1
    start = "quality-velocity" if set(methods) & set(FIELDS) else "quality"
    end = "".join(f"-{name}" for name in ("everywhere", "data", "quick") if getattr(args, name))
    out = args.out or HERE / "results" / f"{start}-{name}{end}{'-whole' * (args.pairs == 0)}.json"
    draws = args.nulls if args.nulls is not None else 0 if args.quick else DRAWS
    store = Store(out, name, "all" if args.everywhere else layers[0])
    measure(store, layers, model, tokenizer, concepts, methods, texts, seeds, draws, writes=not args.quick)
    quality_report.report(out)


def load(path: str | None) -> tuple[Any, Any, str]:
    """A model in float32 with its tokenizer and name."""
    if path is None:
        return *demo_model.load(progress=print), "smollm2-135m"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = Path(path)
    if where.suffix == ".gguf":
        given = {"pretrained_model_name_or_path": where.parent, "gguf_file": where.name}
    else:
        given = {"pretrained_model_name_or_path": where}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**given), where.stem.lower()


def quick(
    concepts: Sequence[Concept], methods: dict[str, Method], texts: tuple[str, ...]
) -> tuple[list[Concept], dict[str, Method], tuple[str, ...]]:
    """The same questions with fewer texts and strengths."""
    some = [replace(c, test=c.test[:: max(1, len(c.test) // QUICK["test"])]) for c in concepts]
    few = {key: replace(m, strengths=m.strengths[: QUICK["strengths"]]) for key, m in methods.items()}
    return some, few, texts[: QUICK["texts"]]


class Store:
    """The raw rows, on disk as soon as they are measured."""

    def __init__(self, path: Path, model: str, layer: int | str) -> None:
        self.path = path
        self.run = {"model": model, "layer": layer}
        self.concepts: dict[str, dict[str, Any]] = {}
        self.rows: list[dict[str, Any]] = []
        self.nulls: list[dict[str, Any]] = []
        if path.exists():
            text = json.loads(path.read_text(encoding="utf-8"))
            if text.get("schema") != SCHEMA or any(text["run"].get(key) != value for key, value in self.run.items()):
                raise ValueError(f"quality: {path} holds another run ({text.get('run')}); choose another --out")
            self.run, self.concepts, self.rows = text["run"], text["concepts"], text["rows"]
            self.nulls = text.get("nulls", [])

    def concept(self, name: str, found: dict[str, Any]) -> None:
        """Keep what is known of a concept before any steering."""
        known = self.concepts.setdefault(name, found)
        if known["groups"] != found["groups"] or known["tokens"] != found["tokens"]:
            raise ValueError(f"quality: {self.path} was measured on other texts of {name!r}; choose another --out")
        self.save()

    def curve(self, **key: Any) -> dict[float, float]:
        """Damage by strength of what is known of a configuration."""
        rows = [row for row in self.rows if all(row[name] == value for name, value in key.items())]
        return {row["strength"]: self.damage(key["concept"], row["reference"]) for row in rows}

    def damage(self, concept: str, scores: Sequence[float]) -> float:
        """What is lost on the neutral texts of a concept, in nats per token."""
        known = self.concepts[concept]
        return (sum(known["unsteered"]["reference"]) - sum(scores)) / sum(known["tokens"])

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Keep rows."""
        self.rows += rows
        self.save()

    def set_null(self, where: dict[str, Any], curve: list[dict[str, Any]]) -> None:
        """Keep the curve of a null, in place of what was known of it."""
        self.nulls = [row for row in self.nulls if any(row[name] != value for name, value in where.items())]
        self.nulls.append({**where, "curve": curve})
        self.save()

    def save(self) -> None:
        self.run |= {
            "date": date.today().isoformat(), "torch": torch.__version__, "python": platform.python_version(),
            "processor": platform.machine(),
        }  # fmt: skip
        rows, nulls = (
            ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in part)
            for part in (self.rows, self.nulls)
        )
        head = {"schema": SCHEMA, "kind": "steerfast.quality", "run": self.run, "concepts": self.concepts}
        start = json.dumps(head, ensure_ascii=False, allow_nan=False)[:-1]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, f'{start},\n"rows": [\n{rows}\n],\n"nulls": [\n{nulls}\n]}}\n'.encode())


@dataclass(frozen=True)
class Scorer:
    """The held-out pairs and neutral texts of a concept, their prompts already read."""

    pairs: list[tuple[list[int], Batch]]
    reference: list[tuple[list[int], Batch]]

    def __call__(self, plan: sf.Plan | None, strength: float = 1.0) -> dict[str, list[float]]:
        """Log-odds and log-likelihood of the wanted text of every pair, and log-likelihood of every neutral text."""
        scores = log_likelihoods(self.pairs, plan, strength)
        odds = [w - u for w, u in zip(scores[::2], scores[1::2], strict=True)]
        texts = log_likelihoods(self.reference, plan, strength)
        found = {"odds": odds, "wanted": scores[::2], "reference": texts}
        return {name: [round(v, 4) for v in values] for name, values in found.items()}


def measure(
    store: Store, layers: Sequence[int], model: Any, tokenizer: Any, concepts: Sequence[Concept], methods: dict[str, Method],
    texts: Sequence[str], seeds: int, draws: int, writes: bool,
) -> None:  # fmt: skip
    """Run every configuration that the store lacks, training set by training set."""
    prepared = {}
    for concept in concepts:
        neutral = reference_texts(tokenizer, texts)
        score = Scorer(*(batches(model, texts, min(layers)) for texts in (pair_texts(tokenizer, concept), neutral)))
        classifier = None if concept.classifier is None else WordClassifier(*concept.classifier)
        prepared[concept.name] = (
            score,
            classifier,
            activations(model, tokenizer, concept, layers, heads="iti" in methods),
        )
        store.concept(concept.name, {
            "groups": [pair.group for pair in concept.test],
            "tokens": [len(text.ids) - text.start for text in neutral],
            "classifier accuracy": None if classifier is None else round(classifier.accuracy(concept), 4),
            "unsteered": score(None) | (written(model, tokenizer, concept, None, [0.0], classifier)[0] if writes else {}),
        })  # fmt: skip
    for seed in range(seeds):
        for concept in concepts:
            score, classifier, sample = prepared[concept.name]
            part = sample.take(concept.sampled(seed), seed)
            for key, method in methods.items():
                where = {"concept": concept.name, "method": key, "seed": seed}
                known, rows, plan = store.curve(**where), [], None
                for s in lacking(method.strengths, known):
                    plan = plan or sf.Plan(method.edits(part), positions="last", model=model)
                    rows.append({**where, "strength": s, **score(plan, s)})
                    known[s] = store.damage(concept.name, rows[-1]["reference"])
                if not rows:
                    continue
                if writes and seed == 0:
                    own_texts = written(model, tokenizer, concept, plan, [row["strength"] for row in rows], classifier)
                    rows = [row | own for row, own in zip(rows, own_texts, strict=True)]
                store.add(rows)
                print(f"seed {seed}  {concept.name:12} {method.label}", flush=True)
    firsts = {concept.name: prepared[concept.name][2].take(concept.sampled(0), 0) for concept in concepts}
    for draw in range(draws):
        for concept in concepts:
            measure_nulls(store, concept, prepared[concept.name][0], firsts[concept.name], methods, draw)


def lacking(strengths: Sequence[float], known: Mapping[float, float], most: float = math.inf) -> Iterator[float]:
    """The strengths that a curve lacks, each to be put into `known` with its damage before the next is asked for.

    First those of the method, upwards until one has damaged more than `most`, then halves of the least.
    """
    for s in strengths:
        if s not in known:
            yield s
        if known[s] > most:
            break
    for _ in range(HALVES):
        least = min(known)
        if known[least] <= FINE or least <= strengths[0] / 2**HALVES * 1.01:
            break
        yield round(least / 2, 9)


def measure_nulls(
    store: Store, concept: Concept, score: Scorer, part: Sample, methods: dict[str, Method], draw: int
) -> None:
    """One draw of every null that the store lacks: of each method, and of random directions."""
    builds = {RANDOM: (lambda: random_direction(part, draw), methods.get("caa", METHODS["caa"]).strengths)}
    turned = part.shuffled(draw)
    builds |= {key: (lambda m=m: m.edits(turned), m.strengths) for key, m in methods.items()}
    for key, (build, strengths) in builds.items():
        where = {"concept": concept.name, "method": key, "draw": draw}
        row = next((row for row in store.nulls if all(row[name] == value for name, value in where.items())), None)
        curve = [] if row is None else row["curve"]
        known, plan = {one["strength"]: one["damage"] for one in curve}, None
        for s in lacking(strengths, known, DAMAGES[-1]):
            plan = plan or sf.Plan(build(), positions="last", model=part.model)
            found = score(plan, s)
            known[s] = round(store.damage(concept.name, found["reference"]), 5)
            curve.append({"strength": s, "damage": known[s], "odds": found["odds"]})
        if plan is None:
            continue
        curve.sort(key=lambda one: one["strength"])
        store.set_null(where, curve)
        print(f"null {draw}  {concept.name:12} {key}", flush=True)


def activations(model: Any, tokenizer: Any, concept: Concept, layers: Sequence[int], heads: bool) -> Sample:
    """The last tokens of the training texts, at some layers and, for a method that needs them, at every head."""
    sides = [
        [pair.prompt + (pair.wanted if wanted else pair.unwanted) for pair in concept.train] for wanted in (True, False)
    ]
    stream = [sf.collect(model, tokenizer, side, layers, progress=False) for side in sides]
    count, each = find_layers(model, "quality").count, model.config.num_attention_heads
    found: list[dict[int, torch.Tensor]] = [{}, {}]
    for i, side in enumerate(sides if heads else ()):
        read = sf.collect(model, tokenizer, side, range(count), site="head_out", progress=False)
        found[i] = {at: x.unflatten(1, (each, -1)) for at, x in read.items()}
    first, *others = layers

    def at(layer: int, *more: Any) -> Sample:
        return Sample(layer, *(side[layer] for side in stream), *found, concept.train, 0, model, tokenizer, *more)

    return at(first, tuple(at(layer) for layer in others))


def written(
    model: Any, tokenizer: Any, concept: Concept, plan: sf.Plan | None, strengths: Sequence[float],
    classifier: WordClassifier | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What the model writes at every strength, with the classifier's verdict."""
    found = []
    for texts in generate(model, tokenizer, concept.openings, plan, strengths):
        verdict = None if classifier is None else [round(v, 4) for v in classifier(texts)]
        found.append({"texts": texts, "classifier": verdict})
    return found


if __name__ == "__main__":
    main()
