"""EleutherAI's sparsify: cfg.json and sae.safetensors; the directory is named after the hookpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from steerfast.place import Place
from steerfast.sae.model import SAE, Source

from ._parts import dictionary, fold, home_of, refuse, setting, tensor, transcode, vector, whole, width_of


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """A Top-K SAE of sparsify, whose decoder bias is subtracted first, or a transcoder, whose is not."""
    if config.get("activation", "topk") != "topk":
        raise refuse(path, f"activation {config['activation']!r}; expected topk")
    if setting(config, "signed", path):
        raise refuse(path, "signed is set, so its features may be negative; only positive ones are read")
    d = width_of(tensors, "b_dec", path)
    if "d_in" in config and whole(config["d_in"], "d_in", path) != d:
        raise refuse(path, f"d_in is {config['d_in']} in cfg.json and {d} in the weights; they do not belong together")
    w_enc, w_dec = dictionary(tensors, "encoder.weight", d, path), dictionary(tensors, "W_dec", d, path)
    b_enc, b_dec = vector(tensors, "encoder.bias", w_enc.shape[0], path), vector(tensors, "b_dec", d, path)
    name, k = path.absolute().parent.name, whole(config.get("k"), "k", path)
    if setting(config, "transcode", path) or setting(config, "transcoder", path):
        found = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc, "b_dec": b_dec}
        if setting(config, "skip_connection", path) or "W_skip" in tensors:
            found["w_skip"] = tensor(tensors, "W_skip", path)
        # what the module adds to the stream is not known from its name: a norm may follow
        source = Source("sparsify", name and f"input of {name}", "", name and f"output of {name}")
        return transcode(found, (None, None), source, k)
    if setting(config, "skip_connection", path) or "W_skip" in tensors:
        raise refuse(
            path, "an SAE with a skip connection, which passes its own input on; only transcoders have one here"
        )
    # a block; its parts add other things to the stream
    block = re.fullmatch(r"(?:.+\.)?(?:layers|h|blocks)\.(\d+)", name)
    home = home_of("sparsify", None if block is None else Place("resid_post", int(block[1])), name)
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=True, home=home, k=k)
