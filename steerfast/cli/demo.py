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
from steerfast.edits.features import Amplify, Calibrate, EditFeatures
from steerfast.edits.flow import Flow
from steerfast.edits.linear import Ablate, Add
from steerfast.hooks.steer import steer
from steerfast.models import demo as demo_model
from steerfast.models.collect import Activations, collect
from steerfast.ops.backends import backend_of
from steerfast.plan import Plan
from steerfast.sae.explanation import explain, vocabulary_of
from steerfast.sae.model import SAE

from . import shared
from .demo_prompts import (
    HATE,
    KIND,
    KIND_HELD_OUT,
    LAND,
    LOVE,
    PROFESSIONS,
    PROMPTS,
    SEA,
    UNKIND,
    UNKIND_HELD_OUT,
    WORDS,
)

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
SAE_FOLDER = Path(__file__).parents[2] / "benchmarks" / "sae" / "smollm2-135m-instruct-L7"
"""The SAE that the repository ships; a wheel is without it."""
VOCABULARY = 2000  # words to explain features by; all 10 000 take five times as long and find the same feature


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
    unsteered: dict[tuple[str, ...], list[str]] = field(default_factory=dict)

    def activations(self, texts: tuple[str, ...], layer: int, plan: Plan | None = None) -> Activations:
        """The stream after a layer at the last token of each text, steered by a plan."""
        with steer(self.model, plan) if plan is not None else nullcontext():
            return collect(self.model, self.tokenizer, texts, layers=layer, progress=False)

    def plain(self, prompts: tuple[str, ...]) -> list[str]:
        """Unsteered continuations, generated once."""
        if prompts not in self.unsteered:
            self.progress(f"unsteered: {self.tokens} tokens for each of {len(prompts)} prompts")
            self.unsteered[prompts] = self.generate(prompts, None)
        return self.unsteered[prompts]

    def generate(self, prompts: tuple[str, ...], plan: Plan | None) -> list[str]:
        """Greedy continuations of the prompts, in one left-padded batch."""
        inputs = self.tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
        with steer(self.model, plan) if plan is not None else nullcontext():
            out = greedy(self.model, inputs, self.tokens, self.tokenizer.pad_token_id)
        start = inputs["input_ids"].shape[1]
        return list(self.tokenizer.batch_decode(out[:, start:], skip_special_tokens=True))

    def table(self, prompts: Sequence[str], texts: Sequence[str]) -> None:
        """Print one continuation per prompt."""
        longest = max(map(len, prompts))
        for prompt, text in zip(prompts, texts, strict=True):
            indent = " " * (longest + 6)
            shown = textwrap.wrap(" ".join(text.split()), max(20, self.width - len(indent))) or [""]
            self.say(f"  {prompt:>{longest}} …".ljust(len(indent)) + f"\n{indent}".join(shown))

    def note(self, line: str) -> None:
        """Print a line under a title."""
        self.say(textwrap.fill(line, self.width, initial_indent="  ", subsequent_indent="  "))

    def show(
        self,
        key: str,
        title: str,
        plan: Plan,
        notes: list[str],
        numbers: dict[str, Any],
        prompts: tuple[str, ...] = PROMPTS,
    ) -> None:
        """Generate under a plan, print it (and the unsteered texts of prompts not seen so far), and save the plan."""
        seen = prompts in self.unsteered
        plain = self.plain(prompts)
        self.progress(f"{key}: {self.tokens} tokens for each of {len(prompts)} prompts")
        steered = self.generate(prompts, plan)
        directory = plan.save(self.out / "plans" / key)
        self.say(f"\n{title}")
        for line in notes:
            self.note(line)
        self.say("")
        if not seen:
            self.table(prompts, plain)
            self.say("  steered:")
        self.table(prompts, steered)
        texts = [
            {"prompt": prompt, "unsteered": before, "steered": after}
            for prompt, before, after in zip(prompts, plain, steered, strict=True)
        ]
        self.results[key] = {"plan": directory.relative_to(self.out).as_posix(), "numbers": numbers, "texts": texts}


