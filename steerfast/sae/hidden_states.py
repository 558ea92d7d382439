"""Rows of the files that vLLM's own extraction of hidden states writes: one safetensors file for each request.

    hidden_states    (tokens, extracted layers, d), the stream behind some layers
    token_ids        (tokens,)

vLLM does not say in them which layers these are. `collect_hidden_states` writes that beside them, as hidden_states.json.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerfast.files.remote import Folder, digest, safetensors_header
from steerfast.place import Origin, Place

SCHEMA = 1
MANIFEST = "hidden_states.json"
SHARD_ROWS = 32768
"""Files that follow each other make a shard of so many rows at least."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32}


@dataclass(frozen=True)
class Extraction:
    """What a folder of hidden states was made from.

    Attributes:
        model: Class name of the model.
        layers: What is extracted, in the order of the files: the streams behind these layers, 0-based.
        context: Tokens of a request.
        contexts: Number of requests in all.
        text: SHA-256 of all the tokens.
        special: Ids of special tokens, whose rows mean nothing.
    """

    model: str
    layers: tuple[int, ...]
    context: int
    contexts: int
    text: str
    special: tuple[int, ...]

    def content(self) -> bytes:
        """The content of a folder's hidden_states.json."""
        return (json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes, where: str) -> Extraction:
        """What a file says.

        Raises:
            ValueError: it is damaged, or of another schema.
        """
        try:
            about = json.loads(content)
            if about.pop("schema") != SCHEMA:
                raise ValueError(f"another schema than {SCHEMA}")
            return cls(**about | {"layers": tuple(about["layers"]), "special": tuple(about["special"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"HiddenStates: {where} cannot be read ({error!r}); remove it and collect again"
            ) from error


@dataclass
class _File:
    """One request's file: where its tensors are, and how many rows it gives."""

    name: str
    states: dict[str, Any]
    ids: dict[str, Any]
    start: int
    rows: int = field(default=0)


class HiddenStates:
    """The stream behind a layer, as vLLM's `ExampleHiddenStatesConnector` has written it.

    The first position of a request and special tokens are left out: their norm is many times that of text, and they mean nothing.

    Args:
        source: A folder of such files, or one of them, as a path or an address that fsspec knows (s3://…).
        layer: Which layer, where hidden_states.json says what was extracted. None: the only one.
        index: Which of the extracted layers, where there is no hidden_states.json. None: the only one.
        special: Ids of special tokens, where there is no hidden_states.json.

    Attributes:
        counts: Rows of each shard.
        d: Width of a row.
        info: What the folder was made from, where hidden_states.json says it.
        origin: Model and place, as far as they are known.

    Raises:
        FileNotFoundError: there is nothing at the path, or no such file in it.
        ValueError: no such layer, or several; a file is not whole, or of another model.

    Example:
        >>> rows = sf.sae.HiddenStates("hidden", layer=12)  # doctest: +SKIP
        >>> sf.sae.train_sae(rows, config)  # doctest: +SKIP
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        layer: int | None = None,
        *,
        index: int | None = None,
        special: tuple[int, ...] = (),
    ) -> None:
        self._folder = Folder(source, "HiddenStates")
        self.info = self._manifest()
        names = self._folder.files(".safetensors")
        if not names:
            raise FileNotFoundError(f"HiddenStates: {self._folder.name} has no file that ends in .safetensors")
        if self.info is not None and len(names) < self.info.contexts:
            raise ValueError(
                f"HiddenStates: {self._folder.name} has {len(names)} of {self.info.contexts} contexts; run the "
                "collection again (all of its parts), it goes on where it stopped"
            )
        self._special = special if self.info is None else self.info.special
        self._about = list[Any]()
        files = [self._header(name) for name in names]
        self.d = int(files[0].states["shape"][2])
        self._index = self._chosen(layer, index, int(files[0].states["shape"][1]))
        self._check(files)
        self._shards = _grouped(files)
        self.counts = tuple(sum(file.rows for file in shard) for shard in self._shards)
        if not self.counts:
            raise ValueError(f"HiddenStates: {self._folder.name} holds no rows but those of first and special tokens")

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def origin(self) -> Origin:
        """Model and place, as far as they are known."""
        if self.info is None:
            return Origin()
        return Origin(self.info.model, Place("resid_post", self.info.layers[self._index]))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the rows: what was extracted, or a hash of names, sizes and headers of the files."""
        about = digest(self._about) if self.info is None else asdict(self.info)
        return {"rows": len(self), "d": self.d, "index": self._index, "special": list(self._special), "files": about}

    def read(self, shard: int) -> Tensor:
        """The rows of one shard, (rows, d), in their stored dtype.

        Raises:
            ValueError: a file was changed or cut off since it was opened.
        """
        return torch.cat([self._rows(file) for file in self._shards[shard]])

    def _manifest(self) -> Extraction | None:
        found = [file for file in self._folder.files(MANIFEST) if os.path.basename(file) == MANIFEST]
        if not found:
            return None
        with self._folder.open(found[0]) as opened:
            return Extraction.parse(opened.read(), found[0])

    def _header(self, name: str) -> _File:
        """What a file says of itself, and how many rows it gives: its token ids are read, the states are not."""
        size = int(self._folder.system.size(name))
        with self._folder.open(name) as opened:
            tensors, start = safetensors_header(opened, size, f"HiddenStates: {name}")
            states, ids = tensors.get("hidden_states"), tensors.get("token_ids")
            if states is None or ids is None or len(states["shape"]) != 3 or states["shape"][:1] != ids["shape"]:
                there = ", ".join(f"{key} {about['shape']}" for key, about in tensors.items())
                raise ValueError(
                    f"HiddenStates: {name} holds {there or 'nothing'}; expected hidden_states (tokens, layers, d) and token_ids "
                    "(tokens,), as vLLM's extraction of hidden states writes them"
                )
            file = _File(name, states, ids, start)
            file.rows = int(self._kept(opened, file).sum())
        self._about.append([os.path.relpath(name, self._folder.root), size, states, ids])
        return file

    def _kept(self, opened: Any, file: _File) -> Tensor:
        """Which tokens of a file count, bool (tokens,)."""
        ids = _tensor(opened, file, file.ids)
        keep = ~torch.isin(ids, torch.tensor(self._special, dtype=ids.dtype))
        keep[:1] = False
        return keep

    def _rows(self, file: _File) -> Tensor:
        with self._folder.open(file.name) as opened:
            keep = self._kept(opened, file)
            rows = _tensor(opened, file, file.states)[keep, self._index]
        if len(rows) != file.rows:
            raise ValueError(f"HiddenStates: {file.name} was changed since it was opened; open the folder again")
        return rows

    def _chosen(self, layer: int | None, index: int | None, count: int) -> int:
        layers = None if self.info is None else self.info.layers
        if layers is not None:
            if len(layers) != count or index is not None:
                raise ValueError(
                    f"HiddenStates: {MANIFEST} names the layers {list(layers)}, the files hold {count}; choose by layer="
                )
            if layer is None and len(layers) == 1:
                return 0
            if layer not in layers:
                raise ValueError(f"HiddenStates: layer is {layer}; extracted are {', '.join(map(str, layers))}")
            return layers.index(layer)
        if layer is not None:
            raise ValueError(f"HiddenStates: there is no {MANIFEST} that says which layers these are; choose by index=")
        if (index is None and count > 1) or (index is not None and not 0 <= index < count):
            raise ValueError(f"HiddenStates: index is {index}; the files hold {count} layers, 0 to {count - 1}")
        return index or 0

    def _check(self, files: list[_File]) -> None:
        shape, dtype = files[0].states["shape"][1:], files[0].states["dtype"]
        for file in files:
            if file.states["shape"][1:] != shape or file.states["dtype"] != dtype:
                raise ValueError(
                    f"HiddenStates: {file.name} holds {file.states['dtype']} {file.states['shape'][1:]}, {files[0].name} {dtype} "
                    f"{shape} (layers, d); are they of different models?"
                )
        if dtype not in ("F32", "F16", "BF16"):
            raise ValueError(f"HiddenStates: {files[0].name} holds {dtype}; expected F32, F16 or BF16")


def _tensor(opened: Any, file: _File, about: dict[str, Any]) -> Tensor:
    """One tensor of an open file."""
    first, last = about["data_offsets"]
    if about["dtype"] not in _DTYPES:
        raise ValueError(f"HiddenStates: {file.name} holds {about['dtype']}; expected one of {', '.join(_DTYPES)}")
    opened.seek(file.start + first)
    content = bytearray(opened.read(last - first))
    if len(content) != last - first:
        raise ValueError(f"HiddenStates: {file.name} was cut off since it was opened; make it again")
    if not content:
        return torch.empty(about["shape"], dtype=_DTYPES[about["dtype"]])
    return torch.frombuffer(content, dtype=_DTYPES[about["dtype"]]).view(about["shape"])


def _grouped(files: list[_File]) -> list[list[_File]]:
    shards: list[list[_File]] = [[]]
    for file in files:
        if sum(one.rows for one in shards[-1]) >= SHARD_ROWS:
            shards.append([])
        if file.rows:
            shards[-1].append(file)
    return [shard for shard in shards if shard]
