"""Gradients of a reconstruction from a few latents, without a dense product behind the encoder.

Only some of F latents have a gradient in a row. A product with the (n, F) matrix of latents is a sum over bags: of decoder rows
per row of the batch, and of the batch's rows per feature. `embedding_bag` sums Σ weight·row in a fixed order without an (n, k, d)
tensor. What belongs to a feature is made for a block of features at a time, so that the gradients never exist at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .distributed import Alone
from .selection import Latents, dots


@dataclass(frozen=True)
class Pulled:
    """What the loss asks of a batch.

    Attributes:
        error: x̂ - x of all features, (n, d).
        pulls: By prefix, ∂loss/∂x̂ that its features feel, (n, d): of this prefix and all longer ones.
        values: ∂loss/∂f of each latent, (m,).
    """

    error: Tensor
    pulls: tuple[Tensor, ...]
    values: Tensor


def pulled(latents: Latents, target: Tensor, w_dec: Tensor, ends: Sequence[int], rows: int, split: Alone) -> Pulled:
    """Derivatives of Σ over prefixes of ‖W_decᵀf - target‖²/rows; `ends` are those of the features of this process."""
    parts = [latents.within(*part) for part in _prefixes(ends)] if len(ends) > 1 else [latents]
    errors: list[Tensor] = []
    for part in parts:
        out = split.sum_over_features(_decoded(part, w_dec))
        errors.append(out.sub_(target) if not errors else out.add_(errors[-1]))
    pulls: list[Tensor] = []
    for error in reversed(errors):
        pull = error * (2 / rows)
        pulls.insert(0, pull.add_(pulls[0]) if pulls else pull)
    if len(parts) == 1:
        return Pulled(errors[-1], tuple(pulls), dots(latents.starts, latents.features, w_dec, pulls[0]))
    values = torch.zeros_like(latents.values)
    for (first, last), part, pull in zip(_prefixes(ends), parts, pulls, strict=True):
        inside = (latents.features >= first) & (latents.features < last)
        values[inside] = dots(part.starts, part.features, w_dec, pull)
    return Pulled(errors[-1], tuple(pulls), values)


class ByFeature:
    """Latents sorted by their feature: sums Σ weight·row over the rows of each feature, a block of features at a time."""

    def __init__(self, latents: Latents, features: int) -> None:
        self._order = latents.features.argsort(stable=True)
        self._rows = latents.rows[self._order]
        self._ends = torch.bincount(latents.features, minlength=features).cumsum(0)

    def order(self, weights: Tensor) -> Tensor:
        """Weights of the latents, in the order of `sums`."""
        return weights[self._order]

    def sums(self, ordered: Tensor, of: Tensor, first: int, last: int) -> Tensor:
        """Of the features first to last, exclusive: (last - first, d); `of` are the rows of the batch, (n, d)."""
        begin = int(self._ends[first - 1]) if first else 0
        ends = self._ends[first:last]
        part = slice(begin, int(ends[-1]))
        starts = torch.cat([ends.new_full((1,), begin), ends[:-1]]) - begin
        return embedding_bag(self._rows[part], of, starts, per_sample_weights=ordered[part], mode="sum")


def blocks(ends: Sequence[int], width: int) -> Iterator[tuple[int, int, int]]:
    """(prefix, first, last) of blocks of features that stay inside a part between two prefixes."""
    size = max(1, _ELEMENTS // width)
    for number, (first, last) in enumerate(_prefixes(ends)):
        for start in range(first, last, size):
            yield number, start, min(start + size, last)


_ELEMENTS = 1 << 20  # of a block of gradients: 4 MB


def _prefixes(ends: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip((0, *ends[:-1]), ends, strict=True))


def _decoded(latents: Latents, w_dec: Tensor) -> Tensor:
    """Σ f·W_dec by row, (n, d)."""
    return embedding_bag(latents.features, w_dec, latents.starts, per_sample_weights=latents.values, mode="sum")
