"""A long run of random requests through vLLM's server, and a check of everything that was applied, decided, read and answered.

    python benchmarks/vllm_soak.py --requests 10000 --out benchmarks/results

Random plans, conditions, strengths, positions, probes, limits, captures and adapters; some unsteered, some refused, some hung up
on, some given up before an answer, some ended by a limit, a token or a text. Everything is scarce: slots for a fifth of the
plans, few tokens a step, fewer keys and values than the requests need. Several times the engine sleeps and wakes. The server
writes down, token by token, what its row tables said and its conditions decided (STEERFAST_TRACE). Afterwards every line, every
token, every score, every captured row and every end must be what transformers makes of that text by plain hooks
(`vllm_truth.py`), and every hundredth request, asked again on its own, must get the same answer. None lost, nothing left in the
server, memory flat. The model is a tiny Llama with random weights, made here; the plugin does not know.

The requests are shared out over the forms of an engine (`vllm_soak_forms.py`): alone, with adapters, drafts, two workers, two
stages, two engines; `--form` names one of them.
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
from vllm_soak_forms import FORMS, SLOTS, WAVES, Form
from vllm_soak_requests import FATES, Refused, draw, send
from vllm_truth import Truth

GROWTH = 24 << 20  # bytes between the second quarter of a run and its last that still count as flat, in a long run
LONG = 3000  # requests, below which memory has not settled: with adapters 60 MiB more after 2000, 13 MiB after the next 2000
WRITTEN = 3.0  # seconds after which captured rows are on disk
HELD = "STEERFAST_SOAK"
"""Names the folder in which the server's processes write down what they hold."""
NEEDED = ("steered_tokens", "scores", "decisions", "ended_by_limit")
"""Figures without which a run has shown nothing."""


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
    parser.add_argument("--form", choices=[*FORMS, "all"], default="all")
    parser.add_argument("--compiled", action="store_true", help="compile the model, whatever the form")
    parser.add_argument("--requests", type=int, default=10_000, help="of all forms together")
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="of one form: after these no further request is sent"
    )
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory for the raw rows")
    args = parser.parse_args()
    chosen = [*FORMS] if args.form == "all" else [args.form]
    args.requests = -(-args.requests // len(chosen))
    failed = 0
    for name in chosen:
        print(f"{name}:")
        with tempfile.TemporaryDirectory() as folder:
            failed += soak(args, name, Path(folder))
    return 1 if failed else 0


def soak(args: argparse.Namespace, name: str, folder: Path) -> bool:
    """One form. Returns whether anything was wrong."""
    form, truth = FORMS[name], Truth(folder)
    if args.compiled:
        form, name = form._replace(eager=False), f"{name} compiled"
    trace = folder / "trace.jsonl"
    trace.touch()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(form, folder, trace, port)
    try:
        asked, told, values = asyncio.run(drive(args, f"http://127.0.0.1:{port}", server, truth, form, folder / "held"))
    finally:
        server.terminate()
        server.wait(60)
    wrong, counts = verify(asked, trace, truth, form, folder / "captured")
    values |= counts
    needed = [*NEEDED, *["rows"] * form.captures, *["accepted_drafts"] * form.drafts]
    wrong += [f"none of the {one}" for one in needed if not values[one]]
    values["wrong_or_lost"] += len(wrong)
    for line in (told + wrong)[:40]:
        print(f"  {line}")
    for key, value in values.items():
        print(f"  {key:<24} {value:g}")
    if args.out is not None:
        row = {"case": f"vllm soak {name}", "suite": "engines", "status": "ok", "values": values, "run": here("cpu")}
        append_row(args.out / f"{row['run']['date'][:10]}-cpu-vllm-soak.jsonl", row)
    return bool(values["wrong_or_lost"])


def start(form: Form, folder: Path, trace: Path, port: int) -> subprocess.Popen[bytes]:
    """The server, each of whose processes loads `watch` as a plugin of vLLM."""
    plugin, holds = folder / "plugin" / "soak-0.dist-info", folder / "held"
    plugin.mkdir(parents=True)
    holds.mkdir()
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: soak\nVersion: 0\n")
    (plugin / "entry_points.txt").write_text("[vllm.general_plugins]\nsoak = vllm_soak:watch\n")
    paths = [str(Path(__file__).parent), str(plugin.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = os.environ | form.settings(folder) | {"STEERFAST_TRACE": str(trace), HELD: str(holds)}
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model")]
    where = ["--served-model-name", "m", "--host", "127.0.0.1", "--port", str(port)]
    return subprocess.Popen([*command, *form.command(folder), *where], env=environment)


async def drive(
    args: argparse.Namespace, url: str, server: Any, truth: Truth, form: Form, folder: Path
) -> tuple[dict[str, Any], list[str], dict[str, float]]:
    """What was asked, by request; what went wrong, in words; and the figures of the run."""
    rng = random.Random(args.seed)
    asked: dict[str, dict[str, Any]] = {}
    answered: list[dict[str, Any]] = []
    ended = dict.fromkeys(FATES, 0)
    memory: list[int] = []
    told: list[str] = []
    stuck: list[str] = []
    gate = asyncio.Semaphore(args.at_once)
    limits = httpx.Limits(max_connections=args.at_once)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        await ready(http, server)
        began = time.monotonic()

        async def one(number: int) -> None:
            async with gate:
                if time.monotonic() - began > 60 * args.minutes:
                    return
                request = draw(rng, number, truth, form, answered)
                asked[request["request_id"]] = request
                try:
                    request["answer"] = await send(http, request)
                    ended[request["fate"]] += 1
                    answered.extend([request] * (request["answer"] is not None))
                except (httpx.HTTPError, Refused) as error:
                    told.append(f"{request['request_id']}: {type(error).__name__}: {error}")
                if number % max(1, args.requests // 20) == 0:
                    memory.append(resident(server.pid))

        for wave in range(WAVES):
            await asyncio.gather(*(one(number) for number in range(wave, args.requests, WAVES)))
            stuck += await settle(http)
            await asleep(http)
        seconds = time.monotonic() - began
        again = [r for r in asked.values() if r["fate"] == "finish" and "answer" in r and r["likeliest"]]
        again = [r for r in again if not r["temperature"]][::100]
        for request in again:  # a batch of one, and whatever the prefix cache has kept
            once_more = {**request, "request_id": f"again-{request['request_id']}"}
            once_more["answer"] = await send(http, once_more)
            asked[once_more["request_id"]] = once_more
            if once_more["answer"]["tokens"] != request["answer"]["tokens"]:
                told.append(f"{request['request_id']} got another answer when asked again")
        counters = {name: await counter(http, f"vllm:{metric}_total") for name, metric in COUNTERS.items()}
        await send(http, draw(rng, -1, truth, form) | {"request_id": "last", "fate": "finish", "vllm_xargs": {}})
        stuck += await left(folder)
        await asyncio.sleep(WRITTEN)
    quarters = [statistics.median(memory[i * len(memory) // 4 :][: len(memory) // 4 or 1]) for i in range(4)]
    growth = quarters[3] - quarters[1]
    sent = len(asked) - len(again)
    lost = sent - sum(ended.values())
    told += [f"not back at zero: {line}" for line in stuck] + [f"memory grew by {growth} bytes"] * (
        growth > GROWTH and args.requests >= LONG
    )
    values = {
        "wrong_or_lost": lost + sum(not line.startswith("soak-") or "another answer" in line for line in told),
        "requests": sent, **{name.replace(" ", "_"): count for name, count in ended.items()}, "lost": lost,
        "asked_again": len(again), **counters, "seconds": round(seconds, 1),
        "memory_mib": quarters[3] / 2**20, "memory_growth_mib": growth / 2**20,
    }  # fmt: skip
    return asked, told, values


COUNTERS = {
    "preemptions": "num_preemptions", "cached_tokens": "prefix_cache_hits",
    "drafts": "spec_decode_num_draft_tokens", "accepted_drafts": "spec_decode_num_accepted_tokens",
}  # fmt: skip


async def asleep(http: Any) -> None:
    """Let the engine sleep, and wake it."""
    for route in ("/sleep?level=1", "/wake_up"):
        answer = await http.post(route)
        if answer.status_code != 200:
            raise RuntimeError(f"{route}: {answer.status_code} {answer.text}")


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
