"""Vectors of the library steering-vectors: a SteeringVector has `layer_activations` and `layer_type`.

The library adds the vector to the output of a module of the layer, counted from 0:

| layer_type | our site |
|---|---|
| decoder_block | resid_post |
| self_attn | attn_out |
| mlp | mlp_out |
| input_layernorm, post_attention_layernorm | none: refused |

Where a norm follows the module (Gemma 2 and 3, OLMo 2) or the module was handed the residual (BLOOM, MPT), the output
of the module is not what the block adds to the stream, so a vector of `self_attn` or `mlp` means something else there:
the reader warns about these two.

The library has no format of its own; people save the object with torch.save. Such a file is read without the library
and without running anything: a class of ours stands in for SteeringVector.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import tensor_of
from steerfast.directions.direction import Direction
from steerfast.directions.sets import DirectionSet
from steerfast.files.replace import replace_file
from steerfast.files.torch_file import as_vector, read_torch_file

from .gguf import foreign, layer_of, single_site, without_zeros

SITES = {"decoder_block": "resid_post", "self_attn": "attn_out", "mlp": "mlp_out"}
_KIND = "steering-vectors"


@dataclass
class _StandIn:
    layer_activations: dict[int, Tensor]
    layer_type: str = "decoder_block"


STAND_IN: list[tuple[type, str]] = [
    (_StandIn, f"{module}.SteeringVector") for module in ("steering_vectors.steering_vector", "steering_vectors")
]


def read(path: str | os.PathLike[str]) -> DirectionSet:
    """Read a SteeringVector, or a dict of its two fields, that torch.save wrote.

    Args:
        path: the file.

    Returns:
        One direction per layer, named `<site>.<layer>`.

    Raises:
        ValueError: damaged, another content, unknown fields, a layer_type that is no site, NaN or Inf.

    Warns:
        UserWarning: layer_type is "self_attn" or "mlp", see above; the vector of a layer is all zero, and is left out.

    Reference:
        https://github.com/steering-vectors/steering-vectors

    Example:
        >>> vectors = sf.integrations.steering_vectors.read("vector.pt")  # doctest: +SKIP
    """
    source = Path(path)
    content = read_torch_file(source, STAND_IN)
    if not recognises(content):
        raise ValueError(f"{source} holds a {type(content).__name__}; expected a SteeringVector or a dict of its two")
    return from_content(content, source, depth=4)


def write(path: str | os.PathLike[str], directions: Any) -> Path:
    """Write the two fields of a SteeringVector with torch.save: `SteeringVector(**torch.load(path))` reads them.

    Args:
        path: the file; replaced if it exists.
        directions: a `DirectionSet`, or what its constructor takes; all of one site, one per layer.

    Returns:
        The path.

    Raises:
        ValueError: sites differ or are unknown to the library, a direction without a layer, two for one layer.

    Example:
        >>> sf.integrations.steering_vectors.write("vector.pt", {14: v})  # doctest: +SKIP
    """
    buffer = BytesIO()
    torch.save(_fields("steering_vectors.write", directions), buffer)
    target = Path(path)
    replace_file(target, buffer.getvalue())
    return target


def from_object(vector: Any) -> DirectionSet:
    """Return the directions of a SteeringVector in memory; the library itself is not needed.

    Args:
        vector: an object with `layer_activations` and `layer_type`.

    Raises:
        TypeError: it has not these two; ValueError: as `read`.

    Example:
        >>> vectors = from_object(train_steering_vector(model, tokenizer, samples))  # doctest: +SKIP
    """
    if not hasattr(vector, "layer_activations") or not hasattr(vector, "layer_type"):
        raise TypeError(f"from_object: expected a SteeringVector; got {type(vector).__name__}")
    return _directions(vector.layer_activations, vector.layer_type, None, depth=3)


def to_object(directions: Any) -> Any:
    """Return a SteeringVector of the library steering-vectors, which must be installed.

    Args:
        directions: as in `write`.

    Raises:
        ImportError: steering-vectors is not installed; ValueError: as `write`.

    Example:
        >>> with to_object({14: v}).apply(model, multiplier=4.0):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    try:
        from steering_vectors import SteeringVector  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("to_object: needs steering-vectors; pip install steering-vectors") from error
    return SteeringVector(**_fields("to_object", directions))


def recognises(content: Any) -> bool:
    """Whether the object of a torch file is one of this library."""
    return isinstance(content, _StandIn) or (isinstance(content, dict) and "layer_activations" in content)


def from_content(content: Any, path: Path, depth: int = 5) -> DirectionSet:
    """The directions of an object that `recognises` accepts; a warning points `depth` calls up."""
    fields = vars(content) if isinstance(content, _StandIn) else content
    if unknown := sorted(map(repr, set(fields) - {"layer_activations", "layer_type"})):
        raise ValueError(f"{path}: unknown field {unknown[0]}; a SteeringVector has layer_activations and layer_type")
    if "layer_activations" not in fields:
        raise ValueError(f"{path}: the SteeringVector has no layer_activations")
    return _directions(fields["layer_activations"], fields.get("layer_type", "decoder_block"), path, depth)


def _directions(activations: Any, layer_type: Any, path: Path | None, depth: int) -> DirectionSet:
    name = "SteeringVector" if path is None else str(path)
    if not isinstance(layer_type, str) or layer_type not in SITES:
        raise ValueError(f"{name}: layer_type is {layer_type!r}; expected one of {', '.join(SITES)}")
    if not isinstance(activations, dict) or not activations:
        raise ValueError(f"{name}: layer_activations is {activations!r:.60}; expected a dict of layer -> tensor")
    found: list[Direction] = []
    for layer, value in without_zeros(activations, name).items():
        if type(layer) is not int or layer < 0:
            raise ValueError(f"{name}: {layer!r} is not a layer; expected a number counted from 0")
        vector = value if path is None else as_vector(value, f"layer {layer}", path)
        found.append(foreign(tensor_of(vector).flatten(), _KIND, layer, SITES[layer_type], None, name))
    if len(widths := {len(direction.vector) for direction in found}) > 1:
        raise ValueError(f"{name}: vectors have widths {sorted(widths)}; a SteeringVector is for one model")
    if layer_type != "decoder_block":
        warnings.warn(
            f"{name}: layer_type {layer_type!r} is read as {SITES[layer_type]}, which is the same except where a norm "
            f"follows the module or the module is handed the residual (Gemma 2 and 3, OLMo 2, BLOOM, MPT)",
            UserWarning,
            stacklevel=depth,
        )
    return DirectionSet(sorted(found, key=layer_of))


def _fields(owner: str, directions: Any) -> dict[str, Any]:
    chosen = DirectionSet(directions)
    site = _site_of(next(iter(chosen.values())))
    layer_type = next((kind for kind, ours in SITES.items() if ours == site), None)
    if layer_type is None:
        raise ValueError(f"{owner}: steering-vectors has no layer_type for site {site!r}; it has {', '.join(SITES)}")
    by_layer = single_site(owner, chosen, "a SteeringVector", site)
    activations = {layer: direction.vector.clone() for layer, direction in sorted(by_layer.items())}
    return {"layer_activations": activations, "layer_type": layer_type}


def _site_of(direction: Direction) -> str:
    return "resid_post" if direction.origin.place is None else direction.origin.place.site
