"""The command `steerfast`: demo, extract, generate, check, sweep, plan, sae and bench.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 a check failed, 2 the input does not work
(one line says why; `--debug` shows the traceback), 130 interrupted. Anything heavy is imported by the command that
needs it.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .check import Finding
    from .plan import Plan

METHODS = ("mean_difference", "difference", "pca", "logistic")
SITES = ("resid_post", "resid_pre", "attn_out", "mlp_out", "head_out")
POSITIONS = ("all", "prompt", "generated", "last")
COLUMNS = 100
"""A terminal this wide shows two texts side by side."""
GAP = "  │  "


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
    args = _parser(argv).parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console without "α" prints "?" rather than nothing
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _note(f"steerfast {args.command}: {_one_line(message)}")
        try:
            return int(args.run(args))
        except KeyboardInterrupt:
            _note("interrupted")
            return 130
        except (ValueError, TypeError, RuntimeError, OSError, ImportError) as error:
            if args.debug:
                traceback.print_exc()
            else:
                _note(f"steerfast {args.command}: {_one_line(error)}")
            return 2


def _demo(args: argparse.Namespace) -> int:
    from .demo import run

    run(args.out, say=_say, progress=_progress, tokens=args.tokens, width=_width())
    return 0


def _extract(args: argparse.Namespace) -> int:
    positive, negative = _texts("--positive", args.positive), _texts("--negative", args.negative)
    position = _position(args.position)
    model, tokenizer = _load(args)
    from . import extract
    from .extract import collect
    from .interventions import Add
    from .layers import find_layers
    from .plan import Plan

    layers = _layers(args.layers, find_layers(model, "extract").count)
    sides = [
        collect(model, tokenizer, texts, layers, position, args.site, progress=sys.stderr.isatty())
        for texts in (positive, negative)
    ]
    found = getattr(extract, args.method)(*sides, normalize=args.normalize)
    directions = found if isinstance(found, dict) else {found.layer: found}
    edits: dict[int | tuple[str, int], Any] = {
        (args.site, layer): Add(d, strength=args.strength) for layer, d in directions.items()
    }
    saved = Plan(edits, positions=args.steer, model=model).save(args.out)
    _say(
        f"{args.method}: {len(positive)} positive and {len(negative)} negative texts, {args.site}, position {position}"
    )
    _say(f"\n{'layer':>7} {'norm':>10} {'typical activation':>20}")
    for layer, direction in directions.items():
        _say(f"{layer:>7} {direction.norm:>10.4g} {direction.activation_norm:>20.4g}")
    _say(f"\nPlan        {saved} (strength {args.strength:g}{', unit vectors' if args.normalize else ''})")
    _say(f'Next        steerfast generate {args.model} "Your prompt" --plan {saved}')
    return 0


def _generate(args: argparse.Namespace) -> int:
    from .plan import Plan

    plan = Plan.load(args.plan)
    model, tokenizer = _load(args)
    prompt = args.prompt
    if args.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("--chat: this tokenizer has no chat template; leave --chat away")
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt, return_tensors="pt", add_special_tokens=not args.chat).to(model.device)
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}  # a tokenizer may return more
    if inputs["input_ids"].shape[1] == 0:
        raise ValueError("the prompt has no tokens; give it content")
    _say(f"{args.prompt}\n")
    if sys.stdout.isatty() and shutil.get_terminal_size().columns >= COLUMNS:
        _beside(model, tokenizer, inputs, plan, args)
    else:
        _in_turn(model, tokenizer, inputs, plan, args)
    return 0


def _check(args: argparse.Namespace) -> int:
    from .plan import Plan

    plan = None if args.plan is None else Plan.load(args.plan)
    if args.engine == "vllm":
        from .integrations.vllm.proof import prove

        return _report(prove(_folder(args.model), plan, args.dtype), "this engine")
    model, tokenizer = _load(args)
    from ._backends import backend_of
    from .check import check
    from .layers import find_layers

    layers = find_layers(model, "check")
    first = next(model.parameters())
    _say(f"{layers.name}: {layers.count} layers of width {layers.d} at {layers.path}")
    _say(f"{_short(first.dtype)} on {first.device}, backend {backend_of(first)}\n")
    return _report(check(model, tokenizer, plan), "this model")


def _report(findings: Iterable[Finding], where: str) -> int:
    failed = 0
    for finding in findings:
        failed += finding.outcome == "failed"
        _say(f"  {finding.outcome:<8} {finding.name}")
        _say(textwrap.fill(finding.detail, _width(), initial_indent=" " * 11, subsequent_indent=" " * 11))
    _say(f"\n{failed} failed" if failed else f"\nSteering works on {where}.")
    return 1 if failed else 0


# --- the two texts of `generate` --------------------------------------------------------------------------------------


class _Stream:
    """A streamer for `generate`: collects the new tokens of every batch row and hands on the texts after each step."""

    def __init__(self, tokenizer: Any, ends: set[int], show: Callable[[list[str]], None]) -> None:
        self.tokenizer, self.ends, self.show = tokenizer, ends, show
        self.rows: list[list[int]] = []
        self.open: list[bool] = []
        self.started = time.perf_counter()

    def put(self, value: Any) -> None:
        """Take the prompt, at the first call, and one token per row at every later one."""
        if not self.rows:
            batch = 1 if value.dim() == 1 else value.shape[0]
            self.rows, self.open = [[] for _ in range(batch)], [True] * batch
            return
        for i, token in enumerate(value.flatten().tolist()):
            if self.open[i]:
                self.rows[i].append(token)
                self.open[i] = token not in self.ends
        self.show(self.texts())

    def end(self) -> None:
        """Nothing is left to do when the last token is out."""

    def texts(self) -> list[str]:
        """The text of each row, without the first bytes of an unfinished character."""
        return [t.rstrip("\ufffd") for t in self.tokenizer.batch_decode(self.rows, skip_special_tokens=True)]

    def rate(self) -> str:
        """How many tokens came, and how fast."""
        count = sum(map(len, self.rows))
        return f"{count} tokens, {count / (time.perf_counter() - self.started):.1f} tokens/s"


def _beside(model: Any, tokenizer: Any, inputs: Any, plan: Plan, args: argparse.Namespace) -> None:
    """Both texts at once: a batch of two rows of which one is steered, in two columns."""
    from .hooks import steer

    columns = _Columns(_say_raw, *shutil.get_terminal_size())
    columns.head("unsteered", "steered")
    two = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    stream = _Stream(tokenizer, _ends(model), columns.show)
    with steer(model, [None, plan], strength=[1.0, args.strength]):
        _run(model, two, stream, args)
    _say(f"\n{stream.rate()}, both together")


def _in_turn(model: Any, tokenizer: Any, inputs: Any, plan: Plan, args: argparse.Namespace) -> None:
    """One text after the other, each as it comes."""
    from .hooks import steer

    for title in ("unsteered", "steered"):
        shown = 0

        def show(texts: list[str]) -> None:
            nonlocal shown
            _say_raw(texts[0][shown:])
            shown = max(shown, len(texts[0]))

        _say(f"[{title}]")
        stream = _Stream(tokenizer, _ends(model), show)
        with ExitStack() as stack:
            if title == "steered":
                stack.enter_context(steer(model, plan, strength=args.strength))
            _run(model, inputs, stream, args)
        _say(f"\n({stream.rate()})\n")


def _run(model: Any, inputs: Any, stream: _Stream, args: argparse.Namespace) -> None:
    import torch

    options: dict[str, Any] = {"max_new_tokens": args.tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options["temperature"] = args.temperature
    if model.generation_config.pad_token_id is None:
        options["pad_token_id"] = min(_ends(model), default=0)
    torch.manual_seed(args.seed)
    stream.started = time.perf_counter()
    model.generate(**inputs, **options, streamer=stream)


def _ends(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, (list, tuple)) else set() if found is None else {found}


class _Columns:
    """Two growing texts side by side. Only lines that can still change are drawn again."""

    def __init__(self, write: Callable[[str], None], columns: int, rows: int) -> None:
        self.write = write
        self.width = (columns - len(GAP)) // 2
        self.rows = max(2, rows - 2)
        self.lines: list[list[str]] = [[], []]
        self.drawn = 0

    def head(self, left: str, right: str) -> None:
        """The titles of the columns."""
        self.write(f"{left:<{self.width}}{GAP}{right}\n{'─' * self.width}──┼──{'─' * self.width}\n")

    def show(self, texts: list[str]) -> None:
        """Bring the columns up to these texts, each of which continues the one before."""
        old = [len(lines) for lines in self.lines]
        self.lines = [_wrapped(text, self.width) for text in texts]
        height = max(map(len, self.lines))
        first = min(max(0, min(*old, *map(len, self.lines)) - 1), self.drawn)
        first = max(first, self.drawn - self.rows)  # what has scrolled away cannot be drawn again
        if self.drawn > first:
            self.write(f"\x1b[{self.drawn - first}A")
        for i in range(first, max(height, self.drawn)):
            left, right = (lines[i] if i < len(lines) else "" for lines in self.lines)
            self.write(f"\r\x1b[K{left:<{self.width}}{GAP}{right}\n")
        self.drawn = max(height, self.drawn)


def _wrapped(text: str, width: int) -> list[str]:
    """Lines of a text, its own line breaks kept."""
    return [line for part in text.split("\n") for line in (textwrap.wrap(part, width) or [""])]


# --- arguments --------------------------------------------------------------------------------------------------------


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model, in eval mode and on its device, and its tokenizer."""
    import torch

    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Any = "auto" if args.dtype == "auto" else getattr(torch, args.dtype)
    if args.model == "demo":
        from . import demo_model

        model, tokenizer = demo_model.load(dtype=torch.float32 if dtype == "auto" else dtype, progress=_progress)
        return model.to(args.device), tokenizer
    looks_local = args.model.startswith((".", "/", "~")) or args.model.count("/") > 1
    folder = Path(args.model).expanduser()
    if looks_local and not folder.is_dir():
        raise FileNotFoundError(f"MODEL: {args.model} is not a directory; give a saved model, a hub name, or demo")
    _progress(f"loading {args.model}")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    name = folder if folder.is_dir() else args.model
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    return model.eval().to(args.device), AutoTokenizer.from_pretrained(name)


