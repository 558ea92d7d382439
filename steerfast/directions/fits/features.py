"""Estimators of edits of an SAE's features: which features the sides differ in, and how active the positive side has them.

A feature is a candidate if it is active in more than a share τ of the positive rows. Of the candidates those are taken whose
mean activation is higher by most on the positive side. The contrast of mean activations and the share τ are those of sparse
activation steering (Bayat et al. 2025, arXiv:2503.00177).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import finite_number, one_of, positive_integer
from steerfast.edits.features import Amplify, Calibrate, DeficitPush, EditFeatures
from steerfast.place import common_origin
from steerfast.sae.model import SAE
from steerfast.sae.transcoder import Transcoder

from .sides import Sides

MODES = ("set", "add", "max")
_ROWS = 256  # that are encoded at once


@dataclass(frozen=True)
class Contrast:
    """The features that the sides differ in most, largest difference first.

    Attributes:
        indices: Their numbers, int64 (m,).
        positive, negative: Their mean activation on each side, float64 (m,).
        rows: Their decoder rows, float32 (m, d), on the CPU.
        bias: −rows·b_dec, (m,): with it a decoder row reads what the SAE's reconstruction of zero leaves.
    """

    indices: Tensor
    positive: Tensor
    negative: Tensor
    rows: Tensor
    bias: Tensor

    def read(self, x: Tensor) -> Tensor:
        """relu(Sᵀx + b) of rows x (n, d), float64 (n, m)."""
        return torch.relu(x.double() @ self.rows.double().T + self.bias.double())


def contrast(sides: Sides, sae: Any, count: int = 8, tau: float = 0.5) -> Contrast:
    """Choose features by the contrast of the two sides.

    Args:
        sides: Both sides, read where the SAE belongs.
        sae: The `SAE`.
        count: How many features, at most.
        tau: τ, 0 to 1: a feature is active in more than this share of the positive rows.

    Raises:
        TypeError, ValueError: no `SAE`, or a `Transcoder`; another width or place, more features than the SAE has, τ out of
            range, or no feature that is active often enough and more active on the positive side.
    """
    if not isinstance(sae, SAE):
        raise TypeError(f"{sides.owner}: sae must be an SAE, such as sf.SAE.load gives; got {type(sae).__name__}")
    if isinstance(sae, Transcoder):
        raise ValueError(
            f"{sides.owner}: sae is a transcoder, which reads one place and writes another, so the stream that would be edited "
            "does not show its features; give an SAE, or add its directions where it writes, sf.Add(transcoder.w_dec[i], …)"
        )
    if sae.d != sides.data.x.shape[1]:
        raise ValueError(f"{sides.owner}: the SAE has width {sae.d} and the rows {sides.data.x.shape[1]}")
    common_origin(f"{sides.owner}: the sides and the SAE", [sides.data.origin, sae.origin])
    count = positive_integer(sides.owner, "count", count)
    if count > sae.features:
        raise ValueError(f"{sides.owner}: count is {count} and the SAE has {sae.features} features")
    tau = finite_number(sides.owner, "tau", tau)
    if not 0 <= tau < 1:
        raise ValueError(f"{sides.owner}: tau is {tau}; expected a share of the rows, 0 <= tau < 1")
    means, often = _activity(sae, sides.positive)
    other, _ = _activity(sae, sides.negative)
    gain = torch.where(often > tau, means - other, 0.0)
    best = gain.topk(count)
    indices = best.indices[best.values > 0]
    if not len(indices):
        raise ValueError(
            f"{sides.owner}: no feature is active in more than {tau:g} of the positive rows and more so than on the negative "
            "side; lower tau, or check that the rows are of the SAE's place"
        )
    rows = sae.w_dec.detach()[indices.to(sae.w_dec.device)].float().cpu()
    centre = torch.zeros(sae.d, device="cpu") if sae.b_dec is None else sae.b_dec.detach().float().cpu()
    return Contrast(indices, means[indices], other[indices], rows, -(rows @ centre))


def _activity(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean activation of each feature on rows x, and the share of the rows that it is active in: float64 (F,)."""
    total = often = torch.zeros(sae.features, dtype=torch.float64, device="cpu")
    for part in x.float().split(_ROWS):
        with torch.no_grad():
            found = sae.encode(part.to(sae.w_enc.device)).double().cpu()
        total, often = total + found.sum(0), often + (found > 0).sum(0)
    return total / len(x), often / len(x)


def edit_features(sides: Sides, sae: Any, count: int = 8, tau: float = 0.5, mode: str = "set") -> EditFeatures:
    """Give the features that the sides differ in the mean activation of the positive side.

    Args:
        sides: Both sides.
        sae: The `SAE`.
        count: As of `contrast`.
        tau: As of `contrast`.
        mode: "set" or at least ("max") the positive mean; or "add" the difference of the means.

    Reference:
        Bayat et al. 2025, Steering Large Language Model Activations in Sparse Spaces (arXiv:2503.00177).
    """
    one_of(sides.owner, "mode", mode, MODES)
    found = contrast(sides, sae, count, tau)
    values = found.positive - found.negative if mode == "add" else found.positive
    return EditFeatures(sae, dict(zip(found.indices.tolist(), values.tolist(), strict=True)), mode)


def amplify(sides: Sides, sae: Any, count: int = 8, tau: float = 0.5, alpha: float = 1.0) -> Amplify:
    """Amplify the decoder rows of the features that the sides differ in.

    Args:
        sides: Both sides.
        sae: The `SAE`.
        count: As of `contrast`.
        tau: As of `contrast`.
        alpha: α.

    Reference:
        Wu et al. 2025 (arXiv:2502.15576); the features by contrast, as above, not by their explanations.
    """
    return Amplify(contrast(sides, sae, count, tau).rows, alpha)


def calibrate(sides: Sides, sae: Any, count: int = 8, tau: float = 0.5) -> Calibrate:
    """Give the decoder rows the mean total activity that they have on the positive side: β = mean Σⱼ relu(Sⱼᵀx).

    Args:
        sides: Both sides.
        sae: The `SAE`.
        count: As of `contrast`.
        tau: As of `contrast`.

    Reference:
        Wu et al. 2025 (arXiv:2502.15576); the features by contrast, as above, not by their explanations.
    """
    found = contrast(sides, sae, count, tau)
    beta = float(torch.relu(sides.positive @ found.rows.double().T).sum(1).mean())
    return Calibrate(found.rows, beta)


def deficit_push(sides: Sides, sae: Any, count: int = 8, tau: float = 0.5) -> DeficitPush:
    """Push decoder rows that fall short of m, their mean reading relu(Sᵀx + b) on the positive side, b = −Sᵀb_dec.

    Args:
        sides: Both sides.
        sae: The `SAE`.
        count: As of `contrast`.
        tau: As of `contrast`.

    Raises:
        ValueError: the SAE normalises each row, so that b, which is of rows at that length, has another value for each row of
            the stream; the decoder rows read nothing on the positive side; and what `contrast` refuses.

    Reference:
        The released code of Wu et al. 2025 (arXiv:2502.15576); the features by contrast, as above.
    """
    found = contrast(sides, sae, count, tau)
    if sae.normalisation != "none":
        raise ValueError(
            f"{sides.owner}: the SAE normalises each row ({sae.normalisation}), and its b_dec is in units of such rows, which no "
            'one bias is for rows of the stream; fit "edit_features" or "amplify"'
        )
    return DeficitPush(found.rows, float(found.read(sides.positive).mean()), found.bias)
