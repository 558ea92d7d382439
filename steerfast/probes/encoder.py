"""What the activations of an SAE's features depend on: rows of an encoder, a selection, and their copies on each device.

An SAE is known by what it carries (`w_enc`, `b_enc`, `threshold`, `k`, `normalisation`), so that nothing here imports one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast import ops
from steerfast._checks import as_tensor
from steerfast.ops.backends import in_full_precision

LAYER_NORM_EPSILON = 1e-5  # of OpenAI and SAELens, added to the deviation, not to the variance

_COPIES: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[tuple[str, torch.device], Tensor]] = (
    weakref.WeakKeyDictionary()
)
"""An SAE to its encoder on each device: one copy there for all that reads or edits with it, freed with its last reference."""


def shared_copy(owner: Any, name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of an SAE on a device, one copy for all who ask."""
    copies = _COPIES.setdefault(owner, weakref.WeakValueDictionary())
    found = copies.get((name, device))
    if found is None:
        found = copies[name, device] = tensor.to(device)
    return found


class _Latest(threading.local):
    """What this thread has encoded last: of which tensors, in which state, and what was found."""

    def __init__(self) -> None:
        self.of: tuple[weakref.ref[Tensor], ...] = ()
        self.state: tuple[Any, ...] = ()
        self.found: tuple[Tensor, Tensor] | None = None
        self.scope: Encodes | None = None


_LATEST = _Latest()


class Encodes:
    """What is encoded of one tensor while it is the stream of a place: by each SAE once, for all who read and edit.

    For an engine, whose tensors say nothing of their changes: `with Encodes() as read` promises that what is read inside does
    not change there. What was found may be asked for as long as this object is there.
    """

    __slots__ = ("_found", "_rows")

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[Tensor, tuple[Tensor, Tensor]]] = {}
        self._rows: Tensor | slice | None = None

    def __enter__(self) -> Encodes:
        _LATEST.scope = self
        return self

    def __exit__(self, *_: object) -> None:
        _LATEST.scope = None

    def __bool__(self) -> bool:
        return bool(self._found)

    def among(self, rows: Tensor | slice) -> Encodes:
        """The same of some of the rows, by their numbers among all of them."""
        part = Encodes()
        part._found, part._rows = self._found, rows
        return part

    def of(self, weight: Tensor, bias: Tensor, k: int, normalisation: str) -> tuple[Tensor, Tensor] | None:
        """(values, indices) of every row, (n, k) both; None: nobody has asked for them."""
        known = self._found.get((id(weight), id(bias), k, normalisation))
        if known is None or self._rows is None:
            return None if known is None else known[1]
        values, indices = known[1]
        return values[self._rows], indices[self._rows]

    def find(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, normalisation: str) -> tuple[Tensor, Tensor]:
        """What `ops.sae_encode` gives of normalised rows x."""
        key = id(weight), id(bias), k, normalisation
        known = self._found.get(key)
        if known is None or known[0] is not x:
            known = self._found[key] = x, ops.sae_encode(normalised(x, normalisation)[0], weight, bias, k)
        return known[1]


def encoded(x: Tensor, weight: Tensor, bias: Tensor, k: int, normalisation: str) -> tuple[Tensor, Tensor]:
    """The k largest activations of rows x (..., d) and their features, as `ops.sae_encode` gives them of normalised rows.

    Whoever asks next for the same of the same tensors, a probe, a gate or an edit, has it for nothing.
    """
    state: tuple[Any, ...] = ()
    if not torch.compiler.is_compiling() and _LATEST.scope is not None:
        return _LATEST.scope.find(x, weight, bias, k, normalisation)
    if plain := _is_plain(x, weight, bias):
        state = x._version, weight._version, bias._version, k, normalisation
        same = _LATEST.of and all(ref() is one for ref, one in zip(_LATEST.of, (x, weight, bias), strict=True))
        if same and _LATEST.found is not None and _LATEST.state == state:
            return _LATEST.found
    found = ops.sae_encode(normalised(x, normalisation)[0], weight, bias, k)
    if plain:
        _LATEST.of, _LATEST.state = (weakref.ref(x), weakref.ref(weight), weakref.ref(bias)), state
        _LATEST.found = found
    return found


