"""Checks of what a user passes: each names the argument, says what was got, what was expected and what to do.

Some return what they checked as the tensor that an object keeps, a float32 one on the CPU.
"""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_SLOTS_PER_ROW = 4
T = TypeVar("T")


def check_stream(op: str, x: Tensor) -> None:
    """x is a floating tensor (..., d) with d ≥ 1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor (..., d); got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(
            f"{op}: x has dtype {x.dtype}; expected float16, bfloat16, float32 or float64: convert it with x.float()"
        )
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}; expected (..., d) with d >= 1")


def check_width(op: str, name: str, directions: Tensor, x: Tensor) -> None:
    """The directions have the width, the device and a dtype that fit x."""
    if not isinstance(directions, Tensor):
        raise TypeError(
            f"{op}: {name} must be a tensor of rows (m, d) or one row (d,); got {type(directions).__name__}"
        )
    if directions.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {directions.dtype}; expected a floating dtype")
    if directions.dim() not in (1, 2) or directions.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"{op}: {name} has shape {tuple(directions.shape)}; expected (d,) or (m, d) with d = {x.shape[-1]}, the width of x"
        )
    if directions.device != x.device:
        raise ValueError(f"{op}: {name} is on {directions.device} and x on {x.device}; move one with .to(...)")


def check_table(op: str, rows: Tensor | None, scale: Tensor | None, x: Tensor) -> None:
    """rows is int32 (n,) or (n, P), scale float32 of the same shape (or (n,) without rows), both beside x."""
    if rows is None and scale is None:
        return
    n = x.numel() // x.shape[-1]
    for name, table, dtype in (("rows", rows, torch.int32), ("scale", scale, torch.float32)):
        if table is None:
            continue
        if not isinstance(table, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor of {dtype}; got {type(table).__name__}")
        if table.dtype != dtype:
            raise TypeError(f"{op}: {name} has dtype {table.dtype}; expected {dtype}")
        if table.dim() not in (1, 2) or table.shape[0] != n:
            raise ValueError(
                f"{op}: {name} has shape {tuple(table.shape)}; expected ({n},) or ({n}, P): one entry per row of x"
            )
        if table.dim() == 2 and not 1 <= table.shape[1] <= MAX_SLOTS_PER_ROW:
            raise ValueError(
                f"{op}: {name} has P = {table.shape[1]} columns; expected 1 to {MAX_SLOTS_PER_ROW}: split the call"
            )
        if table.device != x.device:
            raise ValueError(f"{op}: {name} is on {table.device} and x on {x.device}; move it with .to(...)")
    if rows is not None and scale is not None and rows.shape != scale.shape:
        raise ValueError(
            f"{op}: scale has shape {tuple(scale.shape)} and rows {tuple(rows.shape)}; expected the same shape"
        )
    if rows is None and scale is not None and scale.numel() != n:
        raise ValueError(f"{op}: scale has shape {tuple(scale.shape)}; without rows expected ({n},)")


def fits(x: Tensor, directions: Tensor, rows: Tensor | None = None, scale: Tensor | None = None) -> bool:
    """Whether `check_stream`, `check_width` and `check_table` pass: one look, without the words of what does not fit."""
    if not (isinstance(x, Tensor) and isinstance(directions, Tensor)):
        return False
    shape, of_rows = x.shape, directions.shape
    if x.dtype not in FLOATS or directions.dtype not in FLOATS or not shape or len(of_rows) not in (1, 2):
        return False
    d, device = shape[-1], x.device
    if d < 1 or of_rows[-1] != d or directions.device != device:
        return False
    if rows is None:
        return scale is None or (
            _is_table(scale, torch.float32, x.numel() // d, device) and scale.numel() == x.numel() // d
        )
    if not _is_table(rows, torch.int32, x.numel() // d, device):
        return False
    return scale is None or (_is_table(scale, torch.float32, x.numel() // d, device) and scale.shape == rows.shape)


def _is_table(table: Any, dtype: torch.dtype, n: int, device: torch.device) -> bool:
    if not isinstance(table, Tensor):
        return False
    shape = table.shape
    if table.dtype != dtype or table.device != device or not shape or shape[0] != n:
        return False
    return len(shape) == 1 or (len(shape) == 2 and 1 <= shape[1] <= MAX_SLOTS_PER_ROW)


def check_dictionary(op: str, name: str, weights: Tensor, bias_name: str, bias: Tensor | None, bias_axis: int) -> None:
    """weights is a floating (F, d) tensor, F and d ≥ 1; the bias, where given, has one entry per row (0) or column (1)."""
    if not isinstance(weights, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor (F, d); got {type(weights).__name__}")
    if weights.dtype not in FLOATS:
        raise TypeError(f"{op}: {name} has dtype {weights.dtype}; expected a floating dtype")
    if weights.dim() != 2 or 0 in weights.shape:
        raise ValueError(f"{op}: {name} has shape {tuple(weights.shape)}; expected (F, d), one row per feature")
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: {bias_name} must be a tensor; got {type(bias).__name__}")
    if bias.dtype not in FLOATS:
        raise TypeError(f"{op}: {bias_name} has dtype {bias.dtype}; expected a floating dtype")
    if bias.shape != (weights.shape[bias_axis],):
        raise ValueError(f"{op}: {bias_name} has shape {tuple(bias.shape)}; expected ({weights.shape[bias_axis]},)")
    if bias.device != weights.device:
        raise ValueError(
            f"{op}: {bias_name} is on {bias.device} and {name} on {weights.device}; move one with .to(...)"
        )


def tensor_of(value: Any) -> Tensor:
    """A tensor as it is; numbers and arrays as one on the CPU, whatever the default device."""
    if isinstance(value, np.ndarray):  # of any strides and byte order
        value = np.ascontiguousarray(value, value.dtype.newbyteorder("="))
    return value if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")


def no_gradient(owner: str, name: str, value: Any) -> None:
    """Refuse a tensor that requires a gradient where a copy is made, which no gradient would reach."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(
            f"{owner}: {name} requires a gradient, which would not reach it, because a copy is kept; pass it detached, "
            f"{name}.detach()"
        )


