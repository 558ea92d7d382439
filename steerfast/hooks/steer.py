"""The hook: puts plans into a transformers model and takes them out again.

`steer` attaches plans and returns a handle; `prepare` installs inert dispatchers once, before torch.compile, after which
only the contents of buffers change. What happens in between is the controller's (`steerfast.hooks.controller`).
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, listed, whole_number, whole_numbers
from steerfast.place import Place
from steerfast.plan import Plan, as_plan
from steerfast.probes.given import as_probe

from .attachment import Attachment
from .compiled import Room
from .controller import LOCK, Controller, controller_of, known_controller
from .fixed import check_probes


def steer(
    model: nn.Module,
    plan: Plan | dict[Any, Any] | Sequence[Plan | dict[Any, Any] | None],
    strength: float | Sequence[float] = 1.0,
    prompt_length: int | Sequence[int] | None = None,
) -> Steering:
    """Steer a model until the returned handle is removed, or for a `with` block.

    Args:
        model: A transformers causal language model, or its decoder.
        plan: A `Plan`, a dict that describes one, or a list with one plan or None per batch row.
        strength: Multiplies every edit (for a flow its T); one number, or one per batch row.
        prompt_length: P for bare forward passes, in tokens, padding included; one number, or one per batch row. Not
            needed under `generate`, nor where the first pass from an empty cache is the whole prompt.

    Returns:
        A handle: `remove()`, `stats()`, `strength`, and a context manager.

    Raises:
        TypeError, ValueError: the plan does not fit the model; nothing has been attached.
        RuntimeError: the model is already compiled and was not prepared.

    Example:
        >>> with sf.steer(model, {8: sf.Add(v, 2.0)}) as handle:  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    many = isinstance(plan, Sequence)
    given: Sequence[Any] = plan if isinstance(plan, Sequence) else [plan]
    plans = [None if one is None else as_plan("steer", one) for one in given]
    if not any(plans):
        raise ValueError("steer: no plan is given; pass a Plan, a dict, or a list with at least one plan")
    lengths = prompt_lengths(prompt_length)
    with LOCK:
        controller = controller_of(model)
        for one in plans:
            if one is not None:
                controller.check(one)
        controller.check_positions([one for one in plans if one is not None], lengths)
        return Steering(controller, Attachment(plans, many, _strengths(strength, len(plans)), lengths))


def warmup(
    model: nn.Module, plan: Plan | dict[Any, Any] | Sequence[Plan | dict[Any, Any] | None] | None = None
) -> None:
    """Compile before traffic what it will launch: the kernels of a plan on a model, for passes of any size.

    On a GPU a kernel is compiled at its first launch, which takes seconds. Here every kernel is launched once, on zeros;
    neither the model nor what steers it changes, and nothing is counted. Whoever steers with another combination of methods
    or ranks, or with more interventions in a row, may meet a kernel that is new. On a CPU the plan is checked, and where numba is
    installed the edits are compiled: 11 seconds of CPU time, once for a machine, then less than one.

    Args:
        model: A transformers causal language model, or its decoder, on the device of its traffic. A prepared one launches
            the same kernels for every plan; compile the model itself after this.
        plan: What `steer` will be given. None: what steers the model now, or what it was prepared for.

    Raises:
        TypeError, ValueError: the plan does not fit the model.
        RuntimeError: no plan is given, and the model is neither steered nor prepared; or it is compiled and was not prepared.

    Example:
        >>> sf.warmup(model, {8: sf.Add(v, 2.0)})  # doctest: +SKIP
    """
    if plan is not None:
        handle = steer(model, plan)
        try:
            handle._controller.rehearse()
        finally:
            handle._detach()  # not removed: that no token was edited is as it should be
        return
    controller = known_controller(model)
    if controller is None:
        raise RuntimeError("warmup: nothing steers this model; pass the plan that will, or call prepare(model) first")
    with LOCK:
        controller.rehearse()


