"""Vectors trained on a model: each objective against its formula in float64, and what training teaches a tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from test_sweeping import Letters
from torch import Tensor

import steerfast as sf
from steerfast.directions.fits.lessons import Lesson, Pupil
from steerfast.place import Place

LESSON = Lesson((1, 20, 31, 42), (7, 8, 9), (30, 31))
LESSONS = [(f"{a} tells", " zq") for a in "abcdefghijkl"]
CONTRASTS = [(prompt, wanted, " kk") for prompt, wanted in LESSONS]
LAYER = 1


def vector(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(48, generator=torch.Generator().manual_seed(4))


def reference(prompt: tuple[int, ...], tail: tuple[int, ...], edit: Callable[[Tensor], Tensor]) -> Tensor:
    """log p of each token of the tail, in float64, with the edit hooked in by hand."""
    model = deepcopy(build("llama")).double()

    def hook(_: Any, __: Any, out: Any) -> Any:
        return (edit(out[0]), *out[1:]) if isinstance(out, tuple) else edit(out)

    handle = model.model.layers[LAYER].register_forward_hook(hook)
    ids = torch.tensor([[*prompt, *tail]])
    with torch.no_grad():
        rows = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    handle.remove()
    return rows.gather(1, torch.tensor(tail)[:, None])[:, 0]


def loss_of(goal: Any, w: Tensor, progress: float = 0.5, draw: float = 0.0) -> float:
    pupil = Pupil("t", build("llama"), LAYER)
    with pupil.taught(), torch.no_grad():
        return float(goal.loss(pupil, w, LESSON, progress, draw))


def test_the_language_model_objective_is_the_mean_cross_entropy() -> None:
    w = vector()
    wanted = -float(reference(LESSON.prompt, LESSON.wanted, lambda x: x + w.double()).mean())
    assert loss_of(sf.LMObjective(), w) == pytest.approx(wanted, abs=1e-5)


def test_reft_r1_adds_the_mean_of_the_largest_activations_and_pays_for_the_others() -> None:
    w = vector() / vector().norm()
    paid: list[float] = []

    def edit(x: Tensor) -> Tensor:
        a = sorted((max(float(row @ w.double()), 0.0) for row in x[0, 1:]), reverse=True)
        paid.append(sum(a[2:]) / len(a))
        return x + sum(a[:2]) / 2 * w.double()

    likelihood = float(reference(LESSON.prompt, LESSON.wanted, edit).mean())
    goal = sf.ReFTr1(top=2, penalty=3.0)
    assert paid[0] > 0
    assert loss_of(goal, w, progress=0.5) == pytest.approx(3.0 * 0.5 * paid[0] - likelihood, abs=1e-5)
    assert loss_of(goal, w, progress=0.0) == pytest.approx(-likelihood, abs=1e-5)


def test_reps_prefers_in_both_directions() -> None:
    w, goal = vector(0.4), sf.RePS((1.5, 3.0))
    lesson, W = LESSON, w.double()

    def both(edit: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(reference(lesson.prompt, tail, edit) for tail in (lesson.wanted, lesson.unwanted))  # type: ignore[return-value]

    plain = [float(part.sum()) for part in both(lambda x: x)]
    for draw, factor in ((0.0, 1.5), (0.6, 3.0)):
        yc, y = both(lambda x: x + factor * W)  # noqa: B023
        plus = max(plain[1] - plain[0], 1.0) * yc.mean() - y.mean()
        yc, y = both(lambda x: x - (torch.relu(x @ W) / W.dot(W))[..., None] * W)
        minus = max(plain[0] - plain[1], 1.0) * y.mean() - yc.mean()
        wanted = math.log1p(math.exp(-float(plus))) + math.log1p(math.exp(-float(minus)))
        assert loss_of(goal, w, draw=draw) == pytest.approx(wanted, abs=1e-4)


def likely(plan: Any, text: str) -> float:
    """Mean log p of a continuation's tokens behind a held-out prompt."""
    head, tail = Letters()("a tells")["input_ids"], Letters()(text, False)["input_ids"]
    ids, model = torch.tensor([head + tail]), build("llama")
    with torch.no_grad():
        if plan is None:
            logits = model(ids).logits
        else:
            with sf.steer(model, plan):
                logits = model(ids).logits
    rows = logits[0, len(head) - 1 : -1].log_softmax(-1)
    return float(rows.gather(1, torch.tensor(tail)[:, None]).mean())


@pytest.mark.parametrize(
    ("goal", "examples", "method", "least"),
    [
        (None, LESSONS, "vector", 0.5),
        (sf.ReFTr1(top=2), LESSONS, "reft_r1", 0.5),
        # a preference is about the gap, not about the likelihood itself
        (sf.RePS((2.0, 4.0)), CONTRASTS, "reps", 0.0),
    ],
)
def test_it_teaches_prompts_that_were_held_out(
    goal: Any, examples: Any, method: str, least: float, tmp_path: Path
) -> None:
    model = build("llama")
    before = [part.clone() for part in model.parameters()]
    flags = [part.requires_grad for part in model.parameters()]
    made = sf.fit_vector(model, Letters(), examples, LAYER, goal, steps=30, lr=0.05)
    assert [part.requires_grad for part in model.parameters()] == flags
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert (made.info.method, made.info.positives, made.origin.place) == (method, 9, Place("resid_post", LAYER))
    assert made.info.nats > least
    assert made.info.null is not None
    assert made.info.null.beaten
    assert (len(made.info.null.random), made.info.null.shuffled) == (20, ())
    plan = sf.Plan.load(sf.Plan([made]).save(tmp_path))
    wanted, unwanted = (likely(plan, tail) - likely(None, tail) for tail in (" zq", " kk"))
    assert wanted > least
    assert wanted - unwanted > 1.0
    again = sf.fit_vector(model, Letters(), examples, LAYER, goal, steps=30, lr=0.05)
    assert torch.equal(again.vector, made.vector)


