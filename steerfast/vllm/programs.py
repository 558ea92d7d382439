"""Edits of one place that fit no slot of a bank: features of an SAE whose activations take a whole encode, flows of full rank.

What they hold is a row for each slot in buffers that never move, so that every row of a batch finds its own features, values
and strength: one encode of an SAE serves the requests of all plans that edit it, whatever they do to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from steerfast import ops
from steerfast.edits.base import Intervention
from steerfast.edits.conditions import When
from steerfast.edits.features import EditFeatures
from steerfast.edits.flow import Flow
from steerfast.edits.selected import SelectedFeatures, edit_row
from steerfast.ops.backends import backend_of, in_full_precision
from steerfast.ops.torch_backend import restore_norm
from steerfast.ops.torch_topk import edited, found
from steerfast.probes.encoder import Encodes, encoded, normalised, shared_copy


def bare(edit: Intervention) -> Intervention:
    """An edit without the condition that it stands behind."""
    return edit.then if isinstance(edit, When) else edit


def selected(edit: Intervention) -> SelectedFeatures | None:
    """The features of an edit that takes a whole encode; None: it is another."""
    inner = bare(edit)
    features = inner.sae if isinstance(inner, EditFeatures) else None
    return features if isinstance(features, SelectedFeatures) else None


def fits_no_slot(edit: Intervention, device: torch.device) -> bool:
    """Whether an edit runs by itself on that device: as in `sf.steer`, or because a bank would serve it worse."""
    inner = bare(edit)
    if selected(edit) is not None:
        return True
    if isinstance(inner, Flow):  # a bank's kernel would read Q for every token
        return inner.barrier.rank == inner.width and backend_of(torch.empty(0, device=device)) != "torch"
    return inner.program(device) is not None


def costs_an_encode(edit: Intervention) -> bool:
    """Whether it is a whole encode for each column of the row table on a GPU, also of those where nobody asks for it."""
    features = selected(edit)
    return features is not None and not _is_counted(features)


def _is_counted(features: SelectedFeatures) -> bool:
    return features.k > 0 and features.normalisation == "none" and len(features.features) <= ops.MOST_EDITS


class Group(Protocol):
    """Edits that act at once, each on the rows of its own slot."""

    def load(self, slot: int, edit: Intervention) -> None:
        """Put one of its edits into a free slot."""
        ...

    def unload(self, slot: int) -> None:
        """Empty a slot; nothing happens if nothing of it stands there."""
        ...

    def edit(self, x: Tensor, slots: Tensor, weights: Tensor, read: Encodes | None) -> Tensor:
        """x (n, d) where the row's slot is one of its own, at that strength; the other rows as they are, bit for bit."""
        ...


