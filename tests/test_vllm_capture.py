"""Captures and the file of scores inside vLLM's V1 runner on a CPU, against transformers: one engine for all tests.

It is as scarce as that of `test_vllm_read.py`: 4 slots, 64 tokens a step (chunked prefill), 384 tokens of keys and values.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_engines import (
    ENVIRONMENT,
    NO_SAVED_FUNCTION,
    PROMPT,
    WIDTH,
    Transformers,
    captured_rows,
    environment,
    fields,
    needs_vllm,
    reads,
    save,
    unit,
)

import steerfast as sf
from steerfast.sae.growing import contexts_of
from steerfast.vllm import register

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.model]
TOKENS = 6
LONG = "The quick brown fox jumps over the lazy dog and runs away from the old grey wolf. " * 6
ROWS = 640
"""Of the ring: what two of these prompts take at two places."""


class Engine:
    """An LLM that captures, beside its plans and probes."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        from steerfast.models import demo as demo_model

        self.folder, self.scores = folder / "captured", folder / "scores.jsonl"
        scarce = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 12, "block_size": 32}
        self.llm = LLM(
            str(demo_model.path()),
            dtype="float32",
            max_model_len=256,
            gpu_memory_utilization=0.2,
            disable_log_stats=False,
            **scarce,  # type: ignore[arg-type]
        )

    def run(self, requests: list[tuple[str, dict[str, Any] | None]], tokens: int = TOKENS, **more: Any) -> list[Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                **{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "extra_args": extra, **more}
            )
            for _, extra in requests
        ]
        return self.llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def taker(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner.steerfast_taker

    def settle(self) -> None:
        """Nothing of any request is left, and all that has ended is on disk."""
        self.run([("once more", None)], tokens=2)
        assert self.taker.collector.drain()
        steered = self.core.model_executor.driver_worker.worker.model_runner.steerfast
        assert len(steered.places.captures) == 0
        assert not steered.places.captures.active
        assert not self.core.scheduler.requests

    def captured(self, output: Any, name: str) -> tuple[list[int], torch.Tensor, list[int]]:
        """Positions, rows and tokens that a cache has of a request."""
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
        positions, rows, tokens = captured_rows(self.folder / name, output.request_id)
        return positions, rows, tokens[: len(ids)]

    def counted(self, field: str) -> float:
        return self.core.scheduler.steerfast.counters.total()[field][""]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("capture")
    plans = save(folder / "plans")
    probes = {
        "linear": sf.probes.LinearProbe(unit(21), 0.5, place=8),
        "rows": sf.probes.LinearProbe(torch.stack([unit(22), unit(23)]), place=29),
    }
    for name, probe in probes.items():
        probe.save(folder / "probes" / name)
    with environment(
        **ENVIRONMENT,
        **NO_SAVED_FUNCTION,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        STEERFAST_PLANS=str(folder / "plans"),
        STEERFAST_PROBES=str(folder / "probes"),
        STEERFAST_SLOTS="4",
        STEERFAST_SCORES=str(folder / "scores.jsonl"),
        STEERFAST_CAPTURE=str(folder / "captured"),
        STEERFAST_CAPTURE_PLACES="8, resid_pre.0, attn_out.9, mlp_out.20, 28",
        STEERFAST_CAPTURE_TOKENS="200",
        STEERFAST_CAPTURE_RING=str(ROWS * WIDTH * 4),
    ):
        made = Engine(folder)
        made.plans, made.probes = plans, probes  # type: ignore[attr-defined]
        yield made
        made.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def truth() -> Transformers:
    return Transformers()


def captures(*places: Any, **more: Any) -> dict[str, Any]:
    """The wire form of capturing these places in float32."""
    return {"steer_capture": list(places), "steer_capture_dtype": "float32", **more}


@torch.inference_mode()
def stream(
    truth: Transformers, output: Any, place: tuple[str, int], plans: list[tuple[sf.Plan, float]], after: bool
) -> Any:
    """What transformers has at a place, for every token that has run, in one pass under the same plans."""
    ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]])
    eye = torch.eye(WIDTH)
    with ExitStack() as stack:
        for plan, strength in plans:
            stack.enter_context(
                sf.steer(truth.model, plan, strength=strength, prompt_length=len(output.prompt_token_ids))
            )
        probe = sf.probes.LinearProbe(eye, torch.zeros(WIDTH), place=place, after=after)
        reading = stack.enter_context(sf.read(truth.model, {"all": probe}))
        truth.model(input_ids=ids)
        return reading["all"].values[0]


