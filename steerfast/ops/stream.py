"""Edits of a stream by one vector, one subspace, one set of features or one flow, each with its in-place twin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steerfast._checks import finite_number, one_of, path_length, step_count

from . import calls, torch_backend, torch_cpu
from .backends import apart, backend_of, kernels, transformed
from .slots import AFFINE, FLOW, HINGE, SOLVE, Eight, Tables, hinge
from .solvers import Field, Scheme, scheme
from .subspace import check_in_place, check_op, edited, edited_, needs_gradient
from .tableaus import SOLVERS
from .tables import affine_tables, flow_tables, hinge_tables, loreft_tables, with_numbers
from .torch_slots import How, bent


def add(x: Tensor, vectors: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Add a steering vector: x + scale · vectors[rows].

    Args:
        x: Residual stream, (..., d), n rows in all.
        vectors: One vector (d,) or a bank of S vectors (S, d).
        rows: int32 (n,) or (n, P), P ≤ 4: vectors added to each row, left to right; -1 = none. A row whose entries
            are all -1 is returned bit for bit; one that names a vector outside the bank (≥ S or < -1) becomes NaN, since an
            error would stall a GPU. None: vector 0 for every row.
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
    if rows is None and scale is None and torch_cpu.is_elementwise(x, vectors):
        return torch.add(x, vectors)
    compiles = torch.compiler.is_compiling()
    if rows is not None and not compiles:
        quick = torch_cpu.add(x, vectors, rows, scale)
        if quick is not None:
            return quick
    check_op("add", x, "vectors", vectors, rows, scale)
    if compiles:
        return torch.ops.steerfast.add(x, vectors, rows, scale)
    backend = backend_of(x)
    if backend == "torch":
        return torch_backend.add(x, vectors, rows, scale)
    if needs_gradient(backend, x, vectors, scale):
        return torch.ops.steerfast.add(x, vectors, rows, scale)
    return calls.add(backend, x, vectors, rows, scale)


def add_(x: Tensor, vectors: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """`add`, written into x."""
    check_op("add_", x, "vectors", vectors, rows, scale, in_place=True)
    if (
        rows is None
        and scale is None
        and torch_cpu.is_elementwise(x, vectors)
        and not transformed()
        and apart(x, vectors)
    ):
        return x.add_(vectors)
    if torch.compiler.is_compiling():
        torch.ops.steerfast.add_(x, vectors, rows, scale)
    else:
        calls.add_(backend_of(x), x, vectors, rows, scale)
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
    return _hinged("ablate", x, "basis", basis, _ABLATE, 1.0)


def ablate_(x: Tensor, basis: Tensor) -> Tensor:
    """`ablate`, written into x."""
    return _hinged("ablate_", x, "basis", basis, _ABLATE, 1.0, in_place=True)


def amplify(x: Tensor, features: Tensor, alpha: float = 1.0) -> Tensor:
    """Amplify features where they are active: x + α · relu(xS)Sᵀ, S = features.T.

    Args:
        x: Residual stream, (..., d).
        features: One feature direction (d,) or m of them (m, d), for instance decoder rows of an SAE.
        alpha: α. -1 erases the active part only if the features are orthogonal: 150 random directions kept 47 %.

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, width or device does not fit, or α is not finite in float32; the message names it.

    Reference:
        Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.amplify(torch.tensor([[2.0, -1.0]]), torch.eye(2), alpha=0.5)
        tensor([[ 3., -1.]])
    """
    return _hinged("amplify", x, "features", features, _AMPLIFY, _strength("amplify", "alpha", alpha))


def amplify_(x: Tensor, features: Tensor, alpha: float = 1.0) -> Tensor:
    """`amplify`, written into x."""
    share = _strength("amplify_", "alpha", alpha)
    return _hinged("amplify_", x, "features", features, _AMPLIFY, share, in_place=True)


def calibrate(x: Tensor, features: Tensor, beta: float = 1.0) -> Tensor:
    """Replace the active part of features by a fixed one: x - relu(xS)Sᵀ + β · mean(S), S = features.T.

    Args:
        x: Residual stream, (..., d).
        features: One feature direction (d,) or m of them (m, d).
        beta: β, the multiple of the features' mean that is put in; its effect grows with the norm of mean(S).

    Returns:
        A new tensor (..., d) of the dtype of x.

    Raises:
        TypeError, ValueError: a dtype, width or device does not fit, or β is not finite in float32; the message names it.

    Reference:
        Wu et al. 2025, mutual-information explanations of sparse autoencoders (arXiv:2502.15576).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.ops.calibrate(torch.tensor([[2.0, -1.0]]), torch.eye(2), beta=2.0)
        tensor([[1., 0.]])
    """
    return _hinged("calibrate", x, "features", features, _CALIBRATE, _strength("calibrate", "beta", beta))


def calibrate_(x: Tensor, features: Tensor, beta: float = 1.0) -> Tensor:
    """`calibrate`, written into x."""
    share = _strength("calibrate_", "beta", beta)
    return _hinged("calibrate_", x, "features", features, _CALIBRATE, share, in_place=True)


def flow(
    x: Tensor,
    basis: Tensor,
    eigenvalues: Tensor,
    bias: Tensor,
    *,
    angle: float | None = None,
    T: float | None = None,
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
        angle: T/‖a‖ of each row, in radians. Exactly one of angle and T.
        T: Length of the path in units of x.
        steps: Number of steps, ≥ 1.
        method: The solver, a name of `steerfast.ops.tableaus.SOLVERS`, such as "euler", "geodesic" or "rk4".

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
    backend = backend_of(x)
    if backend == "torch" and not torch.compiler.is_compiling():
        return torch_backend.flow(x, basis, Field(eigenvalues, bias), path, how.count(steps), how)
    bank = _flow_bank(x, basis, eigenvalues, bias, path, steps, how)
    return edited(backend, x, bank, _flow_mode(how), bank[0].shape[0])


def flow_(
    x: Tensor,
    basis: Tensor,
    eigenvalues: Tensor,
    bias: Tensor,
    *,
    angle: float | None = None,
    T: float | None = None,
    steps: int = 10,
    method: str = "euler",
) -> Tensor:
    """`flow`, written into x."""
    path, how = path_length("flow_", T, angle), _check_flow("flow_", x, basis, eigenvalues, bias, steps, method)
    check_in_place("flow_", x, basis, eigenvalues, bias)
    backend = backend_of(x)
    if backend == "torch" and not torch.compiler.is_compiling():
        return x.copy_(torch_backend.flow(x, basis, Field(eigenvalues, bias), path, how.count(steps), how))
    bank = _flow_bank(x, basis, eigenvalues, bias, path, steps, how)
    return edited_(backend, x, bank, _flow_mode(how), bank[0].shape[0])


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
    check_op("loreft", x, "R", R)
    if R.dim() != 2 or W.shape != R.shape or b.shape != R.shape[:1]:
        raise ValueError(
            f"loreft: R has shape {tuple(R.shape)}, W {tuple(W.shape)} and b {tuple(b.shape)}; expected (r, d), (r, d) and (r,)"
        )
    rank = R.shape[0]
    wide = torch.promote_types(R.dtype, torch.float32)
    vectors = torch.cat([W.to(wide) - R.to(wide), R.to(wide)])
    head, slots = loreft_tables(rank, wide, x.device)
    columns = torch.nn.functional.pad(torch.stack([b.to(wide), torch.ones_like(b, dtype=wide)], dim=1), (0, 6))
    return edited(backend_of(x), x, (vectors, torch.cat([head, columns]), slots), HINGE, rank)


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
    if torch_cpu.is_elementwise(x, weight, bias):
        return torch.addcmul(bias, weight, x)
    _check_affine("affine", x, weight, bias)
    backend = backend_of(x)
    if backend == "torch":
        return torch_backend.affine(x, weight, bias)
    return edited(backend, x, _affine_bank(x, weight, bias), AFFINE, 2)


def affine_(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`affine`, written into x."""
    _check_affine("affine_", x, weight, bias)
    check_in_place("affine_", x, weight, bias)
    if torch_cpu.is_elementwise(x, weight, bias) and not transformed() and apart(x, weight, bias):
        return torch.addcmul(bias, weight, x, out=x)
    backend = backend_of(x)
    if backend == "torch":
        return x.copy_(torch_backend.affine(x, weight, bias))
    return edited_(backend, x, _affine_bank(x, weight, bias), AFFINE, 2)


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
    check_op("similarity", x, "basis", basis)
    squash = one_of("similarity", "kind", kind, ("projection", "tanh")) == "tanh"
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or basis.requires_grad)
    if torch.compiler.is_compiling() or needs_grad or backend_of(x) == "torch":
        return torch_backend.similarity(x, basis, squash)  # a compiler fuses it by itself
    return kernels("similarity").similarity(x, basis, squash)


