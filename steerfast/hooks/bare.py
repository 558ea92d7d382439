"""Bare passes: texts that nobody has announced. What of them was a prompt is known by the cache that its pass has filled.

Between two passes a caller may take tokens out of a cache or hand its rows to one another, and a later pass may bring padding
of its own. Each of these is looked at where it can matter, and what then cannot be said any more is refused by its name.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._positions import Selector
from steerfast.models.caches import cache_in, first_keys
from steerfast.models.proof import Proof
from steerfast.plan import needs_prompt, rule_of

from .attachment import Attachment
from .bookkeeping import is_mapped
from .call import Call
from .compiled import lengths_per_row
from .generation import valid_tokens
from .prompts import Prompt
from .texts import mark_of, unmoved

_PACKED = ("cu_seq_lens_q", "cu_seqlens", "seq_idx")
"""What says where the documents of a row begin, beside position ids that start again."""


@dataclass(frozen=True, eq=False)
class Filled:
    """Whose text a cache holds, and how its last pass has left it."""

    prompt: Prompt
    mark: tuple[int, int] | None  # of its counter, where that is a tensor
    reached: int | None  # tokens in it; None: only the device knows
    keys: weakref.ref[Tensor] | None  # its first ones, which are others once rows have changed places


class BareTexts:
    """The texts of bare passes, by the caches that hold them."""

    def __init__(self, model: nn.Module, proof: Proof) -> None:
        self._model, self._proof = model, proof
        self._filled: weakref.WeakKeyDictionary[Any, Filled] = weakref.WeakKeyDictionary()

    def clear(self) -> None:
        """Forget them all."""
        self._filled.clear()

    def keep(self, prompt: Prompt, cache: Any) -> None:
        """A pass over this prompt, or behind it, has filled a cache."""
        counter, keys = cache.get_seq_length(), first_keys(cache)
        reached = counter if isinstance(counter, int) else None
        self._filled[cache] = Filled(prompt, mark_of(counter), reached, None if keys is None else weakref.ref(keys))

    def prompt(
        self,
        call: Call,
        attachments: Sequence[Attachment],
        inputs: Mapping[str, Any],
        mask: Any,
        ids: Tensor | None,
        start: int | Tensor,
        remembers: bool,
    ) -> Prompt:
        """The prompt of the text that a pass runs.

        Args:
            call: Of its thread; gets the position of the pass, and what of a text has been counted.
            attachments: What is attached.
            inputs: The pass's arguments by name.
            mask: Its mask in the form that shows padding.
            ids: Its tokens; None: it shows none.
            start: The position of its first token; a tensor is its cache's own counter.
            remembers: Whether something attached goes on from what it saw of a text before.
        """
        (batch, count), found = call.shape, cache_in(inputs)
        filled = None if found is None else self._filled.get(found[1])
        if filled is not None and filled.prompt.batch != batch:
            filled = None
        if isinstance(start, Tensor):  # read once per prompt: a static cache that we have not seen may be empty or not
            start = start.clone() if filled is not None and unmoved(start, filled.mark, count) else int(start)
        call.start, call.seen = start, 0
        if found is not None and filled is not None and (isinstance(start, Tensor) or start > 0):
            known = _as_left(filled, found[1], start)
            if known is not None:
                return _with_padding(known, mask, start, count)
        return self._new(call, attachments, inputs, mask, ids, int(start), remembers)

    def _new(
        self,
        call: Call,
        attachments: Sequence[Attachment],
        inputs: Mapping[str, Any],
        mask: Any,
        ids: Tensor | None,
        start: int,
        remembers: bool,
    ) -> Prompt:
        """The prompt that a pass shows itself."""
        (batch, count), found = call.shape, cache_in(inputs)
        placed = _placed(attachments, remembers)
        if placed is not None and mask is None and found is None and is_packed(inputs):
            raise ValueError(
                f"steer: a row of this pass holds several documents (its position_ids start again), and {placed} asks where in "
                "one text a token stands; use positions='all' or ids:, or a row for each document"
            )
        if placed is not None and call.texts is None:
            self._refuse_kept_generate()
        virtual = self._proof.virtual if start == 0 and call.given_ids is not None else 0
        if isinstance(mask, Tensor) and mask.dim() == 2 and virtual and mask.shape[1] == start + count:
            mask = mask[:, virtual:]
        valid = valid_tokens(mask, batch, start + count - virtual)
        texts = call.texts if found is None and ids is not None and not virtual else None
        longer = None if texts is None or ids is None else texts.find(ids, valid)
        if longer is not None:
            prompt, call.seen = longer
            return prompt
        given = next((one.prompt_length for one in attachments if one.prompt_length is not None), None)
        if given is None:
            here = torch.arange(1, valid.shape[1] + 1, device="cpu")
            lengths = None if start > 0 else torch.where(valid, here, 0).amax(1)
        else:
            lengths = lengths_per_row(given, batch)
            valid = nn.functional.pad(valid, (0, max(0, int(lengths.max()) - valid.shape[1])), value=True)
        prompt = Prompt(valid, lengths, reorders=call.reorders)
        prompt = prompt.behind(virtual) if virtual else prompt
        if texts is not None and ids is not None:
            texts.keep(ids, prompt)
        return prompt

    def _refuse_kept_generate(self) -> None:
        """Refuse the passes of a `generate` of this model that was not called by its own name, and so has announced nothing."""
        generate = getattr(type(self._model), "generate", None)
        code = None if generate is None else getattr(inspect.unwrap(generate), "__code__", None)
        frame = sys._getframe()
        while frame is not None and code is not None:
            if frame.f_code is code and frame.f_locals.get("self") is self._model:
                raise RuntimeError(
                    "steer: this generate was taken from the model before it was steered, so where its prompt ends has not been "
                    "announced; call model.generate while the plan is active"
                )
            frame = frame.f_back  # type: ignore[assignment]


def _as_left(filled: Filled, cache: Any, start: int | Tensor) -> Prompt | None:
    """The prompt of a cache's text, if the cache still holds it; None: tokens of it have been taken out."""
    prompt, reached = filled.prompt, filled.reached
    if isinstance(start, int) and reached is not None and start < min(reached, prompt.valid.shape[1]):
        return None
    moved = filled.keys is not None and filled.keys() is not first_keys(cache)
    if moved and prompt.batch > 1 and not prompt.reorders and (isinstance(start, Tensor) or start == reached):
        return replace(prompt, reorders=True, ids=None, memories={})
    return prompt


