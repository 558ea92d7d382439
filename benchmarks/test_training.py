"""One training step, forward and backward: of directions through `ops.amplify`, of a Top-K autoencoder through the SAE ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import torch
from lab.case import Case, Function, Inputs, Stream, error_share
from setting import AT, K, pick
from torch import Tensor

from steerfast import ops

AT = Stream(AT.device, pick(AT.dtype, AT.dtype, torch.float32), AT.d)
N, TOKENS, FEATURES = pick(4096, 256, 3), pick(4096, 64, 3), pick(16384, 2048, 64)


def gradients(loss: Callable[..., Tensor]) -> Function:
    """A step: the gradients of a loss of (x, *weights) for the weights."""

    def step(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [w.detach().requires_grad_() for w in weights]
            return torch.autograd.grad(loss(x, *leaves), leaves)

    return step


def same_gradients(loss: Callable[..., Tensor]) -> Callable[[Inputs], Callable[[Any], float]]:
    def judge(inputs: Inputs) -> Callable[[Any], float]:
        true, naive = gradients(loss)(*(t.double() for t in inputs)), gradients(loss)(*inputs)
        return lambda got: max(error_share(g, t, v) for g, t, v in zip(got, true, naive, strict=True))

    return judge


def test_directions(race: Any) -> None:
    k = pick(16, 16, 2)

    def fused(x: Tensor, s: Tensor) -> Tensor:
        return (ops.amplify(x, s, 0.5) * x).sum() / len(x)

    def eager(x: Tensor, s: Tensor) -> Tensor:
        return ((x + 0.5 * torch.relu(x @ s.T) @ s) * x).sum() / len(x)

    race(
        lambda: Case(
            f"train amplify k={k} n={N} {AT.tag}",
            bytes=4 * N * AT.d * AT.dtype.itemsize, operations=12 * N * AT.d * k,
            fresh=lambda: (AT.rows(N),), fixed=(AT.basis(k),), dtype=AT.dtype,
            ours=gradients(fused), judge=same_gradients(eager), peers={"eager": lambda: gradients(eager)},
        ),
        memory=("ours", "eager"),
    )  # fmt: skip


def test_autoencoder(race: Any) -> None:
    """The gradients of the squared error for both weights; sparse ones for ours, dense ones for the naive form."""

    def fused(x: Tensor, w_enc: Tensor, w_dec: Tensor) -> Tensor:
        values, indices = ops.sae_encode(x, w_enc, None, K)
        return (ops.sae_decode(values, indices, w_dec).to(x.dtype) - x).square().sum() / len(x)

    def eager(x: Tensor, w_enc: Tensor, w_dec: Tensor) -> Tensor:
        values, indices = torch.relu(x @ w_enc.T).topk(K)
        bag = torch.nn.functional.embedding_bag(indices, w_dec, per_sample_weights=values, mode="sum")
        return (bag - x).square().sum() / len(x)

    def dense(x: Tensor, w_enc: Tensor, w_dec: Tensor) -> Tensor:
        values, indices = torch.relu(x @ w_enc.T).topk(K)
        full = torch.zeros(len(x), len(w_dec), dtype=x.dtype, device=x.device).scatter(1, indices, values)
        return (full @ w_dec - x).square().sum() / len(x)

    def sparsify() -> Function:
        encoder = peers.alone("sparsify", "fused_encoder").fused_encoder
        bag = peers.alone("sparsify", "xformers").xformers_embedding_bag if AT.device == "cuda" else None

        def loss(x: Tensor, w_enc: Tensor, w_dec: Tensor) -> Tensor:
            values, indices, _ = encoder(x, w_enc, w_enc.new_zeros(len(w_enc)), K, "topk")
            decode = bag or (lambda i, w, v: torch.nn.functional.embedding_bag(i, w, per_sample_weights=v, mode="sum"))
            return (decode(indices, w_dec, values) - x).square().sum() / len(x)

        return gradients(loss)

    at = Stream(AT.device, torch.float32, AT.d)
    race(
        lambda: Case(
            f"train sae F={FEATURES} k={K} n={TOKENS} {at.tag}",
            bytes=4 * at.d * (4 * FEATURES + 3 * TOKENS), operations=2 * TOKENS * at.d * (FEATURES + 5 * K),
            fresh=lambda: (at.rows(TOKENS),), fixed=(at.dictionary(FEATURES), at.dictionary(FEATURES)),
            ours=gradients(fused), judge=same_gradients(dense),
            peers={"eager": lambda: gradients(eager), "dense": lambda: gradients(dense), "sparsify": sparsify},
        ),
        memory=("ours", "eager"),
    )  # fmt: skip
