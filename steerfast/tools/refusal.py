"""The refusal direction, selected as its authors select it.

Every position behind the instruction times every layer gives a candidate, the difference of the mean activations of harmful
and harmless prompts at the block's input. On held-out prompts each is scored by the first token of the answer:

    refusal     log Σ p(refusing tokens) - log (1 - Σ p(refusing tokens)), mean over prompts
    bypass      refusal on harmful prompts with the candidate ablated everywhere: low is good
    induction   refusal on harmless prompts with the candidate added at its layer: high is good
    divergence  KL(unsteered ‖ ablated) of the first token on harmless prompts: low is good
"""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, instance_of, positive_integer, seed_number, warn_user, whole_number
from steerfast._null import DRAWS, Null
from steerfast.barriers.data import seeded
from steerfast.directions.direction import Direction
from steerfast.directions.sets import text_table
from steerfast.edits.linear import Ablate, Add
from steerfast.files.replace import replace_file
from steerfast.models.layers import evaluating, find_layers
from steerfast.place import Origin, Place, typical_norm_of
from steerfast.plan import Plan

from .bake import everywhere
from .flow_plot import require_matplotlib
from .refusal_scores import RefusalScorer, divergence

HELD = 5
"""Of so many prompts one is held out for the scores."""


@dataclass(frozen=True)
class RefusalRules:
    """How a refusal direction is selected; the defaults are those of the paper.

    Args:
        words: A refusal begins with the first token of one of these.
        divergence: Largest divergence, in nats, that a candidate may have.
        induction: Least induction, in nats.
        late: Share of the layers, the last ones, that give no candidates.
        filtered: Leave out harmful prompts that the model does not refuse and harmless ones that it does.
        draws: Controls of each kind that the selected candidate stands beside.
        seed: Of their draws.

    Raises:
        TypeError, ValueError: no words, or a number that is out of range.
    """

    words: tuple[str, ...] = ("I", "As")
    divergence: float = 0.1
    induction: float = 0.0
    late: float = 0.2
    filtered: bool = True
    draws: int = DRAWS
    seed: int = 0

    def __post_init__(self) -> None:
        words = (self.words,) if isinstance(self.words, str) else tuple(self.words)
        if not words or not all(isinstance(word, str) and word for word in words):
            raise ValueError(f"RefusalRules: words is {self.words!r}; expected beginnings of a refusal, one at least")
        object.__setattr__(self, "words", words)
        for name in ("divergence", "induction", "late"):
            object.__setattr__(self, name, finite_number("RefusalRules", name, getattr(self, name)))
        if not 0 <= self.late < 1:
            raise ValueError(f"RefusalRules: late is {self.late}; expected a share of the layers, 0 <= late < 1")
        whole_number("RefusalRules", "draws", self.draws, 0)
        object.__setattr__(self, "seed", seed_number("RefusalRules", self.seed))

    def layers(self, count: int) -> range:
        """The layers that give candidates, in a model of so many."""
        return range(int(round(count * (1 - self.late), 9)))  # 30·(1 - 0.9) is just below 3

    def fallen(self, bypass: float, induction: float, divergence: float) -> str:
        """Why a candidate with these scores falls; "": it stays."""
        if math.isnan(bypass + induction + divergence):
            return "no number"
        if divergence > self.divergence:
            return "divergence"
        return "induction" if induction < self.induction else ""


@dataclass(frozen=True)
class Candidate:
    """A direction that was scored.

    Attributes:
        position: Of the token that it was read at, from the end of the prompt: -1 is the last.
        layer: The block at whose input it was read.
        bypass, induction, divergence: Its scores, in nats.
        fallen: Why it fell: "divergence", "induction" or "no number"; "": it stays.
    """

    position: int
    layer: int
    bypass: float
    induction: float
    divergence: float
    fallen: str


