"""How a benchmark measures: ours meets each peer in duels, in random order; outputs are checked first.

A duel is a burst of calls of ours and one of the peer, one right after the other: CPU time of the process on the host, CUDA
graphs between events on a GPU. What disturbs a machine disturbs both, so their ratio is steadier than their times. A round
is a few duels with each peer. Duels that met a slow core are left out where enough others did not. One contender, "again",
is ours a second time: what its ratio differs from 1 is the noise.
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Inputs = tuple[Any, ...]
Function = Callable[..., Any]
Row = dict[str, Any]

OURS, AGAIN = "ours", "again"
MOST_SETS = 32
LEAST_ROTATION = 256 << 20  # bytes of rotating inputs on a GPU: more than any L2 of today
# of a round: a contender's seconds, those of ours in its duels, whether these were at full speed
KINDS = "times", "beside", "calm"
LEAST_CALM = 10
SHARE = 8  # in a round a contender is met for this part of the time that the slowest takes, or for six bursts if that is more
SHORT_CALL = 0.02  # seconds; a longer one fills the caches itself and is not warmed up
RESAMPLES = 2000
PACKAGES = (
    "steerfast", "torch", "triton", "transformers", "vllm", "sae-lens", "eai-sparsify", "steering-vectors", "repeng",
    "torchdiffeq", "hotwire-vllm",
)  # fmt: skip


class NotHere(Exception):
    """Raised by the maker of a peer that cannot run here; its text is the reason that is reported."""


@dataclass(frozen=True)
class Case:
    """One op at one size: what it must move and compute, how to call it, and how an answer is judged.

    Attributes:
        name: The op and its sizes, such as "amplify k=8 n=256 d=576 fp32"; results are found by it.
        bytes: Bytes that any implementation must read and write once per call.
        operations: Floating-point operations that it must do per call.
        fresh: Makes one set of inputs. Sets rotate, so that inputs larger than the cache are read from memory.
        ours: What is measured, called with a set.
        fixed: What every call shares, such as weights; a set is what `fresh` makes, followed by these.
        judge: For a set, a function from an answer to its error as a share of what is allowed.
        peers: Other ways to the same answer, by name: what makes a function like `ours`. Checked before they are timed.
        yardsticks: Other work that the same inputs are compared with, such as the matrix products alone; not checked.
        dtype: Of the arithmetic that the peak is measured in.
        slack: How much more than ours a peer may err, who may round more often than we do.
        captured: Whether a GPU runs the call inside a CUDA graph; otherwise the time of the host counts, too.
    """

    name: str
    bytes: float
    operations: float
    fresh: Callable[[], Inputs]
    ours: Function
    judge: Callable[[Inputs], Callable[[Any], float]]
    fixed: Inputs = ()
    peers: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    yardsticks: Mapping[str, Callable[[], Function]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    slack: float = 8.0
    captured: bool = True


@dataclass(frozen=True)
class Within:
    """A contender inside a context, such as a hook: entered before each burst and left after it, outside the time taken."""

    function: Function
    around: Callable[[], AbstractContextManager[object]]

    def __call__(self, *inputs: Any) -> Any:
        """One call in a context of its own."""
        with self.around():
            return self.function(*inputs)


def _taken_apart(function: Function) -> tuple[Function, Callable[[], AbstractContextManager[object]]]:
    return (function.function, function.around) if isinstance(function, Within) else (function, nullcontext)


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds per burst at least, rounds at most, seconds of rounds per case; whether to compile peers.

    least: rounds at least, however long they take.
    patience: seconds that a duel may wait for the core's full speed, and be fought again where that did not last.
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
    """A contender that is warm; taken: seconds of a call, about, 0 where unknown."""

    taken: float

    def burst(self, seconds: float) -> float:
        """Calls for about so many seconds, one at least: what one of them took."""

    def lasting(self, seconds: float) -> float:
        """About how long a burst of so many seconds keeps the machine."""


class Duel(NamedTuple):
    """Seconds of a call of ours and of another contender, taken together; whether the core was at full speed meanwhile."""

    ours: float
    other: float
    calm: bool


class HostRunner:
    """Calls on the host, in the CPU time of the process."""

    def __init__(self, function: Function, sets: Sequence[Inputs], effort: Effort) -> None:
        self._call, self._around = _taken_apart(function)
        self._rotation = itertools.cycle(sets)
        self.taken = 0.0
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
    proportion. So a duel waits until a fixed piece of work takes no more than 1.6 times the least that it ever took here
    (right after wide vector instructions it takes 1.3 times that anyhow), and looks again at its end: each time for a
    twentieth of its length, so that it tells of a long one, too. Where waiting was in vain, the next duel waits half as long.
    """

    name = "CPU time of the process"
    device = "cpu"
    thorough = Effort()
    slow = 1.6

    def __init__(self) -> None:
        self._least = math.inf
        self._hope = 1.0

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
        """Warm a contender up."""
        if math.isinf(self._least):
            self._learn(40 * effort.patience)
        return HostRunner(function, sets, effort)

    def duel(self, ours: Runner, other: Runner, effort: Effort) -> Duel:
        """A burst of each, as long as a call of the longer but at most ten times the effort's."""
        burst = max(effort.burst, min(10 * effort.burst, max(ours.taken, other.taken)))
        look = (max(burst, ours.taken) + max(burst, other.taken)) / 20
        limit = time.perf_counter() + self._hope * effort.patience
        while True:
            while not (calm := self.at_full_speed(look)) and time.perf_counter() < limit:
                pass  # a core that sleeps is given to others
            taken = _bursts(ours, other, burst)
            calm = calm and self.at_full_speed(look)
            if calm or time.perf_counter() >= limit:
                self._hope = 1.0 if calm else max(self._hope / 2, 1 / 64)
                return Duel(*taken, calm)


