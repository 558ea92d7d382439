"""Rows of several places side by side: for a transcoder, and for several SAEs on one forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import whole_number
from steerfast.sae.cache import info_of
from steerfast.sae.place_reader import PlaceReader

from .rows import Rows, as_rows, origin_of, read_ahead


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
    """Activations of several places from one forward, computed when they are read; see `ActivationStream`.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        texts: Strings.
        places: (site, layer) each, such as ("resid_post", 8).
        context: Tokens of a context, beginning-of-text included.

    Raises:
        TypeError, ValueError: no place, no such place, or one named twice; too few texts for one context.

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
        self._reader = PlaceReader("PlacesStream", model, list(places))
        self._reader.pack(tokenizer, texts, whole_number("PlacesStream", "context", context))
        self.infos = tuple(info_of(self._reader, place, "float32") for place in self._reader.points)
        self.counts = self._reader.counts()
        self.widths = tuple(info.d for info in self.infos)
        self.origins = tuple(info.origin for info in self.infos)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the rows."""
        return {"places": [asdict(info) for info in self.infos]}

    def read(self, shard: int) -> Tensor:
        """The activations of one shard, float32 (rows, Σ d), place by place. The forward stops after the last layer.

        Raises:
            ValueError: they are NaN or Inf.
        """
        return torch.cat(list(self._reader.read(shard, self._reader.points).values()), dim=1)
