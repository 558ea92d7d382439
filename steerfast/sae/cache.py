"""Activations of places in a model, collected once, each place into a directory of safetensors shards.

    cache.json              what it was made from, and which shards are there; cache.2of4.json: those of part 2 of 4
    00000.safetensors …     activations (rows, d), tokens (contexts, length) int32, positions (rows,) int32

Texts are packed into contexts (`contexts`). `positions` says where in `tokens`, flattened, a row was read. Rows of special
tokens and the first position of every context are left out: their norm is many times that of text, and they mean nothing.

Every file is written whole or not at all, so that a killed collection goes on where it stopped. Part i of n makes every n-th
shard; a directory with the files of all parts is a whole cache, whichever machines made them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from steerfast._checks import checked_part, instance_of, whole_number
from steerfast.files.claim import Claim
from steerfast.files.replace import replace_file
from steerfast.place import Origin, Place

from .place_reader import PlaceReader

SCHEMA = 1
MANIFEST = "cache.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Of stored rows, by the name that a manifest has for them."""
_PART = re.compile(r"cache\.(\d+)of(\d+)\.json")
_UNFINISHED = re.compile(r"\.(\d{5,})\.safetensors\.\d+")


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
        weights: SHA-256 of some numbers of every weight of the model; "": not known.
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
    weights: str = ""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.contexts // self.shard)

    @property
    def origin(self) -> Origin:
        """Where the rows were read."""
        return Origin(self.model, Place(self.site, self.layer))

    def agrees(self, other: CacheInfo) -> bool:
        """Whether rows of both belong to one collection; weights that one of them does not know are no difference."""
        both = self.weights and other.weights
        return self == (other if both else replace(other, weights=self.weights))


@dataclass(frozen=True)
class CacheConfig:
    """How activations are collected.

    Attributes:
        context: Tokens of a context, beginning-of-text included. A last context that is not full is dropped.
        dtype: Of the stored rows: torch.bfloat16 or torch.float32.
        part: (i, n): make every n-th shard, from the i-th; i counts from 1.

    Raises:
        TypeError, ValueError: another dtype; a part that is none.
    """

    context: int = 256
    dtype: torch.dtype = torch.bfloat16
    part: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "context", whole_number("CacheConfig", "context", self.context))
        if self.dtype not in DTYPES.values():
            raise ValueError(f"CacheConfig: dtype is {self.dtype}; expected torch.bfloat16 or torch.float32")
        object.__setattr__(self, "part", checked_part("CacheConfig", self.part))

    @property
    def stored(self) -> str:
        """The name of the dtype."""
        return next(name for name, known in DTYPES.items() if known == self.dtype)


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

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the rows."""
        return asdict(self.info)

    @property
    def origin(self) -> Origin:
        """Where the rows were read."""
        return self.info.origin

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> ActivationCache:
        """Open a finished cache; the parts of a divided collection may lie in one directory, side by side.

        Raises:
            FileNotFoundError: there is no cache.
            ValueError: it is not finished, damaged, or of another schema; its parts are of different collections.
        """
        path = Path(directory)
        parts, counts = _parts(path), dict[int, int]()
        info = read_manifest(path, parts[0])[0]
        for part in parts:
            found, rows = read_manifest(path, part)
            if not found.agrees(info):
                raise ValueError(
                    f"ActivationCache: part {part[0]} of {part[1]} in {path} is of another collection ({_differs(info, found)}); "
                    "keep the parts of one collection in a directory"
                )
            counts.update(zip(_numbers(info, part), rows, strict=False))
        if missing := info.shards - len(counts):
            known = ", ".join(f"{i} of {n}" for i, n in parts)
            there = "" if parts == [(1, 1)] else f" (there are parts {known})"
            raise ValueError(
                f"ActivationCache: {path} lacks {missing} of {info.shards} shards{there}; "
                "run the collection again, it goes on where it stopped"
            )
        for number in counts:
            if not shard_file(path, number).is_file():
                raise ValueError(
                    f"ActivationCache: {shard_file(path, number)} is gone; run the collection again, it makes "
                    "this shard anew"
                )
        return cls(path, info, tuple(counts[number] for number in range(info.shards)))

    def read(self, shard: int) -> Tensor:
        """The activations of one shard, (rows, d), in their stored dtype.

        Raises:
            ValueError: the file is damaged, or holds other rows than the manifest says.
        """
        path = shard_file(self.directory, shard)
        with opened(path) as file:
            rows = file.get_tensor("activations")
        if rows.shape != (self.counts[shard], self.info.d):
            raise ValueError(
                f"ActivationCache: {path} holds {tuple(rows.shape)}, its manifest says ({self.counts[shard]}, {self.info.d}); "
                "it is of another collection: remove it and run the collection again, which makes this shard anew"
            )
        return rows

    def contexts(self, shard: int) -> tuple[Tensor, Tensor]:
        """The tokens (contexts, length) of one shard, and where in them, flattened, each row was read."""
        with opened(shard_file(self.directory, shard)) as file:
            return file.get_tensor("tokens"), file.get_tensor("positions")


class ActivationStream:
    """Activations computed when they are read, in the shards of a cache of the same texts: no rows on disk, a forward per epoch.

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

    ahead = 0
    """Shards that may be read in another thread: none, the model is the user's own."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, texts: Iterable[str], place: tuple[str, int], *, context: int = 256
    ) -> None:
        self._reader = PlaceReader("ActivationStream", model, [place])
        self._reader.pack(tokenizer, texts, whole_number("ActivationStream", "context", context))
        (self._place,) = self._reader.points
        self.info = info_of(self._reader, self._place, "float32")
        self.counts = self._reader.counts()

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the rows."""
        return asdict(self.info)

    @property
    def origin(self) -> Origin:
        """Where the rows are read."""
        return self.info.origin

    def contexts(self, shard: int) -> tuple[Tensor, Tensor]:
        """The tokens (contexts, length) of one shard, and where in them, flattened, each row is read."""
        return self._reader.shard(shard)

    def read(self, shard: int) -> Tensor:
        """The activations of one shard, float32 (rows, d). The forward stops after the layer.

        Raises:
            ValueError: they are NaN or Inf.
        """
        return self._reader.read(shard, [self._place])[self._place]


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
    config = CacheConfig(context, dtype)
    reader = PlaceReader("cache_activations", model, [place])
    _collect(reader, tokenizer, texts, [Path(directory)], config, progress)
    return ActivationCache.open(directory)