def _bursts(ours: Runner, other: Runner, seconds: float) -> tuple[float, float]:
    """A burst of each, in random order."""
    if random.random() < 0.5:
        return ours.burst(seconds), other.burst(seconds)
    first = other.burst(seconds)
    return ours.burst(seconds), first


def _fixed_work() -> float:
    begin, total = time.perf_counter(), 0
    for i in range(2000):
        total += i
    return time.perf_counter() - begin


class DeviceRunner:
    """Calls on a GPU: a CUDA graph of them over rotating inputs, between CUDA events.

    What cannot be captured runs as launches from the host: between events where it should have been captured, by the clock
    on the wall where the case says that the host counts.
    """

    most_calls = 20

    def __init__(self, function: Function, sets: Sequence[Inputs], effort: Effort, captured: bool) -> None:
        """Warm it up on a stream of its own, and capture its calls."""
        call, self._around = _taken_apart(function)
        stream = torch.cuda.Stream() if captured else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with self._around(), torch.cuda.stream(stream):
            for inputs in sets[:3]:
                call(*inputs)
            torch.cuda.synchronize()
            start = time.perf_counter()
            call(*sets[0])
            torch.cuda.synchronize()
        self.taken = time.perf_counter() - start
        self._captured = captured
        self._calls = max(1, min(self.most_calls, int(10 * effort.burst / self.taken)))
        rotation = itertools.cycle(sets)

        def launch() -> None:
            for inputs in itertools.islice(rotation, self._calls):
                call(*inputs)

        self._run = launch
        if captured:
            graph = torch.cuda.CUDAGraph()
            try:
                with self._around(), torch.cuda.graph(graph, stream=stream):
                    launch()
                self._run = graph.replay
                self._run()
            except RuntimeError:
                torch.cuda.synchronize()
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

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
    thorough = Effort(rounds=15, seconds=1.5)  # nobody shares it, and compiling the peers takes longer than timing them

    def prepare(self, function: Function, sets: Sequence[Inputs], effort: Effort, captured: bool = True) -> Runner:
        """Warm a contender up and capture its calls."""
        return DeviceRunner(function, sets, effort, captured)

    def duel(self, ours: Runner, other: Runner, effort: Effort) -> Duel:
        """A burst of each."""
        return Duel(*_bursts(ours, other, effort.burst), True)


Clock = HostClock | DeviceClock