def demonstrate(
    out: Path, say: Say, progress: Say, tokens: int = 20, width: int = 88, sae: Path | None = None
) -> dict[str, Any]:
    """Run the whole demo.

    Args:
        out: Directory for the plans and for results.json; made if it does not exist.
        say: Takes each line of the report.
        progress: Takes a line before each step that takes seconds.
        tokens: New tokens per continuation.
        width: Columns of the report.
        sae: Folder or file of an SAE of this model; None: the repository's. Where only the wheel is installed, which is
            without it, that part is left out, and the report says so.

    Returns:
        What results.json holds.

    Raises:
        FileNotFoundError: there is no such SAE.
        RuntimeError: the model cannot be fetched; the message says how to fetch it by hand.
        OSError: the directory cannot be written.
    """
    started = time.perf_counter()
    dictionary = None if sae is None and not SAE_FOLDER.exists() else SAE.load(sae or SAE_FOLDER)
    out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = demo_model.load(progress=progress)
    demo = Demo(model, tokenizer, out, say, progress, tokens, width)
    shape = f"{model.config.num_hidden_layers} layers of width {model.config.hidden_size}"
    say(
        f"SmolLM2-135M-Instruct: {shape}, {str(model.dtype).removeprefix('torch.')}. Greedy continuations, unsteered:\n"
    )
    demo.table(PROMPTS, demo.plain(PROMPTS))
    love = _add(demo)
    _ablate(demo, love)
    _amplify_and_calibrate(demo)
    _flow(demo)
    _sae(demo, dictionary)
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
    pos, neg = (demo.activations(texts, layer) for texts in (KIND, UNKIND))
    barrier = fit_barrier(pos, neg, kind="linear", C=BARRIER_C, raw=False)
    kind, unkind = (barrier(demo.activations(texts, layer)[layer]) for texts in (KIND_HELD_OUT, UNKIND_HELD_OUT))
    right, held_out = int((kind > 0).sum() + (unkind < 0).sum()), len(kind) + len(unkind)
    plan = Plan({layer: Flow(barrier, angle=0.3, steps=10)}, model=demo.model)
    before, after = (float(barrier(demo.activations(PROMPTS, layer, p)[layer]).mean()) for p in (None, plan))
    notes = [
        f"h = log p(kind)/p(unkind): linear barrier on the sphere, fitted on {len(KIND)} + {len(UNKIND)} sentences; right on "
        f"{right} of {held_out} others ({right / held_out:.0%}), which share no content word with them",
        f"mean h on the prompts: {before:+.2f} unsteered, {after:+.2f} steered",
    ]
    title = f"5  Flow: ten Euler steps of da/dt = ∇h/‖∇h‖ over 0.3 rad after layer {layer}"
    numbers = {"accuracy": right / held_out, "held_out": held_out, "h_before": before, "h_after": after}
    demo.show("flow", title, plan, notes, numbers)


def _sae(demo: Demo, sae: SAE | None) -> None:
    title = "6  EditFeatures: x + 20·W_dec[f], one feature of an SAE, where f is the one that its words explain"
    if sae is None:
        demo.say(f"\n{title}")
        demo.note("left out: the SAE is in the repository, not in the package; name one with --sae benchmarks/sae/…")
        return
    demo.progress(f"explaining {sae.features} features by {VOCABULARY} words")
    found = explain(sae, demo.model, demo.tokenizer, vocabulary=vocabulary_of(demo.tokenizer, VOCABULARY))
    feature = found.find(WORDS)[0]
    plan = Plan([EditFeatures(sae, {feature: 20.0}, mode="add")], model=demo.model)
    before, after = (_she_over_he(demo, p) for p in (None, plan))
    notes = [
        f"feature {feature} of {sae.features}: {', '.join(found[feature][:4])}",
        f"mean log p(she)/p(he) behind the prompts: {before:+.2f} unsteered, {after:+.2f} steered",
    ]
    numbers = {"feature": feature, "she_over_he_before": before, "she_over_he_after": after}
    demo.show("sae", title, plan, notes, numbers, PROFESSIONS)


def _she_over_he(demo: Demo, plan: Plan | None) -> float:
    """log p(she)/p(he) as the next token, mean over the prompts."""
    she, he = (demo.tokenizer(word)["input_ids"][0] for word in (" she", " he"))
    ratios = []
    with torch.no_grad(), steer(demo.model, plan) if plan is not None else nullcontext():
        for text in PROFESSIONS:
            logits = demo.model(**demo.tokenizer(text, return_tensors="pt")).logits[0, -1]
            ratios.append(float(logits[she] - logits[he]))
    return sum(ratios) / len(ratios)


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
    demonstrate(args.out, shared.say, shared.progress, args.tokens, shared.width(), args.sae)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast demo` to a parser."""
    default = Path("steerfast-demo")
    out = "directory of the results (default: %(default)s)"
    parser.add_argument("--out", type=shared.out_folder, default=default, metavar="DIR", help=out)
    sae = "SAE of this model (default: the one of the repository)"
    parser.add_argument("--sae", type=Path, metavar="DIR", help=sae)
    parser.add_argument("--tokens", type=shared.positive, default=20, help="new tokens per text (default: %(default)s)")
