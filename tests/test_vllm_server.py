"""Steering through vLLM's OpenAI server: one eager server for everything that a client can send, good and bad."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_engines import ENVIRONMENT, PROMPT, Transformers, needs_vllm, save, unit

import steerfast as sf
from steerfast.sae.growing import contexts_of

httpx = pytest.importorskip("httpx")
pytestmark = [needs_vllm, pytest.mark.vllm, pytest.mark.model]
TOKENS = 8
MODEL = "demo"
KINDS = ("completions", "chat/completions")


class Server:
    """The server, its plans, and a client."""

    def __init__(self, folder: Path) -> None:
        from steerfast.models import demo as demo_model

        self.plans = save(folder)
        sf.Plan({3: sf.Add(torch.ones(7))}).save(folder / "narrow")
        self.probes = {
            "lean": sf.probes.LinearProbe(unit(1), place=8),
            "sure": sf.probes.LogisticProbe(unit(2), 0.3, place=20),
        }
        for name, probe in self.probes.items():
            probe.save(folder.parent / "probes" / name)
        sf.probes.LinearProbe(torch.ones(7), place=3).save(folder.parent / "probes" / "narrow")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {
            "--model": str(demo_model.path()),
            "--served-model-name": MODEL,
            "--host": "127.0.0.1",
            "--port": str(port),
            "--dtype": "float32",
            "--max-model-len": "256",
            "--max-num-seqs": "8",
            "--gpu-memory-utilization": "0.2",
        }
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
        self.log = folder.parent / "server.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, *(word for option in options.items() for word in option)],
                env=os.environ
                | ENVIRONMENT
                | {
                    "STEERFAST_PLANS": str(folder),
                    "STEERFAST_PROBES": str(folder.parent / "probes"),
                    "STEERFAST_CAPTURE": str(folder.parent / "captured"),
                    "STEERFAST_CAPTURE_PLACES": "8",
                    "STEERFAST_CAPTURE_TOKENS": "220",
                    "STEERFAST_SCORES": str(folder.parent / "scores.jsonl"),
                },
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)
        deadline = time.monotonic() + 300
        while True:
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                pytest.fail(f"the server did not start:\n{self.log.read_text()[-4000:]}")
            time.sleep(0.5)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)

    def body(self, kind: str, xargs: Any, **more: Any) -> dict[str, Any]:
        asked = {"messages": [{"role": "user", "content": PROMPT}]} if kind.startswith("chat") else {"prompt": PROMPT}
        options = {"model": MODEL, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        return {**asked, **options, **({} if xargs is None else {"vllm_xargs": xargs}), **more}

    def post(self, kind: str, xargs: Any, **more: Any) -> Any:
        # JSON knows no NaN, Python's reader does: so may any client's
        text = json.dumps(self.body(kind, xargs, **more))
        return self.http.post(f"/v1/{kind}", content=text, headers={"content-type": "application/json"})

    def text(self, kind: str, xargs: Any, **more: Any) -> str:
        answer = self.post(kind, xargs, **more)
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        return choice["message"]["content"] if kind.startswith("chat") else choice["text"]

    def stream(self, kind: str, xargs: Any) -> str:
        parts = []
        with self.http.stream("POST", f"/v1/{kind}", json=self.body(kind, xargs, stream=True)) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    parts.append(choice["delta"].get("content") or "" if kind.startswith("chat") else choice["text"])
        return "".join(parts)

    def counter(self, field: str, plan: str) -> float:
        for line in self.http.get("/metrics").text.splitlines():
            if line.startswith(f"steerfast:{field}") and f'plan="{plan}"' in line:
                return float(line.rpartition(" ")[2])
        raise AssertionError(f"/metrics says nothing of steerfast:{field} for {plan!r}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    made = Server(tmp_path_factory.mktemp("plans"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def truth() -> Transformers:
    return Transformers()


@pytest.mark.parametrize("name", ["love", "ablate", "flow", "features"])
def test_a_completion_is_what_transformers_generates(server, truth, name) -> None:
    wanted, _ = truth.generate(PROMPT, [(server.plans[name], 1.0, None)], TOKENS)
    text = truth.tokenizer.decode(wanted)
    assert server.text("completions", {"steer": name}) == text
    assert server.stream("completions", {"steer": [name], "steer_strength": [1.0]}) == text


def test_requests_at_once_each_get_their_own(server, truth) -> None:
    """Sixteen at a time, streaming and not, steered and not, each with its own strength: all as alone."""
    asked = [None, *({"steer": "love", "steer_strength": s} for s in (0.3, 0.9, 2.0)), {"steer": "ablate"}]
    alone = [server.text("completions", xargs) for xargs in asked]
    wanted, _ = truth.generate(PROMPT, [], TOKENS)
    assert alone[0] == truth.tokenizer.decode(wanted)
    assert len(set(alone)) >= 3
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit((server.text, server.stream)[i % 2], "completions", asked[i % 5]) for i in range(40)]
        assert [call.result() for call in calls] == [alone[i % 5] for i in range(40)]


def test_chat_is_steered_streaming_or_not(server) -> None:
    plain = server.text("chat/completions", None)
    steered = server.text("chat/completions", {"steer": "ablate"})
    assert steered != plain
    assert server.stream("chat/completions", {"steer": "ablate"}) == steered
    assert server.stream("chat/completions", None) == plain


BAD = [
    ({"steer": "nobody"}, "there is no plan 'nobody'"),
    ({"steer": "../plans/love"}, "there is no plan '../plans/love'"),
    ({"steer": "narrow"}, "has width 7; this model has 576"),
    ({"steer": ["love"] * 10_000}, "names 10000 plans; at most 4"),
    ({"steer": ["chain", "chain", "love"]}, "apply 5 interventions"),
    ({"steer": 7}, "expected a plan's name"),
    ({"steer": "love", "steer_strength": float("nan")}, "expected a finite number"),
    ({"steer": "love", "steer_strength": float("inf")}, "expected a finite number"),
    ({"steer": "love", "steer_strength": 1e30}, "at most 65504"),
    ({"steer": "love", "steer_strength": "much"}, "expected a number"),
    ({"steer": "love", "steer_strength": [1, 2]}, "2 numbers for 1 plans"),
    ({"steer": "love", "steer_positions": "sometimes"}, "expected all, prompt, generated, last"),
    ({"steer_strength": 2}, "without steer"),
    ({"steering": "love"}, "unknown field 'steering'"),
    ({"steer_read": "nobody"}, "there is no probe 'nobody'; this engine has 2 probes"),
    ({"steer_read": "narrow"}, "has width 7; this model has 576"),
    ({"steer_read": "../probes/lean"}, "there is no probe '../probes/lean'"),
    ({"steer_read": "lean", "steer_read_positions": "sometimes"}, "expected all, prompt, generated, last"),
    ({"steer_read": "lean", "steer_read_what": 3}, "expected 'request' or 'tokens'"),
    ({"steer_abort": "lean>much"}, "a finite number, such as"),
    ({"steer_capture": 9}, "'resid_post.9' is not captured by this engine"),
    ({"steer_capture": "../../etc"}, "expected a layer, or a place such as"),
    ({"steer_capture": 8, "steer_capture_positions": "200:210"}, "the window 200:210 lies outside this prompt"),
    ({"steer_capture": 8, "steer_capture_positions": "300"}, "position 300 is out of range"),
    ({"steer": "love", "steer_positions": "300"}, "position 300 is out of range"),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("xargs", "reason"), BAD)
def test_whatever_cannot_be_followed_is_a_400_with_the_reason(server, kind, xargs, reason, stream) -> None:
    answer = server.post(kind, xargs, stream=stream)
    assert answer.status_code == 400, answer.text
    assert reason in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "xargs",
    [
        {"steer": {"name": "love"}},
        {"steer": [["love"]]},
        {"steer": None},
        {"steer": "love", "steer_strength": None},
        "love",
    ],
)
def test_what_is_not_even_flat_is_a_400(server, xargs) -> None:
    assert server.post("completions", xargs).status_code == 400


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_beside_vllm_xargs_is_refused_and_not_ignored(server, kind) -> None:
    answer = server.post(kind, None, steer="love")
    assert answer.status_code == 400
    assert "steer stands beside vllm_xargs; put it inside" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", KINDS)
def test_beam_search_with_plans_is_refused_and_without_runs(server, kind) -> None:
    answer = server.post(kind, {"steer": "love"}, use_beam_search=True, n=2)
    assert answer.status_code == 400
    assert "beam search drops the fields of a request" in answer.json()["error"]["message"]
    assert server.post(kind, None, use_beam_search=True, n=2).status_code == 200


READ = {"steer_read": ["lean", "sure"], "steer_read_what": "tokens"}


def chunks(server, kind: str, xargs: Any, **more: Any) -> list[dict[str, Any]]:
    with server.http.stream("POST", f"/v1/{kind}", json=server.body(kind, xargs, stream=True, **more)) as answer:
        assert answer.status_code == 200
        return [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]


@pytest.mark.parametrize("kind", KINDS)
def test_scores_come_with_the_answer_and_with_the_last_chunk_of_a_stream(server, truth, kind) -> None:
    answer = server.post(kind, READ, return_token_ids=True).json()
    found, choice = answer["kv_transfer_params"]["steerfast"], answer["choices"][0]
    ids = [*(answer.get("prompt_token_ids") or choice["prompt_token_ids"]), *choice["token_ids"][:-1]]
    with torch.inference_mode(), sf.read(truth.model, server.probes) as reading:
        truth.model(input_ids=torch.tensor([ids]))
    for name, scores in reading.scores().items():
        assert found[name]["positions"] == list(range(len(ids)))
        assert torch.allclose(torch.tensor(found[name]["scores"]), scores.values[0], atol=1e-3), name
        assert found[name]["max"] == pytest.approx(float(scores.max()), abs=1e-3)
    for more in ({}, {"stream_options": {"include_usage": True}}):
        streamed = chunks(server, kind, READ, **more)
        ended = [chunk for chunk in streamed if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
        assert [chunk for chunk in streamed if chunk.get("kv_transfer_params")] == ended
        assert len(ended) == 1
        for name, scores in ended[0]["kv_transfer_params"]["steerfast"].items():
            assert scores["scores"] == pytest.approx(found[name]["scores"], abs=1e-3)
        texts = [chunk["choices"][0] for chunk in streamed if chunk["choices"]]
        text = "".join((c["delta"].get("content") or "") if kind.startswith("chat") else c["text"] for c in texts)
        assert text == server.text(kind, None)
    assert server.post(kind, None).json().get("kv_transfer_params") is None
    assert all("kv_transfer_params" not in chunk for chunk in chunks(server, kind, None))


def test_readers_at_once_each_get_their_own(server) -> None:
    asked = [
        READ,
        {**READ, "steer": "love"},
        {"steer_read": "sure"},
        None,
        {**READ, "steer_read_positions": "generated"},
    ]
    alone = [server.post("completions", xargs).json().get("kv_transfer_params") for xargs in asked]
    with ThreadPoolExecutor(16) as pool:
        calls = [pool.submit(server.post, "completions", asked[i % 5]) for i in range(40)]
        for i, call in enumerate(calls):
            found, wanted = call.result().json().get("kv_transfer_params"), alone[i % 5]
            assert (found is None) == (wanted is None)
            for name in wanted["steerfast"] if wanted else ():
                assert found["steerfast"][name]["tokens"] == wanted["steerfast"][name]["tokens"]
                assert found["steerfast"][name]["mean"] == pytest.approx(wanted["steerfast"][name]["mean"], abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_of_a_stream_ends_with_its_own_scores(server, truth, kind) -> None:
    """They end in the same step, and what the engine gives of them is merged on its way."""
    tokens: dict[int, list[int]] = {}
    found: dict[int, Any] = {}
    prompt: list[int] = []
    for chunk in chunks(server, kind, READ, n=3, temperature=1.5, return_token_ids=True):
        prompt = prompt or chunk.get("prompt_token_ids") or []
        for choice in chunk["choices"]:
            prompt = prompt or choice.get("prompt_token_ids") or []
            tokens.setdefault(choice["index"], []).extend(choice.get("token_ids") or [])
            if choice["finish_reason"]:
                assert choice["index"] not in found
                found[choice["index"]] = chunk["kv_transfer_params"]["steerfast"]
    assert sorted(found) == [0, 1, 2]
    assert len({tuple(one) for one in tokens.values()}) == 3
    for index, answer in found.items():
        ids = [*prompt, *tokens[index][:-1]]
        with torch.inference_mode(), sf.read(truth.model, server.probes) as reading:
            truth.model(input_ids=torch.tensor([ids]))
        for name, scores in reading.scores().items():
            assert answer[name]["positions"] == list(range(len(ids)))
            assert torch.allclose(torch.tensor(answer[name]["scores"]), scores.values[0], atol=1e-3), (index, name)


def test_the_other_routes_answer_with_scores_or_refuse_to_read(server) -> None:
    asked = server.body("chat/completions", READ)
    message = server.http.post("/v1/messages", json=asked)
    assert message.json()["kv_transfer_params"]["steerfast"]["lean"]["tokens"] > 0
    refused = server.http.post("/v1/messages", json=asked | {"stream": True})
    assert refused.status_code == 400
    assert "no place for scores" in refused.json()["error"]["message"]
    several = server.post("completions", READ, prompt=[PROMPT, PROMPT])
    assert several.status_code == 400
    assert "send them one by one" in several.json()["error"]["message"]
    ask = {"model": MODEL, "input": PROMPT, "max_output_tokens": 4, "temperature": 0, "vllm_xargs": READ}
    assert server.http.post("/v1/responses", json=ask).json()["kv_transfer_params"]["steerfast"]["sure"]["tokens"] > 0
    both = server.post("completions", READ, n=2, temperature=1.0).json()["kv_transfer_params"]["steerfast"]
    assert [sorted(one) for one in both] == [["lean", "sure"]] * 2


def test_metrics_have_a_histogram_of_scores(server) -> None:
    def count() -> float:
        lines = server.http.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith('steerfast:score_count{probe="sure"}')).split()[-1])

    before = count()
    answer = server.post("completions", READ)
    assert count() - before == answer.json()["kv_transfer_params"]["steerfast"]["sure"]["tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_crosses_a_limit_ends_by_name_streaming_or_not(server, kind) -> None:
    whole = server.post(kind, {**READ, "steer_read_positions": "generated"}).json()
    scores = whole["kv_transfer_params"]["steerfast"]["lean"]["scores"]
    level = max(scores) - 1e-3
    ended = {"steer_abort": f"lean>{level}", "steer_read_positions": "generated"}
    answer = server.post(kind, ended).json()
    choice = answer["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", f"steer_abort: lean>{level:g}")
    assert answer["usage"]["completion_tokens"] == scores.index(max(scores)) + 1 < TOKENS
    last = [chunk for chunk in chunks(server, kind, ended) if chunk["choices"]][-1]
    assert last["choices"][0]["stop_reason"] == f"steer_abort: lean>{level:g}"
    assert last["kv_transfer_params"]["steerfast"]["lean"]["tokens"] == answer["usage"]["completion_tokens"]
    streamed = server.stream(kind, ended)
    assert streamed == (choice["message"]["content"] if kind.startswith("chat") else choice["text"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_that_crosses_a_limit_is_answered_with_the_reason_streaming_or_not(server, kind) -> None:
    """Without a token there is nothing to stream but the end."""
    ended = {"steer_abort": "lean<1e6", "steer_read_what": "tokens"}
    answer = server.post(kind, ended).json()
    (choice,), found = answer["choices"], answer["kv_transfer_params"]["steerfast"]["lean"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "steer_abort: lean<1e+06")
    assert answer["usage"]["completion_tokens"] == 0
    assert found["tokens"] == len(found["scores"]) > 0
    (last,) = [
        chunk for chunk in chunks(server, kind, ended) if chunk["choices"] and chunk["choices"][0]["finish_reason"]
    ]
    assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == (
        "stop",
        "steer_abort: lean<1e+06",
    )
    assert last["kv_transfer_params"]["steerfast"]["lean"]["scores"] == pytest.approx(found["scores"], abs=1e-3)
    assert server.stream(kind, ended) == ""


def test_refusals_leave_the_engine_and_its_neighbours_alone(server) -> None:
    wanted = server.text("completions", {"steer": "love"}, max_tokens=40)
    with ThreadPoolExecutor(8) as pool:
        good = [pool.submit(server.text, "completions", {"steer": "love"}, max_tokens=40) for _ in range(4)]
        bad = [pool.submit(server.post, "completions", xargs) for xargs, _ in BAD]
        assert {call.result().status_code for call in bad} == {400}
        assert [call.result() for call in good] == [wanted] * 4
    assert server.http.get("/health").status_code == 200


def test_a_client_that_hangs_up_leaves_nothing_behind(server) -> None:
    for _ in range(4):
        with server.http.stream(
            "POST", "/v1/completions", json=server.body("completions", {"steer": "chain"}, stream=True, max_tokens=200)
        ) as answer:
            next(answer.iter_lines())
    deadline = time.monotonic() + 60
    while "vllm:num_requests_running" not in (text := server.http.get("/metrics").text) or any(
        line.startswith(("vllm:num_requests_running{", "steerfast:waiting{")) and not line.endswith(" 0.0")
        for line in text.splitlines()
    ):
        assert time.monotonic() < deadline, "an aborted request is still running"
        time.sleep(0.2)
    assert server.text("completions", {"steer": "chain"})


def test_captures_are_bounded_written_and_not_of_a_client_that_hung_up(server) -> None:
    folder = server.log.parent / "captured"
    for stream in (False, True):
        answer = server.post("completions", {"steer_capture": 8}, max_tokens=230, stream=stream)
        assert answer.status_code == 400
        assert "this engine captures at most 220 of one" in answer.json()["error"]["message"]
    names, dropped = [], server.counter("capture_dropped_total", "")
    body = server.body("completions", {"steer_capture": [8], "steer_capture_dtype": "float32"})
    with server.http.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 200}) as answer:
        assert answer.status_code == 200
        next(answer.iter_lines())
    for kind in KINDS:
        names.append(server.post(kind, {"steer_capture": 8, "steer_capture_dtype": "float32"}).json()["id"])
    deadline = time.monotonic() + 60
    while server.counter("captured_total", "") == 0 or server.counter("capture_dropped_total", "") == dropped:
        assert time.monotonic() < deadline, "nothing was written, or the client that hung up has not been given up"
        time.sleep(0.5)
    time.sleep(3)  # until what has ended is on disk at the latest
    found = contexts_of(folder / "resid_post.8.before.float32", 0)
    assert len(found) == 2
    assert all(name.startswith(asked) for (name, _), asked in zip(found, names, strict=True))
    assert len(sf.sae.ActivationCache.open(folder / "resid_post.8.before.float32")) > 2 * TOKENS


def test_scores_go_to_the_operators_file(server) -> None:
    answer = server.post("completions", {"steer_read": "lean"}).json()
    deadline = time.monotonic() + 30
    while True:
        lines = [json.loads(line) for line in (server.log.parent / "scores.jsonl").read_text().splitlines()]
        mine = [line for line in lines if line["request"].startswith(answer["id"])]
        if mine or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert len(mine) == 1
    assert max(mine[0]["scores"]) == pytest.approx(answer["kv_transfer_params"]["steerfast"]["lean"]["max"], abs=1e-6)


def test_several_answers_to_one_prompt_are_all_steered(server, truth) -> None:
    wanted, _ = truth.generate(PROMPT, [(server.plans["love"], 2.0, None)], TOKENS)
    answer = server.post("completions", {"steer": "love", "steer_strength": 2}, n=3, temperature=1e-4)
    assert [choice["text"] for choice in answer.json()["choices"]] == [truth.tokenizer.decode(wanted)] * 3


def test_messages_are_steered_streaming_or_not(server) -> None:
    """The route of another vendor's clients makes a chat request of the message; its text is that of the chat route."""
    asked = server.body("chat/completions", None)
    texts = {}
    for name, xargs in {"plain": None, "ablate": {"steer": "ablate"}, "off": {"steer": []}}.items():
        body = asked | ({} if xargs is None else {"vllm_xargs": xargs})
        answer = server.http.post("/v1/messages", json=body)
        assert answer.status_code == 200, answer.text
        texts[name] = "".join(block["text"] for block in answer.json()["content"])
        with server.http.stream("POST", "/v1/messages", json=body | {"stream": True}) as stream:
            assert stream.status_code == 200
            events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
        parts = [event["delta"]["text"] for event in events if event["type"] == "content_block_delta"]
        assert "".join(parts) == texts[name] == server.text("chat/completions", xargs, ignore_eos=False)
    assert texts["plain"] == texts["off"] != texts["ablate"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("xargs", "reason"), BAD)
