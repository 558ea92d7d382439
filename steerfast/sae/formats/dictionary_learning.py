"""dictionary_learning: config.json and ae.pt, one class of dictionary each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from steerfast.place import Place
from steerfast.sae.model import SAE

from ._parts import Home, dictionary, fold, home_of, number, refuse, tensor, vector, whole, wide, width_of

BIAS = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
    "JumpReluAutoEncoder": "b_dec",
    "AutoEncoderTopK": "b_dec",
    "BatchTopKSAE": "b_dec",
    "MatryoshkaBatchTopKSAE": "b_dec",
}
"""The classes that are read, and what each calls the bias of its decoder."""
UNSUBTRACTED = {"AutoEncoderNew", "JumpReluAutoEncoder"}
MATRICES = {"JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE"}
"""The classes that keep W_enc (d, F) and W_dec (F, d); the others keep encoder.weight (F, d) and decoder.weight (d, F)."""


def read(config: dict[str, Any], tensors: dict[str, Any], path: Path) -> SAE:
    """A dictionary as the library itself loads it; BatchTopK selects by its threshold, as it does at inference."""
    trainer = config.get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or not isinstance(kind, str) or kind not in BIAS:
        raise refuse(path, f"trainer.dict_class in config.json is {kind!r}; expected one of {', '.join(BIAS)}")
    d = width_of(tensors, BIAS[kind], path)
    matrices = kind in MATRICES
    w_enc = dictionary(tensors, "W_enc" if matrices else "encoder.weight", d, path, transposed=matrices)
    w_dec = dictionary(tensors, "W_dec" if matrices else "decoder.weight", d, path, transposed=not matrices)
    count, b_dec = w_enc.shape[0], vector(tensors, BIAS[kind], d, path)
    k, threshold = None, None
    if kind == "GatedAutoEncoder":  # relu(e^r·y + b_mag)·[y + b_gate > 0]: a threshold on h = e^r·y + b_mag
        gain = wide(vector(tensors, "r_mag", count, path)).exp()
        b_enc, gate = (wide(vector(tensors, name, count, path)) for name in ("mag_bias", "gate_bias"))
        w_enc, threshold = gain[:, None] * wide(w_enc), b_enc - gain * gate
    else:
        b_enc = vector(tensors, "b_enc" if matrices else "encoder.bias", count, path)
    if kind == "AutoEncoder":
        norms = wide(w_dec).norm(dim=1)
        if not torch.allclose(
            norms, torch.ones_like(norms)
        ):  # the library rescales features to decoder rows of length 1
            w_enc, b_enc, w_dec = norms[:, None] * wide(w_enc), norms * wide(b_enc), wide(w_dec) / norms[:, None]
    elif kind == "AutoEncoderTopK":
        k = whole(tensors["k"] if "k" in tensors else trainer.get("k"), "k", path)
        tensors.get("threshold")  # kept for another selection, which is asked for by name
    elif kind == "JumpReluAutoEncoder":
        threshold = vector(tensors, "threshold", count, path)
    elif kind in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        theta = wide(tensor(tensors, "threshold", path))
        threshold = theta.new_full((count,), number(theta, "threshold", path))
        if float(threshold[0]) < 0:
            raise refuse(
                path, "its threshold was never set (it is negative), so BatchTopK has no rule for a single row"
            )
    return fold(
        w_enc, w_dec, b_enc, b_dec, subtract=kind not in UNSUBTRACTED, home=_home(trainer), k=k, threshold=threshold
    )


def _home(trainer: dict[str, Any]) -> Home:
    name = str(trainer.get("submodule_name") or "")
    found = re.fullmatch(r"(resid_pre|resid_post|attn_out|mlp_out)_layer_(\d+)", name)
    place = None if found is None else Place(found[1], int(found[2]))
    return home_of("dictionary_learning", place, name, trainer.get("lm_name"))
