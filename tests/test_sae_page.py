"""The page of features: what is in it, nothing of a corpus as markup, nothing from elsewhere, and its size."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steerfast.sae.counting import Sample, Text, TopPassages
from steerfast.sae.detection import Detection
from steerfast.sae.evidence import Evidence
from steerfast.sae.explanation import Explanations
from steerfast.sae.page import write_page
from steerfast.sae.relations import Relations

NASTY = "</script><script>alert(1)</script> & \u2028 😀\ud800 <b>"


def parts(features: int, word: str, top: int = 6) -> tuple[Explanations, Evidence, Detection, Relations]:
    """Everything that a page can show, as full as it gets: ten words, all passages, eight tokens and neighbours each."""
    draw = torch.Generator().manual_seed(0)
    words = tuple(tuple(f"{word}{i % 97}{j}" for j in range(10)) for i in range(features))
    about = {"model": "Tiny", "place": ("resid_post", 7)}
    found = Explanations(words, torch.rand(features, 10, generator=draw), "use", 100, about)
    passages = TopPassages(features, top, before=16, after=8)
    passages.values[:] = 3.0
    passages.where[..., 0], passages.where[..., 1] = np.arange(features)[:, None] % 50, 40
    passages.levels[:, :, 14:18] = [0.2, 1.5, 3.0, 2.0]
    text = " ".join(f"{word}{i}" for i in range(128))[:640]  # five characters a token, as in English
    bounds = np.linspace(0, len(text), 129).astype(np.int32)
    passages.texts = {i: Text(text, bounds) for i in range(50)}
    histogram = torch.zeros(features, 52, dtype=torch.int64)
    histogram[:, 20:32] = torch.randint(1, 5000, (features, 12), generator=draw)
    empty = Sample(0, (), np.empty(0), np.empty(0), np.zeros(features + 1), np.empty(0), np.empty(0))
    edges = torch.exp2(torch.linspace(-10, 16, 53))
    evidence = Evidence(
        found.about, 10**6, (70, 30), histogram.sum(1), edges, histogram, ("",), np.zeros(1), np.zeros((3, 0)), 0,
        empty, empty, passages,
    )  # fmt: skip
    accuracy = torch.rand(features, generator=draw)
    accuracy[::10] = torch.nan
    detection = Detection(accuracy, torch.rand(features, 5), accuracy, histogram.sum(1), (9, 9), 20)
    tokens = tuple(tuple(f" {word}{j}" for j in range(8)) for _ in range(features))
    values, near = torch.rand(features, 8), torch.randint(0, features, (features, 8), generator=draw)
    return found, evidence, detection, Relations(tokens, tokens, values, values, near, values)


def data_of(text: str) -> dict[str, Any]:
    (content,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(content)


def test_what_the_page_holds(tmp_path: Path) -> None:
    found, evidence, detection, relations = parts(40, "word")
    evidence.fired[3] = 0
    text = write_page(tmp_path / "page.html", found, evidence, detection=detection, relations=relations).read_text(
        "utf-8"
    )
    data = data_of(text)
    scored = sorted((i for i in range(40) if i % 10), key=lambda i: -float(detection.accuracy[i]))
    rest = sorted((i for i in range(40) if not i % 10), key=lambda i: -float(found.scores[i, 0]))
    shown = [one["n"] for one in data["features"]]
    assert shown == [i for i in scored + rest if i != 3]  # scored ones first; what never fired is left out
    one = next(one for one in data["features"] if one["n"] == 7)
    assert one["w"] == list(found.words[7])
    assert one["d"] == pytest.approx(float(detection.accuracy[7]), rel=0.01)
    assert one["h"] == [20, evidence.histogram[7, 20:32].tolist()]
    assert one["f"] == pytest.approx(float(evidence.density[7]), rel=0.01)
    assert [number for number, _ in one["c"]] == relations.neighbours[7].tolist()
    value, passage, sizes, levels = one["p"][0]
    tokens = evidence.passages(7)[0].tokens
    assert (value, passage) == (3.0, "".join(tokens))
    assert [ord(size) - 96 for size in sizes] == [len(token) for token in tokens]
    assert levels == "00000000000000" + "1496"
    assert "d" not in next(one for one in data["features"] if one["n"] == 10)
    assert len(data_of(write_page(tmp_path / "few.html", found, limit=5).read_text("utf-8"))["features"]) == 5
    with pytest.raises(ValueError, match="evidence knows 40 features, the explanations 7"):
        write_page(tmp_path / "no.html", parts(7, "a")[0], evidence)


def test_nothing_of_a_corpus_becomes_markup_and_nothing_comes_from_elsewhere(tmp_path: Path) -> None:
    found, evidence, _, relations = parts(3, NASTY)
    text = write_page(tmp_path / "page.html", found, evidence, relations=relations).read_text("utf-8")
    assert text.count("<script") == text.count("</script>") == 2  # the data and the script of the page
    assert "<b>" not in text
    assert "alert(1)" in data_of(text)["features"][0]["w"][0]
    assert not re.findall(r"https?:|(?:src|href)=|@import|url\(", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'")
    for kind, block in (("style", r"<style>(.*?)</style>"), ("script", r"</script>\n<script>(.*?)</script>")):
        (content,) = re.findall(block, text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[0]
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|import\(", script)


def test_ten_thousand_features_fit_into_twenty_megabytes(tmp_path: Path) -> None:
    found, evidence, detection, relations = parts(10_000, "words")
    page = write_page(tmp_path / "page.html", found, evidence, detection=detection, relations=relations)
    assert 10e6 < page.stat().st_size < 20e6
    assert len(data_of(page.read_text("utf-8"))["features"]) == 10_000


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_parses(tmp_path: Path) -> None:
    import steerfast.sae.page as module

    script = Path(module.__file__).with_name("page.js")
    done = subprocess.run(["node", "--check", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
