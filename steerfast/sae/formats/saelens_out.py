"""SAEs for SAELens 6, as files and as its own objects; and from its objects."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast.files.replace import replace_files
from steerfast.sae.model import SAE
from steerfast.sae.transcoder import Transcoder

from .saelens import read_beside


def save_saelens(sae: SAE, directory: str | os.PathLike[str]) -> Path:
    """Write an SAE as SAELens 6 reads it, cfg.json and sae_weights.safetensors; what was folded stays folded.

    SAELens keeps one dtype for all tensors and casts rows to it: the widest is written, float32 at least.

    Args:
        sae: The SAE.
        directory: Where to; it is made, and both files are written or neither.

    Returns:
        The directory.

    Raises:
        ValueError: SAELens has no such kind: a Top-K transcoder.

    Example:
        >>> import tempfile, torch, steerfast as sf
        >>> from steerfast.sae.formats import save_saelens
        >>> sf.SAE.load(save_saelens(sf.SAE(torch.ones(3, 2), torch.ones(3, 2), k=1), tempfile.mkdtemp()))
        SAE(F=3, d=2, k=1, place=None, torch.float32)
    """
    from safetensors.torch import save as save_tensors

    config, tensors = _as_saelens(sae, "save_saelens")
    target = Path(directory)
    blob, text = save_tensors(tensors), json.dumps(config, indent=2).encode()
    replace_files(target, {"sae_weights.safetensors": blob, "cfg.json": text})
    return target


def to_saelens(sae: SAE) -> Any:
    """The SAE as an object of SAELens; see `SAE.to_saelens`."""
    try:
        import sae_lens
    except ImportError as error:
        raise ImportError(f"SAE.to_saelens: sae-lens cannot be imported ({error}): pip install sae-lens") from None
    config, tensors = _as_saelens(sae, "SAE.to_saelens")
    made = sae_lens.SAE.from_dict(config)
    made.load_state_dict(tensors)
    return made.to(str(sae.w_enc.device))


def from_saelens(sae: Any) -> SAE:
    """An SAE of an object of SAELens; see `SAE.from_saelens`."""
    parts = ("cfg", "state_dict", "process_state_dict_for_saving")
    if not all(hasattr(sae, name) for name in parts) or not hasattr(sae.cfg, "to_dict"):
        raise TypeError(f"SAE.from_saelens: expected an SAE of SAELens; got {type(sae).__name__}")
    tensors = {name: value.detach().cpu().clone() for name, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving(tensors)
    return read_beside(sae.cfg.to_dict(), tensors, Path(type(sae).__name__), None, None)


def _as_saelens(sae: SAE, caller: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its cfg.json and its tensors by the names of SAELens, on the CPU, apart from ours."""
    over = sae if isinstance(sae, Transcoder) else None
    architecture = {"topk": "topk", "relu": "standard", "jumprelu": "jumprelu"}[sae.activation]
    if over is not None and sae.k is not None:
        raise ValueError(f"{caller}: SAELens has no Top-K transcoder; save {sae} with sae.save")
    if over is not None:
        start = "jumprelu_" if architecture == "jumprelu" else ""
        architecture = f"{start}{'' if over.w_skip is None else 'skip_'}transcoder"
    dtype = torch.float32
    for value in sae.tensors().values():
        dtype = torch.promote_types(dtype, value.dtype)
    tensors = {"W_enc": sae.w_enc.T, "W_dec": sae.w_dec, "b_enc": sae.b_enc, "b_dec": sae.b_dec}
    if "jumprelu" in architecture:
        tensors["threshold"] = sae.threshold
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d,
        "d_sae": sae.features,
        "dtype": str(dtype).removeprefix("torch."),
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
    if over is not None:
        config |= {"d_out": over.d_out, "reshape_activations": "none"}
        config["metadata"] |= {
            "hook_name": over.reads.place.hook_name if over.reads.place else sae.source.hook_name or None,
            "hook_name_out": sae.place.hook_name if sae.place else sae.source.hook_name_out or None,
        }
        if over.w_skip is not None:
            tensors["W_skip"] = over.w_skip
    made = {name: value.detach().cpu().to(dtype).clone() for name, value in tensors.items() if value is not None}
    return config, {name: value.contiguous() for name, value in made.items()}