def _check_affine(op: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    for name, vector in (("weight", weight), ("bias", bias)):
        check_op(op, x, name, vector)
        if vector.dim() != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(vector.shape)}; expected ({x.shape[-1]},)")


def _affine_bank(x: Tensor, weight: Tensor, bias: Tensor) -> Tables:
    wide = torch.promote_types(weight.dtype, torch.float32)  # w - 1 in 16 bits would lose what w is close to 1
    return torch.stack([weight.to(wide) - 1, bias.to(wide)]), *affine_tables(x.device)


_LARGEST = torch.finfo(torch.float32).max


class _Hinge(NamedTuple):
    """g = act(Bx) of a number and k directions: as eight numbers, as a formula that is differentiable, and in few calls."""

    numbers: Callable[[float, int], Eight]
    act: Callable[[float, Tensor], Tensor]
    how: Callable[[float, int], How]


_ABLATE = _Hinge(
    lambda share, _: hinge(slope=-share),
    lambda share, y: -share * y,
    functools.lru_cache(lambda share, _: How(-share)),
)
_AMPLIFY = _Hinge(
    lambda alpha, _: hinge(bend=alpha),
    lambda alpha, y: alpha * torch.relu(y),
    functools.lru_cache(lambda alpha, _: How(alpha, torch.relu_)),
)
_CALIBRATE = _Hinge(
    lambda beta, k: hinge(beta / max(1, k), bend=-1.0),
    lambda beta, y: beta / max(1, y.shape[-1]) - torch.relu(y),
    functools.lru_cache(lambda beta, k: How(-1.0, bent(0.0, -beta / max(1, k)))),
)


