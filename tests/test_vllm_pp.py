"""Steering on a pipeline of two stages: each has its own layers' edits, and hands on what probes and conditions have found.

On a CPU vLLM 0.32 runs a pipeline only where it compiles the model: eagerly its second stage has no room for the stream.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engines import (
    ENVIRONMENT,
    Transformers,
    assert_scores,
    environment,
    fields,
    needs_vllm,
    reads,
    tiny,
    tiny_edits,
    tiny_plans,
    tiny_probes,
    unit,
)

import steerfast as sf

pytestmark = [needs_vllm, pytest.mark.vllm]
TOKENS = 6


def across(folder: Path) -> tuple[dict[str, sf.Plan], sf.probes.LinearProbe]:
    """Plans of all layers that act on what the first has shown; layers 0 and 1 stand on the first stage, or 0 alone."""
    early, v = sf.probes.LinearProbe(unit(11, 128), place=0), sf.Add(unit(4, 128), 4.0)
    made = {
        "by token": sf.Plan({2: sf.WhenToken(sf.Condition(early, 0.0), v)}),
        "by request": sf.Plan({2: sf.When(sf.Condition(early, 0.0), v), 0: sf.Add(unit(5, 128))}),
        "held on": sf.Plan({2: sf.WhenToken(sf.Condition(early, 0.05, release=-0.05), v)}),
        "ends": sf.Plan({("resid_pre", 0): v, ("resid_pre", 1): sf.Add(unit(6, 128)), -1: sf.Add(unit(7, 128))}),
    }
    for name, plan in made.items():
        plan.save(folder / name)
    return made, early


def test_two_stages_steer_read_and_decide_as_one(tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams

    model = tiny(tmp_path / "model")
    plans = tiny_plans(tmp_path / "plans")
    probes = tiny_probes(tmp_path / "probes", tmp_path / "saes")
    plans |= tiny_edits(tmp_path / "plans", probes)
    more, probes["early"] = across(tmp_path / "plans")
    plans |= more
    probes["early"].save(tmp_path / "probes" / "early")
    asked = [(i % 2 == 0, name) for i, name in enumerate([None, *plans, *more])]
    texts = [random.Random(i).choices(range(3, 120), k=40 if i % 5 == 3 else 6 + i % 7) for i in range(len(asked))]
    folders = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    with environment(**ENVIRONMENT, **folders):
        llm = LLM(
            str(tmp_path / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=32,
            gpu_memory_utilization=0.2,
            pipeline_parallel_size=2,
        )
        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
        said = f"after:ids:{texts[0][3]},{texts[1][2]},7,8,9,10,11,12"
        wishes = [
            ({} if name is None else fields((name, 1.0))) | (reads(*probes) if read else {}) for read, name in asked
        ]
        wishes.append(fields(("add", 1.0)) | {"steer_positions": said})
        texts.append(texts[0])
        params = [SamplingParams(**common, logprobs=0, extra_args=wish) for wish in wishes]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in texts], params, use_tqdm=False)
        ending = {"steer_abort": "early>-1e9", "steer_read_positions": "generated"}
        (ended,) = llm.generate(
            [{"prompt_token_ids": texts[0]}], [SamplingParams(**common, extra_args=ending)], use_tqdm=False
        )
        llm.llm_engine.engine_core.shutdown()
    truth, shut = Transformers(model), 0
    for ids, (read, name), output in zip(texts, [*asked, (False, "add")], outputs, strict=True):
        where = said if output is outputs[-1] else None
        wanted, likely = truth.generate(ids, [] if name is None else [(plans[name], 1.0, where)], TOKENS)
        made = output.outputs[0]
        assert list(made.token_ids) == wanted, name
        got = torch.tensor([at[token].logprob for at, token in zip(made.logprobs, wanted, strict=True)])
        torch.testing.assert_close(got, likely, atol=1e-4, rtol=0)
        if read:
            assert_scores(model, output, probes, [] if name is None else [(plans[name], 1.0)])
        shut += name in more and torch.equal(likely, truth.generate(ids, [], TOKENS)[1])
    assert shut < len(more)
    assert len(ended.outputs[0].token_ids) == 1
    assert ended.outputs[0].stop_reason == "steer_abort: early>-1e+09"
