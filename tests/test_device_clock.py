"""The clock of a GPU, on a stand-in for one: what is captured, how many calls a graph holds, what becomes of a failure."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import bars  # noqa: E402
from lab import clock, table  # noqa: E402
from lab.case import Case, same_as  # noqa: E402
from lab.clock import DeviceClock, DeviceRunner, Effort, Peaks  # noqa: E402
from lab.pairs import OURS, Race  # noqa: E402

LAUNCH = 5e-6  # what the replay of a graph takes, whatever it holds


class Gpu:
    """A GPU that takes as long for each call as a test says, and fails to capture what a test says."""

    def __init__(self, call: float, broken: Callable[[], bool]) -> None:
        self.now, self.calls, self.each, self.broken = 0.0, 0, call, broken
        self.host = 0.0  # seconds that the host takes for a call that it launches itself
        self.capturing: Graph | None = None
        self.graphs: list[Graph] = []

    def run(self, x: torch.Tensor) -> torch.Tensor:
        if self.capturing is not None:
            if self.broken():
                raise RuntimeError("operation not permitted when stream is capturing")
            self.capturing.calls += 1
        else:
            self.now += self.each + self.host
            self.calls += 1
        return 2 * x

    def eager(self, x: torch.Tensor) -> torch.Tensor:
        """As long a call, which is captured whatever else is not."""
        if self.capturing is not None:
            self.capturing.calls += 1
        else:
            self.now += self.each
        return x + x

    @contextmanager
    def graph(self, graph: Graph, stream: object) -> Iterator[None]:
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None


class Graph:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.calls = gpu, 0
        gpu.graphs.append(self)

    def replay(self) -> None:
        self.gpu.now += LAUNCH + self.calls * self.gpu.each


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = self.gpu.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other: object) -> None:
        pass


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gpu]:
    def make(call: float, broken: Callable[[], bool] = lambda: False) -> Gpu:
        gpu = Gpu(call, broken)
        stands = {
            "Stream": Stream,
            "current_stream": Stream,
            "stream": lambda stream: nullcontext(),
            "synchronize": lambda: None,
            "CUDAGraph": lambda: Graph(gpu),
            "graph": gpu.graph,
            "Event": lambda enable_timing: Event(gpu),
        }
        for name, value in stands.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(clock.time, "perf_counter", lambda: gpu.now)  # a host that waits for the device
        return gpu

    return make


EFFORT = Effort(rounds=2, seconds=1e-9, least=2)


def runner(gpu: Gpu) -> DeviceRunner:
    return DeviceRunner(gpu.run, [(torch.ones(3),)] * 4, EFFORT, captured=True)


@pytest.mark.parametrize(("call", "calls"), [(2e-6, 200), (9e-6, 195), (12e-6, 150), (5e-4, 3), (0.1, 1)])
def test_a_graph_of_short_calls_holds_many(on, call, calls):
    """So that the launch of the graph, which the events enclose, is less than a hundredth of what they show."""
    gpu = on(call)
    made = runner(gpu)
    assert gpu.graphs[-1].calls == calls
    assert made.burst(0.0) == pytest.approx(call, rel=0.03)
    assert made.uncaptured == ""


def test_a_slow_host_makes_no_smaller_graph(on):
    """A sparse op takes the host ten times what it takes the device."""
    gpu = on(17e-6)
    gpu.host = 170e-6
    made = runner(gpu)
    assert gpu.graphs[-1].calls == int(2e-3 / (17e-6 + LAUNCH / 4))
    assert made.burst(0.0) == pytest.approx(17e-6, rel=0.01)


def test_a_capture_that_fails_is_told(on):
    made = runner(on(1e-3, lambda: True))
    assert made.uncaptured == "RuntimeError: operation not permitted when stream is capturing"
    assert made.burst(0.0) == pytest.approx(1e-3)


def test_the_second_capture_may_fail_alone(on):
    left = iter([False] * 20)
    made = runner(on(2e-6, lambda: next(left, True)))
    assert "capturing" in made.uncaptured
    assert made.burst(0.0) == pytest.approx(2e-6)


def raced(gpu: Gpu) -> Race:
    rows = lambda: (torch.ones(3, 4),)  # noqa: E731
    case = Case("double", 192, 24, rows, gpu.run, same_as(lambda x: x + x), peers={"eager": lambda: gpu.eager})
    made = Race(replace(case, captured=True), DeviceClock(), Peaks(1e9, 1e10), EFFORT)
    made.run()
    return made


def test_its_row_is_marked_and_feeds_no_bar(on):
    row = {**raced(on(1e-3, lambda: True)).row, "run": {"device": "d", "date": "2026-01-02", "place": "cuda"}}
    assert set(row["uncaptured"]) == {OURS, "again"}
    assert "not captured: ours, again" in table.line(row)
    for measure in ("floor", "copy", "time: ours", "over: ours | eager", "above: eager | ours"):
        bar = bars.Bar("1", "cuda", "double", measure, ">= 0", "w")
        assert bars.judge(bar, {("double", "cuda"): row}).outcome == "not measured yet", measure
    bar = bars.Bar("1", "cuda", "double", "time: eager", ">= 0", "w")
    assert bars.judge(bar, {("double", "cuda"): row}).outcome == "met"  # a baseline that was captured


def test_a_row_that_was_captured_feeds_bars(on):
    row = {**raced(on(1e-3)).row, "run": {"device": "d", "date": "2026-01-02", "place": "cuda"}}
    assert row["uncaptured"] == {}
    assert "not captured" not in table.line(row)
    bar = bars.Bar("1", "cuda", "double", "time: ours", "<= 0.0011", "w")
    assert bars.judge(bar, {("double", "cuda"): row}).outcome == "met"


def test_peaks_that_were_not_captured_are_none(on, monkeypatch):
    gpu = on(1e-3, lambda: True)
    monkeypatch.setattr(torch, "mm", lambda a, b: gpu.run(a))
    monkeypatch.setattr(DeviceClock, "device", "cpu")
    host = DeviceClock()
    with pytest.raises(RuntimeError, match="peaks are not known"):
        clock.measure_peaks(host, torch.float32, replace(EFFORT, seconds=0))
