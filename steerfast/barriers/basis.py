"""What a flow follows sees an activation through the rows of one basis."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


class LowRank:
    """What has a `basis` of orthonormal rows (k, d), float32 on the CPU."""

    basis: Tensor

    @property
    def rank(self) -> int:
        """k, the numbers that it sees of an activation."""
        return self.basis.shape[0]

    @property
    def width(self) -> int:
        """d, the width of the stream."""
        return self.basis.shape[1]

    def basis_as(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The basis on a device in a dtype, copied once and kept: a captured CUDA graph may ask for it, too."""
        if torch.compiler.is_compiling():
            return self.basis.to(device, dtype)
        found = self._copies.get((device, dtype))
        if found is None:
            with torch.inference_mode(False):  # so that a later gradient can use it
                found = self._copies[device, dtype] = self.basis.to(device, dtype)
        return found

    @functools.cached_property
    def _copies(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}