def direction_rows(owner: str, name: str, value: Any, *, one: bool = False, gaps: bool = False) -> Tensor:
    """Directions as float32 CPU rows (m, d): finite, none zero (`gaps`: not all). Takes a tensor or what has `.vector`."""
    value = getattr(value, "vector", value)
    no_gradient(owner, name, value)
    try:
        rows = tensor_of(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"{owner}: {name} must be a tensor, or carry one as .vector; got {type(value).__name__}"
        ) from None
    if not rows.is_floating_point():
        raise TypeError(f"{owner}: {name} has dtype {rows.dtype}; expected a floating dtype")
    if rows.layout != torch.strided or rows.is_meta:
        raise TypeError(f"{owner}: {name} is a {'meta' if rows.is_meta else rows.layout} tensor; expected a dense one")
    given = rows
    rows = rows.detach().to("cpu", torch.float32, copy=True)  # the caller may go on changing its tensor
    if rows.dim() == 1:
        rows = rows[None]
    if rows.dim() != 2 or rows.shape[-1] == 0 or rows.shape[0] == 0 or (one and rows.shape[0] != 1):
        expected = "(d,)" if one else "(d,) or (m, d), m >= 1"
        raise ValueError(f"{owner}: {name} has shape {tuple(given.shape)}; expected {expected}")
    bad = (~rows.isfinite()).any(1).nonzero().flatten().tolist()
    if bad and bool(given.isfinite().all()):
        raise ValueError(f"{owner}: {name} overflows float32 in row {bad[0]}; scale it towards length 1")
    if bad:
        raise ValueError(f"{owner}: {name} holds NaN or Inf in row {bad[0]}; check the activations it came from")
    zero = (rows == 0).all(1).nonzero().flatten().tolist()
    if zero and not (gaps and len(zero) < len(rows)):
        raise ValueError(f"{owner}: {name} is all zero in row {zero[0]}; a zero direction steers nothing")
    return rows.contiguous()


def finite_number(owner: str, name: str, value: Any) -> float:
    """A finite Python float."""
    if type(value) is float and math.isfinite(value):
        return value
    if isinstance(value, (bool, str, bytes)):
        raise TypeError(f"{owner}: {name} must be a number; got {value!r}")
    no_gradient(owner, name, value)
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{owner}: {name} must be a number; got {value!r}") from None
    except OverflowError:
        raise ValueError(f"{owner}: {name} must be finite; got a whole number beyond any float") from None
    if number != number or number in (float("inf"), float("-inf")):
        raise ValueError(f"{owner}: {name} must be finite; got {number}")
    return number


