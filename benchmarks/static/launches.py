"""What one call of an op launches and compiles to; nothing runs. Triton's launches are caught on their way to the device."""

from __future__ import annotations

import functools
import hashlib
import importlib
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from lab.case import Case
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import steerfast as sf
import steerfast_kernels
from steerfast.ops import calls
from steerfast_kernels import _device

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from variants import specialise

from .constants import LIMITS, TARGETS

NO_WORK = {
    "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze", "t", "transpose", "unsqueeze",
    "view", "_reshape_alias", "_unsafe_view", "unbind", "lift_fresh", "promote_types", "scalar_tensor",
}  # fmt: skip
"""Calls of PyTorch that launch nothing: other views of a tensor, constants of the host."""


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        return int(torch.tensor(self.grid).prod())

    def compile(self, target: str) -> Any:
        """The kernel with the types, constants and options of this launch, for a target that need not be present."""
        names = {parameter.name for parameter in self.kernel.params}
        options = {name: value for name, value in self.arguments.items() if name not in names}
        options["enable_fp_fusion"] = True  # the default until Triton 3.10, and what the Makefile states
        # Triton's own cache ignores where a function stands, and what comes from it may name the lines of an older file
        with mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": _cache()}):
            return triton.compile(specialise(self.kernel, self.arguments), target=TARGETS[target], options=options)


@functools.cache
def _cache() -> str:
    """A folder for what these very files compile to."""
    folders = [*steerfast_kernels.__path__, Path(__file__).parent / "yardsticks"]
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.py"))]
    text = "".join(f"{file}\n{file.read_text(encoding='utf-8')}" for file in files)
    return str(Path(__file__).parents[2] / ".cache" / "static" / hashlib.sha256(text.encode()).hexdigest()[:16])


class Calls(TorchDispatchMode):
    """Counts PyTorch's own work beside the launches."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.allocations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in {"empty", "empty_like", "empty_strided", "new_empty"}:
            self.allocations += 1
        elif name not in NO_WORK:
            self.kernels[name] += 1
        return function(*args, **(kwargs or {}))


def as_on_a_gpu(case: Case) -> Callable[[], object]:
    """The call of a case, to be made in `kernels_chosen`."""
    inputs = (*case.fresh(), *case.fixed)
    return lambda: case.ours(*inputs)


@contextmanager
def kernels_chosen() -> Iterator[None]:
    """Ops on CPU tensors take the kernels, in the dtype that they would have on a GPU."""
    for module in pkgutil.iter_modules(steerfast_kernels.__path__):
        importlib.import_module(f"steerfast_kernels.{module.name}")
    sf.use_backend("triton")
    try:
        # the backend asks the environment when it is called; Triton asked it when the kernels were imported, just now
        with (
            mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
            mock.patch.object(calls, "interpreted", return_value=False),
            torch.no_grad(),
        ):
            yield
    finally:
        sf.use_backend("auto")


def launches_of(call: Callable[[], object], target: str) -> tuple[list[Launch], Calls]:
    """The launches of a call as on a target, in order, and what PyTorch does beside them."""
    found: list[Launch] = []

    def catch(kernel: JITFunction, *, grid: tuple[int, ...], warmup: bool, **arguments: Any) -> None:
        found.append(Launch(kernel, grid, arguments))

    amd = None if target.startswith("sm_") else "as on AMD"
    limits = LIMITS[target]
    device = _device.Device(TARGETS[target].warp_size, limits.shared - limits.reserved, wgmma=target == "sm_90")
    beside = Calls()
    with (
        kernels_chosen(),
        mock.patch.object(JITFunction, "run", catch),
        mock.patch.object(torch.version, "hip", amd),
        mock.patch.object(_device, "device_of", return_value=device),
        beside,
    ):
        call()
    return found, beside
