"""The CPU backend beside what a user would write by hand, at few rows and many, narrow and wide, in float32 and bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lab import cpu_cases
from lab.case import SHORT, Stream
from setting import PLACE, TINY

pytestmark = pytest.mark.skipif(PLACE == "cuda", reason="the CPU backend is measured where no GPU is")

ROWS = (3,) if TINY else (1, 16, 256, 4096)
WIDTHS = (40,) if TINY else (576, 4096)
DTYPES = (torch.float32,) if TINY else (torch.float32, torch.bfloat16)
OWNERS = 3 if TINY else 32
every_stream = pytest.mark.parametrize(
    "at", [Stream("cpu", dtype, d) for d in WIDTHS for dtype in DTYPES], ids=lambda at: f"{at.d}-{SHORT[at.dtype]}"
)
every_road = pytest.mark.parametrize("road", cpu_cases.ROADS)
every_count = pytest.mark.parametrize("n", ROWS)


@every_stream
@every_count
@pytest.mark.parametrize("name", ["add", "affine"])
def test_elementwise(race: Any, name: str, n: int, at: Stream) -> None:
    race(lambda: getattr(cpu_cases, name)(at, n))


@every_stream
@every_count
@every_road
def test_add_with_rows(race: Any, road: str, n: int, at: Stream) -> None:
    race(lambda: cpu_cases.on(road, cpu_cases.add_with_rows(at, n)))


@every_stream
@every_count
@every_road
@pytest.mark.parametrize("name", ["ablate", "amplify", "calibrate"])
def test_op(race: Any, name: str, road: str, n: int, at: Stream) -> None:
    race(lambda: cpu_cases.on(road, cpu_cases.op(at, n, name)))


@every_stream
@every_count
@every_road
def test_op_in_place(race: Any, road: str, n: int, at: Stream) -> None:
    race(lambda: cpu_cases.on(road, cpu_cases.op_in_place(at, n)))


@every_stream
@every_road
@pytest.mark.parametrize("n", (3,) if TINY else (1, 256))
@pytest.mark.parametrize("method", cpu_cases.MODES)
def test_bank(race: Any, method: str, n: int, road: str, at: Stream) -> None:
    race(lambda: cpu_cases.on(road, cpu_cases.bank(at, n, method, cpu_cases.MODES[method])))


@every_stream
@every_road
@pytest.mark.parametrize("k", [1, 8])
def test_owners(race: Any, k: int, road: str, at: Stream) -> None:
    race(lambda: cpu_cases.on(road, cpu_cases.owners(at, OWNERS, k)))


@every_stream
@pytest.mark.parametrize("n", (3,) if TINY else (1, 64, 256))
@pytest.mark.parametrize("features", (300,) if TINY else (8192, 65536))
def test_sae_encode(race: Any, features: int, n: int, at: Stream) -> None:
    if features * at.d > 1 << 26:
        pytest.skip("a dictionary of 2 GB")
    race(lambda: cpu_cases.sae_encode(at, n, features, 5 if TINY else 32))
