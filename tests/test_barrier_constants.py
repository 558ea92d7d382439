"""Constants of a barrier by the effect of its flow at equal damage."""

from __future__ import annotations

import math

import pytest
from families import build
from test_sweeping import MORE, QUESTION, Letters, one_by_one

import steerfast as sf
from steerfast.tools.barrier_constants import ANGLES, KERNELS, effect_at, fit_steering_barrier


def test_the_effect_at_a_damage_is_on_the_line_between_two_angles() -> None:
    assert effect_at([(1.0, 0.05), (3.0, 0.15)], 0.1) == pytest.approx(2.0)
    assert effect_at([(1.0, 0.2)], 0.1) == pytest.approx(0.5)
    assert effect_at([(1.0, 0.01), (0.5, 0.02)], 0.1) == 1.0
    assert effect_at([(1.0, -0.1), (2.0, 0.1)], 0.1) == 2.0


def test_the_candidate_of_most_effect_is_taken() -> None:
    model, kernels = build("llama"), ((0.1, 1.0), (1.0, 0.1))
    pos, neg = (sf.collect(model, Letters(), side, [1], progress=False) for side in MORE)
    made = fit_steering_barrier(model, Letters(), pos, neg, QUESTION, kernels, 1.3)
    plain, figures = one_by_one(None), []
    for kernel in kernels:
        h = sf.fit_barrier(pos, neg, "quadratic", kernel=kernel)
        found = [one_by_one({1: sf.Flow(h, angle=angle)}) for angle in ANGLES]
        figures.append(effect_at([(e - plain[0], math.log(p / plain[1])) for e, p in found], math.log(1.3)))
        assert found[0][1] < 1.3 * plain[1]  # no half of the least angle is needed
    best = max(range(2), key=lambda i: figures[i])
    assert (made.info.settings["gamma"], made.info.settings["coef0"]) == kernels[best]
    assert made.info.settings["effect"] == pytest.approx(figures[best], abs=1e-3)
    assert made.origin.place == ("resid_post", 1)


def test_a_curve_begins_below_the_damage_that_it_is_read_at() -> None:
    """A line from nothing to an angle that breaks the model says little of the effect at a small damage."""
    model, kernel, damage = build("llama"), (0.1, 1.0), 1.01
    pos, neg = (sf.collect(model, Letters(), side, [1], progress=False) for side in MORE)
    plain, h = one_by_one(None), sf.fit_barrier(pos, neg, "quadratic", kernel=kernel)
    least, curve = 2 * ANGLES[0], []
    while not curve or curve[0][1] >= math.log(damage):
        least /= 2
        effect, perplexity = one_by_one({1: sf.Flow(h, angle=least)})
        curve.insert(0, (effect - plain[0], math.log(perplexity / plain[1])))
    assert least < ANGLES[0]
    made = fit_steering_barrier(model, Letters(), pos, neg, QUESTION, [kernel], damage)
    assert made.info.settings["effect"] == pytest.approx(effect_at(curve, math.log(damage)), abs=1e-3)


def test_the_default_barrier_is_a_candidate() -> None:
    assert KERNELS[0] == "steer"
    model = build("llama")
    pos, neg = (sf.collect(model, Letters(), side, [1], progress=False) for side in MORE)
    assert fit_steering_barrier(model, Letters(), pos, neg, QUESTION, KERNELS[:1]).raw


def test_bad_input_is_named() -> None:
    model = build("llama")
    pos, neg = (sf.collect(model, Letters(), side, [1], progress=False) for side in MORE)
    for given, words in ((((), 1.1), "kernels is empty"), ((((0.1, 1.0),), 1.0), "damage is 1.0; expected a multiple")):
        with pytest.raises(ValueError, match=words):
            fit_steering_barrier(model, Letters(), pos, neg, QUESTION, *given)
    with pytest.raises(ValueError, match="do not say where they were read"):
        fit_steering_barrier(model, Letters(), pos[1], neg[1], QUESTION)
