"""Two engines behind one front end: both serve the plans and probes of one folder, and count into one registry.

Each of them has slots for a few plans only, so that plans come and go in both.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
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
)

pytestmark = [needs_vllm, pytest.mark.vllm]
TOKENS = 4


def test_two_engines_steer_and_read_alike_and_count_together(tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    model = tiny(tmp_path / "model")
    probes = tiny_probes(tmp_path / "probes", tmp_path / "saes")
    plans = tiny_plans(tmp_path / "plans") | tiny_edits(tmp_path / "plans", probes)
    asked = [name for name in (None, *plans) for _ in range(2)] + ["later"]  # each of them once by either engine
    texts = [random.Random(i).choices(range(3, 120), k=6 + i % 7) for i in range(len(asked))]
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}

    async def one(llm: Any, i: int) -> Any:
        wish = reads(*probes) | ({} if asked[i] is None else fields((asked[i], 1.0)))
        params = SamplingParams(**common, extra_args=wish, output_kind=RequestOutputKind.FINAL_ONLY)
        prompt: Any = {"prompt_token_ids": texts[i]}
        return [o async for o in llm.generate(prompt, params, f"request {i}", data_parallel_rank=i % 2)][-1]

    async def run() -> tuple[list[Any], dict[str, dict[str, float]]]:
        llm = AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                str(tmp_path / "model"),
                skip_tokenizer_init=True,
                dtype="float32",
                max_model_len=64,
                max_num_seqs=8,
                gpu_memory_utilization=0.2,
                enforce_eager=True,
                data_parallel_size=2,
            )
        )
        try:
            plans["add"].save(tmp_path / "plans" / "later")
            with pytest.raises(ValueError, match="'later'"):
                await one(llm, asked.index("later"))
            outputs = await asyncio.gather(*(one(llm, i) for i in range(len(asked) - 1)))
            return outputs, llm.input_processor.steerfast.counters.total()
        finally:
            llm.shutdown()

    folders = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    with environment(**ENVIRONMENT, **folders, STEERFAST_SLOTS="8"):
        outputs, counted = asyncio.run(run())
    truth = Transformers(model)
    for name, ids, output in zip(asked, texts, outputs, strict=False):
        steered = [] if name is None else [(plans[name], 1.0)]
        assert list(output.outputs[0].token_ids) == truth.generate(ids, [(*one, None) for one in steered], TOKENS)[0], (
            name
        )
        assert_scores(model, output, probes, steered)
    assert {name: counted["requests"][name] for name in plans} == dict.fromkeys(plans, 2.0)
    for name in plans:
        most = sum(len(ids) + TOKENS - 1 for ids, one in zip(texts, asked, strict=True) if one == name)
        assert 0 < counted["tokens"][name] <= most
    assert counted["tokens"]["add"] == sum(
        len(ids) + TOKENS - 1 for ids, one in zip(texts, asked, strict=True) if one == "add"
    )
    assert sum(counted["slots"].values()) == 0
