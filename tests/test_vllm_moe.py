"""Mixtures of experts, alone and with experts that two workers share; and an engine that has slept."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
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
    tiny_edits,
    tiny_plans,
    tiny_probes,
)

pytestmark = [needs_vllm, pytest.mark.vllm]
TOKENS = 4
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "max_position_embeddings": 256,
    "dtype": "float32",
}


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))


def qwen() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=64, norm_topk_prob=True))


class Case:
    """A tiny model, plans and probes for it, requests of every kind, and what transformers makes of them."""

    def __init__(self, build: Any, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder, self.model = folder, build().float().eval()
        self.model.save_pretrained(folder / "model")
        self.probes = tiny_probes(folder / "probes", folder / "saes")
        self.plans = tiny_plans(folder / "plans") | tiny_edits(folder / "plans", self.probes)
        self.asked = [None, *self.plans]
        self.texts = [random.Random(i).choices(range(3, 120), k=6 + i % 5) for i in range(len(self.asked))]
        truth = Transformers(self.model)  # asked first: an engine in this process decorates the classes of transformers
        self.wanted = [
            truth.generate(ids, self._steered(name), TOKENS) for ids, name in zip(self.texts, self.asked, strict=True)
        ]

    def engine(self, **more: Any) -> Any:
        from vllm import LLM

        common: dict[str, Any] = {"skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True}
        sizes: dict[str, Any] = {"max_model_len": 64, "max_num_seqs": 8, "gpu_memory_utilization": 0.2}
        return LLM(str(self.folder / "model"), **common, **sizes, **more)

    def assert_served_by(self, llm: Any) -> None:
        from vllm import SamplingParams

        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(**common, logprobs=0, extra_args=reads(*self.probes) | (fields((name, 1.0)) if name else {}))
            for name in self.asked
        ]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in self.texts], params, use_tqdm=False)
        for name, output, (tokens, likely) in zip(self.asked, outputs, self.wanted, strict=True):
            made = output.outputs[0]
            assert list(made.token_ids) == tokens, name
            got = torch.tensor([at[token].logprob for at, token in zip(made.logprobs, tokens, strict=True)])
            torch.testing.assert_close(got, likely, atol=1e-4, rtol=0)
            assert_scores(self.model, output, self.probes, [plan[:2] for plan in self._steered(name)])

    def _steered(self, name: str | None) -> list[Any]:
        return [] if name is None else [(self.plans[name], 1.0, None)]


def settings(folder: Path) -> dict[str, str]:
    return {f"STEERFAST_{name.upper()}": str(folder / name) for name in ("plans", "probes", "saes")}


def test_a_mixture_of_experts_is_steered_and_an_engine_that_has_slept_steers_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sleep discards is allocated from a pool of memory, which a CPU does not have: nothing of ours is made inside of it."""
    from vllm.v1.worker.gpu_worker import Worker

    from steerfast.vllm import seams

    seen: list[str] = []
    inside: list[str] = []
    made: list[tuple[str, ...]] = []

    @contextmanager
    def pool(worker: Any, tag: str) -> Iterator[None]:
        seen.append(tag)
        inside.append(tag)
        yield
        inside.remove(tag)

    class Watched(seams.Steered):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(tuple(inside))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(Worker, "_maybe_get_memory_pool_context", pool)
    monkeypatch.setattr(seams, "Steered", Watched)
    case = Case(mixtral, tmp_path)
    with environment(**ENVIRONMENT, **settings(tmp_path), VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        llm = case.engine()
        assert "weights" in seen
        assert made == [()]
        case.assert_served_by(llm)
        llm.sleep(level=1)
        llm.wake_up()
        case.assert_served_by(llm)
        llm.llm_engine.engine_core.shutdown()


def test_experts_that_are_cut_over_two_workers_are_steered_and_read(tmp_path: Path) -> None:
    case = Case(qwen, tmp_path)
    with environment(**ENVIRONMENT, **settings(tmp_path)):
        llm = case.engine(tensor_parallel_size=2)
        case.assert_served_by(llm)
        llm.llm_engine.engine_core.shutdown()
