"""Whether an SAE belongs to a model: one place, one width, one family, or a message that says what does not fit."""

from __future__ import annotations

from typing import Any

from steerfast._checks import warn_user
from steerfast.models.layers import find_layers
from steerfast.models.points import Point
from steerfast.place import family

from .model import SAE
from .transcoder import Transcoder


def point_of(owner: str, sae: SAE, model: Any) -> tuple[int, Point]:
    """The layer that an SAE reads in a model, and the point there.

    Raises:
        ValueError: the SAE knows no place that it reads (an MLP's input is no site), or has another width than the model there.

    Warns:
        UserWarning: the SAE's origin names a model of another family.
    """
    found = find_layers(model, owner)
    place = sae.reads.place if isinstance(sae, Transcoder) else sae.place
    if place is None:
        field = "reads=" if isinstance(sae, Transcoder) else ""
        raise ValueError(
            f"{owner}: {sae} does not know the place that it reads; give it {field}Origin(place=(site, layer))"
        )
    site, layer = place
    point = found.point(layer, site, owner)
    if point.width != sae.d:
        raise ValueError(f"{owner}: {sae} has width {sae.d}, {point.path} has {point.width}; is it another model's?")
    warn_of_another_model(owner, sae, found.name)
    return layer, point


def warn_of_another_model(owner: str, sae: SAE, name: str) -> None:
    """Warn where the SAE's origin names a model of another family than the class that is given."""
    known = sae.origin.model
    if known is not None and family(known) not in ("unknown", family(name)):
        warn_user(f"{owner}: {sae!r} comes from activations of {known}; this model is a {name}")
