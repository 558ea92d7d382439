"""The one op under the others, project → act → lift, with a bank of slots; and an addition fused with the norm behind it."""

from __future__ import annotations

import torch
from torch import Tensor

from steerfast._checks import check_stream, check_table, check_width, fits

from . import calls, compiled_cpu, torch_backend, torch_cpu
from .backends import backend_of
from .slots import ALL_MODES, HINGE


def subspace(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    modes: int = ALL_MODES,
    max_rank: int | None = None,
) -> Tensor:
    """Project → act → lift with the slots of a bank: x' = s·x + C·g, (s, g) = act(Bᵀx, ‖x‖); the one op under the others.

    Args:
        x: Residual stream, (..., d), n rows in all.
        vectors: The rows of every B and C of the bank, (R, d).
        coefficients: float32 (M, 8): per slot one row of constants, then one row per direction.
        slots: int32 (S, 8): per slot mode, rank, first row of B, first row of C, row of the constants, steps, keep_norm, 0.
            The layout is written down in `steerfast.ops.slots`; `sf.Bank` fills it.
        rows: int32 (n,) or (n, P), P ≤ 4: slots applied to each row, left to right; -1 = none. A row whose entries are
            all -1 is returned bit for bit. A row that names a slot which the bank does not have (≥ S or < -1) becomes NaN:
            on a GPU an error would stall the stream. None: slot 0 for every row.
        scale: float32 of the shape of rows, or (n,) without rows: multiplies the edit (for a flow its T). None: 1.
        modes: What may occur, or-ed: modes, and KEEP_NORM where a slot restores lengths; the kernel is compiled for
            these only.
        max_rank: The largest rank that may occur; a bank of one full-rank flow runs as two matrix products where it is d.
            None: unknown, at most the number of rows of vectors.

    Returns:
        A new tensor (..., d) of the dtype of x. A row's result never depends on what the rows beside it hold. On a GPU its
        last bits may depend on how many they are, but for a bank of one mode and up to 3 directions: the order of sums
        changes above 256 rows (above 512 from rank 16 on), and with the height of the tiles at some thousands. Above, several
        slots of one row round to the dtype of x in between. On a CPU (with numba beyond 16 directions) they may depend on how
        many rows there are, and how many of them have its slot.

    Raises:
        TypeError, ValueError: a dtype, width, device or table shape does not fit; the message names it.

    Example:
        >>> import torch, steerfast as sf
        >>> bank = sf.Bank(width=2, slots=4)
        >>> slot = bank.register(sf.Ablate(torch.tensor([1.0, 0.0])))
        >>> sf.ops.subspace(torch.tensor([[3.0, 4.0]]), *bank.tensors)
        tensor([[0., 4.]])
    """
    if (max_rank is None or (type(max_rank) is int and max_rank >= 0)) and not torch.compiler.is_compiling():
        # before the looks that follow, which would cost more than the edit of one row
        quick = compiled_cpu.subspace(x, vectors, coefficients, slots, rows, scale)
        if quick is None:
            quick = torch_cpu.subspace_by_calls(x, vectors, coefficients, slots, rows, scale)
        if quick is not None:
            return quick
    if max_rank is None:
        modes |= HINGE  # no promise that the one slot is a flow of full rank
    max_rank = _check_bank("subspace", x, vectors, coefficients, slots, rows, scale, max_rank)
    if torch.compiler.is_compiling():
        return torch.ops.steerfast.subspace(x, vectors, coefficients, slots, rows, scale, modes, max_rank)
    backend = backend_of(x)
    if backend == "torch":
        return torch_backend.subspace(x, vectors, coefficients, slots, rows, scale)
    if needs_gradient(backend, x, vectors, coefficients, scale):
        return torch.ops.steerfast.subspace(x, vectors, coefficients, slots, rows, scale, modes, max_rank)
    return calls.subspace(backend, x, vectors, coefficients, slots, rows, scale, modes, max_rank)


