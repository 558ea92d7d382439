"""What the hook costs: host time per hooked layer and call, decode of a real model, and the import.

    python benchmarks/hooks.py --out benchmarks/results

Cases run in turns within each round, so that all of them see the same machine; a ratio is the median over rounds of
steered over unsteered, with a 95 % bootstrap interval. CPU time is reported beside wall time: on a machine with other
work it is the steadier of the two. Raw rows go to a JSON file, a short table is printed last.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 576
HOST_CALLS = 2000
RESAMPLES = 4000
PROMPT = "I hate you because"
IMPORT = (
    "import time, torch\nstart = time.perf_counter()\nimport steerfast\n"
    "print(time.perf_counter() - start)"
)  # fmt: skip
Row = dict[str, Any]
Mode = Callable[[], Any]


def dispatched(module: nn.Module, width: int = WIDTH) -> Any:
    """Put the library's dispatcher with one `Add` on a module, as `steer` does; returns the handle of the hook."""
    import steerfast as sf
    from steerfast.hooks import Dispatcher
    from steerfast.layers import Point
    from steerfast.positions import Pass

    controller: Any = SimpleNamespace(now=Pass(owners=((0, 1.0),)))
    dispatcher = Dispatcher(controller, Point(module, "post", "module", width), sf.Bank(width, 1, 1), fixed=False)
    dispatcher.put({0: sf.Add(torch.ones(width))}, 1)
    return dispatcher.hook


def host_time(rounds: int) -> Iterator[Row]:
    """Seconds per call of an identity module: bare, with a hook that does nothing, one that adds, and ours."""
    modules = {name: nn.Identity() for name in ("bare module", "empty hook", "hook + add", "steerfast add")}
    vector = torch.ones(WIDTH)
    modules["empty hook"].register_forward_hook(lambda module, args, output: None)
    modules["hook + add"].register_forward_hook(lambda module, args, output: output + vector)
    dispatched(modules["steerfast add"])
    x = torch.zeros(1, 1, WIDTH)
    if not torch.equal(modules["steerfast add"](x), x + vector):
        raise RuntimeError("the dispatcher did not add: nothing to measure")
    for number in range(rounds):
        for name in random.sample(list(modules), len(modules)):
            module = modules[name]
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(HOST_CALLS):
                module(x)
            yield _row("host time", name, number, wall, cpu, HOST_CALLS)


def decode(rounds: int, tokens: int, say: Callable[[str], None]) -> Iterator[Row]:
    """Seconds per generated token of SmolLM2-135M-Instruct with every layer steered, beside unsteered."""
    from steerfast import demo_model

    model, tokenizer = demo_model.load(progress=say)
    layers = model.config.num_hidden_layers
    vectors = {layer: 0.01 * torch.randn(model.config.hidden_size) for layer in range(layers)}
    modes = _modes(model, vectors, say)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    for mode in modes.values():  # warm up
        with mode():
            model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
    for number in range(rounds):
        say(f"decode: round {number + 1} of {rounds}")
        for name in random.sample(list(modes), len(modes)):
            with modes[name]():
                wall, cpu = time.perf_counter(), time.process_time()
                model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
                yield _row("decode", name, number, wall, cpu, tokens)


def imports(rounds: int) -> Iterator[Row]:
    """Seconds that `import steerfast` takes after `import torch`, each in a process of its own."""
    for number in range(rounds):
        done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True)
        yield {
            "suite": "import",
            "case": "steerfast over torch",
            "round": number,
            "wall": float(done.stdout),
            "calls": 1,
        }


def _modes(model: Any, vectors: dict[int, Tensor], say: Callable[[str], None]) -> dict[str, Mode]:
    import steerfast as sf
    from steerfast.layers import find_layers

    blocks = find_layers(model).blocks

    @contextmanager
    def bare() -> Iterator[None]:
        with ExitStack() as stack:
            for layer, vector in vectors.items():
                stack.enter_context(blocks[layer].register_forward_hook(_adder(vector)))
            yield

    plan = sf.Plan({layer: sf.Add(vector) for layer, vector in vectors.items()})
    modes: dict[str, Mode] = {"unsteered": nullcontext, "unsteered again": nullcontext, "bare hooks": bare}
    modes["steerfast"] = lambda: sf.steer(model, plan)
    if importlib.util.find_spec("steering_vectors") is None:
        say("skipped: steering-vectors is not installed (it needs transformers < 5)")
    else:
        from steering_vectors import SteeringVector

        peer = SteeringVector(vectors)
        modes["steering-vectors"] = lambda: peer.apply(model)
    return modes


