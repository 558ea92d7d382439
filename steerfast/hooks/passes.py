"""The forward passes of a model: which token of the running one is steered by whom.

That is decided once per pass, by a hook on the decoder, and read by every dispatcher. What a pass needs to know of its
prompt comes from `generate`, which announces it, or from the pass itself (see `steerfast.hooks.positions`).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Container, Mapping
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerfast.models.caches import PAGED, cache_in, keeps_cache, past_length
from steerfast.models.layers import Layers, stream_storage

from .attachment import Attachment
from .compiled import FixedTable
from .continuous import pass_for_all
from .gates import Gates
from .generation import by_name, tokens_of, valid_tokens
from .positions import IDLE, Owners, Pass, Prompt, Table, lengths_per_row


class Passes:
    """What the dispatchers of one model see of the batch that is running.

    Attributes:
        attachments: What is attached, in the order in which it acts.
        now: The running pass.
        gates: What the conditions have decided.
        fixed: The row table of a prepared model; None: not prepared.
        generating: The thread that is inside generate.
    """

    def __init__(self, model: nn.Module, layers: Layers) -> None:
        self.attachments: list[Attachment] = []
        self.now: Pass = IDLE
        self.gates = Gates()
        self.fixed: FixedTable | None = None
        self.generating: int | None = None
        self.decoder = model.get_submodule(layers.path.rpartition(".")[0])
        self.keeps_cache = keeps_cache(model, self.decoder)
        self._model, self._layers = model, layers
        self._names = list(inspect.signature(self.decoder.forward).parameters)
        self._hooks: list[RemovableHandle] = []  # on the decoder, and on the model around it
        self._mask: Any = None  # as the model around the decoder was given it, not yet prepared
        self._prompt: Prompt | None = None
        self._table: Table | None = None
        self._prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()  # by the cache that a bare pass filled
        self._broadcasts: dict[Owners, tuple[Tensor, Tensor]] = {}
        self._host_counts: dict[int, int] = {}
        self._device_counts: Tensor | None = None
        self._ones = torch.empty(0)

    @property
    def device(self) -> torch.device:
        """Where the stream enters the first block, and where tables are needed."""
        return stream_storage(self._layers.blocks[0], self._model)[1]

    # --- watching ----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Hook the decoder and, where it is nested, the model around it."""
        if not self._hooks:
            self._hooks.append(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
            self._hooks.append(self.decoder.register_forward_hook(self._end, with_kwargs=True))
            if self._model is not self.decoder:
                names = list(inspect.signature(self._model.forward).parameters)
                note = partial(self._note_mask, names)
                self._hooks.append(self._model.register_forward_pre_hook(note, with_kwargs=True))

    def unwatch(self) -> None:
        """Take the hooks off again."""
        while self._hooks:
            self._hooks.pop().remove()

    def forget(self) -> None:
        """Nothing is attached any more: no prompt, no table, nobody is steered."""
        self._prompt, self._table, self.now = None, None, IDLE
        self._broadcasts.clear()
        self._prompts.clear()
        if self.fixed is not None:
            self.fixed.unplaced = False
            self.fixed.clear()

    @torch.inference_mode(False)
    def refresh(self) -> None:
        """Rebuild the table of the batch that is running: something was attached, detached, or changed its strength."""
        self._broadcasts.clear()
        highest = max((slot for one in self.attachments for slot in one.all_slots), default=0)
        self.make_counts(highest + 2)
        if self._prompt is not None:
            self._build(self._prompt)
        elif self.fixed is not None:
            self.fixed.publish_unprompted(self.attachments)

    @torch.inference_mode(False)
    def announce(self, prompt: Prompt, copies: int) -> None:
        """Generate begins with this prompt, each of its rows repeated `copies` times."""
        table = self._build(prompt)
        if self.fixed is not None:
            self.fixed.unplaced = False
            self.fixed.publish(table, copies)

    @torch.inference_mode(False)
    def retract(self) -> None:
        """Generate has ended."""
        self._prompt, self._table, self.now = None, None, IDLE
        if self.attachments and self.fixed is not None:
            self.fixed.publish_unprompted(self.attachments)

    # --- what dispatchers and handles ask ----------------------------------------------------------------------------

    def columns(self, slots: Container[int]) -> list[tuple[int, int]]:
        """(column, slot) of those slots that the row table of this pass names."""
        if self.now.owners is not None:
            return [(column, slot) for column, (slot, _) in enumerate(self.now.owners) if slot in slots]
        found, before = [], 0
        for one in self.attachments:
            places = {slot: before + i for chain in one.slots for i, slot in enumerate(chain)}
            found += [(column, slot) for slot, column in places.items() if slot in slots]
            before += max(len(chain) for chain in one.slots)
        return found

    def broadcast(self, now: Pass) -> tuple[Tensor, Tensor]:
        """The owners of a pass that treats every token alike, as tables with one row."""
        owners = now.owners or ()
        if owners not in self._broadcasts:
            slots, scales = zip(*owners, strict=True)
            self._broadcasts[owners] = (
                torch.tensor([slots], dtype=torch.int32, device=self.device),
                torch.tensor([scales], dtype=torch.float32, device=self.device),
            )
        return self._broadcasts[owners]

    def counted(self, slot: int) -> int:
        """Tokens that a slot has been applied to."""
        on_device = 0 if self._device_counts is None else int(self._device_counts[slot + 1])
        return self._host_counts.get(slot, 0) + on_device

    def make_counts(self, size: int) -> None:
        """Room on the device for the tokens of that many slots; what is there is kept."""
        if self._device_counts is None or self._device_counts.shape[0] < size:
            counts = torch.zeros(size, dtype=torch.int64, device=self.device)
            if self._device_counts is not None:
                counts[: self._device_counts.shape[0]] = self._device_counts
            self._device_counts = counts

    def clear_counts(self, slots: list[int]) -> None:
        """The next owner of these slots counts from zero."""
        for slot in slots:
            self._host_counts.pop(slot, None)
            if self._device_counts is not None and slot + 1 < self._device_counts.shape[0]:
                self._device_counts[slot + 1] = 0

    # --- one pass ----------------------------------------------------------------------------------------------------

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
        if not self.attachments:
            self.now = IDLE
            return
        inputs = by_name(self._names, args, kwargs)
        mask = self._given_mask(inputs)
        tokens = tokens_of(inputs)
        batch, count = tokens.shape[:2]
        if inputs.keys() >= PAGED:
            self.now = pass_for_all(self.attachments, bool(self.gates), tokens, self.now)
            self._count(self.now, batch * count)
            return
        if self.generating not in (None, threading.get_ident()):
            raise RuntimeError(
                "steer: the model runs in two threads at once, and only one of them can be inside generate"
            )
        start = past_length(inputs)
        table = self._table if self.generating else self._bare(batch, count, start, inputs, mask)
        if table is None:
            raise RuntimeError("steer: the model runs inside generate, but no prompt was announced")
        if not self.keeps_cache and not bool(table.prompt.valid.all()):
            raise ValueError(
                f"steer: {self._layers.name} keeps a state that hides which tokens are padding; run its prompts unpadded"
            )
        self.now = table.at(start, count, batch) if isinstance(start, int) else table.gather(start, count, batch)
        if self.gates:
            self.gates.begin(table, start, count, batch)
        self._count(self.now, batch * count)

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder ran: a cache that it filled belongs to the prompt that it read."""
        if torch.compiler.is_compiling() or self.generating or self._prompt is None:
            return
        found = cache_in(output) if isinstance(output, Mapping) else None
        if found is not None:
            self._prompts[found[1]] = self._prompt

    def _traced(self, inputs: dict[str, Any]) -> Pass:
        """The pass as a part of the compiled graph: a gather from the table that `announce` or `refresh` fills."""
        if self.fixed is None:
            raise RuntimeError("steer: the model is being compiled; call prepare(model) before torch.compile")
        now = self.fixed.trace(past_length(inputs), tokens_of(inputs), self._given_mask(inputs))
        owned = now.rows.flatten().long() + 1  # type: ignore[union-attr]  # a fixed table is a table
        self._device_counts.index_add_(0, owned, torch.ones_like(owned))  # type: ignore[union-attr]
        return now

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
        given = next((one.prompt_length for one in self.attachments if one.prompt_length is not None), None)
        if given is None:
            lengths = None if int(start) > 0 else torch.where(valid, torch.arange(1, valid.shape[1] + 1), 0).amax(1)
        else:
            lengths = lengths_per_row(given, batch)
            valid = nn.functional.pad(valid, (0, max(0, int(lengths.max()) - valid.shape[1])), value=True)
        prompt = Prompt(valid, lengths)
        return self._table_for(self._prompt if self._prompt is not None and _same(self._prompt, prompt) else prompt)

    def _table_for(self, prompt: Prompt) -> Table:
        return self._table if prompt is self._prompt and self._table is not None else self._build(prompt)

    def _build(self, prompt: Prompt) -> Table:
        table = Table(prompt, [one.layer(prompt.batch) for one in self.attachments], self.device)
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


def _same(one: Prompt, other: Prompt) -> bool:
    if (one.starts is None) != (other.starts is None) or not torch.equal(one.valid, other.valid):
        return False
    return one.starts is None or other.starts is None or torch.equal(one.starts, other.starts)
