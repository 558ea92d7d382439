"""Gemma Scope 1 (params.npz, no configuration) and 2 (config.json and params.safetensors): JumpReLU, no subtraction."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from steerfast.place import Place
from steerfast.sae.model import SAE

from ._parts import Home, dictionary, fold, home_of, refuse, vector, width_of

FIRST = {"res": "resid_post", "att": "head_out", "mlp": "mlp_out"}
"""The last part of a repository's name, gemma-scope-2b-pt-res, and what its SAEs read."""
SECOND = (
    (re.compile(r"model\.layers\.(\d+)\.output"), "resid_post"),
    (re.compile(r"model\.layers\.(\d+)\.self_attn\.o_proj\.input"), "head_out"),
    (re.compile(r"model\.layers\.(\d+)\.post_feedforward_layernorm\.output"), "mlp_out"),
)


def read_first(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """An SAE of Gemma Scope 1; its place is told by the folders …-res/layer_20/… that it lies in."""
    folders = "/".join(path.resolve().parts)
    kind, layer = re.search(r"gemma-scope-([\w.]+-\w+)-(\w+)(?=/)", folders), re.search(r"layer_(\d+)(?=/)", folders)
    site = None if kind is None else FIRST.get(kind[2])
    place = None if site is None or layer is None else Place(site, int(layer[1]))
    model = "" if kind is None else f"google/gemma-2-{kind[1].removesuffix('-pt')}"
    name = "" if layer is None else f"layer_{layer[1]}" + ("" if kind is None else f" {kind[2]}")
    return _read(tensors, path, ("W_enc", "W_dec"), home_of("Gemma Scope", place, name, model))


def read_second(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """An SAE of Gemma Scope 2."""
    point, out = str(config.get("hf_hook_point_in") or ""), config.get("hf_hook_point_out")
    if "affine_skip_connection" in tensors or config.get("affine_connection") or out not in (None, point):
        raise refuse(path, "a transcoder, which reads and writes different places; only SAEs are read")
    if str(config.get("architecture", "jump_relu")).replace("_", "") != "jumprelu":
        raise refuse(path, f"architecture {config['architecture']!r}; expected jump_relu")
    places = [Place(site, int(found[1])) for pattern, site in SECOND if (found := pattern.fullmatch(point))]
    home = home_of("Gemma Scope 2", places[0] if places else None, point, config.get("model_name"))
    return _read(tensors, path, ("w_enc", "w_dec"), home)


def _read(tensors: dict[str, Tensor], path: Path, names: tuple[str, str], home: Home) -> SAE:
    d = width_of(tensors, "b_dec", path)
    factors = tensors.get("scaling_factor")
    if factors is not None and not bool((factors == 1).all()):
        raise refuse(path, "it holds a scaling_factor per feature; fold it into the weights first")
    w_enc, w_dec = dictionary(tensors, names[0], d, path, transposed=True), dictionary(tensors, names[1], d, path)
    count = w_enc.shape[0]
    b_enc, threshold = vector(tensors, "b_enc", count, path), vector(tensors, "threshold", count, path)
    b_dec = vector(tensors, "b_dec", d, path)
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=False, home=home, threshold=threshold)
