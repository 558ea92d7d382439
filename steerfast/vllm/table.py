"""The row table of an engine step: which slots edit which token of the batch, in buffers that never move.

What a request wants is one row of six numbers a column, written when it arrives: slots, the first position that each acts on,
the position where it stops, its strength, which tokens it looks for, and in which spans; and which tokens open and close
these. A step gathers these rows by request, compares them with the positions (and, where someone looks, the tokens) that the
engine itself has on its device, and writes the table: nothing is read back, and no count that is only a guess under
speculation is used. Whether a span is open behind a request's last token is kept from step to step. A slot may stand for a run
of them, one for each of a prompt's first tokens; where a plan has such runs, one more table says which slot that is at each
position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from steerfast._checks import MAX_SLOTS_PER_ROW
from steerfast._positions import EVER, Between

from .pieces import Span

EVERY_TOKEN = 1
"""Of `TokenSets`: not in the empty set."""
SPANS = 2
"""Different spans that a request's selectors can name."""
__all__ = ["EVER", "EVERY_TOKEN", "SPANS", "Owner", "RowTable", "TokenSets"]


class Owner(NamedTuple):
    """One slot of a request: it edits positions [first, stop), multiplied by strength.

    With ids only where the token is among them, or where it is not; with spans only inside or outside of these.
    """

    slot: int
    strength: float
    first: int
    stop: int
    ids: tuple[int, ...] = ()
    among: bool = False
    spans: tuple[tuple[Span, bool], ...] = ()


