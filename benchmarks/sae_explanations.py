r"""Whether explanations foretell where features fire: both forms, scored on held-out documents; and what their page weighs.

    python benchmarks/sae_explanations.py
    python benchmarks/sae_explanations.py --corpus wikitext-2 --title '^ = [^=].* = $'

CORPUS is text, JSON lines, Parquet, or a folder of such files (`sf.sae.read_documents`); nothing of it is kept. Without one,
the texts of `steerfast.sae.training.corpus.wikipedia` are read that the preset "smollm2" does not train on. Words, how often
features fire on them and thresholds come from the training documents; every score is measured once, on the held-out ones. A
run is added to the results, or takes the place of one with the same corpus, tokens and passage; `--table` prints them."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lab.rows import circumstances

import steerfast as sf
from steerfast.cli.sae_train import PRESETS
from steerfast.models import demo as demo_model
from steerfast.sae.explanation import Explanations
from steerfast.sae.training.corpus import wikipedia

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sae-explanations.json"
MOST = 40  # words of the longest explanation
COUNTS = (1, 2, 5, 10, 20, MOST)
SAMPLES = 1000  # of the bootstrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="path of the documents (default: text of Wikipedia)")
    parser.add_argument("--title", metavar="REGEX", help="the first line of a document, for text")
    parser.add_argument("--key", default="text", help="where JSON lines keep the text (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=480_000, help="read at most (default: %(default)s)")
    parser.add_argument("--passage", type=int, default=16, help="tokens of a passage (default: %(default)s)")
    parser.add_argument(
        "--sae", type=Path, help="folder of an SAE of SmolLM2-135M-Instruct (default: the one beside this file)"
    )
    parser.add_argument("--page", type=Path, help="write the page of features, too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print what is in the results, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.out.read_text())))
        return
    torch.set_num_threads(1)
    runs = json.loads(args.out.read_text()) if args.out.is_file() else []
    run = measured(args)
    same = ("corpus", "tokens", "passage")
    runs = [old for old in runs if [old[key] for key in same] != [run[key] for key in same]] + [run]
    args.out.write_text(json.dumps(runs, indent=1) + "\n")
    print(table([run]))


def measured(args: argparse.Namespace) -> dict[str, Any]:
    sae = sf.SAE.load(args.sae or next((HERE / "sae").iterdir()))
    model, tokenizer = demo_model.load(progress=print)
    config = sf.sae.ObserveConfig(tokens=args.tokens, passage=args.passage)
    digest = hashlib.sha256()
    documents = noted(texts(args), digest)
    seconds: dict[str, float] = {}
    evidence = timed(
        seconds, "observe", lambda: sf.sae.observe(sae, model, tokenizer, documents, config, progress=print)
    )
    use = timed(seconds, "explain_use", lambda: sf.sae.explain_use(evidence, MOST))
    plain = sf.sae.explain_use(evidence, MOST, kinds=("word",))
    embedding = timed(seconds, "explain", lambda: sf.explain(sae, model, tokenizer, words=MOST))
    forms = {"use": use, "use, words alone": plain, "embedding": embedding}
    found = {
        f"{name}, {n}": sf.sae.detect(shortened(form, n), evidence) for name, form in forms.items() for n in COUNTS
    }
    scores = {
        name: {**one.summary(), "detection_median_interval": interval(one.accuracy)} for name, one in found.items()
    }
    if args.page is not None:
        relations = timed(seconds, "relate", lambda: sf.sae.relate(sae, model, tokenizer))
        sf.sae.write_page(args.page, shortened(use, 10), evidence, detection=found["use, 10"], relations=relations)
    return {
        "corpus": "wikipedia" if args.corpus is None else args.corpus.name, "title": args.title,
        "sha256": digest.hexdigest(), "tokens": evidence.tokens, "documents": list(evidence.documents),
        "passage": args.passage, "held_out": config.held_out, "sae": repr(sae),
        "pairs_forgotten": evidence.forgotten, "seconds": seconds, "scores": scores,
        "page_bytes": None if args.page is None else args.page.stat().st_size, "run": circumstances("cpu"),
    }  # fmt: skip


def texts(args: argparse.Namespace) -> Iterator[str]:
    if args.corpus is not None:
        return sf.sae.read_documents(args.corpus, key=args.key, title=args.title)
    return iter(wikipedia(print)[PRESETS["smollm2"].texts :])


def noted(documents: Iterator[str], digest: Any) -> Iterator[str]:
    """The documents, and a digest of those that were read."""
    for document in documents:
        digest.update(document.encode())
        yield document


def timed(seconds: dict[str, float], name: str, call: Any) -> Any:
    start = time.perf_counter()
    result = call()
    seconds[name] = round(time.perf_counter() - start, 1)
    return result


def shortened(found: Explanations, count: int) -> Explanations:
    """The first words alone."""
    words = tuple(row[:count] for row in found.words)
    return dataclasses.replace(found, words=words, scores=found.scores[:, :count])


def interval(accuracy: torch.Tensor) -> list[float]:
    """95 % of the medians of features that are drawn again."""
    known = accuracy[~accuracy.isnan()]
    draws = torch.randint(len(known), (SAMPLES, len(known)), generator=torch.Generator().manual_seed(0))
    return known[draws].median(1).values.double().quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def table(runs: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "| corpus | tokens | passage | words | features | detection: median (95 %), mean | ≥ 0.75 | intruder: median, mean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for name, score in run["scores"].items():
            low, high = score["detection_median_interval"]
            lines.append(
                f"| {run['corpus']} | {run['tokens']:,} | {run['passage']} | {name} | {score['features']} | "
                f"{score['detection_median']:.3f} ({low:.3f}–{high:.3f}), {score['detection_mean']:.3f} | "
                f"{score['detection_at_least_0.75']:.0%} | {score['intruder_median']:.3f}, {score['intruder_mean']:.3f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
