"""`steerfast extract`: a steering vector from two sides of texts."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from . import shared

DESCRIPTION = (
    "Make a steering vector from two sides of texts. Runs the model on both, takes a direction per layer, and "
    "saves a plan that adds it there, and beside it the directions themselves, for sf.load_directions."
)
EXAMPLE = (
    'steerfast extract demo --positive "I love you" --negative "I hate you" \\\n'
    "    --layers 8 --strength 2 --out love\n"
    "steerfast extract path/to/model --positive @kind.txt --negative @rude.txt \\\n"
    "    --layers 10-14 --normalize --strength 6 --out kind"
)


def run(args: argparse.Namespace) -> int:
    """Run `steerfast extract`; returns the exit code."""
    positive, negative = shared.texts("--positive", args.positive), shared.texts("--negative", args.negative)
    position = shared.position(args.position)
    model, tokenizer = shared.load(args)
    from steerfast.directions import extract
    from steerfast.directions.sets import save_directions
    from steerfast.edits.linear import Add
    from steerfast.models.collect import collect
    from steerfast.models.layers import find_layers
    from steerfast.plan import Plan

    layers = shared.layers(args.layers, find_layers(model, "extract"))
    sides = [
        collect(model, tokenizer, texts, layers, position, args.site, progress=sys.stderr.isatty())
        for texts in (positive, negative)
    ]
    found = getattr(extract, args.method)(*sides, normalize=args.normalize)
    directions = found if isinstance(found, dict) else {found.origin.place.layer: found}
    edits: dict[int | tuple[str, int], Any] = {
        (args.site, layer): Add(d, strength=args.strength) for layer, d in directions.items()
    }
    known = shared.special(tokenizer, args.steer)
    saved = Plan(edits, positions=args.steer, model=model, special=known).save(args.out)
    save_directions(args.out, directions, model)
    shared.say(
        f"{args.method}: {len(positive)} positive and {len(negative)} negative texts, {args.site}, position {position}"
    )
    shared.say(f"\n{'layer':>7} {'norm':>10} {'typical activation':>20}")
    for layer, direction in directions.items():
        shared.say(f"{layer:>7} {direction.norm:>10.4g} {direction.origin.typical_norm:>20.4g}")
    shared.say(f"\nPlan        {saved} (strength {args.strength:g}{', unit vectors' if args.normalize else ''})")
    shared.say(f'Next        steerfast generate {args.model} "Your prompt" --plan {saved}')
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast extract` to a parser."""
    shared.model_arguments(parser)
    for side, meaning in (("positive", "with the property"), ("negative", "without it")):
        text = f"texts {meaning}; @FILE: one per line"
        parser.add_argument(f"--{side}", nargs="+", action="extend", required=True, metavar="TEXT", help=text)
    parser.add_argument(
        "--out", type=shared.out_folder, required=True, metavar="DIR", help="directory of the plan and the directions"
    )
    layers = "8, -1 (the last), 6,8, 6-12, all or middle (default: %(default)s)"
    parser.add_argument("--layers", "--layer", default="middle", metavar="SPEC", help=layers)
    parser.add_argument("--method", default=shared.METHODS[0], choices=shared.METHODS, help="(default: %(default)s)")
    position = "token that is read: last, mean, all, or an index (default: %(default)s)"
    parser.add_argument("--position", default="last", metavar="TOKEN", help=position)
    parser.add_argument(
        "--site", default=shared.SITES[0], choices=shared.SITES, help="where in the layer (default: %(default)s)"
    )
    parser.add_argument("--normalize", action="store_true", help="scale every direction to length 1")
    parser.add_argument("--strength", type=float, default=1.0, metavar="C", help="c in x + c·v (default: %(default)s)")
    steered = "tokens that the plan steers, as generated, 0:8 or 'all & !special' (default: %(default)s)"
    parser.add_argument("--steer", default="all", type=shared.selector, metavar="POSITIONS", help=steered)
