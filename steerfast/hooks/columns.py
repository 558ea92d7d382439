"""From a plan to the columns of a row table, and what of a plan cannot be followed by a model. Nothing here runs one."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from steerfast._checks import warn_user
from steerfast._positions import Selector
from steerfast.edits.base import Intervention
from steerfast.edits.columns import Column, columns_of
from steerfast.edits.conditions import When
from steerfast.models.layers import Layers
from steerfast.place import Place, family
from steerfast.plan import Plan, needs_prompt, rule_of

from .attachment import Attachment


def layout_of(plan: Plan | None, layers: Layers) -> list[Column]:
    """The columns that a plan needs in a row table; the gate of a condition is (condition, kind, where it is read)."""

    def gate_of(place: Place, edit: Intervention) -> Any:
        return (edit.condition, type(edit), read_at(edit, place, layers)) if isinstance(edit, When) else None

    return [] if plan is None else columns_of(places_of(plan, layers), gate_of)


def places_of(plan: Plan, layers: Layers, caller: str = "steer") -> dict[Place, tuple[Intervention, ...]]:
    """(site, layer) to chain, layers counted from 0; two names of one layer are one chain."""
    merged: dict[Place, tuple[Intervention, ...]] = {}
    for (site, layer), chain in plan.edits.items():
        place = Place(site, layers.resolve(layer, caller))
        merged[place] = merged.get(place, ()) + chain
    return merged


def read_at(when: When, place: Place, layers: Layers, caller: str = "steer") -> Place:
    """Where a condition of an intervention at `place` is read."""
    read = place if when.reads is None else Place(when.reads.site, layers.resolve(when.reads.layer, caller))
    if when.condition.probe.after and read == place:
        raise ValueError(
            f"{caller}: {when!r} looks at the stream after the edits of its own place, of which it is one; read an earlier "
            "layer, or before the edits"
        )
    if read[1] > place[1] or (read[1] == place[1] and place[0] != read[0]):
        raise ValueError(
            f"{caller}: {when!r} stands at {place[0]} {place[1]}, before layer {read[1]} where its condition is read; name "
            "that layer or an earlier one"
        )
    if layers.point(read[1], read[0], caller).width != when.condition.width:
        raise ValueError(f"{caller}: the condition of {when!r} does not have the width of {read[0]} {read[1]}")
    return read


def check_plan(plan: Plan, layers: Layers, prepared: Container[Place] | None, caller: str = "steer") -> None:
    """Refuse a plan that does not fit the model; `prepared` are the places of a prepared one, None for any other."""
    card = plan.model
    if card is not None and (card.width, card.layers) != (layers.d, layers.count):
        raise ValueError(
            f"{caller}: the plan was made for {card.name} (width {card.width}, {card.layers} layers); this model "
            f"({layers.name}) has width {layers.d} and {layers.count} layers"
        )
    rule = rule_of(plan)
    if prepared is not None and isinstance(rule, Selector) and rule.reads_tokens:
        raise ValueError(
            f"{caller}: positions={plan.positions!r} on a prepared model; they look at token ids, which a compiled graph does "
            "not compare: steer a model that has not been prepared"
        )
    for (site, layer), chain in places_of(plan, layers, caller).items():
        point = layers.point(layer, site, caller)
        for edit in chain:
            if isinstance(edit, When):
                read_at(edit, Place(site, layer), layers, caller)
            if edit.width != point.width:
                raise ValueError(
                    f"{caller}: {edit!r} at {site} {layer} has width {edit.width}; this model's {site} has {point.width}"
                )
        if prepared is not None and (site, layer) not in prepared:
            raise RuntimeError(
                f"{caller}: {site} of layer {layer} was not prepared; name it in prepare before compiling"
            )


def warn_of_others(plan: Plan, layers: Layers) -> None:
    """Say what of a plan was made for another model, or with one."""
    card = plan.model
    if card is not None and card.name.partition(":")[0] != layers.name:
        warn_user(f"steer: the plan was made for {card.name}, this model is a {layers.name}")
    for (site, layer), chain in plan.edits.items():
        here = Place(site, layers.resolve(layer, "steer"))
        for edit in chain if layer < 0 else ():  # which layer that is, the plan could not say
            home = edit.origin.place
            if home is not None and home.layer >= 0 and not edit.everywhere and not here.same_stream(home):
                warn_user(f"steer: {edit!r} belongs to {home} and is put at {here}; sf.Plan([...]) finds its place")
    for edit in (edit for chain in plan.edits.values() for edit in chain):
        if edit.origin.model is not None and family(edit.origin.model) not in ("unknown", family(layers.name)):
            warn_user(f"steer: {edit!r} comes from activations of {edit.origin.model}; this model is a {layers.name}")


def check_lengths(lengths: tuple[int, ...] | None, active: Sequence[Attachment]) -> None:
    """Refuse two lengths of one prompt."""
    others = {one.prompt_length for one in active if one.prompt_length is not None}
    if lengths is not None and others - {lengths}:
        raise ValueError(
            f"steer: prompt_length {lengths} differs from {others.pop()} of a handle that is active; a prompt has one length"
        )


def check_positions(plans: Sequence[Plan], layers: Layers, counted: bool, length_known: bool) -> None:
    """Refuse positions that a model could never show; its prompt's length is known from `generate` or was given."""
    placed = [what for plan in plans if (what := needs_prompt(plan))]
    named = placed + [
        f"positions={plan.positions!r}"
        for plan in plans
        if isinstance(rule := rule_of(plan), Selector) and rule.remembers
    ]
    if not named:
        return
    if not counted:
        raise ValueError(
            f"steer: {named[0]} needs a cache of keys and values to count tokens; {layers.name} "
            'keeps another state, and has no generate that would show them: use positions="all"'
        )
    if not length_known and placed:
        raise ValueError(
            f"steer: {placed[0]} on a bare decoder ({layers.name}) needs prompt_length=, because "
            "generate runs on the model around it; steer that model instead"
        )
