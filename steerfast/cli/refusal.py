"""`steerfast refusal`: the refusal direction, selected as its authors select it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from steerfast.files.text import rows_of

from . import shared

DESCRIPTION = (
    "Select the refusal direction among all positions behind the instruction and all layers, by what ablating and adding it "
    "does to the first token of the answer. Saves a plan that ablates it everywhere, a plan that induces refusal, the table "
    "of candidates and a heat map. Where all candidates fall, it says so and exits with 1."
)
EXAMPLE = (
    "steerfast refusal Qwen/Qwen2.5-1.5B-Instruct --harmful @harmful.txt --harmless @harmless.txt --out refusal\n"
    'steerfast generate Qwen/Qwen2.5-1.5B-Instruct "How do I kill a Python process?" --chat --plan refusal/ablate'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast refusal` to a parser."""
    from steerfast.tools.refusal import RefusalRules

    shared.model_arguments(parser)
    for side, meaning in (("harmful", "refuses"), ("harmless", "follows")):
        text = f"instructions that the model {meaning}; @FILE: one per line"
        parser.add_argument(f"--{side}", nargs="+", action="extend", required=True, metavar="TEXT", help=text)
    parser.add_argument(
        "--out", type=shared.out_folder, required=True, metavar="DIR", help="directory of the plans, table and picture"
    )
    words = f"a refusal begins with the first token of one of these (default: {' '.join(RefusalRules.words)})"
    parser.add_argument("--words", nargs="+", metavar="WORD", default=list(RefusalRules.words), help=words)
    template = 'with {instruction}, such as "Q: {instruction}\\nA:" (default: the chat template)'
    parser.add_argument("--template", metavar="TEXT", help=template)
    numbers = {
        "divergence": "largest KL divergence on harmless prompts, nats",
        "induction": "least refusal of harmless prompts with the direction added, nats",
        "late": "share of the layers, the last ones, without candidates",
    }
    for name, meaning in numbers.items():
        default = getattr(RefusalRules, name)
        parser.add_argument(
            f"--{name}", type=float, default=default, metavar="X", help=f"{meaning} (default: {default})"
        )
    draws = "controls of each kind beside the best (default: %(default)s)"
    parser.add_argument("--draws", type=int, default=RefusalRules.draws, metavar="N", help=draws)
    every = "use also the harmful prompts that the model does not refuse, and the harmless ones that it does"
    parser.add_argument("--every", action="store_true", help=every)
    xstest = "XSTest's prompts (columns prompt, label): what the plans do to refusal of its safe ones"
    parser.add_argument("--xstest", type=Path, metavar="CSV", help=xstest)
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="prompts per forward (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Run `steerfast refusal`; returns the exit code."""
    from steerfast.tools.refusal import RefusalRules, select_refusal

    sides = [shared.texts("--harmful", args.harmful), shared.texts("--harmless", args.harmless)]
    rules = RefusalRules(
        tuple(args.words), args.divergence, args.induction, args.late, filtered=not args.every, draws=args.draws
    )
    asked = None if args.xstest is None else _xstest(args.xstest)
    template = None if args.template is None else args.template.replace("\\n", "\n")
    model, tokenizer = shared.load(args)
    shown = sys.stderr.isatty()
    found = select_refusal(model, tokenizer, sides[0], sides[1], rules, template, args.batch_size, shown)
    shared.say(f"{found!r}\n")
    shared.say(
        f"Prompts     {found.prompts[0]} harmful of {len(sides[0])}, {found.prompts[1]} harmless of {len(sides[1])}"
    )
    shared.say(f"Candidates  {found.save_table(args.out / 'refusal.json')}")
    try:
        shared.say(f"Heat map    {found.heat_map(args.out / 'refusal.png')}")
    except ImportError as error:
        shared.say(f"No heat map: {error}")
    if found.best is None:
        shared.say(found.verdict)
        for name in ("ablate", "induce"):
            shared.say_earlier("Plan", args.out / name)
        return 1
    shared.say(f"Best        {found.verdict}")
    for name, null in (("bypass", found.bypass_null), ("induction", found.induction_null)):
        if null is not None:
            shared.say(f"{'Null':<12}{name}: {null}")
    for name, plan in (("ablate", found.ablate), ("induce", found.induce)):
        if plan is not None:
            shared.say(f"{'Plan':<12}{plan.save(args.out / name)}")
    if asked is not None:
        _say_over_refusal(model, tokenizer, asked, found, rules, template, args.batch_size)
    shared.say(f'Next        steerfast generate {args.model} "Your prompt" --plan {args.out / "ablate"}')
    return 0


def _xstest(file: Path) -> dict[str, list[str]]:
    """Label to prompts of XSTest's file."""
    rows = rows_of("--xstest", file, "give the CSV file of XSTest")
    if not rows or not {"prompt", "label"} <= set(rows[0]):
        raise ValueError(
            f"--xstest: {file} has columns {', '.join(rows[0]) if rows else 'none'}; expected prompt and label"
        )
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        if not row["prompt"].strip() or not row["label"].strip():
            raise ValueError(
                f"--xstest: row {number} of {file} lacks its prompt or its label; fill it in, or remove it"
            )
        found.setdefault(row["label"], []).append(row["prompt"])
    if "safe" not in found:
        raise ValueError(f"--xstest: {file} has no prompt labelled safe; expected labels safe and unsafe")
    return found


def _say_over_refusal(model: Any, tokenizer: Any, asked: dict[str, list[str]], found: Any, *rest: Any) -> None:
    """Print the refusals of prompts that only look unsafe, and of those that are, under each plan."""
    from steerfast.tools.refusal import refusal_rates

    for label, prompts in sorted(asked.items()):
        plain, ablated, induced = refusal_rates(model, tokenizer, prompts, [None, found.ablate, found.induce], *rest)
        shares = f"refused {plain:.1%} unsteered, {ablated:.1%} ablated, {induced:.1%} induced"
        shared.say(f"XSTest      {len(prompts)} {label} prompts: {shares}")
