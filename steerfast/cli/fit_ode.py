"""`steerfast fit-ode`: a barrier from two sides of texts, and a plan that flows along it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from steerfast.barriers.fit import KINDS
from steerfast.ops.solvers import SOLVERS

DESCRIPTION = (
    "Fit a barrier h = log p(positive)/p(negative) on the activations of two sides of texts, and save it with a plan that "
    "follows its gradient (ODESteer). Prints how well h tells held-out texts apart."
)
EXAMPLE = (
    'steerfast fit-ode demo --positive "I love you" "I adore you" --negative "I hate you" "I loathe you" \\\n'
    "    --layer 14 --kind quadratic --angle 0.4 --out love-ode\n"
    'steerfast generate demo "I hate you because" --plan love-ode'
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast fit-ode` to a parser."""
    from . import shared

    shared.model_arguments(parser)
    for side, meaning in (("positive", "with the property"), ("negative", "without it")):
        text = f"texts {meaning}; @FILE: one per line"
        parser.add_argument(f"--{side}", nargs="+", action="extend", required=True, metavar="TEXT", help=text)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the plan and the barrier")
    parser.add_argument("--layer", default="middle", metavar="L", help="one layer, or middle (default: %(default)s)")
    parser.add_argument(
        "--site", default=shared.SITES[0], choices=shared.SITES, help="where in the layer (default: %(default)s)"
    )
    parser.add_argument("--kind", default="quadratic", choices=KINDS, help="of the barrier (default: %(default)s)")
    path = parser.add_mutually_exclusive_group()
    path.add_argument("--angle", type=float, metavar="RADIANS", help="how far, as an angle (default: 0.4)")
    path.add_argument("--T", type=float, metavar="LENGTH", help="how far, in units of the stream")
    path.add_argument("--norms", type=float, metavar="X", help="how far, in units of the typical activation's norm")
    parser.add_argument("--steps", type=int, default=10, help="of the solver (default: %(default)s)")
    parser.add_argument("--method", default="euler", choices=tuple(SOLVERS), help="the solver (default: %(default)s)")
    parser.add_argument("--level", type=float, metavar="H", help="stop where h reaches this (default: go all the way)")
    steered = "tokens that the plan steers, as generated, 0:8 or 'all & !special' (default: %(default)s)"
    parser.add_argument("--steer", default="last", type=shared.selector, metavar="POSITIONS", help=steered)
    picture = "draw h along the path, from the negative texts, and its gain by the number of steps (needs matplotlib)"
    parser.add_argument("--plot", type=Path, metavar="PNG", help=picture)


def run(args: argparse.Namespace) -> int:
    """Run `steerfast fit-ode`; returns the exit code."""
    from steerfast.barriers.fit import fit_barrier
    from steerfast.edits.flow import Flow
    from steerfast.models.collect import collect
    from steerfast.models.layers import find_layers
    from steerfast.plan import Plan
    from steerfast.tools.flow_plot import plot_flow, require_matplotlib

    from . import shared

    if args.plot is not None:
        require_matplotlib()  # before the model is loaded
    positive, negative = shared.texts("--positive", args.positive), shared.texts("--negative", args.negative)
    model, tokenizer = shared.load(args)
    layers = shared.layers(args.layer, find_layers(model, "fit-ode").count)
    if len(layers) != 1:
        raise ValueError(f"--layer: {args.layer!r} names {len(layers)} layers; a barrier belongs to one")
    sides = [
        collect(model, tokenizer, texts, layers, site=args.site, progress=sys.stderr.isatty())
        for texts in (positive, negative)
    ]
    barrier = fit_barrier(sides[0], sides[1], kind=args.kind)
    info = barrier.info
    typical = barrier.origin.typical_norm or 0.0
    T = args.T if args.norms is None else args.norms * typical
    angle = 0.4 if T is None and args.angle is None else args.angle
    flow = Flow(barrier, angle=angle, T=T, steps=args.steps, method=args.method, level=args.level)
    layer = next(iter(sides[0]))
    barrier.save(args.out / "barrier")
    known = shared.special(tokenizer, args.steer)
    saved = Plan({(args.site, layer): flow}, positions=args.steer, model=model, special=known).save(args.out)
    shared.say(
        f"{args.kind}: {len(positive)} positive and {len(negative)} negative texts, {args.site} of layer {layer}"
    )
    shared.say(f"Rank        {barrier.rank} of {barrier.width}; typical activation {typical:.4g}")
    shared.say(f"Held out    accuracy {info.accuracy:.1%}, log-likelihood {info.log_likelihood:.3f} per text")
    if info.separable:
        shared.say("Separable   every text lies on its own side, so the size of h comes from the penalty")
    shared.say("Settings    " + (", ".join(f"{name} {value:g}" for name, value in info.settings.items())))
    shared.say(f"Plan        {saved} ({flow!r}, positions {args.steer})")
    shared.say(f"Barrier     {args.out / 'barrier'}")
    if args.plot is not None:
        shared.say(f"Picture     {plot_flow(flow, sides[1][layer], args.plot)}")
    shared.say(f'Next        steerfast generate {args.model} "Your prompt" --plan {saved}')
    return 0
