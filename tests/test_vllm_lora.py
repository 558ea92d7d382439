"""Adapters in vLLM, without steerfast's plugin and beside steering: base and edited model in one batch, against transformers."""

from __future__ import annotations

import copy
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
from steerfast.tools.bake import bake
from steerfast.tools.lora import write_lora

pytestmark = [needs_vllm, pytest.mark.vllm]
TOKENS = 8
PROMPTS = (list(range(5, 14)), list(range(30, 45)))


def engine(model: Path) -> Any:
    """On a CPU vLLM 0.32 gives base requests the adapter of its last slot: one slot more than adapters stays empty."""
    from vllm import LLM

    sizes = {"max_model_len": 64, "max_num_seqs": 8, "gpu_memory_utilization": 0.2}
    adapters = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    return LLM(str(model), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, **sizes, **adapters)


def test_an_ablation_everywhere_is_an_adapter_for_some_requests(tmp_path: Path) -> None:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model = tiny(tmp_path / "model")
    plan = sf.tools.everywhere(model, sf.Ablate(torch.stack([unit(1, 128), unit(2, 128)])))
    write_lora(model, plan, tmp_path / "ablated")
    with_bias = write_lora(model, {1: sf.Add(unit(3, 128), 3.0)}, tmp_path / "added", "peft")
    truth = Transformers(model)
    wanted = [
        truth.generate(ids, [(plan, 1.0, None)] if steered else [], TOKENS)
        for steered in (False, True)
        for ids in PROMPTS
    ]
    ablated = LoRARequest("ablated", 1, str(tmp_path / "ablated"))
    with environment(**ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_PLUGINS=""):
        llm = engine(tmp_path / "model")
        params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
        asked = [{"prompt_token_ids": ids} for ids in (*PROMPTS, *PROMPTS)]
        outputs = llm.generate(asked, params, use_tqdm=False, lora_request=[None, None, ablated, ablated])
        for output, (tokens, logprobs) in zip(outputs, wanted, strict=True):
            made = output.outputs[0]
            assert list(made.token_ids) == tokens
            got = torch.tensor([at[token].logprob for at, token in zip(made.logprobs, tokens, strict=True)])
            torch.testing.assert_close(got, logprobs, atol=1e-4, rtol=0)
        assert wanted[0][0] != wanted[2][0]
        with pytest.raises(Exception, match="lora_bias"):  # a bias is PEFT's alone: vLLM says so, and no text comes
            llm.generate(asked[:1], params, use_tqdm=False, lora_request=LoRARequest("added", 2, str(with_bias)))
        llm.llm_engine.engine_core.shutdown()


def test_requests_with_and_without_an_adapter_are_steered_and_read_in_one_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everywhere, at what the heads give an output projection that the adapter changes, too."""
    import vllm.plugins
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    monkeypatch.setattr(
        vllm.plugins, "plugins_loaded", False
    )  # a process loads them once, and above it has loaded none
    model = tiny(tmp_path / "model")
    plans, probes = tiny_plans(tmp_path / "plans"), tiny_probes(tmp_path / "probes", tmp_path / "saes")
    plans |= tiny_edits(tmp_path / "plans", probes)
    plans["heads"] = sf.Plan({("head_out", 1): sf.Add(unit(31, 128), 5.0), 2: sf.Add(unit(32, 128))})
    plans["heads"].save(tmp_path / "plans" / "heads")
    ablation = sf.tools.everywhere(model, sf.Ablate(torch.stack([unit(1, 128), unit(2, 128)])))
    write_lora(model, ablation, tmp_path / "ablated")
    changed = copy.deepcopy(model)
    bake(changed, ablation)
    truths = {False: Transformers(model), True: Transformers(changed)}
    asked = [(bool(i % 2), name) for name in ("add", "norm", "flow", "held", "top", "heads", None) for i in range(2)]
    texts = [random.Random(i).choices(range(3, 120), k=7 + i % 5) for i in range(len(asked))]
    wanted = [
        truths[adapted].generate(ids, [] if name is None else [(plans[name], 1.0, None)], TOKENS)
        for ids, (adapted, name) in zip(texts, asked, strict=True)
    ]
    folders = {f"STEERFAST_{name.upper()}": str(tmp_path / name) for name in ("plans", "probes", "saes")}
    with environment(**ENVIRONMENT, **folders, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        llm = engine(tmp_path / "model")
        adapter = LoRARequest("ablated", 1, str(tmp_path / "ablated"))
        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(
                **common, logprobs=0, extra_args=reads(*probes) | ({} if name is None else fields((name, 1.0)))
            )
            for _, name in asked
        ]
        prompts: list[Any] = [{"prompt_token_ids": ids} for ids in texts]
        adapters = [adapter if adapted else None for adapted, _ in asked]
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
        for (adapted, name), output, (tokens, logprobs) in zip(asked, outputs, wanted, strict=True):
            made = output.outputs[0]
            assert list(made.token_ids) == tokens, (adapted, name)
            got = torch.tensor([at[token].logprob for at, token in zip(made.logprobs, tokens, strict=True)])
            torch.testing.assert_close(got, logprobs, atol=1e-4, rtol=0)
            plan = [] if name is None else [(plans[name], 1.0)]
            assert_scores(truths[adapted].model, output, probes, plan)
        llm.llm_engine.engine_core.shutdown()
