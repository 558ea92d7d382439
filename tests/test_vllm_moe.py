"""Mixtures of experts: alone, cut over two workers, shared out among them; and an engine that has slept."""

from __future__ import annotations

import os
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


# vLLM's experts for CPUs take an expert's number among all for its number among those of the worker. A plugin of vLLM's own form
# looks it up in the map that they are given, in every process of the engine; all else of expert parallelism is as vLLM has it.
EXPERTS = """
def mend():
    import torch
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    from steerfast.vllm import guards

    def apply(self, **given):
        if (expert_map := given["expert_map"]) is not None:
            ids = expert_map[given["topk_ids"].long()]
            given["topk_weights"] = torch.where(ids < 0, 0, given["topk_weights"])
            given["topk_ids"] = ids.clamp(min=0).int()
            assert len(given["w1"]) < given["global_num_experts"], "this worker has all experts"
        original(self, **given)

    original, CPUUnquantizedExperts.apply = CPUUnquantizedExperts.apply, apply
    guards.overlooks_experts = lambda: False
"""


def install_experts(folder: Path) -> None:
    (folder / "experts_of_a_worker.py").write_text(EXPERTS)
    info = folder / "experts_of_a_worker-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: experts-of-a-worker\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nexperts = experts_of_a_worker:mend\n")


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

    from steerfast.vllm import worker_seams

    seen: list[str] = []
    inside: list[str] = []
    made: list[tuple[str, ...]] = []

    @contextmanager
    def pool(worker: Any, tag: str) -> Iterator[None]:
        seen.append(tag)
        inside.append(tag)
        yield
        inside.remove(tag)

    class Watched(worker_seams.Steered):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            made.append(tuple(inside))
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(Worker, "_maybe_get_memory_pool_context", pool)
    monkeypatch.setattr(worker_seams, "Steered", Watched)
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


def test_experts_that_are_shared_out_among_two_workers_are_steered_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case(qwen, tmp_path)
    install_experts(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with environment(**ENVIRONMENT, **settings(tmp_path), PYTHONPATH=path):
        llm = case.engine(tensor_parallel_size=2, enable_expert_parallel=True)
        case.assert_served_by(llm)
        llm.llm_engine.engine_core.shutdown()
