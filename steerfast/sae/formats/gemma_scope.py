"""Gemma Scope 1 (params.npz, no configuration) and 2 (config.json and params.safetensors): JumpReLU, no subtraction.

Their transcoders read the MLP's input behind its norm, which is no site of ours, and write what the block adds, mlp_out. An
SAE of the embedding was trained on embeddings before Gemma's factor √d, which is folded in, as SAELens does.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from steerfast._checks import as_tensor
from steerfast.place import Place
from steerfast.sae.model import SAE, Source

from ._parts import Home, dictionary, fold, home_of, refuse, rows_of, setting, tensor, transcode, vector, wide, width_of

FIRST = {"res": "resid_post", "att": "head_out", "mlp": "mlp_out", "transcoders": "mlp_out"}
"""The last part of a repository's name, gemma-scope-2b-pt-res, and what its SAEs write."""
SECOND = (
    (re.compile(r"model\.layers\.(\d+)\.output"), "resid_post"),
    (re.compile(r"model\.layers\.(\d+)\.self_attn\.o_proj\.input"), "head_out"),
    (re.compile(r"model\.layers\.(\d+)\.post_feedforward_layernorm\.output"), "mlp_out"),
)
SKIP = "affine_skip_connection"
"""(d_in, d_out)."""


def read_first(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """One of Gemma Scope 1; its place is told by the folders …-res/layer_20/… that it lies in."""
    folders = "/".join(path.absolute().parts)
    kind = next(reversed(list(re.finditer(r"gemma-scope-([\w.]+-\w+)-(\w+)(?=/)", folders))), None)
    folders = folders if kind is None else folders[kind.end() :]  # those above it are the user's own
    layer = next(reversed(list(re.finditer(r"(?<=/)layer_(\d+)(?=/)", folders))), None)
    site = None if kind is None else FIRST.get(kind[2])
    place = None if site is None or layer is None else Place(site, int(layer[1]))
    model = "" if kind is None else f"google/gemma-2-{kind[1].removesuffix('-pt')}"
    name = "" if layer is None else f"layer_{layer[1]}" + ("" if kind is None else f" {kind[2]}")
    if kind is not None and kind[2] == "transcoders":
        number = "" if layer is None else f"layer_{layer[1]} "
        source = Source("Gemma Scope", f"{number}MLP input, normed", model, f"{number}MLP output")
        return transcode(_tensors(tensors, path, ("W_enc", "W_dec")), (None, place), source)
    embedding = layer is None and "/embedding/" in folders
    if embedding:
        place, name = Place("resid_pre", 0), "embedding"
    sae = _read(tensors, path, ("W_enc", "W_dec"), home_of("Gemma Scope", place, name, model))
    if not embedding:
        return sae
    # resid_pre 0 holds √d·embedding; the decoder writes there, its bias among it
    root, b_dec = sae.d**0.5, as_tensor(sae.b_dec)
    return replace(sae, w_enc=wide(sae.w_enc) / root, w_dec=wide(sae.w_dec) * root, b_dec=b_dec * root)


def read_second(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """An SAE or a transcoder of Gemma Scope 2."""
    point, out = str(config.get("hf_hook_point_in") or ""), config.get("hf_hook_point_out")
    if str(config.get("architecture", "jump_relu")).replace("_", "") != "jumprelu":
        raise refuse(path, f"architecture {config['architecture']!r}; expected jump_relu")
    shape = tuple(getattr(tensors.get("w_dec"), "shape", ()))
    if len(shape) == 3:
        raise refuse(
            path, f"w_dec has shape {shape}: a cross-layer transcoder or a crosscoder, of several layers at once"
        )
    model, affine = str(config.get("model_name") or ""), setting(config, "affine_connection", path)
    if SKIP not in tensors and not affine and out in (None, point):
        home = home_of("Gemma Scope 2", _second_place(point), point, model)
        return _read(tensors, path, ("w_enc", "w_dec"), home)
    found = _tensors(tensors, path, ("w_enc", "w_dec"))
    if SKIP in tensors:
        found["w_skip"] = tensor(tensors, SKIP, path).T.contiguous()
    elif affine:
        raise refuse(path, f"config.json says affine_connection, and the file has no {SKIP}; it is incomplete")
    source = Source("Gemma Scope 2", point, model, str(out or ""))
    return transcode(found, (_second_place(point), _second_place(str(out or ""))), source)


def _second_place(point: str) -> Place | None:
    return next((Place(site, int(found[1])) for pattern, site in SECOND if (found := pattern.fullmatch(point))), None)


def _read(tensors: dict[str, Tensor], path: Path, names: tuple[str, str], home: Home) -> SAE:
    d = width_of(tensors, "b_dec", path)
    found: dict[str, Any] = _tensors(tensors, path, names) | {
        "w_enc": dictionary(tensors, names[0], d, path, transposed=True),
        "w_dec": dictionary(tensors, names[1], d, path),
    }
    return fold(**found, subtract=False, home=home)


def _tensors(tensors: dict[str, Tensor], path: Path, names: tuple[str, str]) -> dict[str, Tensor]:
    """The tensors under our names; their biases checked against the width that is written."""
    factors = tensors.get("scaling_factor")
    if factors is not None and not bool((factors == 1).all()):
        raise refuse(path, "it holds a scaling_factor per feature; fold it into the weights first")
    w_enc, w_dec = rows_of(tensors, names[0], path, transposed=True), rows_of(tensors, names[1], path)
    count = w_enc.shape[0]
    vectors = {"b_enc": count, "threshold": count, "b_dec": w_dec.shape[1]}
    return {"w_enc": w_enc, "w_dec": w_dec} | {
        name: vector(tensors, name, size, path) for name, size in vectors.items()
    }
