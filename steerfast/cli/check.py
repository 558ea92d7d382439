"""`steerfast check`: proofs that steering works on a model, or inside an engine."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from . import shared

if TYPE_CHECKING:
    from steerfast.tools.check import Finding


DESCRIPTION = (
    "Prove on your own model that steering works. With ordinary hooks: a prompt's tokens and a cached new token "
    "move by the vector, batch-mates and padding keep their bits, the sites add up, and removal restores the "
    "logits bit for bit. Exit code 1 if something fails."
)
EXAMPLE = "steerfast check path/to/model --dtype bfloat16\nsteerfast check demo --plan love"


def run(args: argparse.Namespace) -> int:
    """Run `steerfast check`; returns the exit code."""
    from steerfast.plan import Plan

    if args.plan is None:
        shared.refuse(args, "without --plan", "saes")
    plan = None if args.plan is None else Plan.load(args.plan, args.saes)
    if args.engine == "vllm":
        shared.refuse(args, "with --engine vllm, which chooses its own", "device")
        from steerfast.tools.check_vllm import prove

        return _report(prove(shared.folder(args.model), plan, args.dtype), "this engine")
    model, tokenizer = shared.load(args)
    from steerfast.models.layers import find_layers
    from steerfast.ops.backends import backend_of
    from steerfast.tools.check import check

    layers = find_layers(model, "check")
    first = next(model.parameters())
    shared.say(f"{layers.name}: {layers.count} layers of width {layers.d} at {layers.path}")
    shared.say(f"{shared.short(first.dtype)} on {first.device}, backend {backend_of(first)}\n")
    return _report(check(model, tokenizer, plan), "this model")


def _report(findings: Iterable[Finding], where: str) -> int:
    failed = 0
    for finding in findings:
        failed += finding.outcome == "failed"
        shared.say(f"  {finding.outcome:<8} {finding.name}")
        shared.say(textwrap.fill(finding.detail, shared.width(), initial_indent=" " * 11, subsequent_indent=" " * 11))
    shared.say(f"\n{failed} failed" if failed else f"\nSteering works on {where}.")
    return 1 if failed else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast check` to a parser."""
    shared.model_arguments(parser)
    parser.add_argument("--plan", metavar="DIR", help="a plan that must fit the model and change its logits")
    shared.saes_argument(parser)
    parser.add_argument(
        "--engine", choices=["transformers", "vllm"], default="transformers", help="what is to run the model"
    )
