"""Tables of one-slot ops: their numbers, how long they are kept, and that no copy from the host makes them."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from places import backend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import steerfast as sf
from steerfast.ops import tables
from steerfast.ops.slots import AFFINE, FLOW, HINGE, SOLVE, Header, constants, hinge
from steerfast.ops.solvers import Field, pack, scheme
from steerfast.ops.tableaus import SOLVERS

CPU = torch.device("cpu")


def test_tables_hold_the_numbers():
    numbers = hinge(0.25, -1.5, 3e-9, 1e30)
    coefficients, slots = tables.hinge_tables(3, numbers, CPU)
    assert torch.equal(coefficients, torch.tensor([constants(), numbers, numbers, numbers]))
    assert torch.equal(slots, Header(HINGE, 3).tensor())
    coefficients, slots = tables.affine_tables(CPU)
    assert torch.equal(coefficients, torch.tensor([constants()] * 3))
    assert torch.equal(slots, Header(AFFINE, 2).tensor())
    head, slots = tables.loreft_tables(4, torch.float64, CPU)
    assert torch.equal(head, torch.tensor([constants()], dtype=torch.float64))
    assert torch.equal(slots, Header(HINGE, 4, lift=4).tensor())


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("path", [(2.5, 0.0), (0.0, 0.4), (0.0, 0.0)])
def test_a_flow_holds_its_solver(method, path):
    how = scheme(method)
    kept, slots = tables.flow_tables(2, 7, how, torch.float32, CPU)
    table = tables.with_numbers(kept, {(0, 0, 0): path[0], (0, 0, 1): path[1]}, CPU)
    assert (table is kept) == (path == (0.0, 0.0))
    extra = pack(Field(torch.zeros(2), torch.zeros(2)), how)
    rows = torch.zeros(0, 8) if extra is None else extra
    assert torch.equal(table, torch.cat([torch.tensor([constants(*path)]), torch.zeros(2, 8), rows]))
    mode = FLOW if how.plain else SOLVE
    assert torch.equal(slots, Header(mode, 2, steps=how.count(7), extra=rows.shape[0]).tensor())


class Cuda:
    """The streams of a device that is not there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.capturing, self.made = 1, False, 0
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=self.stream))
        self.kept = tables.Kept(self.make)

    def make(self, number: int, device: torch.device) -> tuple[int, int]:
        self.made += 1
        return number, self.made

    def get(self, number: int) -> tuple[int, int]:
        return self.kept(number, torch.device("cuda", 0))


def test_tables_are_kept_for_their_stream(monkeypatch):
    cuda = Cuda(monkeypatch)
    assert cuda.get(5) == cuda.get(5) == (5, 1)
    cuda.stream = 2
    assert cuda.get(5) == cuda.get(5) == (5, 2)
    cuda.stream = 1
    assert cuda.get(5) == (5, 1)
    for number in range(tables.KEPT + 10):
        assert cuda.get(number)[0] == number
    assert len(cuda.kept._of_stream) <= tables.KEPT


def test_a_graph_fills_its_own_tables_or_holds_those_that_are_there(monkeypatch):
    cuda = Cuda(monkeypatch)
    there = cuda.get(5)
    cuda.capturing, cuda.stream = True, 9
    assert cuda.get(5) == there
    assert cuda.get(6) != cuda.get(6)  # each is filled again where the graph runs
    cuda.capturing = False
    assert cuda.get(6) == cuda.get(6) == (6, 4)
    for number in range(100, 100 + tables.KEPT):
        cuda.get(number)
    cuda.capturing = True
    assert cuda.get(5) == there


def test_tables_without_memory_are_not_kept():
    rank, number = 11, 0.8125  # of no other test
    with FakeTensorMode():
        assert all(isinstance(one, FakeTensor) for one in tables.hinge_tables(rank, hinge(number), CPU))
    found, _ = tables.hinge_tables(rank, hinge(number), CPU)
    assert found[1:, 0].tolist() == [number] * rank


class Calls(TorchDispatchMode):
    """The calls of PyTorch that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


ONE_SLOT = {
    "ablate_": lambda x, v, i: sf.ops.ablate_(x, v),
    "amplify_": lambda x, v, i: sf.ops.amplify_(x, v, 0.5 + i),
    "calibrate_": lambda x, v, i: sf.ops.calibrate_(x, v, 0.5 + i),
    "affine_": lambda x, v, i: sf.ops.affine_(x, v[0] + i, v[1]),
    "loreft": lambda x, v, i: sf.ops.loreft(x, v, v, v[:, 0] + i),
    "flow_": lambda x, v, i: sf.ops.flow_(x, v, v[:, 0] + i, v[:, 1], angle=0.1 + i),
    "flow rk4": lambda x, v, i: sf.ops.flow(x, v, v[:, 0], v[:, 1], T=0.1 + i, method="rk4", steps=2 + i),
}


@pytest.mark.interpreter
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("name", ONE_SLOT)
def test_no_number_is_copied_from_the_host(name):
    """What torch.tensor does shows as lift_fresh; a number that a kernel takes as an argument shows nowhere."""
    with backend("interpreter") as device:
        v = torch.linalg.qr(torch.randn(24, 2, device=device))[0].T.contiguous()
        for i in range(3):
            x = torch.randn(3, 24, device=device)
            with Calls() as calls:
                ONE_SLOT[name](x, v, i)
            assert "lift_fresh" not in calls.names
    with Calls() as calls:
        torch.tensor([1.0])
    assert "lift_fresh" in calls.names


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ONE_SLOT)
def test_a_graph_captures_numbers_that_it_sees_first(name):
    with backend("cuda"):
        v = torch.linalg.qr(torch.randn(24, 2))[0].T.contiguous().cuda()
        x = torch.randn(3, 24, device="cuda")
        ONE_SLOT[name](x.clone(), v, 3)  # compiles the kernels
        for number in (3, 1000):
            static = x.clone()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = ONE_SLOT[name](static, v, number)
            for _ in range(2):
                static.copy_(x)
                graph.replay()
                torch.testing.assert_close(out, ONE_SLOT[name](x.clone(), v, number), rtol=0, atol=0)
