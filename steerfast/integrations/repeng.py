"""repeng's ControlVector in memory. Its files are GGUF control vectors: see `steerfast.integrations.gguf`.

`directions[L]` is added to the output of decoder block L, counted from 0: our `resid_post` of layer L. repeng's default
method (`pca_diff`) gives vectors of norm 1; the coefficient of `set_control` is our `strength`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steerfast.directions.direction import Direction
from steerfast.directions.sets import DirectionSet
from steerfast.place import family

from .gguf import foreign, layer_of, single_site, without_zeros


def from_object(vector: Any) -> DirectionSet:
    """Return the directions of a repeng ControlVector; repeng itself is not needed.

    Args:
        vector: an object with `model_type` and `directions`, a dict of layer -> array (d,).

    Returns:
        One direction per layer, `resid_post.<layer>`; `model` is the vector's model type, such as "llama".

    Raises:
        TypeError: it has not these two; ValueError: a negative layer, widths that differ, NaN or Inf.

    Warns:
        UserWarning: the vector of a layer is all zero; it is left out.

    Reference:
        https://github.com/vgel/repeng

    Example:
        >>> vectors = from_object(ControlVector.train(model, tokenizer, dataset))  # doctest: +SKIP
    """
    rows, model = getattr(vector, "directions", None), getattr(vector, "model_type", None)
    if not isinstance(rows, Mapping) or not isinstance(model, str):
        raise TypeError(f"from_object: expected a ControlVector of repeng; got {type(vector).__name__}")
    found: list[Direction] = []
    for layer, row in without_zeros(rows, "ControlVector").items():
        if isinstance(layer, bool) or not hasattr(layer, "__index__") or layer < 0:
            raise ValueError(f"from_object: {layer!r} is not a layer; expected a number counted from 0")
        found.append(foreign(row, "repeng", int(layer), "resid_post", model, "ControlVector"))
    if len(widths := {len(direction.vector) for direction in found}) > 1:
        raise ValueError(f"from_object: vectors have widths {sorted(widths)}; a control vector is for one model")
    return DirectionSet(sorted(found, key=layer_of))


def to_object(directions: Any, model_type: str | None = None) -> Any:
    """Return a ControlVector of repeng, which must be installed.

    Args:
        directions: a `DirectionSet`, or what its constructor takes; all at `resid_post`, one per layer.
        model_type: as in the model's config; by default the family of the directions' model.

    Raises:
        ImportError: repeng is not installed; ValueError: another site, no layer, two directions for one layer.

    Example:
        >>> control_model.set_control(to_object({14: v}), 1.5)  # doctest: +SKIP
    """
    by_layer = single_site("to_object", DirectionSet(directions), "a control vector")
    try:
        from repeng import ControlVector  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("to_object: needs repeng; pip install repeng") from error
    kind = model_type or next((family(d.origin.model) for d in by_layer.values() if d.origin.model), "unknown")
    return ControlVector(kind, {layer: d.vector.numpy().copy() for layer, d in sorted(by_layer.items())})
