"""The demo: every method of the library on a real language model, with real weights and real tokens.

`demonstrate` steers SmolLM2-135M-Instruct with vectors made on the spot from a handful of prompts and writes what it did: each
plan as a directory that `steerfast.Plan.load` reads, and all texts and numbers as one JSON file.
"""

from __future__ import annotations

import argparse
import json
import platform
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.barriers.fit import fit_barrier
from steerfast.directions import extract
from steerfast.edits.features import Amplify, Calibrate
from steerfast.edits.flow import Flow
from steerfast.edits.linear import Ablate, Add
from steerfast.hooks.steer import steer
from steerfast.models import demo as demo_model
from steerfast.models.collect import Activations, collect
from steerfast.ops.backends import backend_of
from steerfast.plan import Plan

from . import shared

DESCRIPTION = (
    "Steer a real model with every method. Fetches SmolLM2-135M-Instruct once (93 MB), makes vectors from prompts, "
    "prints steered texts beside unsteered ones, and writes plans that the other commands read."
)
EXAMPLE = (
    'steerfast demo --out steerfast-demo\nsteerfast generate demo "My neighbour said" --plan steerfast-demo/plans/flow'
)


Say = Callable[[str], None]

LAYER_ADD, LAYER_FEATURES = 8, 10
BARRIER_C = 100.0
PROMPTS = ("I hate you because", "I think people are", "My boss is", "This movie was")
LOVE, HATE = ("I love you",), ("I hate you",)
KIND = (
    "I love spending time with my family.",
    "What a wonderful, kind thing to do!",
    "Thank you so much, this made me happy.",
    "The food was delicious and the staff were friendly.",
    "She smiled and hugged her best friend.",
    "I am proud of you and grateful for your help.",
    "It was the best day of my life.",
    "They are generous, warm and caring people.",
)
UNKIND = (
    "I hate spending time with my family.",
    "What a horrible, cruel thing to do!",
    "Go away, this made me furious.",
    "The food was disgusting and the staff were rude.",
    "She screamed and slapped her worst enemy.",
    "I am ashamed of you and sick of your excuses.",
    "It was the worst day of my life.",
    "They are selfish, cold and vicious people.",
)
SEA = (
    "The waves rolled over the deep blue sea.",
    "Whales and dolphins swim in the ocean.",
    "The ship sailed across the ocean.",
    "Fish live among the corals of the sea.",
)
LAND = (
    "The report was finished on Monday.",
    "Teachers and students sit in the classroom.",
    "The car drove along the street.",
    "People live among the houses of the town.",
)


@dataclass
class Demo:
    """One run: the model, where results go, and what has been done so far."""

    model: Any
    tokenizer: Any
    out: Path
    say: Say
    progress: Say
    tokens: int
    width: int
    results: dict[str, Any] = field(default_factory=dict)
    plain: list[str] = field(default_factory=list)

    def activations(self, texts: tuple[str, ...], layer: int, plan: Plan | None = None) -> Activations:
        """The stream after a layer at the last token of each text, steered by a plan."""
        with steer(self.model, plan) if plan is not None else nullcontext():
            return collect(self.model, self.tokenizer, texts, layers=layer, progress=False)

    def generate(self, plan: Plan | None) -> list[str]:
        """Greedy continuations of the prompts, in one left-padded batch."""
        inputs = self.tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="left")
        with steer(self.model, plan) if plan is not None else nullcontext():
            out = greedy(self.model, inputs, self.tokens, self.tokenizer.pad_token_id)
        start = inputs["input_ids"].shape[1]
        return list(self.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True))

    def table(self, texts: Sequence[str]) -> None:
        """Print one continuation per prompt."""
        longest = max(map(len, PROMPTS))
        for prompt, text in zip(PROMPTS, texts, strict=True):
            indent = " " * (longest + 6)
            shown = textwrap.wrap(" ".join(text.split()), max(20, self.width - len(indent))) or [""]
            self.say(f"  {prompt:>{longest}} …".ljust(len(indent)) + f"\n{indent}".join(shown))

    def show(self, key: str, title: str, plan: Plan, notes: list[str], numbers: dict[str, Any]) -> None:
        """Generate under a plan, print it beside the unsteered texts, and save the plan."""
        self.progress(f"{key}: {self.tokens} tokens for each of {len(PROMPTS)} prompts")
        steered = self.generate(plan)
        directory = plan.save(self.out / "plans" / key)
        self.say(f"\n{title}")
        for note in notes:
            self.say(textwrap.fill(note, self.width, initial_indent="  ", subsequent_indent="  "))
        self.say("")
        texts = [
            {"prompt": prompt, "unsteered": before, "steered": after}
            for prompt, before, after in zip(PROMPTS, self.plain, steered, strict=True)
        ]
        self.table(steered)
        self.results[key] = {"plan": directory.relative_to(self.out).as_posix(), "numbers": numbers, "texts": texts}


