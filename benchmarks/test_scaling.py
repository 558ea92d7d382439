"""How time and memory grow: one op, one size varied. `report.py` fits the exponents and draws a picture of each.

Marked slow and left out of `make bench`; `make evidence` and `pytest benchmarks/test_scaling.py` run it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from lab import cases, sae_cases
from lab.case import Case, Stream, Within
from setting import AT, pick

import steerfast as sf

pytestmark = pytest.mark.slow
N = pick(4096, 64, 2)


def wide(d: int) -> Stream:
    return Stream(AT.device, AT.dtype, d)


SWEEPS: dict[str, tuple[tuple[int, ...], Callable[[int], Case]]] = {
    "tokens, add": (
        pick((1, 4, 16, 64, 256, 1024, 4096, 16384, 65536), (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536), (1, 2)),
        lambda n: cases.add(AT, n),
    ),
    "tokens, amplify k=16": (
        pick((1, 4, 16, 64, 256, 1024, 4096, 16384, 65536), (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536), (1, 2)),
        lambda n: cases.subspace(AT, n, "amplify", pick(16, 16, 2)),
    ),
    "tokens, sae_encode": (
        pick((1, 4, 16, 64, 256, 1024, 4096, 16384), (1, 4, 16, 64, 256), (1, 2)),
        lambda n: sae_cases.sae_encode(AT, n, pick(65536, 16384, 300), pick(32, 32, 5)),
    ),
    "width, amplify k=16": (
        pick((576, 1024, 2048, 4096, 8192, 16384), (576, 1024, 2048, 4096, 8192, 16384), (40, 72)),
        lambda d: cases.subspace(wide(d), N, "amplify", pick(16, 16, 2)),
    ),
    "rank, amplify": (
        pick((1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (1, 17)),
        lambda k: cases.subspace(AT, N, "amplify", k),
    ),
    "slots, add": (
        pick((1, 4, 16, 64, 256, 1024), (1, 4, 16, 64, 256, 1024), (1, 4)),
        lambda slots: cases.add(AT, pick(8192, 1024, 3), slots),
    ),
    "features, sae_encode": (
        pick((4096, 16384, 65536, 262144), (4096, 16384, 65536, 262144), (150, 300)),
        lambda features: sae_cases.sae_encode(AT, N, features, pick(32, 32, 5)),
    ),
    "k, sae_encode": (
        pick((1, 8, 32, 128, 512), (1, 8, 32, 128, 512), (1, 9)),
        lambda k: sae_cases.sae_encode(AT, N, pick(65536, 16384, 300), k),
    ),
    "k, sae_decode": (
        pick((1, 8, 32, 128, 512), (1, 8, 32, 128, 512), (1, 9)),
        lambda k: sae_cases.sae_decode(AT, N, pick(65536, 16384, 300), k),
    ),
    "steps, flow k=64": (
        pick((1, 3, 10, 30, 100), (1, 3, 10, 30, 100), (1, 3)),
        lambda steps: cases.flow(AT, N, pick(64, 64, 17), steps),
    ),
}  # fmt: skip
POINTS = [pytest.param(name, size, id=f"{name}-{size}") for name, (sizes, _) in SWEEPS.items() for size in sizes]


@pytest.mark.parametrize(("name", "size"), POINTS)
def test_scaling(race: Any, name: str, size: int) -> None:
    """Ours alone: what peers do is in the other suites."""

    def build() -> Case:
        case = SWEEPS[name][1](size)
        return replace(case, name=f"scaling {name} = {size}", peers={}, yardsticks={})

    race(build, memory=("ours",), sizes={"size": size})


@pytest.fixture(scope="module")
def model() -> Any:
    return models.real() if AT.device == "cpu" and AT.d == 576 else models.shaped()


@pytest.mark.parametrize("layers", pick((1, 2, 4, 8, 16, 32), (1, 3, 10, 30), (1, 2)))
def test_layers(race: Any, model: Any, layers: int) -> None:
    """One forward pass of one token per row with this many layers steered, beside unsteered."""
    ids = torch.full((pick(16, 1, 2), 1), 7, device=next(model.parameters()).device)
    call = lambda: model(ids).logits.float()  # noqa: E731

    def build() -> Case:
        vectors = models.vectors(model, list(range(layers)))
        plan = sf.Plan({i: sf.Add(v.float().cpu()) for i, v in vectors.items()})
        return Case(
            f"scaling layers, forward pass = {layers}", bytes=1, operations=0, fresh=lambda: (), captured=False,
            ours=Within(call, lambda: sf.steer(model, plan)),
            judge=models.same_logits(Within(call, models.bare_hooks(model, vectors)), pick(5e-2, 1e-4, 1e-4)),
            yardsticks={"unsteered": lambda: call},
        )  # fmt: skip

    race(build, sizes={"size": layers})
