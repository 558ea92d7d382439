"""Steering inside vLLM's V1 runner on a CPU, with torch.compile, against transformers: one engine for all tests.

Everything is made scarce on purpose: 4 slots for 10 interventions, 64 tokens a step (chunked prefill), 384 tokens of keys
and values (preemption). The engine runs in this process, so that what is left behind can be counted.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_engines import ENVIRONMENT, PROMPT, Transformers, environment, fields, needs_vllm, save

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.model]
TOKENS = 6
LONG = "The quick brown fox jumps over the lazy dog and runs away from the old grey wolf. " * 6
CLOSE = 5e-3  # in log-probability: float32 in another order of summation, over 30 layers


class Engine:
    """An LLM beside its plans."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        from steerfast.models import demo as demo_model

        self.folder = folder
        self.plans = save(folder)
        scarce = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_gpu_blocks_override": 12, "block_size": 32}
        self.llm = LLM(
            str(demo_model.path()),
            dtype="float32",
            max_model_len=256,
            gpu_memory_utilization=0.2,
            disable_log_stats=False,
            **scarce,  # type: ignore[arg-type]
        )

    def run(self, requests: list[tuple[str, dict[str, Any] | None]], tokens: int = TOKENS, **more: Any) -> list[Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0, extra_args=extra, **more)
            for _, extra in requests
        ]
        return self.llm.generate([prompt for prompt, _ in requests], params, use_tqdm=False)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def steered(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner.steerfast

    def idle(self) -> bool:
        """Nothing of any request is left: no slot, no holder, no line of the table, nobody waiting."""
        self.run([("once more", None)], tokens=2)  # what has ended is told with the next step
        desk = self.core.scheduler.steerfast_slots
        left = (desk.free, desk.waiting, desk.requests, self.steered.held, self.steered.steered)
        return left == (4, 0, 0, 0, 0) and not self.core.scheduler.requests


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("plans")
    with environment(
        **ENVIRONMENT, VLLM_ENABLE_V1_MULTIPROCESSING="0", STEERFAST_PLANS=str(folder), STEERFAST_SLOTS="4"
    ):
        made = Engine(folder)
        yield made
        made.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def truth() -> Transformers:
    return Transformers()


def ids(output: Any, which: int = 0) -> list[int]:
    return list(output.outputs[which].token_ids)


def logprobs(output: Any) -> torch.Tensor:
    chosen = output.outputs[0]
    return torch.tensor([step[token].logprob for step, token in zip(chosen.logprobs, chosen.token_ids, strict=True)])


def counted(engine: Engine, metric: str) -> float:
    return sum(m.value for m in engine.llm.get_metrics() if m.name == metric)


def assert_like_transformers(engine, truth, output, prompt, steered, positions=None, tokens=TOKENS) -> None:
    wanted, likely = truth.generate(prompt, [(engine.plans[n], s, positions) for n, s in steered], tokens)
    assert ids(output) == wanted, steered
    assert (logprobs(output) - likely).abs().max() < CLOSE, steered


def test_trap_3_the_engine_under_test_compiles_and_is_salted(engine) -> None:
    """Trap 3: a compiled graph of an engine without steering, or with other places, is never taken from the cache."""
    from vllm.config import CompilationMode

    config = engine.llm.llm_engine.vllm_config
    assert config.compilation_config.mode != CompilationMode.NONE  # on a CPU: one graph of the whole model
    places = config.additional_config["steerfast"]
    assert {"resid_post.8", "resid_pre.0", "attn_out.9", "mlp_out.20"} <= set(places)
    ours = config.compute_hash()
    config.additional_config["steerfast"] = places[1:]
    fewer = config.compute_hash()
    del config.additional_config["steerfast"]
    without = config.compute_hash()
    config.additional_config["steerfast"] = places
    assert len({ours, fewer, without}) == 3


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_traps_1_8_10_12_every_request_of_a_batch_gets_what_transformers_computes(engine, truth, positions) -> None:
    """All kinds of interventions and all positions in one batch of mixed strengths, between unsteered requests.

    Traps 1, 8, 10 and 12: norms, gates and projections see the whole stream, nothing is folded into the graph, cached
    decode steps are steered, and a push whose features all exceed their target divides nothing by nothing."""
    asked = [[(name, 1.0)] for name in engine.plans] + [
        [("love", 0.4)],
        [("love", -0.5)],
        [("norm", 0.7), ("love", 0.3)],
    ]
    requests: list[tuple[str, Any]] = [(PROMPT, None)]
    requests += [(PROMPT, {**fields(*steered), "steer_positions": positions}) for steered in asked] + [(PROMPT, None)]
    outputs = engine.run(requests)
    for steered, output in zip([[], *asked, []], outputs, strict=True):
        assert_like_transformers(engine, truth, output, PROMPT, steered, positions)
    assert len({tuple(ids(output)) for output in outputs}) > 3
    assert engine.idle()


def test_a_plans_own_positions_hold_where_the_request_names_none(engine, truth) -> None:
    (output,) = engine.run([(PROMPT, fields(("flow", 1.0)))])
    assert_like_transformers(engine, truth, output, PROMPT, [("flow", 1.0)])


@pytest.mark.parametrize("positions", ["prompt", "last", "generated"])
def test_chunked_prefill_means_the_same_positions(engine, truth, positions) -> None:
    (output,) = engine.run([(LONG, {**fields(("love", 1.5)), "steer_positions": positions})])
    assert len(output.prompt_token_ids) > 64, "this prompt must take more than one step"
    assert_like_transformers(engine, truth, output, LONG, [("love", 1.5)], positions)


def test_selectors_mean_what_they_mean_in_hooks(engine, truth) -> None:
    """Windows in pieces, and token ids of prompt and generation, beside requests that look for none."""
    every = fields(("love", 1.5))
    plain, steered = engine.run([(LONG, None), (LONG, every)])
    spared = sorted({*plain.prompt_token_ids[3:40:6], *ids(steered)[:4]})
    selectors = ["1:9 | last", "!-4:", f"all & !ids:{','.join(map(str, spared))}", f"ids:{spared[0]},{spared[-1]} | 0"]
    requests = [(LONG, {**every, "steer_positions": selector}) for selector in selectors]
    outputs = engine.run([(LONG, every), *requests, (LONG, None)])
    for selector, output in zip(selectors, outputs[1:-1], strict=True):
        assert_like_transformers(engine, truth, output, LONG, [("love", 1.5)], selector)
        assert not torch.equal(logprobs(output), logprobs(steered)), selector
    assert engine.idle()


def test_traps_2_11_neighbours_are_bit_equal_to_the_same_batch_with_nobody_steered(engine) -> None:
    """Traps 2 and 11: an unsteered row keeps its bits, whoever is beside it, at whatever place of the batch."""
    prompts = [PROMPT, "Once upon a time", "The capital of France is", "2 + 2 ="]
    alone = engine.run([(p, None) for p in prompts])
    for steered in (fields(("love", 2.0)), fields(("ablate", 1.0)), fields(("chain", 1.0), ("norm", 1.0))):
        for where in range(4):
            mixed = engine.run([(p, steered if i == where else None) for i, p in enumerate(prompts)])
            for i in set(range(4)) - {where}:
                assert ids(mixed[i]) == ids(alone[i])
                assert torch.equal(logprobs(mixed[i]), logprobs(alone[i]))
            assert not torch.equal(logprobs(mixed[where]), logprobs(alone[where]))


def test_strength_zero_is_nobody_steered(engine) -> None:
    both = engine.run([(PROMPT, None), (PROMPT, fields(("norm", 0.0)))])
    assert ids(both[0]) == ids(both[1])
    assert (logprobs(both[0]) - logprobs(both[1])).abs().max() < 1e-5  # two places of one batch


def test_trap_4_steered_keys_and_values_are_never_shared(engine, truth) -> None:
    """Either way round, for another strength or position, and for a steered answer that comes back as a prompt."""
    prompt = "Listen. " + LONG[:250] + " In short,"  # no other test begins like this
    plain = [(prompt, None)]
    steered = [(prompt, fields(("love", 1.5)))]
    first = engine.run(plain)[0]
    assert engine.run(plain)[0].num_cached_tokens > 0, "unsteered traffic must share its cache"
    output = engine.run(steered)[0]
    assert output.num_cached_tokens == 0
    assert_like_transformers(engine, truth, output, prompt, [("love", 1.5)])
    again = engine.run(steered)[0]
    assert again.num_cached_tokens > 0, "equal steering must share its cache"
    assert ids(again) == ids(output)
    for other in (fields(("love", 1.4)), {**fields(("love", 1.5)), "steer_positions": "1:"}, fields(("norm", 1.5))):
        assert engine.run([(prompt, other)])[0].num_cached_tokens == 0
    last = engine.run([(prompt, {**fields(("love", 1.5)), "steer_positions": "last"})])[0]
    assert last.num_cached_tokens > 0, "where nothing acts the unsteered cache is right"
    assert_like_transformers(engine, truth, last, prompt, [("love", 1.5)], "last")
    back = engine.run(plain)[0]
    assert ids(back) == ids(first)
    # the second turn resends the steered answer; what was generated while steered lies in the cache, too
    answer = engine.run(steered, tokens=40)[0]
    turn = prompt + answer.outputs[0].text + " And so"
    reply = engine.run([(turn, None)])[0]
    assert reply.num_cached_tokens <= len(first.prompt_token_ids)
    assert_like_transformers(engine, truth, reply, turn, [])
    assert engine.idle()


@pytest.mark.parametrize("positions", ["generated", "last", "prompt", "!-1", "all"])
def test_an_answer_that_comes_back_is_steered_as_a_prompt(engine, truth, positions: str) -> None:
    """The same plan and selector, and other positions: the keys and values of the answer are those of no prompt."""
    asked = {**fields(("love", 3.0)), "steer_positions": positions}
    prompt = "Turn by turn. " + LONG[:200]
    answer = engine.run([(prompt, asked)], tokens=70)[0]
    turn = [*answer.prompt_token_ids, *ids(answer)]
    wanted, likely = truth.generate(turn, [(engine.plans["love"], 3.0, positions)], TOKENS)
    reply = engine.run([({"prompt_token_ids": turn}, asked)])[0]
    assert reply.num_cached_tokens >= (64 if positions == "all" else 32), "what is the same is shared"
    assert ids(reply) == wanted
    assert (logprobs(reply) - likely).abs().max() < CLOSE


def test_preempted_requests_come_back_with_their_steering(engine, truth) -> None:
    """More tokens than the cache holds: some requests are thrown out and recomputed, and P is still the prompt's length."""
    before = counted(engine, "vllm:num_preemptions")
    asked = [("love", 1.0, "last"), ("ablate", 1.0, "all"), ("love", 0.5, "generated"), ("norm", 1.0, "prompt")] * 2
    prompt, tokens = "Once upon a time there was a king who", 48
    requests = [(prompt, {**fields((name, strength)), "steer_positions": where}) for name, strength, where in asked]
    outputs = engine.run(requests, tokens=tokens)
    assert counted(engine, "vllm:num_preemptions") > before, "nothing was preempted: the test proves nothing"
    for (name, strength, where), output in zip(asked[:4], outputs[:4], strict=True):
        wanted, _ = truth.generate(prompt, [(engine.plans[name], strength, where)], tokens)
        assert ids(output) == wanted
    assert [ids(o) for o in outputs[:4]] == [ids(o) for o in outputs[4:]]
    assert engine.idle()


def test_trap_9_more_plans_than_slots_wait_and_all_finish(engine, truth) -> None:
    """Ten interventions, four slots, and a hundred strengths; while others run, plans are loaded in their place."""
    names = list(engine.plans)
    asked = [[(names[i % len(names)], 1.0 - i / 200)] for i in range(100)]
    outputs = engine.run([(PROMPT, fields(*steered)) for steered in asked], tokens=3)
    for i in (0, 13, 42, 71, 99):
        assert_like_transformers(engine, truth, outputs[i], PROMPT, asked[i], tokens=3)
    assert all(len(ids(output)) == 3 for output in outputs)
    assert engine.idle()


def test_every_sample_of_a_request_is_steered(engine, truth) -> None:
    from vllm import SamplingParams

    wanted, _ = truth.generate(PROMPT, [(engine.plans["love"], 2.0, None)], 4)
    params = SamplingParams(
        n=3, temperature=1e-4, seed=1, max_tokens=4, ignore_eos=True, extra_args=fields(("love", 2.0))
    )
    (output,) = engine.llm.generate([PROMPT], params, use_tqdm=False)
    assert [ids(output, i) for i in range(3)] == [wanted] * 3
    assert params.extra_args == fields(("love", 2.0)), "the caller's own object was changed"


def test_trap_5_chat_is_steered_like_any_prompt(engine) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True, extra_args=fields(("ablate", 1.0)))
    talk = [{"role": "user", "content": PROMPT}]
    (chat,) = engine.llm.chat([talk], params, use_tqdm=False)  # type: ignore[list-item]
    (same,) = engine.llm.generate([{"prompt_token_ids": chat.prompt_token_ids}], params, use_tqdm=False)
    (plain,) = engine.llm.generate(
        [{"prompt_token_ids": chat.prompt_token_ids}],
        SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True),
        use_tqdm=False,
    )
    assert ids(chat) == ids(same) != ids(plain)


