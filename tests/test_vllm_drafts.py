"""Speculative decoding: what is drafted and not accepted leaves no score, no row, no decision and no count.

A third of the drafts of an n-gram are accepted here, and those of the second model wherever its text is the same.
"""

from __future__ import annotations

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
    tiny_edits,
    tiny_plans,
    tiny_probes,
)

pytestmark = [needs_vllm, pytest.mark.vllm]
TOKENS = 16
# In this order: after Numba, which looks n-grams up, vLLM 0.32 finds no kernels for a second model in the same process.
DRAFTS = {
    "draft_model": {"method": "draft_model"},
    "ngram": {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1},
}


class Engine:
    """The tiny model with drafts; the second model of `draft_model` is the same one, unsteered."""

    def __init__(self, folder: Path, method: str) -> None:
        from vllm import LLM

        self.folder = folder
        self.model = tiny(folder / "model")
        self.plans = tiny_plans(folder / "plans")
        self.probes = tiny_probes(folder / "probes", folder / "saes")
        self.plans |= tiny_edits(folder / "plans", self.probes)
        drafts: dict[str, Any] = DRAFTS[method] | {"num_speculative_tokens": 3}
        if method == "draft_model":
            drafts["model"] = str(folder / "model")
        self.llm = LLM(
            str(folder / "model"),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=48,
            gpu_memory_utilization=0.2,
            enforce_eager=True,
            speculative_config=drafts,
            disable_log_stats=False,
        )

    def outputs(self, requests: list[tuple[list[int], dict[str, Any] | None]], **more: Any) -> list[Any]:
        from vllm import SamplingParams

        common: dict[str, Any] = {"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "detokenize": False}
        params = [SamplingParams(**common | more, extra_args=extra) for _, extra in requests]
        return self.llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)

    def drafted(self) -> tuple[int, int]:
        """How many tokens were drafted, and how many of them accepted."""
        found = {metric.name.split("spec_decode_num_")[-1]: metric for metric in self.llm.get_metrics()}
        return found["draft_tokens"].value, found["accepted_tokens"].value


