"""Llama Scope: hyperparams.json and final.safetensors, with the mean length of its data set on both sides.

**The unit of its threshold.** The encoder was trained on rows scaled by s = √d/‖x‖_mean, so a pre-activation h is in that
unit. The one number `jump_relu_threshold`, θ, is very probably in that of the unscaled stream, and a feature is on where
h > θ·s. Nothing says so and no weights could be had to try it; but SAELens multiplies, and the published θ grow with the
length of the stream from layer to layer while θ·s is nearly constant (2.05, 1.95, 1.66).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.place import place_of_hook
from steerfast.sae.model import SAE

from ._parts import dictionary, fold, home_of, number, refuse, setting, vector, whole, wide, width_of


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """An SAE of Llama Scope: h = s·W·x + b, s = √d/‖x‖_mean, gated by h·‖W_dec‖ > θ·s or h > θ·s; s is folded in."""
    d = width_of(tensors, "decoder.bias", path)
    w_enc = dictionary(tensors, "encoder.weight", d, path)
    w_dec = dictionary(tensors, "decoder.weight", d, path, transposed=True)
    count = w_enc.shape[0]
    b_enc, b_dec = vector(tensors, "encoder.bias", count, path), vector(tensors, "decoder.bias", d, path)
    if "d_model" in config and whole(config["d_model"], "d_model", path) != d:
        raise refuse(path, f"d_model is {config['d_model']} in hyperparams.json and {d} in the weights")
    hook, out = str(config.get("hook_point_in") or ""), config.get("hook_point_out")
    if out not in (None, hook):
        raise refuse(path, f"a transcoder from {hook} to {out}; only SAEs are read")
    names = ("apply_decoder_bias_to_pre_encoder", "use_glu_encoder")
    unknown = [name for name in names if setting(config, name, path)]
    if unknown:
        raise refuse(path, f"{unknown[0]} is set, which this reader does not know")
    function, norms = str(config.get("act_fn", "jumprelu")).lower(), None
    if setting(config, "sparsity_include_decoder_norm", path):
        norms = wide(w_dec).norm(dim=1)
    before, after = _scales(config, d, path)
    k: int | None = None
    threshold: Tensor | None = None  # ReLU
    if function == "jumprelu":
        threshold = torch.full(
            (count,), number(_needed(config, "jump_relu_threshold", path), "jump_relu_threshold", path) * before
        )
        threshold = threshold if norms is None else threshold / norms
    elif function == "topk":
        if norms is not None:
            raise refuse(path, "Top-K of h·‖W_dec‖ that returns h itself; convert it to JumpReLU, as the release was")
        k = whole(_needed(config, "top_k", path), "top_k", path)
    elif function != "relu":
        raise refuse(path, f"act_fn {function!r}; expected jumprelu, topk or relu")
    if (before, after) != (1.0, 1.0):
        w_enc, w_dec, b_dec = wide(w_enc) * before, wide(w_dec) / after, wide(b_dec) / after
    home = home_of("Llama Scope", place_of_hook(hook), hook, config.get("model_name"))
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=False, home=home, k=k, threshold=threshold)


def _scales(config: dict[str, Any], d: int, path: Path) -> tuple[float, float]:
    """√d over the mean length of what goes in, and of what comes out."""
    kind = config.get("norm_activation", "dataset-wise")
    if kind in ("inference", "none"):
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise refuse(path, f"norm_activation is {kind!r}; expected dataset-wise, inference or none")
    name = "dataset_average_activation_norm"
    lengths = _needed(config, name, path)
    if not isinstance(lengths, dict) or not {"in", "out"} <= set(lengths):
        raise refuse(path, f"{name} is {lengths!r}; expected lengths > 0 under in and out")
    before, after = (number(lengths[side], f"{name}.{side}", path, 0) for side in ("in", "out"))
    return d**0.5 / before, d**0.5 / after


def _needed(config: dict[str, Any], name: str, path: Path) -> Any:
    if config.get(name) is None:
        raise refuse(path, f"hyperparams.json has no {name}")
    return config[name]
