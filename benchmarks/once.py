"""Every op once at odd sizes, checked and not timed: what a memory checker runs.

compute-sanitizer python benchmarks/once.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from lab import cases, goals, sae_cases
from lab.case import Case, NotHere, Stream
from lab.methods import METHODS
from setting import INTERPRETED, PLACE, pick

import steerfast as sf

MANY = 1100  # more rows than one kernel for few of them takes
SIZES = pick((70, 5000), (70, 5000), (3, 300))
"""Rows and features: no multiples of a block."""
WIDTHS = pick((4096, 1000), (1000,), (40,))
"""One whose rows are read 16 bytes at a time, and one whose rows are not."""


def every(at: Stream, n: int, features: int) -> Iterator[partial[Case]]:
    """One case of every op and method."""
    yield partial(cases.add, at, n)
    yield partial(cases.add_rms_norm, at, n)
    yield partial(cases.affine, at, n)
    for method in METHODS:
        yield partial(cases.subspace, at, n, method, 2)
    for k in (8, 33):
        yield partial(cases.subspace, at, n, "amplify", k)
    yield partial(cases.subspace, at, pick(MANY, MANY, n + 1), "amplify", 33)
    yield partial(cases.subspace, at, n, "amplify", 8, slots=n)
    yield partial(cases.subspace, at, n, "amplify", 33, slots=n)
    yield partial(goals.split_stream, at, n, 8)
    yield partial(goals.split_stream, at, n, 33)
    yield partial(goals.nobody_in_place, at, n, 33)
    yield partial(cases.flow, at, n, 17, 3)
    full = replace(at, d=min(at.d, 1024))  # its basis is as long as the stream is wide
    yield partial(cases.flow, full, n, full.d, 3)
    yield partial(sae_cases.edit_features, at, n, features)
    yield partial(sae_cases.sae_encode, at, n, features, 5)
    yield partial(goals.encode_mixed, at, n, features, 5)
    yield partial(sae_cases.sae_encode_threshold, at, n, features, 64)
    yield partial(sae_cases.sae_decode, at, n, features, 5)
    yield partial(goals.edit_top_k, at, n, features, 5, 3)


COUNT = len(list(every(Stream("cpu", torch.float32, 8), *SIZES)))


def at(d: int) -> Stream:
    """The stream of this place."""
    return Stream(pick("cuda", "cpu", "cpu"), pick(torch.bfloat16, torch.float32, torch.float16), d)


def check(build: partial[Case]) -> bool:
    """Whether a case is right, or not here."""
    try:
        case = build()
    except NotHere as reason:
        print(f"not here: {reason}")
        return True
    inputs = (*case.fresh(), *case.fixed)
    judge = case.judge(inputs)
    share = judge(case.ours(*inputs))
    print(f"{case.name}: error {share:.3g} of what is allowed{'' if share <= 1 else '  RED'}", flush=True)
    return share <= 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, metavar="D")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    if PLACE == "cuda" or INTERPRETED:
        sf.use_backend("triton")
    red = 0
    for build in (build for d in options.widths for build in every(at(d), *SIZES)):
        try:
            red += not check(build)
        except Exception as error:  # the rest goes on
            red += 1
            print(f"{build.func.__name__}{build.args[1:]}: failed: {type(error).__name__}: {error}"[:400], flush=True)
    print(f"{red} red")
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