def demonstrate(out: Path, say: Say, progress: Say, tokens: int = 20, width: int = 88) -> dict[str, Any]:
    """Run the whole demo.

    Args:
        out: Directory for the plans and for results.json; made if it does not exist.
        say: Takes each line of the report.
        progress: Takes a line before each step that takes seconds.
        tokens: New tokens per continuation.
        width: Columns of the report.

    Returns:
        What results.json holds.

    Raises:
        RuntimeError: the model cannot be fetched; the message says how to fetch it by hand.
        OSError: the directory cannot be written.
    """
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = demo_model.load(progress=progress)
    demo = Demo(model, tokenizer, out, say, progress, tokens, width)
    shape = f"{model.config.num_hidden_layers} layers of width {model.config.hidden_size}"
    say(
        f"SmolLM2-135M-Instruct: {shape}, {str(model.dtype).removeprefix('torch.')}. Greedy continuations, unsteered:\n"
    )
    progress(f"unsteered: {tokens} tokens for each of {len(PROMPTS)} prompts")
    demo.plain = demo.generate(None)
    demo.table(demo.plain)
    love = _add(demo)
    _ablate(demo, love)
    _amplify_and_calibrate(demo)
    _flow(demo)
    progress("tokens per second, steered and unsteered in turns")
    speed = _speed(demo, Plan({LAYER_ADD: Add(love, 2.0)}))
    report = {
        "model": {"name": "smollm2-135m-instruct", "dtype": str(model.dtype), "device": str(model.device)},
        "backend": backend_of(next(model.parameters())),
        "versions": versions(),
        "speed": speed,
        "methods": demo.results,
        "seconds": time.perf_counter() - started,
    }
    file = out / "results.json"
    file.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _summary(demo, report, file)
    return report


def greedy(model: Any, inputs: Any, tokens: int, pad: int) -> Tensor:
    """Generate exactly `tokens` tokens greedily."""
    return model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=pad)


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    import transformers

    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def _add(demo: Demo) -> Tensor:
    love = extract.difference(demo.activations(LOVE, LAYER_ADD), demo.activations(HATE, LAYER_ADD))
    notes = [
        f'love − hate: "{LOVE[0]}" minus "{HATE[0]}", last token, length {love.norm:.1f} '
        f"(typical activation {love.origin.typical_norm:.1f})"
    ]
    plan = Plan({LAYER_ADD: Add(love, 2.0)}, model=demo.model)
    title = f"1  Add: x + 2·(love − hate) after layer {LAYER_ADD}"
    demo.show("add", title, plan, notes, {"norm": love.norm, "activation_norm": love.origin.typical_norm})
    return love.vector


def _ablate(demo: Demo, love: Tensor) -> None:
    last = demo.model.config.num_hidden_layers - 1
    plan = Plan({layer: Ablate(love) for layer in range(last + 1)}, model=demo.model)
    unit = love / love.norm()
    before, after = (float((demo.activations(PROMPTS, last, p)[last] @ unit).abs().mean()) for p in (None, plan))
    notes = [f"mean |v̂ᵀx| after layer {last}: {before:.3g} unsteered, {after:.1g} ablated"]
    title = "2  Ablate: x − v̂v̂ᵀx with v = love − hate, after every layer"
    demo.show("ablate", title, plan, notes, {"projection_before": before, "projection_after": after})


