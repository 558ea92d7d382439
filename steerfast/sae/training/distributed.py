"""How the training of an SAE is split over processes; `Alone` is the split into one.

`Mesh` takes a mesh of `torch.distributed` with two ways to split, over any backend (gloo on CPUs). Along "replica"
processes hold the same features and read a part of the data each, and of each batch; gradients are summed. Along "feature"
they see the same rows and hold a part of the features; each takes its own best k, the k best of all are found from these
candidates, and the parts of the reconstruction are summed. Both do to a batch what one process would do, up to the order
of summation.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DIMENSIONS = ("replica", "feature")


class Alone:
    """One process. The methods are what training asks of any split."""

    rank, world = 0, 1
    replica, replicas = 0, 1
    """Which part of the data this process reads, and how many parts there are."""
    group: dist.ProcessGroup | None = None

    def features(self, count: int) -> tuple[int, int]:
        """First and last (exclusive) feature that this process holds."""
        return 0, count

    def cut(self, values: Tensor, k: int) -> Tensor:
        """Which of this process's candidates (n, k), its best ones, are among the k best of all: bool (n, k)."""
        return torch.ones_like(values, dtype=torch.bool)

    def largest(self, values: Tensor, count: int) -> Tensor:
        """The count-th largest of the positive values (m,) of all processes; 0 where there are fewer."""
        if len(values) < count:
            return values.new_zeros(())
        return values.kthvalue(len(values) - count + 1).values

    def sum_over_features(self, tensor: Tensor) -> Tensor:
        """Add up, in place, what processes computed from their features."""
        return tensor

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Add up, in place, what processes computed from their rows."""
        return tensor

    def all_features(self, rows: Tensor) -> Tensor:
        """The rows of all features, from those of this process."""
        return rows

    def stored(self, tensor: Tensor, by_feature: bool) -> Tensor:
        """A tensor of this process as a checkpoint sees it: whole, or a part of the features."""
        return tensor

    def agreed(self, number: int, otherwise: str) -> int:
        """A number that every process found, the same one.

        Raises:
            ValueError: they found different ones; `otherwise` says of what, with two {} for the numbers, and what to do.
        """
        return number

    def wait(self) -> None:
        """Return when every process has come here."""


class Mesh(Alone):
    """Processes in a mesh with the dimensions "replica" (parts of a batch), "feature" (parts of the features), or both.

    The batch must divide by the replicas, the features by their parts. Features belong within a node, replicas across nodes.

    Args:
        mesh: Of all processes of the run, with names of its dimensions.

    Raises:
        TypeError, ValueError: it is no mesh, has other dimensions, or leaves processes out.

    Example:
        >>> mesh = init_device_mesh("cpu", (2, 4), mesh_dim_names=("replica", "feature"))  # doctest: +SKIP
        >>> sf.sae.train_sae(cache, config, split=sf.sae.Mesh(mesh))  # doctest: +SKIP
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                f"Mesh: mesh is {type(mesh).__name__}; expected a DeviceMesh, such as "
                'init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "feature"))'
            )
        names = tuple(mesh.mesh_dim_names or ())
        if not names or set(names) - set(DIMENSIONS):
            raise ValueError(f"Mesh: the mesh has the dimensions {names}; expected 'replica', 'feature', or both")
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if mesh.size() != self.world:
            raise ValueError(f"Mesh: the mesh has {mesh.size()} of {self.world} processes; expected all of them")
        self.mesh = mesh
        self.replicas, self.replica, self._replica_group = self._along("replica")
        self.shards, self.shard, self._feature_group = self._along("feature")
        self.group = dist.new_group(backend="gloo")  # of checkpoints, which are written beside the training

    def features(self, count: int) -> tuple[int, int]:
        """One of equal parts, one after another."""
        if count % self.shards:
            raise ValueError(f"Mesh: {count} features do not divide by {self.shards} processes")
        part = count // self.shards
        return self.shard * part, (self.shard + 1) * part

    def cut(self, values: Tensor, k: int) -> Tensor:
        """Compare with the k-th best of all candidates; a tie goes to the lower feature, as in one process."""
        if self.shards == 1:
            return super().cut(values, k)
        every = torch.cat(self._gather(values), dim=1)
        best = every.sort(dim=1, descending=True, stable=True).indices[:, :k]
        chosen = torch.zeros_like(every, dtype=torch.bool).scatter_(1, best, True)
        width = values.shape[1]
        return chosen[:, self.shard * width : (self.shard + 1) * width]

    def largest(self, values: Tensor, count: int) -> Tensor:
        """By bisection: the bits of a positive float are in the order of the floats, so 31 counts find it exactly."""
        bits, found = values.float().view(torch.int32), 0
        for place in reversed(range(31)):
            tried = found | 1 << place
            if int(self.sum_over_data(self.sum_over_features((bits >= tried).sum()))) >= count:
                found = tried
        return torch.tensor(found, dtype=torch.int32).view(torch.float32)

    def sum_over_features(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        return self._sum(tensor, self.shards, self._feature_group)

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """All-reduce."""
        return self._sum(tensor, self.replicas, self._replica_group)

    def all_features(self, rows: Tensor) -> Tensor:
        """Gather, in the order of the features."""
        return rows if self.shards == 1 else torch.cat(self._gather(rows))

    def stored(self, tensor: Tensor, by_feature: bool) -> Tensor:
        """A `DTensor` over this memory."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        part = Shard(0) if by_feature else Replicate()
        placements = [part if name == "feature" else Replicate() for name in self.mesh.mesh_dim_names or ()]
        return DTensor.from_local(tensor, self.mesh, placements, run_check=False)

    def agreed(self, number: int, otherwise: str) -> int:
        """Compare over all processes."""
        ends = torch.tensor([number, -number])
        with together():
            dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=self.group)
        if int(ends[0]) != -int(ends[1]):
            raise ValueError(f"train_sae: processes have different {otherwise.format(-int(ends[1]), int(ends[0]))}")
        return number

    def wait(self) -> None:
        """A barrier."""
        with together():
            dist.barrier(self.group)

    def _along(self, name: str) -> tuple[int, int, dist.ProcessGroup | None]:
        """Processes along a dimension, the number of this one, and their group."""
        if name not in (self.mesh.mesh_dim_names or ()):
            return 1, 0, None
        group = self.mesh.get_group(name)
        return dist.get_world_size(group), self.mesh.get_local_rank(name), group

    def _sum(self, tensor: Tensor, count: int, group: dist.ProcessGroup | None) -> Tensor:
        if count > 1:
            with together():
                dist.all_reduce(tensor, group=group)
        return tensor

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.shards)]
        with together():
            dist.all_gather(parts, tensor.contiguous(), group=self._feature_group)
        return parts


def mesh_of(shards: int, device: str) -> Mesh:
    """All processes of a run, `shards` of them side by side to hold the features, the replicas across.

    Raises:
        ValueError: the number of processes does not divide by `shards`.
    """
    world = dist.get_world_size()
    if shards < 1 or world % shards:
        raise ValueError(f"Mesh: {world} processes do not divide into groups of {shards} that hold the features")
    return Mesh(init_device_mesh(device, (world // shards, shards), mesh_dim_names=DIMENSIONS))


@contextmanager
def together() -> Iterator[None]:
    """What fails because another process is gone says so."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"train_sae: another process of the run has left or cannot be reached ({error}); start the run again, with as "
            "many processes as there are: it goes on from its last checkpoint"
        ) from error
