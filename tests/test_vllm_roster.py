"""All processes of an engine serve the same plans and probes, whatever happens to their folders while it starts."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import steerfast as sf
from steerfast.vllm import counters, roster
from steerfast.vllm.plans import Library, load
from steerfast.vllm.probes import load_probes

WIDTH, LAYERS = 8, 3


def unit(number: int) -> torch.Tensor:
    return torch.eye(WIDTH)[number]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv(counters.FOLDER, str(tmp_path / "shared"))
    for name in ("plans", "probes"):
        monkeypatch.setenv(f"STEERFAST_{name.upper()}", str(tmp_path / name))
    for i, name in enumerate(("one", "two")):
        sf.Plan({1: sf.Add(unit(i))}).save(tmp_path / "plans" / name)
        sf.probes.LinearProbe(unit(i), place=1).save(tmp_path / "probes" / name)
    return tmp_path


def plans(folders: Path) -> Library:
    return load(folders / "plans", WIDTH, LAYERS)[0]


def test_what_is_added_while_an_engine_starts_is_left_out_by_all_of_it(folders: Path) -> None:
    first = plans(folders)
    read, _ = load_probes(folders / "probes", WIDTH, LAYERS, first)
    sf.Plan({0: sf.Add(unit(2))}).save(folders / "plans" / "a third")
    (folders / "plans" / "damaged").mkdir()
    (folders / "plans" / "damaged" / "plan.json").write_text("{")
    sf.probes.LinearProbe(unit(2), place=1).save(folders / "probes" / "a third")
    assert plans(folders) == first
    assert load_probes(folders / "probes", WIDTH, LAYERS, first)[0] == read
    roster.begin()  # another engine
    assert [*plans(folders).plans] == ["a third", "one", "two"]
    assert [*plans(folders).refused] == ["damaged"]
    assert [*load_probes(folders / "probes", WIDTH, LAYERS, first)[0].probes] == ["a third", "one", "two"]


@pytest.mark.parametrize("kind", ["plans", "probes"])
def test_what_changes_or_goes_while_an_engine_starts_stops_it_by_name(folders: Path, kind: str) -> None:
    def read() -> Any:
        return plans(folders) if kind == "plans" else load_probes(folders / kind, WIDTH, LAYERS, Library())

    read()
    (file,) = (folders / kind / "two").glob("*.safetensors")
    content, about = file.read_bytes(), file.stat()
    file.write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=rf"STEERFAST_{kind.upper()}: 'two' in .* has changed while the engine was starting"
    ):
        read()
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    read()
    shutil.rmtree(folders / kind / "two")
    with pytest.raises(ValueError, match=r"'two' in .* has gone while the engine was starting, .* start it again"):
        read()


def test_a_plan_that_changes_while_it_is_read_is_not_served(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sf.Plan.load

    def slow(folder: Path, *more: Any) -> sf.Plan:
        plan = original(folder, *more)
        if folder.name == "two":
            sf.Plan({1: sf.Add(unit(5))}).save(folder)
        return plan

    monkeypatch.setattr(sf.Plan, "load", slow)
    with pytest.raises(ValueError, match=r"'two' in .* has changed"):
        plans(folders)


def _start(done: Any) -> None:
    roster.begin()
    done.put(True)


def test_a_process_that_an_engine_has_started_does_not_begin_anew(folders: Path) -> None:
    plans(folders)
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    process = context.Process(target=_start, args=(done,))
    process.start()
    assert done.get(timeout=120)
    process.join()
    (folders / "plans" / "two" / "plan.json").unlink()
    with pytest.raises(ValueError, match="has gone"):
        plans(folders)
