"""The fixtures of the suites: `race` measures a case under pytest-benchmark and keeps its raw row.

pytest-benchmark reads a clock of ours that advances by what a round measured, on the host or on the device: so its
tables, its JSON and its comparisons show the same times as our rows.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent))  # the suites import the files beside them; the root stays off the path

from bars import rank
from lab import table
from lab.case import SHORT, Case, NotHere
from lab.clock import QUICK, REHEARSAL, Clock, DeviceClock, Effort, HostClock, Peaks, measure_peaks
from lab.memory import memory_rise
from lab.pairs import OURS, Race, interval, times
from lab.rows import Row, append_row, circumstances, file_of
from results import newest, read
from setting import INTERPRETED, PLACE, TINY

import steerfast as sf

LONGEST = 40.0  # seconds of rounds that a case may take in all its visits: ten rounds of the longest


def _date(text: str) -> str:
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a date such as 2026-01-02T03:04:05+00:00") from None
    return text


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("steerfast")
    group.addoption("--rows", type=Path, metavar="FOLDER", help="where raw rows go (default: benchmarks/results)")
    group.addoption("--quick", action="store_true", help="few short rounds, nothing compiled")
    group.addoption(
        "--eager", action="store_true", help="nothing compiled, which takes most of the time of a thorough run"
    )
    group.addoption("--deadline", type=float, default=float("inf"), help="seconds after which no further case starts")
    group.addoption(
        "--visits", type=int, default=1, help="measure each case in so many parts, far from each other (CPU)"
    )
    group.addoption(
        "--parts", type=int, default=1, help="how many processes share the effort; this is one of them (CPU)"
    )
    group.addoption("--series", type=_date, metavar="DATE", help="runs with the same one are one measurement")


class Ledger:
    """What a run measured, and what it did not: rows are written as they are measured, so that an interrupt keeps them."""

    def __init__(self, config: pytest.Config) -> None:
        self.thorough = not TINY and not config.getoption("--quick")
        self.clock: Clock = DeviceClock() if PLACE == "cuda" else HostClock()
        if config.getoption("--parts") > 1 and not config.getoption("--series"):
            raise pytest.UsageError("--parts: give the processes a --series, too, or their rows are not joined")
        self.visits, parts = map(config.getoption, ("--visits", "--parts")) if PLACE != "cuda" else (1, 1)
        effort = self.clock.thorough if self.thorough else REHEARSAL if TINY else QUICK
        effort = replace(effort, compile=effort.compile and not config.getoption("--eager"))
        self.effort: Effort = effort.shared(self.visits * parts)
        self.longest = LONGEST / parts
        self.origin = {**circumstances(PLACE), "quick": not self.thorough}
        self.origin["series"] = config.getoption("--series") or self.origin["date"]
        folder = config.getoption("--rows") or Path(__file__).parent / "results"
        self.file = file_of(folder, self.origin)
        self.earlier = _of_series(self.file, self.origin["series"]) if config.getoption("--series") else []
        self.rows: list[Row] = []
        self.unwritten: list[Row] = []
        self.deadline = time.monotonic() + config.getoption("--deadline")
        self.now = 0.0
        self.contests: list[Race] = []
        self.spent: Counter[str] = Counter()  # seconds of rounds, by case
        self.visits_left = 0
        self._peaks: dict[torch.dtype, Peaks] = {}
        self.planned: list[str] = []

    def cases(self) -> list[Row]:
        """A row for each case, with the rounds of all its visits, here and in earlier processes of the series."""
        here, visited = newest(self.rows), newest([*self.earlier, *self.rows])
        last = {(row["case"], row["run"]["place"]): row for row in self.rows}
        return [visited[key] if key in here else row for key, row in last.items()]

    def peaks(self, dtype: torch.dtype) -> Peaks:
        if dtype not in self._peaks:
            self._peaks[dtype] = measure_peaks(self.clock, dtype, self.effort)
        return self._peaks[dtype]

    def measure(self, contest: Race) -> None:
        """Visit a case: measure it, and keep the row whatever happens."""
        row, begin = contest.row, time.perf_counter()
        try:
            with torch.no_grad():
                contest.run()
        except BaseException as error:
            _note(row, error)
            raise
        finally:
            taken = time.perf_counter() - begin
            self.spent[row["case"]] += taken
            row["seconds"] = round(row["seconds"] + taken, 2)
            self.keep(row)
            row["seconds"] = 0.0

    def visit_again(self) -> None:
        """The further visits of every case, in turn: what a machine is like for some minutes, averages out.

        A case whose rounds are long is passed over where it has had its part of `LONGEST`.
        """
        self.visits_left = (self.visits - 1) * len(self.contests)
        for number in range(1, self.visits):
            for contest in list(self.contests):
                if time.monotonic() > self.deadline:
                    return
                if self.spent[contest.row["case"]] > self.longest * number / self.visits:
                    self.visits_left -= 1
                    continue
                try:
                    self.measure(contest)
                except Exception:
                    self.contests.remove(contest)
                    print(f"{contest.row['case']}: visit {number + 1} failed: {contest.row['error']}", flush=True)
                self.visits_left -= 1

    def keep(self, row: Row) -> None:
        row = copy.deepcopy({**row, "run": self.origin})
        self.rows.append(row)
        self.unwritten.append(row)
        while self.unwritten:
            try:
                append_row(self.file, self.unwritten[0])
            except OSError:
                return  # a full disk may have room again at the next row; the rest is printed at the end
            del self.unwritten[0]

    def later(self) -> float:
        """The clock that pytest-benchmark reads."""
        return self.now


def _of_series(file: Path, series: str) -> list[Row]:
    return [row for row in read([file]) if row["run"].get("series") == series] if file.exists() else []


def _note(row: Row, error: BaseException) -> None:
    """What ended a measurement early; a wrong answer is noted already."""
    if isinstance(error, KeyboardInterrupt):
        row["status"] = "interrupted"
    elif isinstance(error, Exception):
        row["status"], row["error"] = "failed", f"{type(error).__name__}: {error}"[:500]


LEDGER = pytest.StashKey[Ledger]()
LAST = ("test_hooks", "test_training", "test_engines")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEDGER] = Ledger(config)
    signal.signal(signal.SIGTERM, _end)
    if PLACE == "cpu":
        torch.set_num_threads(1)  # the clock counts the CPU time of all threads
    if PLACE == "cuda" or INTERPRETED:
        sf.use_backend("triton")


def _end(*_: Any) -> None:
    """What `timeout` sends ends a run like Ctrl-C, with its summary, which a second one does not cut short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ledger = config.stash[LEDGER]
    last = {stem: i for i, stem in enumerate(LAST)}
    items.sort(key=lambda item: (last.get(item.path.stem, -1), rank(_words(item), PLACE)))
    for item in items:
        group = item.path.stem.removeprefix("test_")
        item.add_marker(pytest.mark.benchmark(timer=ledger.later, group=group, disable_gc=False, warmup=False))


