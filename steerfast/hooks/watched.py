"""Whether the modules that carry our hooks are still those that the model runs, and their weights what they were."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter, getitem, is_
from typing import Any, Protocol

import torch
from torch import nn

from steerfast.models.layers import telling_weight
from steerfast.models.points import Point

Step = tuple[dict[str, nn.Module | None], str, nn.Module, str]
"""The children of a module, the name of one, the child that it was, and its path."""


_storage = attrgetter("dtype", "device")


class Placed(Protocol):
    """A dispatcher, as it is watched."""

    point: Point
    block: nn.Module

    @property
    def storage(self) -> tuple[torch.dtype, torch.device]:
        """dtype and device of what it edits with."""
        ...

    def convert(self, dtype: torch.dtype, device: torch.device) -> None:
        """Edit with another."""
        ...


class Watched:
    """The modules on the way to every place that has a dispatcher, and where a weight of its block lies."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._steps: dict[Point, list[Step]] = {}
        self._children: list[dict[str, nn.Module | None]] = []
        self._names: list[str] = []
        self._modules: list[nn.Module] = []
        self._placed: list[Placed] = []
        self._parameters: list[dict[str, nn.Parameter]] = []
        self._telling: list[str] = []
        self._inside: tuple[list[Any], ...] = (
            [],
            [],
            [],
        )  # as `_children`, `_names`, `_modules`, from blocks to those weights
        self._stored: list[tuple[torch.dtype, torch.device]] = []

    def watch(self, placed: Iterable[Placed]) -> None:
        """These places have a dispatcher now; of one that had it before, what was there then counts."""
        self._placed = list(placed)
        points = [one.point for one in self._placed]
        self._steps = {point: self._steps.get(point) or self._way(point) for point in points}
        found = [telling_weight(one.block, self._model) for one in self._placed]
        self._parameters, self._telling = [where for where, _, _ in found], [name for _, name, _ in found]
        below = [
            step for one, (_, _, path) in zip(self._placed, found, strict=True) for step in _below(one.block, path)
        ]
        self._inside = tuple(list(column) for column in zip(*below, strict=True)) or ([], [], [])
        self._stored = [
            _storage(weight) if weight.is_meta else one.storage
            for one, weight in zip(self._placed, self._weights(), strict=True)
        ]
        self._list()

    def convert(self) -> bool:
        """Whether weights have been converted, moved or replaced by others (`model.half()`, `load_state_dict(assign=True)`).

        What edits beside them is converted, too.

        Raises:
            RuntimeError: a prepared model's have; its buffers stay as they are.
        """
        try:
            children, names, modules = self._inside
            there = all(map(is_, map(dict.get, children, names), modules))
            if there and list(map(_storage, self._weights())) == self._stored:
                return False
        except (AttributeError, KeyError):  # it lies elsewhere now, as one that has got a parametrization does
            pass
        converted = False
        for one in self._placed:
            parameters, name, _ = telling_weight(one.block, self._model)
            if not parameters[name].is_meta and (now := _storage(parameters[name])) != one.storage:
                one.convert(*now)
                converted = True
        self.watch(self._placed)
        return converted

    def _weights(self) -> Iterable[nn.Parameter]:
        """Asked for by name each time: what a name stands for may have been replaced."""
        return map(getitem, self._parameters, self._telling)

    def check(self) -> None:
        """Refuse a pass through another module than the one that was hooked; a few microseconds for all of them.

        Raises:
            RuntimeError: a module has been replaced, as by an adapter that was put in or taken out.
        """
        if all(map(is_, map(dict.get, self._children, self._names), self._modules)):
            return
        for steps in self._steps.values():
            for at, (children, name, module, path) in enumerate(steps):
                found = children.get(name)
                if found is module:
                    continue
                if getattr(found, "_orig_mod", None) is not module:  # torch.compile wraps what it compiles
                    raise RuntimeError(
                        f"steer: {path} was a {type(module).__name__} when the model was steered and is a "
                        f"{type(found).__name__} now, which no plan has been put into; remove the handles and steer again "
                        "after an adapter is put in or taken out"
                    )
                steps[at] = children, name, found, path  # type: ignore[assignment]  # a module: it wraps one
        self._list()

    def _list(self) -> None:
        """Each step once, as three lists that a check goes through side by side."""
        once = {(id(step[0]), step[1]): step for steps in self._steps.values() for step in steps}
        self._children = [step[0] for step in once.values()]
        self._names = [step[1] for step in once.values()]
        self._modules = [step[2] for step in once.values()]

    def _way(self, point: Point) -> list[Step]:
        steps: list[Step] = []
        parent, names = self._model, point.path.split(".")
        for depth, name in enumerate(names, 1):
            if name not in parent._modules:  # a compiled module stands in front of its own
                parent = getattr(parent, "_orig_mod", parent)
            module = parent._modules.get(name)
            if module is None:
                break
            steps.append((parent._modules, name, module, ".".join(names[:depth])))
            parent = module
        return steps


def _below(block: nn.Module, path: str) -> Iterator[tuple[dict[str, nn.Module | None], str, nn.Module]]:
    """The steps from a block to a module inside it."""
    module = block
    for name in path.split(".") if path else ():
        children, module = module._modules, module.get_submodule(name)
        yield children, name, module
