"""LinEAS: its distance and its proximal step against the formulas in float64, and maps that move a tiny model."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from families import build
from scipy.optimize import minimize
from test_sweeping import Letters

import steerfast as sf
from steerfast.directions.fits.lineas import shrink, wasserstein

POSITIVE = [f"zzz {a}{b}" for a, b in itertools.product("abc", "defg")]
NEGATIVE = [f"kkkk {a}{b}" for a, b in itertools.product("nop", "qrst")]


def test_the_distance_is_that_of_optimal_transport() -> None:
    a, b = torch.randn(4, 3, dtype=torch.float64), 2 * torch.randn(4, 3, dtype=torch.float64) + 1
    for j in range(3):
        costs = [
            sum((a[i, j] - b[k, j]) ** 2 for i, k in enumerate(order)) / 4 for order in itertools.permutations(range(4))
        ]
        assert float(wasserstein(a, b)[j]) == pytest.approx(float(min(costs)))
    c = torch.randn(6, 3, dtype=torch.float64)
    repeated = wasserstein(a.repeat_interleave(3, 0), c.repeat_interleave(2, 0))
    torch.testing.assert_close(wasserstein(a, c), repeated)
    assert torch.autograd.gradcheck(wasserstein, (a.requires_grad_(), c.requires_grad_()))


def test_the_step_of_the_penalties_minimises_them() -> None:
    x = torch.tensor([2.0, -1.0, 0.3, 0.05], dtype=torch.float64)
    found = shrink(x, 0.2, 0.5)

    def cost(z: np.ndarray) -> float:
        return float(0.2 * np.abs(z).sum() + 0.5 * np.linalg.norm(z) + 0.5 * ((z - x.numpy()) ** 2).sum())

    best = minimize(cost, x.numpy(), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20000})
    torch.testing.assert_close(found, torch.from_numpy(best.x), atol=1e-5, rtol=1e-5)
    assert not shrink(x, 0.0, 9.0).any()
    assert torch.equal(shrink(x, 0.0, 0.0), x)


def test_two_layers_together_close_the_gap_of_held_out_texts() -> None:
    model = build("llama")
    before = deepcopy(model.state_dict())
    plan = sf.fit_lineas(model, Letters(), POSITIVE, NEGATIVE, [0, 2], settings=sf.LinEAS(steps=80))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [place.layer for place in plan.edits] == [0, 2]
    for place, (edit,) in plan.edits.items():
        assert edit.info.method == "lineas"
        assert edit.info.closed > 0.5
        assert edit.origin.place == place
        assert edit.origin.typical_norm > 0
    # what is said of held-out texts is what the plan does to them, redone here
    held = [side[::5] for side in (POSITIVE, NEGATIVE)]
    target, plain = (sf.collect(model, Letters(), side, [0, 2], "mean", progress=False) for side in held)
    taught = [[text for i, text in enumerate(side) if i % 5] for side in (POSITIVE, NEGATIVE)]
    rows = [sf.collect(model, Letters(), side, [0, 2], "mean", progress=False) for side in taught]
    with sf.steer(model, plan):
        edited = sf.collect(model, Letters(), held[1], [0, 2], "mean", progress=False)
    for place, (edit,) in plan.edits.items():
        layer = place.layer
        size = torch.cat([side[layer] for side in rows]).std(0)
        near, far = (wasserstein(x[layer] / size, target[layer] / size).sum() for x in (edited, plain))
        assert edit.info.closed == pytest.approx(1 - float(near / far), abs=1e-3)


def test_the_penalties_empty_coordinates_and_layers() -> None:
    def fitted(**numbers: float) -> sf.Plan:
        return sf.fit_lineas(
            build("llama"), Letters(), POSITIVE, NEGATIVE, [0, 1], settings=sf.LinEAS(steps=40, **numbers)
        )

    def untouched(plan: sf.Plan) -> int:
        edits = [edit for chain in plan.edits.values() for edit in chain]
        return sum(int(((e.weight == 1) & (e.bias == 0)).sum()) for e in edits)

    assert untouched(fitted()) == 0
    assert untouched(fitted(penalty=2.0)) > 10
    with pytest.raises(ValueError, match="fit_lineas: the penalties leave no coordinate of any layer changed"):
        fitted(group_penalty=100.0)


def test_a_step_that_is_too_long_is_named() -> None:
    with pytest.raises(ValueError, match=r"fit_lineas: the loss is (nan|inf) in step \d+; take a smaller lr"):
        sf.fit_lineas(build("llama"), Letters(), POSITIVE, NEGATIVE, [0, 2], settings=sf.LinEAS(steps=5, lr=1e30))


def test_few_texts_hold_nothing_out() -> None:
    plan = sf.fit_lineas(build("llama"), Letters(), POSITIVE[:3], NEGATIVE[:4], [1], settings=sf.LinEAS(steps=2))
    ((edit,),) = plan.edits.values()
    assert math.isnan(edit.info.closed)
    assert (edit.info.positives, edit.info.negatives) == (3, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positive": ["a"]}, "positive holds 1 texts"),
        ({"negative": "abc"}, "negative must be several texts"),
        ({"layers": [3]}, "layer 3 is out of range"),
        ({"site": "nowhere"}, "site"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    given = {"positive": POSITIVE, "negative": NEGATIVE, "layers": [1], **change}
    with pytest.raises((TypeError, ValueError), match=words):
        sf.fit_lineas(build("llama"), Letters(), **given)


def test_bad_settings_are_named() -> None:
    for change, words in (
        ({"penalty": -1.0}, "penalty is -1.0"),
        ({"pool": "all"}, "pool"),
        ({"lr": 0.0}, "lr is 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            sf.LinEAS(**change)
