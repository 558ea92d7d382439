"""What stands beside the code: links that lead somewhere, versions that agree, findings in their form."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "docs/*.ipynb", "*/README.md") for path in ROOT.glob(pattern))
FINDINGS = sorted((ROOT / "findings").glob("*"))
LINK = re.compile(r"""\]\(\s*<?([^)<>\s]+)>?(?:\s+"[^"]*")?\s*\)|\b(?:src|href)="([^"]+)\"""")
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:")


def prose(path: Path) -> str:
    """A page without its code: blocks, and spans in backticks, which may hold brackets of their own."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^(```+|~~~+).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*#*$", prose(path), re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading.replace("`", ""))
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def broken(path: Path) -> list[str]:
    """Links of a page, to files of the repository, that lead nowhere."""
    found = []
    for link in re.findall(LINK, re.sub(r"`[^`\n]*`", "code", prose(path))):
        target, _, anchor = "".join(link).partition("#")
        if EXTERNAL.match(target):
            continue
        file = (path.parent / target).resolve() if target else path
        if not file.exists():
            found.append(f"{target}: no such file")
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            found.append(f"{target}#{anchor}: no such heading")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_somewhere(path: Path) -> None:
    assert broken(path) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text(
        "# A `sf.Plan` & more: it's\n\n## Twice\n\n## Twice\n\n```\n# not a heading\n```\n"
    )
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-sfplan--more-its) [c](other.md#twice-1) [d](https://x.y) `[e](none.md)`\n"
        "[f](none.md) [g](other.md#not-a-heading) [h](#nowhere)\n<img src='x'>\n<img src=\"none.png\">\n"
    )
    assert broken(page) == [
        "none.md: no such file",
        "other.md#not-a-heading: no such heading",
        "#nowhere: no such heading",
        "none.png: no such file",
    ]


def test_the_citation_names_the_version_that_is_built() -> None:
    (built,) = re.findall(r'^    version="(.*)",$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    assert cited == built


def test_every_finding_has_the_form_that_is_stated() -> None:
    table = (ROOT / "findings/README.md").read_text(encoding="utf-8")
    scripts = [path for path in FINDINGS if path.name != "README.md"]
    assert scripts
    for path in scripts:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*\.sh", path.name)
        text = path.read_text(encoding="utf-8")
        assert text.startswith("#!/usr/bin/env bash\n# "), path
        head, code = re.fullmatch(r"((?:#.*\n)+)((?s:.*))", text).groups()  # type: ignore[union-attr]
        assert "# Seen:" in head, f"{path} does not say what output was seen"
        assert re.search(r"\d+\.\d+", head), f"{path} states no version"
        assert re.search(r"mktemp -d(.*\n)+trap 'rm -rf", code), f"{path} leaves something behind"
        assert re.search(r"pip install .*\w==\d", code), f"{path} pins nothing"
        assert "steerfast" not in code, f"{path} runs steerfast"
        assert f"[{path.stem}]({path.name})" in table, f"{path} has no row in findings/README.md"
