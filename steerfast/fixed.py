"""The row table of a prepared model: buffers at fixed addresses, which a compiled graph gathers from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import MAX_SLOTS_PER_ROW
from .positions import Pass, Table


class FixedTable:
    """Owners of every position of every batch row, in tensors that are only ever written into.

    Args:
        batch: Most rows of a batch.
        length: Longest prompt; one more column stands for every later position.
        device: Where the compiled graph runs.
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        shape = (batch, length + 1, MAX_SLOTS_PER_ROW)
        self.rows = torch.full(shape, -1, dtype=torch.int32, device=device)
        self.scale = torch.ones(batch, MAX_SLOTS_PER_ROW, device=device)

    @property
    def batch(self) -> int:
        """Most rows of a batch."""
        return self.rows.shape[0]

    def clear(self) -> None:
        """Nobody is steered."""
        self.rows.fill_(-1)
        self.scale.fill_(1.0)

    def publish(self, table: Table, copies: int) -> None:
        """Copy a batch's table in, each of its rows `copies` times.

        Raises:
            ValueError: the batch is larger than what `prepare` made room for; nothing has been written.
        """
        batch, span, columns = table.rows.shape
        room = self.rows.shape
        if batch * copies > room[0] or span > room[1] or columns > room[2]:
            raise ValueError(
                f"steer: {batch * copies} rows, {span - 1} prompt tokens and {columns} interventions in a row; prepare "
                f"made room for {room[0]}, {room[1] - 1} and {room[2]}"
            )
        self.clear()
        rows = table.rows.repeat_interleave(copies, 0).to(self.rows.device)
        self.rows[: batch * copies, :span, :columns] = rows
        self.rows[: batch * copies, span:, :columns] = rows[:, -1:]
        self.scale[: batch * copies, :columns] = table.scale.repeat_interleave(copies, 0).to(self.scale.device)

    def gather(self, start: Any, batch: int, tokens: int, mask: Tensor | None) -> Pass:
        """The pass over positions [start, start + tokens) as a part of the graph; padding in a 2-D mask is left out."""
        if batch > self.batch:
            raise ValueError(f"steer: a batch of {batch}; prepare made room for {self.batch}")
        position = start + torch.arange(tokens, device=self.rows.device)
        rows = self.rows[:batch, position.clamp(max=self.rows.shape[1] - 1)]
        if mask is not None:
            rows = torch.where(mask[:, -tokens:, None] != 0, rows, -1)
        columns = self.rows.shape[2]
        scale = self.scale[:batch, None].expand(batch, tokens, columns)
        return Pass(None, rows.reshape(-1, columns), scale.reshape(-1, columns))
