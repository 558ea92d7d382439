"""Which layer, how strong: effect against damage over a grid, so that a user can choose.

Every cell of layers × strengths × methods is measured by the model itself, steered at all tokens:

    effect      mean over prompts of log Σ p(wanted | prompt) - log Σ p(unwanted | prompt)
    perplexity  exp(mean negative log-likelihood per token) of neutral texts

Activations are collected once for all layers. Cells run in batches that mix them, one plan per batch row. Each finished
cell is on disk before the next begins, under a temporary name first, so an interrupted run continues.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import checked_part, finite_number, one_of, positive_integer, whole_number, whole_numbers
from steerfast.barriers.barrier import Barrier
from steerfast.barriers.fit import fit_barrier
from steerfast.directions import extract
from steerfast.directions.direction import Direction
from steerfast.edits.flow import Flow
from steerfast.edits.linear import Add
from steerfast.hooks.steer import steer
from steerfast.models.collect import collect
from steerfast.models.layers import evaluating, find_layers
from steerfast.models.texts import TextReader
from steerfast.place import SITES
from steerfast.plan import Plan, card

from .sweep_cells import Cell, Store

METHODS = (*extract.METHODS, "flow")
UNITS = ("stream", "vector")
NEUTRAL = (
    "The bridge was built in the nineteenth century and connects the two halves of the town.",
    "Water boils at a lower temperature in the mountains, because the air pressure is lower there.",
    "She put the letters on the table, took off her coat and opened the window.",
    "The train leaves at half past eight and arrives in the capital shortly before noon.",
    "To make the dough, mix flour, water and a little salt, and let it rest for an hour.",
    "The committee meets twice a year and publishes its minutes within a month.",
)
"""Texts about nothing in particular, for the perplexity where a user names none."""


@dataclass(frozen=True)
class Question:
    """What is measured.

    Args:
        prompts: Beginnings of texts.
        wanted: Continuations that steering should make likelier, as they follow a prompt: usually with a leading space.
        unwanted: Continuations that it should make less likely.
        neutral: Texts whose perplexity tells the damage.

    Raises:
        TypeError, ValueError: a field is one text instead of several, or has none.
    """

    prompts: tuple[str, ...]
    wanted: tuple[str, ...]
    unwanted: tuple[str, ...]
    neutral: tuple[str, ...] = NEUTRAL

    def __post_init__(self) -> None:
        for name in ("prompts", "wanted", "unwanted", "neutral"):
            object.__setattr__(self, name, _texts("Question", name, getattr(self, name)))


@dataclass(frozen=True)
class Grid:
    """What is tried.

    Args:
        layers: 0-based, negative from the end; also an array or a tensor of integers, or a slice of all layers.
        strengths: In the given unit; negative ones steer the other way, 0 is the unsteered model.
        methods: Functions of `steerfast.extract`: "mean_difference", "difference", "pca", "logistic".
        unit: "stream": the added vector's length as a share of the stream's typical (median) norm at that layer, so
            that layers compare; "vector": multiples of the vector as it was extracted.
        site: Where activations are read and the vector is added.
        part: (i, n): measure the i-th of n equal parts of the cells, i from 1.

    Raises:
        TypeError, ValueError: an empty or repeated entry, an unknown word, or a strength that is not finite.
    """

    layers: tuple[int, ...] | slice
    strengths: tuple[float, ...] = (-0.4, -0.2, -0.1, 0.1, 0.2, 0.4, 0.8)
    methods: tuple[str, ...] = ("mean_difference",)
    unit: str = "stream"
    site: str = "resid_post"
    part: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        object.__setattr__(self, "part", checked_part("Grid", self.part))
        one_of("Grid", "unit", self.unit, UNITS)
        one_of("Grid", "site", self.site, SITES)
        strengths = tuple(finite_number("Grid", "strengths", s) for s in _several("Grid", "strengths", self.strengths))
        methods = tuple(one_of("Grid", "methods", m, METHODS) for m in _several("Grid", "methods", self.methods))
        layers: Any = self.layers
        if not isinstance(layers, slice):
            layers = tuple(whole_number("Grid", "layers", layer) for layer in _several("Grid", "layers", layers))
        for name, values in (("layers", layers), ("strengths", strengths), ("methods", methods)):
            if not isinstance(values, slice) and len(set(values)) != len(values):
                raise ValueError(f"Grid: {name} is {values}; name each once")
            object.__setattr__(self, name, values)


class Sweep(Sequence[Cell]):
    """The measured cells, which show themselves as a table.

    Attributes:
        baseline: the unsteered model; its method is "none".
        unit: of the strengths.
    """

    def __init__(self, cells: Iterable[Cell], baseline: Cell, unit: str) -> None:
        self._cells = tuple(cells)
        self.baseline = baseline
        self.unit = unit

    def __getitem__(self, index: Any) -> Any:
        return self._cells[index]

    def __len__(self) -> int:
        return len(self._cells)

    def best(self, damage: float = 1.1) -> Cell | None:
        """The cell of largest effect whose perplexity is at most `damage` times the unsteered one, if there is one."""
        bearable = [c for c in self._cells if c.perplexity <= damage * self.baseline.perplexity]
        return max(bearable, key=lambda cell: cell.effect, default=None)

    def __repr__(self) -> str:
        unsteered = self.baseline
        lines = [f"unsteered: effect {unsteered.effect:+.2f} nats, perplexity {unsteered.perplexity:.1f}"]
        for method in dict.fromkeys(cell.method for cell in self._cells):
            layers, strengths, cells = self._axes(method)
            lines += ["", f"{method}: change of effect | perplexity; strength in units of the {self.unit}"]
            lines.append(f"{'layer':>6}" + "".join(f"{s:>16g}" for s in strengths))
            for layer in layers:
                shown = [cells.get((layer, s)) for s in strengths]
                lines.append(f"{layer:>6}" + "".join(f"{self._cell(c):>16}" for c in shown))
        return "\n".join(lines)

    def heat_map(self, path: str | os.PathLike[str]) -> Path:
        """Write effect and damage of each method as a PNG; needs matplotlib.

        Returns:
            The file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError('heat_map: needs matplotlib; pip install "steerfast[bench]"') from error
        methods = list(dict.fromkeys(cell.method for cell in self._cells))
        layers, strengths, _ = self._axes(methods[0])
        size = (2 * max(4.0, 0.7 * len(strengths) + 2), len(methods) * max(3.0, 0.3 * len(layers) + 1.5))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(methods), 2, squeeze=False)
        for row, method in enumerate(methods):
            for axes, what in zip(panels[row], ("effect", "damage"), strict=True):
                self._panel(axes, method, what)
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as file:
                FigureCanvasAgg(figure).print_png(file)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
        return target

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
    """Measure effect and damage of a steering vector over layers, strengths and methods of extraction.

        effect = mean over prompts of log Σ p(wanted | prompt) - log Σ p(unwanted | prompt)

    Args:
        model: A transformers causal language model, not steered.
        tokenizer: Its tokenizer.
        sides: Texts with the property, and texts without it, as for `collect`.
        question: What is measured.
        grid: What is tried.
        out: Directory of `sweep.json`, to which every finished cell is added; a directory that holds an unfinished
            sweep of the same texts is continued, also with a larger grid. Parts have files of their own there; the whole
            grid then takes what they hold, and measures what is missing. None: nothing is written.
        batch_size: Texts per forward; cells share a batch.
        progress: Show a progress bar on stderr.

    Returns:
        The cells of the grid, with the unsteered model as the baseline.

    Raises:
        TypeError, ValueError: a bad layer or batch size, texts without tokens, or `out` belongs to another sweep.

    Example:
        >>> question = sf.tools.Question(("I think people are",), (" kind", " good"), (" cruel", " bad"))
        >>> found = sf.sweep(model, tokenizer, (love, hate), question, sf.tools.Grid((6, 8)), out="sweep")  # doctest: +SKIP
        >>> found.best()  # doctest: +SKIP
    """
    batch_size = positive_integer("sweep", "batch_size", batch_size)
    layers = find_layers(model, "sweep")
    given = whole_numbers("sweep", "layers", grid.layers, layers.count)
    chosen = list(dict.fromkeys(layers.resolve(layer, "sweep") for layer in given))
    if not chosen:
        raise ValueError(f"sweep: {grid.layers} names none of the {layers.count} layers")
    tokenizer = TextReader.of(tokenizer, "sweep")  # one reader, so that `collect` below does not warn again
    if len(sides) != 2:
        raise ValueError(f"sweep: sides must be (texts with the property, texts without it), got {len(sides)} items")
    both = [_texts("sweep", "sides", side) for side in sides]
    # Files of schema 1 name the question "probe".
    origin = {"site": grid.site, "model": vars(card(model))}
    settings = {"sides": both, "probe": asdict(question), "unit": grid.unit, **origin}
    store = Store(None if out is None else Path(out), settings, grid.part)
    sequences = _sequences(tokenizer, question)
    cells = [(m, layer, s) for m in grid.methods for layer in chosen for s in grid.strengths]
    number, parts = grid.part
    wanted = cells[
        (number - 1) * len(cells) // parts : number * len(cells) // parts
    ]  # of neighbours: few layers, few vectors
    missing = [key for key in wanted if key not in store.cells]
    with evaluating(model), _bar(len(wanted), len(wanted) - len(missing), progress) as bar:
        if store.baseline is None:
            [(effect, perplexity)] = _measure(model, sequences, question, [None], batch_size)
            store.add(Cell("none", -1, 0.0, 0.0, effect, perplexity))
        vectors = _directions(model, tokenizer, both, grid, missing, batch_size, progress) if missing else {}
        group = max(1, batch_size // len(sequences))  # cells that fill a batch together
        for first in range(0, len(missing), group):
            part = missing[first : first + group]
            adds = [_edit(vectors[method, layer], strength, grid.unit) for method, layer, strength in part]
            plans = [None if a is None else Plan({(grid.site, key[1]): a}) for key, a in zip(part, adds, strict=True)]
            for key, add, values in zip(
                part, adds, _measure(model, sequences, question, plans, batch_size), strict=True
            ):
                store.add(Cell(*key, 0.0 if add is None else _length(add), *values))
                bar.update()
    if store.baseline is None:
        raise RuntimeError("sweep: the unsteered model was not measured")
    return Sweep([store.cells[key] for key in wanted], store.baseline, grid.unit)


# --- one cell ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sequence:
    """Token ids, of which those from `start` on are scored."""

    ids: tuple[int, ...]
    start: int


def _sequences(reader: TextReader, question: Question) -> list[_Sequence]:
    """Prompts with each continuation, prompt by prompt, then the neutral texts."""
    found = []
    for prompt in question.prompts:
        head = _filled("prompts", prompt, reader.beginning(prompt))
        for continuation in (*question.wanted, *question.unwanted):
            tail = _filled("wanted and unwanted", continuation, reader.bare(continuation))
            found.append(_Sequence((*head, *tail), len(head)))
    for text in question.neutral:
        ids = _filled("neutral", text, reader.ids(text))
        if len(ids) < 2:
            raise ValueError(f"sweep: {text!r} in neutral has one token; perplexity needs at least two")
        found.append(_Sequence(ids, 1))
    return found


def _filled(name: str, text: str, ids: list[int]) -> tuple[int, ...]:
    if not ids:
        raise ValueError(f"sweep: {text!r} in {name} has no tokens; remove it or give it content")
    return tuple(ids)


def _measure(
    model: nn.Module, sequences: list[_Sequence], question: Question, plans: Sequence[Plan | None], batch_size: int
) -> Iterator[tuple[float, float]]:
    """(effect, perplexity) under each plan; rows of several plans run together."""
    jobs = [(plan, sequence) for plan in plans for sequence in sequences]
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i][1].ids))  # little padding
    scores = [0.0] * len(jobs)
    for first in range(0, len(jobs), batch_size):
        rows = order[first : first + batch_size]
        batch = _log_likelihoods(model, [jobs[i][1] for i in rows], [jobs[i][0] for i in rows])
        for i, score in zip(rows, batch, strict=True):
            scores[i] = score
    for i in range(len(plans)):
        yield _effect_and_perplexity(sequences, question, scores[i * len(sequences) : (i + 1) * len(sequences)])


