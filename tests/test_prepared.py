"""A prepared launch is the launch that Triton would have made: the same kernel, the same arguments, on a driver that records."""

from __future__ import annotations

import gc
import os
import random
import weakref
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
import triton.language as tl
from families import build
from stub import stub_driver
from triton.runtime.jit import JITFunction

import steerfast as sf
from steerfast.hooks.dispatcher import SPREADS
from steerfast.ops import backends
from steerfast.ops.backends import interpreted, kernels
from steerfast_kernels import _launch, _prepared, add, similarity, subspace, subspace_rows
from steerfast_kernels._prepared import Kernel
from steerfast_kernels._private import is_known

FACTOR = tl.constexpr(2)


@_prepared.kernel(do_not_specialize=["N", "stride_n"], do_not_specialize_on_alignment=["table_ptr"])
def _any_kernel(x_ptr, table_ptr, other_ptr, stride_x, N, stride_n, weight, FLAG: tl.constexpr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)
    x = tl.load(x_ptr + offs * stride_x, mask=offs < N, other=0.0)
    if table_ptr is not None:
        x += tl.load(table_ptr + offs * stride_n, mask=offs < N, other=0)
    if other_ptr is not None:
        x *= tl.load(other_ptr + offs)
    if FLAG:
        x *= FACTOR
    tl.store(x_ptr + offs * stride_x, x + weight, mask=offs < N)


@pytest.fixture
def launched():
    """The launches of a test, on a device of its own, for which no kernel has been prepared."""
    found: list[tuple[Any, ...]] = []
    forget()
    with stub_driver(found.append) as driver:
        yield found, driver
        forget()


def forget() -> None:
    for one in (_any_kernel, add._add_kernel, subspace_rows._rows_kernel):
        one.device_caches.clear()
        one._on.clear()


def mix(pick: random.Random) -> dict[str, Any]:
    """Arguments as they come: off by an element, of another dtype, None, a stride of 1, 8, 16 or 17, few or many rows."""
    memory = torch.zeros(64, dtype=pick.choice([torch.float16, torch.float32]))
    table = torch.zeros(64, dtype=pick.choice([torch.int32, torch.float32]))
    return {
        "x_ptr": memory[pick.choice([0, 1]) :],
        "table_ptr": pick.choice([None, table, table[1:]]),
        "other_ptr": pick.choice([None, memory, memory[8:], memory[1:]]),
        "stride_x": pick.choice([1, 8, 16, 17]),
        "N": pick.choice([1, 16, 17, 2**40]),
        "stride_n": pick.choice([0, 1, 16]),
        "weight": pick.choice([0.5, 1.0, 1, 16, True]),
        "FLAG": pick.choice([True, False]),
        "SIZE": 16,
        "num_warps": pick.choice([1, 4]),
    }


def test_this_triton_launches_as_the_one_that_was_read():
    assert is_known(JITFunction.run)
    for one in (add._add_kernel, add._add_rms_norm_kernel, similarity._similarity_kernel, _any_kernel):
        assert isinstance(one, Kernel)


@pytest.mark.parametrize("seed", range(2))
def test_the_prepared_road_launches_what_the_public_road_does(seed, launched):
    found, _ = launched
    pick = random.Random(seed)
    seen: set[int] = set()
    for _ in range(40):
        arguments, grid = mix(pick), pick.choice([(3,), (2, 5), (2, 5, 7)])
        found.clear()
        _any_kernel[grid](**arguments)
        _any_kernel[grid](**arguments)
        _any_kernel._jitted[grid](**arguments)
        first, prepared, public = found
        assert_same(prepared, public)
        assert_same(first, public)
        assert prepared[6:9] == (
            None,
            None,
            None,
        )  # without records for profilers: the second time nothing was asked of Triton
        seen.add(public[4])
    assert len(seen) > 20


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[:6] == other[:6]  # grid, stream, function, packed metadata
    for a, b in zip(one[9:], other[9:], strict=True):
        assert a is b or (type(a) is type(b) and a == b)