def test_reft_r1_keeps_length_one_and_steers_by_its_largest_activation() -> None:
    model = build("llama")
    made = sf.fit_vector(model, Letters(), LESSONS[:9], LAYER, sf.ReFTr1(top=2), steps=5)
    assert float(made.vector.norm()) == pytest.approx(1.0, abs=1e-5)
    texts = [a + b for a, b in LESSONS[:9]]
    read = [sf.collect(model, Letters(), [text], LAYER, position="all", progress=False)[LAYER] for text in texts]
    largest = max(float(torch.relu(rows[1:] @ made.vector).max()) for rows in read)
    assert made.strength == pytest.approx(largest, rel=1e-4)
    assert made.info.null is None  # nine examples: none is held out
    assert math.isnan(made.info.nats)


def test_reft_r1_does_not_read_the_first_token_of_a_text() -> None:
    """Its norm is a hundred times that of the others in many models: a vector that it alone activates is active nowhere."""
    model, goal = build("llama"), sf.ReFTr1(top=2)
    pupil = Pupil("t", model, LAYER)
    rows = sf.collect(model, Letters(), ["a tells"], LAYER, position="all", progress=False)[LAYER]
    ids = tuple(Letters()("a tells")["input_ids"])
    lesson = Lesson(ids[:2], ids[2:])
    away = torch.linalg.lstsq(rows, torch.tensor([1.0, *[-1.0] * (len(rows) - 1)])).solution
    assert (torch.relu(rows @ away) > 0.5).tolist() == [True, *[False] * (len(rows) - 1)]
    with pupil.taught():
        assert goal.strength(pupil, rows[2] / rows[2].norm(), [lesson]) == pytest.approx(
            float((rows[1:] @ rows[2]).max() / rows[2].norm()), rel=1e-4
        )
        assert goal.strength(pupil, away, [lesson]) == 0.0


def test_reft_r1_that_comes_to_be_active_nowhere_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    strength, seen = sf.ReFTr1.strength, []

    def dies(times: int) -> Callable[..., float]:
        def once(self: Any, pupil: Any, w: Tensor, lessons: Any) -> float:
            seen.append(w.clone())
            return 0.0 if len(seen) <= times else strength(self, pupil, w, lessons)

        return once

    monkeypatch.setattr(sf.ReFTr1, "strength", dies(2))
    made = sf.fit_vector(build("llama"), Letters(), LESSONS[:9], LAYER, sf.ReFTr1(top=2), steps=5)
    assert len(seen) == 3
    assert torch.equal(made.vector, seen[2])
    assert not torch.allclose(seen[0], seen[1])
    seen.clear()
    monkeypatch.setattr(sf.ReFTr1, "strength", dies(99))
    with pytest.raises(
        ValueError, match="fit_vector: from 8 starts the vector came to be active on no token of the examples"
    ):
        sf.fit_vector(build("llama"), Letters(), LESSONS[:9], LAYER, sf.ReFTr1(top=2), steps=5)
    assert len(seen) == 8


@pytest.mark.parametrize("fit", [sf.fit_vector, sf.fit_loreft])
def test_what_does_not_carry_over_is_said(fit: Any) -> None:
    # the examples that are held out, every fifth, want what the others make unlikely
    examples = [(head, " kk" if i % 5 == 0 else " zq") for i, (head, _) in enumerate(LESSONS)]
    with pytest.warns(RuntimeWarning, match=rf"{fit.__name__}: held-out continuations became no likelier \(-"):
        made = fit(build("llama"), Letters(), examples, LAYER, steps=20, lr=0.05)
    assert made.info.nats < 0


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"examples": LESSONS, "objective": sf.RePS()},
            TypeError,
            r"expected \(prompt, wanted, unwanted\), three strings",
        ),
        ({"examples": CONTRASTS}, TypeError, r"expected \(prompt, continuation\), two strings"),
        ({"examples": [("a", "")]}, ValueError, "a text without tokens"),
        ({"examples": []}, ValueError, r"examples is \[\]"),
        ({"layer": 3}, ValueError, "layer 3 is out of range"),
        ({"lr": 0.0}, ValueError, "lr is 0.0"),
        ({"steps": 0}, ValueError, "steps must be a positive integer"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"examples": LESSONS, "layer": LAYER, **change}
    with pytest.raises(error, match=words):
        sf.fit_vector(build("llama"), Letters(), **given)


def test_bad_objectives_are_named() -> None:
    with pytest.raises(ValueError, match="RePS: factors"):
        sf.RePS(())
    with pytest.raises(ValueError, match="ReFTr1: top"):
        sf.ReFTr1(top=0)
