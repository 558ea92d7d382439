"""Clocks: how a burst of calls is timed, how two bursts make a pair, and what the machine was seen to do at its best.

On the host it is the CPU time of the process, on a GPU CUDA graphs between events.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from .case import Case, Function, Inputs, Within

SHORT_CALL = 0.02  # seconds; a longer one fills the caches itself and is not warmed up


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds per burst at least, rounds at most, seconds of rounds per case; whether to compile.

    least: rounds at least, however long they take.
    patience: seconds that a pair may wait for the core's full speed, and be retried where that did not last.
    """

    burst: float = 0.0002
    rounds: int = 192
    seconds: float = 13.5
    compile: bool = True
    patience: float = 0.05
    least: int = 3

    def shared(self, visits: int) -> Effort:
        """The part of each of so many visits, which together make this effort."""
        rounds, least = -(-self.rounds // visits), -(-self.least // visits)
        return replace(self, seconds=self.seconds / visits, rounds=rounds, least=least)


QUICK = Effort(rounds=5, seconds=3.0, compile=False)
REHEARSAL = Effort(burst=0.0, rounds=1, seconds=0.0, compile=False, patience=0.0, least=1)


class Runner(Protocol):
    """A function that is warm.

    taken: seconds of a call, about, 0 where unknown.
    uncaptured: why its calls should have been captured in a graph and are not; "" where all is well.
    """

    taken: float
    uncaptured: str

    def burst(self, seconds: float) -> float:
        """Calls for about so many seconds, one at least: what one of them took."""

    def lasting(self, seconds: float) -> float:
        """About how long a burst of so many seconds keeps the machine."""


class Pair(NamedTuple):
    """Seconds of a call of ours and of a baseline, one right after the other; whether the core was at full speed meanwhile."""

    ours: float
    baseline: float
    calm: bool


def _taken_apart(function: Function) -> tuple[Function, Callable[[], AbstractContextManager[object]]]:
    return (function.function, function.around) if isinstance(function, Within) else (function, nullcontext)


class HostRunner:
    """Calls on the host, in the CPU time of the process."""

    def __init__(self, function: Function, sets: Sequence[Inputs], effort: Effort) -> None:
        self._call, self._around = _taken_apart(function)
        self._rotation = itertools.cycle(sets)
        self.taken, self.uncaptured = 0.0, ""
        if effort.burst > 0:
            with self._around():
                self._call(*next(self._rotation))
                begin = time.perf_counter()
                self._call(*next(self._rotation))
                self.taken = max(time.perf_counter() - begin, 1e-9)

    def lasting(self, seconds: float) -> float:
        """As long as it shall take, or a call takes."""
        return max(seconds, self.taken)

    def burst(self, seconds: float) -> float:
        """Calls for about so many seconds, one at least; before short ones an untimed one, which they find in the caches."""
        calls = max(1, round(seconds / self.taken)) if self.taken else 1
        with self._around():
            if 0 < self.taken < SHORT_CALL:
                self._call(*next(self._rotation))
            begin = time.process_time()
            for inputs in itertools.islice(self._rotation, calls):
                self._call(*inputs)
            return (time.process_time() - begin) / calls


class HostClock:
    """CPU time of the process per call.

    A virtual core shares a real one: while its neighbour works everything takes up to twice as long, and not all of it in one
    proportion. So a pair waits until a fixed piece of work takes no more than 1.6 times the least that it ever took here
    (right after wide vector instructions it takes 1.3 times that anyhow), and looks again at its end: each time for a
    twentieth of its length, so that it tells of a long one, too. Where retries were in vain, the next pair waits half as long.
    """

    name = "CPU time of the process"
    device = "cpu"
    thorough = Effort()
    slow = 1.6

    def __init__(self) -> None:
        self._least = math.inf
        self._willing = 1.0

    def at_full_speed(self, lasting: float = 0.0) -> bool:
        """Whether this core is nobody else's at the moment, or for so many seconds."""
        end = time.perf_counter() + lasting
        while True:
            taken = _fixed_work()
            self._least = min(self._least, taken)
            if taken > self.slow * self._least:
                return False
            if time.perf_counter() >= end:
                return True

    def _learn(self, seconds: float) -> None:
        """Look for the full speed of this core, once."""
        end = time.perf_counter() + seconds
        while math.isinf(self._least) or time.perf_counter() < end:
            self.at_full_speed()

    def prepare(self, function: Function, sets: Sequence[Inputs], effort: Effort, captured: bool = True) -> Runner:
        """Warm a function up."""
        if math.isinf(self._least):
            self._learn(40 * effort.patience)
        return HostRunner(function, sets, effort)

    def pair(self, ours: Runner, baseline: Runner, effort: Effort) -> Pair:
        """A burst of each, as long as a call of the longer but at most ten times the effort's; retried as patience allows."""
        burst = max(effort.burst, min(10 * effort.burst, max(ours.taken, baseline.taken)))
        look = (max(burst, ours.taken) + max(burst, baseline.taken)) / 20
        limit = time.perf_counter() + self._willing * effort.patience
        while True:
            while not (calm := self.at_full_speed(look)) and time.perf_counter() < limit:
                pass  # a core that sleeps is given to others
            taken = _bursts(ours, baseline, burst)
            calm = calm and self.at_full_speed(look)
            if calm or time.perf_counter() >= limit:
                self._willing = 1.0 if calm else max(self._willing / 2, 1 / 64)
                return Pair(*taken, calm)


def _bursts(ours: Runner, baseline: Runner, seconds: float) -> tuple[float, float]:
    """A burst of each, in random order."""
    if random.random() < 0.5:
        return ours.burst(seconds), baseline.burst(seconds)
    first = baseline.burst(seconds)
    return ours.burst(seconds), first


def _fixed_work() -> float:
    begin, total = time.perf_counter(), 0
    for i in range(2000):
        total += i
    return time.perf_counter() - begin


class DeviceRunner:
    """Calls on a GPU: a CUDA graph of them over rotating inputs, between CUDA events.

    What cannot be captured runs as launches from the host: between events where it should have been captured, and then the row
    says so; by the clock on the wall where the case says that the host counts. How long a call takes is asked of a first small
    graph, since a host that waits for a call of some microseconds sees ten times as many.
    """

    most_calls = 200  # of the shortest: the launch of a graph, some microseconds, lies between the events, too
    first_calls = 4

    def __init__(self, function: Function, sets: Sequence[Inputs], effort: Effort, captured: bool) -> None:
        """Warm it up on a stream of its own, and capture its calls."""
        self._call, self._around = _taken_apart(function)
        self._rotation = itertools.cycle(sets)
        stream = torch.cuda.Stream() if captured else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with self._around(), torch.cuda.stream(stream):
            for inputs in sets[:3]:
                self._call(*inputs)
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._call(*sets[0])
            torch.cuda.synchronize()
        self.taken = max(time.perf_counter() - start, 1e-9)
        self._captured, self.uncaptured = captured, ""
        self._calls, self._run = self._as_many(effort), self._launch
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if captured:
            self._calls = min(self._calls, self.first_calls)
            self._capture(stream)
            if not self.uncaptured:
                self.taken = max(self.burst(0.0), 1e-9)
                if self._calls != (calls := self._as_many(effort)):
                    self._calls = calls
                    self._capture(stream)

    def _as_many(self, effort: Effort) -> int:
        """Calls that take about ten bursts."""
        return max(1, min(self.most_calls, int(10 * effort.burst / self.taken)))

    def _launch(self) -> None:
        for inputs in itertools.islice(self._rotation, self._calls):
            self._call(*inputs)

    def _capture(self, stream: torch.cuda.Stream) -> None:
        """Run a graph of the launches instead of them, where there can be one."""
        graph = torch.cuda.CUDAGraph()
        try:
            with self._around(), torch.cuda.graph(graph, stream=stream):
                self._launch()
            graph.replay()
            self._run = graph.replay
        except RuntimeError as error:
            torch.cuda.synchronize()
            self.uncaptured, self._run = f"{type(error).__name__}: {error}"[:300], self._launch

    def lasting(self, seconds: float) -> float:
        """As long as the calls that were captured, twice: once to warm up."""
        return 2 * self._calls * self.taken

    def burst(self, seconds: float) -> float:
        """The calls that were captured, however long they take."""
        with self._around():
            if self.taken < SHORT_CALL:
                self._run()
            torch.cuda.synchronize()
            start = time.perf_counter()
            self._begin.record()
            self._run()
            self._end.record()
            self._end.synchronize()
            wall = time.perf_counter() - start
        return (self._begin.elapsed_time(self._end) / 1e3 if self._captured else wall) / self._calls


class DeviceClock:
    """Time on the device per call."""

    name = "CUDA events"
    device = "cuda"
    thorough = Effort(
        rounds=15, seconds=1.5
    )  # nobody shares it, and compiling the baselines takes longer than timing them

    def prepare(self, function: Function, sets: Sequence[Inputs], effort: Effort, captured: bool = True) -> Runner:
        """Warm a function up and capture its calls."""
        return DeviceRunner(function, sets, effort, captured)

    def pair(self, ours: Runner, baseline: Runner, effort: Effort) -> Pair:
        """A burst of each."""
        return Pair(*_bursts(ours, baseline, effort.burst), True)


Clock = HostClock | DeviceClock


@dataclass(frozen=True)
class Peaks:
    """What this machine was seen to do: bytes per second of a copy (read plus write), operations per second of a product."""

    copy: float
    product: float

    def floor(self, case: Case) -> float:
        """The least seconds that a case can take: the larger of moving its bytes and doing its operations."""
        return max(case.bytes / self.copy, case.operations / self.product)


def measure_peaks(clock: Clock, dtype: torch.dtype, effort: Effort) -> Peaks:
    """Time a copy larger than the caches and a large matrix product; the best of several bursts each."""
    rehearsal = effort.seconds == 0
    size, side = (1 << 30, 8192) if clock.device == "cuda" else (1 << 28, 1024)
    if rehearsal:
        size, side = 1 << 14, 32
    source = torch.ones(size, dtype=torch.uint8, device=clock.device)
    a, b = (torch.randn(side, side, device=clock.device).to(dtype) for _ in range(2))
    copy = clock.prepare(torch.empty_like(source).copy_, [(source,)], effort)
    product = clock.prepare(torch.mm, [(a, b)], effort)
    if failed := copy.uncaptured or product.uncaptured:
        raise RuntimeError(f"the machine's peaks are not known: a copy or a product could not be captured: {failed}")
    fast = [min(clock.pair(one, one, effort).ours for _ in range(1 if rehearsal else 9)) for one in (copy, product)]
    return Peaks(2 * size / fast[0], 2 * side**3 / fast[1])