def _is_plain(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Whether a change of the tensors would show, and nothing is recorded of what is made of them."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if x.is_inference() or weight.is_inference() or bias.is_inference():
        return False
    return not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))


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
class Encoder:
    """Rows of an encoder: f = select(W·norm(x) + b), the k largest positive ones or those above θ.

    Attributes:
        weight: W, (r, d): all of it for Top-K, where a feature depends on all others.
        bias: b, (r,).
        threshold: θ, (r,); None: Top-K.
        k: Of Top-K; 0 with a threshold.
        normalisation: As in `SAE`.
        numbers: The feature of each row; None: row i is feature i.
        sae: The SAE that it is of, which a file names instead of all of its encoder; None: the rows stand for themselves.
    """

    weight: Tensor
    bias: Tensor
    threshold: Tensor | None = None
    k: int = 0
    normalisation: str = "none"
    numbers: tuple[int, ...] | None = None
    sae: Any = None

    def __post_init__(self) -> None:
        rows = self.weight.shape[0] if self.weight.dim() == 2 else 0
        sizes = [t.shape for t in (self.bias, self.threshold) if t is not None]
        if (
            not rows
            or any(size != (rows,) for size in sizes)
            or (self.numbers is not None and len(self.numbers) != rows)
        ):
            shapes = [tuple(t.shape) for t in (self.weight, self.bias, self.threshold) if t is not None]
            raise ValueError(
                f"Encoder: the shapes {shapes} do not fit; expected (r, d), (r,) and (r,), a row per feature"
            )
        if (self.threshold is None) == (self.k == 0) or not 0 <= self.k <= rows:
            raise ValueError(f"Encoder: k is {self.k}; expected a threshold, or 1 to {rows} for Top-K")

    @classmethod
    def of(cls, owner: str, value: Any) -> Encoder:
        """The encoder of an SAE or a transcoder, or of `Features`.

        Raises:
            TypeError: it is none of these.
        """
        if isinstance(value, Encoder):
            return value
        if hasattr(value, "w_enc"):
            return cls(value.w_enc, value.b_enc, value.threshold, value.k or 0, value.normalisation, sae=value)
        if hasattr(value, "encoder") and getattr(value, "threshold", None) is not None:
            return cls(value.encoder, value.bias, value.threshold, 0, getattr(value, "normalisation", "none"))
        raise TypeError(f"{owner}: sae must be an SAE, a transcoder or Features; got {type(value).__name__}")

    @property
    def width(self) -> int:
        """d, of what it reads."""
        return self.weight.shape[1]

    def picked(self, owner: str, features: Sequence[int]) -> Encoder:
        """What those features depend on: their own rows as float32 CPU tensors; with Top-K all of it.

        Raises:
            ValueError: a feature is not among its rows.
        """
        count = self.weight.shape[0]
        known = range(count) if self.numbers is None else self.numbers
        if outside := [feature for feature in features if feature not in known]:
            there = f"0 to {count - 1}" if self.numbers is None else ", ".join(map(str, self.numbers))
            raise ValueError(f"{owner}: feature {outside[0]} is out of range; there are {there}")
        if self.threshold is None:
            return self
        rows = list(features) if self.numbers is None else [self.numbers.index(feature) for feature in features]
        weight, bias, threshold = (
            part[rows].detach().to("cpu", torch.float32, copy=True) for part in (self.weight, self.bias, self.threshold)
        )
        for name, part in (("encoder", weight), ("bias", bias), ("threshold", threshold)):
            if not bool(part.isfinite().all()):
                raise ValueError(f"{owner}: {name} holds NaN or Inf")
        return Encoder(weight, bias, threshold, 0, self.normalisation, tuple(features))

    def reading(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Of an encoder with thresholds: the activations of all its rows, x (..., d) -> float32 (..., r)."""
        weight, bias, threshold = (as_tensor(part).to(device) for part in (self.weight, self.bias, self.threshold))

        @in_full_precision
        def run(x: Tensor) -> Tensor:
            inner = normalised(x.float(), self.normalisation)[0]
            h = inner @ weight.T + bias
            return torch.where(h <= threshold, 0, h)  # NaN stays

        return run

    def selecting(self, k: int, device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Of a whole encoder: x (..., d) -> the k largest activations, float32, and their features, int32, (..., k) both."""
        owner = self if self.sae is None else self.sae
        weight, bias = (shared_copy(owner, n, t, device) for n, t in (("encoder", self.weight), ("bias", self.bias)))
        threshold = None if self.threshold is None else self.threshold.to(device, torch.float32)
        one = threshold is None or bool((threshold == threshold[0]).all())  # the k largest are the k largest above it

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            if threshold is None or one:
                values, indices = encoded(x, weight, bias, k, self.normalisation)
                if threshold is None:
                    return values.float(), indices
                kept = ~(values <= threshold[0])  # NaN stays
                return torch.where(kept, values, 0).float(), torch.where(kept, indices, 0)
            inner = normalised(x, self.normalisation)[0]
            values, indices, _ = ops.sae_encode_threshold(inner, weight, bias, threshold, weight.shape[0])
            return values[..., :k].float(), indices[..., :k]

        return run
