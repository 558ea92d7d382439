"""The plans that an engine serves: read once from a directory, known by name, told apart by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from steerfast._checks import MAX_SLOTS_PER_ROW
from steerfast._positions import as_selector
from steerfast.edits.base import Intervention, slot_in
from steerfast.edits.columns import Column, columns_of, numbered
from steerfast.edits.conditions import When
from steerfast.edits.linear import Add
from steerfast.files.shelf import VARIABLE, Shelf
from steerfast.place import Place
from steerfast.plan import Plan

from .programs import costs_an_encode, fits_no_slot
from .roster import Roster

SITES_IN_ORDER = ("resid_pre", "head_out", "attn_out", "mlp_out", "resid_post")
"""Where an engine can be steered and read, in the order in which a layer comes to them."""

Chains = dict[Place, dict[int, Intervention]]
"""(site, layer) -> slot of the plan, counted from 0 -> intervention, in the order in which they act; layers are counted from 0,
and resid_pre of a later layer is resid_post of the one before."""


class Widths(NamedTuple):
    """Of a model's stream, and of head_out; 0: its heads are split over devices, and nothing is steered or read there."""

    stream: int
    heads: int = 0

    def at(self, site: str) -> int:
        """The width of a site.

        Raises:
            ValueError: an engine has no such site.
        """
        if site not in SITES_IN_ORDER:
            raise ValueError(f"site {site!r} is not known inside vLLM; the sites are {', '.join(SITES_IN_ORDER)}")
        if site == "head_out" and not self.heads:
            raise ValueError(
                "site 'head_out' cannot be steered or read inside vLLM on several devices, over which the heads are split; use "
                "attn_out"
            )
        return self.heads if site == "head_out" else self.stream


