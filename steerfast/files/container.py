"""The folder that a plan, directions, a barrier, a velocity field, an SAE and a probe are saved as.

NAME.json beside NAME.safetensors.

The JSON says what it is ("kind"), in which form ("schema"), what is no tensor, and the checksum of the other file. Here is
the one writer and the one reader of them all, and the one wording of each error.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from steerfast._checks import FLOATS

from .replace import replace_files

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Kind:
    """One kind of folder.

    Attributes:
        name: Of its two files; the JSON's "kind" is "steerfast.<name>".
        noun: What it holds, as an error calls it.
        reader: The public function that reads it.
        writer: The public function that writes it.
        keys: Keys of the JSON beside "schema", "kind" and "tensors_sha256".
        optional: Keys that may be missing.
        schema: What is written; every one from 1 to it is read.
    """

    name: str
    noun: str
    reader: str
    writer: str
    keys: frozenset[str]
    optional: frozenset[str] = frozenset()
    schema: int = 1

    @property
    def text_name(self) -> str:
        """Name of the JSON file."""
        return f"{self.name}.json"

    @property
    def tensors_name(self) -> str:
        """Name of the file with the tensors."""
        return f"{self.name}.safetensors"

    @property
    def label(self) -> str:
        """The JSON's "kind"."""
        return f"steerfast.{self.name}"


_HEAD = frozenset({"schema", "kind", "tensors_sha256"})

PLAN = Kind(
    "plan",
    "a plan",
    "Plan.load",
    "Plan.save",
    frozenset({"positions", "model", "edits"}),
    frozenset({"special"}),
    schema=3,
)
"""Schema 3: a condition looks at any probe; before, at a direction. Schema 2: an edit of a Top-K SAE names the SAE, whose encoder
it carried in schema 1."""
DIRECTIONS = Kind(
    "directions", "a set of directions", "load_directions", "save_directions", frozenset({"model", "directions"})
)
BARRIER = Kind("barrier", "a barrier", "Barrier.load", "Barrier.save", frozenset({"barrier"}), schema=2)
"""Schema 2 says the origin, with the median norm of the activations; schema 1 said their mean norm."""
VELOCITY = Kind("velocity", "a velocity field", "VelocityField.load", "VelocityField.save", frozenset({"velocity"}))
SAE = Kind(
    "sae",
    "an SAE",
    "SAE.load",
    "SAE.save",
    frozenset({"features", "width", "k", "normalisation", "origin"}),
    frozenset({"fingerprint", "source", "transcoder"}),
    schema=3,
)
"""Schema 3 may hold a transcoder. Schema 2 says the fingerprint, by which a plan finds it, and tells its origin from what its
source says."""
PROBE = Kind(
    "probe",
    "a probe",
    "Probe.load",
    "Probe.save",
    frozenset({"type", "numbers", "place", "after", "origin", "tensors"}),
)
KINDS = (PLAN, DIRECTIONS, BARRIER, VELOCITY, SAE, PROBE)


