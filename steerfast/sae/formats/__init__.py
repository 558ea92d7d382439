"""SAE files of every family: one small reader each, told apart by the names of their files.

A reader gets the parsed configuration, the tensors and the path, and returns an `SAE`; what it cannot hold exactly it
refuses with the reason. Nothing in a file is ever executed: `.pt` files are read as tensors only.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import FLOATS, finite_number, whole_number
from steerfast.files import container
from steerfast.place import Place, place_of
from steerfast.sae.model import SAE

from . import dictionary_learning, gemma_scope, llama_scope, llamascopium, own, releases, saelens, sparsify
from ._parts import Tensors, read_json, read_tensors, refuse
from .family import Family
from .own import save as save
from .saelens_out import from_saelens as from_saelens
from .saelens_out import save_saelens as save_saelens
from .saelens_out import to_saelens as to_saelens
from .sparsify import save_sparsify as save_sparsify
from .torch_files import TORCH_FAMILIES, family_of

FAMILIES = (
    Family("steerfast", container.SAE.tensors_name, container.SAE.text_name, None),
    Family("SAELens", "sae_weights.safetensors", "cfg.json", saelens.read, ("scale",)),
    Family("llamascopium", "sae_weights.safetensors", "config.json", llamascopium.read, ("scale",)),
    Family("sparsify", "sae.safetensors", "cfg.json", sparsify.read),
    Family("Gemma Scope", "params.npz", None, gemma_scope.read_first),
    Family("Gemma Scope 2", "params.safetensors", "config.json", gemma_scope.read_second),
    Family("Llama Scope", "final.safetensors", "hyperparams.json", llama_scope.read),
    Family("Llama Scope", "checkpoints/final.safetensors", "hyperparams.json", llama_scope.read),
    Family("dictionary_learning", "ae.pt", "config.json", dictionary_learning.read),
)


def load(
    path: str | os.PathLike[str],
    sae_id: str | None = None,
    *,
    k: int | None = None,
    scale: float | None = None,
    site: Any = None,
    dtype: torch.dtype | None = None,
) -> SAE:
    """Read an SAE from a directory, a file with weights, or a release; see `SAE.load`."""
    if k is not None and (k := whole_number("SAE.load", "k", k)) < 1:
        raise ValueError(f"SAE.load: k is {k}; expected >= 1, the features of a row")
    if scale is not None and (scale := finite_number("SAE.load", "scale", scale)) <= 0:
        raise ValueError(f"SAE.load: scale is {scale}; expected > 0, √d over the mean length of a row")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"SAE.load: dtype is {dtype!r}; expected a floating dtype such as torch.bfloat16")
    place = None if site is None else place_of("SAE.load", site)
    found, overrides = Path(path), {}
    if sae_id is not None and (found / sae_id).exists():
        found, sae_id = found / sae_id, None
    if sae_id is not None or not found.exists():
        release = releases.find(os.fspath(path), sae_id)
        if release is None:
            raise FileNotFoundError(
                f"SAE.load: {found} does not exist; give a directory, or the file with the weights, or a release and its SAE, "
                'such as SAE.load("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")'
            )
        found, overrides = release.path, release.overrides
    sae = _placed(_read(found, overrides, k, scale), found, place)
    return sae if dtype is None else _stored(sae, found, dtype)


def _read(path: Path, overrides: dict[str, Any], k: int | None, scale: float | None) -> SAE:
    found = _families_of_file(path) if path.is_file() else _families_of_directory(path)
    if len(found) > 1:
        names = " and ".join(f"{family.name} ({weights.name})" for family, weights, _ in found)
        raise ValueError(f"SAE.load: {path} is ambiguous, it holds {names}; give the file with the weights")
    family, weights, config = found[0]
    if family is FAMILIES[0]:
        sae = own.read(weights.parent)
    else:
        tensors = read_tensors(weights)
        family = family_of(tensors, weights) if family is _TORCH else family
        given = {
            name: value for name, value in (("k", k), ("scale", scale)) if value is not None and name in family.takes
        }
        settings = ({} if config is None else read_json(config)) | overrides
        sae = _made(family, settings, tensors, weights, given)
    if scale is not None and "scale" not in family.takes:
        raise refuse(weights, f"a file of {family.name} needs no scale; leave scale={scale} away")
    if k is not None and sae.k != k:
        said = "it selects by a threshold" if sae.k is None else f"it says k = {sae.k}"
        raise refuse(weights, f"{said}; leave k={k} away")
    return sae


def _made(family: Family, settings: dict[str, Any], tensors: Tensors, path: Path, given: dict[str, Any]) -> SAE:
    """What the reader of a family makes of a file, or an error that names the file."""
    if family.read is None:
        raise TypeError(f"SAE.load: no reader for {path}")
    try:
        sae = family.read(settings, tensors, path, **given)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if str(error).startswith("SAE.load: "):
            raise
        raise refuse(path, f"not what a file of {family.name} holds ({error})") from error
    if unread := tensors.unread():
        raise refuse(
            path,
            f"its settings describe an SAE that does not use {', '.join(unread)}, and the file holds it; mend the settings, or "
            "write the file without it if it changes nothing",
        )
    return sae


def _placed(sae: SAE, path: Path, place: Place | None) -> SAE:
    """The SAE at the place that was given, where its file says none."""
    if place is None or (sae.place is not None and sae.place.same_stream(place)):
        return sae
    if sae.place is not None:
        raise refuse(path, f"it says that it belongs to {sae.place}; leave site={tuple(place)} away")
    return replace(sae, origin=replace(sae.origin, place=place))


def _stored(sae: SAE, path: Path, dtype: torch.dtype) -> SAE:
    """The SAE with its matrices in a dtype, and what that costs in its source."""
    error, most = sae.source.rounding, torch.finfo(dtype).max
    for name, matrix in sae.tensors().items():
        if matrix.dim() != 2 or torch.promote_types(matrix.dtype, dtype) == dtype:
            continue
        if float(matrix.abs().max()) > most:
            raise refuse(
                path, f"{name} holds {float(matrix.abs().max()):.4g}, and {dtype} ends at {most:.4g}; choose another"
            )
        error = max(error, *(_row_error(rows, dtype) for rows in matrix.split(4096)))
    return replace(sae.to(dtype=dtype), source=replace(sae.source, rounding=error))


def _row_error(rows: Tensor, dtype: torch.dtype) -> float:
    """The largest ‖rounded row - row‖ / ‖row‖; rows of zeros are exact."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    lengths = torch.linalg.vector_norm(wide, dim=1)
    errors = torch.linalg.vector_norm(wide.to(dtype).to(wide.dtype) - wide, dim=1)
    return float((errors / lengths.clamp(min=torch.finfo(wide.dtype).tiny)).max())


