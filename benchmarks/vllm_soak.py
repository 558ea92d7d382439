"""A long run of random requests through vLLM's server, and a check of everything that was applied.

    python benchmarks/vllm_soak.py MODEL --requests 10000

Random plans, strengths, positions and lengths, some unsteered, some refused, some hung up on. The server writes down
what its row tables said, token by token (STEERFAST_TRACE); afterwards every line must equal what its request asked for.
None lost, no slot leaked, memory flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

PLANS = 24
SLOTS = 8  # so that plans come and go


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        return soak(args, Path(name))


def soak(args: argparse.Namespace, folder: Path) -> int:
    save_plans(folder / "plans", args.model)
    trace = folder / "trace.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"STEERFAST_PLANS": str(folder / "plans"), "STEERFAST_TRACE": str(trace)}
    environment |= {"STEERFAST_SLOTS": str(SLOTS), "VLLM_LOGGING_LEVEL": "WARNING"}
    options = ["--max-model-len", "256", "--max-num-seqs", "16", "--gpu-memory-utilization", "0.2", "--enforce-eager"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model, "--port", str(port)]
    server = subprocess.Popen([*command, "--served-model-name", "m", "--host", "127.0.0.1", *options], env=environment)
    try:
        return asyncio.run(drive(args, f"http://127.0.0.1:{port}", server, trace))
    finally:
        server.terminate()
        server.wait(60)


def save_plans(folder: Path, model: str) -> None:
    import torch
    from transformers import AutoConfig

    import steerfast as sf

    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    for i in range(PLANS):
        v = torch.randn(config.hidden_size, generator=torch.Generator().manual_seed(i))
        layer = i % config.num_hidden_layers
        edit = [sf.Add(v / v.norm(), 0.5), sf.Ablate(v)][i % 2]
        sf.Plan({layer: [edit, sf.Add(v / v.norm(), 0.1)] if i % 5 == 0 else edit}).save(folder / f"plan{i}")


async def drive(args: argparse.Namespace, url: str, server: Any, trace: Path) -> int:
    rng = random.Random(args.seed)
    asked: dict[str, dict[str, Any]] = {}
    ended = {"finished": 0, "hung up": 0, "refused": 0}
    memory: list[int] = []
    gate = asyncio.Semaphore(args.at_once)
    limits = httpx.Limits(max_connections=args.at_once)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        while server.poll() is None:
            try:
                if (await http.get("/health")).status_code == 200:
                    break
            except httpx.TransportError:
                await asyncio.sleep(1)

        async def one(number: int) -> None:
            async with gate:
                request = draw(rng, number)
                asked[request["request_id"]] = request
                ended[await send(http, request)] += 1
                if number % max(1, args.requests // 20) == 0:
                    memory.append(resident(server.pid))

        began = time.monotonic()
        await asyncio.gather(*(one(number) for number in range(args.requests)))
        seconds = time.monotonic() - began
        for _ in range(100):
            text = (await http.get("/metrics")).text
            if not any(left(line) for line in text.splitlines()):
                break
            await asyncio.sleep(0.2)
        stuck = [line for line in text.splitlines() if left(line)]
        await send(http, {"request_id": "last", "vllm_xargs": {}, "prompt": [5], "max_tokens": 2, "fate": "finish"})
    wrong, seen = verify(asked, trace)
    lost = args.requests - sum(ended.values())
    print(f"{args.requests} requests in {seconds:.0f} s: {ended}, {lost} lost, {len(stuck)} counters not back at zero")
    print(f"{seen} steered tokens checked, {len(wrong)} wrong")
    print(f"resident memory in MiB, from the first twentieth to the last: {[m >> 20 for m in memory]}")
    for line in wrong[:10] + stuck[:10]:
        print(f"  {line}")
    return 1 if wrong or lost or stuck or not seen else 0


def draw(rng: random.Random, number: int) -> dict[str, Any]:
    names = rng.sample([f"plan{i}" for i in range(PLANS)], rng.choice([0, 1, 1, 1, 2]))
    strengths = [round(rng.uniform(-2, 2), 3) for _ in names]
    xargs: dict[str, Any] = {"steer": names, "steer_strength": strengths} if names else {}
    fate = rng.choices(["finish", "hang up", "refuse"], [80, 15, 5])[0]
    if names:
        xargs["steer_positions"] = rng.choice(["all", "prompt", "generated", "last"])
    if fate == "refuse":
        xargs = rng.choice([{"steer": "nobody"}, {"steer": "plan1", "steer_strength": "x"}, {"steer_x": 1}])
    prompt = [rng.randrange(5, 5000) for _ in range(rng.randint(1, 60))]
    return {
        "request_id": f"soak-{number}",
        "prompt": prompt,
        "max_tokens": rng.randint(1, 12),
        "vllm_xargs": xargs,
        "fate": fate,
    }


async def send(http: Any, request: dict[str, Any]) -> str:
    body = {key: value for key, value in request.items() if key != "fate"}
    body |= {"model": "m", "temperature": 0, "ignore_eos": True, "stream": request["fate"] == "hang up"}
    if request["fate"] == "hang up":
        async with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for _ in answer.aiter_lines():
                return "hung up"
    answer = await http.post("/v1/completions", json=body)
    if request["fate"] == "refuse":
        assert answer.status_code == 400, answer.text
        return "refused"
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == request["max_tokens"]
    return "finished"


def left(line: str) -> bool:
    return line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{", "steerfast:waiting{")) and (
        not line.endswith(" 0.0")
    )


def verify(asked: dict[str, dict[str, Any]], trace: Path) -> tuple[list[str], int]:
    """Lines of the trace that are not what their request asked for, and how many steered tokens were seen."""
    wrong, seen, reached = [], 0, dict.fromkeys(asked, -1)
    with open(trace) as lines:
        for line in lines:
            name, position, applied = json.loads(line)
            request = asked.get(name.removeprefix("cmpl-").rsplit("-", 2)[0])  # the engine adds an index and a suffix
            if request is None:
                if "soak-" in name:
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
            reached[request["request_id"]] = max(reached[request["request_id"]], position)
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
