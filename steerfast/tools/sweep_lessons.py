"""Trained methods in a sweep: the two sides of texts as examples, at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steerfast.directions.fits.lineas import fit_lineas
from steerfast.directions.fits.loreft import fit_loreft
from steerfast.directions.fits.vector import LMObjective, ReFTr1, RePS, fit_vector
from steerfast.edits.base import Intervention

OBJECTIVES = {"vector": LMObjective, "reft_r1": ReFTr1, "reps": RePS}
TRAINED = ("loreft", *OBJECTIVES, "lineas")
"""Methods that are trained on the model itself, at resid_post."""


def examples_of(positive: Sequence[str], negative: Sequence[str]) -> list[tuple[str, str, str]]:
    """(prompt, wanted, unwanted) of texts that are paired row by row.

    The prompt is the words that both begin with, or else the first word of the positive text; the continuations are what
    follows. Pairs without a continuation on either side are left out.

    Raises:
        ValueError: none is left.
    """
    found = []
    for mine, other in zip(positive, negative, strict=False):
        words, against = mine.split(" "), other.split(" ")
        alike = 0
        while alike < min(len(words), len(against)) and words[alike] == against[alike]:
            alike += 1
        start = max(alike, 1)
        wanted, unwanted = ("".join(f" {word}" for word in side[start:]) for side in (words, against))
        if wanted.strip() and unwanted.strip() and words[0]:
            found.append((" ".join(words[:start]), wanted, unwanted))
    if not found:
        raise ValueError("sweep: a trained method needs texts of two words at least, in pairs with the same beginning")
    return found


class Teacher:
    """Trains the methods of `TRAINED` on two sides of texts."""

    def __init__(self, model: nn.Module, reader: Any, sides: Sequence[Sequence[str]]) -> None:
        self.model, self.reader, self.sides = model, reader, sides

    def __call__(self, method: str, layer: int, generator: torch.Generator | None) -> Intervention:
        """The edit at a layer; with a generator: on sides whose texts are exchanged by chance, pair by pair."""
        positive, negative = self.sides if generator is None else self._mixed(generator)
        if method == "lineas":
            ((edit,),) = fit_lineas(self.model, self.reader, positive, negative, [layer]).edits.values()
            return edit
        examples = examples_of(positive, negative)
        plain = [one[:2] for one in examples]
        if method == "loreft":
            return fit_loreft(self.model, self.reader, plain, layer)
        goal: Any = OBJECTIVES[method]()
        return fit_vector(self.model, self.reader, examples if goal.contrast else plain, layer, goal)

    def _mixed(self, generator: torch.Generator) -> tuple[list[str], list[str]]:
        positive, negative = (list(side) for side in self.sides)
        swapped = torch.rand(min(len(positive), len(negative)), generator=generator, device="cpu") < 0.5
        for i in swapped.nonzero().flatten().tolist():
            positive[i], negative[i] = negative[i], positive[i]
        return positive, negative
