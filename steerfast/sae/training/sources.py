"""Rows of several places side by side: for a transcoder, and for several SAEs on one forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import whole_number
from steerfast.models.collect import read_batch
from steerfast.models.layers import evaluating, find_layers
from steerfast.place import Origin, Place, place_of
from steerfast.sae.cache import ActivationStream

from .rows import Rows, as_rows, origin_of, read_ahead

_FORWARD_TOKENS = 2048


class SideBySide:
    """Sources of the same rows at several places: row i of one and row i of another belong to the same token.

    Args:
        sources: Tensors (n, d), what `open_rows` returns, `ActivationStream`s or other rows, with shards of the same lengths.

    Raises:
        TypeError, ValueError: one is no source of rows; there is none; their shards have other lengths, or they were collected
            on other texts or from other models.
    """

    def __init__(self, sources: Sequence[Rows | Tensor]) -> None:
        self.sources = tuple(as_rows(source) for source in sources)
        if not self.sources:
            raise ValueError("SideBySide: sources is empty; give one or several")
        self.counts = tuple(self.sources[0].counts)
        for number, source in enumerate(self.sources):
            if tuple(source.counts) != self.counts:
                raise ValueError(
                    f"train_sae: source {number} has shards of {tuple(source.counts)[:4]} rows and source 0 of "
                    f"{self.counts[:4]} (the first ones); expected the same rows: collect both from the same texts"
                )
        for key, what in {"text": "on different texts", "weights": "from models with different weights"}.items():
            infos = (getattr(source, "info", None) for source in self.sources)
            if len({value for info in infos if (value := getattr(info, key, ""))}) > 1:
                raise ValueError(f"train_sae: the sources were collected {what}; collect them together")
        self.widths = tuple(source.read(0).shape[1] for source in self.sources)
        self.origins = tuple(origin_of(source) for source in self.sources)
        self.ahead = min(read_ahead(source) for source in self.sources)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the rows of all sources."""
        return {"sources": [source.fingerprint for source in self.sources]}

    def read(self, shard: int) -> Tensor:
        """The rows of one shard, (rows, Σ d)."""
        return torch.cat([source.read(shard) for source in self.sources], dim=1)


class PlacesStream:
    """Activations of several layers from one forward, computed when they are read; see `ActivationStream`.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        texts: Strings.
        places: (site, layer) each, such as ("resid_post", 8); each of another layer.
        context: Tokens of a context, beginning-of-text included.

    Raises:
        TypeError, ValueError: no such place, or two of one layer; too few texts for one context.

    Example:
        >>> places = [("resid_post", 0), ("resid_post", 1)]
        >>> sf.sae.PlacesStream(model, tokenizer, true_statements, places, context=8).widths
        (576, 576)
    """

    ahead = 0  # the model is the user's own

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        texts: Iterable[str],
        places: Iterable[tuple[str, int]],
        *,
        context: int = 256,
    ) -> None:
        found = find_layers(model, "PlacesStream")
        wanted = [place_of("PlacesStream", place) for place in places]
        if not wanted:
            raise ValueError("PlacesStream: places is empty; give one or several, such as ('resid_post', 8)")
        layers = [found.resolve(place.layer, "PlacesStream") for place in wanted]
        if len(set(layers)) < len(layers):
            raise ValueError(f"PlacesStream: the places are of layers {layers}; expected each of another layer")
        context = whole_number("PlacesStream", "context", context)
        self._first = ActivationStream(model, tokenizer, texts, (wanted[0].site, layers[0]), context=context)
        self._points = {n: found.point(n, p.site, "PlacesStream") for n, p in zip(layers, wanted, strict=True)}
        self._model = getattr(model, "_orig_mod", model)
        self.info, self.counts = self._first.info, self._first.counts
        self.widths = tuple(point.width for point in self._points.values())
        self.origins = tuple(
            Origin(found.name, Place(place.site, layer)) for place, layer in zip(wanted, layers, strict=True)
        )

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the rows."""
        return {**asdict(self.info), "places": [str(origin.place) for origin in self.origins]}

    def read(self, shard: int) -> Tensor:
        """The activations of one shard, float32 (rows, Σ d), place by place. The forward stops after the last layer."""
        tokens, positions = self._first.contexts(shard)
        rows: list[Tensor] = []
        with evaluating(self._model):
            for batch in tokens.split(max(1, _FORWARD_TOKENS // self.info.context)):
                found = read_batch(self._model, self._points, batch.tolist(), "all")
                rows.append(torch.cat([torch.cat(found[layer]) for layer in self._points], dim=1))
        return torch.cat(rows)[positions]
