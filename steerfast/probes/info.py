"""How a probe was fitted, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ProbeInfo:
    """How a probe was fitted, and how good it is on rows that were held out.

    Attributes:
        accuracy: Share of held-out rows on the right side of p = 1/2; NaN if nothing was held out.
        auroc: Area under the ROC curve of the held-out rows: the chance that a positive one scores above a negative one.
        log_likelihood: Mean log-likelihood per held-out row.
        positives, negatives: Rows of each side.
        groups: Groups of rows, each held out as a whole.
        separable: Whether the fitted rows all lie on their own side: the size of w is then set by C alone.
        C: Inverse strength of the penalty, given or chosen.
        best_layer: Of layers that were fitted in one call the one with the best held-out log-likelihood; None: there was one.
    """

    accuracy: float = math.nan
    auroc: float = math.nan
    log_likelihood: float = math.nan
    positives: int = 0
    negatives: int = 0
    groups: int = 0
    separable: bool = False
    C: float = math.nan
    best_layer: int | None = None

    def numbers(self) -> dict[str, Any]:
        """Its fields, ready for JSON: what is unknown is null."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}

    @classmethod
    def restore(cls, numbers: Mapping[str, Any]) -> ProbeInfo:
        """The inverse of `numbers`."""
        unknown = {f.name for f in fields(cls) if isinstance(f.default, float)}
        known: dict[str, Any] = {k: math.nan if v is None and k in unknown else v for k, v in numbers.items()}
        return cls(**known)