def active(model: nn.Module) -> list[Steering]:
    """List the handles that steer a model now, in the order in which they act.

    Args:
        model: Any model; one that is not steered has none.

    Example:
        >>> sf.active(model)
        []
    """
    controller = known_controller(model)
    return [] if controller is None else [one.handle for one in controller.attachments if not one.reads]


def reset(model: nn.Module) -> None:
    """Remove every handle from a model, those of `read`, too: no hook remains, unless it was prepared, and `generate` is its own.

    Args:
        model: Any model; one that is not steered stays as it is.

    Example:
        >>> sf.reset(model)
    """
    controller = known_controller(model)
    with ExitStack() as stack:  # a warning of one may be an error, and the others are removed all the same
        for one in [] if controller is None else controller.attachments:
            stack.callback(one.handle.remove)


def prepare(
    model: nn.Module,
    layers: int | slice | Iterable[int] | Tensor | None = None,
    site: str = "resid_post",
    room: Room | None = None,
    probes: Mapping[str, Any] | None = None,
) -> None:
    """Install inert dispatchers before torch.compile; afterwards `steer` only changes the contents of buffers.

    Args:
        model: A transformers causal language model that has not been compiled yet.
        layers: Which layers may be steered: one, several (also an array or a tensor of integers), or a slice; None: all.
        site: At which site.
        room: What the buffers are large enough for; None: `Room()`.
        probes: Name -> probe, as for `read`: what `read` and the conditions of `When` and `WhenToken` may look at. Each is a
            part of the compiled graph, used or not.

    Raises:
        TypeError, ValueError: a layer or site that the model does not have, a probe without a place or of another width.
        RuntimeError: the model is already compiled, or is being steered.

    Example:
        >>> sf.prepare(model)  # doctest: +SKIP
        >>> model.forward = torch.compile(model.forward, fullgraph=True)  # doctest: +SKIP
    """
    controller = controller_of(model, "prepare")
    if controller.attachments:
        raise RuntimeError("prepare: the model is being steered; remove the handles first")
    room = Room() if room is None else room
    if not isinstance(room, Room):
        raise TypeError(f"prepare: room must be a Room; got {room!r}")
    named = {name: as_probe("prepare", probe) for name, probe in check_probes(probes).items()}
    count = controller.layers.count
    chosen = whole_numbers("prepare", "layers", slice(None) if layers is None else layers, count)
    if not chosen:
        raise ValueError(f"prepare: layers is {layers!r}, which names none of {count}; pass None for all")
    points = [Place(site, controller.layers.resolve(layer, "prepare")) for layer in chosen]
    with torch.inference_mode(False):
        controller.prepare(points, room, named)


def unprepare(model: nn.Module) -> None:
    """Undo `prepare`: no hook remains, and what was compiled is compiled anew, without steering.

    Graphs are dropped by `torch._dynamo.reset`, which drops those of other models, too; they come back at their next call.
    To steer the model without torch.compile, or to prepare it again, take its compiled forward off first.

    Args:
        model: Any model; one that is not prepared stays as it is.

    Raises:
        RuntimeError: the model is prepared, and being steered.

    Example:
        >>> sf.unprepare(model)
    """
    controller = known_controller(model)
    if controller is None or not controller.prepared:
        return
    if controller.attachments:
        raise RuntimeError("unprepare: the model is being steered; remove the handles first, or call reset(model)")
    with LOCK:
        controller.unprepare()


