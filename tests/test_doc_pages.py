"""The pages under docs/ and the README run: every python block and every cell of the notebook, page by page."""

from __future__ import annotations

import json
import re
import traceback
import warnings
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
NEEDS_DEMO = {"README.md"}
PAGES = [
    pytest.param(path, id=path.name, marks=[pytest.mark.model] if path.name in NEEDS_DEMO else [])
    for path in (
        ROOT / "README.md",
        *(
            ROOT / "docs" / f"{name}.md"
            for name in ("hooks", "methods", "probes", "migration", "tools", "sae", "flow", "distributed")
        ),
    )
]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(path: Path) -> list[tuple[int, str]]:
    """(line of the first statement, source) of each python block."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(1)) + 1, found.group(1)) for found in BLOCK.finditer(text)]


def run(source: str, where: str, first: int, names: dict[str, object]) -> None:
    """Run one block in the page's namespace; an error names `where` and the line, counted from `first`."""
    try:
        exec(compile("\n" * (first - 1) + source, where, "exec"), names)
    except Exception as error:
        line = error.lineno if isinstance(error, SyntaxError) else None
        for frame in traceback.extract_tb(error.__traceback__):
            if frame.filename == where:  # the innermost one that belongs to the page
                line = frame.lineno
        pytest.fail(f"{where}:{line}: {type(error).__name__}: {error}")


@pytest.fixture
def page(tmp_path, monkeypatch) -> dict[str, object]:
    """The namespace of a page, which may write files where it runs."""
    monkeypatch.chdir(tmp_path)
    torch.set_printoptions(profile="default")
    return {"__name__": "__page__"}


@pytest.mark.parametrize("path", PAGES)
def test_every_python_block_runs(path, page):
    found = blocks(path)
    assert found, f"{path} shows no python"
    for first, source in found:
        run(source, str(path), first, page)


@pytest.mark.model
def test_every_cell_of_the_notebook_runs(page):
    for number, cell in enumerate(json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"], 1):
        if cell["cell_type"] == "code":
            run("".join(cell["source"]), f"{NOTEBOOK} cell {number}", 1, page)


def test_the_notebook_is_of_format_4_and_holds_no_results():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code")
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


def test_every_intervention_has_a_section():
    import steerfast as sf

    sections = set(re.findall(r"^## (\w+)$", (ROOT / "docs" / "methods.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(sf.Intervention.registry) <= sections


def test_an_error_names_the_page_and_the_line(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("# Title\n\n```python\nx = 1\n```\n\n```text\nnot run\n```\n\n```python\ny = 2\nx / 0\n```\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names: dict[str, object] = {}
        (first, one), (second, two) = blocks(path)
        run(one, str(path), first, names)
        with pytest.raises(pytest.fail.Exception, match=r"page\.md:13: ZeroDivisionError"):
            run(two, str(path), second, names)