@pytest.fixture(scope="module", params=DRAFTS)
def engine(request, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = {f"STEERFAST_{name.upper()}": str(folder / name) for name in ("plans", "probes", "saes")}
    settings["STEERFAST_CAPTURE"] = str(folder / "capture")
    with environment(**ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", **settings):
        made = Engine(folder, request.param)
        yield made
        made.llm.llm_engine.engine_core.shutdown()


def prompts(seed: int, count: int) -> list[list[int]]:
    """Texts that repeat themselves, so that there is something to look up."""
    return [2 * random.Random(seed + i).choices(range(3, 120), k=7 + i) for i in range(count)]


def test_a_text_is_steered_read_and_captured_as_without_drafts(engine) -> None:
    truth = Transformers(engine.model)
    before = engine.drafted()
    names = ["add", "many", "flow", "once", "held", "top", "rows", "between", "norm"]
    asked = [[], *([(name, 1.0)] for name in names), [("norm", 0.5), ("add", -1.0)]]
    texts = prompts(0, len(asked))
    read = reads(*engine.probes)
    capture = {"steer_capture": [1, 2], "steer_capture_dtype": "float32"}
    requests = [(ids, {**fields(*steered), **read, **capture}) for ids, steered in zip(texts, asked, strict=True)]
    outputs = engine.outputs(requests)
    engine.outputs([(texts[0], None)])  # the step that tells the worker of the others' end
    drafted, accepted = (now - then for now, then in zip(engine.drafted(), before, strict=True))
    assert 0 < accepted < drafted
    runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert runner.steerfast_taker.collector.drain()
    for ids, steered, output in zip(texts, asked, outputs, strict=True):
        plans = [(engine.plans[name], weight) for name, weight in steered]
        wanted, _ = truth.generate(ids, [(*plan, None) for plan in plans], TOKENS)
        assert list(output.outputs[0].token_ids) == wanted, steered
        assert_scores(engine.model, output, engine.probes, plans)
        assert_rows_captured(engine.model, output, engine.folder / "capture", plans, "before")


def test_what_a_text_has_said_and_what_was_decided_go_back_with_a_draft(engine) -> None:
    """Every token that is drafted opens or closes a span somewhere, and the condition holds until another score takes it back."""
    truth, draw = Transformers(engine.model), random.Random(3)
    texts, asked = prompts(20, 8), []
    for i, ids in enumerate(texts):
        some = [*map(str, draw.sample(range(128), 80))]
        opens, closes = ",".join(some[:40]), ",".join(some[40:])
        where = f"between:ids:{opens}..{closes}" if i % 3 else f"after:ids:{ids[-1]},{opens} & generated"
        asked.append((ids, "add" if i % 2 else "held", where))
    outputs = engine.outputs([(ids, fields((name, 1.0)) | {"steer_positions": where}) for ids, name, where in asked])
    differ = 0
    for (ids, name, where), output in zip(asked, outputs, strict=True):
        wanted, _ = truth.generate(ids, [(engine.plans[name], 1.0, where)], TOKENS)
        assert list(output.outputs[0].token_ids) == wanted, (name, where)
        differ += wanted != truth.generate(ids, [(engine.plans[name], 1.0, None)], TOKENS)[0]
    assert differ >= 4


def test_a_limit_ends_a_text_at_an_accepted_token_and_a_stop_leaves_nothing_behind_it(engine) -> None:
    texts = prompts(40, 4)
    plain = engine.outputs([(ids, reads("lean", steer_read_positions="generated")) for ids in texts])
    for ids, output in zip(texts, plain, strict=True):
        tokens, found = list(output.outputs[0].token_ids), output.kv_transfer_params["steerfast"]["lean"]
        limit = sum(sorted(found["scores"])[-5:-3]) / 2
        at = next(i for i, score in enumerate(found["scores"]) if score > limit)
        (ended,) = engine.outputs([(ids, reads("lean", steer_read_positions="generated", steer_abort=f"lean>{limit}"))])
        assert list(ended.outputs[0].token_ids) == tokens[: at + 1]
        assert ended.outputs[0].stop_reason.startswith("steer_abort: lean>")
        got = ended.kv_transfer_params["steerfast"]["lean"]
        assert got["positions"] == found["positions"][: at + 1]
        (stopped,) = engine.outputs([(ids, reads("lean"))], stop_token_ids=[tokens[7]])
        stop = tokens.index(tokens[7])
        assert list(stopped.outputs[0].token_ids) == tokens[: stop + 1]
        assert stopped.kv_transfer_params["steerfast"]["lean"]["positions"] == [*range(len(ids) + stop)]


def test_drafts_behind_a_prompt_of_which_one_token_is_left_leave_no_score(engine) -> None:
    """vLLM adds drafts, of which none is accepted, to the first step of such a prompt, once others decode."""
    from vllm import SamplingParams

    draw = random.Random(9)
    requests = [
        ([draw.randrange(3, 120) for _ in range(9 if i < 4 else 1)], 30 if i < 4 else 1 + i % 5) for i in range(24)
    ]
    params = [
        SamplingParams(
            temperature=0.0,
            max_tokens=count,
            ignore_eos=True,
            detokenize=False,
            extra_args=reads(*engine.probes, steer_read_positions="generated"),
        )
        for _, count in requests
    ]
    outputs = engine.llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
    for output in outputs:
        assert_scores(engine.model, output, engine.probes, [], "generated")


def test_what_is_counted_is_what_the_text_has(engine) -> None:
    counters = engine.llm.llm_engine.input_processor.steerfast.counters
    before = counters.total()["tokens"]["norm"]
    texts = prompts(60, 3)
    engine.outputs([(ids, fields(("norm", 1.0))) for ids in texts])
    assert counters.total()["tokens"]["norm"] - before == sum(len(ids) + TOKENS - 1 for ids in texts)
