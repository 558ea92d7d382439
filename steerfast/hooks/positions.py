"""Who is steered where: from positions, padding and a plan per batch row to the row table of a forward pass.

A prompt of P tokens has P + 1 columns in a table: one per prompt position, and one that every later position shares.
The table is built once per prompt on the host; a forward pass over tokens [start, stop) is a slice of it, so that a
decode step costs no tensor work at all, whatever the cache: dynamic, static, chunked prefill, assisted generation.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import torch
from torch import Tensor

Positions = str | tuple[int, ...] | Tensor
Owners = tuple[tuple[int, float], ...]
"""(slot, scale) applied to a token, left to right."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is known of a batch of prompts.

    Attributes:
        valid: bool (batch, P), False on padding.
        starts: int64 (batch,), the first generated position of each row; None if the prompt's length is unknown.
        virtual: Positions in front that hold no token of the text (soft prompts): "all" has them, nothing else has.
    """

    valid: Tensor
    starts: Tensor | None
    virtual: int = 0

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.valid.shape[0]

    def behind(self, virtual: int) -> Prompt:
        """The same prompt behind so many virtual tokens."""
        front = self.valid.new_ones(self.batch, virtual)
        starts = None if self.starts is None else self.starts + virtual
        return Prompt(torch.cat([front, self.valid], dim=1), starts, self.virtual + virtual)

    @classmethod
    def whole(cls, batch: int, length: int, valid: Tensor | None = None) -> Prompt:
        """A prompt that fills all positions below `length`."""
        valid = torch.ones(batch, length, dtype=torch.bool) if valid is None else valid
        return cls(valid, torch.full((batch,), length))


@dataclass(frozen=True, eq=False)
class Layer:
    """One plan per batch row, as far as positions matter: which slots, how strong, and where."""

    slots: list[tuple[int, ...]]  # per batch row, () for an unsteered one
    scales: list[float]  # per batch row
    positions: list[Positions]  # per batch row
    latched: frozenset[int] = frozenset()  # slots that a condition holds back before the last prompt token
    gated: frozenset[int] = frozenset()  # slots with a condition of either kind


@dataclass(frozen=True, eq=False)
class Pass:
    """What one forward pass does: the same owners for every token, or a table."""

    owners: Owners | None
    rows: Tensor | None = field(default=None)  # int32 (n, P)
    scale: Tensor | None = field(default=None)  # float32 (n, P)


IDLE = Pass(owners=())


def allowed(prompt: Prompt, row: int, positions: Positions) -> Tensor:
    """bool (P + 1,): which positions of one batch row a plan acts on; the last entry stands for every later one.

    Raises:
        ValueError: the prompt's length must be known and is not, an index is out of range, or a mask has another length.
    """
    valid, length = prompt.valid[row], prompt.valid.shape[1]
    here = torch.arange(length)
    if isinstance(positions, str) and positions == "all":
        return _with_later(valid, True)
    if prompt.starts is None:
        raise ValueError(
            f"steer: positions={positions!r} needs the prompt's length, which this forward pass does not show (it starts from "
            "a filled cache): pass prompt_length= to steer, or use generate"
        )
    start, front = int(prompt.starts[row]), prompt.virtual
    valid = valid & (here >= front)
    real = (valid & (here < start)).nonzero().flatten()
    if isinstance(positions, Tensor):
        if positions.dim() == 2 and positions.shape[0] != prompt.batch:
            raise ValueError(f"steer: the mask has {positions.shape[0]} rows for a batch of {prompt.batch} prompts")
        mask = positions if positions.dim() == 1 else positions[row]
        covered = mask.shape[0] + front
        if covered > length or covered < min(start, length):
            raise ValueError(
                f"steer: the mask covers {mask.shape[0]} positions; this prompt has {min(start, length) - front}, padding "
                "included"
            )
        return _with_later(valid & torch.nn.functional.pad(mask, (front, length - covered)), False)
    if isinstance(positions, tuple):
        count = real.shape[0]
        outside = [p for p in positions if not -count <= p < count]
        if outside:
            raise ValueError(
                f"steer: position {outside[0]} is out of range; prompt {row} has {count} real tokens, 0 to {count - 1}"
            )
        chosen = torch.zeros(length, dtype=torch.bool)
        chosen[real[list(positions)]] = True
        return _with_later(chosen, False)
    if positions == "prompt":
        return _with_later(valid & (here < start), False)
    first = start if positions == "generated" else int(real[-1]) if real.numel() else start
    return _with_later(valid & (here >= first), True)


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
        rows = torch.full((batch, span, sum(widths)), -1, dtype=torch.int32)
        scale = torch.ones(batch, sum(widths))
        column = 0
        for layer, width in zip(layers, widths, strict=True):
            for row, slots in enumerate(layer.slots):
                if not slots or layer.scales[row] == 0.0:
                    continue
                where = allowed(prompt, row, layer.positions[row])
                rows[row, where, column : column + len(slots)] = torch.tensor(slots, dtype=torch.int32)
                scale[row, column : column + width] = layer.scales[row]
                held = [column + i for i, slot in enumerate(slots) if slot in layer.latched]
                if held:  # nothing is decided before the last prompt token
                    rows[row, ~allowed(prompt, row, "last"), held[0] : held[-1] + 1] = -1
            column += width
        self.prompt = prompt
        self.rows, self.scale = rows, scale
        self._device = device
        gated = frozenset().union(*(layer.gated for layer in layers))
        self._runs, owners = _runs(rows, scale, gated)
        self._passes = [None if found is None else Pass(found) for found in owners]
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._later: dict[tuple[int, int], Pass] = {}
        self._ends: Tensor | None = None

    @property
    def span(self) -> int:
        """P + 1."""
        return self.rows.shape[1]

    @property
    def ends(self) -> Tensor:
        """int64 (batch,): the position of each prompt's last real token."""
        if self._ends is None:
            starts = self.prompt.starts
            if starts is None:
                raise ValueError(
                    "steer: a condition needs the prompt's length; pass prompt_length= to steer, or use generate"
                )
            here = torch.arange(self.prompt.valid.shape[1])
            self._ends = torch.where(self.prompt.valid & (here < starts[:, None]), here, -1).amax(1)
        return self._ends

    def at(self, start: int, tokens: int, batch: int) -> Pass:
        """The pass over positions [start, start + tokens) of every row; rows may have been repeated by generate."""
        first, last = min(start, self.span - 1), min(max(start + tokens, 1), self.span)
        run = bisect_right(self._runs, first) - 1
        same = self._passes[run]
        if same is not None and last <= self._runs[run + 1]:
            return same
        if start >= self.span - 1:  # generated positions share one column, so every decode step shares one pass
            if (tokens, batch) not in self._later:
                rows, scale = self._on_device(batch)
                self._later[tokens, batch] = _flat(rows[:, -1:].expand(-1, tokens, -1), scale)
            return self._later[tokens, batch]
        rows, scale = self._on_device(batch)
        if start + tokens <= self.span:
            part = rows[:, start : start + tokens]
        else:
            part = rows[:, torch.arange(start, start + tokens, device=rows.device).clamp(max=self.span - 1)]
        return _flat(part, scale)

    def gather(self, start: Tensor, tokens: int, batch: int) -> Pass:
        """`at` for a start that only the device knows: no host sync."""
        rows, scale = self._on_device(batch)
        index = (start.to(rows.device) + torch.arange(tokens, device=rows.device)).clamp(max=self.span - 1)
        return _flat(rows[:, index], scale)

    def _on_device(self, batch: int) -> tuple[Tensor, Tensor]:
        """The tables on the device, with each prompt's row repeated for its beams or samples."""
        if batch % self.prompt.batch:
            raise ValueError(
                f"steer: this forward pass has {batch} rows, but {self.prompt.batch} prompts were announced; rows must be "
                "the prompts, each repeated equally often"
            )
        if batch not in self._moved:
            copies = batch // self.prompt.batch
            self._moved[batch] = tuple(  # type: ignore[assignment]
                table.repeat_interleave(copies, 0).to(self._device, non_blocking=True)
                for table in (self.rows, self.scale)
            )
        return self._moved[batch]


