"""The cache of keys and values that a forward pass is given or returns, known by what it is, never by its name.

transformers calls it `past_key_values` up to 5.23 and `cache` from 5.24 on; some models had names of their own. A cache
is whatever counts the tokens it holds: an object with `get_seq_length`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PAGED = {"read_index", "write_index"}
"""Arguments by which a forward pass of transformers' continuous batching is known; its cache counts no tokens."""


def cache_in(values: Mapping[str, Any]) -> tuple[str, Any] | None:
    """(name, cache) among the arguments of a call, or in the output of one; None where there is none."""
    for name, value in values.items():
        if hasattr(type(value), "get_seq_length") and _counts(value):
            return name, value
    return None


def first_keys(cache: Any) -> Tensor | None:
    """The keys of the first layer of a cache that holds any; a cache whose rows change places gets other ones."""
    own = getattr(cache, "self_attention_cache", cache)
    found = [getattr(layer, "keys", None) for layer in getattr(own, "layers", ())]
    found += getattr(own, "key_cache", ())  # hybrids of transformers 4; an empty tensor where a layer has none
    return next((keys for keys in found if isinstance(keys, Tensor) and keys.dim() > 1), None)


def keeps_cache(model: nn.Module, decoder: nn.Module) -> bool:
    """Whether a model hands its decoder a cache that counts its tokens, as signatures and configuration show.

    A state that is only carried on (Mamba, RWKV) does not tell how many tokens it has seen.
    """
    from transformers import DynamicCache

    if not any(_takes_cache(kind) for kind in {type(module) for module in (model, *decoder.modules())}):
        return False
    config: Any = model.config
    try:
        return _counts(DynamicCache(config=config.get_text_config(decoder=True)))
    except (AttributeError, KeyError, TypeError):  # the model builds a cache of a kind of its own
        return True


def past_length(inputs: Mapping[str, Any]) -> int | Tensor:
    """Tokens in the cache before this pass: a number, or a device tensor that must not be read on the host."""
    from transformers.cache_utils import Cache

    found, position = cache_in(inputs), inputs.get("cache_position")
    cache = None if found is None else found[1]
    if position is not None and not isinstance(cache, Cache):  # hybrids of transformers 4 miscount, or have no cache
        return position[0] if torch.compiler.is_compiling() else int(position[0])
    length = 0 if cache is None else cache.get_seq_length()
    if isinstance(length, Tensor) and not torch.compiler.is_compiling() and length.device.type == "cpu":
        return int(length)
    return length


def _counts(cache: Any) -> bool:
    try:
        cache.get_seq_length()
    except ValueError:  # none of its layers has keys and values
        return False
    return True


def _takes_cache(kind: type[nn.Module]) -> bool:
    """Whether an argument of a module's forward is annotated as a cache, alone or in a union."""
    annotations = [parameter.annotation for parameter in inspect.signature(kind.forward).parameters.values()]
    named = [name for annotation in annotations for name in (annotation, *typing.get_args(annotation))]
    return any(hasattr(name, "get_seq_length") or (isinstance(name, str) and "Cache" in name) for name in named)
