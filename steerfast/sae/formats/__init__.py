"""SAE files of every family: one small reader each, told apart by the names of their files.

A reader gets the parsed configuration, the tensors and the path, and returns an `SAE`; what it cannot hold exactly it
refuses with the reason. Nothing in a file is ever executed: `.pt` files are read as tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from steerfast._checks import finite_number
from steerfast.files import container
from steerfast.sae.model import SAE

from . import dictionary_learning, gemma_scope, llama_scope, openai, own, saelens, sparsify
from ._parts import read_json, read_tensors, refuse
from .own import save as save
from .saelens import save_saelens as save_saelens


@dataclass(frozen=True)
class Family:
    """One family of files.

    Attributes:
        name: As it is called in messages and in `Origin.source`.
        weights: Name of the file with the tensors, relative to the directory of the configuration.
        config: Name of the JSON beside it; None: the family has none.
        read: (configuration, tensors, path of the weights) -> SAE; None: ours, which `own` reads as a folder.
        scaled: Whether its reader takes the scale of the data set, too.
    """

    name: str
    weights: str
    config: str | None
    read: Callable[..., SAE] | None
    scaled: bool = False


FAMILIES = (
    Family("steerfast", container.SAE.tensors_name, container.SAE.text_name, None),
    Family("SAELens", "sae_weights.safetensors", "cfg.json", saelens.read, scaled=True),
    Family("sparsify", "sae.safetensors", "cfg.json", sparsify.read),
    Family("Gemma Scope", "params.npz", None, gemma_scope.read_first),
    Family("Gemma Scope 2", "params.safetensors", "config.json", gemma_scope.read_second),
    Family("Llama Scope", "final.safetensors", "hyperparams.json", llama_scope.read),
    Family("Llama Scope", "checkpoints/final.safetensors", "hyperparams.json", llama_scope.read),
    Family("dictionary_learning", "ae.pt", "config.json", dictionary_learning.read),
)


def load(path: Path, scale: float | None = None) -> SAE:
    """Read an SAE from a directory, or from the file with its weights; see `SAE.load`."""
    if scale is not None and (scale := finite_number("SAE.load", "scale", scale)) <= 0:
        raise ValueError(f"SAE.load: scale is {scale}; expected > 0, √d over the mean length of a row")
    if not path.exists():
        raise FileNotFoundError(f"SAE.load: {path} does not exist; give a directory, or the file with the weights")
    found = _families_of_file(path) if path.is_file() else _families_of_directory(path)
    if len(found) > 1:
        names = " and ".join(f"{family.name} ({weights.name})" for family, weights, _ in found)
        raise ValueError(f"SAE.load: {path} is ambiguous, it holds {names}; give the file with the weights")
    family, weights, config = found[0]
    if scale is not None and not family.scaled:
        raise refuse(weights, f"a file of {family.name} needs no scale; leave scale={scale} away")
    if family.read is None:
        return own.read(weights.parent)
    given = {} if scale is None else {"scale": scale}
    return family.read({} if config is None else read_json(config), read_tensors(weights), weights, **given)


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
        others = [file for file in sorted(directory.glob("*.pt")) if file.name != "ae.pt"]
        if len(others) > 1 and not whole:
            raise ValueError(f"SAE.load: {directory} is ambiguous, it holds {len(others)} .pt files; give one of them")
        whole += [(_OPENAI, file, None) for file in others[:1]]
    if not whole and (directory / container.SAE.text_name).is_file():
        return [(FAMILIES[0], directory / FAMILIES[0].weights, None)]  # whose reader says what is missing
    if not whole and partial:
        raise FileNotFoundError(f"SAE.load: {directory} is incomplete: there is no {', nor '.join(partial)}")
    if not whole and (kind := container.kind_of(directory)) is not None:
        raise container.wrong_kind(container.SAE, directory, kind)
    if not whole:
        known = ", ".join(dict.fromkeys(family.name for family in (*FAMILIES, _OPENAI)))
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
        return [(_OPENAI, file, None)]
    raise ValueError(
        f"SAE.load: {file} is no weights file of a known family; expected one of "
        f"{', '.join(dict.fromkeys(family.weights for family in FAMILIES))}, or an OpenAI .pt file"
    )


def _config_path(family: Family, directory: Path) -> Path | None:
    return None if family.config is None else directory / family.config


_OPENAI = Family("OpenAI", "*.pt", None, openai.read)
_LLAMA_CHECKPOINT = FAMILIES[6]
