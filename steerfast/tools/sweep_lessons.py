"""Trained methods in a sweep: the two sides of texts as examples, at one layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from steerfast.directions.fits.lessons import split
from steerfast.directions.fits.natural import Gradients
from steerfast.directions.fits.velocity import natural_field
from steerfast.directions.trained import examples_of, train
from steerfast.edits.base import Intervention
from steerfast.edits.flow import Flow


class Teacher:
    """Trains the methods of `directions.trained` on two sides of texts."""

    def __init__(self, model: nn.Module, reader: Any, sides: Sequence[Sequence[str]]) -> None:
        self.model, self.reader, self.sides = model, reader, sides
        self._gradients: dict[int, Gradients] = {}

    def __call__(self, method: str, layer: int, generator: torch.Generator | None) -> Intervention:
        """The edit at a layer; with a generator: on sides whose texts are exchanged by chance, pair by pair."""
        if method == "velocity":
            return self._flow(layer, generator)
        positive, negative = self.sides if generator is None else self._mixed(generator)
        return train(method, self.model, self.reader, positive, negative, layer)

    def _flow(self, layer: int, generator: torch.Generator | None) -> Flow:
        """Along the field of examples whose gradients are taken once: an exchanged one has its own with the other sign."""
        if layer not in self._gradients:
            examples = examples_of(*self.sides)
            self._gradients[layer] = Gradients.of("sweep", self.model, self.reader, examples, layer)
        known = self._gradients[layer]
        signs = [0.0] * len(known.lessons)
        for i in split(list(range(len(signs))))[0]:  # as `fit_velocity` has it
            signs[i] = 1.0
        if generator is not None:
            swapped = torch.rand(len(signs), generator=generator, device="cpu", dtype=torch.float32) < 0.5
            signs = [-sign if swap else sign for sign, swap in zip(signs, swapped.tolist(), strict=True)]
        with known.pupil.taught():
            field = natural_field(known, signs)[0]
        return Flow(field, T=1.0)

    def _mixed(self, generator: torch.Generator) -> tuple[list[str], list[str]]:
        positive, negative = (list(side) for side in self.sides)
        swapped = (
            torch.rand(min(len(positive), len(negative)), generator=generator, device="cpu", dtype=torch.float32) < 0.5
        )
        for i in swapped.nonzero().flatten().tolist():
            positive[i], negative[i] = negative[i], positive[i]
        return positive, negative
