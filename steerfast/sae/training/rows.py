"""What a training reads: rows in shards, their order, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count, islice
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfast.place import Origin

from .config import TrainConfig

_MIXED_SHARDS = 8  # read and shuffled together
_AHEAD = 2  # shards that a thread reads while the ones before them are trained on


class Rows(Protocol):
    """What can be trained on: rows of activations in shards of known length, such as an `ActivationCache`.

    A source may also have an `origin`, an `Origin`, and `ahead`, how many shards may be read in another thread before they are
    needed (2 where it does not say).
    """

    @property
    def counts(self) -> Sequence[int]:
        """Rows of each shard; known without reading them."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the rows, as JSON has it: equal for equal rows, and found without reading them all."""

    def read(self, shard: int) -> Tensor:
        """The rows of one shard, (rows, d), floating."""


def stream(
    data: Rows, batch: int, seed: int, step: int, *, steps: int | None = None, replica: tuple[int, int] = (0, 1)
) -> Generator[Tensor, None, None]:
    """The rows of a replica in each batch, from number `step` on; without end, or up to batch number `steps`.

    An epoch is a random order of the shards. Replica r of R has the r-th of R equal parts of its rows, one after another, so it
    reads 1/R of the shards and one that two replicas share. Eight shards are read and shuffled together; two more are read
    ahead in a thread. What comes at a step depends on seed, step and R alone; groups before it are skipped without being read.
    Of a source of one shard, such as a tensor, replicas divide every batch among them, so that R changes nothing.

    Raises:
        ValueError: NaN or Inf in the rows; a shard of another length or width than the source says; a batch that does not
            divide by the replicas.
    """
    index, replicas = replica
    if batch % replicas:
        raise ValueError(f"train_sae: a batch of {batch} rows does not divide by {replicas} replicas")
    if sum(data.counts) < replicas:
        raise ValueError(f"train_sae: the source has {sum(data.counts)} rows for {replicas} replicas; each needs one")
    if (
        len(data.counts) == 1 and replicas > 1
    ):  # each has to read it all, so each has its part of every batch of one process
        with closing(stream(data, batch, seed, step, steps=steps)) as batches:
            yield from (rows[index::replicas] for rows in batches)
        return
    own = batch // replicas
    groups = _groups(data.counts, seed, replica, step * own, None if steps is None else steps * own)
    # the order of what comes is drawn twice: by the thread's side to read ahead, and here
    wanted = (piece for group in groups() for piece in group.pieces)
    read = _read_ahead(lambda piece: _rows_of(data, piece), wanted, read_ahead(data))
    pieces, held = list[Tensor](), 0
    try:
        for group in groups():
            rows = _together(group.pieces, read)
            for piece in group.order.to(rows.device).split(own):
                pieces.append(rows[piece])
                held += len(piece)
                if held >= own:
                    joined = torch.cat(pieces)
                    yield joined[:own]
                    pieces, held = [joined[own:]], held - own
    finally:
        read.close()


@dataclass(frozen=True)
class _Piece:
    """Rows start to stop of a shard."""

    shard: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Group:
    """Pieces that are read together, and the order in which their rows come."""

    pieces: tuple[_Piece, ...]
    order: Tensor


def beginning(data: Rows, count: int) -> Tensor:
    """The first rows, (count, d), or all where there are fewer.

    Raises:
        ValueError: as `stream`.
    """
    pieces = _run(range(len(data.counts)), data.counts, 0, count)
    return _together(pieces, (_rows_of(data, piece) for piece in pieces))


def _groups(
    counts: Sequence[int], seed: int, replica: tuple[int, int], start: int, stop: int | None
) -> Callable[[], Iterator[_Group]]:
    """The groups of a replica that hold its rows from number `start` to `stop`, epoch after epoch."""
    total, (index, number) = sum(counts), replica
    ends = index * total // number, (index + 1) * total // number

    def groups() -> Iterator[_Group]:
        row = 0
        for epoch in count():
            dice = torch.Generator("cpu").manual_seed(1_000_003 * seed + epoch)
            pieces = _run(torch.randperm(len(counts), generator=dice, device="cpu").tolist(), counts, *ends)
            for first in range(0, len(pieces), _MIXED_SHARDS):
                group = pieces[first : first + _MIXED_SHARDS]
                size = sum(piece.stop - piece.start for piece in group)
                order = torch.randperm(size, generator=dice, device="cpu")
                if row + size > start:
                    yield _Group(tuple(group), order[max(0, start - row) :])
                row += size
                if stop is not None and row >= stop:
                    return

    return groups