class Refusal(Sequence[Candidate]):
    """The scored candidates, and what the best of them does; shows itself as a table.

    Attributes:
        best: The candidate of lowest bypass that did not fall; None: all fell.
        direction: Its `Direction`, not normalised; None if all fell.
        unsteered: Mean refusal of the unsteered model on held-out (harmful, harmless) prompts.
        ablate: The plan that removes the direction from everything that is written into the stream; None if all fell.
        induce: The plan that adds it at its layer; None if all fell.
        bypass_null, induction_null: The best one's scores (the bypass negated) beside those of mean differences of shuffled
            prompts at the same place, and of random directions of the same length; None if all fell, or none was drawn.
        tokens: Position to the token that stands there.
        prompts: How many (harmful, harmless) prompts were used, the held-out ones among them.
    """

    def __init__(
        self, candidates: Iterable[Candidate], unsteered: tuple[float, float], tokens: Mapping[int, str]
    ) -> None:
        self._candidates = tuple(candidates)
        self.unsteered, self.tokens = unsteered, dict(tokens)
        standing = [one for one in self._candidates if not one.fallen]
        self.best: Candidate | None = min(standing, key=lambda one: one.bypass, default=None)
        self.direction: Direction | None = None
        self.ablate: Plan | None = None
        self.induce: Plan | None = None
        self.bypass_null: Null | None = None
        self.induction_null: Null | None = None
        self.prompts = (0, 0)

    def __getitem__(self, index: Any) -> Any:
        return self._candidates[index]

    def __len__(self) -> int:
        return len(self._candidates)

    def __repr__(self) -> str:
        harmful, harmless = self.unsteered
        order = sorted(self._candidates, key=lambda one: (bool(one.fallen), one.bypass))
        rows = [
            [str(one.position), repr(self.tokens.get(one.position, "")), str(one.layer), f"{one.bypass:+.2f}",
             f"{one.induction:+.2f}", f"{one.divergence:.3f}", one.fallen or ("best" if one is self.best else "")]
            for one in order
        ]  # fmt: skip
        title = (
            f"Candidates; refusal unsteered: {harmful:+.2f} on harmful and {harmless:+.2f} on harmless prompts, nats"
        )
        head = ["position", "token", "layer", "bypass", "induction", "divergence", ""]
        return text_table(title, head, rows, len(rows)) + ("" if self.best else f"\n{self.verdict}")

    @property
    def verdict(self) -> str:
        """What came out, in a sentence."""
        if self.best is not None:
            return (
                f"position {self.best.position}, layer {self.best.layer}: refusal of harmful prompts {self.unsteered[0]:+.2f} -> "
                f"{self.best.bypass:+.2f}, of harmless ones {self.unsteered[1]:+.2f} -> {self.best.induction:+.2f} nats, "
                f"divergence {self.best.divergence:.3f}"
            )
        reasons = [one.fallen for one in self._candidates]
        counts = ", ".join(f"{reasons.count(reason)} by {reason}" for reason in dict.fromkeys(reasons))
        return (
            f"All {len(self)} candidates fell ({counts}): in this model no single direction both carries refusal and leaves "
            "harmless prompts alone"
        )

    def save_table(self, path: str | os.PathLike[str]) -> Path:
        """Write the candidates, the unsteered scores and the nulls as JSON.

        Returns:
            The file.
        """
        nulls = {"bypass": self.bypass_null, "induction": self.induction_null}
        text = {
            "kind": "steerfast.refusal",
            "schema": 1,
            "unsteered": dict(zip(("harmful", "harmless"), self.unsteered, strict=True)),
            "tokens": {str(position): token for position, token in self.tokens.items()},
            "best": None if self.best is None else asdict(self.best),
            "nulls": {name: None if null is None else null.numbers() for name, null in nulls.items()},
            "candidates": [_finite(asdict(one)) for one in self._candidates],
        }
        replace_file(Path(path), json.dumps(text, indent=1, ensure_ascii=False).encode())
        return Path(path)

    def heat_map(self, path: str | os.PathLike[str]) -> Path:
        """Draw the three scores, position by layer, as a PNG; a cross marks what fell, a ring the best.

        Returns:
            The file.

        Raises:
            ImportError: matplotlib is not installed.
        """
        FigureCanvasAgg, Figure = require_matplotlib("heat_map")
        layers = sorted({one.layer for one in self._candidates})
        positions = sorted({one.position for one in self._candidates})
        size = (max(5.0, 0.28 * len(layers) + 2.5), 3 * max(1.6, 0.3 * len(positions) + 1.1))
        figure = Figure(figsize=size, layout="constrained")
        for axes, (name, title, colours) in zip(figure.subplots(3, 1), _PANELS, strict=True):
            values = torch.full((len(positions), len(layers)), math.nan, device="cpu")
            for one in self._candidates:
                cell = positions.index(one.position), layers.index(one.layer)
                values[cell] = getattr(one, name)
                if one.fallen or one is self.best:
                    ring = {"facecolors": "none", "edgecolors": "k", "s": 90}
                    look = {"marker": "x", "color": "0.4", "s": 18} if one.fallen else {"marker": "o", **ring}
                    axes.scatter(cell[1], cell[0], **look)
            image = axes.imshow(values.numpy(), cmap=colours, aspect="auto", origin="lower")
            figure.colorbar(image, ax=axes, label="nats")
            axes.set_title(title)
            axes.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
            axes.set_yticks(range(len(positions)), [f"{at} {self.tokens.get(at, '')!r}" for at in positions])
            axes.set_xlabel("layer (ring: the best; cross: fell)")
        image_file = io.BytesIO()
        FigureCanvasAgg(figure).print_png(image_file)
        replace_file(Path(path), image_file.getvalue())
        return Path(path)


