"""SAELens: cfg.json and sae_weights.safetensors, from version 3 to 6."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import as_tensor
from steerfast.place import place_of_hook
from steerfast.sae.model import SAE, Source

from ._parts import (
    Home,
    dictionary,
    fold,
    home_of,
    number,
    read_json,
    read_tensors,
    refuse,
    rows_of,
    setting,
    tensor,
    transcode,
    vector,
    whole,
    wide,
    width_of,
)

CENTRED = re.compile(r"gpt2|pythia|gpt-neo|gpt-j", re.IGNORECASE)
"""Models with LayerNorm, whose writing weights TransformerLens centres when it is told to."""
NOT_CENTRED = re.compile(r"llama|gemma|mistral|mixtral|qwen|smollm", re.IGNORECASE)
"""Models with RMSNorm, whose writing weights it leaves alone."""


TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
KINDS = ("relu", "topk", "abstopk", "jumprelu", "gated", "batchtopk", "matryoshka_batchtopk")
FUNCTIONS = {"topk": "topk", "jumprelu": "relu", "gated": "relu"}
"""What versions 3 to 5 put behind h by name, `activation_fn`, in an architecture that has a name of its own."""
REFUSED = {
    "matching_pursuit": "it finds its features one after another, each on what the ones before it left; no selection does that",
    "temporal": "it attends across the tokens before a row, so a row alone does not tell its features",
}
WHITENING = "activation_whitening.safetensors"
"""Beside a checkpoint: mean (d,), matrix M (d, d) and inverse_matrix, for z = (x - mean)·M."""

Folding = dict[str, Tensor]
"""w_enc, w_dec, b_enc, b_dec, and threshold where there is one, under way."""


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path, scale: float | None = None) -> SAE:
    """An SAE of SAELens, an SAE in training among them, with all that surrounds its two products folded in."""
    return read_beside(config, tensors, path, scale, path.parent)


def read_beside(
    config: dict[str, Any], tensors: dict[str, Tensor], path: Path, scale: float | None, folder: Path | None
) -> SAE:
    """The same, with the scaler and the whitening of a checkpoint in a folder; None: there are none."""
    config = _flat(config)
    kind = _architecture(config, path)
    factors = tensors.get("scaling_factor")
    if setting(config, "finetuning_scaling_factor", path) or (factors is not None and not bool((factors == 1).all())):
        raise refuse(path, "finetuning_scaling_factor is set; fold it into the weights with SAELens first")
    if kind in TRANSCODERS:
        if scale is not None:
            raise refuse(path, f"a transcoder needs no scale; leave scale={scale} away")
        return _transcoder(config, tensors, path, kind)
    found = _weights(config, tensors, path, kind)
    k = whole(config.get("k"), "k", path) if kind in ("topk", "abstopk") else None
    if kind not in ("relu", "gated", "jumprelu") and setting(config, "rescale_acts_by_decoder_norm", path):
        found = _by_decoder_norm(found)
    subtract, whitening = setting(config, "apply_b_dec_to_input", path, True), None
    scale, normalisation = _normalisation(config, path, scale, folder)
    if normalisation == "covariance_whitening":
        whitening, normalisation = _whitening(found["b_dec"].shape[0], path, folder), "none"
    sae = fold(**found, subtract=subtract, home=_home(config, path), k=k, normalisation=normalisation)
    if scale != 1.0:  # the encoder sees scale·x, so b_dec was subtracted from that
        w_enc, w_dec, b_dec = wide(sae.w_enc) * scale, wide(sae.w_dec) / scale, wide(found["b_dec"]) / scale
        sae = replace(sae, w_enc=w_enc, w_dec=w_dec, b_dec=b_dec)
    if whitening is not None:
        sae = _unwhitened(sae, *whitening)
    if _is_centred(config, path):
        if normalisation == "constant_norm_rescale":
            raise refuse(path, "the length of a centred row (center_writing_weights) cannot be had from the row itself")
        w_enc = wide(sae.w_enc)
        sae = replace(sae, w_enc=w_enc - w_enc.mean(dim=1, keepdim=True))
    return _both_signs(sae) if kind == "abstopk" else sae


def _weights(config: dict[str, Any], tensors: dict[str, Tensor], path: Path, kind: str) -> Folding:
    d = width_of(tensors, "b_dec", path)
    w_enc, w_dec = dictionary(tensors, "W_enc", d, path, transposed=True), dictionary(tensors, "W_dec", d, path)
    b_dec, count = vector(tensors, "b_dec", d, path), w_enc.shape[0]
    _check_sizes(config, {"d_in": d, "d_sae": count}, path)
    if w_dec.shape != w_enc.shape:
        raise refuse(
            path, f"W_dec has shape {tuple(w_dec.shape)} and W_enc {tuple(w_enc.T.shape)}; expected the same F"
        )
    if kind == "gated":  # relu(e^r·y + b_mag)·[y + b_gate > 0], y = Wx: a threshold on h = e^r·y + b_mag
        gain = wide(vector(tensors, "r_mag", count, path)).exp()
        magnitude, gate = (wide(vector(tensors, name, count, path)) for name in ("b_mag", "b_gate"))
        found = {"w_enc": gain[:, None] * wide(w_enc), "b_enc": magnitude, "threshold": magnitude - gain * gate}
        return {**found, "w_dec": w_dec, "b_dec": b_dec}
    found = {"w_enc": w_enc, "b_enc": vector(tensors, "b_enc", count, path), "w_dec": w_dec, "b_dec": b_dec}
    if kind == "jumprelu":
        found["threshold"] = _threshold(tensors, count, path)
    elif kind in ("batchtopk", "matryoshka_batchtopk"):  # one number for all features, in float64
        theta = number(tensor(tensors, "topk_threshold", path), "topk_threshold", path)
        found["threshold"] = b_dec.new_full((count,), theta, dtype=torch.float32)
    return found


def _threshold(tensors: dict[str, Tensor], count: int, path: Path) -> Tensor:
    if "log_threshold" in tensors:  # in training, of older versions
        return wide(vector(tensors, "log_threshold", count, path)).exp()
    return vector(tensors, "threshold", count, path)


def _check_sizes(config: dict[str, Any], sizes: dict[str, int], path: Path) -> None:
    for name, size in sizes.items():
        if name in config and whole(config[name], name, path) != size:
            raise refuse(
                path, f"{name} is {config[name]} in cfg.json and {size} in the weights; they do not belong together"
            )


def _by_decoder_norm(found: Folding) -> Folding:
    """Selected by h·‖W_dec‖, which is what SAELens returns as the feature, and decoded by rows of length 1."""
    norm, w_dec = wide(found["w_dec"]).norm(dim=1), wide(found["w_dec"])
    changed = {"w_enc": norm[:, None] * wide(found["w_enc"]), "b_enc": norm * wide(found["b_enc"])}
    return {**found, **changed, "w_dec": w_dec / norm[:, None]}


def _transcoder(config: dict[str, Any], tensors: dict[str, Tensor], path: Path, kind: str) -> SAE:
    """A transcoder, with or without a skip connection, ReLU or JumpReLU; its b_dec is never subtracted."""
    if (name := config.get("normalize_activations") or "none") != "none":
        raise refuse(path, f"a transcoder with normalize_activations {name!r}, which says nothing of what it writes")
    w_enc, w_dec = rows_of(tensors, "W_enc", path, transposed=True), rows_of(tensors, "W_dec", path)
    (count, d), out = w_enc.shape, w_dec.shape[1]
    _check_sizes(config, {"d_in": d, "d_sae": count, "d_out": out}, path)
    found = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": vector(tensors, "b_enc", count, path)}
    found["b_dec"] = vector(tensors, "b_dec", out, path)
    if "jumprelu" in kind:
        found["threshold"] = _threshold(tensors, count, path)
    if "skip" in kind:
        found["w_skip"] = tensor(tensors, "W_skip", path)
    hooks = str(config.get("hook_name") or ""), str(config.get("hook_name_out") or "")
    source = Source("SAELens", hooks[0], str(config.get("model_name") or ""), hooks[1])
    return transcode(found, (place_of_hook(hooks[0]), place_of_hook(hooks[1])), source)


def _whitening(d: int, path: Path, folder: Path | None) -> tuple[Tensor, Tensor, Tensor]:
    """mean, M and its inverse, for z = (x - mean)·M."""
    file = None if folder is None else folder / WHITENING
    if file is None or not file.is_file():
        raise refuse(
            path,
            f"normalize_activations is 'covariance_whitening', and there is no {WHITENING} beside it with the matrices",
        )
    tensors = read_tensors(file)
    matrices = [tensor(tensors, name, file) for name in ("matrix", "inverse_matrix")]
    if any(tuple(matrix.shape) != (d, d) for matrix in matrices):
        raise refuse(file, f"its matrices have shapes {[tuple(m.shape) for m in matrices]}; expected ({d}, {d})")
    return vector(tensors, "mean", d, file), matrices[0], matrices[1]


def _unwhitened(sae: SAE, mean: Tensor, matrix: Tensor, inverse: Tensor) -> SAE:
    """The same SAE of x instead of (x - mean)·M, in float64 and rounded once."""
    dtype = wide(sae.w_enc).dtype
    w_enc = torch.cat([part.double() @ matrix.double().T for part in sae.w_enc.split(4096)])
    w_dec = torch.cat([part.double() @ inverse.double() for part in sae.w_dec.split(4096)])
    b_enc = as_tensor(sae.b_enc).double() - w_enc @ mean.double()
    b_dec = as_tensor(sae.b_dec).double() @ inverse.double() + mean.double()
    new = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc, "b_dec": b_dec}
    return replace(sae, **{name: value.to(dtype) for name, value in new.items()})  # type: ignore[arg-type]


def _both_signs(sae: SAE) -> SAE:
    """AbsTopK keeps the k largest |h| with their signs: feature i where h > 0, feature F + i, with -W_dec, where h < 0."""
    turned = {name: torch.cat([value, -value]) for name, value in sae.tensors().items() if name != "b_dec"}
    return replace(sae, **turned)  # type: ignore[arg-type]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of any version under the names of version 6, its metadata among them."""
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    metadata = config.get("metadata")
    flat = {**(metadata if isinstance(metadata, dict) else {}), **config}
    flat = {renamed.get(name, name): value for name, value in flat.items()}
    arguments = flat.get("activation_fn_kwargs")
    if flat.get("k") is None and isinstance(arguments, dict):
        flat["k"] = arguments.get("k")
    return flat


