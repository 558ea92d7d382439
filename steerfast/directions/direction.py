"""A direction of the residual stream: a vector, and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import direction_rows, finite_number, tensor_of
from steerfast.place import NOWHERE, Origin, common_origin

_LONGEST_METHOD = 500  # characters of an expression of directions that are kept
ROUNDING = 1e-6  # a difference below this share of the activations' norm is float32 noise


@dataclass(frozen=True, eq=False)
class Direction:
    """A direction in the stream that knows its origin. Interventions take it wherever they take a vector.

    Directions of one model and place form a vector space: `a + b`, `a - b`, `-a`, `2 * a`, `a / 3`, `sum(directions)`.
    The result's `method` says what was combined. A model or place that only one operand knows is kept; two different
    ones are an error, because such vectors live in different spaces.

    Attributes:
        vector: float32 (d,), on the CPU; finite and not zero.
        method: the function that made it, or the expression of such functions.
        norm: L2 norm before normalisation, in the activations' unit.
        origin: where the activations were read, and their typical norm; nothing is known of plain tensors, little in most
            files of other libraries. Of operands it is what `common_origin` says.

    Raises:
        TypeError, ValueError: vector is not one finite non-zero row of floats; operands do not belong together.

    Example:
        >>> import torch
        >>> a, b = (Direction(torch.tensor(v), "mean_difference", 5.0) for v in ([3.0, 4.0], [3.0, 0.0]))
        >>> (2 * a - b).vector.tolist(), (2 * a - b).method
        ([3.0, 8.0], '2.0·mean_difference − mean_difference')
    """

    vector: Tensor = field(repr=False)
    method: str
    norm: float
    origin: Origin = NOWHERE

    __array_ufunc__ = None  # NumPy's scalars leave `numpy.float32(2) * direction` to this class

    def __post_init__(self) -> None:
        row = direction_rows("Direction", "vector", self.vector, one=True)[0]
        object.__setattr__(self, "vector", row.clone())  # the caller may change the tensor it came from
        object.__setattr__(self, "norm", finite_number("Direction", "norm", self.norm))
        if not isinstance(self.origin, Origin):
            raise TypeError(f"Direction: origin is {self.origin!r}; expected a steerfast.place.Origin")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.vector.numpy()
        array = array if dtype is None else array.astype(dtype, copy=False)
        return array.copy() if copy else array

    def __add__(self, other: Direction) -> Direction:
        return _sum(self, other, 1.0) if isinstance(other, Direction) else NotImplemented

    def __radd__(self, other: Any) -> Direction:
        return self if type(other) is int and other == 0 else NotImplemented  # what the built-in sum starts with

    def __sub__(self, other: Direction) -> Direction:
        return _sum(self, other, -1.0) if isinstance(other, Direction) else NotImplemented

    def __neg__(self) -> Direction:
        return self._made(-self.vector, f"−{_factor(self.method)}")

    def __mul__(self, scale: float) -> Direction:
        if isinstance(scale, (Direction, Tensor)):
            return NotImplemented
        number = finite_number("Direction", "the factor", scale)
        return self._made(self.vector.double() * number, f"{number!r}·{_factor(self.method)}")

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> Direction:
        if isinstance(divisor, (Direction, Tensor)):
            return NotImplemented
        number = finite_number("Direction", "the divisor", divisor)
        if number == 0:
            raise ValueError(f"Direction: cannot divide {self!r} by zero")
        return self._made(self.vector.double() / number, f"{_factor(self.method)} / {number!r}")

    def project_out(self, *others: Direction | Tensor) -> Direction:
        """Return the part that is orthogonal to the span of other directions: v − QQᵀv, Q an orthonormal basis of it.

        Args:
            others: directions, vectors (d,) or rows (m, d). They need not be independent.

        Returns:
            The direction; its `method` names what was removed.

        Raises:
            TypeError, ValueError: nothing to remove; another width, layer, site or model; nothing is left.

        Example:
            >>> import torch
            >>> Direction(torch.tensor([3.0, 4.0]), "pca", 5.0).project_out(torch.tensor([1.0, 0.0])).vector
            tensor([0., 4.])
        """
        if not others:
            raise TypeError("project_out: expected at least one direction to remove")
        known = [self, *(other for other in others if isinstance(other, Direction))]
        rows = torch.cat(
            [direction_matrix("project_out", "a direction", other) for other in others if _fits(self, other)]
        )
        rest = orthogonal_to("project_out", self.vector.double(), rows)
        removed = ", ".join(other.method if isinstance(other, Direction) else "a tensor" for other in others)
        method = f"{_factor(self.method)} without ({removed})"
        return self._made(rest, method, common_origin("project_out", [one.origin for one in known]))

    def normalized(self) -> Direction:
        """Return the direction at norm 1: v / ‖v‖. `norm` keeps the length that it had before.

        Example:
            >>> import torch
            >>> unit = Direction(torch.tensor([3.0, 4.0]), "pca", 5.0).normalized()
            >>> unit.norm, float(unit.vector.norm())
            (5.0, 1.0)
        """
        length = float(self.vector.double().norm())
        return replace(self, vector=self.vector.double() / length, norm=length, method=f"unit({self.method})")

    def dose(self, strength: float = 1.0) -> float:
        """Return the relative dose of adding c·v, ‖c·v‖ / ‖x‖; ‖x‖ is typical of the activations it was made from.

        `steerfast.dose` measures it on texts of your own, for a whole plan, and says which doses are too large.

        Args:
            strength: c, as in `Add`.

        Returns:
            A number without unit: 1 adds as much as there was.

        Raises:
            ValueError: the typical norm is unknown.

        Example:
            >>> import torch
            >>> Direction(torch.tensor([3.0, 4.0]), "pca", 5.0, Origin(typical_norm=50.0)).dose(4.0)
            0.4
        """
        if self.origin.typical_norm is None:
            raise ValueError(
                f"dose: {self!r} does not know the norm of the activations; "
                f"measure it with steerfast.dose(model, tokenizer, plan, texts)"
            )
        strength = finite_number("dose", "strength", strength)
        return abs(strength) * float(self.vector.double().norm()) / self.origin.typical_norm

    def _made(self, vector: Tensor, method: str, origin: Origin | None = None) -> Direction:
        """The result of an expression, with its own norm."""
        short = method if len(method) <= _LONGEST_METHOD else f"{method[: _LONGEST_METHOD - 2]} …"
        return replace(
            self, vector=vector, method=short, norm=float(vector.double().norm()), origin=origin or self.origin
        )

    def __repr__(self) -> str:
        where = f" of {self.origin}" if str(self.origin) else ""
        typical = "unknown" if self.origin.typical_norm is None else f"{self.origin.typical_norm:.4g}"
        norms = f"norm {self.norm:.4g}, typical activation {typical}"
        return f"Direction({self.method}{where}: d {self.vector.numel()}, {norms})"


def _sum(a: Direction, b: Direction, sign: float) -> Direction:
    """a + sign·b."""
    _fits(a, b)
    vector = a.vector.double() + sign * b.vector.double()
    text = f"{a.method} + {b.method}" if sign > 0 else f"{a.method} − {_factor(b.method)}"
    if vector.norm() <= ROUNDING * max(a.vector.norm(), b.vector.norm()):
        raise ValueError(f"Direction: {text} cancels to zero; a zero direction steers nothing")
    return a._made(vector, text, common_origin(f"Direction: {text}", [a.origin, b.origin]))


def _fits(a: Direction, other: Direction | Tensor) -> bool:
    """Whether `other` has the width of `a`; if not, an error."""
    width = tensor_of(getattr(other, "vector", other)).shape[-1:]
    if width != a.vector.shape:
        raise ValueError(
            f"Direction: {a!r} has width {len(a.vector)}, the other {tuple(width)}; they must come from one model"
        )
    return True


def _factor(method: str) -> str:
    """A method as a factor: in parentheses if it is a sum."""
    return f"({method})" if any(sign in method for sign in (" ", "−")) else method


def direction_matrix(name: str, argument: str, side: Any) -> Tensor:
    """The rows (n, d) of one argument in float64 on the CPU, checked."""
    try:
        rows = tensor_of(getattr(side, "vector", side))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{name}: {argument} must be numbers of shape (n, d) or (d,), got {type(side).__name__}; several vectors become one "
            "tensor by torch.stack"
        ) from None
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or not rows.is_floating_point():
        raise ValueError(
            f"{name}: {argument} must be floating point of shape (n, d) or (d,), got {rows.dtype} {tuple(rows.shape)}"
        )
    if not rows.numel():
        raise ValueError(f"{name}: {argument} has no rows, shape {tuple(rows.shape)}; give at least one")
    if bad := int((~rows.isfinite().all(1)).sum()):
        raise ValueError(
            f"{name}: {argument} has NaN or Inf in {bad} of {len(rows)} rows; "
            f"collect in bfloat16 or float32 instead of float16"
        )
    return rows.detach().to("cpu", torch.float64)


def orthogonal_to(name: str, vector: Tensor, directions: Any) -> Tensor:
    """`vector` without its part in the span of the rows of `directions`."""
    rows = direction_matrix(name, "project_out", directions)
    if rows.shape[1] != len(vector):
        raise ValueError(f"{name}: project_out has width {rows.shape[1]}, pos and neg {len(vector)}")
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[sizes > ROUNDING * sizes[0]]
    rest = vector - basis.T @ (basis @ vector)
    if rest.norm() <= ROUNDING * vector.norm():
        raise ValueError(
            f"{name}: nothing is left after project_out: the direction lies in the span of its {len(rows)} rows"
        )
    return rest
