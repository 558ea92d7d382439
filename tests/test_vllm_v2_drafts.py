"""Drafts on vLLM's V2 runner, with every Triton kernel of vLLM and ours interpreted. Run by itself:

TRITON_INTERPRET=1 python -m pytest tests/test_vllm_v2_drafts.py
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
TOKENS = 4


def test_what_the_second_runner_drafts_and_takes_back_leaves_nothing(tmp_path: Path) -> None:
    """The second model is the same one, unsteered: right where nobody steers, and wrong here and there where somebody does."""
    model = tiny(tmp_path / "model")
    probes = tiny_probes(tmp_path / "probes", tmp_path / "saes")
    plans = tiny_plans(tmp_path / "plans") | tiny_edits(tmp_path / "plans", probes)
    asked = [None, "held", "top"]
    texts = [2 * random.Random(i).choices(range(3, 120), k=7 + i) for i in (0, 2, 3)]
    said = f"between:ids:{','.join(map(str, range(40)))}..{','.join(map(str, range(60, 110)))}"
    pretend_that_triton_runs_here()
    folders = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    folders |= {
        "STEERFAST_BACKEND": "triton",
        "STEERFAST_COLUMNS": "4",
        "STEERFAST_CAPTURE": str(tmp_path / "captured"),
    }
    runner = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    with environment(**ENVIRONMENT, **folders, **runner):
        from vllm import LLM, SamplingParams
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        llm = LLM(
            str(tmp_path / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=64,
            max_num_seqs=8,
            max_num_batched_tokens=48,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
            disable_log_stats=False,
            speculative_config={
                "method": "draft_model",
                "model": str(tmp_path / "model"),
                "num_speculative_tokens": 2,
            },
        )
        core: Any = llm.llm_engine.engine_core
        here = core.engine_core.model_executor.driver_worker.worker.model_runner
        assert isinstance(here, GPUModelRunner)
        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
        wishes = [fields((name, 1.0)) if name else {} for name in asked]
        read = [reads(*probes) | {"steer_capture": [1], "steer_capture_dtype": "float32"} | wish for wish in wishes]
        read.append(fields(("add", 1.0)) | {"steer_positions": said})
        texts.append(texts[0])
        params = [SamplingParams(**common, extra_args=wish) for wish in read]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in texts], params, use_tqdm=False)
        llm.generate(
            [{"prompt_token_ids": texts[0][:3]}], [SamplingParams(max_tokens=1, detokenize=False)], use_tqdm=False
        )
        assert (here.steerfast.steered, here.steerfast.reading, here.steerfast.held) == (0, 0, 0)
        assert here.steerfast_taker.collector.drain()
        found: Any = {metric.name.split("spec_decode_num_")[-1]: metric for metric in llm.get_metrics()}
        llm.llm_engine.engine_core.shutdown()
    truth = Transformers(model)
    for ids, name, output in zip(texts, asked, outputs, strict=False):
        steered = [(plans[name], 1.0)] if name else []
        assert list(output.outputs[0].token_ids) == truth.generate(ids, [(*one, None) for one in steered], TOKENS)[0], (
            name
        )
        assert_scores(model, output, probes, steered)
        assert_rows_captured(model, output, tmp_path / "captured", steered, "before", layers=(1,))
    assert list(outputs[-1].outputs[0].token_ids) == truth.generate(texts[0], [(plans["add"], 1.0, said)], TOKENS)[0]
    assert 0 < found["accepted_tokens"].value < found["draft_tokens"].value
