"""Probes of an SAE: some of its features by name, or whichever are most active."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import set_field, whole_number, whole_numbers

from .encoder import Encoder
from .probe import Probe, Reader


@dataclass(frozen=True, eq=False, repr=False)
class FeatureProbe(Probe):
    """The activations of some features of an SAE, as its own encoder gives them.

    With thresholds (ReLU, JumpReLU, gated, BatchTopK) only the rows of these features are kept and read. Whether a Top-K SAE
    selects a feature depends on all others: then it is a full encode, and 0 where the feature is not selected.

    Args:
        sae: An SAE; a transcoder, read at `reads`; or `Features`.
        features: One feature's number: one number per row of the stream. Or several, each once: m numbers.

    Raises:
        TypeError, ValueError: no SAE; no features, one out of range, one twice; as of every `Probe`.

    Reference:
        Bricken et al. 2023, Towards Monosemanticity; Gao et al. 2024 (arXiv:2406.04093); JumpReLU arXiv:2407.14435.

    Example:
        >>> import torch, steerfast as sf
        >>> sae = sf.SAE(torch.eye(3), torch.eye(3), k=1)
        >>> sf.probes.FeatureProbe(sae, [0, 2])(torch.tensor([[3.0, -1.0, 2.0]]))
        tensor([[3., 0.]])
    """

    sae: Any
    features: int | Iterable[int]

    def __post_init__(self) -> None:
        encoder = Encoder.of("FeatureProbe", self.sae)
        super().__post_init__()
        numbers = whole_numbers("FeatureProbe", "features", self.features, encoder.weight.shape[0])
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"FeatureProbe: features is {self.features!r}; expected one or several, each once")
        set_field(self, "sae", encoder.picked("FeatureProbe", numbers))
        set_field(self, "features", numbers[0] if _is_one(self.features) else tuple(numbers))

    @property
    def width(self) -> int:
        return self._encoder.width

    @property
    def names(self) -> tuple[str, ...] | None:
        return tuple(map(str, self.features)) if isinstance(self.features, tuple) else None

    def program(self, device: torch.device) -> Reader:
        one = not isinstance(self.features, tuple)
        if self._encoder.threshold is not None:
            reading = self._encoder.reading(device)
            return (lambda x: reading(x)[..., 0]) if one else reading
        selecting = self._encoder.selecting(self._encoder.k, device)
        wanted = torch.tensor(self.features, dtype=torch.int32, device=device).reshape(-1, 1)

        def run(x: Tensor) -> Tensor:
            values, indices = selecting(x)
            found = (values[..., None, :] * (indices[..., None, :] == wanted)).sum(-1)  # NaN stays
            return found[..., 0] if one else found

        return run

    def tensors(self) -> dict[str, Tensor]:
        """The rows of the features; none where `numbers` names the SAE."""
        encoder = self._encoder
        if encoder.sae is not None:
            return {}
        found = {name: getattr(encoder, name) for name in ("weight", "bias", "threshold")}
        return {name: value for name, value in found.items() if value is not None}

    def numbers(self) -> dict[str, Any]:
        """Which features; of a Top-K SAE its name, `{"fingerprint": …, "about": …}`, for which `restore` takes the SAE."""
        encoder = self._encoder
        features = list(self.features) if isinstance(self.features, tuple) else self.features
        if encoder.sae is not None:
            return {"features": features, "sae": _name_of(encoder.sae)}
        return {"features": features, "normalisation": encoder.normalisation}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> FeatureProbe:
        """The inverse of `tensors` and `numbers`, with the SAE in place of its name; everything is validated anew."""
        features = numbers["features"]
        if "sae" in numbers:
            return cls(numbers["sae"], features)
        rows = tuple(whole_numbers("FeatureProbe", "features", features, 0))
        parts: dict[str, Any] = {**tensors, "normalisation": numbers["normalisation"], "numbers": rows}
        return cls(Encoder(**parts), features)

    @property
    def _encoder(self) -> Encoder:
        return self.sae

    def _words(self) -> str:
        several = isinstance(self.features, tuple)
        return f"{'features' if several else 'feature'} {list(self.features) if several else self.features}"  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False, repr=False)
class TopKProbe(Probe):
    """The k most active features of each row: (values float32 (..., k), indices int32 (..., k)), largest first.

    Where fewer are active the rest is value 0 at index 0.

    Args:
        sae: An SAE; or a transcoder, read at `reads`.
        k: At most the k of a Top-K SAE, which is the default; needed for an SAE with thresholds, at most F. Thresholds that
            differ by feature (JumpReLU) need F numbers of memory per row.

    Raises:
        TypeError, ValueError: no SAE, or a k that does not fit; as of every `Probe`.

    Reference:
        Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093).

    Example:
        >>> import torch, steerfast as sf
        >>> sae = sf.SAE(torch.eye(3), torch.eye(3), k=2)
        >>> sf.probes.TopKProbe(sae)(torch.tensor([[3.0, -1.0, 2.0]]))
        (tensor([[3., 2.]]), tensor([[0, 2]], dtype=torch.int32))
    """

    sae: Any
    k: int | None = None

    pairs = True

    def __post_init__(self) -> None:
        encoder = Encoder.of("TopKProbe", self.sae)
        if encoder.sae is None:
            raise TypeError("TopKProbe: sae is a few rows of one; expected the whole SAE")
        super().__post_init__()
        if self.k is None and not encoder.k:
            raise ValueError(f"TopKProbe: {self.sae!r} selects by thresholds; say how many features to keep, k=32")
        most = encoder.k or encoder.weight.shape[0]
        k = encoder.k if self.k is None else whole_number("TopKProbe", "k", self.k, 1)
        if k > most:
            raise ValueError(f"TopKProbe: k is {k}; expected at most {most}, what {self.sae!r} has")
        set_field(self, "k", k)

    @property
    def width(self) -> int:
        return self.sae.w_enc.shape[1]

    @property
    def names(self) -> tuple[str, ...] | None:
        return ()

    def program(self, device: torch.device) -> Reader:
        encoder, k = Encoder.of("TopKProbe", self.sae), self.k or 0
        selecting = encoder.selecting(encoder.k or k, device)
        if encoder.k in (0, k):
            return selecting

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            values, indices = selecting(x)
            return values[..., :k], indices[..., :k]

        return run

    def numbers(self) -> dict[str, Any]:
        return {"k": self.k, "sae": _name_of(self.sae)}

    def _words(self) -> str:
        return f"the {self.k} largest of {self.sae!r}"


def _is_one(features: Any) -> bool:
    return not isinstance(features, (Iterable, slice)) or getattr(features, "shape", None) == ()


def _name_of(sae: Any) -> dict[str, str]:
    """How a file names an SAE."""
    return {"fingerprint": sae.fingerprint, "about": repr(sae)}
