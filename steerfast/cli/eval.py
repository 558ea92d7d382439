"""`steerfast eval`: multiple choice and free text, unsteered and under a plan."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import shared

DESCRIPTION = (
    "Measure what a plan does to answers. Scores multiple choice by likelihood (A/B pairs of CAA, MC1 and MC2 of TruthfulQA), "
    "and the variety of free text (distinct-n), unsteered and steered; the effect stands beside random directions of the "
    "same dose."
)
EXAMPLE = (
    "steerfast eval demo --plan love --choices caa/sycophancy/test.json --limit 50\n"
    'steerfast eval demo --plan love --prompts "I think people are" "My boss is" --tokens 40'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast eval` to a parser."""
    from steerfast._null import DRAWS

    shared.model_arguments(parser)
    parser.add_argument("--plan", type=Path, metavar="DIR", help="the plan (default: the unsteered model only)")
    shared.saes_argument(parser)
    parser.add_argument("--strength", type=float, default=1.0, metavar="C", help="multiplies every edit (default: 1)")
    choices = "questions: CAA's pairs (.json) or TruthfulQA (.csv)"
    parser.add_argument("--choices", type=Path, nargs="+", default=[], metavar="FILE", help=choices)
    parser.add_argument("--limit", type=shared.positive, metavar="N", help="the first N questions of each file")
    prompts = "beginnings of free texts; @FILE: one per line"
    parser.add_argument("--prompts", nargs="+", action="extend", metavar="TEXT", help=prompts)
    parser.add_argument(
        "--tokens", type=shared.positive, default=64, metavar="N", help="of a free text (default: %(default)s)"
    )
    draws = "random directions that the effect stands beside (default: %(default)s)"
    parser.add_argument("--draws", type=int, default=DRAWS, metavar="N", help=draws)
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="answers per forward (default: %(default)s)"
    )
    parser.add_argument("--out", type=shared.out_file, metavar="JSON", help="file of all scores")


def run(args: argparse.Namespace) -> int:
    """Run `steerfast eval`; returns the exit code."""
    from steerfast.plan import Plan
    from steerfast.tools.evaluate import read_choices

    if not args.choices and not args.prompts:
        raise ValueError("--choices, --prompts: give questions or beginnings of texts, or both")
    if args.plan is None:
        shared.refuse(args, "without --plan", "saes", "strength", "draws")
    if not args.choices:
        shared.refuse(args, "without --choices", "limit", "draws", "batch_size")
    if not args.prompts:
        shared.refuse(args, "without --prompts", "tokens")
    plan = None if args.plan is None else Plan.load(args.plan, args.saes)
    prompts = shared.texts("--prompts", args.prompts) if args.prompts else []
    for file in args.choices:  # what cannot be read is refused before the model is loaded
        read_choices(file, None, args.limit)
    model, tokenizer = shared.load(args)
    found: dict[str, Any] = {"choices": {}}
    for file in args.choices:
        choices = read_choices(file, tokenizer, args.limit)
        found["choices"][str(file)] = _choices(model, tokenizer, choices, plan, args, file)
    if prompts:
        found["texts"] = _texts(model, tokenizer, prompts, plan, args)
    if args.out is not None:
        from steerfast.files.replace import replace_file

        text = {"kind": "steerfast.eval", "schema": 1, "strength": args.strength, "found": _known(found)}
        replace_file(args.out, json.dumps(text, indent=1, ensure_ascii=False, allow_nan=False).encode())
        shared.say(f"Scores      {args.out}")
    return 0


def _known(value: Any) -> Any:
    """Scores for JSON, which has no NaN: null."""
    if isinstance(value, dict):
        return {name: _known(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_known(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _choices(
    model: Any, tokenizer: Any, choices: Any, plan: Any, args: argparse.Namespace, file: Path
) -> dict[str, Any]:
    """Print and return the scores of one file."""
    from steerfast.tools.evaluate import evaluate_choices

    shared.say(f"{file}")
    plain = evaluate_choices(model, tokenizer, choices, batch_size=args.batch_size)
    shared.say(f"  unsteered   {plain}")
    if plan is None:
        return {"unsteered": asdict(plain)}
    steered = evaluate_choices(model, tokenizer, choices, plan, args.strength, args.draws, args.batch_size)
    shared.say(f"  steered     {steered}")
    if steered.null is not None:
        shared.say(f"  null        log-odds {steered.null.effect:+.2f}: {steered.null}")
    return {"unsteered": asdict(plain), "steered": asdict(steered)}


def _texts(model: Any, tokenizer: Any, prompts: list[str], plan: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the scores of free text."""
    from steerfast.tools.evaluate import evaluate_text

    found = {}
    for name, one in (("unsteered", None), ("steered", plan)):
        if name == "steered" and plan is None:
            continue
        scores = evaluate_text(model, tokenizer, prompts, one, args.strength, args.tokens)
        shared.say(f"texts, {name}: {scores}")
        for prompt, text in zip(prompts, scores.texts, strict=True):
            shared.say(f"  {shared.one_line(prompt + text)}")
        found[name] = asdict(scores)
    return found
