"""What the targets allow: the limits against which every default variant is checked before it meets a device."""

from __future__ import annotations

from typing import NamedTuple


class Limits(NamedTuple):
    """Hard limits of one target, as its vendor documents them."""

    registers: int  # per thread
    shared: int  # bytes of shared memory (LDS) that one program may use


LIMITS = {
    "sm_80": Limits(255, 163 * 1024),
    "sm_90": Limits(255, 227 * 1024),
    "sm_100": Limits(255, 227 * 1024),
    "gfx942": Limits(512, 64 * 1024),  # 256 vector and 256 accumulation registers
}
