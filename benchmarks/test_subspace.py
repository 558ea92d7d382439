"""The methods of `ops.subspace`: project, act, lift."""

from __future__ import annotations

from typing import Any

import pytest
from lab import cases, sae_cases
from lab.case import Stream
from setting import AT, FEATURES, pick

ROWS = pick((64, 8192), (1, 256), (3,))
RANKS = pick((8, 16, 32, 64), (8, 64), (17,))


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("k", RANKS)
@pytest.mark.parametrize("method", ["amplify", "amplify keep_norm"])
def test_rank(race: Any, n: int, k: int, method: str) -> None:
    race(lambda: cases.subspace(AT, n, method, k))


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(
    ("method", "k"),
    [("ablate", 1), ("affine_ablate", 1), ("clamp", 1), ("rotate", 2), ("calibrate", 8), ("loreft", 8), ("push", 8)],
)
def test_method(race: Any, n: int, method: str, k: int) -> None:
    race(lambda: cases.subspace(AT, n, method, k))


@pytest.mark.parametrize("k", [1, 8])
def test_own_slot_for_each_row(race: Any, k: int) -> None:
    n = pick(256, 32, 3)
    race(lambda: cases.subspace(AT, n, "amplify", k, slots=n))


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("name", "k"), [("ablate", 1), ("amplify", 8), ("calibrate", 8)])
def test_op(race: Any, n: int, name: str, k: int) -> None:
    """The functions on tensors, which need no bank."""
    race(lambda: cases.op(AT, n, name, k))


def test_wide_amplify(race: Any) -> None:
    """At the width of a large model, with the memory that the call takes beside that of its output."""
    n, at = pick(4096, 256, 3), Stream(AT.device, AT.dtype, pick(4096, 4096, 40))
    output = n * at.d * at.dtype.itemsize
    case = lambda: cases.op(at, n, "amplify", pick(64, 64, 2))  # noqa: E731
    race(case, memory=("ours", "eager"), sizes={"output": output})


@pytest.mark.parametrize("n", ROWS)
def test_affine(race: Any, n: int) -> None:
    race(lambda: cases.affine(AT, n))


def test_edit_features(race: Any) -> None:
    race(lambda: sae_cases.edit_features(AT, pick(16, 256, 2), FEATURES))
