"""The default kernel variants: what the launchers really launch, caught on its way to the device and compiled ahead of time.

A variant is one launch of a launcher at a typical size. The launch is recorded instead of run, its arguments are
specialised as Triton does (a size of 1 becomes a constant; pointers and multiples of 16 are marked divisible by 16; None
is a constant; what changes from step to step is none of this), and the kernel is compiled for a target that need not be present.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from steerfast.ops.slots import ALL_MODES, HINGE, SOLVE
from steerfast_kernels import (
    _device,
    add,
    flow,
    sae_decode,
    sae_edit,
    sae_edit_topk,
    sae_encode,
    sae_encode_threshold,
    subspace,
)
from steerfast_kernels._device import LIMITS, Device

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Variant:
    """One launch and what its code may use and must hold."""

    name: str
    kernel: str
    launch: Callable[[], object]
    registers: int  # per thread on CUDA
    shared: int  # bytes on CUDA
    stack: int = 0  # bytes of local memory on CUDA
    vector_loads: bool = False  # 16 bytes a thread and load, or an asynchronous copy of 16 bytes
    tensor_cores: bool = False
    wgmma: bool = False  # on sm_90: 64 rows or more
    targets: tuple[str, ...] = tuple(TARGETS)


@dataclass
class Report:
    """What one compilation came to."""

    registers: int = -1
    stack: int = 0  # bytes of local memory or scratch
    spills: int = 0  # AMD: vector registers that went to memory
    scalar_spills: int = (
        0  # AMD: scalar registers kept in lanes of a vector register; to memory they would show in stack
    )
    shared: int = 0
    text: str = field(default="", repr=False)  # PTX or AMD assembly


def _rows(d: int, dtype: torch.dtype, modes: int, rank: int, columns: int = 1) -> None:
    x = torch.empty(64, d, dtype=dtype)
    bank = torch.empty(4 * rank, d, dtype=dtype), torch.empty(64, 8), torch.empty(4, 8, dtype=torch.int32)
    rows, scale = torch.zeros(64, columns, dtype=torch.int32), torch.empty(64, columns)
    subspace.subspace(x, *bank, rows, scale, modes, rank, out=torch.empty_like(x))


def _tiles(n: int, dtype: torch.dtype, modes: int, rank: int) -> None:
    x = torch.empty(n, 4096, dtype=dtype)
    bank = torch.empty(2 * rank, 4096, dtype=dtype), torch.empty(256, 8), torch.empty(4, 8, dtype=torch.int32)
    rows, scale = torch.zeros(n, dtype=torch.int32), torch.empty(n)
    subspace.subspace(x, *bank, rows, scale, modes, rank, out=torch.empty_like(x))


def _shared(n: int, modes: int, rank: int) -> None:
    """All tokens have one slot."""
    x = torch.empty(n, 4096, dtype=torch.bfloat16)
    bank = torch.empty(2 * rank, 4096, dtype=torch.bfloat16), torch.empty(256, 8), torch.empty(1, 8, dtype=torch.int32)
    subspace.subspace(x, *bank, None, torch.empty(n), modes, rank, out=torch.empty_like(x))


def _few(modes: int, rank: int) -> None:
    _tiles(16, torch.bfloat16, modes, rank)


def _full_rank() -> None:
    x, q = torch.empty(64, 4096, dtype=torch.bfloat16), torch.empty(4096, 4096, dtype=torch.bfloat16)
    bank = torch.empty(5000, 8), torch.empty(1, 8, dtype=torch.int32)
    flow.flow(x, q, *bank, torch.zeros(64, 1, dtype=torch.int32), torch.empty(64, 1), solves=True)


def _add() -> None:
    x = torch.empty(64, 4096, dtype=torch.bfloat16)
    rows, scale = torch.zeros(64, 1, dtype=torch.int32), torch.empty(64, 1)
    add.add(x, torch.empty(8, 4096, dtype=torch.bfloat16), rows, scale, out=torch.empty_like(x))


def _encode(n: int, dtype: torch.dtype, weights: torch.dtype | None = None) -> None:
    # 64 tiles of features: k' stays 4 and a repair is possible, as with the 512 tiles of a real dictionary
    weights = weights or dtype
    w, b = torch.zeros(8192, 512, dtype=weights), torch.zeros(8192, dtype=weights)
    sae_encode.sae_encode(torch.zeros(n, 512, dtype=dtype), w, b, 16)


def _edit_topk(n: int) -> None:
    x, w, b = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((n, 512), (8192, 512), (8192,)))
    features, table = torch.zeros(8, dtype=torch.int32), torch.zeros(8, 4)
    sae_edit_topk.sae_edit_topk(x, w, b, 16, features, table, w[:8], torch.zeros(n))


def _encode_threshold(n: int) -> None:
    x, w, b = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((n, 512), (8192, 512), (8192,)))
    sae_encode_threshold.sae_encode_threshold(x, w, b, torch.zeros(8192), 256)


def _edit(n: int) -> None:
    x, w = torch.zeros(n, 4096, dtype=torch.bfloat16), torch.zeros(8, 4096, dtype=torch.bfloat16)
    values, indices = torch.zeros(n, 32), torch.zeros(n, 32, dtype=torch.int32)
    sae_edit.sae_edit(x, values, indices, torch.zeros(8, dtype=torch.int32), torch.zeros(8, 4), w, torch.zeros(n))


def _decode(n: int) -> None:
    w = torch.empty(1024, 4096, dtype=torch.bfloat16)
    sae_decode.sae_decode(
        torch.empty(n, 32), torch.empty(n, 32, dtype=torch.int32), w, torch.empty(4096, dtype=torch.bfloat16)
    )


MANY = 8192
bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
# where a kernel differs little from one that is compiled for all targets
ONE, TWO, OLD = ("sm_90",), ("sm_90", "gfx942"), ("sm_80", "sm_90")
VARIANTS = [
    Variant("add", "_add_kernel", _add, registers=64, shared=1024, vector_loads=True, targets=TWO),
    Variant("rows-d4096-all-modes", "_rows_kernel", lambda: _rows(4096, bf16, ALL_MODES, 8), 128, 1024, vector_loads=True),
    Variant("rows-d576-all-modes", "_rows_kernel", lambda: _rows(576, bf16, ALL_MODES, 8), 168, 16384, 0, True, targets=TWO),
    Variant("rows-one-direction", "_rows_kernel", lambda: _rows(4096, bf16, HINGE, 1), 168, 1024, vector_loads=True, targets=TWO),
    Variant("rows-k64-columns", "_rows_kernel", lambda: _rows(4096, bf16, ALL_MODES, 64, 4), 255, 1024, 0, True, targets=ONE),
    Variant("whole-k64-hinge", "whole_kernel", lambda: _tiles(MANY, bf16, HINGE, 64), 255, 200704, 0, False, True, True, TWO),
    Variant("whole-k64-solve", "whole_kernel", lambda: _tiles(MANY, bf16, SOLVE, 64), 255, 131072, 64, False, True, False, ONE),
    Variant("whole-k8-all-modes", "whole_kernel", lambda: _tiles(4096, bf16, ALL_MODES, 8), 255, 98304, 8, False, True),
    Variant("whole-k64-all-modes", "whole_kernel", lambda: _tiles(MANY, bf16, ALL_MODES, 64), 255, 114688, 64, False, True),
    Variant("whole-k8-hinge", "whole_kernel", lambda: _tiles(4096, bf16, HINGE, 8), 168, 98304, 0, False, True, False, ONE),
    Variant("flow-full-rank", "_flow_kernel", _full_rank, 128, 16384),
    Variant("split-project", "project_kernel", lambda: _few(HINGE, 64), 168, 65536, tensor_cores=True, targets=TWO),
    Variant("split-lift", "lift_kernel", lambda: _few(ALL_MODES, 64), 255, 65536, tensor_cores=True, targets=TWO),
    Variant("split-lift-k32", "lift_kernel", lambda: _few(ALL_MODES, 32), 128, 65536, 16, False, True, False, ONE),
    Variant("wide-project", "project_kernel", lambda: _tiles(MANY, bf16, HINGE, 512), 255, 147500, 88, False, True, True, TWO),
    Variant("wide-act-k512", "act_kernel", lambda: _tiles(MANY, bf16, ALL_MODES, 512), 255, 8192, 16, targets=ONE),
    Variant("wide-lift-k256", "lift_kernel", lambda: _tiles(MANY, bf16, HINGE, 256), 255, 229376, 64, False, True, True, ONE),
    Variant("wide-lift-k512", "lift_kernel", lambda: _tiles(MANY, bf16, HINGE, 512), 255, 196700, 376, False, True, True, TWO),
    Variant("wide-project-k64", "project_kernel", lambda: _shared(1025, HINGE, 64), 168, 98304, 0, False, True, True, ONE),
    Variant("wide-lift-k64", "lift_kernel", lambda: _shared(1025, ALL_MODES, 64), 200, 65536, 0, False, True, True, TWO),
    Variant("whole-float32", "whole_kernel", lambda: _tiles(1024, fp32, ALL_MODES, 64), 255, 147456, 64, targets=ONE),
    Variant("split-lift-float32", "lift_kernel", lambda: _tiles(300, fp32, ALL_MODES, 64), 200, 65536, targets=ONE),
    Variant("encode-many-rows", "_encode_kernel", lambda: _encode(4096, bf16), 200, 200704, tensor_cores=True, wgmma=True),
    Variant("encode-few-rows", "_encode_kernel", lambda: _encode(16, bf16), 168, 102400, 0, False, True, True, TWO),
    Variant("encode-float32", "_encode_kernel", lambda: _encode(128, fp32), 168, 32768, targets=ONE),
    Variant("encode-mixed", "_encode_kernel", lambda: _encode(128, bf16, fp32), 255, 131072, 0, False, True, True, OLD),
    Variant("encode-mixed-few", "_encode_kernel", lambda: _encode(16, fp16, fp32), 200, 163840, 0, False, True, True, ONE),
    Variant("encode-repair", "_repair_kernel", lambda: _encode(128, bf16), 200, 102400, 0, False, True, True, ONE),
    Variant("encode-select", "select_kernel", lambda: _encode(128, bf16), 96, 8192, targets=ONE),
    Variant("encode-threshold", "_threshold_kernel", lambda: _encode_threshold(4096), 128, 200704, 0, False, True, True, ONE),
    Variant("edit-topk-own", "_own_kernel", lambda: _edit_topk(16), 168, 102400, 0, False, True, True, ONE),
    Variant("edit-topk-count", "_count_kernel", lambda: _edit_topk(4096), 255, 200704, 0, False, True, True, ONE),
    Variant("edit-features", "_edit_kernel", lambda: _edit(16), 40, 1024, targets=ONE),
    Variant("decode-few-rows", "_decode_kernel", lambda: _decode(16), 64, 8192, vector_loads=True, targets=ONE),
]  # fmt: skip


def record(variant: Variant, target: str) -> tuple[JITFunction, dict[str, Any]]:
    """The kernel and the arguments of the variant's launch as on the target; nothing runs."""
    launches: list[tuple[JITFunction, dict[str, Any]]] = []

    def catch(kernel: JITFunction, *, grid: object, warmup: bool, **arguments: Any) -> None:
        launches.append((kernel, arguments))

    device = Device(LIMITS[target].lanes, LIMITS[target].shared, wgmma=target == "sm_90")
    with mock.patch.object(JITFunction, "run", catch), mock.patch.object(_device, "device_of", return_value=device):
        variant.launch()
    return next((kernel, arguments) for kernel, arguments in launches if kernel.__name__ == variant.kernel)


