"""What the commands share: their arguments, models, texts, and the console."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from steerfast.files.replace import no_file, no_folder
from steerfast.files.text import lines_of

METHODS = ("mean_difference", "difference", "pca", "logistic")
SITES = ("resid_post", "resid_pre", "attn_out", "mlp_out", "head_out")
COLUMNS = 100
"""A terminal this wide shows two texts side by side."""


# --- arguments --------------------------------------------------------------------------------------------------------


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, in eval mode and on its device, and its tokenizer."""
    import torch

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.model == "demo":
        from steerfast.models import demo as demo_model

        model, tokenizer = demo_model.load(dtype=torch.float32 if dtype == "auto" else dtype, progress=progress)
        return model.to(args.device), tokenizer
    looks_local = args.model.startswith((".", "/", "~")) or args.model.count("/") > 1
    folder = Path(args.model).expanduser()
    if looks_local and not folder.is_dir():
        raise FileNotFoundError(f"MODEL: {args.model} is not a directory; give a saved model, a hub name, or demo")
    progress(f"loading {args.model}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    name = folder if folder.is_dir() else args.model
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.eval().to(args.device), AutoTokenizer.from_pretrained(name)


def prompt(tokenizer: Any, text: str, model: Any, *, chat: bool = False) -> dict[str, Any]:
    """What `generate` takes, for one text that goes on; a chat's text has its special tokens already.

    Raises:
        ValueError: it has no tokens.
    """
    import torch

    from steerfast.models.layers import home
    from steerfast.models.texts import TextReader

    reader = TextReader.of(tokenizer, "prompt")
    ids = torch.tensor([reader.bare(text) if chat else reader.beginning(text)], dtype=torch.long, device=home(model))
    if ids.shape[1] == 0:
        raise ValueError("the prompt has no tokens; give it content")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def selector(text: str) -> str:
    """Positions of a plan, as an argument."""
    from steerfast._positions import parse

    try:
        return str(parse("this", text))
    except ValueError as reason:
        raise argparse.ArgumentTypeError(str(reason)) from None


def special(tokenizer: Any, positions: str) -> Any:
    """What a plan with these positions is given to know special tokens by."""
    return tokenizer if "special" in positions else None


def folder(model: str) -> str:
    """What an engine that loads models itself can open."""
    if model != "demo":
        return str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
    from steerfast.models import demo as demo_model

    return str(demo_model.path(progress=progress))


def texts(option: str, values: Iterable[str]) -> list[str]:
    """Texts as given; @file stands for the lines of a file as they are, without those of white space alone."""
    texts: list[str] = []
    for value in values:
        if value.startswith("@"):
            lines = lines_of(option, value[1:], "after @ comes a file of texts, one a line")
            texts += [line for line in lines if line.strip()]
        else:
            texts.append(value)
    if not texts:
        raise ValueError(f"{option}: no texts in {' '.join(values)}; give at least one")
    return texts


def sae(path: Path) -> Any:
    """The SAE of a folder or file."""
    from steerfast.sae.model import SAE

    return SAE.load(path)


def layers(spec: str, blocks: Any, option: str = "--layers") -> list[int]:
    """0-based layers of "8", "-1", "6,8", "6-12", "all" or "middle", of what `find_layers` gives."""
    if spec == "middle":
        return [blocks.count // 2]
    if spec == "all":
        return list(range(blocks.count))
    found: list[int] = []
    for part in spec.split(","):
        first, dash, last = part.strip().rpartition("-")
        try:
            found += range(int(first), int(last) + 1) if dash and first else [int(part)]
        except ValueError:
            raise ValueError(f"{option}: cannot read {spec!r}; write 8, -1, 6,8, 6-12, all or middle") from None
    if not found:
        raise ValueError(f"{option}: {spec!r} names no layer; the first comes before the last")
    return [blocks.resolve(layer, option) for layer in found]


def position(value: str) -> str | int:
    """A token's index, or the name of a rule."""
    if value in ("last", "mean", "all"):
        return value
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"--position: got {value!r}; expected last, mean, all or a token's index") from None


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str) -> Any:
    """Add a command to the parser of all; returns its own parser."""
    parser = commands.add_parser(
        name,
        help=text.partition(".")[0][0].lower() + text.partition(".")[0][1:],
        description=textwrap.fill(text, 100),
        epilog=f"example:\n{textwrap.indent(example, '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, usual=parser.get_default)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def refuse(args: argparse.Namespace, where: str, *names: str) -> None:
    """Refuse options that would not be looked at in this run, where they differ from what they are by default.

    Args:
        args: The arguments of a parser with `usual`, its `get_default`.
        where: In which run.
        names: Of the options; of an argument without a flag in capitals.

    Raises:
        ValueError: which ones.
    """
    if given := [name for name in names if getattr(args, name.lower()) != args.usual(name.lower())]:
        flags = ", ".join(name if name.isupper() else f"--{name.replace('_', '-')}" for name in given)
        action = f"{args.command} {args.action}: " if hasattr(args, "action") else ""
        raise ValueError(f"{action}{flags} would say nothing {where}; leave it out")


def model_arguments(parser: Any) -> None:
    """Add the arguments by which a command finds its model."""
    parser.add_argument("model", metavar="MODEL", help="directory of a saved model, name on the hub, or demo")
    device_arguments(parser)


def corpus_arguments(parser: Any, option: str, says: str, required: bool = False) -> None:
    """Add the argument that names texts, and those that say how they are read."""
    paths = f"text, .jsonl or .parquet, or a folder: {says}"
    parser.add_argument(option, type=Path, required=required, metavar="PATH", help=paths)
    parser.add_argument("--key", default="text", help="where .jsonl and .parquet keep the text (default: %(default)s)")
    titles = "for text: the first line of a document (default: empty lines separate documents)"
    parser.add_argument("--title", metavar="REGEX", help=titles)


def device_arguments(parser: Any) -> None:
    """Add the arguments that say where a command's model is and in which dtype."""
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights (default: as they were saved)")


def saes_argument(parser: Any) -> None:
    """Add the argument by which a command that reads a plan finds the SAEs that it names."""
    text = "SAE that the plan names, or folder of SAEs; may be repeated (default: STEERFAST_SAES)"
    parser.add_argument("--saes", action="append", metavar="PATH", help=text)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def out_folder(text: str) -> Path:
    """A folder that a command writes into, as an argument."""
    return _out(Path(text), no_folder(Path(text)))


def out_file(text: str) -> Path:
    """A file that a command writes, as an argument."""
    return _out(Path(text), no_file(Path(text)))


def out_new(text: str) -> Path:
    """A folder or file that a command makes, as an argument."""
    exists = f"{text} exists; choose another name, or remove it" if os.path.exists(text) else None
    return _out(Path(text), exists or no_folder(Path(text).parent))


def _out(path: Path, refused: str | None) -> Path:
    if refused is not None:
        raise argparse.ArgumentTypeError(refused)
    return path


PART = "do part I of N, I from 1; the parts may run at the same time, on several machines (default: all)"
"""What an argument for a part says."""


def part(text: str) -> tuple[int, int]:
    """Part i of n, written i/n."""
    i, slash, n = text.partition("/")
    if not slash or not i.isdecimal() or not n.isdecimal() or not 1 <= int(i) <= int(n):
        raise argparse.ArgumentTypeError(f"{text!r} is no part; write I/N with I from 1 to N, such as 2/4")
    return int(i), int(n)


def temperature(text: str) -> float:
    """A temperature, 0 or more."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a temperature; 0 or more")
    return value


# --- the console ------------------------------------------------------------------------------------------------------


def width() -> int:
    """Columns of the terminal, within bounds that read well."""
    return max(40, min(shutil.get_terminal_size().columns, COLUMNS))


def say(line: str) -> None:
    """Print a line of the result."""
    print(line, flush=True)


def say_raw(text: str) -> None:
    """Print a part of the result, without a line break."""
    print(text, end="", flush=True)


def say_earlier(what: str, path: Path, also: str = "") -> None:
    """Say that something stands in a folder of results that this run has not made, if it does."""
    if path.exists():
        say(f"{what:<12}{path} is of an earlier run: remove it{also}")


def note(line: str) -> None:
    """Print a line to stderr."""
    print(line, file=sys.stderr, flush=True)


def progress(line: str) -> None:
    """Print what is going on to stderr."""
    print(f"… {line}", file=sys.stderr, flush=True)


def one_line(message: object) -> str:
    """A message on one line."""
    return " ".join(str(message).split()) or type(message).__name__


def short(dtype: object) -> str:
    """A dtype without its package."""
    return str(dtype).removeprefix("torch.")