def whole_number(owner: str, name: str, value: Any, least: int | None = None) -> int:
    """A Python int of whatever is a whole number: int, a NumPy integer, an array or a tensor of one integer.

    Raises:
        TypeError: anything else; True and 3.0 are no whole numbers.
        ValueError: it is less than `least`.
    """
    bound = "" if least is None else f" >= {least}"
    try:
        if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{owner}: {name} must be a whole number{bound}; got {value!r}") from None
    if least is not None and number < least:
        raise ValueError(f"{owner}: {name} is {number}; expected a whole number{bound}")
    return number


def positive_integer(owner: str, name: str, value: Any) -> int:
    """A Python int >= 1 of whatever is one, a NumPy integer too."""
    try:
        number = whole_number(owner, name, value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{owner}: {name} must be a positive integer, got {value!r}")
    return number


def seed_number(owner: str, value: Any) -> int:
    """A seed that whatever draws takes, NumPy, scikit-learn and PyTorch: 0 to 2**32 - 1."""
    seed = whole_number(owner, "seed", value, 0)
    if seed >= 2**32:
        raise ValueError(f"{owner}: seed is {seed}; expected a whole number from 0 to 2**32 - 1")
    return seed


def whole_numbers(owner: str, name: str, value: Any, count: int) -> list[int]:
    """Python ints of one whole number or several: an iterable, an array, a tensor, or a slice of `count` of them.

    Negative numbers stay negative; a slice is one of range(count).

    Raises:
        TypeError: something in it is no whole number.
        ValueError: a slice of step 0.
    """
    if isinstance(value, slice):
        bounds = (value.start, value.stop, value.step)
        start, stop, step = (None if b is None else whole_number(owner, name, b) for b in bounds)
        if step == 0:
            raise ValueError(f"{owner}: {name} is a slice of step 0; expected another step")
        return list(range(count))[start:stop:step]
    if getattr(value, "shape", None) is not None and hasattr(value, "tolist"):  # an array, a tensor, a NumPy number
        if len(value.shape) > 1:
            raise TypeError(f"{owner}: {name} has shape {tuple(value.shape)}; expected one number or a list of them")
        value = value.tolist()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return [whole_number(owner, name, value)]
    return [whole_number(owner, name, number) for number in value]


def checked_part(owner: str, part: Any) -> tuple[int, int]:
    """A part (i, n), i from 1 to n.

    Raises:
        TypeError, ValueError: it is none.
    """
    if not isinstance(part, tuple | list) or len(part) != 2:
        raise TypeError(f"{owner}: part must be (i, n), part i of n, got {part!r}")
    i, n = (whole_number(owner, "part", number, 1) for number in part)
    if i > n:
        raise ValueError(f"{owner}: part is {i} of {n}; they count from 1 to {n}")
    return i, n


def warn_user(message: str) -> None:
    """Warn at the line outside steerfast that led here, however deep; Python shows a line's repeated warning once."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "steerfast":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def flag(owner: str, name: str, value: Any) -> bool:
    """True or False; a word such as "no" would count as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False; got {value!r}")
    return value


def instance_of(owner: str, name: str, value: Any, kind: type[T], such: str) -> T:
    """An object of ours.

    Args:
        owner: The function that was given it.
        name: Of the argument.
        value: What was given.
        kind: What it must be.
        such: How one is had.

    Raises:
        TypeError: it is something else, such as the class itself, its settings in a dict, or where it is saved.
    """
    if not isinstance(value, kind):
        got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)[:60]
        raise TypeError(f"{owner}: {name} is {got}; expected {kind.__name__}, such as {such}")
    return value


