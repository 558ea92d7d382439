"""What captures the stream in the vLLM plugin, without vLLM: fields and bounds, the ring, the thread, the shards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import steerfast as sf
from steerfast._positions import EVER
from steerfast.place import Place
from steerfast.sae import growing
from steerfast.sae.cache import CacheInfo
from steerfast.sae.growing import Context, GrowingCache, contexts_of
from steerfast.vllm import collecting
from steerfast.vllm.capture import Capture, CaptureSettings, check_capture, read_capture
from steerfast.vllm.capture_seams import Taker
from steerfast.vllm.capturing import Captures, Ring
from steerfast.vllm.collecting import Begin, Collector, End

D, LAYERS = 12, 4


def settings(folder: Path, **more: Any) -> CaptureSettings:
    places = frozenset([*(Place("resid_post", i) for i in range(LAYERS)), Place("resid_pre", 2), Place("mlp_out", 1)])
    bounds = {"tokens": 40, "batch": 16, "room": 1 << 20, "ring": 64 * D * 4, "memory": 1 << 20}
    plans = {"edited": frozenset([Place("resid_post", 1)]), "entered": frozenset([2])}
    model = {"layers": LAYERS, "width": D, "size": 4}
    return CaptureSettings(folder, places, **{**model, **bounds, **plans, **more})  # type: ignore[arg-type]


# --- what a client may say, and what the operator allows ---------------------------------------------------------------


def test_a_request_names_places_positions_edits_and_dtype(tmp_path: Path) -> None:
    allowed = settings(tmp_path)
    capture = read_capture({"steer_capture": [-1, "mlp_out.1", 3, 1], "steer": "plan"}, allowed)
    assert capture is not None
    assert [point.named for point in capture.points] == [("resid_post", 3), ("mlp_out", 1), ("resid_post", 1)]
    assert (capture.positions, capture.after, capture.dtype) == ("all", False, "bfloat16")
    behind = read_capture({"steer_capture": [0, "resid_pre.2"], "steer_capture_edits": "after"}, allowed)
    assert behind is not None
    # layer 0 is edited by no plan, so that before and behind are one; what enters layer 2 is what leaves layer 1
    assert [(point.place, point.after) for point in behind.points] == [
        (("resid_post", 0), False),
        (("resid_post", 1), True),
    ]
    assert read_capture({"steer_read": "probe"}, allowed) is None
    assert len(allowed.points) == 6
    with pytest.raises(ValueError, match="lies between the edits"):
        read_capture({"steer_capture": "resid_pre.2"}, allowed)
    with pytest.raises(ValueError, match="lies between its edits"):
        read_capture({"steer_capture": 1, "steer_capture_edits": "after"}, allowed)
    with pytest.raises(
        ValueError, match="this engine captures nothing; its operator names a folder in STEERFAST_CAPTURE"
    ):
        read_capture({"steer_capture": 1}, None)


def test_bounds_are_those_of_tokens_rows_of_a_step_and_bytes(tmp_path: Path) -> None:
    allowed = settings(tmp_path)

    def check(length: tuple[int, int], allowed: CaptureSettings = allowed, **fields: Any) -> None:
        capture = read_capture({"steer_capture": [0, 3], **fields}, allowed)
        assert capture is not None
        check_capture(capture, allowed, range(length[0]), length)

    check((10, 41))
    with pytest.raises(ValueError, match="may take 41 tokens of this request, 10 of prompt and up to 32 new ones"):
        check((10, 42))
    check((100, 120), steer_capture_positions="generated")
    check((100, 120), steer_capture_positions="-4: | last")
    with pytest.raises(ValueError, match="the window 10:12 lies outside this prompt, which has 10 tokens"):
        check((10, 12), steer_capture_positions="0 | 10:12")
    with pytest.raises(ValueError, match="names no token of this request"):
        check((10, 11), steer_capture_positions="generated")
    with pytest.raises(ValueError, match="may take 32 rows in one step"):
        check((20, 30), replace(allowed, ring=31 * D * 4))
    with pytest.raises(ValueError, match="may take 384 bytes; this engine has room for 383"):
        check((8, 9), replace(allowed, room=383))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "00000.safetensors").write_bytes(bytes(100))
    with pytest.raises(ValueError, match="room for 383"):
        check((8, 9), replace(allowed, room=483))
    capture = read_capture({"steer_capture": 0}, allowed)
    assert capture is not None
    with pytest.raises(ValueError, match="given as embeddings"):
        check_capture(capture, allowed, None, (5, 6))


def test_settings_are_read_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(**values: str) -> CaptureSettings | None:
        for name, value in values.items():
            monkeypatch.setenv(f"STEERFAST_CAPTURE{name}", value)
        return CaptureSettings.read((LAYERS, D, 2), 16, (), ())

    monkeypatch.delenv("STEERFAST_CAPTURE", raising=False)
    assert given() is None
    found = given(**{"": str(tmp_path)})
    assert found is not None
    assert (len(found.places), found.tokens, found.rows) == (LAYERS, 4096, (256 << 20) // (2 * D))
    found = given(_PLACES=" 1, mlp_out.-1", _TOKENS="7", _RING="48")
    assert found is not None
    assert (found.places, found.tokens, found.rows) == ({("resid_post", 1), ("mlp_out", 3)}, 7, 2)
    for name, value, reason in (
        ("_PLACES", "9", "layer 9 is out of range"),
        ("_PLACES", "head_out.1", "head_out is not captured"),
        ("_RING", "5", "expected at least the 24 bytes of a row"),
        ("_TOKENS", "many", "expected a whole number"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=reason):
            patch.setenv(f"STEERFAST_CAPTURE{name}", value)
            CaptureSettings.read((LAYERS, D, 2), 16, (), ())


# --- the ring, the thread and the shards -------------------------------------------------------------------------------


class Worker:
    """An engine's steps on tiny rows: the stream of token `id` at position p of a request is id + p / 100, by layer."""

    def __init__(self, folder: Path, **more: Any) -> None:
        self.settings = settings(folder, **more)
        self.counted: dict[str, float] = {}
        self.said: list[str] = []
        self.points = [(f"{place.site}.{place.layer}", after) for place, after in self.settings.points]
        self.ring = Ring(self.settings.rows, D, torch.float32, torch.device("cpu"))
        self.captures = Captures(self.points, self.ring, 64)
        self.collector = Collector(self.settings, self.points, self.ring, "Model", self.count, self.said.append)

    def count(self, name: str, amount: float) -> None:
        self.counted[name] = self.counted.get(name, 0) + amount

    def start(self, name: str, prompt: list[int], **fields: Any) -> Capture:
        capture = read_capture({"steer_capture_dtype": "float32", **fields}, self.settings)
        assert capture is not None
        where = [(f"{point.place.site}.{point.place.layer}", point.after) for point in capture.points]
        self.captures.start(name, where, capture.pieces(len(prompt)))
        self.collector.put(Begin(name, capture, prompt))
        return capture

    def step(self, *batch: tuple[str, int, list[int]], late: bool = False) -> None:
        """Requests, the position of each one's first token, and its tokens."""
        lengths = [len(ids) for _, _, ids in batch]
        starts = torch.tensor([0, *np.cumsum(lengths)])
        positions = torch.tensor([p for _, first, ids in batch for p in range(first, first + len(ids))])
        ids = torch.tensor([token for _, _, tokens in batch for token in tokens])
        scheduled = {name: (first, len(tokens)) for name, first, tokens in batch if name in self.captures}
        self.captures.begin([name for name, _, _ in batch], (starts, positions, len(ids), ids), scheduled, late)
        for place, after in self.points:
            x = stream(ids, positions, place, after)
            half = torch.full_like(x, 3.0)
            self.captures.write(x - half, half, place, after)
        if (taken := self.captures.take()) is not None:
            self.collector.put(taken)

    def end(self, name: str, tokens: int = EVER, last: int = -1) -> None:
        self.captures.end(name)
        self.collector.put(End(name, tokens, last))

    def read(self, name: str) -> dict[str, tuple[list[int], torch.Tensor, torch.Tensor]]:
        """request -> positions, tokens, rows of a cache."""
        assert self.collector.drain()
        cache = sf.sae.ActivationCache.open(self.settings.folder / name)
        found: dict[str, tuple[list[int], torch.Tensor, torch.Tensor]] = {}
        for shard in range(len(cache.counts)):
            tokens, positions = cache.contexts(shard)
            rows = cache.read(shard)
            for i, (request, first) in enumerate(contexts_of(cache.directory, shard)):
                here = positions // cache.info.context == i
                part = found.get(request, ([], tokens[:0, 0], rows[:0]))
                where = [*part[0], *((positions[here] % cache.info.context) + first).tolist()]
                found[request] = where, torch.cat([part[1], tokens[i]]), torch.cat([part[2], rows[here]])
        return found