def test_what_was_compiled_in_another_order_is_told_apart(launched):
    found, _ = launched
    memory, rest = torch.zeros(64), (None, None, 1, 5, 1, 1.0, False, 16)
    for _ in range(2):
        for x in (memory, memory[1:], memory.half(), memory[4:]):
            _any_kernel[(1,)](x, *rest)
    functions = [launch[4] for launch in found]
    assert functions[:4] == functions[4:]
    assert functions[0] == functions[3]
    assert len(set(functions)) == 3


def test_keywords_places_and_both_are_one_launch(launched):
    found, _ = launched
    arguments = mix(random.Random(0))
    warps = {"num_warps": arguments.pop("num_warps")}
    names = list(arguments)
    for count in (0, 3, len(names)):
        _any_kernel[(1,)](
            *list(arguments.values())[:count], **{name: arguments[name] for name in names[count:]}, **warps
        )
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("option", [{"num_warps": 8}, {"num_stages": 1}, {"maxnreg": 64}, {"launch_pdl": True}])
def test_another_option_is_another_kernel(option, launched):
    found, _ = launched
    arguments = {**mix(random.Random(1)), "num_warps": 4}
    for how in ({}, option) * 2:
        _any_kernel[(1,)](**{**arguments, **how})
    functions = [launch[4] for launch in found]
    assert functions[:2] == functions[2:]
    assert functions[0] != functions[1]


def test_each_device_has_its_own_kernels_and_each_launch_the_stream_of_its_moment(launched):
    found, driver = launched
    arguments = mix(random.Random(2))
    for device, stream in ((0, 7), (1, 8), (0, 9), (1, 10)):
        driver.device, driver.stream = device, stream
        _any_kernel[(1,)](**arguments)
    assert [launch[3] for launch in found] == [7, 8, 9, 10]
    zero, one = {launch[4] for launch in found[::2]}, {launch[4] for launch in found[1::2]}
    assert len(zero) == len(one) == 1
    assert zero != one


def test_no_tensor_outlives_its_launch(launched):
    arguments = mix(random.Random(3))
    arguments["x_ptr"] = torch.zeros(64)
    gone = weakref.ref(arguments["x_ptr"])
    for _ in range(3):
        _any_kernel[(1,)](**arguments)
    launched[0].clear()
    del arguments
    gc.collect()
    assert gone() is None


def test_who_watches_launches_sees_them_as_ever(launched):
    found, _ = launched
    arguments, seen = mix(random.Random(4)), []
    for _ in range(2):
        _any_kernel[(1,)](**arguments)
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(seen.append)
    try:
        _any_kernel[(1,)](**arguments)
    finally:
        hook.remove(seen.append)
    assert found[-1][6].get()["name"] == "_any_kernel"
    assert found[-1][7] is hook
    _any_kernel[(1,)](**arguments)
    assert found[-1][6:9] == (None, None, None)

    _any_kernel.add_pre_run_hook(lambda *args, **kwargs: seen.append(kwargs["SIZE"]))
    try:
        _any_kernel[(1,)](**arguments)
    finally:
        _any_kernel.pre_run_hooks.clear()
    assert seen == [16]

    with mock.patch.object(JITFunction, "run", lambda kernel, **kwargs: seen.append(kernel.__name__)):
        _any_kernel[(1,)](**arguments)
    assert seen == [16, "_any_kernel"]


def test_a_setting_of_triton_is_heeded(launched, monkeypatch):
    found, _ = launched
    arguments = mix(random.Random(5))
    for debug in (False, True, False):
        monkeypatch.setattr(triton.knobs.runtime, "debug", debug)
        _any_kernel[(1,)](**arguments)
    plain, debugged, again = (launch[4] for launch in found)
    assert plain == again != debugged


