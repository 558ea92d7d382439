"""What the static model counts never gets worse: against tests/data/static.json, per version of Triton, in one direction.

Counts alone are held, no time is. A change that makes one worse on purpose writes the table anew
(`python -m benchmarks.static --targets sm_90 --hold`) and says why.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing; the counts start one of their own", allow_module_level=True)

import triton

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

from results import read
from static import constants, machine
from static.__main__ import OTHERS, misses
from static.cases import HELD as NAMES
from static.cases import QUICK
from static.model import Row, count_all, rows, time_of
from static.published import PUBLISHED

pytestmark = pytest.mark.aot

HELD = json.loads((Path(__file__).parent / "data/static.json").read_text(encoding="utf-8"))
AT_LEAST = ("programs_per_sm", "in_flight", "access")
AT_MOST = (
    "launches", "torch_kernels", "allocations", "stack", "cycles_per_token", "l2_bytes_per_token", "memory_bytes_per_token",
)  # fmt: skip


def worse(found: dict[str, float], held: dict[str, float]) -> list[str]:
    """The counts that moved the wrong way."""
    return [
        f"{name}: {found[name]}, held {'>=' if name in AT_LEAST else '<='} {held[name]}"
        for name in (*AT_LEAST, *AT_MOST)
        if (found[name] < held[name] if name in AT_LEAST else found[name] > held[name])
    ]


def counted(names: tuple[str, ...]) -> dict[str, Row]:
    return {name: rows(name, launches, ["sm_90"])[0] for name, launches in count_all(names).items()}


@pytest.fixture(scope="module")
def quick() -> dict[str, Row]:
    return counted(QUICK)


@pytest.mark.parametrize("name", QUICK)
def test_counts_do_not_get_worse(name: str, quick: dict[str, Row]) -> None:
    check(name, quick[name])


@pytest.mark.slow
def test_no_count_of_any_case_gets_worse() -> None:
    for name, row in counted(NAMES).items():
        check(name, row)


def check(name: str, row: Row) -> None:
    if triton.__version__ not in HELD:
        pytest.skip(f"no counts are held for triton {triton.__version__}; held are {', '.join(HELD)}")
    found, held = row.counts(), HELD[triton.__version__][name]
    assert set(found) == {*AT_LEAST, *AT_MOST}
    assert not worse(found, held), name


def test_the_table_holds_every_case_and_a_worse_count_is_seen() -> None:
    for version, cases in HELD.items():
        assert set(cases) == set(NAMES), version
    held = HELD[max(HELD)]["hinge k=64"]
    assert worse(held, held) == []
    for name in AT_MOST:
        assert worse({**held, name: held[name] + 1}, held) == [f"{name}: {held[name] + 1}, held <= {held[name]}"]
    for name in AT_LEAST:
        assert worse({**held, name: held[name] - 1}, held) == [f"{name}: {held[name] - 1}, held >= {held[name]}"]


def test_an_add_moves_what_its_formula_says(quick: dict[str, Row]) -> None:
    """x once from memory and once to it, eight vectors, eight bytes of table: counted, beside the arithmetic by hand."""
    row = quick["add"]
    d, n = 4096, 8192
    assert row.counts()["memory_bytes_per_token"] == pytest.approx((2 * n * d * 2 + 8 * d * 2) / n + 8, abs=0.1)
    assert row.counts()["l2_bytes_per_token"] == 3 * 2 * d + 4 * 2 * constants.SECTOR  # four programs a token
    assert row.counts()["access"] == 16


def test_a_product_is_counted_whole(quick: dict[str, Row]) -> None:
    """Rank 64 on tensor cores: xBᵀ once and C·g three times, so that the loops turn as often as they must.

    g enters in two parts, and the first of these two products is done by both warp groups: Triton gives it a layout of its own.
    """
    products = [
        kernel.walk.product * kernel.programs for kernel in quick["hinge k=64"].kernels if kernel.walk is not None
    ]
    assert [product / (2 * 8192 * 4096 * 64) for product in products] == [4]


def test_what_is_read_again_is_near_or_far_by_what_came_between() -> None:
    """Three columns of a row read, then read backwards and written; directions that all programs share are no distance."""
    from static.counted import Program, _reuse

    program, x, out, shared = Program(), ("x", "read"), ("out", "write"), ("b", "read")
    columns = [np.arange(8 * i, 8 * i + 8) for i in range(3)]  # 256 bytes each
    for column in columns:
        program.touched += [(x, column), (shared, 900 + column)]
    for column in reversed(columns):
        program.touched += [(shared, 900 + column), (x, column), (out, 500 + column)]
    assert _reuse(program, {shared}) == {x: [(0, 256), (512, 256), (1024, 256)]}
    program.touched = [(x, column) for column in 2 * columns]
    assert _reuse(program, {shared}) == {x: [(512, 768)]}


def test_a_prediction_is_a_range_around_no_point(quick: dict[str, Row]) -> None:
    for row in quick.values():
        assert row.predicted is not None
        assert row.floor / 1.1 < row.predicted.short < row.predicted.long
        assert sum(time_of(kernel).short for kernel in row.kernels) < row.predicted.short


def test_how_far_the_model_misses_is_what_is_stated() -> None:
    """Predictions of kernels that others have timed, beside the committed table: misses included, the worst of them named.

    One of them; `python -m benchmarks.static --published` counts all, with inputs of up to 16 GB.
    """
    names = ("softmax short",)
    stated = json.loads(OTHERS.read_text(encoding="utf-8"))
    assert {row["case"] for row in stated["rows"]} == set(PUBLISHED)
    assert max(row["miss"] for row in stated["rows"]) == 1.28
    if triton.__version__ != stated["triton"]:
        pytest.skip(f"the table is of triton {stated['triton']}")
    assert misses(names) == [row for row in stated["rows"] if row["case"] in names]


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "programs"),
    [
        ("sm_90", 32, 0, 4, 16),  # 64 warps
        ("sm_90", 44, 0, 4, 10),  # 65536 registers in steps of 8
        ("sm_90", 24, 73728, 4, 3),  # 228 kB of shared memory, one of them for the system
        ("sm_120", 24, 0, 1, 24),  # programs
        ("gfx942", 257, 0, 4, 1),  # 512 registers a lane, one wave in each of four SIMDs
        ("gfx942", 64, 16384, 4, 4),  # LDS
    ],
)
def test_programs_per_sm(target: str, registers: int, shared: int, warps: int, programs: int) -> None:
    assert machine.programs_per_sm(target, registers, shared, warps) == programs


def test_predictions_are_no_rows_of_results(tmp_path: Path, quick: dict[str, Row]) -> None:
    """What `make bars` reads: a file of predictions beside the measured rows adds none, so no bar can be met by one."""
    from static.model import as_json

    (tmp_path / "static.json").write_text(json.dumps({"rows": [as_json(row) for row in quick.values()]}))
    assert read([tmp_path]) == []
