"""`steerfast fit`: an intervention from two sides of texts, by any method that is fitted on activations or trained on a model."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from steerfast.barriers.velocity import VelocityInfo
from steerfast.directions import trained
from steerfast.directions.fit import ESTIMATORS, settings_of
from steerfast.directions.trained import TRAINED
from steerfast.files import container

from . import shared

DESCRIPTION = (
    "Fit an intervention on the activations of two sides of texts, or train one on the model itself, and save a plan that "
    "applies it. Prints what the same fit does to texts that it has not seen. What is trained (but lineas) takes the texts in "
    "pairs, line by line: the words that both begin with are the prompt, what follows is to become likelier, or less likely."
)
EXAMPLE = (
    'steerfast fit affine_ablate demo --positive "I love you" "I adore you" --negative "I hate you" "I loathe you" \\\n'
    "    --layer 14 --out love\n"
    "steerfast fit flow demo --positive @kind.txt --negative @rude.txt --layer 14 --set kind=linear angle=0.3 --out kind\n"
    "steerfast fit velocity demo --positive @kind.txt --negative @rude.txt --layer 14 --out kind\n"
    'steerfast generate demo "I hate you because" --plan love'
)
SEVERAL_LAYERS = ("rotate",)
"""Methods that look at all layers to edit one."""
LAST = ("flow", "velocity")
"""Methods that steer from the last token of the prompt on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast fit` to a parser."""
    methods = f"{', '.join(ESTIMATORS)}; trained on the model: {', '.join(TRAINED)}"
    parser.add_argument("method", metavar="METHOD", choices=(*ESTIMATORS, *TRAINED), help=methods)
    shared.model_arguments(parser)
    for side, meaning in (("positive", "with the property"), ("negative", "without it")):
        text = f"texts {meaning}; @FILE: one per line"
        parser.add_argument(f"--{side}", nargs="+", action="extend", required=True, metavar="TEXT", help=text)
    parser.add_argument("--out", type=shared.out_folder, required=True, metavar="DIR", help="directory of the plan")
    parser.add_argument("--layer", default="middle", metavar="L", help="one layer, or middle (default: %(default)s)")
    position = "token that is read: last, mean, all, or an index (default: %(default)s)"
    parser.add_argument("--position", default="last", metavar="TOKEN", help=position)
    parser.add_argument(
        "--site", default=shared.SITES[0], choices=shared.SITES, help="where in the layer (default: %(default)s)"
    )
    numbers = "settings of the method, such as alpha=0.5 or kind=linear; see sf.fit"
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help=numbers)
    neutral = "of a velocity: texts that are to stay as likely as they are; @FILE: one per line (default: the model writes 48)"
    parser.add_argument("--neutral", nargs="+", action="extend", metavar="TEXT", help=neutral)
    parser.add_argument("--sae", type=Path, metavar="PATH", help="the SAE whose features are edited")
    steered = "tokens that the plan steers, as generated, 0:8 or 'all & !special' (default: all; last for a flow and a velocity)"
    parser.add_argument("--steer", type=shared.selector, metavar="POSITIONS", help=steered)
    picture = "of a flow: draw h along the path, from the negative texts, and its gain by the number of steps (needs matplotlib)"
    parser.add_argument("--plot", type=shared.out_file, metavar="PNG", help=picture)


def run(args: argparse.Namespace) -> int:
    """Run `steerfast fit`; returns the exit code."""
    from steerfast.directions.fit import fit
    from steerfast.edits.flow import Flow
    from steerfast.models.collect import collect
    from steerfast.models.layers import find_layers
    from steerfast.plan import Plan
    from steerfast.tools.flow_plot import plot_flow

    settings = _settings(args)
    _check_plot(args)
    if args.method in TRAINED:
        _check_trained(args)
    positive, negative = shared.texts("--positive", args.positive), shared.texts("--negative", args.negative)
    position = shared.position(args.position)
    model, tokenizer = shared.load(args)
    blocks = find_layers(model, "fit")
    layers = shared.layers(args.layer, blocks, "--layer")
    if len(layers) != 1:
        raise ValueError(f"--layer: {args.layer!r} names {len(layers)} layers; an intervention is fitted on one")
    (layer,) = layers
    if args.method in TRAINED:
        edit = trained.train(args.method, model, tokenizer, positive, negative, layer, **settings)
    else:
        read = range(blocks.count) if args.method in SEVERAL_LAYERS else layers
        sides = [
            collect(model, tokenizer, texts, read, position, args.site, progress=sys.stderr.isatty())
            for texts in (positive, negative)
        ]
        edit = fit(args.method, sides[0], sides[1], layer=layer, **settings)
    steered = args.steer or ("last" if args.method in LAST else "all")
    known = shared.special(tokenizer, steered)
    saved = Plan({(args.site, layer): edit}, positions=steered, model=model, special=known).save(args.out)
    typical = "" if edit.origin.typical_norm is None else f", typical activation {edit.origin.typical_norm:.4g}"
    texts = f"{len(positive)} positive and {len(negative)} negative texts"
    shared.say(f"{args.method}: {texts}, {args.site} of layer {layer}{typical}")
    _say_held_out(edit)
    shared.say(f"Plan        {saved} ({edit!r}, positions {steered})")
    shared.say_earlier("Directions", args.out / container.DIRECTIONS.text_name, "; sf.load_directions reads them")
    if args.plot is not None and isinstance(edit, Flow):
        shared.say(f"Picture     {plot_flow(edit, sides[1][layer], args.plot)}")
    shared.say(f'Next        steerfast generate {args.model} "Your prompt" --plan {saved}')
    return 0


def _say_held_out(edit: Any) -> None:
    """Print what is known of the fit."""
    if (fitted := edit.info) is not None:
        if not math.isnan(fitted.closed):
            dose = "" if math.isnan(fitted.dose) else f", at a dose of {fitted.dose:.2f}"
            shared.say(f"Held out    closes {fitted.closed:.1%} of the distance between the sides{dose}")
        if not math.isnan(fitted.nats):
            shared.say(f"Held out    continuations become likelier by {fitted.nats:+.3g} nats a token")
        if fitted.null is not None:
            shared.say(f"Null        {fitted.null}")
    if (barrier := getattr(edit, "barrier", None)) is None:
        return
    info = barrier.info
    if isinstance(info, VelocityInfo):
        if not math.isnan(info.nats):
            gain = f"{info.nats:+.3g} nats of log-odds"
            shared.say(f"Held out    pairs move by {gain}, at {info.damage:.2g} nats a token of neutral text")
        if info.null is not None:
            shared.say(f"Null        {info.null}")
        return
    shared.say(f"Barrier     rank {barrier.rank} of {barrier.width}, {info.kind}: accuracy {info.accuracy:.1%}, log-likelihood "
               f"{info.log_likelihood:.3f} per held-out text")  # fmt: skip
    if info.separable:
        shared.say("Separable   every text lies on its own side, so the size of h comes from the penalty")
    shared.say("Settings    " + ", ".join(f"{name} {value:g}" for name, value in info.settings.items()))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The method's settings from the command line: numbers, true, false, null, or words."""
    settings: dict[str, Any] = {}
    names = (trained.settings_of if args.method in TRAINED else settings_of)(args.method)
    names = tuple(name for name in names if name != "neutral")  # an option of its own
    for item in args.set:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--set: cannot read {item!r}; write NAME=VALUE, such as {names[0]}=1")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            settings[name] = text
    for name in settings if args.method in TRAINED else ():
        if name not in names:
            raise ValueError(f"--set: {args.method} has no setting {name!r}; it has {', '.join(names)}")
    if args.neutral is not None:
        if args.method != "velocity":
            raise ValueError(f"--neutral: {args.method} looks at no neutral text; leave it out")
        settings["neutral"] = shared.texts("--neutral", args.neutral)
    if args.sae is not None and "sae" not in names:
        raise ValueError(f"--sae: {args.method} edits no features of an SAE; leave it out")
    if args.sae is not None:
        settings["sae"] = shared.sae(args.sae)
    elif "sae" in names:
        raise ValueError(f"--sae: {args.method} edits features of an SAE; give its path")
    return settings


def _check_trained(args: argparse.Namespace) -> None:
    """Refuse what a method that is trained on the model does not look at."""
    for name, usual in (("site", shared.SITES[0]), ("position", "last")):
        if getattr(args, name) != usual:
            what = f"{args.method} is trained at {shared.SITES[0]}, on the texts themselves"
            raise ValueError(f"--{name}: got {getattr(args, name)}, but {what}; leave it out")


def _check_plot(args: argparse.Namespace) -> None:
    """Refuse a picture that cannot be drawn before the model is loaded."""
    if args.plot is None:
        return
    if args.method != "flow":
        raise ValueError(f"--plot: draws a flow, and the method is {args.method}; leave it out")
    from steerfast.tools.flow_plot import require_matplotlib

    require_matplotlib()