def _adder(vector: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

    return add


def _row(suite: str, case: str, number: int, wall: float, cpu: float, calls: int) -> Row:
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"suite": suite, "case": case, "round": number, "wall": wall, "cpu": cpu, "calls": calls}


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median and its 95 % bootstrap interval."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return statistics.median(values), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def table(rows: list[Row]) -> list[str]:
    """The result in a few lines."""
    lines = [f"{'case':<34} {'wall':>24} {'CPU':>24}"]
    for case in ("empty hook", "hook + add", "steerfast add"):
        cells = [
            interval(_paired(rows, "host time", case, "bare module", clock, 1e6, float.__sub__)) for clock in CLOCKS
        ]
        lines.append(f"{'host µs over bare: ' + case:<34} " + " ".join(f"{_cell(c, '.1f'):>24}" for c in cells))
    for case in dict.fromkeys(row["case"] for row in rows if row["suite"] == "decode" and row["case"] != "unsteered"):
        cells = [
            interval(_paired(rows, "decode", case, "unsteered", clock, 1.0, float.__truediv__)) for clock in CLOCKS
        ]
        lines.append(f"{'decode ratio: ' + case:<34} " + " ".join(f"{_cell(c, '.3f'):>24}" for c in cells))
    for row in [row for row in rows if row["suite"] == "decode" and row["case"] == "unsteered"][:1]:
        rates = [r["calls"] / r["wall"] for r in rows if r["suite"] == "decode" and r["case"] == row["case"]]
        lines.append(f"{'decode tokens/s: unsteered':<34} {_cell(interval(rates), '.1f'):>24}")
    taken = [1e3 * row["wall"] for row in rows if row["suite"] == "import"]
    lines.append(f"{'import ms over torch':<34} {_cell(interval(taken), '.0f'):>24}")
    return lines


CLOCKS = ("wall", "cpu")


def _paired(
    rows: list[Row], suite: str, case: str, base: str, clock: str, unit: float, relate: Callable[[float, float], float]
) -> list[float]:
    """The relation of a case to its base, round by round, per call."""
    taken = {
        name: {r["round"]: unit * r[clock] / r["calls"] for r in rows if r["suite"] == suite and r["case"] == name}
        for name in (case, base)
    }
    return [relate(taken[case][number], taken[base][number]) for number in taken[case]]


def _cell(value: tuple[float, float, float], form: str) -> str:
    middle, low, high = (format(v, form) for v in value)
    return f"{middle} ({low} … {high})"


def circumstances() -> dict[str, Any]:
    """What the numbers depend on; nothing that names the machine."""
    versions = {}
    for package in ("steerfast", "torch", "transformers", "triton", "steering-vectors"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    root = Path(__file__).resolve().parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False).stdout
    dirty = subprocess.run(
        ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False
    ).stdout
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit.strip() or None,
        "uncommitted_changes": bool(dirty),
        "python": platform.python_version(),
        "versions": versions,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[1] if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=40, help="of the decode (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="per decode round (default: %(default)s)")
    parser.add_argument("--no-model", action="store_true", help="leave the decode out")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(f"… {line}", file=sys.stderr, flush=True)

    with torch.inference_mode():
        say("host time")
        rows = list(host_time(rounds=25))
        say("import")
        rows += imports(rounds=9)
        if not args.no_model:
            rows += decode(args.rounds, args.tokens, say)
    found = circumstances()
    args.out.mkdir(parents=True, exist_ok=True)
    short = f"torch{found['versions']['torch'].partition('+')[0]}-transformers{found['versions']['transformers']}"
    file = args.out / f"hooks-{found['date']}-{short}.json"
    file.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    say(f"wrote {file}")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
