"""`steerfast bench`: the ops of `sf.ops` on this machine, with eager PyTorch as the baseline, against the machine's own peak."""
# ruff: noqa: E731

from __future__ import annotations

import argparse
import json
import platform
import re
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, addmm, relu
from torch.nn.functional import embedding_bag, normalize, rms_norm
from torch.utils.benchmark import Measurement, Timer

from steerfast import __version__, ops

from . import shared

DESCRIPTION = "Check every op, and time it and its formula in eager PyTorch; without a GPU, on one thread of the CPU."
EXAMPLE = "steerfast bench\nsteerfast bench --only flow --out rows.jsonl"
HEAD = f"{'case':52}{'ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'of peak':>9}{'eager':>8}"
LEGEND = "of peak: bytes or operations at that speed, whichever is slower, over the time. eager: its time over ours."
SIZES = {"cuda": (4096, (16, 4096), 65536, 1 << 30, 8192), "cpu": (576, (1, 256), 16384, 1 << 28, 1024)}
Case = tuple[int, tuple[Tensor, ...], Any, Any]  # operations of a row, inputs, op, eager formula


def standard(device: str, dtype: torch.dtype, d: int, f: int) -> dict[str, Callable[[int], Case]]:
    """By the name of an op, what builds its case of n rows; in-place twins and `subspace*` run the kernels of these."""
    random, k, ids = partial(torch.randn, device=device), min(64, d), torch.arange(32, device=device).int()
    x = lambda n: (normalize(random(n, d)) * d**0.5).to(dtype)
    unit = lambda k: torch.linalg.qr(random(d, k))[0].T.contiguous().to(dtype)
    slots = lambda n: (x(8), ids[:8].repeat(-(-n // 8))[:n], random(n))
    codes = lambda n: (random(n, 32).abs(), ((torch.randint(f, (n, 1), device=device) + ids * (f // 32)) % f).int())
    sae = lambda n, *level: (x(n), x(f) / d**0.5, random(f).to(dtype) / 10, *level)
    add = lambda x, v, rows, c: torch.addcmul(x, c[:, None].to(x.dtype), v[rows])
    wide = lambda x, w: torch.mm(x, w.T, out_dtype=torch.float32) if x.is_cuda and x.dtype.itemsize == 2 else x @ w.T
    top = lambda x, w, b, level=0.0: torch.where((y := wide(x, w) + b) > level, y, 0).topk(32)
    decode = lambda v, i, w: embedding_bag(i, w, per_sample_weights=v.to(w.dtype), mode="sum")
    eight = torch.full((8, 4), 8.0, device=device)
    edit = lambda x, v, i, m, t, w: x + (8 - (v[..., None] * (i[..., None] == m)).sum(1)).to(w.dtype) @ w
    return {
        "add slots=8": lambda n: (2 * d, (x(n), *slots(n)), ops.add, add),
        "add_rms_norm slots=8": lambda n: (6 * d, (x(n), x(n), x(1)[0], *slots(n)), ops.add_rms_norm,
            lambda h, r, w, *more: (rms_norm(new := add(h + r, *more), w.shape, w, 1e-6), new)),
        "ablate k=1": lambda n: (4 * d, (x(n), unit(1)), ops.ablate, lambda x, b: addmm(x, x @ b.T, b, alpha=-1)),
        f"amplify k={k}": lambda n: (4 * k * d, (x(n), unit(k)), ops.amplify, lambda x, b: addmm(x, relu(x @ b.T), b)),
        "calibrate k=8": lambda n: (32 * d, (x(n), unit(8)), ops.calibrate, lambda x, b: addmm(x, 1 / len(b) - relu(x @ b.T), b)),
        "affine": lambda n: (2 * d, (x(n), *x(2)), ops.affine, lambda x, w, b: torch.addcmul(b, w, x)),
        "loreft k=8": lambda n: (32 * d, (x(n), unit(8), x(8) / d**0.5, random(8).to(dtype)), ops.loreft,
            lambda x, r, w, b: addmm(x, addmm(b, x, (w - r).T), r)),
        "similarity k=8": lambda n: (18 * d, (x(n), unit(8)), ops.similarity, lambda x, w: (x @ w.T).norm(2, -1) / x.norm(2, -1)),
        f"flow k={k}": lambda n: (4 * k * d, (x(n), unit(k), *random(2, k)), partial(ops.flow, angle=0.4), _flow),
        f"sae_encode F={f} k=32": lambda n: (2 * d * f, sae(n), partial(ops.sae_encode, k=32), top),
        f"sae_encode_threshold F={f}": lambda n: (2 * d * f, sae(n, torch.full((f,), 3.6, device=device)),
            partial(ops.sae_encode_threshold, capacity=32), top),
        f"sae_decode F={f} k=32": lambda n: (64 * d, (*codes(n), x(f)), ops.sae_decode, decode),
        f"sae_add F={f} k=32": lambda n: (64 * d, (x(n), *codes(n), x(f)), ops.sae_add, lambda x, *a: x + decode(*a)),
        "sae_edit k=32": lambda n: (32 * d, (x(n), *codes(n), ids[:8], eight, x(8)), ops.sae_edit, edit),
        f"sae_edit_topk F={f} k=32": lambda n: (2 * d * f, (*sae(n), ids[:8], eight, x(8)),
            lambda x, w, b, *rest: ops.sae_edit_topk(x, w, b, 32, *rest), lambda x, w, b, *rest: edit(x, *top(x, w, b), *rest)),
    }  # fmt: skip


def _flow(x: Tensor, q: Tensor, lam: Tensor, bias: Tensor) -> Tensor:
    a, q, step = x.to(lam.dtype), q.to(lam.dtype), 0.04 * x.to(lam.dtype).norm(dim=-1, keepdim=True)
    for _ in range(10):
        point = normalize(a)
        u = (2 * lam * (point @ q.T) + bias) @ q
        a = a + step * normalize(u - (point * u).sum(-1, keepdim=True) * point)
    return a.to(x.dtype)


def _timed(function: Callable[..., Any], inputs: Sequence[Tensor], seconds: float) -> Measurement:
    return Timer("f(*x)", globals={"f": function, "x": inputs}).blocked_autorange(min_run_time=seconds)  # on one thread


def _seen(answer: Any, inputs: Sequence[Tensor]) -> Tensor:
    """What is compared: of codes how far each feature lies above the level or the last one, so that ties may differ."""
    if isinstance(answer, Tensor) or answer[1].is_floating_point():
        return answer if isinstance(answer, Tensor) else torch.stack(answer)
    above = relu(answer[0] - (inputs[3][:1] if len(inputs) == 4 else answer[0][:, -1:]))
    return above.new_zeros(len(above), len(inputs[1])).scatter_add(1, answer[1].long(), above)


def _measure(row: dict[str, Any], case: Case, seconds: float) -> str:
    """Fill a row, and say it. An answer may err twice what eager PyTorch errs, plus one unit in the last place."""
    operations, inputs, ours, eager = case
    answer, exact = ours(*inputs), [v.double() if v.is_floating_point() else v for v in inputs]
    got, naive, true = _seen(answer, inputs), _seen(eager(*inputs), inputs), _seen(eager(*exact), exact)
    most = 2 * (naive - true).abs().max() + true.abs().max() * torch.finfo(got.dtype).eps
    if not (error := (got - true).abs().max()) <= most:  # NaN, too
        raise ArithmeticError(f"it errs by {error:.3g}, where {most:.3g} is allowed")
    named = max((v.numel() for v in inputs if v.dtype == torch.int32), default=1 << 62)  # rows, by indices
    moved = [*(v[:named] if v.dim() == 2 else v for v in inputs), *([answer] if isinstance(answer, Tensor) else answer)]
    size, count = sum(v.nbytes for v in moved), operations * len(inputs[0])
    floor = max(size / row["copy"], count / row["product"])
    took, baseline = _timed(ours, inputs, seconds), _timed(eager, inputs, seconds)
    row |= {"status": "ok", "bytes": size, "operations": count, "floor": floor}
    row["times"] = {"ours": took.times, "eager": baseline.times}
    s = took.median
    return f"{1e3 * s:10.4f}{size / s / 1e9:8.1f}{count / s / 1e9:9.1f}{floor / s:9.0%}{baseline.median / s:8.2f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `steerfast bench` to a parser."""
    parser.add_argument("--only", default="", metavar="TEXT", help="ops whose name contains this, such as flow or sae")
    parser.add_argument("--width", type=shared.positive, metavar="D", help="(default: 4096 on a GPU, else 576)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="(default: bfloat16 on a GPU)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the time for each")
    parser.add_argument(
        "--out", type=shared.out_file, metavar="FILE", help="append the raw rows to this file, one JSON a line"
    )


@torch.no_grad()
def run(args: argparse.Namespace) -> int:
    """Run `steerfast bench`; returns the exit code: 1 if an op failed or gave a wrong answer."""
    place, default = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    width, counts, features, size, side = SIZES[place]
    d, dtype, seconds = args.width or width, getattr(torch, args.dtype or default), 0.05 if args.quick else 0.5
    builds = {name: build for name, build in standard(place, dtype, d, features).items() if args.only in name}
    if not builds:
        raise ValueError(f"--only: no op has {args.only!r} in its name")
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text() if info.is_file() else "")
    device = torch.cuda.get_device_name() if place == "cuda" else cpu[1] if cpu else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "steerfast": __version__}
    origin = {"place": place, "device": device, "versions": versions, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    source, square = torch.ones(size // 4, device=place), torch.ones(side, side, dtype=dtype, device=place)
    copy = 2 * size / min(_timed(torch.empty_like(source).copy_, [source], seconds).times)
    product = 2 * side**3 / min(_timed(torch.mm, [square, square], seconds).times)
    shared.say(f"{device}: copy {copy / 1e9:.1f} GB/s, product {product / 1e9:.0f} GFLOP/s\n{LEGEND}\n\n{HEAD}")
    bad, tag = 0, f"d={d} {shared.short(dtype)}"
    for name, n in ((name, n) for name in builds for n in counts):
        row = {"case": f"{name} n={n} {tag}", "status": "failed", "copy": copy, "product": product, "run": origin}
        try:
            text = _measure(row, builds[name](n), seconds)
        except Exception as error:  # the rest goes on
            row["error"] = text = f"failed: {type(error).__name__}: {shared.one_line(error)}"
            bad += 1
            if args.debug:
                traceback.print_exc()
        shared.say(f"{row['case']:52}{text}")
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
    return min(bad, 1)
