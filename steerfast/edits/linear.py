"""Interventions: small immutable objects that say what is done to the residual stream, validated on construction.

Each one is a slot of a bank (see `steerfast.ops.slots`): rows B to project on, rows C to lift with, eight numbers per
direction. A new method is a new class of a few lines here, not a new kernel. Tensors are kept as float32 on the CPU;
a bank rounds them to the dtype of the stream.
"""

from __future__ import annotations

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
    no_gradient,
    orthonormal,
    set_field,
    tensor_of,
)
from steerfast.ops.slots import ADD, AFFINE, HINGE, Slot

from .base import (
    BEND,
    BEND2,
    KNOT,
    KNOT2,
    OFFSET,
    SLOPE,
    Intervention,
    beside,
    constants_row,
    hinge_rows,
    live_rows,
    live_table,
    rows_of,
    unit_row,
)


@dataclass(frozen=True, eq=False, repr=False)
class Add(Intervention):
    """Add a steering vector: x + c·v; or, with one row per prompt token, x_i + c·V_i for the prompt's token i alone.

    Args:
        vector: v, (d,), or an object with `.vector`; it is added at the plan's positions. One that requires a gradient
            is trained: see docs/hooks.md. Or V, (T, d), as from `steerfast.extract.prompt_difference`: row i is added to
            the prompt's i-th real token, i = 0 … T - 1, counted without padding, and to nothing behind; a row of zeros
            leaves its token bit for bit as it is, and a prompt shorter than T takes the rows that it has tokens for.
            The plan's positions are then "all", and no condition stands around it.
        strength: c. With unit v its unit is the length of the residual stream.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: v is not one finite non-zero row, V not finite rows of which one at least is not zero, or c
            is not finite.

    Reference:
        Turner et al. 2023, Activation Addition (arXiv:2308.10248); Rimsky et al. 2024, CAA (arXiv:2312.06681).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Add(torch.tensor([1.0, 0.0]), strength=4.0)
        Add(vector: 2, strength=4.0, keep_norm=False)
    """

    vector: Directions
    strength: float = 1.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("Add", "keep_norm", self.keep_norm)
        set_field(self, "vector", _one_or_by_token(self.vector))
        set_field(self, "strength", finite_number("Add", "strength", self.strength))

    @property
    def width(self) -> int:
        """d, the width of the stream that it edits."""
        return as_tensor(self.vector).shape[-1]

    @property
    def by_token(self) -> tuple[Add | None, ...]:
        """An addition of one vector (d,) for each row of V, None for a row of zeros that stays so; () if the vector is (d,)."""
        rows = as_tensor(self.vector)
        if rows.dim() == 1:
            return ()
        acts = [rows.requires_grad or bool(row.any()) for row in rows.detach()]
        with torch.enable_grad():  # a plan is attached without; a gradient must reach V through its rows
            return tuple(Add(rows[i], self.strength, self.keep_norm) if acts[i] else None for i in range(len(rows)))

    def slot(self) -> Slot:
        if as_tensor(self.vector).dim() == 2:
            raise ValueError(
                f"{self!r} adds a row of its own to each prompt token, which is no single slot; steer with it, or register the "
                "additions of its by_token one by one"
            )
        rows = rows_of(self.vector)
        return Slot(ADD, 0, self.keep_norm, rows, rows, constants_row(strength=self.strength), hinge_rows(1))


def _one_or_by_token(value: Directions) -> Tensor:
    """A vector (d,), or rows (T, d), as they are kept; a vector that requires a gradient stays the one that was given."""
    given = getattr(value, "vector", value)
    if isinstance(given, Tensor) and given.requires_grad:
        return live_rows("Add", "vector", given, one=given.dim() != 2, zero=True, gaps=True)
    rows = direction_rows("Add", "vector", given, gaps=True)
    return rows if tensor_of(given).dim() == 2 else rows[0]