def lengths_per_row(lengths: tuple[int, ...], batch: int) -> Tensor:
    """int64 (batch,) of lengths as given: one for all rows, or one per row."""
    if len(lengths) not in (1, batch):
        raise ValueError(f"steer: prompt_length names {len(lengths)} rows; this batch has {batch}")
    return torch.tensor(lengths).expand(batch).clone()


def _with_later(mask: Tensor, later: bool) -> Tensor:
    return torch.cat([mask, torch.tensor([later])])


def _flat(part: Tensor, scale: Tensor) -> Pass:
    batch, tokens, columns = part.shape
    weights = scale[:, None, :].expand(batch, tokens, columns)
    return Pass(None, part.reshape(-1, columns), weights.reshape(-1, columns))


def _runs(rows: Tensor, scale: Tensor, gated: frozenset[int]) -> tuple[list[int], list[Owners | None]]:
    """Runs of positions with equal columns: their first positions (and the end), and the owners where all rows agree.

    A slot with a condition may be shut for one row and open for the next, so its runs have no common owners.
    """
    span = rows.shape[1]
    changes = (rows[:, 1:] != rows[:, :-1]).any(2).any(0).nonzero().flatten() + 1
    starts = [0, *changes.tolist()]
    agree = (rows == rows[:1]).all(2).all(0)
    same_scale = bool((scale == scale[:1]).all())
    owners: list[Owners | None] = []
    for start in starts:
        idle = bool((rows[:, start] < 0).all())
        if idle:
            owners.append(())
        elif agree[start] and same_scale and gated.isdisjoint(rows[0, start].tolist()):
            pairs = zip(rows[0, start].tolist(), scale[0].tolist(), strict=True)
            owners.append(tuple((slot, weight) for slot, weight in pairs if slot >= 0))
        else:
            owners.append(None)
    return [*starts, span], owners
