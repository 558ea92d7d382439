"""Activations of a model on prompts, and directions from them.

`collect` reads a site of some layers on many texts. `difference`, `mean_difference`, `pca` and `logistic` turn two
sides of activations into a `Direction` per layer; `prompt_difference` runs two prompts and keeps a row per token. All
arithmetic on the sides is float64; what is stored is float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from steerfast._checks import finite_number
from steerfast.barriers.kernels import linear_weights, scikit_learn
from steerfast.models.collect import Activations, check_same_origin, collect
from steerfast.models.texts import TextReader
from steerfast.place import Origin, place_of, typical_norm_of

from .direction import ROUNDING, Direction, direction_matrix, orthogonal_to

METHODS = ("mean_difference", "difference", "pca", "logistic")
Side: TypeAlias = Tensor | Mapping[int, Tensor]
Directions: TypeAlias = (
    Any  # a Direction, or for several layers dict[int, Direction]: the data decide, no type can say it
)
_Method = Callable[[Tensor, Tensor], Tensor]


def difference(pos: Side, neg: Side, *, normalize: bool = False, project_out: Any = None) -> Directions:
    """Return the mean difference of pairs: row i of `pos` against row i of `neg`.

        v = 1/n · Σᵢ (posᵢ − negᵢ)

    The value is that of `mean_difference`; the pairing is checked. One pair is love − hate as one vector for every token;
    activation addition as published keeps a row per token: `prompt_difference`.

    Args:
        pos: activations with the property, a tensor (n, d) or (d,), or `Activations`.
        neg: activations without it, the same layers, site and number of rows.
        normalize: scale to norm 1; the original norm stays in `norm`.
        project_out: directions to remove from the result, a vector (d,) or rows (m, d).

    Returns:
        The direction; for activations of several layers a dict of layer -> direction.

    Raises:
        ValueError: sides that do not match, without rows, with NaN or Inf, or that do not differ.

    Reference:
        Turner et al. 2023, Activation Addition, arXiv:2308.10248.

    Example:
        >>> acts = sf.collect(model, tokenizer, ["Love", "Hate"], layers=[8])
        >>> v = sf.extract.difference(acts[8][0], acts[8][1])
        >>> plan = sf.Plan({8: sf.Add(v, 4.0)})
    """
    return _extract("difference", _mean_difference, pos, neg, normalize, project_out, paired=True)


def prompt_difference(
    model: nn.Module, tokenizer: Any, prompt: str, against: str, layer: int, *, site: str = "resid_post"
) -> Tensor:
    """Return the difference of two prompts' activations, token by token: activation addition as published.

        V_i = x_i(prompt) − x_i(against),   i = 0 … T − 1,   T the number of tokens of the longer prompt

    `Add(V, c)` adds c·V_i to token i of the prompt that is steered, whatever stands there, and nothing behind it. Both
    prompts are read with the special tokens that the tokenizer puts in front (an end-of-text token behind is left out). The
    shorter one is padded on the right with the token of one space, as in the paper's code, or, where a tokenizer has no such
    token, with its padding token or else its end-of-text token; the model reads the padding as text. Where both prompts
    begin alike, as with one beginning-of-text token, the rows are zero, and `Add` leaves those tokens bit for bit as they
    are.

    A tokenizer that puts nothing in front, such as that of GPT-2, makes row 0 the first word's. The paper's GPT-2 saw
    "<|endoftext|>" in front of every text; to do so, write it in front of both prompts and of every text that is steered.

    Args:
        model: a `transformers` causal language model.
        tokenizer: its tokenizer.
        prompt: the text to steer toward, such as "Love".
        against: the text to steer away from, such as "Hate"; "" for the paper's empty prompt.
        layer: the layer, 0-based, negative from the end; give the plan the same.
        site: as in `collect`; give the plan the same. The paper's layer l is read and steered where block l begins:
            "resid_pre" of l, or "resid_post" of l − 1.

    Returns:
        V, a float32 CPU tensor (T, d): no `Direction`, which is one vector for any token.

    Raises:
        TypeError: a prompt is not a string; model or tokenizer of the wrong type.
        ValueError: no prompt has a token, they have the same tokens, or their activations do not differ; an unknown layer
            or site; a tokenizer without any token to pad with.

    Reference:
        Turner et al. 2023, Activation Addition, arXiv:2308.10248, algorithm 1.

    Example:
        >>> V = sf.extract.prompt_difference(model, tokenizer, "Love", "Hate", layer=8)
        >>> plan = sf.Plan({8: sf.Add(V, 5.0)})
    """
    reader = TextReader.of(tokenizer, "prompt_difference")
    for name, text in (("prompt", prompt), ("against", against)):
        if not isinstance(text, str):
            raise TypeError(f"prompt_difference: {name} must be one text; got {type(text).__name__}")
    sides = [reader.beginning(text) for text in (prompt, against)]
    length = max(map(len, sides))
    if len(sides[0]) != len(sides[1]):
        filler = _padding_token(reader)
        sides = [ids + [filler] * (length - len(ids)) for ids in sides]
    if sides[0] == sides[1]:
        raise ValueError(f"prompt_difference: both prompts are the tokens {sides[0]}; give two different ones")
    tokens = [torch.tensor([ids], device="cpu") for ids in sides]
    inputs = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in tokens]
    (rows,) = collect(model, layers=[layer], position="all", site=site, inputs=inputs, progress=False).values()
    plus, minus = rows.double().split(length)
    difference = plus - minus
    alike = [mine == other for mine, other in zip(*sides, strict=True)].index(False)
    difference[:alike] = 0.0  # a token sees nothing behind it: what is left there is rounding
    if difference.norm(dim=1).max() <= ROUNDING * typical_norm_of(rows):
        raise ValueError(
            f"prompt_difference: the activations of {prompt!r} and {against!r} do not differ at {site} {layer}"
        )
    return difference.float()


def _padding_token(reader: TextReader) -> int:
    """The token of a space, or the tokenizer's own padding."""
    space = reader.inside(" ")
    if len(space) == 1:
        return space[0]
    for name in ("pad_token_id", "eos_token_id"):
        if (token := getattr(reader.tokenizer, name, None)) is not None:
            return int(token)
    raise ValueError(
        "prompt_difference: the prompts differ in length, and this tokenizer has neither one token for a space nor a padding "
        "token; give prompts of equal length, or set tokenizer.pad_token"
    )


