"""Velocity fields da/dt = v(a) of low rank: what a flow follows where no barrier is at hand."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import check_orthonormal, one_of, own_tensors
from steerfast._null import Null
from steerfast.files import container
from steerfast.ops.backends import in_full_precision
from steerfast.ops.solvers import Field
from steerfast.place import NOWHERE, Origin

from .basis import LowRank

ACTIVATIONS = ("identity", "tanh")
TENSORS = ("basis", "bias", "directions", "phases", "outputs")


@dataclass(frozen=True)
class VelocityInfo:
    """How a velocity field was fitted.

    Attributes:
        kind: "natural" (`fit_velocity`); "" if it was made by hand.
        nats: By how many nats the log-odds of held-out pairs rise over a time of 1; NaN if nothing was held out.
        damage: KL(unsteered ‖ steered) of a token of held-out neutral text over a time of 1, in nats: by so much a token that
            the model itself would have written becomes less likely. NaN if not measured.
        settings: What the fit chose or was given, by name.
        null: The gain `nats` beside that of controls at the same damage; None without draws or held-out pairs.
    """

    kind: str = ""
    nats: float = math.nan
    damage: float = math.nan
    settings: Mapping[str, float] = field(default_factory=dict)
    null: Null | None = None

    def numbers(self) -> dict[str, Any]:
        """Its fields, ready for JSON: what is unknown is null."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    @classmethod
    def restore(cls, numbers: Mapping[str, Any]) -> VelocityInfo:
        """The inverse of `numbers`."""
        rest = dict(numbers)
        null = rest.pop("null", None)
        known: dict[str, Any] = {name: math.nan if value is None else value for name, value in rest.items()}
        return cls(**known, null=None if null is None else Null.restore(null))


@dataclass(frozen=True, eq=False)
class VelocityField(LowRank):
    """A velocity of low rank: v(a) = Q(b + Σⱼ φ(ωⱼᵀz + βⱼ)·ηⱼ), z = Qᵀa, Q = basis.T; φ is the identity or tanh.

    It need not be a gradient: the directions ω that are read and those η that are written are free. With φ the identity it is an
    affine field A·z + b, A = Σⱼ ηⱼωⱼᵀ: affine ablation is its rank-one case in one Euler step.

    Attributes:
        basis: Orthonormal rows (k, d), float32.
        bias: b, (k,).
        directions: ω, (m, k).
        phases: β, (m,).
        outputs: η, (m, k).
        activation: φ, "identity" or "tanh".
        info: How it was fitted.
        origin: Where it belongs.

    Raises:
        TypeError, ValueError: shapes do not fit, a number is not finite, the basis is not orthonormal, an unknown activation.

    Example:
        >>> import torch, steerfast as sf
        >>> one = torch.ones(1, 1)
        >>> v = sf.VelocityField(torch.tensor([[1.0, 0.0]]), torch.zeros(1), -one, torch.zeros(1), one)
        >>> v(torch.tensor([[3.0, 4.0]]))
        tensor([[-3., 0.]])
    """

    basis: Tensor
    bias: Tensor
    directions: Tensor
    phases: Tensor
    outputs: Tensor
    activation: str = "identity"
    info: VelocityInfo = field(default_factory=VelocityInfo)
    origin: Origin = NOWHERE

    def __post_init__(self) -> None:
        one_of("VelocityField", "activation", self.activation, ACTIVATIONS)
        own_tensors(self, "VelocityField", TENSORS)
        rank = self.basis.shape[0] if self.basis.dim() == 2 else 0
        units = self.directions.shape[0] if self.directions.dim() == 2 else 0
        expected = {"bias": (rank,), "directions": (units, rank), "phases": (units,), "outputs": (units, rank)}
        found = {name: tuple(getattr(self, name).shape) for name in expected}
        if rank == 0 or units == 0 or found != expected:
            raise ValueError(
                f"VelocityField: basis {tuple(self.basis.shape)} and {found} do not fit; expected basis (k, d), bias (k,), "
                "directions and outputs (m, k), phases (m,)"
            )
        check_orthonormal("VelocityField", "basis", self.basis)

    @functools.cached_property
    def field(self) -> Field:
        """The field in the coordinates of its basis, as the solvers take it."""
        none, ones = torch.zeros_like(self.bias), torch.ones_like(self.phases)
        return Field(none, self.bias, 0.0, True, self.directions, self.phases, ones, self.activation, self.outputs)

    @in_full_precision
    def __call__(self, a: Tensor) -> Tensor:
        """v of activations (..., d), of the same shape, in float32 or, for float64 activations, in float64."""
        if a.shape[-1:] != (self.width,):
            raise ValueError(f"VelocityField: got activations of shape {tuple(a.shape)}; expected (..., {self.width})")
        a = a if a.dtype == torch.float64 else a.float()
        basis, bias, directions, phases, outputs = (getattr(self, name).to(a) for name in TENSORS)
        inside = (a @ basis.T) @ directions.T + phases
        return ((inside if self.activation == "identity" else inside.tanh()) @ outputs + bias) @ basis

    def __neg__(self) -> VelocityField:
        """The field back in time; of its fit only the settings hold."""
        back = VelocityInfo(self.info.kind, settings=self.info.settings)
        return VelocityField(
            self.basis, -self.bias, self.directions, self.phases, -self.outputs, self.activation, back, self.origin
        )

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, as `save` writes them."""
        return {name: getattr(self, name) for name in TENSORS}

    def numbers(self) -> dict[str, Any]:
        """All else, ready for JSON."""
        return {"activation": self.activation, "info": self.info.numbers(), "origin": self.origin.numbers()}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> VelocityField:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        rest = dict(numbers)
        info, origin = VelocityInfo.restore(rest.pop("info")), Origin.restore(rest.pop("origin"))
        parts: dict[str, Any] = {name: tensors[name] for name in TENSORS}
        return cls(**parts, **rest, info=info, origin=origin)

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write velocity.json and velocity.safetensors into a directory: both, or neither.

        Returns:
            The directory.
        """
        return container.write(container.VELOCITY, directory, {"velocity": self.numbers()}, self.tensors())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> VelocityField:
        """Read what `save` wrote. Nothing is executed, nothing is loaded in part.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, or of another kind or schema.
        """
        text, tensors = container.read(container.VELOCITY, directory)
        container.expect(container.VELOCITY, directory, tensors, dict.fromkeys(TENSORS))
        with container.describing(container.VELOCITY, directory):
            return cls.restore(tensors, text["velocity"])
