"""From counts to rows: what a case's launches are, what each needs and moves, and what that should take on an H200."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.case import Case

from . import constants as c
from .cases import EVERY, tokens
from .launches import Launch, as_on_a_gpu, launches_of
from .machine import Resources, disassemble, resources, tensor_instructions
from .walk import Counted, Walk, walk


@dataclass(frozen=True)
class Kernel:
    """One launch of a case on a target."""

    name: str
    target: str
    grid: tuple[int, ...]
    resources: Resources
    tensor: str  # the kind of tensor-core instruction, or nothing
    l2: float  # bytes that its programs ask of L2 and write to it; little that is read again stays in L1
    memory: c.Range  # bytes from and to DRAM
    walk: Walk | None  # not read from AMD's code

    @property
    def programs(self) -> int:
        return math.prod(self.grid)

    @property
    def busiest(self) -> int:
        """Programs that the busiest SM works off."""
        return -(-self.programs // c.SMS[self.target])

    @property
    def resident(self) -> int:
        """Programs in one SM at a time: what it can hold, where the grid has as many."""
        return min(self.resources.programs, self.busiest)

    @property
    def in_flight(self) -> int:
        """Bytes of the stream under way in one SM."""
        return 0 if self.walk is None else self.walk.in_flight * self.resident


@dataclass(frozen=True)
class Row:
    """One case on one target."""

    case: str
    target: str
    tokens: int
    kernels: tuple[Kernel, ...]
    beside: dict[str, int]  # what PyTorch launches, by name
    allocations: int
    floor: float  # seconds: the case's bytes or operations, at the middle of what is assumed
    predicted: c.Range | None  # seconds; on sm_90 alone, as an H200

    def counts(self) -> dict[str, float]:
        """What a test holds, over all launches: the worst of each program, the sum of what is moved and issued."""
        walks = [(k, k.walk) for k in self.kernels if k.walk is not None]
        busiest = max(self.kernels, key=lambda kernel: kernel.l2)
        return {
            "launches": len(self.kernels),
            "torch_kernels": sum(self.beside.values()),
            "allocations": self.allocations,
            "programs_per_sm": min(kernel.resident for kernel in self.kernels),
            "stack": max(kernel.resources.stack for kernel in self.kernels),
            "in_flight": busiest.in_flight,
            "access": busiest.walk.narrowest if busiest.walk else 0,
            "cycles_per_token": round(sum(w.cycles * k.programs for k, w in walks) / self.tokens, 1),
            "l2_bytes_per_token": round(sum(kernel.l2 for kernel in self.kernels) / self.tokens, 1),
            "memory_bytes_per_token": round(sum(kernel.memory.long for kernel in self.kernels) / self.tokens, 1),
        }


def count_all(names: Iterable[str]) -> dict[str, list[Counted]]:
    """Cases by short name -> their launches as counted, in a process of their own: Triton decides at its import."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "static.counted", *names],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout)


def rows(name: str, counted: list[Counted], targets: Iterable[str]) -> list[Row]:
    """A case on each target."""
    case = EVERY[name]()
    return [_row(case, counted, target) for target in targets]


def _row(case: Case, counted: list[Counted], target: str) -> Row:
    launches, beside = launches_of(as_on_a_gpu(case), target)
    if [launch.kernel.__name__ for launch in launches] != [each["kernel"] for each in counted]:
        raise RuntimeError(f"{case.name}: the interpreter and {target} were sent different kernels")
    kernels = tuple(_kernel(launch, counted[: i + 1], target) for i, launch in enumerate(launches))
    middle = sum(c.DRAM) / 2, sum(c.PRODUCT) / 2
    floor = max(case.bytes / middle[0], case.operations / middle[1])
    predicted = None
    if target == "sm_90":
        extra = len(kernels) + sum(beside.kernels.values())
        times = [time_of(kernel) for kernel in kernels]
        predicted = c.Range(
            sum(time.short for time in times) + extra * c.LAUNCH.short,
            sum(time.long for time in times) + extra * c.LAUNCH.long,
        )
    return Row(case.name, target, tokens(case), kernels, dict(beside.kernels), beside.allocations, floor, predicted)


