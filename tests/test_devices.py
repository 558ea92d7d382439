"""Launchers fit the device: its shared memory, the lanes of its warps, its capability. No GPU is needed."""

from __future__ import annotations

import os
import types
import warnings
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from variants import specialise

from steerfast.ops import backends
from steerfast.ops.slots import ALL_MODES, HINGE, KEEP_NORM
from steerfast_kernels import _device, subspace
from steerfast_kernels._device import Device

KB = 1024
DEVICES = {
    "sm_90": (GPUTarget("cuda", 90, 32), Device(32, 227 * KB)),
    "sm_89": (GPUTarget("cuda", 89, 32), Device(32, 99 * KB)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device(64, 64 * KB)),
    "gfx1100": (GPUTarget("hip", "gfx1100", 32), Device(32, 64 * KB)),
}


def launches(
    name: str,
    n: int,
    dtype: torch.dtype,
    rank: int,
    split_stream: bool,
    rows: torch.Tensor | None = None,
    modes: int = HINGE,
) -> list[tuple[JITFunction, dict[str, Any]]]:
    """The launches of a bank of this rank on a device that need not be there."""
    found: list[tuple[JITFunction, dict[str, Any]]] = []

    def catch(kernel: JITFunction, *, grid: object, warmup: bool, **arguments: Any) -> None:
        found.append((kernel, arguments))

    x, vectors = torch.empty(n, 1024, dtype=dtype), torch.empty(2 * rank, 1024, dtype=dtype)
    bank = vectors, torch.empty(rank + 1, 8), torch.zeros(1, 8, dtype=torch.int32)
    hidden = torch.empty_like(x) if split_stream else None
    device = DEVICES[name][1]
    with mock.patch.object(JITFunction, "run", catch), mock.patch.object(_device, "device_of", return_value=device):
        subspace.subspace(x, *bank, rows, None, modes, rank, out=x, hidden=hidden)
    return found


CASES = [
    ("sm_89", torch.float32, 512, 16, False),
    ("sm_89", torch.float32, 512, 4096, False),
    ("sm_89", torch.float32, 512, 4096, True),
    ("sm_89", torch.float32, 257, 16, True),
    ("gfx942", torch.bfloat16, 512, 4096, False),
    ("gfx942", torch.float32, 512, 16, False),
    ("gfx942", torch.float32, 512, 4096, False),
    ("gfx1100", torch.bfloat16, 512, 4096, True),
]


@pytest.mark.aot
@pytest.mark.parametrize(("name", "dtype", "rank", "n", "split_stream"), CASES)
def test_what_is_launched_fits_the_shared_memory(name, dtype, rank, n, split_stream):
    target, device = DEVICES[name]
    for kernel, arguments in launches(name, n, dtype, rank, split_stream):
        options = {key: arguments[key] for key in ("num_warps", "num_stages") if key in arguments}
        compiled = triton.compile(specialise(kernel, arguments), target=target, options=options)
        assert compiled.metadata.shared <= device.shared, (kernel.__name__, arguments)


def test_a_device_with_room_keeps_its_stages():
    def steps(name: str, dtype: torch.dtype, rank: int) -> tuple[int, int, int]:
        (_, first), *_ = launches(name, 8192, dtype, rank, split_stream=False)
        return first["BLOCK_D"], first["num_stages"], first["SUMS"]

    assert steps("sm_90", torch.float32, 64) == (64, 4, 2)
    assert steps("sm_90", torch.bfloat16, 64) == (128, 3, 2)
    assert steps("sm_89", torch.float32, 64) == steps("gfx942", torch.float32, 64) == (64, 2, 2)
    assert steps("sm_90", torch.bfloat16, 512) == (64, 3, 1)  # of the wide road, whose tiles fit everywhere
    assert steps("sm_90", torch.float32, 512) == steps("sm_89", torch.float32, 512) == (32, 2, 1)


def test_as_many_threads_whatever_the_lanes_of_a_warp():
    threads = {
        name: launches(name, 8192, torch.bfloat16, 64, split_stream=False)[0][1]["num_warps"] * device.lanes
        for name, (_, device) in DEVICES.items()
    }
    assert set(threads.values()) == {256}


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_whatever_a_row_may_ask_for_is_one_launch(columns):
    """Of any rank up to 64: so a layer that nobody steers costs one, of however many tokens and columns.

    But for few tokens of one column, whose tiles are split over the GPU: two launches, three where a length may be restored.
    """
    for n in (1, 64, 128, 256, 512, 513, 8192):
        rows = torch.empty(n, columns, dtype=torch.int32)
        for rank in (1, 8, 16, 17, 32, 64):
            for modes, most in ((HINGE, 2), (HINGE | KEEP_NORM, 3), (ALL_MODES, 3)):
                found = len(launches("sm_90", n, torch.bfloat16, rank, False, rows, modes))
                at_once = columns > 1 or n > 512 or rank <= (16 if n <= 128 else 8 if n <= 256 else 0)
                assert found <= (1 if at_once else most), (n, rank, modes)


def of_capability(major: int, minor: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for a tensor on a GPU of this capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))
    backends._capability.cache_clear()
    backends._warn_once.cache_clear()
    return types.SimpleNamespace(is_cuda=True, dtype=torch.float16, device=torch.device("cuda:0"))


def test_auto_takes_pytorch_where_products_have_no_tensor_cores(monkeypatch):
    x = of_capability(7, 5, monkeypatch)
    with pytest.warns(RuntimeWarning, match=r"compute capability 7\.5") as seen:
        assert [backends.backend_of(x) for _ in range(3)] == ["torch"] * 3
    assert len(seen) == 1
    monkeypatch.setattr(backends, "_chosen", "triton")
    assert backends.backend_of(x) == "triton"  # by name it may


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (12, 0)])
def test_auto_takes_the_kernels_from_ampere_on(capability, monkeypatch):
    x = of_capability(*capability, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.backend_of(x) == "triton"


@pytest.fixture(autouse=True)
def _forget():
    yield
    backends._capability.cache_clear()
    backends._warn_once.cache_clear()
