"""`steerfast sae train`: collect activations and train on them, in one process or in those of torchrun."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from steerfast.place import SITES
from steerfast.sae.cache import ActivationCache, cache_activations
from steerfast.sae.documents import read_documents
from steerfast.sae.model import SAE
from steerfast.sae.opening import open_rows
from steerfast.sae.training.config import TrainConfig
from steerfast.sae.training.corpus import wikipedia
from steerfast.sae.training.distributed import Alone, mesh_of
from steerfast.sae.training.objectives import OBJECTIVES, Transcode
from steerfast.sae.training.sources import PlacesStream
from steerfast.sae.training.train import train_sae, train_saes
from steerfast.sae.training.trainer import local_ends

from . import shared

_CHOICES = ("features", "k", "tokens", "batch", "lr", "k_start", "seed")  # what can be set on the command line
_KINDS = {objective.kind: objective for objective in OBJECTIVES}
_OF_A_MODEL = ("MODEL", "preset", "text", "key", "title", "site", "reads", "cache", "context", "dtype")
"""What rows that were collected had."""
_PATIENCE = timedelta(days=7)  # while one process collects activations, the others wait


@dataclass(frozen=True)
class Preset:
    """A whole training run by name.

    Attributes:
        model: As MODEL on the command line.
        place: (site, layer).
        texts: Paragraphs of `corpus.wikipedia`; what comes after them is never trained on.
        config: Of the training.
    """

    model: str
    place: tuple[str, int]
    texts: int
    config: TrainConfig


PRESETS = {
    "smollm2": Preset(
        "demo",
        ("resid_post", 7),
        15_500,
        TrainConfig(features=8192, k=32, tokens=2_500_000, batch=1024, lr=1.5e-3, warmup=0.032),
    )
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast sae train` to a parser."""
    shared.model_arguments(parser)
    model = next(action for action in parser._actions if action.dest == "model")
    model.nargs, model.required = "?", False  # a preset names it
    parser.add_argument("--preset", choices=tuple(PRESETS), help="a whole run: model, place, texts and numbers")
    parser.add_argument(
        "--out", type=shared.out_folder, required=True, metavar="DIR", help="of the SAE and its checkpoints"
    )
    shared.corpus_arguments(parser, "--text", "what the model reads")
    rows = "train on what was collected instead, by `collect`, an engine, or as Parquet or Arrow; of a transcoder two"
    parser.add_argument("--rows", nargs="+", metavar="PATH", help=rows)
    parser.add_argument("--column", metavar="NAME", help="of --rows in a table: which column")
    several = (
        "0-based, negative from the end; several: an SAE for each, on one forward, none of them stored; of --rows by vLLM: "
        "which of the extracted ones"
    )
    parser.add_argument("--layer", type=int, nargs="+", metavar="N", help=several)
    parser.add_argument("--site", choices=SITES, help=f"where in the layer (default: {SITES[1]})")
    parser.add_argument("--kind", default="topk", choices=tuple(_KINDS), help="default: %(default)s")
    reads = "where in the layer a transcoder reads (default: %(default)s); it writes --site"
    parser.add_argument("--reads", default=SITES[0], choices=SITES, help=reads)
    parser.add_argument("--cache", type=shared.out_folder, metavar="DIR", help="activations (default: DIR/activations)")
    parser.add_argument(
        "--context", type=shared.positive, default=256, metavar="N", help="tokens of a context (default: 256)"
    )
    kinds = {field.name: float if field.name == "lr" else int for field in fields(TrainConfig)}
    meanings = {
        "features": "F", "k": "features per token", "tokens": "rows seen in all", "batch": "rows of a step",
        "lr": "learning rate", "k_start": "features per token at the beginning", "seed": "of weights and order",
    }  # fmt: skip
    for name, meaning in meanings.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kinds[name], metavar="X", help=meaning)
    parser.add_argument("--checkpoint-every", type=shared.positive, default=50, metavar="N", help="steps (default: 50)")
    shards = "of torchrun's processes, how many hold the features together (default: those of a node)"
    parser.add_argument("--feature-shards", type=shared.positive, metavar="N", help=shards)
    stored = "of the weights in the file (default: %(default)s)"
    parser.add_argument("--store", default="bfloat16", choices=("bfloat16", "float32"), help=stored)


def run(args: argparse.Namespace) -> int:
    """Run `steerfast sae train`; returns the exit code."""
    preset = PRESETS.get(args.preset)
    if args.kind != "transcoder":
        shared.refuse(args, f"of --kind {args.kind}, which reads where it writes", "reads")
    if args.rows is not None:
        return _run_on_rows(args)
    shared.refuse(args, "without --rows", "column")
    if preset is not None:
        shared.refuse(args, "beside --preset", "layer", "site")
    if preset is None and (args.model is None or args.layer is None or args.text is None):
        raise ValueError("sae train: give --preset, or MODEL with --layer and --text, or --rows")
    args.model = args.model or (preset.model if preset else None)
    places = [preset.place] if preset else [(args.site or SITES[1], layer) for layer in args.layer]
    if len(places) > 1:
        shared.refuse(args, "beside several layers, of which nothing is stored", "cache")
    config = _config(args, preset.config if preset else TrainConfig())
    if isinstance(config.objective, Transcode) and (len(places) > 1 or args.reads == places[0][0]):
        raise ValueError(
            f"sae train: a transcoder reads {args.reads} and writes {places[0][0]} of one layer; give one --layer, and two "
            "sites: --reads and --site"
        )
    if args.text is None:
        shared.refuse(args, "without --text", "key", "title")
    texts = _texts(args, preset)
    with _split(args) as split:
        said: Callable[[str], None] = shared.progress if split.rank == 0 else _silent
        saes = _trained(args, config, places, texts, split, said)
        if split.rank == 0:
            _save(args, saes)
        split.wait()  # torchrun ends all when one has ended
    return 0


