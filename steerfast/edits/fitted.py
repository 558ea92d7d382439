"""How an intervention or a condition was fitted, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from steerfast._null import Null


@dataclass(frozen=True)
class FitInfo:
    """How `sf.fit` made an intervention, and what it does to rows that were held out.

    Attributes:
        method: Name of the estimator.
        closed: Share of the squared distance between the means of the two held-out sides that the edit closes: 1 if edited
            negative rows end at the positive mean, 0 if they come no nearer, negative if they move away. A removal edits both
            sides. The scatter of few held-out rows stays, so with few rows even the best edit closes less. NaN if nothing was
            held out.
        dose: Mean ‖x' − x‖/‖x‖ of the held-out rows that were edited; NaN if nothing was held out.
        positives, negatives: Rows of each side; of what was trained on texts, those that it was trained on.
        groups: Groups of rows, each held out as a whole.
        nats: Of what was trained on texts: by how many nats a token of held-out continuations became likelier; NaN otherwise.
        null: `closed` beside that of the same method fitted on shuffled labels, and of random directions of the same dose; None:
            nothing was drawn.
    """

    method: str
    closed: float = math.nan
    dose: float = math.nan
    positives: int = 0
    negatives: int = 0
    groups: int = 0
    nats: float = math.nan
    null: Null | None = None

    def numbers(self) -> dict[str, Any]:
        """Its fields, ready for JSON: what is unknown is null."""
        return _known({**asdict(self), "null": None if self.null is None else self.null.numbers()})

    @classmethod
    def restore(cls, numbers: Mapping[str, Any]) -> FitInfo:
        """The inverse of `numbers`."""
        rest = dict(numbers)
        null = rest.pop("null", None)
        return cls(**_measured(rest), null=None if null is None else Null.restore(null))


@dataclass(frozen=True)
class LayerFit:
    """The best condition on one layer.

    Attributes:
        layer: Its number.
        threshold, above: θ, and the side that acts.
        f1: F1 on the rows that it was fitted on.
        held_out_f1: F1 on held-out rows; NaN if nothing was held out.
    """

    layer: int
    threshold: float
    above: bool
    f1: float
    held_out_f1: float = math.nan


@dataclass(frozen=True)
class ConditionInfo:
    """How a condition was fitted, and how good it is.

    Attributes:
        f1: F1 on the rows that it was fitted on.
        held_out_f1: F1 on held-out rows, the layer chosen anew without them; NaN if nothing was held out.
        positives, negatives: Rows of each side.
        groups: Groups of rows, each held out as a whole.
        layers: What was found on each layer.
    """

    f1: float
    held_out_f1: float
    positives: int
    negatives: int
    groups: int
    layers: tuple[LayerFit, ...]

    def numbers(self) -> dict[str, Any]:
        """Its fields, ready for JSON: what is unknown is null."""
        layers = [_known(asdict(one)) for one in self.layers]
        return {**_known(asdict(self)), "layers": layers}

    @classmethod
    def restore(cls, numbers: Mapping[str, Any]) -> ConditionInfo:
        """The inverse of `numbers`."""
        rest = dict(_measured(numbers))
        layers = tuple(LayerFit(**_measured(one)) for one in rest.pop("layers"))
        return cls(**rest, layers=layers)


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value != value else value for name, value in fields.items()}


def _measured(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in fields.items()}
