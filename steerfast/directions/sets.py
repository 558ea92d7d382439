"""Sets of directions as files, plans from them, and the relative dose that a plan gives.

A set on disk is a folder of two files: `directions.json` says what each direction is, `directions.safetensors` holds
the numbers, as `steerfast.files.container` writes them.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from steerfast._checks import warn_user
from steerfast.edits.base import Intervention
from steerfast.edits.linear import Add
from steerfast.files import container
from steerfast.models.layers import find_layers
from steerfast.place import SITES, Origin, Place, place_of
from steerfast.plan import ModelCard, Plan, Positions, card

from .direction import Direction

_NAME = re.compile(r"\w[\w .+\-]{0,127}")
_PathLike = str | os.PathLike[str]


class DirectionSet(Mapping[str, Direction]):
    """Directions by name, immutable; what `load_directions` returns.

    Args:
        directions: a dict of name -> direction; a dict of layer -> direction, as `steerfast.extract` returns for
            several layers; a list of directions; or one. Without a name a direction is called after its site and
            layer. Names have 1 to 128 letters, digits, `_`, `-`, `+`, `.` and spaces, and begin with a letter or digit.
        model: the model that they were made with, or its `ModelCard`; a plan from the set then refuses another width
            or layer count.

    Raises:
        TypeError, ValueError: not directions, none, a bad or repeated name, a width that the model does not have.

    Example:
        >>> import torch
        >>> v = Direction(torch.tensor([3.0, 4.0]), "pca", 5.0, Origin(place=8))
        >>> DirectionSet({"love - hate": v}).plan(strength=2.0)
        Plan(resid_post 8: Add; positions='all')
    """

    def __init__(self, directions: Any, model: nn.Module | ModelCard | None = None) -> None:
        self._directions = _named_directions(directions)
        self._model = model if model is None or isinstance(model, ModelCard) else card(model)
        for name, direction in self._directions.items():
            head = direction.origin.place is not None and direction.origin.place.site == "head_out"
            if self._model is not None and not head and len(direction.vector) != self._model.width:
                raise ValueError(
                    f"DirectionSet: {name!r} has width {len(direction.vector)}; "
                    f"{self._model.name} has {self._model.width}"
                )

    @property
    def model(self) -> ModelCard | None:
        """The model that the directions were made with, if width and layer count are known."""
        return self._model

    def __getitem__(self, name: str) -> Direction:
        return self._directions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._directions)

    def __len__(self) -> int:
        return len(self._directions)

    def plan(
        self,
        strength: float | Mapping[str, float] = 1.0,
        positions: Positions = "all",
        keep_norm: bool = False,
        model: nn.Module | None = None,
        special: Any = None,
    ) -> Plan:
        """Return the plan that adds every direction at its own layer and site: x + c·v.

        Args:
            strength: c, one number for all, or by name; a name that is left out is left out of the plan.
            positions: as in `Plan`.
            keep_norm: give every row its old length back afterwards.
            model: the model to be steered. Another width or layer count is refused, another class is warned about.
            special: as in `Plan`.

        Returns:
            The plan; directions of one layer and site are applied in the order of the set.

        Raises:
            ValueError: a direction that does not know its layer, an unknown name, a model that does not fit.

        Reference:
            Turner et al. 2023, Activation Addition (arXiv:2308.10248).

        Example:
            >>> import torch
            >>> v = Direction(torch.tensor([3.0, 4.0]), "pca", 5.0)
            >>> DirectionSet({4: v, 5: v}).plan({"resid_post.5": 3.0})
            Plan(resid_post 5: Add; positions='all')
        """
        wanted = strength if isinstance(strength, Mapping) else dict.fromkeys(self, strength)
        if unknown := [name for name in wanted if name not in self]:
            raise ValueError(f"plan: strength names {unknown[0]!r}; the set has {_short_list(self)}")
        edits: dict[Place, list[Intervention]] = {}
        for name, direction in self.items():
            if name not in wanted:
                continue
            if direction.origin.place is None:
                raise ValueError(
                    f"plan: {name!r} does not know its layer; give it one with dataclasses.replace(direction, "
                    f"origin=steerfast.place.Origin(place=8)), or write the Plan yourself"
                )
            edits.setdefault(direction.origin.place, []).append(Add(direction, wanted[name], keep_norm))
        if model is not None:
            self._check_model(model, edits)
        return Plan(edits, positions, self._model if model is None else model, special)

    def save(self, path: _PathLike) -> Path:
        """Write the set; the same as `save_directions(path, self)`."""
        return save_directions(path, self)

    @classmethod
    def load(cls, path: _PathLike) -> DirectionSet:
        """Read what `save` wrote. Nothing is executed, nothing is loaded in part. `sf.load_directions` reads other files, too.

        Args:
            path: the folder.

        Returns:
            The set; vectors are equal bit for bit to what was saved.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, of another kind or a newer schema, has unknown keys, or does not belong to the other.
        """
        text, tensors = container.read(container.DIRECTIONS, path)
        _check_entries(path, text)
        entries = text["directions"]
        shapes = {name: (entry["width"],) for name, entry in entries.items()}
        container.expect(container.DIRECTIONS, path, tensors, shapes)
        with container.describing(container.DIRECTIONS, path):
            found = {n: Direction(tensors[n], e["method"], e["norm"], _origin(e)) for n, e in entries.items()}
            return cls(found, None if text["model"] is None else ModelCard(**text["model"]))

    def _check_model(self, model: nn.Module, places: Iterable[Any]) -> None:
        layers = find_layers(model, "plan")
        made = self._model
        if made is not None and (made.width, made.layers) != (layers.d, layers.count):
            raise ValueError(
                f"plan: the directions were made with {made.name} (width {made.width}, {made.layers} layers); this "
                f"model ({layers.name}) has width {layers.d} and {layers.count} layers"
            )
        for site, layer in places:
            layers.point(layer, site, "plan")

    def __repr__(self) -> str:
        rows = [
            [name, d.method, *_shown_place(d.origin), str(len(d.vector)), f"{d.norm:.4g}", d.origin.model or ""]
            for name, d in list(self.items())[:_SHOWN_ROWS]
        ]
        head = ["name", "method", "layer", "site", "d", "norm", "model"]
        return text_table(f"DirectionSet of {len(self)}", head, rows, len(self))


def save_directions(path: _PathLike, directions: Any, model: nn.Module | ModelCard | None = None) -> Path:
    """Write directions into a folder, as directions.json and directions.safetensors.

    Args:
        path: the folder; it is made if needed, and a set that is there is replaced.
        directions: a `DirectionSet`, or what its constructor takes: a dict by name or by layer, a list, or one.
        model: the model that they were made with, so that a plan from the file refuses one of another size.

    Returns:
        The folder.

    Raises:
        TypeError, ValueError: not directions, none, a bad or repeated name, a width that the model does not have.

    Example:
        >>> import tempfile, torch
        >>> v = Direction(torch.tensor([3.0, 4.0]), "pca", 5.0, Origin(place=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     float(DirectionSet.load(save_directions(folder, {"love": v}))["love"].vector[1])
        4.0
    """
    known = directions.model if model is None and isinstance(directions, DirectionSet) else model
    checked = DirectionSet(directions, known)
    text = {
        "model": None if checked.model is None else vars(checked.model),
        "directions": {name: _entry(d) for name, d in checked.items()},
    }
    vectors = {name: direction.vector for name, direction in checked.items()}
    return container.write(container.DIRECTIONS, path, text, vectors)


class DirectionInfo(NamedTuple):
    """What a file says of one direction, without its numbers.

    Attributes:
        path: the folder of its set, for `load_directions`.
        name: its name in the set.
        width: d.
        method, norm, origin: as in `Direction`.
    """

    path: str
    name: str
    width: int
    method: str
    norm: float
    origin: Origin


class Listing(list[DirectionInfo]):
    """The directions below a folder: a list of `DirectionInfo` that shows itself as a table.

    Attributes:
        damaged: sets that cannot be read, folder -> reason.
    """

    damaged: dict[str, str]

    def __init__(self, entries: Iterable[DirectionInfo] = (), damaged: Mapping[str, str] | None = None) -> None:
        super().__init__(entries)
        self.damaged = dict(damaged or {})

    def __repr__(self) -> str:
        rows = [
            [
                e.path,
                e.name,
                e.method,
                *_shown_place(e.origin),
                str(e.width),
                f"{e.norm:.4g}",
                e.origin.model or "",
            ]
            for e in self[:_SHOWN_ROWS]
        ]
        head = ["path", "name", "method", "layer", "site", "d", "norm", "model"]
        table = text_table(f"{len(self)} directions", head, rows, len(self))
        return "\n".join([table, *(f"damaged: {reason}" for reason in self.damaged.values())])


def list_directions(directory: _PathLike) -> Listing:
    """Return what the sets in a folder, or in its direct subfolders, hold. Only JSON is read.

    10 000 sets take less than a second.

    Args:
        directory: a set, or a folder of sets.

    Returns:
        One `DirectionInfo` per direction, sorted by folder; `.damaged` names the sets that cannot be read.

    Raises:
        FileNotFoundError: there is no such folder.

    Example:
        >>> import tempfile, torch
        >>> v = Direction(torch.tensor([3.0, 4.0]), "pca", 5.0, Origin(place=8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_directions(f"{folder}/love", v)
        ...     [(info.name, info.origin.place.layer, info.width) for info in list_directions(folder)]
        [('resid_post.8', 8, 2)]
    """
    root = Path(directory)
    if not root.is_dir():
        raise FileNotFoundError(f"list_directions: {root} is not a folder")
    folders = [os.fspath(root), *sorted(entry.path for entry in os.scandir(root) if entry.is_dir())]
    found: list[DirectionInfo] = []
    damaged: dict[str, str] = {}
    for folder in folders:
        if not os.path.isfile(f"{folder}/{container.DIRECTIONS.text_name}"):
            continue
        try:
            text = container.read_text(container.DIRECTIONS, folder)
            _check_entries(folder, text)
            os.stat(f"{folder}/{container.DIRECTIONS.tensors_name}")
            found += [
                DirectionInfo(folder, name, entry["width"], entry["method"], entry["norm"], _origin(entry))
                for name, entry in text["directions"].items()
            ]
        except FileNotFoundError as error:
            damaged[folder] = f"{error.filename} is missing"
        except (OSError, ValueError) as error:
            damaged[folder] = str(error)
    if damaged:
        reason = next(iter(damaged.values()))
        warnings.warn(f"list_directions: {len(damaged)} damaged: {reason}", RuntimeWarning, stacklevel=2)
    return Listing(found, damaged)


def _named_directions(directions: Any) -> dict[str, Direction]:
    if isinstance(directions, Direction):
        directions = [directions]
    if isinstance(directions, Mapping):
        pairs = [(key, value) for key, value in directions.items()]
    elif isinstance(directions, Iterable) and not isinstance(directions, (str, bytes, Tensor)):
        pairs = [(None, value) for value in directions]
    else:
        raise TypeError(
            f"DirectionSet: expected directions by name or layer, a list, or one; got {type(directions).__name__}"
        )
    if not pairs:
        raise ValueError("DirectionSet: there are no directions; give at least one")
    named: dict[str, Direction] = {}
    for key, direction in pairs:
        if not isinstance(direction, Direction):
            raise TypeError(
                f"DirectionSet: {key!r} is a {type(direction).__name__}; expected a Direction, such as "
                "Direction(tensor, 'where it comes from', norm)"
            )
        name, direction = _name(key, direction)
        if name in named:
            raise ValueError(f"DirectionSet: two directions are called {name!r}; give a dict with a name for each")
        named[name] = direction
    return named


def _name(key: Any, direction: Direction) -> tuple[str, Direction]:
    """The name of a direction in its set; a key that is a layer tells the direction its layer."""
    if type(key) is int:
        known = direction.origin.place
        if known is not None and known.layer != key:
            raise ValueError(f"DirectionSet: {direction!r} is given for layer {key}")
        direction = replace(direction, origin=replace(direction.origin, place=known or place_of("DirectionSet", key)))
    place = direction.origin.place
    if key is None and place is None:
        raise ValueError(f"DirectionSet: {direction!r} has neither name nor layer; give a dict of name -> direction")
    name = f"{place.site}.{place.layer}" if place is not None and (key is None or type(key) is int) else key
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"DirectionSet: {name!r} cannot be a name; use 1 to 128 letters, digits, '_', '-', '+', '.' and spaces, "
            f"beginning with a letter or digit"
        )
    return name, direction


def _check_entries(folder: _PathLike, text: dict[str, Any]) -> None:
    """Refuse the JSON of a set whose entries are not of their types."""
    path = f"load_directions: {os.path.join(folder, container.DIRECTIONS.text_name)}"
    if not isinstance(text["directions"], dict) or not text["directions"]:
        raise ValueError(f'{path}: "directions" must be an object with at least one direction')
    for name, entry in text["directions"].items():
        if not isinstance(entry, dict) or entry.keys() != _ENTRY_TYPES.keys():
            raise ValueError(f"{path}: direction {name!r} must have exactly the keys {', '.join(_ENTRY_TYPES)}")
        for key, allowed in _ENTRY_TYPES.items():
            if type(entry[key]) not in allowed:
                raise ValueError(f"{path}: {key} of direction {name!r} is {entry[key]!r}")
        if entry["site"] not in (None, *SITES):
            raise ValueError(f"{path}: site of direction {name!r} is {entry['site']!r}; expected one of {SITES}")


_NONE = type(None)
_ENTRY_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "norm": (float, int),
    "activation_norm": (float, int, _NONE),
    "layer": (int, _NONE),
    "site": (str, _NONE),
    "position": (str, int, _NONE),
    "model": (str, _NONE),
    "width": (int,),
}


def _entry(direction: Direction) -> dict[str, Any]:
    """The JSON of a direction."""
    origin = direction.origin
    return {
        "method": direction.method,
        "norm": direction.norm,
        "activation_norm": origin.typical_norm,
        "layer": None if origin.place is None else origin.place.layer,
        "site": None if origin.place is None else origin.place.site,
        "position": origin.position,
        "model": origin.model,
        "width": len(direction.vector),
    }


def _origin(entry: Mapping[str, Any]) -> Origin:
    if entry["layer"] is None and entry["site"] is not None:
        warn_user(f"a direction of {entry['site']} without a layer is read without a place; give it one")
    place = None if entry["layer"] is None else Place(entry["site"] or "resid_post", entry["layer"])
    return Origin(entry["model"], place, entry["position"], entry["activation_norm"])


def _shown_place(origin: Origin) -> tuple[str, str]:
    """Layer and site as two cells of a table."""
    return ("", "") if origin.place is None else (str(origin.place.layer), origin.place.site)


_SHOWN_ROWS = 20


def text_table(title: str, head: list[str], rows: list[list[str]], total: int) -> str:
    """Text in aligned columns, cut after some rows."""
    if not rows:
        return title
    shown = [head, *([cell if len(cell) <= 60 else f"{cell[:58]} …" for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in shown) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in shown]
    more = [f"… and {total - len(rows)} more"] if total > len(rows) else []
    return "\n".join([title, *(f"  {line}" for line in lines), *more])


def shown_number(value: Any) -> str:
    """A number as a cell of a table; empty if there is none."""
    return "" if value is None else str(value)


def _short_list(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
