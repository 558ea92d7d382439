"""`steerfast plan show | convert`: what is in a file of steering, and the same in another format."""

from __future__ import annotations

import argparse
import textwrap

from steerfast.tools.convert import FORMATS, convert, show

from . import shared

# --- the command ------------------------------------------------------------------------------------------------------

DESCRIPTION = "Look at a file of steering, or write it in another format. Reads plans and vectors of all known formats."
EXAMPLE = "steerfast plan show love\nsteerfast plan convert love love.gguf --to gguf"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast plan` to a parser."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="show|convert")
    text = "print a summary with norms"
    shown = actions.add_parser("show", help=text, description=text)
    shown.add_argument("source", metavar="PATH", help="directory of a plan, or vectors of any known format")
    text = "write a plan or vectors in another format"
    formats = f"formats: {', '.join(FORMATS)}. All but plan hold vectors alone, with their strengths multiplied in."
    other = actions.add_parser("convert", help=text, description=textwrap.fill(f"{text}; {formats}", 100))
    other.add_argument("source", metavar="FROM", help="directory of a plan, or vectors of any known format")
    other.add_argument("target", metavar="TARGET", help="directory or file to write; must not exist")
    other.add_argument("--to", choices=FORMATS, required=True, help="the format")
    other.add_argument(
        "--strength", type=float, default=1.0, metavar="C", help="multiplies every vector (default: %(default)s)"
    )
    shared.saes_argument(shown)
    shared.saes_argument(other)


def run(args: argparse.Namespace) -> int:
    """Run `steerfast plan`; returns the exit code."""
    if args.action == "show":
        shared.say(show(args.source, args.saes))
        return 0
    target = convert(args.source, args.target, args.to, args.strength, args.saes)
    shared.say(f"{show(target, args.saes)}\n\nWritten     {target}")
    return 0
