"""Reading inside vLLM's V1 runner on a CPU, against `sf.read` in transformers: one engine for all tests.

It is as scarce as that of `test_vllm_v1.py`: 4 slots, 64 tokens a step (chunked prefill), 384 tokens of keys and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm_engines import (
    CLOSE_SCORE,
    ENVIRONMENT,
    LAYERS,
    NO_SAVED_FUNCTION,
    PROMPT,
    WIDTH,
    Transformers,
    assert_scores,
    environment,
    fields,
    gated,
    needs_vllm,
    reads,
    save,
    unit,
)

import steerfast as sf

pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.model]
TOKENS = 6
LONG = "The quick brown fox jumps over the lazy dog and runs away from the old grey wolf. " * 6


def probes() -> dict[str, sf.probes.Probe]:
    """One probe of every kind and site, before and after edits."""
    barrier = sf.Barrier(torch.stack([unit(20)]), torch.zeros(1), torch.ones(1), 0.0)
    generator = torch.Generator().manual_seed(7)
    rows = torch.randn(48, WIDTH, generator=generator) / 8
    sae = sf.SAE(rows, rows, b_enc=torch.full((48,), 0.1), threshold=torch.zeros(48))
    return {
        "linear": sf.probes.LinearProbe(unit(21), 0.5, place=8),
        "linear after": sf.probes.LinearProbe(unit(21), 0.5, place=8, after=True),
        "rows": sf.probes.LinearProbe(torch.stack([unit(22), unit(23)]), torch.tensor([0.0, 1.0]), place=29),
        "logistic": sf.probes.LogisticProbe(unit(24), -0.2, place=12),
        "similar": sf.probes.SimilarityProbe(torch.stack([unit(25), unit(26)]), place=8),
        "tanh": sf.probes.SimilarityProbe(unit(27), "tanh", place=14),
        "barrier": sf.probes.BarrierProbe(barrier, place=14),
        "feature": sf.probes.FeatureProbe(sae, 5, place=10),
        "features": sf.probes.FeatureProbe(sae, [3, 40], place=10),
        "entering": sf.probes.LinearProbe(unit(28), place=("resid_pre", 5)),
        "embedding": sf.probes.LinearProbe(unit(29), place=("resid_pre", 0)),
        "attention": sf.probes.LinearProbe(unit(30), place=("attn_out", 9)),
        "mlp": sf.probes.LinearProbe(unit(31), place=("mlp_out", 20)),
    }


def save_probes(folder: Path) -> dict[str, sf.probes.Probe]:
    made = probes()
    for name, probe in made.items():
        probe.save(folder / name)
    sf.probes.LinearProbe(torch.ones(7), place=3).save(folder / "narrow")
    sf.probes.LinearProbe(unit(1), place=LAYERS).save(folder / "deep")
    sf.probes.LinearProbe(unit(1)).save(folder / "nowhere")
    return made


class Engine:
    """An LLM beside its plans and probes."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        from steerfast.models import demo as demo_model

        self.plans = save(folder / "plans") | gated(folder / "plans", LONG)
        self.probes = save_probes(folder / "probes")
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
            SamplingParams(
                **{"temperature": 0.0, "max_tokens": tokens, "ignore_eos": True, "extra_args": extra, **more}
            )
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
        """Nothing of any request is left."""
        self.run([("once more", None)], tokens=2)
        left = (len(self.core.scheduler.steerfast_desk), self.steered.reading, self.steered.held, self.steered.steered)
        return left == (0, 0, 0, 0) and not self.core.scheduler.requests and not self.steered.readers.at


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("read")
    with environment(
        **ENVIRONMENT,
        **NO_SAVED_FUNCTION,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        STEERFAST_PLANS=str(folder / "plans"),
        STEERFAST_PROBES=str(folder / "probes"),
        STEERFAST_SLOTS="4",
    ):
        made = Engine(folder)
        yield made
        made.llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def truth() -> Transformers:
    return Transformers()


def assert_read(engine, truth, output, names, plans=(), positions="all") -> None:
    steered = [(engine.plans[name], strength) for name, strength in plans]
    assert_scores(truth.model, output, {name: engine.probes[name] for name in names}, steered, positions)


def test_every_kind_of_probe_reads_what_transformers_reads(engine, truth) -> None:
    names = list(engine.probes)
    before = engine.run([(PROMPT, None)])[0]
    (output,) = engine.run([(PROMPT, reads(*names))])
    assert output.outputs[0].token_ids == before.outputs[0].token_ids
    assert before.kv_transfer_params is None
    assert_read(engine, truth, output, names)
    assert engine.idle()