def _words(item: pytest.Item) -> set[str]:
    """What tells the op and the sizes of an item: where time runs out, it does so behind those with a bar."""
    parameters = item.callspec.params.items() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    sizes = {f"{name}={value}" for name, value in parameters if isinstance(value, int)}
    op = {word for _, value in parameters if isinstance(value, str) for word in value.split()}
    return sizes | (op or {item.path.stem.removeprefix("test_")})


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[LEDGER].planned = [item.nodeid for item in session.items]


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    done = yield
    session.config.stash[LEDGER].visit_again()
    return done


OUT_OF_TIME = "out of time: --deadline has passed"
_finished: set[str] = set()
_skipped: dict[str, list[str]] = {}  # reason -> cases


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.setdefault(reason.removeprefix("Skipped: "), []).append(report.nodeid)
    if report.when == "teardown":
        _finished.add(report.nodeid)


@pytest.fixture
def ledger(pytestconfig: pytest.Config) -> Ledger:
    return pytestconfig.stash[LEDGER]


@pytest.fixture(autouse=True)
def _in_time(ledger: Ledger) -> None:
    torch.manual_seed(0)
    if time.monotonic() > ledger.deadline:
        pytest.skip(OUT_OF_TIME)


@pytest.fixture
def race(benchmark: Any, ledger: Ledger) -> Callable[..., Row]:
    """`race(build, peers=, yardsticks=, memory=, sizes=)`: check, measure and keep a case; a wrong one of ours shows no time."""

    def run(
        build: Callable[[], Case],
        peers: dict[str, Any] | None = None,
        yardsticks: dict[str, Any] | None = None,
        memory: tuple[str, ...] = (),
        sizes: dict[str, int] | None = None,
    ) -> Row:
        try:
            case = build()
        except NotHere as reason:
            pytest.skip(str(reason))
        more = {"peers": {**case.peers, **(peers or {})}, "yardsticks": {**case.yardsticks, **(yardsticks or {})}}
        case = replace(case, **more)
        row: Row = {"case": case.name, "status": "failed"}
        begin = time.perf_counter()
        try:
            with torch.no_grad():
                contest = Race(case, ledger.clock, ledger.peaks(case.dtype), ledger.effort)
                row = contest.row
                row["suite"] = benchmark.group
                if contest.red:
                    pytest.fail(f"{case.name}: {row['missing'][OURS]}", pytrace=False)
                row["memory"] = {**_memory(case, memory, ledger.clock.device), **(sizes or {})}
        except BaseException as error:
            _note(row, error)
            ledger.keep(row)
            raise
        row["seconds"] = time.perf_counter() - begin
        ledger.measure(contest)
        _tell(benchmark, contest, ledger)
        if ledger.visits > 1:
            ledger.contests.append(contest)
        del contest
        if PLACE == "cuda":
            torch.cuda.empty_cache()
        return row

    return run


