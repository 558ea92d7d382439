"""Launch choices that were measured, by device class; written by benchmarks/tune.py, never while a user's request runs.

A device without an entry uses the values that stand in the kernels' own files: safe everywhere, since those are the ones
that are compiled ahead of time for every target.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# device class -> "module.NAME" -> value
TABLE: dict[str, dict[str, Any]] = {}


def tuned(name: str, default: T, x: Tensor) -> T:
    """The measured value of a choice, such as "add.BLOCK_D", for the device of x; else the default."""
    if not TABLE or not x.is_cuda:
        return default
    return TABLE.get(device_class(x.device.index or 0), {}).get(name, default)


@functools.cache
def device_class(index: int) -> str:
    """The class of a device, such as sm_90 or gfx942: devices of one class share their choices."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
