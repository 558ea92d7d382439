"""The measuring itself: what it refuses, what it keeps, what it concludes. No test asserts how long something took."""

from __future__ import annotations

import argparse
import ast
import collections
import csv
import importlib.util
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import steerfast as sf
from steerfast import ops
from steerfast.cli import bench
from steerfast.cli.main import main

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
sys.path.append(str(BENCHMARKS))
import bars  # noqa: E402
import compare  # noqa: E402
import fits  # noqa: E402
import peers  # noqa: E402
import results  # noqa: E402
from lab import cases, clock, cpu_cases, memory, pairs, sae_cases  # noqa: E402
from lab.case import Case, NotHere, Stream, Within, same_as  # noqa: E402
from lab.clock import QUICK, REHEARSAL, Effort, HostClock, HostRunner, Pair, Peaks  # noqa: E402
from lab.goals import GOALS  # noqa: E402
from lab.methods import METHODS  # noqa: E402
from lab.pairs import AGAIN, OURS, Race, interval, is_calm, paired  # noqa: E402
from lab.rows import append_row, circumstances, file_of  # noqa: E402

PEAKS = Peaks(1e9, 1e10)
AT = Stream("cpu", torch.float32, 24)
EFFORT = replace(REHEARSAL, rounds=3, seconds=1.0)


def race(case: Case, **changes: object) -> Race:
    return Race(replace(case, **changes), HostClock(), PEAKS, EFFORT)


def doubled() -> Case:
    return Case("double", 192, 24, lambda: (AT.rows(3),), lambda x: 2 * x, same_as(lambda x: x + x))


# --- a race -----------------------------------------------------------------------------------------------------------


def test_a_wrong_answer_of_ours_is_red_and_nothing_is_timed():
    found = race(doubled(), ours=lambda x: 2.001 * x, peers={"eager": lambda: lambda x: x + x})
    assert found.red
    assert found.row["times"] == {}
    assert found.row["errors"][OURS] > 1
    assert "red" in found.row["missing"][OURS]


@pytest.mark.parametrize("answer", [lambda x: x + 1, lambda x: x * math.nan, lambda x: x[:1]])
def test_a_wrong_answer_of_a_peer_takes_its_time_away(answer):
    found = race(doubled(), peers={"wrong": lambda: answer, "right": lambda: lambda x: x + x})
    found.round()
    assert set(found.row["times"]) == {OURS, AGAIN, "right"}
    assert "red" in found.row["missing"]["wrong"]


def test_missing_and_failing_peers_are_named():
    def absent():
        import no_such_package_anywhere  # noqa: F401

    def elsewhere():
        raise NotHere("needs a GPU")

    def breaks():
        return lambda x: x @ x

    found = race(doubled(), peers={"absent": absent, "elsewhere": elsewhere, "breaks": breaks})
    assert found.row["missing"]["absent"] == "no_such_package_anywhere is not installed"
    assert found.row["missing"]["elsewhere"] == "needs a GPU"
    assert found.row["missing"]["breaks"].startswith("failed: RuntimeError")
    found.run()
    assert len(found.row["times"][OURS]) >= 3


def lengths(found: Race) -> set[int]:
    return {len(taken) for kind in pairs.KINDS for taken in found.row[kind].values()}


@pytest.mark.parametrize("at", range(1, 10))
def test_an_interrupt_in_a_round_leaves_whole_rounds(at, monkeypatch):
    found = race(doubled(), peers={"peer": lambda: lambda x: x + x})
    counter, mean = itertools.count(), pairs._mean

    def interrupted(seconds):
        if next(counter) == at:
            raise KeyboardInterrupt
        return mean(seconds)

    monkeypatch.setattr(pairs, "_mean", interrupted)  # six to a round
    with pytest.raises(KeyboardInterrupt):
        while True:
            found.round()
    assert lengths(found) == {at // 6}


class Busy(HostClock):
    """A clock on a core whose neighbour works whenever the pattern says so."""

    def __init__(self, pattern: list[bool]) -> None:
        super().__init__()
        self.pattern = itertools.cycle(pattern)
        self._least = 1.0  # there is nothing to learn

    def at_full_speed(self, lasting: float = 0.0) -> bool:
        return next(self.pattern)


def test_a_pair_waits_for_the_full_speed_and_is_retried_where_that_did_not_last():
    calls = 0

    def counted(x):
        nonlocal calls
        calls += 1

    patient, hasty = replace(REHEARSAL, patience=60.0), replace(REHEARSAL, patience=0.02)
    busy = Busy([False, False, True, False, True, True])  # waits twice, is disturbed, and succeeds
    two = busy.prepare(counted, [(1,)], patient), busy.prepare(counted, [(1,)], patient)
    assert busy.pair(*two, patient).calm
    assert calls == 4
    busy.pattern, busy._willing = itertools.cycle([False, True]), 0.0
    assert not busy.pair(*two, hasty).calm  # patience was over before it began
    busy.pattern, busy._willing, calls = itertools.cycle([False]), 1.0, 0
    assert not busy.pair(*two, hasty).calm
    assert calls == 2  # patience is over
    assert busy._willing == 0.5  # and wanes
    busy.pattern = itertools.cycle([True])
    assert busy.pair(*two, hasty).calm
    assert busy._willing == 1.0


@pytest.mark.parametrize(
    ("ours", "other", "lasting"), [(1e-4, 1e-4, 2e-4), (1e-4, 1e-3, 1e-3), (0.5, 1e-4, 2e-3), (0.0, 0.0, 2e-4)]
)
def test_the_bursts_of_a_pair_are_about_equally_long(ours, other, lasting):
    seen = []

    class Recorder:
        def __init__(self, taken, answer):
            self.taken, self.answer = taken, answer

        def burst(self, seconds):
            seen.append(seconds)
            return self.answer

    found = Busy([True]).pair(Recorder(ours, 1.0), Recorder(other, 2.0), replace(REHEARSAL, burst=2e-4))
    assert seen == [pytest.approx(lasting)] * 2
    assert found == (1.0, 2.0, True)


@pytest.mark.parametrize(("taken", "calls", "warm"), [(1e-4, 10, 1), (0.05, 1, 0), (0.0, 1, 0)])
def test_a_burst_is_as_many_calls_as_fit_and_one_to_warm_up(taken, calls, warm, monkeypatch):
    seen = []
    runner = HostRunner(seen.append, [(1,), (2,)], replace(REHEARSAL, burst=2e-4))
    assert len(seen) == 2  # one to warm up, one to know how long it takes
    runner.taken = taken
    del seen[:]
    monkeypatch.setattr(clock.time, "process_time", lambda: float(len(seen)))  # a call takes a second
    assert runner.burst(1e-3) == 1.0
    assert len(seen) == calls + warm
    assert set(seen) <= {1, 2}


def test_an_interrupt_in_a_run_leaves_what_is_known_of_its_rounds():
    found = Race(doubled(), Busy([False]), PEAKS, replace(EFFORT, least=3))
    at = itertools.count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "_now", lambda: 1 / 0 if next(at) == 5 else 0.0)
        with pytest.raises(ZeroDivisionError):
            found.run()
    (done,) = lengths(found)
    assert done > 3
    assert found.row["calm"] == dict.fromkeys((OURS, AGAIN), [False] * done)