@pytest.mark.parametrize("positions", ["all", "generated", "last", "1:9 | last"])
def test_readers_steered_and_plain_requests_share_a_batch(engine, truth, positions) -> None:
    """Chunked prefill, scarce slots, probes of its own for every request; a probe sees the stream before its place is edited."""
    names = ["linear", "logistic", "linear after"]
    asked: list[tuple[list[str], list[tuple[str, float]]]] = [
        (names, []),
        ([], [("love", 1.0)]),
        (["linear", "linear after"], [("love", 1.0)]),
        (["rows"], [("ablate", 0.5)]),
        (["feature", "entering"], [("norm", 1.0), ("love", -0.5)]),
        ([], []),
        (["mlp", "attention", "embedding"], [("sites", 1.0)]),
    ]
    requests: list[tuple[str, Any]] = []
    for read, plans in asked:
        extra = {**(fields(*plans) if plans else {}), **(reads(*read, steer_read_positions=positions) if read else {})}
        requests.append((LONG, extra or None))
    outputs = engine.run(requests)
    assert len(outputs[0].prompt_token_ids) > 64, "this prompt must take more than one step"
    for (read, plans), output in zip(asked, outputs, strict=True):
        if read:
            assert_read(engine, truth, output, read, plans, positions)
        else:
            assert output.kv_transfer_params is None
    steered = outputs[2].kv_transfer_params["steerfast"]
    assert steered["linear"]["scores"] != steered["linear after"]["scores"]
    assert engine.idle()


def test_tokens_from_the_prefix_cache_have_no_scores_so_none_are_taken_where_they_are_read(engine, truth) -> None:
    prompt = "Hear me. " + LONG[:250]
    engine.run([(prompt, None)])
    assert engine.run([(prompt, None)])[0].num_cached_tokens > 0
    for positions, cached in (("all", False), ("prompt", False), ("-2", False), ("last", True), ("generated", True)):
        (output,) = engine.run([(prompt, reads("linear", "rows", steer_read_positions=positions))])
        assert (output.num_cached_tokens > 0) == cached, positions
        assert_read(engine, truth, output, ["linear", "rows"], positions=positions)
    assert engine.run([(prompt, None)])[0].num_cached_tokens > 0, "what a reader computes may be shared"


def test_selectors_that_look_at_tokens(engine, truth) -> None:
    (plain,) = engine.run([(LONG, None)])
    ids = sorted({*plain.prompt_token_ids[3:40:6], *plain.outputs[0].token_ids[:3]})
    for positions in (
        f"ids:{','.join(map(str, ids))}",
        f"after:ids:{plain.prompt_token_ids[30]}",
        f"!ids:{ids[0]} & prompt",
    ):
        (output,) = engine.run([(LONG, reads("linear", steer_read_positions=positions))])
        assert 0 < output.kv_transfer_params["steerfast"]["linear"]["tokens"] < len(plain.prompt_token_ids) + TOKENS
        assert_read(engine, truth, output, ["linear"], positions=positions)


def test_a_preempted_request_counts_no_token_twice(engine, truth) -> None:
    before = sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")
    prompt, tokens = "Once upon a time there was a king who", 48
    asked = [("all", []), ("generated", [("love", 1.0)]), ("last", []), ("all", [("ablate", 1.0)])] * 2
    requests = []
    for positions, plans in asked:
        extra = reads("linear", "logistic", steer_read_positions=positions)
        requests.append((prompt, {**extra, **(fields(*plans) if plans else {})}))
    outputs = engine.run(requests, tokens=tokens)
    assert sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions") > before
    for (positions, plans), output in zip(asked, outputs, strict=True):
        assert_read(engine, truth, output, ["linear", "logistic"], plans, positions)
    assert engine.idle()


def test_a_request_that_ends_by_a_text_or_a_token_has_all_scores(engine, truth) -> None:
    """A stop text is found in the front end, when the engine has already begun the next token."""
    (plain,) = engine.run([(PROMPT, None)], tokens=12)
    text = plain.outputs[0].text.split()[3]
    (by_text,) = engine.run([(PROMPT, reads("linear"))], tokens=12, stop=[text])
    (by_token,) = engine.run([(PROMPT, reads("linear"))], tokens=12, stop_token_ids=[plain.outputs[0].token_ids[4]])
    for output in (by_text, by_token):
        assert output.outputs[0].finish_reason == "stop"
        assert len(output.outputs[0].token_ids) < 12
        assert_read(engine, truth, output, ["linear"])
    (short,) = engine.run([(PROMPT, reads("linear", steer_read_positions="generated"))], tokens=1)
    assert_read(engine, truth, short, ["linear"], positions="generated")  # the only new token is never run
    assert engine.idle()