def write(kind: Kind, folder: PathLike, text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Write both files, or leave the folder as it was; one that is not there is made.

    Returns:
        The folder.

    Raises:
        ValueError: a file stands where the folder should, a tensor or number is not finite, or a name is not free.
        TypeError: something in `text` is nothing that JSON knows.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{kind.writer}: {target} is a file; {_form(kind)}")
    if "__metadata__" in tensors:
        raise ValueError(f"{kind.writer}: '__metadata__' is a name that safetensors keeps for itself; choose another")
    _check_finite(kind.writer, "", tensors)
    blob = save_tensors(_apart(tensors))
    whole = {"schema": kind.schema, "kind": kind.label, **text, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
    try:
        content = json.dumps(whole, indent=2, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError(f"{kind.writer}: {kind.noun} holds a number that is NaN or infinite ({error})") from None
    made = [path for path in (target, *target.parents) if not path.exists()]
    target.mkdir(parents=True, exist_ok=True)
    try:
        replace_files(target, {kind.tensors_name: blob, kind.text_name: content})
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise
    return target


def read(kind: Kind, folder: PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write` was given: the JSON, with its three own keys, and the tensors, on the CPU. Nothing is executed.

    Raises:
        FileNotFoundError: the folder or one of the two files is missing.
        ValueError: the folder holds another kind, a newer schema, or unknown keys; the files are damaged or do not belong
            together; a tensor is not finite.
    """
    text = read_text(kind, folder)
    path = os.path.join(folder, kind.tensors_name)
    if not os.path.isfile(path):
        raise _absent(kind, folder, path)
    blob = Path(path).read_bytes()
    if hashlib.sha256(blob).hexdigest() != text["tensors_sha256"]:
        raise ValueError(
            f"{kind.reader}: {path} is not the file that {kind.text_name} beside it was written with; copy both again"
        )
    try:
        tensors = load_tensors(blob)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{kind.reader}: {path} is damaged ({error})") from None
    _check_finite(kind.reader, f"{path}: ", tensors)
    return text, tensors


def read_text(kind: Kind, folder: PathLike) -> dict[str, Any]:
    """The JSON of a folder alone, its kind, schema and keys checked; errors as in `read`."""
    path = os.path.join(folder, kind.text_name)
    try:
        with open(path, "rb", buffering=0) as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise _absent(kind, folder, path) from None
    try:
        text = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind.reader}: {path} is not JSON ({error})") from None
    _check_text(kind, folder, path, text)
    return text


def expect(
    kind: Kind, folder: PathLike, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...] | None]
) -> None:
    """Refuse a tensor that is missing, that the JSON does not name, or that has another shape; None: any.

    Raises:
        ValueError: which one, and in which file.
    """
    path = os.path.join(folder, kind.tensors_name)
    if missing := [name for name in shapes if name not in tensors]:
        raise ValueError(
            f"{kind.reader}: {path} lacks the tensor {missing[0]!r}, which {kind.text_name} names; copy both again"
        )
    if unknown := [name for name in tensors if name not in shapes]:
        raise ValueError(
            f"{kind.reader}: {path} holds the tensor {unknown[0]!r}, which {kind.text_name} does not name; copy both again"
        )
    for name, shape in shapes.items():
        if shape is not None and tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{kind.reader}: {path}: {name!r} has shape {tuple(tensors[name].shape)}; {kind.text_name} says {shape}"
            )


@contextmanager
def describing(kind: Kind, folder: PathLike) -> Iterator[None]:
    """What does not fit together while an object is built from a folder is an error of its JSON.

    Raises:
        ValueError: the reason, and the file.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
        path, reason = os.path.join(folder, kind.text_name), str(error).removeprefix(f"{kind.reader}: ")
        raise ValueError(f"{kind.reader}: {path} does not describe {kind.noun}: {reason}") from None


def kind_of(folder: PathLike) -> Kind | None:
    """The kind of folder that it is, the first if it is several; None: none of ours."""
    return next((kind for kind in KINDS if os.path.isfile(os.path.join(folder, kind.text_name))), None)


def wrong_kind(kind: Kind, folder: PathLike, found: Kind) -> ValueError:
    """The error for a folder of another kind."""
    return ValueError(
        f"{kind.reader}: {os.fspath(folder)} holds {found.noun}, not {kind.noun}: read it with {found.reader}"
    )


def _absent(kind: Kind, folder: PathLike, path: str) -> Exception:
    """The error for one of the two files that is not there."""
    found = kind_of(folder)
    own = (os.path.exists(os.path.join(folder, name)) for name in (kind.text_name, kind.tensors_name))
    if found is not None and not any(own):
        return wrong_kind(kind, folder, found)
    if os.path.exists(folder) and not os.path.isdir(folder):
        return ValueError(f"{kind.reader}: {os.fspath(folder)} is a file; {_form(kind)}")
    missing = path if os.path.isdir(folder) else os.fspath(folder)
    return FileNotFoundError(f"{kind.reader}: {missing} does not exist; {_form(kind)}")


def _form(kind: Kind) -> str:
    return f"{kind.noun} is a folder with {kind.text_name} and {kind.tensors_name}"


def _check_text(kind: Kind, folder: PathLike, path: str, text: Any) -> None:
    label = text.get("kind") if isinstance(text, dict) else None
    if label != kind.label:
        if found := next((other for other in KINDS if other.label == label), None):
            raise wrong_kind(kind, folder, found)
        raise ValueError(f'{kind.reader}: {path} is not {kind.noun} ("kind" is not "{kind.label}")')
    schema, known = text.get("schema"), "1" if kind.schema == 1 else f"1 to {kind.schema}"
    if type(schema) is not int or schema < 1:
        raise ValueError(f"{kind.reader}: {path} has schema {schema!r}; this version of steerfast reads {known}")
    if schema > kind.schema:
        raise ValueError(
            f"{kind.reader}: {path} has schema {schema}, newer than this version of steerfast, which reads {known}: upgrade it"
        )
    expected = _HEAD | kind.keys
    if text.keys() - kind.optional != expected:
        raise ValueError(f"{kind.reader}: {path} has keys {sorted(text)}; expected {sorted(expected)}")


def _check_finite(owner: str, where: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS and tensor.numel() and not all(map(math.isfinite, map(float, tensor.aminmax()))):
            raise ValueError(f"{owner}: {where}{name!r} holds NaN or Inf; nothing that steers may: make it anew")


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, each in a storage of its own, as safetensors takes them."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        pointer = here.untyped_storage().data_ptr()
        found[name] = here.clone() if pointer in storages else here
        storages.add(pointer)
    return found
