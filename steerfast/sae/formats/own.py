"""Our own format: sae.json beside sae.safetensors, see `steerfast.files.container`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerfast.files import container
from steerfast.place import Origin, Place
from steerfast.sae.model import SAE, Source
from steerfast.sae.transcoder import Transcoder


def save(sae: SAE, directory: Path) -> Path:
    """Write an SAE into a directory, both files or neither; returns the directory. Tied matrices are written once."""
    tied = sae.w_dec.is_set_to(sae.w_enc)  # not a transpose or another view of its memory
    text: dict[str, Any] = {
        "features": sae.features,
        "width": sae.d,
        "k": sae.k,
        "normalisation": sae.normalisation,
        "origin": sae.origin.numbers(),
        "source": vars(sae.source),
        "fingerprint": sae.fingerprint,
    }
    if isinstance(sae, Transcoder):
        text["transcoder"] = {"width_out": sae.d_out, "skip": sae.w_skip is not None, "reads": sae.reads.numbers()}
    tensors = {name: value for name, value in sae.tensors().items() if not (tied and name == "w_dec")}
    return container.write(container.SAE, directory, text, tensors)


def read(directory: Path) -> SAE:
    """An SAE that `save` wrote; a file without w_dec is tied, which its fingerprint has to confirm."""
    text, tensors = container.read(container.SAE, directory)
    tied = "w_dec" not in tensors and "w_enc" in tensors
    if tied:
        tensors["w_dec"] = tensors["w_enc"]
    features, d = text["features"], text["width"]
    over, out = text.get("transcoder"), d
    if over is not None:
        with container.describing(container.SAE, directory):
            out = over["width_out"]
    shapes = {"w_enc": (features, d), "w_dec": (features, out), "b_enc": (features,), "b_dec": (out,)}
    if text["k"] is None:
        shapes["threshold"] = (features,)
    if over is not None and over.get("skip"):
        shapes["w_skip"] = (out, d)
    container.expect(container.SAE, directory, tensors, shapes)
    with container.describing(container.SAE, directory):
        origin, source = _known(text)
        made: dict[str, Any] = {
            **tensors,
            "k": text["k"],
            "normalisation": text["normalisation"],
            "origin": origin,
            "source": source,
        }
        sae = SAE(**made) if over is None else Transcoder(**made, reads=Origin.restore(over["reads"]))
    if tied and text.get("fingerprint", sae.fingerprint) != sae.fingerprint:
        raise ValueError(
            f"{container.SAE.reader}: {directory / container.SAE.tensors_name} lacks w_dec, which was not w_enc in the SAE that "
            "was saved: its fingerprint is another one; save that SAE again"
        )
    return sae


def _known(text: dict[str, Any]) -> tuple[Origin, Source]:
    if "source" in text:
        return Origin.restore(text["origin"]), Source(**text["source"])
    old = text["origin"]  # schema 1: only our own files name a class
    place = None if old["place"] is None else Place(*old["place"])
    source = Source(old["source"], old["hook_name"], old["model"])
    return Origin((old["model"] or None) if old["source"] == "steerfast" else None, place), source
