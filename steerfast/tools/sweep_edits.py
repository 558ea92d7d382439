"""The edits that a sweep tries: every method and layer fitted once, and fitted again on shuffled labels for the null."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast.barriers.barrier import Barrier
from steerfast.barriers.fit import fit_barrier
from steerfast.directions import extract
from steerfast.directions.fit import ESTIMATORS, prepare, settings_of
from steerfast.directions.trained import TRAINED
from steerfast.edits.base import Intervention
from steerfast.edits.flow import Flow
from steerfast.edits.linear import Add
from steerfast.models.collect import Activations
from steerfast.place import Place, typical_norm_of
from steerfast.plan import Plan

from .sweep_lessons import Teacher
from .sweep_scores import Dose, typical_change

METHODS = (*extract.METHODS, *ESTIMATORS, *TRAINED)
"""Methods of extraction, whose vector is added, those of `sf.fit`, and those that are trained on the model."""
UNITS = ("stream", "vector")
SEVERAL_LAYERS = ("rotate",)  # of which one is edited


@dataclass(frozen=True)
class Swept:
    """An edit as it was fitted at one place, and what its strengths mean there.

    Attributes:
        edit: The edit at factor 1; of a flow its barrier.
        place: Where it stands.
        typical: Typical norm of the stream there.
        rows: Negative rows (m, d), on which the length of a change is measured.
        unit: Of the strengths, one of `UNITS`.
    """

    edit: Intervention | Barrier
    place: Place
    typical: float
    rows: Tensor
    unit: str

    def factor(self, strength: float) -> float:
        """What the edit is multiplied by, the strength itself if it moves no row; of a flow its angle, or its length."""
        if isinstance(self.edit, Barrier) or self.unit == "vector":
            return strength
        one = self.length(1.0)
        return strength * self.typical / one if one else strength

    def length(self, factor: float) -> float:
        """Median ‖δ‖ at a factor, of the rows that are moved; of an addition ‖c·v‖."""
        if isinstance(self.edit, Barrier):
            return abs(factor) * (self.typical if self.unit == "stream" else 1.0)
        if isinstance(self.edit, Add):
            return abs(factor * self.edit.strength) * float(self.edit.tensors()["vector"].norm())
        return typical_change(self.rows, self.edit.apply(self.rows, factor))

    def dose(self, strength: float) -> Dose:
        """The plan of a cell; a flow down a barrier is one up its negative."""
        factor = self.factor(strength)
        if strength == 0.0:
            return Dose()
        if not isinstance(self.edit, Barrier):
            return Dose(Plan({self.place: self.edit}), factor)
        h = self.edit if strength > 0 else -self.edit
        return Dose(Plan({self.place: Flow(h, angle=1.0) if self.unit == "stream" else Flow(h, T=1.0)}), abs(factor))


class Trial:
    """What edits are fitted on: a model's activations of two sides of texts, collected once, when they are first needed."""

    def __init__(
        self, read: Callable[[], tuple[Activations, Activations]], teach: Teacher, site: str, unit: str, sae: Any = None
    ) -> None:
        self.read, self.teach, self.site, self.unit, self.sae = read, teach, site, unit, sae
        self._fitted: dict[tuple[str, int], Swept] = {}

    @functools.cached_property
    def sides(self) -> tuple[Activations, Activations]:
        """Positive and negative, of all layers that are tried."""
        return self.read()

    def fit(self, method: str, layer: int, generator: torch.Generator | None = None) -> Swept:
        """The edit of a method at a layer; with a generator: a draw on shuffled labels."""
        if generator is None and (method, layer) in self._fitted:
            return self._fitted[method, layer]
        pos, neg = (side[layer] for side in self.sides)
        typical = typical_norm_of(torch.cat([pos, neg]))
        found = Swept(self._edit(method, layer, generator), Place(self.site, layer), typical, neg, self.unit)
        if generator is None:
            self._fitted[method, layer] = found
        return found

    def _edit(self, method: str, layer: int, generator: torch.Generator | None) -> Intervention | Barrier:
        if method in TRAINED:
            return self.teach(method, layer, generator)
        if method in extract.METHODS or method == "flow":
            pos, neg = (side[layer] for side in self.sides)
            if generator is not None:
                pool = torch.cat([pos, neg])
                pool = pool[torch.randperm(len(pool), generator=generator, device="cpu")]
                pos, neg = pool[: len(pos)], pool[len(pos) :]
            return fit_barrier(pos, neg, "quadratic") if method == "flow" else Add(getattr(extract, method)(pos, neg))
        several = method in SEVERAL_LAYERS
        positive, negative = (side if several else side.only(layer) for side in self.sides)
        given = {"sae": self.sae} if "sae" in settings_of(method) else {}
        make, sides = prepare(method, positive, negative, layer=layer, settings=given)
        return make(sides if generator is None else sides.shuffled(generator))


def control(swept: Swept, length: float, generator: torch.Generator) -> Dose:
    """A random direction of a length, at the same place."""
    drawn = torch.randn(swept.rows.shape[1], generator=generator, device="cpu", dtype=torch.float32)
    return Dose(Plan({swept.place: Add(drawn / drawn.norm())}), length)
