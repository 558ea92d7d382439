"""Which layer, how strong, by which method: effect against damage over a grid, so that a user can choose.

Every cell of layers × strengths × methods is measured by the model itself, steered at all tokens:

    effect      mean over prompts of log Σ p(wanted | prompt) - log Σ p(unwanted | prompt)
    perplexity  exp(mean negative log-likelihood per token) of neutral texts

Activations are collected once for all layers. Cells run in batches that mix them, one plan per batch row. Each finished
cell is on disk before the next begins, under a temporary name first, so an interrupted run continues. The best cell stands
beside its null: the same method, layer and strength fitted on shuffled labels, and random directions of the same length.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steerfast._checks import (
    checked_part,
    finite_number,
    instance_of,
    one_of,
    positive_integer,
    whole_number,
    whole_numbers,
)
from steerfast._null import DRAWS, Null
from steerfast.barriers.data import seeded
from steerfast.directions.fit import ESTIMATORS, settings_of
from steerfast.directions.trained import TRAINED
from steerfast.files.replace import replace_file
from steerfast.models.collect import Activations, collect
from steerfast.models.layers import evaluating, find_layers
from steerfast.models.texts import TextReader
from steerfast.place import SITES
from steerfast.plan import card
from steerfast.sae.model import SAE
from steerfast.sae.place_reader import weights_digest

from .flow_plot import require_matplotlib
from .sweep_edits import METHODS, SEVERAL_LAYERS, UNITS, Trial, control
from .sweep_lessons import Teacher
from .sweep_scores import Dose, Question, Scored, measure, sequences_of, several, texts_of
from .sweep_store import Cell, Store


@dataclass(frozen=True)
class Grid:
    """What is tried.

    Args:
        layers: 0-based, negative from the end; also an array or a tensor of integers, or a slice of all layers.
        strengths: In the given unit; negative ones steer the other way, 0 is the unsteered model.
        methods: Functions of `steerfast.extract` ("mean_difference", "difference", "pca", "logistic"), whose vector is added, and
            methods of `sf.fit` with their default settings; and, trained on the model with the texts as examples, "loreft",
            "vector", "reft_r1", "reps", "lineas" and "velocity": texts are paired row by row, what a pair begins with is the
            prompt.
        unit: "stream": the length of the change as a share of the stream's typical (median) norm at that layer, so that layers
            and methods compare; of a flow the angle. What is no addition is multiplied until it would be that long if it grew in
            proportion, at the median of the negative rows that it moves; where it moves none, by the strength itself. "vector":
            multiples of the edit as it was fitted; of a flow its length.
        site: Where activations are read and the edit stands.
        sae: The SAE of "edit_features", "amplify", "calibrate" and "deficit_push".
        damage: Perplexity in multiples of the unsteered one that the best cell, which is nulled, may have.
        draws: Of each kind for the null of the best cell; 0: none.
        part: (i, n): measure the i-th of n equal parts of the cells, i from 1, and no null.

    Raises:
        TypeError, ValueError: an empty or repeated entry, an unknown word, or a strength that is not finite.
    """

    layers: tuple[int, ...] | slice
    strengths: tuple[float, ...] = (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4, 0.8)
    methods: tuple[str, ...] = ("mean_difference",)
    unit: str = "stream"
    site: str = "resid_post"
    sae: Any = None
    damage: float = 1.1
    draws: int = DRAWS
    part: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", checked_part("Grid", self.part))
        one_of("Grid", "unit", self.unit, UNITS)
        one_of("Grid", "site", self.site, SITES)
        object.__setattr__(self, "damage", finite_number("Grid", "damage", self.damage))
        whole_number("Grid", "draws", self.draws, 0)
        strengths = tuple(finite_number("Grid", "strengths", s) for s in several("Grid", "strengths", self.strengths))
        methods = tuple(one_of("Grid", "methods", m, METHODS) for m in several("Grid", "methods", self.methods))
        layers: Any = self.layers
        if not isinstance(layers, slice):
            layers = tuple(whole_number("Grid", "layers", layer) for layer in several("Grid", "layers", layers))
        for name, values in (("layers", layers), ("strengths", strengths), ("methods", methods)):
            if not isinstance(values, slice) and len(set(values)) != len(values):
                raise ValueError(f"Grid: {name} is {values}; name each once")
            object.__setattr__(self, name, values)
        trained = [one for one in methods if one in TRAINED]
        if trained and self.site != "resid_post":
            raise ValueError(f"Grid: {trained[0]!r} is trained at resid_post, and site is {self.site!r}")
        featured = [one for one in methods if one in ESTIMATORS and "sae" in settings_of(one)]
        if featured and self.sae is None:
            raise TypeError(
                f"Grid: {featured[0]!r} edits features of an SAE; give it as sae=, such as sf.SAE.load gives"
            )
        if self.sae is not None:
            instance_of("Grid", "sae", self.sae, SAE, "sf.SAE.load(path)")


class Sweep(Sequence[Cell]):
    """The measured cells, which show themselves as a table.

    Attributes:
        baseline: the unsteered model; its method is "none".
        unit: of the strengths.
        null: a cell, and its change of effect beside that of its controls; None: nothing was drawn.
    """

    def __init__(self, cells: Iterable[Cell], baseline: Cell, unit: str, null: tuple[Cell, Null] | None = None) -> None:
        self._cells = tuple(cells)
        self.baseline = baseline
        self.unit = unit
        self.null = null

    def __getitem__(self, index: Any) -> Any:
        return self._cells[index]

    def __len__(self) -> int:
        return len(self._cells)

    def best(self, damage: float = 1.1) -> Cell | None:
        """The cell of largest effect whose perplexity is at most `damage` times the unsteered one, if there is one."""
        limit = damage * self.baseline.perplexity
        bearable = [c for c in self._cells if c.perplexity <= limit and not math.isnan(c.effect)]
        return max(bearable, key=lambda cell: cell.effect, default=None)

    def __repr__(self) -> str:
        unsteered = self.baseline
        lines = [f"unsteered: effect {unsteered.effect:+.2f} nats, perplexity {unsteered.perplexity:.1f}"]
        for method in dict.fromkeys(cell.method for cell in self._cells):
            layers, strengths, cells = self._axes(method)
            lines += ["", f"{method}: change of effect | perplexity; strength in units of the {self.unit}"]
            lines.append(f"{'layer':>6}" + "".join(f"{s:>19g}" for s in strengths))
            for layer in layers:
                shown = [cells.get((layer, s)) for s in strengths]
                lines.append(f"{layer:>6}" + "".join(f"{self._cell(c):>19}" for c in shown))
        if self.null is not None:
            cell, null = self.null
            where = f"{cell.method}, layer {cell.layer}, strength {cell.strength:g}"
            lines += ["", f"null of {where} ({null.effect:+.2f}): {null}"]
        return "\n".join(lines)

    def heat_map(self, path: str | os.PathLike[str]) -> Path:
        """Write effect and damage of each method as a PNG; needs matplotlib.

        Returns:
            The file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        FigureCanvasAgg, Figure = require_matplotlib("heat_map")
        methods = list(dict.fromkeys(cell.method for cell in self._cells))
        layers, strengths, _ = self._axes(methods[0])
        size = (2 * max(4.0, 0.7 * len(strengths) + 2), len(methods) * max(3.0, 0.3 * len(layers) + 1.5))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(methods), 2, squeeze=False)
        for row, method in enumerate(methods):
            for axes, what in zip(panels[row], ("effect", "damage"), strict=True):
                self._panel(axes, method, what)
        image = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image)
        replace_file(Path(path), image.getvalue())
        return Path(path)

    def _panel(self, axes: Any, method: str, what: str) -> None:
        layers, strengths, cells = self._axes(method)
        values = torch.full((len(layers), len(strengths)), math.nan)
        for i, layer in enumerate(layers):
            for j, strength in enumerate(strengths):
                if (cell := cells.get((layer, strength))) is not None:
                    gain, ratio = self._change(cell)
                    values[i, j] = gain if what == "effect" else math.log2(ratio) if 0 < ratio < math.inf else math.nan
        largest = max(float(values.nan_to_num().abs().max()), 1e-6)
        image = axes.imshow(values.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto", origin="lower")
        label = "change of log-odds, nats" if what == "effect" else "log₂ of perplexity over unsteered"
        axes.figure.colorbar(image, ax=axes, label=label)
        axes.set_title(f"{method}: {what}")
        axes.set_xticks(range(len(strengths)), [f"{s:g}" for s in strengths])
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set_xlabel(f"strength, units of the {self.unit}")
        axes.set_ylabel("layer")

    def _change(self, cell: Cell) -> tuple[float, float]:
        """(change of effect, perplexity over the unsteered one)."""
        return cell.effect - self.baseline.effect, cell.perplexity / self.baseline.perplexity

    def _cell(self, cell: Cell | None) -> str:
        return "" if cell is None else f"{self._change(cell)[0]:+.2f} | {cell.perplexity:.3g}"

    def _axes(self, method: str) -> tuple[list[int], list[float], dict[tuple[int, float], Cell]]:
        cells = {(c.layer, c.strength): c for c in self._cells if c.method == method}
        return sorted({key[0] for key in cells}), sorted({key[1] for key in cells}), cells


def sweep(
    model: nn.Module,
    tokenizer: Any,
    sides: tuple[Sequence[str], Sequence[str]],
    question: Question,
    grid: Grid,
    out: str | os.PathLike[str] | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Sweep:
    """Measure effect and damage of steering over layers, strengths and methods, and the null of the best cell.

        effect = mean over prompts of log Σ p(wanted | prompt) - log Σ p(unwanted | prompt)

    Args:
        model: A transformers causal language model, not steered.
        tokenizer: Its tokenizer.
        sides: Texts with the property, and texts without it, as for `collect`.
        question: What is measured.
        grid: What is tried.
        out: Directory of `sweep.json`, to which every finished cell is added; a directory that holds an unfinished
            sweep of the same texts and the same model, its weights and dtype, is continued, also with a larger grid. Parts have
            files of their own there; the whole grid then takes what they hold, and measures what is missing. None: nothing is
            written.
        batch_size: Texts per forward; cells share a batch.
        progress: Show a progress bar on stderr.

    Returns:
        The cells of the grid, with the unsteered model as the baseline, and the null of the best cell. The best of many cells is
        favoured by having been chosen; the draws are not, so that a share above 0 is a warning.

    Raises:
        TypeError, ValueError: a bad layer or batch size, texts without tokens, `out` belongs to another sweep, or what a method
            refuses.

    Example:
        >>> question = sf.tools.Question(("I think people are",), (" kind", " good"), (" cruel", " bad"))
        >>> found = sf.sweep(model, tokenizer, (love, hate), question, sf.tools.Grid((6, 8)), out="sweep")  # doctest: +SKIP
        >>> found.best()  # doctest: +SKIP
    """
    instance_of("sweep", "question", question, Question, 'sf.tools.Question(("I am",), (" kind",), (" rude",))')
    instance_of("sweep", "grid", grid, Grid, "sf.tools.Grid((6, 8))")
    batch_size = positive_integer("sweep", "batch_size", batch_size)
    layers = find_layers(model, "sweep")
    given = whole_numbers("sweep", "layers", grid.layers, layers.count)
    chosen = list(dict.fromkeys(layers.resolve(layer, "sweep") for layer in given))
    if not chosen:
        raise ValueError(f"sweep: {grid.layers} names none of the {layers.count} layers")
    tokenizer = TextReader.of(tokenizer, "sweep")  # one reader, so that `collect` below does not warn again
    if len(sides) != 2:
        raise ValueError(f"sweep: sides must be (texts with the property, texts without it), got {len(sides)} items")
    both = [texts_of("sweep", "sides", side) for side in sides]
    # Files of schema 1 name the question "probe".
    origin = {"site": grid.site, "model": vars(card(model)), "weights": weights_digest(model), "dtype": _dtype(model)}
    settings = {"sides": both, "probe": asdict(question), "unit": grid.unit, **origin}
    if grid.sae is not None:
        settings["sae"] = grid.sae.fingerprint
    store = Store(None if out is None else Path(out), settings, grid.part)
    run = _Run(model, question, sequences_of(model, tokenizer, question), batch_size)
    cells = [(m, layer, s) for m in grid.methods for layer in chosen for s in grid.strengths]
    number, parts = grid.part
    # A part holds neighbours: few layers, few fits.
    wanted = cells[(number - 1) * len(cells) // parts : number * len(cells) // parts]
    missing = [key for key in wanted if key not in store.cells]
    read = range(layers.count) if set(grid.methods) & set(SEVERAL_LAYERS) else chosen

    def collected() -> tuple[Activations, Activations]:
        first, second = (
            collect(model, tokenizer, side, read, site=grid.site, batch_size=batch_size, progress=progress)
            for side in both
        )
        return first, second

    trial = Trial(collected, Teacher(model, tokenizer, both), grid.site, grid.unit, grid.sae)
    with evaluating(model), _bar(len(wanted), len(wanted) - len(missing), progress) as bar:
        for method in grid.methods:  # what a method refuses is said before anything is measured
            for layer in [layer for one, layer, _ in missing if one == method][:1]:
                trial.fit(method, layer)
        if store.baseline is None:
            ((effect, perplexity),) = run([Dose()])
            store.add(Cell("none", -1, 0.0, 0.0, effect, perplexity))
        _fill(store, run, trial, missing, bar)
        if store.baseline is None:
            raise RuntimeError("sweep: the unsteered model was not measured")
        found = Sweep([store.cells[key] for key in wanted], store.baseline, grid.unit)
        best = found.best(grid.damage)
        if best is not None and best.strength and grid.draws and parts == 1:
            found.null = _nulled(store, run, trial, best, grid)
    return found


@dataclass(frozen=True)
class _Run:
    """Measures doses."""

    model: nn.Module
    question: Question
    sequences: list[Scored]
    batch_size: int

    def __call__(self, doses: Sequence[Dose]) -> list[tuple[float, float]]:
        """(effect, perplexity) of each; as many as fill a batch run together."""
        group = max(1, self.batch_size // len(self.sequences))
        parts = [doses[i : i + group] for i in range(0, len(doses), group)]
        return [
            one for part in parts for one in measure(self.model, self.sequences, self.question, part, self.batch_size)
        ]


def _fill(store: Store, run: _Run, trial: Trial, missing: list[tuple[str, int, float]], bar: Any) -> None:
    """Measure the cells that are missing, a batch at a time."""
    group = max(1, run.batch_size // len(run.sequences))
    for first in range(0, len(missing), group):
        part = missing[first : first + group]
        fitted = [trial.fit(method, layer) for method, layer, _ in part]
        doses = [one.dose(key[2]) for one, key in zip(fitted, part, strict=True)]
        for (method, layer, strength), one, (effect, perplexity) in zip(part, fitted, run(doses), strict=True):
            factor = one.factor(strength)
            store.add(Cell(method, layer, strength, one.length(factor), effect, perplexity, factor))
            bar.update()


def _nulled(store: Store, run: _Run, trial: Trial, best: Cell, grid: Grid) -> tuple[Cell, Null]:
    """The best cell beside the same method on shuffled labels and random directions of its length."""
    known = store.null
    if known is not None and known[0] == best and max(len(known[1].shuffled), len(known[1].random)) == grid.draws:
        return known
    baseline = store.baseline.effect if store.baseline is not None else 0.0
    generator = seeded(0)
    real = trial.fit(best.method, best.layer)
    doses = []
    for _ in range(grid.draws):
        try:
            doses.append(trial.fit(best.method, best.layer, generator).dose(best.strength))
        except ValueError:  # shuffled sides that do not differ: nothing is found, nothing is done
            doses.append(Dose())
    if best.norm:  # of an edit that moves no negative row no length is known
        doses += [control(real, best.norm, generator) for _ in range(grid.draws)]
    effects = [effect - baseline for effect, _ in run(doses)]
    null = Null.of(best.effect - baseline, effects[: grid.draws], effects[grid.draws :])
    store.keep_null(best, null)
    return best, null


def _dtype(model: nn.Module) -> str:
    """The dtypes of a model's weights."""
    return ", ".join(sorted({str(weight.dtype).removeprefix("torch.") for weight in model.parameters()}))


def _bar(total: int, done: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, desc="sweep", unit="cell", disable=not progress)
