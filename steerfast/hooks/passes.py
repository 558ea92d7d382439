"""The forward passes of a model: which token of the running one is steered by which slot.

That is decided once per pass, by a hook on the decoder, and read by every dispatcher. What a pass needs to know of its
prompt comes from `generate`, which announces it, or from the pass itself (see `steerfast.hooks.positions`). Each thread has
a `Call` of its own, so that two threads in one model do not meet.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerfast.edits.base import Intervention
from steerfast.models.caches import PAGED, cache_in, keeps_cache, past_length
from steerfast.models.layers import Layers, is_looking, stream_storage
from steerfast.models.proof import Proof
from steerfast.plan import needs_prompt

from .attachment import Attachment
from .bare import BareTexts
from .bookkeeping import bookkeeping, refuse_tracing
from .call import UNSEEN, Call, Calls
from .compiled import FixedTable
from .continuous import pass_for_all
from .counts import Counts
from .fixed import Announced
from .frames import is_inside
from .gates import Conditions, Gates
from .generation import Announcement, by_name, tokens_of
from .positions import IDLE, Owners, Pass, Table
from .prompts import Prompt
from .recomputing import THREADS, Recomputing
from .records import Log
from .texts import Batch, Texts, carried
from .watched import Watched


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
        recorders: What notes the stream for those who read it.
        counts: Tokens that each slot has been applied to.
        watched: The modules that carry dispatchers.
    """

    def __init__(self, model: nn.Module, layers: Layers, proof: Proof) -> None:
        self.attachments: list[Attachment] = []
        self.conditions: Conditions = {}
        self.fixed: FixedTable | None = None
        self.traced: Pass = IDLE
        self.generating: int | None = None
        self.dispatchers = 0
        self.recorders: list[Intervention] = []
        self.counts = Counts()
        self.watched = Watched(model)
        self.decoder = model.get_submodule(layers.path.rpartition(".")[0])
        self.recomputing = Recomputing(self.decoder)
        self.keeps_cache = keeps_cache(model, self.decoder)
        self.threads = Calls(self.conditions)
        self.latest = self.threads.call  # of any thread
        self._announced: Call | None = None  # what generate runs, in whatever thread
        self._model, self._layers, self._proof = model, layers, proof
        self._names = list(inspect.signature(self.decoder.forward).parameters)
        self._hooks: list[RemovableHandle] = []  # on the decoder, and on the model around it
        self._version = 0
        self._decided = False  # the running pass began outside of any graph, whatever of it a compiler took up
        self._texts = BareTexts(model, proof)
        self._broadcasts: dict[Owners, tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> Any:
        raise RuntimeError("steer: a model cannot be copied or pickled while it is steered or prepared; do that first")

    @property
    def device(self) -> torch.device:
        """Where the stream enters the first block, and where tables are needed."""
        return stream_storage(self._layers.blocks[0], self._model)[1]

    @property
    def by_row(self) -> bool:
        """Whether something attached tells the rows of a batch apart."""
        return any(one.by_row for one in self.attachments)

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
                self._hooks.append(self._model.register_forward_hook(self._forget_given, always_call=True))

    def unwatch(self) -> None:
        """Take the hooks off again."""
        self.recomputing.end()
        while self._hooks:
            self._hooks.pop().remove()

    def forget(self) -> None:
        """Nothing is attached any more: no prompt, no table."""
        self._version += 1
        self.threads, self._announced = Calls(self.conditions), None
        self._broadcasts.clear()
        self._texts.clear()
        self.traced = IDLE
        if self.fixed is not None:
            self.fixed.settle()
            self.fixed.clear()

    @bookkeeping
    def refresh(self) -> None:
        """What is attached has changed: this thread's table is built anew now, those of others when they run next."""
        self._version += 1
        self._broadcasts.clear()
        self.recorders = [recorder for one in self.attachments for recorder in one.recorders]
        slots = (slot for one in self.attachments for slot in one.all_slots)
        self.counts.make_room(2 + max(slots, default=0), self.device)
        self._renew(self.threads.call)
        if self.fixed is None:
            return
        call = self._announced
        if call is None or call.table is None:
            self.fixed.publish_unprompted(self.attachments)
        else:  # a compiled graph sees the buffers alone, whatever thread it runs in
            self._renew(call)
            self.fixed.text.check_order(call.table.prompt)
            self.fixed.publish(call.table, call.batch.told.copies)  # type: ignore[union-attr]  # generate runs it

    def shares(self, told: Announcement) -> bool:
        """Whether a call of generate inside generate runs the text that this thread has announced."""
        batch = self.threads.call.batch
        return self.generating == threading.get_ident() and batch is not None and batch.shares(told.prompt)

    @contextmanager
    def generation(self, told: Announcement) -> Iterator[None]:
        """While generate runs with this batch; inside another generate, which goes on behind it."""
        before, running = self.threads.call, self.generating
        self.generating = threading.get_ident()
        try:
            self._announce(told)
            yield
        finally:
            self.generating = running
            self._retract(None if running is None else before)

    @bookkeeping
    def _announce(self, told: Announcement) -> None:
        call = self.threads.call = self._announced = Call(Gates(self.conditions), THREADS.own, batch=Batch(told))
        if self.fixed is not None:
            self.fixed.check(told, self.attachments)
        if self.fixed is not None and told.prompt is None:
            self.fixed.publish_unprompted(self.attachments)
            if self.fixed.unplaced:
                raise ValueError(
                    "steer: the arguments of generate do not show its prompt, which a prepared model must be told; pass it as "
                    "input_ids"
                )
        if told.prompt is not None:
            self._build(call, told.prompt)
            self._publish(call)

    @bookkeeping
    def _retract(self, before: Call | None) -> None:
        """Generate has ended; `before` is the call of the one that goes on."""
        if (log := self.threads.call.text) is not None:
            log.settle()  # its cache is not kept
        self.threads.call = Call(Gates(self.conditions), THREADS.own) if before is None else before
        self.traced, self._announced = IDLE, before
        if before is not None:
            self.latest = before
            self._publish(before)
        elif self.attachments and self.fixed is not None:
            self.fixed.publish_unprompted(self.attachments)

    def _publish(self, call: Call) -> None:
        """A prepared model's buffers hold the announced batch."""
        if self.fixed is not None and call.batch is not None and call.table is not None:
            self._renew(call)
            self.fixed.settle(call.batch.done)
            self.fixed.publish(call.table, call.batch.told.copies)
            self.fixed.text.announce(call.table, Announced.of(call.batch.told))

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

    def margins(self, now: Pass) -> tuple[int, int]:
        """How many columns of a pass's row table are readers', on its left and on its right: the edits stand between them."""
        if not self.recorders:
            return 0, 0
        widths = [(one, max(len(chain) for chain in one.slots)) for one in self.attachments]
        if now.owners is not None:
            here = [slot for slot, _ in now.owners]
            widths = [(one, sum(slot in one.all_slots for slot in here)) for one, _ in widths]
        left, right = (sum(width for one, width in widths if one.reads == side) for side in ("before", "after"))
        return left, right

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
        if self.fixed is not None:
            return self.fixed.text.decision(slot)
        return self.latest.gates.decision(slot)

    # --- one pass ----------------------------------------------------------------------------------------------------

    def _note_given(self, names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the whole model runs: its decoder may see a prepared mask, and embeddings with tokens of another's."""
        if torch.compiler.is_compiling() or not self.attachments or is_looking():
            return
        self.watched.check()  # no hook would run in another decoder
        inputs, call = by_name(names, args, kwargs), self.threads.call
        call.running = call.running and is_inside(self.decoder)
        call.given_mask = inputs.get("attention_mask")
        ids = inputs.get("input_ids")
        call.given_ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None

    def _forget_given(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the whole model ran: its decoder may be called by itself."""
        if not torch.compiler.is_compiling() and self.attachments and not is_looking():
            self.threads.call.given_mask, self.threads.call.given_ids = UNSEEN, None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the decoder runs: decide who owns which token of this pass."""
        if torch.compiler.is_compiling():
            self.traced = self._trace(by_name(self._names, args, kwargs))
            return
        self._decided = True
        call = self.latest = self.threads.call
        self._set_aside(call)
        call.ran.clear()
        if not self.attachments:
            call.now = self.traced = IDLE
            self._unattached(by_name(self._names, args, kwargs))
            return
        self.recomputing.begin(follow=self.fixed is None)
        if is_looking():
            self.threads.call, self.traced = call.beside(), IDLE
            return
        refuse_tracing()
        self.watched.check()
        if self.watched.convert():
            self.refresh()
        inputs = by_name(self._names, args, kwargs)
        self._drop_stale(call, inputs)
        mask = call.mask_of(inputs)
        tokens, given = tokens_of(inputs), call.given_ids
        call.shape = batch, count = tokens.shape[0], tokens.shape[1]
        ids = given if tokens.is_floating_point() else tokens
        if inputs.keys() >= PAGED:
            call.now = pass_for_all(self.attachments, bool(self.conditions), inputs, tokens, call.now)
            call.running = True
            return
        if self.generating not in (None, threading.get_ident()):
            raise RuntimeError(
                "steer: the model runs in two threads at once, and only one of them can be inside generate"
            )
        if given is not None and count > given.shape[1] + self._proof.virtual:
            raise RuntimeError(
                f"steer: {self._layers.name} runs {count} tokens where it is given {given.shape[1]} ids; which of them are "
                "the text's cannot be said"
            )
        live = self._position(call, inputs, count)
        start = live.clone() if isinstance(live, Tensor) else live  # the first block moves the cache's own counter on
        if call.batch is not None and not call.batch.owns(inputs, tokens, ids, mask, start):
            call = self._aside(call)
            call.shape, call.given_ids = (batch, count), given
        self._renew(call)
        if call.batch is not None:
            table = self._generated(call, start, count)
        else:
            table = self._bare(call, inputs, mask, ids, live if isinstance(live, Tensor) else start)
        start = call.start
        if table.repeats_virtual(start, tokens, ids):
            call.now = table.behind_virtual(count, batch)
        else:
            call.now = (
                table.at(start, count, batch, ids) if isinstance(start, int) else table.gather(start, count, batch, ids)
            )
        self.traced = call.now
        if self.conditions:
            call.gates.begin(table, start, count, batch)
        if self.recorders:
            found = cache_in(inputs)
            self._follow(call, table, ids, None if found is None else found[1])
        if self.fixed is not None and self.fixed.text:
            self.fixed.text.begin(start, tokens, table.real(start, count, batch))
        self.threads.call, call.running = call, True

    def _drop_stale(self, call: Call, inputs: dict[str, Any]) -> None:
        """What the whole model was given is not the decoder's once a call has been broken off where no hook runs behind it."""
        other = call.given_ids is not None and call.given_ids is not inputs.get("input_ids")
        hidden = isinstance(call.given_mask, Tensor) and inputs.get("attention_mask") is None
        if (other or hidden) and not is_inside(self._model):
            call.given_mask, call.given_ids = UNSEEN, None

    def _unattached(self, inputs: dict[str, Any]) -> None:
        """A pass that nobody steers or reads begins; the probes of a prepared model run in it, and need its shape."""
        if self.fixed is not None and self.fixed.text and not inputs.keys() >= PAGED:
            self.fixed.follow(past_length(inputs), tokens_of(inputs), inputs.get("attention_mask"))

    def _follow(self, call: Call, table: Table, ids: Tensor | None, cache: Any) -> None:
        """Keep what probes read of this text beside what they read of it before."""
        start, (batch, count) = call.start, call.shape
        if call.log is None or not call.log.follows(table.prompt, start, batch):
            told = None if call.batch is None else call.batch.told
            for one in self.attachments:
                one.check_order(table.prompt.reorders)
            call.log = Log(table.prompt, batch, self.device, ((), None) if told is None else (told.eos, told.pad))
        elif table.prompt.moved and not call.log.prompt.moved:
            for one in self.attachments:
                one.check_order(reorders=True)
        call.log.prompt = table.prompt
        if cache is not None:
            call.log.cache = weakref.ref(cache)
        call.log.begin(start, count, ids, self.recorders)

    def _position(self, call: Call, inputs: dict[str, Any], count: int) -> int | Tensor:
        """The position of a pass's first token; a tensor is the cache's own."""
        if self.keeps_cache:
            return past_length(inputs)
        done = 0 if call.batch is None else call.batch.done
        return 0 if count > done else done  # without a cache the whole text comes again, or its next token

    def _aside(self, call: Call) -> Call:
        """The call of a pass inside generate that runs another text than the announced one."""
        if call.other is None:
            told = call.batch.told  # type: ignore[union-attr]  # generate is running
            call.other = Call(Gates(self.conditions), call.thread, texts=Texts())
            call.other.reorders = told.prompt is None and told.reorders
        call.other.ran.clear()
        call.other.outer = call
        return call.other

    def _end(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After the decoder ran: its tokens are counted, and a cache that it filled belongs to the prompt that it read."""
        decided, self._decided = self._decided, False
        if (torch.compiler.is_compiling() and not decided) or not self.attachments:
            return
        call = self.threads.call
        try:
            self._close(call, output)
        finally:
            call.running = False
            if call.outer is not None:
                call, call.outer = call.outer, None
            self.threads.call = call
            if call.held:
                call.go_on()

    def _set_aside(self, call: Call) -> None:
        """A pass is about to begin: is another one of this thread still running around it?"""
        if call.running and is_inside(self.decoder):
            call.hold()
            return
        if call.running:  # the last pass was broken off where no hook runs behind it
            call.running, call.given_mask, call.given_ids = False, UNSEEN, None
        call.held.clear()

    def _close(self, call: Call, output: Any) -> None:
        """A pass has ended."""
        if self.conditions or self.recorders:
            call.scored.clear()  # it holds the stream
        if call.ran or self.fixed is not None:  # compiled blocks do not say that they ran
            self._count(call)
        if call.prompt is None or (call.batch is not None and call.batch.caches):
            return
        found = cache_in(output) if isinstance(output, Mapping) else None
        if found is None:
            return
        if call.batch is not None:  # a cache that the decoder has made itself
            call.batch.made[id(found[1])] = found[1]
        else:
            self._texts.keep(call, call.prompt, found[1])

    def _trace(self, inputs: dict[str, Any]) -> Pass:
        """The pass as a part of the compiled graph: a gather from the table that `announce` or `refresh` fills."""
        if self.fixed is None:
            raise RuntimeError("steer: the model is being compiled; call prepare(model) before torch.compile")
        self.recomputing.check_prepared()
        start, tokens = past_length(inputs), tokens_of(inputs)
        now = self.fixed.trace(start, tokens, inputs.get("attention_mask"))
        owned = now.rows.flatten().long() + 1  # type: ignore[union-attr]  # a fixed table is a table
        self.counts.on_device.index_add_(0, owned, self.fixed.fresh(start, tokens).flatten())  # type: ignore[union-attr]
        return now

    def _generated(self, call: Call, start: int | Tensor, count: int) -> Table:
        """The table of a pass over the batch that generate has announced."""
        batch, prompt = call.batch, call.prompt
        if prompt is None or batch is None or call.table is None:
            raise RuntimeError("steer: the model runs inside generate, but no prompt was announced")
        if batch.done == 0 and isinstance(start, int):
            virtual = self._virtual(call, prompt, start, count)
            if virtual:
                self._build(call, prompt.behind(virtual))
        if isinstance(start, int):
            batch.done = max(batch.done, start + count)
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
    def _bare(self, call: Call, inputs: dict[str, Any], mask: Any, ids: Tensor | None, start: int | Tensor) -> Table:
        """The table of a pass over a text that was not announced; `start` may be its cache's own counter."""
        if not self.keeps_cache and any(
            plan.positions != "all" or needs_prompt(plan) for one in self.attachments for plan in one.plans if plan
        ):
            raise ValueError(
                f"steer: {self._layers.name} keeps no cache that counts its tokens, so a bare pass does not show where it "
                'begins; use generate, or positions="all"'
            )
        if not self.keeps_cache and self._remembers() and carried(inputs):
            raise ValueError(
                f"steer: {self._layers.name} keeps no cache that counts its tokens, so a bare pass that goes on from an "
                "earlier one does not show where it begins, as read and release= must know; use generate, or run the whole text "
                "at once"
            )
        prompt = self._texts.prompt(call, self.attachments, inputs, mask, ids, start, self._remembers())
        if call.prompt is not None and prompt.is_text_of(call.prompt):
            return self._table_for(call, prompt)
        keeps = bool(self.conditions or self.recorders)  # what is decided and read of one text is not another's
        again = (
            not keeps and call.table is not None and not call.table.remembers and prompt.looks_like(call.table.prompt)
        )
        return self._table_for(call, call.table.prompt if again else prompt)  # type: ignore[union-attr]

    def _remembers(self) -> bool:
        """Whether something attached goes on from what it saw of a text before."""
        return bool(self.recorders) or any(when.condition.release is not None for when, _ in self.conditions.values())

    def _table_for(self, call: Call, prompt: Prompt) -> Table:
        return call.table if prompt is call.prompt and call.table is not None else self._build(call, prompt)

    def _renew(self, call: Call) -> None:
        """The table of a call's last text, for what is attached now; a text of other rows than there are plans is over."""
        if call.prompt is None or call.version == self._version:
            return
        rows = {len(one.plans) for one in self.attachments if one.per_row}
        if call.batch is None and rows - {call.prompt.batch}:
            call.prompt = call.table = None
        else:
            self._build(call, call.prompt)

    def _build(self, call: Call, prompt: Prompt) -> Table:
        table = Table(prompt, [one.layer(prompt.batch) for one in self.attachments], self.device)
        call.prompt, call.table, call.version = prompt, table, self._version
        return table

    def _count(self, call: Call) -> None:
        """Tokens of the pass that has ended, once each, for the slots whose place it came by."""
        count, skipped = call.shape[1], 0
        if (call.batch is not None or call.texts is not None) and isinstance(call.start, int):
            skipped = min(count, max(0, call.seen - call.start))  # without a cache a text runs again and again
            call.seen = max(call.seen, call.start + count)
        every = not call.ran or len(call.ran) >= self.dispatchers
        slots = None if every else {slot for dispatcher in call.ran for slot in dispatcher.edits}
        self.counts.add(call.now, call.shape, skipped, slots)
