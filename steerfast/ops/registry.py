"""The ops as torch.library sees them, so that they survive torch.compile, CUDA graphs and autograd.

In eager mode `steerfast.ops` calls what lies under them directly (`steerfast.ops.calls`): a registered op costs 10 to 60 µs
a call on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import calls, torch_backend
from .backends import backend_of


def run_sae_encode_backward(
    grad: Tensor, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, values: Tensor, indices: Tensor
) -> list[Tensor]:
    """Gradients of the values for x, w_enc and b_enc (empty where b_enc is None); the selection is held fixed."""
    grad = torch.where(values > 0, grad, 0)
    flat = x.reshape(-1, x.shape[-1])
    d_x = calls.sae_decode(backend_of(w_enc), grad, indices, w_enc, None).to(x.dtype).view(x.shape)
    scatter = _by_feature(indices, w_enc.shape[0])
    d_w = scatter(grad, flat).to(w_enc.dtype)
    if b_enc is None:
        return [d_x, d_w, grad.new_empty(0)]
    return [d_x, d_w, scatter(grad, grad.new_ones(flat.shape[0], 1))[:, 0].to(b_enc.dtype)]


def run_sae_decode_backward(
    grad: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None
) -> list[Tensor]:
    """Gradients of sae_decode for values, w_dec and b_dec (empty where b_dec is None)."""
    flat = grad.reshape(-1, grad.shape[-1]).to(values.dtype)
    d_w = _by_feature(indices, w_dec.shape[0])(values, flat).to(w_dec.dtype)
    d_b = grad.new_empty(0) if b_dec is None else flat.sum(0).to(b_dec.dtype)
    return [_along_rows(flat, indices, w_dec), d_w, d_b]


def run_sae_add_backward(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, scale: Tensor | None
) -> list[Tensor]:
    """Gradients of sae_add for x, values, w_dec and scale (empty where scale is None)."""
    flat = grad.reshape(-1, grad.shape[-1]).to(values.dtype)
    along = _along_rows(flat, indices, w_dec)
    weight = 1 if scale is None else scale.view(*values.shape[:-1], 1)
    d_w = _by_feature(indices, w_dec.shape[0])(values * weight, flat).to(w_dec.dtype)
    d_scale = grad.new_empty(0) if scale is None else (along * values).sum(-1).to(scale.dtype).view(scale.shape)
    return [grad.clone(), weight * along, d_w, d_scale]


def _along_rows(rows: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """rows[n] · weights[indices[n, j]] for every j, a block of tokens at a time: (n, k, d) never exists."""
    (n, d), k = rows.shape, indices.shape[-1]
    step = max(1, (4096 if rows.is_cuda else torch_backend.SAE_ROWS) // k)
    places = indices.reshape(n, k)
    found = [
        torch.bmm(block[:, None], weights.index_select(0, chosen.reshape(-1)).to(rows.dtype).view(-1, k, d).mT)
        for block, chosen in zip(rows.split(step), places.split(step), strict=True)
    ]
    return torch.cat(found).view(indices.shape)


def _by_feature(indices: Tensor, features: int) -> Callable[[Tensor, Tensor], Tensor]:
    """(weights (n, k), rows (n, d)) -> Σ weights[n, j] · rows[n] in row indices[n, j] of (F, d).

    One bag per feature, its tokens in order: the sum has one order on every run and every device, and neither an atomic
    nor an (n, k, d) tensor is needed.
    """
    places = indices.reshape(-1).long()
    order = places.argsort(stable=True)
    counts = torch.zeros(features, dtype=torch.int64, device=places.device).scatter_add_(
        0, places, torch.ones_like(places)
    )
    starts = counts.cumsum(0) - counts
    tokens = order // max(indices.shape[-1], 1)

    def scatter(weights: Tensor, rows: Tensor) -> Tensor:
        chosen = weights.reshape(-1)[order]
        return torch.nn.functional.embedding_bag(
            tokens, rows.to(weights.dtype), starts, per_sample_weights=chosen, mode="sum"
        )

    return scatter


def _by_formula(formula: Callable[..., Any], gradients: tuple[int, ...], outputs: int) -> Callable[..., list[Tensor]]:
    """(grads of the outputs, inputs) -> gradients for the inputs of these numbers, empty where one is None."""

    def run(*args: Any) -> list[Tensor]:
        grads, inputs = args[:outputs], args[outputs:]
        wanted = [i for i in gradients if inputs[i] is not None]
        twice = torch.is_grad_enabled()  # create_graph: the gradient will be differentiated itself
        with torch.enable_grad():
            leaves = [_leaf(value, twice) if i in wanted else value for i, value in enumerate(inputs)]
            out = formula(*leaves)
            found = torch.autograd.grad(
                out, [leaves[i] for i in wanted], grads, create_graph=twice, materialize_grads=True
            )
        by_number = dict(zip(wanted, found, strict=True))
        return [by_number.get(i, grads[0].new_empty(0)) for i in gradients]

    return run


def _leaf(value: Tensor, twice: bool) -> Tensor:
    return value.view_as(value) if twice and value.requires_grad else value.detach().requires_grad_()


_ADD = "Tensor x, Tensor vectors, Tensor? rows, Tensor? scale"
_BANK = "Tensor vectors, Tensor coefficients, Tensor slots, Tensor? rows, Tensor? scale"
_library = torch.library.Library("steerfast", "DEF")


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any], by: int = 0) -> None:
    """Register an op of `calls`, whose argument number `by` decides about the backend; what it returns is contiguous."""
    _register(schema, lambda *args: _contiguous(function(backend_of(args[by]), *args)), fake)


def _contiguous(found: Any) -> Any:
    if isinstance(found, tuple):
        return tuple(map(_contiguous, found))
    return found if found is None else found.contiguous()


def _register(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, function, key)
    torch.library.register_fake(f"steerfast::{name}", fake, lib=_library)


def _define_backward(schema: str, formula: Callable[..., Any], gradients: tuple[int, ...], outputs: int = 1) -> None:
    """Register the gradient of an op, differentiated from the formula of the PyTorch backend."""

    def fake(*args: Any) -> list[Tensor]:
        return _fake_gradients(args[0], *(args[outputs + i] for i in gradients))

    _register(schema, _by_formula(formula, gradients, outputs), fake)


def _fake_gradients(grad: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return [grad.new_empty(0) if value is None else calls.empty_like(value) for value in inputs]


_define(f"add({_ADD}) -> Tensor", calls.add, lambda x, *_: calls.empty_like(x))
_define(f"add_({_ADD.replace('Tensor x', 'Tensor(a!) x')}) -> ()", calls.add_, lambda *_: None)
_define_backward(f"add_backward(Tensor grad, {_ADD}) -> Tensor[]", torch_backend.add, (0, 1, 3))
_define(
    f"subspace(Tensor x, {_BANK}, int modes, int max_rank) -> Tensor", calls.subspace, lambda x, *_: calls.empty_like(x)
)
_define(f"subspace_(Tensor(a!) x, {_BANK}, int modes, int max_rank) -> ()", calls.subspace_, lambda *_: None)
_define_backward(f"subspace_backward(Tensor grad, Tensor x, {_BANK}) -> Tensor[]", torch_backend.subspace, (0, 1, 2, 5))
_define(
    f"subspace_probe(Tensor x, {_BANK}, int modes, int max_rank) -> (Tensor, Tensor)",
    calls.subspace_probe,
    lambda x, vectors, coefficients, slots, rows, scale, modes, max_rank: (
        calls.empty_like(x),
        x.new_empty(calls.probed_shape(x, rows, max_rank), dtype=torch.promote_types(x.dtype, torch.float32)),
    ),
)
_define(
    f"subspace_split_(Tensor hidden, Tensor(a!) residual, {_BANK}, int modes, int max_rank) -> ()",
    calls.subspace_split_,
    lambda *_: None,
    by=1,
)
_NORM = "Tensor hidden, Tensor residual, Tensor weight, Tensor vectors, Tensor? rows, Tensor? scale"
_define(
    f"add_rms_norm({_NORM}, float eps, bool unit_offset) -> (Tensor, Tensor)",
    calls.add_rms_norm,
    lambda hidden, residual, *_: (calls.empty_like(residual), calls.empty_like(residual)),
    by=1,
)
_define_backward(
    f"add_rms_norm_backward(Tensor normed, Tensor stream, {_NORM}, float eps, bool unit_offset) -> Tensor[]",
    torch_backend.add_rms_norm,
    (0, 1, 2, 3, 5),
    outputs=2,
)


def _differentiable(name: str, tensors: int, gradients: tuple[int, ...]) -> None:
    """Give op `name` a gradient: its first `tensors` inputs are kept, `gradients` says which of them get one."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.present = [value is not None for value in inputs[:tensors]]
        ctx.others = len(inputs) - tensors
        ctx.save_for_backward(*(value for value in inputs[:tensors] if value is not None))

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if present else None for present in ctx.present]
        found = dict(zip(gradients, getattr(torch.ops.steerfast, f"{name}_backward")(grad, *inputs), strict=True))
        wanted = [found.get(i) if ctx.needs_input_grad[i] else None for i in range(tensors)]
        return (*wanted, *[None] * ctx.others)

    torch.library.register_autograd(f"steerfast::{name}", backward, setup_context=keep, lib=_library)


