"""Which implementation runs: Triton kernels on a GPU, PyTorch elsewhere.

`auto` takes the kernels for CUDA tensors and falls back, with one warning, where Triton is missing, the GPU is too old for
their products, or a gradient is asked of a kernel that has none. A backend chosen by name that cannot run is an error,
never a silent fallback.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])
_any_autocast = torch._C._is_any_autocast_enabled
_float32_precision = torch._C._get_fp32_precision_getter
_modes = torch._C._len_torch_dispatch_stack
_trace = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack
_LIBRARIES = {"cuda": torch.backends.cuda.matmul, "cpu": torch.backends.mkldnn.matmul}  # type: ignore[attr-defined]
_STRIDED = torch.strided
_IEEE = ("ieee", "none")
_REDUCED_SUMS = (
    "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction", "allow_fp16_accumulation",
)  # fmt: skip
TENSOR_PRODUCTS = (8, 0)
"""From this compute capability on Triton's products run on tensor cores; below it they fill a thread's stack."""

STEP_SIZES = (1, 65, 257, 513, 2113, 4225, 8449)
"""Numbers of tokens, one for each choice of kernel that launchers make by that number."""

BACKENDS = ("auto", "triton", "torch")
_chosen: str | None = None


def use_backend(name: str) -> None:
    """Choose the backend of every op in this process: "auto", "triton" or "torch".

    `STEERFAST_BACKEND` in the environment does the same for a process that does not call this function; it is read once.

    Raises:
        ValueError: the name is none of the three.

    Example:
        >>> import steerfast as sf
        >>> sf.use_backend("torch")
        >>> sf.use_backend("auto")
    """
    global _chosen
    _chosen = _valid(name, "use_backend: name")


def backend_of(x: Tensor) -> str:
    """The backend that an op on x takes now: "triton" or "torch"."""
    chosen = _chosen or _from_environment()
    if chosen == "torch" or (chosen == "auto" and (not x.is_cuda or x.dtype == torch.float64)):
        return "torch"
    if chosen == "auto":
        if not _has_triton():
            _warn_once("steerfast: Triton is not installed, so CUDA tensors run on the PyTorch backend")
            return "torch"
        if transformed():
            _warn_once("steerfast: transforms of torch.func and forward-mode gradients run on the PyTorch backend")
            return "torch"
        if (capability := _capability(x.device.index)) < TENSOR_PRODUCTS:
            _warn_once(
                f"steerfast: this GPU has compute capability {capability[0]}.{capability[1]}, and the products of the kernels "
                'need 8.0: it runs on the PyTorch backend; use_backend("triton") takes the kernels all the same, which are slow'
            )
            return "torch"
        return "triton"
    if not _has_triton():
        raise RuntimeError(
            'the "triton" backend was chosen, but Triton is not installed: pip install "steerfast[cpu-kernels]"'
        )
    if transformed():
        raise RuntimeError(
            'the "triton" backend has no rules for transforms of torch.func and forward-mode gradients; choose the "torch" '
            "backend for them"
        )
    if x.dtype == torch.float64:
        raise TypeError(
            'the "triton" backend computes in float32 and takes no float64; choose the "torch" backend for float64'
        )
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f'the "triton" backend was chosen, but the tensor is on {x.device}: move it to a GPU, choose the "torch" '
            "backend, or set TRITON_INTERPRET=1 before Python starts to interpret the kernels"
        )
    return "triton"


def in_full_precision(function: Function) -> Function:
    """A function whose products are what they would be without autocast and without reduced float32, as those of a kernel.

    `torch.set_float32_matmul_precision` and its kin hold for the process: a product of another thread that meets a change is
    exact, too. A compiler that traces the function keeps to the settings that it finds.
    """

    def in_float32(kind: str, /, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or kind not in _LIBRARIES or not _is_reduced(kind):
            return function(*args, **kwargs)
        with _set(_LIBRARIES[kind], {"fp32_precision": "ieee"}):
            return function(*args, **kwargs)

    @functools.wraps(function)
    def exact(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _is_exact():
            return function(*args, **kwargs)
        kind = next(value.device.type for value in args if isinstance(value, Tensor))
        if not _any_autocast():
            return in_float32(kind, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return in_float32(kind, *args, **kwargs)

    return cast(Function, exact)


def exactly(function: Callable[..., Any], *args: Any) -> Any:
    """A function of tensors on a CPU, as `in_full_precision` runs it; outside a compiler's trace."""
    if _any_autocast() or _is_reduced("cpu"):
        return in_full_precision(function)(*args)
    return function(*args)