@pytest.fixture
def sample(benchmark: Any, ledger: Ledger) -> Callable[..., Row]:
    """`sample(name, once, rounds, values=)`: keep what times itself; `once` gives seconds by name, ours and baselines."""

    def run(
        name: str, once: Callable[[], dict[str, float]], rounds: int, values: Callable[[], dict[str, float]] = dict
    ) -> Row:
        row: Row = {"case": name, "suite": benchmark.group, "status": "ok", "clock": "wall time", "times": {}}

        def one() -> None:
            for each, seconds in once().items():
                row["times"].setdefault(each, []).append(seconds)
            ledger.now += row["times"][OURS][-1]

        try:
            benchmark.pedantic(one, rounds=min(rounds, ledger.effort.rounds), iterations=1)
            row["values"] = values()
        except BaseException as error:
            _note(row, error)
            raise
        finally:
            ledger.keep(row)
        return row

    return run


def _memory(case: Case, names: tuple[str, ...], device: str) -> dict[str, int]:
    """Bytes by which memory rises in a call of each of these: ours and baselines."""
    inputs = (*case.fresh(), *case.fixed)
    makers = {OURS: lambda: case.ours, **case.peers, **case.yardsticks}
    found = {name: memory_rise(makers[name](), inputs, device) for name in names}
    return {name: rise for name, rise in found.items() if rise is not None}


def _tell(benchmark: Any, contest: Race, ledger: Ledger) -> None:
    """The account of a visit to pytest-benchmark, whose clock advances by what each round measured of ours."""
    taken = iter(contest.row["times"][OURS])

    def one_round() -> None:
        ledger.now += next(taken)

    benchmark.extra_info.update({key: contest.row[key] for key in ("bytes", "operations", "floor", "copy", "product")})
    benchmark.pedantic(one_round, rounds=len(contest.row["times"][OURS]), iterations=1, warmup_rounds=0)


def _short(row: Row) -> str:
    """A row without bytes, operations and a floor."""
    if row["status"] != "ok":
        return f"{row['case']:44}{row['status']}: {row.get('error', '')}"
    return f"{row['case']:44}{1e3 * interval(times(row, OURS))[0]:10.4f}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    ledger, say = config.stash[LEDGER], terminalreporter.write_line
    if not ledger.rows and not ledger.planned:
        return
    terminalreporter.section("steerfast")
    say(f"{ledger.origin['device']}, torch {torch.__version__}, {ledger.clock.name}, place {PLACE}")
    for dtype, peaks in ledger._peaks.items():
        say(f"copy {peaks.copy / 1e9:.1f} GB/s, {SHORT[dtype]} product {peaks.product / 1e12:.3f} TFLOP/s")
    say(table.HEAD)
    for row in ledger.cases():
        say(table.line(row) if "floor" in row else _short(row))
    say(table.LEGEND)
    reasons: dict[str, list[str]] = {}
    for row in ledger.rows:
        for name, reason in row.get("missing", {}).items():
            reasons.setdefault(f"{name}: {reason}", []).append(row["case"])
    for reason, cases in reasons.items():
        say(f"not measured: {reason} ({cases[0] if len(cases) == 1 else f'{len(cases)} cases'})")
    for reason, names in _skipped.items():
        say(f"not measured: {', '.join(names)}: {reason}")
    if ledger.visits_left:
        say(f"not measured: {ledger.visits_left} further visits: the run ended before them")
    for name in ledger.planned:
        if name not in _finished:
            say(f"not measured: {name}: the run ended before it")
    if ledger.unwritten:
        say(f"{ledger.file} could not be written; {len(ledger.unwritten)} raw rows follow")
        for row in ledger.unwritten:
            say(json.dumps(row, default=float))
    elif ledger.rows:
        say(f"raw rows: {ledger.file}")
