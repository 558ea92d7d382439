"""OpenAI's sparse autoencoders: one .pt file with tensors and the activation's name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerfast.sae.model import SAE

from ._parts import dictionary, fold, home_of, refuse, vector, whole, width_of


def read(config: dict[str, Any], tensors: dict[str, Any], path: Path) -> SAE:
    """An SAE of OpenAI: pre_bias is subtracted first; with Top-K each row is normalised, and the reconstruction scaled back."""
    d = width_of(tensors, "pre_bias", path)
    w_enc = dictionary(tensors, "encoder.weight", d, path)
    w_dec = dictionary(tensors, "decoder.weight", d, path, transposed=True)
    b_enc, b_dec = vector(tensors, "latent_bias", w_enc.shape[0], path), vector(tensors, "pre_bias", d, path)
    home, name = home_of("OpenAI", None), tensors.get("activation", "ReLU")
    if name == "ReLU":
        return fold(w_enc, w_dec, b_enc, b_dec, subtract=True, home=home)
    if name != "TopK":
        raise refuse(path, f"activation {name!r}; expected ReLU or TopK")
    state = tensors.get("activation_state_dict", tensors)
    if not isinstance(state, Mapping) or state.get("postact_fn", "ReLU") != "ReLU":
        raise refuse(path, f"activation_state_dict is {state!r}; expected k, with a ReLU behind it")
    k = whole(state.get("k"), "k", path)
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=True, home=home, k=k, normalisation="layer_norm")
