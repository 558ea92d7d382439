"""Who is steered where: from positions, padding and a plan per batch row to the row table of a forward pass.

A prompt of P tokens has P + 1 columns in a table: one per prompt position, and one that every later position shares.
The table is built once per prompt on the host; a forward pass over tokens [start, stop) is a slice of it, so that a
decode step costs no tensor work at all, whatever the cache: dynamic, static, chunked prefill, assisted generation.

A selector that looks at token ids has all its positions in the table, and each pass takes out those that its own tokens
rule out. What it must know of earlier tokens ("after", "between") is one bit per position, kept with the prompt, so that a
cache that steps back, as assisted generation makes it do, finds the bit that belongs there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerfast._positions import (
    ALL,
    After,
    Between,
    Ids,
    Leaf,
    Selector,
    Special,
    beyond,
    evaluate,
    parse,
    placed,
    told,
)

from .bookkeeping import bookkeeping
from .prompts import Memory, Prompt, Rule, allowed, by_token, copies_of, last_tokens, real_tokens, with_later

Owners = tuple[tuple[int, float], ...]
"""(slot, scale) applied to a token, left to right."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One plan per batch row, as far as positions matter: which slots, how strong, and where."""

    slots: list[tuple[int, ...]]  # per batch row, () for an unsteered one
    scales: list[float]  # per batch row
    rules: list[Rule]  # per batch row
    latched: frozenset[int] = frozenset()  # slots that a condition holds back before the last prompt token
    gated: frozenset[int] = frozenset()  # slots with a condition of either kind
    by_token: dict[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # slots that stand for one per prompt token, to those


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass does: the same owners for every token, or a table."""

    owners: Owners | None
    rows: Tensor | None = field(default=None)  # int32 (n, P)
    scale: Tensor | None = field(default=None)  # float32 (n, P)


IDLE = Pass(owners=())

LAST = parse("steer", "last")


@dataclass(eq=False)
class Reading:
    """A selector that looks at tokens, and whose columns it rules."""

    selector: Selector
    governs: Tensor  # bool (batch, columns)


class Table:
    """The row table of one batch of prompts: owners of every prompt position and of all later ones.

    Args:
        prompt: The batch.
        layers: The active handles, in the order in which they act; their columns stand side by side.
        device: Where the passes' tables are needed.
    """

    def __init__(self, prompt: Prompt, layers: list[Layer], device: torch.device) -> None:
        widths = [max((len(slots) for slots in layer.slots), default=0) for layer in layers]
        batch, span = prompt.batch, prompt.valid.shape[1] + 1
        rows = torch.full((batch, span, sum(widths)), -1, dtype=torch.int32, device="cpu")
        scale = torch.ones(batch, sum(widths), dtype=torch.float32, device="cpu")
        readings: dict[Selector, Reading] = {}
        column = 0
        for layer, width in zip(layers, widths, strict=True):
            for row, slots in enumerate(layer.slots):
                if not slots or layer.scales[row] == 0.0:
                    continue
                rule = layer.rules[row]
                where = allowed(prompt, row, rule)
                if isinstance(rule, Selector) and rule.reads_tokens:
                    governs = torch.zeros(batch, sum(widths), dtype=torch.bool, device="cpu")
                    governs = readings.setdefault(rule, Reading(rule, governs)).governs
                    governs[row, column : column + len(slots)] = True
                rows[row, where, column : column + len(slots)] = torch.tensor(slots, dtype=torch.int32, device="cpu")
                scale[row, column : column + width] = layer.scales[row]
                held = [column + i for i, slot in enumerate(slots) if slot in layer.latched]
                if held:  # nothing is decided before the last prompt token
                    rows[row, ~allowed(prompt, row, LAST), held[0] : held[-1] + 1] = -1
                for i, slot in enumerate(slots):
                    if slot in layer.by_token:
                        rows[row, :, column + i] = by_token(prompt, row, layer.by_token[slot])
            column += width
        self.prompt = prompt
        self.rows, self.scale = rows, scale
        self._device = device
        gated = frozenset().union(*(layer.gated for layer in layers))
        self._read = Readings(prompt, list(readings.values()), device) if readings else None
        self._runs, owners = _runs(rows, scale, gated, None if self._read is None else self._read.dynamic)
        self._passes = [None if found is None else Pass(found) for found in owners]
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._later: dict[tuple[int, int], Pass] = {}
        self._ends: Tensor | None = None
        self._reach: tuple[int, int] | None = None  # the first and the last of `ends`

    @property
    def span(self) -> int:
        """P + 1."""
        return self.rows.shape[1]

    @property
    def ends(self) -> Tensor:
        """int64 (batch,): the position of each prompt's last real token."""
        if self._ends is None:
            if self.prompt.starts is None:
                raise ValueError(
                    "steer: a condition needs the prompt's length; pass prompt_length= to steer, or use generate"
                )
            self._ends = last_tokens(self.prompt)
        return self._ends

    def ends_in(self, start: int | Tensor, tokens: int) -> bool:
        """Whether a prompt may end in a pass over [start, start + tokens): where only a device knows the start, it may."""
        if not isinstance(start, int):
            return True
        if self._reach is None:
            self._reach = int(self.ends.amin()), int(self.ends.amax())
        first, last = self._reach
        return first < start + tokens and last >= start

    @property
    def remembers(self) -> bool:
        """Whether a pass depends on the tokens of earlier ones."""
        return self._read is not None and self._read.remembers

    def at(self, start: int, tokens: int, batch: int, ids: Tensor | None = None) -> Pass:
        """The pass over positions [start, start + tokens) of every row; rows may have been repeated by generate.

        Args:
            start: The first position.
            tokens: How many.
            batch: Rows of the pass.
            ids: Its tokens (batch, tokens), where the pass shows them.
        """
        if self._read is not None and not (start >= self.span - 1 and self._read.settled):
            return self._by_tokens(self._read, start, tokens, batch, ids)
        first, last = min(start, self.span - 1), min(max(start + tokens, 1), self.span)
        run = bisect_right(self._runs, first) - 1
        same = self._passes[run]
        if same is not None and last <= self._runs[run + 1]:
            return same
        return self._part(start, tokens, batch)

    def repeats_virtual(self, start: int | Tensor, tokens: Tensor, ids: Tensor | None) -> bool:
        """Whether a pass behind the prompt has the virtual tokens in front once more, as embeddings without ids show."""
        virtual = self.prompt.virtual
        return (
            virtual > 0
            and ids is None
            and isinstance(start, int)
            and start >= self.span - 1
            and tokens.shape[1] > virtual
        )

    @bookkeeping
    def behind_virtual(self, tokens: int, batch: int) -> Pass:
        """The pass over generated tokens with the virtual ones in front once more."""
        rows, scale = self._on_device(batch)
        virtual = self.prompt.virtual
        later = rows[:, -1:].expand(-1, tokens - virtual, -1)
        return _flat(torch.cat([rows[:, :virtual], later], 1), scale)

    @bookkeeping
    def _part(self, start: int, tokens: int, batch: int) -> Pass:
        """The pass over positions that have no common owners."""
        if start >= self.span - 1:  # generated positions share one column, so every decode step shares one pass
            if (tokens, batch) not in self._later:
                rows, scale = self._on_device(batch)
                self._later[tokens, batch] = _flat(rows[:, -1:].expand(-1, tokens, -1), scale)
            return self._later[tokens, batch]
        rows, scale = self._on_device(batch)
        if start + tokens <= self.span:
            part = rows[:, start : start + tokens]
        else:
            part = rows[:, self._columns(start, tokens, rows.device)]
        return _flat(part, scale)

    @bookkeeping
    def gather(self, start: Tensor, tokens: int, batch: int, ids: Tensor | None = None) -> Pass:
        """`at` for a start that only the device knows: no host sync, but for one a prompt where earlier tokens count."""
        if self._read is not None:
            return self._by_tokens(self._read, start, tokens, batch, ids)
        rows, scale = self._on_device(batch)
        return _flat(rows[:, self._columns(start, tokens, rows.device)], scale)

    @bookkeeping
    def real(self, start: int | Tensor, tokens: int, batch: int) -> Tensor:
        """bool (batch, tokens): which tokens of a pass over [start, start + tokens) are no padding."""
        valid = self.prompt.valid
        if isinstance(start, int) and start >= valid.shape[1]:
            return torch.ones(batch, tokens, dtype=torch.bool, device=self._device)
        whole = torch.cat([valid, torch.ones_like(valid[:, :1])], 1).to(self._device)
        return whole.repeat_interleave(batch // self.prompt.batch, 0)[:, self._columns(start, tokens, self._device)]

    def _columns(self, start: int | Tensor, tokens: int, device: torch.device) -> Tensor:
        """The table's columns of positions [start, start + tokens)."""
        first = start.to(device) if isinstance(start, Tensor) else start
        return (first + torch.arange(tokens, device=device)).clamp(max=self.span - 1)

    @bookkeeping
    def _by_tokens(self, read: Readings, start: int | Tensor, tokens: int, batch: int, ids: Tensor | None) -> Pass:
        """The pass where its tokens decide, too."""
        rows, scale = self._on_device(batch)
        if isinstance(start, int) and start >= self.span - 1:
            return _flat(read.close(rows[:, -1:].expand(-1, tokens, -1), None, start, ids), scale)
        columns = self._columns(start, tokens, rows.device)
        return _flat(read.close(rows[:, columns], columns, start, ids), scale)

    def _on_device(self, batch: int) -> tuple[Tensor, Tensor]:
        """The tables on the device, with each prompt's row repeated for its beams or samples."""
        if batch not in self._moved:
            copies = copies_of(self.prompt, batch)
            self._moved[batch] = tuple(  # type: ignore[assignment]
                table.repeat_interleave(copies, 0).to(self._device, non_blocking=True)
                for table in (self.rows, self.scale)
            )
        return self._moved[batch]


class Readings:
    """The selectors of a batch that look at tokens: what of a pass they rule out.

    Args:
        prompt: The batch.
        readings: The selectors, each once.
        device: Where the passes' tables are needed.

    Attributes:
        settled: Whether no generated token has to be looked at.
        remembers: Whether earlier tokens count.
        dynamic: bool (P + 1,), the columns of the table that do not tell by themselves.

    Raises:
        ValueError: earlier tokens count, and rows may change places.
    """

    def __init__(self, prompt: Prompt, readings: list[Reading], device: torch.device) -> None:
        self._later = later = {reading.selector: beyond(reading.selector) for reading in readings}
        self.settled = all(isinstance(left, bool) for left in later.values())
        self.remembers = any(reading.selector.remembers for reading in readings)
        self.dynamic = with_later(torch.ones(prompt.valid.shape[1], dtype=torch.bool, device="cpu"), not self.settled)
        for selector, left in later.items():
            if prompt.reorders and isinstance(left, Selector) and left.remembers:
                raise ValueError(
                    f"steer: positions={str(selector)!r} must know the tokens before each one, and beam search hands rows "
                    "from one to the other, as a cache does that is reordered; sample instead, or name single tokens with ids:"
                )
        self._prompt, self._readings, self._device = prompt, readings, device
        self._fixed: dict[int, dict[Leaf, Tensor]] = {}
        self._governs: dict[int, list[Tensor]] = {}
        self._wanted: dict[tuple[int, ...], Tensor] = {}
        self._trusted: set[tuple[Leaf, int]] = set()  # memories that no pass has been left out of

    def close(self, part: Tensor, columns: Tensor | None, start: int | Tensor, ids: Tensor | None) -> Tensor:
        """The rows (batch, tokens, slots) of a pass without those that its tokens rule out.

        Args:
            part: The rows.
            columns: Which columns of the table they are; None: all its tokens are generated ones.
            start: Its first position.
            ids: Its tokens.
        """
        batch, tokens = part.shape[:2]
        if ids is None or ids.shape[:2] != (batch, tokens):
            raise ValueError(
                f"steer: positions={str(self._readings[0].selector)!r} looks at token ids, which this forward pass does not "
                "show (it is given embeddings); pass input_ids"
            )
        ids = ids.to(self._device)
        fixed = self._fixed_for(batch)
        here = {} if columns is None else {leaf: table[:, columns] for leaf, table in fixed.items()}
        real = here.get(ALL)

        def among(wanted: tuple[int, ...]) -> Tensor:
            if wanted not in self._wanted:
                self._wanted[wanted] = torch.tensor(wanted, device=self._device)
            found = self._wanted[wanted]
            hits = torch.isin(ids, found) if len(wanted) > 8 else (ids[..., None] == found).any(2)
            return hits if real is None else hits & real

        def value_of(leaf: Leaf) -> Tensor:
            if leaf not in here:
                here[leaf] = self._told(leaf, among, start, batch, tokens)
            return here[leaf]

        for reading, governs in zip(self._readings, self._governs[batch], strict=True):
            selector = reading.selector if columns is not None else self._later[reading.selector]
            if isinstance(selector, bool):
                continue  # the table has it already
            where = evaluate(selector, value_of)
            part = torch.where(governs[:, None] & ~where[:, :, None], -1, part)
        return part

    def _told(self, leaf: Leaf, among: Callable[..., Tensor], start: int | Tensor, batch: int, tokens: int) -> Tensor:
        """Where a leaf holds that tokens decide; what it remembers goes on behind them."""
        if isinstance(leaf, Ids):
            return told(leaf, among, None)[0]
        memory = self._memory(leaf, start, batch)  # type: ignore[arg-type]  # no word, no index, no window
        memory.room((start if isinstance(start, int) else memory.reached) + tokens + 1)
        if isinstance(start, int):
            holds, behind = told(leaf, among, memory.open[:, start])  # type: ignore[arg-type]
            memory.open[:, start + 1 : start + tokens + 1] = behind  # type: ignore[assignment]
            memory.reached = start + tokens
            return holds
        first = start.to(self._device).reshape(1)
        holds, behind = told(leaf, among, memory.open.index_select(1, first)[:, 0])  # type: ignore[arg-type]
        memory.open.index_copy_(1, first + torch.arange(1, tokens + 1, device=self._device), behind)  # type: ignore[arg-type]
        memory.reached += tokens  # at most: only the device knows
        return holds

    def _memory(self, leaf: After | Between, start: int | Tensor, batch: int) -> Memory:
        memories, key = self._prompt.memories, (leaf, batch)
        if key not in memories:
            memories[key] = Memory.of(leaf, self._prompt, copies_of(self._prompt, batch), self._device)
        found = memories[key]
        if isinstance(start, int) or key not in self._trusted:
            first = int(start)  # of a static cache once, at the first pass
            if first > found.reached:
                raise ValueError(
                    f"steer: positions with {str(leaf)!r} must know the {first} tokens before this forward pass, and only "
                    f"{found.reached} of them ran under the plan; run the text from its start, or use generate"
                )
            if isinstance(start, Tensor):
                found.reached = first
            self._trusted.add(key)
        return found

    def _fixed_for(self, batch: int) -> dict[Leaf, Tensor]:
        """bool (batch, P + 1) of each leaf that the prompt decides, and of what is real."""
        if batch not in self._fixed:
            prompt, copies, length = self._prompt, copies_of(self._prompt, batch), self._prompt.valid.shape[1]
            leaves = {leaf for one in self._readings for leaf in one.selector.leaves} | {ALL}
            tables: dict[Leaf, list[Tensor]] = {leaf: [] for leaf in leaves if not isinstance(leaf, _TOLD)}
            for row in range(prompt.batch):
                real, start = real_tokens(prompt, row), 0 if prompt.starts is None else int(prompt.starts[row])
                for leaf, rows in tables.items():
                    rows.append(with_later(prompt.valid[row], True) & placed(leaf, real, start, length))
            self._fixed[batch] = {
                leaf: torch.stack(rows).repeat_interleave(copies, 0).to(self._device) for leaf, rows in tables.items()
            }
            self._governs[batch] = [one.governs.repeat_interleave(copies, 0).to(self._device) for one in self._readings]
        return self._fixed[batch]


_TOLD = (Ids, Special, After, Between)


def _flat(part: Tensor, scale: Tensor) -> Pass:
    batch, tokens, columns = part.shape
    weights = scale[:, None, :].expand(batch, tokens, columns)
    return Pass(None, part.reshape(-1, columns), weights.reshape(-1, columns))


def _runs(
    rows: Tensor, scale: Tensor, gated: frozenset[int], dynamic: Tensor | None
) -> tuple[list[int], list[Owners | None]]:
    """Runs of positions with equal columns: their first positions (and the end), and the owners where all rows agree.

    A slot with a condition may be shut for one row and open for the next, so its runs have no common owners; the same holds
    where tokens decide (`dynamic`).
    """
    span = rows.shape[1]
    changed = (rows[:, 1:] != rows[:, :-1]).any(2).any(0)
    if dynamic is not None:
        changed |= dynamic[1:] != dynamic[:-1]
    starts = [0, *(changed.nonzero().flatten() + 1).tolist()]
    agree = (rows == rows[:1]).all(2).all(0)
    same_scale = bool((scale == scale[:1]).all())
    owners: list[Owners | None] = []
    for start in starts:
        idle = bool((rows[:, start] < 0).all())
        if idle:
            owners.append(())
        elif (
            (dynamic is None or not dynamic[start])
            and agree[start]
            and same_scale
            and gated.isdisjoint(rows[0, start].tolist())
        ):
            pairs = zip(rows[0, start].tolist(), scale[0].tolist(), strict=True)
            owners.append(tuple((slot, weight) for slot, weight in pairs if slot >= 0))
        else:
            owners.append(None)
    return [*starts, span], owners
