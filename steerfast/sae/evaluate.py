"""How good an SAE is on text that it was not trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import whole_number
from steerfast.files.replace import replace_file
from steerfast.models.collect import read_batch
from steerfast.models.layers import evaluating
from steerfast.models.points import Point

from .belonging import point_of
from .cache import pack, real_tokens
from .model import SAE
from .transcoder import Transcoder

_TYPICAL = 3.0
"""A row is typical if its norm is below this multiple of the median: the few tokens of enormous norm lie above it."""
_BATCH = 4  # contexts of a forward: the logits of more would not fit beside a large vocabulary


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_sae` measures. The first position of a context and special tokens are left out everywhere.

    Attributes:
        tokens: Rows that were encoded.
        variance_explained: 1 - Σ‖x̂ - x‖² / Σ‖x - mean‖².
        variance_explained_typical: The same over typical rows alone: tokens of enormous norm are easy and weigh much.
        typical: Share of typical rows, those with a norm below three times the median.
        dead: Share of features that were active on none of the rows.
        active: Mean number of active features per row.
        loss_tokens: Predicted tokens of the three losses.
        loss: Cross-entropy of the model, in nats per token.
        loss_reconstructed: With the reconstruction in place of the activations.
        loss_zeroed: With zeros in place of the activations.
    """

    tokens: int
    variance_explained: float
    variance_explained_typical: float
    typical: float
    dead: float
    active: float
    loss_tokens: int
    loss: float
    loss_reconstructed: float
    loss_zeroed: float

    @property
    def loss_recovered(self) -> float:
        """(loss_zeroed - loss_reconstructed) / (loss_zeroed - loss): 1 is a perfect reconstruction, 0 as bad as zeros."""
        return (self.loss_zeroed - self.loss_reconstructed) / (self.loss_zeroed - self.loss)

    def save(self, file: str | os.PathLike[str], about: Mapping[str, Any] | None = None) -> Path:
        """Write the numbers as JSON, after what `about` says of them: which SAE, which text."""
        path = Path(file)
        content = {**(about or {}), **asdict(self), "loss_recovered": self.loss_recovered}
        replace_file(path, (json.dumps(content, indent=2) + "\n").encode())
        return path

    def __str__(self) -> str:
        return (
            f"variance explained   {self.variance_explained:.4f}   ({self.variance_explained_typical:.4f} on the "
            f"{self.typical:.1%} of rows with a typical norm)\n"
            f"dead features        {self.dead:.2%}   ({self.active:.1f} active per token, {self.tokens} tokens)\n"
            f"cross-entropy        {self.loss:.4f}   reconstructed {self.loss_reconstructed:.4f}, zeroed "
            f"{self.loss_zeroed:.4f} ({self.loss_tokens} tokens)\n"
            f"loss recovered       {self.loss_recovered:.4f}"
        )


