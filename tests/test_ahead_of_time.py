"""Every default kernel variant compiles for every target, without a spill, within its budget, with the instructions it needs.

With the newest Triton all targets, with an older one sm_90 alone: 61 compilations at most. No GPU is needed.
"""

from __future__ import annotations

import os
import re

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from variants import TARGETS, VARIANTS, Variant, compile_for

from steerfast_kernels._device import LIMITS

pytestmark = pytest.mark.aot

NEWEST = (3, 9)
ALL_TARGETS = tuple(map(int, triton.__version__.split(".")[:2])) >= NEWEST
CASES = [
    pytest.param(variant, target, id=f"{variant.name}-{target}")
    for variant in VARIANTS
    for target in variant.targets
    if target == "sm_90" or ALL_TARGETS
]
WIDE_LOAD = r"ld\.global[\w.:]*\.v4\.b32|cp\.async\.c[ag]\.shared\.global[^;]*0x10|\w+_load_dwordx4"
TENSOR_CORE = {
    "sm_80": r"mma\.sync\.aligned",
    "sm_90": r"wgmma\.mma_async|mma\.sync\.aligned",
    "sm_100": r"tcgen05\.mma|mma\.sync\.aligned",
    "gfx942": r"v_mfma_f32",
}


@pytest.fixture(autouse=True)
def _floating_point_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.10 turns its default round; a budget should not move with it."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.mark.parametrize(("variant", "target"), CASES)
def test_variant(variant: Variant, target: str) -> None:
    report = compile_for(variant, target)
    limits = LIMITS[target]
    assert report.stack <= (variant.stack if target.startswith("sm_") else 0), (
        f"{report.stack} bytes of local memory, {report.registers} registers"
    )
    assert report.spills == 0, f"{report.spills} registers spilled, {report.registers} in use"
    assert report.scalar_spills <= 40, f"{report.scalar_spills} scalar registers moved to vector registers"
    assert report.registers <= limits.registers
    assert report.shared <= limits.shared
    if target.startswith("sm_"):
        assert report.registers <= variant.registers
        assert report.shared <= variant.shared
    assert not re.search(r"\.tf32\b", report.text), "a float32 product became tf32, which errs by 3e-4"
    if variant.vector_loads:
        assert re.search(WIDE_LOAD, report.text), "no load of 16 bytes"
    if variant.tensor_cores:
        assert re.search(TENSOR_CORE[target], report.text), "the product does not run on tensor cores"


def test_products_of_many_rows_use_the_matrix_unit_of_hopper() -> None:
    for variant in VARIANTS:
        if variant.wgmma:
            assert "wgmma.mma_async" in compile_for(variant, "sm_90").text, variant.name


def test_the_check_for_tf32_sees_one() -> None:
    """The trap is real: without input_precision a float32 product does become tf32."""
    import variants

    assert re.search(r"\.tf32\b", variants.compile_careless_product("sm_90"))


def test_there_are_at_most_sixty_one_compilations() -> None:
    assert len(CASES) <= 60  # and the careless product
    assert {target for variant in VARIANTS for target in variant.targets} == set(TARGETS)
