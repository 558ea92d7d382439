"""A long run of random requests through vLLM's server, and a check of everything that was applied, decided, read and answered.

    python benchmarks/vllm_soak.py --requests 10000 --out benchmarks/results

Random plans, conditions, strengths, positions, probes and limits; some unsteered, some refused, some hung up on, some given up
before an answer, some ended by a limit, a token or a text. Everything is scarce: slots for a fifth of the plans, few tokens a
step, fewer keys and values than the requests need. The server writes down, token by token, what its row tables said and its
conditions decided (STEERFAST_TRACE). Afterwards every line, every token, every score and every end must be what transformers
makes of that text by plain hooks (`vllm_truth.py`), and every hundredth request, asked again on its own, must get the same
answer. None lost, nothing left in the server, memory flat. The model is a tiny Llama with random weights, made here; the plugin
does not know.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import signal
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
from vllm_soak_checks import verify
from vllm_truth import POSITIONS, TO_STEER, WORDS, Truth

SLOTS = 8  # so that plans come and go
POOL = [
    [5 + (7 * i + 3 * j * j) % 120 for j in range(40 + i)] for i in range(20)
]  # prompts that come again: prefix cache
GROWTH = 24 << 20  # bytes between the second quarter of a run and its last that still count as flat
HELD = "STEERFAST_SOAK"
"""Names the folder in which the server's processes write down what they hold."""
FATES = {"finish": 75, "hang up": 10, "give up": 10, "refuse": 5}
BAD = [
    {"steer": "nobody"}, {"steer": "plan1", "steer_strength": "x"}, {"steer_x": 1}, {"steer_read": "nobody"},
    {"steer_read": "lean", "steer_read_positions": "90"}, {"steer_abort": "lean>much"}, {"steer_abort": "several>1"},
    {"steer_read_what": "tokens"}, {"steer_read": "top"}, {"steer_read": "lean", "steer_read_positions": "special"},
    {"steer": ["gated1", "plan0", "plan5", "plan10"]},
]  # fmt: skip
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1", "STEERFAST_SLOTS": str(SLOTS),
}  # fmt: skip
OPTIONS = [
    "--disable-uvicorn-access-log", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "16",
    "--max-num-batched-tokens", "64", "--block-size", "32", "--num-gpu-blocks-override", "14",
]  # fmt: skip


def watch() -> None:
    """A plugin that all processes of the server load: each answers SIGUSR1 by writing down what it holds of requests."""
    file = Path(os.environ[HELD], str(os.getpid()))
    signal.signal(signal.SIGUSR1, lambda *_: file.write_text(json.dumps(held())))
    file.touch()


