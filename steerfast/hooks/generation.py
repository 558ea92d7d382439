"""What a call of `generate`, or a forward pass, says about its prompt: length, padding, and how often rows are repeated."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.models.caches import cache_in
from steerfast.models.proof import given_tokens

from .bookkeeping import is_mapped
from .prompts import Prompt

_PROMPTS = ("inputs_embeds", "input_ids", "inputs")
"""What generate calls its prompt."""
_ENDS = ("stopping_criteria", "stop_strings")
"""What can end one row before the others, beside the tokens of `eos`."""
_DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")
"""What makes generate propose tokens before it knows them."""


@dataclass(frozen=True, eq=False)
class Announcement:
    """What a call of generate says about its batch.

    Attributes:
        prompt: The batch of prompts; None: the arguments do not show it, its first pass will.
        copies: How often each of its rows will be repeated.
        reorders: Whether rows may change places, as beams do.
        named: Whether the prompt and its mask have the names that generate gives them; if not, the first pass is asked.
        assisted: Whether the model proposes tokens to itself, in a cache of their own.
        drafts: Whether tokens are proposed, of which some are taken back.
        guided: Whether a second text runs beside each prompt.
        cache: The cache that generate was handed.
        eos: The tokens that end a row.
        pad: The token that rows are filled with behind their end; None: only `eos` ends a row, and what follows is known.
    """

    prompt: Prompt | None
    copies: int = 1
    reorders: bool = False
    named: bool = True
    assisted: bool = False
    drafts: bool = False
    guided: bool = False
    cache: Any = None
    eos: tuple[int, ...] = ()
    pad: int | None = None


def announced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Announcement:
    """The prompt of a call of generate, padding included, and how its passes will run it.

    Raises:
        ValueError: the prompt has no tokens, or its mask hides the padding.
        TypeError: the prompt is not a tensor.
    """
    call = _bound(model, args, kwargs)
    given = next((call[name] for name in _PROMPTS if call.get(name) is not None), None)
    named = given is not None
    if given is not None and not (isinstance(given, Tensor) and given.dim() >= 2):
        raise TypeError(
            f"steer: generate was given {type(given).__name__} as its prompt; expected a tensor (batch, tokens)"
        )
    prompt = _prompt(model, call, _only_ids(model, call) if given is None else given)
    beams, samples = (int(_setting(model, call, name) or 1) for name in ("num_beams", "num_return_sequences"))
    if prompt is None and _setting(model, call, "prefill_chunk_size"):
        raise ValueError(
            "steer: prefill_chunk_size runs a prompt in parts, and the arguments of generate do not show where it ends; pass it "
            "as input_ids"
        )
    found, helper = cache_in(call), call.get("assistant_model")
    eos, pad = (_token_ids(_setting(model, call, name)) for name in ("eos_token_id", "pad_token_id"))
    return Announcement(
        None if prompt is None else replace(prompt, reorders=beams > 1),
        copies=max(beams, samples),
        reorders=beams > 1,
        named=named,
        assisted=(helper is not None and getattr(helper, "_orig_mod", helper) is model)
        or bool(_setting(model, call, "assistant_early_exit")),
        drafts=any(_setting(model, call, name) for name in _DRAFTS),
        guided=_setting(model, call, "guidance_scale") not in (None, 1),
        cache=None if found is None else found[1],
        eos=eos,
        pad=next(iter(pad or eos), None) if any(_setting(model, call, name) for name in _ENDS) else None,
    )


def _prompt(model: nn.Module, call: dict[str, Any], given: Tensor | None) -> Prompt | None:
    """What the arguments of generate say about its prompt; None: nothing."""
    if given is None or (given.is_floating_point() and given.dim() != 3):  # an image
        return None
    batch, length = given.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError("steer: the prompt has no tokens; give generate at least one")
    mask = call.get("attention_mask")
    if mask is None and not given.is_floating_point():
        mask = _inferred_mask(model, given, call)
    whole = _whole_length(call, mask, length)
    valid = None if mask is None else valid_tokens(mask, batch, whole)
    shows = whole == length and given.dim() == 2
    return replace(Prompt.whole(batch, whole, valid), ids=given if shows else None)


def _only_ids(model: nn.Module, call: dict[str, Any]) -> Tensor | None:
    """The one argument that can be the prompt's ids, where a model's own generate gives it a name of its own."""
    from transformers import GenerationMixin

    others = {*inspect.signature(GenerationMixin.generate).parameters, *inspect.signature(model.forward).parameters}
    found = [value for name, value in call.items() if name not in others and "mask" not in name and _is_ids(value)]
    return found[0] if len(found) == 1 else None


def _is_ids(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and value.dtype in (torch.int64, torch.int32)


def valid_tokens(mask: Any, batch: int, length: int) -> Tensor:
    """A 2-D attention mask as bool on the CPU; without a mask nothing is padding.

    Raises:
        ValueError: the mask is not (batch, tokens), or does not cover them, so that padding cannot be told.
    """
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device="cpu")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            "steer: this forward pass comes with a prepared attention mask, which hides its padding; pass the 2-D mask "
            "(batch, tokens), or use generate"
        )
    if is_mapped(mask):
        raise ValueError(
            "steer: torch.vmap maps over the attention mask, so the host cannot see which tokens are padding; map over "
            "inputs of one mask, or run the rows as a batch"
        )
    if mask.shape[0] not in (1, batch) or mask.shape[1] < length:
        raise ValueError(
            f"steer: the attention mask is {tuple(mask.shape)} for {batch} rows of {length} tokens, those in the cache included; "
            "which of them are padding it does not say: pass a mask (batch, tokens) that covers them all"
        )
    return mask[:, :length].expand(batch, -1).bool().cpu()  # what a wider one says is of tokens that have not come


def by_name(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """What a forward pass reads, (batch, tokens, …).

    Raises:
        TypeError: neither ids nor embeddings are among its arguments.
        ValueError: they are not a batch of tokens.
    """
    found = given_tokens(inputs)
    if found is None:
        raise TypeError(
            "steer: this forward pass shows neither input_ids nor inputs_embeds, so its tokens cannot be counted"
        )
    if found.dim() < 2 or 0 in found.shape[:2]:
        raise ValueError(
            f"steer: this forward pass is given a tensor of shape {tuple(found.shape)}; expected (batch, tokens) with at least "
            "one token"
        )
    return found


def _bound(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, wherever they stood."""
    names = [name for name in inspect.signature(type(model).generate).parameters if name != "self"]  # type: ignore[attr-defined]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _whole_length(call: dict[str, Any], mask: Any, length: int) -> int:
    """Tokens of the whole prompt: beside a cache, generate may be given only what is new, with the mask of everything."""
    found = cache_in(call)
    held = 0 if found is None else int(found[1].get_seq_length())
    if not held or not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] == length:
        if held >= length:
            raise ValueError(
                f"steer: generate was given a cache of {held} tokens and a prompt of {length}; pass the whole prompt, or the "
                "new tokens with the attention_mask of all"
            )
        return length
    if mask.shape[1] != held + length:
        raise ValueError(
            f"steer: generate was given a cache of {held} tokens, {length} ids and a mask of {mask.shape[1]}; the mask must "
            "cover the ids, or the cache and the ids"
        )
    return held + length


def _setting(model: nn.Module, call: dict[str, Any], name: str) -> Any:
    """A setting as generate resolves it: its own argument, the given configuration, the model's."""
    if name in call:  # None, too: it switches off what a configuration says
        return call[name]
    for source in (call.get("generation_config"), getattr(model, "generation_config", None)):
        if getattr(source, name, None) is not None:
            return getattr(source, name)
    return None


def _token_ids(value: Any) -> tuple[int, ...]:
    """A setting that names a token, several, or none."""
    given = value.tolist() if isinstance(value, Tensor) else value
    return () if given is None else tuple(int(one) for one in (given if isinstance(given, (list, tuple)) else [given]))


def _inferred_mask(model: nn.Module, ids: Tensor, call: dict[str, Any]) -> Tensor | None:
    """What generate itself assumes without a mask: the pad token is padding, unless it also ends a text."""
    pad, eos = (_token_ids(_setting(model, call, name)) for name in ("pad_token_id", "eos_token_id"))
    return None if not pad or pad[0] in eos else ids != pad[0]
