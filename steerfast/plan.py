"""Plans: what goes where and when, as an immutable object that saves to JSON and safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerfast.edits.base import Intervention, intervention_type, untrained
from steerfast.edits.linear import Add
from steerfast.files import container
from steerfast.files.shelf import Shelf, with_saes
from steerfast.place import Place, place_of

from ._checks import warn_user
from ._positions import Selector, as_selector, normal, parse, resolved, special_ids

Edits = Mapping[Any, Any]
"""A place to one intervention (or vector to add), or to several."""
Positions = str | int | slice | Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class ModelCard:
    """The model that a plan was made for, as far as steering cares.

    Attributes:
        name: Class and name of the model; another name only warns.
        width: d of its residual stream.
        layers: Number of decoder blocks.
    """

    name: str
    width: int
    layers: int


class Plan:
    """Interventions by layer and site, with the token positions they act on.

    Args:
        edits: Layer L, (site, L) or a name of TransformerLens ("blocks.8.hook_resid_post") to one intervention or to a
            list that is applied in order. Layers are 0-based and may count from the end; the default site is
            "resid_post", the block's output. A vector (d,), or a direction, stands for `sf.Add` of it at strength 1. Or a
            list of interventions that know their place, such as `EditFeatures` of an SAE.
        positions: A selector: "all"; "prompt" (positions < P, the prompt's length in tokens); "generated" (≥ P); "last"
            (≥ P - 1, the last prompt token and every generated one); an index "-1" or a window "0:8" of the prompt's real
            tokens; "ids:5,7", every position whose input token is one of these; "special", every special token;
            "after:ids:5", behind the first of these tokens; "between:ids:5..7", from each 5 to the next 7, both included;
            joined by !, & and |, as in "all & !special" (docs/hooks.md). Or a list of indices, a slice, or a bool mask
            (tokens,) or (batch, tokens) over the prompt as it is passed. Padding is never steered.
        model: The model or `ModelCard` that the plan is made for; another width or layer count is then refused.
        special: The tokens that "special" means: a tokenizer, or their ids.

    Raises:
        TypeError, ValueError: a key, an intervention or the positions are not of these forms; widths differ; positions name
            "special", and special is not given.

    Example:
        >>> import torch, steerfast as sf
        >>> v = torch.tensor([1.0, 0.0])
        >>> sf.Plan({1: [sf.Ablate(v), sf.Add(v, 4.0)], ("attn_out", 0): sf.Add(v)}, positions="last")
        Plan(resid_post 1: Ablate, Add; attn_out 0: Add; positions='last')
        >>> sf.Plan({1: sf.Ablate(v)}) | sf.Plan({1: v, 2: v})
        Plan(resid_post 1: Ablate, Add; resid_post 2: Add; positions='all')
    """

    def __init__(
        self,
        edits: Edits | Sequence[Intervention],
        positions: Positions = "all",
        model: Any = None,
        special: Any = None,
    ) -> None:
        given = _mapping(edits)
        self._edits = {place_of("Plan", key): _chain(key, value) for key, value in given.items()}
        for place, chain in self._edits.items():
            _warn_misplaced(place, chain)
        if len(self._edits) != len(given):
            raise ValueError("Plan: a place is named twice; put its interventions into one list")
        self._positions = normal("Plan: positions", positions)
        self._special = special_ids("Plan: special", special)
        self._rule = _rule(self._positions, self._special)
        self._model = model if model is None or isinstance(model, ModelCard) else card(model)
        self._by_token = next((edit for chain in self._edits.values() for edit in chain if edit.by_token), None)
        if self._by_token is not None and self._positions != "all":
            raise ValueError(
                f"Plan: {self._by_token!r} is added to the prompt's first tokens, row by row, so positions="
                f"{self._positions!r} cannot be followed; leave positions out, and put other edits into a plan of their own"
            )
        widths = {edit.width for (site, _), chain in self._edits.items() if site != "head_out" for edit in chain}
        if self._model is not None:
            widths.add(self._model.width)
        if len(widths) > 1:
            raise ValueError(f"Plan: interventions have different widths {sorted(widths)}; a plan steers one model")

    def merge(self, *others: Plan | Edits) -> Plan:
        """This plan and others as one: what stands at the same place is applied in the order of the plans. Also `a | b`.

        Raises:
            TypeError, ValueError: the plans differ in positions or in the model that they were made for: steer with one
                handle for each, `sf.steer(model, a)` and `sf.steer(model, b)`, instead.
        """
        plans = [self, *(as_plan("Plan.merge", other) for other in others)]
        positions = _agreed("positions", plans, [plan._positions for plan in plans])
        special = _agreed("special tokens", plans, [plan._special for plan in plans if plan._special is not None])
        model = _agreed("models", plans, [plan._model for plan in plans if plan._model is not None])
        return Plan(_in_order(plans, None if model is None else model.layers), positions, model, special)

    def __or__(self, other: Plan | Edits) -> Plan:
        return self.merge(other) if isinstance(other, (Plan, Mapping)) else NotImplemented

    def __ror__(self, other: Edits) -> Plan:
        return Plan(other).merge(self) if isinstance(other, Mapping) else NotImplemented

    @property
    def edits(self) -> dict[Place, tuple[Intervention, ...]]:
        """(site, layer) -> interventions in order; layers as they were given."""
        return dict(self._edits)

    @property
    def positions(self) -> str | tuple[int, ...] | Tensor:
        """The positions as they were given: a selector, a tuple of indices, or a mask."""
        return self._positions

    @property
    def special(self) -> tuple[int, ...] | None:
        """The ids that "special" means, sorted, if they were given."""
        return self._special

    @property
    def model(self) -> ModelCard | None:
        """The model that the plan was made for, if that is known."""
        return self._model

    def __repr__(self) -> str:
        places = [
            f"{site} {layer}: {', '.join(type(edit).__name__ for edit in chain)}"
            for (site, layer), chain in self._edits.items()
        ]
        return f"Plan({'; '.join(places)}; positions={self._positions!r})"

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write plan.json and plan.safetensors into a directory: both, or neither.

        An edit of a Top-K SAE is written as the SAE's fingerprint and the features, without weights: `load` finds the SAE.

        Returns:
            The directory.

        Raises:
            ValueError: a tensor requires a gradient, or a number is not finite; a file stands where the directory should.
        """
        tensors: dict[str, Tensor] = {}
        places = [
            {"site": site, "layer": layer, "interventions": [_describe(edit, tensors) for edit in chain]}
            for (site, layer), chain in self._edits.items()
        ]
        positions: Any = self._positions
        if isinstance(positions, Tensor):
            tensors["positions"] = positions
            positions = {"mask": "positions"}
        text = {
            "positions": positions,
            "model": None if self._model is None else vars(self._model),
            "edits": places,
            **({} if self._special is None else {"special": list(self._special)}),
        }
        return container.write(container.PLAN, directory, text, tensors)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], saes: Any = None) -> Plan:
        """Read what `save` wrote. Nothing is executed, nothing is loaded in part.

        Args:
            directory: The directory.
            saes: Where the SAEs are that its edits of Top-K SAEs name: an SAE, the path of one, the path of a folder of SAE
                folders, or a list of these; None: the folder in the environment variable STEERFAST_SAES. An SAE of several
                edits is loaded once.

        Raises:
            FileNotFoundError: one of the two files is missing, or an SAE that it names is in none of these places.
            ValueError: a file is damaged, of another kind or a newer schema, or holds an unknown intervention or key.
        """
        shelf = saes if isinstance(saes, Shelf) else Shelf("Plan.load", saes)
        text, tensors = container.read(container.PLAN, directory)
        source = os.path.join(directory, container.PLAN.text_name)
        with container.describing(container.PLAN, directory):
            names = _tensor_names(text)
        container.expect(container.PLAN, directory, tensors, names)
        with container.describing(container.PLAN, directory):
            edits = _rebuild(text["edits"], tensors, shelf, source)
            positions = text["positions"]
            positions = tensors[positions["mask"]] if isinstance(positions, dict) else positions
            model = None if text["model"] is None else ModelCard(**text["model"])
            return cls(edits, positions, model, text.get("special"))


