"""Rows of several places of a model on packed texts, shard by shard: for a cache, and for training while the model runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import whole_number
from steerfast.models.collect import read_batch
from steerfast.models.layers import evaluating, find_layers
from steerfast.models.points import Point
from steerfast.place import Place

from .contexts import Contexts

SHARD_TOKENS = 32768
_FORWARD_TOKENS = 2048
_NUMBERS = 16  # of each weight that tell a model from others


class PlaceReader:
    """Packed texts, and the points of a model that are read on them, by shards.

    Args:
        owner: The public function that reads, for its messages.
        model: A `transformers` causal language model.
        places: (site, layer) each.

    Attributes:
        name: Class name of the model.
        weights: See `weights_digest`.
        points: Place -> what is read there.
        texts, per_shard: After `pack`: the contexts, and how many are in a shard.

    Raises:
        TypeError, ValueError: no place, no such place, or one named twice.
    """

    def __init__(self, owner: str, model: nn.Module, places: list[tuple[str, int]]) -> None:
        found = find_layers(model, owner)
        self.owner, self.name, self.points = owner, found.name, dict[Place, Point]()
        for place in places:
            if not isinstance(place, tuple | list) or len(place) != 2:
                raise TypeError(f"{owner}: place must be (site, layer), got {place!r}")
            layer = found.resolve(whole_number(owner, "layer", place[1]), owner)
            point = found.point(layer, place[0], owner)
            if Place(place[0], layer) in self.points:
                raise ValueError(f"{owner}: {place[0]} of layer {layer} is named twice; name each place once")
            self.points[Place(place[0], layer)] = point
        if not self.points:
            raise ValueError(f"{owner}: no place is named; give (site, layer), one or more")
        self.model = getattr(model, "_orig_mod", model)
        self.weights = weights_digest(self.model)

    def pack(self, tokenizer: Any, texts: Iterable[str], length: int, directory: Path | None = None) -> None:
        """Take in the texts."""
        self.texts = Contexts(tokenizer, texts, length, directory)
        self.per_shard = max(1, SHARD_TOKENS // length)

    def counts(self) -> tuple[int, ...]:
        """Rows of each shard."""
        return tuple(len(self.shard(number)[1]) for number in range(-(-len(self.texts) // self.per_shard)))

    def shard(self, number: int) -> tuple[Tensor, Tensor]:
        """Tokens, and the positions that are read."""
        tokens = self.texts[number * self.per_shard : (number + 1) * self.per_shard]
        return tokens, self.texts.real(tokens).flatten().nonzero().flatten().to(torch.int32)

    def read(self, number: int, places: Iterable[Place]) -> dict[Place, Tensor]:
        """The rows of a shard at some places, float32, by one forward after another; each stops after the last layer.

        Raises:
            ValueError: they are NaN or Inf.
        """
        tokens, positions = self.shard(number)
        points = {place: self.points[place] for place in places}
        rows: dict[Place, list[Tensor]] = {place: [] for place in points}
        with evaluating(self.model):
            for batch in tokens.split(max(1, _FORWARD_TOKENS // self.texts.length)):
                for place, part in read_batch(self.model, points, batch.tolist(), "all").items():
                    rows[place] += part
        kept = {place: torch.cat(rows.pop(place))[positions] for place in points}
        for place, some in kept.items():
            self._check(some, number, place)
        return kept

    def _check(self, rows: Tensor, number: int, place: Place) -> None:
        if not bool(rows.isfinite().all()):
            where = int((~rows.isfinite()).any(1).nonzero()[0])
            dtype = next(self.model.parameters()).dtype
            at = f" at {place}" if len(self.points) > 1 else ""
            raise ValueError(
                f"{self.owner}: row {where} of shard {number}{at} is NaN or Inf; check the model ({dtype}) or load it in float32"
            )


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of some numbers of every weight, which tells models of one class apart; "" where they are not all at hand.

    The same weights have the same digest in every dtype that holds them exactly and on every device.
    """
    seen = hashlib.sha256()
    for weight in model.parameters():
        # offloaded, or divided over devices
        if weight.is_meta or not weight.numel() or type(weight.data) is not Tensor:
            return ""
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // _NUMBERS)][:_NUMBERS].double().cpu()
        seen.update(some.numpy().tobytes())
    return seen.hexdigest()
