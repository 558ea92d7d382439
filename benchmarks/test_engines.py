"""Decoding in `transformers`, steered against the same model unsteered: dynamic cache, and static cache with its own compile.

On a GPU `generate` compiles the decode step of a static cache and replays it as a CUDA graph; here it runs eagerly.
"""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from lab.case import Case, Within
from setting import PLACE, pick

import steerfast as sf

TOKENS, PROMPT = pick(48, 2, 2), pick(64, 8, 4)


@pytest.fixture(scope="module")
def plain() -> Any:
    return models.shaped()


@pytest.fixture(scope="module")
def prepared(plain: Any) -> Any:
    model = models.twin(plain)
    sf.prepare(model)
    return model


@pytest.fixture(scope="module")
def wide(plain: Any) -> Any:
    """Room for rank 64: a kernel that holds so many directions is another one."""
    model = models.twin(plain)
    sf.prepare(model, room=sf.Room(rank=64))
    return model


@pytest.mark.parametrize(
    ("rows", "cache"),
    pick(
        ((16, "static"),),
        ((1, "dynamic"), (4, "static")),
        ((2, "dynamic"), (2, "static")),
    ),
)
def test_arms(race: Any, plain: Any, prepared: Any, wide: Any, rows: int, cache: str) -> None:
    """Ours: one vector in every layer for every row. Beside it: nothing steered, one layer, rank-64 edits in every layer."""
    race(lambda: _case(plain, prepared, wide, rows, cache))


def test_configurations(race: Any, plain: Any, prepared: Any) -> None:
    """Every row of a large batch with a vector and a strength of its own, in one layer."""
    rows = pick(256, 8, 3)
    middle = plain.config.num_hidden_layers // 2
    each = torch.stack([models.vectors(plain, [middle])[middle] for _ in range(rows)])
    own, strengths = [sf.Plan({middle: sf.Add(v.float().cpu())}) for v in each], torch.linspace(0.5, 1.5, rows)
    added = (strengths[:, None, None].to(each.device) * each[:, None].float()).to(each.dtype)
    bare = Within(_generate(plain, rows, "dynamic"), models.bare_hooks(plain, {middle: added}))

    def build() -> Case:
        cache = pick("static", "dynamic", "dynamic")
        unsteered, idle = (_generate(m, rows, cache) for m in (plain, prepared))
        around = lambda: sf.steer(prepared, own, strength=strengths.tolist())  # noqa: E731
        return Case(
            f"engine configurations={rows} {cache}", bytes=_bytes(plain), operations=0, fresh=lambda: (), captured=False,
            ours=Within(idle, around), judge=models.same_logits(bare, 1e-4 if each.dtype == torch.float32 else 5e-2),
            yardsticks={"unsteered": lambda: unsteered, "idle": lambda: idle},
        )  # fmt: skip

    race(build)


def _case(plain: Any, prepared: Any, wide: Any, rows: int, cache: str) -> Case:
    count, d = plain.config.num_hidden_layers, plain.config.hidden_size
    layers = list(range(count))
    vectors = models.vectors(plain, layers)
    dtype = next(plain.parameters()).dtype
    basis = torch.linalg.qr(torch.randn(d, min(64, d)))[0].T
    unsteered, ours = _generate(plain, rows, cache), _generate(prepared, rows, cache)
    every = sf.Plan({i: sf.Add(v.float().cpu()) for i, v in vectors.items()})
    arms = {
        "idle": None,
        "one layer": sf.Plan({count // 2: sf.Add(vectors[count // 2].float().cpu())}),
    }
    deep, edits = _generate(wide, rows, cache), sf.Plan({i: sf.Amplify(basis, 0.01) for i in layers})
    bare = Within(_generate(plain, rows, "dynamic"), models.bare_hooks(plain, vectors))

    def arm(plan: Any) -> Any:
        return ours if plan is None else Within(ours, lambda: sf.steer(prepared, plan))

    return Case(
        f"engine rows={rows} {cache}", bytes=_bytes(plain), operations=0, fresh=lambda: (), captured=False,
        ours=arm(every), judge=models.same_logits(bare, 1e-4 if dtype == torch.float32 else 5e-2),
        yardsticks={
            "unsteered": lambda: unsteered, **{name: (lambda p=plan: arm(p)) for name, plan in arms.items()},
            "rank 64, every layer": lambda: Within(deep, lambda: sf.steer(wide, edits)),
        },
    )  # fmt: skip


def _generate(model: Any, rows: int, cache: str) -> Any:
    more = {"cache_implementation": "static"} if cache == "static" else {}
    if cache == "static" and PLACE != "cuda":
        more["disable_compile"] = True
    return models.generation(model, rows, PROMPT, TOKENS, **more)


def _bytes(model: Any) -> int:
    return TOKENS * sum(p.numel() * p.element_size() for p in model.parameters())
