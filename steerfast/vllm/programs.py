"""Edits of one place that fit no slot of a bank: features of an SAE whose activations take a whole encode, flows of full rank.

What they hold is a row for each slot in buffers that never move, so that every row of a batch finds its own features, values
and strength: one encode of an SAE serves the requests of all plans that edit it, whatever they do to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
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
from steerfast.ops.torch_topk import activations, columns, edited, found
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


class StreamRows:
    """Some rows of a stream, float32 (n, d), made once, where someone asks for them; on a CPU.

    Args:
        stream: One half of it, (tokens, d).
        hidden: The other half; None: there is none.
        tokens: Which rows; None: all.
    """

    __slots__ = ("_made", "_of")

    def __init__(self, stream: Tensor, hidden: Tensor | None, tokens: Tensor | None) -> None:
        self._of = stream, hidden, tokens
        self._made: Tensor | None = None

    def __call__(self) -> Tensor:
        """The rows, which nobody writes to."""
        if self._made is None:
            stream, hidden, tokens = self._of
            if tokens is not None:
                stream = stream.index_select(0, tokens)
                hidden = None if hidden is None else hidden.index_select(0, tokens)
            self._made = stream.float() if hidden is None else stream.float() + hidden
        return self._made


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

    def wanted(self, slots: Tensor, weights: Tensor) -> Any:
        """What `added` needs of rows that all have one of its slots, as long as a batch is the same; on a CPU."""
        ...

    def added(self, rows: StreamRows, wanted: Any, read: Encodes | None) -> Tensor:
        """What is added to each of these rows, float32 (n, d); on a CPU."""
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
        alike: dict[Any, list[Intervention]] = {}
        for edit in edits:
            alike.setdefault(_kind(edit), []).append(edit)
        self._groups: list[Group] = []
        for several in alike.values():
            features = selected(several[0])
            if features is None:
                self._groups.append(Alone(several[0], slots, dtype, device))
            else:
                self._groups.append((Dictionary if features.k else Thresholds)(several, slots, device))
        self._kinds = [*alike]
        self._at = np.full(slots, -1)  # the number of the group of each slot

    def load(self, slot: int, edit: Intervention) -> None:
        """Put an edit into a free slot."""
        self._at[slot] = number = self._kinds.index(_kind(edit))
        self._groups[number].load(slot, edit)

    def unload(self, slot: int) -> bool:
        """Empty a slot; whether one of these stood there."""
        number = self._at[slot]
        if number >= 0:
            self._at[slot] = -1
            self._groups[number].unload(slot)
        return bool(number >= 0)

    def wanted(self, slots: np.ndarray, weights: np.ndarray) -> list[tuple[Group, np.ndarray, Any]]:
        """Of rows with slots that stand here, (n,): each group, the numbers of its rows, and what its `added` needs; on a CPU."""
        owner = self._at[slots]
        each = [(self._groups[number], (owner == number).nonzero()[0]) for number in np.unique(owner)]
        return [
            (group, its, group.wanted(torch.from_numpy(slots[its]), torch.from_numpy(weights[its])))
            for group, its in each
        ]

    @torch.no_grad()
    def edit(self, x: Tensor, slots: Tensor, weights: Tensor, read: Encodes | None = None) -> Tensor:
        """The edit of each row of x (n, d) by its slot, (n,) with -1 for none, at its strength, float32 (n,)."""
        for group in self._groups:
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
        self._nothing = torch.tensor(edit_row("add", 0.0), dtype=torch.float32, device=device)  # beside no feature
        self.table = self._nothing.repeat(slots + 1, most, 1)
        self.keeps = torch.zeros(slots + 1, dtype=torch.bool, device=device)
        self.any_keeps = any(edit.keep_norm for edit, _ in each if isinstance(edit, EditFeatures))

    def load(self, slot: int, edit: Intervention, numbers: Tensor) -> None:
        """An edit of the features with these numbers stands in a slot."""
        inner = bare(edit)
        if not isinstance(inner, EditFeatures):
            raise TypeError(f"steerfast: {inner!r} edits no features")
        count = len(numbers)
        rows = [edit_row(inner.mode, value) for value in inner.values.values()]
        self.numbers[slot, :count] = numbers.to(self.numbers)
        self.table[slot, :count] = torch.tensor(rows, dtype=torch.float32, device=self.table.device)
        self.keeps[slot] = inner.keep_norm

    def unload(self, slot: int) -> None:
        """Nothing stands in a slot."""
        self.numbers[slot] = -1
        self.table[slot] = self._nothing
        self.keeps[slot] = False

    def of(self, slots: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, m), table (n, m, 4) and strength (n,) of rows; of one whose slot has none here strength 0."""
        at = slots.long()
        numbers = self.numbers[at]
        return numbers, self.table[at], torch.where((numbers >= 0).any(1), weights, 0)

    def chosen(self, slots: Tensor, weights: Tensor, decoder: Tensor) -> Chosen:
        """The same as `added` takes it, of rows that all have features here, with what they need of a decoder (F, d)."""
        at = slots.long()
        numbers, keeps = self.numbers[at], self.keeps[at][:, None]
        change = _change(self.table[at], weights[:, None])
        lift = _lift(numbers.clamp(min=0).long(), decoder)
        return Chosen(numbers, columns(numbers), change, lift, keeps if bool(keeps.any()) else None)

    def restored(self, x: Tensor, moved: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """The edited rows with their old lengths where their edit keeps these."""
        if not self.any_keeps:
            return moved
        keeps = (self.keeps[slots.long()] & (weights != 0))[:, None]
        return torch.where(keeps, restore_norm(moved.float(), x.float()).to(x.dtype), moved)


class Chosen(NamedTuple):
    """What the rows of a batch have changed, as long as it is the same."""

    numbers: Tensor  # features, int32 (n, m), -1 for none
    columns: list[Tensor]  # the same, m of (n, 1)
    change: Callable[[Tensor], Tensor]  # activations (n, m) -> by how much each is changed, strength included
    lift: Callable[[Tensor], Tensor]  # these changes -> float32 (n, d), what is added to the rows
    keeps: Tensor | None  # bool (n, 1): rows that keep their length; None: no row does

    def added(self, f: Tensor, rows: StreamRows, length: Tensor | None) -> Tensor:
        """What is added to rows whose activations (n, m) are these, of a unit that has this length (n, 1) in the stream.

        A row of zeros has no activations, and nothing is added to it.
        """
        g = self.change(f if f.dtype is torch.float32 else f.float())
        delta = self.lift(g if length is None else torch.where(length == 0, 0, g * length))
        if self.keeps is None:
            return delta
        x = rows()
        return torch.where(self.keeps, restore_norm(x + delta, x) - x, delta)


def _change(table: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """f (n, m) -> weight·(clip(t₀f + t₁, t₂, t₃) - f), table (n, m, 4), weight (n, 1); one call where nothing is clipped."""
    t0, t1, t2, t3 = table.unbind(2)
    if bool(t2.isfinite().any() | t3.isfinite().any()):
        return lambda f: torch.clamp(t0 * f + t1, t2, t3).sub_(f).mul_(weight)
    slope, offset = weight * (t0 - 1), weight * t1
    return lambda f: torch.addcmul(offset, slope, f)


def _lift(places: Tensor, decoder: Tensor) -> Callable[[Tensor], Tensor]:
    """g (n, m) -> Σⱼ g[:, j] · decoder[places[:, j]], places (n, m): by the few rows that are named, float32."""
    shared = bool((places == places[:1]).all())
    if shared or places.shape[1] == 1:
        rows = decoder[places[0] if shared else places[:, 0]].float()
        return rows.mul if places.shape[1] == 1 else partial(_product, rows)
    named, inverse = np.unique(places.numpy(), return_inverse=True)
    rows, bags = decoder[torch.from_numpy(named)].float(), torch.arange(0, places.numel(), places.shape[1])
    flat = torch.from_numpy(inverse.reshape(-1))
    return lambda g: torch.embedding_bag(rows, flat, bags, False, 0, False, g.flatten())[0]


@in_full_precision
def _product(rows: Tensor, g: Tensor) -> Tensor:
    return g @ rows


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
        self._nothing = torch.zeros((), dtype=torch.float32, device=device)
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
        moved = edited(x, found(*pair, columns(numbers)), numbers, table, self._decoder, scale)
        return self._features.restored(x, moved, slots, weights)

    def wanted(self, slots: Tensor, weights: Tensor) -> Chosen:
        """As of every group."""
        return self._features.chosen(slots, weights, self._decoder)

    def added(self, rows: StreamRows, wanted: Chosen, read: Encodes | None) -> Tensor:
        """As of every group."""
        pair = None if read is None else read.of(self._encoder, self._bias, self._k, self._normalisation)
        length = None if self._normalisation == "none" else normalised(rows(), self._normalisation)[1]
        if pair is None and self._counts:
            f = activations(rows(), self._encoder, self._bias, self._k, wanted.numbers)
        else:
            f = found(*(self._encode(rows()) if pair is None else pair), wanted.columns, self._nothing)
        return wanted.added(f, rows, length)

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

    def edit(self, x: Tensor, slots: Tensor, weights: Tensor, read: Encodes | None) -> Tensor:
        """As of every group."""
        numbers, table, weights = self._features.of(slots, weights)
        f, length = self._activations(x, numbers)
        scale = weights if length is None else weights * length.flatten()
        moved = edited(x, f, numbers, table, self._decoder, scale)
        return self._features.restored(x, moved, slots, weights)

    def wanted(self, slots: Tensor, weights: Tensor) -> Chosen:
        """As of every group."""
        return self._features.chosen(slots, weights, self._decoder)

    def added(self, rows: StreamRows, wanted: Chosen, read: Encodes | None) -> Tensor:
        """As of every group."""
        f, length = self._activations(rows(), wanted.numbers)
        return wanted.added(f, rows, length)

    @in_full_precision
    def _activations(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of each row's own features, (n, m), and what a unit of them is worth in the stream, (n, 1); None: 1."""
        inner, length = normalised(x, self._normalisation)
        h = torch.addmm(self._bias, inner.float(), self._encoder.T)
        f = torch.where(h <= self._threshold, 0, h).gather(1, numbers.clamp(min=0).long())
        return f, None if length is None else length.float()


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

    def wanted(self, slots: Tensor, weights: Tensor) -> Tensor:
        """As of every group."""
        return weights

    def added(self, rows: StreamRows, wanted: Tensor, read: Encodes | None) -> Tensor:
        """As of every group."""
        x = rows().to(self._dtype)
        return self._run(x, wanted).float() - x.float()
