"""Memory: by how much a call makes it rise, and how large the last cache is."""

from __future__ import annotations

import ctypes
import gc
import re
from contextlib import suppress
from pathlib import Path

import torch

from .case import Function, Inputs


def memory_rise(function: Function, inputs: Inputs, device: str) -> int | None:
    """By how many bytes memory rises during a call, at its peak: PyTorch's on a GPU, the process's on Linux, else None."""
    function(*inputs)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(*inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    give_back()  # memory that was freed but kept would hide a rise
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        return None
    before = _status("VmRSS")
    function(*inputs)
    return max(0, _status("VmHWM") - before)


def give_back() -> None:
    """Free memory goes back to the system, where the C library can do that."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def last_cache() -> int:
    """Bytes of the host's last cache; 32 MB where it is not told."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [
        int(file.read_text().strip().removesuffix("K")) << 10 for file in sizes if file.read_text().strip()[-1] == "K"
    ]
    return max(found, default=32 << 20)
