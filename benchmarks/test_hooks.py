"""What the hook costs: host time per hooked layer and call, decode of a real model with every layer steered, the import."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import models
import numpy
import torch
from lab.case import Case, Function, NotHere, Stream, Within, same_as
from setting import PLACE, pick
from torch import nn

import steerfast as sf
from steerfast.hooks.dispatcher import Dispatcher

WIDTH = 576
IMPORT = (
    "import time, torch\nstart = time.perf_counter()\nimport steerfast\n"
    "print(time.perf_counter() - start)"
)  # fmt: skip


def hooked(hook: Any) -> nn.Module:
    module = nn.Identity()
    module.register_forward_hook(hook)
    return module


def test_host_time(race: Any) -> None:
    """A real model runs, and inside of its pass the hook of its one layer is called on another module's output."""
    vector, model, seen, true = torch.ones(WIDTH), models.one_layer(WIDTH), [], Dispatcher.__call__

    def called(self: Dispatcher, x: torch.Tensor) -> torch.Tensor | None:
        def build() -> Case:
            if PLACE == "cuda":
                raise NotHere("the hook's host time is measured on the PyTorch backend")
            at = Stream("cpu", torch.float32, WIDTH)
            return Case(
                "hook host time", bytes=3 * 4 * WIDTH, operations=WIDTH, fresh=lambda: (at.rows(1)[None],), captured=False,
                ours=hooked(lambda module, args, output: true(self, output)),
                judge=same_as(lambda x: x + vector),
                peers={"hook that adds": lambda: hooked(lambda module, args, output: output + vector)},
                yardsticks={"bare module": nn.Identity, "empty hook": lambda: hooked(lambda *_: None)},
            )  # fmt: skip

        if not seen:
            seen.append(self)
            race(build)
        return true(self, x)

    with sf.steer(model, {0: sf.Add(vector)}), mock.patch.object(Dispatcher, "__call__", called):
        model(torch.ones(1, 1, dtype=torch.long), use_cache=False)
    assert seen


def test_decode(race: Any) -> None:
    """Every layer steered, one token at a time."""

    def build() -> Case:
        if PLACE == "cuda":
            raise NotHere("test_engines measures a model on a GPU")
        model = pick(None, models.real, models.shaped)()
        layers = list(range(model.config.num_hidden_layers))
        vectors = models.vectors(model, layers)
        call = models.generation(model, rows=1, prompt=5, tokens=pick(32, 2, 2))
        plan = sf.Plan({layer: sf.Add(vector) for layer, vector in vectors.items()})
        bare = Within(call, models.bare_hooks(model, vectors))

        def steering_vectors() -> Function:
            from steering_vectors import SteeringVector

            return Within(call, lambda: SteeringVector(vectors).apply(model))

        def repeng() -> Function:
            if not hasattr(numpy, "float_"):  # repeng 0.4 uses a name that NumPy 2 took away
                setattr(numpy, "float_", numpy.float64)  # noqa: B010
            from repeng import ControlModel, ControlVector

            own = models.twin(model)
            control = ControlModel(own, layers)
            control.set_control(ControlVector("llama", {i: v.numpy() for i, v in vectors.items()}))
            return models.generation(own, rows=1, prompt=5, tokens=pick(32, 2, 2))

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


def test_listing(sample: Any, tmp_path: Path) -> None:
    """A folder of 10 000 sets of vectors, of which only the descriptions are read; copies of one set."""
    count = pick(10_000, 10_000, 10)
    first = Path(sf.save_directions(tmp_path / "0", sf.Direction(torch.ones(8), "pca", 1.0, 1.0, layer=1)))
    for i in range(1, count):
        (tmp_path / str(i)).mkdir()
        for file in first.iterdir():
            (tmp_path / str(i) / file.name).hardlink_to(file)

    def once() -> dict[str, float]:
        begin = time.perf_counter()
        found = sf.list_directions(tmp_path)
        taken = time.perf_counter() - begin
        assert len(found) == count
        return {"ours": taken}

    sample(f"list {count} vectors", once, rounds=5)
