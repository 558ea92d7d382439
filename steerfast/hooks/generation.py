"""What a call of `generate`, or a forward pass, says about its prompt: length, padding, and how often rows are repeated."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.models.caches import cache_in
from steerfast.models.proof import given_tokens

from .bookkeeping import is_mapped
from .prompts import Prompt


def announced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Prompt, int]:
    """The prompt of a call of generate, padding included, and how often each of its rows will be repeated.

    Raises:
        ValueError: the prompt has no tokens, or its mask hides the padding.
        TypeError: the prompt is not a tensor.
    """
    call = _bound(model, args, kwargs)
    given = next((call[name] for name in ("inputs_embeds", "input_ids", "inputs") if call.get(name) is not None), None)
    beams, samples = (int(_setting(model, call, name) or 1) for name in ("num_beams", "num_return_sequences"))
    copies = max(beams, samples)
    if given is None:
        return Prompt.whole(1, 1), copies  # generate starts from the beginning-of-text token
    if not isinstance(given, Tensor) or given.dim() < 2:
        raise TypeError(
            f"steer: generate was given {type(given).__name__} as its prompt; expected a tensor (batch, tokens)"
        )
    batch, length = given.shape[:2]
    if batch == 0 or length == 0:
        raise ValueError("steer: the prompt has no tokens; give generate at least one")
    mask = call.get("attention_mask")
    if mask is None and not given.is_floating_point():
        mask = _inferred_mask(model, given, call)
    whole = _whole_length(call, mask, length)
    valid = None if mask is None else valid_tokens(mask, batch, whole)
    ids = given if whole == length and not given.is_floating_point() else None
    return replace(Prompt.whole(batch, whole, valid), ids=ids, reorders=beams > 1), copies


def valid_tokens(mask: Any, batch: int, length: int) -> Tensor:
    """A 2-D attention mask as bool on the CPU; without a mask nothing is padding.

    Raises:
        ValueError: the mask is not (batch, tokens), so that padding cannot be told.
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
    return mask.bool().cpu()


def by_name(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def tokens_of(inputs: dict[str, Any]) -> Tensor:
    """What a forward pass reads, (batch, tokens, …).

    Raises:
        TypeError: neither ids nor embeddings are among its arguments.
    """
    found = given_tokens(inputs)
    if found is None:
        raise TypeError(
            "steer: this forward pass shows neither input_ids nor inputs_embeds, so its tokens cannot be counted"
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
    for source in (call.get("generation_config"), getattr(model, "generation_config", None)):
        if call.get(name) is not None:
            return call[name]
        if getattr(source, name, None) is not None:
            return getattr(source, name)
    return call.get(name)


def _inferred_mask(model: nn.Module, ids: Tensor, call: dict[str, Any]) -> Tensor | None:
    """What generate itself assumes without a mask: the pad token is padding, unless it also ends a text."""
    pad, eos = _setting(model, call, "pad_token_id"), _setting(model, call, "eos_token_id")
    eos = set(eos) if isinstance(eos, (list, tuple)) else {eos}
    return None if pad is None or pad in eos else ids != pad