def _run(order: Sequence[int], counts: Sequence[int], first: int, last: int) -> list[_Piece]:
    """Rows first to last, exclusive, of the shards in their order: whole shards but for the ends."""
    pieces, row = [], 0
    for shard in order:
        start, stop = max(first - row, 0), min(last - row, counts[shard])
        if start < stop:
            pieces.append(_Piece(shard, start, stop))
        row += counts[shard]
    return pieces


def _read_ahead(
    read: Callable[[_Piece], Tensor], pieces: Iterator[_Piece], ahead: int
) -> Generator[Tensor, None, None]:
    """What is read, in order; a thread reads so many pieces ahead."""
    if not ahead:
        yield from map(read, pieces)
        return
    with ThreadPoolExecutor(1, "steerfast-rows") as pool:
        waiting = deque(pool.submit(read, piece) for piece in islice(pieces, ahead))
        try:
            while waiting:
                rows = waiting.popleft().result()
                waiting.extend(pool.submit(read, piece) for piece in islice(pieces, 1))
                yield rows
        finally:
            for future in waiting:
                future.cancel()


def _rows_of(data: Rows, piece: _Piece) -> Tensor:
    """The rows of a piece, looked at."""
    rows = data.read(piece.shard)
    if rows.dim() != 2 or not rows.is_floating_point() or len(rows) != data.counts[piece.shard]:
        raise ValueError(
            f"train_sae: shard {piece.shard} has shape {tuple(rows.shape)} and dtype {rows.dtype}; expected floating "
            f"({data.counts[piece.shard]}, d), as its source says: was it changed since it was opened?"
        )
    return _finite(rows, piece.shard)[piece.start : piece.stop]


def _together(pieces: Sequence[_Piece], read: Iterator[Tensor]) -> Tensor:
    """The rows of some pieces in one tensor; each shard is let go when it is copied."""
    rows, at = torch.empty(0, device="cpu"), 0
    for piece in pieces:
        part = next(read)
        if at == 0:
            rows = part.new_empty(sum(piece.stop - piece.start for piece in pieces), part.shape[1])
        if part.shape[1] != rows.shape[1]:
            raise ValueError(
                f"train_sae: rows of shard {piece.shard} have width {part.shape[1]}, those of shard {pieces[0].shard} "
                f"{rows.shape[1]}; are they of different models?"
            )
        if part.dtype != rows.dtype:  # a wide row is not rounded to the 16 bits of another shard
            rows = rows.to(torch.promote_types(rows.dtype, part.dtype))
        rows[at : at + len(part)] = part
        at += len(part)
    return rows


def as_rows(source: Any) -> Rows:
    """A source of rows: a tensor (n, d) as one of one shard.

    Raises:
        TypeError, ValueError: it is none.
    """
    if isinstance(source, Tensor):
        return Whole(source)
    if not hasattr(source, "counts"):
        raise TypeError(
            f"train_sae: source must be a tensor (n, d), what open_rows returns, or other rows; got {type(source).__name__}"
        )
    rows: Rows = source
    return rows


class Whole:
    """A tensor of rows as a source of one shard."""

    ahead = 0

    def __init__(self, rows: Tensor) -> None:
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(
                f"train_sae: source has shape {tuple(rows.shape)} and dtype {rows.dtype}; expected floating (n, d)"
            )
        self.rows, self.counts = rows, (len(rows),)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Number of rows, and a hash of 64 spread over all."""
        some = self.rows[:: max(1, len(self.rows) // 64)][:64].detach().cpu().double().contiguous()
        return {"rows": list(self.counts), "sample": [hashlib.sha256(some.numpy().tobytes()).hexdigest()]}

    def read(self, shard: int) -> Tensor:
        """All rows."""
        return self.rows


def _finite(rows: Tensor, shard: int) -> Tensor:
    """The rows; NaN or Inf among them is an error that says where."""
    if not bool(rows.isfinite().all()):
        where = int((~rows.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"train_sae: row {where} of shard {shard} holds NaN or Inf; expected finite activations: check what made them"
        )
    return rows


def read_ahead(data: Rows) -> int:
    """How many shards a thread may read before they are needed."""
    return int(getattr(data, "ahead", _AHEAD))


def origin_of(data: Rows) -> Origin:
    """Where the rows come from, as far as their source says."""
    found = getattr(data, "origin", None)
    return found if isinstance(found, Origin) else Origin()


def fingerprint_of(config: TrainConfig, data: Rows) -> str:
    """What must be equal for a run to go on: the configuration and the data.

    Raises:
        TypeError: the source does not say what identifies its rows.
    """
    if not isinstance(about := getattr(data, "fingerprint", None), dict):
        raise TypeError(
            f"train_sae: {type(data).__name__} has no fingerprint, a dict that identifies its rows; checkpoints need one"
        )
    return json.dumps({"config": asdict(config), "data": about}, sort_keys=True)