def as_on_a_device(captures: Captures) -> None:
    """What a graph would write, at the same addresses in every step, and no number of which the host learns before it."""
    captures._on_host, captures.active = False, True
    captures._table._write = captures._table._on_device


def stream(ids: torch.Tensor, positions: torch.Tensor, place: str, after: bool) -> torch.Tensor:
    number = sum(map(ord, place)) + 0.5 * after
    return (ids + positions / 100 + 1000 * number)[:, None] + torch.arange(D) / 1000


@pytest.fixture(params=["as on a host", "as on a device"])
def worker(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Worker]:
    made = Worker(tmp_path)
    if request.param == "as on a device":
        as_on_a_device(made.captures)
    yield made
    made.collector.close()


def assert_rows(
    found: tuple[list[int], torch.Tensor, torch.Tensor], ids: list[int], where: list[int], place: str, after=False
) -> None:
    positions, tokens, rows = found
    assert positions == where
    assert tokens[: len(ids)].tolist() == ids
    at = torch.tensor(where)
    assert torch.equal(rows, stream(torch.tensor(ids)[at], at, place, after))


def test_each_request_has_its_own_places_and_positions(worker: Worker) -> None:
    a, b, c = [*range(10, 20)], [*range(30, 36)], [*range(50, 54)]
    worker.start("a", a[:6], steer_capture=[0, "mlp_out.1"])
    worker.start("b", b[:3], steer_capture=[0, 3], steer_capture_positions="generated")
    worker.start("d", c, steer_capture="resid_pre.2", steer_capture_edits="after", steer_capture_positions="ids:51,53")
    worker.step(("a", 0, a[:4]), ("plain", 0, [1, 2, 3]), ("b", 0, b[:3]))
    worker.step(("b", 3, b[3:4]), ("a", 4, a[4:6]), ("d", 0, c))
    for i in range(2):
        worker.step(("a", 6 + i, a[6 + i : 7 + i]), ("b", 4 + i, b[4 + i : 5 + i]))
    for name in ("a", "b", "d"):
        worker.end(name)
    found = worker.read("resid_post.0.before.float32")
    assert_rows(found["a"], a[:8], [*range(8)], "resid_post.0")
    assert_rows(found["b"], b, [3, 4, 5], "resid_post.0")
    assert_rows(worker.read("mlp_out.1.before.float32")["a"], a[:8], [*range(8)], "mlp_out.1")
    assert_rows(worker.read("resid_post.3.before.float32")["b"], b, [3, 4, 5], "resid_post.3")
    assert_rows(worker.read("resid_pre.2.after.float32")["d"], c, [1, 3], "resid_post.1", True)
    assert worker.counted["captured"] == 8 + 8 + 3 + 3 + 2
    assert worker.counted.get("capture_dropped", 0) == 0
    assert len(worker.captures) == 0