def _texts(args: argparse.Namespace, preset: Preset | None) -> list[str]:
    """Those of the command line, or else of the preset."""
    if args.text is None and preset is not None:
        return wikipedia(shared.progress)[: preset.texts]
    return list(read_documents(args.text, key=args.key, title=args.title))


def _run_on_rows(args: argparse.Namespace) -> int:
    """Train on what was collected, by whatever; every process opens it."""
    shared.refuse(args, "beside --rows", *_OF_A_MODEL)
    if args.layer is not None and len(args.layer) > 1:
        raise ValueError(f"sae train: --rows with the layers {args.layer}; choose one")
    config = _config(args, TrainConfig())
    wishes = {"column": args.column, "layer": None if args.layer is None else args.layer[0]}
    chosen = {name: value for name, value in wishes.items() if value is not None}
    sources: list[Any] = [open_rows(path, **chosen) for path in args.rows]
    with _split(args) as split:
        said: Callable[[str], None] = shared.progress if split.rank == 0 else _silent
        said(f"{sum(sources[0].counts)} activations in {len(sources[0].counts)} shards of {args.rows[0]}")
        source: Any = sources[0] if len(sources) == 1 else tuple(sources)
        sae = train_sae(source, config, args.out / "checkpoints", **_options(args, split, said))
        if split.rank == 0:
            _save(args, {args.out: sae})
        split.wait()
    return 0


def _config(args: argparse.Namespace, config: TrainConfig) -> TrainConfig:
    """A configuration with what the command line changes."""
    given = {name: value for name in _CHOICES if (value := getattr(args, name)) is not None}
    return replace(config, **given, objective=_KINDS[args.kind])


def _options(args: argparse.Namespace, split: Alone, said: Callable[[str], None]) -> dict[str, Any]:
    return {
        "split": split, "checkpoint_every": args.checkpoint_every, "device": args.device,
        "progress": lambda report: said(str(report)),
    }  # fmt: skip


def _trained(
    args: argparse.Namespace,
    config: TrainConfig,
    places: list[tuple[str, int]],
    texts: list[str],
    split: Alone,
    said: Callable[[str], None],
) -> dict[Path, SAE]:
    """The SAEs by the folder that they belong to."""
    local_ends(config, split)  # what does not divide is refused before a collection of hours
    model, tokenizer = shared.load(args)
    options = _options(args, split, said)
    if len(places) > 1:
        stream = PlacesStream(model, tokenizer, texts, places, context=args.context)
        saes = train_saes(stream, [config] * len(places), args.out / "checkpoints", **options)
        names = [f"{origin.place.site}-{origin.place.layer}" for origin in stream.origins if origin.place]
        return {args.out / name: sae for name, sae in zip(names, saes, strict=True)}
    (place,), folder = places, args.cache or args.out / "activations"
    wanted = {folder: place}
    if isinstance(config.objective, Transcode):
        wanted = {folder.with_name(f"{folder.name}-{args.reads}"): (args.reads, place[1])} | wanted
    for where, one in wanted.items():
        if split.rank == 0:  # once for all
            found = cache_activations(model, tokenizer, texts, one, where, context=args.context, progress=said)
            shared.say(f"{len(found)} activations of width {found.info.d} in {where}")
    split.wait()
    del model  # its memory is better used for the rows
    caches = [ActivationCache.open(where) for where in wanted]
    source: Any = caches[0] if len(caches) == 1 else tuple(caches)
    return {args.out: train_sae(source, config, args.out / "checkpoints", **options)}


def _save(args: argparse.Namespace, saes: dict[Path, SAE]) -> None:
    for folder, sae in saes.items():
        stored = sae.to(dtype=getattr(torch, args.store))
        shared.say(f"{sae!r}\n\nSAE         {stored.save(folder)}")
    if args.kind != "transcoder" and args.model is not None:
        shared.say(f"Next        steerfast sae eval {next(iter(saes))} {args.model} --text FILE")


@contextmanager
def _split(args: argparse.Namespace) -> Iterator[Alone]:
    """The processes of torchrun, features within a node and replicas across; or one process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if args.feature_shards not in (None, 1):
            raise ValueError(
                f"sae train: --feature-shards {args.feature_shards} in one process; start it with torchrun "
                f"--nproc-per-node {args.feature_shards} -m steerfast sae train …"
            )
        yield Alone()
        return
    cuda = torch.cuda.is_available() and args.device != "cpu"
    if cuda:
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield mesh_of(args.feature_shards or int(os.environ["LOCAL_WORLD_SIZE"]), "cuda" if cuda else "cpu")
    finally:
        dist.destroy_process_group()


def _silent(line: str) -> None:
    """What all processes but the first say."""
