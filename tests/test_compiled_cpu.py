"""The compiled road of the CPU backend: exact to the bit where bits are promised, safe with threads and forks, never required."""

from __future__ import annotations

import contextlib
import functools
import gc
import linecache
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from places import needs_numba, only_calls
from torch import Tensor

import steerfast as sf
from steerfast import ops
from steerfast.ops import compiled_cpu, slots, torch_backend

D = 71  # no multiple of anything that a kernel takes together


@pytest.fixture
def compiled() -> None:
    if compiled_cpu.kernels() is None:
        pytest.fail("numba is installed and did not compile")


def features(rank: int, d: int = D) -> Tensor:
    return torch.randn(rank, d) / d**0.5


METHODS = {
    "add": lambda: sf.Add(torch.randn(D), -2.0),
    "add, length kept": lambda: sf.Add(torch.randn(D), 3.0, keep_norm=True),
    "ablate": lambda: sf.Ablate(torch.randn(D)),
    "clamp": lambda: sf.Clamp(torch.randn(D), low=-0.1, high=0.2),
    "five": lambda: sf.Amplify(features(5), 0.5, keep_norm=True),
    "eight": lambda: sf.Calibrate(features(8), 2.0),
    "eleven": lambda: sf.Amplify(features(11), -1.0),
    "sixty-four": lambda: sf.Amplify(features(64), 0.5),
    "rotate": lambda: sf.Rotate(torch.linalg.qr(torch.randn(D, 2))[0].T.contiguous(), degrees=36.0),
    "rotate some": lambda: sf.Rotate(torch.linalg.qr(torch.randn(D, 2))[0].T.contiguous(), degrees=36.0, adaptive=True),
    "push": lambda: sf.DeficitPush(features(6), target=0.5, bias=torch.randn(6) / 4),
    "loreft": lambda: sf.LoReFT(torch.linalg.qr(torch.randn(D, 3))[0].T.contiguous(), features(3), torch.ones(3)),
}


def bank_of(dtype: torch.dtype, methods: dict = METHODS, d: int = D) -> sf.Bank:
    bank = sf.Bank(d, slots=len(methods) + 1, directions=400, dtype=dtype)
    for make in methods.values():
        bank.register(make())
    return bank


@needs_numba
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16])
def test_every_method_in_one_batch(dtype: torch.dtype, wide: torch.dtype) -> None:
    """Owners in any order, rows of nobody and of an empty slot, strengths, and directions of the other dtype."""
    bank, rows = bank_of(wide), torch.randint(-1, len(METHODS) + 1, (131,)).int()
    one = torch.zeros(1, dtype=torch.int32)
    for n, owners in ((131, rows), (131, rows[:, None]), (1, rows[:1]), (131, one.expand(131)), (131, None)):
        x = torch.randn(n, D).to(dtype)
        for scale in (None, torch.rand(n) - 0.2):
            scales = scale if scale is None or owners is None or owners.dim() == 1 else scale[:, None]
            got = compiled_cpu.subspace(x, *bank.tensors, owners, scales, False)
            assert got is not None
            true = torch_backend.subspace(
                x.double(), *(t.double() for t in bank.tensors[:2]), bank.tensors[2], owners, scales
            )
            unit = torch.finfo(dtype).eps * true.abs().max()
            assert (got.double() - true).abs().max() <= (2 if dtype == torch.float32 else 0.51) * unit
            if owners is not None:
                still = (owners.flatten() < 0) | (owners.flatten() == len(METHODS))
                assert torch.equal(got[still], x[still])
            twin = x.clone()
            assert compiled_cpu.subspace(twin, *bank.tensors, owners, scales, True) is twin
            assert torch.equal(twin, got)