@pytest.mark.parametrize(("pattern", "count"), [([True], 3), ([False], 12), ([True] * 6 + [False], 4)])
def test_rounds_go_on_until_enough_saw_the_full_speed_or_time_is_over(pattern, count):
    found = Race(doubled(), Busy(pattern), PEAKS, EFFORT)
    with pytest.MonkeyPatch.context() as patch:
        now = itertools.count()
        patch.setattr(pairs, "_now", lambda: next(now) / 13)  # a round takes a thirteenth of the second
        found.run()
    assert lengths(found) == {count}
    assert found._undisturbed() >= 3 or not found._undisturbed()


def test_of_a_rounds_pairs_the_calm_ones_count():
    found = race(doubled())
    calm, busy = [(1.0, 2.0, True), (9.0, 9.0, False), (3.0, 4.0, True)], [(1.0, 3.0, False)] * 3
    met = itertools.starmap(Pair, calm + busy)
    found._clock = types.SimpleNamespace(pair=lambda ours, baseline, effort: next(met))
    found._often = lambda name: 3
    found.round()
    found.round()
    assert found.row["times"] == {OURS: [2.0, 1.0], AGAIN: [3.0, 3.0]}
    assert found.row["beside"] == {OURS: [2.0, 1.0], AGAIN: [2.0, 1.0]}
    assert found.row["calm"] == {OURS: [True, False], AGAIN: [True, False]}
    assert found._undisturbed() == 1


@pytest.mark.parametrize(
    ("ours", "again", "eager", "often"),
    [
        (0.0, 0.0, 0.0, {AGAIN: 1, "eager": 1}),
        (1e-4, 1e-4, 1e-4, {AGAIN: 3, "eager": 3}),  # six bursts of 0.2 ms
        (2e-3, 2e-3, 4e-3, {AGAIN: 1, "eager": 1}),
        (1e-4, 1e-4, 0.3198, {AGAIN: 100, "eager": 1}),  # an eighth of the pair with the slowest
        (0.3, 0.3, 0.3, {AGAIN: 1, "eager": 1}),
    ],
)
def test_baselines_share_the_time_of_a_round(ours, again, eager, often):
    found = race(doubled())
    found.effort = replace(REHEARSAL, burst=2e-4 if ours else 0.0)
    found._runners = {name: HostRunner(abs, [(1,)], REHEARSAL) for name in (OURS, AGAIN, "eager")}
    for name, taken in {OURS: ours, AGAIN: again, "eager": eager}.items():
        found._runners[name].taken = taken
    assert {name: found._often(name) for name in (AGAIN, "eager")} == often


def test_large_inputs_lie_at_many_places_in_their_pages():
    case = cases.add(Stream("cpu", torch.float32, 64), 16)
    sets = pairs._sets(case, HostClock(), QUICK)
    places = {inputs[0].data_ptr() % 4096 for inputs in sets}
    assert len(places) > 8
    assert {place % 64 for place in places} == {0}
    assert all(inputs[0].is_contiguous() for inputs in sets)


def test_a_slow_case_keeps_its_first_round_and_gets_the_least_number():
    found = Race(doubled(), Busy([True]), PEAKS, replace(EFFORT, least=2))
    with pytest.MonkeyPatch.context() as patch:
        now = itertools.count()
        patch.setattr(pairs, "_now", lambda: float(next(now)))
        found.run()
        assert lengths(found) == {2}
        found.run()  # a visit forgets the one before
    assert lengths(found) == {2}


def test_every_visit_gives_free_memory_back_before_its_rounds(monkeypatch):
    found, seen = Race(doubled(), Busy([True]), PEAKS, EFFORT), []
    monkeypatch.setattr(pairs, "give_back", lambda: seen.append(lengths(found)))
    for _ in range(2):
        found.run()
        assert lengths(found) == {3}
    assert seen == [{0}, {0}]


def test_a_visit_makes_its_part_of_the_effort():
    part = Effort(rounds=60, seconds=6.0, least=3).shared(8)
    assert (part.rounds, part.seconds, part.least) == (8, 0.75, 1)


def test_the_core_is_known_by_its_fastest_moment():
    host = HostClock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "_fixed_work", iter([1.0, 1.5, 1.7, 0.9, 1.5]).__next__)
        assert [host.at_full_speed() for _ in range(5)] == [True, True, False, True, False]


