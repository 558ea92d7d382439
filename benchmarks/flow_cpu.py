"""Flows on a CPU, beside the published way, in one run: ten Euler steps over an angle of 0.4, d = 576.

The published way takes the gradient of w·φ(a/‖a‖) by autograd through the FFTs of a polynomial count sketch, ten times a token.
Ours is `sf.flow` with the quadratic barrier of the same kernel, cut to its rank, and with the sketch itself at full rank. Cases
take turns in one process, one thread; figures are medians of process CPU time, so that a busy machine does not count. Beside
the time stands how far the displacement is from that of the exact kernel's barrier, uncut, in the same steps: the mean over rows.

    python benchmarks/flow_cpu.py                        # activations drawn at random, with a model-like spectrum
    python benchmarks/flow_cpu.py --model demo           # activations of a real model
    python benchmarks/flow_cpu.py --fit 20000 4096 --threads 2   # time and memory of one quadratic fit, a row for `make bars`
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lab.rows import append_row, circumstances
from torch import Tensor

import steerfast as sf
from steerfast.barriers import fit as fitting
from steerfast.barriers.barrier import Sketch
from steerfast.barriers.rank import MAX_RANK

ANGLE, STEPS = 0.4, 10


def activations(n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two sides of rows around a common mean, with a falling spectrum, that differ along one direction and a product."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, 201).float() ** -0.5
    basis = torch.randn(200, d, generator=generator) * spectrum[:, None]
    mean = 2 * torch.randn(d, generator=generator) / 3
    sides = []
    for sign in (1.0, -1.0):
        z = torch.randn(n, 200, generator=generator)
        z[:, 0] += sign
        z[:, 1] += sign * z[:, 2] / 2
        sides.append(z @ basis + 3 * mean + 0.3 * torch.randn(n, d, generator=generator))
    return sides[0], sides[1]


def real_activations() -> tuple[Tensor, Tensor]:
    """Layer 14 of the demo model on praise and blame, one word a text."""
    from steerfast.models import demo as demo_model

    model, tokenizer = demo_model.load()
    words = (
        (
            "wonderful",
            "excellent",
            "delightful",
            "lovely",
            "brilliant",
            "pleasant",
            "fantastic",
            "beautiful",
            "perfect",
            "kind",
        ),
        ("terrible", "awful", "dreadful", "nasty", "boring", "ugly", "disgusting", "poor", "miserable", "rude"),
    )
    frames = ("The film was {}", "I think this place is {}", "What a {} day", "Her cooking was {}", "It was a {} trip")
    frames += ("They called the service {}", "The book is simply {}", "We had a {} time there", "That song sounds {}")
    texts = [[frame.format(word) for word in side for frame in frames] for side in words]
    pos, neg = (sf.collect(model, tokenizer, side, layers=[14], progress=False)[14] for side in texts)
    return pos, neg


def published(sketch: Sketch, a: Tensor) -> Tensor:
    """Ten Euler steps of da/dt = ∇h/‖∇h‖, the gradient by autograd through the FFTs."""
    step = ANGLE * a.norm(dim=1, keepdim=True) / STEPS
    for _ in range(STEPS):
        leaf = a.detach().requires_grad_()
        h = sketch.features(leaf / leaf.norm(dim=1, keepdim=True)) @ sketch.weights
        gradient = torch.autograd.grad(h.sum(), leaf)[0]
        a = a + step * gradient / gradient.norm(dim=1, keepdim=True)
    return a


def race(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of a call; every round runs every way, as often as fills 20 ms."""
    repeats = {}
    for name, run in ways.items():
        run()
        start = time.process_time()
        run()
        repeats[name] = max(1, int(0.02 / max(time.process_time() - start, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            start = time.process_time()
            for _ in range(repeats[name]):
                run()
            taken[name].append((time.process_time() - start) / repeats[name])
    return {name: statistics.median(times) for name, times in taken.items()}


def speed(pos: Tensor, neg: Tensor, rounds: int) -> list[dict[str, object]]:
    """Rows of (n, way, microseconds, times faster than the published way, error and cosine of the displacement)."""
    quadratic = sf.fit_barrier(pos, neg, kind="quadratic", kernel=fitting.PUBLISHED)
    sketch = sf.fit_barrier(pos, neg, kind="sketch")
    every = torch.cat([pos, neg])
    exact = uncut(pos, neg)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "published": lambda x: published(sketch.sketch, x),
        f"quadratic rank {quadratic.rank}": lambda x: sf.flow(x, quadratic, angle=ANGLE, steps=STEPS),
        f"quadratic rank {quadratic.rank} rk4": lambda x: sf.flow(x, quadratic, angle=ANGLE, steps=STEPS, method="rk4"),
        "sketch full rank": lambda x: sf.flow(x, sketch, angle=ANGLE, steps=STEPS),
    }
    true = {
        method: sf.flow(every, exact, angle=ANGLE, steps=STEPS, method=method) - every for method in ("euler", "rk4")
    }
    found: list[dict[str, object]] = []
    for n in (1, 128):
        x = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(1))[:n]]
        times = race({name: functools.partial(run, x) for name, run in ways.items()}, rounds)
        for name, seconds in times.items():
            moved, wanted = ways[name](every) - every, true["rk4" if name.endswith("rk4") else "euler"]
            found.append(
                {
                    "n": n, "way": name, "us": 1e6 * seconds, "faster": times["published"] / seconds,
                    "error": float(((moved - wanted).norm(dim=1) / wanted.norm(dim=1)).mean()),
                    "cosine": float(torch.cosine_similarity(moved, wanted).mean()),
                }
            )  # fmt: skip
    return found


def uncut(pos: Tensor, neg: Tensor) -> sf.Barrier:
    """The barrier of the published kernel, exact and with all of its directions: as many as there are rows, or d."""
    most, MAX_RANK = MAX_RANK, min(len(pos) + len(neg), pos.shape[1])
    try:
        return sf.fit_barrier(pos, neg, kind="quadratic", kernel=fitting.PUBLISHED, rank=MAX_RANK)
    finally:
        MAX_RANK = most


def fit(n: int, d: int) -> dict[str, float]:
    """Seconds and peak memory of a quadratic fit on n rows in all."""
    pos, neg = activations(n // 2, d)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    h = sf.fit_barrier(pos, neg, kind="quadratic", kernel="likelihood")
    return {
        "n": n, "d": d, "rank": h.rank, "accuracy": h.info.accuracy,
        "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu,
        "gigabytes_before": before / 1e6, "memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=("demo",), help="take the activations of the demo model")
    parser.add_argument("--fit", type=int, nargs=2, metavar=("N", "D"), help="time one quadratic fit instead")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for the row of --fit"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.fit:
        values = fit(*args.fit)
        print(json.dumps(values))
        run = circumstances("cpu")
        row = {
            "case": f"fit_barrier {args.fit[0]}x{args.fit[1]}",
            "suite": "flow",
            "status": "ok",
            "clock": "wall time",
        }
        row |= {"times": {"ours": [values["seconds"]]}, "values": values, "run": run}
        append_row(args.out / f"{run['date'][:10]}-cpu-fit.jsonl", row)
        return
    pos, neg = real_activations() if args.model else activations(100, 576)
    for row in speed(pos, neg, args.rounds):
        accuracy = f"error {row['error']:>8.3%}  cosine {row['cosine']:.6f}"
        print(f"{row['n']:>5} {row['way']:<28} {row['us']:>12.1f} us {row['faster']:>8.1f}x  {accuracy}")


if __name__ == "__main__":
    main()
