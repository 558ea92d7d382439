"""The ops: pure functions on (..., d) tensors, each with an in-place twin ending in "_".

All of them are one idea, project → act → lift: x' = s·x + C·g with (s, g) = act(Bᵀx, ‖x‖). They run as fused Triton
kernels on a GPU and as PyTorch elsewhere, return the dtype of x, compute in float32 (float64 stays float64), and work
under torch.compile. Directions are rows: features (m, d) stand for S = features.T in the formulas.

The in-place twins write into x and return it; they raise RuntimeError where a gradient of x is needed.
"""

from __future__ import annotations

from . import registry as registry  # torch.ops.steerfast
from .sae import MOST_EDITS as MOST_EDITS
from .sae import sae_add, sae_decode, sae_edit, sae_edit_topk, sae_encode, sae_encode_threshold
from .stream import (
    ablate,
    ablate_,
    add,
    add_,
    affine,
    affine_,
    amplify,
    amplify_,
    calibrate,
    calibrate_,
    flow,
    flow_,
    loreft,
    similarity,
)
from .subspace import add_rms_norm, subspace, subspace_, subspace_probe, subspace_split_

__all__ = [
    "ablate",
    "ablate_",
    "add",
    "add_",
    "add_rms_norm",
    "affine",
    "affine_",
    "amplify",
    "amplify_",
    "calibrate",
    "calibrate_",
    "flow",
    "flow_",
    "loreft",
    "sae_add",
    "sae_decode",
    "sae_edit",
    "sae_edit_topk",
    "sae_encode",
    "sae_encode_threshold",
    "similarity",
    "subspace",
    "subspace_",
    "subspace_probe",
    "subspace_split_",
]