@pytest.mark.parametrize(("last", "calm"), [(1.0, True), (2.0, False)])
def test_a_core_is_looked_at_for_as_long_as_was_asked(last, calm, monkeypatch):
    work, now = iter([1.0] * 9 + [last]), itertools.count()
    monkeypatch.setattr(clock, "_fixed_work", lambda: next(work))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(now)))
    assert HostClock().at_full_speed(9.5) is calm
    assert next(work, None) is None


def test_a_context_is_entered_around_a_turn_and_left_after_it():
    inside, seen = [], []
    around = Within(lambda x: (seen.append(len(inside)), 2 * x)[1], lambda: _Counted(inside))
    found = race(doubled(), ours=around)
    found.round()
    assert set(seen) == {1}
    assert inside == []


class _Counted:
    def __init__(self, inside):
        self.inside = inside

    def __enter__(self):
        self.inside.append(1)

    def __exit__(self, *_):
        self.inside.pop()


def test_the_floor_is_the_larger_of_bytes_and_operations():
    assert PEAKS.floor(doubled()) == 192 / 1e9
    assert PEAKS.floor(replace(doubled(), operations=1e6)) == 1e6 / 1e10


def test_sets_of_inputs_exceed_the_cache():
    case = replace(doubled(), fresh=lambda: (torch.zeros(1 << 20),))
    sets = pairs._sets(case, HostClock(), QUICK)
    assert len(sets) * (4 << 20) >= min(2 * memory.last_cache(), pairs.MOST_SETS * (4 << 20))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of resident memory")
def test_memory_is_that_of_the_call():
    x = torch.ones(4 << 20)
    rise = memory.memory_rise(lambda x: (x + 1) * 2, (x,), "cpu")
    assert 1.9 * x.nbytes < rise < 2.3 * x.nbytes


# --- every case -------------------------------------------------------------------------------------------------------

CASES = {
    "add": lambda: cases.add(AT, 5),
    "add_rms_norm": lambda: cases.add_rms_norm(AT, 5),
    "affine": lambda: cases.affine(AT, 5),
    "ops.amplify": lambda: cases.op(AT, 5, "amplify", 2),
    "ops.calibrate": lambda: cases.op(AT, 5, "calibrate", 2),
    "ops.ablate": lambda: cases.op(AT, 5, "ablate", 2),
    "slots": lambda: cases.subspace(AT, 5, "amplify", 3, slots=5),
    "edit_features": lambda: sae_cases.edit_features(AT, 5, 100, count=3),
    **{f"flow {name}": lambda name=name: cases.flow(AT, 5, 3, method=name) for name in cases.PLAIN_STEPS},
    "sae_encode": lambda: sae_cases.sae_encode(AT, 5, 300, 7),
    "sae_encode_threshold": lambda: sae_cases.sae_encode_threshold(AT, 5, 300, 32),
    "sae_edit_topk": lambda: sae_cases.sae_edit_topk(AT, 5, 300, 9, count=3),
    "sae_decode": lambda: sae_cases.sae_decode(AT, 5, 300, 7),
    **{name: lambda name=name: cases.subspace(AT, 5, name, 2) for name in METHODS},
    **{f"goal {key}": lambda goal=goal: goal.tiny().case(AT) for key, goal in GOALS.items()},
}


@pytest.mark.parametrize("name", CASES)
def test_ours_and_every_baseline_of_a_case_give_the_same_answer(name):
    found = race(CASES[name]())
    assert not found.red
    assert set(found.row["missing"]) <= {"torch.compile", "unsteered, torch.compile"}
    found.round()
    assert lengths(found) == {1}


def test_a_case_says_at_least_the_bytes_of_its_inputs_and_output():
    case = cases.subspace(AT, 5, "amplify", 2)
    assert case.bytes == (2 * 5 + 2) * 24 * 4
    assert case.operations == 4 * 5 * 24 * 2


# --- rows -------------------------------------------------------------------------------------------------------------


def run(*arguments: str, **changes: object) -> subprocess.Popen:
    environment = {**os.environ, "STEERFAST_BENCH": "tiny", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.Popen(
        command, cwd=BENCHMARKS, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **changes
    )


def rows_in(folder: Path) -> list[dict]:
    return results.read([folder]) if folder.exists() else []


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("rows")
    done = run("test_add.py", "test_scaling.py", "-k", "test_add or tokens or rank", "--rows", str(folder))
    text, _ = done.communicate(timeout=280)
    assert done.returncode == 0, text
    return folder, text


@pytest.mark.slow
def test_a_run_keeps_a_row_for_each_case(rehearsed):
    folder, text = rehearsed
    rows = rows_in(folder)
    assert {row["case"] for row in rows} >= {"add slots=2 n=3 d=40 fp16", "scaling rank, amplify = 17"}
    for row in rows:
        assert row["status"] == "ok"
        assert row["times"][OURS]
        assert set(row["run"]) >= {"device", "driver", "versions", "commit", "date", "place"}
        assert row["run"]["place"] == "tiny"
        assert row["case"] in text
    assert "not measured: hotwire, in place: hotwire's kernel needs a GPU" in text


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_measured_and_names_the_rest(tmp_path):
    running = run("test_scaling.py", "test_add.py", "--rows", str(tmp_path))
    deadline = time.monotonic() + 120
    while not rows_in(tmp_path) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    text, _ = running.communicate(timeout=60)
    assert running.returncode != 0
    kept = rows_in(tmp_path)
    assert kept
    assert kept[0]["case"] in text
    assert "test_add.py::test_add[2-3]: the run ended before it" in text


@pytest.mark.slow
def test_on_a_full_disk_the_rows_are_printed(tmp_path):
    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))  # a row begins to be written and does not fit

    text, _ = run("test_add.py", "-s", "--rows", str(tmp_path), preexec_fn=full).communicate(timeout=120)
    printed = [json.loads(line) for line in text.splitlines() if line.startswith('{"case"')]
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [0]
    assert [row["case"] for row in printed] == ["add slots=2 n=3 d=40 fp16"]
    assert printed[0]["times"][OURS]
    assert "could not be written" in text
    assert rows_in(tmp_path) == []


