"""Ops of sparse autoencoders: encode, decode, and edits that keep the reconstruction error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from steerfast._checks import FLOATS, check_dictionary, check_stream, check_table, check_width, whole_number

from . import calls
from .backends import backend_of, transformed
from .torch_topk import columns, edited, found

MOST_EDITS = 8  # features that are edited by counting what exceeds them; above, a selection costs less


def sae_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k most active features of each row: Top-K of relu(x W_encᵀ + b_enc), exactly, without the (n, F) matrix.

    Exact: no feature that is left out has a larger pre-activation, up to the rounding of the product; equal values go
    to the lower index.

    Args:
        x: Residual stream, (..., d), n rows in all.
        w_enc: Encoder rows, (F, d). On a GPU all pairs but float32 with float32 run on tensor cores; two dtypes meet in
            bfloat16 parts, as exact as a float32 product (three parts of float32: 3 times the work, 5 beside float16).
        b_enc: Encoder bias, (F,), or None. An SAE that subtracts b_dec first: fold it, b_enc - W_enc b_dec.
        k: Features per row, 1 to F.

    Returns:
        (values, indices), both (..., k): float32 and int32, sorted by value, largest first. Where fewer than k features
        are active the rest is value 0 and index 0, which `sae_decode` skips. A row with a NaN gives NaN in that row only.
        float64 stays float64 and runs on PyTorch whatever the backend.

    Raises:
        TypeError, ValueError: k, a dtype, a shape or a device does not fit; the message names it.

    Reference:
        Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.sae_encode(torch.tensor([[3.0, -1.0, 2.0]]), torch.eye(3), None, k=2)
        (tensor([[3., 2.]]), tensor([[0, 2]], dtype=torch.int32))
    """
    k = _check_encoder("sae_encode", x, w_enc, b_enc, "k", k)
    if _needs_library(x, w_enc, b_enc):
        return torch.ops.steerfast.sae_encode(x, w_enc, b_enc, k)
    return calls.sae_encode(backend_of(x), x, w_enc, b_enc, k)