@dataclass(frozen=True)
class ServedPlan:
    """What a server must know of a plan to answer requests; its vectors are in the banks.

    Attributes:
        name: Name of its folder.
        fingerprint: SHA-256 of its content; equal content, equal fingerprint.
        columns: Of each column of the row table that it takes, the same in every layer: for how many of a prompt's first
            tokens it has a slot each; 0: it has one slot, for all tokens.
        positions: What it says itself, as a selector; None: a mask, which a server does not follow.
        special: The ids that "special" means, where the plan says.
        gated: Whether some of its interventions stand behind a condition.
        outputs: Of a layer whose output it edits, (layer, whether as what enters the next) -> whether it does no more than add.
    """

    name: str
    fingerprint: str
    columns: tuple[int, ...]
    positions: str | None
    special: tuple[int, ...] | None = None
    gated: bool = False
    outputs: Mapping[tuple[int, bool], bool] = field(default_factory=dict, hash=False)

    def overtakes(self, later: ServedPlan) -> int | None:
        """A layer whose output it edits as what enters the next, where a plan named behind it edits that output itself.

        That comes first in a model; an engine has one hook for both. None: there is none, or both only add.
        """
        both = [
            layer
            for (layer, enters), adds in self.outputs.items()
            if enters and (layer, False) in later.outputs and not (adds and later.outputs[layer, False])
        ]
        return min(both, default=None)

    @property
    def slots(self) -> int:
        """Slots that it takes, the same numbers in every layer."""
        return sum(max(tokens, 1) for tokens in self.columns)

    @property
    def by_token(self) -> int:
        """The largest number of a prompt's first tokens that have a slot each; 0: none have."""
        return max(self.columns, default=0)

    def runs(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """The numbers of its slots, column by column."""
        ends = [0, *accumulate(max(tokens, 1) for tokens in self.columns)]
        return [numbers[first:stop] for first, stop in pairwise(ends)]


@dataclass(frozen=True)
class Library:
    """All plans of a directory, and why some of them cannot be used.

    Attributes:
        plans: By name, sorted.
        refused: Name to the reason why no request may use it.
        entered: The layers, but the first, that some plan edits at resid_pre.
        width: Columns of the row table: how many interventions can act on a token in one place.
    """

    plans: dict[str, ServedPlan] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    entered: frozenset[int] = frozenset()
    width: int = MAX_SLOTS_PER_ROW

    @property
    def slots(self) -> int:
        """Slots that all plans take together; equal contents share theirs."""
        return sum({served.fingerprint: served.slots for served in self.plans.values()}.values())

    @property
    def least(self) -> int:
        """Slots that whatever one request may name can take."""
        columns = sorted(max(tokens, 1) for served in self.plans.values() for tokens in served.columns)
        return max(self.width, sum(columns[-self.width :]))

    @property
    def longest(self) -> int:
        """Columns of the longest plan."""
        return max((len(served.columns) for served in self.plans.values()), default=0)

    @property
    def by_token(self) -> int:
        """For how many of a prompt's first tokens a plan has a slot each, at most."""
        return max((served.by_token for served in self.plans.values()), default=0)


def load(
    directory: str | os.PathLike[str],
    width: int,
    layers: int,
    dtype: torch.dtype = torch.float32,
    *,
    heads: int = 0,
    saes: Shelf | None = None,
) -> tuple[Library, dict[str, Chains]]:
    """Read every plan of a directory, for a model of that width, number of layers and dtype of the stream.

    `heads` is the width of head_out; 0: nothing can be done there. A plan that is damaged or does not fit is refused
    by name; the others are served. SAEs that plans name are looked for on `saes`, or where STEERFAST_SAES says.

    Raises:
        ValueError: there is no such directory, it holds no plan, or another process of this engine has found other plans.
    """
    root = Path(directory)
    if not root.is_dir():
        raise ValueError(f"STEERFAST_PLANS: {str(root)!r} is not a directory; expected one with a folder per plan")
    served: dict[str, ServedPlan] = {}
    refused: dict[str, str] = {}
    chains: dict[str, Chains] = {}
    entered: set[int] = set()
    widths = Widths(width, heads)
    saes = Shelf("Plan.load") if saes is None else saes  # one for all, so that none is read twice
    roster = Roster("STEERFAST_PLANS", root, "plan.json")
    for folder in roster.folders:
        name = folder.name
        try:
            plan = Plan.load(folder, saes)
            columns = _fit(plan, widths, layers, dtype)
        except (ValueError, TypeError, OSError) as reason:
            roster.check(folder)
            refused[name] = public(str(reason), root)
            continue
        chains[name] = numbered(columns)
        entered |= {layer % layers for site, layer in plan.edits if site == "resid_pre"} - {0}
        # plan.json holds the hash of the tensors beside it, which loading has checked: its own hash covers both.
        fingerprint = hashlib.sha256((folder / "plan.json").read_bytes()).hexdigest()
        roster.check(folder)
        tokens = tuple(column.tokens for column in columns)
        gated = any(isinstance(edit, When) for column in columns for edit in column.edits.values())
        served[name] = ServedPlan(
            name, fingerprint, tokens, _selector(plan), plan.special, gated, _outputs(plan, layers)
        )
    for name in [name for name, plan in served.items() if plan.gated]:
        try:
            for place, chain in chains[name].items():
                for edit in chain.values():
                    if isinstance(edit, When):
                        gate_place(edit, place, layers, entered)
        except ValueError as reason:
            refused[name] = str(reason)
            del served[name], chains[name]
    if not served and not refused:
        raise ValueError(f"STEERFAST_PLANS: {str(root)!r} holds no plan; save one with plan.save(directory / name)")
    library = Library(served, refused, frozenset(entered))
    every = {id(edit): edit for plan in chains.values() for chain in plan.values() for edit in chain.values()}
    free = all(map(_is_free, every.values()))
    return replace(library, width=max(library.longest, MAX_SLOTS_PER_ROW if free else 1)), chains


MOST_COLUMNS = 64
"""That may be asked for: a request writes whole lines."""


def with_columns(library: Library, given: str | None) -> Library:
    """The library with as many columns of the row table as STEERFAST_COLUMNS asks for; None: as it is.

    Raises:
        ValueError: they are fewer than what the longest plan takes, or no number.
    """
    if given is None:
        return library
    least = max(library.longest, 1)
    most = max(least, MOST_COLUMNS)
    if not given.isdecimal() or not least <= int(given) <= most:
        raise ValueError(
            f"STEERFAST_COLUMNS is {given!r}; expected a whole number from {least}, what the longest plan takes, to {most}"
        )
    return replace(library, width=int(given))


ONE_LAUNCH = 16
"""Directions below which a GPU takes all columns of the row table in one launch."""


def _is_free(edit: Intervention) -> bool:
    """Whether a column of the row table in which nobody asks for an edit costs nothing."""
    if fits_no_slot(edit, torch.device("cpu")):
        return not costs_an_encode(edit)
    return edit.slot().rank < ONE_LAUNCH


def public(reason: str, root: Path) -> str:
    """What a client may read of it: no path of the server."""
    if named := os.environ.get(VARIABLE):
        saes = Path(named).expanduser()
        reason = reason.replace(f"{VARIABLE}={saes}", VARIABLE).replace(f"{saes}{os.sep}", "")
    return reason.replace(f"{root}{os.sep}", "")


def engine_place(site: str, layer: int) -> Place:
    """Where an engine has its hook for a place: what enters a later layer is what left the one before."""
    return Place("resid_post", layer - 1) if site == "resid_pre" and layer else Place(site, layer)


def read_place(site: str, layer: int, after: bool, layers: int, entered: Collection[int]) -> tuple[Place, bool]:
    """Where an engine reads what is to be read at a place, and whether after the edits that its hook makes there.

    Args:
        site: One of `SITES_IN_ORDER`.
        layer: Negative ones count from the end.
        after: After the edits of that place.
        layers: Of the model.
        entered: The layers, but the first, that some plan edits at resid_pre.

    Raises:
        ValueError: it has no such place, or nothing can be read between the edits there.
    """
    if not -layers <= layer < layers:
        raise ValueError(f"layer {layer} is out of range; this model has {layers} layers, 0 to {layers - 1}")
    index = layer % layers
    place = engine_place(site, index)
    # Edits of what enters a layer follow those of what left the one before, at one hook.
    if site == "resid_pre" and index in entered and not after:
        raise ValueError(
            f"before resid_pre {index} lies between the edits of resid_post {index - 1} and of resid_pre {index}, which inside "
            f"vLLM are made at once; read resid_post {index - 1} before its edits, or read after=True"
        )
    if site == "resid_post" and index + 1 in entered and after:
        raise ValueError(
            f"after resid_post {index} lies between its edits and those of resid_pre {index + 1}, which inside vLLM are made at "
            f"once; read before them, or after resid_pre {index + 1}"
        )
    return place, after or place.site != site


def gate_place(when: When, place: Place, layers: int, entered: Collection[int]) -> tuple[Place, bool]:
    """Where the condition of an intervention at an engine's place is read, as `read_place` has it.

    Raises:
        ValueError: it is read nowhere, or later than the intervention acts.
    """
    asked = when.reads or place
    read, after = read_place(asked.site, asked.layer, when.condition.probe.after, layers, entered)
    order = [(where.layer, SITES_IN_ORDER.index(where.site)) for where in (read, place)]
    if order[0] > order[1] or (read == place and after):
        raise ValueError(
            f"the condition of {when!r} is read {'after' if after else 'at'} {read.site} {read.layer}, and it is to act at "
            f"{place.site} {place.layer}, which comes first; read an earlier place"
        )
    return read, after


def _outputs(plan: Plan, layers: int) -> dict[tuple[int, bool], bool]:
    """As in `ServedPlan`."""
    found: dict[tuple[int, bool], bool] = {}
    for (site, layer), chain in plan.edits.items():
        if site in ("resid_pre", "resid_post"):
            key = layer % layers - (site == "resid_pre"), site == "resid_pre"
            adds = all(isinstance(edit, Add) and not edit.keep_norm for edit in chain)
            found[key] = adds and found.get(key, True)
    return found


def _selector(plan: Plan) -> str | None:
    """A plan's positions in the one form that a request has for them."""
    given = plan.positions
    return given if isinstance(given, str) else None if isinstance(given, Tensor) else str(as_selector(given))


def _fit(plan: Plan, widths: Widths, layers: int, dtype: torch.dtype) -> list[Column]:
    """The plan's columns in this model, or the reason why there are none."""
    card = plan.model
    if card is not None and (card.width, card.layers) != (widths.stream, layers):
        raise ValueError(
            f"made for width {card.width} and {card.layers} layers; this model has width {widths.stream} and {layers} layers"
        )
    chains: dict[Place, tuple[Intervention, ...]] = {}
    # What enters a layer is what left the one before: its edits come after those at that output.
    for (site, layer), chain in sorted(plan.edits.items(), key=lambda item: item[0][0] == "resid_pre"):
        if not -layers <= layer < layers:
            raise ValueError(f"layer {layer} is out of range; this model has {layers} layers, 0 to {layers - 1}")
        width = widths.at(site)
        for edit in chain:
            if isinstance(edit, When) and site == "resid_pre" and layer % layers:
                raise ValueError(
                    f"{edit!r} stands at resid_pre {layer}, whose edits join those of resid_post {layer % layers - 1} inside "
                    "vLLM; put it there"
                )
            if isinstance(edit, When):
                read = widths.at(site if edit.reads is None else edit.reads.site)
                if edit.condition.width != read:
                    raise ValueError(
                        f"the condition of {edit!r} has width {edit.condition.width}; this model has {read}"
                    )
            if edit.width != width:
                raise ValueError(f"{edit!r} at {site} {layer} has width {edit.width}; this model has {width}")
            for part in edit.by_token or (edit,):
                if part is not None and not fits_no_slot(part, torch.device("cpu")):
                    slot_in(f"{site} {layer}", dtype, part)  # what no bank could hold must not stop the engine later
        index = layer % layers
        place = engine_place(site, index)
        chains[place] = chains.get(place, ()) + chain
    return columns_of(chains)