Found = tuple[Family, Path, Path | None]


def _families_of_directory(directory: Path) -> list[Found]:
    whole: list[Found] = []
    partial = []
    for family in FAMILIES:
        weights, config = directory / family.weights, _config_path(family, directory)
        if weights.is_file() and (config is None or config.is_file()):
            whole.append((family, weights, config))
        elif weights.is_file() or (config is not None and config.is_file()):
            missing = family.config if weights.is_file() else family.weights
            partial.append(f"{missing} of {family.name}")
    if not any(weights.name == "ae.pt" for _, weights, _ in whole):
        others = [file for file in sorted([*directory.glob("*.pt"), *directory.glob("*.pth")]) if file.name != "ae.pt"]
        if len(others) > 1 and not whole:
            raise ValueError(f"SAE.load: {directory} is ambiguous, it holds {len(others)} .pt files; give one of them")
        whole += [(_TORCH, file, None) for file in others[:1]]
    if not whole and (directory / container.SAE.text_name).is_file():
        return [(FAMILIES[0], directory / FAMILIES[0].weights, None)]  # whose reader says what is missing
    if not whole and partial:
        raise FileNotFoundError(f"SAE.load: {directory} is incomplete: there is no {', nor '.join(partial)}")
    if not whole and (kind := container.kind_of(directory)) is not None:
        raise container.wrong_kind(container.SAE, directory, kind)
    if not whole:
        known = ", ".join(dict.fromkeys(family.name for family in (*FAMILIES, *TORCH_FAMILIES)))
        raise ValueError(f"SAE.load: {directory} holds no SAE of a known family ({known})")
    return whole


def _families_of_file(file: Path) -> list[Found]:
    named = [(family, file, _config_path(family, file.parent)) for family in FAMILIES if family.weights == file.name]
    whole = [found for found in named if found[2] is None or found[2].is_file()]
    if file.name == "final.safetensors" and not whole:
        named = [(_LLAMA_CHECKPOINT, file, file.parent.parent / "hyperparams.json")]
        whole = [found for found in named if (file.parent.parent / "hyperparams.json").is_file()]
    if whole:
        return whole
    if named:
        configs = " or ".join(dict.fromkeys(f"{found[2]} ({found[0].name})" for found in named))
        raise FileNotFoundError(f"SAE.load: {file} needs its configuration beside it: {configs}")
    if file.suffix == ".npz":
        return [(next(family for family in FAMILIES if family.name == "Gemma Scope"), file, None)]
    if file.suffix in (".pt", ".pth"):
        return [(_TORCH, file, None)]
    raise ValueError(
        f"SAE.load: {file} is no weights file of a known family; expected one of "
        f"{', '.join(dict.fromkeys(family.weights for family in FAMILIES))}, or a .pt or .pth file"
    )


def _config_path(family: Family, directory: Path) -> Path | None:
    return None if family.config is None else directory / family.config


_TORCH = Family("torch files", "*.pt", None, None)
_LLAMA_CHECKPOINT = FAMILIES[7]
