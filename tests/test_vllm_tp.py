"""Steering under tensor parallelism: two workers in processes of their own, a tiny model, and a server-wide default."""

from __future__ import annotations

import json
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
    reads,
    tiny,
    tiny_plans,
    tiny_probes,
)

pytestmark = [needs_vllm, pytest.mark.vllm]
TOKENS = 5


def test_two_workers_steer_and_read_alike_and_the_default_holds_for_all_who_do_not_decline(tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams

    model = tiny(tmp_path / "model")
    plans = tiny_plans(tmp_path / "plans")
    probes = tiny_probes(tmp_path / "probes", tmp_path / "saes")
    default = json.dumps({"steer": "add", "steer_strength": 0.7, "steer_read": "lean"})
    folders = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    folders["STEERFAST_CAPTURE"] = str(tmp_path / "captured")
    with environment(**ENVIRONMENT, **folders, STEERFAST_DEFAULT=default):
        llm = LLM(
            str(tmp_path / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=8,
            gpu_memory_utilization=0.2,
            tensor_parallel_size=2,
            enforce_eager=True,
        )
        asked: list[Any] = [
            (None, [("add", 0.7)]),
            ({"steer": []}, []),
            (
                fields(("many", 1.0)) | {"steer_capture": [1, 2], "steer_capture_dtype": "float32"},
                [("many", 1.0)],
            ),
            (fields(("norm", 1.0), ("add", -0.5)), [("norm", 1.0), ("add", -0.5)]),
            (fields(("flow", 1.0)) | reads(*probes), [("flow", 1.0)]),
        ]
        prompts = [random.Random(i).choices(range(3, 120), k=6 + i) for i in range(len(asked))]
        params = [
            SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, extra_args=extra)
            for extra, _ in asked
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        truth = Transformers(model)
        for ids, (_, steered), output in zip(prompts, asked, outputs, strict=True):
            wanted, _ = truth.generate(ids, [(plans[name], s, None) for name, s in steered], TOKENS)
            assert list(output.outputs[0].token_ids) == wanted, steered
            assert list(output.kv_transfer_params["steerfast"]) == (
                list(probes) if steered[:1] == [("flow", 1.0)] else ["lean"]
            )
        assert_scores(model, outputs[-1], probes, [(plans["flow"], 1.0)])
        llm.llm_engine.engine_core.shutdown()
    assert_rows_captured(model, outputs[2], tmp_path / "captured", [(plans["many"], 1.0)], "before")
