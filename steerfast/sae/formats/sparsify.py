"""EleutherAI's sparsify, read and written: cfg.json and sae.safetensors; the directory is named after the hookpoint."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.files.replace import replace_files
from steerfast.place import Place
from steerfast.sae.model import SAE, Source
from steerfast.sae.transcoder import Transcoder

from ._parts import dictionary, fold, home_of, refuse, setting, tensor, transcode, vector, whole, width_of


def read(config: dict[str, Any], tensors: dict[str, Tensor], path: Path) -> SAE:
    """A Top-K SAE of sparsify, whose decoder bias is subtracted first, or a transcoder, whose is not."""
    if config.get("activation", "topk") != "topk":
        raise refuse(path, f"activation {config['activation']!r}; expected topk")
    if setting(config, "signed", path):
        raise refuse(path, "signed is set, so its features may be negative; only positive ones are read")
    d = width_of(tensors, "b_dec", path)
    if "d_in" in config and whole(config["d_in"], "d_in", path) != d:
        raise refuse(path, f"d_in is {config['d_in']} in cfg.json and {d} in the weights; they do not belong together")
    w_enc, w_dec = dictionary(tensors, "encoder.weight", d, path), dictionary(tensors, "W_dec", d, path)
    b_enc, b_dec = vector(tensors, "encoder.bias", w_enc.shape[0], path), vector(tensors, "b_dec", d, path)
    name, k = path.absolute().parent.name, whole(config.get("k"), "k", path)
    if setting(config, "transcode", path) or setting(config, "transcoder", path):
        found = {"w_enc": w_enc, "w_dec": w_dec, "b_enc": b_enc, "b_dec": b_dec}
        if setting(config, "skip_connection", path) or "W_skip" in tensors:
            found["w_skip"] = tensor(tensors, "W_skip", path)
        # what the module adds to the stream is not known from its name: a norm may follow
        source = Source("sparsify", name and f"input of {name}", "", name and f"output of {name}")
        return transcode(found, (None, None), source, k)
    if setting(config, "skip_connection", path) or "W_skip" in tensors:
        raise refuse(
            path, "an SAE with a skip connection, which passes its own input on; only transcoders have one here"
        )
    # a block; its parts add other things to the stream
    block = re.fullmatch(r"(?:.+\.)?(?:layers|h|blocks)\.(\d+)", name)
    home = home_of("sparsify", None if block is None else Place("resid_post", int(block[1])), name)
    return fold(w_enc, w_dec, b_enc, b_dec, subtract=True, home=home, k=k)


def save_sparsify(sae: SAE, directory: str | os.PathLike[str]) -> Path:
    """Write a Top-K SAE or transcoder as sparsify reads it, cfg.json and sae.safetensors, float32.

    sparsify subtracts the decoder's bias from the rows of an SAE, so it is taken out of the encoder's bias again. It knows the
    place by the name of the directory, such as layers.7.

    Args:
        sae: The SAE.
        directory: Where to; it is made, and both files are written or neither.

    Returns:
        The directory.

    Raises:
        ValueError: sparsify has no such kind: a threshold, normalised rows, or a transcoder between two widths.

    Example:
        >>> import tempfile, torch, steerfast as sf
        >>> from steerfast.sae.formats import save_sparsify
        >>> sf.SAE.load(save_sparsify(sf.SAE(torch.ones(3, 2), torch.ones(3, 2), k=1), tempfile.mkdtemp()))
        SAE(F=3, d=2, k=1, place=None, torch.float32)
    """
    from safetensors.torch import save as save_tensors

    if sae.k is None or sae.normalisation != "none":
        raise ValueError(
            f"save_sparsify: sparsify has Top-K SAEs without normalisation alone; save {sae} with sae.save"
        )
    over = sae if isinstance(sae, Transcoder) else None
    if over is not None and over.d_out != over.d:
        raise ValueError(
            f"save_sparsify: a transcoder of sparsify reads and writes rows of one width; save {sae} with sae.save"
        )
    wide = {name: value.detach().cpu().to(torch.float32) for name, value in sae.tensors().items()}
    b_enc = wide["b_enc"].double()
    if over is None:
        b_enc = b_enc + wide["w_enc"].double() @ wide["b_dec"].double()
    tensors = {
        "encoder.weight": wide["w_enc"],
        "encoder.bias": b_enc.float(),
        "W_dec": wide["w_dec"],
        "b_dec": wide["b_dec"],
    }
    if "w_skip" in wide:
        tensors["W_skip"] = wide["w_skip"]
    config = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": sae.features, "k": sae.k,
        "multi_topk": False, "skip_connection": "w_skip" in wide, "transcode": over is not None, "d_in": sae.d,
    }  # fmt: skip
    target = Path(directory)
    blob = save_tensors({name: value.clone().contiguous() for name, value in tensors.items()})
    replace_files(target, {"sae.safetensors": blob, "cfg.json": json.dumps(config, indent=2).encode()})
    return target
