"""What trained interventions share: examples as tokens, a frozen model with an edit in it, and steps of Adam."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number, positive_integer
from steerfast.models.layers import evaluating, find_layers, home, stream_storage
from steerfast.models.limits import Limits
from steerfast.models.texts import TextReader, short_text
from steerfast.place import Origin, Place

BATCH = 4
"""Examples of a step."""
HELD = 5
"""Of so many examples one is held out, from twice as many on."""
Edit = Callable[[Tensor], Tensor]
T = TypeVar("T")


@dataclass(frozen=True)
class Lesson:
    """Token ids of a prompt, of the continuation that is wanted, and of the one that is not (empty: none was given)."""

    prompt: tuple[int, ...]
    wanted: tuple[int, ...]
    unwanted: tuple[int, ...] = ()


def read_lessons(
    owner: str, model: nn.Module, reader: TextReader, examples: Any, contrast: bool = False
) -> list[Lesson]:
    """Examples as tokens.

    Args:
        owner: Who trains, for the messages.
        model: What is to read them.
        reader: What reads the texts.
        examples: (prompt, continuation), strings; with `contrast` (prompt, wanted, unwanted).
        contrast: Whether each has an unwanted continuation.

    Raises:
        TypeError, ValueError: none, one that is no tuple of strings, a text without tokens, or one that the model cannot read.
    """
    what = "(prompt, wanted, unwanted)" if contrast else "(prompt, continuation)"
    given = None if isinstance(examples, (str, bytes)) or not isinstance(examples, Iterable) else list(examples)
    if not given:
        raise ValueError(f"{owner}: examples is {examples!r}; expected a list of {what}, one at least")
    lessons, limits = [], Limits(owner, model)
    for one in given:
        if (
            isinstance(one, str) or not isinstance(one, Sequence) or [type(text) for text in one] != [str] * (2 + contrast)
        ):  # fmt: skip
            raise TypeError(
                f"{owner}: {one!r} is no example; expected {what}, {'three' if contrast else 'two'} strings"
            )
        parts = [tuple(reader.beginning(one[0])), *(tuple(reader.following(one[0], text)) for text in one[1:])]
        if not all(parts):
            raise ValueError(f"{owner}: {one!r} has a text without tokens; give both content")
        for text, ids in zip(one[1:], parts[1:], strict=True):
            limits.check(short_text(one[0] + text), (*parts[0], *ids))
        lessons.append(Lesson(*parts))
    return lessons


def split(lessons: list[T]) -> tuple[list[T], list[T]]:
    """(taught, held out) of examples: of ten or more every fifth is held out."""
    held = lessons[::HELD] if len(lessons) >= 2 * HELD else []
    return [lessons[i] for i in range(len(lessons)) if not held or i % HELD], held


class Pupil:
    """A model that stays as it is, with an edit at one block's output that can be changed between two passes.

    Attributes:
        layer, width: Where, and d.
        device: Of the stream there.
        origin: Model and place.
    """

    def __init__(self, owner: str, model: nn.Module, layer: int) -> None:
        found = find_layers(model, owner)
        self.owner, self.layer, self.width = owner, found.resolve(layer, owner), found.d
        self.model = getattr(model, "_orig_mod", model)
        self.device = stream_storage(found.blocks[self.layer], self.model)[1]
        self.origin = Origin(found.name, Place("resid_post", self.layer))
        self._point = found.point(self.layer, caller=owner)
        self._edit: Edit | None = None
        self._listens = False

    @contextmanager
    def taught(self) -> Iterator[Pupil]:
        """Hold the weights, and listen to the edit; both end with the block. Within another such block nothing is left to do."""
        if self._listens:
            yield self
            return
        handle = None
        try:
            with frozen(self.model), evaluating(self.model):
                handle = self._point.attach(lambda x: None if self._edit is None else self._edit(x))
                self._listens = True
                yield self
        finally:
            self._listens = False
            if handle is not None:
                handle.remove()

    def logits(self, ids: Sequence[int], edit: Edit | None) -> Tensor:
        """The logits of one text under an edit, (tokens, vocabulary); it runs by itself, without padding."""
        given = torch.tensor([list(ids)], device=home(self.model))
        self._edit = edit
        try:
            found: Tensor = self.model(input_ids=given, attention_mask=torch.ones_like(given)).logits
        finally:
            self._edit = None
        return found[0]

    def log_likelihoods(self, prompt: Sequence[int], continuation: Sequence[int], edit: Edit | None) -> Tensor:
        """log p of each token of a continuation under an edit, float32 (tokens,)."""
        logits = self.logits([*prompt, *continuation], edit)
        own = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
        follows = torch.tensor(list(continuation), device=own.device)
        return own.gather(1, follows[:, None])[:, 0].cpu()

    def nats(self, lessons: Sequence[Lesson], edit: Edit | None) -> float:
        """Mean log p of a token of the wanted continuations; NaN without lessons."""
        with torch.no_grad():
            found = [self.log_likelihoods(one.prompt, one.wanted, edit) for one in lessons]
        return float(torch.cat(found).mean()) if found else math.nan


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """A model whose weights take no gradient."""
    parts = [part for part in model.parameters() if part.requires_grad]
    for part in parts:
        part.requires_grad_(False)
    try:
        yield
    finally:
        for part in parts:
            part.requires_grad_(True)


def descend(
    owner: str,
    parameters: Sequence[Tensor],
    loss: Callable[[int, list[int]], Tensor],
    count: int,
    steps: int,
    lr: float,
    generator: torch.Generator,
    after: Callable[[], None] | None = None,
) -> None:
    """Adam on a few of `count` examples a step.

    Args:
        owner: Who trains.
        parameters: What is moved.
        loss: (step, indices of examples) -> a number.
        count: Examples.
        steps: How many.
        lr: Learning rate.
        generator: Of the order.
        after: Called behind each step.

    Raises:
        ValueError: the loss is not finite.
    """
    optimizer = torch.optim.Adam(list(parameters), lr=lr)
    order: list[int] = []
    with torch.enable_grad():
        for step in range(steps):
            while len(order) < min(BATCH, count):
                order += torch.randperm(count, generator=generator, device="cpu").tolist()
            part, order = order[:BATCH], order[BATCH:]
            optimizer.zero_grad()
            found = loss(step, part)
            if not bool(found.isfinite()):
                raise ValueError(f"{owner}: the loss is {float(found.detach())} in step {step + 1}; take a smaller lr")
            found.backward()
            optimizer.step()
            if after is not None:
                with torch.no_grad():
                    after()


def steps_and_rate(owner: str, steps: Any, lr: Any) -> tuple[int, float]:
    """Checked numbers of a training."""
    steps, lr = positive_integer(owner, "steps", steps), finite_number(owner, "lr", lr)
    if lr <= 0:
        raise ValueError(f"{owner}: lr is {lr}; expected > 0")
    return steps, lr


def warn_of_no_gain(owner: str, nats: float) -> None:
    """Say so if held-out continuations did not become likelier; `nats` a token, NaN: nothing was held out."""
    if nats <= 0:
        warnings.warn(
            f"{owner}: held-out continuations became no likelier ({nats:+.3g} nats a token): what was learned does not carry "
            "over from the examples; give more of them, fewer steps or a smaller lr",
            RuntimeWarning,
            stacklevel=3,
        )
