"""From chains of interventions to the columns of a row table, and to the slots that each column takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerfast.place import Place

from .base import Intervention


@dataclass(frozen=True, eq=False)
class Column:
    """A column of a row table: one intervention at most in each place, and all of them of one kind.

    Attributes:
        gate: What their conditions have in common; None: they have none.
        edits: Place -> intervention.
    """

    gate: Any
    edits: dict[Place, Intervention]

    @property
    def tokens(self) -> int:
        """T, where each of the prompt's first T tokens has a slot of its own; 0: one slot for all tokens."""
        return max(len(edit.by_token) for edit in self.edits.values())

    @property
    def slots(self) -> int:
        """How many slots it takes, neighbours in every bank."""
        return max(self.tokens, 1)


def columns_of(
    chains: Mapping[Place, Sequence[Intervention]],
    gate_of: Callable[[Place, Intervention], Any] = lambda place, edit: None,
) -> list[Column]:
    """The columns that chains need, shared by all places as far as the order in each of them allows.

    Args:
        chains: Place -> interventions in order.
        gate_of: What must be equal for two interventions to share a column.
    """
    columns: list[Column] = []
    for place, chain in chains.items():
        free = 0
        for edit in chain:
            gate, by_token = gate_of(place, edit), bool(edit.by_token)
            fits = (
                i for i in range(free, len(columns)) if (columns[i].gate, columns[i].tokens > 0) == (gate, by_token)
            )
            index = next(fits, len(columns))
            if index == len(columns):
                columns.append(Column(gate, {}))
            columns[index].edits[place] = edit
            free = index + 1
    return columns


def numbered(columns: Sequence[Column]) -> dict[Place, dict[int, Intervention]]:
    """Place -> number -> intervention, the slots of all columns side by side and counted from 0."""
    found: dict[Place, dict[int, Intervention]] = {}
    first = 0
    for column in columns:
        for place, edit in column.edits.items():
            rows = enumerate(edit.by_token or (edit,), first)
            found.setdefault(place, {}).update({number: row for number, row in rows if row is not None})
        first += column.slots
    return found
