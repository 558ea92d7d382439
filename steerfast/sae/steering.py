"""Editing features where a bank slot cannot: an SAE that compares all features (Top-K), or that normalises each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops

LAYER_NORM_EPSILON = 1e-5  # of OpenAI and SAELens, added to the deviation, not to the variance


def normalised(x: Tensor, kind: str) -> tuple[Tensor, Tensor | None]:
    """The rows as an encoder takes them, and what a reconstruction of them is multiplied with, (..., 1).

    "none": x; "constant_norm_rescale": x·√d/‖x‖; "layer_norm": (x - mean)/(deviation + 1e-5), the deviation over d - 1.
    """
    if kind == "none":
        return x, None
    wide = x.double() if x.dtype == torch.float64 else x.float()
    if kind == "constant_norm_rescale":
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return wide / length, length
    deviation = wide.std(dim=-1, keepdim=True)
    return (wide - wide.mean(dim=-1, keepdim=True)) / (deviation + LAYER_NORM_EPSILON), deviation


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
        place: (site, layer), if known.
    """

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    features: Tensor
    threshold: Tensor | None = None
    k: int = 0
    normalisation: str = "none"
    place: tuple[str, int] | None = None

    def rows(self, indices: list[int]) -> SelectedFeatures:
        """Itself, so that an edit can be rebuilt from its own features."""
        return self

    def to(self, device: torch.device) -> SelectedFeatures:
        """The same features on another device."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return SelectedFeatures(**tensors, **self.numbers(), place=self.place)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        names = ("encoder", "bias", "decoder", "features", "threshold")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def numbers(self) -> dict[str, object]:
        """What is no tensor, by name."""
        return {"k": self.k, "normalisation": self.normalisation}

    def edit(self, x: Tensor, table: Tensor, scale: Tensor | None) -> Tensor:
        """x + scale·(t(f) - f)·W_dec, t(f) = clip(t₀f + t₁, t₂, t₃) with table (m, 4); scale (n,) or None.

        A row of scale 0 is returned bit for bit.
        """
        inner, deviation = normalised(x, self.normalisation)
        if deviation is not None:
            deviation = deviation.float().flatten()
            scale = deviation if scale is None else deviation * scale
        values, indices = self._encode(inner)
        return ops.sae_edit(x, values, indices, self.features, table, self.decoder, scale)

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.threshold is None:
            return ops.sae_encode(x, self.encoder, self.bias, self.k)
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.encoder.dtype), torch.float32)
        h = x.to(dtype) @ self.encoder.to(dtype).T + self.bias.to(dtype)
        return torch.where(h <= self.threshold.to(dtype), 0, h), self.features.expand(h.shape)