def test_the_ring_goes_round(worker: Worker) -> None:
    ids = [*range(100, 140)]
    for i in range(9):
        worker.start(f"r{i}", ids[:20], steer_capture=[0])
        for first in range(0, 40, 13):
            worker.step((f"r{i}", first, ids[first : first + 13]))
            assert worker.collector.drain()
        worker.end(f"r{i}")
    found = worker.read("resid_post.0.before.float32")
    for i in range(9):
        assert_rows(found[f"r{i}"], ids, [*range(40)], "resid_post.0")


def test_what_runs_again_is_kept_once_and_what_was_taken_back_is_gone(worker: Worker) -> None:
    worker.start("a", [1, 2, 3], steer_capture=0)
    worker.step(("a", 0, [1, 2, 3]))
    worker.step(("a", 3, [4]))
    worker.step(("a", 4, [5]))  # preempted here; its last token is sampled anew
    worker.step(("a", 0, [1, 2]))
    worker.step(("a", 2, [3, 4]))
    worker.step(("a", 4, [6]))
    worker.end("a")
    assert_rows(worker.read("resid_post.0.before.float32")["a"], [1, 2, 3, 4, 6], [0, 1, 2, 3, 4], "resid_post.0")


def test_a_draft_that_was_not_accepted_leaves_no_row_at_the_end_either(worker: Worker) -> None:
    worker.start("a", [1, 2, 3], steer_capture=0)
    worker.step(("a", 0, [1, 2, 3]))
    worker.step(("a", 3, [4, 9, 9]))
    worker.step(("a", 4, [5, 6, 9, 9]))
    worker.end("a", 6)
    found = worker.read("resid_post.0.before.float32")["a"]
    assert_rows(found, [1, 2, 3, 4, 5, 6, 0, 0], [0, 1, 2, 3, 4, 5], "resid_post.0")


