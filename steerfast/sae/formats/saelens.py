"""SAELens: cfg.json and sae_weights.safetensors, from version 3 to 6."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from steerfast.files.replace import replace_files
from steerfast.place import place_of_hook
from steerfast.sae.model import SAE

from ._parts import Home, dictionary, fold, home_of, read_json, refuse, vector, whole, wide, width_of

CENTRED = re.compile(r"gpt2|pythia|gpt-neo|gpt-j", re.IGNORECASE)
"""Models with LayerNorm, whose writing weights TransformerLens centres when it is told to."""
NOT_CENTRED = re.compile(r"llama|gemma|mistral|mixtral|qwen|smollm", re.IGNORECASE)
"""Models with RMSNorm, whose writing weights it leaves alone."""


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path, scale: float | None = None) -> SAE:
    """An SAE of SAELens, with the scale of its data set, its decoder bias and its gates folded in."""
    config = _flat(config)
    kind = _architecture(config, path)
    factors = tensors.get("scaling_factor")
    if config.get("finetuning_scaling_factor") or (factors is not None and not bool((factors == 1).all())):
        raise refuse(path, "finetuning_scaling_factor is set; fold it into the weights with SAELens first")
    d = width_of(tensors, "b_dec", path)
    w_enc = dictionary(tensors, "W_enc", d, path, transposed=True)
    w_dec = dictionary(tensors, "W_dec", d, path)
    b_dec, count = vector(tensors, "b_dec", d, path), w_enc.shape[0]
    for name, size in (("d_in", d), ("d_sae", count)):
        if name in config and whole(config[name], name, path) != size:
            raise refuse(
                path, f"{name} is {config[name]} in cfg.json and {size} in the weights; they do not belong together"
            )
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
    scale, normalisation = _normalisation(config, path, scale)
    sae = fold(
        w_enc, w_dec, b_enc, b_dec,
        subtract=bool(config.get("apply_b_dec_to_input", True)),
        home=_home(config, path), k=k, threshold=threshold, normalisation=normalisation,
    )  # fmt: skip
    if scale != 1.0:  # the encoder sees scale·x, so b_dec was subtracted from that
        w_enc, w_dec, b_dec = wide(sae.w_enc) * scale, wide(sae.w_dec) / scale, wide(b_dec) / scale
        sae = replace(sae, w_enc=w_enc, w_dec=w_dec, b_dec=b_dec)
    if _is_centred(config, path):
        if normalisation == "constant_norm_rescale":
            raise refuse(path, "the length of a centred row (center_writing_weights) cannot be had from the row itself")
        w_enc = wide(sae.w_enc)
        sae = replace(sae, w_enc=w_enc - w_enc.mean(dim=1, keepdim=True))
    return sae


def save_saelens(sae: SAE, directory: str | os.PathLike[str]) -> Path:
    """Write an SAE as SAELens 6 reads it, cfg.json and sae_weights.safetensors; what was folded stays folded.

    Args:
        sae: The SAE.
        directory: Where to; it is made, and both files are written or neither.

    Returns:
        The directory.

    Example:
        >>> import tempfile, torch, steerfast as sf
        >>> from steerfast.sae.formats import save_saelens
        >>> sf.SAE.load(save_saelens(sf.SAE(torch.ones(3, 2), torch.ones(3, 2), k=1), tempfile.mkdtemp()))
        SAE(F=3, d=2, k=1, place=None, torch.float32)
    """
    from safetensors.torch import save as save_tensors

    architecture = {"topk": "topk", "relu": "standard", "jumprelu": "jumprelu"}[sae.activation]
    tensors = {"W_enc": sae.w_enc.T, "W_dec": sae.w_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if architecture == "jumprelu":
        tensors["threshold"] = sae.threshold
    config = {
        "architecture": architecture,
        "d_in": sae.d,
        "d_sae": sae.features,
        "dtype": str(sae.w_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,  # folded into b_enc
        "normalize_activations": sae.normalisation,
        "reshape_activations": "hook_z" if sae.place is not None and sae.place[0] == "head_out" else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": sae.source.model or sae.origin.model or None,
            "hook_name": sae.place.hook_name if sae.place else sae.source.hook_name or None,
            "hook_head_index": None,
        },
    }
    if sae.k is not None:
        config["k"] = sae.k
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    blob = save_tensors(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items() if value is not None}
    )
    text = json.dumps(config, indent=2).encode()
    replace_files(target, {"sae_weights.safetensors": blob, "cfg.json": text})
    return target


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


def _architecture(config: dict[str, Any], path: Path) -> str:
    """One of relu, topk, jumprelu and gated."""
    kind = str(config.get("architecture", "standard"))
    function = config.get("activation_fn") or "relu"
    if kind == "standard":
        kind = {"relu": "relu", "topk": "topk"}.get(str(function), f"standard with {function}")
    if kind not in ("relu", "topk", "jumprelu", "gated"):
        raise refuse(path, f"architecture {kind!r}; expected standard (ReLU or Top-K), topk, jumprelu or gated")
    return kind


def _normalisation(config: dict[str, Any], path: Path, given: float | None) -> tuple[float, str]:
    """(scale of the data set, what is done to each row)."""
    name = config.get("normalize_activations") or "none"
    name = "expected_average_only_in" if name is True else name
    scaler = path.parent / "activation_scaler.json"
    if name == "expected_average_only_in":
        factor = read_json(scaler).get("scaling_factor") if scaler.is_file() else None
        if factor is None and given is None:  # SAELens marks a file "none" when it folds the scale in
            raise refuse(
                path,
                f"normalize_activations is {name!r}, so it was trained on s·x, and there is no {scaler.name} with s; give "
                "SAE.load(path, scale=s), s = √d over the mean length of the rows that it was trained on, or scale=1.0 if "
                "you know that the weights have it folded in",
            )
        if factor is not None and given is not None:
            raise refuse(path, f"{scaler.name} says scaling_factor {factor}; leave scale={given} away")
        return _positive(factor if given is None else given, scaler), "none"
    if given is not None:
        raise refuse(path, f"normalize_activations is {name!r}, which needs no scale; leave scale={given} away")
    if name not in ("none", "constant_norm_rescale", "layer_norm"):
        raise refuse(path, f"normalize_activations is {name!r}, which is not known")
    return 1.0, str(name)


def _positive(factor: Any, path: Path) -> float:
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise refuse(path, f"scaling_factor is {factor!r}; expected a number > 0")
    return float(factor)


def _is_centred(config: dict[str, Any], path: Path) -> bool:
    """Whether the SAE saw a stream whose mean over d TransformerLens had removed."""
    arguments = config.get("model_from_pretrained_kwargs") or {}
    hook, model = str(config.get("hook_name")), str(config.get("model_name"))
    if hook.endswith("hook_z"):
        changed = [name for name in ("fold_value_biases", "refactor_factored_attn_matrices") if arguments.get(name)]
        if changed:
            raise refuse(
                path, f"it was trained on a model with {changed[0]}, which changes hook_z; it cannot be applied exactly"
            )
        return False
    if "center_writing_weights" not in arguments:
        if "hook_point" in config:
            raise refuse(path, "version 2 does not say whether the writing weights were centred")
        return False
    if not arguments["center_writing_weights"] or NOT_CENTRED.search(model):
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
