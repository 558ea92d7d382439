"""Plans: what goes where and when, as an immutable object that saves to JSON and safetensors."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from steerfast.edits.base import Intervention, intervention_type, untrained
from steerfast.files.replace import replace_file
from steerfast.models.layers import SITES

from ._checks import one_of, whole_number
from ._positions import Selector, as_selector, normal, parse, resolved, special_ids

SCHEMA = 1

Edits = Mapping[Any, Intervention | Sequence[Intervention]]
"""Layer L or (site, L) to one intervention or several."""
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
        edits: Layer L, or (site, L), to one intervention or to a list that is applied in order. Layers are 0-based and
            may count from the end; the default site is "resid_post", the block's output. Or a list of interventions
            that know their place, such as `EditFeatures` of an SAE.
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
    """

    def __init__(
        self,
        edits: Edits | Sequence[Intervention],
        positions: Positions = "all",
        model: Any = None,
        special: Any = None,
    ) -> None:
        given = _mapping(edits)
        self._edits = {_place(key): _chain(key, value) for key, value in given.items()}
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

    @property
    def edits(self) -> dict[tuple[str, int], tuple[Intervention, ...]]:
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
        """Write plan.json and plan.safetensors into a directory, each under a temporary name first.

        Returns:
            The directory.
        """
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        places = [
            {"site": site, "layer": layer, "interventions": [_describe(edit, tensors) for edit in chain]}
            for (site, layer), chain in self._edits.items()
        ]
        positions: Any = self._positions
        if isinstance(positions, Tensor):
            tensors["positions"] = positions
            positions = {"mask": "positions"}
        blob = save_tensors(tensors)
        text = {
            "schema": SCHEMA,
            "kind": "steerfast.plan",
            "positions": positions,
            "model": None if self._model is None else vars(self._model),
            "edits": places,
            "tensors_sha256": hashlib.sha256(blob).hexdigest(),
            **({} if self._special is None else {"special": list(self._special)}),
        }
        replace_file(target / "plan.safetensors", blob)
        replace_file(target / "plan.json", json.dumps(text, indent=2).encode())
        return target

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote. Nothing is executed, nothing is loaded in part.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, of another kind or schema, or holds an unknown intervention or key.
        """
        source = Path(directory)
        text_path, blob_path = source / "plan.json", source / "plan.safetensors"
        for path in (text_path, blob_path):
            if not path.is_file():
                raise FileNotFoundError(
                    f"Plan.load: {path} does not exist; a plan is a directory with plan.json and plan.safetensors"
                )
        try:
            text = json.loads(text_path.read_bytes())
        except ValueError as error:
            raise ValueError(f"Plan.load: {text_path} is not JSON ({error})") from None
        blob = blob_path.read_bytes()
        _check_text(text_path, text)
        if hashlib.sha256(blob).hexdigest() != text["tensors_sha256"]:
            raise ValueError(
                f"Plan.load: {blob_path} is not the file that {text_path} was written with; copy both again"
            )
        try:
            tensors = load_tensors(blob)
        except SafetensorError as error:
            raise ValueError(f"Plan.load: {blob_path} is damaged: {error}") from None
        try:
            edits = {
                (place["site"], place["layer"]): [_rebuild(item, tensors) for item in place["interventions"]]
                for place in text["edits"]
            }
            if len(edits) != len(text["edits"]):
                raise KeyError("a place stands twice among the edits")
            positions = text["positions"]
            positions = tensors[positions["mask"]] if isinstance(positions, dict) else positions
            model = None if text["model"] is None else ModelCard(**text["model"])
            return cls(edits, positions, model, text.get("special"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"Plan.load: {text_path} does not describe a plan of schema {SCHEMA}: {error}") from None


def card(model: Any) -> ModelCard:
    """The card of a transformers model."""
    from steerfast.models.layers import find_layers

    layers = find_layers(model, "Plan")
    return ModelCard(f"{layers.name}:{getattr(model.config, 'name_or_path', '')}", layers.d, layers.count)


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
    if isinstance(value, Mapping):
        return Plan(value)
    raise TypeError(f"{caller}: expected a Plan or a dict of layer -> intervention; got {type(value).__name__}")


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
    edits: dict[tuple[str, int], list[Intervention]] = {}
    for edit in chain:
        if not isinstance(edit, Intervention):
            raise TypeError(f"Plan: a list must hold interventions; got {edit!r}")
        if edit.place is None:
            raise ValueError(
                f"Plan: {edit!r} does not know its layer and site; pass a dict of layer -> intervention(s)"
            )
        edits.setdefault(edit.place, []).append(edit)
    if not edits:
        raise ValueError("Plan: edits is empty; name at least one layer")
    return edits


def _warn_misplaced(place: tuple[str, int], chain: Sequence[Intervention]) -> None:
    """An SAE reads one place; the output of a block is the input of the next."""
    for edit in chain:
        home = edit.place
        same = {place, ("resid_pre", place[1] + 1) if place[0] == "resid_post" else place}
        same |= {("resid_post", place[1] - 1)} if place[0] == "resid_pre" else set()
        if home is not None and home not in same and place[1] >= 0:
            warnings.warn(
                f"Plan: {edit!r} reads {home[0]} {home[1]} and is put at {place[0]} {place[1]}; sf.Plan([...]) finds its place",
                UserWarning,
                stacklevel=4,
            )


def _place(key: Any) -> tuple[str, int]:
    site, layer = key if isinstance(key, tuple) and len(key) == 2 else ("resid_post", key)
    try:
        number = whole_number("Plan", "layer", layer)
    except TypeError:
        raise TypeError(f"Plan: key {key!r}; expected a layer number or (site, layer)") from None
    return one_of("Plan", "site", site, SITES), number


def _chain(key: Any, value: Any) -> tuple[Intervention, ...]:
    chain = (value,) if isinstance(value, Intervention) else tuple(value) if isinstance(value, Sequence) else None
    if not chain or not all(isinstance(edit, Intervention) for edit in chain):
        raise TypeError(f"Plan: at {key!r} expected an intervention or a non-empty list of them; got {value!r}")
    return chain


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
        tensors[names[name]] = value.contiguous()  # an object that stands in two places is written once
    return {"type": type(edit).__name__, "tensors": names, "numbers": edit.numbers()}


def _rebuild(item: dict[str, Any], tensors: dict[str, Tensor]) -> Intervention:
    kind = intervention_type("Plan.load", item["type"])
    return kind.restore({name: tensors[key] for name, key in item["tensors"].items()}, item["numbers"])


def _check_text(path: Path, text: Any) -> None:
    expected = {"schema", "kind", "positions", "model", "edits", "tensors_sha256"}
    if not isinstance(text, dict) or text.get("kind") != "steerfast.plan":
        raise ValueError(f'Plan.load: {path} is not a plan ("kind" is not "steerfast.plan")')
    if text.get("schema") != SCHEMA:
        raise ValueError(f"Plan.load: {path} has schema {text.get('schema')!r}; this version reads schema {SCHEMA}")
    if set(text) - {"special"} != expected:
        raise ValueError(f"Plan.load: {path} has keys {sorted(text)}; expected {sorted(expected)}")
