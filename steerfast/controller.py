"""What one model knows of its steering: dispatchers, active handles, and the batch that is running.

Which token is steered is decided once per forward pass, by a hook on the decoder, and read by every dispatcher (see
`steerfast.positions`). `generate` is shadowed on the model instance while a plan is active, because a hook alone sees
neither the prompt's length nor, under a static cache, its padding; so is the entry of continuous batching, where a plan
that cannot be followed must be refused before a background thread runs it.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .bank import Bank, Runs
from .caches import PAGED, cache_in, keeps_cache, past_length
from .conditions import When
from .dispatcher import Dispatcher
from .fixed import FixedTable
from .gates import Gates, Place
from .generation import announced, by_name, tokens_of, valid_tokens
from .interventions import Intervention
from .layers import Layers, find_layers
from .plan import Plan
from .positions import IDLE, Owners, Pass, Prompt, Table

if TYPE_CHECKING:
    from .hooks import Steering

_ATTRIBUTE = "_steerfast"
_GRAPHS = (
    "steer: continuous batching records CUDA graphs, which would not follow a plan; pass "
    "continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False), and destroy a cached manager first"
)


def controller_of(model: nn.Module) -> Controller:
    """The controller of a model; a new one is known to nobody until it attaches something."""
    inner = getattr(model, "_orig_mod", model)
    found = vars(inner).get(_ATTRIBUTE) if isinstance(inner, nn.Module) else None
    if found is None:
        layers = find_layers(model, "steer")
        if getattr(inner.config, "is_encoder_decoder", False):
            raise TypeError(f"steer: {layers.name} is an encoder-decoder; only decoders can be steered")
        found = Controller(inner, layers)
    if model is not inner and not found.prepared:
        raise RuntimeError(
            "steer: the model is already compiled, so a new hook would be ignored; call prepare(model) before torch.compile"
        )
    return found


class Controller:
    """What one model knows of its steering: dispatchers, active handles, and the batch that is running."""

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self.model = model
        self.layers = layers
        self.handles: list[Steering] = []
        self.dispatchers: dict[Place, Dispatcher] = {}
        self.now: Pass = IDLE
        self.gates = Gates()
        self._runs = Runs(1 << 20)
        self._prompt: Prompt | None = None
        self._table: Table | None = None
        self._prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()  # by the cache that a bare pass filled
        self._generating: int | None = None  # the thread that is inside generate
        self._originals: dict[str, tuple[Any, bool]] = {}  # what a shadow hides, and whether the instance had its own
        self._unplaced = False  # prepared, but the positions need a prompt that only generate would show
        self._ones = torch.empty(0)
        self._batching = False  # continuous batching has run under a plan
        self._host_counts: dict[int, int] = {}
        self._device_counts: Tensor | None = None
        self._broadcasts: dict[Owners, tuple[Tensor, Tensor]] = {}
        self._decoder = model.get_submodule(layers.path.rpartition(".")[0])
        self._names = list(inspect.signature(self._decoder.forward).parameters)
        self._keeps_cache = keeps_cache(model, self._decoder)
        self._hooks: list[RemovableHandle] = []  # on the decoder, and on the model around it
        self._mask: Any = None  # as the model around the decoder was given it, not yet prepared
        self._fixed: FixedTable | None = None  # of a prepared model

    @property
    def prepared(self) -> bool:
        """Whether the model has its dispatchers for good, so that a compiled graph may hold them."""
        return self._fixed is not None

    def __reduce__(self) -> Any:
        raise RuntimeError("steer: a model cannot be copied or pickled while it is steered or prepared; do that first")

    # --- plans come and go -------------------------------------------------------------------------------------------

    def check(self, plan: Plan) -> None:
        """Refuse a plan that does not fit the model, before anything is attached."""
        card, layers = plan.model, self.layers
        if card is not None and (card.width, card.layers) != (layers.d, layers.count):
            raise ValueError(
                f"steer: the plan was made for {card.name} (width {card.width}, {card.layers} layers); this model "
                f"({layers.name}) has width {layers.d} and {layers.count} layers"
            )
        if card is not None and card.name.partition(":")[0] != layers.name:
            warnings.warn(
                f"steer: the plan was made for {card.name}, this model is a {layers.name}", UserWarning, stacklevel=4
            )
        for (site, layer), chain in self._places(plan).items():
            point = layers.point(layer, site, "steer")
            for edit in chain:
                if isinstance(edit, When):
                    self._read_at(edit, (site, layer))
                if edit.width != point.width:
                    raise ValueError(
                        f"steer: {edit!r} at {site} {layer} has width {edit.width}; this model's {site} has {point.width}"
                    )
                if edit.model not in (None, layers.name):
                    raise ValueError(
                        f"steer: {edit!r} comes from activations of {edit.model}; this model is {layers.name}"
                    )
            if self.prepared and (site, layer) not in self.dispatchers:
                raise RuntimeError(
                    f"steer: {site} of layer {layer} was not prepared; name it in prepare before compiling"
                )
        if not self.prepared and _is_compiled(self.model):
            raise RuntimeError(
                "steer: the model is already compiled, so a new hook would be ignored; call prepare(model) before compiling"
            )

    def check_positions(self, plans: list[Plan], lengths: tuple[int, ...] | None) -> None:
        """Refuse positions that this model could never show, and two lengths of one prompt."""
        others = {h.prompt_length for h in self.handles if h.prompt_length is not None}
        if lengths is not None and others - {lengths}:
            raise ValueError(
                f"steer: prompt_length {lengths} differs from {others.pop()} of a handle that is active; a prompt has one length"
            )
        named = [plan for plan in plans if not isinstance(plan.positions, str) or plan.positions != "all"]
        if not named:
            return
        if not self._keeps_cache:
            raise ValueError(
                f"steer: positions={named[0].positions!r} needs a cache of keys and values to count tokens; {self.layers.name} "
                'keeps another state: use positions="all"'
            )
        if not hasattr(self.model, "generate") and lengths is None:
            raise ValueError(
                f"steer: positions={named[0].positions!r} on a bare decoder ({self.layers.name}) needs prompt_length=, because "
                "generate runs on the model around it; steer that model instead"
            )

    @torch.inference_mode(False)
    def attach(self, handle: Steering) -> None:
        """Give each plan its slots, the same in every layer, and start steering."""
        layouts = [_Layout([], {}) if plan is None else self._layout(plan) for plan in handle.plans]
        wanted: dict[Place, dict[int, Intervention]] = {}
        vars(self.model)[_ATTRIBUTE] = self
        try:
            for layout in layouts:
                width = len(layout.columns)
                first = self._runs.take(width, "slots") if width else 0
                handle.slots.append(tuple(range(first, first + width)))
                for place, edits in layout.edits.items():
                    wanted.setdefault(place, {}).update({first + column: edit for column, edit in edits.items()})
                for slot, gate in enumerate(layout.columns, first):
                    if gate is not None:
                        self._install(handle, slot, *gate)
                        wanted.setdefault(gate[1], {})
            for place in wanted:
                self._dispatcher(place)
            for (
                place,
                dispatcher,
            ) in self.dispatchers.items():  # the row table is shared: every bank must know every slot
                dispatcher.put(wanted.get(place, {}), 1 + max(slot for slots in handle.slots for slot in slots))
                dispatcher.judges = self.gates.at(place)
            self._watch()
            self.handles.append(handle)
            self.refresh()
            self._shadow()
        except BaseException:
            self.detach(handle)
            raise

    @torch.inference_mode(False)
    def detach(self, handle: Steering) -> None:
        """Release the slots of a handle; with the last one go the hooks and the shadow of generate."""
        if handle in self.handles:
            self.handles.remove(handle)
        if not self.handles:
            self._unhook()
        for slots in handle.slots:
            if slots:
                self._runs.give(slots[0], len(slots))
        self.gates.drop([slot for slots in handle.slots for slot in slots])
        for place, dispatcher in list(self.dispatchers.items()):
            dispatcher.take([slot for slots in handle.slots for slot in slots])
            dispatcher.judges = self.gates.at(place)
            if not dispatcher.edits and not dispatcher.judges and not self.prepared:
                dispatcher.hook.remove()
                del self.dispatchers[place]
        for slots in handle.slots:
            self._forget(slots)
        if self.handles:
            self.refresh()

    def _unhook(self) -> None:
        """Nothing is steered any more: whatever else happens, the model is itself again."""
        self._prompt, self._table, self.now, self._unplaced = None, None, IDLE, False
        self._broadcasts.clear()
        self._prompts.clear()
        for name, (original, own) in self._originals.items():
            if own:
                setattr(self.model, name, original)
            else:
                vars(self.model).pop(name, None)
        self._originals.clear()
        if self._batching and _cached_manager(self.model) is not None:  # its prefix cache is steered
            self.model.destroy_cached_continuous_batching_manager()  # type: ignore[operator]
        self._batching = False
        if self._fixed is not None:
            self._fixed.clear()
            return
        for dispatcher in self.dispatchers.values():
            dispatcher.hook.remove()
        self.dispatchers.clear()
        while self._hooks:
            self._hooks.pop().remove()
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

    @torch.inference_mode(False)
    def refresh(self) -> None:
        """Rebuild the table of the batch that is running: a handle came, went, or changed its strength."""
        self._broadcasts.clear()
        highest = max((slot for handle in self.handles for slots in handle.slots for slot in slots), default=0)
        if self._device_counts is None or self._device_counts.shape[0] < highest + 2:
            counts = torch.zeros(highest + 2, dtype=torch.int64, device=self._device)
            if self._device_counts is not None:
                counts[: self._device_counts.shape[0]] = self._device_counts
            self._device_counts = counts
        if self._prompt is not None:
            self._build(self._prompt)
        else:
            self._publish_unprompted()

    def counted(self, slot: int) -> int:
        """Tokens that a slot has been applied to."""
        on_device = 0 if self._device_counts is None else int(self._device_counts[slot + 1])
        return self._host_counts.get(slot, 0) + on_device

    def columns(self, slots: Container[int]) -> list[tuple[int, int]]:
        """(column, slot) of those slots that the row table of this pass names."""
        if self.now.owners is not None:
            return [(column, slot) for column, (slot, _) in enumerate(self.now.owners) if slot in slots]
        found, before = [], 0
        for handle in self.handles:
            places = {slot: before + i for chain in handle.slots for i, slot in enumerate(chain)}
            found += [(column, slot) for slot, column in places.items() if slot in slots]
            before += max(len(chain) for chain in handle.slots)
        return found

    def broadcast(self, now: Pass) -> tuple[Tensor, Tensor]:
        """The owners of a pass that treats every token alike, as tables with one row."""
        owners = now.owners or ()
        if owners not in self._broadcasts:
            slots, scales = zip(*owners, strict=True)
            self._broadcasts[owners] = (
                torch.tensor([slots], dtype=torch.int32, device=self._device),
                torch.tensor([scales], dtype=torch.float32, device=self._device),
            )
        return self._broadcasts[owners]

    def _places(self, plan: Plan) -> dict[Place, tuple[Intervention, ...]]:
        """(site, layer) to chain, layers counted from 0; two names of one layer are one chain."""
        merged: dict[Place, tuple[Intervention, ...]] = {}
        for (site, layer), chain in plan.edits.items():
            place = site, self.layers.resolve(layer, "steer")
            merged[place] = merged.get(place, ()) + chain
        return merged

    def _layout(self, plan: Plan) -> _Layout:
        """The columns that a plan needs in a row table, shared by all its places as far as their conditions agree."""
        layout = _Layout([], {})
        for place, chain in self._places(plan).items():
            free = 0
            for edit in chain:
                gate = (edit, self._read_at(edit, place)) if isinstance(edit, When) else None
                column = layout.find(gate, free)
                layout.edits.setdefault(place, {})[column] = edit
                free = column + 1
        return layout

    def _read_at(self, when: When, place: Place) -> Place:
        """Where a condition of an intervention at `place` is read."""
        if self.prepared:
            raise ValueError(
                f"steer: {when!r} on a prepared model; conditions are read by hooks that a compiled graph does not hold: "
                "steer a model that has not been prepared"
            )
        if when.layer is None:
            return place
        read = "resid_post", self.layers.resolve(when.layer, "steer")
        if read[1] > place[1] or (read[1] == place[1] and place[0] != read[0]):
            raise ValueError(
                f"steer: {when!r} stands at {place[0]} {place[1]}, before layer {read[1]} where its condition is read; name "
                "that layer or an earlier one"
            )
        if self.layers.point(read[1], read[0], "steer").width != when.width:
            raise ValueError(f"steer: the condition of {when!r} does not have the width of {read[0]} {read[1]}")
        return read

    def _install(self, handle: Steering, slot: int, when: When, place: Place) -> None:
        self.gates.add(slot, when, place)
        handle.gated.add(slot)
        if not when.per_token:
            handle.latched.add(slot)

    def _dispatcher(self, place: Place) -> Dispatcher:
        if place not in self.dispatchers:
            point = self.layers.point(place[1], place[0], "steer")
            empty = Bank(point.width, 1, 0, *_storage(self.layers.blocks[place[1]], self.model))
            self.dispatchers[place] = Dispatcher(self, place, point, empty, fixed=False)
        return self.dispatchers[place]

    def _forget(self, slots: tuple[int, ...]) -> None:
        for slot in slots:
            self._host_counts.pop(slot, None)
            if self._device_counts is not None and slot + 1 < self._device_counts.shape[0]:
                self._device_counts[slot + 1] = 0

    # --- one forward pass --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Hook the decoder and, where it is nested, the model around it."""
        if not self._hooks:
            self._hooks.append(self._decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hooks.append(self._decoder.register_forward_hook(self._end, with_kwargs=True))
            if self.model is not self._decoder:
                names = list(inspect.signature(self.model.forward).parameters)
                note = partial(self._note_mask, names)
                self._hooks.append(self.model.register_forward_pre_hook(note, with_kwargs=True))

    def _note_mask(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the whole model runs: some (Gemma 3 with images) hand their decoder a prepared mask."""
        self._mask = by_name(names, args, kwargs).get("attention_mask")

    def _given_mask(self, inputs: dict[str, Any]) -> Any:
        """The mask of this pass in the form that shows padding, if any form of it does."""
        given, self._mask = self._mask, None
        mask = inputs.get("attention_mask")
        return mask if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2) or given is mask else given

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs: decide who owns which token of this pass."""
        if torch.compiler.is_compiling():
            self.now = self._traced(by_name(self._names, args, kwargs))
            return
        if not self.handles:
            self.now = IDLE
            return
        inputs = by_name(self._names, args, kwargs)
        mask = self._given_mask(inputs)
        tokens = tokens_of(inputs)
        batch, count = tokens.shape[:2]
        if inputs.keys() >= PAGED:
            self.now = self._for_all_requests(tokens)
            self._count(self.now, batch * count)
            return
        if self._generating not in (None, threading.get_ident()):
            raise RuntimeError(
                "steer: the model runs in two threads at once, and only one of them can be inside generate"
            )
        start = past_length(inputs)
        table = self._table if self._generating else self._bare(batch, count, start, inputs, mask)
        if table is None:
            raise RuntimeError("steer: the model runs inside generate, but no prompt was announced")
        if not self._keeps_cache and not bool(table.prompt.valid.all()):
            raise ValueError(
                f"steer: {self.layers.name} keeps a state that hides which tokens are padding; run its prompts unpadded"
            )
        self.now = table.at(start, count, batch) if isinstance(start, int) else table.gather(start, count, batch)
        if self.gates:
            self.gates.begin(table, start, count, batch)
        self._count(self.now, batch * count)

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder ran: a cache that it filled belongs to the prompt that it read."""
        if torch.compiler.is_compiling() or self._generating or self._prompt is None:
            return
        found = cache_in(output) if isinstance(output, Mapping) else None
        if found is not None:
            self._prompts[found[1]] = self._prompt

    @torch.inference_mode(False)
    def _bare(self, batch: int, count: int, start: int | Tensor, inputs: dict[str, Any], mask: Any) -> Table:
        """The table of a forward pass outside generate."""
        found = cache_in(inputs)
        known = None if found is None else self._prompts.get(found[1])
        if isinstance(start, Tensor) and known is None:
            start = int(start)  # once per prompt: a static cache that we have not seen may be empty or not
        if known is not None and known.batch == batch and (isinstance(start, Tensor) or start > 0):
            return self._table_for(known)
        valid = valid_tokens(mask, batch, int(start) + count)
        given = next((h.prompt_length for h in self.handles if h.prompt_length is not None), None)
        if given is None:
            lengths = None if int(start) > 0 else torch.where(valid, torch.arange(1, valid.shape[1] + 1), 0).amax(1)
        else:
            lengths = _per_row(given, batch)
            valid = nn.functional.pad(valid, (0, max(0, int(lengths.max()) - valid.shape[1])), value=True)
        prompt = Prompt(valid, lengths)
        return self._table_for(self._prompt if self._prompt is not None and _same(self._prompt, prompt) else prompt)

    def _table_for(self, prompt: Prompt) -> Table:
        return self._table if prompt is self._prompt and self._table is not None else self._build(prompt)

    def _for_all_requests(self, tokens: Tensor) -> Pass:
        """A pass of continuous batching: (1, tokens) of several requests, and nothing that tells them apart."""
        self._check_paged()
        if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(_GRAPHS)
        pairs = [(slot, h.strength[0]) for h in self.handles for slot in h.slots[0] if h.strength[0] != 0.0]
        if self.now.owners != tuple(pairs):
            self.now = Pass(tuple(pairs))
        return self.now

    def _check_paged(self) -> None:
        """Refuse what continuous batching cannot follow."""
        for handle in self.handles:
            if handle.per_row:
                raise ValueError(
                    "steer: continuous batching mixes requests in one row and does not say whose token is whose, so a "
                    "plan per row cannot be followed; give one plan for all requests, or use generate"
                )
            if (positions := next(p.positions for p in handle.plans if p is not None)) != "all":
                raise ValueError(
                    f"steer: positions={positions!r} needs to know where each prompt ends, which continuous batching does "
                    "not show; use positions='all', or generate"
                )
        if self.gates:
            raise ValueError(
                "steer: a condition needs to know which request a token belongs to, which continuous batching does not "
                "show; use generate"
            )

    def _build(self, prompt: Prompt) -> Table:
        table = Table(prompt, [handle.layer(prompt.batch) for handle in self.handles], self._device)
        self._prompt, self._table = prompt, table
        return table

    @torch.inference_mode(False)
    def _count(self, now: Pass, tokens: int) -> None:
        if now.owners is not None:
            for slot, _ in now.owners:
                self._host_counts[slot] = self._host_counts.get(slot, 0) + tokens
        elif now.rows is not None and self._device_counts is not None:
            owned = now.rows.flatten().long() + 1
            if self._ones.shape[0] < owned.shape[0] or self._ones.device != owned.device:
                self._ones = torch.ones(owned.shape[0], dtype=torch.int64, device=owned.device)
            self._device_counts.index_add_(0, owned, self._ones[: owned.shape[0]])

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Shadow of the model's generate: announces the prompt, then runs the real one."""
        generate = self._originals["generate"][0]
        if self._generating == threading.get_ident():  # a model that is its own assistant generates inside generate
            return generate(*args, **kwargs)
        if self._generating is not None:
            raise RuntimeError(
                "steer: generate is running in another thread; a steered model generates one batch at a time"
            )
        prompt, copies = announced(self.model, args, kwargs)
        self._generating = threading.get_ident()
        try:
            with torch.inference_mode(False):
                table = self._build(prompt)
                if self._fixed is not None:
                    self._unplaced = False
                    self._fixed.publish(table, copies)
            return generate(*args, **kwargs)
        finally:
            self._generating = None
            self._prompt, self._table, self.now = None, None, IDLE
            if self.handles:
                with torch.inference_mode(False):
                    self._publish_unprompted()

    def _init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Shadow of the entry of continuous batching: what its thread could not follow is refused here."""
        self._check_paged()
        if _cached_manager(self.model) is not None:
            raise RuntimeError(
                "steer: a cached manager of continuous batching keeps keys and values of requests that ran under another "
                "plan; call model.destroy_cached_continuous_batching_manager() first"
            )
        self._batching = True
        kind: Any = type(self.model)
        manager = kind.init_continuous_batching(self.model, *args, **kwargs)
        if self._device.type == "cuda" and _uses_graphs(manager):
            raise RuntimeError(_GRAPHS)
        return manager

    # --- under torch.compile -----------------------------------------------------------------------------------------

    def prepare(self, points: list[Place], batch: int, length: int, slots: int, directions: int, rank: int) -> None:
        """Install inert dispatchers with banks of fixed size and a row table at a fixed address."""
        if self.prepared:
            raise RuntimeError(
                "prepare: the model is already prepared; a second time would change what a compiled graph has seen"
            )
        if _is_compiled(self.model):
            raise RuntimeError("prepare: the model is already compiled; call prepare before torch.compile")
        found = {place: self.layers.point(place[1], place[0], "prepare") for place in points}
        banks = {
            place: Bank(point.width, slots, directions, *_storage(self.layers.blocks[place[1]], self.model), rank=rank)
            for place, point in found.items()
        }
        for place, point in found.items():
            self.dispatchers[place] = Dispatcher(self, place, point, banks[place], fixed=True)
        self._runs = Runs(slots)
        self._fixed = FixedTable(batch, length, self._device)
        self._device_counts = torch.zeros(slots + 1, dtype=torch.int64, device=self._device)
        self._watch()
        vars(self.model)[_ATTRIBUTE] = self

    def _traced(self, inputs: dict[str, Any]) -> Pass:
        """The pass as a part of the compiled graph: a gather from the table that `generate` or `refresh` fills."""
        if self._fixed is None:
            raise RuntimeError("steer: the model is being compiled; call prepare(model) before torch.compile")
        if self._unplaced:
            raise RuntimeError(
                "steer: a compiled pass outside generate does not show its prompt; pass prompt_length= to steer"
            )
        tokens, mask = tokens_of(inputs), self._given_mask(inputs)
        batch, count = tokens.shape[:2]
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        now = self._fixed.gather(past_length(inputs), batch, count, mask)
        owned = now.rows.flatten().long() + 1  # type: ignore[union-attr]  # a fixed table is a table
        self._device_counts.index_add_(0, owned, torch.ones_like(owned))  # type: ignore[union-attr]
        return now

    def _publish_unprompted(self) -> None:
        """Fill the buffers for bare compiled passes: what prompt_length, or positions="all", says without a prompt."""
        if self._fixed is None:
            return
        self._fixed.clear()
        given = next((h.prompt_length for h in self.handles if h.prompt_length is not None), None)
        plans = [plan for handle in self.handles for plan in handle.plans if plan is not None]
        self._unplaced = given is None and any(not isinstance(p.positions, str) or p.positions != "all" for p in plans)
        if self._unplaced or not self.handles:
            return
        rows = next((len(handle.plans) for handle in self.handles if handle.per_row), self._fixed.batch)
        lengths = None if given is None else _per_row(given, rows)
        valid = torch.ones(rows, 0 if lengths is None else int(lengths.max()), dtype=torch.bool)
        layers = [handle.layer(rows) for handle in self.handles]
        self._fixed.publish(Table(Prompt(valid, lengths), layers, self._device), copies=1)

    @property
    def _device(self) -> torch.device:
        return _storage(self.layers.blocks[0], self.model)[1]


@dataclass
class _Layout:
    """Columns of a row table, each with the condition (and the place it is read at) that all its slots share, or None."""

    columns: list[tuple[When, Place] | None]
    edits: dict[Place, dict[int, Intervention]]

    def find(self, gate: tuple[When, Place] | None, first: int) -> int:
        """The first column from `first` on with this condition; a new one at the end if there is none."""
        for column in range(first, len(self.columns)):
            if _same_gate(self.columns[column], gate):
                return column
        self.columns.append(gate)
        return len(self.columns) - 1


def _same_gate(one: tuple[When, Place] | None, other: tuple[When, Place] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one[1] == other[1] and type(one[0]) is type(other[0]) and one[0].condition is other[0].condition


def _is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model, or generate's own copy of its forward, has been compiled."""
    if getattr(model, "_compiled_call", None) is not None:
        return True
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )


def _storage(block: nn.Module, model: nn.Module) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the stream at a block."""
    for parameter in block.parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            device: Any = parameter.device
            if device.type == "meta":  # accelerate keeps the weights elsewhere until the block runs
                device = getattr(getattr(block, "_hf_hook", None), "execution_device", None)
                if device is None:
                    raise ValueError(f"steer: {type(model).__name__} has weights on the meta device; load them first")
            return parameter.dtype, torch.device(device)
    raise ValueError(
        f"steer: {type(block).__name__} of {type(model).__name__} holds no floating parameter that shows the stream's dtype"
    )


def _same(one: Prompt, other: Prompt) -> bool:
    if (one.starts is None) != (other.starts is None) or not torch.equal(one.valid, other.valid):
        return False
    return one.starts is None or other.starts is None or torch.equal(one.starts, other.starts)


def _per_row(lengths: tuple[int, ...], batch: int) -> Tensor:
    if len(lengths) not in (1, batch):
        raise ValueError(f"steer: prompt_length names {len(lengths)} rows; this batch has {batch}")
    return torch.tensor(lengths).expand(batch).clone()


def _cached_manager(model: nn.Module) -> Any:
    """The manager that generate_batch(persistent_manager=True) has left on a model."""
    return vars(model).get("_cached_continuous_batching_manager")


def _uses_graphs(manager: Any) -> bool:
    """Whether a manager of continuous batching may record CUDA graphs; one that has not decided yet may."""
    config = getattr(manager, "continuous_batching_config", manager)
    used = getattr(config, "use_cuda_graph", None)
    return any(used) if isinstance(used, tuple) else used is not False
