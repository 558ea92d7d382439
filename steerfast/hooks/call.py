"""What one thread runs in a model: its prompt, its table, its running pass, and what is remembered of its text."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .gates import Conditions, Gates
from .positions import IDLE, Pass, Table
from .prompts import Prompt
from .recomputing import THREADS, Thread
from .records import Log, Scored
from .texts import Batch, Texts

UNSEEN = object()


@dataclass(eq=False)
class Call:
    """What one thread runs: its prompt, its table, and its running pass.

    Attributes:
        gates: What the conditions have decided.
        thread: What else that thread runs.
        now: The running pass.
        running: Whether that pass is in the decoder.
        shape: (rows, tokens) of the stream in it.
        prompt: The batch of prompts; None: none is known.
        table: Its owners.
        batch: What generate has announced; None: it is not running.
        ran: The dispatchers that the running pass has reached.
        other: The call of all other texts that run inside of generate.
        texts: Of that one: those that run without a cache.
        outer: Of that one, while it runs: the call to come back to.
        log: What probes have read of its text.
        scored: What probes have found in the running pass.
        held: What passes of the same thread were doing when another began inside of them, the latest last.
    """

    gates: Gates
    thread: Thread
    now: Pass = IDLE
    running: bool = False
    shape: tuple[int, int] = (0, 0)
    prompt: Prompt | None = None
    table: Table | None = None
    batch: Batch | None = None
    ran: set[Any] = field(default_factory=set)
    other: Call | None = None
    log: Log | None = None
    scored: Scored = field(default_factory=Scored)
    held: list[tuple[Any, ...]] = field(default_factory=list)
    texts: Texts | None = None
    outer: Call | None = None
    start: int | Tensor = 0  # position of the running pass's first token
    seen: int = 0  # positions that have been counted
    version: int = 0  # of what is attached, when the table was built
    reorders: bool = False  # rows of its texts may change places
    given_mask: Any = UNSEEN  # as the model around the decoder was given it, not yet prepared
    given_ids: Tensor | None = (
        None  # as that model was given them; None: it was given none, or the decoder is the model
    )

    def mask_of(self, inputs: Mapping[str, Any]) -> Any:
        """The mask of a pass in the form that shows padding, if any form of it does."""
        mask, given = inputs.get("attention_mask"), self.given_mask
        if given is UNSEEN or (isinstance(mask, Tensor) and mask.dim() == 2):
            return mask
        return given  # handed on as a prepared mask, or not at all

    def beside(self) -> Call:
        """The call of a pass that is to be let alone, and after which this one goes on."""
        return Call(Gates({}), self.thread, outer=self)

    def hold(self) -> None:
        """Another pass begins inside the running one."""
        state = self.now, self.shape, self.prompt, self.table, self.start, self.seen, self.log, {*self.ran}
        self.held.append((*state, self.gates.state()))

    def go_on(self) -> None:
        """That pass has ended."""
        *state, gates = self.held.pop()
        self.now, self.shape, self.prompt, self.table, self.start, self.seen, self.log, self.ran = state
        self.gates.go_on(gates)
        self.running = True

    @property
    def text(self) -> Log | None:
        """What probes have read of the text that it is asked about; of a prompt that generate does not show its first pass."""
        unshown = self.batch is not None and self.batch.told.prompt is None and self.other is not None
        return self.other.log if unshown else self.log  # type: ignore[union-attr]


class Calls(threading.local):
    """The call of each thread that asks."""

    def __init__(self, conditions: Conditions) -> None:
        self.call = Call(Gates(conditions), THREADS.own)
