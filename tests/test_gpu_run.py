"""What runs on a lent GPU, without one: the stages and their limits, the headline and its processes, choices that are tuned."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
SCRIPT = BENCHMARKS / "gpu.sh"

import bars  # noqa: E402
import headline  # noqa: E402
import results  # noqa: E402
from lab.goals import GOALS  # noqa: E402
from lab.pairs import AGAIN, OURS  # noqa: E402
from static.cases import AT, CASES, Blank  # noqa: E402

ROOM = 600, 900 - 2 * 90  # seconds of a call, and of both calls of one loan without the starts of the machine


def bash(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def stages() -> list[tuple[str, int, int]]:
    found = re.search(r'^stages="\n(.*?)^"', SCRIPT.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return [(name, int(call), int(seconds)) for name, call, seconds in map(str.split, found[1].splitlines())]


# --- the script -------------------------------------------------------------------------------------------------------


def test_the_stages_fit_the_time_that_a_gpu_is_lent():
    by_call = {n: sum(seconds for _, call, seconds in stages() if call == n) for n in (1, 2, 3)}
    assert max(by_call.values()) <= ROOM[0] - 20 * len(stages())  # what ending a stage may take
    assert by_call[1] + by_call[2] <= ROOM[1]
    assert [name for name, *_ in stages()][:2] == ["precompile", "headline"]
    assert {name: seconds for name, _, seconds in stages()}["headline"] <= 180
    assert stages()[-1][:2] == ("engines", 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--fast"], "unknown option --fast"), (["--only", "lunch"], "no stage lunch"), (["--only"], "no stage given"),
        (["--call", "7"], "no call 7"),
    ],
)  # fmt: skip
def test_the_script_refuses_what_it_does_not_know(arguments, said):
    wrong = bash(*arguments)
    assert wrong.returncode == 2
    assert said in wrong.stderr
    assert "a stage being one of precompile headline" in wrong.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_script_refuses_without_a_gpu(tmp_path):
    none = bash(tmp_path, PYTHON=sys.executable)
    assert none.returncode == 2
    assert "sees no GPU" in none.stderr


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A Python that writes down what it is asked and fails."""
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\necho "$TRITON_CACHE_DIR $*" >> {tmp_path}/asked\nexit 3\n')
    file.chmod(0o755)
    return file


def test_a_stage_that_fails_ends_no_other(tmp_path, broken):
    done = bash(tmp_path / "out", "--tiny", PYTHON=str(broken))
    assert done.returncode == 1
    expected = [name for name, *_ in stages() if name != "engines"]
    assert re.findall(r"^-- (\w+): exit 3 after", done.stdout, re.MULTILINE) == expected
    assert f"not all is well: {' '.join(expected)}" in done.stdout
    asked = (tmp_path / "asked").read_text().splitlines()
    assert {line.split()[0] for line in asked} == {str(SCRIPT.parents[1] / ".cache/gpu")}
    runs = [re.search(r"benchmarks/\w+\.py|-m pytest", line)[0] for line in asked]
    assert runs[:5] == [f"benchmarks/{name}.py" for name in ("precompile", "headline", "bars", "once", "once")]
    assert runs[5:] == ["-m pytest"] * 3
    assert ["--eager" in line for line in asked[6:]] == [True, False]


def test_stages_can_be_chosen(tmp_path, broken):
    done = bash(tmp_path / "out", "--tiny", "--call", 3, "--only", "memcheck", PYTHON=str(broken), SECONDS_MEMCHECK="5")
    assert re.findall(r"^== (.*)", done.stdout, re.MULTILINE) == ["engines: at most 300 s", "memcheck: at most 5 s"]


