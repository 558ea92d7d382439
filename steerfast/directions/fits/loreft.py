"""A LoReFT trained on continuations of prompts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfast import ops
from steerfast._checks import finite_number, positive_integer
from steerfast.barriers.data import seeded
from steerfast.edits.fitted import FitInfo
from steerfast.edits.linear import LoReFT
from steerfast.models.layers import evaluating, find_layers, stream_storage
from steerfast.models.texts import TextReader
from steerfast.place import Origin, Place

BATCH = 4
"""Examples of a step."""
HELD = 5  # of so many examples one is held out, from twice as many on
_Example = tuple[list[int], list[int]]  # token ids of a prompt and of its continuation


def fit_loreft(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[tuple[str, str]],
    layer: int,
    *,
    rank: int = 4,
    steps: int = 100,
    lr: float = 0.02,
    seed: int = 0,
) -> LoReFT:
    """Train x + Rᵀ(Wx + b − Rx) at a block's output so that a model continues prompts as in examples.

    The loss is the mean cross entropy of the continuations' tokens; Adam moves W, b and a matrix A (r, d), of which R is the
    orthonormal basis by QR in every step. It begins where nothing is changed (W = R, b = 0), and edits every token, as a plan
    with the default positions does. The model's weights stay as they are.

    Args:
        model: A `transformers` causal language model.
        tokenizer: Its tokenizer.
        examples: (prompt, continuation), strings; mind the leading space of a continuation. Of ten or more every fifth is held
            out.
        layer: Decoder block, 0-based, negative from the end.
        rank: r, at most d.
        steps: Steps of Adam, on four examples each.
        lr: Its learning rate.
        seed: Of the start and of the order of the examples.

    Returns:
        The intervention; its `origin` holds the model and the place, its `info.nats` by how many nats a token of held-out
        continuations became likelier (NaN if none was held out).

    Raises:
        TypeError, ValueError: no examples, one that is no pair of strings or has no tokens, an unknown layer, rank > d, a number
            out of range, or the training diverges.

    Reference:
        Wu et al. 2024, ReFT: Representation Finetuning for Language Models (arXiv:2404.03592), which edits some tokens of the
        prompt only.

    Example:
        >>> edit = sf.fit_loreft(model, tokenizer, [("The weather is", " purple"), ("My food is", " purple")], 12, steps=2)
        >>> plan = sf.Plan([edit])
    """
    owner = "fit_loreft"
    found = find_layers(model, owner)
    layer = found.resolve(layer, owner)
    rank, steps, lr = _numbers(owner, found.d, rank, steps, lr)
    tokens = _tokens(TextReader.of(tokenizer, owner), examples)
    held = tokens[::HELD] if len(tokens) >= 2 * HELD else []
    taught = [tokens[i] for i in range(len(tokens)) if not held or i % HELD]
    model = getattr(model, "_orig_mod", model)
    device = stream_storage(found.blocks[layer], model)[1]
    generator = seeded(seed)
    start = torch.linalg.qr(torch.randn(found.d, rank, generator=generator, device="cpu")).Q
    A, W, b = (part.to(device).requires_grad_() for part in (start, start.T.clone(), torch.zeros(rank, device="cpu")))
    edit = _Edit(A, W, b)
    frozen = [part for part in model.parameters() if part.requires_grad]
    for part in frozen:
        part.requires_grad_(False)
    handle = None
    try:
        with evaluating(model):
            before = _loss(model, held)
            handle = found.point(layer, caller=owner).attach(edit)
            with torch.enable_grad():
                _train(model, taught, edit, steps, lr, generator)
            edit.turn()
            nats = float(before - _loss(model, held)) if held else math.nan
    finally:
        if handle is not None:
            handle.remove()
        for part in frozen:
            part.requires_grad_(True)
    info = FitInfo("loreft", positives=len(taught), groups=len(taught), nats=nats)
    origin = Origin(found.name, Place("resid_post", layer))
    return LoReFT(edit.R.detach(), W.detach(), b.detach(), origin=origin, info=info)


class _Edit:
    """The edit with tensors that are trained; R belongs to the step."""

    def __init__(self, A: Tensor, W: Tensor, b: Tensor) -> None:
        self.A, self.W, self.b = A, W, b
        self.turn()

    def turn(self) -> None:
        """R of the matrix A as it is now: each row on the side of the column that it was."""
        q, r = torch.linalg.qr(self.A)
        self.R = (q * r.diagonal().sign()).T

    def __call__(self, x: Tensor) -> Tensor:
        return ops.loreft(x, self.R, self.W, self.b)


def _train(
    model: nn.Module, tokens: list[_Example], edit: _Edit, steps: int, lr: float, generator: torch.Generator
) -> None:
    """Adam on a few examples a step."""
    optimizer = torch.optim.Adam([edit.A, edit.W, edit.b], lr=lr)
    order: list[int] = []
    for step in range(steps):
        while len(order) < min(BATCH, len(tokens)):
            order += torch.randperm(len(tokens), generator=generator, device="cpu").tolist()
        part, order = order[:BATCH], order[BATCH:]
        optimizer.zero_grad()
        edit.turn()
        loss = _loss(model, [tokens[i] for i in part])
        if not bool(loss.isfinite()):
            raise ValueError(f"fit_loreft: the loss is {float(loss)} in step {step + 1}; take a smaller lr")
        loss.backward()
        optimizer.step()


def _loss(model: nn.Module, tokens: Sequence[_Example]) -> Tensor:
    """Mean cross entropy of the continuations' tokens, in nats; each example runs by itself, without padding."""
    total, count = torch.zeros((), device="cpu"), 0
    for prompt, continuation in tokens:
        ids = torch.tensor([prompt + continuation], device=next(model.parameters()).device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, len(prompt) - 1 : -1].float()
        total = total + nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum").cpu()
        count += len(continuation)
    return total / max(count, 1)


def _tokens(reader: TextReader, examples: Any) -> list[_Example]:
    """Token ids of prompts and continuations."""
    given = None if isinstance(examples, (str, bytes)) or not isinstance(examples, Iterable) else list(examples)
    if not given:
        raise ValueError(
            f"fit_loreft: examples is {examples!r}; expected a list of (prompt, continuation), one at least"
        )
    tokens = []
    for pair in given:
        if isinstance(pair, str) or not isinstance(pair, Sequence) or [type(text) for text in pair] != [str, str]:
            raise TypeError(f"fit_loreft: {pair!r} is no example; expected (prompt, continuation), two strings")
        prompt, continuation = reader.beginning(pair[0]), reader.bare(pair[1])
        if not prompt or not continuation:
            raise ValueError(f"fit_loreft: {pair!r} has a text without tokens; give both content")
        tokens.append((prompt, continuation))
    return tokens


def _numbers(owner: str, width: int, rank: Any, steps: Any, lr: Any) -> tuple[int, int, float]:
    rank, steps, lr = (
        positive_integer(owner, "rank", rank), positive_integer(owner, "steps", steps), finite_number(owner, "lr", lr),
    )  # fmt: skip
    if rank > width:
        raise ValueError(f"{owner}: rank is {rank} and the stream has width {width}; at most that many are independent")
    if lr <= 0:
        raise ValueError(f"{owner}: lr is {lr}; expected > 0")
    return rank, steps, lr