_differentiable("add", tensors=4, gradients=(0, 1, 3))
_differentiable("subspace", tensors=6, gradients=(0, 1, 2, 5))


def _keep_add_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.numbers = inputs[6:]


def _add_rms_norm_gradient(ctx: Any, normed: Tensor, stream: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.steerfast.add_rms_norm_backward(normed, stream, *ctx.saved_tensors, *ctx.numbers)
    every = (*found[:4], None, found[4])
    return (*(g if needed else None for g, needed in zip(every, ctx.needs_input_grad, strict=False)), None, None)


torch.library.register_autograd(
    "steerfast::add_rms_norm", _add_rms_norm_gradient, setup_context=_keep_add_rms_norm, lib=_library
)


def _fake_sae_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], k)
    dtype = torch.promote_types(torch.promote_types(x.dtype, w_enc.dtype), torch.float32)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=torch.int32)


_define(
    "sae_encode(Tensor x, Tensor w_enc, Tensor? b_enc, int k) -> (Tensor, Tensor)", calls.sae_encode, _fake_sae_encode
)
_define(
    "sae_encode_threshold(Tensor x, Tensor w_enc, Tensor? b_enc, Tensor threshold, int capacity) -> (Tensor, Tensor, Tensor)",
    calls.sae_encode_threshold,
    lambda x, w_enc, b_enc, threshold, capacity: (
        *_fake_sae_encode(x, w_enc, b_enc, capacity),
        x.new_empty(x.shape[:-1], dtype=torch.int32),
    ),
)
_register(
    "sae_encode_backward(Tensor grad, Tensor x, Tensor w_enc, Tensor? b_enc, Tensor values, Tensor indices) -> Tensor[]",
    run_sae_encode_backward,
    lambda grad, x, w_enc, b_enc, *_: _fake_gradients(grad, x, w_enc, b_enc),
)
_define(
    "sae_decode(Tensor values, Tensor indices, Tensor w_dec, Tensor? b_dec) -> Tensor",
    calls.sae_decode,
    lambda values, indices, w_dec, b_dec: w_dec.new_empty((*values.shape[:-1], w_dec.shape[-1])),
    by=2,
)
_register(
    "sae_decode_backward(Tensor grad, Tensor values, Tensor indices, Tensor w_dec, Tensor? b_dec) -> Tensor[]",
    run_sae_decode_backward,
    lambda grad, values, indices, w_dec, b_dec: _fake_gradients(grad, values, w_dec, b_dec),
)


