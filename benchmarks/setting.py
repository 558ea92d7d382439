"""Where the suites run, and at which sizes: a GPU, a CPU, or the rehearsal of the GPU's run at tiny sizes.

`STEERFAST_BENCH=tiny` rehearses: with `TRITON_INTERPRET=1` the kernels themselves run, and no figure is kept as one.
"""

from __future__ import annotations

import os
from typing import TypeVar

import torch
from lab.case import Stream

T = TypeVar("T")

TINY = os.environ.get("STEERFAST_BENCH") == "tiny"
PLACE = "tiny" if TINY else "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pick(cuda: T, cpu: T, tiny: T) -> T:
    """What belongs to this place."""
    return {"cuda": cuda, "cpu": cpu, "tiny": tiny}[PLACE]


AT = pick(
    Stream("cuda", torch.bfloat16, 4096),
    Stream("cpu", torch.float32, 576),
    Stream("cpu", torch.float16, 40),
)
FEATURES = pick(65536, 65536, 300)
K = pick(32, 32, 5)