def clock_here() -> Clock:
    """The clock of this machine: its GPU's, or the host's."""
    return DeviceClock() if torch.cuda.is_available() else HostClock()


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
    fast = [min(clock.duel(one, one, effort).ours for _ in range(1 if rehearsal else 9)) for one in (copy, product)]
    return Peaks(2 * size / fast[0], 2 * side**3 / fast[1])


_now = time.perf_counter


class Race:
    """One case under measurement: contenders are checked, then ours meets each of the others; `row` is what is known.

    Args:
        case: What is measured.
        clock: On which clock.
        peaks: Of the machine, measured in the same run.
        effort: How long.
    """

    def __init__(self, case: Case, clock: Clock, peaks: Peaks, effort: Effort) -> None:
        self.row: Row = {
            "case": case.name, "status": "red", "clock": clock.name, "bytes": case.bytes, "operations": case.operations,
            "floor": peaks.floor(case), "copy": peaks.copy, "product": peaks.product,
            "times": {}, "beside": {}, "calm": {}, "errors": {}, "missing": {},
        }  # fmt: skip
        self.effort = effort
        self._clock = clock
        self._runners: dict[str, Runner] = {}
        sets = _sets(case, clock, effort)
        judge = case.judge(sets[0])
        if self._allow(OURS, case.ours, sets[0], judge, 1.0):
            self.row["status"] = "ok"
            makers = {OURS: lambda: case.ours, AGAIN: lambda: case.ours, **case.peers, **case.yardsticks}
            for name, maker in makers.items():
                self._admit(name, maker, sets, judge if name in case.peers else None, case)
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # what lives now is not looked at before every round

    def _admit(
        self,
        name: str,
        maker: Callable[[], Function],
        sets: Sequence[Inputs],
        judge: Callable[[Any], float] | None,
        case: Case,
    ) -> None:
        """Check a contender and warm it up. A peer that cannot is named with the reason; ours must."""
        try:
            if isinstance(maker, Compiled) and not self.effort.compile:
                raise NotHere("a quick run compiles nothing")
            function = maker()
            if judge is None or self._allow(name, function, sets[0], judge, case.slack):
                self._runners[name] = self._clock.prepare(function, sets, self.effort, case.captured)
                for kind in KINDS:
                    self.row[kind][name] = []
        except NotHere as reason:
            self.row["missing"][name] = str(reason)
        except ModuleNotFoundError as error:
            self.row["missing"][name] = f"{error.name} is not installed"
        except Exception as error:
            if name in (OURS, AGAIN):
                raise
            self.row["missing"][name] = f"failed: {type(error).__name__}: {error}"[:300]

    def _allow(
        self, name: str, function: Function, inputs: Inputs, judge: Callable[[Any], float], allowed: float
    ) -> bool:
        share = judge(function(*inputs))
        self.row["errors"][name] = share
        if share <= allowed:  # false for NaN
            return True
        self.row["missing"][name] = f"red: its error is {share:.3g} of what is allowed, at most {allowed:g}"
        return False

    @property
    def red(self) -> bool:
        """Whether our own answer is wrong, so that nothing may be timed."""
        return self.row["status"] == "red"

    def run(self) -> None:
        """Rounds until the effort is made, to half a round; of earlier ones the row knows nothing afterwards."""
        begin = _now()
        self._keep(0)
        if self._clock.device == "cpu":
            _give_back()  # what the calls allocate lies elsewhere in every visit, so its place averages out
        if self.effort.seconds > 0:
            self.round()  # the first finds caches and clocks cold
            if _now() - begin < self.effort.seconds / 4:
                self._keep(0)
        while (done := len(self.row["times"][OURS])) < self.effort.least or (
            self._undisturbed() < self.effort.rounds and (_now() - begin) * (1 + 0.5 / done) < self.effort.seconds
        ):
            self.round()

    def round(self) -> None:
        """Duels of ours with every other, in random order: their means, of the calm ones alone where there are any."""
        duels: dict[str, list[Duel]] = {name: [] for name in self._runners if name != OURS}
        order = [name for name in duels for _ in range(self._often(name))]
        gc.collect()
        gc.disable()
        try:
            for name in random.sample(order, len(order)):
                duels[name].append(self._clock.duel(self._runners[OURS], self._runners[name], self.effort))
        finally:
            gc.enable()
        duels[OURS] = [Duel(duel.ours, duel.ours, duel.calm) for fought in duels.values() for duel in fought]
        try:
            for name, fought in duels.items():
                calm = [duel for duel in fought if duel.calm]
                self.row["times"][name].append(_mean(duel.other for duel in calm or fought))
                self.row["beside"][name].append(_mean(duel.ours for duel in calm or fought))
                self.row["calm"][name].append(bool(calm))
        finally:
            self._keep(min(len(taken) for kind in KINDS for taken in self.row[kind].values()))  # no half of a round

    def _often(self, name: str) -> int:
        """Duels with a contender in a round: as many as its share of the round holds, one at least."""
        lasting = {other: self._lasting(other) for other in self._runners}
        share = max(6 * self.effort.burst, max(lasting.values()) / SHARE)
        return max(1, round(share / lasting[name])) if lasting[name] else 1

    def _lasting(self, name: str) -> float:
        """Seconds of a duel with a contender, about."""
        return sum(self._runners[one].lasting(self.effort.burst) for one in (OURS, name))

    def _undisturbed(self) -> int:
        """Rounds in which every contender had a calm duel."""
        return sum(map(all, zip(*self.row["calm"].values(), strict=True)))

    def _keep(self, count: int) -> None:
        """Of the rounds so far, the first ones."""
        for kind in KINDS:
            for taken in self.row[kind].values():
                del taken[count:]


