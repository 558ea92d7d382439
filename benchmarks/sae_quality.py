"""Whether a trained SAE is good and whether explanations find what is there: rows for `make bars`.

    python benchmarks/sae_quality.py benchmarks/sae/smollm2-135m-instruct-L7 --text held-out.txt

"sae trained" is `steerfast sae eval` on a text that was not trained on. "sae probes", with the wheel of sae-probes, is its
protocol on ten of its data sets (`sae_probing`; needs pyarrow and scikit-learn). "sae explain" plants words: decoder rows that
point at one word of the vocabulary each, with noise of half their length, are explained, and the planted word is looked for.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lab.rows import append_row, circumstances

import steerfast as sf
from steerfast.models import demo as demo_model
from steerfast.sae import explanation as explaining
from steerfast.sae.evaluate import evaluate_sae

PLANTED = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sae", type=Path, help="folder of an SAE of SmolLM2-135M-Instruct")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, not trained on")
    wheel = "sae_probes-0.4.2-py3-none-any.whl, as `pip download --no-deps sae-probes==0.4.2` leaves it"
    parser.add_argument("--probes", type=Path, metavar="WHEEL", help=wheel)
    parser.add_argument("--loss-tokens", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the rows")
    args = parser.parse_args()
    model, tokenizer = demo_model.load()
    texts = list(sf.sae.read_documents(args.text))
    found = evaluate_sae(sf.SAE.load(args.sae), model, tokenizer, texts, loss_tokens=args.loss_tokens, progress=print)
    print(found)
    digest = hashlib.sha256(args.text.read_bytes()).hexdigest()
    about = {"sae": args.sae.name, "text": args.text.name, "text_sha256": digest}
    keep(args.out, "sae trained", {**asdict(found), "loss_recovered": found.loss_recovered}, about)
    if args.probes is not None:
        from sae_probing import probes

        areas = probes(sf.SAE.load(args.sae), model, tokenizer, args.probes)
        keep(args.out, "sae probes", areas["mean"], about | {"wheel": args.probes.name, "sets": areas})
    values = planted(model, tokenizer)
    print("\n".join(f"{name:<20} {value:g}" for name, value in values.items()))
    keep(args.out, "sae explain", values, {"ranking": explaining.RANKINGS[0]})


def planted(model: torch.nn.Module, tokenizer: Any) -> dict[str, float]:
    """Share of planted words among the first ten and at the first place, and among the ten by the released ranking."""
    torch.manual_seed(0)
    words = explaining.vocabulary_of(tokenizer)
    chosen = [words[i] for i in torch.randperm(len(words))[:PLANTED].tolist()]
    output, norm = explaining.final_head("sae_quality", model)
    rows = (
        explaining._word_rows(tokenizer, chosen, output) / norm.weight.detach()
    )  # what the norm makes of it is the word
    rows = torch.nn.functional.normalize(rows, dim=1)
    rows = rows + 0.5 * torch.nn.functional.normalize(torch.randn_like(rows), dim=1)
    sae = sf.SAE(rows, rows, k=8)
    found = sf.explain(sae, model, tokenizer)
    released = sf.explain(sae, model, tokenizer, ranking="released")
    return {
        "planted": len(chosen),
        "vocabulary": len(words),
        "planted_in_ten": sum(word in found[i] for i, word in enumerate(chosen)) / len(chosen),
        "planted_first": sum(word == found[i][0] for i, word in enumerate(chosen)) / len(chosen),
        "released_in_ten": sum(word in released[i] for i, word in enumerate(chosen)) / len(chosen),
    }


def keep(folder: Path, case: str, values: dict[str, Any], about: dict[str, Any]) -> None:
    """Append the row of a case."""
    run = circumstances("cpu")
    row = {"case": case, "suite": "sae", "status": "ok", "values": values, "about": about, "run": run}
    append_row(folder / f"{run['date'][:10]}-cpu-sae-quality.jsonl", row)


if __name__ == "__main__":
    main()