def _within(config: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """Settings inside the settings; none where there are none."""
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise refuse(path, f"{name} is {found!r}; expected settings by name")
    return found


def _architecture(config: dict[str, Any], path: Path) -> str:
    """One of `KINDS` and `TRANSCODERS`."""
    kind = str(config.get("architecture", "standard"))
    function = config.get("activation_fn") or "relu"
    if kind == "standard":
        kind = {"relu": "relu", "topk": "topk"}.get(str(function), f"standard with {function}")
        if kind == "relu" and config.get("k") is not None:
            raise refuse(
                path, f"it says k = {config['k']}, and no architecture that has one; add the architecture to cfg.json"
            )
    elif config.get("activation_fn") and function not in (FUNCTIONS.get(kind, function), kind):
        raise refuse(
            path,
            f"activation_fn is {function!r} and the architecture {kind!r}, which is read with {FUNCTIONS[kind]!r} alone; mend "
            "the setting if the weights were trained so",
        )
    if setting(_within(config, "activation_fn_kwargs", path), "signed", path):
        raise refuse(path, "signed is set, so its features may be negative; only positive ones are read")
    if kind in REFUSED:
        raise refuse(path, f"architecture {kind!r}: {REFUSED[kind]}")
    if kind not in KINDS and kind not in TRANSCODERS:
        known = ", ".join(("standard (ReLU or Top-K)", *KINDS[1:], *TRANSCODERS))
        raise refuse(path, f"architecture {kind!r}; expected one of {known}")
    return kind


def _normalisation(config: dict[str, Any], path: Path, given: float | None, folder: Path | None) -> tuple[float, str]:
    """(scale of the data set, what is done to each row)."""
    name = config.get("normalize_activations") or "none"
    name = "expected_average_only_in" if name is True else name
    scaler = (folder or Path("no folder")) / "activation_scaler.json"
    if name == "expected_average_only_in":
        factor = read_json(scaler).get("scaling_factor") if folder is not None and scaler.is_file() else None
        factor = config.get("norm_scaling_factor") if factor is None else factor  # of the list of releases
        if factor is None and given is None:  # SAELens marks a file "none" when it folds the scale in
            raise refuse(
                path,
                f"normalize_activations is {name!r}, so it was trained on s·x, and there is no {scaler.name} with s; give "
                "SAE.load(path, scale=s), s = √d over the mean length of the rows that it was trained on, or scale=1.0 if "
                "you know that the weights have it folded in",
            )
        if factor is not None and given is not None:
            raise refuse(path, f"{scaler.name} says scaling_factor {factor}; leave scale={given} away")
        return number(factor if given is None else given, "scaling_factor", scaler, 0), "none"
    if given is not None:
        raise refuse(path, f"normalize_activations is {name!r}, which needs no scale; leave scale={given} away")
    if name not in ("none", "constant_norm_rescale", "layer_norm", "covariance_whitening"):
        raise refuse(path, f"normalize_activations is {name!r}, which is not known")
    return 1.0, str(name)


def _is_centred(config: dict[str, Any], path: Path) -> bool:
    """Whether the SAE saw a stream whose mean over d TransformerLens had removed."""
    arguments = _within(config, "model_from_pretrained_kwargs", path)
    hook, model = str(config.get("hook_name")), str(config.get("model_name"))
    if hook.endswith("hook_z"):
        names = ("fold_value_biases", "refactor_factored_attn_matrices")
        changed = [name for name in names if setting(arguments, name, path)]
        if changed:
            raise refuse(
                path, f"it was trained on a model with {changed[0]}, which changes hook_z; it cannot be applied exactly"
            )
        return False
    if "center_writing_weights" not in arguments:
        if "hook_point" in config:
            raise refuse(path, "version 2 does not say whether the writing weights were centred")
        return False
    if not setting(arguments, "center_writing_weights", path) or NOT_CENTRED.search(model):
        return False
    if not CENTRED.search(model):
        raise refuse(
            path, f"center_writing_weights is set, and whether that changed the stream of {model!r} is not known"
        )
    return True


def _home(config: dict[str, Any], path: Path) -> Home:
    hook, head = str(config.get("hook_name") or ""), config.get("hook_head_index")
    place = place_of_hook(hook) if head is None else None  # one head alone is no site of ours
    name = hook if head is None else f"{hook} of head {head}"
    return home_of("SAELens", place, name, config.get("model_name"))
