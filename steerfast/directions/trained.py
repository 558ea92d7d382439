"""Methods that are trained on a model itself, each by one call from two sides of texts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from steerfast._checks import one_of, warn_user
from steerfast.edits.base import Intervention
from steerfast.edits.flow import Flow

from .fits.lineas import LinEAS, fit_lineas
from .fits.loreft import fit_loreft
from .fits.vector import LMObjective, ReFTr1, RePS, fit_vector
from .fits.velocity import fit_velocity

OBJECTIVES: dict[str, Callable[[], Any]] = {"vector": LMObjective, "reft_r1": ReFTr1, "reps": RePS}
TRAINED: dict[str, Callable[..., Any]] = {
    "loreft": fit_loreft, **dict.fromkeys(OBJECTIVES, fit_vector), "lineas": LinEAS, "velocity": fit_velocity,
}  # fmt: skip
"""Method -> what takes its settings. They edit the output of a block, every token; a velocity from the last of the prompt on."""
_GIVEN = ("model", "tokenizer", "examples", "layer", "objective")


def train(
    method: str,
    model: nn.Module,
    tokenizer: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    layer: int,
    **settings: Any,
) -> Intervention:
    """Train an intervention at a block's output, so that a model writes like the positive texts.

    Args:
        method: One of `TRAINED`.
        model: A `transformers` causal language model; its weights stay as they are.
        tokenizer: Its tokenizer.
        positive: Texts with the property.
        negative: Texts without it; but for "lineas" each is the pair of the positive one of its number (`examples_of`).
        layer: Decoder block, 0-based, negative from the end.
        settings: Of `fit_loreft`, `fit_vector`, `LinEAS` or `fit_velocity`.

    Returns:
        The intervention; of "velocity" a `Flow` over a time of 1.

    Raises:
        TypeError, ValueError: an unknown method or setting, no pair of texts, or what the method's own function refuses.
    """
    one_of("train", "method", method, tuple(TRAINED))
    unknown = [name for name in settings if name not in settings_of(method)]
    if unknown:
        raise TypeError(f"train: {method!r} has no setting {unknown[0]!r}; it has {', '.join(settings_of(method))}")
    if method == "lineas":
        ((edit,),) = fit_lineas(
            model, tokenizer, positive, negative, [layer], settings=LinEAS(**settings)
        ).edits.values()
        return edit
    examples = examples_of(positive, negative)
    if method == "velocity":
        return Flow(fit_velocity(model, tokenizer, examples, layer, **settings), T=1.0)
    plain = [one[:2] for one in examples]
    if method == "loreft":
        return fit_loreft(model, tokenizer, plain, layer, **settings)
    goal = OBJECTIVES[method]()
    return fit_vector(model, tokenizer, examples if goal.contrast else plain, layer, goal, **settings)


def settings_of(method: str) -> tuple[str, ...]:
    """The names of a method's settings."""
    return tuple(name for name in inspect.signature(TRAINED[method]).parameters if name not in _GIVEN)


def examples_of(positive: Sequence[str], negative: Sequence[str]) -> list[tuple[str, str, str]]:
    """(prompt, wanted, unwanted) of texts that are paired row by row.

    The prompt is the words that both begin with, or else the first word of the positive text; the continuations are what
    follows. Pairs without a continuation on either side are left out, with a warning.

    Raises:
        ValueError: not as many of one side as of the other, or no pair is left.
    """
    if len(positive) != len(negative):
        raise ValueError(
            f"train: {len(positive)} positive and {len(negative)} negative texts; they are read in pairs, one of each side at a "
            "time: give as many of both"
        )
    found = []
    for mine, other in zip(positive, negative, strict=True):
        words, against = mine.split(" "), other.split(" ")
        alike = 0
        while alike < min(len(words), len(against)) and words[alike] == against[alike]:
            alike += 1
        start = max(alike, 1)
        wanted, unwanted = ("".join(f" {word}" for word in side[start:]) for side in (words, against))
        if wanted.strip() and unwanted.strip() and words[0]:
            found.append((" ".join(words[:start]), wanted, unwanted))
    if not found:
        raise ValueError(
            f"train: no pair of texts has a continuation on either side, as {positive[0]!r} and {negative[0]!r}; give texts of "
            "two words at least that differ, in pairs with the same beginning"
            if positive
            else "train: no texts; give one of each side at least"
        )
    if len(found) < len(positive):
        gone = len(positive) - len(found)
        warn_user(f"train: of {len(positive)} pairs of texts {gone} have no continuation on a side, and are left out")
    return found
