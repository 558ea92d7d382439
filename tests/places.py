"""Where an op can run, and how exact it must be: one list and one rule for every test of an op."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

import steerfast as sf
from steerfast.ops import compiled_cpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

PLACES = [
    "cpu",
    pytest.param(
        "interpreter",
        marks=[pytest.mark.interpreter, pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")],
    ),
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]

needs_numba = pytest.mark.skipif(find_spec("numba") is None, reason="needs numba: pip install steerfast[cpu]")

ROADS = [
    *PLACES,
    pytest.param("compiled", marks=needs_numba),
]
"""Of the ops for which a CPU has two: "cpu" is the one of PyTorch's calls."""

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextmanager
def backend(place: str) -> Iterator[str]:
    """Choose the backend of a place; yields the device that its tensors live on."""
    sf.use_backend("torch" if place in ("cpu", "compiled") else "triton")
    try:
        with only_calls() if place == "cpu" else nullcontext():
            yield "cuda" if place == "cuda" else "cpu"
    finally:
        sf.use_backend("auto")


@contextmanager
def only_calls() -> Iterator[None]:
    """The CPU backend as where numba is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_cpu, "kernels", lambda: None)
        yield


def runs(place: str, dtype: torch.dtype) -> bool:
    """The interpreter is wrong on raw bf16: its arithmetic is proven on a GPU."""
    return place != "interpreter" or dtype != torch.bfloat16


def assert_exact(got: Tensor, true: Tensor, naive: Tensor, what: str = "") -> None:
    """`got` may err at most twice what the same formula errs in PyTorch in the same dtype, plus one unit in the last place.

    true is float64. naive is the formula evaluated in got's dtype; both errors are largest absolute ones.
    """
    assert got.shape == true.shape
    assert got.dtype == naive.dtype
    largest = true.abs().max().item()
    unit = largest * torch.finfo(got.dtype).eps
    error = (got.double().cpu() - true).abs().max().item()
    allowed = 2 * (naive.double().cpu() - true).abs().max().item() + unit
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"
