"""The two sides of activations that an intervention is fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from steerfast.barriers.data import Data
from steerfast.directions.direction import ROUNDING


@dataclass(frozen=True)
class Sides:
    """Checked activations of both sides at one place.

    Attributes:
        data: Both sides: rows in float32, positives first, with their groups and origin.
        layers: Layer -> both sides there, of all layers that were given: the same rows in the same order.
    """

    data: Data
    layers: Mapping[Any, Data]

    @property
    def owner(self) -> str:
        """Who fits, as messages name it."""
        return self.data.owner

    @property
    def positive(self) -> Tensor:
        """Rows with the property, float64 (n, d)."""
        return self.data.x[self.data.labels].double()

    @property
    def negative(self) -> Tensor:
        """Rows without it, float64 (m, d)."""
        return self.data.x[~self.data.labels].double()

    @property
    def difference(self) -> Tensor:
        """mean(positive) − mean(negative), float64 (d,).

        Raises:
            ValueError: the means do not differ.
        """
        return mean_difference(self.data)

    def take(self, index: Tensor) -> Sides:
        """Some of the rows, in every layer."""
        return replace(
            self, data=self.data.take(index), layers={key: data.take(index) for key, data in self.layers.items()}
        )


def mean_difference(data: Data) -> Tensor:
    """mean(positive) − mean(negative) of one layer, float64 (d,).

    Raises:
        ValueError: the means do not differ.
    """
    x = data.x.double()
    found = x[data.labels].mean(0) - x[~data.labels].mean(0)
    typical = float(x.norm(dim=1).median())
    if not float(found.norm()) > ROUNDING * typical:
        raise ValueError(
            f"{data.owner}: the means of pos and neg do not differ (by {float(found.norm()):.3g} at a typical norm of "
            f"{typical:.3g}); check the texts and position"
        )
    return found
