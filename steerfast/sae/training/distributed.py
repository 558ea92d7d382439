"""How the training of an SAE is split over processes; `Alone` is the split into one.

Two ways, over any backend of `torch.distributed` (gloo on CPUs). `SplitData`: every process holds the whole SAE and takes
its own part of the data; gradients are summed. `SplitFeatures`: every process sees the whole batch and holds F/world features;
each takes its own best k, the k best of all are found from world·k candidates, and the parts of the reconstruction are summed.
Both do what one process would do, up to the order of summation.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Alone:
    """One process. The methods are what training asks of any split."""

    rank, world = 0, 1
    replica, replicas = 0, 1
    """Which part of the data this process reads, and how many parts there are."""

    def features(self, count: int) -> tuple[int, int]:
        """First and last (exclusive) feature that this process holds."""
        return 0, count

    def cut(self, values: Tensor, k: int) -> Tensor:
        """Which of this process's candidates (n, k), its best ones, are among the k best of all: bool (n, k)."""
        return torch.ones_like(values, dtype=torch.bool)

    def sum_over_features(self, tensor: Tensor) -> Tensor:
        """Add up, in place, what processes computed from their features."""
        return tensor

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Add up, in place, what processes computed from their rows."""
        return tensor

    def all_features(self, rows: Tensor) -> Tensor:
        """The rows of all features, from those of this process."""
        return rows

    def wait(self) -> None:
        """Return when every process has come here."""


class _Together(Alone):
    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise RuntimeError(
                f"{type(self).__name__}: torch.distributed is not initialised; call torch.distributed.init_process_group"
            )
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)

    def wait(self) -> None:
        dist.barrier(self.group)

    def _sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.contiguous(), group=self.group)
        return parts


class SplitData(_Together):
    """Each process reads a part of the data, 1/world of each batch; the batch must divide by their number.

    Args:
        group: The processes; None: all.

    Raises:
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> sf.sae.train_sae(cache, config, split=sf.sae.SplitData())  # doctest: +SKIP
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        super().__init__(group)
        self.replica, self.replicas = self.rank, self.world

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        return self._sum(tensor)


class SplitFeatures(_Together):
    """Each process holds F/world features, one after another; F must divide by their number.

    Args:
        group: The processes; None: all.

    Raises:
        RuntimeError: torch.distributed is not initialised.

    Example:
        >>> sf.sae.train_sae(cache, config, split=sf.sae.SplitFeatures())  # doctest: +SKIP
    """

    def features(self, count: int) -> tuple[int, int]:
        """The rank-th of world equal parts."""
        if count % self.world:
            raise ValueError(f"SplitFeatures: {count} features do not divide by {self.world} processes")
        part = count // self.world
        return self.rank * part, (self.rank + 1) * part

    def cut(self, values: Tensor, k: int) -> Tensor:
        """Compare with the k-th best of all candidates; a tie goes to the lower feature, as in one process."""
        every = torch.cat(self._gather(values), dim=1)
        best = every.sort(dim=1, descending=True, stable=True).indices[:, :k]
        chosen = torch.zeros_like(every, dtype=torch.bool).scatter_(1, best, True)
        width = values.shape[1]
        return chosen[:, self.rank * width : (self.rank + 1) * width]

    def sum_over_features(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        return self._sum(tensor)

    def all_features(self, rows: Tensor) -> Tensor:
        """Gather, in the order of the features."""
        return torch.cat(self._gather(rows))
