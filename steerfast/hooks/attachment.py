"""The record of one call of `steer`: what is attached, under which slots, how strong."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from steerfast._positions import Selector, beyond, parse
from steerfast.edits.base import Intervention
from steerfast.edits.columns import Column
from steerfast.plan import Plan, rule_of

from .positions import Layer

EVERYWHERE = parse("steer", "all")


@dataclass(eq=False)
class Attachment:
    """What one call of `steer` has attached.

    Attributes:
        plans: One plan, or one (or None) per batch row.
        per_row: Whether the plans belong to the rows of a batch.
        strengths: The multiplier of each plan.
        prompt_length: P of bare forward passes, one for all rows or one per row; None: not given.
        slots: The slots of each plan, one a column and the same in every layer; given while it is attached.
        by_token: The slots that stand for a run of them, one for each of the prompt's first tokens, to that run.
        gated: The slots behind a condition.
        latched: Those whose condition is decided once per request.
        handle: What the user holds of it.
        reads: "before" or "after" the edits of all others, where its edits are recorders; "": it steers.
    """

    plans: list[Plan | None]
    per_row: bool
    strengths: list[float]
    prompt_length: tuple[int, ...] | None
    slots: list[tuple[int, ...]] = field(default_factory=list)
    by_token: dict[int, tuple[int, ...]] = field(default_factory=dict)
    gated: set[int] = field(default_factory=set)
    latched: set[int] = field(default_factory=set)
    handle: Any = None
    reads: str = ""

    @property
    def turn(self) -> int:
        """When it acts among the attachments of a model: readers before all edits, edits in the order of their handles."""
        return {"before": 0, "": 1, "after": 2}[self.reads]

    @property
    def by_row(self) -> bool:
        """Whether the rows of a batch have a plan, a mask or a length each, or are read: which is which then counts."""
        masks = any(isinstance(rule, Tensor) and rule.dim() == 2 and len(rule) > 1 for rule in self._rules)
        return self.per_row or masks or bool(self.reads) or len(self.prompt_length or ()) > 1

    @property
    def _rules(self) -> list[Selector | Tensor]:
        return [rule_of(plan) for plan in self.plans if plan is not None]

    @property
    def recorders(self) -> list[Intervention]:
        """What notes the stream for it."""
        plans = [plan for plan in self.plans if plan is not None and self.reads]
        return [edit for plan in plans for chain in plan.edits.values() for edit in chain]

    def check_order(self, reorders: bool) -> None:
        """Refuse to read what beams hand from row to row."""
        for rule in self._rules if self.reads and reorders else ():
            if isinstance(rule, Selector) and beyond(rule) is not False:
                raise ValueError(
                    f"read: positions={str(rule)!r} name generated tokens, and beam search hands rows from one to the other, "
                    'as a cache does that is reordered; sample instead, or read positions="prompt"'
                )

    @property
    def all_slots(self) -> list[int]:
        """The slots of all its plans."""
        return [number for slots in self.slots for number in self.numbers(slots)]

    def numbers(self, slots: Iterable[int]) -> list[int]:
        """The slots of some columns, with all of each run."""
        return [number for slot in slots for number in self.by_token.get(slot, (slot,))]

    def take(self, first: int, columns: Sequence[Column]) -> None:
        """The next plan gets the slots from `first` on for its columns."""
        slots = []
        for column in columns:
            slots.append(first)
            if column.tokens:
                self.by_token[first] = tuple(range(first, first + column.tokens))
            first += column.slots
        self.slots.append(tuple(slots))

    def layer(self, batch: int) -> Layer:
        """The plans spread over the rows of a batch."""
        if self.per_row and len(self.plans) != batch:
            raise ValueError(
                f"steer: {len(self.plans)} plans were given for a batch of {batch} prompts; give one per row, None for unsteered"
            )
        index = range(batch) if self.per_row else [0] * batch
        rules = [EVERYWHERE if (plan := self.plans[i]) is None else rule_of(plan) for i in index]
        return Layer(
            [self.slots[i] for i in index],
            [self.strengths[i] for i in index],
            rules,
            frozenset(self.latched),
            frozenset(self.gated),
            self.by_token,
        )