def sae_encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The active features of each row of a JumpReLU SAE: f = h·[h > θ], h = x W_encᵀ + b_enc, as sorted lists.

    Args:
        x: Residual stream, (..., d), n rows in all.
        w_enc: Encoder rows, (F, d). As in `sae_encode`.
        b_enc: Encoder bias, (F,), or None. An SAE that subtracts b_dec first: fold it, b_enc - W_enc b_dec.
        threshold: θ ≥ 0, (F,) float32: JumpReLU; one number for all: BatchTopK at inference; zero: ReLU.
        capacity: Room for each row, 1 to F.

    Returns:
        (values, indices, counts): float32 and int32, (..., capacity), sorted by value, largest first, ties to the lower
        index, then value 0 and index 0; and int32 (...), how many features are active. Nothing is cut off in silence: a
        row whose count is above the capacity has NaN in all its values; call again with `int(counts.max())`. float64
        stays float64 and runs on PyTorch whatever the backend.

    Raises:
        TypeError, ValueError: capacity, a dtype, a shape or a device does not fit; the message names it.

    Reference:
        Rajamanoharan et al. 2024, JumpReLU (arXiv:2407.14435); Bussmann et al. 2024, BatchTopK (arXiv:2412.06410).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.sae_encode_threshold(torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3), None, torch.full((3,), 1.5), 2)
        (tensor([[3., 2.]]), tensor([[0, 2]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    capacity = _check_encoder("sae_encode_threshold", x, w_enc, b_enc, "capacity", capacity)
    if not isinstance(threshold, Tensor) or threshold.shape != (w_enc.shape[0],) or threshold.dtype not in FLOATS:
        got = f"{threshold.dtype} {tuple(threshold.shape)}" if isinstance(threshold, Tensor) else repr(threshold)
        raise TypeError(
            f"sae_encode_threshold: threshold is {got}; expected a floating tensor ({w_enc.shape[0]},), one per feature: "
            "torch.full((F,), θ) for a single one"
        )
    if threshold.device != x.device:
        raise ValueError(
            f"sae_encode_threshold: threshold is on {threshold.device} and x on {x.device}; move one with .to(...)"
        )
    if _needs_library(x, w_enc, b_enc):
        return torch.ops.steerfast.sae_encode_threshold(x, w_enc, b_enc, threshold, capacity)
    return calls.sae_encode_threshold(backend_of(x), x, w_enc, b_enc, threshold, capacity)


def sae_decode(values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None = None) -> Tensor:
    """Rebuild rows from a few features each: Σⱼ values[j] · W_dec[indices[j]] + b_dec.

    Args:
        values: Feature activations, (..., k), k ≥ 1.
        indices: int32 or int64 of the same shape: their features, each in [0, F). Outside: an error on the torch
            backend, a NaN row on a GPU, where a check would stall the stream.
        w_dec: Decoder rows, (F, d).
        b_dec: Decoder bias, (d,), or None.

    Returns:
        (..., d) in the dtype of w_dec; sums are taken in float32 (float64 stays float64).

    Raises:
        TypeError, ValueError: a dtype, a shape or a device does not fit; the message names it.

    Reference:
        Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.sae_decode(torch.tensor([[3.0, 2.0]]), torch.tensor([[0, 2]]), torch.eye(3))
        tensor([[3., 0., 2.]])
    """
    _check_sparse("sae_decode", values, indices, w_dec, b_dec)
    if _needs_library(values, w_dec, b_dec):
        return torch.ops.steerfast.sae_decode(values, indices, w_dec, b_dec)
    return calls.sae_decode(backend_of(w_dec), values, indices, w_dec, b_dec)


def sae_add(x: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, scale: Tensor | None = None) -> Tensor:
    """Add a few features to rows of the stream: x + scale · Σⱼ values[j] · W_dec[indices[j]].

    What lies outside the dictionary, the reconstruction error, stays as it is. With scale -1 and an SAE's own features what
    is left is that error (and b_dec).

    Args:
        x: Residual stream, (..., d), n rows in all.
        values: What is added of each feature, (..., k), k ≥ 1.
        indices: int32 or int64 of the same shape: the features, each in [0, F), as in `sae_decode`.
        w_dec: Decoder rows, (F, d).
        scale: float32 (n,): multiplies the edit of each row; a row of scale 0 is returned bit for bit. None: 1.

    Returns:
        A new tensor (..., d) of the dtype of x; sums are taken in float32 and rounded once.

    Raises:
        TypeError, ValueError: a dtype, a shape or a device does not fit; the message names it.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.sae_add(torch.ones(1, 3), torch.tensor([[3.0]]), torch.tensor([[2]]), torch.eye(3))
        tensor([[1., 1., 4.]])
    """
    check_stream("sae_add", x)
    _check_sparse("sae_add", values, indices, w_dec, None)
    _check_beside("sae_add", x, values, w_dec, scale)
    if _needs_library(x, values, w_dec, scale):
        return torch.ops.steerfast.sae_add(x, values, indices, w_dec, scale)
    return calls.sae_add(backend_of(x), x, values, indices, w_dec, scale)


def sae_edit(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    features: Tensor,
    table: Tensor,
    w_dec: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Change a few features of an encoded row and keep the reconstruction error: x + scale · Σₘ (t(fₘ) - fₘ) · W_dec[m].

    fₘ is what `sae_encode` or `sae_encode_threshold` found for feature m, 0 where it is not among the selected;
    t(f) = clip(t₀f + t₁, t₂, t₃). One pass over x; no decode of the features that stay.

    Args:
        x: Residual stream, (..., d), n rows in all.
        values: Feature activations, (..., k), as an encoder returned them.
        indices: int32 or int64 of the same shape: their features.
        features: int32 (m,): the numbers of the features that change, each once.
        table: float32 (m, 4): t₀, t₁, t₂, t₃ of each.
        w_dec: Their decoder rows, (m, d).
        scale: float32 (n,): multiplies the edit of each row; a row of scale 0 is returned bit for bit. None: 1.

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, a shape or a device does not fit; the message names it.

    Example:
        >>> import torch, steerfast as sf
        >>> x, w = torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3)
        >>> encoded = sf.ops.sae_encode(x, w, None, k=2)
        >>> to_eight = torch.tensor([[0.0, 8.0, -torch.inf, torch.inf]])
        >>> sf.ops.sae_edit(x, *encoded, torch.tensor([2], dtype=torch.int32), to_eight, w[2:])
        tensor([[3., 1., 8.]])
    """
    check_stream("sae_edit", x)
    check_dictionary("sae_edit", "w_dec", w_dec, "b_dec", None, bias_axis=1)
    _check_codes("sae_edit", values, indices, w_dec)
    _check_beside("sae_edit", x, values, w_dec, scale)
    _check_edits("sae_edit", x, features, table, (w_dec.shape[0],), "one per row of w_dec")
    if _needs_library(x, values, w_dec, scale):
        return torch.ops.steerfast.sae_edit(x, values, indices, features, table, w_dec, scale)
    return calls.sae_edit(backend_of(x), x, values, indices, features, table, w_dec, scale)


def sae_edit_topk(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    k: int,
    features: Tensor,
    table: Tensor,
    w_dec: Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """Change up to eight features of a Top-K SAE and keep the reconstruction error: x + scale · Σₘ (t(fₘ) - fₘ) · W_dec[m].

    What `sae_encode` and `sae_edit` do together, without the selection: feature m is among the k of its row iff it is positive
    and fewer than k features exceed it, where a tie goes to the lower index and NaN is above every number, so it is enough
    to count. The selection is that of `sae_encode`, on a GPU bit for bit; t(f) = clip(t₀f + t₁, t₂, t₃).

    Args:
        x: Residual stream, (..., d), n rows in all.
        w_enc: Encoder rows, (F, d).
        b_enc: Encoder bias, (F,), or None. An SAE that subtracts b_dec first: fold it, b_enc - W_enc b_dec.
        k: Features per row, 1 to F.
        features: int32 (m,), m from 1 to 8: the features that change in every row, each once. Or (n, m): those of each row,
            each once and -1 for none; any other number makes its row NaN, where a check would stall the stream.
        table: float32 (m, 4): t₀, t₁, t₂, t₃ of each; (n, m, 4) where each row has its own features.
        w_dec: Their decoder rows, (m, d); where each row has its own features the whole decoder, (F, d).
        scale: float32 (n,): multiplies the edit of each row; a row of scale 0 is returned bit for bit. None: 1.

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: k, a dtype, a shape or a device does not fit; the message names it.

    Reference:
        Gao et al. 2024 (arXiv:2406.04093); Bricken et al. 2023, Towards Monosemanticity.

    Example:
        >>> import torch, steerfast as sf
        >>> to_eight = torch.tensor([[0.0, 8.0, -torch.inf, torch.inf]])
        >>> x, w, feature = torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3), torch.tensor([2], dtype=torch.int32)
        >>> sf.ops.sae_edit_topk(x, w, None, 2, feature, to_eight, w[2:])
        tensor([[3., 1., 8.]])
    """
    k = _check_encoder("sae_edit_topk", x, w_enc, b_enc, "k", k)
    check_dictionary("sae_edit_topk", "w_dec", w_dec, "b_dec", None, bias_axis=1)
    own = isinstance(features, Tensor) and features.dim() == 2
    rows = (x.numel() // max(x.shape[-1], 1),) if own else ()
    count = features.shape[-1] if isinstance(features, Tensor) and features.dim() else 0
    if count and not 1 <= count <= MOST_EDITS:
        raise ValueError(
            f"sae_edit_topk: features names {count} of them; expected 1 to {MOST_EDITS}: sae_encode and sae_edit take more"
        )
    _check_edits("sae_edit_topk", x, features, table, (*rows, count), "(m,) for all rows or (n, m), m from 1")
    wanted = (w_enc.shape[0] if own else count, x.shape[-1])
    if tuple(w_dec.shape) != wanted or w_dec.device != x.device:
        raise ValueError(
            f"sae_edit_topk: w_dec is {tuple(w_dec.shape)} on {w_dec.device}; expected {wanted} on {x.device}, "
            f"{'the whole decoder' if own else 'one row per feature'}"
        )
    check_table("sae_edit_topk", None, scale, x)
    given = (x, w_enc, b_enc, w_dec, scale)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in given):
        # the encoder's own gradient is sparse
        return edited(x, found(*sae_encode(x, w_enc, b_enc, k), columns(features)), features, table, w_dec, scale)
    if torch.compiler.is_compiling():
        return torch.ops.steerfast.sae_edit_topk(x, w_enc, b_enc, k, features, table, w_dec, scale)
    return calls.sae_edit_topk(backend_of(x), x, w_enc, b_enc, k, features, table, w_dec, scale)


def _check_edits(op: str, x: Tensor, features: Any, table: Any, shape: tuple[int, ...], what: str) -> None:
    """Numbers of features, and four numbers of an edit beside each."""
    for name, tensor, wanted, dtype in (
        ("features", features, shape, torch.int32),
        ("table", table, (*shape, 4), torch.float32),
    ):
        if (
            not isinstance(tensor, Tensor)
            or tuple(tensor.shape) != wanted
            or tensor.dtype != dtype
            or not all(shape[-1:])
        ):
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{op}: {name} is {got}; expected {dtype} {wanted}, {what}")
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and x on {x.device}; move one with .to(...)")


def _check_encoder(op: str, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, name: str, count: Any) -> int:
    check_stream(op, x)
    check_dictionary(op, "w_enc", w_enc, "b_enc", b_enc, bias_axis=0)
    check_width(op, "w_enc", w_enc, x)
    if not isinstance(count, int) or isinstance(count, bool):  # a compiler's own kind of int stays what it is
        count = whole_number(op, name, count)
    if not 1 <= count <= w_enc.shape[0]:
        raise ValueError(f"{op}: {name} is {count}; expected 1 to F = {w_enc.shape[0]}, the rows of w_enc")
    return count


def _check_sparse(op: str, values: Tensor, indices: Tensor, w_dec: Tensor, b_dec: Tensor | None) -> None:
    check_dictionary(op, "w_dec", w_dec, "b_dec", b_dec, bias_axis=1)
    _check_codes(op, values, indices, w_dec)


def _check_codes(op: str, values: Tensor, indices: Tensor, w_dec: Tensor) -> None:
    """Values and their features, (..., k) each, beside the weights."""
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{op}: values must be a floating tensor (..., k); got {got}")
    if values.dim() < 1 or values.shape[-1] < 1:
        raise ValueError(f"{op}: values has shape {tuple(values.shape)}; expected (..., k) with k >= 1")
    if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
        what = f"has dtype {indices.dtype}" if isinstance(indices, Tensor) else f"is {type(indices).__name__}"
        raise TypeError(f"{op}: indices {what}; expected a tensor of torch.int32 or torch.int64")
    if indices.shape != values.shape:
        raise ValueError(
            f"{op}: indices has shape {tuple(indices.shape)} and values {tuple(values.shape)}; expected one shape"
        )
    for name, tensor in (("values", values), ("indices", indices)):
        if tensor.device != w_dec.device:
            raise ValueError(f"{op}: {name} is on {tensor.device} and w_dec on {w_dec.device}; move one with .to(...)")


def _check_beside(op: str, x: Tensor, values: Tensor, w_dec: Tensor, scale: Tensor | None) -> None:
    """x has the width of the decoder and the rows of the values; the scale has one number per row."""
    if x.shape != (*values.shape[:-1], w_dec.shape[1]):
        expected = (*values.shape[:-1], w_dec.shape[1])
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected {expected}, as values and w_dec have")
    if x.device != w_dec.device:
        raise ValueError(f"{op}: x is on {x.device} and w_dec on {w_dec.device}; move one with .to(...)")
    check_table(op, None, scale, x)


def _needs_library(*tensors: Tensor | None) -> bool:
    """Whether a sparse op must go through torch.library: while compiling, and for its sparse gradients on any backend."""
    if torch.compiler.is_compiling():
        return True
    if transformed():  # the formula itself is differentiated
        return False
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
