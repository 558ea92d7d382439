"""What steering and reading cost inside vLLM, always against the same engine with the same flags and neither of them.

    python benchmarks/vllm_cost.py --out benchmarks/results

Two engines run in turns, each in a process of its own: one without the plugin, one with it. Every round runs each arm of a load
once, in random order, and the unsteered engine twice; a ratio is the median over rounds of the mean of these two over the arm,
with a 95 % interval, and the two of them show the noise. Times are CPU time of the engine's process with one
thread, the steadier measure on a machine that does other work; wall time is in the raw row. Rows are written after every
round, and nothing starts that --minutes would not let end: the first start of an engine compiles and takes longest, later
ones find the graph in vLLM's cache. Beside the ratios stands, for most loads, what their steps spent in our functions and ops
over what they spent in all others, by clocks around each (`vllm_clock.py`), which says more than a ratio within its noise.
A load with adapters (lora-16) is run by itself: an engine that may load one is another engine.
Needs an environment with vLLM; on a GPU give --wall, since CPU time says little there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import vllm_clock
from lab.pairs import interval, paired
from lab.rows import circumstances

from steerfast.files.replace import replace_file
from steerfast.models import demo as demo_model

BASE = "disabled"
WALL = "wall time"
ON_CPU = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}  # unless told otherwise
TWICE = (f"{BASE}, first", f"{BASE}, second")


class Arm(NamedTuple):
    """Which share of the rows is steered, by which kind of plan, and how many distinct ones of it the batch holds.

    Or it reads: probes of which kind, and how many of them every row reads; a gated plan is one behind a condition.
    """

    share: float
    kind: str  # "one layer", "all layers", "all layers, rank 8", … of plans; "reads", "top 32 of 8192" or both together
    configurations: int
    adapter: bool = False  # of every request, steered or not

    def __str__(self) -> str:
        if self.adapter:
            return f"{self._replace(adapter=False)}, {ADAPTER}" if self.share else ADAPTER
        if not self.share:
            return "idle"
        if self.kind == READS:
            return f"{self.share * 100:.0f} %, read {self.configurations} probes"
        if self.kind in (TOP, BOTH):
            return f"{self.share * 100:.0f} %, read {self.kind}"
        return f"{self.share * 100:.0f} %, {self.kind}, {self.configurations} configurations"

    def steer(self, i: int, batch: int) -> dict[str, Any] | None:
        """What request i of a batch asks for."""
        if i >= self.share * batch:
            return None
        if self.kind == READS:
            return {"steer_read": [f"{READS}-{j}" for j in range(self.configurations)]}
        reads = {"steer_read": TOP, "steer_read_what": "tokens"}
        if self.kind == TOP:
            return reads
        if self.kind == BOTH:
            return {"steer": f"{FEATURE}-0", **reads}
        return {"steer": f"{self.kind}-{i % self.configurations}", "steer_strength": 1.0 + 0.01 * i}


class Load(NamedTuple):
    """Requests at once, tokens of their prompts, tokens generated, and what is compared; the last arm stands for all."""

    batch: int
    prompt: int
    tokens: int
    arms: tuple[Arm, ...]


ONE, ALL, RANK, GATED, READS = "one layer", "all layers", "all layers, rank 8", "one layer, gated", "reads"
RANKS = 8
RANK64 = "all layers, rank 64"
TOP, FEATURE = "top 32 of 8192", "one feature of 8192"
BOTH = f"{TOP} and edit one"
ADAPTER = "LoRA"
EDITED = 17
PROBED = 30
"""Probes that there are, spread over all layers: of the default model one for each."""
IDLE = Arm(0.0, ONE, 1)
LOADS = {
    "decode-16": Load(
        16, 16, 24,
        (
            IDLE, Arm(0.25, ONE, 1), Arm(0.25, ALL, 1), Arm(1.0, ONE, 1), Arm(1.0, RANK, 1), Arm(1.0, ALL, 16),
            Arm(1.0, ALL, 1),
        ),
    ),
    "reads-16": Load(
        16, 16, 24,
        (IDLE, Arm(1.0, READS, PROBED), Arm(1.0, TOP, 1), Arm(1.0, ONE, 1), Arm(1.0, GATED, 1), Arm(1.0, READS, 1)),
    ),
    "edits-16": Load(
        16, 16, 24,
        (IDLE, Arm(1.0, TOP, 1), Arm(1.0, FEATURE, 1), Arm(1.0, BOTH, 1), Arm(1.0, ALL, 16), Arm(1.0, RANK64, 1)),
    ),
    "prefill-16": Load(
        16, 96, 2,
        (IDLE, Arm(0.25, ALL, 1), Arm(1.0, ONE, 1), Arm(1.0, READS, 1), Arm(1.0, READS, PROBED), Arm(1.0, ALL, 1)),
    ),
    "decode-256": Load(256, 4, 8, (Arm(1.0, ONE, 256), Arm(1.0, ALL, 64), Arm(1.0, ALL, 256))),
    "lora-16": Load(16, 16, 24, (IDLE, Arm(0.0, ONE, 1, True), Arm(1.0, ALL, 1), Arm(1.0, ALL, 1, True))),
}  # fmt: skip
CLOCKED = {"reads-16", "edits-16", "decode-256", "lora-16"}
"""Loads whose steps are told apart."""
ADAPTERS: dict[str, Any] = {"enable_lora": True, "max_lora_rank": RANKS, "max_loras": 2}
"""On a CPU vLLM 0.32 gives requests without an adapter that of its last slot: one more than there are stays empty."""
ADAPTED = [name for name, load in LOADS.items() if any(arm.adapter for arm in load.arms)]
Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of a model; without it SmolLM2-135M-Instruct")
    alone = [name for name in LOADS if name not in ADAPTED]
    parser.add_argument("--loads", choices=LOADS, nargs="+", default=alone, help=f"{', '.join(ADAPTED)}: by itself")
    parser.add_argument("--minutes", type=float, default=6.0, help="after these the run ends, whatever it is at")
    parser.add_argument("--rounds", type=int, default=25, help="at most so many")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--wall", action="store_true", help="compare wall time")
    parser.add_argument("--out", type=Path, help="directory for the raw rows")
    parser.add_argument("--serve", choices=[BASE, "steered"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if {*args.loads} & {*ADAPTED} and {*args.loads} - {*ADAPTED}:
        parser.error(
            f"--loads {' '.join(args.loads)}: run {', '.join(ADAPTED)} by itself, its engines may load adapters"
        )
    args.model = args.model or str(demo_model.path())
    if args.serve is not None:
        serve(args)
        return 0
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 60 * args.minutes)
    with tempfile.TemporaryDirectory() as folder:
        save_plans(Path(folder), args)
        save_probes(Path(folder), args.model)
        rows = measure(args, Path(folder))
    for row in rows:
        report(row)
    return 0 if all(row["times"] for row in rows) else 1


def save_plans(folder: Path, args: argparse.Namespace) -> None:
    """One addition in the middle layer, one in every layer, or an ablation of rank 8 in every layer; all different.

    And the first of them behind a condition that every token meets.
    """
    import torch
    from transformers import AutoConfig

    import steerfast as sf

    torch.manual_seed(0)
    config: Any = AutoConfig.from_pretrained(args.model).get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    arms = [arm for name in args.loads for arm in LOADS[name].arms]
    count = {
        kind: max((arm.configurations for arm in arms if arm.kind == kind), default=0)
        for kind in (ONE, ALL, RANK, RANK64)
    }
    for i in range(count[ONE]):
        edit = sf.Add(torch.randn(width) / width**0.5)
        sf.Plan({layers // 2: edit}).save(folder / f"{ONE}-{i}")
        if i == 0:
            met = sf.Condition(sf.probes.LinearProbe(torch.randn(width)), -1e9)
            sf.Plan({layers // 2: sf.WhenToken(met, edit)}).save(folder / f"{GATED}-0")
    for i in range(count[ALL]):
        sf.Plan({j: sf.Add(torch.randn(width) * 0.1 / width**0.5) for j in range(layers)}).save(folder / f"{ALL}-{i}")
    for kind, rank in ((RANK, RANKS), (RANK64, 64)):
        for i in range(count[kind]):
            bases = [torch.linalg.qr(torch.randn(width, rank))[0].T for _ in range(layers)]
            sf.Plan({j: sf.Ablate(basis) for j, basis in enumerate(bases)}).save(folder / f"{kind}-{i}")
    if any(arm.adapter for arm in arms):
        save_adapter(folder / ADAPTER, args.model, layers, width)
    if any(arm.kind == FEATURE for arm in arms):
        edit = sf.EditFeatures(dictionary(width), {EDITED: 1.01})
        sf.Plan({layers // 2: edit}).save(folder / f"{FEATURE}-0")


def save_adapter(folder: Path, model: str, layers: int, width: int) -> None:
    """An adapter of rank 8 for what attention and MLP write in every layer."""
    import torch
    from transformers import AutoModelForCausalLM

    import steerfast as sf

    edit = sf.Ablate(torch.linalg.qr(torch.randn(width, RANKS))[0].T)
    plan = sf.Plan({(site, layer): edit for layer in range(layers) for site in ("attn_out", "mlp_out")})
    sf.tools.write_lora(AutoModelForCausalLM.from_pretrained(model), plan, folder)


def save_probes(folder: Path, model: str) -> None:
    """One probability in the middle layer, then one in each of the others; and what a Top-K SAE of the middle layer selects."""
    import torch
    from transformers import AutoConfig

    import steerfast as sf

    config: Any = AutoConfig.from_pretrained(model).get_text_config()
    layers, width = config.num_hidden_layers, config.hidden_size
    for i in range(PROBED):
        layer = (layers // 2 + i * layers // PROBED) % layers
        sf.probes.LogisticProbe(torch.randn(width) / width**0.5, place=layer).save(folder / READS / f"{READS}-{i}")
    sae = dictionary(width)
    sae.save(folder / "saes" / "sae")
    sf.probes.TopKProbe(sae, place=layers // 2).save(folder / READS / TOP)


def dictionary(width: int) -> Any:
    """A Top-K SAE, the same each time, whose feature `EDITED` every token has: to know that takes a look at all the others."""
    import torch

    import steerfast as sf

    rows = torch.randn(8192, width, generator=torch.Generator().manual_seed(1)) / width**0.5
    bias = torch.zeros(8192)
    bias[EDITED] = 100.0
    return sf.SAE(rows, rows, b_enc=bias, k=32)


def measure(args: argparse.Namespace, plans: Path) -> list[Row]:
    """Rounds of every load until time or patience ends; the rows hold those that were finished."""
    rows = {name: new_row(name, args) for name in args.loads}
    engines: dict[str, Any] = {}
    try:
        for name in (BASE, "steered"):  # one starts after the other: both compile
            engines[name] = start(name, plans)
            ask(engines[name], args.loads[0], [None])
        for number in range(-1, args.rounds):  # the first round warms up
            for name in args.loads:
                arms: list[Arm | str] = [*TWICE, *LOADS[name].arms]
                done = {str(arm): run(engines, arm, name) for arm in random.sample(arms, len(arms))}
                if number >= 0:
                    keep(rows[name], done, LOADS[name].arms[-1])
                    keep_steps(rows[name], done)
                    write(rows[name], args)
                print(f"round {number + 1} of {args.rounds}, {name}", file=sys.stderr)
    except KeyboardInterrupt:
        print("ended by the clock or a signal: what follows is of the rounds that were finished", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for engine in engines.values():
            with contextlib.suppress(ProcessLookupError):  # it has failed
                os.killpg(engine.pid, signal.SIGKILL)
            engine.wait()
    return [*rows.values()]


def new_row(name: str, args: argparse.Namespace) -> Row:
    arms = [str(arm) for arm in LOADS[name].arms]
    return {
        "case": f"vllm {name.replace('-', ' batch=')}", "suite": "engines", "status": "ok",
        "clock": WALL if args.wall else "CPU time of the process", "times": {}, "walls": {}, "missing": {},
        "load": {**LOADS[name]._asdict(), "arms": arms}, "dtype": args.dtype, "compiled": not args.eager,
        "run": here("cuda" if args.wall else "cpu"),
    }  # fmt: skip


def here(place: str) -> Row:
    """The circumstances of a run of vLLM, whose CPU build is another distribution."""
    found = circumstances(place) | {
        "threads": int((ON_CPU | os.environ)["OMP_NUM_THREADS"]),
        "quick": False,
    }
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found["versions"][name] = importlib.metadata.version(name)
    return found


def start(name: str, plans: Path) -> Any:
    environment = ON_CPU | os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    environment |= {"VLLM_PLUGINS": "steerfast" if name == "steered" else "none", "STEERFAST_PLANS": str(plans)}
    environment |= {"STEERFAST_PROBES": str(plans / READS), "STEERFAST_SAES": str(plans / "saes")}
    return subprocess.Popen(
        [sys.executable, *sys.argv, "--serve", name],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is ours
    )


def run(engines: dict[str, Any], arm: Arm | str, load: str) -> Row:
    batch = LOADS[load].batch
    if isinstance(arm, str):
        return ask(engines[BASE], load, [None] * batch)
    return ask(engines["steered"], load, [arm.steer(i, batch) for i in range(batch)], arm.adapter)


def keep(row: Row, done: dict[str, Row], main_arm: Arm) -> None:
    """Add a round to the row."""
    for kind, unit in (("times", "wall" if row["clock"] == WALL else "cpu"), ("walls", "wall")):
        taken = {arm: found[unit] for arm, found in done.items()}
        taken[BASE] = statistics.mean(taken[name] for name in TWICE)
        taken["ours"] = taken[str(main_arm)]
        for arm, seconds in taken.items():
            row[kind].setdefault(arm, []).append(seconds)


def keep_steps(row: Row, done: dict[str, Row]) -> None:
    """Add to a row what the steps of a round spent on what, where they were asked: the medians of each arm."""
    told = {name: found["steps"] for name, found in done.items() if found.get("steps")}
    if not told:
        return
    added = row.setdefault("added", {})
    ours, encode, whole = {}, {}, {}
    for name, steps in told.items():
        found = {kind: statistics.median(step[kind] for step in steps) for kind in steps[0]}
        whole[name] = statistics.median(sum(step.values()) for step in steps)
        ours[name], encode[name] = found["host"] + found["op"] + found["encode"], found["encode"]
        found["share"] = ours[name] / found["theirs"]
        if found["encode"]:
            found["over encode"] = ours[name] / found["encode"]
        for kind, value in found.items():
            added.setdefault(f"{name}: {kind}", []).append(float(f"{value:.5g}"))
    compare_steps(added, ours, encode, whole)


def compare_steps(added: Row, ours: Row, encode: Row, whole: Row) -> None:
    """Add what one arm of a round spent over another: by our functions and ops, by encodes, or by whole steps."""
    idle, one, steer, gated, top, feature, both = (
        str(arm) for arm in (IDLE, *(Arm(1.0, kind, 1) for kind in (ONE, ALL, GATED, TOP, FEATURE, BOTH)))
    )
    if gated in ours:
        gate, edit = (added[f"{name}: share"][-1] for name in (gated, one))
        added.setdefault("gated over edit: share", []).append((1 + gate) / (1 + edit) - 1)
    if feature in ours:
        added.setdefault("edit one feature: over encode", []).append(ours[feature] / encode[top])
        added.setdefault("read and edit: over reading", []).append(ours[both] / ours[top])
    if (together := str(Arm(1.0, ALL, 1, True))) in ours:
        apart = whole[ADAPTER] + whole[steer] - 2 * whole[idle]
        added.setdefault("LoRA and steering: over each alone", []).append((whole[together] - whole[idle]) / apart)
        beside, alone = ours[together] - ours[ADAPTER], ours[steer] - ours[idle]
        added.setdefault("steering beside LoRA: over alone", []).append(beside / alone)


def write(row: Row, args: argparse.Namespace) -> None:
    """The row so far, whole."""
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = row["case"].replace(" batch=", "-").replace(" ", "-")
        path = args.out / f"{row['run']['date'][:10]}-{row['run']['place']}-{name}.jsonl"
        replace_file(path, (json.dumps(row, separators=(",", ":")) + "\n").encode())


def ask(engine: Any, load: str, steering: list[Any], adapter: bool = False) -> Row:
    engine.stdin.write(json.dumps([load, steering, adapter]) + "\n")
    engine.stdin.flush()
    for line in engine.stdout:
        if line.startswith("{"):
            return dict(json.loads(line))
    raise RuntimeError(f"an engine ended with code {engine.wait()}")


def serve(args: argparse.Namespace) -> None:
    """One engine: reads what each request of a batch asks for, runs the batch, says what it took."""
    clock = vllm_clock.before_vllm() if args.serve != BASE and CLOCKED & {*args.loads} else None
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=256,
        max_num_seqs=max(LOADS[name].batch for name in args.loads),
        max_num_batched_tokens=1024,  # an engine starts with a pass of so many
        enforce_eager=args.eager,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.2,
        **(ADAPTERS if {*args.loads} & {*ADAPTED} else {}),
    )
    adapter = LoRARequest(ADAPTER, 1, os.path.join(os.environ["STEERFAST_PLANS"], ADAPTER))
    if clock is not None:
        plain: Any = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
        vllm_clock.around_engine(
            clock, llm, lambda: llm.generate([{"prompt_token_ids": [1]}] * 16, [plain] * 16, use_tqdm=False)
        )
    for line in sys.stdin:
        name, steering, adapted = json.loads(line)
        load = LOADS[name]
        prompts: Any = [
            {"prompt_token_ids": random.Random(i).choices(range(100, 2000), k=load.prompt)}
            for i in range(len(steering))
        ]
        params = [
            SamplingParams(temperature=0.0, max_tokens=load.tokens, ignore_eos=True, detokenize=False, extra_args=extra)
            for extra in steering
        ]
        wall, cpu = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=adapter if adapted else None)
        taken: Row = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        if clock is not None:
            taken["steps"], clock.steps = clock.steps[2:-1] if name in CLOCKED else [], []  # those that decode
        assert all(len(output.outputs[0].token_ids) == load.tokens for output in outputs)
        print(json.dumps(taken), flush=True)


def report(row: Row) -> None:
    if not row["times"]:
        print(f"{row['case']}: no round was finished; give more --minutes")
        return
    print(
        f"{row['case']}, {row['dtype']}, {len(row['times'][BASE])} rounds: throughput over disabled, by {row['clock']}"
    )
    for arm in row["load"]["arms"]:
        print("  {:<48} {:.3f}  [{:.3f}, {:.3f}]".format(arm, *interval(paired(row, BASE, arm))))
    print("  {:<48} {:.3f}  [{:.3f}, {:.3f}]".format("disabled, twice", *interval(paired(row, *TWICE))))
    for name, values in row.get("added", {}).items():
        print("  {:<48} {:.4g}  [{:.4g}, {:.4g}]".format(name, *interval(values)))


if __name__ == "__main__":
    raise SystemExit(main())
