"""Interventions: small immutable objects that say what is done to the residual stream, validated on construction.

Each one is a slot of a bank (see `steerfast.reference`): rows B to project on, rows C to lift with, eight numbers per
direction. A new method is a new class of a few lines here, not a new kernel. Tensors are kept as float32 on the CPU;
a bank rounds them to the dtype of the stream.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from ._checks import direction_rows, finite_number, flag, one_of
from .barrier import ORTHONORMAL
from .reference import ADD, AFFINE, HINGE, PUSH, Slot

if TYPE_CHECKING:
    from .sae.steering import SelectedFeatures

ROUNDED = 1e-6
"""Deviation from orthonormal rows that rounding to float32 explains."""

OFFSET, SLOPE, BEND, KNOT, BEND2, KNOT2, JUMP, EDGE = range(8)
"""Columns of a hinge: g = offset + slope·y + bend·relu(y - knot) + bend2·relu(y - knot2) + jump·[y > edge]."""

DEPENDENT = 1e-4
"""A row whose part outside the span of the earlier rows is shorter than this share of it counts as dependent."""


class HasVector(Protocol):
    """Anything that carries a vector (d,), such as a direction from `steerfast.extract`."""

    vector: Tensor


Directions = Tensor | HasVector


Program = Callable[[Tensor, Tensor | float], Tensor]
"""(x (..., d), scale: a number or one per row, (n,)) -> x'; a row of scale 0 is returned bit for bit."""


