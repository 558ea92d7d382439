"""The ops: pure functions on (..., d) tensors, each with an in-place twin ending in "_".

All of them are one idea, project → act → lift: x' = s·x + C·g with (s, g) = act(Bᵀx, ‖x‖). They run as fused Triton
kernels on a GPU and as PyTorch elsewhere, return the dtype of x, compute in float32 (float64 stays float64), and work
under torch.compile. Directions are rows: features (m, d) stand for S = features.T in the formulas.

The in-place twins write into x and return it; they raise RuntimeError where a gradient of x is needed.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import _library, reference
from ._backends import backend_of, kernels
from ._checks import FLOATS, check_dictionary, check_stream, check_table, check_width, finite_number, one_of
from .flows import check_steps, path_length
from .reference import AFFINE, ALL_MODES, FLOW, HINGE, SOLVE
from .solvers import SOLVERS, Field, Scheme, pack, scheme

__all__ = [
    "ablate",
    "ablate_",
    "add",
    "add_",
    "add_rms_norm",
    "affine",
    "affine_",
    "amplify",
    "amplify_",
    "calibrate",
    "calibrate_",
    "flow",
    "flow_",
    "loreft",
    "sae_add",
    "sae_decode",
    "sae_edit",
    "sae_encode",
    "sae_encode_threshold",
    "similarity",
    "subspace",
    "subspace_",
    "subspace_probe",
    "subspace_split_",
]

_UNIT = (0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # a slot's constants: strength 1
_ERASE = (0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def add(x: Tensor, vectors: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Add a steering vector: x + scale · vectors[rows].

    Args:
        x: Residual stream, (..., d), n rows in all.
        vectors: One vector (d,) or a bank of S vectors (S, d).
        rows: int32 (n,) or (n, P), P ≤ 4: vectors added to each row, left to right; -1 = none. A row whose entries
            are all -1 is returned bit for bit. None: vector 0 for every row.
        scale: float32 of the shape of rows, or (n,) without rows: the strength c of each edit. None: 1.

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, width, device or table shape does not fit; the message names it.

    Reference:
        Turner et al. 2023, Activation Addition (arXiv:2308.10248).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.add(torch.zeros(2, 3), torch.ones(3), scale=torch.tensor([1.0, 2.0]))
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """
    _check("add", x, "vectors", vectors, rows, scale)
    if _registered(x, vectors, scale):
        return torch.ops.steerfast.add(x, vectors, rows, scale)
    return _library.run_add(x, vectors, rows, scale)