def test_a_global_that_changed_is_refused_as_ever(launched, monkeypatch):
    arguments = {**mix(random.Random(6)), "FLAG": True}
    for _ in range(2):
        _any_kernel[(1,)](**arguments)
    monkeypatch.setitem(globals(), "FACTOR", tl.constexpr(3))
    with pytest.raises(RuntimeError, match="FACTOR has changed"):
        _any_kernel[(1,)](**arguments)


def test_wrong_arguments_are_refused_as_ever(launched):
    arguments = mix(random.Random(7))
    for _ in range(2):
        _any_kernel[(1,)](**arguments)
    with pytest.raises(KeyError, match="no_such"):
        _any_kernel[(1,)](**arguments, no_such=1)
    del arguments["SIZE"]
    with pytest.raises(TypeError, match="SIZE"):
        _any_kernel[(1,)](**arguments)


def test_a_grid_that_is_a_function_and_a_warmup_go_the_public_way(launched):
    found, _ = launched
    arguments = mix(random.Random(8))
    _any_kernel.warmup(**arguments, grid=(1,))
    assert not found
    for _ in range(2):
        _any_kernel[lambda bound: (bound["SIZE"],)](**arguments)
        _any_kernel[(16,)](**arguments)
    assert {launch[:3] for launch in found} == {(16, 1, 1)}
    assert len({launch[4] for launch in found}) == 1


def test_a_cache_that_triton_dropped_is_dropped(launched):
    found, _ = launched
    arguments = mix(random.Random(9))
    for _ in range(2):
        _any_kernel[(1,)](**arguments)
    _any_kernel.device_caches.clear()
    _any_kernel[(1,)](**arguments)
    assert found[0][4] == found[1][4] != found[2][4]


def test_another_form_of_triton_leaves_kernels_as_they_are(monkeypatch):
    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        self.start(grid, args)

    assert not is_known(run)
    assert not is_known(len)
    monkeypatch.setattr(JITFunction, "run", run)
    made = _prepared.kernel()(_any_kernel.fn)
    assert type(made) is JITFunction


def test_the_launchers_launch_prepared(launched):
    found, _ = launched
    x, bank = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(2, 64, dtype=torch.bfloat16)
    tables = torch.zeros(4, 8), torch.zeros(2, 8, dtype=torch.int32)
    for n in (1, 3, 2, 3):
        add.add(x[:n], bank, None, None, out=x[:n])
        subspace.subspace(x[:n], bank, *tables, None, None, 2, 1, out=x[:n])
    assert len(found) == 8
    assert len({launch[4] for launch in found}) == 2
    assert all(launch[6:9] == (None, None, None) for launch in found[2:])


def test_the_hook_launches_with_tables_of_the_tokens_that_run(launched, monkeypatch):
    found, _ = launched
    kernels("subspace")
    interpreted()
    monkeypatch.setattr(backends, "_chosen", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # the backend asks; Triton has asked already
    model, vector = build("llama"), torch.ones(48)
    place = subspace_rows._rows_kernel.arg_names.index("rows_ptr")
    with torch.no_grad(), sf.steer(model, {1: [sf.Add(vector, 2.0), sf.Ablate(vector)]}):
        for tokens in [*range(1, SPREADS + 3), 1, 7, 1]:
            found.clear()
            model(torch.ones(1, tokens, dtype=torch.long), use_cache=False)
            (launch,) = found
            rows, scale = (launch[9 + i] for i in (place, place + 3))
            assert launch[0] == tokens
            assert rows.tolist() == [[0, 1]] * tokens
            assert scale.tolist() == [[1.0, 1.0]] * tokens


@pytest.mark.parametrize(("current", "guarded"), [(1, False), (0, True)])
def test_the_device_is_changed_only_where_another_is_current(current, guarded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    x = mock.Mock(is_cuda=True, device=torch.device("cuda", 1))
    x.get_device.return_value = 1
    guard = _launch.on_device(x)
    assert isinstance(guard, torch.cuda.device) is guarded
    if guarded:
        assert guard.idx == 1