def _amplify_and_calibrate(demo: Demo) -> None:
    layer = LAYER_FEATURES
    pairs = ((KIND, UNKIND), (SEA, LAND))
    features = torch.stack(
        [
            extract.mean_difference(
                demo.activations(pos, layer)[layer], demo.activations(neg, layer)[layer], normalize=True
            ).vector
            for pos, neg in pairs
        ]
    )
    notes = ["S: two unit features from prompts, kind − unkind and sea − land"]
    plan = Plan({layer: Amplify(features, alpha=3.0)}, model=demo.model)
    demo.show("amplify", f"3  Amplify: x + 3·relu(xS)Sᵀ after layer {layer}", plan, notes, {"alpha": 3.0})
    plan = Plan({layer: Calibrate(features, beta=80.0)}, model=demo.model)
    title = f"4  Calibrate: x − relu(xS)Sᵀ + 80·mean(S) after layer {layer}"
    demo.show("calibrate", title, plan, notes, {"beta": 80.0})


def _flow(demo: Demo) -> None:
    layer = LAYER_FEATURES
    barrier = fit_barrier(demo.activations(KIND, layer), demo.activations(UNKIND, layer), kind="linear", C=BARRIER_C)
    plan = Plan({layer: Flow(barrier, angle=0.4, steps=10)}, model=demo.model)
    before, after = (float(barrier(demo.activations(PROMPTS, layer, p)[layer]).mean()) for p in (None, plan))
    notes = [
        f"h = log p(kind)/p(unkind): linear barrier on the sphere, {len(KIND)} + {len(UNKIND)} prompts, "
        f"held-out accuracy {barrier.info.accuracy:.0%}",
        f"mean h on the prompts: {before:+.2f} unsteered, {after:+.2f} steered",
    ]
    title = f"5  Flow: ten Euler steps of da/dt = ∇h/‖∇h‖ over 0.4 rad after layer {layer}"
    demo.show("flow", title, plan, notes, {"accuracy": barrier.info.accuracy, "h_before": before, "h_after": after})


def _speed(demo: Demo, plan: Plan, rounds: int = 4, tokens: int = 12) -> dict[str, Any]:
    """Tokens per second of one prompt, the two modes in turns so that both see the same machine."""
    inputs = demo.tokenizer(PROMPTS[0], return_tensors="pt")
    seconds: dict[str, list[float]] = {"unsteered": [], "steered": []}
    for i in range(rounds):
        for mode in sorted(seconds, reverse=i % 2 == 0):
            with steer(demo.model, plan) if mode == "steered" else nullcontext():
                start = time.perf_counter()
                greedy(demo.model, inputs, tokens, demo.tokenizer.pad_token_id)
                seconds[mode].append(time.perf_counter() - start)
    rates = {mode: tokens / sorted(taken)[len(taken) // 2] for mode, taken in seconds.items()}
    return {"tokens_per_second": rates, "seconds_per_round": seconds, "tokens_per_round": tokens}


def _summary(demo: Demo, report: dict[str, Any], file: Path) -> None:
    rates = report["speed"]["tokens_per_second"]
    demo.say(f"\nBackend     {report['backend']} on {report['model']['device']}")
    demo.say(f"Speed       {rates['unsteered']:.1f} tokens/s unsteered, {rates['steered']:.1f} steered (medians)")
    demo.say(f"Time        {report['seconds']:.0f} s")
    demo.say(f"Results     {file}")
    for result in demo.results.values():
        demo.say(f"Plan        {demo.out / result['plan']}")
    demo.say(f'\nNext        steerfast generate demo "I hate you because" --plan {demo.out / "plans" / "add"}')


def run(args: argparse.Namespace) -> int:
    """Run `steerfast demo`; returns the exit code."""
    demonstrate(args.out, say=shared.say, progress=shared.progress, tokens=args.tokens, width=shared.width())
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast demo` to a parser."""
    default = Path("steerfast-demo")
    out = "directory of the results (default: %(default)s)"
    parser.add_argument("--out", type=Path, default=default, metavar="DIR", help=out)
    parser.add_argument("--tokens", type=shared.positive, default=20, help="new tokens per text (default: %(default)s)")
