"""What a case is: one op at one size, what it must move and compute, its baselines, and how an answer is judged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

Inputs = tuple[Any, ...]
Function = Callable[..., Any]
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


class NotHere(Exception):
    """Raised by the maker of a baseline that cannot run here; its text is the reason that is reported."""


@dataclass(frozen=True)
class Case:
    """One op at one size: what it must move and compute, how to call it, and how an answer is judged.

    Attributes:
        name: The op and its sizes, such as "amplify k=8 n=256 d=576 fp32"; results are found by it.
        bytes: Bytes that any implementation must read and write once per call.
        operations: Floating-point operations that it must do per call.
        fresh: Makes one set of inputs. Sets rotate, so that inputs larger than the cache are read from memory.
        ours: What is measured, called with a set.
        fixed: What every call shares, such as weights; a set is what `fresh` makes, followed by these.
        judge: For a set, a function from an answer to its error as a share of what is allowed.
        peers: Baselines that give the same answer, by name: what makes a function like `ours`. Checked before they are timed.
        yardsticks: Baselines that do other work on the same inputs, such as the matrix products alone; not checked.
        dtype: Of the arithmetic that the peak is measured in.
        slack: How much more than ours a peer may err, who may round more often than we do.
        captured: Whether a GPU runs the call inside a CUDA graph; otherwise the time of the host counts, too.
    """

    name: str
    bytes: float
    operations: float
    fresh: Callable[[], Inputs]
    ours: Function
    judge: Callable[[Inputs], Callable[[Any], float]]
    fixed: Inputs = ()
    peers: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    yardsticks: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    slack: float = 8.0
    captured: bool = True


@dataclass(frozen=True)
class Within:
    """A function inside a context, such as a hook: entered before each burst and left after it, outside the time taken."""

    function: Function
    around: Callable[[], AbstractContextManager[object]]

    def __call__(self, *inputs: Any) -> Any:
        """One call in a context of its own."""
        with self.around():
            return self.function(*inputs)


@dataclass(frozen=True)
class Compiled:
    """The maker of a baseline: `torch.compile` of a function, for one shape, in one graph. A quick run leaves it out."""

    function: Function

    def __call__(self) -> Function:
        """Compile; the first call of what is returned takes seconds."""
        old: Any = self.function
        own = FunctionType(old.__code__.replace(), old.__globals__, old.__name__, old.__defaults__, old.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False)  # a code object has room for few compilations


@dataclass(frozen=True)
class Stream:
    """The residual stream of a case: where it lives, in what dtype, how wide."""

    device: str
    dtype: torch.dtype
    d: int

    @property
    def tag(self) -> str:
        """How a case names it, such as "d=4096 bf16"."""
        return f"d={self.d} {SHORT[self.dtype]}"

    def rows(self, n: int) -> Tensor:
        """n random rows."""
        return torch.randn(n, self.d, device=self.device).to(self.dtype)

    def basis(self, k: int) -> Tensor:
        """k orthonormal rows."""
        return torch.linalg.qr(torch.randn(self.d, k, device=self.device))[0].T.contiguous().to(self.dtype)

    def dictionary(self, features: int) -> Tensor:
        """Rows of length about 1, filled in parts: the float32 copy of a large one need not fit."""
        w = torch.empty(features, self.d, device=self.device, dtype=self.dtype)
        for part in w.split(8192):
            part.copy_(torch.randn(part.shape, device=self.device) / math.sqrt(self.d))
        return w


def error_share(got: Tensor, true: Tensor, naive: Tensor) -> float:
    """The largest error over what is allowed: twice the formula's own in this dtype, plus one unit in the last place."""
    unit = true.abs().max() * torch.finfo(got.dtype).eps
    allowed = 2 * (naive.double() - true).abs().max() + unit
    if got.shape != true.shape:
        return float("inf")
    return float(((got.double() - true).abs().max() / allowed).item())


def same_as(formula: Function) -> Callable[[Inputs], Callable[[Any], float]]:
    """Judge by a formula in plain PyTorch: its value in float64 is the truth, its error in the dtype of x the measure."""

    def judge(inputs: Inputs) -> Callable[[Any], float]:
        true = formula(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs))
        naive = formula(*inputs)
        return lambda got: error_share(got, true, naive)

    return judge
