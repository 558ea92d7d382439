"""Every op once at odd sizes, checked and not timed: what a memory checker runs.

compute-sanitizer python benchmarks/once.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from lab import cases, sae_cases
from lab.case import Case, NotHere, Stream
from lab.methods import METHODS
from setting import INTERPRETED, PLACE, pick

import steerfast as sf

AT = Stream(pick("cuda", "cpu", "cpu"), pick(torch.bfloat16, torch.float32, torch.float16), pick(1000, 1000, 40))


def every() -> Iterator[Callable[[], Case]]:
    """One case of every op and method."""
    n, features = pick(70, 70, 3), pick(5000, 5000, 300)
    yield partial(cases.add, AT, n)
    yield partial(cases.add_rms_norm, AT, n)
    yield partial(cases.affine, AT, n)
    for method in METHODS:
        yield partial(cases.subspace, AT, n, method, 2)
    for k in (8, 33):
        yield partial(cases.subspace, AT, n, "amplify", k)
    yield partial(cases.subspace, AT, n, "amplify", 8, slots=n)
    for k in (17, AT.d):
        yield partial(cases.flow, AT, n, k, 3)
    yield partial(sae_cases.edit_features, AT, n, features)
    yield partial(sae_cases.sae_encode, AT, n, features, 5)
    yield partial(sae_cases.sae_encode_threshold, AT, n, features, 64)
    yield partial(sae_cases.sae_decode, AT, n, features, 5)


def main() -> int:
    torch.manual_seed(0)
    if PLACE == "cuda" or INTERPRETED:
        sf.use_backend("triton")
    red = 0
    for build in every():
        try:
            case = build()
        except NotHere as reason:
            print(f"not here: {reason}")
            continue
        inputs = (*case.fresh(), *case.fixed)
        judge = case.judge(inputs)
        share = judge(case.ours(*inputs))
        red += not share <= 1
        print(f"{case.name}: error {share:.3g} of what is allowed{'' if share <= 1 else '  RED'}", flush=True)
    print(f"{red} red")
    return int(red > 0)


if __name__ == "__main__":
    sys.exit(main())