def held() -> dict[str, int]:
    """Counts that are 0 where no request is in flight, of all that this process has."""
    from steerfast.vllm.gating import ROWS
    from steerfast.vllm.runner import Steered
    from steerfast.vllm.scores import Desk
    from steerfast.vllm.slots import Admission

    gc.unfreeze()  # what an engine has frozen is not listed
    found: dict[str, int] = {}
    for one in gc.get_objects():
        kind = type(one)
        if kind is Desk:
            found["desk"] = len(one)
        elif kind is Admission:
            found |= {"admitted": one.requests, "waiting": one.waiting, "slots": SLOTS - one.free}
        elif kind is Steered:
            found |= {"read": one.reading, "steered": one.steered, "held": one.held, "gated": len(one.gates)}
            found["rows of gates"] = ROWS - 1 - len(one.gates._free)
    return found


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
    truth = Truth(folder)
    trace = folder / "trace.jsonl"
    trace.touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    plugin, holds = folder / "plugin" / "soak-0.dist-info", folder / "held"
    plugin.mkdir(parents=True)
    holds.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: soak\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nsoak = vllm_soak:watch\n")
    paths = [str(Path(__file__).parent), str(plugin.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = ENVIRONMENT | os.environ | {"STEERFAST_TRACE": str(trace), "PYTHONPATH": os.pathsep.join(paths)}
    environment[HELD] = str(holds)
    environment |= {f"STEERFAST_{what.upper()}": str(folder / what) for what in ("plans", "probes", "saes")}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"), *OPTIONS]
    server = subprocess.Popen(
        [*command, "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)], env=environment
    )
    try:
        asked, told, values = asyncio.run(drive(args, f"http://127.0.0.1:{port}", server, truth, holds))
    finally:
        server.terminate()
        server.wait(60)
    wrong, counts = verify(asked, trace, truth)
    values |= counts
    values["wrong_or_lost"] += len(wrong) + sum(
        not counts[name] for name in ("steered_tokens", "scores", "decisions", "ended_by_limit")
    )
    for line in (told + wrong)[:40]:
        print(f"  {line}")
    for name, value in values.items():
        print(f"  {name:<24} {value:g}")
    if args.out is not None:
        row = {"case": "vllm soak", "suite": "engines", "status": "ok", "values": values, "run": here("cpu")}
        append_row(args.out / f"{row['run']['date'][:10]}-cpu-vllm-soak.jsonl", row)
    return 1 if values["wrong_or_lost"] else 0


async def drive(
    args: argparse.Namespace, url: str, server: Any, truth: Truth, folder: Path
) -> tuple[dict[str, Any], list[str], dict[str, float]]:
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
                request = draw(rng, number, truth)
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
            once_more = {**request, "request_id": f"again-{request['request_id']}"}
            once_more["answer"] = await send(http, once_more)
            asked[once_more["request_id"]] = once_more
            if once_more["answer"]["tokens"] != request["answer"]["tokens"]:
                told.append(f"{request['request_id']} got another answer when asked again")
        preempted = await counter(http, "vllm:num_preemptions_total")
        cached = await counter(http, "vllm:prefix_cache_hits_total")
        await send(http, draw(rng, -1, truth) | {"request_id": "last", "fate": "finish", "vllm_xargs": {}})
        stuck += await left(folder)
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


async def left(folder: Path) -> list[str]:
    """What is left inside the server, where nothing runs."""
    files = [*folder.iterdir()]
    for file in files:
        os.kill(int(file.name), signal.SIGUSR1)
    for _ in range(100):
        await asyncio.sleep(0.1)
        told = [file.read_text() for file in files]
        if all(told):
            break
    counts = [item for text in told for item in json.loads(text or '{"no answer": 1}').items()]
    seen = {name for name, _ in counts}
    return [f"{count} {name}" for name, count in counts if count] + ["nothing seen"] * (
        not {"desk", "admitted", "read"} <= seen
    )


def draw(rng: random.Random, number: int, truth: Truth) -> dict[str, Any]:
    """A request. What it asks for beside its fate is drawn one thing after the other."""
    fate = rng.choices([*FATES], [*FATES.values()])[0]
    xargs = {**_steer(rng, truth), **_read(rng, truth)} if fate != "refuse" else rng.choice(BAD)
    fresh = [rng.randrange(5, WORDS) for _ in range(rng.randint(1, 60))]
    return {
        "request_id": f"soak-{number}",
        "prompt": rng.choice([fresh, rng.choice(POOL)]),
        "max_tokens": rng.randint(1, 24),
        "vllm_xargs": xargs,
        "fate": fate,
        "patience": rng.uniform(0.0, 0.6),
        "streams": fate == "hang up" or rng.random() < 0.3,
        "reads_until": rng.randint(1, 12),  # chunks, before it hangs up
        "stop_token_ids": rng.sample(range(5, WORDS), 3) if rng.random() < 0.1 else [],
        "stop": [f"w{rng.randrange(100, WORDS)}" for _ in range(3)] if rng.random() < 0.1 else [],
    }


def _steer(rng: random.Random, truth: Truth) -> dict[str, Any]:
    names = rng.sample([*truth.plans], rng.choice([0, 1, 1, 1, 2]))
    if not names:
        return {}
    strengths = [rng.choice([1.0, round(rng.uniform(-2, 2), 3)]) for _ in names]
    return {"steer": names, "steer_strength": strengths, "steer_positions": rng.choice(TO_STEER)}


def _read(rng: random.Random, truth: Truth) -> dict[str, Any]:
    names = rng.sample([*truth.probes], rng.choice([0, 1, 1, 2, 4]))
    found: dict[str, Any] = {"steer_read": names} if names else {}
    if rng.random() < 0.3:
        single = rng.sample([name for name, look in truth.probes.items() if look.single], rng.randint(1, 2))
        shares = [rng.choice([rng.uniform(0.8, 1.0), rng.uniform(0.98, 1.0)]) for _ in single]
        above = [rng.random() < 0.5 for _ in single]
        found["steer_abort"] = [
            f"{name}>{truth.level(name, share)}" if up else f"{name}<{truth.level(name, 1 - share)}"
            for name, share, up in zip(single, shares, above, strict=True)
        ]
    if found:
        found["steer_read_positions"] = rng.choice([*POSITIONS])
        found["steer_read_what"] = rng.choice(["tokens", "tokens" if "top" in names else "request"])
    return found


async def send(http: Any, request: dict[str, Any]) -> dict[str, Any] | None:
    """The answer: tokens, why it ended, what was read; None where there is none to wait for."""
    fate = request["fate"]
    fields = ("request_id", "prompt", "max_tokens", "vllm_xargs", "stop_token_ids", "stop")
    body = {key: request[key] for key in fields} | {"stream": request["streams"] and fate != "refuse"}
    body |= {"model": "m", "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    asking = _streamed(http, body, request) if body["stream"] else _posted(http, body, request)
    if fate != "give up":
        return await asking
    try:
        return await asyncio.wait_for(asking, request["patience"])
    except asyncio.TimeoutError:
        return None


async def _posted(http: Any, body: dict[str, Any], request: dict[str, Any]) -> dict[str, Any] | None:
    answer = await http.post("/v1/completions", json=body)
    if answer.status_code != (400 if request["fate"] == "refuse" else 200):
        raise Refused(answer.text)
    if request["fate"] == "refuse":
        return None
    (choice,) = answer.json()["choices"]
    return _answer(choice["token_ids"], choice, answer.json())


async def _streamed(http: Any, body: dict[str, Any], request: dict[str, Any]) -> dict[str, Any] | None:
    tokens: list[int] = []
    chunks = 0
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise Refused((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, chunks = json.loads(line.removeprefix("data: ")), chunks + 1
            if "error" in chunk:
                raise Refused(line)
            (choice,) = chunk["choices"]
            tokens += choice.get("token_ids") or []
            if choice["finish_reason"] is not None:
                return _answer(tokens, choice, chunk)
            if request["fate"] == "hang up" and chunks >= request["reads_until"]:
                return None
    raise Refused("the stream ended without a reason")


def _answer(tokens: list[int], choice: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    read = (answer.get("kv_transfer_params") or {}).get("steerfast")
    return {"tokens": tokens, "why": choice["finish_reason"], "stop": choice.get("stop_reason"), "read": read}


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
