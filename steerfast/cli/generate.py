"""`steerfast generate`: a steered text beside the unsteered one, as they come."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from . import shared

if TYPE_CHECKING:
    from steerfast.plan import Plan
DESCRIPTION = (
    "Stream a steered text beside the unsteered one. In two columns on a wide terminal, both from one batch of "
    "which one row is steered; one after the other otherwise."
)
EXAMPLE = (
    'steerfast generate demo "I hate you because" --plan love\n'
    'steerfast generate demo "Who are you?" --chat --plan love --strength 0.5 --temperature 0.8'
)


GAP = "  │  "


def run(args: argparse.Namespace) -> int:
    """Run `steerfast generate`; returns the exit code."""
    from steerfast._checks import seed_number
    from steerfast.models.texts import TextReader
    from steerfast.plan import Plan

    seed_number("--seed", args.seed)
    plan = Plan.load(args.plan, args.saes)
    model, tokenizer = shared.load(args)
    prompt = args.prompt
    if args.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError("--chat: this tokenizer has no chat template; leave --chat away")
        chat = [{"role": "user", "content": prompt}]
        prompt = TextReader.of(tokenizer, "--chat").chat(chat, "the prompt")
    inputs = shared.prompt(tokenizer, prompt, model, chat=args.chat)
    shared.say(f"{args.prompt}\n")
    if sys.stdout.isatty() and shutil.get_terminal_size().columns >= shared.COLUMNS:
        _beside(model, tokenizer, inputs, plan, args)
    else:
        _in_turn(model, tokenizer, inputs, plan, args)
    return 0


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
    from steerfast.hooks.steer import steer

    columns = _Columns(shared.say_raw, *shutil.get_terminal_size())
    columns.head("unsteered", "steered")
    two = {name: tensor.repeat(2, 1) for name, tensor in inputs.items()}
    stream = _Stream(tokenizer, _ends(model), columns.show)
    with steer(model, [None, plan], strength=[1.0, args.strength]):
        _run(model, two, stream, args)
    shared.say(f"\n{stream.rate()}, both together")


def _in_turn(model: Any, tokenizer: Any, inputs: Any, plan: Plan, args: argparse.Namespace) -> None:
    """One text after the other, each as it comes."""
    from steerfast.hooks.steer import steer

    for title in ("unsteered", "steered"):
        shown = 0

        def show(texts: list[str]) -> None:
            nonlocal shown
            shared.say_raw(texts[0][shown:])
            shown = max(shown, len(texts[0]))

        shared.say(f"[{title}]")
        stream = _Stream(tokenizer, _ends(model), show)
        with ExitStack() as stack:
            if title == "steered":
                stack.enter_context(steer(model, plan, strength=args.strength))
            _run(model, inputs, stream, args)
        shared.say(f"\n({stream.rate()})\n")


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast generate` to a parser."""
    shared.model_arguments(parser)
    parser.add_argument("prompt", metavar="PROMPT", help="what the text begins with")
    parser.add_argument("--plan", required=True, metavar="DIR", help="what extract, demo or Plan.save has written")
    shared.saes_argument(parser)
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="multiplies every edit (default: 1)")
    parser.add_argument("--tokens", type=shared.positive, default=60, help="new tokens at most (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=shared.temperature, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the model's chat template")
