"""Directions from pairs of texts, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from steerfast._checks import one_of
from steerfast.models.collect import collect

from . import extract
from .sets import DirectionSet


def directions_from(
    model: nn.Module,
    tokenizer: Any,
    pairs: Iterable[tuple[Any, Any]],
    layers: Any = None,
    method: str = "mean_difference",
    *,
    position: str | int = "last",
    site: str = "resid_post",
    normalize: bool = False,
) -> DirectionSet:
    """Read a model's activations on pairs of texts and make one direction per layer of them: `collect` and `extract`.

    Args:
        model: A transformers causal language model.
        tokenizer: Its tokenizer.
        pairs: (text with the property, text without it), strings or chats, one or more.
        layers: 0-based, negative from the end: one, several, or a slice; None: all.
        method: A function of `sf.extract`: "mean_difference", "difference", "pca" or "logistic".
        position: Which token is read: "last", "mean", "all" or an index, as in `collect`.
        site: Where it is read, as in `collect`.
        normalize: Scale every direction to length 1.

    Returns:
        The directions by name ("resid_post.8"), each float32 (d,); `.plan(strength)` makes a plan of them.

    Raises:
        TypeError, ValueError: pairs that are none, an unknown method, or what `collect` and the method refuse.

    Example:
        >>> pairs = [("I love you", "I hate you"), ("What a joy", "What a pain")]
        >>> vectors = sf.directions_from(model, tokenizer, pairs, layers=[8])
        >>> vectors.plan(strength=2.0)
        Plan(resid_post 8: Add; positions='all')
    """
    one_of("directions_from", "method", method, extract.METHODS)
    sides = _sides(pairs)
    chosen = slice(None) if layers is None else layers
    pos, neg = (collect(model, tokenizer, side, chosen, position, site, progress=False) for side in sides)
    return DirectionSet(getattr(extract, method)(pos, neg, normalize=normalize), model)


def _sides(pairs: Any) -> tuple[list[Any], list[Any]]:
    """The texts with the property, and those without it."""
    given = None if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable) else list(pairs)
    if given is None:
        raise TypeError(f"directions_from: pairs is {pairs!r}; expected a list of (positive, negative) texts")
    if not given:
        raise ValueError("directions_from: pairs is empty; give at least one (positive, negative)")
    for pair in given:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"directions_from: {pair!r} is no pair; expected (positive, negative)")
    return [pair[0] for pair in given], [pair[1] for pair in given]