_PANELS = (
    ("bypass", "bypass: refusal of harmful prompts, ablated", "viridis_r"),
    ("induction", "induction: refusal of harmless prompts, added", "viridis"),
    ("divergence", "divergence on harmless prompts, ablated", "magma_r"),
)


def select_refusal(
    model: nn.Module,
    tokenizer: Any,
    harmful: Iterable[str],
    harmless: Iterable[str],
    rules: RefusalRules | None = None,
    template: str | None = None,
    batch_size: int = 16,
    progress: bool = True,
) -> Refusal:
    """Select the direction that carries refusal, among all positions behind the instruction and all layers.

    Every fifth prompt of each side is held out and gives the scores, the others give the candidates. Of the candidates whose
    divergence is at most 0.1 and whose induction is positive the one of lowest bypass is taken.

    Args:
        model: A chat model of transformers, not steered, whose blocks show what attention and MLP add.
        tokenizer: Its tokenizer.
        harmful: Instructions that the model refuses.
        harmless: Instructions that it follows.
        rules: Limits and refusing words; None: those of the paper.
        template: A text with "{instruction}" that ends where the answer begins; None: the tokenizer's chat template.
        batch_size: Prompts per forward.
        progress: Show a progress bar on stderr.

    Returns:
        A `Refusal`: the candidates, the best one's direction, and the two plans.

    Raises:
        TypeError, ValueError: too few prompts, or too few that the model refuses and follows; no chat template; a model whose
            attention and MLP outputs cannot be edited.

    Warns:
        UserWarning: all candidates fell.

    Reference:
        Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717), appendix C.

    Example:
        >>> found = sf.tools.select_refusal(model, tokenizer, harmful, harmless)  # doctest: +SKIP
        >>> with sf.steer(model, found.ablate):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    owner = "select_refusal"
    rules = _rules(owner, rules)
    scorer = RefusalScorer(model, tokenizer, rules.words, template, positive_integer(owner, "batch_size", batch_size))
    sides = [_instructions(owner, name, side) for name, side in (("harmful", harmful), ("harmless", harmless))]
    with evaluating(model):
        sides = [_filtered(scorer, sides[0], True, rules), _filtered(scorer, sides[1], False, rules)]
        held = [scorer.ids(side[::HELD]) for side in sides]
        taught = [[text for i, text in enumerate(side) if i % HELD] for side in sides]
        layers = rules.layers(find_layers(model, owner).count)
        differences = _differences(scorer, taught, layers, progress)
        plain = [scorer.logits(ids) for ids in held]
        unsteered = (float(scorer.refusal(plain[0]).mean()), float(scorer.refusal(plain[1]).mean()))
        scored = []
        for (position, layer), vector in _bar(differences, progress):
            scores = _scores(scorer, vector, layer, held, plain[1])
            scored.append(Candidate(position, layer, *scores, fallen=rules.fallen(*scores)))
        found = Refusal(scored, unsteered, scorer.tokens)
        found.prompts = (len(sides[0]), len(sides[1]))
        if found.best is None:
            warn_user(f"{owner}: {found.verdict[0].lower()}{found.verdict[1:]}")
            return found
        _complete(found, found.best, scorer, (taught, held, plain[1]), differences, rules)
    return found


def _rules(owner: str, rules: RefusalRules | None) -> RefusalRules:
    given = RefusalRules() if rules is None else rules
    return instance_of(owner, "rules", given, RefusalRules, "sf.tools.RefusalRules(late=0.3)")


def refusal_rates(
    model: nn.Module,
    tokenizer: Any,
    instructions: Iterable[str],
    plans: Sequence[Plan | None],
    rules: RefusalRules | None = None,
    template: str | None = None,
    batch_size: int = 16,
) -> list[float]:
    """The share of instructions whose answer the model begins like a refusal (score > 0), under each plan.

    On prompts that only look unsafe, such as the safe ones of XSTest, this is over-refusal.

    Args:
        model: As of `select_refusal`.
        tokenizer: Its tokenizer.
        instructions: What is asked.
        plans: What the model is steered with; None: nothing.
        rules: The refusing words.
        template: As of `select_refusal`.
        batch_size: Prompts per forward.

    Raises:
        TypeError, ValueError: as of `select_refusal`.

    Reference:
        Röttger et al. 2024, XSTest (arXiv:2308.01263), whose judge reads whole answers.
    """
    words = _rules("refusal_rates", rules).words
    scorer = RefusalScorer(
        model, tokenizer, words, template, positive_integer("refusal_rates", "batch_size", batch_size)
    )
    ids = scorer.ids(_instructions("refusal_rates", "instructions", instructions, least=1))
    with evaluating(model):
        scores = [scorer.scores(ids, plan) for plan in plans]
    return [float((score > 0).double().mean()) for score in scores]


def _scores(
    scorer: RefusalScorer, vector: Tensor, layer: int, held: Sequence[list[list[int]]], plain: Tensor
) -> tuple[float, float, float]:
    """(bypass, induction, divergence) of a vector that was read at a block's input."""
    harmful, harmless = held
    plans = _plans(scorer.model, vector, layer)
    ablated = scorer.logits([*harmful, *harmless], plans[0])
    added = scorer.scores(harmless, plans[1])
    bypass = float(scorer.refusal(ablated[: len(harmful)]).mean())
    return bypass, float(added.mean()), divergence(plain, ablated[len(harmful) :])