def subspace_(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    modes: int = ALL_MODES,
    max_rank: int | None = None,
) -> Tensor:
    """`subspace`, written into x."""
    if max_rank is None:
        modes |= HINGE  # no promise that the one slot is a flow of full rank
    max_rank = _check_bank("subspace_", x, vectors, coefficients, slots, rows, scale, max_rank)
    check_in_place("subspace_", x, vectors, coefficients, scale)
    if torch.compiler.is_compiling():
        torch.ops.steerfast.subspace_(x, vectors, coefficients, slots, rows, scale, modes, max_rank)
    else:
        calls.subspace_(backend_of(x), x, vectors, coefficients, slots, rows, scale, modes, max_rank)
    return x


def subspace_probe(
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    max_rank: int,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    modes: int = ALL_MODES,
) -> tuple[Tensor, Tensor]:
    """`subspace`, and what it projected: (x', y) with y = Bᵀx in the same pass, for monitoring.

    Args:
        x: Residual stream, (..., d), n rows in all.
        vectors: The rows of the bank, as in `subspace`.
        coefficients: Its numbers.
        slots: Its headers.
        max_rank: K, the largest rank that may occur.
        rows: int32 (n,) or (n, P), as in `subspace`. None: slot 0 for every row.
        scale: As in `subspace`.
        modes: The modes that may occur, or-ed.

    Returns:
        x' (..., d), and y (n, P, K), float32 (float64 for a float64 x): for each row and column of its table the
        projections that the slot saw, zero beyond its rank, where no slot is named, and for `Add` and `Affine`. A slot
        that the bank does not have projects nothing, and the slots behind it see the NaN that it leaves.
        Without gradients on the Triton backend.

    Raises:
        TypeError, ValueError: a dtype, width, device or table shape does not fit; the message names it.

    Example:
        >>> import torch, steerfast as sf
        >>> bank = sf.Bank(width=2, slots=1)
        >>> slot = bank.register(sf.Ablate(torch.tensor([1.0, 0.0])))
        >>> sf.ops.subspace_probe(torch.tensor([[3.0, 4.0]]), *bank.tensors, max_rank=1)
        (tensor([[0., 4.]]), tensor([[[3.]]]))
    """
    _check_bank("subspace_probe", x, vectors, coefficients, slots, rows, scale, max_rank)
    if torch.compiler.is_compiling():
        return torch.ops.steerfast.subspace_probe(x, vectors, coefficients, slots, rows, scale, modes, max_rank)
    return calls.subspace_probe(backend_of(x), x, vectors, coefficients, slots, rows, scale, modes, max_rank)


def subspace_split_(
    hidden: Tensor,
    residual: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    modes_and_rank: tuple[int, int] | None = None,
) -> Tensor:
    """`subspace` on a stream carried as two tensors: residual += δ(hidden + residual), in place.

    Norms, projections and gates are taken on the whole stream x = hidden + residual, summed in float32; only
    `residual` is written. An engine that adds the two in its next norm then sees the steered stream.

    Args:
        hidden: What the layer adds, (..., d), n rows in all.
        residual: The stream before it, of the same shape and dtype; written into.
        vectors: The rows of the bank, as in `subspace`.
        coefficients: Its numbers.
        slots: Its headers.
        rows: As in `subspace`; a row whose entries are all -1 keeps its residual bit for bit, and one that names a slot
            outside the bank gets a residual of NaN.
        scale: As in `subspace`.
        modes_and_rank: (modes that may occur, largest rank that may occur); None: all modes, the rows of vectors.

    Returns:
        residual.

    Raises:
        TypeError, ValueError: a dtype, width, device or table shape does not fit; the message names it.
        RuntimeError: a gradient is needed.

    Example:
        >>> import torch, steerfast as sf
        >>> bank = sf.Bank(width=2, slots=1)
        >>> slot = bank.register(sf.Ablate(torch.tensor([1.0, 0.0])))
        >>> sf.ops.subspace_split_(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), *bank.tensors)
        tensor([[-3.,  0.]])
    """
    op = "subspace_split_"
    _check_pair(op, hidden, residual)
    modes, rank = (ALL_MODES, None) if modes_and_rank is None else modes_and_rank
    rank = _check_bank(op, residual, vectors, coefficients, slots, rows, scale, rank)
    check_in_place(op, residual, hidden, vectors, coefficients, scale)
    if torch.compiler.is_compiling():
        torch.ops.steerfast.subspace_split_(hidden, residual, vectors, coefficients, slots, rows, scale, modes, rank)
    else:
        calls.subspace_split_(
            backend_of(residual), hidden, residual, vectors, coefficients, slots, rows, scale, modes, rank
        )
    return residual


