"""The house: rooms in one order, and imports that run down it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import steerfast

PACKAGE = Path(steerfast.__file__).parent
ROOMS = (
    "_names", "_checks", "_null", "_positions", "place",
    "files", "ops", "models", "barriers", "probes", "edits", "plan", "bank", "sae",
    "directions", "hooks", "vllm", "integrations", "tools", "cli", "__main__",
)  # fmt: skip
"""From the ground up: a room imports itself and those before it."""
DELEGATED = {("steerfast.sae.model", "steerfast.sae.formats")}
"""A method that hands its work on (SAE.load) imports when it is called; this closes a circle."""


def modules() -> dict[str, Path]:
    """Every module of the package but its front door, which names all rooms and imports none before its first use."""
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    return {_name(path): path for path in files}


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(name: str, path: Path) -> set[tuple[str, str]]:
    """(module, name that is taken from it) of every import of ours, inside functions, too."""
    found: set[tuple[str, str]] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names if alias.name.startswith("steerfast.")}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.add((inner, "") if inner in MODULES else (source, alias.name))
    return {(source, taken) for source, taken in found if source in MODULES}


MODULES = modules()
IMPORTS = {name: imports(name, path) for name, path in MODULES.items()}


def test_a_room_imports_only_rooms_below_it() -> None:
    def floor(name: str) -> int:
        return ROOMS.index(name.split(".")[1])

    up = [
        f"{name} -> {source}" for name, found in IMPORTS.items() for source, _ in found if floor(source) > floor(name)
    ]
    assert not up


def test_no_circle_but_where_a_method_delegates() -> None:
    arrows = {name: {source for source, _ in found} - {name} for name, found in IMPORTS.items()}
    for name, source in DELEGATED:
        arrows[name].remove(source)
    while free := [name for name, sources in arrows.items() if not sources]:
        arrows = {name: sources - set(free) for name, sources in arrows.items() if name not in free}
    assert not arrows, f"imports in a circle: {sorted(arrows)}"


def test_nobody_imports_a_private_name_of_another_module() -> None:
    taken = [(name, source, what) for name, found in IMPORTS.items() for source, what in found if what.startswith("_")]
    assert not [entry for entry in taken if not entry[2].startswith("__")]


def test_files_stay_short_enough_to_read() -> None:
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 520} == {}


@pytest.mark.parametrize("name", ["vllm", "sae.formats", "ops", "directions.sets"])
def test_a_room_loads_no_hooks(name: str) -> None:
    code = f"import sys, steerfast.{name}; print(*(m for m in sys.modules if m.startswith('steerfast.')))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert f"steerfast.{name}" in shown
    assert not [
        module for module in shown if module.startswith(("steerfast.hooks", "steerfast.cli", "steerfast.tools"))
    ]
