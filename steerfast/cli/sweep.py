"""`steerfast sweep`: layers and strengths by measurement."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from steerfast.directions import extract
from steerfast.directions.fit import ESTIMATORS, settings_of
from steerfast.directions.trained import TRAINED
from steerfast.models.layers import find_layers
from steerfast.place import SITES
from steerfast.tools.sweep import Grid, Sweep, sweep
from steerfast.tools.sweep_edits import METHODS, UNITS
from steerfast.tools.sweep_scores import NEUTRAL, Question
from steerfast.tools.sweep_store import Cell

# --- the command ------------------------------------------------------------------------------------------------------

DESCRIPTION = (
    "Choose layer and strength by measurement. Extracts a vector per layer from two sides of texts, steers with each "
    "strength, and shows how much likelier wanted continuations became and what it cost in perplexity of neutral text. "
    "Run it again to continue an interrupted sweep."
)
EXAMPLE = (
    'steerfast sweep demo --positive "I love you" --negative "I hate you" --layers 4-16 \\\n'
    '    --prompts "I think people are" "My boss is" --wanted " kind" " good" --unwanted " cruel" " bad" --out sweep'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast sweep` to a parser."""
    from . import shared

    shared.model_arguments(parser)
    texts = {
        "positive": "texts with the property; @FILE: one per line",
        "negative": "texts without it",
        "prompts": "beginnings of texts, on which the effect is measured",
        "wanted": "continuations that should become likelier; mind the leading space",
        "unwanted": "continuations that should become less likely",
    }
    for name, meaning in texts.items():
        parser.add_argument(f"--{name}", nargs="+", action="extend", required=True, metavar="TEXT", help=meaning)
    neutral = "texts whose perplexity tells the damage (default: six plain sentences)"
    parser.add_argument("--neutral", nargs="+", action="extend", metavar="TEXT", help=neutral)
    parser.add_argument("--layers", default="all", metavar="LAYERS", help="8, 6,8, 6-12, all or middle (default: all)")
    strengths = "default: %(default)s"
    parser.add_argument("--strengths", nargs="+", type=float, default=list(Grid.strengths), metavar="C", help=strengths)
    methods = f"of extraction or of `steerfast fit`: {', '.join(METHODS)} (default: mean_difference)"
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="METHOD", default=["mean_difference"], help=methods
    )
    parser.add_argument("--sae", type=Path, metavar="PATH", help="the SAE of methods that edit features")
    draws = "fits on shuffled labels, and random directions, that the best cell stands beside (default: %(default)s)"
    parser.add_argument("--draws", type=int, default=Grid.draws, metavar="N", help=draws)
    unit = "of the strengths: share of the stream's norm, or multiple of the vector (default: %(default)s)"
    parser.add_argument("--unit", choices=UNITS, default="stream", help=unit)
    parser.add_argument("--site", choices=SITES, default="resid_post", help="where (default: %(default)s)")
    parser.add_argument(
        "--damage", type=float, default=1.1, help="perplexity that is bearable, in multiples of the unsteered"
    )
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="texts per forward (default: %(default)s)"
    )
    parts = f"{shared.PART}; the same command without it merges them"
    parser.add_argument("--part", type=shared.part, default=(1, 1), metavar="I/N", help=parts)
    parser.add_argument(
        "--out", type=shared.out_folder, required=True, metavar="DIR", help="directory of sweep.json and sweep.png"
    )


def run(args: argparse.Namespace) -> int:
    """Run `steerfast sweep`; returns the exit code."""
    from . import shared

    featured = [one for one in args.methods if one in ESTIMATORS and "sae" in settings_of(one)]
    if not featured:
        shared.refuse(args, f"with --methods {' '.join(args.methods)}", "sae")
    read = {
        n: shared.texts(f"--{n}", getattr(args, n)) for n in ("positive", "negative", "prompts", "wanted", "unwanted")
    }
    neutral = NEUTRAL if args.neutral is None else tuple(shared.texts("--neutral", args.neutral))
    question = Question(tuple(read["prompts"]), tuple(read["wanted"]), tuple(read["unwanted"]), neutral)
    sae = None if args.sae is None else shared.sae(args.sae)
    model, tokenizer = shared.load(args)
    layers = shared.layers(args.layers, find_layers(model, "sweep"))
    grid = Grid(
        tuple(layers), tuple(args.strengths), tuple(args.methods), args.unit, args.site, sae, args.damage, args.draws,
        args.part,
    )  # fmt: skip
    shown = sys.stderr.isatty()
    found = sweep(
        model, tokenizer, (read["positive"], read["negative"]), question, grid, args.out, args.batch_size, shown
    )
    shared.say(f"{found!r}\n")
    if args.part != (1, 1):
        shared.say(f"Part        {args.part[0]} of {args.part[1]}; the same command without --part merges them")
        return 0
    best = found.best(args.damage)
    if best is None:
        shared.say(
            f"No cell keeps the perplexity below {args.damage:g} times the unsteered one; try smaller strengths."
        )
    else:
        gain, ratio = best.effect - found.baseline.effect, best.perplexity / found.baseline.perplexity
        change = f"{gain:+.2f} nats, perplexity × {ratio:.2f}"
        shared.say(f"Best        {best.method}, layer {best.layer}, strength {best.strength:g}: {change}")
        if found.null is not None:
            shared.say(f"Null        {found.null[1]}")
        shared.say(f"Next        steerfast {_next(args, best)} --out plan")
        if best.method in (*ESTIMATORS, *TRAINED) and best.method != "flow":
            shared.say(
                f'            steerfast generate {args.model} "Your prompt" --plan plan --strength {best.factor:.4g}'
            )
    return _say_files(args, found)


def _say_files(args: argparse.Namespace, found: Sweep) -> int:
    """Print where the cells and the picture are."""
    from . import shared

    shared.say(f"Cells       {args.out / 'sweep.json'}")
    try:
        shared.say(f"Heat map    {found.heat_map(args.out / 'sweep.png')}")
    except ImportError as error:
        shared.say(f"No heat map: {error}")
    return 0


def _next(args: argparse.Namespace, best: Cell) -> str:
    """The command that makes a plan of a cell."""
    sides = ["--positive ...", "--negative ..."]
    where = f"--layer {best.layer} --site {args.site}"
    if best.method in extract.METHODS:
        sign = "-" if best.strength < 0 else ""
        dose = f"--layers {best.layer} --site {args.site} --method {best.method} --normalize --strength {sign}{best.norm:.4g}"
        return f"extract {args.model} {' '.join(sides)} {dose}"
    if best.method != "flow":
        sae = f" --sae {args.sae}" if best.method in ESTIMATORS and "sae" in settings_of(best.method) else ""
        return f"fit {best.method} {args.model} {' '.join(sides)} {where}{sae} --steer all"
    if best.strength < 0:  # a flow goes one way
        sides = ["--positive (the negative ones)", "--negative (the positive ones)"]
    length = f"{'angle' if args.unit == 'stream' else 'T'}={abs(best.strength):g}"
    return f"fit flow {args.model} {' '.join(sides)} {where} --set {length} --steer all"
