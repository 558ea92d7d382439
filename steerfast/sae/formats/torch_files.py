"""Families of one .pt or .pth file, told apart by the tensors in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import goodfire, mutual_information, openai, plain, qwen_scope
from ._parts import refuse
from .family import Family

OPENAI = Family("OpenAI", "*.pt", None, openai.read)
QWEN = Family("Qwen-Scope", "layer*.sae.pt", None, qwen_scope.read, ("k",))
GOODFIRE = Family("Goodfire", "*.pth", None, goodfire.read, ("k", "scale"))
MUTUAL = Family("MI-SAE", "*.pth", None, mutual_information.read)
PLAIN = Family("qresearch", "*.pt", None, plain.read)
TORCH_FAMILIES = (OPENAI, QWEN, GOODFIRE, MUTUAL, PLAIN)


def family_of(tensors: Mapping[str, Any], path: Path) -> Family:
    """The family of a torch file.

    Raises:
        ValueError: none that is known; what is in the file, and where it looks like something else, what is missing.
    """
    if isinstance(tensors.get("weight"), Mapping) and isinstance(tensors.get("config"), Mapping):
        return MUTUAL
    for name, family in (("pre_bias", OPENAI), ("encoder_linear.weight", GOODFIRE)):
        if name in tensors:
            return family
    if {"W_enc", "W_dec", "b_enc", "b_dec"} == set(tensors):
        return QWEN
    if plain.NAME.search(path.name):
        return PLAIN
    hint = ""
    if isinstance(tensors.get("sae"), Mapping):
        hint = " (a checkpoint of llamascopium: save it with save_pretrained, which writes sae_weights.safetensors)"
    elif "b_dec" in tensors or "decoder.bias" in tensors:
        hint = " (an ae.pt of dictionary_learning needs its config.json beside it)"
    known = ", ".join(family.name for family in TORCH_FAMILIES)
    raise refuse(path, f"a torch file of none of {known}{hint}; it has {', '.join(sorted(map(str, tensors)))}")
