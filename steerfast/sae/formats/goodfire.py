"""Goodfire: one .pt or .pth of the layers of a module, by whose names its two forms are told apart.

Llama-3.1-8B-Instruct-SAE-l19.pth has `encoder_linear` and `decoder_linear` with their biases: ReLU, nothing subtracted, as
SAELens reads it. topk_sae_l15_exp16_k32.pt has `encoder_linear` without a bias, an embedding `decoder` (F, d) and `decoder_bias`:
Top-K of relu(W·(s·x - decoder_bias)), and says neither k nor s.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerfast._checks import as_tensor
from steerfast.place import Place
from steerfast.sae.model import SAE

from ._parts import Home, dictionary, fold, home_of, layer_of, refuse, told_k, vector, wide, width_of

LAYER = r"(?<=[-_])l(\d+)(?=[._])"


def read(
    config: dict[str, Any], tensors: dict[str, Any], path: Path, k: int | None = None, scale: float | None = None
) -> SAE:
    """An SAE of Goodfire; with k one that keeps the k largest."""
    layer = layer_of(path, LAYER)
    model = re.search(r"([A-Z][\w.-]+)-SAE-l\d+", path.name)
    home = home_of(
        "Goodfire",
        None if layer is None else Place("resid_post", layer),
        "" if layer is None else f"l{layer}",
        "" if model is None else model[1],
    )
    if "decoder_linear.weight" not in tensors:
        return _read_topk(tensors, path, home, told_k(k, path, r"topk_sae_l\d+_exp\d+_k(\d+)\.pt"), scale)
    if scale is not None:
        raise refuse(path, f"a file of Goodfire with decoder_linear needs no scale; leave scale={scale} away")
    d = width_of(tensors, "decoder_linear.bias", path)
    w_enc = dictionary(tensors, "encoder_linear.weight", d, path)
    w_dec = dictionary(tensors, "decoder_linear.weight", d, path, transposed=True)
    b_enc, b_dec = (
        vector(tensors, name, size, path)
        for name, size in (("encoder_linear.bias", w_enc.shape[0]), ("decoder_linear.bias", d))
    )
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=False, home=home, k=k)


def _read_topk(tensors: dict[str, Any], path: Path, home: Home, k: int, scale: float | None) -> SAE:
    if scale is None:
        raise refuse(
            path,
            "a Top-K file of Goodfire, trained on s·x, and s is not in it; give SAE.load(path, scale=s), the normalization "
            "constant of its release, or scale=1.0 if the rows were not scaled",
        )
    d = width_of(tensors, "decoder_bias", path)
    w_enc, w_dec = dictionary(tensors, "encoder_linear.weight", d, path), dictionary(tensors, "decoder.weight", d, path)
    b_enc = (
        vector(tensors, "encoder_linear.bias", w_enc.shape[0], path)
        if "encoder_linear.bias" in tensors
        else w_enc.new_zeros(w_enc.shape[0])
    )
    sae = fold(w_enc, w_dec, b_enc, vector(tensors, "decoder_bias", d, path), subtract=True, home=home, k=k)
    if scale == 1.0:
        return sae
    b_dec = as_tensor(sae.b_dec) / scale
    return replace(sae, w_enc=wide(sae.w_enc) * scale, w_dec=wide(sae.w_dec) / scale, b_dec=b_dec)
