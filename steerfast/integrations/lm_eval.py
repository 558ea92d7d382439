"""lm-evaluation-harness's steered model (`--model steered --model_args steer_path=...`): its .pt and its CSV.

A .pt is a dict of hookpoint -> {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}. A CSV
names features of sparse autoencoders instead; its columns are sparse_model, hookpoint, feature_index and
steering_coefficient, and optionally loader, action, head_index, sae_id and description.

A hookpoint is a module below the model's base model, whose output is edited: `layers.3` (GPT-2: `h.3`) is our
`resid_post` of layer 3, `layers.3.self_attn` `attn_out`, `layers.3.mlp` `mlp_out` (where a norm follows the module, its
output is not what the block adds; see `steering_vectors`). With coefficient c, vector v, v̂ = v/‖v‖ and bias b:

| action | lm-eval | here |
|---|---|---|
| add | x + c·v | `Add(c·v)` |
| clamp | x + (c − v̂·(x − b))·v̂ | `Clamp(v, low=t, high=t)`, t = c + v̂·b |

lm-eval 0.4.13 itself refuses every "add" row of a CSV, and of two rows for one hookpoint it takes the last; a .pt serves both.
A clamp is no direction: `read` and `load_directions` refuse it, `read_plan` reads both. Single heads are refused.
"""

from __future__ import annotations

import contextlib
import csv
import os
import re
from dataclasses import dataclass
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steerfast._checks import finite_number, one_of
from steerfast.directions.direction import Direction
from steerfast.directions.sets import DirectionSet
from steerfast.edits.base import Intervention
from steerfast.edits.linear import Add, Clamp
from steerfast.files.replace import replace_file
from steerfast.files.torch_file import as_vector, read_torch_file
from steerfast.plan import Plan

from .gguf import foreign, layer_of

_REQUIRED = {"sparse_model", "hookpoint", "feature_index", "steering_coefficient"}
_OPTIONAL = {"loader", "action", "head_index", "sae_id", "description", ""}
_FIELDS = {"steering_vector", "steering_coefficient", "action", "bias", "head_index"}
_LARGEST_CSV = 1 << 24  # bytes; a row has about a hundred
_BLOCK = r"(?:[A-Za-z_]+\.)*(?:layers|h|blocks)\.(?P<layer>0|[1-9][0-9]{0,4})"
_HOOKPOINTS = {
    "resid_post": re.compile(_BLOCK),
    "attn_out": re.compile(_BLOCK + r"\.(?:self_attn|attn|attention|self_attention)"),
    "mlp_out": re.compile(_BLOCK + r"\.mlp"),
}
_WEIGHTS = {"sparsify": "sae.safetensors", "sae_lens": "sae_weights.safetensors"}


@dataclass(frozen=True)
class _Entry:
    """One hookpoint of a file."""

    where: str
    site: str
    layer: int
    action: str
    vector: Tensor
    coefficient: float
    bias: Tensor | None
    kind: str

    def direction(self) -> Direction:
        if self.action != "add":
            raise ValueError(
                f"{self.where}: action is {self.action!r}; only 'add' is a direction: read the file as a plan, with "
                f"steerfast.integrations.lm_eval.read_plan"
            )
        if self.coefficient == 0:
            raise ValueError(f"{self.where}: steering_coefficient is 0, which steers nothing; remove the entry")
        text = self.kind if self.coefficient == 1 else f"{self.coefficient!r}·({self.kind})"
        vector = self.vector.float() * self.coefficient
        return foreign(vector, text, self.layer, self.site, None, self.where)

    def intervention(self) -> Intervention:
        if self.action == "add":
            return Add(self.direction().vector)
        unit = foreign(self.vector, self.kind, self.layer, self.site, None, self.where).normalized().vector
        target = self.coefficient
        if self.bias is not None:
            if self.bias.shape != unit.shape:
                raise ValueError(
                    f"{self.where}: bias has shape {tuple(self.bias.shape)}, the vector {tuple(unit.shape)}"
                )
            target += float(unit.double() @ self.bias.double())
        return Clamp(unit, low=finite_number(self.where, "the target", target), high=target)


