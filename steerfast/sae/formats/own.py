"""Our own format: sae.json beside sae.safetensors, see `steerfast.files.container`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerfast.files import container
from steerfast.place import Origin, Place
from steerfast.sae.model import SAE, Source


def save(sae: SAE, directory: Path) -> Path:
    """Write an SAE into a directory, both files or neither; returns the directory. Tied matrices are written once."""
    tied = sae.w_dec.data_ptr() == sae.w_enc.data_ptr()
    text = {
        "features": sae.features,
        "width": sae.d,
        "k": sae.k,
        "normalisation": sae.normalisation,
        "origin": sae.origin.numbers(),
        "source": vars(sae.source),
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
        origin, source = _known(text)
        return SAE(**tensors, k=text["k"], normalisation=text["normalisation"], origin=origin, source=source)


def _known(text: dict[str, Any]) -> tuple[Origin, Source]:
    if "source" in text:
        return Origin.restore(text["origin"]), Source(**text["source"])
    old = text["origin"]  # schema 1: only our own files name a class
    place = None if old["place"] is None else Place(*old["place"])
    source = Source(old["source"], old["hook_name"], old["model"])
    return Origin((old["model"] or None) if old["source"] == "steerfast" else None, place), source
