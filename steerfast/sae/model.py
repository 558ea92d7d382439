"""A sparse autoencoder of any family in one form: f = select(W_enc·norm(x) + b_enc), x ≈ W_decᵀf + b_dec.

The families differ in what surrounds these two products. What can be folded into the weights exactly is folded when a file
is read: a subtracted decoder bias, the scale of a data set, the centring of the stream, the two biases of a gated SAE.
What remains is one of two selections (the k largest, or those above a threshold per feature) and, in a few families, a
normalisation of each row.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from steerfast import ops
from steerfast._checks import (
    as_tensor,
    check_dictionary,
    check_stream,
    finite_number,
    instance_of,
    one_of,
    whole_number,
    whole_numbers,
)
from steerfast.edits.features import Features
from steerfast.edits.selected import SelectedFeatures
from steerfast.ops.backends import in_full_precision
from steerfast.place import NOWHERE, Origin, Place
from steerfast.probes.encoder import normalised

NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")
BLOCK_F = 4096  # features of a dense encode computed at a time


@dataclass(frozen=True)
class Source:
    """What the file that an SAE was read from says, in the words of its own library.

    Attributes:
        library: Which one wrote it.
        hook_name: The place; of a transcoder, where it reads.
        model: The model that it was trained on; a name, not a class.
        hook_name_out: Where a transcoder writes.
        rounding: What the dtype that it was loaded in cost: the largest relative error of a row of its matrices, 0.004 for
            0.4 %; 0: nothing was rounded.
    """

    library: str = "steerfast"
    hook_name: str = ""
    model: str = ""
    hook_name_out: str = ""
    rounding: float = 0.0


@dataclass(frozen=True, eq=False, repr=False)
class SAE:
    """A sparse autoencoder: f = select(W_enc·norm(x) + b_enc), x ≈ W_decᵀf + b_dec.

    With k the k largest positive pre-activations h are kept (Top-K); without, f = h·[h > θ] for a threshold θ ≥ 0 per
    feature (JumpReLU, gated, BatchTopK at inference; θ = 0: ReLU).

    Args:
        w_enc: Encoder rows, (F, d).
        w_dec: Decoder rows, (F, d).
        b_enc: (F,), a subtracted decoder bias folded in: b_enc - W_enc·b_dec; None: zero.
        b_dec: (d,); None: zero.
        k: Features per row of a Top-K SAE, 1 to F; None: a threshold selects.
        threshold: θ ≥ 0, (F,); None: zero. Not together with k.
        normalisation: What is done to each row first: "none"; "constant_norm_rescale", x·√d/‖x‖; "layer_norm",
            (x - mean)/(deviation + 1e-5), both undone on the reconstruction.
        origin: Where it reads and writes the stream, as far as that is known and is a site of ours.
        source: What the file says that it was read from.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, k or θ is out of range, a weight is NaN or Inf.

    Reference:
        Cunningham et al. 2023 (arXiv:2309.08600); Gao et al. 2024 (arXiv:2406.04093); JumpReLU arXiv:2407.14435.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.SAE(torch.eye(3), torch.eye(3), k=1).encode(torch.tensor([[3.0, -1.0, 2.0]]))
        tensor([[3., 0., 0.]])
    """

    w_enc: Tensor
    w_dec: Tensor
    b_enc: Tensor | None = None
    b_dec: Tensor | None = None
    k: int | None = None
    threshold: Tensor | None = None
    normalisation: str = "none"
    origin: Origin = NOWHERE
    source: Source = field(default_factory=Source)

    def __post_init__(self) -> None:
        check_dictionary("SAE", "w_enc", self.w_enc, "b_enc", self.b_enc, bias_axis=0)
        check_dictionary("SAE", "w_dec", self.w_dec, "b_dec", self.b_dec, bias_axis=1)
        self._check_shapes()
        instance_of("SAE", "origin", self.origin, Origin, 'steerfast.place.Origin(place=("resid_post", 7))')
        features, theta = self.features, self.threshold
        if theta is not None and (not isinstance(theta, Tensor) or not theta.is_floating_point()):
            got = f"has dtype {theta.dtype}" if isinstance(theta, Tensor) else f"is {type(theta).__name__}"
            raise TypeError(
                f"SAE: threshold {got}; expected a floating tensor (F,): torch.full((F,), θ) for a single one"
            )
        for name, tensor in self.tensors().items():
            if tensor.device != self.w_enc.device:
                raise ValueError(f"SAE: {name} is on {tensor.device} and w_enc on {self.w_enc.device}; move one")
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"SAE: {name} holds NaN or Inf; the file is damaged or the training diverged")
        if self.place is not None and self.place.layer < 0:
            raise ValueError(f"SAE: layer is {self.place.layer}; expected one counted from 0")
        one_of("SAE", "normalisation", self.normalisation, NORMALISATIONS)
        if self.k is not None:
            object.__setattr__(self, "k", whole_number("SAE", "k", self.k))
            if not 1 <= self.k <= features:
                raise ValueError(f"SAE: k is {self.k}; expected 1 to F = {features}, the rows of w_enc")
            if self.threshold is not None:
                raise ValueError("SAE: k and threshold are both given; a Top-K SAE has no threshold")
        small = torch.promote_types(self.w_enc.dtype, torch.float32)
        for name, size in (("b_enc", features), ("b_dec", self.w_dec.shape[1]), ("threshold", features)):
            value = getattr(self, name)
            if value is None and not (name == "threshold" and self.k is not None):
                object.__setattr__(self, name, torch.zeros(size, dtype=small, device=self.w_enc.device))
            elif value is not None and tuple(value.shape) != (size,):
                raise ValueError(f"SAE: {name} has shape {tuple(value.shape)}; expected ({size},)")
        if self.threshold is not None and bool((self.threshold < 0).any()):
            raise ValueError("SAE: threshold is negative; expected >= 0 (a negative one acts as 0: clamp it)")

    @property
    def W_enc(self) -> Tensor:
        """Encoder rows, (F, d): what SAELens calls W_enc, transposed (there it is (d, F))."""
        return self.w_enc

    @property
    def W_dec(self) -> Tensor:
        """Decoder rows, (F, d), as in SAELens."""
        return self.w_dec

    @property
    def d(self) -> int:
        """Width of the stream."""
        return self.w_enc.shape[1]

    @property
    def features(self) -> int:
        """F, the number of features."""
        return self.w_enc.shape[0]

    @property
    def activation(self) -> str:
        """The selection by name: "topk", "jumprelu", or "relu" where every threshold is 0."""
        if self.threshold is None:
            return "topk"
        return "jumprelu" if bool((self.threshold > 0).any()) else "relu"

    @property
    def place(self) -> Place | None:
        """Site and layer that the SAE reads and writes, if that is known."""
        return self.origin.place

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what the SAE computes: k, normalisation, and the names, dtypes, shapes and bits of its tensors.

        Saving and loading keep it, and so does another device or origin; another dtype is another SAE. A plan names the
        SAE of a Top-K edit by it. Computed once, at the first use.
        """
        tensors = dict(sorted(self.tensors().items()))
        shapes = {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()}
        head: dict[str, object] = {"k": self.k, "normalisation": self.normalisation, "tensors": shapes}
        if type(self) is not SAE:  # a transcoder with the same tensors
            head["kind"] = type(self).__name__
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for tensor in tensors.values():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        names = [one.name for one in dataclasses.fields(self)]
        return {name: value for name in names if isinstance(value := getattr(self, name), Tensor)}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SAE:
        """The same SAE on another device, or with its matrices in another floating dtype.

        Biases and thresholds stay float32 at least: they are small, and a folded bias would suffer from rounding.
        """
        matrices = {n: t.to(device=device, dtype=dtype) for n, t in self.tensors().items() if t.dim() == 2}
        small = None if dtype is None else torch.promote_types(dtype, torch.float32)
        vectors = {n: t.to(device=device, dtype=small) for n, t in self.tensors().items() if n not in matrices}
        return dataclasses.replace(self, **matrices, **vectors)  # type: ignore[arg-type]

    def encode(self, x: Tensor) -> Tensor:
        """All features of each row, dense: (..., d) -> (..., F), float32 (float64 stays float64)."""
        inner = self._normalise("SAE.encode", x)[0]
        if self.k is not None:
            values, indices = ops.sae_encode(inner, self.w_enc, self.b_enc, self.k)
            dense = values.new_zeros(*x.shape[:-1], self.features)
            return dense.scatter_add(-1, indices.long(), values)  # the unused places are value 0 at index 0
        flat = _wide(inner.reshape(-1, self.d), self.w_enc)
        dense = flat.new_empty(flat.shape[0], self.features)
        for start in range(0, self.features, BLOCK_F):
            part = slice(start, start + BLOCK_F)
            w, b, threshold = (as_tensor(t)[part].to(flat.dtype) for t in (self.w_enc, self.b_enc, self.threshold))
            h = product(flat, w.T, b)
            dense[:, part] = torch.where(h <= threshold, 0, h)  # NaN stays
        return dense.view(*x.shape[:-1], self.features)

    def topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The active features of each row without the dense matrix: (values, indices), largest first.

        Args:
            x: Rows of the stream, (..., d).

        Returns:
            values float32 and indices int32, (..., k); with a threshold the width is the largest number of active features
            of any row (one host sync; `ops.sae_encode_threshold` has none). Unused places are value 0 at index 0.
        """
        inner = self._normalise("SAE.topk", x)[0]
        if self.k is not None:
            return ops.sae_encode(inner, self.w_enc, self.b_enc, self.k)
        capacity = min(64, self.features)
        while True:
            values, indices, counts = ops.sae_encode_threshold(
                inner, self.w_enc, self.b_enc, as_tensor(self.threshold), capacity
            )
            most = max(int(counts.max()), 1) if counts.numel() else 1
            if most <= capacity:
                return values[..., :most], indices[..., :most]
            capacity = most

    def decode_topk(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """The reconstruction from a few features: Σⱼ values[j]·W_dec[indices[j]] + b_dec, (..., k) -> (..., d).

        Args:
            values: Feature activations, (..., k).
            indices: Their features, int32 or int64, (..., k).
            x: The rows that were encoded; needed, and used, only where the SAE normalises each row.

        Returns:
            In the dtype of w_dec: `sae.to(dtype=torch.float32)` for more than its 8 bits where that is bfloat16.

        Raises:
            ValueError: the SAE normalises each row, and x is not given.
        """
        return self._denormalise("SAE.decode_topk", ops.sae_decode(values, indices, self.w_dec, self.b_dec), x)

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        """The reconstruction from all features, features·W_dec + b_dec, in their dtype: (..., F) -> (..., d).

        Args:
            features: Feature activations, (..., F).
            x: As of `decode_topk`.

        Raises:
            TypeError: the features are no floating tensor.
            ValueError: there are not F, or as of `decode_topk`.
        """
        if not isinstance(features, Tensor) or not features.is_floating_point():
            got = f"has dtype {features.dtype}" if isinstance(features, Tensor) else f"is {type(features).__name__}"
            raise TypeError(f"SAE.decode: features {got}; expected a floating tensor (..., F): features.float()")
        if features.shape[-1:] != (self.features,):
            raise ValueError(
                f"SAE.decode: features has shape {tuple(features.shape)}; expected (..., F) with F = {self.features}"
            )
        w, b = self.w_dec.to(features.dtype), as_tensor(self.b_dec).to(features.dtype)
        out = product(features.reshape(-1, self.features), w, b).view(*features.shape[:-1], w.shape[1])
        return self._denormalise("SAE.decode", out, x)

    def __call__(self, x: Tensor) -> Tensor:
        """The reconstruction decode(encode(x)) by way of the active features, (..., d) -> (..., d), in the dtype of w_dec."""
        return self.decode_topk(*self.topk(x), x)

    def rows(self, indices: Iterable[int] | Tensor | slice) -> Features | SelectedFeatures:
        """Some features as `sf.EditFeatures` takes them.

        A threshold looks at one feature at a time, so their rows are enough (`Features`). Top-K compares all features, and
        a normalised row has a scale of its own: then `SelectedFeatures`, and an edit costs one encode per token. Those of
        a Top-K SAE hold the SAE, and a saved plan names it by its fingerprint; `approximate` avoids both.

        Args:
            indices: Their numbers, 0 to F − 1; also an array or a tensor of integers, or a slice.

        Raises:
            TypeError, ValueError: a number is not whole, or out of range.
        """
        indices = whole_numbers("SAE.rows", "indices", indices, self.features)
        outside = [index for index in indices if not 0 <= index < self.features]
        if outside:
            raise ValueError(f"SAE: feature {outside[0]} is out of range; there are {self.features}, from 0")
        w_enc, w_dec, b_enc, threshold = self.w_enc, self.w_dec[indices], as_tensor(self.b_enc), self.threshold
        if threshold is None:
            numbers = torch.tensor(indices, dtype=torch.int32, device="cpu")
            return SelectedFeatures(
                w_enc, b_enc, w_dec, numbers, None, self.k or 0, self.normalisation, self.origin, self
            )
        w_enc, b_enc, threshold = w_enc[indices], b_enc[indices], threshold[indices]
        if self.normalisation == "none":
            return Features(w_enc, w_dec, b_enc, threshold, self.origin)
        numbers = torch.arange(len(indices), dtype=torch.int32, device="cpu")
        return SelectedFeatures(w_enc, b_enc, w_dec, numbers, threshold, 0, self.normalisation, self.origin)

    def approximate(self, threshold: float = 0.0) -> SAE:
        """A Top-K SAE as one with a threshold, so that an edit reads only the rows of the features that it names.

        Args:
            threshold: θ, the same for all features: a feature counts as active where h > θ. A good one is the mean k-th
                value on a few hundred tokens, `sae.topk(x)[0][:, -1].mean()`; 0 counts every positive feature.

        Raises:
            ValueError: the SAE is no Top-K SAE, or θ is negative.
        """
        if self.k is None:
            raise ValueError("SAE.approximate: this SAE has a threshold already and is edited exactly by its rows")
        theta = finite_number("SAE.approximate", "threshold", threshold)
        return dataclasses.replace(self, k=None, threshold=torch.full_like(as_tensor(self.b_enc), theta))

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        sae_id: str | None = None,
        *,
        k: int | None = None,
        scale: float | None = None,
        site: object = None,
        dtype: torch.dtype | None = None,
    ) -> SAE:
        """Read an SAE of any family, from a file, a directory, or the cache of the Hugging Face hub; see docs/sae.md.

        Args:
            path: The directory, or the file with the weights; the family is told by the names and contents of the files. With
                `sae_id` the name of a release or repository; or an id of Neuronpedia, "gemma-2-2b/20-gemmascope-res-16k".
                Names of releases and ids are looked up in the list of an installed sae-lens.
            sae_id: The SAE in the release, "layer_20/width_16k/average_l0_71", or its folder or file in the repository or
                directory.
            k: Of a Top-K file that does not say it.
            scale: s > 0 of a file that was trained on s·x and does not say s: √d over the mean length of the rows that it was
                trained on; 1.0 if it is folded into the weights already. Refused for a file that says it or needs none.
            site: The place of a file that does not say it: (site, layer), or "blocks.20.hook_resid_post".
            dtype: Of the two matrices; None: as in the file, float32 where something was folded. `source.rounding` tells what
                it cost.

        Returns:
            The SAE on the CPU; a `Transcoder` from the file of one.

        Raises:
            FileNotFoundError: nothing is there, a file of the family is missing, or files of a release are neither cached nor
                to be had: their names.
            ValueError: damaged, ambiguous, of an unknown family, or something this form cannot hold; the reason is given.
                A k, scale or site that the file lacks, contradicts or does not want; numbers that the dtype cannot hold.
        """
        from steerfast.sae.formats import load

        return load(path, sae_id, k=k, scale=scale, site=site, dtype=dtype)

    @classmethod
    def from_saelens(cls, sae: object) -> SAE:
        """An SAE of SAELens that is in memory, of the kinds that `load` reads from its files; nothing is shared with it.

        Raises:
            TypeError: it is no SAE of SAELens.
            ValueError: it is of a kind that this form cannot hold.
        """
        from steerfast.sae.formats import from_saelens

        return from_saelens(sae)

    def to_saelens(self) -> object:
        """The same SAE as an object of SAELens, `sae_lens.SAE`, with the same features; what was folded stays folded.

        Raises:
            ImportError: sae-lens is not installed.
            ValueError: SAELens has no such kind: a Top-K transcoder.
        """
        from steerfast.sae.formats import to_saelens

        return to_saelens(self)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write sae.json and sae.safetensors into a directory: both, or neither.

        Returns:
            The directory.
        """
        from steerfast.sae.formats import save

        return save(self, Path(directory))

    def __repr__(self) -> str:
        select = f"k={self.k}" if self.k is not None else self.activation
        return f"SAE(F={self.features}, d={self.d}, {select}, place={self.place}, {self.w_enc.dtype})"

    def _check_shapes(self) -> None:
        if self.w_dec.shape != self.w_enc.shape:
            raise ValueError(
                f"SAE: w_dec has shape {tuple(self.w_dec.shape)} and w_enc {tuple(self.w_enc.shape)}; expected (F, d) "
                "for both: transpose the one that is (d, F)"
            )

    def _normalise(self, owner: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The rows as the encoder takes them, and what their reconstruction is multiplied with, (..., 1)."""
        check_stream(owner, x)
        if x.shape[-1] != self.d:
            raise ValueError(f"{owner}: x has shape {tuple(x.shape)}; expected (..., d) with d = {self.d}")
        return normalised(x, self.normalisation)

    def _denormalise(self, owner: str, out: Tensor, x: Tensor | None) -> Tensor:
        if self.normalisation == "none":
            return out
        if x is None:
            raise ValueError(f"{owner}: this SAE normalises each row ({self.normalisation}); pass the rows as x=")
        wide = out * as_tensor(self._normalise(owner, x)[1])
        if self.normalisation == "layer_norm":  # a mean in 16 bits would be rounded before it is added
            wide = wide + _wide(x, self.w_dec).mean(dim=-1, keepdim=True)
        return wide.to(out.dtype)


@in_full_precision
def product(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """x·w + b, (n, a) by (a, c) to (n, c), all of one dtype, under autocast, too."""
    return torch.addmm(b, x, w)


def _wide(x: Tensor, weights: Tensor) -> Tensor:
    return x.to(torch.promote_types(torch.promote_types(x.dtype, weights.dtype), torch.float32))
