"""Barriers: h(a) = log p₊(a)/p₋(a), whose gradient a flow follows. `fit_barrier` fits them.

Every barrier is of low rank: it sees an activation only through k numbers z = Qᵀx̂, Q = basis.T, where x̂ is a/‖a‖ or, for a
*raw* one, a itself. So its gradient lies in span(Q, a) and a whole flow stays there:

    h(a) = zᵀΛz + b̃ᵀz + Σⱼ wⱼ·φ(ωⱼᵀz + βⱼ) + c

A linear barrier has k = 1 and Λ = 0; a quadratic one, and the polynomial sketch, have no ridge terms; random Fourier
features and a network with one hidden layer are the ridge terms with φ = cos and φ = tanh. The linear raw barrier is plain
activation addition.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import check_orthonormal, direction_rows, finite_number, one_of, own_tensors, warn_user
from steerfast.files import container
from steerfast.ops.backends import in_full_precision
from steerfast.place import NOWHERE, Origin, Place

from .basis import LowRank

ACTIVATIONS = ("cos", "tanh")
PARTS = {
    "": ("basis", "eigenvalues", "bias"),
    "ridge.": ("directions", "phases", "weights"),
    "sketch.": ("hashes", "signs", "weights"),
}
"""The tensors of a barrier and of its two parts, by the prefix that their names have in a file."""


@dataclass(frozen=True)
class BarrierInfo:
    """How a barrier was fitted and how good it is.

    Attributes:
        kind: "linear", "quadratic", "sketch", "rff" or "mlp"; "" if it was made by hand.
        accuracy: Share of held-out activations on the right side of h = 0; NaN if nothing was held out.
        log_likelihood: Mean log-likelihood per held-out example; NaN if nothing was held out.
        separable: Whether the fitted activations all lie on their own side: the size of h is then set by C alone.
        settings: What the fit chose or was given, by name (C, gamma, coef0, …).
        distance: ‖μ₊ − μ₋‖ between the means of the fitted activations, in units of the stream, where a row of more than three
            typical lengths counts as one of three: a flow with T = distance moves a row as far as the mean difference does.
            NaN if it was made by hand, or by a version before 0.2.
    """

    kind: str = ""
    accuracy: float = math.nan
    log_likelihood: float = math.nan
    separable: bool = False
    settings: Mapping[str, float] = field(default_factory=dict)
    distance: float = math.nan


@dataclass(frozen=True, eq=False)
class Ridge:
    """Ridge terms Σⱼ wⱼ·φ(ωⱼᵀz + βⱼ) of a barrier.

    Attributes:
        directions: ω, (m, k), float32.
        phases: β, (m,).
        weights: w, (m,).
        activation: φ, "cos" or "tanh".

    Raises:
        TypeError, ValueError: shapes do not fit, a number is not finite, or the activation is unknown.
    """

    directions: Tensor
    phases: Tensor
    weights: Tensor
    activation: str = "cos"

    def __post_init__(self) -> None:
        one_of("Ridge", "activation", self.activation, ACTIVATIONS)
        own_tensors(self, "Ridge", ("directions", "phases", "weights"))
        units = self.directions.shape[0] if self.directions.dim() == 2 else 0
        if units == 0 or self.phases.shape != (units,) or self.weights.shape != (units,):
            raise ValueError(
                f"Ridge: directions {tuple(self.directions.shape)}, phases {tuple(self.phases.shape)} and weights "
                f"{tuple(self.weights.shape)} do not fit; expected (m, k), (m,) and (m,)"
            )

    def __call__(self, z: Tensor) -> Tensor:
        """The sum at points z (..., k), as (...,)."""
        return self.program(z.device)(z)

    def program(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """The sum as a function of points on one device, in their dtype."""
        directions, phases, weights = (t.to(device) for t in (self.directions, self.phases, self.weights))
        act = torch.cos if self.activation == "cos" else torch.tanh

        def run(z: Tensor) -> Tensor:
            inside = z @ directions.to(z.dtype).T + phases.to(z.dtype)
            return act(inside) @ weights.to(z.dtype)

        return run


@dataclass(frozen=True, eq=False)
class Sketch:
    """The polynomial count sketch that a barrier was fitted through: its hashes and weights, so that it can be redone.

    φ(x) = C₁x' ⊛ C₂x' (circular convolution) with x' = (√γ·x, √c₀) and count sketches C: entry i of x' is added with
    its sign to component hash[i]. Its products approximate (γ·x·y + c₀)².

    Attributes:
        hashes: int32 (2, d + 1), components in [0, D).
        signs: int8 (2, d + 1), ±1.
        weights: float32 (D,), of logistic regression on the features.
        gamma, coef0: γ and c₀.
    """

    hashes: Tensor
    signs: Tensor
    weights: Tensor
    gamma: float
    coef0: float

    def features(self, x: Tensor) -> Tensor:
        """φ of rows (n, d), as (n, D), in the dtype of x."""
        wide = torch.cat([math.sqrt(self.gamma) * x, x.new_full((*x.shape[:-1], 1), math.sqrt(self.coef0))], dim=-1)
        product: Any = 1.0
        for hashes, signs in zip(self.hashes.long(), self.signs, strict=True):
            counts = wide.new_zeros(*wide.shape[:-1], self.weights.shape[0])
            product = product * torch.fft.rfft(counts.index_add(-1, hashes, wide * signs.to(wide)))
        return torch.fft.irfft(product, n=self.weights.shape[0])

    def quadratic(self) -> tuple[Tensor, Tensor, float]:
        """(A, b, c) with weights·φ(x) = xᵀAx + bᵀx + c exactly, in float64: the sketch is a quadratic polynomial."""
        one, two = self.hashes.long()
        signs = self.signs.double()
        where = (one[:, None] + two[None, :]) % self.weights.shape[0]
        products = signs[0][:, None] * signs[1][None, :] * self.weights.double()[where]
        A = self.gamma * (products[:-1, :-1] + products[:-1, :-1].T) / 2
        b = math.sqrt(self.gamma * self.coef0) * (products[:-1, -1] + products[-1, :-1])
        return A, b, self.coef0 * float(products[-1, -1])


@dataclass(frozen=True, eq=False)
class Barrier(LowRank):
    """A barrier of low rank: h(a) = zᵀΛz + b̃ᵀz + ridge(z) + c, z = Qᵀa/‖a‖ or Qᵀa (raw), Q = basis.T.

    Attributes:
        basis: Orthonormal rows (k, d), float32; k = d for a full-rank one.
        eigenvalues: Λ's diagonal, (k,).
        bias: b̃, (k,).
        offset: c.
        info: How it was fitted, and how good it is.
        origin: Where the activations were read that it was fitted on, and their typical norm.
        ridge: Ridge terms; None: none.
        raw: z = Qᵀa instead, without the sphere.
        sketch: The features that it was fitted through, for kind "sketch".

    Raises:
        TypeError, ValueError: shapes do not fit, a number is not finite, or the basis is not orthonormal.

    Example:
        >>> import torch, steerfast as sf
        >>> h = sf.Barrier(torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.ones(1))
        >>> h(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([0.6000, 0.0000])
    """

    basis: Tensor
    eigenvalues: Tensor
    bias: Tensor
    offset: float = 0.0
    info: BarrierInfo = field(default_factory=BarrierInfo)
    ridge: Ridge | None = None
    raw: bool = False
    sketch: Sketch | None = None
    origin: Origin = NOWHERE

    def __post_init__(self) -> None:
        own_tensors(self, "Barrier", ("basis", "eigenvalues", "bias"))
        rank = self.basis.shape[0] if self.basis.dim() == 2 else 0
        if rank == 0 or self.eigenvalues.shape != (rank,) or self.bias.shape != (rank,):
            raise ValueError(
                f"Barrier: basis {tuple(self.basis.shape)}, eigenvalues {tuple(self.eigenvalues.shape)} and bias "
                f"{tuple(self.bias.shape)} do not fit; expected (k, d), (k,) and (k,)"
            )
        object.__setattr__(self, "offset", finite_number("Barrier", "offset", self.offset))
        if self.ridge is not None and self.ridge.directions.shape[1] != rank:
            raise ValueError(
                f"Barrier: ridge has directions of width {self.ridge.directions.shape[1]}; expected {rank}, the rows of basis"
            )
        check_orthonormal("Barrier", "basis", self.basis)

    @classmethod
    def linear(cls, direction: Any, offset: float = 0.0, raw: bool = False) -> Barrier:
        """h = v·x̂ + c of a direction v (d,), or of anything that carries one as `.vector`; raw: h = v·a + c.

        Raises:
            TypeError, ValueError: v is not one finite non-zero row.

        Example:
            >>> import torch, steerfast as sf
            >>> sf.Barrier.linear(torch.tensor([3.0, 4.0]))(torch.tensor([[2.0, 0.0]]))
            tensor([3.])
        """
        row = direction_rows("Barrier.linear", "direction", direction, one=True).double()
        length = row.norm()
        return cls(
            (row / length).float(),
            torch.zeros(1, dtype=torch.float32, device="cpu"),
            length.float()[None],
            offset,
            raw=raw,
        )

    def __call__(self, a: Tensor) -> Tensor:
        """h of activations (..., d), as (...,), in float32 or, for float64 activations, in float64; a zero row has z = 0."""
        if a.shape[-1:] != (self.width,):
            raise ValueError(f"Barrier: got activations of shape {tuple(a.shape)}; expected (..., {self.width})")
        return self.program(a.device)(a)

    def program(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """h as a function of activations on one device: its tensors are moved there once, nothing is checked."""
        basis, eigenvalues, bias = (t.to(device) for t in (self.basis, self.eigenvalues, self.bias))
        ridge = None if self.ridge is None else self.ridge.program(device)

        @in_full_precision
        def run(a: Tensor) -> Tensor:
            a = a if a.dtype == torch.float64 else a.float()
            z = a @ basis.to(a.dtype).T
            if not self.raw:
                norm = a.norm(dim=-1, keepdim=True)
                z = z / torch.where(norm > 0, norm, 1)
            h = (z * z) @ eigenvalues.to(a.dtype) + z @ bias.to(a.dtype) + self.offset
            return h if ridge is None else h + ridge(z)

        return run

    def __neg__(self) -> Barrier:
        """log p₋/p₊: the barrier of the swapped sides, whose flow goes the other way."""
        ridge = None if self.ridge is None else replace(self.ridge, weights=-self.ridge.weights)
        sketch = None if self.sketch is None else replace(self.sketch, weights=-self.sketch.weights)
        eigenvalues, bias = -self.eigenvalues, -self.bias
        return replace(self, eigenvalues=eigenvalues, bias=bias, offset=-self.offset, ridge=ridge, sketch=sketch)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as `save` writes them."""
        owners: dict[str, Any] = {"": self, "ridge.": self.ridge, "sketch.": self.sketch}
        here = {prefix: owner for prefix, owner in owners.items() if owner is not None}
        return {prefix + name: getattr(owner, name) for prefix, owner in here.items() for name in PARTS[prefix]}

    def numbers(self) -> dict[str, Any]:
        """All else, ready for JSON (a number that is unknown is null)."""
        info = {key: _known(value) for key, value in asdict(self.info).items()}
        return {
            "offset": self.offset,
            "raw": self.raw,
            "info": info,
            "origin": self.origin.numbers(),
            "ridge": None if self.ridge is None else {"activation": self.ridge.activation},
            "sketch": None if self.sketch is None else {"gamma": self.sketch.gamma, "coef0": self.sketch.coef0},
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Barrier:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        parts: dict[str, dict[str, Any]] = {"": {}, "ridge": {}, "sketch": {}}
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            parts[owner][leaf] = tensor
        rest = dict(numbers)
        info = dict(rest.pop("info"))
        origin = Origin.restore(rest.pop("origin")) if "origin" in rest else _old_origin(info)
        missing = ("accuracy", "log_likelihood", "distance")  # what was never measured is null in JSON
        known: dict[str, Any] = {k: math.nan if v is None and k in missing else v for k, v in info.items()}
        for owner, kind in (("ridge", Ridge), ("sketch", Sketch)):
            described = rest.pop(owner)
            rest[owner] = None if described is None else kind(**parts[owner], **described)
        return cls(**parts[""], **rest, info=BarrierInfo(**known), origin=origin)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write barrier.json and barrier.safetensors into a directory: both, or neither.

        Returns:
            The directory.
        """
        return container.write(container.BARRIER, directory, {"barrier": self.numbers()}, self.tensors())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Barrier:
        """Read what `save` wrote. Nothing is executed, nothing is loaded in part.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, or of another kind or schema.
        """
        text, tensors = container.read(container.BARRIER, directory)
        with container.describing(container.BARRIER, directory):
            numbers = text["barrier"]
            here = [prefix for prefix in PARTS if not prefix or numbers[prefix.rstrip(".")] is not None]
            names = [prefix + name for prefix in here for name in PARTS[prefix]]
        container.expect(container.BARRIER, directory, tensors, dict.fromkeys(names))
        with container.describing(container.BARRIER, directory):
            return cls.restore(tensors, numbers)


def _old_origin(info: dict[str, Any]) -> Origin:
    """What a file of schema 1 says: its typical norm was a mean, which a few rows of enormous norm make useless."""
    layer, site, model, norm = (info.pop(name, None) for name in ("layer", "site", "model", "typical_norm"))
    if norm:
        warn_user(
            "Barrier.load: the file says the mean norm of its activations, where the median is wanted; it is read as "
            "unknown: fit the barrier again, or give it an origin",
        )
    return Origin(model, None if layer is None else Place(site or "resid_post", layer))


def _known(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return None if isinstance(value, float) and math.isnan(value) else value