def assert_captured(
    engine: Engine,
    truth: Transformers,
    output: Any,
    place: tuple[str, int],
    plans: list[tuple[str, float]],
    asked: tuple[str, bool] = ("all", False),
) -> None:
    positions, after = asked
    wanted = stream(truth, output, place, [(engine.plans[name], s) for name, s in plans], after)  # type: ignore[attr-defined]
    name = f"{place[0]}.{place[1]}.{'after' if after else 'before'}.float32"
    where, rows, tokens = engine.captured(output, name)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    prompt = len(output.prompt_token_ids)
    expected = [
        i
        for i in range(len(wanted))
        if {
            "all": True,
            "generated": i >= prompt,
            "last": i >= prompt - 1,
            "1:9 | last": 1 <= i < 9 or i >= prompt - 1,
        }[positions]
    ]
    # With asynchronous scheduling the last token of a text may have run, too.
    assert [i for i in where if i < len(wanted)] == expected, (name, where)
    assert tokens == ids[:-1]
    rows = rows[: len(expected)]
    close = 1e-3 * max(1.0, float(wanted.abs().max()) / 100)
    assert (rows - wanted[expected]).abs().max() < close, name


@pytest.mark.parametrize("positions", ["all", "generated", "last", "1:9 | last"])
def test_captured_rows_are_those_of_transformers(engine, truth, positions) -> None:
    """Chunked prefill; captures, steered and plain requests share the batches; before and behind the edits of a place."""
    asked: list[tuple[list[tuple[str, int]], list[tuple[str, float]], str]] = [
        ([("resid_post", 8), ("resid_pre", 0)], [], "before"),
        ([], [("love", 1.0)], "before"),
        ([("resid_post", 8)], [("love", 1.0)], "before"),
        ([("resid_post", 8)], [("love", 1.0)], "after"),
        ([("attn_out", 9), ("mlp_out", 20)], [("sites", 1.0)], "after"),
        ([], [], "before"),
        ([("resid_post", 28)], [("ablate", 0.5)], "before"),
    ]
    requests: list[tuple[str, Any]] = []
    for places, plans, edits in asked:
        extra = dict(fields(*plans)) if plans else {}
        if places:
            named = [layer if site == "resid_post" else f"{site}.{layer}" for site, layer in places]
            extra |= captures(*named, steer_capture_positions=positions, steer_capture_edits=edits)
        requests.append((LONG, extra or None))
    # One after the other fills the ring less: what is dropped has a test of its own.
    outputs = (
        [output for request in requests for output in engine.run([request])]
        if positions == "all"
        else engine.run(requests)
    )
    plain = engine.run([(LONG, None)])[0]
    assert outputs[5].outputs[0].token_ids == plain.outputs[0].token_ids == outputs[0].outputs[0].token_ids
    assert len(outputs[0].prompt_token_ids) > 64, "this prompt must take more than one step"
    engine.settle()
    for (places, plans, edits), output in zip(asked, outputs, strict=True):
        for place in places:
            assert_captured(engine, truth, output, place, plans, (positions, edits == "after"))


def test_tokens_from_the_prefix_cache_have_no_stream_so_none_are_taken_where_it_is_captured(engine, truth) -> None:
    prompt = "Hear me. " + LONG[:250]
    engine.run([(prompt, None)])
    assert engine.run([(prompt, None)])[0].num_cached_tokens > 0
    for positions, cached in (("all", False), ("last", True), ("generated", True)):
        (output,) = engine.run([(prompt, captures(8, steer_capture_positions=positions))])
        assert (output.num_cached_tokens > 0) == cached, positions
        engine.settle()
        assert_captured(engine, truth, output, ("resid_post", 8), [], (positions, False))


