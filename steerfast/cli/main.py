"""The command `steerfast`: demo, extract, generate, check, sweep, fit, refusal, eval, plan, sae and bench.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a check failed, 2 the input does not work
(one line says why; `--debug` shows the traceback), 130 interrupted. Anything heavy is imported by the command that
needs it.
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module

from . import shared

COMMANDS = {
    "demo": "steer a real model with every method",
    "extract": "make a steering vector from two sides of texts",
    "generate": "stream a steered text beside the unsteered one",
    "check": "prove on your own model that steering works",
    "sweep": "try layers and strengths, effect against perplexity",
    "fit": "fit an intervention on two sides of texts, by any method",
    "refusal": "select the refusal direction as its authors do",
    "eval": "score multiple choice and free text under a plan",
    "plan": "look at a file of steering, or convert it",
    "sae": "train, measure, explain and use a sparse autoencoder",
    "bench": "time every op on this machine, against its own peak",
}
"""Commands in the order of the help text; each is the module of its name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Args:
        argv: The arguments after the command's name; None: those of this process.

    Returns:
        0 done, 1 a check failed, 2 the input does not work, 130 interrupted.

    Raises:
        SystemExit: argparse has printed a help text, or what is wrong with the arguments.

    Example:
        >>> main(["generate", "no/such/model/here", "Hello", "--plan", "nowhere"])
        2
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console without "α" prints "?" rather than nothing
    try:
        args = _parser(argv).parse_args(argv)  # a command's module may take seconds to import
    except KeyboardInterrupt:
        shared.note("interrupted")
        return 130
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: shared.note(
            f"steerfast {args.command}: {shared.one_line(message)}"
        )
        try:
            return int(args.run(args))
        except KeyboardInterrupt:
            shared.note("interrupted")
            return 130
        except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
            if args.debug:
                traceback.print_exc()
            else:
                shared.note(f"steerfast {args.command}: {shared.one_line(error)}")
            return 2


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="steerfast",
        description="Steer language models by editing their residual stream while they run.",
        epilog="examples:\n"
        "  steerfast demo\n"
        '  steerfast extract demo --positive "I love you" --negative "I hate you" --layers 8 --strength 2 --out love\n'
        '  steerfast generate demo "I hate you because" --plan love\n'
        "  steerfast check demo --plan love\n\n"
        "`steerfast COMMAND --help` explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        if name not in argv:  # its module may be heavy to import
            commands.add_parser(name, help=text)
            continue
        tool = import_module(f".{name.replace('-', '_')}", __package__)
        tool.add_arguments(shared.command(commands, name, tool.run, tool.DESCRIPTION, tool.EXAMPLE))
    return parser


if __name__ == "__main__":
    sys.exit(main())
