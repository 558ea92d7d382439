"""Activations of one place in a model, collected once into a directory of safetensors shards.

    cache.json              what it was made from, and which shards are there
    00000.safetensors …     activations (rows, d), tokens (contexts, length) int32, positions (rows,) int32

Texts are packed: joined with the end-of-text token, cut into contexts of equal length, each begun with the beginning-of-text
token (where the tokenizer has one), once. `positions` says where in `tokens`, flattened, a row was read. Rows of special
tokens and the first position of every context are left out: their norm is many times that of text, and they mean nothing.

Every file is written whole or not at all, so that a killed collection goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from steerfast._checks import whole_number
from steerfast.files.replace import replace_file
from steerfast.models.collect import read_batch
from steerfast.models.layers import evaluating, find_layers
from steerfast.models.texts import TextReader

SCHEMA = 1
MANIFEST = "cache.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Of stored rows, by the name that a manifest has for them."""
SHARD_TOKENS = 32768
_FORWARD_TOKENS = 2048
_TOKENIZED_AT_A_TIME = 512


@dataclass(frozen=True)
class CacheInfo:
    """What a cache was made from: two collections with equal contents here have equal rows.

    Attributes:
        model: Class name of the model.
        site, layer: The place that was read.
        d: Width of a row.
        dtype: Of the stored rows.
        context: Tokens of a context, the beginning-of-text token included.
        contexts: Their number.
        shard: Contexts in a shard.
        text: SHA-256 of all the tokens.
    """

    model: str
    site: str
    layer: int
    d: int
    dtype: str
    context: int
    contexts: int
    shard: int
    text: str


