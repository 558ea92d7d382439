"""llamascopium 2, and the later files of Llama Scope: config.json beside sae_weights.safetensors.

**Its own fold.** `standardize_parameters_of_dataset_norm` writes norm_activation "inference" and scales W_D and b_E, but not the
threshold that h·‖W_D‖ is compared with, so other features are on than in training. A JumpReLU file that says "inference" is
therefore refused without `scale=`: s, √d over the mean length of what it writes, gives the features of training, and 1.0 those
that llamascopium computes from the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.place import place_of_hook
from steerfast.sae.model import SAE, Source

from ._parts import fold, home_of, number, refuse, rows_of, setting, tensor, transcode, vector, whole, wide

KINDS = {
    "clt": "a cross-layer transcoder, which writes several layers",
    "crosscoder": "a crosscoder, which reads several layers",
    "lorsa": "a low-rank sparse attention, which attends across tokens",
    "molt": "a mixture of linear transforms, whose features are matrices",
}


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path, scale: float | None = None) -> SAE:
    """An SAE or a transcoder of llamascopium, gated by h·‖W_D‖ unless its config says otherwise; both lengths are folded in."""
    kind = str(config.get("sae_type", "sae"))
    if kind != "sae":
        raise refuse(path, f"sae_type {kind!r}: {KINDS.get(kind, 'which is not known')}")
    if setting(config, "use_glu_encoder", path):
        raise refuse(path, "use_glu_encoder is set: a feature is the product of two encoders, which no selection does")
    hooks = (
        str(config.get("hook_point_in") or ""),
        str(config.get("hook_point_out") or config.get("hook_point_in") or ""),
    )
    w_enc, w_dec, b_enc, b_dec = _weights(config, tensors, path)
    count, norms = w_enc.shape[0], wide(w_dec).norm(dim=1)
    by_norm = setting(config, "sparsity_include_decoder_norm", path, True)
    gate = norms if by_norm else torch.ones_like(norms)
    before, after, normalisation = _lengths(config, tensors, hooks, path, w_enc.shape[1])
    k, threshold = _selection(config, tensors, path, count, gate)
    if threshold is not None and config.get("norm_activation") == "inference":
        if scale is None:
            side = "writes" if by_norm else "reads"
            raise refuse(
                path,
                "norm_activation is 'inference': llamascopium has folded the lengths of its data set into the weights and "
                "left the threshold, so other features are on than in training. Give SAE.load(path, scale=s), s = √d over the "
                f"mean length of what it {side}, for those of training, or scale=1.0 for those of the file as it is",
            )
        threshold = threshold / scale
    elif scale is not None:
        raise refuse(path, f"it needs no scale; leave scale={scale} away")
    if before != 1.0:
        w_enc = wide(w_enc) * before
    if after != 1.0:
        w_dec, b_dec = wide(w_dec) / after, wide(b_dec) / after
    if hooks[0] == hooks[1]:
        home = home_of("llamascopium", place_of_hook(hooks[0]), hooks[0])
        return fold(w_enc, w_dec, b_enc, b_dec, False, home, k, threshold, normalisation)
    if normalisation != "none":
        raise refuse(
            path, "a transcoder whose rows are each normalised; the length of what it writes is not in what it reads"
        )
    found = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc, "b_dec": b_dec}
    if threshold is not None:
        found["threshold"] = threshold
    source = Source("llamascopium", hooks[0], "", hooks[1])
    return transcode(found, (place_of_hook(hooks[0]), place_of_hook(hooks[1])), source, k)


def _weights(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Encoder and decoder as rows, and the biases."""
    older = "encoder.weight" in tensors  # of Llama Scope R1: layers of a module, (F, d) and (d, F)
    names = (
        ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias") if older else ("W_E", "W_D", "b_E", "b_D")
    )
    w_enc = rows_of(tensors, names[0], path, transposed=not older)
    w_dec = rows_of(tensors, names[1], path, transposed=older)
    count, out = w_dec.shape
    if "d_model" in config and whole(config["d_model"], "d_model", path) != out:
        raise refuse(path, f"d_model is {config['d_model']} in config.json, and {names[1]} writes {out}")
    if w_enc.shape != w_dec.shape:
        raise refuse(
            path, f"{names[0]} has {tuple(w_enc.shape)} as rows and {names[1]} {tuple(w_dec.shape)}; expected the same"
        )
    b_enc = vector(tensors, names[2], count, path)
    if not setting(config, "use_decoder_bias", path, True):
        return w_enc, w_dec, b_enc, w_dec.new_zeros(out)
    return w_enc, w_dec, b_enc, vector(tensors, names[3], out, path)


def _lengths(
    config: dict[str, Any], tensors: dict[str, Tensor], hooks: tuple[str, str], path: Path, d: int
) -> tuple[float, float, str]:
    """√d over the mean length of what goes in and of what comes out; and what is done to each row."""
    kind = config.get("norm_activation", "dataset-wise")
    if kind == "inference":
        return 1.0, 1.0, "none"
    if kind == "token-wise":
        return 1.0, 1.0, "constant_norm_rescale"
    if kind != "dataset-wise":
        raise refuse(path, f"norm_activation is {kind!r}, a length of the batch that no single row shows")
    found = []
    for hook in hooks:  # only here: with any other norm_activation these hold memory that was never written
        name = f"dataset_average_activation_norm.{hook}"
        found.append(d**0.5 / number(tensor(tensors, name, path), name, path, 0))
    return found[0], found[1], "none"


def _selection(
    config: dict[str, Any], tensors: dict[str, Tensor], path: Path, count: int, gate: Tensor
) -> tuple[int | None, Tensor | None]:
    """k, or the threshold on h; neither: ReLU."""
    function = str(config.get("act_fn", "relu")).lower()
    if function == "relu":
        return None, None
    if function == "jumprelu":
        names = [name for name in tensors if name.rpartition(".")[2] == "log_jumprelu_threshold"]
        log = vector(tensors, names[0] if names else "activation_function.log_jumprelu_threshold", count, path)
        return None, wide(log).exp() / gate
    if function != "topk":
        raise refuse(
            path, f"act_fn {function!r}, which selects across a batch; convert it to JumpReLU with llamascopium first"
        )
    if not torch.allclose(gate, gate[:1].expand_as(gate), rtol=1e-6, atol=0):
        raise refuse(path, "Top-K of h·‖W_D‖ that returns h itself; convert it to JumpReLU with llamascopium first")
    return whole(config.get("top_k"), "top_k", path), None
