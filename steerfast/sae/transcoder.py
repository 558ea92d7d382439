"""A transcoder: features of what is read at one place, written at another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from steerfast.ops.backends import in_full_precision
from steerfast.place import NOWHERE, Origin

from .model import SAE


@dataclass(frozen=True, eq=False, repr=False)
class Transcoder(SAE):
    """An SAE that reads one place and predicts another: f = select(W_enc·x + b_enc), y ≈ W_decᵀf + W_skip·x + b_dec.

    x is a row of the place that is read, often an MLP's input, which is no site of ours; y one of the place that is written,
    such as mlp_out. `encode`, `topk` and `decode` are those of an SAE. Its directions steer where it writes, and leave what it
    does not explain, y - W_decᵀf - W_skip·x - b_dec, as it is:

        plan = sf.Plan({transcoder.place: sf.Add(transcoder.w_dec[123], 4.0)})

    `EditFeatures` and `evaluate_sae` refuse one: the stream at the place that they would edit does not show the features.

    Args:
        w_enc: Encoder rows, (F, d), d the width of what is read.
        w_dec: Decoder rows, (F, d_out), d_out the width of what is written.
        b_enc: (F,); None: zero.
        b_dec: (d_out,); None: zero.
        k: As of an SAE.
        threshold: As of an SAE.
        normalisation: "none"; no other is known of transcoders.
        origin: Where it writes, as far as that is known and is a site of ours.
        source: What the file says, both places among it.
        w_skip: The skip connection, (d_out, d); None: there is none.
        reads: Where it reads, likewise.

    Raises:
        TypeError, ValueError: as of an SAE.

    Reference:
        Dunefsky et al. 2024 (arXiv:2406.11944); with a skip connection Paulo et al. 2025 (arXiv:2501.18823).

    Example:
        >>> import torch, steerfast as sf
        >>> both = sf.sae.Transcoder(torch.eye(2), torch.eye(2), w_skip=-torch.eye(2))
        >>> both(torch.tensor([[3.0, -1.0]]))
        tensor([[0., 1.]])
    """

    w_skip: Tensor | None = None
    reads: Origin = NOWHERE

    @property
    def d_out(self) -> int:
        """Width of what it writes."""
        return self.w_dec.shape[1]

    def decode_topk(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """What a few features predict, (..., k) -> (..., d_out); x, the rows that were read, where there is a skip connection.

        Raises:
            ValueError: there is one, and x is not given.
        """
        return self._skip("SAE.decode_topk", super().decode_topk(values, indices), x)

    def decode(self, features: Tensor, x: Tensor | None = None) -> Tensor:
        """What all features predict, (..., F) -> (..., d_out); x as in `decode_topk`."""
        return self._skip("SAE.decode", super().decode(features), x)

    def rows(self, indices: Iterable[int] | Tensor | slice) -> NoReturn:
        """Refused: a feature is read at another place than the one that would be edited.

        Raises:
            ValueError: always; what to do instead.
        """
        where = f"reads {self.source.hook_name or 'one place'} and writes {self.place or 'another'}"
        raise ValueError(
            f"EditFeatures: a transcoder {where}, so the stream that would be edited does not show its features; add its "
            "directions there, sf.Add(transcoder.w_dec[i], …), or sf.DeficitPush"
        )

    def __repr__(self) -> str:
        inner = super().__repr__().removeprefix("SAE(").replace(f"d={self.d},", f"d={self.d}->{self.d_out},")
        return f"Transcoder({'' if self.w_skip is None else 'skip, '}{inner}"

    def _check_shapes(self) -> None:
        if self.w_dec.shape[0] != self.w_enc.shape[0]:
            raise ValueError(
                f"Transcoder: w_dec has shape {tuple(self.w_dec.shape)} and w_enc {tuple(self.w_enc.shape)}; expected (F, d_out) "
                "and (F, d)"
            )
        if self.normalisation != "none":
            raise ValueError(f"Transcoder: normalisation is {self.normalisation!r}; expected 'none'")
        expected = (self.d_out, self.d)
        if self.w_skip is not None and tuple(self.w_skip.shape) != expected:
            raise ValueError(f"Transcoder: w_skip has shape {tuple(self.w_skip.shape)}; expected {expected}")

    def _skip(self, owner: str, out: Tensor, x: Tensor | None) -> Tensor:
        if self.w_skip is None:
            return out
        if x is None:
            raise ValueError(f"{owner}: this transcoder has a skip connection; pass the rows that it read as x=")
        wide = torch.promote_types(torch.promote_types(x.dtype, self.w_skip.dtype), torch.float32)
        return (out.to(wide) + _passed(x.to(wide), self.w_skip.to(wide))).to(out.dtype)


@in_full_precision
def _passed(x: Tensor, w_skip: Tensor) -> Tensor:
    return x @ w_skip.T