def test_every_sample_has_its_own_scores(engine, truth) -> None:
    (output,) = engine.run([(PROMPT, reads("linear"))], n=3, temperature=1.0, seed=3)
    found = output.kv_transfer_params["steerfast"]
    assert len(found) == 3
    assert len({tuple(sample.token_ids) for sample in output.outputs}) > 1
    for sample, answer in zip(output.outputs, found, strict=True):
        ids = torch.tensor([[*output.prompt_token_ids, *sample.token_ids[:-1]]])
        with torch.inference_mode(), sf.read(truth.model, {"linear": engine.probes["linear"]}) as reading:
            truth.model(input_ids=ids)
        assert torch.allclose(torch.tensor(answer["linear"]["scores"]), reading["linear"].values[0], atol=CLOSE_SCORE)


def test_without_tokens_an_answer_is_a_few_numbers(engine) -> None:
    both = engine.run([(PROMPT, {"steer_read": "rows"}), (PROMPT, reads("rows"))])
    short, long = (output.kv_transfer_params["steerfast"]["rows"] for output in both)
    assert list(short) == ["tokens", "names", "max", "mean", "last"]
    assert {name: long[name] for name in short if name != "tokens"}.keys() < long.keys()
    assert short["names"] == ["0", "1"]
    assert short["max"] == pytest.approx(long["max"], abs=1e-4)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"steer_read": "nobody"}, "there is no probe 'nobody'; this engine has 13 probes"),
        ({"steer_read": "../linear"}, "there is no probe '../linear'"),
        ({"steer_read": "narrow"}, "'narrow' cannot be read: it has width 7; this model has 576"),
        ({"steer_read": "deep"}, "layer 30 is out of range; this model has 30 layers"),
        ({"steer_read": "nowhere"}, "does not say where it is read"),
        ({"steer_read": 7}, "steer_read is 7; expected a probe's name"),
        ({"steer_read": ["linear"] * 65}, "names 65 probes; at most 64"),
        ({"steer_read": "linear", "steer_read_positions": "sometimes"}, "expected all, prompt, generated, last"),
        ({"steer_read": "linear", "steer_read_positions": "special"}, "a probe does not say which"),
        ({"steer_read": "linear", "steer_read_positions": "99"}, "position 99 is out of range"),
        ({"steer_read": "linear", "steer_read_what": "everything"}, "expected 'request' or 'tokens'"),
        ({"steer_read_what": "tokens"}, "without steer_read"),
        ({"steer_abort": "nobody>1"}, "there is no probe 'nobody'"),
        (
            {"steer_abort": "linear>much"},
            "steer_abort is 'linear>much'; expected a probe's name, > or <, and a finite number",
        ),
        ({"steer_abort": "linear>nan"}, "a finite number"),
        ({"steer_abort": "linear"}, "a finite number"),
        ({"steer_abort": [["linear>1"]]}, "a finite number"),
        ({"steer_abort": "rows>1"}, "'rows' gives several numbers per token"),
    ],
)
def test_what_cannot_be_read_is_refused_and_leaves_the_others_alone(engine, truth, bad, reason) -> None:
    good = (PROMPT, reads("linear"))
    with pytest.raises(ValueError, match="steer: ") as error:
        engine.run([good, (PROMPT, bad), good])
    assert reason in str(error.value)
    assert engine.idle()
    assert_read(engine, truth, engine.run([good])[0], ["linear"])


def test_an_aborted_reader_leaves_nothing(engine) -> None:
    from vllm import SamplingParams

    inner = engine.llm.llm_engine
    for name in ("one", "two"):
        inner.add_request(
            name, PROMPT, SamplingParams(max_tokens=50, ignore_eos=True, extra_args=reads("linear", "rows"))
        )
    for _ in range(4):
        inner.step()
    assert len(engine.core.scheduler.steerfast_desk) == 2
    inner.abort_request(["one", "two"])
    assert engine.idle()