@pytest.mark.slow
def test_visits_come_in_turn_and_their_rounds_add_up(tmp_path):
    flags = "-k", "test_add or test_affine", "--rows", str(tmp_path), "--visits", "2"
    text, _ = run("test_add.py", "test_subspace.py", *flags).communicate(timeout=120)
    rows = rows_in(tmp_path)
    assert [row["case"] for row in rows] == ["add slots=2 n=3 d=40 fp16", "affine n=3 d=40 fp16"] * 2
    together = results.newest(rows)["add slots=2 n=3 d=40 fp16", "tiny"]
    assert together["times"][OURS] == rows[0]["times"][OURS] + rows[2]["times"][OURS]
    assert len(rows[0]["times"][OURS]) == len(rows[2]["times"][OURS]) == 1  # a visit forgets the one before
    assert text.count("affine n=3 d=40 fp16") == 1
    assert "further visits" not in text


@pytest.fixture(scope="module")
def suites() -> types.ModuleType:
    found = importlib.util.spec_from_file_location("conftest_of_the_benchmarks", BENCHMARKS / "conftest.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def options(folder: Path, **changes: object) -> types.SimpleNamespace:
    found = {
        "--quick": False,
        "--eager": False,
        "--rows": folder,
        "--deadline": math.inf,
        "--visits": 1,
        "--parts": 1,
        "--series": None,
    }
    found |= {f"--{name}": value for name, value in changes.items()}
    return types.SimpleNamespace(getoption=found.__getitem__)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU needs one process")
def test_processes_share_the_effort(suites, tmp_path):
    ledger = suites.Ledger(options(tmp_path, visits=12, parts=2, series="2026-01-02T03:04:05+00:00"))
    assert ledger.effort == HostClock.thorough.shared(24)
    assert ledger.longest == suites.LONGEST / 2
    with pytest.raises(pytest.UsageError, match="--series"):
        suites.Ledger(options(tmp_path, parts=2))
    with pytest.raises(argparse.ArgumentTypeError, match="got 'foo'"):
        suites._date("foo")


def test_a_case_that_fails_in_a_later_process_shows_no_time(suites, tmp_path):
    ledger = suites.Ledger(options(tmp_path))
    good = {"case": "a", "status": "ok", "times": {OURS: [1.0]}, "run": ledger.origin}
    bad = {"case": "a", "status": "red", "times": {}, "run": ledger.origin}
    ledger.earlier, ledger.rows = [good], [bad]
    assert ledger.cases() == [bad]
    ledger.rows = [good]
    assert ledger.cases()[0]["times"] == {OURS: [1.0, 1.0]}


def test_a_case_of_long_rounds_is_passed_over_where_it_had_its_part(suites):
    ledger, order = object.__new__(suites.Ledger), []
    quick, slow = (types.SimpleNamespace(row={"case": name}) for name in ("quick", "slow"))

    def measure(contest):
        order.append(contest.row["case"])
        ledger.spent[contest.row["case"]] += 10.0 if contest is slow else 0.1

    ledger.visits, ledger.deadline, ledger.longest, ledger.measure = 6, math.inf, 30.0, measure
    ledger.contests, ledger.spent = [quick, slow], collections.Counter(slow=10.0, quick=0.1)
    ledger.visit_again()
    assert order == ["quick", "quick", "slow", "quick", "quick", "slow", "quick"]
    assert ledger.visits_left == 0


@pytest.mark.slow
def test_processes_of_one_series_are_one_measurement(tmp_path):
    flags = "-k", "test_add", "--rows", str(tmp_path), "--series", "2026-01-02T03:04:05+00:00", "--parts", "2"
    for _ in range(2):
        text, _ = run("test_add.py", *flags).communicate(timeout=120)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("2026-01-02-tiny-")
    first, second = rows_in(tmp_path)
    together = results.newest([first, second])["add slots=2 n=3 d=40 fp16", "tiny"]
    assert together["times"][OURS] == first["times"][OURS] + second["times"][OURS]
    assert f"{1e3 * interval(together['times'][OURS])[0]:.4f}" in text  # the last process shows the rounds of both


@pytest.mark.slow
def test_a_deadline_names_what_it_left_out(tmp_path):
    text, _ = run("test_add.py", "--rows", str(tmp_path), "--deadline", "0").communicate(timeout=120)
    assert re.search(r"not measured: \S*test_add\[2-3\]: out of time", text)


def test_a_row_is_written_whole_or_not_at_all(tmp_path):
    with pytest.raises(OSError, match="No space"):
        append_row(Path("/dev/full"), {"case": "a"})
    file = tmp_path / "rows.jsonl"
    append_row(file, {"case": "a", "value": torch.tensor(2.0)})
    append_row(file, {"case": "b"})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"case": "a", "value": 2.0}, {"case": "b"}]


RUN = {"place": "cpu", "device": "test", "date": "2026-01-01T00:00:00+00:00", "commit": "c", "changed": False, "versions": {},
       "driver": None, "threads": 1, "quick": False}  # fmt: skip


def row(case: str, seed: int = 0, slower: float = 1.0, noise: float = 0.01, **changes: object) -> dict:
    draw = random.Random(seed)

    def times(middle: float) -> list[float]:
        return [middle * draw.lognormvariate(0, noise) for _ in range(25)]

    made = {"case": case, "suite": "add", "status": "ok", "floor": 1e-3, "bytes": 1e6, "operations": 1e6, "copy": 1e9,
            "product": 1e9, "times": {OURS: times(2e-3 * slower), AGAIN: times(2e-3 * slower), "eager": times(3e-3)},
            "errors": {OURS: 0.1, "eager": 0.1}, "missing": {}, "memory": {"ours": 10, "output": 8}, "run": RUN}  # fmt: skip
    made.update(changes)
    taken = made["times"]
    return {
        "beside": {name: list(taken[OURS]) for name in taken},
        "calm": {name: [True] * len(taken[name]) for name in taken},
        **made,
    }


