"""`steerfast plan show | convert`: what is in a file of steering, and the same in another format."""

from __future__ import annotations

import argparse
import textwrap

from steerfast.tools.convert import FORMATS, convert, show
from steerfast.tools.lora import ENGINES

from . import shared

# --- the command ------------------------------------------------------------------------------------------------------

DESCRIPTION = "Look at a file of steering, or write it in another format. Reads plans and vectors of all known formats."
EXAMPLE = """steerfast plan show love
steerfast plan convert love love.gguf --to gguf
steerfast plan convert ablation adapter --to lora --model demo"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast plan` to a parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|convert")
    text = "print a summary with norms"
    shown = actions.add_parser("show", help=text, description=text)
    shown.add_argument("source", metavar="PATH", help="directory of a plan, or vectors of any known format")
    text = "write a plan or vectors in another format"
    formats = (
        f"formats: {', '.join(FORMATS)}. All but plan and lora hold vectors alone, with their strengths multiplied in; lora, an "
        "adapter of one model, also holds ablations of what is written into the stream."
    )
    other = actions.add_parser("convert", help=text, description=textwrap.fill(f"{text}; {formats}", 100))
    other.add_argument("source", metavar="FROM", help="directory of a plan, or vectors of any known format")
    other.add_argument(
        "target", type=shared.out_new, metavar="TARGET", help="directory or file to write; must not exist"
    )
    other.add_argument("--to", choices=FORMATS, required=True, help="the format")
    other.add_argument(
        "--strength", type=float, default=1.0, metavar="C", help="multiplies every vector (default: %(default)s)"
    )
    adapter = other.add_argument_group("for --to lora")
    adapter.add_argument("--model", metavar="MODEL", help="directory of a saved model, name on the hub, or demo")
    shared.device_arguments(adapter)
    text = "any: what every engine reads; peft: biases and stacked experts, too (default: %(default)s)"
    adapter.add_argument("--engine", choices=ENGINES, default="any", help=text)
    shared.saes_argument(shown)
    shared.saes_argument(other)
    other.set_defaults(usual=other.get_default)


def run(args: argparse.Namespace) -> int:
    """Run `steerfast plan`; returns the exit code."""
    if args.action == "show":
        shared.say(show(args.source, args.saes))
        return 0
    if args.to != "lora":
        shared.refuse(args, f"with --to {args.to}", "model", "device", "dtype", "engine")
    model = shared.load(args)[0] if args.to == "lora" and args.model else None
    target = convert(args.source, args.target, args.to, args.strength, args.saes, model, args.engine)
    shared.say(f"{show(target, args.saes)}\n\nWritten     {target}")
    return 0