@needs_numba
@pytest.mark.usefixtures("compiled")
def test_a_library_takes_many_rows_of_one_slot_of_many_directions() -> None:
    """Its products are faster then; the compiled kernel says so before it has written anything."""
    for rank, n, owners, serves in (
        (16, 200, None, True), (17, 63, None, True), (17, 64, None, False), (64, 200, [1] * 200, False),
        (64, 200, [1, 0] * 100, True), (64, 200, [1] * 199 + [-1], True), (64, 200, [-1] + [1] * 199, True),
        (64, 200, [-1] * 200, True),
    ):  # fmt: skip
        bank = sf.Bank(D, slots=2, directions=2 * rank)
        for sign in (1.0, -0.5):
            bank.register(sf.Amplify(features(rank), sign))
        x, rows = torch.randn(n, D), None if owners is None else torch.tensor(owners, dtype=torch.int32)
        kept = x.clone()
        got = compiled_cpu.subspace(x, *bank.tensors, rows, None, True)
        assert (got is not None) == serves
        assert serves or torch.equal(x, kept)
        true = torch_backend.subspace(
            kept.double(), *(t.double() for t in bank.tensors[:2]), bank.tensors[2], rows, None
        )
        torch.testing.assert_close(ops.subspace(kept, *bank.tensors, rows).double(), true, atol=1e-5, rtol=1e-5)


@needs_numba
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    """The same bits alone, in a batch, in another order and by several threads."""
    bank, n = bank_of(dtype), 1000
    x, rows = torch.randn(n, D).to(dtype), torch.randint(-1, len(METHODS) + 1, (n,)).int()
    whole = ops.subspace(x, *bank.tensors, rows)
    order = torch.randperm(n)
    assert torch.equal(ops.subspace(x[order], *bank.tensors, rows[order]), whole[order])
    for i in range(0, n, 97):
        assert torch.equal(ops.subspace(x[i : i + 1], *bank.tensors, rows[i : i + 1])[0], whole[i])
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_cpu, "ALONE", 0)
        torch.set_num_threads(3)
        try:
            for _ in range(20):
                assert torch.equal(ops.subspace(x, *bank.tensors, rows), whole)
                assert torch.equal(ops.subspace_(x.clone(), *bank.tensors, rows), whole)
        finally:
            torch.set_num_threads(threads)


@needs_numba
@pytest.mark.usefixtures("compiled")
def test_rounding_of_bfloat16() -> None:
    """Ties to even, infinities, the largest and the smallest numbers: as PyTorch rounds."""
    bits = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).int()
    edges = torch.tensor(
        [0, 1, 0x7FFF, 0x8000, 0x8001, 0x17FFF, 0x18000, 0x7F7FFFFF, 0x7F7F8000, 0x7F800000, 0x7FC00000]
    ).int()
    sums = torch.cat([bits, edges, edges + -(2**31)]).view(torch.float32)
    bank = sf.Bank(sums.shape[0], slots=1, directions=1)  # float32
    bank.register(sf.Add(torch.ones(sums.shape[0])))
    bank.vectors[0] = sums
    got = compiled_cpu.subspace(torch.zeros(1, sums.shape[0], dtype=torch.bfloat16), *bank.tensors, None, None, False)
    wanted = (sums + 0.0).bfloat16()
    assert got is not None
    assert torch.equal(got[0].isnan(), wanted.isnan())
    assert torch.equal(got[0][~wanted.isnan()], wanted[~wanted.isnan()])


