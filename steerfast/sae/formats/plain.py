"""qresearch's SAE of DeepSeek R1: DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt, encoder and decoder as two layers, ReLU.

Nothing but its name tells such a file from others with the same tensors and another selection.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from steerfast.place import Place
from steerfast.sae.model import SAE

from ._parts import dictionary, fold, home_of, vector, width_of

NAME = re.compile(r"^(DeepSeek-R1-[\w.-]+)-SAE-l(\d+)\.pt$")


def read(config: dict[str, Any], tensors: dict[str, Any], path: Path) -> SAE:
    """A ReLU SAE; its decoder bias is not subtracted."""
    d = width_of(tensors, "decoder.bias", path)
    w_enc = dictionary(tensors, "encoder.weight", d, path)
    w_dec = dictionary(tensors, "decoder.weight", d, path, transposed=True)
    b_enc, b_dec = vector(tensors, "encoder.bias", w_enc.shape[0], path), vector(tensors, "decoder.bias", d, path)
    name = NAME.search(path.name)
    place = None if name is None else Place("resid_post", int(name[2]))
    home = home_of(
        "qresearch", place, "" if name is None else f"l{name[2]}", "" if name is None else f"deepseek-ai/{name[1]}"
    )
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=False, home=home)
