"""Guards the layout: what `kernels` may not be, what an import may not load, what a wheel must hold."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import steerfast

ROOT = Path(__file__).resolve().parents[1]
FOLDER_OF = {"steerfast": "steerfast", "steerfast_kernels": "kernels"}


def run_python(code: str, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that building leaves nothing behind in the tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDER_OF.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(target), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (built,) = target.glob("*.whl")
    return built


def test_forbidden_files_are_absent() -> None:
    for name in ("kernels/__init__.py", "conftest.py", "tests/__init__.py", "tests/kernels"):
        assert not (ROOT / name).exists(), f"{name} must not exist, see CONTRIBUTING.md"


def test_our_folder_never_hides_the_package_kernels(tmp_path: Path) -> None:
    """From the root, where our folder comes first on the path, a package `kernels` that comes later still wins."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    origin = run_python("import sys, kernels; assert sys.path[0] == ''; print(kernels.__file__)", ROOT, tmp_path)
    assert Path(origin) == package / "__init__.py"


def test_the_real_package_kernels_is_found_from_the_root() -> None:
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package kernels is not installed")
    assert not Path(run_python("import kernels; print(kernels.__file__)", ROOT)).is_relative_to(ROOT / "kernels")


def test_a_model_can_be_imported_from_the_root() -> None:
    """Whether the package `kernels` is installed or not: our folder is then an empty namespace of that name."""
    code = "from transformers import LlamaConfig, LlamaForCausalLM as M; print(M.__name__)"
    assert run_python(code, ROOT) == "LlamaForCausalLM"


@pytest.mark.parametrize("cwd", ["root", "elsewhere"])
def test_import_is_light_and_silent(cwd: str, tmp_path: Path) -> None:
    heavy = ("triton", "numba", "transformers", "sklearn", "scipy", "gguf", "steerfast_kernels", "kernels")
    # torch comes first: what torch itself loads is not ours.
    code = (
        "import sys, torch; before = set(sys.modules); import steerfast;"
        f"print(sorted((set(sys.modules) - before) & set({heavy!r})))"
    )
    assert run_python(code, ROOT if cwd == "root" else tmp_path) == "[]"


def test_wheel_is_pure(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert "Root-Is-Purelib: true" in archive.read(metadata).decode()


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    expected = {"steerfast/py.typed", "steerfast/sae/page.css", "steerfast/sae/page.js"}
    expected |= {*(f"steerfast/{room}__init__.pyi" for room in ("", "probes/", "sae/", "tools/"))}
    for package, folder in FOLDER_OF.items():
        for file in (ROOT / folder).rglob("*.py"):
            expected.add(f"{package}/{file.relative_to(ROOT / folder).as_posix()}")
    if (ROOT / "kernels/README.md").exists():
        expected.add("steerfast_kernels/README.md")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_entry_points_work_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import importlib.metadata, steerfast\n"
        f"(found,) = importlib.metadata.distributions(name='steerfast', path=[{str(tmp_path)!r}])\n"
        f"assert steerfast.__file__.startswith({str(tmp_path)!r})\n"
        "print(*sorted(f'{point.name}={point.load().__qualname__}' for point in found.entry_points))"
    )
    assert run_python(code, tmp_path) == "steerfast=main steerfast=register"


def test_installed_version_is_the_one_of_setup_py() -> None:
    stated = [line.strip() for line in (ROOT / "setup.py").read_text().splitlines() if "version=" in line]
    assert stated == [f'version="{importlib.metadata.version("steerfast")}",']
    assert steerfast.__version__ == importlib.metadata.version("steerfast")
    assert "[project]" not in (ROOT / "pyproject.toml").read_text()


def test_every_kernel_module_is_importable_as_steerfast_kernels(tmp_path: Path) -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    modules = sorted(file.stem for file in (ROOT / "kernels").glob("*.py"))
    code = f"import importlib\nfor m in {modules}: importlib.import_module('steerfast_kernels.' + m)"
    run_python(code, tmp_path)