def _log_likelihoods(model: nn.Module, batch: list[_Sequence], plans: list[Plan | None]) -> list[float]:
    """Σ log p of the scored tokens of each row."""
    device = next(model.parameters()).device
    ids = nn.utils.rnn.pad_sequence([torch.tensor(s.ids) for s in batch], batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor([len(s.ids) for s in batch])[:, None]).long()
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    if any(plan is not None for plan in plans):
        with steer(model, plans):
            logits: Tensor = model(**inputs).logits
    else:
        logits = model(**inputs).logits
    scores = []
    for row, sequence in enumerate(batch):
        span = slice(sequence.start - 1, len(sequence.ids) - 1)
        likelihoods = logits[row, span].float().log_softmax(-1)
        targets = torch.tensor(sequence.ids[sequence.start :], device=logits.device)
        scores.append(likelihoods.gather(1, targets[:, None]).double().sum())
    return torch.stack(scores).tolist()


def _effect_and_perplexity(sequences: list[_Sequence], question: Question, scores: list[float]) -> tuple[float, float]:
    per_prompt = len(question.wanted) + len(question.unwanted)
    split = len(question.prompts) * per_prompt
    odds = torch.tensor(scores[:split], dtype=torch.float64).view(-1, per_prompt)
    wanted, unwanted = odds[:, : len(question.wanted)], odds[:, len(question.wanted) :]
    tokens = sum(len(s.ids) - s.start for s in sequences[split:])
    loss = -sum(scores[split:]) / tokens
    return float((wanted.logsumexp(1) - unwanted.logsumexp(1)).mean()), math.exp(min(loss, 700.0))


