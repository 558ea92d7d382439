"""What the SAE ops cost on a CPU beside the dense road, wanted and measured.

    python benchmarks/sae_cpu.py --out benchmarks/results

Each pair takes turns in one process on one thread; a ratio is the median over rounds of CPU time over CPU time, with the
lowest and the highest round. Every result is compared with the dense one first. Extra memory is the growth of the
process's peak (Linux: VmHWM) over one call, each in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import steerfast as sf
from steerfast import reference

N, D, F, K, EDITED = 256, 576, 65536, 32, 8
Call = Callable[[], Any]


def dictionary(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, w_enc, b_enc, w_dec) with pre-activations of unit size."""
    torch.manual_seed(0)
    w_enc, w_dec = torch.randn(F, D) / D**0.5, torch.randn(F, D)
    return torch.randn(N, D).to(dtype), w_enc.to(dtype), -torch.rand(F).to(dtype), w_dec.to(dtype)


def dense_top_k(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.topk(torch.relu(x @ w.T + b), K)
    return found.values, found.indices


def dense_edit(x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, chosen: list[int]) -> Tensor:
    """Encode everything, decode it, change the features, decode again, and keep what the first decode missed."""
    f = torch.relu(x @ w_enc.T + b_enc)
    error = x - f @ w_dec
    f[:, chosen] = 4.0
    return f @ w_dec + error


def paired(ours: Call, theirs: Call, rounds: int, calls: int = 1) -> dict[str, float]:
    """CPU seconds of a call of each, and the median of theirs/ours over rounds."""
    ours(), theirs()
    rows = []
    for i in range(rounds):
        seconds = {}
        for name in ("ours", "theirs") if i % 2 else ("theirs", "ours"):
            repeat = calls if name == "ours" else 1
            start = time.process_time()
            for _ in range(repeat):
                (ours if name == "ours" else theirs)()
            seconds[name] = (time.process_time() - start) / repeat
        rows.append(seconds)
    ratios = sorted(row["theirs"] / row["ours"] for row in rows)
    return {
        "ours_s": statistics.median(row["ours"] for row in rows),
        "theirs_s": statistics.median(row["theirs"] for row in rows),
        "times": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
    }


def peak_growth(name: str) -> int:
    """Bytes by which one call raises the peak of this process."""
    x, w, b, _ = dictionary(torch.float32)
    call = dense_top_k if name == "dense" else lambda *arguments: sf.ops.sae_encode(*arguments, K)
    call(x[:1], w, b)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = status("VmRSS")
    call(x, w, b)
    return status("VmHWM") - before


def status(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_a_process(name: str) -> int:
    run = subprocess.run([sys.executable, __file__, "--peak", name], check=True, capture_output=True, text=True)
    return int(run.stdout)


def encode(rounds: int) -> list[dict[str, Any]]:
    x, w, b, _ = dictionary(torch.float32)
    ours, dense = sf.ops.sae_encode(x, w, b, K), dense_top_k(x, w, b)
    torch.testing.assert_close(ours[0], dense[0], atol=1e-5, rtol=1e-5)
    row = paired(lambda: sf.ops.sae_encode(x, w, b, K), lambda: dense_top_k(x, w, b), rounds)
    memory = {name: in_a_process(name) for name in ("ours", "dense")}
    return [
        {"case": "encode float32: time / topk(relu(xW + b))", "wanted": "<= 0.90", "measured": 1 / row["times"], **row},
        {
            "case": "encode float32: extra memory / the same",
            "wanted": "<= 0.25",
            "measured": memory["ours"] / memory["dense"],
            **memory,
        },
    ]


def decode(rounds: int, dtype: torch.dtype) -> dict[str, Any]:
    x, w, b, w_dec = dictionary(dtype)
    values, indices = sf.ops.sae_encode(x, w, b, K)
    f = torch.zeros(N, F).scatter_add_(1, indices.long(), values).to(dtype)
    sparse, dense = sf.ops.sae_decode(values, indices, w_dec), f @ w_dec
    torch.testing.assert_close(sparse, dense, atol=0.5 if dtype == torch.bfloat16 else 1e-3, rtol=0.02)
    row = paired(lambda: sf.ops.sae_decode(values, indices, w_dec), lambda: f @ w_dec, rounds, calls=20)
    name = str(dtype).removeprefix("torch.")
    return {"case": f"decode {name}: dense decode / time", "wanted": ">= 50", "measured": row["times"], **row}


def edit(rounds: int) -> dict[str, Any]:
    x, w_enc, b_enc, w_dec = dictionary(torch.float32)
    chosen = list(range(0, F, F // EDITED))[:EDITED]
    bank = sf.Bank(D, 1)
    slot = bank.register(sf.EditFeatures(sf.SAE(w_enc, w_dec, b_enc), dict.fromkeys(chosen, 4.0)))

    def hooked() -> Tensor:  # what a dispatcher calls where every token has the same owners
        return reference.edit(x, bank.view(slot), bank.strength(slot))

    torch.testing.assert_close(hooked(), dense_edit(x, w_enc, b_enc, w_dec, chosen), atol=0.02, rtol=1e-3)
    row = paired(hooked, lambda: dense_edit(x, w_enc, b_enc, w_dec, chosen), rounds, calls=200)
    case = f"edit {EDITED} features, error kept: full encode + two dense decodes / time"
    return {"case": case, "wanted": ">= 1000", "measured": row["times"], **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the raw rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak", choices=("ours", "dense"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sf.use_backend("torch")
    with torch.inference_mode():
        if arguments.peak:
            print(peak_growth(arguments.peak))
            return
        rows = encode(arguments.rounds)
        rows += [decode(arguments.rounds, dtype) for dtype in (torch.float32, torch.bfloat16)]
        rows.append(edit(arguments.rounds))
    for row in rows:
        print(f"{row['case']:<76} wanted {row['wanted']:>8}  measured {row['measured']:.4g}")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        date = datetime.date.today().isoformat()
        record = {
            "date": date,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "sizes": {"n": N, "d": D, "F": F, "k": K},
            "rows": rows,
        }
        path = arguments.out / f"sae-cpu-{date}-torch{torch.__version__.partition('+')[0]}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