def add_(x: Tensor, vectors: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`add`, written into x."""
    _check("add_", x, "vectors", vectors, rows, scale, in_place=True)
    run = torch.ops.steerfast.add_ if torch.compiler.is_compiling() else _library.run_add_
    run(x, vectors, rows, scale)
    return x


def ablate(x: Tensor, basis: Tensor) -> Tensor:
    """Remove a direction or a subspace: x - VVᵀx, V = basis.T.

    Args:
        x: Residual stream, (..., d).
        basis: One unit direction (d,) or k orthonormal rows (k, d). Rows that are not orthonormal are the caller's
            choice and give the formula as it stands; `sf.Ablate` orthonormalises.

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, width or device does not fit; the message names it.

    Reference:
        Arditi et al. 2024, Refusal in Language Models Is Mediated by a Single Direction (arXiv:2406.11717).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.ablate(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]))
        tensor([[0., 4.]])
    """
    _check("ablate", x, "basis", basis)
    if _by_formula(x):
        return reference.ablate(x, basis)
    return _one_slot(x, basis, _ERASE)


def ablate_(x: Tensor, basis: Tensor) -> Tensor:
    """`ablate`, written into x."""
    _check("ablate_", x, "basis", basis, in_place=True)
    return x.copy_(reference.ablate(x, basis)) if _by_formula(x) else _one_slot_(x, basis, _ERASE)


def amplify(x: Tensor, features: Tensor, alpha: float = 1.0) -> Tensor:
    """Amplify features where they are active: x + α · relu(xS)Sᵀ, S = features.T.

    Args:
        x: Residual stream, (..., d).
        features: One feature direction (d,) or m of them (m, d), for instance decoder rows of an SAE.
        alpha: α. -1 erases the active part only if the features are orthogonal: 150 random directions kept 47 %.

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, width or device does not fit, or α is not finite; the message names it.

    Reference:
        Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.amplify(torch.tensor([[2.0, -1.0]]), torch.eye(2), alpha=0.5)
        tensor([[ 3., -1.]])
    """
    _check("amplify", x, "features", features)
    alpha = finite_number("amplify", "alpha", alpha)
    if _by_formula(x):
        return reference.amplify(x, features, alpha)
    return _one_slot(x, features, (0.0, 0.0, alpha, 0.0, 0.0, 0.0, 0.0, 0.0))


def amplify_(x: Tensor, features: Tensor, alpha: float = 1.0) -> Tensor:
    """`amplify`, written into x."""
    _check("amplify_", x, "features", features, in_place=True)
    alpha = finite_number("amplify_", "alpha", alpha)
    if _by_formula(x):
        return x.copy_(reference.amplify(x, features, alpha))
    return _one_slot_(x, features, (0.0, 0.0, alpha, 0.0, 0.0, 0.0, 0.0, 0.0))


def calibrate(x: Tensor, features: Tensor, beta: float = 1.0) -> Tensor:
    """Replace the active part of features by a fixed one: x - relu(xS)Sᵀ + β · mean(S), S = features.T.

    Args:
        x: Residual stream, (..., d).
        features: One feature direction (d,) or m of them (m, d).
        beta: β, the multiple of the features' mean that is put in; its effect grows with the norm of mean(S).

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, width or device does not fit, or β is not finite; the message names it.

    Reference:
        Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.calibrate(torch.tensor([[2.0, -1.0]]), torch.eye(2), beta=2.0)
        tensor([[1., 0.]])
    """
    _check("calibrate", x, "features", features)
    beta = finite_number("calibrate", "beta", beta)
    if _by_formula(x):
        return reference.calibrate(x, features, beta)
    return _one_slot(x, features, _calibration(features, beta))


def calibrate_(x: Tensor, features: Tensor, beta: float = 1.0) -> Tensor:
    """`calibrate`, written into x."""
    _check("calibrate_", x, "features", features, in_place=True)
    beta = finite_number("calibrate_", "beta", beta)
    if _by_formula(x):
        return x.copy_(reference.calibrate(x, features, beta))
    return _one_slot_(x, features, _calibration(features, beta))


def flow(
    x: Tensor,
    basis: Tensor,
    eigenvalues: Tensor,
    bias: Tensor,
    T: float | None = None,
    angle: float | None = None,
    steps: int = 10,
    method: str = "euler",
) -> Tensor:
    """Follow the gradient of a quadratic barrier: steps of da/dt = ∇h/‖∇h‖ over [0, T].

    h(a) = x̂ᵀQΛQᵀx̂ + b̃ᵀQᵀx̂ with x̂ = a/‖a‖ and Q = basis.T. The trajectory stays in span(Q, a), so all steps are
    taken on k + 1 numbers and lifted once: exact, not an approximation of the d-dimensional flow.

    Args:
        x: Residual stream, (..., d).
        basis: Orthonormal rows (k, d) whose span holds the barrier. k = d: two matrix products around the steps.
        eigenvalues: Λ's diagonal, (k,).
        bias: b̃, the linear term in the coordinates of the basis, (k,).
        T: Length of the path in units of x. Exactly one of T and angle.
        angle: T/‖a‖ of each row, in radians.
        steps: Number of steps, ≥ 1.
        method: The solver, a name of `steerfast.solvers.SOLVERS`, such as "euler", "geodesic" or "rk4".

    Returns:
        A new tensor (..., d) of the dtype of x. A zero row and a row at a stationary point of h do not move. On a CPU one
        row, a few rows and many take three ways through the same steps, so the last bit of a row may depend on their number.

    Raises:
        TypeError, ValueError: a dtype, width, device or number does not fit; the message names it.

    Reference:
        Zhao et al. 2026, ODESteer (arXiv:2602.17560); docs/flow.md derives the k + 1 numbers.

    Example:
        >>> import torch, steerfast as sf
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> sf.ops.flow(x, torch.tensor([[1.0, 0.0]]), torch.zeros(1), torch.ones(1), T=0.5, steps=1)
        tensor([[3.4000, 3.7000]])
    """
    path, how = path_length("flow", T, angle), _check_flow("flow", x, basis, eigenvalues, bias, steps, method)
    if _by_formula(x) and not torch.compiler.is_compiling():
        return reference.flow(x, basis, Field(eigenvalues, bias), path, how.count(steps), how)
    bank = _flow_bank(x, basis, eigenvalues, bias, path, steps, method)
    return subspace(x, *bank, modes=_flow_mode(how), max_rank=bank[0].shape[0])


def flow_(
    x: Tensor,
    basis: Tensor,
    eigenvalues: Tensor,
    bias: Tensor,
    T: float | None = None,
    angle: float | None = None,
    steps: int = 10,
    method: str = "euler",
) -> Tensor:
    """`flow`, written into x."""
    path, how = path_length("flow_", T, angle), _check_flow("flow_", x, basis, eigenvalues, bias, steps, method)
    _check_in_place("flow_", x, basis, eigenvalues, bias)
    if _by_formula(x) and not torch.compiler.is_compiling():
        return x.copy_(reference.flow(x, basis, Field(eigenvalues, bias), path, how.count(steps), how))
    bank = _flow_bank(x, basis, eigenvalues, bias, path, steps, method)
    return subspace_(x, *bank, modes=_flow_mode(how), max_rank=bank[0].shape[0])


def loreft(x: Tensor, R: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """Low-rank linear-subspace fine-tuning: x + Rᵀ(Wx + b - Rx), differentiable in all four.

    Args:
        x: Residual stream, (..., d).
        R: Rows (r, d), orthonormal by the caller's care (torch.nn.utils.parametrizations.orthogonal keeps them so).
        W: (r, d).
        b: (r,).

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, shape or device does not fit; the message names it.

    Reference:
        Wu et al. 2024, ReFT: Representation Finetuning for Language Models (arXiv:2404.03592).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.loreft(torch.tensor([[3.0, 4.0]]), torch.eye(2)[:1], torch.zeros(1, 2), torch.tensor([1.0]))
        tensor([[1., 4.]])
    """
    _check("loreft", x, "R", R)
    if R.dim() != 2 or W.shape != R.shape or b.shape != R.shape[:1]:
        raise ValueError(
            f"loreft: R has shape {tuple(R.shape)}, W {tuple(W.shape)} and b {tuple(b.shape)}; expected (r, d), (r, d) and (r,)"
        )
    rank = R.shape[0]
    wide = torch.promote_types(R.dtype, torch.float32)
    vectors = torch.cat([W.to(wide) - R.to(wide), R.to(wide)])
    tables = _make_loreft_tables if torch.compiler.is_compiling() else _loreft_tables
    head, slots = tables(rank, wide, x.device)
    columns = torch.nn.functional.pad(torch.stack([b.to(wide), torch.ones_like(b, dtype=wide)], dim=1), (0, 6))
    return subspace(x, vectors, torch.cat([head, columns]), slots, modes=HINGE, max_rank=rank)


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
            The layout is written down in `steerfast.reference`; `sf.Bank` fills it.
        rows: int32 (n,) or (n, P), P ≤ 4: slots applied to each row, left to right; -1 = none. A row whose entries are
            all -1 is returned bit for bit. None: slot 0 for every row.
        scale: float32 of the shape of rows, or (n,) without rows: multiplies the edit (for a flow its T). None: 1.
        modes: What may occur, or-ed: modes, and KEEP_NORM where a slot restores lengths; the kernel is compiled for
            these only.
        max_rank: The largest rank that may occur; a bank of one full-rank flow runs as two matrix products where it is d.
            None: unknown, at most the number of rows of vectors.

    Returns:
        A new tensor (..., d) of the dtype of x. A row's result never depends on the rows beside it; on a GPU and from
        rank 16 on, its sums are taken in another order above 1024 rows, which may move last bits, and several slots of
        one row round to the dtype of x in between.

    Raises:
        TypeError, ValueError: a dtype, width, device or table shape does not fit; the message names it.

    Example:
        >>> import torch, steerfast as sf
        >>> bank = sf.Bank(width=2, slots=4)
        >>> slot = bank.register(sf.Ablate(torch.tensor([1.0, 0.0])))
        >>> sf.ops.subspace(torch.tensor([[3.0, 4.0]]), *bank.tensors)
        tensor([[0., 4.]])
    """
    if max_rank is None:
        modes |= HINGE  # no promise that the one slot is a flow of full rank
    max_rank = _check_bank("subspace", x, vectors, coefficients, slots, rows, scale, max_rank)
    if _registered(x, vectors, coefficients, scale):
        return torch.ops.steerfast.subspace(x, vectors, coefficients, slots, rows, scale, modes, max_rank)
    return _library.run_subspace(x, vectors, coefficients, slots, rows, scale, modes, max_rank)


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
    _check_in_place("subspace_", x, vectors, coefficients, scale)
    run = torch.ops.steerfast.subspace_ if torch.compiler.is_compiling() else _library.run_subspace_
    run(x, vectors, coefficients, slots, rows, scale, modes, max_rank)
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
        projections that the slot saw, zero beyond its rank, where no slot is named, and for `Add` and `Affine`.
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
    run = torch.ops.steerfast.subspace_probe if torch.compiler.is_compiling() else _library.run_subspace_probe
    return run(x, vectors, coefficients, slots, rows, scale, modes, max_rank)


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
        rows: As in `subspace`; a row whose entries are all -1 keeps its residual bit for bit.
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
    _check_in_place(op, residual, hidden, vectors, coefficients, scale)
    run = torch.ops.steerfast.subspace_split_ if torch.compiler.is_compiling() else _library.run_subspace_split_
    run(hidden, residual, vectors, coefficients, slots, rows, scale, modes, rank)
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
        rows: int32 (n,) or (n, P), P ≤ 4: vectors added to each row; -1 = none. None: vector 0 for every row.
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
    _check(op, residual, "vectors", vectors, rows, scale)
    check_width(op, "weight", weight, residual)
    if weight.dim() != 1:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected ({residual.shape[-1]},)")
    if _registered(residual, hidden, weight, vectors, scale):
        return torch.ops.steerfast.add_rms_norm(hidden, residual, weight, vectors, rows, scale, eps, unit_offset)
    return _library.run_add_rms_norm(hidden, residual, weight, vectors, rows, scale, eps, unit_offset)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """An elementwise affine map: w ⊙ x + b.

    Args:
        x: Residual stream, (..., d).
        weight: w, (d,).
        bias: b, (d,).

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, width or device does not fit; the message names it.

    Reference:
        Rodriguez et al. 2025, Linear-AcT (arXiv:2410.23054).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.affine(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0]))
        tensor([[3., 3.]])
    """
    _check_affine("affine", x, weight, bias)
    if _by_formula(x):
        return reference.affine(x, weight, bias)
    return subspace(x, *_affine_bank(x, weight, bias), modes=AFFINE, max_rank=2)


