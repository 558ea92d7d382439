"""Whether the modules that carry our hooks are still those that the model runs."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_

from torch import nn

from steerfast.models.points import Point

Step = tuple[dict[str, nn.Module | None], str, nn.Module, str]
"""The children of a module, the name of one, the child that it was, and its path."""


class Watched:
    """The modules on the way to every place that has a dispatcher."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._steps: dict[Point, list[Step]] = {}
        self._children: list[dict[str, nn.Module | None]] = []
        self._names: list[str] = []
        self._modules: list[nn.Module] = []

    def watch(self, points: Iterable[Point]) -> None:
        """These places have a dispatcher now; of one that had it before, what was there then counts."""
        self._steps = {point: self._steps.get(point) or self._way(point) for point in points}
        self._list()

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
