"""What a device allows: asked of Triton where launchers choose by it; and the limits of targets compiled ahead of time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Device(NamedTuple):
    """What launchers ask of a device."""

    lanes: int  # threads of a warp: 64 on AMD's CDNA, 32 on its RDNA and on NVIDIA
    shared: int  # bytes of shared memory (LDS) that one program may use
    wgmma: bool = False  # four warps multiply together, as on sm_90 alone


class Limits(NamedTuple):
    """Hard limits of one target, as its vendor documents them."""

    registers: int  # per thread
    shared: int  # bytes
    lanes: int


LIMITS = {
    "sm_80": Limits(255, 163 * 1024, 32),
    "sm_90": Limits(255, 227 * 1024, 32),
    "sm_100": Limits(255, 227 * 1024, 32),
    "gfx942": Limits(512, 64 * 1024, 64),  # 256 vector and 256 accumulation registers
}
INTERPRETED = Device(32, 227 * 1024, wgmma=True)


def device_of(x: Tensor) -> Device:
    """The device of x."""
    return _device(x.device.index or 0) if x.is_cuda else INTERPRETED


@functools.cache
def _device(index: int) -> Device:
    with torch.cuda.device(index):
        driver = triton.runtime.driver.active
        target, properties = driver.get_current_target(), driver.utils.get_device_properties(index)
        return Device(target.warp_size, properties["max_shared_mem"], wgmma=target.arch == 90)