_define(
    "sae_add(Tensor x, Tensor values, Tensor indices, Tensor w_dec, Tensor? scale) -> Tensor",
    calls.sae_add,
    lambda x, *_: calls.empty_like(x),
)
_register(
    "sae_add_backward(Tensor grad, Tensor x, Tensor values, Tensor indices, Tensor w_dec, Tensor? scale) -> Tensor[]",
    run_sae_add_backward,
    lambda grad, x, values, indices, w_dec, scale: _fake_gradients(grad, x, values, w_dec, scale),
)
_EDIT = "Tensor x, Tensor values, Tensor indices, Tensor features, Tensor table, Tensor w_dec, Tensor? scale"
_define(f"sae_edit({_EDIT}) -> Tensor", calls.sae_edit, lambda x, *_: calls.empty_like(x))
_define_backward(f"sae_edit_backward(Tensor grad, {_EDIT}) -> Tensor[]", torch_backend.sae_edit, (0, 1, 5, 6))
_define(
    "sae_edit_topk(Tensor x, Tensor w_enc, Tensor? b_enc, int k, Tensor features, Tensor table, Tensor w_dec, Tensor? scale) "
    "-> Tensor",
    calls.sae_edit_topk,
    lambda x, *_: calls.empty_like(x),
)
_differentiable("sae_add", tensors=5, gradients=(0, 1, 3, 4))
_differentiable("sae_edit", tensors=7, gradients=(0, 1, 5, 6))


def _keep_sae_encode(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.others = len(inputs) - 3
    ctx.save_for_backward(*inputs[:3], *output[:2])


def _sae_encode_gradient(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    found = torch.ops.steerfast.sae_encode_backward(grad, *ctx.saved_tensors)
    wanted = (g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False))
    return (*wanted, *[None] * ctx.others)


def _keep_sae_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sae_decode_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_values, d_w, d_b = torch.ops.steerfast.sae_decode_backward(grad, *ctx.saved_tensors)
    found = (d_values, None, d_w, d_b)
    return tuple(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=True))


for _encoder in ("sae_encode", "sae_encode_threshold"):
    torch.library.register_autograd(
        f"steerfast::{_encoder}", _sae_encode_gradient, setup_context=_keep_sae_encode, lib=_library
    )
torch.library.register_autograd(
    "steerfast::sae_decode", _sae_decode_gradient, setup_context=_keep_sae_decode, lib=_library
)
