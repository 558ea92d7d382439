"""What changes from one step of a model to the next compiles nothing: keys of compiled kernels are counted, without a GPU."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from steerfast.ops.slots import ALL_MODES, FLOW, HINGE, SOLVE
from steerfast_kernels import add, flow, sae_decode, sae_edit, sae_edit_topk, sae_encode, sae_encode_threshold, subspace

STEPS = [1, 16, 17, 4096]  # decode of one request, of a batch, of an odd batch; a long prompt
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
D, bf16 = 512, torch.bfloat16


def keys_of(launches: list[Callable[[], object]]) -> dict[tuple[Any, ...], set[str]]:
    """(kernel, its constants, its options) -> what Triton would compile it for; nothing runs."""
    found: dict[tuple[Any, ...], set[str]] = defaultdict(set)

    def catch(kernel: JITFunction, *, grid: object, warmup: bool, **arguments: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        bound, specialization, options = bind(**arguments)
        constants = [value for value, one in zip(bound.values(), kernel.params, strict=True) if one.is_constexpr]
        found[kernel.__name__, str(constants), str(sorted(options.items()))].add(str(specialization))

    with mock.patch.object(JITFunction, "run", catch):
        for launch in launches:
            launch()
    return found


def tables(n: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A table of the step's own, a column of a wider one, and one row for every token."""
    rows, scale = torch.zeros(n, 4, dtype=torch.int32), torch.ones(n, 4)
    if kind == "one row":
        return rows[:1, :2].expand(n, -1), scale[:1, :2].expand(n, -1)
    part = slice(0, 2) if kind == "own" else slice(1, 3)
    return (
        (rows[:, part], scale[:, part]) if kind == "part" else (rows[:, part].contiguous(), scale[:, part].contiguous())
    )


def banked(n: int, kind: str, modes: int, rank: int) -> None:
    x, bank = torch.zeros(n, D, dtype=bf16), (torch.zeros(2 * rank, D, dtype=bf16), torch.zeros(99, 8))
    rows, scale = tables(n, kind)
    subspace.subspace(x, *bank, torch.zeros(4, 8, dtype=torch.int32), rows, scale, modes, rank, out=x)


def full_rank(n: int, kind: str) -> None:
    basis, slots = torch.zeros(D, D, dtype=bf16), torch.zeros(1, 8, dtype=torch.int32)
    flow.flow(torch.zeros(n, D, dtype=bf16), basis, torch.zeros(D + 1, 8), slots, *tables(n, kind), solves=True)


def added(n: int, kind: str, vectors: int = 3) -> None:
    x, bank = torch.zeros(n, D, dtype=bf16), torch.zeros(vectors, D, dtype=bf16)
    add.add(x, bank, *tables(n, kind), out=x)
    add.add_rms_norm(x, x, x[0], bank, *tables(n, kind), 1e-6, False, torch.empty_like(x), torch.empty_like(x))


LAUNCHES: dict[str, Callable[[int, str], object]] = {
    "add": added,
    "rows": lambda n, kind: banked(n, kind, HINGE, 8),
    "tiles and split": lambda n, kind: banked(n, kind, HINGE | 256, 64),
    "flows": lambda n, kind: banked(n, kind, FLOW | SOLVE, 16),
    "full rank": full_rank,
}
FEATURES, ACTIVE = torch.zeros(8192, D, dtype=bf16), 32


def encoded(n: int) -> None:
    sae_encode.sae_encode(torch.zeros(n, D, dtype=bf16), FEATURES, FEATURES[:, 0].contiguous(), ACTIVE)


def encoded_above(n: int) -> None:
    x = torch.zeros(n, D, dtype=bf16)
    sae_encode_threshold.sae_encode_threshold(x, FEATURES, None, torch.zeros(8192), 256)


def decoded(n: int) -> None:
    values, indices = torch.zeros(n, ACTIVE), torch.zeros(n, ACTIVE, dtype=torch.int32)
    sae_decode.sae_decode(values, indices, FEATURES, None)
    x, few, numbers = torch.zeros(n, D, dtype=bf16), torch.zeros(8, dtype=torch.int32), torch.zeros(8, 4)
    sae_edit.sae_edit(x, values, indices, few, numbers, FEATURES[:8], torch.zeros(n))


def counted(n: int) -> None:
    x, few, numbers = torch.zeros(n, D, dtype=bf16), torch.zeros(8, dtype=torch.int32), torch.zeros(8, 4)
    sae_edit_topk.sae_edit_topk(x, FEATURES, None, ACTIVE, few, numbers, FEATURES[:8], torch.zeros(n))


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_step_of_any_size_meets_a_kernel_that_is_there(name):
    launch = LAUNCHES[name]
    found = keys_of([lambda n=n, kind=kind: launch(n, kind) for n in STEPS for kind in ("own", "part", "one row")])
    assert found
    for kernel, keys in found.items():
        assert len(keys) == 1, (kernel, keys)


@pytest.mark.parametrize("launch", [encoded, encoded_above, decoded, counted])
def test_an_sae_compiles_nothing_for_a_step_of_another_size(launch):
    found = keys_of([lambda n=n: launch(n) for n in STEPS])
    assert found
    for kernel, keys in found.items():
        assert len(keys) == 1, (kernel, keys)


def test_a_bank_of_any_size_meets_the_same_kernel():
    found = keys_of([lambda s=s: added(16, "own", s) for s in (1, 3, 16)])
    assert {len(keys) for keys in found.values()} == {1}


def test_tables_of_two_to_four_columns_meet_the_same_tiles():
    """A kernel of all modes takes a minute to compile; only one column has its own."""

    def launch(columns: int) -> None:
        x = torch.zeros(1024, 512, dtype=torch.bfloat16)
        bank = torch.zeros(80, 512, dtype=x.dtype), torch.zeros(99, 8), torch.zeros(4, 8, dtype=torch.int32)
        rows = torch.zeros(1024, columns, dtype=torch.int32)
        subspace.subspace(x, *bank, rows, rows.float(), ALL_MODES, 20, out=torch.empty_like(x))

    for columns, count in (((2, 3, 4), 1), ((1, 2), 2)):
        found = keys_of([lambda p=p: launch(p) for p in columns])
        assert {name: len(keys) for (name, *_), keys in found.items()} == {"whole_kernel": count}


@triton.jit
def _careless_kernel(x_ptr, N):
    tl.store(x_ptr + tl.arange(0, 16), 1.0, mask=tl.arange(0, 16) < N)


def test_the_count_sees_a_size_that_is_specialised():
    x = torch.zeros(16)
    found = keys_of([lambda n=n: _careless_kernel[(1,)](x_ptr=x, N=n) for n in STEPS])
    assert [len(keys) for keys in found.values()] == [3]
