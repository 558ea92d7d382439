"""Training steps of a Top-K SAE: ours beside the trainers of sparsify and SAELens, where they are installed.

    OMP_NUM_THREADS=1 python benchmarks/sae_training.py [--cache DIR] [--rounds 9]

One step is forward, backward, optimiser and upkeep, on the same rows for all; no model runs. Steps are taken in turns, and a
ratio is that of a pair of the same round: process CPU time on one thread, so that other work on the machine does not count.
sparsify's step is its trainer's: its `SparseCoder`, its unit-norm upkeep, and Adam (its default is sign-SGD; fused Adam is the
same for all three here). SAELens's is `SAETrainer.step`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch

from steerfast.sae.cache import ActivationCache
from steerfast.sae.training.config import TrainConfig
from steerfast.sae.training.distributed import Alone
from steerfast.sae.training.trainer import Trainer

Step = Callable[[torch.Tensor], object]


def ours(rows: torch.Tensor, features: int, k: int, batch: int) -> Step:
    return Trainer(TrainConfig(features=features, k=k, batch=batch, tokens=10**9), [rows], Alone()).train_on


def sparsify(rows: torch.Tensor, features: int, k: int, batch: int) -> Step:
    os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "0" if torch.cuda.is_available() else "1")  # read at its import
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(rows.shape[1], SparseCoderConfig(num_latents=features, k=k), dtype=torch.float32)
    coder.b_dec.data = rows.mean(0)
    adam = torch.optim.Adam(coder.parameters(), lr=8e-4, fused=True)
    dead = torch.zeros(features, dtype=torch.bool)
    fired = torch.zeros(features, dtype=torch.bool)

    def step(x: torch.Tensor) -> None:
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=dead)
        fired[out.latent_indices.flatten()] = True
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        adam.step()
        adam.zero_grad()

    return step


def saelens(rows: torch.Tensor, features: int, k: int, batch: int, sparse: bool = False) -> Step:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(d_in=rows.shape[1], d_sae=features, k=k, use_sparse_activations=sparse, device="cpu")
    )
    trainer = SAETrainer(
        SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=batch, lr=8e-4, lr_end=8e-4),
        sae,
        iter(()),
    )
    trainer.optimizer = torch.optim.Adam(sae.parameters(), lr=8e-4, fused=True)
    return trainer.step


def saelens_sparse(rows: torch.Tensor, features: int, k: int, batch: int) -> Step:
    return saelens(rows, features, k, batch, sparse=True)


CONTESTANTS = {"steerfast": ours, "sparsify": sparsify, "SAELens": saelens, "SAELens (sparse)": saelens_sparse}
PACKAGES = ("torch", "steerfast", "eai-sparsify", "sae-lens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="activations to train on (default: random rows)")
    parser.add_argument("--features", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--d", type=int, default=576)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sae_training.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    need = 4 * args.batch
    if args.cache:
        rows = ActivationCache.open(args.cache).read(0)[:need].float()
        rows = rows / (rows - rows.mean(0)).square().mean().sqrt()  # a scale that every trainer was made for
    else:
        rows = torch.randn(need, args.d)

    steps, missing = {}, {}
    for name, make in CONTESTANTS.items():
        try:
            steps[name] = make(rows, args.features, args.k, args.batch)
            steps[name](rows[: args.batch])  # the first step allocates
        except (ImportError, NotImplementedError) as error:
            missing[name] = str(error).splitlines()[0][:200]
            steps.pop(name, None)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds):
        x = rows[torch.randperm(len(rows))[: args.batch]]
        order = list(steps)[number % len(steps) :] + list(steps)[: number % len(steps)]
        for name in order:
            start = time.process_time()
            steps[name](x)
            times[name].append(time.process_time() - start)

    result = {
        "date": date.today().isoformat(),
        "processor": platform.processor() or platform.machine(),
        "threads": 1,
        "versions": {name: _version(name) for name in PACKAGES},
        "sizes": {"rows": "cached activations" if args.cache else "random"}
        | {name: getattr(args, name) for name in ("features", "k", "batch", "rounds")}
        | {"d": rows.shape[1]},
        "missing": missing,
        "seconds": times,
        "tokens_per_cpu_second": {name: args.batch / statistics.median(found) for name, found in times.items()},
        "speedup_paired": {
            name: statistics.median(other / own for other, own in zip(found, times["steerfast"], strict=True))
            for name, found in times.items()
        },
    }
    for name, rate in result["tokens_per_cpu_second"].items():
        print(
            f"{name:<18}{rate:>9.0f} tokens per CPU second   steerfast is {result['speedup_paired'][name]:.2f}× as fast"
        )
    for name, why in missing.items():
        print(f"{name:<18}not measured: {why}")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\n{os.path.relpath(args.out)}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
