"""How far the model is off: kernels whose times on an H200 others have published, predicted by the same code as our own.

Source: github.com/XAheli/Kernel-Profiling at 9f91fc1 (June 2026), the durations of its data_dashboard/data.js under "triton".
Device: one H200 of 141 GB. Clock: not stated; the times are Nsight Compute's, which holds the base clock unless told otherwise.
Which tile its products' autotuner chose is not stated either: the one here is the best of its list by count. Our own kernels
are not among them: this says how good the constants and the rules are, not that a prediction came true.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lab.case import Case
from torch import Tensor

from .constants import Range
from .yardsticks import kernels


@dataclass(frozen=True)
class Published:
    """A kernel at one size.

    Attributes:
        kernel: Its name in the source.
        microseconds: What was measured.
        bound: What the source's own counters say that it waits for.
        make: -> the case.
    """

    kernel: str
    microseconds: float
    bound: str
    make: Callable[[], Case]


def _case(
    name: str, launch: Callable[..., None], size: float, operations: float, tensors: list[tuple[Any, ...]]
) -> Case:
    """A case on memory that nobody touches: what a kernel moves and issues does not depend on the numbers."""

    def fresh() -> tuple[Tensor, ...]:
        return tuple(torch.empty(*shape, dtype=dtype) for *shape, dtype in tensors)

    def judge(_: Any) -> Callable[[Any], float]:
        raise RuntimeError("a published kernel is counted, never run")

    return Case(name, size, operations, fresh, launch, judge)


def vector_sum(n: int, dtype: torch.dtype) -> Case:
    def launch(x: Tensor, y: Tensor, out: Tensor) -> None:
        kernels.sum_kernel[(-(-n // 1024),)](x_ptr=x, y_ptr=y, out_ptr=out, N=n, BLOCK=1024, num_warps=4)

    return _case(f"sum n={n} {dtype}", launch, 3 * n * dtype.itemsize, n, [(n, dtype)] * 3)


def softmax(rows: int, d: int, dtype: torch.dtype, backward: bool = False) -> Case:
    block = 1 << (d - 1).bit_length()
    warps = 4 if block < 2048 else 8 if block < 8192 else 16
    kernel = kernels.softmax_backward_kernel if backward else kernels.softmax_kernel
    names = ("grad_ptr", "out_ptr", "grad_x_ptr") if backward else ("x_ptr", "out_ptr")
    count = len(names)

    def launch(*tensors: Tensor) -> None:
        kernel[(rows,)](**dict(zip(names, tensors, strict=True)), D=d, BLOCK=block, num_warps=warps)

    name = f"softmax{' backward' if backward else ''} rows={rows} d={d} {dtype}"
    return _case(name, launch, count * rows * d * dtype.itemsize, 4 * rows * d, [(rows, d, dtype)] * count)


def product(batch: int, m: int, k: int, n: int, dtype: torch.dtype) -> Case:
    def launch(a: Tensor, b: Tensor, out: Tensor) -> None:
        grid = batch, -(-m // 128), -(-n // 256)
        kernels.product_kernel[grid](
            a_ptr=a,
            b_ptr=b,
            out_ptr=out,
            M=m,
            N=n,
            K=k,
            BLOCK_M=128,
            BLOCK_N=256,
            BLOCK_K=64,
            num_warps=8,
            num_stages=3,
        )

    size = batch * (m * k + k * n + m * n) * dtype.itemsize
    shapes = [(batch, m, k, dtype), (batch, k, n, dtype), (batch, m, n, dtype)]
    return _case(f"product {batch}×{m}×{k}×{n} {dtype}", launch, size, 2.0 * batch * m * k * n, shapes)


SOURCE = (
    "github.com/XAheli/Kernel-Profiling at 9f91fc1, data_dashboard/data.js; an H200, Nsight Compute, clock not stated"
)
half, brain, full = torch.float16, torch.bfloat16, torch.float32
ROWS: list[tuple[str, str, float, str, Callable[..., Case], tuple[Any, ...]]] = [
    ("sum fp32", "vector_addition, Config G", 2410, "DRAM 90 %", vector_sum, (48 * 12000 * 1536, full)),
    ("sum fp16", "vector_addition, FP16 Large", 2850, "DRAM 90 %", vector_sum, (64 * 16000 * 2048, half)),
    ("softmax fp32", "softmax_forward, (32, 4K, 4K)", 1050, "4.1 TB/s", softmax, (32 * 4096, 4096, full)),
    ("softmax fp16", "softmax_forward, (64, 8K, 1K, FP16)", 796.8, "SM busy 94 %", softmax, (64 * 8192, 1024, half)),
    ("softmax bf16", "softmax_forward, (64, 8K, 1K, BF16)", 862.2, "SM busy 90 %", softmax, (64 * 8192, 1024, brain)),
    ("softmax short", "softmax_forward, (32, 4K, 256)", 124.9, "SM busy 85 %", softmax, (32 * 4096, 256, full)),
    ("gradient fp32", "softmax_backward, (32, 4K, 4K)", 1970, "4.2 TB/s", softmax, (32 * 4096, 4096, full, True)),
    (
        "gradient fp16",
        "softmax_backward, (64, 8K, 1K, FP16)",
        729.5,
        "4.5 TB/s",
        softmax,
        (64 * 8192, 1024, half, True),
    ),
    ("product k=1024", "batched_matmul, FP16", 2800, "L2 89 %, DRAM 71 %", product, (64, 8000, 1024, 1024, half)),
    (
        "product k=2048",
        "batched_matmul, FP16 Large",
        26950,
        "L2 94 %, DRAM 7 %",
        product,
        (64, 16000, 2048, 2048, half),
    ),
]
PUBLISHED = {
    name: Published(kernel, microseconds, bound, functools.partial(make, *sizes))
    for name, kernel, microseconds, bound, make, sizes in ROWS
}
CASES = {name: one.make for name, one in PUBLISHED.items()}


def miss(microseconds: float, predicted: Range) -> float:
    """What was measured over the nearest end of a range: 1 within it."""
    nearest = min(max(microseconds, predicted.short), predicted.long)
    return microseconds / nearest
