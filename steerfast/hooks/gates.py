"""Gates: what the conditions of the active plans have decided, for which request or token, in one thread's passes.

A gate belongs to one slot. The dispatcher at the place where its condition is read calls `judge`, the dispatchers that
hold the slot call `close`, which takes the slot out of the row table wherever the gate is shut. Everything happens on
the device; where a static cache hides the position of a pass from the host, so does the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast.edits.conditions import When
from steerfast.place import Place

from .bookkeeping import bookkeeping, is_mapped, settled
from .positions import Table
from .prompts import Memory, Prompt
from .records import Scored


@dataclass(eq=False)
class Gate:
    """One condition, and its state for the batch that is running."""

    when: When
    place: Place  # where the condition is read
    prompt: Prompt | None = None  # the batch that `latch` belongs to
    latch: Tensor | None = None  # bool (batch,): what was decided at each last prompt token
    decided: Tensor | None = None  # bool (batch,), on the host; None where only the device knows
    open: Tensor | None = None  # bool (n,): which tokens of this pass may be edited
    program: Callable[[Tensor], Any] | None = None  # of its probe, on the device of the stream
    device: torch.device | None = None  # that one
    memory: Memory | None = None  # of one with a release, whether it is open before each position of `prompt`

    def score(self, x: Tensor) -> Any:
        """What its probe finds in the stream."""
        if self.program is None or self.device != x.device:
            self.program, self.device = self.when.condition.probe.program(x.device), x.device
        return self.program(x)


Conditions = dict[int, tuple[When, Place]]
"""Slot -> its condition, and where it is read; one such table for all threads of a model."""


class Gates:
    """What the conditions of a model have decided in the passes of one thread.

    Attributes:
        asks: Whether conditions are read in the running pass, even if nobody is edited in it.
    """

    def __init__(self, conditions: Conditions) -> None:
        self.asks = False
        self._conditions = conditions
        self._known: dict[int, Gate] = {}
        self._pass: tuple[Table, int | Tensor, int, int] | None = None

    def __bool__(self) -> bool:
        return bool(self._conditions)

    @property
    def _gates(self) -> dict[int, Gate]:
        """A gate for each slot that has a condition now; a slot that got another one begins anew."""
        for slot, (when, place) in self._conditions.items():
            if slot not in self._known or self._known[slot].when is not when:
                self._known[slot] = Gate(when, place)
        return {slot: self._known[slot] for slot in self._conditions}

    @property
    def remembers(self) -> bool:
        """Whether some condition must see every token."""
        return any(when.condition.release is not None for when, _ in self._conditions.values())

    def state(self) -> tuple[Any, ...]:
        """What the running pass has come to."""
        return self._pass, self.asks, {slot: gate.open for slot, gate in self._known.items()}

    def go_on(self, state: tuple[Any, ...]) -> None:
        """Come back to a pass."""
        self._pass, self.asks, opened = state
        for slot, gate in self._known.items():
            gate.open = opened.get(slot)

    def begin(self, table: Table, start: int | Tensor, tokens: int, batch: int) -> None:
        """A forward pass over positions [start, start + tokens) of every row begins."""
        self._pass = table, start, tokens, batch
        for gate in self._gates.values():
            gate.open = None
        self.asks = self.remembers or (table.prompt.starts is not None and table.ends_in(start, tokens))

    @torch.no_grad()
    def judge(self, place: Place, x: Tensor, scored: Scored, after: bool = False) -> None:
        """Read the conditions of a place from the stream x (batch, tokens, d) before its edits, or `after` them."""
        for gate in self._gates.values():
            if gate.place != place or gate.when.condition.probe.after != after:
                continue
            if not gate.when.per_token:
                gate.open = self._latched(gate, x)
                continue
            score = scored(gate.when.condition.probe, gate.score, x)[0]
            if gate.when.condition.release is None:
                gate.open = settled(gate.when.condition.decide(score)).reshape(-1)
            else:
                gate.open = self._held(gate, score)

    def close(self, rows: Tensor, slots: Iterable[int]) -> Tensor:
        """The row table (n, P) without the slots among `slots` whose gate is shut."""
        for slot in slots:
            gate = self._gates.get(slot)
            if gate is None:
                continue
            if gate.open is None:
                raise RuntimeError(
                    f"steer: {gate.when!r} is to act, but {gate.place[0]} {gate.place[1]} has not run in this pass"
                )
            rows = torch.where((rows == slot) & ~gate.open.to(rows.device)[:, None], -1, rows)
        return rows

    def decision(self, slot: int) -> Tensor | None:
        """bool (batch,) on the CPU: what a latched condition has decided for the last batch; None before that."""
        gate = self._gates.get(slot)
        return None if gate is None or gate.latch is None else gate.latch.cpu()

    @bookkeeping
    def _held(self, gate: Gate, score: Tensor) -> Tensor:
        """The decision for every token of a condition that stays open until its score falls back."""
        if self._pass is None:
            raise RuntimeError("steer: a condition is read outside a forward pass of the decoder")
        if is_mapped(score):
            raise RuntimeError(f"steer: torch.vmap maps over the stream, and {gate.when!r} must remember each text")
        table, start, tokens, batch = self._pass
        memory = self._remembered(gate, table, start, batch, score.device)
        memory.room((start if isinstance(start, int) else memory.reached) + tokens + 1)
        here = torch.as_tensor(start, device=score.device).reshape(1) + torch.arange(tokens, device=score.device)
        before = memory.open.index_select(1, here[:1])[:, 0]
        found = gate.when.condition.decide(
            score.reshape(batch, tokens), before, table.real(start, tokens, batch).to(score.device)
        )
        memory.open.index_copy_(1, here + 1, found)
        memory.reached = start + tokens if isinstance(start, int) else memory.reached + tokens
        return found.reshape(-1)

    def _remembered(self, gate: Gate, table: Table, start: int | Tensor, batch: int, device: torch.device) -> Memory:
        prompt, memory = table.prompt, gate.memory
        known = memory is not None and prompt.is_text_of(gate.prompt) and memory.open.shape[0] == batch
        if memory is None or not known or (isinstance(start, int) and start == 0):
            if prompt.reorders:
                raise _reordered(gate)
            memory = gate.memory = Memory(torch.zeros(batch, 1, dtype=torch.bool, device=device), 0)
        if prompt.moved:
            raise _reordered(gate)
        gate.prompt = prompt
        first = start if isinstance(start, int) else (int(start) if not memory.reached else 0)
        if first > memory.reached:
            raise ValueError(
                f"steer: {gate.when!r} must know the {first} tokens before this forward pass, and only {memory.reached} of them "
                "ran under the plan; run the text from its start, or use generate"
            )
        return memory

    def _latched(self, gate: Gate, x: Tensor) -> Tensor:
        if self._pass is None:
            raise RuntimeError("steer: a condition is read outside a forward pass of the decoder")
        table, start, tokens, batch = self._pass
        stream = x.reshape(batch, tokens, -1)
        latch, here, ends = self._before(gate, table, start, tokens, batch, x.device)
        if here is not None and isinstance(start, int):
            if here.numel():
                score = gate.score(settled(stream[here, (ends - start)[here]]))
                found = settled(gate.when.condition.decide(score[:, None]))[:, 0]
                latch = latch.index_put((here.to(x.device),), found)
        else:
            position = torch.as_tensor(start, device=x.device) + torch.arange(tokens, device=x.device)
            last = position == ends.to(x.device)[:, None]  # (batch, tokens)
            found = settled(gate.when.condition.decide(gate.score(stream)))
            latch = torch.where(last.any(1), (found & last).any(1), latch)
        latch = settled(latch)
        gate.latch = None if is_mapped(latch) else latch  # a decision of every example that is mapped over ends with it
        return latch[:, None].expand(batch, tokens).reshape(-1)

    @bookkeeping
    def _before(
        self, gate: Gate, table: Table, start: int | Tensor, tokens: int, batch: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """What was latched before, the rows that this pass decides (None: only the device knows), where prompts end."""
        ends = table.ends.repeat_interleave(batch // table.prompt.batch)
        if table.prompt.moved:
            raise _reordered(gate)
        if not table.prompt.is_text_of(gate.prompt) or gate.latch is None or gate.latch.shape[0] != batch:
            gate.latch = torch.zeros(batch, dtype=torch.bool, device=device)
            gate.decided = torch.zeros(batch, dtype=torch.bool, device="cpu")
            start = int(start)  # of a static cache once a text: it may hold a prompt that nobody has asked about
        gate.prompt = table.prompt
        if gate.decided is not None and isinstance(start, int):
            here = ((ends >= start) & (ends < start + tokens)).nonzero().flatten()
            gate.decided[here] = True
            if bool((~gate.decided & (ends < start) & (ends >= 0)).any()):  # -1: a row without a token decides nothing
                raise ValueError(
                    f"steer: {gate.when!r} is decided at the last prompt token, which lies before this forward pass; run "
                    "the prompt while the plan is active, or use WhenToken"
                )
            if isinstance(self._pass[1], int):  # type: ignore[index]  # a pass is running
                return gate.latch, here, ends
        gate.decided = None
        return gate.latch, None, ends


def _reordered(gate: Gate) -> ValueError:
    return ValueError(
        f"steer: {gate.when!r} must know which row is which, and beam search hands rows from one to the other, as a cache "
        "does that is reordered; sample instead, or use WhenToken without release"
    )