def affine_(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`affine`, written into x."""
    _check_affine("affine_", x, weight, bias)
    _check_in_place("affine_", x, weight, bias)
    if _by_formula(x):
        return x.copy_(reference.affine(x, weight, bias))
    return subspace_(x, *_affine_bank(x, weight, bias), modes=AFFINE, max_rank=2)


def similarity(x: Tensor, basis: Tensor, kind: str = "projection") -> Tensor:
    """How much of a row lies in a subspace, as a cosine: the condition of conditional activation steering.

    "projection": |cos(x, proj_W x)| = ‖Wx‖/‖x‖, the paper's. "tanh": cos(x, tanh(WᵀWx)), the released code's.

    Args:
        x: Residual stream, (..., d).
        basis: W, one unit direction (d,) or m orthonormal rows (m, d).
        kind: "projection" or "tanh".

    Returns:
        (...,) in float32 (float64 for a float64 x); 0 for a zero row.

    Raises:
        TypeError, ValueError: a dtype, width or device does not fit, or an unknown kind.

    Reference:
        Lee et al. 2024, Programming Refusal with Conditional Activation Steering (arXiv:2409.05907).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]))
        tensor([0.6000])
    """
    _check("similarity", x, "basis", basis)
    squash = one_of("similarity", "kind", kind, ("projection", "tanh")) == "tanh"
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or basis.requires_grad)
    if torch.compiler.is_compiling() or needs_grad or backend_of(x) == "torch":
        return reference.similarity(x, basis, squash)  # a compiler fuses it by itself
    return kernels("similarity").similarity(x, basis, squash)


def sae_encode(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The k most active features of each row: Top-K of relu(x W_encᵀ + b_enc), exactly, without the (n, F) matrix.

    Exact: no feature that is left out has a larger pre-activation, up to the rounding of the product; equal values go
    to the lower index.

    Args:
        x: Residual stream, (..., d), n rows in all.
        w_enc: Encoder rows, (F, d). Two 16-bit tensors of one dtype run on tensor cores; other pairs in float32.
        b_enc: Encoder bias, (F,), or None. An SAE that subtracts b_dec first: fold it, b_enc - W_enc b_dec.
        k: Features per row, 1 to F.

    Returns:
        (values, indices), both (..., k): float32 and int32, sorted by value, largest first. Where fewer than k features
        are active the rest is value 0 and index 0, which `sae_decode` skips. A row with a NaN gives NaN in that row only.
        float64 stays float64 and runs on the reference on every backend.

    Raises:
        TypeError, ValueError: k, a dtype, a shape or a device does not fit; the message names it.

    Reference:
        Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.sae_encode(torch.tensor([[3.0, -1.0, 2.0]]), torch.eye(3), None, k=2)
        (tensor([[3., 2.]]), tensor([[0, 2]], dtype=torch.int32))
    """
    _check_encoder("sae_encode", x, w_enc, b_enc, "k", k)
    if _needs_library(x, w_enc, b_enc):
        return torch.ops.steerfast.sae_encode(x, w_enc, b_enc, k)
    return _library.run_sae_encode(x, w_enc, b_enc, k)


