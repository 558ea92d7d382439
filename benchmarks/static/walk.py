"""An instruction at a time through a kernel: how often each runs, what is in flight, where a program waits.

How often a loop turns is taken from the interpreter: what a statement of its body did there, over what one turn of the loop does.
Loads are followed to their first use; a warp that waits for one has all that were under way when it goes on.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass
from typing import Any

from .constants import SCHEDULERS
from .lines import is_kernel, statement
from .machine import Code, Instruction, Resources, named_registers, registers_of

LOADS, COPIES, STORES = ("LDG", "LD"), ("LDGSTS",), ("STG", "ST")
Counted = dict[str, Any]
"""One launch as counted.py writes it down."""


@dataclass(frozen=True)
class Walk:
    """What one program does."""

    cycles: float  # of its SM, if nothing else ran and every slot were filled
    in_flight: int  # bytes of the stream that it has under way at most
    waits: float  # for a load of the stream, one after another
    short_waits: float  # for loads of what other programs read, too
    narrowest: int  # bytes that a thread moves in one access to the stream; 0: none seen
    product: float  # operations on tensor cores


def times_run(instruction: Instruction, counted: Counted) -> float:
    """How often the interpreter ran the statement of an instruction, as part of the calls that were inlined around it."""
    lines, calls = counted["lines"], counted["calls"]
    around = [statement(file, line) for file, line in instruction.where if is_kernel(file) and line > 0]
    around = [this for this in around if not this.definition]
    if not around:
        return 1.0
    times = float(lines.get(around[0].name, 0))
    for inner, outer in itertools.pairwise(around):
        if inner.function != outer.function:  # the share of this call among all calls of the function
            times *= lines.get(outer.name, 0) / max(1, calls.get(inner.function, 0))
    return times


def _access(instruction: Instruction, counted: Counted) -> dict[str, Any] | None:
    """The load or store of the source that an instruction belongs to."""
    for file, line in instruction.where:
        if is_kernel(file) and (found := counted["accesses"].get(statement(file, line).name)):
            return found
    return None


def turns(code: Code, counted: Counted, threads: int) -> list[float]:
    """How often each loop turns, in one program.

    A loop without loads and stores of its own is taken to turn as often as its busiest statement ran: too often where the
    compiler unrolled it. What a pipelined loop issues before its first turn stands outside of it and says nothing there.
    """
    found: dict[int, float] = {}
    inner: set[str] = set()  # statements of the loops inside this one, or beside it
    for number in reversed(range(len(code.loops))):  # the narrowest first
        body = [i for i in code.instructions if i.loop == number]
        groups: dict[str, list[Instruction]] = {}
        for i in body:
            if i.is_a(*LOADS, *COPIES, *STORES) and _access(i, counted) and (name := _name(i)) not in inner:
                groups.setdefault(name, []).append(i)
        shares = [_turns_of(group, counted, threads) for group in groups.values()]
        plain = [times_run(i, counted) for i in body if _name(i) not in inner]
        found[number] = max(shares or plain, default=0.0)
        inner |= {_name(i) for i in body}
    return [found[number] for number in range(len(code.loops))]


def _name(instruction: Instruction) -> str:
    """Where an instruction came from, through all calls."""
    return " ".join(statement(file, line).name for file, line in instruction.where if is_kernel(file) and line > 0)


def _turns_of(group: list[Instruction], counted: Counted, threads: int) -> float:
    """How often a loop turns by one load or store of its source, of which these are one turn."""
    access = _access(group[0], counted)
    assert access is not None
    needed = -(-access["bytes"] // (threads * group[0].width))
    unrolled = max(1, round(len(group) / needed))
    return times_run(group[0], counted) / unrolled


def _stream(counted: Counted) -> set[str]:
    """The tensors that come from memory: the largest one, and those of at least half its size."""
    sizes = {name.split()[0]: tensor["size"] for name, tensor in counted["tensors"].items()}
    return {name for name, size in sizes.items() if size >= max(sizes.values()) / 2}


def _operations(instruction: Instruction) -> float:
    """Operations of a tensor-core instruction, a warp's share of it."""
    if instruction.is_a("HGMMA") and (shape := re.search(r"\.(\d+)x(\d+)x(\d+)", instruction.name)):
        return 2 * math.prod(map(int, shape.groups())) / 4  # four warps issue it together
    if instruction.is_a("HMMA") and (shape := re.search(r"\.(16)(8)(16|8)\b", instruction.name)):
        return 2 * math.prod(map(int, shape.groups()))
    return 0.0


class _Flight:
    """Loads under way: in registers until they are used, in shared memory until a group is waited for."""

    def __init__(self) -> None:
        self.loads: list[tuple[set[int], int]] = []
        self.open, self.groups = 0, list[int]()
        self.most = 0

    def load(self, registers: set[int], size: int) -> None:
        self.loads.append((registers, size))
        self._note()

    def copy(self, size: int) -> None:
        self.open += size
        self._note()

    def _note(self) -> None:
        self.most = max(self.most, sum(size for _, size in self.loads) + self.open + sum(self.groups))

    def use(self, registers: set[int]) -> int | None:
        """Bytes of the stream that an instruction which reads these waits for; None: it goes on at once."""
        if not any(held & registers for held, _ in self.loads):
            return None
        size = sum(size for _, size in self.loads)
        self.loads.clear()
        return size

    def close(self) -> None:
        self.groups.append(self.open)
        self.open = 0

    def wait(self, left: int) -> float:
        """What a wait for all groups but the last `left` costs, as a share of a whole one: the tiles before hide the rest."""
        under_way = len(self.groups)
        done = under_way - left
        if done <= 0 or not sum(self.groups):
            return 0.0
        del self.groups[:done]
        return done / under_way


def walk(code: Code, counted: Counted, resources: Resources) -> Walk:
    """Follow the executed instructions of a kernel once through, every loop weighted with its turns."""
    threads = 32 * resources.warps
    loops = turns(code, counted, threads)
    stream = _stream(counted)
    flight, slots, waits, short_waits, product, narrowest = _Flight(), 0.0, 0.0, 0.0, 0.0, 0
    for i in code.instructions:
        weight = 0.0 if not times_run(i, counted) else 1.0 if i.loop is None else loops[i.loop]
        if not weight:
            continue
        slots += weight
        product += weight * _operations(i) * resources.warps
        awaited = flight.use(named_registers(i.operands))
        waits += weight * (awaited is not None and awaited > 0)
        short_waits += weight * (awaited == 0)
        access = _access(i, counted) if i.is_a(*LOADS, *COPIES, *STORES) else None
        streams = access is not None and access["tensor"] in stream
        size = min(access["bytes"], threads * i.width) if access is not None and streams else 0
        if i.is_a(*LOADS):
            flight.load(registers_of(i.operands, i.width), size)
        elif i.is_a(*COPIES):
            flight.copy(size)
        elif i.is_a("LDGDEPBAR"):
            flight.close()
        elif i.is_a("DEPBAR") and (left := re.search(r"SB0, (0x[0-9a-f]+)", i.operands)):
            waits += weight * flight.wait(int(left.group(1), 16))
        if streams:
            narrowest = min(narrowest or i.width, i.width)
    return Walk(slots * resources.warps / SCHEDULERS, flight.most, waits, short_waits, narrowest, product)
