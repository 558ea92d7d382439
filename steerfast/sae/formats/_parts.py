"""What every reader needs: safe reading of files, settings and tensors by name with clear errors, exact folding."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.files.torch_file import read_torch_file
from steerfast.place import Origin, Place
from steerfast.sae.model import SAE, Source
from steerfast.sae.transcoder import Transcoder

Home = tuple[Origin, Source]
"""Where an SAE belongs, as we say it and as its file does."""


def home_of(library: str, place: Place | None, hook_name: str = "", model: object = None) -> Home:
    """What the file of a library says of the place; it names no class of a model."""
    return Origin(place=place), Source(library, hook_name, str(model or ""))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"SAE.load: {path} is not JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"SAE.load: {path} holds a {type(found).__name__}; expected an object with the SAE's settings")
    return found


class Tensors(dict[str, Any]):
    """What a file holds by name, and which of it was read; a mapping inside it is another one."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        inner = {name: Tensors(value) if isinstance(value, Mapping) else value for name, value in found.items()}
        super().__init__(inner)
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As of a dictionary."""
        self._read.add(name)
        return super().get(name, default)

    def unread(self) -> list[str]:
        """Tensors that no reader asked for, and whose names say that they change what an SAE computes."""
        found = [name for name, value in self.items() if isinstance(value, Tensor) and name not in self._read]
        inner = [name for value in self.values() if isinstance(value, Tensors) for name in value.unread()]
        return [name for name in found if _MEANING.search(name)] + inner


_MEANING = re.compile(r"thresh|skip|scal|gate|glu|mag|mean|matrix|bias|weight|^[wb]_", re.IGNORECASE)


def read_tensors(path: Path) -> Tensors:
    """The tensors of a .safetensors, .npz or .pt file by name, on the CPU; a .pt may hold settings, too."""
    if path.suffix == ".safetensors":
        return Tensors(_read_safetensors(path))
    if path.suffix == ".npz":
        return Tensors(_read_npz(path))
    found = read_torch_file(path)
    if not isinstance(found, Mapping):
        raise ValueError(f"SAE.load: {path} holds a {type(found).__name__}; expected tensors by name")
    return Tensors(found)


def tensor(tensors: Mapping[str, Any], name: str, path: Path) -> Tensor:
    """A floating tensor of a file by its name."""
    value = tensors.get(name)
    if value is None:
        raise ValueError(f"SAE.load: {path} has no tensor {name!r}; it has {', '.join(sorted(map(str, tensors)))}")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        raise ValueError(f"SAE.load: {path}: {name!r} is not a dense floating tensor")
    return value.detach()


def rows_of(tensors: Mapping[str, Any], name: str, path: Path, *, transposed: bool = False) -> Tensor:
    """A weight matrix as rows (F, d), whatever d is; transposed: the family keeps (d, F)."""
    matrix = tensor(tensors, name, path)
    if matrix.dim() != 2:
        raise ValueError(f"SAE.load: {path}: {name!r} has shape {tuple(matrix.shape)}; expected a matrix")
    if matrix.shape[0] == matrix.shape[1]:
        raise ValueError(
            f"SAE.load: {path}: {name!r} is {matrix.shape[0]}×{matrix.shape[1]}, so its shape does not show whether features "
            "are rows or columns; build sf.SAE(w_enc, w_dec, …) from its tensors yourself"
        )
    return (matrix.T if transposed else matrix).contiguous()


def dictionary(tensors: Mapping[str, Any], name: str, width: int, path: Path, *, transposed: bool = False) -> Tensor:
    """A weight matrix as rows (F, d), checked against the width d of the stream; transposed: the family keeps (d, F)."""
    rows = rows_of(tensors, name, path, transposed=transposed)
    if rows.shape[1] != width:
        shape, expected = tuple(tensors[name].shape), f"({width}, F)" if transposed else f"(F, {width})"
        raise ValueError(f"SAE.load: {path}: {name!r} has shape {shape}; this family keeps {expected}")
    return rows


def vector(tensors: Mapping[str, Any], name: str, size: int, path: Path) -> Tensor:
    """A vector (size,)."""
    found = tensor(tensors, name, path)
    if tuple(found.shape) != (size,):
        raise ValueError(f"SAE.load: {path}: {name!r} has shape {tuple(found.shape)}; expected ({size},)")
    return found


def width_of(tensors: Mapping[str, Any], name: str, path: Path) -> int:
    """d, from a bias of the stream."""
    found = tensor(tensors, name, path)
    if found.dim() != 1:
        raise ValueError(f"SAE.load: {path}: {name!r} has shape {tuple(found.shape)}; expected (d,)")
    return found.shape[0]


def whole(value: Any, name: str, path: Path) -> int:
    """A whole number of a configuration."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        raise ValueError(f"SAE.load: {path}: {name} is {value!r}; expected a whole number")
    return int(value)


