"""How good an SAE is on text that it was not trained on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from steerfast._checks import instance_of, whole_number
from steerfast.files.replace import replace_file
from steerfast.models.collect import read_batch
from steerfast.models.layers import evaluating, home
from steerfast.models.points import Point
from steerfast.place import typical_norm_of

from .belonging import point_of
from .contexts import packed, real_tokens
from .model import SAE
from .transcoder import Transcoder

_TYPICAL = 3.0
"""A row is typical if its norm is below this multiple of the median: the few tokens of enormous norm lie above it."""
_MEDIAN_ROWS = 1 << 12  # that tell the median norm
_ENCODED = 1 << 12  # rows that are encoded together
_BATCH = 4  # contexts of a forward: the logits of more would not fit beside a large vocabulary


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_sae` measures. The first position of a context and special tokens are left out everywhere.

    Attributes:
        tokens: Rows that were encoded.
        variance_explained: 1 - Σ‖x̂ - x‖² / Σ‖x - mean‖².
        variance_explained_typical: The same over typical rows alone: tokens of enormous norm are easy and weigh much.
        typical: Share of typical rows, those with a norm below three times the median of the first 4,096 rows.
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
    special tokens: an SAE never saw them. Texts are read as they are needed and rows are summed up, so memory does not grow
    with their number.

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
        ValueError: the SAE has no place or another width than the model, or is a transcoder; too few texts; activations are
            NaN or Inf.

    Example:
        >>> from steerfast.place import Origin, Place
        >>> both = torch.cat([torch.eye(576), -torch.eye(576)])  # every number of the stream as one of two features
        >>> sae = sf.SAE(both, both, k=576, origin=Origin(place=Place("resid_post", 0)))
        >>> found = sf.sae.evaluate_sae(sae, model, tokenizer, true_statements, context=8, loss_tokens=8)
        >>> round(found.variance_explained, 4), round(found.loss_recovered, 2)
        (1.0, 1.0)
    """
    instance_of("evaluate_sae", "sae", sae, SAE, "sf.SAE.load(path)")
    if isinstance(sae, Transcoder):
        raise ValueError(
            f"evaluate_sae: {sae} predicts what it writes from another place; measure its prediction, transcoder(x) beside y"
        )
    layer, point = point_of("evaluate_sae", sae, model)
    sae = sae.to(dtype=torch.float32)  # the same numbers; rows are not rounded to the 16 bits of its file
    context, loss_tokens = (
        whole_number("evaluate_sae", name, value, 1)
        for name, value in (("context", context), ("loss_tokens", loss_tokens))
    )
    model = getattr(model, "_orig_mod", model)
    most = None if tokens is None else max(1, whole_number("evaluate_sae", "tokens", tokens) // context)
    quality, losses, done = _Quality(sae), _Losses(sae, model, point), 0
    with evaluating(model):
        for batch in _batches(packed(tokenizer, texts, context), most):
            keep = real_tokens(tokenizer.all_special_ids, batch)
            rows: list[Tensor] = read_batch(model, {layer: point}, batch.tolist(), "all")[layer]
            found = torch.cat(rows)[keep.flatten()]
            if not bool(found.isfinite().all()):
                raise ValueError(
                    f"evaluate_sae: the model's activations are NaN or Inf in the contexts {done} to {done + len(batch) - 1}; "
                    "check the model, or load it in float32"
                )
            quality.add(found)
            if (left := max(1, loss_tokens // context) - done) > 0:
                losses.add(batch[:left], keep[:left])
            done += len(batch)
            if progress is not None and done % (16 * _BATCH) == 0:
                progress(f"read {done} contexts, losses on {losses.count} tokens")
    return Evaluation(**quality.numbers(), **losses.numbers())


def _batches(blocks: Iterable[Any], most: int | None) -> Iterator[Tensor]:
    """Contexts, a few at a time, no more than `most`."""
    left = float("inf") if most is None else most
    for block in blocks:
        for part in torch.from_numpy(block).split(_BATCH):
            if left <= 0:
                return
            yield part[: int(min(left, len(part)))]
            left -= len(part)


class _Sums:
    """What variance and error of some rows are made of."""

    def __init__(self, d: int) -> None:
        self.count, self.error, self.squares = 0, 0.0, 0.0
        self.total = torch.zeros(d, dtype=torch.float64, device="cpu")

    def add(self, rows: Tensor, error: Tensor) -> None:
        """Take in rows, float64 and less a centre that stays the same, and their squared errors."""
        self.count += len(rows)
        self.total += rows.sum(0)
        self.squares += float(rows.square().sum())
        self.error += float(error.sum())

    @property
    def explained(self) -> float:
        """1 - Σ error / Σ‖x - mean‖²."""
        return 1 - self.error / (self.squares - float(self.total.square().sum()) / self.count)


class _Quality:
    """The numbers that need activations alone, summed up over rows as they come."""

    def __init__(self, sae: SAE) -> None:
        self.sae, self.active, self.first = sae, 0, list[Tensor]()
        self.alive = torch.zeros(sae.features, dtype=torch.bool, device=sae.w_enc.device)
        self.every, self.typical = _Sums(sae.d), _Sums(sae.d)
        self.bound: float | None = None
        self.centre = self.every.total

    def add(self, rows: Tensor) -> None:
        """Take in rows; the first ones wait until they tell the median norm."""
        if self.bound is not None:
            self._sum(rows)
            return
        self.first.append(rows)
        if sum(map(len, self.first)) >= _MEDIAN_ROWS:
            self._begin()

    def numbers(self) -> dict[str, Any]:
        """What was measured."""
        if self.bound is None:
            self._begin()
        rows = self.every.count
        return {
            "tokens": rows,
            "variance_explained": self.every.explained,
            "variance_explained_typical": self.typical.explained,
            "typical": self.typical.count / rows,
            "dead": 1 - float(self.alive.float().mean()),
            "active": self.active / rows,
        }

    def _begin(self) -> None:
        rows = torch.cat(self.first)
        self.first.clear()
        self.bound = _TYPICAL * typical_norm_of(rows.float())
        self.centre = rows.double().mean(0)  # near the mean of all, so that nothing cancels in the sums
        self._sum(rows)

    def _sum(self, rows: Tensor) -> None:
        for part in rows.split(_ENCODED):
            x = part.to(self.sae.w_enc.device)
            values, indices = self.sae.topk(x)
            self.alive[indices[values > 0].long()] = True
            self.active += int((values > 0).sum())
            error = (self.sae.decode_topk(values, indices, x).double() - x.double()).square().sum(1).cpu()
            typical = torch.linalg.vector_norm(part.float(), dim=1) < self.bound
            wide = part.double() - self.centre
            self.every.add(wide, error)
            self.typical.add(wide[typical], error[typical])


class _Losses:
    """The cross-entropy of real tokens under the model as it is, with the reconstruction, and with zeros."""

    def __init__(self, sae: SAE, model: Any, point: Point) -> None:
        self.model, self.point, self.count = model, point, 0
        self.edits: dict[str, Callable[[Tensor], Tensor] | None] = {
            "loss": None,
            "loss_reconstructed": lambda x: sae(x.to(sae.w_enc)).to(x.device),
            "loss_zeroed": torch.zeros_like,
        }
        self.sums = dict.fromkeys(self.edits, 0.0)

    def add(self, contexts: Tensor, keep: Tensor) -> None:
        """Three forwards on contexts, whose real tokens are kept."""
        ids, which = contexts.long().to(home(self.model)), keep.to(home(self.model))
        predicted = which[:, 1:]
        self.count += int(predicted.sum())
        for name, new in self.edits.items():
            handle = None if new is None else self.point.attach(_replacing(new, which))
            try:
                logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1]
            finally:
                if handle is not None:
                    handle.remove()
            self.sums[name] += float(
                nn.functional.cross_entropy(logits[predicted].float(), ids[:, 1:][predicted], reduction="sum")
            )

    def numbers(self) -> dict[str, Any]:
        """What was measured."""
        return {"loss_tokens": self.count, **{name: total / self.count for name, total in self.sums.items()}}


def _replacing(new: Callable[[Tensor], Tensor], which: Tensor) -> Callable[[Tensor], Tensor]:
    """An edit of the rows that count, and of no other."""

    def edit(x: Tensor) -> Tensor:
        rows = x.reshape(*which.shape, x.shape[-1])
        return torch.where(which[..., None], new(rows).to(x.dtype), rows).view(x.shape)

    return edit