def mean_difference(pos: Side, neg: Side, *, normalize: bool = False, project_out: Any = None) -> Directions:
    """Return the difference of the two sides' means; they may have different numbers of rows.

        v = mean(pos) − mean(neg)

    Args:
        pos: activations with the property, a tensor (n, d) or (d,), or `Activations`.
        neg: activations without it, (m, d), the same layers and site.
        normalize: scale to norm 1; the original norm stays in `norm`.
        project_out: directions to remove from the result, a vector (d,) or rows (m, d).

    Returns:
        The direction; for activations of several layers a dict of layer -> direction.

    Raises:
        ValueError: sides that do not match, without rows, with NaN or Inf, or that do not differ.

    Reference:
        Rimsky et al. 2023, Contrastive Activation Addition, arXiv:2312.06681; Arditi et al. 2024, refusal direction,
        arXiv:2406.11717.

    Example:
        >>> pos = sf.collect(model, tokenizer, kind_texts, layers=[14])
        >>> neg = sf.collect(model, tokenizer, rude_texts, layers=[14])
        >>> v = sf.extract.mean_difference(pos, neg)
    """
    return _extract("mean_difference", _mean_difference, pos, neg, normalize, project_out)


def pca(pos: Side, neg: Side, *, normalize: bool = False, project_out: Any = None) -> Directions:
    """Return the first principal component of the paired differences, pointing from `neg` to `pos`.

        v = argmax over ‖v‖ = 1 of Σᵢ ((posᵢ − negᵢ)·v)², with the sign for which the mean of (posᵢ − negᵢ)·v is
        positive

    Each pair is centred on its own middle; the mean difference is *not* subtracted, since it is what one looks for.
    This is the convention of steering-vectors' `pca_aggregator` and of repeng's `pca_center`; repeng's default
    `pca_diff` subtracts the mean difference as well.

    Args:
        pos: activations with the property, a tensor (n, d) or (d,), or `Activations`.
        neg: activations without it, the same layers, site and number of rows.
        normalize: scale to norm 1; a component has norm 1 already, so this matters only after `project_out`.
        project_out: directions to remove from the result, a vector (d,) or rows (m, d).

    Returns:
        The direction, of norm 1; for activations of several layers a dict of layer -> direction.

    Raises:
        ValueError: sides that do not match, without rows, with NaN or Inf, or that do not differ.

    Reference:
        Zou et al. 2023, Representation Engineering, arXiv:2310.01405.

    Example:
        >>> pos = sf.collect(model, tokenizer, happy_texts, layers=range(10, 20))
        >>> neg = sf.collect(model, tokenizer, sad_texts, layers=range(10, 20))
        >>> directions = sf.extract.pca(pos, neg)
    """
    return _extract("pca", _first_component, pos, neg, normalize, project_out, paired=True)


