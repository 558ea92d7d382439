"""Our own format: sae.json beside sae.safetensors, with a schema version and the checksum of the tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from steerfast.files.replace import replace_file
from steerfast.sae.model import SAE, Origin

from ._parts import refuse

SCHEMA = 1
KEYS = {"kind", "schema", "features", "width", "k", "normalisation", "origin", "tensors_sha256"}
TENSORS = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"}


def save(sae: SAE, directory: Path) -> Path:
    """Write an SAE into a directory, each file whole or not at all; returns the directory."""
    from safetensors.torch import save as save_tensors

    directory.mkdir(parents=True, exist_ok=True)
    tied = sae.w_dec.data_ptr() == sae.w_enc.data_ptr()
    blob = save_tensors(
        {
            name: value.detach().cpu().contiguous()
            for name, value in sae.tensors().items()
            if not (tied and name == "w_dec")
        }
    )
    text = {
        "kind": "steerfast.sae",
        "schema": SCHEMA,
        "features": sae.features,
        "width": sae.d,
        "k": sae.k,
        "normalisation": sae.normalisation,
        "origin": vars(sae.origin),
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
    }
    replace_file(directory / "sae.safetensors", blob)
    replace_file(directory / "sae.json", json.dumps(text, indent=2).encode())
    return directory


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """An SAE that `save` wrote; a file without w_dec is tied."""
    if config.get("kind") != "steerfast.sae":
        raise refuse(path, '"kind" in sae.json is not "steerfast.sae"')
    if config.get("schema") != SCHEMA:
        raise refuse(path, f"schema {config.get('schema')!r}; this version reads schema {SCHEMA}")
    if set(config) != KEYS or not {"w_enc", "b_enc", "b_dec"} <= set(tensors) <= TENSORS:
        raise refuse(path, f"keys {sorted(config)} and tensors {sorted(tensors)} are not those of schema {SCHEMA}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != config["tensors_sha256"]:
        raise refuse(path, "not the file that sae.json was written with; copy both again")
    try:
        origin = dict(config["origin"])
        place = origin.pop("place")
        made = SAE(
            **{"w_dec": tensors["w_enc"], **tensors},
            k=config["k"],
            normalisation=config["normalisation"],
            origin=Origin(None if place is None else tuple(place), **origin),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise refuse(path, f"does not describe an SAE: {error}") from None
    if (made.features, made.d) != (config["features"], config["width"]):
        raise refuse(
            path, f"holds {made.features}×{made.d} weights; sae.json says {config['features']}×{config['width']}"
        )
    return made