@pytest.mark.parametrize(
    "bad",
    [
        {"steer": "nobody"},
        {"steer": "../love"},
        {"steer": ["love"] * 5},
        {"steer": "love", "steer_strength": float("nan")},
        {"steer": "love", "steer_where": "all"},
    ],
)
def test_a_request_that_cannot_be_followed_is_a_value_error_and_leaves_the_others_alone(engine, bad) -> None:
    good = (PROMPT, fields(("love", 1.0)))
    before = ids(engine.run([good])[0])
    with pytest.raises(ValueError, match="steer: "):
        engine.run([good, (PROMPT, bad), good])
    assert engine.idle(), "the requests beside it were left in the engine"
    assert ids(engine.run([good])[0]) == before


def test_an_aborted_request_gives_its_slots_back(engine) -> None:
    from vllm import SamplingParams

    inner = engine.llm.llm_engine
    params = SamplingParams(max_tokens=50, ignore_eos=True, extra_args=fields(("chain", 1.0), ("norm", 1.0)))
    waiting = SamplingParams(max_tokens=50, ignore_eos=True, extra_args=fields(("love", 1.0), ("ablate", 1.0)))
    inner.add_request("runs", PROMPT, params)
    inner.add_request("waits", PROMPT, waiting)
    for _ in range(4):
        inner.step()
    desk = engine.core.scheduler.steerfast_slots
    assert (desk.requests, desk.waiting) == (1, 1)
    inner.abort_request(["waits"])
    inner.abort_request(["runs"])
    assert engine.idle()


