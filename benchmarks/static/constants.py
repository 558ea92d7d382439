"""Every number that the model does not read from the code: limits of the targets, and how fast an H200 is.

Limits are the vendors' own. Speeds are assumed until rows of a GPU are committed, and change only with such rows.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.backends.compiler import GPUTarget

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DEFAULT = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")  # the others on request


class Limits(NamedTuple):
    """What one SM (compute unit on AMD) holds."""

    warps: int  # resident at a time; waves of 64 lanes on AMD
    programs: int
    registers: int  # of 32 bits, in all
    shared: int  # bytes
    reserved: int  # bytes of shared memory that every program costs besides its own


# CUDA C++ Programming Guide 12.9, table "Technical Specifications per Compute Capability"; CDNA 3 ISA Reference Guide, ch. 3
LIMITS = {
    "sm_80": Limits(64, 32, 65536, 164 * 1024, 1024),
    "sm_86": Limits(48, 16, 65536, 100 * 1024, 1024),
    "sm_89": Limits(48, 24, 65536, 100 * 1024, 1024),
    "sm_90": Limits(64, 32, 65536, 228 * 1024, 1024),
    "sm_100": Limits(64, 32, 65536, 228 * 1024, 1024),
    "sm_120": Limits(48, 24, 65536, 100 * 1024, 1024),
    "gfx942": Limits(32, 32, 4 * 512 * 64, 64 * 1024, 0),
}


class Range(NamedTuple):
    """A constant that is not known well: the value that makes a prediction short, and the one that makes it long."""

    short: float
    long: float


# Data sheets: A100, RTX 3090, RTX 4090, H200 SXM, B200, RTX 5090, MI300X
SMS = {"sm_80": 108, "sm_86": 82, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304}

# The H200 SXM, whose data sheet says 4.8 TB/s, 989 TFLOP/s dense bf16, 67 TFLOP/s float32, 50 MB of L2
L2_SIZE = 50e6  # bytes
SCHEDULERS = 4  # warp instructions a cycle and SM, at best
L2_PORT = 64  # bytes a cycle from L2 into one SM, at best
SECTOR = 32  # bytes: what L2 and DRAM move at least

# Assumed, from what is published of H100 and H200 kernels of this kind
CLOCK = Range(1.83e9, 1.70e9)  # Hz under load; 1.98 at most
DRAM = Range(4.4e12, 4.2e12)  # bytes/s of a large copy
L2 = Range(7.0e12, 5.5e12)  # bytes/s from L2 to all SMs
PRODUCT = Range(800e12, 600e12)  # bf16 operations/s of a good product
ISSUE_SHARE = Range(1.0, 0.6)  # of the issue slots that a kernel of this kind fills
WAIT = Range(0.27e-6, 0.70e-6)  # s until a load of the stream is there: from L2, from DRAM
SHORT_WAIT = Range(0.10e-6, 0.27e-6)  # s until a load of what every program reads is there: from L1, from L2
L1_KEEPS = 16 * 1024  # bytes that a program reads again without asking L2
L2_SHARE = Range(1.0, 0.5)  # of L2 that what is read again may occupy and still be there
LAUNCH = Range(1.0e-6, 2.5e-6)  # s that a launch inside a CUDA graph costs by itself