def disturb(made: dict, name: str, rounds: slice, by: float = 2.0) -> dict:
    """A row in whose rounds the pairs with a baseline met a slow core, which slowed that one alone."""
    for i in range(25)[rounds]:
        made["times"][name][i] *= by
        made["calm"][name][i] = False
    return made


def test_reading_skips_a_line_cut_short_and_takes_the_newest(tmp_path, capsys):
    new = {**RUN, "date": "2026-02-01T00:00:00+00:00"}
    quick = {**RUN, "date": "2026-03-01T00:00:00+00:00", "quick": True}
    lines = [
        row("a", run=new, floor=2.0),
        row("a", floor=1.0),
        row("a", run=quick, floor=3.0),
        row("b", status="red", times={}),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"case": "c", "ti')
    found = results.newest(results.read([tmp_path]))
    assert "line 5: no row; skipped" in capsys.readouterr().err
    assert set(found) == {("a", "cpu")}
    assert found["a", "cpu"]["floor"] == 2.0
    with pytest.raises(FileNotFoundError, match="does not exist; give a file"):
        results.read([tmp_path / "nowhere"])


def test_the_rounds_of_the_passes_of_a_series_add_up():
    runs = [{**RUN, "date": f"2026-01-01T00:0{i}:00+00:00", "series": "one" if i < 2 else "other"} for i in range(3)]
    first, second, other = (row("a", seed, run=run) for seed, run in enumerate(runs))
    first["times"]["late"] = second["times"]["early"] = [1.0] * 25
    found = results.newest([first, second])["a", "cpu"]
    assert set(found["times"]) == {OURS, AGAIN, "eager"}  # what one pass lacks could not be paired
    assert found["times"][OURS] == first["times"][OURS] + second["times"][OURS]
    assert results.newest([first, second, other])["a", "cpu"]["times"] == other["times"]


@pytest.mark.parametrize(("disturbed", "calm"), [(15, True), (16, False)])
def test_disturbed_pairs_count_only_where_too_few_others_are(disturbed, calm):
    found = disturb(row("a", noise=0.0), "eager", slice(disturbed))
    assert is_calm(found, OURS)
    assert is_calm(found, "eager") is is_calm(found, OURS, "eager") is calm
    assert interval(pairs.times(found, "eager"))[0] == pytest.approx(3e-3 if calm else 6e-3)
    assert interval(paired(found, "eager", OURS))[0] == pytest.approx(1.5 if calm else 3.0)


def test_baselines_that_did_not_meet_are_compared_by_way_of_ours():
    found = row("a", times={OURS: [1.5] * 25, "a": [3.0] * 25, "b": [8.0] * 25})
    found["beside"] = {OURS: [1.5] * 25, "a": [1.0] * 25, "b": [2.0] * 25}  # the core was slow when ours met b
    assert set(paired(found, "a", OURS)) == {3.0}
    assert set(paired(found, "b", OURS)) == {4.0}
    assert set(paired(found, OURS, "b")) == {0.25}
    assert set(paired(found, "a", "b")) == {0.75}
    assert set(pairs.pairs(found, OURS, "b")) == {(1.5, 6.0)}


def test_baselines_that_were_never_calm_in_one_round_are_compared_over_all():
    found = disturb(disturb(row("a", noise=0.0), AGAIN, slice(13)), "eager", slice(13, 25))
    assert is_calm(found, AGAIN)
    assert is_calm(found, "eager")
    assert not is_calm(found, AGAIN, "eager")
    assert len(paired(found, AGAIN, "eager")) == 25
    del found["calm"], found["beside"]  # what times itself knows neither
    assert is_calm(found, OURS)
    assert pairs.times(found, OURS) == found["times"][OURS]
    both = zip(found["times"]["eager"], found["times"][OURS], strict=True)
    assert paired(found, "eager", OURS) == [a / b for a, b in both]
    del found["times"]["eager"][-1]
    with pytest.raises(ValueError, match="zip"):
        paired(found, "eager", OURS)


def test_few_rounds_are_calm_if_all_are():
    few = row("a", times={OURS: [1.0] * 3, "eager": [2.0] * 3})
    assert is_calm(few, OURS, "eager")
    few["calm"]["eager"][1] = False
    assert not is_calm(few, OURS, "eager")


def test_the_committed_results_can_be_read():
    found = bars.verdicts(results.read([results.FOLDER]))
    assert sum(verdict.value is not None for verdict in found) > 10


def test_results_of_the_long_runs_are_rows_too(tmp_path):
    head = {"date": "2026-01-02", "processor": "test", "versions": {}}
    seconds = {"steerfast": [1.0], "sparsify": [2.0]}
    (tmp_path / "sae_training.json").write_text(json.dumps({**head, "missing": {"SAELens": "no"}, "seconds": seconds}))
    (tmp_path / "sae_defence.json").write_text("{}")
    found = results.read([tmp_path])
    assert set(results.newest(found)) == {("sae trainer", "cpu")}
    outcomes = {v.bar.words: (v.outcome, v.value[0]) for v in bars.verdicts(found) if v.value}
    assert outcomes["training: sparsify's time over ours"] == ("met", 2.0)


# --- what is concluded from rows --------------------------------------------------------------------------------------


def test_the_interval_holds_the_median_of_what_was_drawn():
    draw = random.Random(1)
    inside = 0
    for _ in range(200):
        _, low, high = interval([draw.gauss(1, 0.1) for _ in range(25)])
        inside += low <= 1 <= high
    assert inside >= 180  # of 190 expected
    assert interval([2.0]) == (2.0, 2.0, 2.0)


def test_a_drift_of_the_machine_leaves_a_paired_ratio_alone():
    drift = [1 + 0.5 * i / 24 for i in range(25)]
    made = row("a", times={OURS: [2 * v for v in drift], "eager": [3 * v for v in drift]})
    assert interval(paired(made, "eager", OURS)) == pytest.approx((1.5, 1.5, 1.5))


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("over: eager | ours", 1.5), ("above: eager | ours", 1e-3), ("time: eager", 3e-3), ("floor", 2.0), ("copy", 0.5),
        ("memory: ours | output", 1.25), ("beside: 1.5", 5e-4),
    ],
)  # fmt: skip
def test_bars_measure_what_they_say(measure, value):
    made = row("a", noise=0.0)
    assert bars.samples(made, measure)[0] == pytest.approx(value)
    met = bars.judge(bars.Bar("1", "cpu", "a", measure, f">= {0.9 * value}", "w"), {("a", "cpu"): made})
    missed = bars.judge(bars.Bar("1", "cpu", "a", measure, f"<= {0.9 * value}", "w"), {("a", "cpu"): made})
    assert (met.outcome, missed.outcome) == ("met", "MISSED")


