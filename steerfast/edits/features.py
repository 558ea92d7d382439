"""Interventions on features: by their directions, or by the features of a sparse autoencoder."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfast._checks import Directions, as_tensor, direction_rows, finite_number, flag, float_table, one_of, set_field
from steerfast.ops.slots import HINGE, PUSH, Slot
from steerfast.place import NOWHERE, Origin, Place

from .base import (
    BEND,
    BEND2,
    EDGE,
    JUMP,
    KNOT,
    KNOT2,
    OFFSET,
    Intervention,
    Program,
    constants_row,
    hinge_rows,
    live_rows,
    rows_of,
)
from .selected import SelectedFeatures


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
        super().__post_init__()
        flag("Amplify", "keep_norm", self.keep_norm)
        set_field(self, "features", live_rows("Amplify", "features", self.features))
        set_field(self, "alpha", finite_number("Amplify", "alpha", self.alpha))

    def slot(self) -> Slot:
        rows = rows_of(self.features)
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
        super().__post_init__()
        flag("Calibrate", "keep_norm", self.keep_norm)
        set_field(self, "features", live_rows("Calibrate", "features", self.features))
        set_field(self, "beta", finite_number("Calibrate", "beta", self.beta))

    def slot(self) -> Slot:
        rows = rows_of(self.features)
        table = hinge_rows(rows.shape[0], offset=self.beta / rows.shape[0], bend=-1.0)
        return Slot(HINGE, 0, self.keep_norm, rows, rows, constants_row(), table)


@dataclass(frozen=True, eq=False)
class Features:
    """Some features of an SAE, by their rows: f = h·[h > θ], h = W_enc·x + b (θ = 0: ReLU; else JumpReLU).

    Attributes:
        encoder: W_enc, (m, d); fold a subtracted decoder bias into `bias`.
        decoder: W_dec, (m, d).
        bias: b, (m,); None: zero.
        threshold: θ ≥ 0, (m,); None: ReLU.
        origin: The place that they read and write, and the model, if known: `sf.Plan([...])` puts them there.

    Raises:
        TypeError, ValueError: shapes do not fit, a value is not finite, or a threshold is negative.
    """

    encoder: Tensor
    decoder: Tensor
    bias: Tensor | None = None
    threshold: Tensor | None = None
    origin: Origin = NOWHERE

    def __post_init__(self) -> None:
        set_field(self, "encoder", direction_rows("Features", "encoder", self.encoder))
        set_field(self, "decoder", float_table("Features", "decoder", self.decoder, tuple(self.encoder.shape)))
        for name in ("bias", "threshold"):
            value = getattr(self, name)
            value = torch.zeros(self.encoder.shape[0], dtype=torch.float32, device="cpu") if value is None else value
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
        return Features(self.encoder[indices], self.decoder[indices], bias, threshold, self.origin)


class HasFeatures(Protocol):
    """Anything that can show the rows of some of its features, such as an SAE."""

    def rows(self, indices: list[int]) -> Features | SelectedFeatures:
        """The features with these numbers."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class EditFeatures(Intervention):
    """Change a few features of an SAE and keep its reconstruction error: x + (t(f) - f)·W_dec, f = act(W_enc·x + b).

    Only the rows of the named features are read: no full encode, no decode, and what the SAE does not explain stays. Whether
    a Top-K SAE selects a feature depends on all others: its edit is exact and reads all of the encoder (no room in a slot, so
    not in a compiled model); `sae.approximate(threshold)` is the cheap form.

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
        super().__post_init__()
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
        return self.decoder.shape[-1]

    @property
    def decoder(self) -> Tensor:
        """W_dec of the features that it edits, (m, d)."""
        return self._rows.decoder

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
        t = torch.tensor(list(self.values.values()), dtype=torch.float32, device="cpu")
        table = _feature_table(self.mode, t, as_tensor(features.bias), as_tensor(features.threshold))
        return Slot(HINGE, 0, self.keep_norm, features.encoder, features.decoder, constants_row(), table)

    def program(self, device: torch.device) -> Program | None:
        if isinstance(self._rows, Features):
            return None
        return self._rows.program(self.mode, list(self.values.values()), self.keep_norm, device)

    def tensors(self) -> dict[str, Tensor]:
        """The rows of the features; none where `numbers` names the SAE."""
        if isinstance(self._rows, Features):
            return {name: getattr(self.sae, name) for name in ("encoder", "decoder", "bias", "threshold")}
        return self._rows.tensors() if self._rows.sae is None else {}

    def numbers(self) -> dict[str, Any]:
        """All else; of a Top-K SAE its name, `{"fingerprint": …, "about": …}`, for which `restore` takes the SAE."""
        numbers = {
            "features": list(self.values),
            "values": list(self.values.values()),
            "mode": self.mode,
            "keep_norm": self.keep_norm,
        }
        if isinstance(self._rows, Features):
            return numbers
        sae = self._rows.sae
        if sae is None:
            return {**numbers, "selection": self._rows.numbers()}
        numbers["features"] = self._rows.features.tolist()  # as the SAE counts them
        return {**numbers, "sae": {"fingerprint": sae.fingerprint, "about": repr(sae)}}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> EditFeatures:
        """The inverse of `tensors` and `numbers`, with the SAE in place of its name; everything is validated anew."""
        rest = dict(numbers)
        names, values, selection = rest.pop("features"), rest.pop("values"), rest.pop("selection", None)
        if len(names) != len(values):
            raise ValueError(f"EditFeatures: {len(names)} features and {len(values)} values; expected as many")
        place, model = rest.pop("place", None), rest.pop("model", None)  # in a plan of schema 1
        origin = Origin(model, None if place is None else Place(*place))
        features: HasFeatures
        if (sae := rest.pop("sae", None)) is not None:
            if not hasattr(sae, "rows"):
                raise TypeError(
                    f"EditFeatures: sae is {sae!r}; expected the SAE itself, which Plan.load finds by its name"
                )
            features = sae.rows(names)
        elif selection is None:
            features = Features(**tensors, origin=origin)
        else:
            features = SelectedFeatures.restore(tensors, {**selection, "origin": origin})
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
        super().__post_init__()
        rows = direction_rows("DeficitPush", "features", self.features)
        set_field(self, "features", rows)
        set_field(self, "target", finite_number("DeficitPush", "target", self.target))
        if self.target <= 0:
            raise ValueError(f"DeficitPush: target is {self.target}; expected > 0")
        bias = torch.zeros(rows.shape[0], dtype=torch.float32, device="cpu") if self.bias is None else self.bias
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
    table = torch.zeros(t.shape[0], 8, dtype=torch.float32, device="cpu")
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
