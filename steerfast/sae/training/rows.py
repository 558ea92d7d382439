"""What a training reads: rows in shards, their order, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from steerfast.place import Origin, Place
from steerfast.sae.cache import ActivationCache, ActivationStream

from .config import TrainConfig

_MIXED_SHARDS = 8  # read and shuffled together


class Rows(Protocol):
    """What can be trained on: rows of activations in shards of known length, such as an `ActivationCache`."""

    @property
    def counts(self) -> Sequence[int]:
        """Rows of each shard."""

    def read(self, shard: int) -> Tensor:
        """The rows of one shard, (rows, d), floating."""


def stream(data: Rows, batch: int, seed: int, step: int) -> Iterator[Tensor]:
    """Batches without end, from number `step` on: the shards in random order, eight at a time read and shuffled together.

    What comes at a step depends on seed and step alone; groups before it are skipped without being read.
    """
    start, row, pieces, held = step * batch, 0, [], 0
    for epoch in count():
        dice = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for group in torch.randperm(len(data.counts), generator=dice).split(_MIXED_SHARDS):
            size = sum(data.counts[shard] for shard in group.tolist())
            order = torch.randperm(size, generator=dice)
            if row + size > start:
                rows = torch.cat([finite(data.read(shard), shard) for shard in group.tolist()])
                order = order[max(0, start - row) :]
                for piece in order.to(rows.device).split(batch):
                    pieces.append(rows[piece])
                    held += len(piece)
                    if held >= batch:
                        joined = torch.cat(pieces)
                        yield joined[:batch]
                        pieces, held = [joined[batch:]], held - batch
            row += size


class Whole:
    """A tensor of rows as a source of one shard."""

    def __init__(self, rows: Tensor) -> None:
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(
                f"train_sae: source has shape {tuple(rows.shape)} and dtype {rows.dtype}; expected floating (n, d)"
            )
        self.rows, self.counts = rows, (len(rows),)

    def read(self, shard: int) -> Tensor:
        """All rows."""
        return self.rows


def finite(rows: Tensor, shard: int) -> Tensor:
    """The rows; NaN or Inf among them is an error that says where."""
    if not bool(rows.isfinite().all()):
        where = int((~rows.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"train_sae: row {where} of shard {shard} holds NaN or Inf; expected finite activations: check what made them"
        )
    return rows


def _digest(rows: Tensor) -> str:
    """A hash of 64 rows spread over all, enough to tell data sets apart."""
    some = rows[:: max(1, len(rows) // 64)][:64].detach().cpu().double().contiguous()
    return hashlib.sha256(some.numpy().tobytes()).hexdigest()


def origin_of(data: Rows) -> Origin:
    """Where the rows come from, as far as their source says."""
    if isinstance(data, (ActivationCache, ActivationStream)):
        info = data.info
        return Origin(info.model, Place(info.site, info.layer))
    return Origin()


def fingerprint_of(config: TrainConfig, data: Rows) -> str:
    """What must be equal for a run to go on: the configuration and the data."""
    if isinstance(data, (ActivationCache, ActivationStream)):
        about = asdict(data.info)
    else:
        about = {"rows": list(data.counts), "sample": [_digest(data.read(shard)) for shard in range(len(data.counts))]}
    return json.dumps({"config": asdict(config), "data": about}, sort_keys=True)
