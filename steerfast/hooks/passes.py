"""The forward passes of a model: which token of the running one is steered by which slot.

That is decided once per pass, by a hook on the decoder, and read by every dispatcher. What a pass needs to know of its
prompt comes from `generate`, which announces it, or from the pass itself (see `steerfast.hooks.positions`). Each thread has
a `Call` of its own, so that two threads in one model do not meet.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerfast._positions import Selector
from steerfast.models.caches import PAGED, cache_in, keeps_cache, past_length
from steerfast.models.layers import Layers, stream_storage
from steerfast.models.proof import Proof
from steerfast.plan import needs_prompt, rule_of

from .attachment import Attachment
from .bookkeeping import bookkeeping, refuse_tracing
from .compiled import FixedTable, lengths_per_row
from .continuous import pass_for_all
from .gates import Conditions, Gates
from .generation import by_name, tokens_of, valid_tokens
from .positions import IDLE, Owners, Pass, Table
from .prompts import Prompt
from .recomputing import THREADS, Recomputing, Thread

_UNSEEN = object()


@dataclass(eq=False)
class Call:
    """What one thread runs: its prompt, its table, and its running pass.

    Attributes:
        gates: What the conditions have decided.
        thread: What else that thread runs.
        now: The running pass.
        shape: (rows, tokens) of the stream in it.
        prompt: The batch of prompts; None: none is known.
        table: Its owners.
        announced: Whether generate announced the prompt.
        ran: The dispatchers that the running pass has reached.
    """

    gates: Gates
    thread: Thread
    now: Pass = IDLE
    shape: tuple[int, int] = (0, 0)
    prompt: Prompt | None = None
    table: Table | None = None
    announced: bool = False
    ran: set[Any] = field(default_factory=set)
    start: int | Tensor = 0  # position of the running pass's first token
    done: int = 0  # positions of the announced prompt that have run
    seen: int = 0  # those that have been counted
    version: int = 0  # of what is attached, when the table was built
    given_mask: Any = _UNSEEN  # as the model around the decoder was given it, not yet prepared
    given_ids: Tensor | None = (
        None  # as that model was given them; None: it was given none, or the decoder is the model
    )


class _Threads(threading.local):
    """The call of each thread that asks."""

    def __init__(self, conditions: Conditions) -> None:
        self.call = Call(Gates(conditions), THREADS.own)


class Passes:
    """What the dispatchers of one model see of the batches that are running.

    Attributes:
        attachments: What is attached, in the order in which it acts.
        conditions: The conditions of what is attached.
        fixed: The row table of a prepared model; None: not prepared.
        threads: `threads.call` is what this thread runs.
        traced: The pass that a prepared model's dispatchers apply.
        generating: The thread that is inside generate.
        dispatchers: How many places have an edit.
    """

    def __init__(self, model: nn.Module, layers: Layers, proof: Proof) -> None:
        self.attachments: list[Attachment] = []
        self.conditions: Conditions = {}
        self.fixed: FixedTable | None = None
        self.traced: Pass = IDLE
        self.generating: int | None = None
        self.dispatchers = 0
        self.decoder = model.get_submodule(layers.path.rpartition(".")[0])
        self.recomputing = Recomputing(self.decoder)
        self.keeps_cache = keeps_cache(model, self.decoder)
        self.threads = _Threads(self.conditions)
        self.latest = self.threads.call  # of any thread
        self._model, self._layers, self._proof = model, layers, proof
        self._names = list(inspect.signature(self.decoder.forward).parameters)
        self._hooks: list[RemovableHandle] = []  # on the decoder, and on the model around it
        self._version = 0
        self._prompts: WeakKeyDictionary[Any, Prompt] = WeakKeyDictionary()  # by the cache that a bare pass filled
        self._broadcasts: dict[Owners, tuple[Tensor, Tensor]] = {}
        self._host_counts: dict[int, int] = {}
        self._device_counts: Tensor | None = None
        self._ones = torch.empty(0, device="cpu")

    def __reduce__(self) -> Any:
        raise RuntimeError("steer: a model cannot be copied or pickled while it is steered or prepared; do that first")

    @property
    def device(self) -> torch.device:
        """Where the stream enters the first block, and where tables are needed."""
        return stream_storage(self._layers.blocks[0], self._model)[1]

    @property
    def width(self) -> int:
        """The most slots that a row of what is attached names."""
        return sum(max(len(chain) for chain in one.slots) for one in self.attachments)

    # --- watching ----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Hook the decoder and, where it is nested, the model around it."""
        if not self._hooks:
            self._hooks.append(self.decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
            after = self.decoder.register_forward_hook(self._end, with_kwargs=True, always_call=True)
            self._hooks.append(after)  # a reader may have left the pass once it had seen enough
            if self._model is not self.decoder:
                names = list(inspect.signature(self._model.forward).parameters)
                note = partial(self._note_given, names)
                self._hooks.append(self._model.register_forward_pre_hook(note, with_kwargs=True))

    def unwatch(self) -> None:
        """Take the hooks off again."""
        self.recomputing.end()
        while self._hooks:
            self._hooks.pop().remove()

    def forget(self) -> None:
        """Nothing is attached any more: no prompt, no table."""
        self._version += 1
        self.threads = _Threads(self.conditions)
        self._broadcasts.clear()
        self._prompts.clear()
        self.traced = IDLE
        if self.fixed is not None:
            self.fixed.unplaced = self.fixed.by_token = False
            self.fixed.clear()

    @bookkeeping
    def refresh(self) -> None:
        """What is attached has changed: this thread's table is built anew now, those of others when they run next."""
        self._version += 1
        self._broadcasts.clear()
        self.make_counts(2 + max((slot for one in self.attachments for slot in one.all_slots), default=0))
        call = self.threads.call
        if call.prompt is not None:
            self._build(call, call.prompt)
        elif self.fixed is not None:
            self.fixed.publish_unprompted(self.attachments)

    @bookkeeping
    def announce(self, prompt: Prompt, copies: int) -> None:
        """Generate begins with this prompt, each of its rows repeated `copies` times."""
        call = self.threads.call = Call(Gates(self.conditions), THREADS.own, announced=True)
        table = self._build(call, prompt)
        if self.fixed is not None:
            self.fixed.unplaced = self.fixed.by_token = False
            self.fixed.publish(table, copies)

    @bookkeeping
    def retract(self) -> None:
        """Generate has ended."""
        self.threads.call = Call(Gates(self.conditions), THREADS.own)
        self.traced = IDLE
        if self.attachments and self.fixed is not None:
            self.fixed.publish_unprompted(self.attachments)

    # --- what dispatchers and handles ask ----------------------------------------------------------------------------

    def columns(self, now: Pass, slots: Container[int]) -> list[tuple[int, int]]:
        """(column, slot) of those slots that the row table of a pass names."""
        if now.owners is not None:
            return [(column, slot) for column, (slot, _) in enumerate(now.owners) if slot in slots]
        found, before = [], 0
        for one in self.attachments:
            places = {
                slot: before + i
                for chain in one.slots
                for i, first in enumerate(chain)
                for slot in one.numbers([first])
            }
            found += [(column, slot) for slot, column in places.items() if slot in slots]
            before += max(len(chain) for chain in one.slots)
        return found

    @bookkeeping
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

    def decision(self, slot: int) -> Tensor | None:
        """bool (batch,) on the CPU: what a latched condition decided in the pass that began last."""
        return self.latest.gates.decision(slot)

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

    def _note_given(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the whole model runs: its decoder may see a prepared mask, and embeddings with tokens of another's."""
        if torch.compiler.is_compiling() or not self.attachments:
            return
        inputs, call = by_name(names, args, kwargs), self.threads.call
        call.given_mask = inputs.get("attention_mask")
        ids = inputs.get("input_ids")
        call.given_ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs: decide who owns which token of this pass."""
        if torch.compiler.is_compiling():
            self.traced = self._trace(by_name(self._names, args, kwargs))
            return
        call = self.latest = self.threads.call
        call.ran.clear()
        if not self.attachments:
            call.now = self.traced = IDLE
            return
        self.recomputing.begin(follow=self.fixed is None)
        refuse_tracing()
        inputs = by_name(self._names, args, kwargs)
        mask, call.given_mask = _mask(inputs, call.given_mask), _UNSEEN
        tokens = tokens_of(inputs)
        call.shape = batch, count = tokens.shape[0], tokens.shape[1]
        ids = call.given_ids if tokens.is_floating_point() else tokens
        if inputs.keys() >= PAGED:
            call.now = pass_for_all(self.attachments, bool(self.conditions), tokens, call.now)
            return
        if self.generating not in (None, threading.get_ident()):
            raise RuntimeError(
                "steer: the model runs in two threads at once, and only one of them can be inside generate"
            )
        given = call.given_ids
        if given is not None and count > given.shape[1] + self._proof.virtual:
            raise RuntimeError(
                f"steer: {self._layers.name} runs {count} tokens where it is given {given.shape[1]} ids; which of them are "
                "the text's cannot be said"
            )
        if call.version != self._version and call.prompt is not None:
            self._build(call, call.prompt)
        if call.announced:
            table = self._generated(call, inputs, batch, count)
        else:
            table = self._bare(call, inputs, mask, batch, count)
        start = call.start
        call.now = (
            table.at(start, count, batch, ids) if isinstance(start, int) else table.gather(start, count, batch, ids)
        )
        self.traced = call.now
        if self.conditions:
            call.gates.begin(table, start, count, batch)

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder ran: its tokens are counted, and a cache that it filled belongs to the prompt that it read."""
        if torch.compiler.is_compiling() or not self.attachments:
            return
        call = self.threads.call
        if call.ran or self.fixed is not None:  # compiled blocks do not say that they ran
            self._count(call)
        if call.announced or call.prompt is None:
            return
        found = cache_in(output) if isinstance(output, Mapping) else None
        if found is not None:
            self._prompts[found[1]] = call.prompt

    def _trace(self, inputs: dict[str, Any]) -> Pass:
        """The pass as a part of the compiled graph: a gather from the table that `announce` or `refresh` fills."""
        if self.fixed is None:
            raise RuntimeError("steer: the model is being compiled; call prepare(model) before torch.compile")
        self.recomputing.check_prepared()
        now = self.fixed.trace(past_length(inputs), tokens_of(inputs), inputs.get("attention_mask"))
        owned = now.rows.flatten().long() + 1  # type: ignore[union-attr]  # a fixed table is a table
        self._device_counts.index_add_(0, owned, torch.ones_like(owned))  # type: ignore[union-attr]
        return now

    def _generated(self, call: Call, inputs: dict[str, Any], batch: int, count: int) -> Table:
        """The table of a pass inside generate, and where in it the pass begins."""
        prompt = call.prompt
        if prompt is None or call.table is None:
            raise RuntimeError("steer: the model runs inside generate, but no prompt was announced")
        if self.keeps_cache:
            start = past_length(inputs)
        else:  # a model that keeps no cache is given the whole text again, or its next token
            start = 0 if count > call.done else call.done
        if call.done == 0 and isinstance(start, int):
            virtual = self._virtual(call, prompt, start, count)
            if virtual:
                self._build(call, prompt.behind(virtual))
        if isinstance(start, int):
            call.done = max(call.done, start + count)
        call.start = start
        return call.table

    def _virtual(self, call: Call, prompt: Prompt, start: int, count: int) -> int:
        """Virtual tokens in front of an announced prompt, known in its first pass."""
        length = prompt.valid.shape[1]
        if start == 0 and self._proof.virtual and count == length + self._proof.virtual:
            return self._proof.virtual
        if start == 0 and call.given_ids is None and count > length:  # soft prompts come as embeddings
            return count - length
        if start > 0 and count == length:  # a prefix that was put into the cache
            return start
        return 0

    @bookkeeping
    def _bare(self, call: Call, inputs: dict[str, Any], mask: Any, batch: int, count: int) -> Table:
        """The table of a forward pass outside generate, and where in it the pass begins."""
        if not self.keeps_cache and any(
            plan.positions != "all" or needs_prompt(plan) for one in self.attachments for plan in one.plans if plan
        ):
            raise ValueError(
                f"steer: {self._layers.name} keeps no cache that counts its tokens, so a bare pass does not show where it "
                'begins; use generate, or positions="all"'
            )
        start: int | Tensor = past_length(inputs) if self.keeps_cache else 0
        found = cache_in(inputs)
        known = None if found is None else self._prompts.get(found[1])
        if isinstance(start, Tensor) and known is None:
            start = int(start)  # once per prompt: a static cache that we have not seen may be empty or not
        call.start = start
        if known is not None and known.batch == batch and (isinstance(start, Tensor) or start > 0):
            return self._table_for(call, known)
        virtual = self._proof.virtual if int(start) == 0 and call.given_ids is not None else 0
        if isinstance(mask, Tensor) and mask.dim() == 2 and virtual and mask.shape[1] == int(start) + count:
            mask = mask[:, virtual:]
        valid = valid_tokens(mask, batch, int(start) + count - virtual)
        given = next((one.prompt_length for one in self.attachments if one.prompt_length is not None), None)
        if given is None:
            here = torch.arange(1, valid.shape[1] + 1, device="cpu")
            lengths = None if int(start) > 0 else torch.where(valid, here, 0).amax(1)
        else:
            lengths = lengths_per_row(given, batch)
            valid = nn.functional.pad(valid, (0, max(0, int(lengths.max()) - valid.shape[1])), value=True)
        prompt = Prompt(valid, lengths)
        prompt = prompt.behind(virtual) if virtual else prompt
        again = call.table is not None and not call.table.remembers and _same(call.table.prompt, prompt)
        return self._table_for(call, call.table.prompt if again else prompt)  # type: ignore[union-attr]

    def _table_for(self, call: Call, prompt: Prompt) -> Table:
        return call.table if prompt is call.prompt and call.table is not None else self._build(call, prompt)

    def _build(self, call: Call, prompt: Prompt) -> Table:
        table = Table(prompt, [one.layer(prompt.batch) for one in self.attachments], self.device)
        call.prompt, call.table, call.version = prompt, table, self._version
        return table

    @bookkeeping
    def _count(self, call: Call) -> None:
        """Tokens of the pass that has ended, once each, for the slots whose place it came by."""
        now, (batch, count) = call.now, call.shape
        skipped = 0
        if call.announced and isinstance(call.start, int):  # without a cache a text runs again and again
            skipped = min(count, max(0, call.seen - call.start))
            call.seen = max(call.seen, call.start + count)
        every = not call.ran or len(call.ran) >= self.dispatchers
        slots = set() if every else {slot for dispatcher in call.ran for slot in dispatcher.edits}
        if now.owners is not None:
            for slot, _ in now.owners:
                if every or slot in slots:
                    self._host_counts[slot] = self._host_counts.get(slot, 0) + batch * (count - skipped)
        elif now.rows is not None and self._device_counts is not None:
            rows = now.rows
            if skipped:
                rows = rows.view(batch, count, -1)[:, skipped:]
            if not every:
                rows = torch.where(torch.isin(rows, torch.tensor(sorted(slots), device=rows.device)), rows, -1)
            owned = rows.reshape(-1).long() + 1
            if self._ones.shape[0] < owned.shape[0] or self._ones.device != owned.device:
                self._ones = torch.ones(owned.shape[0], dtype=torch.int64, device=owned.device)
            self._device_counts.index_add_(0, owned, self._ones[: owned.shape[0]])


def _mask(inputs: dict[str, Any], given: Any) -> Any:
    """The mask of a pass in the form that shows padding, if any form of it does."""
    mask = inputs.get("attention_mask")
    if given is _UNSEEN or (isinstance(mask, Tensor) and mask.dim() == 2):
        return mask
    return given  # handed on as a prepared mask, or not at all


def _needs_place(one: Attachment) -> bool:
    """Whether a plan asks where in its text a token stands."""
    plans = [plan for plan in one.plans if plan is not None]
    return any(needs_prompt(p) or (isinstance(rule := rule_of(p), Selector) and rule.remembers) for p in plans)


def _same(one: Prompt, other: Prompt) -> bool:
    if (one.starts is None) != (other.starts is None) or one.virtual != other.virtual:
        return False
    if not torch.equal(one.valid, other.valid):
        return False
    return one.starts is None or other.starts is None or torch.equal(one.starts, other.starts)
