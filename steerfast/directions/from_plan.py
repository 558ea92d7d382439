"""The vectors that a plan adds, as directions, and several directions of one place as their sum."""

from __future__ import annotations

from dataclasses import replace

from steerfast.edits.linear import Add
from steerfast.place import Place
from steerfast.plan import Plan

from .direction import Direction
from .sets import DirectionSet


def directions_of(owner: str, plan: Plan) -> DirectionSet:
    """What a plan adds, one direction per layer and site: the sum of its c·v there.

    The set's own plan, at strength 1, steers as the given one does; what only a plan can say is refused. Of their origin
    the plan knows as much as the directions knew that were put into it.

    Args:
        owner: Whose errors they are: a function, a file.
        plan: Of `Add` alone.

    Raises:
        ValueError: another intervention, keep_norm, positions other than "all", a layer that counts from the end, or
            additions that cancel, or all of strength 0.
    """
    if plan.positions != "all":
        raise ValueError(
            f"{owner}: the plan has positions={plan.positions!r}, which vectors cannot say; they steer every token"
        )
    model = None if plan.model is None else plan.model.name.partition(":")[0]
    found: list[Direction] = []
    for (site, layer), chain in plan.edits.items():
        if layer < 0:
            raise ValueError(
                f"{owner}: {site} {layer} counts from the end, which vectors cannot say; name the layer from 0"
            )
        parts: list[Direction] = []
        for edit in chain:
            if not isinstance(edit, Add) or edit.keep_norm:
                raise ValueError(
                    f"{owner}: {edit!r} at {site} {layer} is no vector that is added; only a plan can hold it"
                )
            if edit.by_token:
                raise ValueError(
                    f"{owner}: {edit!r} at {site} {layer} is added to the prompt's first tokens, a row to each, which vectors "
                    "cannot say; they steer every token"
                )
            vector = edit.tensors()["vector"].double() * edit.strength
            if edit.strength != 0:
                origin = replace(edit.origin, place=Place(site, layer), model=edit.origin.model or model)
                parts.append(Direction(vector, "plan", float(vector.norm()), origin))
        if parts:
            found.append(sum(parts[1:], parts[0]))
    if not found:
        raise ValueError(
            f"{owner}: every addition of the plan has strength 0, so there is no vector; give another strength"
        )
    return DirectionSet(found, plan.model)


def summed(owner: str, directions: DirectionSet) -> DirectionSet:
    """One direction per layer and site: the sum of those that are there, for formats that hold one.

    Raises:
        ValueError: a direction that does not know its layer; those of one place are of two models, or cancel.
    """
    places: dict[Place, Direction] = {}
    for name, direction in directions.items():
        place = direction.origin.place
        if place is None:
            raise ValueError(
                f"{owner}: {name!r} does not know its layer; give it one with dataclasses.replace(direction, "
                "origin=steerfast.place.Origin(place=8))"
            )
        places[place] = places[place] + direction if place in places else direction
    return DirectionSet(list(places.values()), directions.model)