def test_a_message_that_cannot_be_followed_is_a_400_with_the_reason(server, xargs, reason, stream) -> None:
    text = json.dumps(server.body("chat/completions", xargs, stream=stream))
    answer = server.http.post("/v1/messages", content=text, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    reason = (
        "no place for scores" if stream and {"steer_read", "steer_abort"} & xargs.keys() else reason
    )  # whatever it says
    assert reason in answer.json()["error"]["message"]


def test_a_field_that_a_message_or_a_route_would_drop_is_refused(server) -> None:
    asked = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    refused = server.http.post("/v1/messages", json=asked | {"max_tokens": 2, "steer": "love"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "steer: steer stands beside vllm_xargs; put it inside"
    assert server.http.post("/v1/messages/count_tokens", json=asked).json()["input_tokens"] > 0
    for fields in ({"steer": "love"}, {"vllm_xargs": {"steer": "love"}}):
        refused = server.http.post("/v1/messages/count_tokens", json=asked | fields)
        assert refused.status_code == 400
        assert "steer: steer is not read by /v1/messages/count_tokens" in refused.json()["error"]["message"]


def test_metrics_count_requests_tokens_and_refusals_per_plan(server) -> None:
    names = ("requests", "tokens", "refused", "waiting")
    assert server.counter("slots", "") == 0  # nobody is in flight
    before = {name: server.counter(name, "turn") for name in names}
    answer = server.post("completions", {"steer": "turn"})
    length = answer.json()["usage"]["prompt_tokens"]
    server.post("completions", {"steer": "turn", "steer_strength": "x"})
    after = {name: server.counter(name, "turn") for name in names}
    change = {name: after[name] - before[name] for name in names}
    assert change == {"requests": 1, "tokens": length + TOKENS - 1, "refused": 1, "waiting": 0}
