"""The standard cases of sparse autoencoders: encode, decode, and a few features edited."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import steerfast as sf
from steerfast import ops

from .case import Case, Inputs, Stream, error_share, same_as


def edit_features(at: Stream, n: int, features: int, count: int = 8) -> Case:
    """A few features of an SAE set to a value with the error term kept, beside encode, edit and two decodes of all."""
    w_enc, w_dec = at.dictionary(features), at.dictionary(features)
    bias = 0.1 * torch.randn(features, device=at.device).to(at.dtype)
    chosen = torch.randperm(features)[:count].sort().values.tolist()
    place = torch.tensor(chosen, device=at.device)
    parts = sf.Features(w_enc[place].float(), w_dec[place].float(), bias[place].float())
    bank = sf.Bank(at.d, 1, 2 * count, at.dtype, at.device)
    bank.register(sf.EditFeatures(parts, dict.fromkeys(range(count), 4.0)))

    def few(x: Tensor, w_enc: Tensor, w_dec: Tensor, bias: Tensor) -> Tensor:
        f = torch.relu(x @ w_enc[place].T + bias[place])
        return x + (4.0 - f) @ w_dec[place]

    def whole(x: Tensor, w_enc: Tensor, w_dec: Tensor, bias: Tensor) -> Tensor:
        f = torch.relu(torch.addmm(bias, x, w_enc.T))
        error = x - f @ w_dec
        f[:, place] = 4.0
        return f @ w_dec + error

    return Case(
        f"edit_features count={count} F={features} n={n} {at.tag}",
        bytes=(2 * n + 2 * count) * at.d * at.dtype.itemsize,
        operations=4 * n * at.d * count,
        fresh=lambda: (at.rows(n),),
        fixed=(w_enc, w_dec, bias),
        ours=lambda x, *_: ops.subspace(x, *bank.tensors, modes=bank.modes, max_rank=count),
        judge=same_as(few),
        peers={"eager": lambda: few, "whole SAE twice": lambda: whole},
        dtype=at.dtype,
        slack=100.0,  # the whole SAE takes the difference of two large sums
    )


def sae_encode(at: Stream, n: int, features: int, k: int) -> Case:
    """Top-K of relu(x W_encᵀ + b), beside the full matrix of pre-activations in float32 and torch.topk."""
    w, b = at.dictionary(features), (0.1 * torch.randn(features, device=at.device)).to(at.dtype)
    return Case(
        f"sae_encode F={features} k={k} n={n} {at.tag}",
        bytes=(w.numel() + n * at.d) * at.dtype.itemsize + 8 * n * k,
        operations=2 * n * w.numel(),
        fresh=lambda: (at.rows(n),),
        fixed=(w, b),
        ours=lambda x, w, b: ops.sae_encode(x, w, b, k),
        judge=_exact_top_k,
        peers={"eager": lambda: lambda x, w, b: torch.relu(_product(x, w) + b).topk(k)},
        yardsticks={
            "product alone": lambda: lambda x, w, b: x @ w.T,
            "eager, rounded": lambda: lambda x, w, b: torch.addmm(b, x, w.T).relu_().topk(k),
        },
        dtype=at.dtype,
    )


def sae_edit_topk(at: Stream, n: int, features: int, k: int, count: int = 8) -> Case:
    """A few features of a Top-K SAE doubled by counting what exceeds them, beside the selection and the edit of it.

    The bias alone orders the features, and the edited ones lie among the first k: no tile can be left out.
    """
    w, rows = at.dictionary(features), at.dictionary(count)
    b = torch.linspace(9, 1, features, device=at.device).to(at.dtype)
    chosen = torch.arange(count, dtype=torch.int32, device=at.device)
    table = torch.tensor([[2.0, 0.0, -torch.inf, torch.inf]], device=at.device).repeat(count, 1)

    def selected(x: Tensor, w: Tensor, b: Tensor, rows: Tensor) -> Tensor:
        product = x @ w.T if x.dtype == torch.float64 else _product(x, w)
        values, indices = torch.relu(product + b).topk(k)
        f = (values[:, :, None] * (indices[:, :, None] == chosen)).sum(1)
        return (x + f @ rows.to(f.dtype)).to(x.dtype)

    return Case(
        f"sae_edit_topk count={count} F={features} k={k} n={n} {at.tag}",
        bytes=(w.numel() + 2 * n * at.d + rows.numel()) * at.dtype.itemsize,
        operations=2 * n * w.numel(),
        fresh=lambda: (0.01 * at.rows(n),),
        fixed=(w, b, rows),
        ours=lambda x, w, b, rows: ops.sae_edit_topk(x, w, b, k, chosen, table, rows),
        judge=same_as(selected),
        peers={
            "eager": lambda: selected,
            "encode and edit": lambda: (
                lambda x, w, b, rows: ops.sae_edit(x, *ops.sae_encode(x, w, b, k), chosen, table, rows)
            ),
        },
        dtype=at.dtype,
    )


def sae_encode_threshold(at: Stream, n: int, features: int, capacity: int) -> Case:
    """What lies above a threshold of 3.5 deviations, compacted and sorted, beside the full matrix and torch.topk."""
    w, b = at.dictionary(features), torch.zeros(features, device=at.device, dtype=at.dtype)
    level = 3.5 if features > 1000 else 2.0
    threshold = torch.full((features,), level, device=at.device)

    def best(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pre = _product(x, w) + b
        pre = torch.where(pre > threshold, pre, 0)
        return (*pre.topk(capacity), (pre > 0).sum(1))

    def judge(inputs: Inputs) -> Callable[[Any], float]:
        """Every selected value is right, and the counts are those of float64 but for what lies at the threshold."""
        x, w, b = inputs[0][:16], inputs[1], inputs[2]
        true = x.double() @ w.double().T + b.double()
        tolerance = 2 * (x.float() @ w.float().T - true).abs().max() + true.max() * torch.finfo(torch.float32).eps
        least, most = ((true > level + sign * tolerance).sum(1) for sign in (1, -1))

        def share(got: tuple[Tensor, Tensor, Tensor]) -> float:
            values, indices, counts = got[0][:16], got[1][:16].long(), got[2][:16]
            error = torch.where(values > 0, values - true.gather(1, indices), 0).abs().max()
            wrong = ((counts < least) | (counts > most)).any() or not ((values > 0).sum(1) == counts).all()
            return math.inf if wrong else float(error / tolerance)

        return share

    return Case(
        f"sae_encode_threshold F={features} n={n} {at.tag}",
        bytes=(w.numel() + n * at.d) * at.dtype.itemsize,
        operations=2 * n * w.numel(),
        fresh=lambda: (at.rows(n),),
        fixed=(w, b),
        ours=lambda x, w, b: ops.sae_encode_threshold(x, w, b, threshold, capacity),
        judge=judge,
        peers={"eager": lambda: best},
        yardsticks={"product alone": lambda: lambda x, w, b: x @ w.T},
        dtype=at.dtype,
    )


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x Wᵀ in float32: from tensor cores without rounding where PyTorch offers it."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return x.float() @ w.float().T


def _exact_top_k(inputs: Inputs) -> Callable[[Any], float]:
    """Nothing left out is larger than the smallest selected, up to twice the rounding of a float32 product."""
    x, w, b = inputs[0][:16], inputs[1], inputs[2]
    wide, naive = [], []
    for rows, bias in zip(w.split(8192), b.split(8192), strict=True):
        wide.append(torch.relu(x.double() @ rows.double().T + bias.double()))
        naive.append(torch.relu(x.float() @ rows.float().T + bias.float()))
    true = torch.cat(wide, 1)
    tolerance = 2 * (torch.cat(naive, 1) - true).abs().max() + true.max() * torch.finfo(torch.float32).eps

    def share(got: tuple[Tensor, Tensor]) -> float:
        values, indices = got[0][:16], got[1][:16].long()
        if (values.diff(dim=1) > 0).any() or (indices.sort(dim=1).values.diff(dim=1) == 0).any():
            return math.inf
        error = (values - true.gather(1, indices)).abs().max()
        left_out = true.scatter(1, indices, 0).amax(1) - values[:, -1]
        return max(float(error / tolerance), float(left_out.max() / (2 * tolerance)))

    return share


def sae_decode(at: Stream, n: int, features: int, k: int) -> Case:
    """Σ values · W_dec[indices], beside a gather, an embedding bag and the dense product."""
    w = at.dictionary(features)

    def fresh() -> Inputs:
        places = torch.rand(n, features, device=at.device).topk(k).indices if n * features < 1 << 26 else None
        if places is None:
            places = torch.randint(0, features, (n, k), device=at.device)
        return torch.rand(n, k, device=at.device), places.int()

    def chain(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        return torch.einsum("nk,nkd->nd", values.to(w.dtype), w[indices.long()])

    def bag(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(indices, w, per_sample_weights=values.to(w.dtype), mode="sum")

    def dense(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
        full = w.new_zeros(n, features).scatter_add_(1, indices.long(), values.to(w.dtype))
        return full @ w

    def judge(inputs: Inputs) -> Callable[[Any], float]:
        values, indices, w = inputs
        some = slice(0, 64)
        true = torch.einsum("nk,nkd->nd", values[some].double(), w[indices[some].long()].double())
        naive = chain(values[some], indices[some], w)
        return lambda got: error_share(got[some], true, naive)

    return Case(
        f"sae_decode F={features} k={k} n={n} {at.tag}",
        bytes=n * (k + 1) * at.d * at.dtype.itemsize + 8 * n * k,
        operations=2 * n * k * at.d,
        fresh=fresh,
        fixed=(w,),
        ours=lambda values, indices, w: ops.sae_decode(values, indices, w),
        judge=judge,
        peers={"eager": lambda: bag, "naive chain": lambda: chain, "dense": lambda: dense},
        dtype=at.dtype,
    )