def logistic(pos: Side, neg: Side, *, C: float = 1.0, normalize: bool = False, project_out: Any = None) -> Directions:
    """Return the weight of a logistic regression that tells `pos` from `neg`, in units of log-odds per unit of
    activation.

        log p(pos | x) / p(neg | x) = v·x + b,   penalty ‖s·v‖² / 2C,   s = root mean square of the centred activations

    The activations are centred and divided by the one number s, so `C` means the same whatever their unit; v is in
    the original unit.

    Args:
        pos: activations with the property, a tensor (n, d) or (d,), or `Activations`.
        neg: activations without it, (m, d), the same layers and site.
        C: inverse strength of the L2 penalty, as in scikit-learn.
        normalize: scale to norm 1; the original norm stays in `norm`.
        project_out: directions to remove from the result, a vector (d,) or rows (m, d).

    Returns:
        The direction; for activations of several layers a dict of layer -> direction.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        TypeError, ValueError: C is no positive number; sides that do not match, without rows, with NaN or Inf, or that do not
            differ.

    Reference:
        Li et al. 2023, Inference-Time Intervention, arXiv:2306.03341.

    Example:
        >>> pos = sf.collect(model, tokenizer, true_statements, layers=[12])
        >>> neg = sf.collect(model, tokenizer, false_statements, layers=[12])
        >>> v = sf.extract.logistic(pos, neg, C=0.1, normalize=True)
    """
    C = finite_number("logistic", "C", C)
    if C <= 0:
        raise ValueError(f"logistic: C must be positive, got {C}")
    scikit_learn("logistic")

    def weight(p: Tensor, n: Tensor) -> Tensor:
        x = torch.cat([p, n])
        x = x - x.mean(0)
        scale = x.square().mean().sqrt()
        labels = torch.arange(len(x), device="cpu") < len(p)
        return linear_weights(x / scale, labels, C)[0] / scale

    return _extract("logistic", weight, pos, neg, normalize, project_out)


def _mean_difference(p: Tensor, n: Tensor) -> Tensor:
    return p.mean(0) - n.mean(0)


def _first_component(p: Tensor, n: Tensor) -> Tensor:
    delta = p - n
    if len(delta) <= delta.shape[1]:  # the smaller of the two Gram matrices has the same leading eigenvector
        component = delta.T @ torch.linalg.eigh(delta @ delta.T).eigenvectors[:, -1]
    else:
        component = torch.linalg.eigh(delta.T @ delta).eigenvectors[:, -1]
    component = component / component.norm()
    return -component if delta.mean(0) @ component < 0 else component


def _extract(
    name: str, method: _Method, pos: Side, neg: Side, normalize: bool, project_out: Any, *, paired: bool = False
) -> Directions:
    """Apply `method` to each layer of the two sides, and finish the result."""
    if not isinstance(pos, Mapping) and not isinstance(neg, Mapping):
        return _direction(name, method, pos, neg, normalize, project_out, paired)
    if not (isinstance(pos, Mapping) and isinstance(neg, Mapping)):
        raise ValueError(
            f"{name}: pos is a {type(pos).__name__} and neg a {type(neg).__name__}; "
            f"give both as activations or both as tensors"
        )
    check_same_origin(name, pos, neg, paired)
    directions = {}
    for layer in pos:
        direction = _direction(f"{name}: layer {layer}", method, pos[layer], neg[layer], normalize, project_out, paired)
        known = pos.origin(layer) if isinstance(pos, Activations) else Origin(place=place_of("extract", layer))
        origin = replace(known, typical_norm=direction.origin.typical_norm)
        directions[layer] = replace(direction, method=name, origin=origin)
    return directions if len(directions) != 1 else next(iter(directions.values()))


def _direction(
    name: str, method: _Method, pos: Any, neg: Any, normalize: bool, project_out: Any, paired: bool
) -> Direction:
    p, n = direction_matrix(name, "pos", pos), direction_matrix(name, "neg", neg)
    if p.shape[1] != n.shape[1]:
        raise ValueError(
            f"{name}: pos has width {p.shape[1]} and neg {n.shape[1]}; they must come from the same model and site"
        )
    if paired and len(p) != len(n):
        raise ValueError(
            f"{name}: needs pairs, got {len(p)} rows in pos and {len(n)} in neg; use mean_difference or logistic"
        )
    typical = typical_norm_of(torch.cat([p, n]))
    apart = (p - n).norm(dim=1).max() if paired else _mean_difference(p, n).norm()
    if apart <= ROUNDING * typical:
        raise ValueError(
            f"{name}: pos and neg do not differ (by {float(apart):.3g} at a typical norm of {typical:.3g}); "
            f"check the texts and position"
        )
    vector = method(p, n)
    if vector.norm() <= ROUNDING * typical and method is _mean_difference:
        raise ValueError(f"{name}: the differences of pos and neg cancel to zero; try pca")
    if project_out is not None:
        vector = orthogonal_to(name, vector, project_out)
    norm = float(vector.norm())
    return Direction((vector / norm if normalize else vector).float(), name, norm, Origin(typical_norm=typical))