@needs_numba
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_infinities_and_nan_stay_alone(dtype: torch.dtype) -> None:
    bank, x = bank_of(dtype), torch.randn(5 * (len(METHODS) + 1), D).to(dtype)
    rows = (torch.arange(x.shape[0]) // 5).int()
    clean = ops.subspace(x, *bank.tensors, rows)
    x[1::5], x[3::5, 7] = math.nan, math.inf
    got, wanted = ops.subspace(x, *bank.tensors, rows), torch_backend.subspace(x, *bank.tensors, rows)
    for rest in (0, 2, 4):
        assert torch.equal(got[rest::5], clean[rest::5])
    assert got[1:-5:5].isnan().all()
    assert torch.equal(got.isfinite()[1::5], wanted.isfinite()[1::5])
    assert not got[3:-5:5].isfinite().all(1).any()


@needs_numba
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype) -> None:
    """Rows apart, three dimensions, one column of a table, a bank of every second row, numbers apart: and nothing beside them."""
    bank = bank_of(dtype)
    rows, scale = torch.randint(-1, 12, (12, 2)).int(), torch.rand(12, 2)
    wide = torch.randn(12, 2 * D).to(dtype)
    forms = (
        lambda w: w[:, :D],
        lambda w: w.view(-1)[: 12 * D].view(3, 4, D),
        lambda w: w[:, ::2],
        lambda w: w.T[:D].T,
        lambda w: w[:, 1 : D + 1].view(3, 4, D),
    )
    for form in forms:
        x = form(wide)
        edit = lambda x: ops.subspace(x, *bank.tensors, rows[:, 0], scale[:, 1])  # noqa: E731
        add = lambda x: ops.add(x, bank.vectors[::2], rows[:, 1], scale[:, 0])  # noqa: E731
        with only_calls():
            wanted = edit(x), add(x)
        got = edit(x), add(x)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other)
        kept = wide.clone()
        ops.subspace_(form(kept), *bank.tensors, rows[:, 0], scale[:, 1])
        assert torch.equal(form(kept), got[0])
        form(kept).copy_(x)
        assert torch.equal(kept, wide)  # nothing beside these rows was written


@needs_numba
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_are_one_in_memory(dtype: torch.dtype) -> None:
    """Each after its own slot, whatever stands beside it."""
    bank, rows, scale = bank_of(dtype), torch.randint(-1, len(METHODS) + 1, (61,)).int(), torch.rand(61)
    x = torch.randn(1, D).to(dtype).expand(61, D)
    assert torch.equal(ops.subspace(x, *bank.tensors, rows, scale), ops.subspace(x.clone(), *bank.tensors, rows, scale))
    assert torch.equal(ops.add(x, bank.vectors, rows, scale), ops.add(x.clone(), bank.vectors, rows, scale))
    for b in (features(1), features(3), features(8)):
        assert torch.equal(ops.amplify(x, b), ops.amplify(x.clone(), b))


@needs_numba
@pytest.mark.usefixtures("compiled")
def test_what_it_does_not_serve_it_leaves_alone() -> None:
    """Other modes, many directions, other dtypes, owners outside the bank: nothing is written."""
    bank = sf.Bank(D, slots=3, directions=300)
    bank.register(sf.Amplify(features(3)))
    bank.register(sf.Amplify(features(65)))
    bank.register(sf.Affine(torch.randn(D), torch.randn(D)))
    x = torch.randn(4, D)
    for owners in ([0, 0, 1, 0], [0, 2, 0, 0], [0, 0, 0, 3], [-2, 0, 0, 0]):
        twin = x.clone()
        assert compiled_cpu.subspace(twin, *bank.tensors, torch.tensor(owners).int(), None, True) is None
        assert torch.equal(twin, x)
    rows = torch.zeros(4, dtype=torch.int32)
    assert compiled_cpu.subspace(x.half(), *bank.tensors, rows, None, False) is None
    assert compiled_cpu.subspace(x, *bank.tensors, rows.long(), None, False) is None
    vectors, coefficients, headers = bank.tensors
    for dtype in (torch.float64, torch.bfloat16):
        assert compiled_cpu.subspace(x, vectors, coefficients.to(dtype), headers, rows, None, False) is None
    assert compiled_cpu.subspace(x, *bank.tensors, rows, torch.ones(4).double(), False) is None
    assert compiled_cpu.add(x, bank.vectors.bfloat16(), rows, None, False) is None
    assert compiled_cpu.add(x, bank.vectors, rows + 300, None, True) is None
    assert compiled_cpu.hinged(x, features(65), 65, lambda share, _: slots.hinge(slope=-share), 1.0, False) is None


