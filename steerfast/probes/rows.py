"""Probes of a few directions or of a barrier, which look at nothing but their own row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import (
    Directions,
    as_tensor,
    direction_rows,
    finite_number,
    float_table,
    one_of,
    orthonormal,
    set_field,
)
from steerfast.barriers.barrier import Barrier
from steerfast.ops.backends import in_full_precision
from steerfast.ops.stream import similarity

from .info import ProbeInfo
from .probe import Probe, Reader

SIMILARITIES = ("projection", "tanh")


@dataclass(frozen=True, eq=False, repr=False)
class LinearProbe(Probe):
    """x·w + b, of one direction or of several; nothing is normalised.

    Args:
        weight: w (d,), or anything that carries one as `.vector`: one number per row. Or rows (m, d): m numbers.
        bias: b, a number; with rows also (m,).

    Raises:
        TypeError, ValueError: not finite, a zero direction, a bias of another shape; as of every `Probe`.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.probes.LinearProbe(torch.tensor([1.0, 2.0]), bias=0.5)(torch.tensor([[3.0, 4.0]]))
        tensor([11.5000])
    """

    weight: Directions
    bias: float | Tensor = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = direction_rows("LinearProbe", "weight", self.weight)
        if _is_one_row(self.weight):
            set_field(self, "weight", rows[0])
            set_field(self, "bias", finite_number("LinearProbe", "bias", self.bias))
            return
        several = isinstance(self.bias, Tensor) and self.bias.dim() > 0
        bias = (
            self.bias
            if several
            else torch.full((len(rows),), finite_number("LinearProbe", "bias", self.bias), device="cpu")
        )
        set_field(self, "weight", rows)
        set_field(self, "bias", float_table("LinearProbe", "bias", as_tensor(bias), (len(rows),)))

    @property
    def width(self) -> int:
        return as_tensor(self.weight).shape[-1]

    @property
    def names(self) -> tuple[str, ...] | None:
        weight = as_tensor(self.weight)
        return None if weight.dim() == 1 else tuple(map(str, range(len(weight))))

    def program(self, device: torch.device) -> Reader:
        return _affine(as_tensor(self.weight), self.bias, device)


@dataclass(frozen=True, eq=False, repr=False)
class LogisticProbe(Probe):
    """A probability: σ(x·w + b).

    Args:
        weight: w (d,), or anything that carries one as `.vector`, in log-odds per unit of x.
        bias: b, in log-odds.
        info: How it was fitted, and how good it is: what `fit_probe` knows.

    Raises:
        TypeError, ValueError: not finite, a zero direction; as of every `Probe`.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.probes.LogisticProbe(torch.tensor([1.0, 2.0]), bias=-11.0)(torch.tensor([[3.0, 4.0]]))
        tensor([0.5000])
    """

    weight: Directions
    bias: float = 0.0
    info: ProbeInfo = field(default_factory=ProbeInfo)

    def __post_init__(self) -> None:
        super().__post_init__()
        set_field(self, "weight", direction_rows("LogisticProbe", "weight", self.weight, one=True)[0])
        set_field(self, "bias", finite_number("LogisticProbe", "bias", self.bias))
        if not isinstance(self.info, ProbeInfo):
            raise TypeError(f"LogisticProbe: info must be a ProbeInfo; got {type(self.info).__name__}")

    @property
    def width(self) -> int:
        return as_tensor(self.weight).shape[-1]

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, 1.0

    def program(self, device: torch.device) -> Reader:
        odds = _affine(as_tensor(self.weight), self.bias, device)
        return lambda x: torch.sigmoid(odds(x))

    def numbers(self) -> dict[str, Any]:
        return {"bias": self.bias, "info": self.info.numbers()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> LogisticProbe:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        return cls(tensors["weight"], numbers["bias"], ProbeInfo.restore(numbers["info"]))


@dataclass(frozen=True, eq=False, repr=False)
class SimilarityProbe(Probe):
    """How much of a row lies in a subspace, as a cosine: what a `Condition` on a direction looks at.

    "projection": |cos(x, proj_W x)| = ‖Wx‖/‖x‖, between 0 and 1. "tanh": cos(x, tanh(WᵀWx)), between -1 and 1; it depends on
    the size of x and on all of its entries.

    Args:
        direction: One vector (d,), or m independent ones (m, d), of any length; W is an orthonormal basis.
        kind: "projection" or "tanh".

    Raises:
        TypeError, ValueError: not finite, zero or dependent rows, an unknown kind; as of every `Probe`.

    Reference:
        Lee et al. 2024, Programming Refusal with Conditional Activation Steering (arXiv:2409.05907).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.probes.SimilarityProbe(torch.tensor([2.0, 0.0]))(torch.tensor([[3.0, 4.0]]))
        tensor([0.6000])
    """

    direction: Directions
    kind: str = "projection"

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = direction_rows("SimilarityProbe", "direction", self.direction)
        set_field(self, "direction", orthonormal("SimilarityProbe", "direction", rows))
        one_of("SimilarityProbe", "kind", self.kind, SIMILARITIES)

    @property
    def width(self) -> int:
        return as_tensor(self.direction).shape[-1]

    @property
    def bounds(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.kind == "projection" else (-1.0, 1.0)

    def program(self, device: torch.device) -> Reader:
        basis, kind = as_tensor(self.direction).to(device), self.kind
        return lambda x: similarity(x, basis, kind).float()

    def _words(self) -> str:
        return f"{self.kind}, d {self.width}"


@dataclass(frozen=True, eq=False, repr=False)
class BarrierProbe(Probe):
    """h(x) = log p₊(x)/p₋(x) of a barrier.

    Args:
        barrier: What `fit_barrier` returns.

    Raises:
        TypeError: it is no barrier; as of every `Probe`.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.probes.BarrierProbe(sf.Barrier.linear(torch.tensor([3.0, 4.0])))(torch.tensor([[2.0, 0.0]]))
        tensor([3.])
    """

    barrier: Barrier

    def __post_init__(self) -> None:
        if not isinstance(self.barrier, Barrier):
            raise TypeError(f"BarrierProbe: barrier must be a Barrier; got {type(self.barrier).__name__}")
        super().__post_init__()

    @property
    def width(self) -> int:
        return self.barrier.width

    def program(self, device: torch.device) -> Reader:
        h = self.barrier.program(device)
        return lambda x: h(x).float()

    def tensors(self) -> dict[str, Tensor]:
        """Those of the barrier."""
        return self.barrier.tensors()

    def numbers(self) -> dict[str, Any]:
        return {"barrier": self.barrier.numbers()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> BarrierProbe:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        return cls(Barrier.restore(tensors, numbers["barrier"]))


def _is_one_row(weight: Any) -> bool:
    return len(getattr(getattr(weight, "vector", weight), "shape", ())) < 2


def _affine(weight: Tensor, bias: float | Tensor, device: torch.device) -> Reader:
    """x·w + b in float32."""
    columns = weight.T.to(device) if weight.dim() == 2 else weight.to(device)
    shift = bias.to(device) if isinstance(bias, Tensor) else bias

    @in_full_precision
    def run(x: Tensor) -> Tensor:
        return x.float() @ columns + shift

    return run
