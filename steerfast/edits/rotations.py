"""Rotations: interventions that turn a row of the stream and keep its length."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from steerfast._checks import (
    Directions,
    as_tensor,
    check_orthonormal,
    direction_rows,
    finite_number,
    flag,
    float_table,
    set_field,
)
from steerfast.ops.slots import REFLECT, ROTATE, SLERP, Slot

from .base import Intervention, constants_row, hinge_rows, unit_row


@dataclass(frozen=True, eq=False, repr=False)
class Rotate(Intervention):
    """Set the angle of the stream within a plane: g = ‖y‖(cos t, sin t) - y, y = (b₁ᵀx, b₂ᵀx); the length in the plane stays.

    Args:
        plane: b₁ and b₂, orthonormal rows (2, d); b₁ is the direction of angle 0.
        degrees: t. A strength given to `steer` multiplies it.
        adaptive: Turn only rows whose y₁ is positive.

    Raises:
        TypeError, ValueError: not two finite orthonormal rows (the deviation is stated), or t is not finite.

    Reference:
        Vu & Nguyen 2025, Angular Steering (arXiv:2510.26243): the fixed angle, and the adaptive mask on the first axis.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Rotate(torch.eye(3)[:2], degrees=90.0)
        Rotate(plane: 2×3, degrees=90.0, adaptive=False)
    """

    plane: Tensor
    degrees: float = 0.0
    adaptive: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        set_field(self, "plane", direction_rows("Rotate", "plane", self.plane))
        if self.plane.shape[0] != 2:
            raise ValueError(f"Rotate: plane has {self.plane.shape[0]} rows; a plane is two orthonormal rows (2, d)")
        check_orthonormal("Rotate", "plane", self.plane)
        set_field(self, "degrees", finite_number("Rotate", "degrees", self.degrees))
        flag("Rotate", "adaptive", self.adaptive)

    def slot(self) -> Slot:
        constants = constants_row()
        constants[3], constants[4] = math.radians(self.degrees), float(self.adaptive)
        return Slot(ROTATE, 0, False, self.plane, self.plane, constants, hinge_rows(2))


@dataclass(frozen=True, eq=False, repr=False)
class Spherical(Intervention):
    """Turn rows that lean to the wrong side towards a target along the geodesic, their length kept.

    With unit prototypes μ_T (target) and μ_H (avoided), p_H - p_T = tanh(κ(cos_H - cos_T)/2) says how far a row leans
    to μ_H. Where it exceeds β the row is turned by the share t = α(p_H - p_T - β)/(1 - β) of its angle to μ_T.
    `Flow` with a linear barrier and method "geodesic" turns every row by one angle instead.

    Args:
        target: μ_T, (d,), of any length.
        avoid: μ_H, (d,); None: -μ_T, the antipodal prototype of the paper.
        alpha: α, the largest share of the angle, up to 1. A strength given to `steer` multiplies it.
        beta: β, the lead of μ_H below which a row stays as it is, -1 ≤ β < 1.
        kappa: κ > 0, how sharply the cosines decide.

    Raises:
        TypeError, ValueError: not finite rows of one width, equal prototypes, or a number out of range.

    Reference:
        You et al. 2026, Spherical Steering (arXiv:2602.08169): slerp with the von Mises-Fisher gate.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Spherical(torch.tensor([1.0, 0.0]), alpha=0.5)
        Spherical(target: 2, avoid: 2, alpha=0.5, beta=0.0, kappa=20.0)
    """

    target: Directions
    avoid: Directions | None = None
    alpha: float = 1.0
    beta: float = 0.0
    kappa: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        target = unit_row("Spherical", self.target, "target")
        avoid = -target if self.avoid is None else unit_row("Spherical", self.avoid, "avoid")
        if avoid.shape != target.shape:
            raise ValueError(
                f"Spherical: avoid has width {avoid.numel()} and target {target.numel()}; expected one width"
            )
        if torch.equal(avoid, target):
            raise ValueError("Spherical: target and avoid point the same way, so no row leans to either")
        set_field(self, "target", target)
        set_field(self, "avoid", avoid)
        for name in ("alpha", "beta", "kappa"):
            set_field(self, name, finite_number("Spherical", name, getattr(self, name)))
        if not -1 <= self.beta < 1:
            raise ValueError(
                f"Spherical: beta is {self.beta}; expected -1 <= beta < 1, a difference of two probabilities"
            )
        if self.kappa <= 0 or self.alpha > 1:
            raise ValueError(
                f"Spherical: kappa is {self.kappa} and alpha {self.alpha}; expected kappa > 0 and alpha <= 1"
            )

    def slot(self) -> Slot:
        rows, constants = torch.stack([as_tensor(self.target), as_tensor(self.avoid)]), constants_row()
        constants[3:6] = torch.tensor([self.alpha, self.beta, self.kappa], dtype=torch.float32, device="cpu")
        return Slot(SLERP, 0, False, rows, rows, constants, hinge_rows(2))


@dataclass(frozen=True, eq=False, repr=False)
class Householder(Intervention):
    """Turn rows on the negative side of a hyperplane towards their mirror image, by an angle that a small net predicts.

    x' = sin(φ - γ)/sin φ · x + sin γ/sin φ · (x - 2(v̂ᵀx)v̂), γ = π·σ(w₂ᵀrelu(W₁x + b₁) + b₂), φ the angle between x and its
    image: γ = φ is the reflection. Rows with v̂ᵀx + offset ≥ 0 stay. The length is kept.

    Args:
        normal: v, (d,), of any length: the weight of a linear probe; v̂ = v/‖v‖.
        W1: First layer of the angle net, (h, d).
        b1: Its bias, (h,).
        w2: Second layer, (h,).
        b2: Its bias.
        offset: The probe's bias, in units of v̂ᵀx (bias/‖v‖).

    Raises:
        TypeError, ValueError: shapes do not fit or a value is not finite.

    Reference:
        Pham & Nguyen 2024, Householder Pseudo-Rotation (arXiv:2409.10053): one hidden layer with ReLU predicts the angle.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Householder(torch.tensor([1.0, 0.0]), torch.eye(2), torch.zeros(2), torch.ones(2))
        Householder(normal: 2, W1: 2×2, b1: 2, w2: 2, b2=0.0, offset=0.0)
    """

    normal: Directions
    W1: Tensor
    b1: Tensor
    w2: Tensor
    b2: float = 0.0
    offset: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        normal = unit_row("Householder", self.normal, "normal")
        layer = direction_rows("Householder", "W1", self.W1)
        if layer.shape[1] != normal.numel():
            raise ValueError(
                f"Householder: W1 has width {layer.shape[1]} and normal {normal.numel()}; expected one width"
            )
        set_field(self, "normal", normal)
        set_field(self, "W1", layer)
        for name in ("b1", "w2"):
            set_field(self, name, float_table("Householder", name, getattr(self, name), (layer.shape[0],)))
        for name in ("b2", "offset"):
            set_field(self, name, finite_number("Householder", name, getattr(self, name)))

    def slot(self) -> Slot:
        rows, constants = torch.cat([as_tensor(self.normal)[None], self.W1]), constants_row()
        constants[3:5] = torch.tensor([self.b2, self.offset], dtype=torch.float32, device="cpu")
        table = hinge_rows(rows.shape[0])
        table[1:, 0], table[1:, 1] = self.b1, self.w2
        return Slot(REFLECT, 0, False, rows, rows, constants, table)