def _strength(op: str, name: str, value: float) -> float:
    number = finite_number(op, name, value)
    if abs(number) > _LARGEST:
        raise ValueError(f"{op}: {name} is {number}; expected a number that float32 holds, up to {_LARGEST:.3g}")
    return number


def _hinged(
    op: str, x: Tensor, name: str, directions: Tensor, edit: _Hinge, number: float, in_place: bool = False
) -> Tensor:
    """x + Bᵀg, perhaps written into x."""
    compiles = torch.compiler.is_compiling()
    if in_place:
        check_op(op, x, name, directions, in_place=True)
    if not compiles:  # it looks by itself: of few rows a second look would tell
        quick = torch_cpu.hinged(x, directions, edit.numbers, edit.how, number, in_place)
        if quick is not None:
            return quick
    if not in_place:
        check_op(op, x, name, directions)
    backend = backend_of(x)
    if backend == "torch":
        out = torch_backend.hinged(x, directions, functools.partial(edit.act, number))
        return x.copy_(out) if in_place else out
    count = directions.numel() // directions.shape[-1]
    bank = _hinge_bank(x, directions, edit.numbers(number, count))
    return (edited_ if in_place else edited)(backend, x, bank, HINGE, bank[0].shape[0])


def _hinge_bank(x: Tensor, directions: Tensor, numbers: Eight) -> Tables:
    vectors = directions.reshape(-1, directions.shape[-1])
    return vectors, *hinge_tables(vectors.shape[0], numbers, x.device)


def _check_flow(
    op: str, x: Tensor, basis: Tensor, eigenvalues: Tensor, bias: Tensor, steps: int, method: str
) -> Scheme:
    check_op(op, x, "basis", basis)
    rank = basis.numel() // basis.shape[-1]
    for name, numbers in (("eigenvalues", eigenvalues), ("bias", bias)):
        if numbers.shape != (rank,) or numbers.device != x.device:
            raise ValueError(
                f"{op}: {name} has shape {tuple(numbers.shape)} on {numbers.device}; expected ({rank},) on {x.device}, "
                "one number per row of basis"
            )
    step_count(op, steps)
    one_of(op, "method", method, tuple(SOLVERS))
    return scheme(method)


def _flow_mode(how: Scheme) -> int:
    return FLOW if how.plain else SOLVE


def _flow_bank(
    x: Tensor, basis: Tensor, eigenvalues: Tensor, bias: Tensor, path: tuple[float, float], steps: int, how: Scheme
) -> Tables:
    vectors = basis.reshape(-1, basis.shape[-1])
    rank, dtype = vectors.shape[0], torch.promote_types(eigenvalues.dtype, torch.float32)
    kept, slots = flow_tables(rank, steps, how, dtype, x.device)
    table = with_numbers(kept, {(0, 0, 0): path[0], (0, 0, 1): path[1]}, x.device)
    table = kept.clone() if table is kept else table
    for column, numbers in enumerate((eigenvalues, bias)):
        table.as_strided((rank,), (8,), 8 + column).copy_(
            numbers
        )  # rows 1 to rank: half the time of an index on the host
    return vectors, table, slots