class Programs:
    """What stands at one place and fits no slot.

    Args:
        edits: Every one of them that may stand here.
        slots: Of the bank beside them.
        dtype: Of the stream.
        device: Of the stream.
    """

    def __init__(self, edits: Sequence[Intervention], slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._groups: dict[Any, Group] = {}
        self._at: dict[int, Group] = {}
        alike: dict[Any, list[Intervention]] = {}
        for edit in edits:
            alike.setdefault(_kind(edit), []).append(edit)
        for kind, several in alike.items():
            features = selected(several[0])
            if features is None:
                self._groups[kind] = Alone(several[0], slots, dtype, device)
            else:
                self._groups[kind] = (Dictionary if features.k else Thresholds)(several, slots, device)

    def load(self, slot: int, edit: Intervention) -> None:
        """Put an edit into a free slot."""
        group = self._at[slot] = self._groups[_kind(edit)]
        group.load(slot, edit)

    def unload(self, slot: int) -> bool:
        """Empty a slot; whether one of these stood there."""
        group = self._at.pop(slot, None)
        if group is not None:
            group.unload(slot)
        return group is not None

    @torch.no_grad()
    def edit(self, x: Tensor, slots: Tensor, weights: Tensor, read: Encodes | None = None) -> Tensor:
        """The edit of each row of x (n, d) by its slot, (n,) with -1 for none, at its strength, float32 (n,)."""
        for group in self._groups.values():
            x = group.edit(x, slots, weights, read)
            read = None  # of the rows before an edit
        return x


def _kind(edit: Intervention) -> Any:
    """What edits have in common that act at once."""
    features = selected(edit)
    if features is None:
        return id(bare(edit))
    if features.k:
        return id(features.encoder), features.k, features.normalisation
    return features.normalisation


class Features:
    """Which features the plan in each slot edits, and how: a row each of tables that a row of the batch is looked up in.

    Args:
        edits: Every one that may stand here.
        slots: Of the bank; the last row stands for no slot.
        device: Of the stream.
    """

    def __init__(self, edits: Iterable[Intervention], slots: int, device: torch.device) -> None:
        each = [(bare(edit), features) for edit in edits if (features := selected(edit)) is not None]
        most = max(len(features.features) for _, features in each)
        self.numbers = torch.full((slots + 1, most), -1, dtype=torch.int32, device=device)
        self.table = torch.zeros(slots + 1, most, 4, dtype=torch.float32, device=device)
        self.keeps = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        self.any_keeps = any(edit.keep_norm for edit, _ in each if isinstance(edit, EditFeatures))
        self._last: tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]] | None = None  # that was looked up, on a CPU

    def load(self, slot: int, edit: Intervention, numbers: Tensor) -> None:
        """An edit of the features with these numbers stands in a slot."""
        self._last = None
        inner = bare(edit)
        if not isinstance(inner, EditFeatures):
            raise TypeError(f"steerfast: {inner!r} edits no features")
        count = len(numbers)
        rows = torch.tensor([edit_row(inner.mode, value) for value in inner.values.values()], device="cpu")
        self.numbers[slot, :count] = numbers.to(self.numbers)
        self.table[slot, :count] = rows.to(self.table)
        self.keeps[slot] = inner.keep_norm

    def unload(self, slot: int) -> None:
        """Nothing stands in a slot."""
        self._last = None
        self.numbers[slot] = -1
        self.table[slot] = 0
        self.keeps[slot] = False

    def of(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, m), table (n, m, 4) and strength (n,) of rows; of one whose slot has none here strength 0.

        On a CPU slots and weights are tensors that nobody writes to, the same ones while a batch goes on.
        """
        if self._last is not None and self._last[0] is slots and self._last[1] is weights:
            return self._last[2]
        at = slots.long()
        numbers = self.numbers[at]
        found = numbers, self.table[at], torch.where((numbers >= 0).any(1), weights, 0)
        self._last = None if slots.is_cuda else (slots, weights, found)
        return found

    def restored(self, x: Tensor, moved: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The edited rows with their old lengths where their edit keeps these."""
        if not self.any_keeps:
            return moved
        keeps = (self.keeps[slots.long()] & (weights != 0))[:, None]
        return torch.where(keeps, restore_norm(moved.float(), x.float()).to(x.dtype), moved)


class Dictionary:
    """Edits of features of one Top-K SAE: by counting what exceeds them, or from an encode, which whoever reads has made.

    Args:
        edits: Every one that may stand here.
        slots: Of the bank.
        device: Of the stream.
    """

    def __init__(self, edits: Sequence[Intervention], slots: int, device: torch.device) -> None:
        several = [features for edit in edits if (features := selected(edit)) is not None]
        first = several[0]
        self._features = Features(edits, slots, device)
        self._counts = all(map(_is_counted, several))
        owner = first if first.sae is None else first.sae
        self._encoder = shared_copy(owner, "encoder", first.encoder, device)
        self._bias = shared_copy(owner, "bias", first.bias, device)
        self._k, self._normalisation = first.k, first.normalisation
        if first.sae is not None:
            self._decoder = shared_copy(owner, "decoders", first.sae.w_dec, device)
            return
        self._decoder = torch.zeros_like(self._encoder)  # the file of the plan holds these rows alone
        for features in several:
            self._decoder[features.features.long()] = features.decoder.to(self._decoder)

    def load(self, slot: int, edit: Intervention) -> None:
        """As of every group."""
        if (features := selected(edit)) is not None:
            self._features.load(slot, edit, features.features)

    def unload(self, slot: int) -> None:
        """As of every group."""
        self._features.unload(slot)

    def edit(self, x: Tensor, slots: Tensor, weights: Tensor, read: Encodes | None) -> Tensor:
        """As of every group."""
        numbers, table, weights = self._features.of(slots, weights)
        pair = None if read is None else read.of(self._encoder, self._bias, self._k, self._normalisation)
        if pair is None and self._counts:
            arguments = (self._encoder, self._bias, self._k, numbers, table, self._decoder, weights)
            return self._features.restored(x, ops.sae_edit_topk(x, *arguments), slots, weights)
        if pair is None:
            pair = self._encode(x)
        scale = weights
        if self._normalisation != "none":
            length = normalised(x, self._normalisation)[1]
            scale = weights if length is None else weights * length.float().flatten()
        moved = edited(x, found(*pair, numbers), numbers, table, self._decoder, scale)
        return self._features.restored(x, moved, slots, weights)

    @in_full_precision
    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return encoded(x, self._encoder, self._bias, self._k, self._normalisation)


