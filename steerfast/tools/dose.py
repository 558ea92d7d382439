"""Doses: how large an edit is beside the stream that it edits, ‖c·v‖/‖x‖ per layer, on texts."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number
from steerfast.directions.sets import DirectionSet, text_table
from steerfast.edits.base import Intervention
from steerfast.edits.conditions import When
from steerfast.hooks.columns import check_plan, places_of
from steerfast.hooks.steer import steer
from steerfast.models.collect import collect
from steerfast.models.layers import find_layers
from steerfast.models.texts import TextReader
from steerfast.place import SITES, median_of
from steerfast.plan import Plan, as_plan

LARGE_DOSE = 0.5
"""Above this relative dose `dose` warns. Adding ‖c·v‖ = r·‖x‖ at right angles to x shrinks all that the next norm shows
the model of x by 1/√(1 + r²): by 4 % at r = 0.3, 11 % at 0.5, 29 % at 1. Ordinary prose under SmolLM2-135M-Instruct
(3.0 nats a token), steered at one layer of 4, 8, 14, 20 and 26 along love − hate or a random direction, costs 0.0 to
0.4 nats a token more at r = 0.3, 0.1 to 1.2 at 0.5, 0.4 to 4.8 at 1 and 1.1 to 8.5 at 1.5: no text any more."""


@dataclass(frozen=True)
class LayerDose:
    """What a plan does to the stream at one place, as medians over the tokens of the texts.

    Attributes:
        site, layer: the place.
        edits: names of its interventions, in order.
        stream: ‖x‖ of the unsteered stream.
        change: ‖δ(x)‖ of all edits here together.
        dose: ‖δ(x)‖ / ‖x‖.
        accumulated: ‖x' − x‖ / ‖x‖ when the whole plan acts: edits of earlier layers, and what became of them,
            included.
    """

    site: str
    layer: int
    edits: tuple[str, ...]
    stream: float
    change: float
    dose: float
    accumulated: float


class DoseTable(Sequence[LayerDose]):
    """The relative dose of a plan, one row per place; shows itself as a table.

    Attributes:
        texts, tokens: how many were measured.
        limit: the dose above which a row is marked.
    """

    def __init__(self, rows: Iterable[LayerDose], texts: int, tokens: int, limit: float) -> None:
        self._rows = tuple(rows)
        self.texts, self.tokens, self.limit = texts, tokens, limit

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def largest(self) -> LayerDose:
        """The row whose dose, own or accumulated, is largest."""
        return max(self._rows, key=_worst)

    def __repr__(self) -> str:
        rows = [
            [
                row.site,
                str(row.layer),
                ", ".join(row.edits),
                *(f"{value:.4g}" for value in (row.stream, row.change)),
                f"{row.dose:.3f}",
                f"{row.accumulated:.3f}",
                "large" if _worst(row) > self.limit else "",
            ]
            for row in self._rows
        ]
        head = ["site", "layer", "edits", "‖x‖", "‖δ‖", "dose", "accumulated", ""]
        title = f"Relative dose, medians over {self.tokens} tokens of {self.texts} texts; large: above {self.limit:g}"
        return text_table(title, head, rows, len(rows))


def dose(
    model: nn.Module,
    tokenizer: Any,
    plan: Plan | DirectionSet | Mapping[Any, Any],
    texts: Iterable[Any],
    *,
    limit: float = LARGE_DOSE,
    batch_size: int = 8,
    progress: bool = False,
) -> DoseTable:
    """Return the relative dose of a plan per layer, measured on real activations.

        dose = median over tokens of ‖δ(x)‖ / ‖x‖,   for `Add` ‖c·v‖ / ‖x‖

    The dose decides whether text stays coherent, and a strength c alone says nothing about it: ‖x‖ differs a
    hundredfold between models and layers. Every token counts, whatever the plan's positions; where nothing but rows for
    a prompt's first tokens is added, every token that a row is for. The median is not moved by the enormous norm of a
    first token. Many small edits add up: `accumulated` runs the whole plan.

    Args:
        model: a `transformers` causal language model, not steered.
        tokenizer: its tokenizer.
        plan: a `Plan`, a dict that describes one, or a `DirectionSet` (at strength 1).
        texts: strings or chats of the kind that will be steered, as in `collect`; a dozen are enough.
        limit: warn above this dose, 0 or more; 0.5, from where on ordinary text becomes clearly less likely.
        batch_size: texts per forward.
        progress: show progress bars on stderr.

    Returns:
        A table with one row per site and layer of the plan, in the order of the layers.

    Raises:
        TypeError, ValueError: the plan does not fit the model, there are no texts, or the limit is negative.

    Warns:
        UserWarning: a dose, own or accumulated, lies above `limit`.

    Reference:
        Turner et al. 2023, Activation Addition (arXiv:2308.10248), report coefficients relative to the stream's norm.

    Example:
        >>> sf.dose(model, tokenizer, {8: sf.Add(v, 4.0)}, ["I went to the market."])  # doctest: +SKIP
    """
    limit = finite_number("dose", "limit", limit)
    if limit < 0:
        raise ValueError(f"dose: limit is {limit:g}; expected a relative dose, 0 or more")
    tokenizer = TextReader.of(tokenizer, "dose")  # one reader, so that `collect` does not warn at every place
    plan = plan.plan() if isinstance(plan, DirectionSet) else as_plan("dose", plan)
    layers = find_layers(model, "dose")
    check_plan(plan, layers, None, "dose")
    edits = places_of(plan, layers, "dose")
    if isinstance(texts, Iterable) and not isinstance(texts, (str, Mapping)):
        texts = list(texts)  # they are read twice
    everywhere = Plan(edits, "all", plan.model)
    before, at = _streams(model, tokenizer, edits, texts, batch_size, progress)
    with steer(model, everywhere):
        after, _ = _streams(model, tokenizer, edits, texts, batch_size, progress)
    rows = [
        _layer_dose(place, edits[place], before[place], after[place], at)
        for place in sorted(edits, key=lambda place: (place[1], SITES.index(place[0])))
    ]
    table = DoseTable(rows, len(texts), max(len(x) for x in before.values()), limit)
    if _worst(table.largest) > limit:
        row = table.largest
        warnings.warn(
            f"dose: {row.site} {row.layer} is changed by {_worst(row):.2f} of the stream's norm (limit {limit:g}); "
            f"text may fall apart: multiply the strengths by {limit / _worst(row):.2g}, or steer fewer layers",
            UserWarning,
            stacklevel=2,
        )
    return table


def _streams(
    model: nn.Module, tokenizer: Any, edits: Iterable[tuple[str, int]], texts: Any, batch_size: int, progress: bool
) -> tuple[dict[tuple[str, int], Tensor], Tensor]:
    """The stream at every token of the texts, by place, and where in its text each token stands."""
    places = list(edits)
    streams: dict[tuple[str, int], Tensor] = {}
    for site in dict.fromkeys(site for site, _ in places):
        wanted = [layer for other, layer in places if other == site]
        acts = collect(model, tokenizer, texts, wanted, "all", site, batch_size=batch_size, progress=progress)
        streams.update({(site, layer): rows for layer, rows in acts.items()})
        text, counts = acts.text_index, acts.text_index.bincount()
    return streams, torch.arange(len(text), device="cpu") - (counts.cumsum(0) - counts)[text]


def _layer_dose(
    place: tuple[str, int], chain: tuple[Intervention, ...], x: Tensor, steered: Tensor, at: Tensor
) -> LayerDose:
    edited, acted = x, torch.zeros_like(at, dtype=torch.bool)
    for edit in chain:
        rows: Iterable[tuple[Tensor, Intervention | None]] = [(at == i, row) for i, row in enumerate(edit.by_token)]
        for where, row in rows if edit.by_token else [(at >= 0, edit)]:
            if row is not None:
                edited = torch.where(where[:, None], _applied(row, edited), edited)
                acted |= where
    if not acted.any():
        raise ValueError(
            f"dose: no text is long enough for a row of {chain[0]!r} at {place[0]} {place[1]}; give longer texts"
        )
    x, edited, steered = x[acted], edited[acted], steered[acted]
    norms = x.norm(dim=1)
    kept = norms > 0
    change = (edited - x).norm(dim=1)
    total = (steered - x).norm(dim=1)
    return LayerDose(
        *place,
        tuple(type(edit).__name__ for edit in chain),
        median_of(norms),
        median_of(change),
        median_of(change[kept] / norms[kept]),
        median_of(total[kept] / norms[kept]),
    )


def _applied(edit: Intervention, x: Tensor) -> Tensor:
    """What an intervention makes of the rows; a condition counts as met."""
    return (edit.then if isinstance(edit, When) else edit).apply(x)


def _worst(row: LayerDose) -> float:
    return max(row.dose, row.accumulated)
