"""Where in a model something is read or steered, and where what is made of activations comes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ._checks import finite_number, one_of, whole_number

SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "head_out")
HOOKS = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "attn.hook_z": "head_out",
}
"""TransformerLens's names of the sites; its hook_z, all heads side by side, is what the output projection reads."""


class Place(NamedTuple):
    """A site of a layer.

    Attributes:
        site: "resid_pre", "resid_post", "attn_out", "mlp_out" or "head_out".
        layer: Decoder block, 0-based; negative ones count from the end.
    """

    site: str
    layer: int

    def __str__(self) -> str:
        return f"{self.site} {self.layer}"

    @property
    def hook_name(self) -> str:
        """The place as TransformerLens names it, such as blocks.5.hook_resid_pre."""
        return f"blocks.{self.layer}.{next(hook for hook, site in HOOKS.items() if site == self.site)}"

    def same_stream(self, other: Place) -> bool:
        """Whether both show the same tensor: the output of a block is the input of the next."""
        return _counted_from_outputs(self) == _counted_from_outputs(other)


@dataclass(frozen=True)
class Origin:
    """Where activations were read, as far as that is known, and how long they are there.

    Args:
        model: Class of the model, such as "LlamaForCausalLM", or the model type that another library's file names.
        place: Site and layer; what else `place_of` takes, such as (site, layer) or a layer, is made a `Place`.
        position: Which tokens: "last", "mean", "all" or an index.
        typical_norm: Median L2 norm of the rows; the mean would follow the few tokens of enormous norm.

    Raises:
        TypeError, ValueError: a place that is none, or a norm that is negative or not finite.
    """

    model: str | None = None
    place: Place | None = None
    position: str | int | None = None
    typical_norm: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, (str, type(None))):
            raise TypeError(f"Origin: model is {self.model!r}; expected the name of a class, or None")
        if not isinstance(self.position, (str, type(None))):
            object.__setattr__(self, "position", whole_number("Origin", "position", self.position))
        if self.place is not None:
            object.__setattr__(self, "place", place_of("Origin", self.place))
        if self.typical_norm is not None:
            norm = finite_number("Origin", "typical_norm", self.typical_norm)
            if norm < 0:
                raise ValueError(f"Origin: typical_norm is {norm}; expected a length >= 0, or None where it is unknown")
            object.__setattr__(self, "typical_norm", norm)

    def numbers(self) -> dict[str, Any]:
        """Its fields, ready for JSON."""
        return {**vars(self), "place": None if self.place is None else list(self.place)}

    @classmethod
    def restore(cls, numbers: Mapping[str, Any]) -> Origin:
        """The inverse of `numbers`; everything is validated anew."""
        place = numbers["place"]
        return cls(**{**numbers, "place": None if place is None else Place(*place)})

    def __str__(self) -> str:
        layer = None if self.place is None else f"layer {self.place.layer}, {self.place.site}"
        return ", ".join(part for part in (self.model, layer) if part)


NOWHERE = Origin()
"""The origin of what says nothing of it."""


def common_origin(owner: str, origins: Iterable[Origin]) -> Origin:
    """The origin of what is made of several things.

    A model or place that only some of them know is kept. Two places whose streams differ, or models of two families, are
    refused, because vectors of different places live in different spaces. Two different positions leave none: they do not
    say where something can be used. The typical norm is the mean of those that are known.

    Args:
        owner: Who asks, for the message.
        origins: Theirs, one at least.

    Raises:
        ValueError: two models, or two places.
    """
    known = list(origins)
    model = _only(owner, "model", [one.model for one in known], lambda a, b: family(a) == family(b))
    place = _only(owner, "place", [one.place for one in known], Place.same_stream)
    positions = {one.position for one in known}
    norms = [one.typical_norm for one in known if one.typical_norm is not None]
    position = positions.pop() if len(positions) == 1 else None
    return Origin(model, place, position, sum(norms) / len(norms) if norms else None)


def _only(owner: str, name: str, values: list[Any], same: Callable[[Any, Any], bool]) -> Any:
    found = [value for value in values if value is not None]
    for other in found[1:]:
        if not same(found[0], other):
            raise ValueError(
                f"{owner}: the {name} is {str(found[0])!r} of one and {str(other)!r} of another; such vectors live in "
                "different spaces (dataclasses.replace(v, origin=steerfast.place.Origin()) forgets where v comes from)"
            )
    return found[0] if found else None


def typical_norm_of(rows: Tensor) -> float:
    """The median length of the rows (n, d)."""
    return median_of(rows.norm(dim=1))


def median_of(values: Tensor) -> float:
    """The median; of an even number of values the mean of the two in the middle, of which `Tensor.median` is the lower one."""
    return (float(values.median()) - float((-values).median())) / 2


def family(model: str) -> str:
    """The family that a class name (LlamaForCausalLM) or a model type (llama) names, as one lower-case word."""
    word = re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration|Model|_text)$", "", model.partition(":")[0])
    return re.sub(r"[^a-z0-9]", "", word.lower())


def place_of(owner: str, key: Any) -> Place:
    """The place that a key names.

    Args:
        owner: Who asks, for the messages.
        key: A layer L, whose site is then "resid_post"; (site, L); or a name of TransformerLens, "blocks.L.hook_resid_post".

    Raises:
        TypeError, ValueError: none of these, or an unknown site.
    """
    if isinstance(key, str):
        found = place_of_hook(key)
        if found is None:
            raise ValueError(
                f"{owner}: key {key!r} is no place; expected a layer number, (site, layer), or a name such as "
                f"{', '.join(f'blocks.8.{hook}' for hook in HOOKS)}"
            )
        return found
    site, layer = key if isinstance(key, tuple) and len(key) == 2 else ("resid_post", key)
    try:
        number = whole_number(owner, "layer", layer)
    except TypeError:
        raise TypeError(f"{owner}: key {key!r}; expected a layer number or (site, layer)") from None
    return Place(one_of(owner, "site", site, SITES), number)


def place_of_hook(name: str) -> Place | None:
    """The place of a TransformerLens name such as blocks.5.hook_resid_pre; None if no site of ours is that place."""
    found = re.fullmatch(r"blocks\.([0-9]+)\.(.+)", name)
    site = None if found is None else HOOKS.get(found[2])
    return None if found is None or site is None else Place(site, int(found[1]))


def _counted_from_outputs(place: Place) -> Place:
    return Place("resid_post", place.layer - 1) if place.site == "resid_pre" and place.layer > 0 else place
