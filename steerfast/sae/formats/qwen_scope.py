"""Qwen-Scope: layerN.sae.pt of a repository SAE-Res-MODEL-W32K-L0_50, whose name alone says k."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from steerfast.place import Place
from steerfast.sae.model import SAE

from ._parts import dictionary, fold, home_of, layer_of, told_k, vector, width_of

MODEL = r"SAE-Res-(Qwen[\w.-]+?)-W\d+K-L0_\d+(?=/)"
K = r"SAE-Res-Qwen[\w.-]+?-W\d+K-L0_(\d+)(?=/)"


def read(config: dict[str, Any], tensors: dict[str, Any], path: Path, k: int | None = None) -> SAE:
    """A Top-K SAE of Qwen-Scope, W_enc (F, d) and W_dec (d, F): ReLU behind the selection, nothing subtracted."""
    d = width_of(tensors, "b_dec", path)
    w_enc = dictionary(tensors, "W_enc", d, path)
    w_dec = dictionary(tensors, "W_dec", d, path, transposed=True)
    b_enc, b_dec = vector(tensors, "b_enc", w_enc.shape[0], path), vector(tensors, "b_dec", d, path)
    k = told_k(k, path, K)
    layer = layer_of(path, r"/layer(\d+)\.sae\.pt")
    models = set(re.findall(MODEL, "/".join(path.absolute().parts)))
    model = f"Qwen/{models.pop()}" if len(models) == 1 else ""
    place = None if layer is None else Place("resid_post", layer)
    home = home_of("Qwen-Scope", place, "" if layer is None else f"layer{layer}", model)
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=False, home=home, k=k)
