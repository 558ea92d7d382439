"""A long run of random requests through vLLM's server, and a check of everything that was applied and answered.

    python benchmarks/vllm_soak.py --requests 10000 --out benchmarks/results

Random plans, strengths, positions and lengths; some unsteered, some refused, some hung up on, some given up before an
answer. Everything is scarce: slots for a third of the plans, few tokens a step, fewer keys and values than the requests
need. The server writes down what its row tables said, token by token (STEERFAST_TRACE); afterwards every line must equal
what its request asked for, and every hundredth request, asked again on its own, must get the same answer. None lost, no
slot leaked, memory flat. The model is a tiny Llama with random weights, made here; the plugin does not know.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from lab.rows import append_row
from vllm_cost import here

PLANS = 24
SLOTS = 8  # so that plans come and go
WIDTH, LAYERS, WORDS = 64, 3, 128
POOL = [
    [5 + (7 * i + 3 * j * j) % 120 for j in range(40 + i)] for i in range(20)
]  # prompts that come again: prefix cache
GROWTH = 24 << 20  # bytes between the second quarter of a run and its last that still count as flat
FATES = {"finish": 75, "hang up": 10, "give up": 10, "refuse": 5}
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1", "STEERFAST_SLOTS": str(SLOTS),
}  # fmt: skip
OPTIONS = [
    "--disable-uvicorn-access-log", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "16",
    "--max-num-batched-tokens", "64", "--block-size", "32", "--num-gpu-blocks-override", "12",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30.0, help="after these no further request is sent")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory for the raw row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return soak(args, Path(name))


def soak(args: argparse.Namespace, folder: Path) -> int:
    save_model(folder / "model")
    save_plans(folder / "plans")
    trace = folder / "trace.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = ENVIRONMENT | os.environ | {"STEERFAST_PLANS": str(folder / "plans"), "STEERFAST_TRACE": str(trace)}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"), *OPTIONS]
    server = subprocess.Popen(
        [*command, "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)], env=environment
    )
    try:
        asked, told, values = asyncio.run(drive(args, f"http://127.0.0.1:{port}", server))
    finally:
        server.terminate()
        server.wait(60)
    wrong, values["steered_tokens"] = verify(asked, trace)
    values["wrong_or_lost"] += len(wrong) + (not values["steered_tokens"])
    for line in (told + wrong)[:20]:
        print(f"  {line}")
    for name, value in values.items():
        print(f"  {name:<24} {value:g}")
    if args.out is not None:
        row = {"case": "vllm soak", "suite": "engines", "status": "ok", "values": values, "run": here("cpu")}
        append_row(args.out / f"{row['run']['date'][:10]}-cpu-vllm-soak.jsonl", row)
    return 1 if values["wrong_or_lost"] else 0


def save_model(folder: Path) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "vocab_size": WORDS}
    config = LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=32, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0").save_pretrained(folder)


def save_plans(folder: Path) -> None:
    import torch

    import steerfast as sf

    for i in range(PLANS):
        v = torch.randn(WIDTH, generator=torch.Generator().manual_seed(i))
        v /= v.norm()
        edit = [sf.Add(v, 2.0), sf.Ablate(v), sf.Add(v, 3.0, keep_norm=True)][i % 3]
        sf.Plan({i % LAYERS: [edit, sf.Add(v)] if i % 5 == 0 else edit}).save(folder / f"plan{i}")


async def drive(args: argparse.Namespace, url: str, server: Any) -> tuple[dict[str, Any], list[str], dict[str, float]]:
    """What was asked, by request; what went wrong, in words; and the figures of the run."""
    rng = random.Random(args.seed)
    asked: dict[str, dict[str, Any]] = {}
    ended = dict.fromkeys(FATES, 0)
    memory: list[int] = []
    told: list[str] = []
    gate = asyncio.Semaphore(args.at_once)
    limits = httpx.Limits(max_connections=args.at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        await ready(http, server)
        began = time.monotonic()

        async def one(number: int) -> None:
            async with gate:
                if time.monotonic() - began > 60 * args.minutes:
                    return
                request = draw(rng, number)
                asked[request["request_id"]] = request
                try:
                    request["answer"] = await send(http, request)
                    ended[request["fate"]] += 1
                except (httpx.HTTPError, Refused) as error:
                    told.append(f"{request['request_id']}: {type(error).__name__}: {error}")
                if number % max(1, args.requests // 20) == 0:
                    memory.append(resident(server.pid))

        await asyncio.gather(*(one(number) for number in range(args.requests)))
        seconds = time.monotonic() - began
        stuck = await settle(http)
        again = [r for r in asked.values() if r["fate"] == "finish" and "answer" in r][::100]
        for request in again:  # a batch of one, and whatever the prefix cache has kept
            if await send(http, {**request, "request_id": f"again-{request['request_id']}"}) != request["answer"]:
                told.append(f"{request['request_id']} got another answer when asked again")
        preempted = await counter(http, "vllm:num_preemptions_total")
        cached = await counter(http, "vllm:prefix_cache_hits_total")
        await send(http, draw(rng, -1) | {"request_id": "last", "fate": "finish", "vllm_xargs": {}})
    quarters = [statistics.median(memory[i * len(memory) // 4 :][: len(memory) // 4 or 1]) for i in range(4)]
    growth = quarters[3] - quarters[1]
    lost = args.requests - sum(ended.values())
    told += [f"not back at zero: {line}" for line in stuck] + [f"memory grew by {growth} bytes"] * (growth > GROWTH)
    values = {
        "wrong_or_lost": lost + sum(not line.startswith("soak-") or "another answer" in line for line in told),
        "requests": args.requests, **{name.replace(" ", "_"): count for name, count in ended.items()}, "lost": lost,
        "asked_again": len(again), "preemptions": preempted, "cached_tokens": cached, "seconds": round(seconds, 1),
        "memory_mib": quarters[3] / 2**20, "memory_growth_mib": growth / 2**20,
    }  # fmt: skip
    return asked, told, values


class Refused(Exception):
    """An answer with another status or length than was asked for."""


async def ready(http: Any, server: Any) -> None:
    while server.poll() is None:
        try:
            if (await http.get("/health")).status_code == 200:
                return
        except httpx.TransportError:
            await asyncio.sleep(1)
    raise RuntimeError(f"the server ended with code {server.returncode}")


async def settle(http: Any) -> list[str]:
    """Wait until nothing runs or waits; the counters that do not come back to zero."""
    for _ in range(100):
        lines = (await http.get("/metrics")).text.splitlines()
        left = [line for line in lines if line.startswith(LEFT) and not line.endswith(" 0.0")]
        if not left:
            break
        await asyncio.sleep(0.2)
    return left


GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
LEFT = tuple(f"{gauge}{{" for gauge in (*GAUGES, "steerfast:waiting", "steerfast:slots"))


async def counter(http: Any, name: str) -> float:
    lines = (await http.get("/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name}{{"))


def draw(rng: random.Random, number: int) -> dict[str, Any]:
    names = rng.sample([f"plan{i}" for i in range(PLANS)], rng.choice([0, 1, 1, 1, 2]))
    strengths = [round(rng.uniform(-2, 2), 3) for _ in names]
    xargs: dict[str, Any] = {"steer": names, "steer_strength": strengths} if names else {}
    fate = rng.choices([*FATES], [*FATES.values()])[0]
    if names:
        xargs["steer_positions"] = rng.choice(["all", "prompt", "generated", "last"])
    if fate == "refuse":
        xargs = rng.choice([{"steer": "nobody"}, {"steer": "plan1", "steer_strength": "x"}, {"steer_x": 1}])
    fresh = [rng.randrange(5, WORDS) for _ in range(rng.randint(1, 60))]
    return {
        "request_id": f"soak-{number}",
        "prompt": rng.choice([fresh, rng.choice(POOL)]),
        "max_tokens": rng.randint(1, 12),
        "vllm_xargs": xargs,
        "fate": fate,
        "patience": rng.uniform(0.0, 0.3),
    }


async def send(http: Any, request: dict[str, Any]) -> str | None:
    """The text of the answer; None where there is none to wait for."""
    fate = request["fate"]
    body = {key: request[key] for key in ("request_id", "prompt", "max_tokens", "vllm_xargs")}
    body |= {"model": "m", "temperature": 0, "ignore_eos": True, "stream": fate == "hang up"}
    if fate == "hang up":
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise Refused(await answer.aread())
            async for _ in answer.aiter_lines():
                return None
    posted = http.post("/v1/completions", json=body)
    if fate == "give up":
        try:
            answer = await asyncio.wait_for(posted, request["patience"])
        except asyncio.TimeoutError:
            return None
    else:
        answer = await posted
    if answer.status_code != (400 if fate == "refuse" else 200):
        raise Refused(answer.text)
    if fate == "refuse":
        return None
    if answer.json()["usage"]["completion_tokens"] != request["max_tokens"]:
        raise Refused(f"{answer.json()['usage']} for {request['max_tokens']} tokens")
    return str(answer.json()["choices"][0]["text"])


def verify(asked: dict[str, dict[str, Any]], trace: Path) -> tuple[list[str], int]:
    """Lines of the trace that are not what their request asked for, and how many steered tokens were seen."""
    wrong, seen, reached = [], 0, dict.fromkeys(asked, -1)
    with open(trace) as lines:
        for line in lines:
            name, position, applied = json.loads(line)
            name = name.removeprefix("cmpl-").rsplit("-", 2)[0]  # the engine adds an index and a suffix
            request = asked.get(name.removeprefix("again-"))
            if request is None:
                if name != "last":
                    wrong.append(f"nobody sent {name}")
                continue
            xargs, prompt = request["vllm_xargs"], len(request["prompt"])
            acts = {
                "all": True,
                "prompt": position < prompt,
                "generated": position >= prompt,
                "last": position >= prompt - 1,
            }[xargs.get("steer_positions", "all")]
            wanted = list(zip(xargs.get("steer", []), xargs.get("steer_strength", []), strict=True)) if acts else []
            # a plan of two interventions shows up twice, with one strength
            found = [tuple(pair) for i, pair in enumerate(applied) if i == 0 or pair != applied[i - 1]]
            if [n for n, _ in found] != [n for n, s in wanted if s] or any(
                abs(got - s) > 1e-6 for (_, got), (_, s) in zip(found, [w for w in wanted if w[1]], strict=False)
            ):
                wrong.append(f"{line.strip()}: asked {xargs}, prompt {prompt}")
            seen += bool(applied)
            if not name.startswith("again-"):
                reached[name] = max(reached[name], position)
    for name, request in asked.items():
        expected = len(request["prompt"]) + request["max_tokens"] - 2  # the last token is never read
        steered = any(request["vllm_xargs"].get("steer_strength", []))
        if request["fate"] == "finish" and steered and reached[name] < expected:
            wrong.append(f"{name} was followed to position {reached[name]} of {expected}")
    return wrong, seen


def resident(pid: int) -> int:
    """Bytes of a process and all that it has started."""
    lines = subprocess.run(["ps", "-eo", "pid=,ppid=,rss="], capture_output=True, text=True).stdout.splitlines()
    table = [tuple(map(int, line.split())) for line in lines]
    family = {pid}
    while more := {child for child, parent, _ in table if parent in family} - family:
        family |= more
    return sum(size for child, _, size in table if child in family) * 1024


if __name__ == "__main__":
    raise SystemExit(main())