def number(value: Any, name: str, path: Path, above: float = -math.inf) -> float:
    """A finite number of a configuration, or the one in a tensor, larger than `above`."""
    found = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(found, bool) or not isinstance(found, int | float) or not above < found < math.inf:
        least = "" if above == -math.inf else f" > {above:g}"
        raise ValueError(f"SAE.load: {path}: {name} is {found!r}; expected a number{least}")
    return float(found)


def setting(config: Mapping[str, Any], name: str, path: Path, default: bool = False) -> bool:
    """A setting that is true or false."""
    value = config.get(name, default)
    if value is None and not default:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"SAE.load: {path}: {name} is {value!r}; expected true or false")
    return value


def refuse(path: Path, what: str) -> ValueError:
    """The error for something that an SAE of ours cannot hold exactly."""
    return ValueError(f"SAE.load: {path}: {what}")


def fold(
    w_enc: Tensor,
    w_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    subtract: bool,
    home: Home,
    k: int | None = None,
    threshold: Tensor | None = None,
    normalisation: str = "none",
) -> SAE:
    """The SAE with the subtracted decoder bias folded in, h = W(x - b_dec) + b; biases in float32 at least.

    A negative threshold is a gate that the ReLU behind it closes at zero.
    """
    b_enc, b_dec = wide(b_enc), wide(b_dec)
    if subtract:
        b_enc = (b_enc.double() - product(w_enc, b_dec.double())).to(b_enc.dtype)
    threshold = None if threshold is None else _closed_at_zero(threshold)
    return SAE(w_enc, w_dec, b_enc, b_dec, k, threshold, normalisation, *home)


def transcode(
    tensors: Mapping[str, Tensor],
    places: tuple[Place | None, Place | None],
    source: Source,
    k: int | None = None,
) -> Transcoder:
    """A transcoder from tensors under our names, (place that it reads, place that it writes); no bias is subtracted."""
    found: dict[str, Any] = {name: wide(value) if value.dim() == 1 else value for name, value in tensors.items()}
    if "threshold" in found:
        found["threshold"] = _closed_at_zero(found["threshold"])
    reads, writes = (Origin(place=place) for place in places)
    return Transcoder(**found, k=k, origin=writes, source=source, reads=reads)


def _closed_at_zero(threshold: Tensor) -> Tensor:
    """θ ≥ 0; what is not finite stays, so that it is refused."""
    threshold = wide(threshold)
    return torch.where(threshold.isfinite(), threshold.clamp(min=0), threshold)


def told_k(k: int | None, path: Path, pattern: str = "") -> int:
    """k of a Top-K file: as given, or as the names of its folders and of itself say it, the pattern's first group.

    Raises:
        ValueError: neither, or two that differ.
    """
    said = {int(found) for found in re.findall(pattern, "/".join(path.absolute().parts))} if pattern else set()
    if k is not None and said - {k}:
        raise refuse(path, f"its name says k = {min(said - {k})}; leave k={k} away")
    if k is None and len(said) != 1:
        raise refuse(path, "a Top-K SAE, and neither the file nor its name says k; give SAE.load(path, k=…)")
    return k if k is not None else said.pop()


def layer_of(path: Path, pattern: str) -> int | None:
    """The layer that the names of a file and its folders say, the pattern's first group; None: none, or several."""
    said = {int(found) for found in re.findall(pattern, "/".join(path.absolute().parts))}
    return said.pop() if len(said) == 1 else None


def product(rows: Tensor, vector: Tensor) -> Tensor:
    """rows @ vector in float64, a block of rows at a time."""
    return torch.cat([block.double() @ vector for block in rows.split(4096)])


def wide(values: Tensor) -> Tensor:
    """At least float32: what is scaled or folded is not rounded to 16 bits again."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"SAE.load: {path} is truncated or damaged ({error})") from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except Exception as error:  # whatever a damaged archive provokes in the reader is one thing to the user
        raise ValueError(f"SAE.load: {path} is truncated, damaged or no archive of arrays ({error})") from None