def test_the_histogram_counts_what_was_read(engine) -> None:
    from prometheus_client import REGISTRY, generate_latest

    def shown() -> dict[str, float]:
        lines = generate_latest(REGISTRY).decode().splitlines()
        return {
            line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("steerfast:score")
        }

    before = shown()
    assert before['steerfast:score_bucket{le="0.5",probe="logistic"}'] >= 0
    (output,) = engine.run([(PROMPT, reads("logistic"))])
    scores, after = np.array(output.kv_transfer_params["steerfast"]["logistic"]["scores"]), shown()

    def change(key: str) -> float:
        return after[key] - before[key]

    assert change('steerfast:score_count{probe="logistic"}') == len(scores)
    assert change('steerfast:score_sum{probe="logistic"}') == pytest.approx(scores.sum(), rel=1e-5)
    for end in ("0.1", "0.5", "0.9", "+Inf"):
        key = f'steerfast:score_bucket{{le="{end}",probe="logistic"}}'
        assert change(key) == (scores <= float(end.replace("+Inf", "inf"))).sum(), end
    assert all(change(key) == 0 for key in after if 'probe="linear"' in key)


# --- conditions --------------------------------------------------------------------------------------------------------

GATED = ["when", "never", "token", "held", "below", "own", "after"]
CLOSE = 5e-3  # in log-probability, as in test_vllm_v1.py


def assert_like_transformers(engine, truth, output, prompt, steered, positions=None, tokens=TOKENS) -> None:
    wanted, likely = truth.generate(prompt, [(engine.plans[n], s, positions) for n, s in steered], tokens)
    chosen = output.outputs[0]
    assert list(chosen.token_ids) == wanted, steered
    found = torch.tensor([step[token].logprob for step, token in zip(chosen.logprobs, chosen.token_ids, strict=True)])
    assert (found - likely).abs().max() < CLOSE, steered


@pytest.mark.parametrize("prompt", [PROMPT, LONG])
def test_conditions_decide_in_a_mixed_batch_what_they_decide_in_transformers(engine, truth, prompt) -> None:
    """Each beside plain and steered requests, LONG in chunks; what is read is read behind the gates."""
    asked: list[list[tuple[str, float]]] = [
        [],
        *([(name, 1.0)] for name in GATED),
        [("love", 1.0)],
        [("token", 0.5), ("love", 0.5)],
    ]
    outputs = engine.run(
        [(prompt, {**fields(*plans), **reads("rows")} if plans else None) for plans in asked], logprobs=0
    )
    for plans, output in zip(asked, outputs, strict=True):
        assert_like_transformers(engine, truth, output, prompt, plans)
        if plans:
            assert_read(engine, truth, output, ["rows"], plans)
    likely = {
        str(plans): [next(iter(step.values())).logprob for step in o.outputs[0].logprobs]
        for plans, o in zip(asked, outputs, strict=True)
    }
    assert (likely["[]"] == likely["[('never', 1.0)]"]) or np.allclose(
        likely["[]"], likely["[('never', 1.0)]"], atol=1e-5
    )
    acts = {name for name in GATED if not np.allclose(likely["[]"], likely[str([(name, 1.0)])], atol=1e-3)}
    assert acts >= {"token", "held", "own", "after"}
    assert ("when" in acts) == (prompt == PROMPT), "its request is open, the other shut"
    assert engine.idle()


@pytest.mark.parametrize("positions", ["prompt", "generated", "last"])
def test_conditions_stay_within_the_positions_of_the_request(engine, truth, positions) -> None:
    # What is decided in a prompt that the plan does not touch, transformers refuses to read.
    names = [name for name in GATED if positions != "generated" or name not in ("when", "never", "held")]
    requests = [(LONG, {**fields((name, 1.0)), "steer_positions": positions}) for name in names]
    for name, output in zip(names, engine.run(requests, logprobs=0), strict=True):
        assert_like_transformers(engine, truth, output, LONG, [(name, 1.0)], positions)


def test_requests_with_conditions_keep_their_state_when_rows_move_and_when_they_are_preempted(engine, truth) -> None:
    before = sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions")
    prompt, names = "Once upon a time there was a king who", ["when", "held", "token", "held"] * 2
    lengths = [48, 40, 30, 20, 44, 36, 28, 12]
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True, logprobs=0, extra_args=fields((name, 1.0)))
        for name, n in zip(names, lengths, strict=True)
    ]
    outputs = engine.llm.generate([prompt] * len(params), params, use_tqdm=False)
    assert sum(m.value for m in engine.llm.get_metrics() if m.name == "vllm:num_preemptions") > before
    for name, output, tokens in zip(names, outputs, lengths, strict=True):
        assert_like_transformers(engine, truth, output, prompt, [(name, 1.0)], tokens=tokens)
    assert engine.idle()
    assert not engine.steered.gates._requests