def _mean(seconds: Iterable[float]) -> float:
    """In five figures: enough for a row."""
    return float(f"{statistics.fmean(seconds):.5g}")


def _counted(row: Row, *names: str) -> tuple[Sequence[int], bool]:
    """The rounds that count for these contenders, and whether they are calm: ten or more that are, otherwise all."""
    every = range(len(row["times"][names[0]]))
    if "calm" not in row:
        return every, True
    calm = [i for i in every if all(row["calm"][name][i] for name in names)]
    enough = len(calm) >= min(LEAST_CALM, len(every))
    return (calm if enough else every), enough


def is_calm(row: Row, *names: str) -> bool:
    """Whether what counts of these contenders was measured at the core's full speed, as far as the row knows."""
    return _counted(row, *names)[1]


def times(row: Row, name: str) -> list[float]:
    """Round by round, the seconds of one contender that count."""
    return [row["times"][name][i] for i in _counted(row, name)[0]]


def pairs(row: Row, name: str, base: str) -> list[tuple[float, float]]:
    """Round by round, the seconds of two contenders that count, those of the second as if it had met the first.

    Both met ours; so they are scaled by what ours took beside the one over what it took beside the other.
    """
    taken, ours = list(zip(row["times"][name], row["times"][base], strict=True)), row.get("beside")
    rounds, _ = _counted(row, name, base)
    return [(taken[i][0], taken[i][1] * (ours[name][i] / ours[base][i] if ours else 1.0)) for i in rounds]


def paired(row: Row, name: str, base: str) -> list[float]:
    """Round by round, the time of one contender over that of another."""
    return [a / b for a, b in pairs(row, name, base)]


