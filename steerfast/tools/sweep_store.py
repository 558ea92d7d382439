"""The cells of a sweep, and the files that keep them: sweep.json, or sweep.2of4.json for part 2 of 4."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from steerfast._checks import warn_user
from steerfast._null import Null
from steerfast.files.replace import no_folder, replace_file

SCHEMA = 3
"""Files of schema 1 hold no nulls and no factors; before schema 3 none says of which weights, in which dtype, its cells are."""
KIND = "steerfast.sweep"
_SAID = {"probe": "questions (prompts, wanted, unwanted, neutral)"}  # keys that mean nothing to who reads a message


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        method, layer, strength: Which cell; the strength in the grid's unit.
        norm: ‖c·v‖, the length of what was added: the strength of a normalised vector; of what is no addition the median change
            of the negative rows that it moves, 0 if it moves none.
        effect: Mean log-odds of wanted against unwanted continuations, in nats.
        perplexity: Of the neutral texts.
        factor: What the edit as it was fitted is multiplied by, `steer`'s strength; of a flow its angle or length. NaN in
            files of schema 1.
    """

    method: str
    layer: int
    strength: float
    norm: float
    effect: float
    perplexity: float
    factor: float = math.nan


class Store:
    """The cells that are done, in memory and, if there is a folder, in its sweep.json, or in a file of a part.

    What any file of the folder holds counts as done, so that a whole sweep is merged from its parts.

    Raises:
        ValueError: a file is of another sweep, or damaged, or the folder is none.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], part: tuple[int, int] = (1, 1)) -> None:
        name = "sweep.json" if part == (1, 1) else f"sweep.{part[0]}of{part[1]}.json"
        self.path = None if folder is None else folder / name
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.key = _key(self.settings)
        self.cells: dict[tuple[str, int, float], Cell] = {}
        self.baseline: Cell | None = None
        self.null: tuple[Cell, Null] | None = None
        if folder is not None:
            if (refused := no_folder(folder)) is not None:
                raise ValueError(f"sweep: out: {refused}")
            for file in (*sorted(folder.glob("sweep.*of*.json")), folder / "sweep.json"):
                if file.exists():
                    self._read(file)

    def add(self, cell: Cell) -> None:
        """Keep a cell, on disk as well before this returns."""
        if cell.method == "none":
            self.baseline = cell
        else:
            self.cells[cell.method, cell.layer, cell.strength] = cell
        self.save()

    def keep_null(self, cell: Cell, null: Null) -> None:
        """Keep the null of a cell."""
        self.null = cell, null
        self.save()

    def save(self) -> None:
        """Write all that is known, whole or not at all."""
        if self.path is None:
            return
        baseline = None if self.baseline is None else _numbers(self.baseline)
        cells = [_numbers(one) for one in self.cells.values()]
        text = {"schema": SCHEMA, "kind": KIND, "key": self.key, "question": self.settings}
        null = None if self.null is None else {"cell": _numbers(self.null[0]), "null": self.null[1].numbers()}
        body = json.dumps({**text, "baseline": baseline, "cells": cells, "null": null}, indent=1)
        replace_file(self.path, body.encode())

    def _read(self, path: Path) -> None:
        try:
            text = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"sweep: {path} is not JSON ({error}); choose another directory") from None
        if not isinstance(text, dict) or text.get("kind") != KIND or text.get("schema") not in range(1, SCHEMA + 1):
            raise ValueError(f"sweep: {path} is no sweep of schema 1 to {SCHEMA}; choose another directory")
        asked = {n: v for n, v in self.settings.items() if text["schema"] == SCHEMA or n not in ("weights", "dtype")}
        if text.get("key") != _key(asked):
            old = text.get("question")
            differs = [
                _SAID.get(name, name)
                for name, value in asked.items()
                if not isinstance(old, dict) or old.get(name) != value
            ]
            raise ValueError(
                f"sweep: {path} was measured with other {', '.join(differs) or 'texts'}; choose another directory"
            )
        if asked != self.settings:
            warn_user(
                f"sweep: {path}, of an older version, does not say its model's weights and dtype; they count as these"
            )
        try:
            self.baseline = self.baseline if text["baseline"] is None else _cell(text["baseline"])
            self.cells |= {(cell.method, cell.layer, cell.strength): cell for cell in map(_cell, text["cells"])}
            if (null := text.get("null")) is not None:
                self.null = _cell(null["cell"]), Null.restore(null["null"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"sweep: {path} is damaged ({error!r}); delete it, or choose another directory") from None


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _numbers(cell: Cell) -> dict[str, Any]:
    """A cell for JSON, which has no Inf and NaN: what has no number is null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(cell).items()}


def _cell(entry: dict[str, Any]) -> Cell:
    numbers = {
        name: math.nan if entry[name] is None else float(entry[name])
        for name in ("strength", "norm", "effect", "perplexity")
    }
    factor = entry.get("factor")
    return Cell(
        str(entry["method"]), int(entry["layer"]), **numbers, factor=math.nan if factor is None else float(factor)
    )