def evaluate_sae(
    sae: SAE,
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    context: int = 256,
    tokens: int | None = None,
    loss_tokens: int = 20_000,
    progress: Callable[[str], None] | None = None,
) -> Evaluation:
    """Measure variance explained, dead features and cross-entropy recovered on texts.

    Texts are packed into contexts as `cache_activations` does. Nothing is replaced at the first position of a context and at
    special tokens: an SAE never saw them.

    Args:
        sae: With a place, (site, layer).
        model: The `transformers` model that it belongs to.
        tokenizer: Its tokenizer.
        texts: Held-out texts.
        context: Tokens of a context.
        tokens: Tokens at most, in whole contexts; None: all.
        loss_tokens: Tokens, at least one context, on which the three losses are measured; each costs three full forwards.
        progress: Called with a line of text now and then.

    Returns:
        The numbers, an `Evaluation`.

    Raises:
        ValueError: the SAE has no place or another width than the model, or is a transcoder; too few texts.

    Example:
        >>> from steerfast.place import Origin, Place
        >>> both = torch.cat([torch.eye(576), -torch.eye(576)])  # every number of the stream as one of two features
        >>> sae = sf.SAE(both, both, k=576, origin=Origin(place=Place("resid_post", 0)))
        >>> found = sf.sae.evaluate_sae(sae, model, tokenizer, true_statements, context=8, loss_tokens=8)
        >>> round(found.variance_explained, 4), round(found.loss_recovered, 2)
        (1.0, 1.0)
    """
    if isinstance(sae, Transcoder):
        raise ValueError(
            f"evaluate_sae: {sae} predicts what it writes from another place; measure its prediction, transcoder(x) beside y"
        )
    layer, point = point_of("evaluate_sae", sae, model)
    sae = sae.to(dtype=torch.float32)  # the same numbers; rows are not rounded to the 16 bits of its file
    loss_tokens = whole_number("evaluate_sae", "loss_tokens", loss_tokens)
    contexts = pack(tokenizer, texts, context)
    if tokens is not None:
        contexts = contexts[: max(1, whole_number("evaluate_sae", "tokens", tokens) // contexts.shape[1])]
    keep = real_tokens(tokenizer, contexts)
    model = getattr(model, "_orig_mod", model)
    with evaluating(model):
        parts = []
        for start in range(0, len(contexts), _BATCH):
            some = slice(start, start + _BATCH)
            rows: list[Tensor] = read_batch(model, {layer: point}, contexts[some].tolist(), "all")[layer]
            parts.append(torch.cat(rows)[keep[some].flatten()])
            if progress is not None and start % (64 * _BATCH) == 0:
                progress(f"read {start} of {len(contexts)} contexts")
        quality = _quality(sae, torch.cat(parts))
        losses = _losses(sae, model, point, contexts[: max(1, loss_tokens // context)], keep, progress)
    return Evaluation(**quality, **losses)


def _quality(sae: SAE, rows: Tensor) -> dict[str, Any]:
    """The numbers that need activations alone."""
    norms = torch.linalg.vector_norm(rows.float(), dim=1)
    typical = norms < _TYPICAL * norms.median()
    device = sae.w_enc.device
    alive = torch.zeros(sae.features, dtype=torch.bool, device=device)
    errors, active = [], 0
    for part in rows.split(4096):
        x = part.to(device)
        values, indices = sae.topk(x)
        alive[indices[values > 0].long()] = True
        active += int((values > 0).sum())
        errors.append((sae.decode_topk(values, indices, x).double() - x.double()).square().sum(1).cpu())
    error = torch.cat(errors)

    def explained(which: Tensor) -> float:
        wide = rows[which].double()
        return 1 - float(error[which].sum() / (wide - wide.mean(0)).square().sum())

    return {
        "tokens": len(rows),
        "variance_explained": explained(torch.ones_like(typical)),
        "variance_explained_typical": explained(typical),
        "typical": float(typical.float().mean()),
        "dead": 1 - float(alive.float().mean()),
        "active": active / len(rows),
    }


def _losses(
    sae: SAE, model: Any, point: Point, contexts: Tensor, keep: Tensor, progress: Callable[[str], None] | None
) -> dict[str, Any]:
    """The cross-entropy of real tokens under the model as it is, with the reconstruction, and with zeros."""

    def replace(new: Callable[[Tensor], Tensor], which: Tensor) -> Callable[[Tensor], Tensor]:
        def edit(x: Tensor) -> Tensor:
            rows = x.reshape(*which.shape, x.shape[-1])
            return torch.where(which[..., None], new(rows).to(x.dtype), rows).view(x.shape)

        return edit

    edits = {
        "loss": None,
        "loss_reconstructed": lambda x: sae(x.to(sae.w_enc)).to(x.device),
        "loss_zeroed": torch.zeros_like,
    }
    sums, count = dict.fromkeys(edits, 0.0), 0
    for start in range(0, len(contexts), _BATCH):
        ids = contexts[start : start + _BATCH].long().to(model.device)
        which = keep[start : start + len(ids)].to(model.device)
        predicted = which[:, 1:]
        count += int(predicted.sum())
        for name, new in edits.items():
            handle = None if new is None else point.attach(replace(new, which))
            try:
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            finally:
                if handle is not None:
                    handle.remove()
            sums[name] += float(
                nn.functional.cross_entropy(logits[predicted].float(), ids[:, 1:][predicted], reduction="sum")
            )
        if progress is not None:
            progress(f"losses on {start + len(ids)} of {len(contexts)} contexts")
    return {"loss_tokens": count, **{name: total / count for name, total in sums.items()}}
