"""The SAEs of the mutual-information paper: a .pth of {"weight": …, "config": …}, W_dec = W_encᵀ.

Reference:
    Wu et al. 2025 (arXiv:2502.15576), whose released code writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from steerfast.place import Place
from steerfast.sae.model import SAE

from ._parts import dictionary, fold, home_of, layer_of, refuse, vector, whole, width_of


def read(config: dict[str, Any], tensors: dict[str, Any], path: Path) -> SAE:
    """A tied SAE, relu(topk((x - b_dec)·W_enc + b_enc)), or ReLU alone where its config has no topK; `mask` takes no part."""
    config, tensors = tensors["config"], tensors["weight"]
    d = width_of(tensors, "b_dec", path)
    w_enc = dictionary(tensors, "W_enc", d, path, transposed=True)
    for name, size in (("d_inp", d), ("d_hide", w_enc.shape[0])):
        if whole(config.get(name), name, path) != size:
            raise refuse(
                path, f"{name} is {config[name]} in its config and {size} in its weights; they do not belong together"
            )
    b_enc, b_dec = vector(tensors, "b_enc", w_enc.shape[0], path), vector(tensors, "b_dec", d, path)
    k = None if config.get("topK") is None else whole(config["topK"], "topK", path)
    layer = layer_of(
        path, r"/[A-Za-z0-9]+_l(\d+)_[^/]*\.pth"
    )  # counted from 1: hidden_states[l], the output of block l − 1
    home = home_of("MI-SAE", Place("resid_post", layer - 1) if layer else None, f"l{layer}" if layer else "")
    return fold(w_enc, w_enc, b_enc, b_dec, subtract=True, home=home, k=k)