def _folder(model: str) -> str:
    """What an engine that loads models itself can open."""
    if model != "demo":
        return str(Path(model).expanduser()) if Path(model).expanduser().is_dir() else model
    from . import demo_model

    return str(demo_model.path(progress=_progress))


def _texts(option: str, values: Iterable[str]) -> list[str]:
    """Texts as given; @file stands for the lines of a file that are not empty."""
    texts: list[str] = []
    for value in values:
        if value.startswith("@"):
            file = Path(value[1:]).expanduser()
            if not file.is_file():
                raise FileNotFoundError(f"{option}: {file} does not exist; after @ comes a file of texts, one a line")
            texts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        else:
            texts.append(value)
    if not texts:
        raise ValueError(f"{option}: no texts in {' '.join(values)}; give at least one")
    return texts


def _layers(spec: str, count: int) -> list[int]:
    """Layers of "8", "-1", "6,8", "6-12", "all" or "middle"."""
    if spec == "middle":
        return [count // 2]
    if spec == "all":
        return list(range(count))
    found: list[int] = []
    for part in spec.split(","):
        first, dash, last = part.strip().rpartition("-")
        try:
            found += range(int(first), int(last) + 1) if dash and first else [int(part)]
        except ValueError:
            raise ValueError(f"--layers: cannot read {spec!r}; write 8, -1, 6,8, 6-12, all or middle") from None
    if not found:
        raise ValueError(f"--layers: {spec!r} names no layer; the first comes before the last")
    return found


def _position(value: str) -> str | int:
    if value in ("last", "mean", "all"):
        return value
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"--position: got {value!r}; expected last, mean, all or a token's index") from None


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
    _demo_parser(commands)
    _extract_parser(commands)
    _generate_parser(commands)
    _check_parser(commands)
    _later(commands, argv, "sweep", "sweeping", "try layers and strengths, effect against perplexity")
    _later(commands, argv, "fit-ode", "fit_ode", "fit a barrier and save a plan that flows along it")
    _later(commands, argv, "plan", "plan_tools", "look at a file of steering, or convert it")
    _later(commands, argv, "sae", "sae.cli", "train, measure, explain and use a sparse autoencoder")
    _later(commands, argv, "bench", "bench", "time every op on this machine, against its own peak")
    return parser