def test_a_bar_may_be_about_two_cases():
    rows = {("a", "cpu"): row("a", noise=0.0), ("b", "cpu"): {**row("b", noise=0.0), "floor": 8e-4}}
    bar = bars.Bar("1", "cpu", "b", "beyond: a", "<= 0.51", "w")
    assert bars.judge(bar, rows).value == pytest.approx((0.5, 0.5, 0.5))
    del rows["a", "cpu"]
    assert bars.judge(bar, rows).outcome == "not measured yet"


def test_suites_run_in_the_order_of_the_bars():
    ranks = [
        bars.rank(words, "cuda") for words in ({"add", "n=8192"}, {"amplify", "k=64", "n=8192"}, {"sae_encode", "n=16"})
    ]
    assert ranks == sorted(ranks)
    assert bars.rank({"affine", "n=8192"}, "cuda") == sum(bar.place == "cuda" for bar in bars.bars())


def test_a_bar_without_its_row_peer_or_place_is_not_measured_yet():
    rows = {("a", "tiny"): row("a"), ("b", "cpu"): row("b")}
    for case, measure in (("a", "floor"), ("b", "over: sparsify | ours"), ("b", "value: x"), ("c", "floor")):
        assert bars.judge(bars.Bar("1", "cpu", case, measure, "<= 1", "w"), rows).outcome == "not measured yet"
    with pytest.raises(ValueError, match="unknown measure"):
        bars.samples(row("a"), "colour: red")


def test_a_bar_holds_on_the_worse_of_the_processors_that_measured_it_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(device: str, seconds: float, day: int) -> results.Row:
        run = RUN | {"device": device, "date": f"2026-01-{day:02}T00:00:00+00:00"}
        return row("a", run=run, times={"ours": [seconds] * 3, "eager": [1.0] * 3})

    rows = [measured("one", 0.7, 9), measured("one", 0.5, 10), measured("two", 0.6, 12), measured("three", 0.9, 2)]
    for limit, value, device in (("<= 0.55", 0.6, "two"), (">= 0.55", 0.5, "one")):
        monkeypatch.setattr(
            bars, "bars", lambda limit=limit: [bars.Bar("1", "cpu", "a", "over: ours | eager", limit, "w")]
        )
        (verdict,) = bars.verdicts(rows)
        assert (verdict.outcome, verdict.value[0], verdict.device) == ("MISSED", value, device)
    assert bars.verdicts([])[0].outcome == "not measured yet"


def template(name: str) -> str:
    return re.sub(r"(?<==)[\w]+", "#", re.sub(r"steps=\d+|(?<=flow )\w+", "#", name)).replace("fp32", "bf16")


def test_rows_of_a_processor_held_to_fewer_instructions_have_a_name_and_a_file_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for limit in ("ATEN_CPU_CAPABILITY", "NUMBA_CPU_NAME"):
        monkeypatch.delenv(limit, raising=False)
    free = circumstances("cpu") | {"series": "2026-11-30T00:00:00+00:00"}
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    held = circumstances("cpu") | {"series": "2026-11-30T00:00:00+00:00"}
    assert held["device"] == f"{free['device']} held to avx2"
    assert file_of(tmp_path, held).name == file_of(tmp_path, free).name.replace(".jsonl", "-held-to-avx2.jsonl")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_in_place_does_the_same_work_again_on_what_it_left(dtype: torch.dtype) -> None:
    case = cpu_cases.op_in_place(replace(AT, dtype=dtype), 5)
    inputs = (*case.fresh(), *case.fixed)
    before = inputs[0].clone()
    judge = case.judge(inputs)
    first = case.ours(*inputs)
    assert first is inputs[0]
    assert not torch.equal(first, before)
    assert judge(first) <= 1
    assert judge(case.ours(*inputs)) <= case.slack
    for name, make in case.peers.items():
        assert judge(make()(*inputs)) <= case.slack, name