def _sets(case: Case, clock: Clock, effort: Effort) -> list[Inputs]:
    """Sets of inputs that together exceed the last cache twice over, at most 32; small ones stay in it, as in a model."""
    first = case.fresh()
    size = sum(value.numel() * value.element_size() for value in first if isinstance(value, Tensor))
    rotation = LEAST_ROTATION if clock.device == "cuda" else 2 * last_cache()
    count = 1 if effort.seconds == 0 else min(MOST_SETS, max(2, -(-rotation // max(size, 1))))
    place = _anywhere if clock.device == "cpu" else lambda value: value
    return [(*map(place, inputs), *case.fixed) for inputs in (first, *(case.fresh() for _ in range(count - 1)))]


def _anywhere(value: Any) -> Any:
    """A copy of a tensor that begins anywhere in a page.

    A core mistakes a load for one of a store just before where their places in their pages agree. Left to the allocator, large
    tensors all lie in one such place or in another, and the ratio of two contenders was seen to differ by a tenth between runs.
    """
    if not isinstance(value, Tensor):
        return value
    page, line = 4096 // value.element_size(), 64 // value.element_size()
    begin = random.randrange(0, page, line)
    return value.new_empty(page + value.numel())[begin : begin + value.numel()].view(value.shape).copy_(value)


def error_share(got: Tensor, true: Tensor, naive: Tensor) -> float:
    """The largest error over what is allowed: twice the formula's own in this dtype, plus one unit in the last place."""
    unit = true.abs().max() * torch.finfo(got.dtype).eps
    allowed = 2 * (naive.double() - true).abs().max() + unit
    if got.shape != true.shape:
        return float("inf")
    return float(((got.double() - true).abs().max() / allowed).item())


def same_as(formula: Function) -> Callable[[Inputs], Callable[[Any], float]]:
    """Judge by a formula in plain PyTorch: its value in float64 is the truth, its error in the dtype of x the measure."""

    def judge(inputs: Inputs) -> Callable[[Any], float]:
        true = formula(*(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in inputs))
        naive = formula(*inputs)
        return lambda got: error_share(got, true, naive)

    return judge


@dataclass(frozen=True)
class Compiled:
    """The maker of a peer: `torch.compile` of a function, for one shape, in one graph. A quick run leaves it out."""

    function: Function

    def __call__(self) -> Function:
        """Compile; the first call of what is returned takes seconds."""
        old: Any = self.function
        own = FunctionType(old.__code__.replace(), old.__globals__, old.__name__, old.__defaults__, old.__closure__)
        return torch.compile(own, fullgraph=True, dynamic=False)  # a code object has room for few compilations


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median and its bootstrap interval; always the same for the same values."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - confidence) / 2
    return statistics.median(values), medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1]


def memory_rise(function: Function, inputs: Inputs, device: str) -> int | None:
    """By how many bytes memory rises during a call, at its peak: PyTorch's on a GPU, the process's on Linux, else None."""
    function(*inputs)
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function(*inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _give_back()  # memory that was freed but kept would hide a rise
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    except OSError:
        return None
    before = _status("VmRSS")
    function(*inputs)
    return max(0, _status("VmHWM") - before)


def _give_back() -> None:
    """Free memory goes back to the system, where the C library can do that."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def last_cache() -> int:
    """Bytes of the host's last cache; 32 MB where it is not told."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    found = [
        int(file.read_text().strip().removesuffix("K")) << 10 for file in sizes if file.read_text().strip()[-1] == "K"
    ]
    return max(found, default=32 << 20)


def circumstances(place: str) -> dict[str, Any]:
    """What numbers depend on: device, driver, versions, commit, date; nothing that names the machine."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = getattr(sys.modules.get(package), "__version__", None)
    root = Path(__file__).resolve().parent
    ours = _ask(
        "git", "ls-files", "--error-unmatch", "timing.py", cwd=root
    )  # an installed package may lie in another's
    status = _ask("git", "status", "--porcelain", "--untracked-files=no", "--", ".", "../kernels", cwd=root)
    gpu = torch.cuda.is_available() and place == "cuda"
    return {
        "place": place,
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", cwd=root) if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "commit": _ask("git", "rev-parse", "HEAD", cwd=root) if ours else None,
        "changed": status != "" if ours else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _ask(*command: str, cwd: Path) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return named[1].strip() if named else platform.processor() or platform.machine()


def append_row(file: Path, row: Row) -> None:
    """Append a row to a file of one JSON object a line; where the disk is full the file stays as it was.

    Raises:
        OSError: the row could not be written whole.
    """
    text = (json.dumps(row, separators=(",", ":"), default=_number) + "\n").encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:
        before = out.tell()
        written = 0
        try:
            written = out.write(text)
            os.fsync(out.fileno())
        finally:
            if 0 < written < len(text):
                os.ftruncate(out.fileno(), before)
    if written < len(text):
        raise OSError(errno.ENOSPC, "the disk is full", str(file))


def _number(value: Any) -> float:
    return float(value)
