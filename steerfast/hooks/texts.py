"""Which text a pass inside generate runs: the batch that was announced, or another one.

A model may run more than its batch there: the negative prompt of classifier-free guidance, whatever a logits processor asks
it, a prompt that the arguments of generate do not show. A pass belongs to the batch if it comes with the batch's own cache,
or if it runs the batch's own tokens; every other one is a text by itself, and is followed as a bare pass is.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .generation import Announcement, valid_tokens
from .prompts import Prompt

_PLAIN = (Tensor, bool, int, float, str, type(None))


def mark_of(counter: int | Tensor) -> tuple[int, int] | None:
    """By what a cache's own counter shows that nobody has written into it since; None: it does not."""
    if not isinstance(counter, Tensor) or counter.is_inference():
        return None
    return id(counter), counter._version


def unmoved(counter: Tensor, mark: tuple[int, int] | None, count: int) -> bool:
    """Whether a cache holds what the last pass left in it, without reading it from the device."""
    if counter.is_inference():  # has no version; a text of several tokens may be a new one
        return count == 1
    return mark is not None and mark == mark_of(counter)


class Batch:
    """The batch that generate has announced, and by what its passes are known.

    Attributes:
        told: What was announced.
        caches: The caches that hold its text and that a pass was given, by their id.
        made: Those that the decoder has made itself, of which nobody has made use yet.
        done: Positions of it that have run.
    """

    def __init__(self, told: Announcement) -> None:
        self.told = told
        self.caches: dict[int, Any] = {} if told.cache is None else {id(told.cache): told.cache}
        self.made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.done = 0
        self._whole: Tensor | None = None  # its text, as a pass without a cache ran it last

    def owns(
        self, inputs: Mapping[str, Any], tokens: Tensor, ids: Tensor | None, mask: Any, start: int | Tensor
    ) -> bool:
        """Whether a pass runs the announced text.

        Args:
            inputs: Its arguments by name.
            tokens: What it reads, (batch, tokens, …).
            ids: The ids of it; None: it shows none.
            mask: Its mask in the form that shows padding.
            start: Position of its first token.
        """
        prompt = self.told.prompt
        if prompt is None:
            return False
        self.caches |= {
            id(value): value for value in inputs.values() if any(value is one for one in self.made.values())
        }
        known = bool(self.caches) and not self.caches.keys().isdisjoint(map(id, inputs.values()))
        if known and (isinstance(start, Tensor) or start > 0):
            return True
        found = next((value for value in inputs.values() if hasattr(type(value), "get_seq_length")), None)
        if not known and self.caches and not (self.told.assisted and found is not None):
            return False
        if found is None and self.done and tokens.shape[1] == 1 and carried(inputs):
            return True  # the state of a model that keeps no keys and values
        if tokens.shape[0] % prompt.batch or not self._begins(prompt, tokens, ids, start):
            return False
        if not self.done and not self.told.named and not _padded_alike(prompt, mask, tokens):
            return False
        if found is None:
            self._whole = tokens if ids is None else ids
        else:
            self.caches[id(found)] = found
        return True

    def shares(self, prompt: Prompt | None) -> bool:
        """Whether another generate inside this one proposes tokens of its text, as a model does that is its own assistant."""
        own = self.told.prompt
        if not self.told.assisted or own is None or own.ids is None or prompt is None or prompt.ids is None:
            return False
        return prompt.batch == own.batch and _equal(prompt.ids[:, : own.ids.shape[1]], own.ids)

    def _begins(self, prompt: Prompt, tokens: Tensor, ids: Tensor | None, start: int | Tensor) -> bool:
        """Whether the tokens of a pass are those with which the text begins."""
        first, length = not self.done, prompt.valid.shape[1]
        if self._whole is not None:
            seen = tokens if ids is None else ids
            if self.told.reorders and ids is not None:  # rows of beams have changed places behind the prompt
                return seen.shape[1] >= length and self._prompt_agrees(prompt, seen, length, 0)
            count = min(seen.shape[1], self._whole.shape[1])
            return seen.shape[1] >= length and _equal(seen[:, :count], self._whole[:, :count])
        if ids is None or prompt.ids is None:
            return first
        count = min(ids.shape[1], length)
        if count < length and not first:
            return False
        later = isinstance(start, int) and start > 0 and self._prompt_agrees(prompt, ids, count, start)
        return later or self._prompt_agrees(prompt, ids, count, 0)

    @staticmethod
    def _prompt_agrees(prompt: Prompt, ids: Tensor, count: int, start: int) -> bool:
        if prompt.ids is None:
            return True
        expected = prompt.ids.repeat_interleave(ids.shape[0] // prompt.batch, 0)[:, start : start + count]
        return _equal(ids[:, :count], expected)


class Texts:
    """Texts that generate has not announced and that run from their start again and again: each keeps its prompt."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Prompt]] = []

    def find(self, ids: Tensor, valid: Tensor) -> tuple[Prompt, int] | None:
        """The prompt of a text that has run before and is longer now, and how many of its tokens have run."""
        ids = ids.to("cpu", copy=True)
        for at, (before, prompt) in enumerate(self._known):
            held, length = before.shape[1], prompt.valid.shape[1]
            if held < ids.shape[1] and _equal(ids[:, :held], before) and _equal(valid[:, :length], prompt.valid):
                self._known[at] = ids, prompt
                return prompt, held
        return None

    def keep(self, ids: Tensor, prompt: Prompt) -> None:
        """A text runs for the first time."""
        self._known.append((ids.to("cpu", copy=True), prompt))


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other.to(one.device))


def carried(inputs: Mapping[str, Any]) -> bool:
    """Whether a pass is handed something that goes on from an earlier one."""
    return any(not isinstance(value, _PLAIN) for value in inputs.values())


def _padded_alike(prompt: Prompt, mask: Any, tokens: Tensor) -> bool:
    """Whether a pass that shows its padding has that of the prompt."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != tokens.shape[:2]:
        return True
    shown = valid_tokens(mask, mask.shape[0], mask.shape[1])
    valid = prompt.valid.repeat_interleave(tokens.shape[0] // prompt.batch, 0)
    return shown.shape == valid.shape and torch.equal(shown, valid)