def cache_places(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    places: Iterable[tuple[str, int]],
    directory: str | os.PathLike[str],
    config: CacheConfig | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[Place, Path]:
    """Collect a model's activations at several places in one forward, or a part of them; each place gets a cache of its own.

    The caches are `directory/SITE-LAYER`. A collection that was interrupted goes on.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        texts: Strings; the same ones, in the same order, for all parts and when going on.
        places: (site, layer) each, as in `sf.Plan`.
        directory: Made if need be.
        config: Length of a context, dtype and part; None: `CacheConfig()`.
        progress: Called with a line of text after each shard.

    Returns:
        Place -> the directory of its cache, which `ActivationCache.open` opens when all parts are there.

    Raises:
        ValueError: no place, no such place, or one named twice; otherwise as `cache_activations`.
        OSError: the disk is full; the shards written so far stay valid.

    Example:
        >>> folders = sf.sae.cache_places(
        ...     model, tokenizer, true_statements, [("resid_pre", 0), ("mlp_out", 0)], "caches", sf.sae.CacheConfig(context=8)
        ... )
        >>> [len(sf.sae.ActivationCache.open(folder)) > 0 for folder in folders.values()]
        [True, True]
    """
    reader = PlaceReader("cache_places", model, list(places))
    folders = {place: Path(directory) / f"{place.site}-{place.layer}" for place in reader.points}
    config = CacheConfig() if config is None else config
    instance_of("cache_places", "config", config, CacheConfig, "sf.sae.CacheConfig(context=256)")
    _collect(reader, tokenizer, texts, list(folders.values()), config, progress)
    return folders


def info_of(reader: PlaceReader, place: Place, dtype: str) -> CacheInfo:
    """What the rows of a place are made from."""
    texts, width = reader.texts, reader.points[place].width
    return CacheInfo(
        reader.name, *place, width, dtype, texts.length, len(texts), reader.per_shard, texts.digest, reader.weights
    )


def _collect(
    reader: PlaceReader,
    tokenizer: Any,
    texts: Iterable[str],
    folders: list[Path],
    config: CacheConfig,
    progress: Callable[[str], None] | None,
) -> None:
    """Write the shards of a part that are not there yet, for all places in one forward."""
    with ExitStack() as claims:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            claims.enter_context(_claimed(reader.owner, folder, config.part))
        reader.pack(tokenizer, texts, config.context, folders[0])
        _write(reader, folders, config, progress)


def _claimed(owner: str, folder: Path, part: tuple[int, int]) -> Claim:
    """The files of a part, for this process alone."""
    try:
        return Claim(folder, f".{_manifest_file(folder, part).stem}.lock")
    except BlockingIOError:
        raise ValueError(
            f"{owner}: another process collects into {folder}; wait for its end, or choose another directory or part"
        ) from None


def _write(
    reader: PlaceReader, folders: list[Path], config: CacheConfig, progress: Callable[[str], None] | None
) -> None:
    """Write the shards of the reader's texts."""
    infos = {place: info_of(reader, place, config.stored) for place in reader.points}
    at = dict(zip(infos, folders, strict=True))
    counts = {place: _resume(reader.owner, at[place], info, config.part) for place, info in infos.items()}
    numbers = _numbers(next(iter(infos.values())), config.part)
    for file in (file for folder in folders for file in folder.glob(".*.safetensors.*")):
        if (left := _UNFINISHED.fullmatch(file.name)) and int(left[1]) in numbers:
            file.unlink()  # of a process that was killed while it wrote
    for done, number in enumerate(numbers):
        missing = [place for place in infos if len(counts[place]) <= done or not _whole(shard_file(at[place], number))]
        if not missing:
            continue
        tokens, positions = reader.shard(number)
        for place, rows in reader.read(number, missing).items():
            content = {"activations": rows.to(config.dtype), "tokens": tokens, "positions": positions}
            replace_file(shard_file(at[place], number), save(content))
            counts[place][done : done + 1] = [len(positions)]
            replace_file(_manifest_file(at[place], config.part), manifest(infos[place], counts[place]))
        if progress is not None:
            progress(f"collected shard {done + 1} of {len(numbers)}, {sum(counts[missing[0]])} rows")


def _numbers(info: CacheInfo, part: tuple[int, int]) -> range:
    """The shards of a part."""
    return range(part[0] - 1, info.shards, part[1])


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
        raise ValueError(
            f"ActivationCache: {file} is damaged ({error}); run the collection again, it makes this shard anew"
        ) from error


def _whole(file: Path) -> bool:
    """Whether a shard is there and was not cut off."""
    try:
        opened(file)
    except ValueError:
        return False
    return True


def _resume(owner: str, path: Path, info: CacheInfo, part: tuple[int, int]) -> list[int]:
    """The row counts of the part's shards that are there already; a new directory gets its manifest."""
    for other in _parts(path) if any(path.glob("cache*.json")) else []:
        there = read_manifest(path, other)[0]
        if not there.agrees(info):
            raise ValueError(f"{owner}: {path} holds another cache ({_differs(there, info)}); choose another directory")
    if not (file := _manifest_file(path, part)).exists():
        replace_file(file, manifest(info, []))
        return []
    return read_manifest(path, part)[1]


def _differs(there: CacheInfo, here: CacheInfo) -> str:
    old, new = asdict(there), asdict(here)
    return ", ".join(f"{key} {old[key]!r} there, {new[key]!r} here" for key in old if old[key] != new[key])


def read_manifest(path: Path, part: tuple[int, int] = (1, 1)) -> tuple[CacheInfo, list[int]]:
    """What a cache was made from, and the rows of each shard of a part that is there.

    Raises:
        FileNotFoundError: there is no cache.
        ValueError: its manifest is damaged, or of another schema.
    """
    file = _manifest_file(path, part)
    if not file.is_file():
        raise FileNotFoundError(f"ActivationCache: {file} does not exist; make it with cache_activations")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']}, expected {SCHEMA}")
        return CacheInfo(**content["info"]), [int(count) for count in content["rows"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"ActivationCache: {file} cannot be read ({error}); remove it and collect again") from error


def manifest(info: CacheInfo, counts: Sequence[int]) -> bytes:
    """The content of a cache's manifest."""
    return (json.dumps({"schema": SCHEMA, "info": asdict(info), "rows": list(counts)}, indent=2) + "\n").encode()


def _parts(path: Path) -> list[tuple[int, int]]:
    """The parts that have a manifest in a directory; (1, 1) where none has."""
    found = [(1, 1)] if (path / MANIFEST).exists() else []
    names = [_PART.fullmatch(file.name) for file in sorted(path.glob("cache.*.json"))]
    found += [checked_part(str(path), (int(name[1]), int(name[2]))) for name in names if name]
    return found or [(1, 1)]


def _manifest_file(path: Path, part: tuple[int, int]) -> Path:
    return path / (MANIFEST if part == (1, 1) else f"cache.{part[0]}of{part[1]}.json")