def card(model: Any) -> ModelCard:
    """The card of a transformers model."""
    from steerfast.models.layers import find_layers

    layers = find_layers(model, "Plan")
    name = str(getattr(model.config, "name_or_path", ""))
    name = Path(name).name if os.path.isdir(name) else name  # a plan is handed on, and says no path of this machine
    return ModelCard(f"{layers.name}:{name}", layers.d, layers.count)


def rule_of(plan: Plan) -> Selector | Tensor:
    """A plan's positions as whoever follows them reads them: a selector that holds no "special", or a mask."""
    return plan._rule


def needs_prompt(plan: Plan) -> str | None:
    """What of a plan asks where in its prompt a token stands, in words; None: nothing does."""
    if plan._by_token is not None:
        return repr(plan._by_token)
    named = not isinstance(plan._rule, Selector) or plan._rule.needs_length
    return f"positions={plan._positions!r}" if named else None


def as_plan(caller: str, value: Any) -> Plan:
    """A plan, or a dict that describes one."""
    if isinstance(value, Plan):
        return value
    if callable(plan := getattr(value, "plan", None)):  # a set of directions
        return plan()
    if isinstance(value, Mapping):
        return Plan(value)
    hint = "; one that knows its place goes into sf.Plan([...])" if isinstance(value, Intervention) else ""
    raise TypeError(f"{caller}: expected a Plan or a dict of layer -> intervention; got {type(value).__name__}{hint}")


def _agreed(what: str, plans: Sequence[Plan], values: Sequence[Any]) -> Any:
    """The one value that plans to be merged have in common, None where none states it."""
    for value in values[1:]:
        masks = isinstance(value, Tensor) and isinstance(values[0], Tensor)
        if not (torch.equal(value, values[0]) if masks else type(value) is type(values[0]) and value == values[0]):
            raise ValueError(
                f"Plan.merge: the plans have different {what}, {values[0]!r} and {value!r}; steer with one handle for each"
            )
    return values[0] if values else None


