"""What the hook costs: host time per hooked layer and call, decode of a real model with every layer steered, the import."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from setting import PLACE, pick
from torch import nn

import steerfast as sf
from steerfast.bench_cases import Stream, same_as
from steerfast.hooks import Dispatcher
from steerfast.layers import Point
from steerfast.positions import Pass
from steerfast.timing import Case, Function, NotHere, Within

WIDTH = 576
IMPORT = (
    "import time, torch\nstart = time.perf_counter()\nimport steerfast\n"
    "print(time.perf_counter() - start)"
)  # fmt: skip


def dispatched(module: nn.Module) -> nn.Module:
    """Put the library's dispatcher with one `Add` on a module, as `steer` does."""
    controller: Any = SimpleNamespace(now=Pass(owners=((0, 1.0),)))
    dispatcher = Dispatcher(controller, Point(module, "post", "module", WIDTH), sf.Bank(WIDTH, 1, 1), fixed=False)
    dispatcher.put({0: sf.Add(torch.ones(WIDTH))}, 1)
    return module


def hooked(hook: Any) -> nn.Module:
    module = nn.Identity()
    module.register_forward_hook(hook)
    return module


def test_host_time(race: Any) -> None:
    """An identity module, so that nothing but the hook is left."""
    vector = torch.ones(WIDTH)

    def build() -> Case:
        at = Stream("cpu", torch.float32, WIDTH)
        return Case(
            "hook host time", bytes=3 * 4 * WIDTH, operations=WIDTH, fresh=lambda: (at.rows(1)[None],), captured=False,
            ours=dispatched(nn.Identity()),
            judge=same_as(lambda x: x + vector),
            peers={"hook that adds": lambda: hooked(lambda module, args, output: output + vector)},
            yardsticks={"bare module": nn.Identity, "empty hook": lambda: hooked(lambda *_: None)},
        )  # fmt: skip

    race(build)


def test_decode(race: Any) -> None:
    """Every layer steered, one token at a time."""

    def build() -> Case:
        if PLACE == "tiny":
            model = models.shaped()
        else:
            model = models.real()
        layers = list(range(model.config.num_hidden_layers))
        vectors = models.vectors(model, layers)
        call = models.generation(model, rows=1, prompt=5, tokens=pick(32, 8, 2))
        plan = sf.Plan({layer: sf.Add(vector) for layer, vector in vectors.items()})
        bare = Within(call, models.bare_hooks(model, vectors))

        def steering_vectors() -> Function:
            from steering_vectors import SteeringVector

            return Within(call, lambda: SteeringVector(vectors).apply(model))

        def repeng() -> Function:
            from repeng import ControlModel, ControlVector

            own = models.twin(model)
            control = ControlModel(own, layers)
            control.set_control(ControlVector("llama", {i: v.numpy() for i, v in vectors.items()}))
            call = models.generation(own, rows=1, prompt=5, tokens=pick(32, 8, 2))
            return call

        return Case(
            f"decode layers={len(layers)}", bytes=4 * sum(p.numel() for p in model.parameters()), operations=0,
            fresh=lambda: (), captured=False,
            ours=Within(call, lambda: sf.steer(model, plan)),
            judge=models.same_logits(bare, 1e-4),
            peers={"bare hooks": lambda: bare, "steering-vectors": steering_vectors, "repeng": repeng},
            yardsticks={"unsteered": lambda: call, "unsteered again": lambda: call},
        )  # fmt: skip

    race(build)


def test_import(sample: Any) -> None:
    """`import steerfast` in a fresh process, over `import torch`."""

    def once() -> dict[str, float]:
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        return {"ours": float(done.stdout)}

    sample("import steerfast", once, rounds=9)