def specialise(kernel: JITFunction, arguments: dict[str, Any]) -> ASTSource:
    """The source of one launch with the types and constants that Triton would give it."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        aligned = isinstance(value, torch.Tensor) or value % 16 == 0
        if aligned and special and not parameter.do_not_specialize_on_alignment:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_for(variant: Variant, target: str) -> Report:
    """Compile a variant for a target; raises what the compiler raises."""
    kernel, arguments = record(variant, target)
    options = {name: arguments[name] for name in OPTIONS if name in arguments}
    compiled = triton.compile(specialise(kernel, arguments), target=TARGETS[target], options=options)
    report = Report(shared=compiled.metadata.shared)
    if target.startswith("sm_"):
        report.text = compiled.asm["ptx"]
        report.registers, report.stack = _resources(compiled.asm["cubin"])
    else:
        report.text = compiled.asm["amdgcn"]
        numbers = {
            name: max(map(int, re.findall(rf"\.{name}:\s+(\d+)", report.text)), default=0)
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
        }
        report.registers, report.stack = numbers["vgpr_count"], numbers["private_segment_fixed_size"]
        report.spills, report.scalar_spills = numbers["vgpr_spill_count"], numbers["sgpr_spill_count"]
    return report


@triton.jit
def _careless_product_kernel(x_ptr, y_ptr):
    offs = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + offs)
    tl.store(y_ptr + offs, tl.dot(x, x))


def compile_careless_product(target: str) -> str:
    """PTX of a float32 product that leaves its precision to the compiler."""
    source = ASTSource(_careless_product_kernel, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {}, {})
    return triton.compile(source, target=TARGETS[target]).asm["ptx"]


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers per thread, bytes of stack and local memory) as cuobjdump reads them out of a cubin."""
    tool = next(Path(triton.__file__).parent.rglob("backends/nvidia/bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
    found = {
        name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)
    }
    return found["REG"], found["STACK"] + found["LOCAL"]