def _in_order(plans: Sequence[Plan], layers: int | None) -> dict[Place, list[Intervention]]:
    """The edits of several plans, what stands at one place in their order, also where it has two names, as 2 and -1 may be."""
    edits: dict[Place, list[Intervention]] = {}
    for plan in plans:
        for place, chain in plan._edits.items():
            names = list(edits)
            behind = names[names.index(place) + 1 :] if place in edits else []
            for other in behind:  # their edits came before these
                if other.site != place.site or (other.layer < 0) == (place.layer < 0):
                    continue
                if layers is None:
                    raise ValueError(
                        f"Plan.merge: {place} and {other} may be one layer, where the plans would not act in their order; count "
                        "layers from one end, or give the plans model="
                    )
                if (other.layer - place.layer) % layers == 0:
                    place = other
            edits.setdefault(place, []).extend(chain)
    return edits


def _mapping(edits: Any) -> Edits:
    if isinstance(edits, Sequence) and not isinstance(edits, str):
        return _by_place(edits)
    if not isinstance(edits, Mapping):
        raise TypeError(f"Plan: edits must be a dict of layer -> intervention(s); got {type(edits).__name__}")
    if not edits:
        raise ValueError("Plan: edits is empty; name at least one layer")
    return edits


def _by_place(chain: Sequence[Any]) -> Edits:
    """A list of interventions, each at the place that it knows."""
    edits: dict[Any, list[Intervention]] = {}
    for edit in chain:
        if not isinstance(edit, Intervention):
            raise TypeError(f"Plan: a list must hold interventions; got {edit!r}; wrap a vector in sf.Add")
        if edit.origin.place is None:
            raise ValueError(
                f"Plan: {edit!r} does not know its layer and site; pass a dict of layer -> intervention(s)"
            )
        edits.setdefault(edit.origin.place, []).append(edit)
    if not edits:
        raise ValueError("Plan: edits is empty; name at least one layer")
    return edits


def _warn_misplaced(place: Place, chain: Sequence[Intervention]) -> None:
    """Something that was made for one place is put at another."""
    for edit in chain:
        home = edit.origin.place
        if home is None or edit.everywhere or min(place.layer, home.layer) < 0 or place.same_stream(home):
            continue
        warn_user(f"Plan: {edit!r} belongs to {home} and is put at {place}; sf.Plan([...]) finds its place")


def _chain(key: Any, value: Any) -> tuple[Intervention, ...]:
    several = isinstance(value, Sequence) and not isinstance(value, str)
    chain = tuple(Add(one) if _is_vector(one) else one for one in (value if several else [value]))
    if not chain or not all(isinstance(edit, Intervention) for edit in chain):
        raise TypeError(
            f"Plan: at {key!r} expected an intervention, a vector to add, or a non-empty list of them; got {value!r}"
        )
    return chain


def _is_vector(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray)) or (
        isinstance(getattr(value, "vector", None), Tensor) and not isinstance(value, Intervention)
    )


def _rule(positions: str | tuple[int, ...] | Tensor, special: tuple[int, ...] | None) -> Selector | Tensor:
    if isinstance(positions, Tensor):
        return positions
    if isinstance(positions, tuple):
        return as_selector(positions)
    try:
        return resolved(parse("Plan: positions", positions), special)
    except ValueError as reason:
        raise ValueError(f"Plan: {reason}") from None


def _describe(edit: Intervention, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The JSON of an intervention; its tensors go into the shared file under numbered names."""
    untrained("Plan.save", edit)
    names = {}
    for name, value in edit.tensors().items():
        names[name] = next((key for key, other in tensors.items() if other is value), f"{len(tensors)}.{name}")
        tensors[names[name]] = value  # an object that stands in two places is written once
    return {"type": type(edit).__name__, "tensors": names, "numbers": edit.numbers(), **edit.known()}


def _tensor_names(text: dict[str, Any]) -> dict[str, None]:
    """The tensors that a plan's JSON names; an unknown intervention is refused first."""
    names: dict[str, None] = {}
    for place in text["edits"]:
        for item in place["interventions"]:
            intervention_type("Plan.load", item["type"])
            names |= dict.fromkeys(item["tensors"].values())
    return names | ({text["positions"]["mask"]: None} if isinstance(text["positions"], dict) else {})


def _rebuild(places: Any, tensors: dict[str, Tensor], shelf: Shelf, source: str) -> Edits:
    """The edits of a plan's JSON; an intervention that stands in several places is one object again."""
    made: dict[str, Intervention] = {}
    edits: dict[tuple[str, int], list[Intervention]] = {}
    for place in places:
        chain = edits.setdefault((place["site"], place["layer"]), [])
        if chain:
            raise ValueError("a place stands twice among the edits")
        for item in place["interventions"]:
            key = json.dumps(item, sort_keys=True)
            if key not in made:
                parts = {name: tensors[stored] for name, stored in item["tensors"].items()}
                numbers = with_saes(item["numbers"], shelf, source)
                edit = intervention_type("Plan.load", item["type"]).restore(parts, numbers)
                made[key] = edit.with_known(item)
            chain.append(made[key])
    return edits
