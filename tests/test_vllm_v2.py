"""Steering inside vLLM's V2 runner, the default on GPUs: on a CPU, with every Triton kernel of vLLM and ours interpreted.

vLLM takes V2 only where Triton has a driver, so a stub driver says that there is one. Run by itself:

    TRITON_INTERPRET=1 python -m pytest tests/test_vllm_v2.py
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from vllm_engines import (
    ENVIRONMENT,
    Transformers,
    assert_rows_captured,
    assert_scores,
    environment,
    fields,
    needs_vllm,
    pretend_that_triton_runs_here,
    reads,
    tiny,
    tiny_edits,
    tiny_plans,
    tiny_probes,
)

pytestmark = [
    needs_vllm,
    pytest.mark.vllm,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"),
]
TOKENS = 5


class Engine:
    def __init__(self, folder: Path, features: bool) -> None:
        from vllm import LLM

        self.folder = folder
        self.model = tiny(folder / "model")
        self.plans = tiny_plans(folder / "plans")
        self.probes = tiny_probes(folder / "probes", folder / "saes")
        if features:  # every step runs them, whoever is steered, as on a GPU: five times as long under the interpreter
            self.plans |= tiny_edits(folder / "plans", self.probes)
        self.llm = LLM(
            str(folder / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
        )
        places = self.runner.steerfast.places
        places.table._write, places._on_host = places.table._on_device, False  # as on a GPU
        captures = places.captures
        captures._table._write = captures._table._on_device
        captures._on_host, captures.active = False, True

    def run(self, requests: list[tuple[list[int], dict[str, Any] | None]]) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.outputs(requests)]

    def outputs(self, requests: list[tuple[list[int], dict[str, Any] | None]]) -> list[Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=extra)
            for _, extra in requests
        ]
        prompts: Any = [{"prompt_token_ids": ids} for ids, _ in requests]
        return self.llm.generate(prompts, params, use_tqdm=False)

    @property
    def runner(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module", params=[False], ids=["slots"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """An engine with slots and probes; also with edits of SAE features where a test says so."""
    folder = tmp_path_factory.mktemp("v2")
    pretend_that_triton_runs_here()
    with environment(
        **ENVIRONMENT,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_USE_V2_MODEL_RUNNER="1",
        STEERFAST_PLANS=str(folder / "plans"),
        STEERFAST_PROBES=str(folder / "probes"),
        STEERFAST_SAES=str(folder / "saes"),
        STEERFAST_BACKEND="triton",
        STEERFAST_CAPTURE=str(folder / "captured"),
        STEERFAST_COLUMNS="4",
    ):
        yield Engine(folder, features=request.param)


with_features = pytest.mark.parametrize("engine", [True], indirect=True, ids=["features"])


def prompt(seed: int, length: int) -> list[int]:
    return random.Random(seed).choices(range(3, 120), k=length)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_every_request_of_a_batch_gets_what_transformers_computes(engine, positions) -> None:
    """Our kernels as they run on a GPU, on a batch of all plans, with chunked prefill and unsteered neighbours."""
    truth = Transformers(engine.model)
    asked = [[], [("add", 1.0)], [("many", 1.0)], [("norm", 0.5), ("add", -1.0)], [("flow", 1.0)], []]
    prompts = [prompt(i, 40 if i == 3 else 7 + i) for i in range(len(asked))]
    requests = [
        (ids, {**fields(*steered), "steer_positions": positions} if steered else None)
        for ids, steered in zip(prompts, asked, strict=True)
    ]
    found = engine.run(requests)
    for ids, steered, got in zip(prompts, asked, found, strict=True):
        wanted, _ = truth.generate(ids, [(engine.plans[name], s, positions) for name, s in steered], TOKENS)
        assert got == wanted, steered
    assert found[1:5] != engine.run([(ids, None) for ids in prompts])[1:5]


def test_a_row_for_each_of_a_prompts_first_tokens(engine) -> None:
    """Through our kernels, beside edits of every token; one prompt is shorter than the rows, one comes in chunks."""
    truth = Transformers(engine.model)
    asked = [[("rows", 1.0)], [("rows", -1.5), ("norm", 1.0)], [("rows", 2.0)], [("add", 1.0)]]
    prompts = [prompt(20, 3), prompt(21, 40), prompt(22, 8), prompt(23, 8)]
    found = engine.run([(ids, fields(*steered)) for ids, steered in zip(prompts, asked, strict=True)])
    for ids, steered, got in zip(prompts, asked, found, strict=True):
        wanted, _ = truth.generate(ids, [(engine.plans[name], s, None) for name, s in steered], TOKENS)
        assert got == wanted, steered
    assert found != engine.run([(ids, None) for ids in prompts])


def test_requests_read_what_transformers_reads(engine) -> None:
    """Beside steered and plain requests, one of them in chunks; the places are read before and after our kernels edit them."""
    asked = [[], [("add", 1.0)], [("norm", 0.5), ("add", -1.0)], [("flow", 1.0)]]
    prompts = [prompt(30 + i, 40 if i == 1 else 7 + i) for i in range(len(asked))]
    names = list(engine.probes)
    plain = engine.run([(ids, fields(*steered)) for ids, steered in zip(prompts, asked, strict=True)])
    outputs = engine.outputs(
        [(ids, {**fields(*steered), **reads(*names)}) for ids, steered in zip(prompts, asked, strict=True)]
    )
    assert [list(output.outputs[0].token_ids) for output in outputs] == plain
    for steered, output in zip(asked, outputs, strict=True):
        assert_scores(engine.model, output, engine.probes, [(engine.plans[name], s) for name, s in steered])
    engine.run([(prompts[0], None)])
    assert engine.runner.steerfast.reading == 0


def test_requests_capture_what_transformers_has(engine) -> None:
    """Before and behind the edits of a place, one request in chunks, beside requests that are only steered."""
    asked = [[], [("add", 1.0)], [("add", 1.0)], [("many", 1.0)]]
    prompts = [prompt(70 + i, 40 if i == 1 else 7 + i) for i in range(len(asked))]
    edits = ["before", "before", "after", None]
    places = {"steer_capture": [1, 2], "steer_capture_dtype": "float32"}
    requests = [
        (ids, {**fields(*steered), **({**places, "steer_capture_edits": when} if when else {})})
        for ids, steered, when in zip(prompts, asked, edits, strict=True)
    ]
    outputs = engine.outputs(requests)
    engine.run([(prompts[0], None)])
    assert engine.runner.steerfast_taker.collector.drain()
    for steered, when, output in zip(asked[:3], edits, outputs, strict=False):
        plans = [(engine.plans[name], s) for name, s in steered]
        assert_rows_captured(engine.model, output, engine.folder / "captured", plans, when)


@with_features
def test_features_of_a_top_k_sae_are_edited_beside_what_reads_them(engine) -> None:
    """Counted by our kernels, or from the encode of a probe; alone, between slots of a bank, where a text has said something."""
    truth = Transformers(engine.model)
    prompts = [prompt(60 + i, 40 if i == 1 else 7 + i) for i in range(5)]
    plain = engine.run([(ids, None) for ids in prompts])
    told = [None, f"between:ids:{prompts[1][20]}..{plain[1][2]}", f"after:ids:{plain[2][1]}", None, None]
    asked = [[("top", 1.0)], [("top", 1.0)], [("top", 2.0)], [("between", 1.0)], [("top", 0.5), ("between", 0.5)]]
    requests = [
        (ids, fields(*steered) | ({} if where is None else {"steer_positions": where}))
        for ids, steered, where in zip(prompts, asked, told, strict=True)
    ]
    found = engine.run(requests)
    for ids, steered, where, got in zip(prompts, asked, told, found, strict=True):
        wanted, _ = truth.generate(ids, [(engine.plans[name], s, where) for name, s in steered], TOKENS)
        assert got == wanted, (steered, where)
    assert sum(one != other for one, other in zip(found, plain, strict=True)) >= 3
    outputs = engine.outputs([(ids, {**extra, **reads("top")}) for ids, extra in requests[:1] + requests[3:]])
    assert [list(output.outputs[0].token_ids) for output in outputs] == [found[0], *found[3:]]
    assert_scores(engine.model, outputs[0], {"top": engine.probes["top"]}, [(engine.plans["top"], 1.0)])


def test_conditions_are_decided_on_the_device(engine) -> None:
    """Through our kernels, in prompts that come in chunks and in decoding; of some requests the last prompt token is shut out."""
    truth = Transformers(engine.model)
    prompts = [prompt(50 + i, 40 if i % 3 == 1 else 7 + i) for i in range(6)]
    asked = [[(name, 1.0)] for name in ("held", "once", "once", "held", "once")] + [[]]
    found = engine.run(
        [(ids, fields(*steered) if steered else None) for ids, steered in zip(prompts, asked, strict=True)]
    )
    acted = set()
    for ids, steered, got in zip(prompts, asked, found, strict=True):
        wanted, _ = truth.generate(ids, [(engine.plans[name], s, None) for name, s in steered], TOKENS)
        assert got == wanted, steered
        plain, _ = truth.generate(ids, [], TOKENS)
        acted |= {(name, got != plain) for name, _ in steered}
    assert ("held", True) in acted
    assert len(engine.runner.steerfast.gates._requests) == 0 or engine.run([(prompts[0], None)])


def test_trap_5_it_is_the_second_runner_that_was_steered_and_nothing_is_left_in_it(engine) -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    assert isinstance(engine.runner, GPUModelRunner)
    engine.run([(prompt(9, 4), fields(("many", 1.0)))])
    engine.run([(prompt(8, 4), None)])
    assert (engine.runner.steerfast.steered, engine.runner.steerfast.held) == (0, 0)
    assert bool((engine.runner.steerfast.table.rows == -1).all())