def test_a_draft_that_ran_where_the_last_token_stands_leaves_no_row(worker: Worker) -> None:
    """The text ends with a token that nobody has run, or with the draft itself."""
    for name, last, kept in (("a", 6, 5), ("b", 5, 6), ("c", -1, 6)):
        worker.start(name, [1, 2, 3], steer_capture=0)
        worker.step((name, 0, [1, 2, 3]))
        worker.step((name, 3, [4, 8, 5, 9]))
        worker.end(name, 6, last)
        positions, tokens, _ = worker.read("resid_post.0.before.float32")[name]
        assert positions == [*range(kept)]
        assert tokens[5] == (5 if last < 0 else last)


def test_a_step_that_captures_nothing_leaves_the_ring_alone(worker: Worker) -> None:
    """Its places may be visited, because somebody reads there."""
    worker.start("a", [1, 2, 3, 4, 5, 6], steer_capture=0)
    worker.step(("a", 0, [1, 2, 3, 4, 5, 6]))
    before = worker.ring.buffer[: worker.ring.rows].clone()
    worker.step(("plain", 0, [7, 8, 9, 7, 8, 9]))
    worker.step(("plain", 6, [7]))
    assert torch.equal(worker.ring.buffer[: worker.ring.rows], before)


def test_a_long_text_falls_into_contexts(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "CONTEXT", 4)
    ids = [*range(7, 18)]
    worker.start("a", ids, steer_capture=0, steer_capture_positions="1:3 | -2")
    worker.step(("a", 0, ids))
    worker.end("a")
    positions, tokens, rows = worker.read("resid_post.0.before.float32")["a"]
    assert positions == [1, 2, 9]
    assert tokens.tolist() == [7, 8, 9, 10, 15, 16, 17, 0]
    assert torch.equal(rows, stream(torch.tensor([8, 9, 16]), torch.tensor([1, 2, 9]), "resid_post.0", False))


def test_a_full_ring_drops_whole_requests_and_counts_them(worker: Worker) -> None:
    stop, copy = threading.Event(), worker.collector._copy
    worker.collector._copy = lambda step: (stop.wait(30), copy(step))[1]  # type: ignore[method-assign]
    ids = [*range(20)]
    for name in ("a", "b", "c", "d"):
        worker.start(name, ids, steer_capture=[0])
        worker.step((name, 0, ids[:16]))  # four fill the ring
        worker.step((name, 16, ids[16:]))
    stop.set()
    for name in ("a", "b", "c", "d"):
        worker.end(name)
    worker.start("e", ids, steer_capture=[0])
    worker.step(("e", 0, ids), late=True)
    worker.end("e")
    found = worker.read("resid_post.0.before.float32")
    assert set(found) == {"a", "b", "c"}
    for name in found:
        assert_rows(found[name], ids, ids, "resid_post.0")
    assert worker.counted["capture_dropped"] == 4 + 16 + 20
    assert worker.counted["captured"] == 60


def test_what_is_hung_up_or_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    ids = [*range(10)]
    worker = Worker(tmp_path, room=15 * D * 4)
    for name, keep in (("hung", False), ("fits", True), ("too much", True)):
        worker.start(name, ids, steer_capture=2)
        worker.step((name, 0, ids))
        worker.end(name, EVER if keep else 0)
    worker.start("in flight", ids, steer_capture=2)
    worker.step(("in flight", 0, ids))
    assert set(worker.read("resid_post.2.before.float32")) == {"fits"}
    worker.collector.close()
    assert worker.counted == {"captured": 10, "capture_dropped": 30}
    again = Worker(tmp_path, memory=9 * D * 4)
    again.start("more", ids, steer_capture=2)
    again.step(("more", 0, ids))
    again.end("more")
    assert set(again.read("resid_post.2.before.float32")) == {"fits"}
    assert again.counted["capture_dropped"] == 10
    again.collector.close()
    assert not list(tmp_path.rglob(".*safetensors*")), "no half a file"


