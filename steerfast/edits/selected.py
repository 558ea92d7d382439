"""Features of an SAE whose activations depend on more than their own rows: an edit of them is one encode per token."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steerfast import ops
from steerfast.ops.backends import in_full_precision
from steerfast.ops.torch_backend import restore_norm
from steerfast.place import NOWHERE, Origin
from steerfast.probes.encoder import encoded, normalised, shared_copy

from .base import Program


def edit_row(mode: str, value: float) -> list[float]:
    """t₀, t₁, t₂, t₃ of t(f) = clip(t₀f + t₁, t₂, t₃) for a mode of `sf.EditFeatures`."""
    least, most = -math.inf, math.inf
    rows = {
        "set": [0.0, value, least, most],
        "add": [1.0, value, least, most],
        "scale": [value, 0.0, least, most],
        "min": [1.0, 0.0, least, value],
        "max": [1.0, 0.0, value, most],
    }
    return rows[mode]


SHARED = ("encoder", "bias")


@dataclass(frozen=True, eq=False)
class SelectedFeatures:
    """Some features of an SAE, with all that their activations depend on; made by `SAE.rows`.

    Attributes:
        encoder: W_enc, all of it (F, d) for Top-K; the features' own rows (m, d) with a threshold.
        bias: b_enc, one per row of the encoder.
        decoder: W_dec, the features' rows (m, d).
        features: Their rows in the encoder, int32 (m,).
        threshold: θ, (m,); None: Top-K.
        k: Features per row of a Top-K SAE; 0 with a threshold.
        normalisation: As in `SAE`.
        origin: Place and model, if known.
        sae: The Top-K SAE that they are of: a file names it instead of its encoder. None: the file carries all tensors,
            which are few with a threshold, and all of an encoder in a plan of release 0.1.
    """

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    features: Tensor
    threshold: Tensor | None = None
    k: int = 0
    normalisation: str = "none"
    origin: Origin = NOWHERE
    sae: Any = None

    def __post_init__(self) -> None:
        count, width = self.decoder.shape
        rows = self.encoder.shape[0]
        fits = self.encoder.shape == (rows, width) and self.bias.shape == (rows,) and self.features.shape == (count,)
        if not fits or (self.threshold is None) == (self.k == 0) or not 0 <= self.k <= rows:
            raise ValueError(
                f"SelectedFeatures: {self.numbers()} and the shapes of {sorted(self.tensors())} do not fit"
            )
        if self.threshold is not None and self.threshold.shape != (rows,):
            raise ValueError(f"SelectedFeatures: threshold has shape {tuple(self.threshold.shape)}; expected ({rows},)")
        if count and not 0 <= int(self.features.min()) <= int(self.features.max()) < rows:
            raise ValueError(f"SelectedFeatures: a feature is out of range; there are {rows}, from 0")

    def rows(self, indices: list[int]) -> SelectedFeatures:
        """Some of them, by their places among themselves; of Top-K the encoder stays whole.

        Raises:
            ValueError: a number is out of range.
        """
        outside = [index for index in indices if not 0 <= index < len(self.features)]
        if outside:
            raise ValueError(
                f"EditFeatures: feature {outside[0]} is out of range; there are {len(self.features)}, from 0"
            )
        features, decoder = self.features[indices], self.decoder[indices]
        if self.threshold is None:
            return replace(self, decoder=decoder, features=features)
        encoder, bias, threshold = (part[features.long()] for part in (self.encoder, self.bias, self.threshold))
        numbers = torch.arange(len(indices), dtype=torch.int32, device="cpu")
        return SelectedFeatures(encoder, bias, decoder, numbers, threshold, 0, self.normalisation, self.origin)

    def program(self, mode: str, values: list[float], keep_norm: bool, device: torch.device) -> Program:
        """The edit of these features to or by `values` as a function of the stream, with its tensors on a device."""
        here = self._on(device)
        table = torch.tensor([edit_row(mode, value) for value in values], dtype=torch.float32, device=device)

        def run(x: Tensor, scale: Tensor | float) -> Tensor:
            if not isinstance(scale, Tensor):
                scale = torch.full((x.numel() // x.shape[-1],), scale, dtype=torch.float32, device=device)
            out = here.edit(x, table, scale)
            if not keep_norm:
                return out
            restored = restore_norm(out.float(), x.float()).to(x.dtype)
            return torch.where(scale.view(*x.shape[:-1], 1) == 0, x, restored)

        return run

    def _on(self, device: torch.device) -> SelectedFeatures:
        """Themselves on a device; edits of one SAE share its encoder there."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items() if name not in SHARED}
        owner = self if self.sae is None else self.sae
        moved |= {name: shared_copy(owner, name, getattr(self, name), device) for name in SHARED}
        return self.restore(moved, self.numbers())

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> SelectedFeatures:
        """The inverse of `tensors` and `numbers`; the origin is not among them, but may be given."""
        arguments: dict[str, Any] = {**tensors, **numbers}
        return cls(**arguments)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        names = ("encoder", "bias", "decoder", "features", "threshold")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def numbers(self) -> dict[str, Any]:
        """What is no tensor, by name."""
        return {"k": self.k, "normalisation": self.normalisation}

    def edit(self, x: Tensor, table: Tensor, scale: Tensor) -> Tensor:
        """x + scale·(t(f) - f)·W_dec, t(f) = clip(t₀f + t₁, t₂, t₃), table (m, 4), scale (n,); scale 0: x, bit for bit."""
        inner, length = normalised(x, self.normalisation)
        if self.k and length is None and len(self.features) <= ops.MOST_EDITS:
            arguments = (self.encoder, self.bias, self.k, self.features, table, self.decoder, scale)
            return ops.sae_edit_topk(x, *arguments)
        if length is not None:  # what a feature is worth in the stream, a row at a time
            scale = scale * length.float().flatten()
        values, indices = self._selected(x) if self.threshold is None else self._thresholded(inner, self.threshold)
        return ops.sae_edit(x, values, indices, self.features, table, self.decoder, scale)

    @in_full_precision
    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return encoded(x, self.encoder, self.bias, self.k, self.normalisation)

    @in_full_precision
    def _thresholded(self, x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.encoder.dtype), torch.float32)
        h = x.to(dtype) @ self.encoder.to(dtype).T + self.bias.to(dtype)
        return torch.where(h <= threshold.to(dtype), 0, h), self.features.expand(h.shape)