def _with_padding(prompt: Prompt, mask: Any, start: int | Tensor, count: int) -> Prompt:
    """The same prompt with the padding that a later pass shows among its own tokens."""
    length = prompt.valid.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or prompt.virtual or is_mapped(mask):
        return prompt
    if count == 1 and (isinstance(start, Tensor) or start >= length):  # a step of decoding does not wait for its device
        return prompt
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return prompt
    start = int(start)
    stop = start + count
    if mask.shape[0] not in (1, prompt.batch) or mask.shape[1] < stop:
        return prompt
    shown = valid_tokens(mask, prompt.batch, stop)
    valid = nn.functional.pad(prompt.valid, (0, max(0, stop - length)), value=True)
    if torch.equal(valid[:, start:stop], shown[:, start:]):
        return prompt
    valid[:, start:stop] = shown[:, start:]
    return replace(prompt, valid=valid)


def is_packed(inputs: Mapping[str, Any]) -> bool:
    """Whether a row of a pass without a mask and a cache holds several documents, as transformers tells them apart."""
    if any(inputs.get(name) is not None for name in _PACKED):
        return True
    at = inputs.get("position_ids")
    if isinstance(at, Tensor) and at.dim() == 3 and at.shape[0] == 4:  # the first of four are the text's
        at = at[0]
    if not isinstance(at, Tensor) or at.dim() != 2 or at.shape[1] < 2 or is_mapped(at):
        return False
    return bool((at[:, 1:] - at[:, :-1] != 1).any())


def _placed(attachments: Sequence[Attachment], remembers: bool) -> str | None:
    """What is attached that asks where in its text a token stands, or which came before; None: nothing does."""
    for one in attachments:
        for plan in one.plans:
            if plan is None:
                continue
            rule = rule_of(plan)
            if (what := needs_prompt(plan)) or (isinstance(rule, Selector) and rule.remembers):
                return what or f"positions={plan.positions!r}"
        if one.latched:
            return "a condition that is decided at the last prompt token"
    return "what is read of a text, or goes by its earlier tokens," if remembers else None
