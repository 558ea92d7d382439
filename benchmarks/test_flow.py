"""`ops.flow`: the ODE of a low-rank barrier, beside the ways that step in all d dimensions."""

from __future__ import annotations

import resource
import time
from typing import Any

import peers
import pytest
import torch
from setting import AT, PLACE, pick

import steerfast as sf
from steerfast import bench_cases

RANK = pick(64, 64, 17)


@pytest.mark.parametrize("n", pick((1, 64, 8192), (1, 128), (3,)))
def test_flow(race: Any, n: int) -> None:
    ways = peers.published_flow(AT)
    race(lambda: bench_cases.flow(AT, n, RANK), peers=peers.flow(steps=10), yardsticks=ways)


@pytest.mark.parametrize("n", pick((64, 8192), (128,), (3,)))
@pytest.mark.parametrize(("method", "steps"), [("euler", 40), ("rk4", 10)])
def test_solver(race: Any, n: int, method: str, steps: int) -> None:
    race(lambda: bench_cases.flow(AT, n, RANK, steps, method))


def test_full_rank(race: Any) -> None:
    """A barrier that no small basis holds: two products around the steps."""
    race(lambda: bench_cases.flow(AT, pick(8192, 128, 3), AT.d))


@pytest.mark.slow
@pytest.mark.skipif(PLACE != "cpu", reason="barriers are fitted on a CPU")
def test_fit(sample: Any, ledger: Any) -> None:
    """A quadratic barrier from 20 000 activations of width 4096; a quick run takes a tenth of them."""
    count, d = (20_000 if ledger.thorough else 2_000), 4096
    shift = torch.randn(d) / d**0.5
    pos, neg = torch.randn(count // 2, d) + shift, torch.randn(count // 2, d) - shift
    memory: list[float] = []

    def once() -> dict[str, float]:
        begin, before = time.process_time(), peak_bytes()
        sf.fit_barrier(pos, neg, kind="quadratic")
        memory.append((peak_bytes() - before) / 1e9)
        return {"ours": time.process_time() - begin}

    sample(f"fit_barrier {count}x{d}", once, rounds=1, values=lambda: {"memory_gb": max(memory)})


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