def test_every_bar_names_a_case_that_is_measured():
    """By the form of its name: the sizes of a GPU's cases cannot be built here."""
    forms = {template(build().name) for build in CASES.values()}
    on_a_cpu = [
        cpu_cases.add_with_rows(AT, 3), cpu_cases.op(AT, 3, "amplify"), cpu_cases.op_in_place(AT, 3),
        cpu_cases.bank(AT, 3, "ablate", 1), cpu_cases.bank(AT, 3, "amplify", 8), cpu_cases.owners(AT, 3, 8),
    ]  # fmt: skip
    forms |= {template(f"{case.name}{road}") for case in on_a_cpu for road in ("", " compiled")}
    forms |= {template(case.name) for case in (cpu_cases.add(AT, 3), cpu_cases.affine(AT, 3))}
    source = "\n".join(path.read_text() for path in BENCHMARKS.glob("*.py"))
    for bar in bars.bars():
        sign, limit = bar.limit.split()
        assert sign in ("<=", ">=")
        float(limit)
        assert bar.place in ("cuda", "cpu")
        assert bar.measure.partition(":")[0] in bars.__doc__
        if bar.case in AWAITED or template(bar.case) in forms:
            continue
        plain = re.split(r"[=\d]| decode| reads| edits| lora", bar.case)[0].strip().removesuffix(" n")
        assert plain in source, f"no suite measures {bar.case!r}"


FORMS = {f"vllm soak {form}" for form in ("plain", "lora", "ngram", "draft", "tensor", "data", "pipeline")}
AWAITED = {"vllm host time", "vllm memory", "sae trained", "sae explain", *FORMS}
"""Figures that tests or long runs state; a row with this case and `values` says them here."""


def test_the_table_of_bars_names_every_issue_with_numbers():
    with bars.TABLE.open() as file:
        assert {line["issue"] for line in csv.DictReader(file)} == {*"2345678", "23"}


def test_bars_as_a_table(tmp_path, capsys):
    append_row(tmp_path / "rows.jsonl", row("hook host time", times={OURS: [2e-5], "bare module": [1e-5]}))
    append_row(tmp_path / "rows.jsonl", row("import steerfast", times={OURS: [1.0]}))
    assert bars.main([str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert re.search(r"hook and add on a trivial module.*1\.00e-05.*met", text)
    assert re.search(r"import steerfast over import torch.*MISSED", text)
    assert f"{len(bars.bars())} bars: 1 met, 1 MISSED" in text
    assert bars.main([str(tmp_path), "--measured"]) == 1
    assert "2 bars: 1 met, 1 MISSED, 0 not measured yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slower", "noise", "outcome"),
    [(1.0, 0.01, "same"), (1.2, 0.01, "SLOWER"), (0.8, 0.01, "faster"), (1.1, 0.5, "same")],
)
def test_a_regression_is_what_noise_does_not_explain(tmp_path, slower, noise, outcome):
    old, new = {("a", "cpu"): row("a", 1, 1.0, noise)}, {("a", "cpu"): row("a", 2, slower, noise)}
    changes, _ = compare.compare(old, new)
    assert [change.outcome for change in changes] == [outcome]
    for name, rows in (("old", old), ("new", new)):
        append_row(tmp_path / f"{name}.jsonl", rows["a", "cpu"])
    assert compare.main([str(tmp_path / "old.jsonl"), str(tmp_path / "new.jsonl")]) == (outcome == "SLOWER")


def test_a_calm_run_is_not_compared_with_a_disturbed_one():
    calm, busy = (disturb(row("a", noise=0.0), "eager", slice(rounds)) for rounds in (15, 16))
    assert is_calm(calm, OURS, "eager")
    assert not is_calm(busy, OURS, "eager")
    assert compare.change(calm, busy, "eager").ratio == pytest.approx(1.0)


def test_what_cannot_be_compared_is_named():
    other = row("b", run={**RUN, "device": "other"})
    lone = row("c", times={OURS: [1.0], AGAIN: [1.0]})
    old = {("b", "cpu"): row("b"), ("c", "cpu"): lone, ("d", "cpu"): row("d")}
    new = {("a", "cpu"): row("a"), ("b", "cpu"): other, ("c", "cpu"): lone}
    changes, without = compare.compare(old, new)
    assert changes == []
    assert [reason.partition(":")[0] for reason in without] == ["a", "b", "c", "d"]


def test_how_far_a_repeat_moved_becomes_a_row(tmp_path):
    for case, slower, disturbed in (("a", 1.1, slice(20)), ("b", 1.02, slice(0))):
        append_row(tmp_path / "a.jsonl", row(case, noise=0.0))
        append_row(tmp_path / "b.jsonl", disturb(row(case, slower=slower, noise=0.0), "eager", disturbed, by=1.0))
    out = tmp_path / "out.jsonl"
    assert compare.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--repeat", "--out", str(out)]) == 0
    values = results.read([out])[0]["values"]
    assert (values["largest_move"], values["largest_calm_move"]) == pytest.approx((0.1, 0.02))
    assert (values["pairs"], values["calm_pairs"]) == (2, 1)


def test_exponents_and_bends():
    sizes = [2**i for i in range(12)]
    assert fits.fit(sizes, [3 * s**1.5 for s in sizes]).below == pytest.approx(1.5)
    law = fits.fit(sizes, [max(64.0, s) for s in sizes])
    assert law.bend == pytest.approx(64, rel=0.2)
    assert (law.below, law.above) == pytest.approx((0.0, 1.0), abs=0.05)
    with pytest.raises(ValueError, match="expected two or more, all positive"):
        fits.fit([1], [1])


@pytest.mark.slow
def test_both_forms_of_the_published_flow_go_the_same_way():
    at = Stream("cpu", torch.float32, 48)
    x = torch.randn(5, 48)
    authors, by_hand = (make()(x) for make in peers.published_flow(at, components=600).values())
    assert (authors - x).norm() > 0.2 * x.norm()
    torch.testing.assert_close(by_hand, authors, atol=1e-4, rtol=1e-4)


