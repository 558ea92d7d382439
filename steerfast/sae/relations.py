"""What a feature stands beside: the tokens whose logits its decoder row raises and lowers, and the features it is most alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import instance_of, whole_number
from steerfast.ops.backends import in_full_precision

from .belonging import warn_of_another_model
from .explanation import final_head, normed_rows
from .model import SAE

_ELEMENTS = 1 << 24  # of a product at once: 64 MB


@dataclass(frozen=True, eq=False)
class Relations:
    """Tokens and features that a feature is related to; made by `relate`.

    Attributes:
        raised, lowered: Feature -> tokens, the strongest first.
        raised_by, lowered_by: float32 (F, n), norm(W_dec[c])·W_out[token]: in logits, up to one factor per feature.
        neighbours: int64 (F, n), other features, the most alike first.
        cosines: float32 (F, n), of the decoder rows.
    """

    raised: tuple[tuple[str, ...], ...] = field(repr=False)
    lowered: tuple[tuple[str, ...], ...] = field(repr=False)
    raised_by: Tensor = field(repr=False)
    lowered_by: Tensor = field(repr=False)
    neighbours: Tensor = field(repr=False)
    cosines: Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.raised)


def relate(sae: SAE, model: nn.Module, tokenizer: Any, count: int = 8) -> Relations:
    """Return the tokens whose logits each feature raises and lowers most, and the features with the nearest decoder rows.

    Logits are those of the decoder row alone, through the model's final norm and output embedding: what the feature promotes
    where it is written, not what later layers make of it.

    Args:
        sae: The features are its decoder rows.
        model: The `transformers` model that it belongs to.
        tokenizer: Its tokenizer.
        count: Of each, per feature.

    Raises:
        ValueError: widths do not fit; count is not 1 to F − 1; no final norm or output embedding.

    Warns:
        UserWarning: the SAE comes from a model of another family.

    Example:
        >>> rows = torch.eye(576)[:3]
        >>> rows[2] += 2 * rows[0]
        >>> found = sf.sae.relate(sf.SAE(rows, rows, k=1), model, tokenizer, count=1)
        >>> found.neighbours.flatten().tolist(), len(found.raised[0])
        ([2, 0, 0], 1)
    """
    instance_of("relate", "sae", sae, SAE, "sf.SAE.load(path)")
    output, norm = final_head("relate", model)
    if output.shape[1] != sae.w_dec.shape[1]:
        raise ValueError(
            f"relate: {sae} writes rows of width {sae.w_dec.shape[1]}, the model has {output.shape[1]}; is it another model's?"
        )
    count = whole_number("relate", "count", count, 1)
    if count >= sae.features:
        raise ValueError(f"relate: count is {count}; expected 1 to {sae.features - 1}, the other features")
    warn_of_another_model("relate", sae, type(model).__name__)
    tokens = output[: len(tokenizer)].float()  # what is behind them only fills the matrix up
    with torch.no_grad():
        directions = normed_rows(sae, norm, output.device)
        raised_by, raised, lowered_by, lowered = _extremes(directions, tokens, count)
        cosines, neighbours = _nearest(nn.functional.normalize(sae.w_dec.float(), dim=1), count)
    shown = {token: tokenizer.decode([token]) for token in torch.cat([raised, lowered]).unique().tolist()}
    up, down = (tuple(tuple(shown[token] for token in row) for row in found.tolist()) for found in (raised, lowered))
    return Relations(up, down, raised_by.cpu(), lowered_by.cpu(), neighbours.cpu(), cosines.cpu())


@in_full_precision
def _extremes(rows: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest and smallest products of each row: values and places of both."""
    found = []
    for part in rows.split(max(1, _ELEMENTS // len(others))):
        z = part @ others.T
        up, down = z.topk(count, dim=1), z.topk(count, dim=1, largest=False)
        found.append((up.values, up.indices, down.values, down.indices))
    a, b, c, d = (torch.cat(parts) for parts in zip(*found, strict=True))
    return a, b, c, d


@in_full_precision
def _nearest(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest cosines of each row with the others, and where they are."""
    values, places, start = [], [], 0
    for part in rows.split(max(1, _ELEMENTS // len(rows))):
        z = part @ rows.T
        z[torch.arange(len(part)), torch.arange(start, start + len(part))] = -torch.inf  # itself
        best = z.topk(count, dim=1)
        values.append(best.values)
        places.append(best.indices)
        start += len(part)
    return torch.cat(values), torch.cat(places)