class Thresholds:
    """Edits of features with thresholds, of SAEs that normalise a row in one way: the rows of all of them are one product.

    Args:
        edits: Every one that may stand here.
        slots: Of the bank.
        device: Of the stream.
    """

    def __init__(self, edits: Sequence[Intervention], slots: int, device: torch.device) -> None:
        several = list({id(one): one for edit in edits if (one := selected(edit)) is not None}.values())
        self._features = Features(edits, slots, device)
        self._normalisation = several[0].normalisation
        self._first: dict[int, int] = {}
        reached = 0
        for one in several:
            self._first[id(one)] = reached
            reached += len(one.features)
        self._held = several  # they are known by what they are, which must not be another's
        self._encoder, self._bias, self._decoder = (
            torch.cat([getattr(one, name) for one in several]).float().to(device)
            for name in ("encoder", "bias", "decoder")
        )
        thresholds = [one.threshold for one in several if one.threshold is not None]
        self._threshold = torch.cat(thresholds).float().to(device)

    def load(self, slot: int, edit: Intervention) -> None:
        """As of every group."""
        if (one := selected(edit)) is not None:
            self._features.load(slot, edit, one.features + self._first[id(one)])

    def unload(self, slot: int) -> None:
        """As of every group."""
        self._features.unload(slot)

    @in_full_precision
    def edit(self, x: Tensor, slots: Tensor, weights: Tensor, read: Encodes | None) -> Tensor:
        """As of every group."""
        numbers, table, weights = self._features.of(slots, weights)
        inner, length = normalised(x, self._normalisation)
        h = torch.addmm(self._bias, inner.float(), self._encoder.T)
        f = torch.where(h <= self._threshold, 0, h).gather(1, numbers.clamp(min=0).long())
        scale = weights if length is None else weights * length.float().flatten()
        moved = edited(x, f, numbers, table, self._decoder, scale)
        return self._features.restored(x, moved, slots, weights)


class Alone:
    """One edit that runs as it does in `sf.steer`, on every row of the batch at the strength that the row gives it.

    Args:
        edit: Which one.
        slots: Of the bank.
        dtype: Of the stream, which a flow's products are in.
        device: Of the stream.
    """

    def __init__(self, edit: Intervention, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        inner = bare(edit)
        run = inner.alone(device) if isinstance(inner, Flow) else inner.program(device)
        if run is None:
            raise ValueError(f"steerfast: {inner!r} has a slot")
        self._run, self._dtype = run, dtype
        self._here = torch.zeros(slots + 1, dtype=torch.bool, device=device)

    def load(self, slot: int, edit: Intervention) -> None:
        """As of every group."""
        self._here[slot] = True

    def unload(self, slot: int) -> None:
        """As of every group."""
        self._here[slot] = False

    def edit(self, x: Tensor, slots: Tensor, weights: Tensor, read: Encodes | None) -> Tensor:
        """As of every group."""
        weights = torch.where(self._here[slots.long()], weights, 0)
        narrow = x.to(self._dtype)
        moved = self._run(narrow, weights)
        if narrow is not x:
            moved = (x + (moved.float() - narrow.float())).to(x.dtype)
        return torch.where((weights == 0)[:, None], x, moved)
