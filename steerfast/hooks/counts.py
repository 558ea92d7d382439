"""How many tokens each slot has been applied to: on the host where a pass has common owners, on the device elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from .bookkeeping import bookkeeping
from .positions import Pass


class Counts:
    """The counts of one model's slots.

    Attributes:
        on_device: int64 (slots + 1,): tokens that a row table named; the first entry belongs to no slot.
    """

    def __init__(self) -> None:
        self.on_device: Tensor | None = None
        self._on_host: dict[int, int] = {}
        self._ones = torch.empty(0, device="cpu")

    def of(self, slot: int) -> int:
        """Tokens that a slot has been applied to."""
        on_device = 0 if self.on_device is None else int(self.on_device[slot + 1])
        return self._on_host.get(slot, 0) + on_device

    def make_room(self, size: int, device: torch.device) -> None:
        """Room on the device for the tokens of that many slots; what is there is kept."""
        before = self.on_device
        if before is None or before.shape[0] < size or before.device != device:
            held = 0 if before is None else before.shape[0]
            self.on_device = torch.zeros(max(size, held), dtype=torch.int64, device=device)
            if before is not None:
                self.on_device[:held] = before

    def clear(self, slots: list[int]) -> None:
        """The next owner of these slots counts from zero."""
        for slot in slots:
            self._on_host.pop(slot, None)
            if self.on_device is not None and slot + 1 < self.on_device.shape[0]:
                self.on_device[slot + 1] = 0

    @bookkeeping
    def add(self, now: Pass, shape: tuple[int, int], skipped: int, slots: set[int] | None) -> None:
        """A pass has ended.

        Args:
            now: What it did.
            shape: (rows, tokens) of it.
            skipped: How many of its first tokens have been counted before.
            slots: Those whose place it came by; None: all.
        """
        batch, count = shape
        if now.owners is not None:
            for slot, _ in now.owners:
                if slots is None or slot in slots:
                    self._on_host[slot] = self._on_host.get(slot, 0) + batch * (count - skipped)
        elif now.rows is not None and self.on_device is not None:
            rows = now.rows
            if skipped:
                rows = rows.view(batch, count, -1)[:, skipped:]
            if slots is not None:
                rows = torch.where(torch.isin(rows, torch.tensor(sorted(slots), device=rows.device)), rows, -1)
            owned = rows.reshape(-1).long() + 1
            if self._ones.shape[0] < owned.shape[0] or self._ones.device != owned.device:
                self._ones = torch.ones(owned.shape[0], dtype=torch.int64, device=owned.device)
            self.on_device.index_add_(0, owned, self._ones[: owned.shape[0]])
