"""What writes the scores of all requests into an operator's file: needs no vLLM."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from pyarrow import parquet

from steerfast.vllm import sink
from steerfast.vllm.scores import ProbeScores


def scores() -> list[ProbeScores]:
    one = ProbeScores("one", None, False, np.array([2, 3]), np.array([[0.5], [np.nan]], dtype=np.float32))
    two = ProbeScores("two", ("a", "b"), False, np.array([2, 3]), np.array([[1, 2], [3, 4]], dtype=np.float32))
    top = ProbeScores("top", None, True, np.array([7]), np.array([[9.5, 8.5, 31, 4]], dtype=np.float32))
    missing = ProbeScores("missing", None, False, np.array([], dtype=int), np.zeros((0, 1), dtype=np.float32))
    return [one, two, top, missing]


WANTED = [
    ("one", None, [2, 3], [0.5, None], None),
    ("two", "a", [2, 3], [1.0, 3.0], None),
    ("two", "b", [2, 3], [2.0, 4.0], None),
    ("top", "0", [7], [9.5], [31]),
    ("top", "1", [7], [8.5], [4]),
]
FIELDS = ("probe", "name", "positions", "scores", "features")


def opened(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[sink.ScoreSink, dict[str, float], list[str]]:
    counted: dict[str, float] = {}
    said: list[str] = []
    monkeypatch.setenv("STEERFAST_SCORES", str(path))
    made = sink.open_sink(lambda name, n: counted.update({name: counted.get(name, 0) + n}), said.append)
    assert made is not None
    return made, counted, said


def test_json_lines_say_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for request in ("first", "second"):
        made, counted, _ = opened(monkeypatch, tmp_path / "new" / "scores.jsonl")
        made.put(request, 3, scores())
        made.close()
        assert counted == {"scores_written": 8}
    lines = [json.loads(line) for line in (tmp_path / "new" / "scores.jsonl").read_text().splitlines()]
    assert [tuple(line[name] for name in FIELDS) for line in lines] == WANTED * 2
    assert [(line["request"], line["prompt"]) for line in lines] == [("first", 3)] * 5 + [("second", 3)] * 5
    assert all(line["time"] > 1.7e9 for line in lines)


def test_parquet_has_the_same_fields_or_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scores.parquet"
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(
            ImportError, match=r"needs pyarrow; pip install steerfast\[parquet\], or name a .jsonl file"
        ):
            opened(without, folder)
    monkeypatch.setattr(sink, "_PART_NUMBERS", 7)
    made, counted, _ = opened(monkeypatch, folder)
    made.put("first", 3, scores())
    made.put("second", 4, scores()[:1])
    made.close()
    assert counted == {"scores_written": 10}
    table = parquet.read_table(folder)
    rows = table.to_pylist()
    assert [tuple(row[name] for name in FIELDS) for row in rows] == [*WANTED, WANTED[0]]
    assert [row["request"] for row in rows] == ["first"] * 5 + ["second"]


def test_a_sink_that_cannot_follow_drops_and_counts_and_nobody_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink, "MOST_WAITING", 30)
    made, counted, said = opened(monkeypatch, tmp_path / "scores.jsonl")
    go, write = threading.Event(), made._write
    made._write = lambda new, last: (go.wait(30), write(new, last))[1]  # type: ignore[method-assign]
    for _ in range(5):  # 10 numbers each, indices among them
        made.put("request", 3, scores())
    assert counted == {"scores_dropped": 20}
    go.set()
    made.close()
    assert counted == {"scores_dropped": 20, "scores_written": 24}
    made.put("late", 3, scores())
    assert counted["scores_dropped"] == 30
    assert not said


def test_a_disk_that_takes_no_scores_is_said_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scores.jsonl").symlink_to("/dev/full")
    made, counted, said = opened(monkeypatch, tmp_path / "scores.jsonl")
    made.put("request", 3, scores())
    made.close()
    assert counted == {"scores_dropped": 8}
    assert "No space left" in said[0]


@pytest.mark.parametrize(
    ("name", "reason"), [("scores.csv", "ends in .jsonl"), ("file/scores.jsonl", "cannot be written")]
)
def test_a_sink_that_cannot_be_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=reason):
        opened(monkeypatch, tmp_path / name)