def _later(commands: Any, argv: Sequence[str], name: str, module: str, text: str) -> None:
    """A command whose module is heavy to import: it is imported when the command is called."""
    if name not in argv:
        commands.add_parser(name, help=text)
        return
    tool = import_module(f".{module}", __package__)
    tool.add_arguments(_command(commands, name, tool.run, tool.DESCRIPTION, tool.EXAMPLE))


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str, example: str) -> Any:
    parser = commands.add_parser(
        name,
        help=text.partition(".")[0][0].lower() + text.partition(".")[0][1:],
        description=textwrap.fill(text, 100),
        epilog=f"example:\n{textwrap.indent(example, '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _model_arguments(parser: Any) -> None:
    parser.add_argument("model", metavar="MODEL", help="directory of a saved model, name on the hub, or demo")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda if there is one)")
    dtypes = ("auto", "float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="auto", choices=dtypes, help="of the weights (default: as they were saved)")


def _demo_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        _demo,
        "Steer a real model with every method. Fetches SmolLM2-135M-Instruct once (93 MB), makes vectors from prompts, "
        "prints steered texts beside unsteered ones, and writes plans that the other commands read.",
        "steerfast demo --out steerfast-demo\n"
        'steerfast generate demo "My neighbour said" --plan steerfast-demo/plans/flow',
    )
    default = Path("steerfast-demo")
    out = "directory of the results (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=out)
    parser.add_argument("--tokens", type=_positive, default=20, help="new tokens per text (default: %(default)s)")


