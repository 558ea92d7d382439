"""Prepared models: a row table in buffers at fixed addresses, which a compiled graph gathers from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import whole_number
from steerfast._positions import Index, Selector, Window, Word
from steerfast.plan import needs_prompt, rule_of

from .attachment import Attachment
from .fixed import FixedText
from .generation import Announcement
from .positions import Pass, Table
from .prompts import Prompt

_LAST = Word("last")
_library = torch.library.Library("steerfast", "FRAGMENT")
_library.define("unplaced(Tensor rows) -> Tensor")


def _refuse(rows: Tensor) -> Tensor:
    raise RuntimeError("steer: a compiled pass outside generate does not show its prompt; pass prompt_length= to steer")


_library.impl("unplaced", _refuse, "CompositeExplicitAutograd")
torch.library.register_fake("steerfast::unplaced", torch.empty_like, lib=_library)
_library.define("placed(Tensor rows, Tensor hidden, int nobody) -> Tensor")


def _placed(rows: Tensor, hidden: Tensor, nobody: int) -> Tensor:
    """Rows (batch, tokens, columns) of which none may be nobody's: on a CPU an error, on a device, which cannot raise, NaN."""
    rows = torch.where(hidden[:, None, None], nobody, rows)
    if rows.is_cpu and bool((rows == nobody).any()):
        raise RuntimeError(
            "steer: the attention_mask of this compiled pass leaves out tokens of a prompt whose real tokens are counted, which "
            "a graph cannot follow: give a prompt_length= for each row that is padded on the right, or use generate"
            if bool(hidden.any())
            else "steer: this compiled pass has more rows than have been given plans, or lengths, or were announced"
        )
    return rows


_library.impl("placed", _placed, "CompositeExplicitAutograd")
torch.library.register_fake("steerfast::placed", lambda rows, hidden, nobody: torch.empty_like(rows), lib=_library)


@dataclass(frozen=True)
class Room:
    """What a prepared model has room for: the sizes of the buffers that its compiled graph reads.

    Args:
        batch: Largest batch, beams and samples included.
        length: Longest prompt, in tokens; where probes are prepared, the longest text whose tokens are read one by one.
        slots: How many interventions can be active at one layer.
        directions: How many rows of B and C each layer's bank holds.
        rank: k, the largest rank of an intervention: the compiled kernels hold this many directions, so a small one is fast.
        columns: How many interventions, of all handles together, a token can meet in one place. Each is a part of the
            compiled graph in every prepared layer, used or not; on a GPU two launches each from rank 16 on and in passes of
            more than 256 tokens, so that 1 is the fastest where one will do.

    Raises:
        TypeError, ValueError: not a whole number of at least 1.

    Example:
        >>> import steerfast as sf
        >>> sf.Room(batch=4, columns=1)
        Room(batch=4, length=4096, slots=64, directions=256, rank=8, columns=1)
    """

    batch: int = 16
    length: int = 4096
    slots: int = 64
    directions: int = 256
    rank: int = 8
    columns: int = 2

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, whole_number("Room", one.name, getattr(self, one.name), 1))