@needs_numba
@pytest.mark.usefixtures("compiled")
def test_gradients_transforms_and_modes_keep_their_road() -> None:
    """A tensor that is more than its numbers never reaches a kernel."""
    x, b = torch.randn(4, D), features(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_cpu, "kernels", lambda: pytest.fail("a kernel was asked for"))
        leaf = x.clone().requires_grad_()
        ops.amplify(leaf, b).sum().backward()
        torch.func.vmap(lambda row: ops.amplify(row[None], b)[0])(x)
        torch.func.grad(lambda x: ops.amplify(x, b).sum())(x)
        torch.compile(lambda x: ops.amplify(x, b), backend="eager", fullgraph=True)(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of tracing, and of the checks of shapes, which a trace takes as they are
            traced = torch.jit.trace(lambda x: ops.amplify(x, b), x, check_trace=False)
    assert leaf.grad is not None
    torch.testing.assert_close(traced(2 * x), ops.amplify(2 * x, b))


@needs_numba
@pytest.mark.usefixtures("compiled")
def test_numbers_that_a_view_negates() -> None:
    bank, x = bank_of(torch.float32), torch.randn(4, D)
    scale = torch.randn(4, dtype=torch.complex64).conj().imag
    assert scale.is_neg()
    got = ops.subspace(x, *bank.tensors, None, scale)
    torch.testing.assert_close(got, ops.subspace(x, *bank.tensors, None, scale.resolve_neg()))
    for b in (features(1), features(3)):
        torch.testing.assert_close(ops.amplify(torch._neg_view(x), b), ops.amplify(-x, b))
        torch.testing.assert_close(ops.amplify(x, torch._neg_view(b)), ops.amplify(x, -b))


@needs_numba
@pytest.mark.usefixtures("compiled")
def test_a_tensor_without_memory() -> None:
    assert torch.equal(ops.ablate(torch._efficientzerotensor(4, D), torch.ones(D)), torch.zeros(4, D))


@needs_numba
def test_owners_that_another_thread_writes_meanwhile() -> None:
    """Numbers beyond the bank are not followed, whenever they appear."""
    run("""
        import threading, time, torch, steerfast as sf
        bank, x, rows = sf.Bank(8, slots=3, directions=3), torch.randn(2000, 8), torch.zeros(2000, dtype=torch.int32)
        for _ in range(3):
            bank.register(sf.Add(torch.randn(8)))
        far, ends = torch.full_like(rows, 2**31 - 1), time.monotonic() + 1

        def write():
            while time.monotonic() < ends:
                rows.copy_(far)
                rows.zero_()

        writer = threading.Thread(target=write)
        writer.start()
        while writer.is_alive():
            try:
                sf.ops.subspace(x, *bank.tensors, rows)
                sf.ops.add(x, bank.vectors, rows)
            except IndexError:  # of PyTorch's own calls, which take over where an owner is beyond the bank
                pass
    """)


PARTS = 8
"""Of `together` below."""


def together(kernel: Callable[[int, int], int], owner: object = None) -> int:
    """A kernel on the rows of eight parts, by two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        return compiled_cpu._together(kernel, (), PARTS * compiled_cpu.BLOCK, owner)
    finally:
        torch.set_num_threads(threads)


class Held:
    """What a test asks whether it still lives."""


def test_memory_lives_while_a_thread_writes_there() -> None:
    """One thread is interrupted while the other is at work: what that one writes to stays until it is done."""
    begun, interrupted, done = threading.Event(), threading.Event(), threading.Event()
    caller, owner = threading.current_thread(), Held()
    lives = weakref.ref(owner)
    alive = []

    def kernel(begin: int, end: int) -> int:
        if threading.current_thread() is caller:
            assert begun.wait(10)
            raise KeyboardInterrupt
        begun.set()
        assert interrupted.wait(10)
        gc.collect()
        alive.append(lives() is not None)
        done.set()
        return 0

    with contextlib.suppress(KeyboardInterrupt):
        together(kernel, owner)
    del owner
    interrupted.set()
    assert done.wait(10)
    assert alive == [True]


def test_where_no_more_threads_can_be_started_those_that_run_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, parts = threading.Event(), []
    caller = threading.current_thread()

    def kernel(begin: int, end: int) -> int:
        if threading.current_thread() is caller:
            assert begun.wait(10)
        else:
            begun.set()
            time.sleep(0.1)
        parts.append(begin)
        return 0

    class Full(ThreadPoolExecutor):
        def submit(self, *task: Any) -> Any:
            super().submit(*task)  # as the standard one does, which has queued a task before it asks for its thread
            raise RuntimeError("can't start new thread")

    pool = functools.lru_cache(Full)
    monkeypatch.setattr(compiled_cpu, "_pool", pool)
    assert together(kernel) == 0
    assert len(parts) == PARTS
    assert pool.cache_info().currsize == 0  # a queue that no thread serves holds no memory


def test_what_another_thread_meets_is_raised() -> None:
    begun, caller = threading.Event(), threading.current_thread()

    def kernel(begin: int, end: int) -> int:
        if threading.current_thread() is caller:
            assert begun.wait(10)
            return 0
        begun.set()
        raise MemoryError

    with pytest.raises(MemoryError):
        together(kernel)


@needs_numba
@pytest.mark.usefixtures("compiled")
def test_many_threads_of_python_at_once() -> None:
    """Each with rows enough that all of them ask the same helpers."""
    bank, rows = bank_of(torch.float32), torch.randint(-1, 12, (300,)).int()
    streams = [torch.randn(300, D) for _ in range(8)]
    wanted = [ops.subspace(x, *bank.tensors, rows) for x in streams]
    threads = torch.get_num_threads()

    def work(i: int) -> bool:
        torch.set_num_threads(2)
        return all(torch.equal(ops.subspace(streams[i], *bank.tensors, rows), wanted[i]) for _ in range(30))

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(8) as pool:
        patch.setattr(compiled_cpu, "ALONE", 0)
        assert all(pool.map(work, range(8)))
    torch.set_num_threads(threads)


def _in_child(results: multiprocessing.Queue, x: Tensor, bank: tuple, rows: Tensor) -> None:
    torch.set_num_threads(2)
    results.put(ops.subspace(x, *bank, rows).double().sum().item())


@needs_numba
@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_that_has_used_its_threads() -> None:
    """Helpers do not follow into a fork: the child wakes its own."""
    bank, rows, x = bank_of(torch.float32), torch.randint(-1, 12, (300,)).int(), torch.randn(300, D)
    threads, context = torch.get_num_threads(), multiprocessing.get_context("fork")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_cpu, "ALONE", 0)
        torch.set_num_threads(2)
        wanted = ops.subspace(x, *bank.tensors, rows).double().sum().item()
        assert compiled_cpu._pool.cache_info().currsize == 1
        torch.set_num_threads(threads)
        results = context.Queue()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads, which this test is about
            child = context.Process(target=_in_child, args=(results, x, bank.tensors, rows))
            child.start()
        child.join(60)
        assert child.exitcode == 0
        assert results.get(timeout=5) == wanted


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needs_numba
def test_warmup_compiles() -> None:
    """Nothing is compiled by an import, nor by what needs no kernel."""
    printed = run("""
        import sys, torch, steerfast as sf
        from transformers import LlamaConfig, LlamaForCausalLM
        model = LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, vocab_size=8))
        sf.ops.add(torch.zeros(2, 3), torch.ones(3))
        before = "steerfast.ops.numba_cpu" in sys.modules
        sf.warmup(model, {0: sf.Add(torch.ones(16))})
        print(before, "steerfast.ops.numba_cpu" in sys.modules)
    """)
    assert printed == "False True"


EDIT = """
    import warnings
    warnings.simplefilter("error")
    import torch, steerfast as sf
    from steerfast.ops import compiled_cpu
    got = sf.ops.ablate(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]))
    print(got.tolist(), compiled_cpu.kernels() is not None)
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of compiled code, made by a first edit."""
    folder = tmp_path_factory.mktemp("compiled")
    assert run(EDIT, NUMBA_CACHE_DIR=str(folder)) == "[[0.0, 4.0]] True"
    return folder


@needs_numba
def test_compiled_code_is_kept_in_a_folder_and_read_again(filled: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in filled.rglob("*.nbc")}
    assert kept
    assert run(EDIT, NUMBA_CACHE_DIR=str(filled)) == "[[0.0, 4.0]] True"
    assert {path: path.stat().st_mtime_ns for path in filled.rglob("*.nbc")} == kept


@needs_numba
def test_what_differs_is_kept_in_files_of_other_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another processor, another number of another module, another text of its own or of a module beside it."""
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path))
    numba_cache = pytest.importorskip("steerfast.ops.numba_cache")

    def name(constant: float = 1.0) -> str:
        def function() -> None:
            """Compiled in no time."""

        return numba_cache.compiled(["void()"], (constant,), (str(beside),))(function).py_func.__qualname__

    beside = tmp_path / "beside.py"
    beside.write_text("first\n")
    names = [name(), name(), name(2.0)]
    beside.write_text("second\n")
    linecache.clearcache()
    names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(numba_cache, "_PROCESSOR", ("another",))
        names.append(name())
    with monkeypatch.context() as patch:
        patch.setattr(numba_cache.linecache, "getlines", lambda file: ["another"])
        names.append(name())
    assert names[0] == names[1]
    assert len(set(names)) == 5