def read(path: str | os.PathLike[str]) -> DirectionSet:
    """Read the .pt or the CSV of lm-eval's steered model, if it only adds.

    Args:
        path: the file. For a CSV, `sparse_model` must be a folder on this machine, relative to the working directory as
            in lm-eval: with the loader "sparsify" it holds <hookpoint>/sae.safetensors, with "sae_lens"
            <sae_id>/sae_weights.safetensors; only the one row of the decoder is read.

    Returns:
        One direction per hookpoint, named `<site>.<layer>`, with the coefficient multiplied in (in float32, as lm-eval
        does in the model's dtype).

    Raises:
        FileNotFoundError: a CSV names an autoencoder that is not on this machine.
        ValueError: damaged, another content, unknown fields, columns or hookpoints, an action other than "add", a bias,
            a head index, a coefficient of zero, two vectors for one layer and site, NaN or Inf, no such feature.

    Reference:
        https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/models/hf_steered.py

    Example:
        >>> plan = sf.integrations.lm_eval.read("steer.pt").plan()  # doctest: +SKIP
    """
    return _set(_entries(Path(path)))


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """Read the .pt or the CSV of lm-eval's steered model as a plan, clamps included.

    Args:
        path: as in `read`.

    Returns:
        A plan with one `Add` or `Clamp` per hookpoint, at all positions.

    Raises:
        FileNotFoundError, ValueError: as `read`; an action other than "add" and "clamp".

    Example:
        >>> with sf.steer(model, read_plan("steer.pt")):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    return Plan({(entry.site, entry.layer): entry.intervention() for entry in _entries(Path(path))})


def write(path: str | os.PathLike[str], directions: Any, blocks: str = "layers") -> Path:
    """Write the .pt of lm-eval's steered model.

    Args:
        path: the file, which lm-eval wants to end in .pt; replaced if it exists.
        directions: a `DirectionSet`, or what its constructor takes; one per layer, all at `resid_post`.
        blocks: name of the list of blocks below the model's base model: "layers" in most families, "h" in GPT-2, BLOOM
            and Falcon.

    Returns:
        The path. (lm-eval opens it with a full unpickler; it holds tensors, numbers and texts only.)

    Raises:
        ValueError: a direction of another site or without a layer, two for one layer, a name lm-eval would not find.

    Example:
        >>> sf.integrations.lm_eval.write("steer.pt", {14: 4.0 * v})  # doctest: +SKIP
    """
    chosen = DirectionSet(directions)
    content: dict[str, Any] = {}
    for name, direction in chosen.items():
        place = direction.origin.place
        hookpoint = f"{blocks}.{place and place.layer}"
        if place is not None and place.site != "resid_post":
            raise ValueError(
                f"lm_eval.write: {name!r} is of site {place.site!r}; only resid_post is the same module everywhere"
            )
        if not _HOOKPOINTS["resid_post"].fullmatch(hookpoint):
            raise ValueError(
                f"lm_eval.write: {name!r} would be at {hookpoint!r}; expected a list of blocks and a layer from 0"
            )
        if hookpoint in content:
            raise ValueError(f"lm_eval.write: two directions are at {hookpoint}; lm-eval takes one")
        content[hookpoint] = {
            "steering_vector": direction.vector.clone(),
            "steering_coefficient": 1.0,
            "action": "add",
            "bias": None,
            "head_index": None,
        }
    buffer = BytesIO()
    torch.save(content, buffer)
    target = Path(path)
    replace_file(target, buffer.getvalue())
    return target


def is_csv(head: bytes) -> bool:
    """Whether a file begins with the header line of lm-eval's CSV."""
    line = head.removeprefix(b"\xef\xbb\xbf").splitlines()[:1]
    columns = {cell.strip().strip('"') for cell in (line[0] if line else b"").decode("latin-1").split(",")}
    return {"sparse_model", "feature_index"} <= columns or {"hookpoint", "steering_coefficient"} <= columns