class FixedTable:
    """Owners of every position of every batch row, in tensors that are only ever written into.

    Args:
        room: Their sizes; one more position stands for every later one.
        device: Where the compiled graph runs.
    """

    def __init__(self, room: Room, device: torch.device) -> None:
        self.rows = torch.full((room.batch, room.length + 1, room.columns), -1, dtype=torch.int32, device=device)
        self.scale = torch.ones(room.batch, room.columns, dtype=torch.float32, device=device)
        self.text = FixedText(room.batch, room.length, room.slots, device)
        self.unplaced = False  # the positions need a prompt that only generate would show
        self._nobody = room.slots  # beyond every bank, so that a row that is given it becomes NaN
        # of each row the first tokens, and all of its prompt, in which padding would move what is counted from either end
        self._front, self._whole = torch.zeros(2, room.batch, 1, dtype=torch.int64, device=device)
        self._counted = torch.full((), -1, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        """Most rows of a batch."""
        return self.rows.shape[0]

    @property
    def columns(self) -> int:
        """Most interventions of a token in one place."""
        return self.rows.shape[2]

    def clear(self) -> None:
        """No row is steered."""
        self.rows.fill_(-1)
        self.scale.fill_(1.0)

    def settle(self, counted: int = -1) -> None:
        """Bare passes are asked nothing: generate announces its batch, or nothing is attached.

        Args:
            counted: How many tokens of that batch have been counted; -1: a pass is counted whole.
        """
        self._counted.fill_(counted)
        self.unplaced = False
        self._front.zero_()
        self._whole.zero_()

    @staticmethod
    def check(told: Announcement, attachments: Sequence[Attachment]) -> None:
        """Refuse a call of generate that a compiled graph cannot follow.

        Raises:
            ValueError: it runs a second text, or takes back tokens that are read.
        """
        if told.guided:
            raise ValueError(
                "steer: guidance_scale runs a second text beside each prompt, which a compiled graph cannot tell from the first; "
                "steer a model that has not been prepared"
            )
        if told.drafts and any(one.reads for one in attachments):
            raise ValueError(
                "read: assisted generation takes tokens back, which a compiled graph does not see; generate without drafts, or "
                "read a model that has not been prepared"
            )

    def publish(self, table: Table, copies: int) -> None:
        """Copy a batch's table in, each of its rows `copies` times, whole: a pass of another thread sees the old or the new one.

        Raises:
            ValueError: the batch takes more room than what `prepare` made room for; nothing has been written.
        """
        batch, span, columns = table.rows.shape
        room = self.rows.shape
        if batch * copies > room[0] or span > room[1] or columns > room[2]:
            raise ValueError(
                f"steer: {batch * copies} rows, {span - 1} prompt tokens and {columns} interventions in a row; prepare "
                f"made room for batch={room[0]}, length={room[1] - 1} and columns={room[2]}: unprepare, and prepare for more"
            )
        whole, scale = torch.full_like(self.rows, -1), torch.ones_like(self.scale)
        whole[batch * copies :] = self._nobody  # of a larger batch than was announced
        rows = table.rows.repeat_interleave(copies, 0).to(whole.device)
        whole[: batch * copies, :span, :columns] = rows
        whole[: batch * copies, span:, :columns] = rows[:, -1:]
        scale[: batch * copies, :columns] = table.scale.repeat_interleave(copies, 0).to(scale.device)
        self.scale.copy_(scale)
        self.rows.copy_(whole)

    def publish_unprompted(self, attachments: Sequence[Attachment]) -> None:
        """Fill the buffers for bare passes: what prompt_length, or positions="all", says without a prompt."""
        self.settle()
        given = next((one.prompt_length for one in attachments if one.prompt_length is not None), None)
        plans = [plan for one in attachments for plan in one.plans if plan is not None]
        latched = any(one.latched for one in attachments)
        self.unplaced = given is None and (latched or any(map(needs_prompt, plans)))
        if self.unplaced or not attachments:
            self.clear()
            self.text.announce(None)
            return
        per_row = [len(one.plans) for one in attachments if one.per_row]
        rows = next(iter(per_row), self.batch if given is None or len(given) == 1 else len(given))
        lengths = None if given is None else lengths_per_row(given, rows)
        valid = torch.ones(rows, 0 if lengths is None else int(lengths.max()), dtype=torch.bool, device="cpu")
        layers = [one.layer(rows) for one in attachments]
        table = Table(Prompt(valid, lengths), layers, self.rows.device)
        self.publish(table, copies=1)
        self.text.announce(table)
        if lengths is not None:
            self._front[:rows] = max(map(counted_from_the_front, attachments))
            if any(map(counts_from_the_end, attachments)):
                self._whole[:rows, 0] = lengths.to(self._whole.device)

    def trace(self, start: Any, tokens: Tensor, mask: Any) -> Pass:
        """The pass over `tokens` (batch, tokens, …) as a part of the graph."""
        batch, count = tokens.shape[:2]
        if self.text:
            self.follow(start, tokens, mask)
        now = self.gather(start, batch, count, mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
        if self.unplaced and now.rows is not None:  # an error of the tracer would only make it leave the graph
            return replace(now, rows=torch.ops.steerfast.unplaced(now.rows))
        return now

    def fresh(self, start: Any, tokens: Tensor) -> Tensor:
        """int64 (batch·tokens, columns): 1 where a pass is counted, 0 where generate runs tokens again, as without a cache."""
        batch, count = tokens.shape[:2]
        position = start + torch.arange(count, device=self.rows.device)
        found = (position >= self._counted).long()
        behind = torch.maximum(self._counted, position[-1] + 1)
        self._counted.copy_(torch.where(self._counted < 0, self._counted, behind))
        return found.expand(batch, count).reshape(-1, 1).expand(-1, self.columns)

    def follow(self, start: Any, tokens: Tensor, mask: Any) -> None:
        """Probes follow a pass over `tokens` of which a 2-D mask alone shows the padding."""
        batch, count = tokens.shape[:2]
        shows = isinstance(mask, Tensor) and mask.dim() == 2
        whole = torch.ones(batch, count, dtype=torch.bool, device=self.rows.device)
        self.text.begin(start, tokens, _shown(mask, start, count) if shows else whole)

    def gather(self, start: Any, batch: int, tokens: int, mask: Tensor | None) -> Pass:
        """The pass over positions [start, start + tokens) as a part of the graph; padding in a 2-D mask is left out."""
        if batch > self.batch:
            raise ValueError(f"steer: a batch of {batch}; prepare made room for {self.batch}")
        position = start + torch.arange(tokens, device=self.rows.device)
        rows = self.rows[:batch, position.clamp(max=self.rows.shape[1] - 1)]
        if mask is None:
            hidden = torch.zeros(batch, dtype=torch.bool, device=rows.device)
        else:
            rows = torch.where(_shown(mask, start, tokens)[..., None], rows, -1)
            column, real = torch.arange(mask.shape[1], device=rows.device), mask != 0
            hidden = (~real & (column < self._front[:batch])).any(1)
            ended = real[:, :-1] & ~real[:, 1:] & (column[1:] < self._whole[:batch])
            hidden = hidden | ended.any(1)
        rows = torch.ops.steerfast.placed(rows, hidden, self._nobody)
        scale = self.scale[:batch, None].expand(batch, tokens, self.columns)
        return Pass(None, rows.reshape(-1, self.columns), scale.reshape(-1, self.columns))


def counted_from_the_front(one: Attachment) -> int:
    """How many of a prompt's first real tokens are told apart."""
    tokens = (len(slots) for slots in one.by_token.values())
    return max([0, *tokens, *(number + 1 for number in _bounds(one) if number >= 0)])


def counts_from_the_end(one: Attachment) -> bool:
    """Whether what is attached counts a prompt's real tokens from the last one back."""
    return bool(one.latched) or any(number < 0 for number in _bounds(one))


def _bounds(one: Attachment) -> list[int]:
    """The indices, and the ends of windows, that positions name; "last" is -1, and a window that begins with 0 with no token."""
    rules = [rule_of(plan) for plan in one.plans if plan is not None]
    leaves = {leaf for rule in rules if isinstance(rule, Selector) for leaf in rule.leaves}
    found = [leaf.at for leaf in leaves if isinstance(leaf, Index)]
    for leaf in leaves:
        if isinstance(leaf, Window):
            found += [number for number in (leaf.first or None, leaf.stop) if number is not None]
    return [*found, -1] if _LAST in leaves else found


def _shown(mask: Tensor, start: Any, tokens: int) -> Tensor:
    """bool (batch, tokens): which tokens of a pass a mask shows, of its whole text, of all that a cache holds, or of itself."""
    most = mask.shape[1] - tokens
    first = start.clamp(max=most) if isinstance(start, Tensor) else min(start, most)
    return mask.index_select(1, first + torch.arange(tokens, device=mask.device)) != 0


def lengths_per_row(lengths: tuple[int, ...], batch: int) -> Tensor:
    """int64 (batch,) of lengths as given: one for all rows, or one per row."""
    if len(lengths) not in (1, batch):
        raise ValueError(f"steer: prompt_length names {len(lengths)} rows; this batch has {batch}")
    return torch.tensor(lengths, device="cpu").expand(batch).clone()


def is_compiled(model: nn.Module) -> bool:
    """Whether any part of the model, or generate's own copy of its forward, has been compiled."""
    if getattr(model, "_compiled_call", None) is not None:
        return True
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module, "_orig_mod")
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
        for module in model.modules()
    )
