"""A LoReFT trained on continuations of prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfast import ops
from steerfast._checks import positive_integer, seed_number
from steerfast.barriers.data import seeded
from steerfast.edits.fitted import FitInfo
from steerfast.edits.linear import LoReFT
from steerfast.models.texts import TextReader

from .lessons import Edit, Lesson, Pupil, descend, read_lessons, split, steps_and_rate, warn_of_no_gain


@torch.inference_mode(False)
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
    seed = seed_number(owner, seed)
    pupil = Pupil(owner, model, layer)
    steps, lr = steps_and_rate(owner, steps, lr)
    rank = positive_integer(owner, "rank", rank)
    if rank > pupil.width:
        raise ValueError(
            f"{owner}: rank is {rank} and the stream has width {pupil.width}; at most that many are independent"
        )
    taught, held = split(read_lessons(owner, model, TextReader.of(tokenizer, owner), examples))
    generator = seeded(seed)
    start = torch.linalg.qr(torch.randn(pupil.width, rank, generator=generator, device="cpu", dtype=torch.float32)).Q
    parts = (start, start.T.clone(), torch.zeros(rank, device="cpu", dtype=torch.float32))
    edit = _Edit(*(part.to(pupil.device).requires_grad_() for part in parts))

    def loss(_: int, part: list[int]) -> Tensor:
        edit.turn()
        return cross_entropy(pupil, [taught[i] for i in part], edit)

    with pupil.taught():
        before = pupil.nats(held, None)
        descend(owner, [edit.A, edit.W, edit.b], loss, len(taught), steps, lr, generator)
        edit.turn()
        nats = pupil.nats(held, edit) - before
    warn_of_no_gain(owner, nats)
    info = FitInfo("loreft", positives=len(taught), groups=len(taught), nats=nats)
    return LoReFT(edit.R.detach(), edit.W.detach(), edit.b.detach(), origin=pupil.origin, info=info)


def cross_entropy(pupil: Pupil, lessons: Sequence[Lesson], edit: Edit | None) -> Tensor:
    """Mean cross entropy of the wanted continuations' tokens, in nats."""
    found = [pupil.log_likelihoods(one.prompt, one.wanted, edit) for one in lessons]
    return -torch.cat(found).mean()


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