@dataclass(frozen=True, eq=False, repr=False)
class Ablate(Intervention):
    """Remove a direction, or the span of several: x - VVᵀx with V an orthonormal basis of the rows.

    Args:
        direction: One direction (d,) or m independent ones (m, d), of any length.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: not finite, zero, more rows than d, or rows that depend on each other.

    Reference:
        Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Ablate(torch.tensor([3.0, 0.0]))
        Ablate(direction: 1×2, keep_norm=False)
    """

    direction: Directions
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("Ablate", "keep_norm", self.keep_norm)
        rows = live_rows("Ablate", "direction", self.direction)
        basis = orthonormal("Ablate", "direction", rows_of(rows.detach()).to("cpu", torch.float32))
        set_field(self, "direction", rows if rows.requires_grad else basis)

    @property
    def everywhere(self) -> bool:
        """Yes: one direction is removed at every layer."""
        return True

    def slot(self) -> Slot:
        rows = rows_of(self.direction)
        if rows.requires_grad:  # an optimizer may have moved them
            rows = torch.linalg.qr(rows.to(torch.promote_types(rows.dtype, torch.float32)).T)[0].T
        return Slot(HINGE, 0, self.keep_norm, rows, rows, constants_row(), hinge_rows(rows.shape[0], slope=-1.0))


@dataclass(frozen=True, eq=False, repr=False)
class AffineAblate(Intervention):
    """Set the projection on a direction to a baseline plus c: x + (y₀ - v̂ᵀx + c)·v̂ (affine concept editing).

    Args:
        direction: v, (d,), of any length; v̂ = v/‖v‖.
        baseline: y₀ in units of the stream, or a point (d,), such as the mean of the negative side: then y₀ = v̂ᵀpoint.
        offset: c, added to the baseline.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: v is not one finite non-zero row, or a number is not finite.

    Reference:
        Marshall et al. 2024, Refusal in LLMs is an Affine Function (arXiv:2411.09003).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.AffineAblate(torch.tensor([2.0, 0.0]), baseline=1.5)
        AffineAblate(direction: 2, baseline=1.5, offset=0.0, keep_norm=False)
    """

    direction: Directions
    baseline: float | Tensor = 0.0
    offset: float = 0.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("AffineAblate", "keep_norm", self.keep_norm)
        unit = unit_row("AffineAblate", self.direction)
        set_field(self, "direction", unit)
        baseline = self.baseline
        if isinstance(baseline, Tensor) and baseline.dim() == 1:
            if baseline.shape != unit.shape:
                raise ValueError(
                    f"AffineAblate: baseline has shape {tuple(baseline.shape)}; expected a number or ({unit.numel()},)"
                )
            no_gradient("AffineAblate", "baseline", baseline)
            baseline = float(unit.double() @ baseline.detach().cpu().double())
        set_field(self, "baseline", finite_number("AffineAblate", "baseline", baseline))
        set_field(self, "offset", finite_number("AffineAblate", "offset", self.offset))

    def slot(self) -> Slot:
        rows = as_tensor(self.direction)[None]
        table = hinge_rows(1, offset=float(self.baseline) + self.offset, slope=-1.0)
        return Slot(HINGE, 0, self.keep_norm, rows, rows, constants_row(), table)