def sae_encode_threshold(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, threshold: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The active features of each row of a JumpReLU SAE: f = h·[h > θ], h = x W_encᵀ + b_enc, as sorted lists.

    Args:
        x: Residual stream, (..., d), n rows in all.
        w_enc: Encoder rows, (F, d). Two 16-bit tensors of one dtype run on tensor cores; other pairs in float32.
        b_enc: Encoder bias, (F,), or None. An SAE that subtracts b_dec first: fold it, b_enc - W_enc b_dec.
        threshold: θ ≥ 0, (F,) float32: JumpReLU; one number for all: BatchTopK at inference; zero: ReLU.
        capacity: Room for each row, 1 to F.

    Returns:
        (values, indices, counts): float32 and int32, (..., capacity), sorted by value, largest first, ties to the lower
        index, then value 0 and index 0; and int32 (...), how many features are active. Nothing is cut off in silence: a
        row whose count is above the capacity has NaN in all its values; call again with `int(counts.max())`. float64
        stays float64 and runs on the reference on every backend.

    Raises:
        TypeError, ValueError: capacity, a dtype, a shape or a device does not fit; the message names it.

    Reference:
        Rajamanoharan et al. 2024, JumpReLU (arXiv:2407.14435); Bussmann et al. 2024, BatchTopK (arXiv:2412.06410).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.sae_encode_threshold(torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3), None, torch.full((3,), 1.5), 2)
        (tensor([[3., 2.]]), tensor([[0, 2]], dtype=torch.int32), tensor([2], dtype=torch.int32))
    """
    _check_encoder("sae_encode_threshold", x, w_enc, b_enc, "capacity", capacity)
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
    return _library.run_sae_encode_threshold(x, w_enc, b_enc, threshold, capacity)


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
    return _library.run_sae_decode(values, indices, w_dec, b_dec)


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
    return _library.run_sae_add(x, values, indices, w_dec, scale)


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
    count = w_dec.shape[0]
    for name, tensor, shape, dtype in (
        ("features", features, (count,), torch.int32),
        ("table", table, (count, 4), torch.float32),
    ):
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != shape or tensor.dtype != dtype:
            got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"sae_edit: {name} is {got}; expected {dtype} {shape}, one per row of w_dec")
        if tensor.device != x.device:
            raise ValueError(f"sae_edit: {name} is on {tensor.device} and x on {x.device}; move one with .to(...)")
    if _needs_library(x, values, w_dec, scale):
        return torch.ops.steerfast.sae_edit(x, values, indices, features, table, w_dec, scale)
    return _library.run_sae_edit(x, values, indices, features, table, w_dec, scale)


def _check_encoder(op: str, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, name: str, count: int) -> None:
    check_stream(op, x)
    check_dictionary(op, "w_enc", w_enc, "b_enc", b_enc, bias_axis=0)
    check_width(op, "w_enc", w_enc, x)
    if not isinstance(count, int) or isinstance(count, bool):
        raise TypeError(f"{op}: {name} must be a whole number; got {count!r}")
    if not 1 <= count <= w_enc.shape[0]:
        raise ValueError(f"{op}: {name} is {count}; expected 1 to F = {w_enc.shape[0]}, the rows of w_enc")


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
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: indices has dtype {indices.dtype}; expected torch.int32 or torch.int64")
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
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _check(
    op: str,
    x: Tensor,
    name: str,
    directions: Tensor,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    in_place: bool = False,
) -> None:
    check_stream(op, x)
    check_width(op, name, directions, x)
    check_table(op, rows, scale, x)
    if in_place:
        _check_in_place(op, x, directions, scale)


def _check_pair(op: str, hidden: Tensor, residual: Tensor) -> None:
    check_stream(op, residual)
    check_stream(op, hidden)
    if hidden.shape != residual.shape or hidden.dtype != residual.dtype or hidden.device != residual.device:
        raise ValueError(
            f"{op}: hidden is {tuple(hidden.shape)} {hidden.dtype} on {hidden.device} and residual {tuple(residual.shape)} "
            f"{residual.dtype} on {residual.device}; expected two halves of one stream"
        )


def _check_affine(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    for name, vector in (("weight", weight), ("bias", bias)):
        _check(op, x, name, vector)
        if vector.dim() != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}; expected ({x.shape[-1]},)")


def _affine_bank(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    tables = _make_affine_tables if torch.compiler.is_compiling() else _affine_tables
    wide = torch.promote_types(weight.dtype, torch.float32)  # w - 1 in 16 bits would lose what w is close to 1
    return torch.stack([weight.to(wide) - 1, bias.to(wide)]), *tables(x.device)


def _check_in_place(op: str, x: Tensor, *others: Tensor | None) -> None:
    for name, tensor in (("x", x), *(("an argument", other) for other in others)):
        if torch.is_grad_enabled() and tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} needs a gradient, which an in-place edit would break; use {op.rstrip('_')} instead"
            )
    if any(step == 0 and size > 1 for size, step in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"{op}: x is an expanded view, several of whose rows share memory; use {op.rstrip('_')}, or x.contiguous()"
        )


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
    _check(op, x, "vectors", vectors, rows, scale)
    if vectors.dim() != 2:
        raise ValueError(f"{op}: vectors has shape {tuple(vectors.shape)}; expected (R, d)")
    for name, table in (("coefficients", coefficients), ("slots", slots)):
        if table.dim() != 2 or table.shape[1] != 8 or not table.is_contiguous():
            raise ValueError(f"{op}: {name} has shape {tuple(table.shape)}; expected a contiguous table with 8 columns")
        if table.device != x.device:
            raise ValueError(f"{op}: {name} is on {table.device} and x on {x.device}; move it with .to(...)")
    if slots.dtype != torch.int32:
        raise TypeError(f"{op}: slots has dtype {slots.dtype}; expected torch.int32")
    if max_rank is None:
        return vectors.shape[0]
    if isinstance(max_rank, bool) or not isinstance(max_rank, int):
        raise TypeError(f"{op}: max_rank is {max_rank!r}; expected a whole number >= 0")
    if max_rank < 0:
        raise ValueError(f"{op}: max_rank is {max_rank}; expected >= 0, the largest rank of a slot")
    return max_rank


def _registered(*tensors: Tensor | None) -> bool:
    """Whether the call must go through torch.library: while compiling, and for the gradient of a kernel."""
    if torch.compiler.is_compiling():
        return True
    needs_grad = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return needs_grad and backend_of(tensors[0]) == "triton"  # type: ignore[arg-type]


def _by_formula(x: Tensor) -> bool:
    return backend_of(x) == "torch"


def _one_slot(x: Tensor, directions: Tensor, numbers: tuple[float, ...]) -> Tensor:
    vectors = directions.reshape(-1, directions.shape[-1])
    tables = _make_hinge_tables if torch.compiler.is_compiling() else _hinge_tables
    coefficients, slots = tables(vectors.shape[0], numbers, x.device)
    return subspace(x, vectors, coefficients, slots, modes=HINGE, max_rank=vectors.shape[0])


def _one_slot_(x: Tensor, directions: Tensor, numbers: tuple[float, ...]) -> Tensor:
    vectors = directions.reshape(-1, directions.shape[-1])
    tables = _make_hinge_tables if torch.compiler.is_compiling() else _hinge_tables
    coefficients, slots = tables(vectors.shape[0], numbers, x.device)
    return subspace_(x, vectors, coefficients, slots, modes=HINGE, max_rank=vectors.shape[0])


def _make_hinge_tables(rank: int, numbers: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables of one slot whose directions share their eight numbers."""
    coefficients = torch.tensor([_UNIT, *[numbers] * rank], dtype=torch.float32, device=device)
    return coefficients, torch.tensor([[HINGE, rank, 0, 0, 0, 0, 0, 0]], dtype=torch.int32, device=device)


