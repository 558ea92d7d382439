"""Methods of the subspace op: an intervention, and the same in plain PyTorch as (x, B, C) -> x'."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

import steerfast as sf

from .case import Function

Method = tuple[sf.Intervention, Function, Function]  # the intervention, the best eager form, the naive chain


def _ablate(rows: Tensor) -> Method:
    return (
        sf.Ablate(rows),
        lambda x, b, c: torch.addmm(x, x @ b.T, b, alpha=-1),
        lambda x, b, c: x - (x @ b.T) @ b,
    )


def amplify(rows: Tensor) -> Method:
    """x + α·relu(x Bᵀ) B, the method that most suites take."""
    return (
        sf.Amplify(rows, 0.5),
        lambda x, b, c: torch.addmm(x, torch.relu(x @ b.T), b, alpha=0.5),
        lambda x, b, c: x + 0.5 * (torch.relu(x @ b.T) @ b),
    )


def _amplify_keep_norm(rows: Tensor) -> Method:
    def chain(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        out = x + 0.5 * (torch.relu(x @ b.T) @ b)
        return out * (x.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True))

    def best(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        out = torch.addmm(x, torch.relu(x @ b.T), b, alpha=0.5)
        return out.mul_(x.norm(dim=-1, keepdim=True).div_(out.norm(dim=-1, keepdim=True)))

    return sf.Amplify(rows, 0.5, keep_norm=True), best, chain


def _calibrate(rows: Tensor) -> Method:
    return (
        sf.Calibrate(rows, 2.0),
        lambda x, b, c: torch.addmm(x, torch.relu(x @ b.T).neg_().add_(2.0 / len(b)), b),
        lambda x, b, c: x - torch.relu(x @ b.T) @ b + 2.0 * b.mean(0),
    )


def _affine_ablate(rows: Tensor) -> Method:
    chain = lambda x, b, c: x + (1.5 - x @ b.T) @ b  # noqa: E731
    return (
        sf.AffineAblate(rows[0], baseline=1.0, offset=0.5),
        lambda x, b, c: torch.addmm(x, 1.5 - x @ b.T, b),
        chain,
    )


def _clamp(rows: Tensor) -> Method:
    def act(y: Tensor) -> Tensor:
        return y.clamp(-0.5, 0.5) - y

    return (
        sf.Clamp(rows[0], low=-0.5, high=0.5),
        lambda x, b, c: torch.addmm(x, act(x @ b.T), b),
        lambda x, b, c: x + act(x @ b.T) @ b,
    )


def _rotate(rows: Tensor) -> Method:
    def act(y: Tensor) -> Tensor:
        return y.norm(dim=-1, keepdim=True) * y.new_tensor([math.cos(math.pi / 5), math.sin(math.pi / 5)]) - y

    return (
        sf.Rotate(rows[:2], degrees=36.0),
        lambda x, b, c: torch.addmm(x, act(x @ b.T), b),
        lambda x, b, c: x + act(x @ b.T) @ b,
    )


def _loreft(rows: Tensor) -> Method:
    w = torch.randn(rows.shape, device=rows.device) / math.sqrt(rows.shape[1])
    return (
        sf.LoReFT(rows, w),
        lambda x, b, c: torch.addmm(x, x @ b.T, c),
        lambda x, b, c: x + (x @ b.T) @ c,
    )


def _push(rows: Tensor) -> Method:
    def chain(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        short = torch.relu(3.0 - torch.relu(x @ b.T))
        out = x + 3.0 * (short / short.sum(-1, keepdim=True)) @ b
        return out * (x.norm(dim=-1, keepdim=True) / out.norm(dim=-1, keepdim=True))

    def best(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        short = torch.relu(3.0 - torch.relu(x @ b.T))
        out = torch.addmm(x, short.div_(short.sum(-1, keepdim=True)), b, alpha=3.0)
        return out.mul_(x.norm(dim=-1, keepdim=True).div_(out.norm(dim=-1, keepdim=True)))

    return sf.DeficitPush(rows, target=3.0), best, chain


METHODS: dict[str, Callable[[Tensor], Method]] = {
    "ablate": _ablate,
    "amplify": amplify,
    "amplify keep_norm": _amplify_keep_norm,
    "calibrate": _calibrate,
    "affine_ablate": _affine_ablate,
    "clamp": _clamp,
    "rotate": _rotate,
    "loreft": _loreft,
    "push": _push,
}
