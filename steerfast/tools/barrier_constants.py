"""Constants of a quadratic barrier by what its flow does to a model: the most effect at equal damage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from steerfast._checks import finite_number, positive_integer
from steerfast.barriers.barrier import Barrier
from steerfast.barriers.fit import PUBLISHED, fit_barrier
from steerfast.edits.flow import Flow
from steerfast.models.collect import Activations
from steerfast.models.layers import evaluating
from steerfast.models.texts import TextReader
from steerfast.plan import Plan

from .sweep_scores import Dose, Question, measure, sequences_of

KERNELS: tuple[Any, ...] = ("steer", PUBLISHED, "likelihood", (1.0, 1.0), (1.0, 0.1), (0.1, 0.1))
ANGLES = (0.1, 0.2, 0.4, 0.8)
HALVES = 8
"""How often the least angle is halved, at most, until it does less than the damage that effects are read at."""


def fit_steering_barrier(
    model: nn.Module,
    tokenizer: Any,
    positive: Activations,
    negative: Activations,
    question: Question,
    kernels: Sequence[Any] = KERNELS,
    damage: float = 1.1,
    batch_size: int = 16,
) -> Barrier:
    """Fit a quadratic barrier with the constants whose flow has the most effect at equal damage, on prompts of their own.

    Each candidate's flow is measured at angles of 0.1 to 0.8 rad, steered at all tokens, and at halves of 0.1 until the
    least does less damage than asked for. Its figure is the change of effect where the perplexity of the neutral texts has
    grown to `damage` times the unsteered one, between two angles in a straight line over the logarithm; of a flow that does
    less damage everywhere, the largest change of effect.

    Args:
        model: A transformers causal language model, not steered.
        tokenizer: Its tokenizer.
        positive: Activations with the property at one layer, such as `sf.collect` returns.
        negative: Activations without it.
        question: What is measured, as of `sf.sweep`; its prompts are none that the activations come from.
        kernels: Candidates, each what `fit_barrier` takes as `kernel`: its default "steer" is raw, a pair is on the sphere.
        damage: Perplexity in multiples of the unsteered one, above 1.
        batch_size: Texts per forward.

    Returns:
        The `Barrier`; its `info.settings` hold the constants and `effect`, its figure in nats.

    Raises:
        TypeError, ValueError: no candidates, a damage of at most 1, no place known, and what `fit_barrier` refuses.

    Example:
        >>> question = sf.tools.Question(("I think people are",), (" kind",), (" cruel",))
        >>> h = sf.tools.fit_steering_barrier(model, tokenizer, pos, neg, question)  # doctest: +SKIP
    """
    owner = "fit_steering_barrier"
    batch_size = positive_integer(owner, "batch_size", batch_size)
    if finite_number(owner, "damage", damage) <= 1:
        raise ValueError(f"{owner}: damage is {damage}; expected a multiple of the unsteered perplexity, above 1")
    if not kernels:
        raise ValueError(f"{owner}: kernels is empty; give candidates, such as (0.1, 1.0)")
    barriers = [fit_barrier(positive, negative, "quadratic", kernel=kernel) for kernel in kernels]
    place = barriers[0].origin.place
    if place is None:
        raise ValueError(f"{owner}: the activations do not say where they were read; collect them with sf.collect")
    sequences = sequences_of(model, TextReader.of(tokenizer, owner), question)
    most, plain = math.log(damage), (0.0, 1.0)

    def curve(angles: Sequence[float]) -> list[list[tuple[float, float]]]:
        """Change of effect and of the logarithm of perplexity under the flow of each candidate, by angle."""
        flows = [Dose(Plan({place: Flow(h, angle=angle)})) for h in barriers for angle in angles]
        found = [
            (effect - plain[0], math.log(perplexity / plain[1]))
            for effect, perplexity in measure(model, sequences, question, flows, batch_size)
        ]
        return [found[i : i + len(angles)] for i in range(0, len(found), len(angles))]

    with evaluating(model):
        (plain,) = measure(model, sequences, question, [Dose()], batch_size)
        curves = curve(ANGLES)
        for half in range(1, HALVES + 1):
            if all(one[0][1] < most for one in curves):
                break
            curves = [[*below, *one] for below, one in zip(curve([ANGLES[0] / 2**half]), curves, strict=True)]
    figures = [effect_at(one, most) for one in curves]
    best = max(range(len(figures)), key=lambda i: figures[i])
    info = barriers[best].info
    return replace(barriers[best], info=replace(info, settings={**info.settings, "effect": figures[best]}))


def effect_at(curve: Sequence[tuple[float, float]], damage: float) -> float:
    """The effect where a curve of (effect, damage), from nothing on, first reaches a damage; else its largest effect."""
    before = (0.0, 0.0)
    for effect, harm in curve:
        if harm >= damage:
            share = (damage - before[1]) / (harm - before[1])
            return before[0] + share * (effect - before[0])
        before = (effect, harm)
    return max(effect for effect, _ in curve)