def _kernel(launch: Launch, so_far: list[Counted], target: str) -> Kernel:
    counted = so_far[-1]
    compiled = launch.compile(target)
    needs = resources(compiled, target)
    walked = walk(disassemble(compiled.asm["cubin"]), counted, needs) if target.startswith("sm_") else None
    programs, tensors = launch.programs, counted["tensors"].values()
    at_once = min(programs, needs.programs * c.SMS[target])
    memory = c.Range(
        *(sum(_memory(each, programs, at_once, share, so_far) for each in tensors) for share in c.L2_SHARE)
    )
    return Kernel(
        counted["kernel"],
        target,
        tuple(launch.grid),
        needs,
        tensor_instructions(compiled, target),
        programs * sum(each["distinct" if each["distinct"] <= c.L1_KEEPS else "moved"] for each in tensors),
        memory,
        walked,
    )


def _memory(tensor: dict[str, Any], programs: int, resident: int, share: float, so_far: list[Counted]) -> float:
    """Bytes of a tensor that reach DRAM: what is touched first, and what L2 has lost until a program reads it again."""
    touched = tensor["distinct"] * programs
    kept = tensor["shared"] or tensor["size"] <= c.L2_SIZE
    first = min(touched, tensor["size"]) if kept else touched
    if tensor["reads"] and _bytes_since(tensor, so_far) <= share * c.L2_SIZE:
        first = 0.0  # an earlier launch of the call has left it in L2
    room = share * c.L2_SIZE
    if tensor["shared"]:
        again = tensor["moved"] - tensor["distinct"]
        return first + (programs * again if min(tensor["size"], tensor["distinct"] * resident) > room else 0.0)
    return first + programs * sum(size for between, size in tensor["again"] if between * resident > room)


def _bytes_since(tensor: dict[str, Any], so_far: list[Counted]) -> float:
    """Bytes that passed through L2 since an earlier launch touched a tensor, until all of it is read again."""
    spans = dict[int, int]()
    for before in reversed(so_far[:-1]):
        spans.update({each["from"]: each["size"] for each in before["tensors"].values()})
        if tensor["from"] in spans:
            written = {each["from"]: each["size"] for each in so_far[-1]["tensors"].values() if not each["reads"]}
            return sum((spans | written).values())
    return math.inf


def parts(kernel: Kernel) -> dict[str, c.Range]:
    """Seconds that each resource of an H200 would take if it were the only one."""
    assert kernel.walk is not None
    waves = -(-kernel.busiest // kernel.resident)
    cycles = kernel.walk.cycles * kernel.busiest
    waits = zip(c.WAIT, c.SHORT_WAIT, strict=True)
    into_one = kernel.l2 / kernel.programs * kernel.busiest / c.L2_PORT  # cycles of the busiest SM's own port
    return {
        "memory": c.Range(kernel.memory.short / c.DRAM.short, kernel.memory.long / c.DRAM.long),
        "L2": c.Range(*(max(kernel.l2 / all_, into_one / clock) for all_, clock in zip(c.L2, c.CLOCK, strict=True))),
        "issue": c.Range(cycles / c.CLOCK.short / c.ISSUE_SHARE.short, cycles / c.CLOCK.long / c.ISSUE_SHARE.long),
        "product": c.Range(*(kernel.walk.product * kernel.programs / speed for speed in c.PRODUCT)),
        "wait": c.Range(
            *(waves * (kernel.walk.waits * wait + kernel.walk.short_waits * brief) for wait, brief in waits)
        ),
    }


def time_of(kernel: Kernel) -> c.Range:
    """Seconds of a launch: whatever takes longest; with one program an SM nothing fills its waits, so they come on top."""
    found = parts(kernel)
    wait = found.pop("wait")
    short, long = max(part.short for part in found.values()), max(part.long for part in found.values())
    return c.Range(max(short, wait.short), long + wait.long if kernel.resident == 1 else max(long, wait.long))


def binds(row: Row) -> str:
    """What the longest launch of a row is bound by."""
    kernel = max(row.kernels, key=lambda each: time_of(each).long)
    return max(parts(kernel).items(), key=lambda part: part[1].long)[0]


def as_json(row: Row) -> dict[str, Any]:
    """A row for a file: every figure by its name, so that none can be taken for a measured time."""
    kernels = [asdict(kernel) for kernel in row.kernels]
    predicted = None if row.predicted is None else row.predicted._asdict()
    return {
        "case": row.case, "target": row.target, "tokens": row.tokens, "counts": row.counts(), "kernels": kernels,
        "torch_kernels": row.beside, "floor_seconds": row.floor, "predicted_seconds": predicted,
    }  # fmt: skip
