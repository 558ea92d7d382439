"""Which of the long parts of CI a change can reach: `python3 .ci/affected.py BASE` prints their names, one a line.

The parts are the tests under vLLM, under the oldest versions, and of every architecture. A part depends on its test files and on
every module that these reach: by an import, by a name of the package's front door (`sf.Plan`), or by a module's dotted name in a
string. Text that nobody imports (documentation, results, the tests' data) matters to a part whose tests name it; pins matter to
their own environment. Whatever is not understood (setup.py, the Makefile, this folder, a deleted module, an unknown kind of file)
matters to every part. Needs the standard library and git alone.
"""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("vllm", "oldest", "zoo")
PINS = {
    "constraints-vllm.txt": {"vllm"},
    "constraints-oldest.txt": {"oldest"},
    "constraints-common.txt": {"oldest", "zoo"},
    "constraints.txt": {"zoo"},
}
TEXT = re.compile(
    r"(docs|findings|benchmarks|tests/data|\.github)/|[^/]+\.md$|(LICENSE|CITATION\.cff|\.gitignore|\.pre-commit-config\.yaml|.*\.pyi)$"
)
STARTED = {
    "vllm": ("steerfast/vllm/*.py", "steerfast/cli/main.py", "steerfast/cli/check.py", "steerfast/tools/check_vllm.py")
}
"""What a part starts without an import: vLLM's plugin, and the command in another process."""
KERNELS = {"vllm", "oldest"}
"""The parts that run kernels; they are loaded by a name made at run time."""


def affected(changed: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """Part -> the first of the changed files (paths from the root) that it depends on."""
    reached = {part: reach(part, root) for part in PARTS}
    found: dict[str, str] = {}
    for name in sorted(changed):
        for part in sorted(_concerned(name, reached, root)):
            found.setdefault(part, name)
    return found


def reach(part: str, root: Path = ROOT) -> set[Path]:
    """Every file of ours that a part's tests load."""
    todo = [root / "tests/conftest.py", *_tests(part, root)]
    todo += [file for pattern in STARTED.get(part, ()) for file in root.glob(pattern)]
    if part in KERNELS:
        todo += root.glob("kernels/*.py")
    seen: set[Path] = set()
    while todo:
        file = todo.pop()
        if file not in seen:
            seen.add(file)
            todo += _loads(file, root)
    return seen


def changes(base: str, root: Path = ROOT) -> list[str]:
    """Files that differ from a commit, in commits or in the working tree, the untracked ones too.

    Raises:
        subprocess.CalledProcessError: git knows no such commit.
    """
    # Without -M: of a file that moved, both names count.
    tracked = _git(root, "diff", "--name-only", "--no-renames", "-z", base, "--")
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    return sorted(set(filter(None, (tracked + untracked).split("\0"))))


def _git(root: Path, *command: str) -> str:
    return subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout


def _concerned(name: str, reached: dict[str, set[Path]], root: Path) -> set[str]:
    if name in PINS:
        return PINS[name]
    file = root / name
    if TEXT.match(name):
        known = name.split("/")[2] if name.startswith("tests/data/") else file.name
        tests = root / "tests"
        return {
            part for part, files in reached.items() if any(f.parent == tests and known in _source(f) for f in files)
        }
    ours = name.endswith(".py") and name.startswith(("steerfast/", "kernels/", "tests/"))
    if not ours or not file.is_file():
        return set(PARTS)
    return {part for part, files in reached.items() if file in files}


def _tests(part: str, root: Path) -> list[Path]:
    if part != "oldest":
        return sorted(root.glob(f"tests/test_{part}*.py"))
    (names,) = re.findall(
        r"^OLDEST := \$\(addprefix tests/test_,((?:.|\\\n)*?)\)$", _source(root / "Makefile"), re.MULTILINE
    )
    return [root / f"tests/test_{name}" for name in re.findall(r"\w+\.py", names)]


@functools.cache
def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8")


@functools.cache
def _homes(root: Path) -> dict[str, str]:
    """Public name ("Plan", "sae.train_sae") -> the module that a package takes it from, by the packages' stubs."""
    homes = {}
    for stub in sorted((root / "steerfast").rglob("__init__.pyi")):
        package = _package(stub, root)
        room = package.removeprefix("steerfast").lstrip(".")
        for node in ast.parse(_source(stub)).body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    name = ".".join(filter(None, [room, alias.asname or alias.name]))
                    homes[name] = ".".join(filter(None, [package, node.module, alias.name]))
    return homes


@functools.cache
def _loads(file: Path, root: Path) -> tuple[Path, ...]:
    """Files of ours that one file loads."""
    source = _source(file)
    names = set(re.findall(r"\bsteerfast(?:\.\w+)+", source))
    for found in re.findall(r"\b(?:sf|steerfast)\.(\w+(?:\.\w+)?)", source):
        names |= {_homes(root)[name] for name in (found, found.partition(".")[0]) if name in _homes(root)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _package(file, root).split(".")
            above = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join(filter(None, [*above, node.module or ""]))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
            if module == "steerfast":
                names |= {_homes(root).get(alias.name, "") for alias in node.names}
    return tuple(found for name in names for found in _files(name, root))


def _package(file: Path, root: Path) -> str:
    return ".".join(file.relative_to(root).parent.parts)


def _files(name: str, root: Path) -> list[Path]:
    """A module's file and those of the packages around it; of `module.attribute` those of the module."""
    parts = name.split(".")
    if parts[0] != "steerfast":
        file = root / "tests" / f"{parts[0]}.py"
        return [file] if file.is_file() else []
    files = [root.joinpath(*parts[:depth], "__init__.py") for depth in range(1, len(parts) + 1)]
    files += [root.joinpath(*parts[:depth]).with_suffix(".py") for depth in range(2, len(parts) + 1)]
    return [file for file in files if file.is_file()]


def main() -> int:
    """Print the parts that differ from a base; a reason for each to stderr."""
    (base,) = sys.argv[1:]
    try:
        changed = changes(base)
    except (OSError, subprocess.CalledProcessError):
        print(f"affected: git does not know {base} here; every part runs", file=sys.stderr)
        print(*PARTS, sep="\n")
        return 0
    for part, why in affected(changed).items():
        print(f"affected: {part}, by {why}", file=sys.stderr)
        print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