@needs_numba
def test_a_damaged_file_in_the_folder_is_said_and_does_no_harm(filled: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(filled, tmp_path / "damaged")
    damaged = list(folder.rglob("numba_cpu.add_*.nbi"))
    assert damaged
    for path in damaged:
        path.write_bytes(b"")
    heard = "warnings.showwarning = lambda message, *_: print(str(message)[:46])"
    said, got = run(EDIT.replace('warnings.simplefilter("error")', heard), NUMBA_CACHE_DIR=str(folder)).splitlines()
    assert said == "steerfast: numba cannot use its folder of comp"
    assert got == "[[0.0, 4.0]] True"


@needs_numba
def test_without_a_folder_to_write_it_compiles_all_the_same() -> None:
    nowhere = "import numba.core.caching as c; c.CacheImpl._locator_classes = []\n"
    assert run(nowhere + textwrap.dedent(EDIT)) == "[[0.0, 4.0]] True"


def test_a_broken_numba_is_said_once_and_does_without(tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('this is no numba')\n")
    printed = run(f"""
        import sys, warnings
        sys.path.insert(0, {str(tmp_path)!r})
        import torch, steerfast as sf
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(3):
                got = sf.ops.ablate(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0]))
        print(got.tolist(), [str(w.message)[:52] for w in seen if "numba" in str(w.message)])
    """)
    assert printed == "[[0.0, 4.0]] ['steerfast: numba is installed but cannot compile the']"


@needs_numba
def test_numba_may_be_told_to_compile_nothing() -> None:
    assert run(EDIT.replace('"error"', '"ignore"'), NUMBA_DISABLE_JIT="1") == "[[0.0, 4.0]] False"


def test_a_stand_in_for_numba_does_without() -> None:
    stand_in = "import sys, types; sys.modules['numba'] = types.ModuleType('numba')\n"
    assert run(stand_in + textwrap.dedent(EDIT.replace('"error"', '"ignore"'))) == "[[0.0, 4.0]] False"


def test_a_system_without_fork() -> None:
    assert run("import os, torch; del os.register_at_fork\n" + textwrap.dedent(EDIT)).startswith("[[0.0, 4.0]]")


def test_nobody_needs_numba() -> None:
    printed = run("""
        import sys
        sys.modules["numba"] = None
        import warnings
        warnings.simplefilter("error")
        import torch, steerfast as sf
        from steerfast.ops import compiled_cpu
        print(sf.ops.ablate(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 0.0])).tolist(), compiled_cpu.kernels())
    """)
    assert printed == "[[0.0, 4.0]] None"
