"""Gradient checkpointing: a part of a pass runs again inside the backward pass, and must do there what it did at first.

By then another pass may have begun, a strength have changed, the handle be gone. transformers calls the function
`_gradient_checkpointing_func` of a block, with what is to be run; while a model is steered, a shadow of that function hands
over a `Region` in its place, which notes what every dispatcher inside did and repeats exactly that, as often as it is asked.
Checkpointing that goes another way is refused where it is seen.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Act = Callable[[Tensor], Tensor]
"""What a dispatcher does to the stream, with all that it needs."""

_FUNCTION = "_gradient_checkpointing_func"
_FILE = torch.utils.checkpoint.__file__
_FOREIGN = (
    "is recomputed in the backward pass by torch.utils.checkpoint, where another pass may have begun or the handle be gone; use "
    "model.gradient_checkpointing_enable(), which is followed in a model that is not prepared, or steer without checkpointing"
)


class Recomputed(Protocol):
    """A dispatcher, as a region sees it."""

    hook: RemovableHandle

    def act(self, x: Tensor) -> Act | None:
        """What this pass does here; None: nothing."""
        ...

    def attach(self) -> RemovableHandle:
        """Hook the module."""
        ...


class Thread:
    """What one thread is running."""

    __slots__ = ("region", "task", "tracked")

    def __init__(self) -> None:
        self.region: Region | None = None
        self.task = -1  # the backward pass in which its forward pass began; -1: outside of any
        self.tracked = False  # that pass began with gradients on


class _Threads(threading.local):
    def __init__(self) -> None:
        self.own = Thread()


THREADS = _Threads()
"""`THREADS.own` is what this thread is running."""
backward_pass = torch._C._current_graph_task_id
"""The number of the backward pass that this thread is in; -1: none."""
_packing = torch._C._autograd._top_saved_tensors_default_hooks


def plainly_recorded() -> bool:
    """Whether gradients are recorded here and what they need is kept as it is: nothing will be run again."""
    return _packing(False) is None and torch.is_grad_enabled()


def runs_hooks_again(block: nn.Module) -> bool:
    """Whether the hooks of a checkpointed block lie inside of what is run again, as they do up to transformers 5.23."""
    return type(block).__call__ is not nn.Module.__call__ or not hasattr(block, "gradient_checkpointing")


class Region:
    """What one call of checkpointing runs, at first and again: `run`, with what the dispatchers inside did."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run
        self._acts: dict[Recomputed, list[Act | None]] = {}
        self._left: dict[Recomputed, list[Act | None]] | None = None  # to be repeated; None: this is the first time
        self._begun = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; from the second time on, the dispatchers do what they did the first time."""
        thread, hooks = THREADS.own, []
        before, thread.region = thread.region, self
        try:
            if self._begun:
                self._left = {dispatcher: acts[::-1] for dispatcher, acts in self._acts.items()}
                hooks = [dispatcher.attach() for dispatcher in self._acts if not _hangs(dispatcher.hook)]
            self._begun = True
            return self._run(*args, **kwargs)
        finally:
            thread.region, self._left = before, None
            for hook in hooks:
                hook.remove()

    def edit(self, dispatcher: Recomputed, x: Tensor) -> Tensor | None:
        """What a dispatcher makes of the stream, now or as it did the first time; one that came later does nothing."""
        if self._left is None:
            act = dispatcher.act(x)
            self._acts.setdefault(dispatcher, []).append(act)
        else:
            acts = self._left.get(dispatcher)
            act = acts.pop() if acts else None
        return None if act is None else act(x)


class Recomputing:
    """Where the passes of one model are run again.

    Args:
        decoder: The module whose blocks may be checkpointed.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder = decoder
        self._modules: list[Any] = [module for module in decoder.modules() if hasattr(module, "gradient_checkpointing")]
        self.prepared_inside = False  # a dispatcher of a prepared model lies inside of a block
        self._unseen = False  # some block ran without gradients inside a pass with them, and the reason is unknown

    def begin(self, follow: bool) -> None:
        """A pass begins in this thread; `follow`: put the shadows in place (a compiled graph would trace them)."""
        thread = THREADS.own
        thread.task, thread.tracked = backward_pass(), torch.is_grad_enabled()
        if thread.task != -1 and _inside_checkpoint():
            raise RuntimeError(f"steer: this forward pass {_FOREIGN}")
        if not follow:
            self.check_prepared()
            return
        if not thread.tracked:
            return
        for module in self._modules:
            found = vars(module).get(_FUNCTION)
            if found is not None and not isinstance(found, _Shadow):
                setattr(module, _FUNCTION, _Shadow(found))

    def check_prepared(self) -> None:
        """Refuse a prepared model that checkpoints: a compiler leaves out what hooks inside of the blocks do."""
        trains = self.prepared_inside and self._decoder.training and torch.is_grad_enabled()
        if trains and any(module.gradient_checkpointing for module in self._modules):
            raise RuntimeError(
                "steer: a prepared model that trains with gradient checkpointing cannot be steered inside its blocks; call "
                "model.gradient_checkpointing_disable(), or steer a model that is neither prepared nor compiled"
            )

    def end(self) -> None:
        """Nothing is steered any more."""
        for module in self._modules:
            if isinstance(found := vars(module).get(_FUNCTION), _Shadow):
                setattr(module, _FUNCTION, found.original)
        self._unseen = False

    def runs_anew(self, path: str) -> bool:
        """Whether a dispatcher outside of any region runs in a pass, not in the repetition of one that we have not seen.

        Such a pass began before the model was steered, so that nothing is to be done in it.

        Raises:
            RuntimeError: the module is checkpointed in a way that cannot be followed.
        """
        thread, task = THREADS.own, backward_pass()
        if task not in (-1, thread.task):
            if self._unseen:
                raise RuntimeError(
                    f"steer: {path} runs again in a backward pass, and which pass that repeats is not shown"
                )
            return False
        if thread.tracked:
            packing = _packing(False)
            if (
                packing is not None and packing[0].__module__ == torch.utils.checkpoint.__name__
            ) or _inside_checkpoint():
                raise RuntimeError(f"steer: {path} {_FOREIGN}")
            self._unseen = self._unseen or not torch.is_grad_enabled()
        return True


class _Shadow:
    """In front of a block's checkpointing function while the model is steered."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.original(run, *args, **kwargs)
        if THREADS.own.region is not None:
            raise RuntimeError("steer: gradient checkpointing inside gradient checkpointing cannot be followed")
        return self.original(Region(run), *args, **kwargs)


def _hangs(hook: RemovableHandle) -> bool:
    """Whether a hook has not been removed."""
    return hook.id in (hook.hooks_dict_ref() or ())


def _inside_checkpoint() -> bool:
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_filename != _FILE:
        frame = frame.f_back
    return frame is not None