def test_the_report_needs_nothing_beside_it(rehearsed, tmp_path):
    pytest.importorskip("matplotlib")
    import report

    folder, _ = rehearsed
    append_row(
        tmp_path / "more.jsonl", row("engine rows=1 static", suite="engines", times={OURS: [2.0], "unsteered": [1.0]})
    )
    assert report.main([str(folder), str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', page)
    assert "add slots=2 n=3 d=40 fp16" in page
    assert "not measured yet" in page
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names >= {"roofline-tiny.png", "peers-tiny.png", "overhead-cpu.png", "scaling-tiny-amplify-against-rank.png"}
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG") for name in names)
    assert page.count("<img") == len(names)


def test_a_report_of_nothing_says_so(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import report

    assert report.main([str(tmp_path)]) == 2
    assert "no measured rows" in capsys.readouterr().err


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch) -> dict:
    """`steerfast bench` at tiny sizes, for the blinking of an eye."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(bench.SIZES, "cpu", (24, (1, 5), 300, 1 << 14, 32))
    timed = bench._timed
    monkeypatch.setattr(bench, "_timed", lambda function, inputs, seconds: timed(function, inputs, 1e-3))


def test_the_command_measures_every_op_and_keeps_rows(tiny, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    assert main(["bench", "--quick", "--out", str(file)]) == 0
    text, found = capsys.readouterr().out, [json.loads(line) for line in file.read_text().splitlines()]
    public = {name for name in ops.__all__ if not name.endswith("_") and not name.startswith("subspace")}
    assert collections.Counter(row["case"].split()[0] for row in found) == dict.fromkeys(public, 2)
    assert "loreft k=8 n=5 d=24 float32" in {row["case"] for row in found}
    for row in found:
        assert row["case"] in text
        assert row["status"] == "ok"
        assert row["times"].keys() == {"ours", "eager"}
        assert row["floor"] == max(row["bytes"] / row["copy"], row["operations"] / row["product"])
        assert row["run"].keys() == {"place", "device", "versions", "date"}
        assert row["run"]["versions"].keys() >= {"torch", "steerfast"}
    assert next(row for row in found if row["case"].startswith("affine n=5"))["bytes"] == 4 * (2 * 5 + 2) * 24
    assert next(row for row in found if row["case"].startswith("add slots=8 n=1 "))["bytes"] == 4 * (3 * 24 + 1 + 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_command_takes_other_widths_and_dtypes(tiny, dtype, capsys):
    assert main(["bench", "--quick", "--width", "40", "--dtype", dtype]) == 0
    assert f"add_rms_norm slots=8 n=5 d=40 {dtype}" in capsys.readouterr().out


def test_an_exception_in_one_case_is_named_and_the_rest_goes_on(tiny, monkeypatch, tmp_path, capsys):
    def breaks(*_):
        raise RuntimeError("out of\nmemory")

    monkeypatch.setattr(ops, "affine", breaks)
    monkeypatch.setattr(ops, "ablate", lambda x, basis: 1.001 * x)
    monkeypatch.setattr(ops, "similarity", lambda x, basis: x[..., 0] * math.nan)
    file = tmp_path / "rows.jsonl"
    assert main(["bench", "--quick", "--out", str(file), "--only", "a"]) == 1
    lines = {line[:52].strip(): line[52:] for line in capsys.readouterr().out.splitlines()}
    rows = {row["case"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert lines["affine n=1 d=24 float32"] == "failed: RuntimeError: out of memory"
    for op in ("ablate k=1", "similarity k=8"):
        assert re.fullmatch(
            r"failed: ArithmeticError: it errs by \S+, where \S+ is allowed", lines[f"{op} n=5 d=24 float32"]
        )
    outcomes = {case.split()[0]: row["status"] for case, row in rows.items()}
    failing = {"affine", "ablate", "similarity"}
    assert {op for op, status in outcomes.items() if status == "failed"} == failing
    assert {op for op, status in outcomes.items() if status == "ok"} >= {"add", "amplify", "calibrate", "sae_add"}
    assert all(("times" in row) != ("error" in row) for row in rows.values())
    assert main(["bench", "--quick", "--only", "affine", "--debug"]) == 1
    assert "in breaks" in capsys.readouterr().err


def test_the_command_refuses_what_names_no_op(capsys):
    assert main(["bench", "--only", "nothing"]) == 2
    assert "no op has 'nothing' in its name" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--width", "0"])


# --- the lab ----------------------------------------------------------------------------------------------------------


def taken(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import of a file."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return [("." * node.level + (node.module or ""), alias.name) for node in nodes for alias in node.names]


def test_the_lab_stays_out_of_the_package_and_its_modules_out_of_each_others_privacy():
    lab = [*(BENCHMARKS / "lab").glob("*.py")]
    assert len(lab) > 5
    private = [(p.name, *i) for p in [*lab, *BENCHMARKS.glob("*.py")] for i in taken(p) if i[1].startswith("_")]
    assert [entry for entry in private if entry[1] != "steerfast_kernels"] == []
    inside = list(Path(sf.__file__).parent.rglob("*.py"))
    assert [p for p in inside for module, _ in taken(p) if module.split(".")[0] in ("lab", "benchmarks")] == []


EVERY_HELP = """
import runpy, sys
for sys.argv in [[script, "--help"] for script in sys.argv[1:]]:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        print("said", sys.argv[0], end.code)
"""


def test_every_script_explains_itself():
    needed = {"vllm_soak.py": "httpx", "report.py": "matplotlib", "conftest.py": "no such thing"}
    scripts = sorted(p.name for p in BENCHMARKS.glob("*.py") if "ArgumentParser(" in p.read_text())
    scripts = [name for name in scripts if importlib.util.find_spec(needed.get(name, "torch"))]
    assert {"bars.py", "compare.py", "tune.py", "vllm_cost.py", "flow_cpu.py", "sae_quality.py"} <= {*scripts}
    command = [sys.executable, "-c", EVERY_HELP, *(str(BENCHMARKS / name) for name in scripts)]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, check=False)
    assert re.findall(r"^said .*", done.stdout, re.MULTILINE) == [f"said {name} 0" for name in command[3:]], done.stderr
