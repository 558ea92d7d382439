"""SAELens: cfg.json and sae_weights.safetensors, from version 3 to 6."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..._files import replace_file
from ._parts import HOOKS, dictionary, fold, place_of_hook, read_json, refuse, vector, whole, wide, width_of

if TYPE_CHECKING:
    from ..model import SAE

CENTRED = re.compile(r"gpt2|pythia|gpt-neo|gpt-j", re.IGNORECASE)
"""Models with LayerNorm, whose writing weights TransformerLens centres when it is told to."""
NOT_CENTRED = re.compile(r"llama|gemma|mistral|mixtral|qwen|smollm", re.IGNORECASE)
"""Models with RMSNorm, whose writing weights it leaves alone."""
OUR_SITES = {site: name for name, site in HOOKS.items()}


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """An SAE of SAELens, with the scale of its data set, its decoder bias and its gates folded in."""
    from ..model import Origin

    config = _flat(config)
    kind = _architecture(config, path)
    if config.get("finetuning_scaling_factor"):
        raise refuse(path, "finetuning_scaling_factor is set; fold it into the weights with SAELens first")
    d = width_of(tensors, "b_dec", path)
    w_enc = dictionary(tensors, "W_enc", d, path, transposed=True)
    w_dec = dictionary(tensors, "W_dec", d, path)
    b_dec, count = vector(tensors, "b_dec", d, path), w_enc.shape[0]
    for name, size in (("d_in", d), ("d_sae", count)):
        if name in config and whole(config[name], name, path) != size:
            raise refuse(path, f"{name} is {config[name]} in cfg.json and {size} in the weights; they do not belong together")
    k, threshold = None, None
    if kind == "gated":  # relu(e^r·y + b_mag)·[y + b_gate > 0], y = Wx: a threshold on h = e^r·y + b_mag
        gain = wide(vector(tensors, "r_mag", count, path)).exp()
        magnitude, gate = (wide(vector(tensors, name, count, path)) for name in ("b_mag", "b_gate"))
        w_enc, b_enc, threshold = gain[:, None] * wide(w_enc), magnitude, magnitude - gain * gate
    else:
        b_enc = vector(tensors, "b_enc", count, path)
    if kind == "jumprelu":
        threshold = vector(tensors, "threshold", count, path)
    elif kind == "topk":
        k = whole(config.get("k"), "k", path)
        if config.get("rescale_acts_by_decoder_norm"):
            norm = wide(w_dec).norm(dim=1)
            w_enc, b_enc, w_dec = norm[:, None] * wide(w_enc), norm * wide(b_enc), wide(w_dec) / norm[:, None]
    # b_dec is subtracted from the row that the encoder sees: after the scale, and on the centred stream
    scale, normalisation = _normalisation(config, path)
    sae = fold(
        w_enc, w_dec, b_enc, b_dec,
        subtract=bool(config.get("apply_b_dec_to_input", True)),
        origin=_origin(config, path), k=k, threshold=threshold, normalisation=normalisation,
    )  # fmt: skip
    if scale is None and not _is_centred(config, path):
        return sae
    from dataclasses import replace

    w_enc, w_dec = sae.w_enc, sae.w_dec
    if scale is not None:
        w_enc, w_dec = wide(w_enc) * scale, wide(w_dec) / scale
        sae = replace(sae, b_dec=wide(sae.b_dec) / scale)  # type: ignore[arg-type]
    if _is_centred(config, path):
        w_enc = wide(w_enc) - wide(w_enc).mean(dim=1, keepdim=True)
    return replace(sae, w_enc=w_enc, w_dec=w_dec, origin=Origin(**vars(sae.origin)))