def _directions(
    model: nn.Module,
    tokenizer: Any,
    sides: Sequence[tuple[str, ...]],
    grid: Grid,
    keys: list[tuple[str, int, float]],
    batch_size: int,
    progress: bool,
) -> dict[tuple[str, int], Direction | Barrier]:
    """The direction of each method and layer that is still needed; the activations are collected once."""
    layers = sorted({layer for _, layer, _ in keys})
    acts = [
        collect(model, tokenizer, side, layers, site=grid.site, batch_size=batch_size, progress=progress)
        for side in sides
    ]
    found: dict[tuple[str, int], Direction | Barrier] = {}
    for method, layer in dict.fromkeys(key[:2] for key in keys):
        if method == "flow":
            found[method, layer] = fit_barrier(acts[0][layer], acts[1][layer], kind="quadratic")
        else:
            found[method, layer] = getattr(extract, method)(acts[0][layer], acts[1][layer])
    return found


def _edit(direction: Direction | Barrier, strength: float, unit: str) -> Add | Flow | None:
    """What one cell does; a flow takes its strength as an angle, or as its length where the unit is the vector's."""
    if strength == 0.0:
        return None
    if isinstance(direction, Barrier):
        h = direction if strength > 0 else -direction
        return Flow(h, angle=abs(strength)) if unit == "stream" else Flow(h, T=abs(strength))
    if unit == "stream" and direction.origin.typical_norm is not None:
        strength = strength * direction.origin.typical_norm / float(direction.vector.norm())
    return Add(direction.vector, strength=strength)


def _length(edit: Add | Flow) -> float:
    if isinstance(edit, Flow):
        return edit.T if edit.T is not None else float(edit.angle or 0.0) * (edit.origin.typical_norm or 0.0)
    return abs(edit.strength) * float(edit.tensors()["vector"].norm())


def _bar(total: int, done: int, progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, initial=done, desc="sweep", unit="cell", disable=not progress)


def _several(owner: str, name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{owner}: {name} must be several values, got {values!r}; put it into a list")
    found = tuple(values)
    if not found:
        raise ValueError(f"{owner}: {name} is empty; give at least one")
    return found


def _texts(owner: str, name: str, values: Any) -> tuple[str, ...]:
    found = _several(owner, name, values)
    for text in found:
        if not isinstance(text, str) or not text:
            raise TypeError(f"{owner}: {name} holds {text!r}; expected texts with content")
    return found