def test_a_gated_request_takes_nothing_from_the_prefix_cache_and_shares_nothing_with_others(engine, truth) -> None:
    prompt = "Once more: " + LONG[:250]
    for _ in range(2):
        (output,) = engine.run([(prompt, fields(("held", 1.0)))], logprobs=0)
        assert output.num_cached_tokens == 0
        assert_like_transformers(engine, truth, output, prompt, [("held", 1.0)])
    (plain,) = engine.run([(prompt, None)], logprobs=0)
    assert_like_transformers(engine, truth, plain, prompt, [])


def test_a_condition_that_is_read_later_than_it_acts_is_refused(engine) -> None:
    with pytest.raises(
        ValueError, match="is read at resid_post 20, and it is to act at resid_post 9, which comes first"
    ):
        engine.run([(PROMPT, fields(("late", 1.0)))])


# --- ending a request --------------------------------------------------------------------------------------------------


def record(scores: list[float]) -> tuple[int, float]:
    """The last token that exceeds all before it, but for the first, and a limit that it is the first to cross."""
    best = [max(scores[:i]) for i in range(1, len(scores))]
    at = max(i for i in range(1, len(scores)) if scores[i] > best[i - 1])
    return at, (scores[at] + best[at - 1]) / 2


def test_a_request_ends_with_the_token_that_crosses_a_limit(engine, truth) -> None:
    """Beside one that crosses nothing, one that is below a limit, and one that is steered."""
    asked = reads("linear", steer_read_positions="generated")
    plain, steered = engine.run([(PROMPT, asked), (PROMPT, {**asked, **fields(("love", 1.0))})], tokens=24)
    found = [output.kv_transfer_params["steerfast"]["linear"]["scores"] for output in (plain, steered)]
    up, high = record(found[0])
    down, low = record([-score for score in found[0]])
    other, love = record(found[1])
    outputs = engine.run(
        [
            (PROMPT, {**asked, "steer_abort": f"linear>{high}"}),
            (PROMPT, {**asked, "steer_abort": ["logistic>2", f"linear<{-low}"]}),
            (PROMPT, {**asked, "steer_abort": f"linear>{love}", **fields(("love", 1.0))}),
            (PROMPT, {**asked, "steer_abort": f"linear>{max(found[0]) + 1}"}),
            (PROMPT, None),
        ],
        tokens=24,
    )
    whole = list(plain.outputs[0].token_ids)
    wanted = [whole[: up + 1], whole[: down + 1], list(steered.outputs[0].token_ids)[: other + 1], whole, whole]
    assert [list(output.outputs[0].token_ids) for output in outputs] == wanted
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop"] * 3 + ["length"] * 2
    reasons = [output.outputs[0].stop_reason for output in outputs]
    assert reasons == [
        f"steer_abort: linear>{high:g}",
        f"steer_abort: linear<{-low:g}",
        f"steer_abort: linear>{love:g}",
        None,
        None,
    ]
    crossing = outputs[0].kv_transfer_params["steerfast"]["linear"]
    assert crossing["tokens"] == up + 1, "the token that crosses is the last one, and has its score"
    assert crossing["last"] == crossing["max"] > high
    assert engine.idle()


def test_a_prompt_that_crosses_is_not_answered_and_not_run_to_its_end(engine) -> None:
    (whole,) = engine.run([(LONG, reads("linear"))])
    scores = whole.kv_transfer_params["steerfast"]["linear"]["scores"]
    early = max(scores[:60]) - 1e-3
    late = max(scores[len(whole.prompt_token_ids) - 20 : len(whole.prompt_token_ids)])
    outputs = engine.run(
        [
            (LONG, {"steer_abort": f"linear>{early}"}),
            (LONG, {"steer_abort": f"linear>{late - 1e-3}", "steer_read_positions": "-20: & prompt"}),
            (LONG, {"steer_abort": f"linear>{max(scores) + 1}"}),
        ]
    )
    assert [len(output.outputs[0].token_ids) for output in outputs] == [0, 0, TOKENS]
    assert [output.outputs[0].text == "" for output in outputs] == [True, True, False]
    assert outputs[0].outputs[0].stop_reason == f"steer_abort: linear>{early:g}"
    found = outputs[0].kv_transfer_params["steerfast"]["linear"]
    assert 0 < found["tokens"] <= 64, "further chunks were run"
    assert found["max"] > early, "what its prompt has read so far is answered"
    assert engine.idle()