def test_a_preempted_request_yields_no_row_twice(engine, truth) -> None:
    before = sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")
    lost = engine.counted("capture_dropped")
    requests = [
        ("Once upon a time there was a king who", captures(8, steer_capture_positions=p)) for p in ("all", "last") * 4
    ]
    outputs = engine.run(requests, tokens=48)
    assert sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions") > before
    engine.settle()
    assert engine.counted("capture_dropped") == lost
    for (_, extra), output in zip(requests, outputs, strict=True):
        assert_captured(engine, truth, output, ("resid_post", 8), [], (extra["steer_capture_positions"], False))


def test_a_request_that_is_hung_up_leaves_no_row(engine) -> None:
    from vllm import SamplingParams

    inner, written = engine.llm.llm_engine, engine.counted("captured")
    lost = engine.counted("capture_dropped")
    for name in ("hung one", "hung two"):
        inner.add_request(name, LONG, SamplingParams(max_tokens=50, ignore_eos=True, extra_args=captures(8, 28)))
    for _ in range(5):
        inner.step()
    inner.abort_request(["hung one", "hung two"])
    engine.settle()
    assert engine.counted("captured") == written
    assert engine.counted("capture_dropped") > lost
    for folder in engine.folder.iterdir():
        if folder.is_dir():
            cache = sf.sae.ActivationCache.open(folder)
            for shard in range(len(cache.counts)):
                assert not any(name.startswith("hung") for name, _ in contexts_of(folder, shard))


def test_an_end_by_text_is_no_hang_up(engine, truth) -> None:
    (plain,) = engine.run([(PROMPT, None)], tokens=12)
    text = plain.outputs[0].text.split()[3]
    (output,) = engine.run([(PROMPT, captures(8))], tokens=12, stop=[text])
    assert output.outputs[0].finish_reason == "stop"
    engine.settle()
    assert_captured(engine, truth, output, ("resid_post", 8), [])


@contextmanager
def stalled(collector: Any) -> Iterator[None]:
    """The collecting thread stands still."""
    go, copy = threading.Event(), collector._copy
    collector._copy = lambda step: (go.wait(60), copy(step))[1]
    try:
        yield
    finally:
        collector._copy = copy
        go.set()


def test_a_full_ring_drops_counts_and_slows_nobody(engine, truth) -> None:
    engine.settle()
    lost, written = engine.counted("capture_dropped"), engine.counted("captured")
    prompts = [f"{i} {LONG}" for i in range(6)]
    before = engine.run([(prompt, None) for prompt in prompts])
    with stalled(engine.taker.collector):
        outputs = engine.run([(prompt, captures(8, 28)) for prompt in prompts])
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in before]
    engine.settle()
    assert engine.counted("capture_dropped") > lost
    found = engine.counted("captured") - written
    length = [len(o.prompt_token_ids) + TOKENS for o in outputs]
    assert found < 2 * sum(length) - 6 * 2, "not all of them fit"
    (output,) = engine.run([(PROMPT, captures(8))])
    engine.settle()
    assert_captured(engine, truth, output, ("resid_post", 8), [])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"steer_capture": 30}, "layer 30 is out of range; this model has 30 layers"),
        ({"steer_capture": 7}, "'resid_post.7' is not captured by this engine, which offers 5 places"),
        ({"steer_capture": "../etc/passwd"}, "expected a layer, or a place such as 'mlp_out.12'"),
        ({"steer_capture": True}, "expected a layer"),
        ({"steer_capture": [8.0]}, "expected a layer"),
        ({"steer_capture": []}, "is an empty list"),
        ({"steer_capture": [8] * 11}, "names 11 places; this engine offers 5"),
        ({"steer_capture_dtype": "float32"}, "steer_capture_dtype is given without steer_capture"),
        ({"steer_capture": 8, "steer_capture_dtype": "float8"}, "expected 'bfloat16' or 'float32'"),
        ({"steer_capture": 8, "steer_capture_edits": "around"}, "expected 'before' or 'after'"),
        ({"steer_capture": 8, "steer_capture_positions": "sometimes"}, "expected all, prompt, generated, last"),
        ({"steer_capture": 8, "steer_capture_positions": "after:ids:5"}, "is not kept inside vLLM"),
        ({"steer_capture": 8, "steer_capture_positions": "special"}, "names special tokens"),
        ({"steer_capture": 8, "steer_capture_positions": "99"}, "position 99 is out of range"),
        ({"steer_capture": 8, "steer_capture_positions": "90:99"}, "the window 90:99 lies outside this prompt"),
        ({"steer_capture": [8, 28, "mlp_out.20"], "steer_capture_path": "/tmp"}, "unknown field 'steer_capture_path'"),
    ],
)
def test_what_cannot_be_captured_is_refused_and_leaves_the_others_alone(engine, truth, bad, reason) -> None:
    with pytest.raises(ValueError, match="steer: ") as error:
        engine.run([(PROMPT, captures(8)), (PROMPT, bad)])
    assert reason in str(error.value)
    engine.settle()