def _make_flow_tables(
    rank: int, path: tuple[float, float], steps: int, method: str, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The constants, the further rows and the header of one flow."""
    how = scheme(method)
    constants = torch.tensor([[*path, 1, 0, 0, 0, 0, 0]], dtype=dtype, device=device)
    extra = pack(Field(constants, constants), how)
    more = constants[:0] if extra is None else extra.to(constants)
    header = [FLOW if extra is None else SOLVE, rank, 0, 0, 0, how.count(steps), 0, more.shape[0]]
    return constants, more, torch.tensor([header], dtype=torch.int32, device=device)


def _make_affine_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The tables of one elementwise affine map."""
    coefficients = torch.tensor([_UNIT] * 3, dtype=torch.float32, device=device)
    return coefficients, torch.tensor([[AFFINE, 2, 0, 0, 0, 0, 0, 0]], dtype=torch.int32, device=device)


def _make_loreft_tables(rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The constants and the header of one LoReFT: B in the first rows of vectors, C in the next."""
    return (
        torch.tensor([_UNIT], dtype=dtype, device=device),
        torch.tensor([[HINGE, rank, 0, rank, 0, 0, 0, 0]], dtype=torch.int32, device=device),
    )


# Kept, so that a hot path allocates no constants; made outside inference mode, so that a later gradient can use them.
_hinge_tables = functools.lru_cache(maxsize=256)(torch.inference_mode(False)(_make_hinge_tables))
_affine_tables = functools.lru_cache(maxsize=8)(torch.inference_mode(False)(_make_affine_tables))
_loreft_tables = functools.lru_cache(maxsize=64)(torch.inference_mode(False)(_make_loreft_tables))
_flow_tables = functools.lru_cache(maxsize=256)(torch.inference_mode(False)(_make_flow_tables))


def _calibration(features: Tensor, beta: float) -> tuple[float, ...]:
    count = features.numel() // features.shape[-1]
    return (beta / count, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def _check_flow(
    op: str, x: Tensor, basis: Tensor, eigenvalues: Tensor, bias: Tensor, steps: int, method: str
) -> Scheme:
    _check(op, x, "basis", basis)
    rank = basis.numel() // basis.shape[-1]
    for name, numbers in (("eigenvalues", eigenvalues), ("bias", bias)):
        if numbers.shape != (rank,) or numbers.device != x.device:
            raise ValueError(
                f"{op}: {name} has shape {tuple(numbers.shape)} on {numbers.device}; expected ({rank},) on {x.device}, "
                "one number per row of basis"
            )
    check_steps(op, steps)
    one_of(op, "method", method, tuple(SOLVERS))
    return scheme(method)


def _flow_mode(how: Scheme) -> int:
    return FLOW if how.plain else SOLVE


def _flow_bank(
    x: Tensor, basis: Tensor, eigenvalues: Tensor, bias: Tensor, path: tuple[float, float], steps: int, method: str
) -> tuple[Tensor, Tensor, Tensor]:
    vectors = basis.reshape(-1, basis.shape[-1])
    tables = _make_flow_tables if torch.compiler.is_compiling() else _flow_tables  # a graph keeps what it makes
    dtype = torch.promote_types(eigenvalues.dtype, torch.float32)
    constants, more, slots = tables(vectors.shape[0], path, steps, method, dtype, x.device)
    columns = torch.stack([eigenvalues, bias], dim=1).to(dtype)
    return vectors, torch.cat([constants, torch.nn.functional.pad(columns, (0, 6)), more]), slots