def test_a_default_steers_a_beam_search_where_it_means_the_same_tokens(engine, truth, monkeypatch) -> None:
    """Each step of it is a request of its own, whose prompt is a beam: "generated" would mean nothing, "prompt" everything."""
    from vllm.sampling_params import BeamSearchParams

    from steerfast.vllm import seams
    from steerfast.vllm.served import Served
    from steerfast.vllm.wire import read

    def search(**more: Any) -> list[int]:
        default = property(lambda served: read(fields(("love", 1.0)) | more, served.library))
        monkeypatch.setattr(Served, "default", default, raising=False)  # of front end, scheduler and worker
        params = BeamSearchParams(beam_width=1, max_tokens=TOKENS, ignore_eos=True)
        return engine.llm.beam_search([{"prompt": PROMPT}], params)[0].sequences[0].tokens[-TOKENS:]

    for positions in ("all", "!0", "after:ids:346"):
        wanted = truth.generate(PROMPT, [(engine.plans["love"], 1.0, positions)], TOKENS)[0]
        assert search(steer_positions=positions) == wanted, positions
    for positions in ("generated", "prompt", "last", "!-1", "0:8"):
        with pytest.raises(ValueError, match="beam search sends its beams as prompts"):
            search(steer_positions=positions)
        with pytest.raises(ValueError, match="beam search sends its beams as prompts"):  # over HTTP
            seams._to_beam_search_params(len, SimpleNamespace(vllm_xargs=None))