def _extract_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "extract",
        _extract,
        "Make a steering vector from two sides of texts. Runs the model on both, takes a direction per layer, and "
        "saves a plan that adds it there.",
        'steerfast extract demo --positive "I love you" --negative "I hate you" \\\n'
        "    --layers 8 --strength 2 --out love\n"
        "steerfast extract path/to/model --positive @kind.txt --negative @rude.txt \\\n"
        "    --layers 10-14 --normalize --strength 6 --out kind",
    )
    _model_arguments(parser)
    for side, meaning in (("positive", "with the property"), ("negative", "without it")):
        text = f"texts {meaning}; @FILE: one per line"
        parser.add_argument(f"--{side}", nargs="+", action="extend", required=True, metavar="TEXT", help=text)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the plan")
    layers = "8, -1 (the last), 6,8, 6-12, all or middle (default: %(default)s)"
    parser.add_argument("--layers", "--layer", default="middle", metavar="SPEC", help=layers)
    parser.add_argument("--method", default=METHODS[0], choices=METHODS, help="(default: %(default)s)")
    position = "token that is read: last, mean, all, or an index (default: %(default)s)"
    parser.add_argument("--position", default="last", metavar="TOKEN", help=position)
    parser.add_argument("--site", default=SITES[0], choices=SITES, help="where in the layer (default: %(default)s)")
    parser.add_argument("--normalize", action="store_true", help="scale every direction to length 1")
    parser.add_argument("--strength", type=float, default=1.0, metavar="C", help="c in x + c·v (default: %(default)s)")
    steered = "tokens that the plan steers (default: %(default)s)"
    parser.add_argument("--steer", default="all", choices=POSITIONS, help=steered)


def _generate_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        _generate,
        "Stream a steered text beside the unsteered one. In two columns on a wide terminal, both from one batch of "
        "which one row is steered; one after the other otherwise.",
        'steerfast generate demo "I hate you because" --plan love\n'
        'steerfast generate demo "Who are you?" --chat --plan love --strength 0.5 --temperature 0.8',
    )
    _model_arguments(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="what the text begins with")
    parser.add_argument("--plan", required=True, metavar="DIR", help="what extract, demo or Plan.save has written")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="multiplies every edit (default: 1)")
    parser.add_argument("--tokens", type=_positive, default=60, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")


def _check_parser(commands: Any) -> None:
    parser = _command(
        commands,
        "check",
        _check,
        "Prove on your own model that steering works. With ordinary hooks: a prompt's tokens and a cached new token "
        "move by the vector, batch-mates and padding keep their bits, the sites add up, and removal restores the "
        "logits bit for bit. Exit code 1 if something fails.",
        "steerfast check path/to/model --dtype bfloat16\nsteerfast check demo --plan love",
    )
    _model_arguments(parser)
    parser.add_argument("--plan", metavar="DIR", help="a plan that must fit the model and change its logits")
    parser.add_argument(
        "--engine", choices=["transformers", "vllm"], default="transformers", help="what is to run the model"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a temperature; 0 or more")
    return value


# --- the console ------------------------------------------------------------------------------------------------------


def _width() -> int:
    return max(40, min(shutil.get_terminal_size().columns, COLUMNS))


def _say(line: str) -> None:
    print(line, flush=True)


def _say_raw(text: str) -> None:
    print(text, end="", flush=True)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _progress(line: str) -> None:
    print(f"… {line}", file=sys.stderr, flush=True)


def _one_line(message: object) -> str:
    return " ".join(str(message).split()) or type(message).__name__


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
