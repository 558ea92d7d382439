"""A cache of activations that grows: contexts are added one by one, and whatever is on disk is a whole `ActivationCache`.

Every shard but the last has the same number of contexts; the last one is written anew until it is full. One whose rows reach a
number of bytes before is filled up with empty contexts. A shard and the manifest that counts its rows are replaced together.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from steerfast.files.replace import replace_files

from .cache import MANIFEST, CacheInfo, manifest, opened, read_manifest, shard_file

_ABOUT = "contexts"
FULL = 32 << 20
"""Bytes of rows with which a shard is full, whatever its contexts."""


class Context(NamedTuple):
    """One stretch of a text, as a shard keeps it.

    Attributes:
        tokens: int32 (context,); 0 where the text has none or its tokens are not known.
        positions: int32 (rows,), where in `tokens` each row was read, rising.
        rows: (rows, d) in the cache's dtype.
        about: What it comes from, in a word and a number; both stand in the shard's metadata.
    """

    tokens: Tensor
    positions: Tensor
    rows: Tensor
    about: tuple[str, int]


class GrowingCache:
    """A directory that contexts are added to, by one process at a time.

    Args:
        directory: Made if need be; a cache that is there goes on.
        info: What it holds; `contexts` and `text` are those of an empty one and are kept up to date.

    Raises:
        ValueError: the directory holds a cache of something else, or a damaged one.
    """

    def __init__(self, directory: str | os.PathLike[str], info: CacheInfo) -> None:
        self.directory = Path(directory)
        self.info = replace(info, contexts=0, text=hashlib.sha256().hexdigest())
        self._tail: list[Context] = []
        self._counts: list[int] = []  # of full shards
        self._text = hashlib.sha256()  # of their tokens
        self.changed = False
        """Whether something was added since the last `write`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if (self.directory / MANIFEST).exists():
            self._go_on()

    def __len__(self) -> int:
        return sum(self._counts) + self.unfinished

    @property
    def unfinished(self) -> int:
        """Rows of the last shard, which are held in memory."""
        return sum(len(context.rows) for context in self._tail)

    def add(self, context: Context) -> None:
        """Add a context; it is on disk after the next `write`, or when its shard is full.

        Raises:
            OSError: the disk is full; what was written before stays valid, and this context is not there.
        """
        self._tail.append(context)
        self.changed = True
        if len(self._tail) < self.info.shard and sum(held.rows.nbytes for held in self._tail) < FULL:
            return
        count = len(self._tail)
        empty = Context(torch.zeros_like(context.tokens), context.positions[:0], context.rows[:0], ("", 0))
        self._tail += [empty] * (self.info.shard - count)
        try:
            self.write()
        except OSError:
            del self._tail[count - 1 :]
            raise

    def write(self) -> None:
        """Bring everything that was added to disk.

        Raises:
            OSError: the disk is full; what was written before stays valid.
        """
        if not self.changed:
            return
        text = self._text.copy()
        for context in self._tail:
            text.update(context.tokens.numpy().tobytes())
        number, counts = len(self._counts), [*self._counts, self.unfinished]
        info = replace(self.info, contexts=number * self.info.shard + len(self._tail), text=text.hexdigest())
        contents = {shard_file(self.directory, number).name: self._packed(), MANIFEST: manifest(info, counts)}
        replace_files(self.directory, contents)
        self.info, self.changed = info, False
        if len(self._tail) == info.shard:
            self._tail, self._counts, self._text = [], counts, text

    def _packed(self) -> bytes:
        at = [context.positions + i * self.info.context for i, context in enumerate(self._tail)]
        content = {
            "activations": torch.cat([context.rows for context in self._tail]),
            "tokens": torch.stack([context.tokens for context in self._tail]),
            "positions": torch.cat(at).to(torch.int32),
        }
        return save(content, {_ABOUT: json.dumps([context.about for context in self._tail])})

    def _go_on(self) -> None:
        info, counts = read_manifest(self.directory)
        if replace(info, contexts=0, text=self.info.text) != self.info:
            raise ValueError(f"{self.directory} holds another cache ({info}); choose another directory")
        if -(-info.contexts // info.shard) != len(counts):
            raise ValueError(f"{self.directory} is an unfinished collection; choose another directory")
        for number, count in enumerate(counts):
            with opened(shard_file(self.directory, number)) as file:
                tokens = file.get_tensor("tokens")
                if len(tokens) == info.shard:
                    self._text.update(tokens.numpy().tobytes())
                    self._counts.append(count)
                    continue
                positions, rows = file.get_tensor("positions"), file.get_tensor("activations")
                about = json.loads((file.metadata() or {}).get(_ABOUT, "[]")) or [["", 0]] * len(tokens)
                for i, (name, first) in enumerate(about):
                    here = (positions >= i * info.context) & (positions < (i + 1) * info.context)
                    part = positions[here] - i * info.context
                    self._tail.append(Context(tokens[i].clone(), part, rows[here].clone(), (name, first)))
        self.info = info


def contexts_of(directory: str | os.PathLike[str], shard: int) -> list[tuple[str, int]]:
    """What each context of a shard of such a cache comes from: its name, and the position of its first token there."""
    with opened(shard_file(Path(directory), shard)) as file:
        return [(name, int(first)) for name, first in json.loads((file.metadata() or {})[_ABOUT])]