def recognises(content: Any) -> bool:
    """Whether the object of a torch file is lm-eval's."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(item, dict) and "steering_vector" in item for item in content.values())
    )


def from_content(content: dict[Any, dict[Any, Any]], path: Path) -> DirectionSet:
    """The directions of an object that `recognises` accepts."""
    return _set(_from_content(content, path))


def _set(entries: list[_Entry]) -> DirectionSet:
    return DirectionSet(sorted((entry.direction() for entry in entries), key=layer_of))


def _entries(path: Path) -> list[_Entry]:
    with open(path, "rb") as file:
        head = file.read(4096)
    if is_csv(head):
        return _from_csv(path)
    content = read_torch_file(path)
    if not recognises(content):
        raise ValueError(f"{path} holds no dict of hookpoint -> steering_vector and action, as lm-eval reads it")
    return _from_content(content, path)


def _from_content(content: dict[Any, dict[Any, Any]], path: Path) -> list[_Entry]:
    found = []
    for hookpoint, item in content.items():
        where = f"{path}: {hookpoint!r}"
        if unknown := sorted(map(repr, set(item) - _FIELDS)):
            raise ValueError(f"{where} has the unknown key {unknown[0]}; known are {', '.join(sorted(_FIELDS))}")
        action = _action(item.get("action"), item.get("head_index"), where)
        bias = None if item.get("bias") is None else as_vector(item["bias"], f"the bias of {hookpoint!r}", path)
        if bias is not None and action == "add":
            raise ValueError(f"{where} has a bias, which lm-eval itself refuses for the action 'add'")
        vector = as_vector(item["steering_vector"], f"{hookpoint!r}", path)
        coefficient = _coefficient(item.get("steering_coefficient", 1.0), where)
        found.append(_Entry(where, *_place(hookpoint, where), action, vector, coefficient, bias, "lm-eval"))
    return _consistent(found, path)


def _from_csv(path: Path) -> list[_Entry]:
    if path.stat().st_size > _LARGEST_CSV:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; a CSV of lm-eval has at most {_LARGEST_CSV}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.DictReader(StringIO(text, newline=""), restkey="more", restval="", strict=True)
        columns = [column.strip() for column in reader.fieldnames or ()]
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a CSV in UTF-8: {error}") from None
    if missing := sorted(_REQUIRED - set(columns)):
        raise ValueError(f"{path} lacks the column {missing[0]!r}; lm-eval's CSV has {', '.join(sorted(_REQUIRED))}")
    if unknown := sorted(set(columns) - _REQUIRED - _OPTIONAL):
        known = ", ".join(sorted(_REQUIRED | _OPTIONAL - {""}))
        raise ValueError(f"{path} has the unknown column {unknown[0]!r}; known are {known}")
    found = []
    for number, row in enumerate(rows, 2):
        if "more" in row:
            raise ValueError(f"{path}, line {number} has more cells than the header has columns")
        cells = {key.strip(): value.strip() for key, value in row.items()}
        found.append(_from_row(cells, f"{path}, line {number}"))
    return _consistent(found, path)


def _from_row(row: dict[str, str], where: str) -> _Entry:
    action = _action(row.get("action") or "add", row.get("head_index") or None, where)
    loader = row.get("loader") or "sparsify"
    if loader not in _WEIGHTS:
        raise ValueError(f"{where}: loader is {loader!r}; expected one of {', '.join(_WEIGHTS)}")
    place = _place(row["hookpoint"], where)  # before it becomes part of a path
    below = row["hookpoint"] if loader == "sparsify" else row.get("sae_id", "")
    if ".." in Path(below).parts or Path(below).is_absolute():
        raise ValueError(f"{where}: sae_id is {below!r}; expected a folder below sparse_model")
    if not row["sparse_model"]:
        raise ValueError(f"{where}: sparse_model is empty")
    if not re.fullmatch(r"[0-9]{1,9}", row["feature_index"]):
        raise ValueError(f"{where}: feature_index is {row['feature_index']!r}; expected a number from 0")
    coefficient = _coefficient(row["steering_coefficient"], where)
    weights, feature = Path(row["sparse_model"]) / below / _WEIGHTS[loader], int(row["feature_index"])
    vector, bias = _decoder_row(weights, feature, loader, where)
    kind = f"lm-eval feature {feature} of {row['sparse_model']}"
    return _Entry(where, *place, action, vector, coefficient, bias if action == "clamp" else None, kind)


def _decoder_row(weights: Path, feature: int, loader: str, where: str) -> tuple[Tensor, Tensor]:
    """Row of the decoder (F, d), and the decoder's bias (d,)."""
    if not weights.is_file():
        raise FileNotFoundError(
            f"{where}: {weights} is not on this machine; download the sparse autoencoder, and let sparse_model be the "
            f"folder it is in"
        )
    try:
        with safe_open(weights, framework="pt") as file:
            decoder = file.get_slice("W_dec")
            encoder = file.get_slice("encoder.weight" if loader == "sparsify" else "W_enc").get_shape()
            shape = decoder.get_shape()
            if len(shape) != 2 or (encoder if loader == "sparsify" else encoder[::-1]) != shape:
                raise ValueError(f"{where}: {weights} has W_dec {shape} and an encoder {encoder}, which do not fit")
            if feature >= shape[0]:
                raise ValueError(f"{where}: feature_index is {feature}; {weights} has {shape[0]} features")
            return decoder[feature : feature + 1][0].float(), file.get_tensor("b_dec").float()
    except SafetensorError as error:
        raise ValueError(f"{where}: {weights} is not such an autoencoder: {error}") from None


def _place(hookpoint: Any, where: str) -> tuple[str, int]:
    for site, pattern in _HOOKPOINTS.items():
        if isinstance(hookpoint, str) and (match := pattern.fullmatch(hookpoint)):
            return site, int(match["layer"])
    raise ValueError(
        f"{where}: hookpoint {hookpoint!r} is unknown; expected layers.<n> or h.<n>, alone or with .mlp or .self_attn"
    )


def _action(action: Any, head: Any, where: str) -> str:
    if head is not None:
        raise ValueError(f"{where}: head_index is {head!r}; a single head of a module's output is not supported")
    return one_of(where, "action", action, ("add", "clamp"))


def _coefficient(value: Any, where: str) -> float:
    if isinstance(value, str):  # a cell of a CSV file; what is no number there is named below
        with contextlib.suppress(ValueError):
            value = float(value)
    try:
        return finite_number(where, "steering_coefficient", value)
    except TypeError as error:
        raise ValueError(str(error)) from None


def _consistent(found: list[_Entry], path: Path) -> list[_Entry]:
    if not found:
        raise ValueError(f"{path} names no vectors")
    places = [(entry.site, entry.layer) for entry in found]
    for place in places:
        if places.count(place) > 1:
            raise ValueError(f"{path} has two vectors for layer {place[1]}, {place[0]}; expected one")
    if len(widths := {len(entry.vector) for entry in found}) > 1:
        raise ValueError(f"{path}: vectors have widths {sorted(widths)}; expected those of one model")
    return found