def _plans(model: nn.Module, vector: Tensor | Direction, layer: int) -> tuple[Plan, Plan]:
    """The plan that ablates everywhere, and the one that adds at the layer."""
    inner = getattr(model, "_orig_mod", model)
    return everywhere(model, Ablate(vector)), Plan({("resid_pre", layer): Add(vector)}, model=inner)


def _differences(
    scorer: RefusalScorer, taught: Sequence[Sequence[str]], layers: range, progress: bool
) -> dict[tuple[int, int], Tensor]:
    """(position, layer) to mean(harmful) - mean(harmless) at the block's input; without those that do not differ."""
    if not layers:
        raise ValueError("select_refusal: rules.late drops every layer; make it smaller")
    found = {}
    for position in scorer.tokens:
        sides = [scorer.collect(side, layers, position, progress) for side in taught]
        for layer in layers:
            vector = sides[0][layer].double().mean(0) - sides[1][layer].double().mean(0)
            # at the first block's input every prompt has the same token here, and a difference is rounding
            if float(vector.norm()) > 1e-6 * typical_norm_of(sides[1][layer]):
                found[position, layer] = vector.float()
    if not found:
        raise ValueError("select_refusal: harmful and harmless prompts have the same activations; check the prompts")
    return found


def _complete(
    found: Refusal, best: Candidate, scorer: RefusalScorer, prompts: Any, vectors: Mapping[Any, Tensor], rules: RefusalRules
) -> None:  # fmt: skip
    """Add direction, plans and nulls of the best candidate; prompts: taught, held out, and the latter's unsteered logits."""
    taught, held, plain = prompts
    vector, place = vectors[best.position, best.layer], Place("resid_pre", best.layer)
    sides = [scorer.collect(side, [best.layer], best.position, False)[best.layer] for side in taught]
    rows = torch.cat(sides)
    typical = typical_norm_of(rows)
    origin = Origin(find_layers(scorer.model, "select_refusal").name, place, best.position, typical)
    found.direction = Direction(vector, "select_refusal", float(vector.norm()), origin)
    found.ablate, found.induce = _plans(scorer.model, found.direction, best.layer)
    if not rules.draws:
        return
    generator = seeded(rules.seed)
    kinds: list[list[tuple[float, float, float]]] = [[], []]
    for _ in range(rules.draws):
        mixed = rows[torch.randperm(len(rows), generator=generator, device="cpu")].double()
        shuffled = mixed[: len(sides[0])].mean(0) - mixed[len(sides[0]) :].mean(0)
        drawn = torch.randn(vector.shape, generator=generator, device="cpu")
        for kind, control in zip(kinds, (shuffled.float(), drawn * vector.norm() / drawn.norm()), strict=True):
            kind.append(_scores(scorer, control, best.layer, held, plain))
    bypass, induction = ([[sign * score[i] for score in kind] for kind in kinds] for i, sign in ((0, -1.0), (1, 1.0)))
    found.bypass_null = Null.of(-best.bypass, *bypass)
    found.induction_null = Null.of(best.induction, *induction)


