"""What the model is asked about: the cases of the suites at the sizes of the goals, without their random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from lab import cases, goals, sae_cases
from lab.case import Case, Stream
from torch import Tensor

from . import published

D, N, FEATURES, K = 4096, 8192, 65536, 32


class Blank(Stream):
    """A stream of zeros: what a kernel reads and writes depends on sizes and tables, not on the numbers of a row."""

    def rows(self, n: int) -> Tensor:
        return torch.zeros(n, self.d, dtype=self.dtype)

    def dictionary(self, features: int) -> Tensor:
        return torch.empty(features, self.d, dtype=self.dtype)  # never read but where a program is counted


AT = Blank("cpu", torch.bfloat16, D)


def subspace(n: int, method: str, k: int, slots: int = 1) -> Callable[[], Case]:
    return lambda: cases.subspace(AT, n, method, k, slots)


def nobody(n: int, k: int, columns: int = 4) -> Case:
    return goals.nobody(AT, n, k, columns)


def prepared(n: int, k: int) -> Case:
    return goals.prepared(AT, n, k)


def encode(n: int) -> Case:
    return sae_cases.sae_encode(AT, n, FEATURES, K)


def encode_mixed(n: int) -> Case:
    return goals.encode_mixed(AT, n, FEATURES, K)


def edit_topk(n: int) -> Case:
    """With no feature that exceeds another, so that the programs which are counted leave each other work."""
    case = sae_cases.sae_edit_topk(AT, n, FEATURES, K)
    w, b, rows = case.fixed
    return replace(case, fixed=(w, -b, rows))


CASES: dict[str, Callable[[], Case]] = {
    "add": lambda: cases.add(AT, N),
    "add n=64": lambda: cases.add(AT, 64),
    "norm": lambda: cases.add_rms_norm(AT, N),
    "hinge k=1": subspace(N, "ablate", 1),
    "hinge k=1 n=64": subspace(64, "ablate", 1),
    "hinge k=8": subspace(N, "amplify", 8),
    "hinge k=8 n=64": subspace(64, "amplify", 8),
    "hinge k=8, 256 owners": subspace(256, "amplify", 8, 256),
    "hinge k=16": subspace(N, "amplify", 16),
    "hinge k=32": subspace(N, "amplify", 32),
    "hinge k=64": subspace(N, "amplify", 64),
    "hinge k=64 n=64": subspace(64, "amplify", 64),
    "hinge k=64 n=1024": subspace(1024, "amplify", 64),
    "hinge k=64 n=1025": subspace(1025, "amplify", 64),
    "keep_norm k=8": subspace(N, "amplify keep_norm", 8),
    "keep_norm k=16": subspace(N, "amplify keep_norm", 16),
    "keep_norm k=64": subspace(N, "amplify keep_norm", 64),
    "flow k=64": lambda: cases.flow(AT, N, 64),
    "flow k=8": lambda: cases.flow(AT, N, 8),
    "all modes k=8": lambda: prepared(N, 8),
    "nobody k=8": lambda: nobody(N, 8),
    "nobody k=64": lambda: nobody(N, 64),
    "nobody k=64 n=64": lambda: nobody(64, 64),
    "affine": lambda: cases.affine(AT, N),
    "encode": lambda: encode(4096),
    "encode n=16": lambda: encode(16),
    "encode mixed": lambda: encode_mixed(4096),
    "encode mixed n=16": lambda: encode_mixed(16),
    "topk edit": lambda: edit_topk(4096),
    "topk edit n=16": lambda: edit_topk(16),
    "threshold": lambda: sae_cases.sae_encode_threshold(AT, 4096, FEATURES, 256),
    "decode": lambda: sae_cases.sae_decode(AT, 4096, FEATURES, K),
    "decode n=16": lambda: sae_cases.sae_decode(AT, 16, FEATURES, K),
}
"""Short name -> the case; what a row is called elsewhere is the case's own name."""

HELD = tuple(CASES)
"""Those whose counts a test holds."""

# --- the goals of a GPU that are not among them, under the names of headline.py ---
CASES |= {name: partial(goal.case, AT) for name, goal in goals.GOALS.items() if name not in CASES}

EVERY = CASES | published.CASES
"""With kernels whose times others have published."""

QUICK = ("add", "hinge k=1", "hinge k=64")
"""What the fast test counts."""


def tokens(case: Case) -> int:
    """Rows of the stream in a call."""
    return int(case.fresh()[0].shape[0])
