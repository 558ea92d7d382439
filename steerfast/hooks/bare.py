"""Bare passes: texts that nobody has announced. What of them was a prompt is known by the cache that its pass has filled.

Between two passes a caller may take tokens out of a cache or hand its rows to one another, and a later pass may bring padding
of its own. Each of these is looked at where it can matter, and what then cannot be said any more is refused by its name.
"""

from __future__ import annotations

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
from .compiled import counts_from_the_end, lengths_per_row
from .frames import is_in_its_generate
from .generation import valid_tokens
from .prompts import Prompt, last_tokens
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
    numbers: Tensor | None  # one of these for each row and position, to tell moved rows from other changes


class BareTexts:
    """The texts of bare passes, by the caches that hold them."""

    def __init__(self, model: nn.Module, proof: Proof) -> None:
        self._model, self._proof = model, proof
        self._filled: weakref.WeakKeyDictionary[Any, Filled] = weakref.WeakKeyDictionary()

    def clear(self) -> None:
        """Forget them all."""
        self._filled.clear()

    def keep(self, call: Call, prompt: Prompt, cache: Any) -> None:
        """A pass over this prompt, or behind it, has filled a cache."""
        keys, before, count = first_keys(cache), self._filled.get(cache), call.shape[1]
        reached = call.start + count if isinstance(call.start, int) else None
        goes_on = count == 1 and before is not None and prompt.is_text_of(before.prompt)
        numbers = before.numbers if goes_on and before is not None else _numbers(keys, reached)
        known = None if keys is None else weakref.ref(keys)
        self._filled[cache] = Filled(prompt, mark_of(cache.get_seq_length()), reached, known, numbers)

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
            known = self._as_left(filled, attachments, found[1], start)
            return _with_padding(known, attachments, mask, start, count)
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
        given = _given(attachments)
        placed = _placed(attachments, remembers)
        if placed is not None and mask is None and found is None and self._is_packed(inputs):
            raise ValueError(
                f"steer: a row of this pass holds several documents (its position_ids are not one run), and {placed} asks where "
                "in one text a token stands; use positions='all' or ids:, or a row for each document"
            )
        if placed is not None and given is None and call.texts is None and is_in_its_generate(self._model):
            raise RuntimeError(
                "steer: this generate was taken from the model before it was steered, so where its prompt ends has not been "
                "announced; call model.generate while the plan is active"
            )
        virtual = self._proof.virtual if start == 0 and call.given_ids is not None else 0
        if isinstance(mask, Tensor) and mask.dim() == 2 and virtual and mask.shape[1] == start + count:
            mask = mask[:, virtual:]
        valid = valid_tokens(mask, batch, start + count - virtual)
        texts = call.texts if found is None and ids is not None and not virtual else None
        longer = None if texts is None or ids is None else texts.find(ids, valid)
        if longer is not None:
            prompt, call.seen = longer
            return prompt
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

    def _as_left(self, filled: Filled, attachments: Sequence[Attachment], cache: Any, start: int | Tensor) -> Prompt:
        """The prompt of a cache's text as the cache holds it now: tokens may be gone, and rows in other places.

        Raises:
            ValueError: rows that have plans, masks or lengths of their own have changed places.
        """
        prompt, reached, numbers = filled.prompt, filled.reached, filled.numbers
        cut = isinstance(start, int) and (reached is None or start < reached)
        if cut:
            numbers = None if numbers is None else numbers[:, :start]
            self._filled[cache] = replace(filled, numbers=numbers)
        if prompt.batch > 1 and not prompt.moved and _is_moved(filled.keys, numbers, first_keys(cache), cut):
            if any(one.by_row and not one.reads for one in attachments):
                raise ValueError(
                    "steer: rows of this cache have changed places, and each has a plan, a mask or a prompt_length of its own; "
                    "which is whose is not known any more: steer the rows in their new order from the start of the text"
                )
            prompt = replace(prompt, moved=True, reorders=True)
        if not isinstance(start, int) or not cut:
            return prompt
        starts, valid = prompt.starts, prompt.valid[:, :start]
        if starts is not None and start < int(starts.max()):  # what is left of a prompt says no more where it ends
            given = _given(attachments)
            starts = None if given is None else lengths_per_row(given, prompt.batch)
        if starts is not None:
            valid = nn.functional.pad(valid, (0, max(0, int(starts.max()) - start)), value=True)
        return replace(prompt, valid=valid, starts=starts)

    def _is_packed(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a row of a pass without a mask holds several documents, as transformers tells them apart.

        It does so by position ids where the pass makes no cache, and its kernels of flash attention always.
        """
        if any(inputs.get(name) is not None for name in _PACKED):
            return True
        config: Any = self._model.config
        uses = inputs.get("use_cache")
        uses = getattr(config, "use_cache", False) if uses is None else uses
        if uses and "flash" not in str(getattr(config, "_attn_implementation", "")):
            return False
        at = inputs.get("position_ids")
        if isinstance(at, Tensor) and at.dim() == 3 and at.shape[0] == 4:  # the first of four are the text's
            at = at[0]
        if not isinstance(at, Tensor) or at.dim() != 2 or at.shape[1] < 2 or is_mapped(at) or _is_captured(at):
            return False
        return bool((at[:, 1:] - at[:, :-1] != 1).any())


def _given(attachments: Sequence[Attachment]) -> tuple[int, ...] | None:
    """The prompt's length as it was given."""
    return next((one.prompt_length for one in attachments if one.prompt_length is not None), None)


def _numbers(keys: Tensor | None, reached: int | None) -> Tensor | None:
    """One number of each key, (batch, positions), by which a row is known again; None: not all positions are there."""
    if keys is None or keys.dim() != 4 or reached is None or keys.shape[2] < reached:
        return None
    return keys.detach()[:, 0, :reached, 0].clone()


def _is_moved(before: weakref.ref[Tensor] | None, numbers: Tensor | None, now: Tensor | None, cut: bool) -> bool:
    """Whether rows of a cache have changed places since its keys were `before`."""
    if before is None or before() is now:
        return False
    if numbers is None or now is None or now.dim() != 4 or now.shape[2] < numbers.shape[1]:
        return not cut
    alike = len(numbers.unique(dim=0)) < len(numbers)  # rows of one text: which is which cannot be seen
    same = torch.equal(now[:, 0, : numbers.shape[1], 0].to(numbers), numbers)
    return not same or (alike and not cut)


def _with_padding(
    prompt: Prompt, attachments: Sequence[Attachment], mask: Any, start: int | Tensor, count: int
) -> Prompt:
    """The same prompt with the padding that a later pass shows among its own tokens.

    Raises:
        ValueError: a row's prompt has ended before this pass, and something counts from its end.
    """
    length = prompt.valid.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2 or prompt.virtual or is_mapped(mask):
        return prompt
    if count == 1 and (isinstance(start, Tensor) or start >= length):  # a step of decoding does not wait for its device
        return prompt
    if _is_captured(mask):
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
    padded = replace(prompt, valid=valid)
    late = (last_tokens(prompt) >= start) & (last_tokens(padded) < start)
    if bool(late.any()) and any(map(counts_from_the_end, attachments)):
        raise ValueError(
            f"steer: prompt {int(late.nonzero()[0])} has ended before this pass, as its attention_mask shows only now, and "
            "positions or a condition that count from its end have been passed by; give a prompt_length= for each row"
        )
    return padded


def _is_captured(tensor: Tensor) -> bool:
    """Whether a graph is being captured, in which nothing can be read from its device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


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
