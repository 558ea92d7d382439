"""`steerfast sae collect`: activations of several places, by transformers or by vLLM, whole or in parts."""

from __future__ import annotations

import argparse
from pathlib import Path

from steerfast.place import SITES, Place
from steerfast.sae.cache import CacheConfig, cache_places
from steerfast.sae.documents import read_documents

from . import shared

TEXT = "collect activations of several places in one forward, whole or in parts; run it again to go on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast sae collect` to a parser."""
    shared.model_arguments(parser)
    shared.corpus_arguments(parser, "--text", "what the model reads", required=True)
    places = "SITE:LAYER or LAYER, such as resid_post:8 mlp_out:-1 12; all are read in one forward"
    parser.add_argument("--at", nargs="+", required=True, type=place, metavar="PLACE", help=places)
    parser.add_argument(
        "--out", type=shared.out_folder, required=True, metavar="DIR", help="each place gets DIR/SITE-LAYER"
    )
    parser.add_argument(
        "--context", type=shared.positive, default=256, metavar="N", help="tokens of a context (default: 256)"
    )
    parser.add_argument("--part", type=shared.part, default=(1, 1), metavar="I/N", help=shared.PART)
    engine = "vllm: its own extraction of hidden states, resid_post alone, into DIR (default: transformers)"
    parser.add_argument("--engine", choices=("transformers", "vllm"), default="transformers", help=engine)
    stored = "of the rows; vLLM keeps them in its own (default: %(default)s)"
    parser.add_argument("--store", default="bfloat16", choices=("bfloat16", "float32"), help=stored)


def run(args: argparse.Namespace) -> int:
    """Run `steerfast sae collect`; returns the exit code."""
    import torch

    if args.engine == "vllm":
        shared.refuse(args, "with --engine vllm, which chooses its own", "device")
    config = CacheConfig(args.context, getattr(torch, args.store), args.part)
    texts = list(read_documents(args.text, key=args.key, title=args.title))
    folders = [_by_vllm(args, texts, config)] if args.engine == "vllm" else _by_transformers(args, texts, config)
    for folder in folders:
        shared.say(f"Rows        {folder}")
    if args.part != (1, 1):
        shared.say(f"Part        {args.part[0]} of {args.part[1]}; together the parts are whole, in one directory")
    shared.say(f"Next        steerfast sae train --rows {folders[0]} --out sae")
    return 0


def place(text: str) -> Place:
    """A place, as an argument."""
    site, colon, layer = text.rpartition(":")
    site = site if colon else "resid_post"
    try:
        number = int(layer)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no place; write SITE:LAYER, such as resid_post:8") from None
    if site not in SITES:
        raise argparse.ArgumentTypeError(f"{site!r} is no site; use {', '.join(SITES)}")
    return Place(site, number)


def _by_transformers(args: argparse.Namespace, texts: list[str], config: CacheConfig) -> list[Path]:
    model, tokenizer = shared.load(args)
    return list(cache_places(model, tokenizer, texts, args.at, args.out, config, shared.progress).values())


def _by_vllm(args: argparse.Namespace, texts: list[str], config: CacheConfig) -> Path:
    from steerfast.vllm.hidden_states import collect_hidden_states

    if other := [str(place) for place in args.at if place.site != "resid_post"]:
        raise ValueError(
            f"sae collect: vLLM's extraction has resid_post alone, got {', '.join(other)}; use --engine transformers for them"
        )
    layers = [place.layer for place in args.at]
    options = {} if args.dtype == "auto" else {"dtype": args.dtype}
    return collect_hidden_states(shared.folder(args.model), texts, layers, args.out, config, shared.progress, **options)