@dataclass(frozen=True)
class ActivationCache:
    """A directory of activations, opened.

    Attributes:
        directory: Where the shards are.
        info: What they were made from.
        counts: Rows of each shard.
    """

    directory: Path
    info: CacheInfo
    counts: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.counts)

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> ActivationCache:
        """Open a finished cache.

        Raises:
            FileNotFoundError: there is no cache.
            ValueError: it is not finished, damaged, or of another schema.
        """
        path = Path(directory)
        info, counts = read_manifest(path)
        missing = -(-info.contexts // info.shard) - len(counts)
        if missing:
            raise ValueError(
                f"ActivationCache: {path} lacks {missing} of {-(-info.contexts // info.shard)} shards; "
                "run the collection again, it goes on where it stopped"
            )
        for number in range(len(counts)):
            if not shard_file(path, number).is_file():
                raise ValueError(
                    f"ActivationCache: {shard_file(path, number)} is gone; remove {path} and collect again"
                )
        return cls(path, info, tuple(counts))

    def read(self, shard: int) -> Tensor:
        """The activations of one shard, (rows, d), in their stored dtype."""
        with opened(shard_file(self.directory, shard)) as file:
            return file.get_tensor("activations")

    def contexts(self, shard: int) -> tuple[Tensor, Tensor]:
        """The tokens (contexts, length) of one shard, and where in them, flattened, each row was read."""
        with opened(shard_file(self.directory, shard)) as file:
            return file.get_tensor("tokens"), file.get_tensor("positions")


class ActivationStream:
    """Activations computed when they are read, in the same shards as a cache of the same texts: no disk, a forward per epoch.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        texts: Strings.
        place: (site, layer) as in `sf.Plan`, such as ("resid_post", 8).
        context: Tokens of a context, beginning-of-text included. A last context that is not full is dropped.

    Raises:
        ValueError: no such place; too few texts for one context.

    Example:
        >>> stream = sf.sae.ActivationStream(model, tokenizer, true_statements, ("resid_post", 0), context=8)
        >>> stream.read(0).shape == (stream.counts[0], 576)
        True
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, texts: Iterable[str], place: tuple[str, int], *, context: int = 256
    ) -> None:
        if not isinstance(place, tuple | list) or len(place) != 2:
            raise TypeError(f"ActivationStream: place must be (site, layer), got {place!r}")
        found = find_layers(model, "ActivationStream")
        site, layer = place[0], found.resolve(whole_number("ActivationStream", "layer", place[1]), "ActivationStream")
        context = whole_number("ActivationStream", "context", context)
        self._point = found.point(layer, site, "ActivationStream")
        self._model = getattr(model, "_orig_mod", model)
        self._tokens = pack(tokenizer, texts, context)
        self._keep = real_tokens(tokenizer, self._tokens)
        digest = hashlib.sha256(self._tokens.numpy().tobytes()).hexdigest()
        shard = max(1, SHARD_TOKENS // context)
        count = len(self._tokens)
        self.info = CacheInfo(found.name, site, layer, self._point.width, "float32", context, count, shard, digest)
        self.counts = tuple(int(part.sum()) for part in self._keep.split(shard))

    def contexts(self, shard: int) -> tuple[Tensor, Tensor]:
        """The tokens (contexts, length) of one shard, and where in them, flattened, each row is read."""
        part = slice(shard * self.info.shard, (shard + 1) * self.info.shard)
        return self._tokens[part], self._keep[part].flatten().nonzero().flatten().to(torch.int32)

    def read(self, shard: int) -> Tensor:
        """The activations of one shard, float32 (rows, d). The forward stops after the layer.

        Raises:
            ValueError: they are NaN or Inf.
        """
        tokens, positions = self.contexts(shard)
        layer, rows = self.info.layer, []
        with evaluating(self._model):
            for batch in tokens.split(max(1, _FORWARD_TOKENS // self.info.context)):
                rows += read_batch(self._model, {layer: self._point}, batch.tolist(), "all")[layer]
        kept = torch.cat(rows)[positions]
        if not bool(kept.isfinite().all()):
            where = int((~kept.isfinite()).any(1).nonzero()[0])
            dtype = next(self._model.parameters()).dtype
            raise ValueError(
                f"ActivationStream: row {where} of shard {shard} is NaN or Inf; check the model ({dtype}) or load it in float32"
            )
        return kept


def cache_activations(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    place: tuple[str, int],
    directory: str | os.PathLike[str],
    *,
    context: int = 256,
    dtype: torch.dtype = torch.bfloat16,
    progress: Callable[[str], None] | None = None,
) -> ActivationCache:
    """Collect a model's activations on packed texts into a directory; a collection that was interrupted goes on.

    The forward stops after the layer that is read. See the module's docstring for what is left out.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        texts: Strings; the same ones, in the same order, when going on.
        place: (site, layer) as in `sf.Plan`, such as ("resid_post", 8).
        directory: Made if need be.
        context: Tokens of a context, beginning-of-text included. A last context that is not full is dropped.
        dtype: Of the stored rows: torch.bfloat16 or torch.float32.
        progress: Called with a line of text after each shard.

    Returns:
        The cache, finished.

    Raises:
        ValueError: no such place; too few texts for one context; the directory holds a cache of something else; NaN or Inf.
        OSError: the disk is full; the shards written so far stay valid.

    Example:
        >>> cache = sf.sae.cache_activations(model, tokenizer, true_statements, ("resid_post", 0), "cache", context=8)
        >>> cache.read(0).shape == (len(cache), 576)
        True
    """
    name = next((name for name, known in DTYPES.items() if known == dtype), None)
    if name is None:
        raise ValueError(f"cache_activations: dtype is {dtype}; expected torch.bfloat16 or torch.float32")
    source = ActivationStream(model, tokenizer, texts, place, context=context)
    info, path = replace(source.info, dtype=name), Path(directory)
    counts = _resume(path, info)
    for number in range(len(counts), len(source.counts)):
        tokens, positions = source.contexts(number)
        content = {"activations": source.read(number).to(dtype), "tokens": tokens.contiguous(), "positions": positions}
        replace_file(shard_file(path, number), save(content))
        counts.append(len(positions))
        write_manifest(path, info, counts)
        if progress is not None:
            progress(f"collected shard {number + 1} of {len(source.counts)}, {sum(counts)} rows")
    return ActivationCache(path, info, tuple(counts))


def pack(tokenizer: Any, texts: Iterable[str], context: int) -> Tensor:
    """Texts as contexts of equal length, int32 (contexts, context); see the module's docstring.

    Raises:
        TypeError: texts is one string.
        ValueError: context is too short, or the texts do not fill one context.

    Warns:
        UserWarning: a text brings along a special token that the tokenizer adds itself; it is left out.
    """
    if isinstance(texts, str):
        raise TypeError("pack: texts must be several texts, got one string; put it into a list")
    context = whole_number("pack", "context", context, 8)
    reader = TextReader.of(tokenizer, "pack")
    tokenizer = reader.tokenizer
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    last = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    room = context - len(first)
    stream: list[int] = []
    for window in _windows(texts, _TOKENIZED_AT_A_TIME):
        for ids in reader.own(window):
            stream += [*ids, *last]
    contexts, at = [], 0
    while True:
        begin = [] if stream[at : at + 1] == first else first  # a chat's first token, or an end of text that is both
        until = at + context - len(begin)
        if until > len(stream):
            break
        contexts.append([*begin, *stream[at:until]])
        at = until
    if not contexts:
        raise ValueError(f"pack: the texts have {len(stream)} tokens; expected {room} at least, one context: give more")
    return torch.tensor(contexts, dtype=torch.int32)


def real_tokens(tokenizer: Any, contexts: Tensor) -> Tensor:
    """Which tokens of packed contexts count: neither the first of a context nor special; bool like contexts."""
    keep = ~torch.isin(contexts, torch.tensor(sorted(tokenizer.all_special_ids), dtype=contexts.dtype))
    keep[:, 0] = False
    return keep


def _windows(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    window: list[str] = []
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"pack: a text is {type(text).__name__}; expected strings")
        window.append(text)
        if len(window) == size:
            yield window
            window = []
    if window:
        yield window


def shard_file(path: Path, number: int) -> Path:
    """Where a cache has one of its shards."""
    return path / f"{number:05d}.safetensors"


def opened(file: Path) -> Any:
    """A shard as safetensors opens it.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return safe_open(file, "pt")
    except Exception as error:
        raise ValueError(f"ActivationCache: {file} is damaged ({error}); remove the cache and collect again") from error


def _resume(path: Path, info: CacheInfo) -> list[int]:
    """The row counts of the shards that are there already; a new directory gets its manifest."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / MANIFEST).exists():
        write_manifest(path, info, [])
        return []
    there, counts = read_manifest(path)
    if there != info:
        old, new = asdict(there), asdict(info)
        differs = ", ".join(f"{key} {old[key]!r} there, {new[key]!r} here" for key in old if old[key] != new[key])
        raise ValueError(f"cache_activations: {path} holds another cache ({differs}); choose another directory")
    return counts


def read_manifest(path: Path) -> tuple[CacheInfo, list[int]]:
    """What a cache was made from, and the rows of each shard that is there.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: its manifest is damaged, or of another schema.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"ActivationCache: {file} does not exist; make it with cache_activations")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
        return CacheInfo(**content["info"]), [int(count) for count in content["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"ActivationCache: {file} cannot be read ({error}); remove it and collect again") from error


def write_manifest(path: Path, info: CacheInfo, counts: list[int]) -> None:
    """Say what is there now."""
    replace_file(path / MANIFEST, manifest(info, counts))


def manifest(info: CacheInfo, counts: Sequence[int]) -> bytes:
    """The content of a cache's `cache.json`."""
    return (json.dumps({"schema": SCHEMA, "info": asdict(info), "rows": list(counts)}, indent=2) + "\n").encode()