def add_rms_norm(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    vectors: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    unit_offset: bool = False,
) -> tuple[Tensor, Tensor]:
    """Residual add, steering and the next RMSNorm in one pass: two reads, two writes.

    stream = hidden + residual + scale · vectors[rows]; normed = stream / √(mean(stream²) + eps) · weight, taken on the
    stream as it is stored, so that normed is exactly the norm of the returned stream.

    Args:
        hidden: What the layer adds, (..., d), n rows in all.
        residual: The stream before it, of the same shape and dtype.
        weight: Gain of the norm, (d,).
        vectors: One vector (d,) or a bank of S vectors (S, d).
        rows: int32 (n,) or (n, P), P ≤ 4: vectors added to each row; -1 = none; any other number outside the bank: the row
            becomes NaN. None: vector 0 for every row.
        scale: float32 of the shape of rows, or (n,) without rows; None: 1.
        eps: Added to the mean square.
        unit_offset: The gain is 1 + weight (Gemma).

    Returns:
        (normed, stream), both (..., d) in the dtype of residual.

    Raises:
        TypeError, ValueError: a dtype, width, device or table shape does not fit; the message names it.

    Reference:
        Zhang & Sennrich 2019, Root Mean Square Layer Normalization (arXiv:1910.07467).

    Example:
        >>> import torch, steerfast as sf
        >>> zero, one = torch.zeros(1, 2), torch.ones(1, 2)
        >>> sf.ops.add_rms_norm(zero, one, torch.ones(2), torch.tensor([2.0, 2.0]), eps=0.0)
        (tensor([[1., 1.]]), tensor([[3., 3.]]))
    """
    op = "add_rms_norm"
    _check_pair(op, hidden, residual)
    check_op(op, residual, "vectors", vectors, rows, scale)
    check_width(op, "weight", weight, residual)
    if weight.dim() != 1:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected ({residual.shape[-1]},)")
    if torch.compiler.is_compiling():
        return torch.ops.steerfast.add_rms_norm(hidden, residual, weight, vectors, rows, scale, eps, unit_offset)
    backend = backend_of(residual)
    if needs_gradient(backend, residual, hidden, weight, vectors, scale):
        return torch.ops.steerfast.add_rms_norm(hidden, residual, weight, vectors, rows, scale, eps, unit_offset)
    return calls.add_rms_norm(backend, hidden, residual, weight, vectors, rows, scale, eps, unit_offset)


def check_op(
    op: str,
    x: Tensor,
    name: str,
    directions: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    in_place: bool = False,
) -> None:
    """Refuse a stream, directions, a row table or a scale that do not fit each other."""
    if not fits(x, directions, rows, scale):
        check_stream(op, x)
        check_width(op, name, directions, x)
        check_table(op, rows, scale, x)
    if in_place:
        check_in_place(op, x, directions, scale)


def _check_pair(op: str, hidden: Tensor, residual: Tensor) -> None:
    """Refuse two halves that are not of one stream; what else residual must be, `check_op` looks at."""
    if (
        isinstance(hidden, Tensor)
        and isinstance(residual, Tensor)
        and hidden.shape == residual.shape
        and hidden.dtype == residual.dtype
        and hidden.device == residual.device
    ):
        return
    check_stream(op, residual)
    check_stream(op, hidden)
    raise ValueError(
        f"{op}: hidden is {tuple(hidden.shape)} {hidden.dtype} on {hidden.device} and residual {tuple(residual.shape)} "
        f"{residual.dtype} on {residual.device}; expected two halves of one stream"
    )