def test_what_is_beyond_the_bounds_is_refused(engine) -> None:
    with pytest.raises(
        ValueError, match="may take 207 tokens of this request, 4 of prompt and up to 204 new ones"
    ) as error:
        engine.run([(PROMPT, captures(8))], tokens=204)
    assert "at most 200 of one" in str(error.value)
    with pytest.raises(ValueError, match="n=2 would capture the prompt 2 times"):
        engine.run([(PROMPT, captures(8))], n=2, temperature=1.0)


def test_what_was_captured_trains_an_sae(engine) -> None:
    engine.run([(f"{i}. {LONG}", captures(8)) for i in range(2)])
    engine.settle()
    cache = sf.sae.ActivationCache.open(engine.folder / "resid_post.8.before.float32")
    config = sf.sae.TrainConfig(features=64, k=4, tokens=320, batch=64)
    sae = sf.sae.train_sae(cache, config)
    assert sae.origin.place == ("resid_post", 8)
    assert torch.isfinite(sae.decode(sae.encode(cache.read(0)))).all()


def test_the_file_of_scores_has_what_the_answers_have(engine) -> None:
    (first, second) = engine.run([(PROMPT, reads("linear", "rows")), (LONG, {"steer_read": "linear"})])
    engine.settle()
    from steerfast.vllm import seams

    seams._served.sink.close()
    lines = [json.loads(line) for line in engine.scores.read_text().splitlines()]
    found = {(line["request"], line["probe"], line["name"]): line for line in lines}
    answer = first.kv_transfer_params["steerfast"]
    line = found[first.request_id, "linear", None]
    assert line["scores"] == pytest.approx(answer["linear"]["scores"])
    assert (line["positions"], line["prompt"]) == (answer["linear"]["positions"], len(first.prompt_token_ids))
    for i, name in enumerate(("0", "1")):
        assert found[first.request_id, "rows", name]["scores"] == pytest.approx(
            [s[i] for s in answer["rows"]["scores"]]
        )
    short = second.kv_transfer_params["steerfast"]["linear"]
    line = found[second.request_id, "linear", None]
    assert len(line["scores"]) == short["tokens"]
    assert max(line["scores"]) == pytest.approx(short["max"])
    assert engine.counted("scores_written") == sum(len(line["scores"]) for line in lines)
    engine.run([(PROMPT, reads("linear"))])
    assert engine.counted("scores_dropped") > 0, "a closed file drops and counts"


@pytest.mark.parametrize(
    ("folder", "request_timeout", "timeout", "given"),
    [
        ("captured", 0, 0, 15.0),
        ("captured", 0, None, None),
        ("captured", 0, 3, 3),
        ("captured", 5, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_an_engine_that_is_stopped_at_once_has_time_to_write(
    monkeypatch: pytest.MonkeyPatch, folder: str, request_timeout: int, timeout: float | None, given: float | None
) -> None:
    """A server that is not told to wait for its requests leaves the processes of its engine no time at all."""
    from vllm.v1.engine import utils

    register()
    asked: list[Any] = []
    monkeypatch.setattr(utils, "shutdown", lambda processes, timeout: asked.append(timeout))
    monkeypatch.setenv("STEERFAST_CAPTURE", folder)
    manager: Any = object.__new__(utils.CoreEngineProcManager)
    manager.processes, manager.manager_stopped = [], threading.Event()
    manager._finalizer = SimpleNamespace(detach=lambda: True)
    manager._request_shutdown_timeout = request_timeout
    manager.shutdown(timeout=timeout)
    assert asked == [given]