class Steering:
    """A removable handle of one `steer` call, and a context manager."""

    def __init__(self, controller: Controller, attachment: Attachment) -> None:
        self._controller = controller
        self._attachment = attachment
        self.plans = attachment.plans
        self._counts = [0] * len(attachment.plans)
        self._decisions: list[list[Tensor | None]] = []
        self._active = True
        attachment.handle = self
        controller.attach(attachment)

    @property
    def strength(self) -> list[float]:
        """The multiplier of each plan (or batch row); assign one number or a list to change it at once."""
        return list(self._attachment.strengths)

    @strength.setter
    def strength(self, value: float | Sequence[float]) -> None:
        self._check_active()
        self._attachment.strengths = _strengths(value, len(self.plans))
        self._controller.passes.refresh()

    def stats(self) -> list[int]:
        """How many tokens each plan has been applied to so far, counted once, not per layer.

        A condition that held tokens back is not looked at: see `decisions`.
        """
        return [
            count + self._counted(slots) if self._active and slots else count
            for count, slots in zip(self._counts, self._attachment.slots, strict=True)
        ]

    def _counted(self, slots: tuple[int, ...]) -> int:
        """Tokens of the column that edits most of them."""
        counted, numbers = self._controller.passes.counts.of, self._attachment.numbers
        return max(sum(map(counted, numbers([slot]))) for slot in slots)

    def decisions(self) -> list[list[Tensor | None]]:
        """What the `When` conditions of each plan decided for the last batch: bool (rows,) each, None before a decision."""
        if not self._active:
            return self._decisions
        found: list[list[Tensor | None]] = []
        for index, slots in enumerate(self._attachment.slots):
            latches = [self._controller.passes.decision(slot) for slot in slots if slot in self._attachment.latched]
            found.append(
                [one if one is None or not self._attachment.per_row else self._own(one, index) for one in latches]
            )
        return found

    def _own(self, latch: Tensor, index: int) -> Tensor:
        """The part of a decision (batch,) that belongs to plan `index` of a list: its row, repeated by generate."""
        copies = latch.shape[0] // len(self.plans)
        return latch[index * copies : (index + 1) * copies]

    def remove(self) -> None:
        """Detach: no hook remains, unless the model was prepared, and `generate` is restored. Safe to call twice."""
        running = self._controller.passes.generating
        if not self._detach():
            return
        if running not in (None, threading.get_ident()):
            warnings.warn(
                "steer: generate is still running in another thread; from here on it is not steered: join the thread, or "
                "read its streamer to the end, before the block is left",
                RuntimeWarning,
                stacklevel=2,
            )
        if any(self._attachment.strengths) and not any(self._counts):
            warnings.warn(
                "steer: no token was edited; did the model run, and do the positions fit?", RuntimeWarning, stacklevel=2
            )

    def __enter__(self) -> Steering:
        self._check_active()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.remove()
        else:
            self._detach()  # the run was cut short: no warning on top of its error

    def _detach(self) -> bool:
        if not self._active:
            return False
        with LOCK:
            try:
                self._counts, self._decisions = self.stats(), self.decisions()
            finally:  # they may not come, as where Ctrl-C is pressed: the model is itself again
                self._active = False
                self._controller.detach(self._attachment)
        return True

    def _check_active(self) -> None:
        if not self._active:
            raise RuntimeError("steer: this handle has been removed; call steer again")


def _strengths(value: Any, count: int) -> list[float]:
    """One multiplier per plan, of one number or a list, an array or a tensor of them."""
    value = listed(value)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if len(value) != count:
            raise ValueError(
                f"steer: {len(value)} strengths for {count} plan(s); give one number, or a list of plans with one strength each"
            )
        return [finite_number("steer", "strength", v) for v in value]
    return [finite_number("steer", "strength", value)] * count


def prompt_lengths(value: Any, caller: str = "steer") -> tuple[int, ...] | None:
    """prompt_length as given: one number for all rows, or one per row."""
    if value is None:
        return None
    given = listed(value)
    try:
        several = isinstance(given, Sequence) and not isinstance(given, str)
        numbers = tuple(whole_number(caller, "prompt_length", one) for one in (given if several else [given]))
    except TypeError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(
            f"{caller}: prompt_length is {value!r}; expected a number of tokens >= 1, or one per batch row"
        )
    return numbers
