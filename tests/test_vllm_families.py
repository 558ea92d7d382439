"""Traps 6 and 7: blocks that carry the stream as one tensor, under names that no list of names would hold.

vLLM has its own GPT-2; GPT-NeoX it runs through its backend for models of transformers, whose stream is (1, n, d)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engines import ENVIRONMENT, Transformers, environment, fields, needs_vllm, tiny_plans

pytestmark = [needs_vllm, pytest.mark.vllm]
TOKENS = 5


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=128, n_positions=256, n_embd=128, n_layer=3, n_head=4, initializer_range=0.1)
    )


def neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = GPTNeoXConfig(vocab_size=128, max_position_embeddings=256, initializer_range=0.1, **sizes)
    return GPTNeoXForCausalLM(config)


@pytest.mark.parametrize("build", [gpt2, neox])
def test_traps_6_7_any_block_is_found_by_structure(build, tmp_path: Path) -> None:
    from vllm import LLM, SamplingParams

    torch.manual_seed(0)
    model = build().float().eval()
    model.save_pretrained(tmp_path / "model")
    plans = tiny_plans(tmp_path / "plans")
    asked: list[list[tuple[str, float]]] = [[], [("add", 1.0)], [("many", 1.0)], [("norm", 1.0)], [("flow", 1.0)]]
    prompts = [random.Random(i).choices(range(3, 120), k=6 + i) for i in range(len(asked))]
    truth = Transformers(model)  # asked first: an engine in this process decorates the classes of transformers
    wanted = [
        truth.generate(ids, [(plans[name], s, None) for name, s in steered], TOKENS)[0]
        for ids, steered in zip(prompts, asked, strict=True)
    ]
    with environment(**ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", STEERFAST_PLANS=str(tmp_path / "plans")):
        llm = LLM(
            str(tmp_path / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=8,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
        )
        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=TOKENS,
                ignore_eos=True,
                detokenize=False,
                extra_args=fields(*steered) if steered else None,
            )
            for steered in asked
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
        llm.llm_engine.engine_core.shutdown()
