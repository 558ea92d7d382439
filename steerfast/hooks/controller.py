"""What one model knows of its steering: dispatchers, what is attached, and the passes that run.

`generate` is shadowed on the model instance while a plan is active, because a hook alone sees neither the prompt's length
nor, under a static cache, its padding; so is the entry of continuous batching, where a plan that cannot be followed must
be refused before a background thread runs it.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from steerfast.bank import Bank, Runs
from steerfast.edits.base import Intervention
from steerfast.edits.columns import numbered
from steerfast.edits.conditions import When
from steerfast.models.layers import Layers, find_layers, refuse_flat, stream_storage
from steerfast.models.proof import Proof, prove, refuse_split
from steerfast.ops.backends import STEP_SIZES
from steerfast.place import Place
from steerfast.plan import Plan
from steerfast.probes.probe import Probe

from .attachment import Attachment
from .bookkeeping import bookkeeping
from .columns import check_lengths, check_plan, check_positions, layout_of, places_of, warn_of_others
from .compiled import FixedTable, Room, is_compiled
from .continuous import cached_manager, check_paged, new_manager
from .dispatcher import Dispatcher
from .fixed import FixedProbe
from .generation import announced
from .passes import Passes

_ATTRIBUTE = "_steerfast"
_COMPILED = "{}: the model is already compiled, so a new hook would be ignored; call prepare(model) before that"

LOCK = threading.RLock()
"""Held while something is attached or detached: two threads that steer one model share its controller."""


def known_controller(model: nn.Module) -> Controller | None:
    """The controller of a model that is steered or prepared; None for any other."""
    inner = getattr(model, "_orig_mod", model)
    return vars(inner).get(_ATTRIBUTE) if isinstance(inner, nn.Module) else None


def controller_of(model: nn.Module, caller: str = "steer") -> Controller:
    """The controller of a model; a new one is registered when it attaches something."""
    inner = getattr(model, "_orig_mod", model)
    found = known_controller(model)
    if found is None:
        layers = find_layers(model, caller)
        refuse_flat(inner, caller)
        found = Controller(inner, layers, Proof() if is_compiled(inner) else prove(inner, layers, caller))
    if model is not inner and not found.prepared:
        raise RuntimeError(_COMPILED.format(caller))
    return found


class Controller:
    """What one model knows of its steering: dispatchers, what is attached, and the passes that run."""

    def __init__(self, model: nn.Module, layers: Layers, proof: Proof) -> None:
        self.model = model
        self.layers = layers
        self.proof = proof
        self.dispatchers: dict[Place, Dispatcher] = {}
        self.passes = Passes(model, layers, proof)
        self._runs = Runs(1 << 20)
        self._originals: dict[str, tuple[Any, bool]] = {}  # what a shadow hides, and whether the instance had its own
        self._batching = False  # continuous batching has run under a plan

    @property
    def attachments(self) -> list[Attachment]:
        """What is attached, in the order in which it acts."""
        return self.passes.attachments

    @property
    def prepared(self) -> bool:
        """Whether the model has its dispatchers for good, so that a compiled graph may hold them."""
        return self.passes.fixed is not None

    # --- plans come and go -------------------------------------------------------------------------------------------

    def check(self, plan: Plan, caller: str = "steer") -> None:
        """Refuse a plan that does not fit the model, before anything is attached."""
        places = places_of(plan, self.layers, caller)
        known = {place for place, one in self.dispatchers.items() if one.edited} if caller == "steer" else places
        check_plan(plan, self.layers, known if self.prepared else None, caller)
        for site, layer in places:
            refuse_split(self.proof, self.layers, layer, site, caller)
        if not self.prepared and is_compiled(self.model):
            raise RuntimeError(_COMPILED.format(caller))
        if self.passes.watched.convert():
            self.passes.refresh()
        warn_of_others(plan, self.layers)

    def check_positions(self, plans: list[Plan], lengths: tuple[int, ...] | None) -> None:
        """Refuse positions that this model could never show, and two lengths of one prompt."""
        check_lengths(lengths, self.attachments)
        generates = hasattr(self.model, "generate")
        bare = not generates and getattr(self.model, "base_model", self.model) is self.model  # a part of what generates
        check_positions(plans, self.layers, self.passes.keeps_cache or generates, not bare or lengths is not None)

    @bookkeeping
    def attach(self, new: Attachment) -> None:
        """Give each plan its slots, the same in every layer, and start steering."""
        layouts = [layout_of(plan, self.layers) for plan in new.plans]
        wanted: dict[Place, dict[int, Intervention]] = {}
        vars(self.model)[_ATTRIBUTE] = self
        try:
            for columns in layouts:
                width = sum(column.slots for column in columns)
                first = self._runs.take(width, "slots") if width else 0
                new.take(first, columns)
                for place, edits in numbered(columns).items():
                    wanted.setdefault(place, {}).update({first + number: edit for number, edit in edits.items()})
                for slot, column in zip(new.slots[-1], columns, strict=True):
                    if column.gate is not None:
                        read = column.gate[-1]
                        self._install(new, slot, next(iter(column.edits.values())), read)  # type: ignore[arg-type]
                        if not self.prepared:
                            wanted.setdefault(read, {})
            for place in wanted:
                self._dispatcher(place)
            count = 1 + max(new.all_slots, default=-1)
            for place, dispatcher in self.dispatchers.items():  # one row table: every bank must know every slot
                dispatcher.put(wanted.get(place, {}), count)
                dispatcher.judges = self._read_here(place)
            self._count_places()
            self.passes.watch()
            self.attachments.append(new)
            self.attachments.sort(key=lambda one: one.turn)
            self.passes.refresh()
            self._shadow()
        except BaseException:
            self.detach(new)
            raise

    @bookkeeping
    def detach(self, old: Attachment) -> None:
        """Release the slots of an attachment; with the last one go the hooks and the shadow of generate."""
        if old in self.attachments:
            self.attachments.remove(old)
        if not self.attachments:
            self._unhook()
        for slots in old.slots:
            if slots:
                self._runs.give(slots[0], len(old.numbers(slots)))
        for slot in old.all_slots:
            self.passes.conditions.pop(slot, None)
        if self.passes.fixed is not None:
            self.passes.fixed.text.free(old.all_slots)
        for place, dispatcher in list(self.dispatchers.items()):
            dispatcher.take(old.all_slots)
            dispatcher.judges = self._read_here(place)
            if not dispatcher.edits and not dispatcher.judges and not self.prepared:
                dispatcher.hook.remove()
                del self.dispatchers[place]
        self._count_places()
        self.passes.counts.clear(old.all_slots)
        if self.attachments:
            self.passes.refresh()

    def _unhook(self) -> None:
        """Nothing is steered any more: whatever else happens, the model is itself again."""
        self.passes.forget()
        for name, (original, own) in self._originals.items():
            if own:
                setattr(self.model, name, original)
            else:
                vars(self.model).pop(name, None)
        self._originals.clear()
        if self._batching and cached_manager(self.model) is not None:  # its prefix cache is steered
            self.model.destroy_cached_continuous_batching_manager()  # type: ignore[operator]
        self._batching = False
        if self.prepared:
            return
        for dispatcher in self.dispatchers.values():
            dispatcher.hook.remove()
        self.dispatchers.clear()
        self.passes.unwatch()
        vars(self.model).pop(_ATTRIBUTE, None)

    def _shadow(self) -> None:
        """Put our entries of generation in front of the model's, on the instance."""
        for name, shadow in {
            "generate": self._generate,
            "init_continuous_batching": self._init_continuous_batching,
        }.items():
            if name not in self._originals and hasattr(self.model, name):
                self._originals[name] = getattr(self.model, name), name in vars(self.model)
                setattr(self.model, name, shadow)

    def _read_here(self, place: Place) -> bool:
        """Whether some condition is read at a place."""
        return any(where == place for _, where in self.passes.conditions.values())

    def _count_places(self) -> None:
        self.passes.dispatchers = sum(bool(one.edits or one.judges) for one in self.dispatchers.values())
        self.passes.watched.watch(self.dispatchers.values())

    def _install(self, new: Attachment, slot: int, when: When, place: Place) -> None:
        if self.passes.fixed is None:
            self.passes.conditions[slot] = when, place
        else:
            self.passes.fixed.text.gate(slot, when, place)
        new.gated.add(slot)
        if not when.per_token:
            new.latched.add(slot)

    def _dispatcher(self, place: Place) -> Dispatcher:
        if place not in self.dispatchers:
            point = self.layers.point(place[1], place[0], "steer")
            block = self.layers.blocks[place[1]]
            empty = Bank(point.width, 1, 0, *stream_storage(block, self.model))
            self.dispatchers[place] = Dispatcher(self.passes, place, point, block, empty, fixed=False)
        return self.dispatchers[place]

    def prepare(self, points: list[Place], room: Room, probes: Mapping[str, Probe]) -> None:
        """Install inert dispatchers with banks of fixed size and a row table at a fixed address, and probes with buffers."""
        if self.prepared:
            raise RuntimeError("prepare: the model is already prepared; call unprepare(model) first")
        if is_compiled(self.model):
            raise RuntimeError("prepare: the model is already compiled; call prepare before torch.compile")
        read = {name: self._read_by(name, probe) for name, probe in probes.items()}
        found = {
            place: self.layers.point(place[1], place[0], "prepare")
            for place in dict.fromkeys([*points, *read.values()])
        }
        sizes = {place: (room.slots, room.directions) if place in points else (1, 1) for place in found}
        banks = {
            at: Bank(point.width, *sizes[at], *stream_storage(self.layers.blocks[at[1]], self.model), rank=room.rank)
            for at, point in found.items()
        }
        fixed = FixedTable(room, self.passes.device)
        for number, (name, place) in enumerate(read.items(), 1):
            device = banks[place].vectors.device
            fixed.text.probes.append(FixedProbe(name, probes[name], place, number, room.batch, room.length, device))
        for place, point in found.items():
            block = self.layers.blocks[place[1]]
            one = self.dispatchers[place] = Dispatcher(self.passes, place, point, block, banks[place], fixed=True)
            one.probes = [probe for probe in fixed.text.probes if probe.place == place]
            one.edited = place in points
        self._runs = Runs(room.slots)
        self.passes.fixed = fixed
        self.passes.counts.make_room(room.slots + 2, self.passes.device)
        self.passes.watch()
        self._count_places()
        vars(self.model)[_ATTRIBUTE] = self

    def _read_by(self, name: str, probe: Probe) -> Place:
        """Where a probe of `prepare` is read."""
        if probe.place is None:
            raise ValueError(
                f"prepare: {name!r} does not say where it is read; make it with place=, a layer or (site, layer)"
            )
        place = Place(probe.place.site, self.layers.resolve(probe.place.layer, "prepare"))
        width = self.layers.point(place.layer, place.site, "prepare").width
        if probe.width != width:
            raise ValueError(f"prepare: {name!r} has width {probe.width}; {place} of this model has {width}")
        return place

    @torch.no_grad()
    def rehearse(self) -> None:
        """Launch at every place what the passes of traffic can launch there."""
        for dispatcher in self.dispatchers.values():
            for tokens in STEP_SIZES:
                dispatcher.rehearse(tokens)

    def unprepare(self) -> None:
        """Take the inert dispatchers out again, and drop the graphs that hold them."""
        self.passes.fixed = None
        self._unhook()
        torch._dynamo.reset()  # a graph is kept by the code it was made of: a later one would be this one, with old buffers

    # --- shadows of the model's own entries --------------------------------------------------------------------------

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Shadow of the model's generate: announces the prompt, then runs the real one."""
        passes = self.passes
        if "generate" not in self._originals:  # kept from a block that has been left: the model's own, or a later one's
            own: Any = self.model
            return own.generate(*args, **kwargs)
        generate = self._originals["generate"][0]
        if passes.generating not in (None, threading.get_ident()):
            raise RuntimeError(
                "steer: generate is running in another thread; a steered model generates one batch at a time"
            )
        told = announced(self.model, args, kwargs)
        if passes.shares(told):  # a model that is its own assistant generates inside generate
            return generate(*args, **kwargs)
        with passes.generation(told):
            return generate(*args, **kwargs)

    def _init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Shadow of the entry of continuous batching: what its thread could not follow is refused here."""
        if "init_continuous_batching" not in self._originals:
            own: Any = self.model
            return own.init_continuous_batching(*args, **kwargs)
        check_paged(self.attachments, bool(self.passes.conditions))
        manager = new_manager(self.model, args, kwargs, self.passes.device.type == "cuda")
        self._batching = True
        return manager
