"""The methods of `ops.subspace`: project, act, lift."""

from __future__ import annotations

from typing import Any

import pytest
from setting import AT, FEATURES, pick

from steerfast import bench_cases
from steerfast.bench_cases import Stream

FEW, MANY = pick(64, 1, 1), pick(8192, 256, 3)
RANKS = pick((8, 16, 32, 64), (8, 64), (2, 17))


@pytest.mark.parametrize("n", (FEW, MANY))
@pytest.mark.parametrize("k", RANKS)
@pytest.mark.parametrize("method", ("amplify", "amplify keep_norm"))
def test_rank(race: Any, n: int, k: int, method: str) -> None:
    race(lambda: bench_cases.subspace(AT, n, method, k))


@pytest.mark.parametrize("n", (FEW, MANY))
@pytest.mark.parametrize(
    ("method", "k"),
    (("ablate", 1), ("affine_ablate", 1), ("clamp", 1), ("rotate", 2), ("calibrate", 8), ("loreft", 8), ("push", 8)),
)
def test_method(race: Any, n: int, method: str, k: int) -> None:
    race(lambda: bench_cases.subspace(AT, n, method, k))


@pytest.mark.parametrize("k", (1, 8))
def test_own_slot_for_each_row(race: Any, k: int) -> None:
    n = pick(256, 32, 3)
    race(lambda: bench_cases.subspace(AT, n, "amplify", k, slots=n))


def test_memory_of_amplify(race: Any) -> None:
    """Steady memory against x and the output: what the call takes beyond x, plus x, over twice x."""
    at = Stream(AT.device, AT.dtype, pick(4096, 4096, 40))
    n = pick(8192, 256, 3)
    row = race(lambda: bench_cases.subspace(at, n, "amplify", pick(64, 64, 2)), memory=("ours", "eager"))
    assert row["memory"].get("ours", 1) > 0


def test_edit_features(race: Any) -> None:
    race(lambda: bench_cases.edit_features(AT, pick(16, 1, 2), FEATURES), memory=("ours", "whole SAE twice"))
