"""Each op on a backend that has been chosen: the Triton kernel, or the PyTorch function of the same name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import torch_backend, torch_cpu, torch_encode, torch_topk
from .backends import apart, in_full_sums, interpreted, kernels, note_write

if TYPE_CHECKING:
    from typing_extensions import Unpack

Edit = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, int, int]
"""(vectors, coefficients, slots, rows, scale, modes, max_rank), as `ops.subspace` takes them."""


def add(backend: str, x: Tensor, vectors: Tensor, rows: Tensor | None, scale: Tensor | None) -> Tensor:
    """Out of place, on a backend."""
    if backend == "torch":
        quick = None if rows is None else torch_cpu.add(x, vectors, rows, scale)
        return torch_backend.add(x, vectors, rows, scale) if quick is None else quick
    return kernels("add").add(x, vectors, rows, scale, out=empty_like(x))


def add_(backend: str, x: Tensor, vectors: Tensor, rows: Tensor | None, scale: Tensor | None) -> None:
    """In place, on a backend."""
    if backend == "torch":
        if rows is None or torch_cpu.add(x, vectors, rows, scale, in_place=True) is None:
            x.copy_(torch_backend.add(x, vectors, rows, scale))
    elif not (_dense(x) and apart(x, vectors, scale)):
        x.copy_(add(backend, x, vectors, rows, scale))
    else:
        kernels("add").add(x, vectors, rows, scale, out=x)
        note_write(x)


def subspace(backend: str, x: Tensor, *edit: Unpack[Edit]) -> Tensor:
    """Out of place, on a backend."""
    if backend == "torch":
        quick = torch_cpu.subspace(x, *edit[:5])
        return torch_backend.subspace(x, *edit[:5]) if quick is None else quick
    if _to_widen(x, edit[0]):
        return subspace(backend, x.float(), edit[0].float(), *edit[1:]).to(x.dtype)
    return _launched(x, *edit)(x, *edit, out=empty_like(x))


def subspace_(backend: str, x: Tensor, *edit: Unpack[Edit]) -> None:
    """In place, on a backend."""
    if backend == "torch":
        if torch_cpu.subspace(x, *edit[:5], in_place=True) is None:
            x.copy_(torch_backend.subspace(x, *edit[:5]))
    elif not (_dense(x) and apart(x, *edit[:2], edit[4])) or _to_widen(x, edit[0]):
        x.copy_(subspace(backend, x, *edit))
    else:
        _launched(x, *edit)(x, *edit, out=x)
        note_write(x)


def subspace_probe(backend: str, x: Tensor, *edit: Unpack[Edit]) -> tuple[Tensor, Tensor]:
    """(x', y), on a backend."""
    vectors, coefficients, slots, rows, scale, _, max_rank = edit
    if backend == "torch":
        return torch_backend.subspace_probe(x, vectors, coefficients, slots, max_rank, rows, scale)
    if _to_widen(x, vectors):
        moved, seen = subspace_probe(backend, x.float(), vectors.float(), *edit[1:])
        return moved.to(x.dtype), seen
    y = x.new_zeros(probed_shape(x, rows, max_rank), dtype=torch.float32)
    return kernels("subspace").subspace(x, *edit, out=empty_like(x), probe=y), y


def subspace_split_(backend: str, hidden: Tensor, residual: Tensor, *edit: Unpack[Edit]) -> None:
    """In place on residual, on a backend."""
    if backend == "torch":
        residual.copy_(torch_backend.subspace_split(hidden, residual, *edit[:5]))
        return
    if _to_widen(residual, edit[0]):
        out = residual.float()
        subspace_split_(backend, hidden.float(), out, edit[0].float(), *edit[1:])
        residual.copy_(out)
        return
    in_place = _dense(residual) and apart(residual, *edit[:2], edit[4])
    out = residual if in_place else residual.clone(memory_format=torch.contiguous_format)
    kernels("subspace").subspace(out, *edit, out=out, hidden=hidden)
    if out is residual:
        note_write(residual)
    else:
        residual.copy_(out)


def add_rms_norm(
    backend: str,
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    vectors: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    eps: float,
    unit_offset: bool,
) -> tuple[Tensor, Tensor]:
    """(normed, stream), on a backend."""
    if backend == "torch":
        return torch_backend.add_rms_norm(hidden, residual, weight, vectors, rows, scale, eps, unit_offset)
    return kernels("add").add_rms_norm(
        hidden, residual, weight, vectors, rows, scale, eps, unit_offset, empty_like(residual), empty_like(residual)
    )


def sae_encode(backend: str, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """(values, indices) on a backend; float64 on PyTorch."""
    if backend == "torch" or torch.float64 in (x.dtype, w_enc.dtype):
        return torch_encode.sae_encode(x, w_enc, b_enc, k)
    return kernels("sae_encode").sae_encode(x, w_enc, b_enc, k)


def sae_encode_threshold(
    backend: str, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, indices, counts) on a backend; float64 on PyTorch."""
    if backend == "torch" or torch.float64 in (x.dtype, w_enc.dtype):
        return torch_encode.sae_encode_threshold(x, w_enc, b_enc, threshold, capacity)
    return kernels("sae_encode_threshold").sae_encode_threshold(x, w_enc, b_enc, threshold, capacity)


def sae_decode(backend: str, values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None) -> Tensor:
    """The reconstruction, on a backend; float64 on PyTorch."""
    if backend == "torch" or torch.float64 in (values.dtype, w_dec.dtype):
        return torch_backend.sae_decode(values, indices, w_dec, b_dec)
    return kernels("sae_decode").sae_decode(values, indices, w_dec, b_dec)


def sae_add(backend: str, x: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, scale: Tensor | None) -> Tensor:
    """Out of place, on a backend; float64 on PyTorch."""
    if backend == "torch" or torch.float64 in (x.dtype, values.dtype, w_dec.dtype):
        return torch_backend.sae_add(x, values, indices, w_dec, scale)
    return kernels("sae_decode").sae_add(x, values, indices, w_dec, scale)


def sae_edit(
    backend: str,
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    features: Tensor,
    table: Tensor,
    w_dec: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Out of place, on a backend; float64 on PyTorch."""
    if backend == "torch" or torch.float64 in (x.dtype, values.dtype, w_dec.dtype):
        return torch_backend.sae_edit(x, values, indices, features, table, w_dec, scale)
    return kernels("sae_edit").sae_edit(x, values, indices, features, table, w_dec, scale)


def sae_edit_topk(
    backend: str,
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    features: Tensor,
    table: Tensor,
    w_dec: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Out of place, on a backend; float64 on PyTorch."""
    if backend == "torch" or torch.float64 in (x.dtype, w_enc.dtype, w_dec.dtype):
        return torch_topk.sae_edit_topk(x, w_enc, b_enc, k, features, table, w_dec, scale)
    return kernels("sae_edit_topk").sae_edit_topk(x, w_enc, b_enc, k, features, table, w_dec, scale)


def probed_shape(x: Tensor, rows: Tensor | None, max_rank: int) -> tuple[int, int, int]:
    """Shape of what a probe returns: rows, columns of the row table, directions."""
    columns = 1 if rows is None or rows.dim() == 1 else rows.shape[1]
    return x.numel() // x.shape[-1], columns, max_rank


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor of the shape, dtype and device of x; its contents are arbitrary."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launched(x: Tensor, *edit: Unpack[Edit]) -> Callable[..., Tensor]:
    """The launcher of the kernels; with so many directions there may be a flow of full rank, which takes a library's products."""
    return _with_products if edit[-1] == x.shape[-1] else kernels("subspace").subspace


@in_full_sums
def _with_products(x: Tensor, *edit: Any, out: Tensor) -> Tensor:
    return kernels("subspace").subspace(x, *edit, out=out)


def _to_widen(*tensors: Tensor) -> bool:
    """Whether a kernel with a product would run on bfloat16 in Triton's interpreter."""
    return interpreted() and any(tensor.dtype == torch.bfloat16 for tensor in tensors)


def _dense(x: Tensor) -> bool:
    """Whether x can be seen as (n, d) rows without a copy, so that a kernel can write into it."""
    return x.is_contiguous() or (x.dim() <= 2 and x.stride(-1) == 1)
