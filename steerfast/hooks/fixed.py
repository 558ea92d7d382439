"""Probes of a prepared model: they are a part of the compiled graph, which writes what they find into buffers.

A graph runs no Python, so nothing is known of a text but what it has written itself and what `generate` announced. Each pass
notes its tokens, and each probe its scores and the state of its gate, at their positions; whoever asks later takes out what the
positions name. Buffers are only ever written into.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steerfast.edits.conditions import Condition, When, held
from steerfast.place import Place
from steerfast.probes.probe import Probe

from .attachment import Attachment
from .bookkeeping import bookkeeping
from .generation import Announcement
from .positions import Table
from .prompts import Prompt
from .records import NEVER, Scores, over, scores_of

PADDING = -2
"""Stands in the place of a token that is none."""


@dataclass(frozen=True, eq=False)
class Announced:
    """A batch that generate has announced: the prompt, how often its rows are repeated, and what ends a row."""

    prompt: Prompt
    copies: int
    ends: tuple[tuple[int, ...], int | None]
    held: int  # tokens in the cache that it began with

    @classmethod
    def of(cls, told: Announcement) -> Announced | None:
        """What generate has just announced; None: its arguments do not show the prompt."""
        held = 0 if told.cache is None else int(told.cache.get_seq_length())
        return None if told.prompt is None else cls(told.prompt, told.copies, (told.eos, told.pad), held)


class Window:
    """The pass that is running: its positions, which of its tokens are real, and where they stand in buffers.

    Args:
        start: int64 (), position of its first token.
        real: bool (batch, tokens), False on padding.
        length: Positions that buffers keep apart; all later ones share the last entry.
    """

    def __init__(self, start: Tensor, real: Tensor, length: int) -> None:
        self.batch, self.tokens = real.shape
        self.real = real
        self.position = start + torch.arange(self.tokens, device=real.device)
        self.at = self.position.clamp(max=length)
        self.before = start.clamp(max=length + 1).reshape(1)
        self.behind = (start + self.tokens).clamp(max=length + 1).reshape(1)


class FixedProbe:
    """One probe of a prepared model, and the one gate that may look at it.

    Args:
        name: As `prepare` was given it.
        probe: Read at `place`.
        number: Of its gate, from 1.
        batch, length: As in `Room`.
        device: Of the stream.
    """

    def __init__(
        self, name: str, probe: Probe, place: Place, number: int, batch: int, length: int, device: torch.device
    ) -> None:
        self.name, self.probe, self.place, self.number = name, probe, place, number
        self.program = probe.program(device)
        found = self.program(torch.zeros(1, probe.width, device=device))
        parts = found if isinstance(found, tuple) else (found,)
        room = (batch, length + 1)
        self.parts = [part.new_zeros(*room, part.reshape(1, -1).shape[1]) for part in parts]
        self.open = torch.zeros(batch, length + 2, dtype=torch.bool, device=device)  # before each position
        self.latch = torch.zeros(batch, dtype=torch.bool, device=device)
        self.levels = torch.zeros(2, dtype=torch.float32, device=device)  # θ, release
        self.above, self.each, self.holds = (torch.zeros((), dtype=torch.bool, device=device) for _ in range(3))
        self.slots: set[int] = set()  # whose gate it is
        self.rule: tuple[Any, ...] | None = None

    def note(self, x: Tensor, window: Window, ends: Tensor) -> Tensor | None:
        """Write what it finds in the stream of a pass, (batch, tokens, d) or (batch·tokens, d).

        Returns:
            bool (batch·tokens,): for which tokens its gate is open; None: it gives more than one number.
        """
        here = (window.batch, window.tokens)
        with torch.no_grad():
            found = self.program(x.detach())
            parts = found if isinstance(found, tuple) else (found,)
            for buffer, part in zip(self.parts, parts, strict=True):
                buffer[: window.batch].index_copy_(1, window.at, part.reshape(*here, -1))
            if not self.probe.single:
                return None
            return self._decide(parts[0].reshape(here), window, ends[: window.batch]).reshape(-1)

    def _decide(self, score: Tensor, window: Window, ends: Tensor) -> Tensor:
        level, release = self.levels[0], self.levels[1]
        on = torch.where(self.above, score > level, score < level)
        off = torch.where(self.above, score < release, score > release)
        memory = self.open[: window.batch]
        each = torch.where(self.holds, held(on, off, memory.index_select(1, window.before)[:, 0], window.real), on)
        memory.index_copy_(1, window.at + 1, each)
        memory.index_copy_(1, window.behind, each[:, -1:])  # of many positions that share an entry, the last
        last = window.position == ends[:, None]
        latch = torch.where(last.any(1), (on & last).any(1), self.latch[: window.batch])
        self.latch[: window.batch].copy_(latch)
        return torch.where(self.each, each, latch[:, None])

    def gate(self, slot: int, when: When) -> None:
        """A slot is held back by a condition on this probe.

        Raises:
            ValueError: another condition looks at it.
        """
        condition: Condition = when.condition
        rule = (condition.threshold, condition.release, condition.above, when.per_token)
        if self.slots and self.rule != rule:
            raise ValueError(
                f"steer: {when!r} looks at {self.name!r}, as another condition does; a prepared probe has one gate: prepare it "
                "under a second name, too"
            )
        self.slots.add(slot)
        self.rule = rule
        release = condition.threshold if condition.release is None else condition.release
        self.levels.copy_(torch.tensor([condition.threshold, release]))
        self.above.fill_(condition.above)
        self.each.fill_(when.per_token)
        self.holds.fill_(condition.release is not None)

    def is_same(self, other: Probe, place: Place) -> bool:
        """Whether another object is this probe, as one that was read from a file may be."""
        if self.probe is other:
            return self.place == place
        mine, theirs = ({**one.described(), "origin": None, "place": None} for one in (self.probe, other))
        if self.place != place or mine != theirs:
            return False
        kept, given = self.probe.tensors(), other.tensors()
        return kept.keys() == given.keys() and all(torch.equal(kept[name], given[name]) for name in kept)


class FixedText:
    """The text that a prepared model runs, as far as its graph can say, and all probes that read it.

    Args:
        batch, length: As in `Room`.
        slots: As in `Room`.
        device: Of the stream.
    """

    def __init__(self, batch: int, length: int, slots: int, device: torch.device) -> None:
        self.probes: list[FixedProbe] = []
        self.length, self.device = length, device
        self.window: Window | None = None
        self.opens: dict[int, Tensor] = {}  # number of a gate -> bool (n,), in the running pass
        self.ids = torch.full((batch, length + 1), -1, dtype=torch.int64, device=device)
        self.ends = torch.full((batch,), -1, dtype=torch.int64, device=device)
        self.valid = torch.ones(
            batch, length + 1, dtype=torch.bool, device=device
        )  # False on padding that was announced
        self._stopped = torch.full((batch,), NEVER, dtype=torch.int64, device="cpu")  # as in `over`
        self._zero = torch.zeros((), dtype=torch.int64, device=device)
        # rows, reached, announced, first, passes, and how many there were before this text
        self._seen = torch.zeros(6, dtype=torch.int64, device=device)
        self._serial = torch.zeros((), dtype=torch.int64, device=device)  # of what generate has announced; 0: nothing
        self._gate_of = torch.zeros(slots + 2, dtype=torch.int64, device=device)  # slot + 1 -> gate
        self._announced: tuple[int, Announced] | None = None

    def __bool__(self) -> bool:
        return bool(self.probes)

    # --- before passes -------------------------------------------------------------------------------------------------

    @bookkeeping
    def announce(self, table: Table | None, told: Announced | None = None) -> None:
        """A text comes whose prompts end where a table says; `told`: generate runs it, and says this of it.

        Without a table nothing is known of what comes.
        """
        if not self:
            return
        self.ends.fill_(-1)
        self.valid.fill_(True)
        if table is not None and table.prompt.starts is not None:
            ends = table.ends.repeat_interleave(1 if told is None else told.copies)
            self.ends[: len(ends)] = ends.to(self.device)
        if told is None:
            self._serial.zero_()
            return
        self.check_order(told.prompt)
        valid = told.prompt.valid.repeat_interleave(told.copies, 0).to(self.device)
        self.valid[: len(valid), : valid.shape[1]] = valid
        serial = 1 if self._announced is None else self._announced[0] + 1
        self._announced = serial, told
        self._stopped.fill_(NEVER)
        self._serial.fill_(serial)

    def check_order(self, prompt: Prompt) -> None:
        """Refuse a condition that goes by a text's earlier tokens where rows change places."""
        if prompt.reorders and any(one.slots and one.rule and one.rule[1] is not None for one in self.probes):
            raise ValueError(
                "steer: a condition with release must know the tokens before each one, and beam search hands rows from one to "
                "the other; sample instead"
            )

    def find(self, probe: Probe, place: Place, caller: str) -> FixedProbe:
        """The prepared probe that another object is.

        Raises:
            ValueError: it was not prepared.
        """
        for one in self.probes:
            if one.is_same(probe, place):
                return one
        known = ", ".join(f"{one.name!r} at {one.place}" for one in self.probes) or "none"
        raise ValueError(
            f"{caller}: {probe!r} at {place} is no part of the prepared model; name it in prepare(model, probes=...) before "
            f"compiling (prepared: {known})"
        )

    def gate(self, slot: int, when: When, place: Place) -> None:
        """A slot is held back by a condition that is read at a place."""
        one = self.find(when.condition.probe, place, "steer")
        one.gate(slot, when)
        self._gate_of[slot + 1] = one.number

    def free(self, slots: Sequence[int]) -> None:
        """These slots are gone."""
        for one in self.probes:
            one.slots.difference_update(slots)
        for slot in slots:
            self._gate_of[slot + 1] = 0

    # --- in a pass, as a part of the graph -----------------------------------------------------------------------------

    def begin(self, start: int | Tensor, tokens: Tensor, real: Tensor) -> None:
        """A pass over `tokens` (batch, tokens, …) begins at a position; `real` (batch, tokens) is False on padding."""
        self.opens = {}  # a new one: a graph would be guarded by what the old one held
        first = (self._zero + start).reshape(())
        window = self.window = Window(first, real.to(self.device), self.length)
        window.real = window.real & self.valid[: window.batch].index_select(
            1, window.at
        )  # a static cache hides its mask
        ids = self._zero - 1 if tokens.is_floating_point() else tokens.to(self.device, torch.int64)
        self.ids[: window.batch].index_copy_(1, window.at, torch.where(window.real, ids, PADDING))
        goes_on = (first == self._seen[1]) & (self._seen[0] == window.batch)
        goes_on = goes_on & (first != 0)
        since, began = (
            torch.where(goes_on, old, new) for old, new in ((self._seen[3], first), (self._seen[5], self._seen[4]))
        )
        rows, passes = self._zero + window.batch, self._seen[4] + 1
        self._seen.copy_(torch.stack([rows, first + window.tokens, self._serial, since, passes, began]))

    def note(self, probes: Sequence[FixedProbe], x: Tensor, after: bool) -> None:
        """The probes of a place look at the stream before its edits, or after them."""
        if self.window is None:
            raise RuntimeError("read: a prepared place runs outside a forward pass of the decoder")
        for one in probes:
            if one.probe.after == after:
                found = one.note(x, self.window, self.ends)
                if found is not None:
                    self.opens[one.number] = found

    def close(self, rows: Tensor) -> Tensor:
        """The row table (n, P) without the slots whose gate is shut."""
        gates = self._gate_of[rows.long() + 1]
        for number, found in self.opens.items():
            rows = torch.where((gates == number) & ~found.to(rows.device)[:, None], -1, rows)
        return rows

    # --- after passes --------------------------------------------------------------------------------------------------

    def decision(self, slot: int) -> Tensor | None:
        """bool (batch,) on the CPU: what the latched condition of a slot has decided; None before any pass."""
        rows = int(self._seen[0])
        found = next((one.latch[:rows].cpu() for one in self.probes if slot in one.slots), None)
        return found if rows else None

    def mark(self) -> tuple[int, int]:
        """Passes until now, and what the latest text has reached."""
        return int(self._seen[4]), int(self._seen[1])

    @bookkeeping
    def scores(self, one: FixedProbe, reading: Attachment, mark: tuple[int, int]) -> Scores | None:
        """What a probe has read of the latest text, where an attachment reads, since a mark; None: no pass has run."""
        rows, reached, serial, first, passes, began = self._seen.tolist()
        if passes == mark[0]:
            return None
        if reached > self.length:
            raise ValueError(
                f"read: the text has {reached} tokens; prepare made room for length={self.length}: unprepare, and prepare for "
                "more"
            )
        ids = self.ids[:rows, :reached].cpu()
        told = self._told(serial, rows, ids, reading)
        named = self._named(told, reading, rows)
        positions = torch.arange(reached, device="cpu").clamp(max=named.shape[1] - 1)
        read = named[:, positions] & (ids != PADDING) & ~over(ids, told.prompt, told.ends, self._stopped[:rows])
        since = max(first, told.held, mark[1] if began < mark[0] else 0)
        read[:, :since] = False
        parts = [part[:rows, :reached].cpu() for part in one.parts]
        unseen = named[:, :since].any(1)
        return scores_of(one.probe, parts, read, unseen)

    def crossed(
        self, one: FixedProbe, reading: Attachment, mark: tuple[int, int], threshold: float, above: bool
    ) -> Tensor:
        """bool (batch,): which rows hold a token, among those that `scores` says, beyond a threshold; these end here."""
        scores = self.scores(one, reading, mark)
        if scores is None:
            return torch.zeros(len(self.ends), dtype=torch.bool, device="cpu")
        found = (scores.values > threshold if above else scores.values < threshold).any(1)
        stopped = self._stopped[: len(found)]
        stopped.copy_(torch.where(found, stopped.clamp(max=scores.values.shape[1]), stopped))
        return found

    def _told(self, serial: int, rows: int, ids: Tensor, reading: Attachment) -> Announced:
        """What is known of the latest text: what generate announced, or what a bare pass showed."""
        if serial and self._announced is not None and self._announced[0] == serial:
            return self._announced[1]
        given = reading.prompt_length
        starts = None if given is None else torch.tensor(given, device="cpu").expand(rows).clone()
        length = ids.shape[1] if starts is None else int(starts.max())
        valid = torch.ones(rows, length, dtype=torch.bool, device="cpu")
        valid[:, : ids.shape[1]] = ids[:, :length] != PADDING
        return Announced(Prompt(valid, starts), 1, ((), None), 0)

    @staticmethod
    def _named(told: Announced, reading: Attachment, rows: int) -> Tensor:
        """bool (batch, P + 1): which positions an attachment reads."""
        table = Table(told.prompt, [reading.layer(told.prompt.batch)], torch.device("cpu"))
        return (table.rows >= 0).any(2).repeat_interleave(rows // told.prompt.batch, 0)


def check_probes(probes: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The probes of `prepare` by name.

    Raises:
        TypeError: they are no dict of names.
    """
    if probes is None:
        return {}
    if not isinstance(probes, Mapping) or not all(isinstance(name, str) and name for name in probes):
        raise TypeError(f"prepare: probes must be a dict of name -> probe; got {probes!r}")
    return probes