@dataclass(frozen=True, eq=False)
class Intervention:
    """Base of all interventions: an edit of rows of the stream that fits one slot."""

    registry: ClassVar[dict[str, type[Intervention]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Intervention.registry[cls.__name__] = cls

    @property
    def width(self) -> int:
        """d, the width of the stream that it edits."""
        return self.slot().lift.shape[-1]

    @property
    def place(self) -> tuple[str, int] | None:
        """(site, layer) where it belongs, if it knows."""
        return None

    @property
    def model(self) -> str | None:
        """Class of the one model that it fits; None: any of its width."""
        return None

    def slot(self) -> Slot:
        """The intervention as float32 CPU tensors; B and C are the same object where C = B."""
        raise TypeError(f"{type(self).__name__} does not say how it edits the stream")

    def program(self, device: torch.device) -> Program | None:
        """What runs an edit that fits no slot, its tensors on that device; None: its slot says all."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def numbers(self) -> dict[str, Any]:
        """The fields that are not tensors, by name."""
        return {f.name: value for f in fields(self) if not isinstance(value := getattr(self, f.name), Tensor)}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> Intervention:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        return cls(**tensors, **numbers)

    def __repr__(self) -> str:
        shapes = [f"{name}: {'×'.join(map(str, value.shape))}" for name, value in self.tensors().items()]
        return f"{type(self).__name__}({', '.join([*shapes, *(f'{k}={v!r}' for k, v in self.numbers().items())])})"


@dataclass(frozen=True, eq=False, repr=False)
class Add(Intervention):
    """Add a steering vector: x + c·v.

    Args:
        vector: v, (d,), or an object with `.vector`.
        strength: c. With unit v its unit is the length of the residual stream.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: v is not one finite non-zero row, or c is not finite.

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
        flag("Add", "keep_norm", self.keep_norm)
        set_field(self, "vector", direction_rows("Add", "vector", self.vector, one=True)[0])
        set_field(self, "strength", finite_number("Add", "strength", self.strength))

    def slot(self) -> Slot:
        rows = as_tensor(self.vector)[None]
        return Slot(ADD, 0, self.keep_norm, rows, rows, constants_row(strength=self.strength), hinge_rows(1))


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
        flag("Ablate", "keep_norm", self.keep_norm)
        set_field(
            self, "direction", orthonormal("Ablate", "direction", direction_rows("Ablate", "direction", self.direction))
        )

    def slot(self) -> Slot:
        rows = as_tensor(self.direction)
        return Slot(HINGE, 0, self.keep_norm, rows, rows, constants_row(), hinge_rows(rows.shape[0], slope=-1.0))


@dataclass(frozen=True, eq=False, repr=False)
class Amplify(Intervention):
    """Amplify features where they are active: x + α · relu(xS)Sᵀ, S = features.T.

    Args:
        features: One feature (d,) or m of them (m, d), for instance decoder rows of an SAE.
        alpha: α. -1 erases the active part only if the features are orthogonal: 150 random directions kept 47 %.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: not finite, zero rows, or α is not finite.

    Reference:
        Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Amplify(torch.eye(2), alpha=0.5)
        Amplify(features: 2×2, alpha=0.5, keep_norm=False)
    """

    features: Directions
    alpha: float = 1.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        flag("Amplify", "keep_norm", self.keep_norm)
        set_field(self, "features", direction_rows("Amplify", "features", self.features))
        set_field(self, "alpha", finite_number("Amplify", "alpha", self.alpha))

    def slot(self) -> Slot:
        rows = as_tensor(self.features)
        return Slot(HINGE, 0, self.keep_norm, rows, rows, constants_row(), hinge_rows(rows.shape[0], bend=self.alpha))


@dataclass(frozen=True, eq=False, repr=False)
class Calibrate(Intervention):
    """Replace the active part of features by a fixed one: x - relu(xS)Sᵀ + β · mean(S), S = features.T.

    Args:
        features: One feature (d,) or m of them (m, d), for instance decoder rows of an SAE.
        beta: β, the multiple of the features' mean that is put in.
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: not finite, zero rows, or β is not finite.

    Reference:
        Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Calibrate(torch.eye(2), beta=2.0)
        Calibrate(features: 2×2, beta=2.0, keep_norm=False)
    """

    features: Directions
    beta: float = 1.0
    keep_norm: bool = False

    def __post_init__(self) -> None:
        flag("Calibrate", "keep_norm", self.keep_norm)
        set_field(self, "features", direction_rows("Calibrate", "features", self.features))
        set_field(self, "beta", finite_number("Calibrate", "beta", self.beta))

    def slot(self) -> Slot:
        rows = as_tensor(self.features)
        table = hinge_rows(rows.shape[0], offset=self.beta / rows.shape[0], bend=-1.0)
        return Slot(HINGE, 0, self.keep_norm, rows, rows, constants_row(), table)


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
        flag("AffineAblate", "keep_norm", self.keep_norm)
        unit = unit_row("AffineAblate", self.direction)
        set_field(self, "direction", unit)
        baseline = self.baseline
        if isinstance(baseline, Tensor) and baseline.dim() == 1:
            if baseline.shape != unit.shape:
                raise ValueError(
                    f"AffineAblate: baseline has shape {tuple(baseline.shape)}; expected a number or ({unit.numel()},)"
                )
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
        weight = weight if isinstance(weight, Tensor) else torch.full(width, weight)
        bias = torch.zeros(width) if self.bias is None else self.bias
        set_field(self, "weight", float_table("Affine", "weight", weight, tuple(width)))
        set_field(self, "bias", float_table("Affine", "bias", bias, tuple(width)))
        if bool((as_tensor(self.weight) == 1).all()) and not bool(as_tensor(self.bias).any()):
            raise ValueError("Affine: weight is one and bias zero everywhere, which changes nothing")

    def slot(self) -> Slot:
        rows = torch.stack([self.weight - 1, as_tensor(self.bias)])
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
        flag("LoReFT", "keep_norm", self.keep_norm)
        set_field(self, "R", direction_rows("LoReFT", "R", self.R))
        set_field(self, "W", float_table("LoReFT", "W", self.W, tuple(self.R.shape)))
        b = torch.zeros(self.R.shape[0]) if self.b is None else self.b
        set_field(self, "b", float_table("LoReFT", "b", b, (self.R.shape[0],)))
        check_orthonormal("LoReFT", "R", self.R)

    def slot(self) -> Slot:
        table = hinge_rows(self.R.shape[0], slope=1.0)
        table[:, OFFSET] = as_tensor(self.b)
        return Slot(HINGE, 0, self.keep_norm, self.W - self.R, self.R, constants_row(), table)


@dataclass(frozen=True, eq=False)
class Features:
    """Some features of an SAE, by their rows: f = h·[h > θ], h = W_enc·x + b (θ = 0: ReLU; else JumpReLU).

    Attributes:
        encoder: W_enc, (m, d); fold a subtracted decoder bias into `bias`.
        decoder: W_dec, (m, d).
        bias: b, (m,); None: zero.
        threshold: θ ≥ 0, (m,); None: ReLU.
        place: (site, layer) that they read and write, if known: `sf.Plan([...])` puts them there.
        model: Class of the model whose stream they read, if known; another one is then refused.

    Raises:
        TypeError, ValueError: shapes do not fit, a value is not finite, or a threshold is negative.
    """

    encoder: Tensor
    decoder: Tensor
    bias: Tensor | None = None
    threshold: Tensor | None = None
    place: tuple[str, int] | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        set_field(self, "encoder", direction_rows("Features", "encoder", self.encoder))
        set_field(self, "decoder", float_table("Features", "decoder", self.decoder, tuple(self.encoder.shape)))
        for name in ("bias", "threshold"):
            value = getattr(self, name)
            value = torch.zeros(self.encoder.shape[0]) if value is None else value
            set_field(self, name, float_table("Features", name, value, (self.encoder.shape[0],)))
        if (as_tensor(self.threshold) < 0).any():
            raise ValueError("Features: threshold is negative; a JumpReLU threshold is >= 0")

    def rows(self, indices: list[int]) -> Features:
        """The features with these numbers.

        Raises:
            ValueError: a number is out of range.
        """
        outside = [index for index in indices if not 0 <= index < self.encoder.shape[0]]
        if outside:
            raise ValueError(
                f"EditFeatures: feature {outside[0]} is out of range; there are {self.encoder.shape[0]}, from 0"
            )
        bias, threshold = as_tensor(self.bias)[indices], as_tensor(self.threshold)[indices]
        return Features(self.encoder[indices], self.decoder[indices], bias, threshold, self.place, self.model)


class HasFeatures(Protocol):
    """Anything that can show the rows of some of its features, such as an SAE."""

    def rows(self, indices: list[int]) -> Features | SelectedFeatures:
        """The features with these numbers."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class EditFeatures(Intervention):
    """Change a few features of an SAE and keep its reconstruction error: x + (t(f) - f)·W_dec, f = act(W_enc·x + b).

    Only the rows of the named features are read: no full encode, no decode, and what the SAE does not explain stays. Whether
    a Top-K SAE selects a feature depends on all others: its edit is exact and takes one fused encode per token (no room in a
    slot, so not in a compiled model); `sae.approximate(threshold)` is the cheap form.

    Args:
        sae: `Features`, or an SAE that has `rows`; an `SAE` also knows where it belongs, see `Plan`.
        values: Feature number to the mode's number.
        mode: "set" f to the number, "add" it, "scale" f by it, or bound f from above ("min") or from below ("max").
        keep_norm: Give every row its old length back afterwards.

    Raises:
        TypeError, ValueError: no features, an unknown mode or feature, a non-finite number, a negative bound.

    Reference:
        Bricken et al. 2023, Towards Monosemanticity; Rajamanoharan et al. 2024, JumpReLU (arXiv:2407.14435).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.EditFeatures(sf.Features(torch.eye(4), torch.eye(4)), {2: 8.0}, mode="set")
        EditFeatures(features [2], mode='set', keep_norm=False)
    """

    sae: HasFeatures
    values: Mapping[int, float]
    mode: str = "set"
    keep_norm: bool = False

    def __post_init__(self) -> None:
        flag("EditFeatures", "keep_norm", self.keep_norm)
        one_of("EditFeatures", "mode", self.mode, ("set", "add", "scale", "min", "max"))
        if not isinstance(self.values, Mapping) or not self.values:
            raise TypeError(f"EditFeatures: values must be a non-empty dict of feature -> number; got {self.values!r}")
        if not hasattr(self.sae, "rows"):
            raise TypeError(f"EditFeatures: sae must be Features or an SAE; got {type(self.sae).__name__}")
        wrong = [k for k in self.values if isinstance(k, bool) or not hasattr(k, "__index__")]
        if wrong:
            raise TypeError(f"EditFeatures: {wrong[0]!r} is no feature number; expected a whole number")
        values = {operator.index(k): finite_number("EditFeatures", f"values[{k}]", v) for k, v in self.values.items()}
        set_field(self, "values", values)
        if self.mode in ("min", "max") and min(self.values.values()) < 0:
            raise ValueError(
                f"EditFeatures: a bound of {min(self.values.values())}; a feature is never negative, so bounds are >= 0"
            )
        set_field(self, "sae", self.sae.rows(list(self.values)))

    @property
    def width(self) -> int:
        """d, the width of the stream that it edits."""
        return self._rows.decoder.shape[-1]

    @property
    def place(self) -> tuple[str, int] | None:
        """(site, layer) that the SAE reads and writes, if that is known."""
        return self._rows.place

    @property
    def model(self) -> str | None:
        """Class of the model whose stream the SAE was trained on, if that is known."""
        return self._rows.model

    @property
    def _rows(self) -> Features | SelectedFeatures:
        return self.sae  # type: ignore[return-value]  # __post_init__ has picked the rows

    def slot(self) -> Slot:
        features = self._rows
        if not isinstance(features, Features):
            raise TypeError(
                "EditFeatures: a Top-K or row-normalised SAE is edited exactly by a full encode, which fits no slot; use "
                "sae.approximate(threshold) for a slot (Top-K without normalisation)"
            )
        t = torch.tensor(list(self.values.values()))
        table = _feature_table(self.mode, t, as_tensor(features.bias), as_tensor(features.threshold))
        return Slot(HINGE, 0, self.keep_norm, features.encoder, features.decoder, constants_row(), table)

    def program(self, device: torch.device) -> Program | None:
        if isinstance(self._rows, Features):
            return None
        return self._rows.program(self.mode, list(self.values.values()), self.keep_norm, device)

    def tensors(self) -> dict[str, Tensor]:
        if not isinstance(self._rows, Features):
            return self._rows.tensors()
        return {name: getattr(self.sae, name) for name in ("encoder", "decoder", "bias", "threshold")}

    def numbers(self) -> dict[str, Any]:
        numbers = {
            "features": list(self.values),
            "values": list(self.values.values()),
            "mode": self.mode,
            "keep_norm": self.keep_norm,
            "place": self.place,
            "model": self.model,
        }
        return numbers if isinstance(self._rows, Features) else {**numbers, "selection": self._rows.numbers()}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> EditFeatures:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        rest = dict(numbers)
        names, values, selection = rest.pop("features"), rest.pop("values"), rest.pop("selection", None)
        if len(names) != len(values):
            raise ValueError(f"EditFeatures: {len(names)} features and {len(values)} values; expected as many")
        place, model = rest.pop("place", None), rest.pop("model", None)
        home = {"place": None if place is None else (place[0], place[1]), "model": model}
        if selection is None:
            features: HasFeatures = Features(**tensors, **home)  # type: ignore[arg-type]  # tensors by name
        else:
            from .sae.steering import SelectedFeatures

            features = SelectedFeatures.restore(tensors, {**selection, **home})
        made = cls(features, dict(enumerate(values)), **rest)
        set_field(made, "values", dict(zip(names, values, strict=True)))
        return made

    def __repr__(self) -> str:
        return f"EditFeatures(features {list(self.values)}, mode={self.mode!r}, keep_norm={self.keep_norm})"


@dataclass(frozen=True, eq=False, repr=False)
class DeficitPush(Intervention):
    """Push features that fall short of a target m, in proportion to what they lack, and restore the row's length.

    v = relu(m - relu(Sᵀx + b)), x + m·S·v/Σv, scaled back to ‖x‖; where no feature falls short nothing happens.

    Args:
        features: S.T, one feature (d,) or several (k, d).
        target: m > 0.
        bias: b, (k,); None: zero.

    Raises:
        TypeError, ValueError: not finite, zero rows, a bias of another shape, or m ≤ 0.

    Reference:
        The released code of Wu et al. 2025, arXiv:2502.15576; the paper's own formulas are `Amplify` and `Calibrate`.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.DeficitPush(torch.eye(2), target=3.0)
        DeficitPush(features: 2×2, bias: 2, target=3.0)
    """

    features: Directions
    target: float
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        rows = direction_rows("DeficitPush", "features", self.features)
        set_field(self, "features", rows)
        set_field(self, "target", finite_number("DeficitPush", "target", self.target))
        if self.target <= 0:
            raise ValueError(f"DeficitPush: target is {self.target}; expected > 0")
        bias = torch.zeros(rows.shape[0]) if self.bias is None else self.bias
        set_field(self, "bias", float_table("DeficitPush", "bias", bias, (rows.shape[0],)))

    def slot(self) -> Slot:
        rows, constants, table = (
            as_tensor(self.features),
            constants_row(),
            hinge_rows(as_tensor(self.features).shape[0]),
        )
        constants[3], table[:, 0] = self.target, as_tensor(self.bias)
        return Slot(PUSH, 0, True, rows, rows, constants, table)


def _feature_table(mode: str, t: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """t(f) - f as hinges in y = W_enc·x, where f = relu(y - κ) + θ·[y > κ], κ = θ - b."""
    table = torch.zeros(t.shape[0], 8)
    table[:, KNOT] = table[:, EDGE] = threshold - bias
    table[:, KNOT2] = t - bias
    above = t >= threshold
    if mode == "add":
        table[:, OFFSET] = t
    elif mode == "scale":
        table[:, BEND], table[:, JUMP] = t - 1, (t - 1) * threshold
    elif mode == "set":
        table[:, OFFSET], table[:, BEND], table[:, JUMP] = t, -1.0, -threshold
    elif mode == "min":  # a bound above θ bends at the bound; one below it cuts every active feature down to it
        table[:, BEND], table[:, BEND2] = torch.where(above, 0.0, -1.0), torch.where(above, -1.0, 0.0)
        table[:, JUMP] = torch.where(above, 0.0, t - threshold)
    else:  # "max": a bound below θ lifts only inactive features
        table[:, OFFSET] = t
        table[:, BEND], table[:, BEND2] = torch.where(above, -1.0, 0.0), torch.where(above, 1.0, 0.0)
        table[:, JUMP] = torch.where(above, -threshold, -t)
    return table


def intervention_type(owner: str, name: str) -> type[Intervention]:
    """The class of an intervention by its name: one of ours, imported where it lives, or a subclass defined elsewhere.

    Raises:
        ValueError: there is none of this name.
    """
    import steerfast

    if name not in Intervention.registry and name in steerfast.__all__:
        getattr(steerfast, name)
    if name not in Intervention.registry:
        raise ValueError(
            f"{owner}: unknown intervention {name!r}; known are {', '.join(sorted(Intervention.registry))}"
        )
    return Intervention.registry[name]


def orthonormal(owner: str, name: str, rows: Tensor) -> Tensor:
    """An orthonormal basis (m, d) of the span of m independent rows; a single row keeps its direction."""
    count, width = rows.shape
    if count > width:
        raise ValueError(f"{owner}: {name} has {count} rows of width {width}; at most {width} can be independent")
    wide = rows.double()
    if (
        wide @ wide.T - torch.eye(count)
    ).abs().max() <= ROUNDED:  # already a basis: what was saved comes back as it was
        return rows
    basis, triangle = torch.linalg.qr((wide / wide.norm(dim=1, keepdim=True)).T)
    diagonal = triangle.diagonal()
    weakest = int(diagonal.abs().argmin())
    if diagonal[weakest].abs() < DEPENDENT:
        raise ValueError(
            f"{owner}: row {weakest} of {name} lies in the span of the rows before it (only {diagonal[weakest].abs():.1e} "
            "of its length is outside); remove it"
        )
    return (basis * diagonal.sign()).T.float().contiguous()


def check_orthonormal(owner: str, name: str, rows: Tensor) -> None:
    """Refuse rows that are not orthonormal, and say by how much."""
    deviation = (rows.double() @ rows.double().T - torch.eye(rows.shape[0])).abs().max().item()
    if rows.shape[0] > rows.shape[1] or deviation > ORTHONORMAL:
        raise ValueError(
            f"{owner}: the rows of {name} are not orthonormal (their products deviate from the identity by {deviation:.1e}); "
            "orthonormalise them first, for instance with torch.linalg.qr"
        )


def float_table(owner: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A finite float32 CPU tensor of one shape."""
    try:
        table = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{owner}: {name} must be a tensor of shape {shape}; got {type(value).__name__}") from None
    if tuple(table.shape) != shape or not table.is_floating_point():
        raise ValueError(
            f"{owner}: {name} has shape {tuple(table.shape)} and dtype {table.dtype}; expected {shape}, floating"
        )
    table = table.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not table.isfinite().all():
        raise ValueError(f"{owner}: {name} holds NaN or Inf")
    return table


def unit_row(owner: str, direction: Directions, name: str = "direction") -> Tensor:
    """One direction (d,), scaled to length 1."""
    row = direction_rows(owner, name, direction, one=True)[0].double()
    return (row / row.norm()).float()


def constants_row(T: float = 0.0, angle: float = 0.0, strength: float = 1.0) -> Tensor:
    """A slot's row of constants; c₃ … c₇ are the mode's own."""
    return torch.tensor([T, angle, strength, 0.0, 0.0, 0.0, 0.0, 0.0])


def hinge_rows(rank: int, offset: float = 0.0, slope: float = 0.0, bend: float = 0.0, knot: float = 0.0) -> Tensor:
    """The same hinge for every direction: g = offset + slope·y + bend·relu(y - knot)."""
    return torch.tensor([[offset, slope, bend, knot, 0.0, 0.0, 0.0, 0.0]]).repeat(rank, 1)


def as_tensor(value: Any) -> Tensor:
    """A field that __post_init__ has made a tensor."""
    return value


def set_field(target: object, name: str, value: Any) -> None:
    """Set a field of a frozen object, from its __post_init__."""
    object.__setattr__(target, name, value)