def test_a_stage_that_hangs_is_ended(tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    begin = time.monotonic()
    done = bash(tmp_path, "--tiny", "--only", "precompile", "--only", "tests", PYTHON=str(slow), SECONDS_PRECOMPILE="1",
                SECONDS_TESTS="1")  # fmt: skip
    assert time.monotonic() - begin < 30
    assert re.findall(r"^-- (\w+): exit (\d+)", done.stdout, re.MULTILINE) == [("precompile", "124"), ("tests", "124")]


@pytest.mark.slow
def test_the_first_call_is_rehearsed(tmp_path):
    """Kernels compiled, cases measured, every op once: at tiny sizes, under the interpreter."""
    done = bash(tmp_path, "--tiny", "--only", "precompile", "--only", "memcheck", PYTHON=sys.executable,
                TRITON_CACHE_DIR=str(tmp_path / "cache"))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 cases, 2 launches" in done.stdout
    assert re.search(r"^\d\d ops ran", done.stdout, re.MULTILINE)


# --- the headline -----------------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import os, signal, sys, time
for key in sys.argv[1 : sys.argv.index("--child")]:
    print("\\N{BULLET} " + key, flush=True)
    if key == "aborts":
        os.abort()
    if key == "hangs":
        signal.alarm(1)
        time.sleep(30)
    print(key, "is done", flush=True)
    if key == "breaks the device":
        sys.exit(3)
"""


def test_a_case_that_ends_its_process_costs_that_case_alone(tmp_path, monkeypatch):
    file = tmp_path / "child.py"
    file.write_text(OTHER_PROCESS)
    monkeypatch.setattr(headline, "__file__", str(file))
    keys = ["a", "aborts", "b", "hangs", "breaks the device", "c"]
    said = list(headline.lines_of(keys, tmp_path, "2026-01-02", time.time() + 60))
    assert [" ".join(text.split()) for text in said] == [
        "a is done", "aborts ended its process (exit -6)", "b is done", f"hangs took more than {headline.CASE_SECONDS} s",
        "breaks the device is done", "c is done",
    ]  # fmt: skip


def test_a_process_that_never_begins_is_told_once(tmp_path, monkeypatch):
    file = tmp_path / "child.py"
    file.write_text("raise SystemExit('no driver')")
    monkeypatch.setattr(headline, "__file__", str(file))
    said = list(headline.lines_of(["a", "b"], tmp_path, "2026-01-02", time.time() + 60))
    assert said == ["no driver", "the process ended before its first case (exit 1)"]


def test_a_line_shows_what_was_predicted_beside_what_was_measured():
    row = {
        "status": "ok", "floor": 3e-5, "times": {OURS: [4.5e-5], AGAIN: [4.6e-5], "eager": [9e-5], headline.COPY: [3.6e-5]},
        "uncaptured": {}, "missing": {"product on tiles": "red"},
    }  # fmt: skip
    text = headline.line("hinge k=8", row, (4e-5, 5.5e-5))
    assert text.split() == [
        "hinge",
        "k=8",
        "40",
        "…",
        "55",
        "45.00",
        "1.50",
        "1.25",
        "2.00",
        "1.02",
        *["product", "on", "tiles:", "red"],
    ]
    failed = headline.line("hinge k=8", {"status": "failed", "error": "RuntimeError: no"}, None)
    assert failed.split() == ["hinge", "k=8", "–", *["failed:", "RuntimeError:", "no"]]


def test_predictions_are_found_under_the_names_of_the_cases():
    spans, of = headline.predictions()
    assert re.fullmatch(r"commit [0-9a-f]{9}, triton [\d.]+", of)
    for key in ("add", "hinge k=8", "keep_norm k=16", "hinge k=64 n=64"):
        name = GOALS[key].case(AT).name
        assert name == CASES[key]().name
        assert spans[name][0] < spans[name][1]


class Named(Blank):
    """A stream for the names of cases: without the memory of their dictionaries."""

    def basis(self, k: int) -> torch.Tensor:
        return torch.eye(k, self.d, dtype=self.dtype)

    def dictionary(self, features: int) -> torch.Tensor:
        return torch.zeros(1, 1, dtype=self.dtype).expand(features, self.d)


def test_every_goal_is_predicted_and_every_bar_of_one_is_in_the_headline():
    assert set(GOALS) <= set(CASES)
    names = {goal.case(Named("cpu", torch.bfloat16, 0)).name for goal in GOALS.values()} | {
        f"{key} n=1" for key in headline.HOST
    }
    assert len(names) + len(headline.GRAPHS) == len(headline.KEYS)
    alone = ("nobody", "split", "edit top-k", "all modes", "host")
    wanted = {
        bar.case for bar in bars.bars() if bar.place == "cuda" and (bar.case.startswith(alone) or "x fp32" in bar.case)
    }
    assert len(wanted) > 12
    assert wanted <= names
    others = {bar.measure.partition(": ")[2] for bar in bars.bars() if bar.measure.startswith("beyond: ")}
    assert others <= names


@pytest.mark.slow
def test_the_headline_keeps_rows_under_the_interpreter(tmp_path):
    keys = ["add", "split stream k=8", "nobody in place k=8 n=64", "host add_"]
    environment = {**os.environ, "STEERFAST_BENCH": "tiny", "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(BENCHMARKS / "headline.py"), *keys, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["key"]: row for row in results.read([tmp_path])}
    assert list(rows) == keys
    for key, row in rows.items():
        assert (row["status"], row["run"]["quick"], row["run"]["place"]) == ("ok", True, "tiny")
        assert re.search(rf"^{re.escape(key)} +– +\d", done.stdout, re.MULTILINE)
    assert rows["nobody in place k=8 n=64"]["times"].keys() == {OURS, AGAIN, "empty kernel"}
    assert rows["host add_"]["times"].keys() == {OURS, AGAIN, "bare launch"}
    assert len({row["run"]["series"] for row in rows.values()}) == 1
    assert json.dumps(rows)


# --- compiled ahead ---------------------------------------------------------------------------------------------------


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
def test_what_is_compiled_ahead_is_found_by_the_next_process(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [
        sys.executable,
        str(BENCHMARKS / "precompile.py"),
        "add n=64",
        "empty kernel",
        "--capability",
        "90",
        "--processes",
        "1",
    ]
    found = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 cases, 2 launches" in done.stdout
        found.append({path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.cubin")})
    assert sorted(found[0]) == ["_add_kernel.cubin", "_empty_kernel.cubin"]
    assert found[0] == found[1]


# --- choices that are tuned -------------------------------------------------------------------------------------------


def test_the_tuner_keeps_the_choices_of_other_devices(tmp_path):
    import tune

    file = tmp_path / "_tuned.py"
    tune.write_table(file, "sm_90", {"add.BLOCK_D": 2048, "flow.WARPS": [(1024, 4), (4096, 8)]})
    tune.write_table(file, "sm_80", {"add.BLOCK_D": 512})
    tune.write_table(file, "sm_90", {"add.BLOCK_D": 4096})
    space: dict = {}
    exec(compile(file.read_text(), str(file), "exec"), space)
    assert space["TABLE"] == {
        "sm_80": {"add.BLOCK_D": 512},
        "sm_90": {"add.BLOCK_D": 4096, "flow.WARPS": [(1024, 4), (4096, 8)]},
    }
    assert space["tuned"]("add.BLOCK_D", 1024, torch.zeros(1)) == 1024  # not on a GPU


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("add.BLOCK_D", 1024, [512, 2048]), ("add.WARPS", 1, [2]), ("sae_encode.STAGES", 3, [2, 4]), ("x.SPLIT", True, [False]),
        ("sae_encode.MAXNREG", None, [80, 96, 128, 168, 232]), ("sae_encode.MAXNREG", 128, [None, 80, 96, 168, 232]),
        ("sae_encode.TILES", (128, 8), [(64, 8), (256, 8), (128, 4), (128, 16), (256, 16), (64, 4)]), ("x.NAME", "text", []),
    ],
)  # fmt: skip
def test_alternatives_are_neighbours(name, value, others):
    import tune

    assert tune.alternatives(name, value) == others


def test_an_alternative_is_tried_on_the_cases_that_it_touches():
    import tune

    from steerfast_kernels import add

    before = add.tuned
    with tune.Chooser({}).installed() as chooser:
        knobs = {
            knob.name: knob for knob in tune.discover(chooser, {key: tune.CASES[key] for key in ("add n=64", "norm")})
        }
    assert add.tuned is before
    assert dict(knobs["add.BLOCK_D"].touched.values()) == {
        512: ["add n=64"],
        2048: ["add n=64"],
    }
    table = knobs["add.NORM_WARPS"]
    assert (table.size, table.value, table.value) == (4096, add.NORM_WARPS[table.entry][1], 8)
    assert [whole[table.entry] for whole, _ in table.touched.values()] == [(4096, 4), (4096, 16)]
    assert all(keys == ["norm"] for _, keys in table.touched.values())


def test_what_was_chosen_is_where_the_next_choice_begins():
    import tune

    with tune.Chooser({"add.BLOCK_D": 512}).installed() as chooser:
        (knob,) = (knob for knob in tune.discover(chooser, {"add n=64": GOALS["add n=64"]}) if knob.touched)
    assert (knob.value, list(knob.touched)) == (512, ["256", "1024"])


@pytest.mark.slow
def test_every_choice_of_a_launcher_is_touched_by_some_case(monkeypatch: pytest.MonkeyPatch):
    import tune

    monkeypatch.setattr(
        torch.utils.deterministic, "fill_uninitialized_memory", False
    )  # nothing is written, much allocated
    with tune.Chooser({}).installed() as chooser:
        knobs = tune.discover(chooser, tune.CASES)
    assert {knob.name for knob in knobs if knob.touched} == tune.in_source()