@dataclass(frozen=True, eq=False, repr=False)
class Clamp(Intervention):
    """Keep the projection on a direction within bounds: x + (clip(v̂ᵀx, low, high) - v̂ᵀx)·v̂.

    Args:
        direction: v, (d,), of any length; v̂ = v/‖v‖.
        low: Lower bound in units of the stream; None: none.
        high: Upper bound; None: none.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: v is not one finite non-zero row, neither bound is given, or low > high.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Clamp(torch.tensor([1.0, 0.0]), low=-1.0, high=2.0)
        Clamp(direction: 2, low=-1.0, high=2.0, keep_norm=False)
    """

    direction: Directions
    low: float | None = None
    high: float | None = None
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("Clamp", "keep_norm", self.keep_norm)
        set_field(self, "direction", unit_row("Clamp", self.direction))
        for name in ("low", "high"):
            if getattr(self, name) is not None:
                set_field(self, name, finite_number("Clamp", name, getattr(self, name)))
        if self.low is None and self.high is None:
            raise ValueError("Clamp: give low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"Clamp: low is {self.low} and high {self.high}; expected low <= high")

    def slot(self) -> Slot:
        rows, table = as_tensor(self.direction)[None], hinge_rows(1)
        if self.low is not None:  # max(y, low) - y = low - y + relu(y - low)
            table[0, OFFSET], table[0, SLOPE], table[0, BEND], table[0, KNOT] = self.low, -1.0, 1.0, self.low
        if self.high is not None:
            table[0, BEND2], table[0, KNOT2] = -1.0, self.high
        return Slot(HINGE, 0, self.keep_norm, rows, rows, constants_row(), table)


@dataclass(frozen=True, eq=False, repr=False)
class Affine(Intervention):
    """An elementwise affine map: w ⊙ x + b. A strength given to `steer` multiplies what it changes.

    Args:
        weight: w, (d,), or a number for all of them.
        bias: b, (d,); None: zero.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: shapes do not fit, a value is not finite, or the map is the identity.

    Reference:
        Rodriguez et al. 2025, Linear-AcT (arXiv:2410.23054); LinEAS (arXiv:2503.10679); SADI (arXiv:2410.12299).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Affine(torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0]))
        Affine(weight: 2, bias: 2, keep_norm=False)
    """

    weight: Tensor
    bias: Tensor | None = None
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("Affine", "keep_norm", self.keep_norm)
        if not isinstance(self.bias, (Tensor, type(None))):
            raise TypeError(f"Affine: bias must be a tensor (d,) or None; got {self.bias!r}")
        shaped = self.weight if isinstance(self.weight, Tensor) else self.bias
        weight = self.weight if isinstance(self.weight, Tensor) else finite_number("Affine", "weight", self.weight)
        if shaped is None:
            raise TypeError(
                "Affine: weight is a number and there is no bias to tell the width; give weight as a tensor (d,)"
            )
        width = shaped.shape
        if len(width) != 1:
            raise ValueError(f"Affine: weight has shape {tuple(width)}; expected (d,)")
        weight = weight if isinstance(weight, Tensor) else torch.full(width, weight, dtype=torch.float32, device="cpu")
        bias = torch.zeros(width, dtype=torch.float32, device="cpu") if self.bias is None else self.bias
        set_field(self, "weight", live_table("Affine", "weight", weight, tuple(width)))
        set_field(self, "bias", live_table("Affine", "bias", bias, tuple(width)))
        if not self.trained and bool((as_tensor(self.weight) == 1).all()) and not bool(as_tensor(self.bias).any()):
            raise ValueError("Affine: weight is one and bias zero everywhere, which changes nothing")

    def slot(self) -> Slot:
        weight, bias = as_tensor(self.weight), as_tensor(self.bias)
        if self.trained:
            weight, bias = beside(weight if weight.requires_grad else bias, weight, bias)
        rows = torch.stack([weight - 1, bias])
        return Slot(AFFINE, 0, self.keep_norm, rows, rows, constants_row(), hinge_rows(2))


@dataclass(frozen=True, eq=False, repr=False)
class LoReFT(Intervention):
    """Low-rank linear-subspace fine-tuning: x + Rᵀ(Wx + b - Rx).

    Args:
        R: Orthonormal rows (r, d).
        W: (r, d).
        b: (r,); None: zero.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: shapes do not fit, a value is not finite, or R is not orthonormal (the deviation is stated).

    Reference:
        Wu et al. 2024, ReFT: Representation Finetuning for Language Models (arXiv:2404.03592).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.LoReFT(torch.eye(4)[:2], torch.ones(2, 4))
        LoReFT(R: 2×4, W: 2×4, b: 2, keep_norm=False)
    """

    R: Tensor
    W: Tensor
    b: Tensor | None = None
    keep_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("LoReFT", "keep_norm", self.keep_norm)
        set_field(self, "R", direction_rows("LoReFT", "R", self.R))
        set_field(self, "W", live_table("LoReFT", "W", self.W, tuple(self.R.shape)))
        b = torch.zeros(self.R.shape[0], dtype=torch.float32, device="cpu") if self.b is None else self.b
        set_field(self, "b", live_table("LoReFT", "b", b, (self.R.shape[0],)))
        check_orthonormal("LoReFT", "R", self.R)

    def slot(self) -> Slot:
        table = hinge_rows(self.R.shape[0], slope=1.0)
        table[:, OFFSET] = as_tensor(self.b)
        (R,) = beside(self.W, self.R)
        return Slot(HINGE, 0, self.keep_norm, self.W - R, R, constants_row(), table)