class TokenSets:
    """Sets of token ids that requests in flight look for, each held once, on the device.

    A set is known by a number whose last bit says that a token must not be in it: 1 is the complement of nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._numbers: dict[tuple[int, ...], int] = {}
        self._held: dict[tuple[int, ...], int] = {}
        self._free: list[int] = []
        self._members = torch.zeros(1, 1, dtype=torch.bool, device=device)  # the last column is for all larger ids
        self._new: set[tuple[int, ...]] = set()

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def hold(self, ids: tuple[int, ...], among: bool) -> int:
        """The number by which a request looks for these."""
        if not ids:
            return 0 if among else EVERY_TOKEN
        if ids not in self._numbers:
            if not self._free or max(ids) >= self._members.shape[1] - 1:
                self._grow(max(ids) + 2)
            self._numbers[ids] = self._free.pop()
            self._new.add(ids)
        self._held[ids] = self._held.get(ids, 0) + 1
        return 2 * self._numbers[ids] + (not among)

    def release(self, ids: tuple[int, ...]) -> None:
        """A request that looked for these has left."""
        if not ids:
            return
        self._held[ids] -= 1
        if not self._held[ids]:
            del self._held[ids]
            self._new.discard(ids)
            self._free.append(self._numbers.pop(ids))

    def found(self, numbers: Tensor, tokens: Tensor) -> Tensor:
        """bool, like numbers (tokens, columns): whether each token is one that is looked for."""
        for ids in self._new:
            self._members[self._numbers[ids]].zero_().index_fill_(0, _send(ids, self._device), True)
        self._new.clear()
        last = self._members.shape[1] - 1
        column = torch.where((tokens < 0) | (tokens > last), last, tokens).long()
        return self._members[(numbers >> 1).long(), column[:, None]] ^ (numbers & 1).bool()

    def _grow(self, width: int) -> None:
        count, held = self._members.shape
        rows, columns = (count if self._free else max(2 * count, 8)), max(width, held)
        if rows > count:
            self._free = [*range(rows - 1, count - 1, -1)]
        if columns > held:
            self._new.update(self._numbers)  # written anew
            self._members = torch.zeros(rows, columns, dtype=torch.bool, device=self._device)
        else:
            self._members = torch.cat([self._members, self._members.new_zeros(rows - count, columns)])


class RowTable:
    """Who edits which token of the running batch.

    Args:
        tokens: How many tokens a batch can have, padding included.
        device: Where the model runs.
        runs: Slots of every bank, and the length of the longest run that one of them may stand for; 0: of itself alone.
        width: Columns: how many slots can edit a token, one after the other.
    """

    def __init__(
        self, tokens: int, device: torch.device, runs: tuple[int, int] = (0, 0), width: int = MAX_SLOTS_PER_ROW
    ) -> None:
        self.width = width
        self.rows = torch.full((tokens, width), -1, dtype=torch.int32, device=device)
        self.scale = torch.ones(tokens, width, dtype=torch.float32, device=device)
        self.tokens = 0  # of the running batch
        self.step = 0  # on the CPU: changes whenever the table does
        self._wanted = torch.zeros(
            1, 6 * width + 2 * SPANS, dtype=torch.int32, device=device
        )  # one line per request; no graph sees it
        self._open = torch.zeros(1, 1, SPANS, dtype=torch.bool, device=device)  # of each line, behind its last tokens
        self._spanned: set[str] = set()  # requests that name spans
        self._wanted[0, :width] = -1  # whoever is not steered
        self._sets = TokenSets(device)
        self._looks: dict[str, list[tuple[int, ...]]] = {}  # what each request holds there
        self._free: list[int] = []
        self._line: dict[str, int] = {}
        self._new: dict[int, np.ndarray] = {}
        self._steady: list[int] | None = None  # the lines of a batch that may go on: a token each, what they want below
        self._reached = np.zeros((0, 1))  # on the host: where it was; nothing changes from there on
        # gathered for the tokens of a batch, (tokens, width); the lines of its requests, and whose each token is
        self._slots = self._first = self._stop = self._look = self._needs = self.rows[:0]
        self._lines = self._owner = torch.zeros(0, dtype=torch.int64, device=device)
        self._count = torch.arange(tokens, device=device)
        self._runs = torch.zeros(runs, dtype=torch.int32, device=device)  # the slot that acts at a position
        self._write = self._on_host if device.type == "cpu" else self._on_device

    def remember(self, tokens: int) -> None:
        """Keep what is open behind each of a request's last tokens, so that a step may take back all but one of these."""
        self._open = self._open.new_zeros(len(self._open), tokens, SPANS)

    def put(self, request: str, owners: Sequence[Owner]) -> None:
        """A request arrives; without owners it is not steered."""
        self.drop(request)
        if not owners:
            return
        if not self._free:
            self._grow()
        line = self._line[request] = self._free.pop()
        wanted = np.zeros(self._wanted.shape[1], dtype=np.int32)
        columns = wanted[: 6 * self.width].reshape(6, self.width)
        columns[0] = -1
        spans = sorted({span for owner in owners for span, _ in owner.spans}, key=str)
        for column, owner in enumerate(owners):
            number = self._sets.hold(owner.ids, owner.among)
            needs = sum((1 if inside else 2) << 2 * spans.index(span) for span, inside in owner.spans)
            columns[:, column] = owner.slot, owner.first, owner.stop, 0, number, needs
            columns[3, column] = np.array([owner.strength], dtype=np.float32).view(np.int32)[0]
        sets = [(span.opens, span.closes) if isinstance(span, Between) else (span.ids, ()) for span in spans]
        for i, pair in enumerate(sets):
            wanted[6 * self.width + 2 * i :][:2] = [self._sets.hold(ids, True) for ids in pair]
        self._new[line] = wanted
        if spans:
            self._spanned.add(request)
        if held := [*(owner.ids for owner in owners), *(ids for pair in sets for ids in pair)]:
            self._looks[request] = [ids for ids in held if ids]

    def drop(self, request: str) -> None:
        """A request has left; nothing happens if it was not steered."""
        line = self._line.pop(request, None)
        if line is not None:
            self._free.append(line)
        self._spanned.discard(request)
        for ids in self._looks.pop(request, ()):
            self._sets.release(ids)

    def spread(self, slots: Sequence[int]) -> None:
        """The first of these slots stands for all of them, one for each of a prompt's first tokens; a single one for itself."""
        if longest := self._runs.shape[1]:
            run = [*slots, *[slots[-1]] * (longest - len(slots))]
            self._runs[slots[0]] = self._send(run, np.int32)

    def __contains__(self, request: str) -> bool:
        return request in self._line

    def __len__(self) -> int:
        return len(self._line)

    def fill(
        self, requests: Iterable[str], starts: Tensor, positions: Tensor, tokens: int, ids: Tensor | None = None
    ) -> None:
        """Write the table of a batch.

        Args:
            requests: Its requests, in order.
            starts: First token of each in the batch, and one past the last: integer (requests + 1,), on the device.
            positions: Position of every token in its request, at least `tokens` of them, on the device.
            tokens: Tokens of the batch; what the engine pads it with stays unsteered.
            ids: The token at each of these positions, on the device; needed while a request looks for some.
        """
        if self._sets and ids is None:
            raise RuntimeError("steerfast: a request looks for tokens, and this engine does not show them")
        lines = [self._line.get(request, 0) for request in requests] if self._line else []
        if any(lines):
            self._write(lines, starts, positions, tokens, ids)
        elif self.tokens:
            self.rows[: self.tokens].fill_(-1)
            self.tokens = 0
            self.step += 1

    def _on_device(self, lines: list[int], starts: Tensor, positions: Tensor, tokens: int, ids: Tensor | None) -> None:
        """A dozen launches, four while a batch decodes, and no word back: the device alone knows positions under speculation."""
        if self._new:
            self._wanted.index_copy_(0, self._send([*self._new]), self._send([*self._new.values()], np.int32))
        if self._new or tokens != len(lines) or lines != self._steady:
            self._new.clear()
            self._lines = self._send(lines)
            self._owner = self._count[:tokens]
            if tokens != len(lines):
                bounds = starts[1 : len(lines) + 1]
                self._owner = torch.searchsorted(bounds, self._owner.to(starts.dtype), right=True)
                self._owner.clamp_(max=len(lines) - 1)
            index = self._lines[self._owner]
            columns = self._wanted[index, : 6 * self.width].view(-1, 6, self.width)
            self._slots, self._first, self._stop, strength, self._look, self._needs = columns.unbind(1)
            self.scale[:tokens] = strength.view(torch.float32)  # each of the six is (tokens, width)
            self._steady = lines if tokens == len(lines) else None
        here = positions[:tokens, None]
        acting = (here >= self._first) & (here < self._stop)
        if self._sets and ids is not None:
            acting &= self._sets.found(self._look, ids[:tokens])
            if self._spanned:
                acting &= self._inside(self._needs, starts, positions[:tokens], ids[:tokens])
        slots = self._slots
        if longest := self._runs.shape[1]:
            slots = self._runs[slots.long(), here.clamp(max=longest - 1)]
        self.rows[:tokens] = torch.where(acting, slots, -1)
        if self.tokens > tokens:
            self.rows[tokens : self.tokens].fill_(-1)
        self.tokens = tokens

    def _on_host(self, lines: list[int], starts: Tensor, positions: Tensor, tokens: int, ids: Tensor | None) -> None:
        """The same where the engine runs on the CPU: NumPy's small calls cost a tenth. An equal table is left as it is."""
        here = positions.numpy()[:tokens, None]
        if lines == self._steady and not self._new and tokens == self.tokens and (here >= self._reached).all():
            return
        wanted, rows, scale = self._wanted.numpy(), self.rows.numpy(), self.scale.numpy()
        for line, values in self._new.items():
            wanted[line] = values
        self._new.clear()
        index, owner = np.asarray(lines), np.arange(len(lines))
        if tokens != len(lines):
            owner = np.repeat(owner, np.diff(starts.numpy()[: len(lines) + 1]))
        columns = wanted[index[owner], : 6 * self.width].reshape(-1, 6, self.width)
        slots, first, stop, strength, look, needs = columns.transpose(1, 0, 2)
        begun, goes_on = here >= first, here < stop
        changes = ~begun | (goes_on & (stop < EVER))
        if self._sets and ids is not None:
            changes |= ((look > EVERY_TOKEN) | (needs > 0)) & goes_on
            goes_on &= self._sets.found(torch.from_numpy(look), ids[:tokens]).numpy()
            if self._spanned:
                self._lines, self._owner = torch.from_numpy(index), torch.from_numpy(owner)
                goes_on &= self._inside(torch.from_numpy(needs), starts, positions[:tokens], ids[:tokens]).numpy()
        self._steady = (
            lines if tokens == len(lines) and not changes.any() else None
        )  # while these decode, nothing changes
        self._reached = here.copy()
        if longest := self._runs.shape[1]:
            slots = self._runs.numpy()[slots, np.minimum(here, longest - 1)]
        slots = np.where(begun & goes_on, slots, -1)
        weights = strength.view(np.float32)
        if tokens == self.tokens and np.array_equal(slots, rows[:tokens]) and np.array_equal(weights, scale[:tokens]):
            return
        rows[:tokens], scale[:tokens] = slots, weights
        rows[tokens : self.tokens] = -1
        self.tokens = tokens
        self.step += 1

    def _inside(self, needs: Tensor, starts: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
        """bool, like needs (tokens, columns): whether each token lies in the spans that it must, and in none that it must not."""
        owner, count = self._owner, len(self._lines)
        sets = self._wanted[self._lines, 6 * self.width :][owner].view(-1, SPANS, 2)
        opens, closes = (self._sets.found(sets[:, :, part], ids) for part in (0, 1))
        first = starts[:count].long()[owner]
        begins, ends, kept = starts[:count].long(), starts[1 : count + 1].long(), self._open.shape[1]
        begun = positions[begins].long()
        before = (
            self._open[self._lines, (begun - 1) % kept] & (begun > 0)[:, None]
        )  # a text that begins anew is in none
        before = before[owner]
        order = 2 * (self._count[: len(owner)] + 1)[:, None]
        latest = torch.where(opens | closes, order + opens.long(), 0).cummax(0).values
        behind = torch.where(latest >= 2 * (first + 1)[:, None], latest % 2 == 1, before)
        ahead = torch.where((self._count[: len(owner)] == first)[:, None], before, behind.roll(1, 0))
        for back in range(kept):
            last = torch.maximum(ends - 1 - back, begins)
            self._open[self._lines, positions[last].long() % kept] = behind[last]
        inside = ahead | (opens & (sets[:, :, 1] > 0))  # what opens a span between two tokens is a part of it
        acting = torch.ones_like(needs, dtype=torch.bool)
        for i in range(SPANS):
            need, there = (needs >> 2 * i) & 3, inside[:, i, None]
            acting &= (need == 0) | torch.where(there, need == 1, need == 2)
        return acting

    def _grow(self) -> None:
        count = self._wanted.shape[0]
        self._wanted = torch.cat([self._wanted, self._wanted.new_zeros(max(count, 64), self._wanted.shape[1])])
        self._open = torch.cat([self._open, self._open.new_zeros(max(count, 64), *self._open.shape[1:])])
        self._free = list(range(self._wanted.shape[0] - 1, count - 1, -1))

    def _send(self, values: Sequence[object], dtype: type = np.int64) -> Tensor:
        return _send(values, self.rows.device, dtype)


def _send(values: Sequence[object], device: torch.device, dtype: type = np.int64) -> Tensor:
    host = torch.from_numpy(np.asarray(values, dtype=dtype))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
