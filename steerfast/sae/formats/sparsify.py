"""EleutherAI's sparsify: cfg.json and sae.safetensors; the directory is named after the hookpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from steerfast.place import Place
from steerfast.sae.model import SAE

from ._parts import dictionary, fold, home_of, refuse, vector, whole, width_of


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """A Top-K SAE of sparsify; its decoder bias is subtracted first."""
    if config.get("transcode") or config.get("transcoder") or config.get("skip_connection") or "W_skip" in tensors:
        raise refuse(path, "a transcoder, which reads and writes different places; only SAEs are read")
    if config.get("activation", "topk") != "topk":
        raise refuse(path, f"activation {config['activation']!r}; expected topk")
    d = width_of(tensors, "b_dec", path)
    if "d_in" in config and whole(config["d_in"], "d_in", path) != d:
        raise refuse(path, f"d_in is {config['d_in']} in cfg.json and {d} in the weights; they do not belong together")
    w_enc, w_dec = dictionary(tensors, "encoder.weight", d, path), dictionary(tensors, "W_dec", d, path)
    b_enc, b_dec = vector(tensors, "encoder.bias", w_enc.shape[0], path), vector(tensors, "b_dec", d, path)
    name = path.resolve().parent.name
    found = re.fullmatch(
        r"(?:.+\.)?(?:layers|h|blocks)\.(\d+)", name
    )  # a block; its parts add other things to the stream
    place = None if found is None else Place("resid_post", int(found[1]))
    home = home_of("sparsify", place, name)
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=True, home=home, k=whole(config.get("k"), "k", path))