def check_in_place(op: str, x: Tensor, *others: Tensor | None) -> None:
    """Refuse an in-place edit that would lose a gradient, or write into rows that share memory."""
    if torch.is_grad_enabled():
        for tensor in (x, *others):
            if tensor is not None and tensor.requires_grad:
                name = "x" if tensor is x else "an argument"
                raise RuntimeError(
                    f"{op}: {name} needs a gradient, which an in-place edit would break; use {op.rstrip('_')} instead"
                )
    if not x.is_contiguous() and _overlaps(x):
        raise ValueError(
            f"{op}: x is an expanded view, several of whose rows share memory; use {op.rstrip('_')}, or x.contiguous()"
        )


def _overlaps(x: Tensor) -> bool:
    """Whether two numbers of a view may have one place: a step is no longer than what the smaller steps reach."""
    reached = 0
    for step, size in sorted((abs(step), size) for step, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if step <= reached:
            return True
        reached += step * (size - 1)
    return False


def _check_bank(
    op: str,
    x: Tensor,
    vectors: Tensor,
    coefficients: Tensor,
    slots: Tensor,
    rows: Tensor | None,
    scale: Tensor | None,
    max_rank: int | None,
) -> int:
    check_op(op, x, "vectors", vectors, rows, scale)
    if not _is_bank(x, vectors, coefficients, slots):
        _refuse_bank(op, x, vectors, coefficients, slots)
    if max_rank is None:
        return vectors.shape[0]
    if isinstance(max_rank, bool) or not isinstance(max_rank, int):
        raise TypeError(f"{op}: max_rank is {max_rank!r}; expected a whole number >= 0")
    if max_rank < 0:
        raise ValueError(f"{op}: max_rank is {max_rank}; expected >= 0, the largest rank of a slot")
    return max_rank


def _is_bank(x: Tensor, vectors: Tensor, coefficients: Tensor, slots: Tensor) -> bool:
    numbers, headers, device = coefficients.shape, slots.shape, x.device
    return (
        vectors.dim() == len(numbers) == len(headers) == 2
        and numbers[1] == headers[1] == 8
        and slots.dtype == torch.int32
        and coefficients.is_contiguous()
        and slots.is_contiguous()
        and coefficients.device == device
        and slots.device == device
    )


def _refuse_bank(op: str, x: Tensor, vectors: Tensor, coefficients: Tensor, slots: Tensor) -> None:
    """Say what `_is_bank` has found."""
    if vectors.dim() != 2:
        raise ValueError(f"{op}: vectors has shape {tuple(vectors.shape)}; expected (R, d)")
    for name, table in (("coefficients", coefficients), ("slots", slots)):
        if table.dim() != 2 or table.shape[1] != 8 or not table.is_contiguous():
            raise ValueError(f"{op}: {name} has shape {tuple(table.shape)}; expected a contiguous table with 8 columns")
        if table.device != x.device:
            raise ValueError(f"{op}: {name} is on {table.device} and x on {x.device}; move it with .to(...)")
    if slots.dtype != torch.int32:
        raise TypeError(f"{op}: slots has dtype {slots.dtype}; expected torch.int32")


def edited(backend: str, x: Tensor, bank: tuple[Tensor, Tensor, Tensor], modes: int, rank: int) -> Tensor:
    """x after the one slot of a bank of our own, on a backend; everything has been checked."""
    if by_library(backend, x, *bank[:2]):
        return torch.ops.steerfast.subspace(x, *bank, None, None, modes, rank)
    return calls.subspace(backend, x, *bank, None, None, modes, rank)


def edited_(backend: str, x: Tensor, bank: tuple[Tensor, Tensor, Tensor], modes: int, rank: int) -> Tensor:
    """`edited`, written into x."""
    if torch.compiler.is_compiling():
        torch.ops.steerfast.subspace_(x, *bank, None, None, modes, rank)
    else:
        calls.subspace_(backend, x, *bank, None, None, modes, rank)
    return x


def by_library(backend: str, *tensors: Tensor | None) -> bool:
    """Whether a call must go through torch.library: a compiler traces it, or a kernel needs a gradient."""
    return torch.compiler.is_compiling() or needs_gradient(backend, *tensors)


def needs_gradient(backend: str, *tensors: Tensor | None) -> bool:
    """Whether a kernel is to run whose gradient someone needs."""
    if backend != "triton" or not torch.is_grad_enabled():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
