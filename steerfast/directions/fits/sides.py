"""The two sides of activations that an intervention is fitted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steerfast.barriers.data import Data
from steerfast.directions.direction import ROUNDING
from steerfast.place import typical_norm_of


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

    def shuffled(self, generator: torch.Generator) -> Sides:
        """The same rows on sides that mean nothing: a draw of the null.

        Rows of a group that has both labels (a pair, a prompt with two answers) change sides among themselves; where no group
        has both, whole groups do, so that rows which belong together stay so.
        """
        order = shuffle(self.data, generator)
        moved = {key: _on_sides(data, order) for key, data in self.layers.items()}
        return replace(self, data=_on_sides(self.data, order), layers=moved)

    def take(self, index: Tensor) -> Sides:
        """Some of the rows, in every layer."""
        return replace(
            self, data=self.data.take(index), layers={key: data.take(index) for key, data in self.layers.items()}
        )


def shuffle(data: Data, generator: torch.Generator) -> Tensor:
    """The row that comes to each place, int64 (n,): a permutation that the groups leave exchangeable."""
    groups, labels = data.groups.unique(return_inverse=True)[1], data.labels
    positives = torch.zeros(int(groups.max()) + 1, dtype=torch.int64, device="cpu").index_add_(0, groups, labels.long())
    mixed = bool(((positives > 0) & (positives < groups.bincount())).any())
    # two sorts: by chance, and then by the group, or by the rank that chance gave the group
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    rank = torch.arange(len(positives), device="cpu")
    if not mixed:
        rank = torch.randperm(len(positives), generator=generator, device="cpu")
    drawn = order[rank[groups[order]].argsort(stable=True)]
    if not mixed:
        return drawn
    places = groups.argsort(stable=True)
    return torch.empty_like(drawn).scatter_(0, places, drawn)


def _on_sides(data: Data, order: Tensor) -> Data:
    """The rows in another order on the old sides; their groups come along."""
    return replace(data, x=data.x[order], groups=data.groups[order])


def mean_difference(data: Data) -> Tensor:
    """mean(positive) − mean(negative) of one layer, float64 (d,).

    Raises:
        ValueError: the means do not differ.
    """
    x = data.x.double()
    found = x[data.labels].mean(0) - x[~data.labels].mean(0)
    typical = typical_norm_of(x)
    if not float(found.norm()) > ROUNDING * typical:
        raise ValueError(
            f"{data.owner}: the means of pos and neg do not differ (by {float(found.norm()):.3g} at a typical norm of "
            f"{typical:.3g}); check the texts and position"
        )
    return found
