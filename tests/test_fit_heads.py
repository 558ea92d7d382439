"""Heads chosen by what their outputs tell, and shifted along it: against scikit-learn, by hand, and in a model."""

from __future__ import annotations

import math

import pytest
import torch
from families import build, token_ids
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import steerfast as sf
from steerfast.directions.fits.heads import logistic
from steerfast.models.collect import Activations
from steerfast.place import Place

HEADS, W, N, M = 4, 6, 40, 31
TOLD = {(1, 2): 3.0, (2, 0): 2.0, (0, 3): 1.5}
"""(layer, head) to how far apart the sides are there."""


def planted(site: str = "head_out") -> tuple[Activations, Activations]:
    rows: list[dict[int, Tensor]] = [{}, {}]
    for layer in range(3):
        x = torch.randn(N + M, HEADS, W, generator=torch.Generator().manual_seed(layer)) + 2.0
        for (at, head), size in TOLD.items():
            if at == layer:
                x[:N, head, layer] += size
        rows[0][layer], rows[1][layer] = (7 * x).flatten(1).split([N, M])
    known = {"model": "LlamaForCausalLM", "site": site, "position": "last"}
    first, second = (Activations(side, **known, text_index=torch.arange(len(side[0]))) for side in rows)
    return first, second


def test_the_heads_that_tell_are_chosen_in_order() -> None:
    found = sf.fit_heads(*planted(), HEADS, count=3)
    assert found.chosen == ((1, 2), (2, 0), (0, 3))
    assert found.accuracy[1].shape == (HEADS,)
    assert float(found.accuracy[1][2]) > 0.85
    assert abs(float(found.accuracy[1][1]) - 0.5) < 0.2
    assert found.null is not None
    assert found.null.beaten
    assert found.null.effect == pytest.approx(sum(float(found.accuracy[a][h]) for a, h in found.chosen) / 3)
    assert found.null.random == ()
    assert len(sf.fit_heads(*planted(), HEADS, draws=0).chosen) == 1  # 5 % of 12 heads, at least one


def test_the_shift_is_alpha_deviations_along_the_mean_difference() -> None:
    pos, neg = planted()
    found = sf.fit_heads(pos, neg, HEADS, count=3, alpha=2.5, draws=0)
    assert list(found.plan.edits) == [Place("head_out", layer) for layer in range(3)]
    for layer, head in found.chosen:
        (edit,) = found.plan.edits["head_out", layer]
        p, n = (side[layer].double().unflatten(1, (HEADS, W))[:, head] for side in (pos, neg))
        theta = (p.mean(0) - n.mean(0)) / (p.mean(0) - n.mean(0)).norm()
        sigma = (torch.cat([p, n]) @ theta).std()
        wanted = torch.zeros(HEADS, W, dtype=torch.float64)
        wanted[head] = 2.5 * sigma * theta
        torch.testing.assert_close(edit.strength * edit.vector.double(), wanted.flatten(), rtol=1e-5, atol=1e-5)
        assert (edit.info.method, edit.info.positives, edit.info.negatives) == ("heads", N, M)
        assert edit.origin.place == ("head_out", layer)


def test_newton_finds_what_scikit_learn_finds() -> None:
    x = torch.randn(5, 50, 7, dtype=torch.float64)
    labels = x[0, :, 0] + torch.randn(50, dtype=torch.float64) > 0
    w, b = logistic(x, labels)
    for i in range(5):
        fit = LogisticRegression(C=1.0, tol=1e-12, max_iter=5000).fit(x[i].numpy(), labels.numpy())
        torch.testing.assert_close(w[i], torch.from_numpy(fit.coef_[0]), rtol=1e-4, atol=1e-5)
        assert float(b[i]) == pytest.approx(float(fit.intercept_[0]), rel=1e-3, abs=1e-5)


def test_newton_takes_no_step_uphill() -> None:
    """A few rows far out, as real heads have them: whole steps end where every probability is 0 or 1."""
    rows = """
        -3 -1 0 0 0 | -110 0 0 3 -2 | 5 0.8 0 0 0 | -8 -2 0 0 0 | -5 -1.2 0 0 0
        | -121 36 0 -3 0 | 0 0 4 0 0 | -3 0 0 -0.4 0 | 5 1 0 0 0 | -8 -1 0 -0.221 0.3 | 5 1.3 -2.3 0 0
    """
    x = torch.tensor([[float(value) for value in row.split()] for row in rows.split("|")], dtype=torch.float64)
    labels = torch.arange(11) < 5
    w, b = logistic(torch.stack([x, x * 1e-2]), labels)
    for scale, weights, intercept in zip((1, 1e-2), w, b, strict=True):
        fit = LogisticRegression(C=1.0, tol=1e-12, max_iter=50_000).fit((x * scale).numpy(), labels.numpy())
        torch.testing.assert_close(weights, torch.from_numpy(fit.coef_[0]), rtol=1e-4, atol=1e-6)
        assert float(intercept) == pytest.approx(float(fit.intercept_[0]), rel=1e-4)


def test_newton_settles_on_sides_that_are_far_apart() -> None:
    labels = torch.arange(20) < 10
    x = torch.where(labels, 50.0, -50.0).double()[None, :, None].repeat(1, 1, 2)
    w, b = logistic(x, labels)
    slope = ((torch.sigmoid(x[0] @ w[0] + b[0]) - labels.double()) @ x[0]) + w[0]
    assert float(slope.abs().max()) < 1e-6


def test_the_plan_steers_heads_of_a_model() -> None:
    model, ids = build("llama"), token_ids(2, 6)
    width = model.config.num_attention_heads
    inputs = [{"input_ids": token_ids(12, 6, seed=seed), "attention_mask": torch.ones(12, 6).long()} for seed in (1, 2)]
    pos, neg = (sf.collect(model, layers=range(3), site="head_out", inputs=[one], progress=False) for one in inputs)
    found = sf.fit_heads(pos, neg, width, count=2, draws=0)
    with torch.no_grad():
        plain = model(ids).logits
        with sf.steer(model, found.plan):
            steered = model(ids).logits
    assert (steered - plain).abs().max() > 1e-3


def test_few_rows_are_ranked_by_the_mean_difference() -> None:
    pos, neg = planted()
    few = [Activations({k: x[:2] for k, x in side.items()}, model="m", site="head_out", position="last",
                       text_index=torch.zeros(2).long()) for side in (pos, neg)]  # fmt: skip
    with pytest.warns(UserWarning, match="fit_heads: the 4 rows are too few"):
        found = sf.fit_heads(*few, HEADS, count=2)
    assert found.null is None
    assert all(math.isnan(float(v)) for row in found.accuracy.values() for v in row)


def test_bad_input_is_named() -> None:
    pos, neg = planted()
    for change, words in (
        ({"heads": 5}, "layer 0 has width 24, which 5 heads do not divide"),
        ({"count": 13}, "count is 13 and there are 12 heads"),
        ({"draws": -1}, "draws"),
    ):
        with pytest.raises(ValueError, match=words):
            sf.fit_heads(pos, neg, **{"heads": HEADS, **change})
    with pytest.raises(TypeError, match="positive is a Tensor; expected layer -> activations at head_out"):
        sf.fit_heads(pos[0], neg[0], HEADS)
    with pytest.raises(ValueError, match="the activations are of resid_post"):
        sf.fit_heads(*planted("resid_post"), HEADS)
