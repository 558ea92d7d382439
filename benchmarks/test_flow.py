"""`ops.flow`: the ODE of a low-rank barrier, beside the ways that step in all d dimensions."""

from __future__ import annotations

from typing import Any

import peers
import pytest
from setting import AT, pick

from steerfast import bench_cases

RANK = pick(64, 64, 17)


@pytest.mark.parametrize("n", pick((1, 64, 8192), (1, 128), (1, 3)))
def test_flow(race: Any, n: int) -> None:
    ways = peers.published_flow(AT)
    race(lambda: bench_cases.flow(AT, n, RANK), peers=peers.flow(steps=10), yardsticks=ways)


@pytest.mark.parametrize("n", pick((64, 8192), (128,), (3,)))
@pytest.mark.parametrize(("method", "steps"), (("euler", 40), ("rk4", 10)))
def test_solver(race: Any, n: int, method: str, steps: int) -> None:
    race(lambda: bench_cases.flow(AT, n, RANK, steps, method))