def test_the_counters_say_what_was_asked_and_done(engine) -> None:
    total = engine.core.scheduler.steerfast.counters.total
    before = total()
    length = len(engine.run([(PROMPT, fields(("turn", 1.0)))], tokens=6)[0].prompt_token_ids)
    engine.run([(PROMPT, {**fields(("turn", 0.5)), "steer_positions": "generated"})], tokens=6)
    after = total()
    assert after["requests"]["turn"] - before["requests"]["turn"] == 2
    # the last token that is generated is never read again
    assert after["tokens"]["turn"] - before["tokens"]["turn"] == (length + 5) + 5
    assert sum(after["waiting"].values()) == 0
    with pytest.raises(ValueError, match="steer"):
        engine.run([(PROMPT, {"steer": "turn", "steer_strength": "x"})])
    assert total()["refused"]["turn"] - before["refused"]["turn"] == 1


def test_a_plan_whose_folder_is_gone_is_still_served(engine, truth) -> None:
    """Last: plans live in memory, so that nobody can change or remove one under a request."""
    shutil.rmtree(engine.folder)
    outputs = engine.run([(PROMPT, fields((name, 1.0))) for name in engine.plans])  # all of them are loaded anew
    for name, output in zip(engine.plans, outputs, strict=True):
        assert_like_transformers(engine, truth, output, PROMPT, [(name, 1.0)])