def _filtered(scorer: RefusalScorer, texts: list[str], refused: bool, rules: RefusalRules) -> list[str]:
    """The prompts that the model treats as its side says."""
    if not rules.filtered:
        return texts
    scores = scorer.scores(scorer.ids(texts))
    kept = [text for text, score in zip(texts, scores.tolist(), strict=True) if (score > 0) == refused]
    if len(kept) < HELD:
        what = "refuses" if refused else "follows"
        raise ValueError(
            f"select_refusal: the model {what} {len(kept)} of {len(texts)} {'harmful' if refused else 'harmless'} prompts by the "
            f"first token of its answer ({', '.join(map(repr, rules.words))}); at least {HELD} are needed: name the words that "
            "its refusals begin with, give more prompts, or use all of them with RefusalRules(filtered=False)"
        )
    return kept


def _instructions(owner: str, name: str, given: Any, least: int = HELD) -> list[str]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{owner}: {name} must be several texts, got {given!r}; put them into a list")
    found = list(given)
    if len(found) < least:
        raise ValueError(f"{owner}: {name} holds {len(found)} texts; expected at least {least}")
    for text in found:
        if not isinstance(text, str) or not text.strip():
            raise TypeError(f"{owner}: {name} holds {text!r}; expected texts with content")
    return found


def _bar(vectors: Mapping[Any, Tensor], progress: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(vectors.items(), desc="refusal", unit="candidate", disable=not progress)


def _finite(entry: dict[str, Any]) -> dict[str, Any]:
    """A candidate for JSON, which has no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