def test_a_disk_that_takes_no_more_is_said_and_counted(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(growing, "replace_files", full)
    worker.start("a", [1, 2], steer_capture=0)
    worker.step(("a", 0, [1, 2]))
    worker.end("a")
    assert worker.collector.drain()
    assert any("no space left" in line for line in worker.said)
    monkeypatch.undo()
    worker.collector._write(now=True)
    assert_rows(worker.read("resid_post.0.before.float32")["a"], [1, 2], [0, 1], "resid_post.0")


def test_two_servers_do_not_write_one_folder(tmp_path: Path) -> None:
    model = torch.nn.Linear(D, D)
    takers = []
    for _ in range(2):
        taker = Taker(settings(tmp_path), lambda _: None, lambda *_: None, lambda _: None)
        steered = SimpleNamespace(
            look_at=lambda *_: SimpleNamespace(d=D, name="Model"), dtype=torch.float32, places=SimpleNamespace()
        )
        takers.append((taker, steered))
    (first, steered), (second, other) = takers
    (tmp_path / "resid_post.1.before.float32").mkdir()
    (tmp_path / "resid_post.1.before.float32" / ".00003.safetensors.123").write_bytes(b"half")
    first.attach(steered, model, (0, 0), 64)
    with pytest.raises(ValueError, match="is written by another server"):
        second.attach(other, model, (0, 0), 64)
    assert not list(tmp_path.rglob("*.safetensors*")), "what a server that was killed has left is gone"
    second.attach(other, model, (0, 1), 64)  # another engine of the same server has a folder of its own
    first.close()
    second.close()
    second.attach(other, model, (0, 0), 64)
    second.close()


# --- a cache that grows ------------------------------------------------------------------------------------------------


def context(seed: int, rows: int, dtype: torch.dtype = torch.bfloat16) -> Context:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 90, (8,), generator=generator, dtype=torch.int32)
    at = torch.randperm(8, generator=generator)[:rows].sort().values.to(torch.int32)
    return Context(tokens, at, torch.randn(rows, D, generator=generator).to(dtype), (f"r{seed}", seed))


INFO = CacheInfo("Model", "resid_post", 1, D, "bfloat16", 8, 0, 3, "")


def test_a_cache_grows_is_whole_at_every_moment_and_goes_on(tmp_path: Path) -> None:
    given = [context(seed, 1 + seed % 7) for seed in range(8)]
    seen: set[str] = set()
    for i, one in enumerate(given):
        grown = GrowingCache(tmp_path, INFO)  # opened anew for every context
        grown.add(one)
        grown.write()
        cache = sf.sae.ActivationCache.open(tmp_path)
        assert len(cache) == len(grown) == sum(len(c.rows) for c in given[: i + 1])
        assert len(cache.counts) == i // 3 + 1
        assert torch.equal(
            torch.cat([cache.read(s) for s in range(len(cache.counts))]), torch.cat([c.rows for c in given[: i + 1]])
        )
        tokens, positions = cache.contexts(i // 3)
        assert torch.equal(tokens[i % 3], one.tokens)
        assert torch.equal(positions[-len(one.rows) :], one.positions + 8 * (i % 3))
        assert contexts_of(tmp_path, i // 3)[-1] == (f"r{i}", i)
        seen.add(cache.info.text)
    assert len(seen) == len(given)
    whole = GrowingCache(tmp_path / "at once", INFO)
    for one in given:
        whole.add(one)
    whole.write()
    assert sf.sae.ActivationCache.open(tmp_path / "at once").info == cache.info
    with pytest.raises(ValueError, match="holds another cache"):
        GrowingCache(tmp_path, replace(INFO, layer=2))


def test_a_shard_of_many_bytes_is_filled_up_with_empty_contexts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growing, "FULL", 6 * D * 2)
    given = [context(seed, 5) for seed in range(5)]
    grown = GrowingCache(tmp_path, INFO)
    for one in given:
        grown.add(one)
    grown.write()
    cache = sf.sae.ActivationCache.open(tmp_path)
    assert cache.counts == (10, 10, 5)
    assert torch.equal(torch.cat([cache.read(s) for s in range(3)]), torch.cat([c.rows for c in given]))
    assert contexts_of(tmp_path, 0) == [("r0", 0), ("r1", 1), ("", 0)]
    again = GrowingCache(tmp_path, INFO)
    again.add(context(9, 5))
    assert sf.sae.ActivationCache.open(tmp_path).counts == (10, 10, 10)


def test_captured_rows_train_an_sae(worker: Worker) -> None:
    ids = [*range(40)]
    for i in range(6):
        worker.start(f"r{i}", ids, steer_capture=0)
        for first in range(0, 40, 10):
            worker.step((f"r{i}", first, ids[first : first + 10]))
            assert worker.collector.drain()
        worker.end(f"r{i}")
    assert worker.collector.drain()
    cache = sf.sae.ActivationCache.open(worker.settings.folder / "resid_post.0.before.float32")
    sae = sf.sae.train_sae(cache, sf.sae.TrainConfig(features=16, k=2, tokens=480, batch=48))
    assert sae.origin.place == ("resid_post", 0)
    assert torch.equal(sae.encode(cache.read(0)), sae.encode(cache.read(0)))