def in_full_sums(function: Function) -> Function:
    """`in_full_precision`, and products of 16-bit tensors add up in float32, whatever the process allows."""
    within = in_full_precision(function)

    @functools.wraps(function)
    def exact(*args: Any, **kwargs: Any) -> Any:
        with _set(torch.backends.cuda.matmul, dict.fromkeys(_REDUCED_SUMS, False)):
            return within(*args, **kwargs)

    return cast(Function, exact)


def _is_exact() -> bool:
    """Whether products are exact on every device as it is, the common case."""
    return not _any_autocast() and (
        _float32_precision("mkldnn", "matmul") in _IEEE and _float32_precision("cuda", "matmul") in _IEEE
    )


def _is_reduced(kind: str) -> bool:
    """Whether products of float32 tensors on such a device may take fewer bits."""
    return _float32_precision("cuda" if kind == "cuda" else "mkldnn", "matmul") not in _IEEE


@contextmanager
def _set(library: Any, wanted: dict[str, Any]) -> Iterator[None]:
    """Settings of a library of products, for a while."""
    before = {name: getattr(library, name) for name in wanted}
    changed = [name for name, value in wanted.items() if before[name] != value]
    try:
        for name in changed:
            setattr(library, name, wanted[name])
        yield
    finally:
        for name in changed:
            setattr(library, name, before[name])


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is on: a tensor is then more than its numbers."""
    return forward_ad._current_level >= 0 or _transform() is not None


def is_plain(x: Tensor, directions: Tensor, *others: Tensor | None) -> bool:
    """Whether these are dense CPU tensors of at most 32 bits: no subclass, mode or transform, nobody's trace or gradient."""
    if type(x) is not Tensor or type(directions) is not Tensor or not x.is_cpu:
        return False
    if x.layout is not _STRIDED or directions.layout is not _STRIDED:
        return False
    if x.dtype is torch.float64 or directions.dtype is torch.float64:
        return False
    records = torch.is_grad_enabled()
    if records and (x.requires_grad or directions.requires_grad):
        return False
    for tensor in others:
        if tensor is not None and (type(tensor) is not Tensor or (records and tensor.requires_grad)):
            return False
    return not (transformed() or _modes() or _trace())


@functools.cache
def kernels(name: str) -> ModuleType:
    """One module of steerfast_kernels, imported at its first use because it imports Triton."""
    return importlib.import_module(f"steerfast_kernels.{name}")


@functools.cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels: its products of bfloat16 tensors then multiply their bit patterns."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    """Of a GPU of CUDA; one of ROCm has products for its matrix units wherever Triton runs."""
    return TENSOR_PRODUCTS if torch.version.hip else torch.cuda.get_device_capability(index)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


@functools.cache
def _from_environment() -> str:
    return _valid(os.environ.get("STEERFAST_BACKEND", "auto"), "STEERFAST_BACKEND")


def _valid(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: got {name!r}; expected one of {', '.join(map(repr, BACKENDS))}")
    return name


def apart(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a kernel may write into x while it reads the others: they lie in other memory, and x is no view that negates."""
    if x.is_neg():
        return False
    memory = x.untyped_storage()
    first = memory.data_ptr()
    last = first + memory.nbytes()
    for other in others:
        if other is not None:
            beside = other.untyped_storage()
            start = beside.data_ptr()
            if start < last and first < start + beside.nbytes():
                return False
    return True


def note_write(x: Tensor) -> None:
    """Tell PyTorch that a kernel has written into x: who keeps it for a gradient, or an encode of it, sees that it changed."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
