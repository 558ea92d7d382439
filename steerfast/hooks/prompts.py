"""What is known of a batch of prompts, and which of its positions a plan names."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from steerfast._positions import (
    After,
    Between,
    Leaf,
    Selector,
    beyond,
    evaluate,
    out_of_range,
    placed,
    told,
)

Rule = Selector | Tensor
"""A selector in which `special` is resolved, or a mask."""


@dataclass(eq=False)
class Memory:
    """Of one leaf and batch: whether it is open before each position."""

    open: Tensor  # bool (batch, positions)
    reached: int  # known up to here

    @classmethod
    def of(cls, leaf: After | Between, prompt: Prompt, copies: int, device: torch.device) -> Memory:
        """What an announced prompt tells; for any other, that nothing is open before its first token."""
        shut = torch.zeros(prompt.batch, 1, dtype=torch.bool, device="cpu")
        known = shut
        if prompt.ids is not None:
            ids, real = prompt.ids.cpu(), prompt.valid[:, : prompt.ids.shape[1]]
            behind = told(leaf, lambda wanted: torch.isin(ids, torch.tensor(wanted, device="cpu")) & real, shut[:, 0])[
                1
            ]
            known = torch.cat([shut, behind], 1)  # type: ignore[list-item]  # no `Ids`
        return cls(known.repeat_interleave(copies, 0).to(device), known.shape[1] - 1)

    def room(self, positions: int) -> None:
        """Make room for that many positions."""
        if self.open.shape[1] < positions:
            self.open = torch.nn.functional.pad(
                self.open, (0, max(positions, 2 * self.open.shape[1], 64) - self.open.shape[1])
            )


@dataclass(frozen=True, eq=False)
class Prompt:
    """What is known of a batch of prompts.

    Attributes:
        valid: bool (batch, P), False on padding.
        starts: int64 (batch,), the first generated position of each row; None if the prompt's length is unknown.
        ids: The tokens of a prompt that was announced before any of it ran; None: they are seen as they run.
        reorders: Whether rows may change places after the prompt, as beams do.
        memories: What selectors remember of its tokens, by leaf and number of rows; by it a text is known.
        moved: Whether rows have changed places since, each with the text of another.
        virtual: Positions in front that hold no token of the text (soft prompts): "all" has them, the prompt does not.
    """

    valid: Tensor
    starts: Tensor | None
    ids: Tensor | None = None
    reorders: bool = False
    memories: dict[tuple[Leaf, int], Memory] = field(default_factory=dict)
    virtual: int = 0
    moved: bool = False

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.valid.shape[0]

    def is_text_of(self, other: Prompt | None) -> bool:
        """Whether the other is the same batch of texts, of which more or less of the padding is known."""
        return other is not None and self.memories is other.memories

    def looks_like(self, other: Prompt) -> bool:
        """Whether all positions mean in the other what they mean here."""
        if (self.starts is None) != (other.starts is None) or self.virtual != other.virtual:
            return False
        if not torch.equal(self.valid, other.valid):
            return False
        return self.starts is None or other.starts is None or torch.equal(self.starts, other.starts)

    def behind(self, virtual: int) -> Prompt:
        """The same prompt behind so many virtual tokens."""
        front = self.valid.new_ones(self.batch, virtual)
        starts = None if self.starts is None else self.starts + virtual
        valid = torch.cat([front, self.valid], dim=1)
        return replace(self, valid=valid, starts=starts, virtual=self.virtual + virtual, ids=None, memories={})

    @classmethod
    def whole(cls, batch: int, length: int, valid: Tensor | None = None) -> Prompt:
        """A prompt that fills all positions below `length`."""
        valid = torch.ones(batch, length, dtype=torch.bool, device="cpu") if valid is None else valid
        return cls(valid, torch.full((batch,), length, device="cpu"))


def allowed(prompt: Prompt, row: int, rule: Rule) -> Tensor:
    """bool (P + 1,): which positions of one batch row a rule names; the last entry stands for every later one.

    Where a selector looks at tokens, these are all that it could name.

    Raises:
        ValueError: the prompt's length must be known and is not, an index is out of range, or a mask has another length.
    """
    valid, length = prompt.valid[row], prompt.valid.shape[1]
    if isinstance(rule, Selector) and rule.reads_tokens:
        _check_indices(prompt, row, rule)
        return with_later(valid, beyond(rule) is not False)
    if isinstance(rule, Selector) and not rule.needs_length:
        return with_later(valid, True) & evaluate(
            rule, lambda leaf: torch.ones(length + 1, dtype=torch.bool, device="cpu")
        )
    start = _start(prompt, row, rule)
    if isinstance(rule, Tensor):
        if rule.dim() == 2 and rule.shape[0] != prompt.batch:
            raise ValueError(f"steer: the mask has {rule.shape[0]} rows for a batch of {prompt.batch} prompts")
        mask, front = rule if rule.dim() == 1 else rule[row], prompt.virtual
        covered = mask.shape[0] + front
        if covered > length or covered < min(start, length):
            raise ValueError(
                f"steer: the mask covers {mask.shape[0]} positions; this prompt has {min(start, length) - front}, padding "
                "included"
            )
        return with_later(valid & torch.nn.functional.pad(mask, (front, length - covered)), False)
    _check_indices(prompt, row, rule)
    real = real_tokens(prompt, row)
    return with_later(valid, True) & evaluate(rule, lambda leaf: placed(leaf, real, start, length, prompt.virtual))


def _start(prompt: Prompt, row: int, rule: Rule | None) -> int:
    if prompt.starts is None:
        named = f"positions={str(rule)!r}" if isinstance(rule, Selector) else "a mask"
        named = "a row for each of a prompt's first tokens" if rule is None else named
        raise ValueError(
            f"steer: {named} needs the prompt's length, which this forward pass does not show (it starts from a filled "
            "cache): pass prompt_length= to steer, or use generate"
        )
    return int(prompt.starts[row])


def real_tokens(prompt: Prompt, row: int) -> Tensor:
    """The positions of the prompt's real tokens."""
    valid, starts = prompt.valid[row], prompt.starts
    here = torch.arange(valid.shape[0], device="cpu")
    text = valid & (here >= prompt.virtual)
    return (text if starts is None else text & (here < starts[row])).nonzero().flatten()


