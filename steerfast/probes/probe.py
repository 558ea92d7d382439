"""What every probe is: it reads rows of the stream and returns numbers for each; it changes nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from steerfast._checks import check_stream, flag, set_field, warn_user
from steerfast.files import container
from steerfast.files.shelf import Shelf, with_saes
from steerfast.place import NOWHERE, Origin, Place, common_origin, place_of

Scores = Any
"""float32 (...) or (..., m); of a `TopKProbe` a pair, (values float32 (..., k), indices int32 (..., k))."""
Reader = Callable[[Tensor], Scores]
"""x (..., d) on one device -> the scores of its rows."""
COMMON = ("place", "after", "origin")


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """Base of all probes: numbers that are read off each row of the stream.

    Attributes:
        place: Where it is read: a layer, (site, layer) or a name of TransformerLens, kept as a `Place`. Default: the place
            that what it was given comes from, if that is known; None: nowhere yet.
        after: See the stream after the edits of its place; False: before them.
        origin: Where the direction, the barrier or the SAE comes from that it was given, as far as that is known.

    Raises:
        TypeError, ValueError: the place is none, or what is given comes from different models or places.
    """

    place: Any = field(default=None, kw_only=True)
    after: bool = field(default=False, kw_only=True)
    origin: Origin = field(default=NOWHERE, kw_only=True)

    registry: ClassVar[dict[str, type[Probe]]] = {}
    pairs: ClassVar[bool] = False
    """Whether it returns a pair, values and indices, instead of numbers with names."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Probe.registry[cls.__name__] = cls

    def __post_init__(self) -> None:
        owner = type(self).__name__
        flag(owner, "after", self.after)
        given = [getattr(self, f.name) for f in fields(self) if f.name not in COMMON]
        found = [one for item in given if isinstance(one := _origin_of(item), Origin)]
        if found:
            set_field(self, "origin", common_origin(owner, found))
        if not isinstance(self.origin, Origin):
            raise TypeError(f"{owner}: origin is {self.origin!r}; expected a steerfast.place.Origin")
        home = self.origin.place
        set_field(self, "place", home if self.place is None else place_of(owner, self.place))
        if home is not None and min(self.place.layer, home.layer) >= 0 and not home.same_stream(self.place):
            warn_user(f"{owner}: what it is given belongs to {home} and is to be read at {self.place}")

    @property
    def width(self) -> int:
        """d, the width of the stream that it reads."""
        raise TypeError(f"{type(self).__name__} does not say what it reads")

    @property
    def names(self) -> tuple[str, ...] | None:
        """What its m numbers per row are called; None: it gives one number per row. () of one that gives pairs."""
        return None

    @property
    def bounds(self) -> tuple[float, float]:
        """Between which numbers its scores lie."""
        return float("-inf"), float("inf")

    @property
    def single(self) -> bool:
        """Whether it gives one number per row, which can be compared with a threshold."""
        return self.names is None and not self.pairs

    def at(self, place: Any, after: bool | None = None) -> Probe:
        """The same probe, read at another place; None: nowhere yet. `after`: None leaves it as it is.

        Raises:
            TypeError, ValueError: what `place_of` refuses.

        Example:
            >>> import torch, steerfast as sf
            >>> sf.probes.LinearProbe(torch.ones(2)).at(("attn_out", 3)).place
            Place(site='attn_out', layer=3)
        """
        owner = f"{type(self).__name__}.at"
        moved = copy(self)
        set_field(moved, "place", None if place is None else place_of(owner, place))
        if after is not None:
            set_field(moved, "after", flag(owner, "after", after))
        return moved

    def __call__(self, x: Tensor) -> Scores:
        """The scores of rows.

        Args:
            x: Rows of the stream, (..., d), of any floating dtype.

        Returns:
            float32 (...), or (..., m) with `names`; of a `TopKProbe` a pair. A row with a NaN has NaN.

        Raises:
            TypeError, ValueError: x is no floating tensor of this width.
        """
        owner = type(self).__name__
        check_stream(owner, x)
        if x.shape[-1] != self.width:
            raise ValueError(f"{owner}: x has width {x.shape[-1]} and the probe {self.width}")
        return self.program(x.device)(x)

    def program(self, device: torch.device) -> Reader:
        """What `__call__` does, as a function of rows on one device: its tensors are moved there once, nothing is checked.

        It waits for nothing on the device, and `torch.compile` traces it.
        """
        raise TypeError(f"{type(self).__name__} does not say what it reads")

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        return {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}

    def numbers(self) -> dict[str, Any]:
        """The fields that are not tensors, by name, ready for JSON, but for place, after and origin."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in COMMON}
        return {name: value for name, value in found.items() if not isinstance(value, Tensor)}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Probe:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        arguments: dict[str, Any] = {**tensors, **numbers}
        return cls(**arguments)

    def described(self) -> dict[str, Any]:
        """All of it but its tensors, ready for JSON."""
        place = None if self.place is None else list(self.place)
        rest = {"place": place, "after": self.after, "origin": self.origin.numbers()}
        return {"type": type(self).__name__, "numbers": self.numbers(), **rest}

    @staticmethod
    def from_description(owner: str, text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Probe:
        """The inverse of `described` and `tensors`, with SAEs in place of their names.

        Raises:
            TypeError, ValueError, KeyError: they do not describe a probe.
        """
        made = probe_type(owner, text["type"]).restore(tensors, text["numbers"])
        set_field(made, "origin", Origin.restore(text["origin"]))
        place = text["place"]
        return made.at(None if place is None else Place(*place), text["after"])

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write probe.json and probe.safetensors into a directory: both, or neither.

        What reads a whole encoder (a Top-K SAE) is written as the SAE's fingerprint, without weights: `load` finds the SAE.

        Returns:
            The directory.
        """
        tensors = self.tensors()
        return container.write(container.PROBE, directory, {**self.described(), "tensors": sorted(tensors)}, tensors)

    @classmethod
    def load(cls, directory: str | os.PathLike[str], saes: Any = None) -> Probe:
        """Read what `save` wrote, whatever its kind. Nothing is executed, nothing is loaded in part.

        Args:
            directory: The directory.
            saes: Where the SAE is that it may name, as for `Plan.load`.

        Raises:
            FileNotFoundError: one of the two files is missing, or an SAE that it names is in none of these places.
            ValueError: a file is damaged, of another kind or a newer schema, or holds an unknown kind of probe.
        """
        shelf = saes if isinstance(saes, Shelf) else Shelf("Probe.load", saes)
        text, tensors = container.read(container.PROBE, directory)
        source = os.path.join(directory, container.PROBE.text_name)
        with container.describing(container.PROBE, directory):
            names = dict.fromkeys(map(str, text["tensors"]))
            probe_type("Probe.load", text["type"])
        container.expect(container.PROBE, directory, tensors, names)
        with container.describing(container.PROBE, directory):
            found = {**text, "numbers": with_saes(text["numbers"], shelf, source)}
            return Probe.from_description("Probe.load", found, tensors)

    def __repr__(self) -> str:
        where = "nowhere yet" if self.place is None else f"{'after' if self.after else 'at'} {self.place}"
        return f"{type(self).__name__}({self._words()}, {where})"

    def _words(self) -> str:
        """What it reads, in short."""
        return f"d {self.width}"


def probe_type(owner: str, name: str) -> type[Probe]:
    """The class of a probe by its name: one of ours, imported where it lives, or a subclass defined elsewhere.

    Raises:
        ValueError: there is none of this name.
    """
    kinds = import_module("steerfast.probes")
    if name not in Probe.registry and name in kinds.__all__:
        getattr(kinds, name)
    if name not in Probe.registry:
        raise ValueError(f"{owner}: unknown probe {name!r}; known are {', '.join(sorted(Probe.registry))}")
    return Probe.registry[name]


def _origin_of(item: Any) -> Any:
    """Where something reads, if that is another place than it writes, as with a transcoder; else where it comes from."""
    return getattr(item, "reads", getattr(item, "origin", None))
