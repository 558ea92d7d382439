"""What decides which long parts of CI a change can reach."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / ".ci" / "affected.py"
SPEC = importlib.util.spec_from_file_location("affected", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
ci = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ci)
EVERY = set(ci.PARTS)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ("docs/methods.md", set()),
        ("README.md", set()),
        ("CITATION.cff", set()),
        ("benchmarks/test_add.py", set()),
        ("tests/test_sae_training.py", set()),
        ("steerfast/sae/training/trainer.py", {"oldest", "vllm"}),  # by what a docstring names
        ("steerfast/cli/demo.py", set()),
        ("steerfast/vllm/runner.py", {"vllm"}),
        ("steerfast/cli/check.py", {"vllm"}),
        ("tests/vllm_engines.py", {"vllm"}),
        ("constraints-vllm.txt", {"vllm"}),
        ("constraints-oldest.txt", {"oldest"}),
        ("constraints-common.txt", {"oldest", "zoo"}),
        ("tests/families.py", {"oldest"}),
        ("kernels/subspace_rows.py", {"oldest", "vllm"}),
        ("steerfast/barriers/fit.py", {"oldest", "zoo", "vllm"}),
        ("tests/zoo_oracle.py", {"zoo"}),
        ("tests/zoo_runner.py", {"zoo"}),
        ("tests/data/zoo.json", {"zoo"}),
        ("steerfast/hooks/dispatcher.py", EVERY),
        ("steerfast/plan.py", EVERY),
        ("steerfast/ops/subspace.py", EVERY),
        ("tests/conftest.py", EVERY),
        ("setup.py", EVERY),
        ("Makefile", EVERY),
        (".ci/run", EVERY),
        ("steerfast/removed.py", EVERY),
        ("something.else", EVERY),
    ],
)
def test_a_change_reaches_the_parts_that_depend_on_it(changed: str, parts: set[str]) -> None:
    assert set(ci.affected([changed])) == parts


def test_every_change_counts() -> None:
    assert ci.affected([]) == {}
    found = ci.affected(["docs/methods.md", "tests/zoo.py", "steerfast/vllm/wire.py"])
    assert found == {"zoo": "tests/zoo.py", "vllm": "steerfast/vllm/wire.py"}


@pytest.mark.parametrize("part", ci.PARTS)
def test_a_part_has_tests_and_they_are_there(part: str) -> None:
    tests = ci._tests(part, ROOT)
    assert tests
    assert [test for test in tests if not test.is_file()] == []
    assert ci.reach(part) > set(tests)


@pytest.mark.parametrize(
    ("part", "code"),
    [
        (
            "zoo",
            "import zoo_checks, zoo_oracle; import steerfast as sf; sf.steer, sf.collect, sf.Plan, sf.Add, sf.prepare",
        ),
        ("oldest", "import test_hooks, test_ops, test_extract"),
    ],
)
def test_what_python_loads_is_among_what_a_part_reaches(part: str, code: str) -> None:
    """Against the real thing: the modules of ours that an import of a part's files brings in."""
    show = (
        "import sys; print(*{m.__file__ for n, m in [*sys.modules.items()] if n.startswith('steerfast.')}, sep='\\n')"
    )
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(ROOT)!r}]; {code}; {show}",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    loaded = {Path(line).resolve() for line in shown}
    assert len(loaded) > 10
    assert loaded <= ci.reach(part)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository of one commit, with one file of each fate."""
    for name in ("kept", "edited", "moved", "removed"):
        (tmp_path / f"{name}.py").write_text(f"# {name}\n" * 20)
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "one")
    return tmp_path


def git(folder: Path, *command: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *who, *command], cwd=folder, check=True, capture_output=True)


def test_changes_are_those_of_commits_and_of_the_working_tree(clone: Path) -> None:
    git(clone, "mv", "moved.py", "new name.py")
    git(clone, "commit", "--quiet", "--message", "two")
    (clone / "edited.py").write_text("other\n")
    (clone / "removed.py").unlink()
    (clone / "untracked.py").touch()
    (clone / "ignored.py").touch()
    assert ci.changes("HEAD~", clone) == ["edited.py", "moved.py", "new name.py", "removed.py", "untracked.py"]
    with pytest.raises(subprocess.CalledProcessError):
        ci.changes("no-such-commit", clone)


def test_an_unknown_base_runs_everything() -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "0" * 40], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == list(ci.PARTS)
    assert "every part runs" in result.stderr


def test_a_name_one_level_down_reaches_its_module(tmp_path: Path) -> None:
    (tmp_path / "steerfast" / "sae").mkdir(parents=True)
    for name in ("__init__.py", "sae/__init__.py", "sae/train.py", "sae/other.py"):
        (tmp_path / "steerfast" / name).write_text("")
    (tmp_path / "steerfast" / "__init__.pyi").write_text("from . import sae as sae\n")
    (tmp_path / "steerfast" / "sae" / "__init__.pyi").write_text("from .train import train_sae as train_sae\n")
    (tmp_path / "test.py").write_text("import steerfast as sf\n\nsf.sae.train_sae()\n")
    found = ci._loads(tmp_path / "test.py", tmp_path)
    assert tmp_path / "steerfast" / "sae" / "train.py" in found
    assert tmp_path / "steerfast" / "sae" / "other.py" not in found