def by_token(prompt: Prompt, row: int, slots: tuple[int, ...]) -> Tensor:
    """int32 (P + 1,): a slot for each of the prompt's first real tokens, and -1 behind them."""
    _start(prompt, row, None)
    real = real_tokens(prompt, row)[: len(slots)]
    owners = torch.full((prompt.valid.shape[1] + 1,), -1, dtype=torch.int32, device="cpu")
    owners[real] = torch.tensor(slots[: len(real)], dtype=torch.int32, device="cpu")
    return owners


def last_tokens(prompt: Prompt) -> Tensor:
    """int64 (batch,): the position of each prompt's last real token; -1 where it has none, or its length is not known."""
    if prompt.starts is None:
        return torch.full((prompt.batch,), -1, device="cpu")
    here = torch.arange(prompt.valid.shape[1], device="cpu")
    return torch.where(prompt.valid & (here < prompt.starts[:, None]), here, -1).amax(1)


def _check_indices(prompt: Prompt, row: int, rule: Selector) -> None:
    if not rule.needs_length:
        return
    _start(prompt, row, rule)
    count = len(real_tokens(prompt, row))
    outside = out_of_range(rule, count)
    if outside is not None:
        raise ValueError(
            f"steer: position {outside} is out of range; prompt {row} has {count} real tokens, 0 to {count - 1}"
        )


def copies_of(prompt: Prompt, batch: int) -> int:
    """How often each prompt's row is repeated in a pass of `batch` rows."""
    if batch % prompt.batch:
        raise ValueError(
            f"steer: this forward pass has {batch} rows, but {prompt.batch} prompts were announced; rows must be the "
            "prompts, each repeated equally often"
        )
    return batch // prompt.batch


def with_later(mask: Tensor, later: bool) -> Tensor:
    """A mask of a prompt's positions, with what holds for every later one."""
    return torch.cat([mask, torch.tensor([later], device="cpu")])
