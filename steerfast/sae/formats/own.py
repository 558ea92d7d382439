"""Our own format: sae.json beside sae.safetensors, see `steerfast.files.container`."""

from __future__ import annotations

from pathlib import Path

from steerfast.files import container
from steerfast.sae.model import SAE, Origin


def save(sae: SAE, directory: Path) -> Path:
    """Write an SAE into a directory, both files or neither; returns the directory. Tied matrices are written once."""
    tied = sae.w_dec.data_ptr() == sae.w_enc.data_ptr()
    text = {
        "features": sae.features,
        "width": sae.d,
        "k": sae.k,
        "normalisation": sae.normalisation,
        "origin": vars(sae.origin),
        "fingerprint": sae.fingerprint,
    }
    tensors = {name: value for name, value in sae.tensors().items() if not (tied and name == "w_dec")}
    return container.write(container.SAE, directory, text, tensors)


def read(directory: Path) -> SAE:
    """An SAE that `save` wrote; a file without w_dec is tied."""
    text, tensors = container.read(container.SAE, directory)
    if "w_dec" not in tensors and "w_enc" in tensors:
        tensors["w_dec"] = tensors["w_enc"]
    features, d = text["features"], text["width"]
    shapes = {"w_enc": (features, d), "w_dec": (features, d), "b_enc": (features,), "b_dec": (d,)}
    if text["k"] is None:
        shapes["threshold"] = (features,)
    container.expect(container.SAE, directory, tensors, shapes)
    with container.describing(container.SAE, directory):
        origin = dict(text["origin"])
        place = origin.pop("place")
        home = Origin(None if place is None else tuple(place), **origin)
        return SAE(**tensors, k=text["k"], normalisation=text["normalisation"], origin=home)