def one_of(owner: str, name: str, value: Any, allowed: Sequence[str]) -> str:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{owner}: {name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")
    return str(value)


ORTHONORMAL = 1e-3
"""Largest entry of |QQᵀ - I| that still counts as an orthonormal basis in float32."""


def check_orthonormal(owner: str, name: str, rows: Tensor) -> None:
    """Refuse rows that are not orthonormal, and say by how much."""
    unit = torch.eye(rows.shape[0], dtype=torch.float64, device="cpu")
    deviation = (rows.double() @ rows.double().T - unit).abs().max().item()
    if rows.shape[0] > rows.shape[1] or deviation > ORTHONORMAL:
        raise ValueError(
            f"{owner}: the rows of {name} are not orthonormal (their products deviate from the identity by {deviation:.1e}); "
            "orthonormalise them first, for instance with torch.linalg.qr"
        )


def own_tensors(target: object, owner: str, names: tuple[str, ...]) -> None:
    """Make the named fields of a frozen object finite float32 CPU tensors of their own, from its __post_init__."""
    for name in names:
        value = getattr(target, name)
        if not isinstance(value, Tensor):
            raise TypeError(f"{owner}: {name} must be a tensor; got {type(value).__name__}")
        no_gradient(owner, name, value)
        value = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        if not value.isfinite().all():
            raise ValueError(f"{owner}: {name} holds NaN or Inf")
        set_field(target, name, value)


def step_count(owner: str, steps: Any) -> int:
    """steps as a Python int >= 1 that the header of a slot can hold."""
    try:
        count = whole_number(owner, "steps", steps)
    except TypeError:
        count = 0
    if not 1 <= count < 2**31:
        raise ValueError(f"{owner}: steps is {steps!r}; expected a whole number from 1 to 2**31 - 1")
    return count


def listed(value: Any) -> Any:
    """An array or a tensor of several numbers as a list of them; anything else as it is."""
    several = len(getattr(value, "shape", ())) > 0 and hasattr(value, "tolist")
    return value.tolist() if several else value


def path_length(owner: str, T: float | None, angle: float | None) -> tuple[float, float]:
    """(absolute length, multiple of ‖a‖) of a path that is given in one of the two ways."""
    if (T is None) == (angle is None):
        raise ValueError(f"{owner}: got T={T} and angle={angle}; give exactly one of them")
    name, value = ("T", T) if angle is None else ("angle", angle)
    value = finite_number(owner, name, value)
    if value < 0:
        raise ValueError(
            f"{owner}: {name} is {value}; expected >= 0 (to steer the other way, swap the barrier's sides)"
        )
    return (value, 0.0) if angle is None else (0.0, value)


class HasVector(Protocol):
    """Anything that carries a vector (d,), such as a direction from `steerfast.extract`."""

    @property
    def vector(self) -> Tensor:
        """The vector, (d,)."""
        ...


Directions = Tensor | HasVector


ROUNDED = 1e-6
"""Deviation from orthonormal rows that rounding to float32 explains."""


DEPENDENT = 1e-4
"""A row whose part outside the span of the earlier rows is shorter than this share of it counts as dependent."""


def orthonormal(owner: str, name: str, rows: Tensor) -> Tensor:
    """An orthonormal basis (m, d) of the span of m independent rows; a single row keeps its direction."""
    count, width = rows.shape
    if count > width:
        raise ValueError(f"{owner}: {name} has {count} rows of width {width}; at most {width} can be independent")
    wide = rows.double()
    if (
        wide @ wide.T - torch.eye(count, dtype=wide.dtype, device="cpu")
    ).abs().max() <= ROUNDED:  # already a basis: what was saved comes back as it was
        return rows
    basis, triangle = torch.linalg.qr((wide / wide.norm(dim=1, keepdim=True)).T)
    diagonal = triangle.diagonal()
    weakest = int(diagonal.abs().argmin())
    if diagonal[weakest].abs() < DEPENDENT:
        raise ValueError(
            f"{owner}: row {weakest} of {name} lies in the span of the rows before it (only {diagonal[weakest].abs():.1e} "
            "of its length is outside); remove it"
        )
    return (basis * diagonal.sign()).T.float().contiguous()


def float_table(owner: str, name: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A finite float32 CPU tensor of one shape."""
    no_gradient(owner, name, value)
    try:
        table = tensor_of(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{owner}: {name} must be a tensor of shape {shape}; got {type(value).__name__}") from None
    if tuple(table.shape) != shape or not table.is_floating_point():
        raise ValueError(
            f"{owner}: {name} has shape {tuple(table.shape)} and dtype {table.dtype}; expected {shape}, floating"
        )
    table = table.detach().to("cpu", torch.float32, copy=True).contiguous()
    if not table.isfinite().all():
        raise ValueError(f"{owner}: {name} holds NaN or Inf")
    return table


def as_tensor(value: Any) -> Tensor:
    """A field that __post_init__ has made a tensor."""
    return value


def set_field(target: object, name: str, value: Any) -> None:
    """Set a field of a frozen object, from its __post_init__."""
    object.__setattr__(target, name, value)
