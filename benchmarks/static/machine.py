"""What the machine code says: resources of a kernel, and its instructions with the loops that they stand in (NVIDIA only)."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from .constants import LIMITS

TENSOR = re.compile(r"^(HMMA|HGMMA|QGMMA|IMMA|DMMA|UTC\w*MMA|OMMA)\b|^v_mfma")
LINE = re.compile(r'"([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@!?(U?P\w+)\s+)?([A-Z][A-Z0-9_]*(?:\.[\w]+)*)\s*([^;]*);")


@dataclass(frozen=True)
class Resources:
    """What a program needs, and how many an SM therefore holds."""

    registers: int  # per thread
    stack: int  # bytes of local memory or scratch per thread
    shared: int  # bytes
    warps: int
    programs: int  # per SM


@dataclass
class Instruction:
    """One instruction of a kernel."""

    name: str  # with its modifiers, such as LDG.E.128
    operands: str
    where: tuple[tuple[str, int], ...]  # (file, line), innermost first: the calls that were inlined
    loop: int | None = None  # index of the innermost loop

    @property
    def width(self) -> int:
        """Bytes that a thread moves."""
        bits = re.search(r"\.(8|16|32|64|128)\b", self.name.replace("U8", "8").replace("S8", "8").replace("U16", "16"))
        return int(bits.group(1)) // 8 if bits else 4

    def is_a(self, *kinds: str) -> bool:
        return self.name.partition(".")[0] in kinds


@dataclass
class Code:
    """The instructions of a kernel in order, and its loops as (first, last) instruction."""

    instructions: list[Instruction] = field(default_factory=list)
    loops: list[tuple[int, int]] = field(default_factory=list)


def tool(name: str) -> Path:
    """A tool of the CUDA toolkit that Triton brings along."""
    return next(Path(triton.__file__).parent.rglob(f"backends/nvidia/bin/{name}"))


def _ask(program: str, cubin: bytes, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool(program), *options, file.name], check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def resources(compiled: Any, target: str) -> Resources:
    """Registers, stack and shared memory of a compiled kernel."""
    if target.startswith("sm_"):
        usage = _ask("cuobjdump", compiled.asm["cubin"], "-res-usage")
        found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
        registers, stack = found["REG"], found["STACK"] + found["LOCAL"]
    else:
        registers, stack = (
            max(map(int, re.findall(rf"\.{name}:\s+(\d+)", compiled.asm["amdgcn"])), default=0)
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Resources(registers, stack, shared, warps, programs_per_sm(target, registers, shared, warps))


def programs_per_sm(target: str, registers: int, shared: int, warps: int) -> int:
    """How many programs are resident at a time: whatever runs out first."""
    limits, lanes = LIMITS[target], 32 if target.startswith("sm_") else 64
    held = -(-max(registers, 1) // 8) * 8 * lanes * warps
    return min(
        limits.programs,
        limits.warps // warps,
        limits.registers // held,
        limits.shared // max(1, shared + limits.reserved),
    )


def tensor_instructions(compiled: Any, target: str) -> str:
    """The kind of tensor-core instruction in a kernel, or nothing."""
    if target.startswith("sm_"):
        names = [
            i.name.partition(".")[0] for i in disassemble(compiled.asm["cubin"]).instructions if TENSOR.search(i.name)
        ]
        return names[0] if names else ""
    return "MFMA" if re.search(r"\bv_mfma", compiled.asm["amdgcn"]) else ""


@functools.lru_cache(maxsize=8)
def disassemble(cubin: bytes) -> Code:
    """Instructions, where they come from, and loops: what lies between a label and a later branch back to it."""
    code, labels, jumps = Code(), dict[str, int](), list[tuple[int, str]]()
    where: list[tuple[str, int]] = []
    fresh = False
    for text in _ask("nvdisasm", cubin, "-c", "-gi").splitlines():
        if "//## File" in text:
            where = ([] if not fresh else where) + [(f, int(n)) for f, n in LINE.findall(text)[:1]]
            fresh = True
        elif label := re.match(r"(\.L_x_\d+):", text):
            labels[label.group(1)] = len(code.instructions)
        elif (found := INSTRUCTION.search(text)) and found.group(3) != "NOP":
            fresh = False
            if target := re.search(r"`\((\.L_x_\d+)\)", found.group(4)):
                jumps.append((len(code.instructions), target.group(1)))
            code.instructions.append(Instruction(found.group(3), found.group(4), tuple(where)))
    back = {}
    for source, label in jumps:
        if labels.get(label, source) < source:
            back[labels[label]] = max(source, back.get(labels[label], 0))
    code.loops = sorted(back.items(), key=lambda loop: loop[0] - loop[1])  # the widest first
    for number, (first, last) in enumerate(code.loops):
        for instruction in code.instructions[first : last + 1]:
            instruction.loop = number
    return code


def registers_of(operand: str, width: int) -> set[int]:
    """The registers that an operand of so many bytes names."""
    found = re.match(r"\s*R(\d+)", operand)
    return set(range(int(found.group(1)), int(found.group(1)) + max(1, width // 4))) if found else set()


def named_registers(operands: str) -> set[int]:
    """Every register that stands in the operands, by its first number."""
    return {int(number) for number in re.findall(r"\bR(\d+)", operands)}
