"""Choose block sizes, warps, stages and borders on this GPU, offline, and write them as the table of its device class.

    python benchmarks/tune.py [--list] [--only NAME] [--seconds 500] [--out FILE]

A choice is whatever a kernel's launcher asks of `tuned("module.NAME", DEFAULT, x)`; nothing is listed here. Which cases an
alternative touches is seen from what they would launch, without a GPU: --list says it. It is taken where its answers are right,
it is faster by more than noise on the first of these cases (the whole 95 % interval of its paired ratio lies below 1), and no
slower by more than noise on the last. One choice at a time, each with what was chosen before it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import pkgutil
import pprint
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from headline import at
from lab import cases, sae_cases
from lab.case import Case, Within
from lab.clock import REHEARSAL, DeviceClock, HostClock, measure_peaks
from lab.goals import FEATURES, GOALS, TOKENS, Goal, K, N, columns
from lab.pairs import OURS, Race, interval, paired
from setting import INTERPRETED, PLACE, TINY
from static.cases import Blank
from static.launches import as_on_a_gpu, kernels_chosen
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

import steerfast as sf
import steerfast_kernels
from steerfast.files.replace import replace_file
from steerfast_kernels._tuned import TABLE, device_class

KERNELS = Path(__file__).parents[1] / "kernels"
FILE = KERNELS / "_tuned.py"
REGISTERS = (None, 80, 96, 128, 168, 232)  # a thread's, at most
OTHERS = {
    "norm": Goal(cases.add_rms_norm, N),
    "hinge k=16 n=512": Goal(cases.subspace, 512, ("amplify", 16)),
    "two columns k=64 n=1536": Goal(columns, 1536, (64,)),
    "flow, full rank": Goal(cases.flow, N, (4096,)),
    "decode": Goal(sae_cases.sae_decode, TOKENS, (FEATURES, K)),
    "decode n=16": Goal(sae_cases.sae_decode, 16, (FEATURES, K)),
    "threshold": Goal(sae_cases.sae_encode_threshold, TOKENS, (FEATURES, 256)),
}
CASES = {**GOALS, **OTHERS}
"""What choices are made on, those first that the most hangs on."""


class Simple(Blank):
    """A stream whose directions take no time to make."""

    def basis(self, k: int) -> Tensor:
        return torch.eye(k, self.d, dtype=self.dtype)


class Chooser:
    """Stands for `tuned` and `choose` in every kernel's file: knows what is asked, and answers with what is tried."""

    def __init__(self, chosen: dict[str, Any]) -> None:
        self.chosen = dict(chosen)
        self.asked: dict[str, Any] = {}  # name -> the answer
        self.served: dict[
            str, tuple[int, int]
        ] = {}  # name of a table -> the entry that served last, and for which size
        names = {module.name for module in pkgutil.iter_modules(steerfast_kernels.__path__)} - {"_tuned", "_launch"}
        self.modules = [importlib.import_module(f"steerfast_kernels.{name}") for name in sorted(names)]

    def tuned(self, name: str, default: Any, x: Tensor) -> Any:
        self.asked[name] = self.chosen.get(name, default)
        return self.asked[name]

    def choose(self, table: list[tuple[int, Any]], size: int) -> Any:
        place = next((i for i, (limit, _) in enumerate(table) if size <= limit), len(table) - 1)
        self.served |= {name: (place, size) for name, answer in self.asked.items() if answer is table}
        return table[place][1]

    @contextmanager
    def installed(self) -> Iterator[Chooser]:
        """Every launcher asks this."""
        before = [(m, name, getattr(m, name)) for m in self.modules for name in ("tuned", "choose") if hasattr(m, name)]
        for module, name, _ in before:
            setattr(module, name, getattr(self, name))
        try:
            yield self
        finally:
            for module, name, function in before:
                setattr(module, name, function)

    @contextmanager
    def trying(self, name: str, value: Any) -> Iterator[None]:
        """A choice has another value inside."""
        before = dict(self.chosen)
        self.chosen[name] = value
        try:
            yield
        finally:
            self.chosen = before


@dataclass
class Knob:
    """A choice, or one entry of a table of (limit, value), by which a launcher goes."""

    name: str  # "add.BLOCK_D"
    entry: int | None
    size: int | None  # that the entry served first
    value: Any  # the present one, of the entry alone
    touched: dict[str, tuple[Any, list[str]]] = field(
        default_factory=dict
    )  # repr -> the alternative, whole, and its cases

    @property
    def title(self) -> str:
        return self.name + ("" if self.size is None else f" at {self.size}") + f" = {self.value!r}"


def in_source() -> set[str]:
    """Every choice that a launcher asks for somewhere, by name."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(KERNELS.glob("*.py"))]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    asked = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "tuned"]
    return {str(name.value) for name in asked if isinstance(name, ast.Constant)}


def alternatives(name: str, value: Any) -> list[Any]:
    """Other values of one kind: half and twice, a stage more or less, other registers; of a tuple in one place or in all."""
    if isinstance(value, tuple):
        found = [
            (*value[:i], other, *value[i + 1 :]) for i, one in enumerate(value) for other in alternatives(name, one)
        ]
        both = [tuple(2 * one for one in value), tuple(one // 2 for one in value)]
        return found + [other for other in both if all(other) and other not in found]
    word = name.rpartition(".")[2]
    if "REG" in word:
        return [other for other in REGISTERS if other != value]
    if isinstance(value, bool) or not isinstance(value, int):
        return [not value] if isinstance(value, bool) else []
    if "STAGES" in word:
        return [other for other in (value - 1, value + 1) if other >= 1]
    return [other for other in (value // 2, 2 * value) if other >= 1]


def with_entry(value: Any, entry: int | None, other: Any) -> Any:
    """The whole choice, of which one entry is another."""
    return other if entry is None else [*value[:entry], (value[entry][0], other), *value[entry + 1 :]]


class NoProducts(TorchDispatchMode):
    """Products give whatever was in memory: no launch depends on their numbers, and on a CPU one takes seconds."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.mm.default:
            return args[0].new_empty(args[0].shape[0], args[1].shape[1])
        return function(*args, **(kwargs or {}))


def launches(call: Callable[[], object]) -> list[Any]:
    """What a call would launch: kernels, grids, options and sizes."""
    found: list[Any] = []

    def catch(kernel: Any, *positional: Any, grid: Any, warmup: bool, **named: Any) -> None:
        shapes = {name: tuple(v.shape) if isinstance(v, Tensor) else v for name, v in named.items()}
        found.append((kernel.__name__, grid, shapes))

    with (
        kernels_chosen(),
        NoProducts(),
        mock.patch.object(JITFunction, "run", catch),
        mock.patch.object(InterpretedFunction, "run", catch),
    ):
        call()
    return found


def discover(chooser: Chooser, goals: Mapping[str, Goal], only: str = "") -> list[Knob]:
    """Every choice that these cases ask for, with the cases that each alternative touches."""
    found: dict[tuple[str, int | None], Knob] = {}
    for key, goal in goals.items():
        call = as_on_a_gpu(goal.case(Simple("cpu", torch.bfloat16, 0)))
        chooser.asked, chooser.served = {}, {}
        before = launches(call)
        for name, value in dict(chooser.asked).items():
            if only not in name or (isinstance(value, list) and name not in chooser.served):
                continue
            entry, size = chooser.served[name] if isinstance(value, list) else (None, None)
            present = value if entry is None else value[entry][1]
            knob = found.setdefault((name, entry), Knob(name, entry, size, present))
            for other in (with_entry(value, entry, other) for other in alternatives(name, present)):
                if _touches(chooser, name, other, call, before):
                    knob.touched.setdefault(repr(other), (other, []))[1].append(key)
    return list(found.values())


def _touches(chooser: Chooser, name: str, other: Any, call: Callable[[], object], before: list[Any]) -> bool:
    served = dict(chooser.served)
    try:
        with chooser.trying(name, other):
            return launches(call) != before
    except Exception:  # a value that the launcher does not take is no alternative
        return False
    finally:
        chooser.served = served


def tune(chooser: Chooser, knob: Knob, build: Callable[[str], Case], measure: Callable[[Case], Race]) -> Any | None:
    """The alternative that wins beyond noise, or None."""
    best, lowest = None, 1.0
    by_case: dict[tuple[str, str], list[str]] = {}
    for name, (_, keys) in knob.touched.items():
        by_case.setdefault((keys[0], keys[-1]), []).append(name)
    for (first, last), names in by_case.items():
        ratios = compare(chooser, knob, build(first), names, measure)
        winning = [name for name in names if name in ratios and ratios[name][2] < 1]
        if winning and last != first:
            others = compare(chooser, knob, build(last), winning, measure)
            winning = [name for name in winning if name in others and others[name][1] <= 1]
        for name in winning:
            if ratios[name][0] < lowest:
                best, lowest = knob.touched[name][0], ratios[name][0]
    return best


def compare(
    chooser: Chooser, knob: Knob, case: Case, names: Iterable[str], measure: Callable[[Case], Race]
) -> dict[str, tuple[float, float, float]]:
    """Alternative -> its time over the present one's, with its interval, on one case."""

    def within(value: Any) -> Callable[[], Within]:
        return lambda: Within(case.ours, lambda: chooser.trying(knob.name, value))

    makers = {name: within(knob.touched[name][0]) for name in names}
    race = measure(replace(case, peers=makers, yardsticks={}, slack=1.0))
    if race.red:
        raise RuntimeError(f"{case.name} is wrong before anything is tuned; run the tests first")
    race.run()
    for name, reason in race.row["missing"].items():
        print(f"  {name}: {reason}")
    ratios = {name: interval(paired(race.row, name, OURS)) for name in names if name in race.row["times"]}
    for name, (middle, low, high) in ratios.items():
        print(f"  {name}: {middle:.3f} ({low:.3f} … {high:.3f}) of the present one, {case.name}", flush=True)
    return ratios


def write_table(file: Path, device: str, choices: dict[str, Any]) -> None:
    """Put the choices of a device class into the table of a file, beside those of other classes."""
    text = FILE.read_text(encoding="utf-8") if not file.exists() else file.read_text(encoding="utf-8")
    start, end = _table(text)
    table: dict[str, dict[str, Any]] = ast.literal_eval(text[start:end])
    table[device] = {**table.get(device, {}), **choices}
    replace_file(file, (text[:start] + pprint.pformat(table, width=110, sort_dicts=True) + text[end:]).encode())


def _table(text: str) -> tuple[int, int]:
    """Where the literal of TABLE stands."""
    head = re.search(r"^TABLE: .* = ", text, re.MULTILINE)
    if head is None:
        raise ValueError("tune: the file has no line that begins with 'TABLE: '; give kernels/_tuned.py")
    tail = re.compile(r"\n\n\ndef ").search(text, head.end())
    return head.end(), tail.start() if tail else len(text.rstrip())


def say(knobs: list[Knob], only: str) -> None:
    """What can be tuned, on what; and what a launcher asks for and no case here touches."""
    for knob in knobs:
        print(knob.title)
        for name, (_, keys) in knob.touched.items():
            print(f"  {name}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}")
    rest = {name for name in in_source() if only in name} - {knob.name for knob in knobs if knob.touched}
    if rest:
        print(f"no case here touches {', '.join(sorted(rest))}")


def tune_all(chooser: Chooser, knobs: list[Knob], seconds: float) -> dict[str, Any]:
    """What was chosen, by name; no choice begins after so many seconds, and one that fails is named."""
    effort, clock = (REHEARSAL, HostClock()) if TINY else (replace(DeviceClock.thorough, seconds=4.0), DeviceClock())
    peaks, end, chosen = measure_peaks(clock, at().dtype, effort), time.monotonic() + seconds, dict[str, Any]()

    def build(key: str) -> Case:
        return (CASES[key].tiny() if TINY else CASES[key]).case(at())

    for knob in (knob for knob in knobs if knob.touched):
        if time.monotonic() > end:
            print(f"{knob.title}: out of time")
            continue
        print(knob.title, flush=True)
        try:
            best = tune(chooser, knob, build, lambda case: Race(case, clock, peaks, effort))
        except Exception as error:
            print(f"  failed: {type(error).__name__}: {error}"[:300])
            continue
        if best is not None:
            other = best if knob.entry is None else best[knob.entry][1]
            whole = with_entry(chooser.chosen.get(knob.name, best), knob.entry, other)
            chooser.chosen[knob.name] = chosen[knob.name] = whole
    return chosen


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="say what would be tried on which cases; no GPU takes part")
    parser.add_argument("--only", default="", metavar="NAME", help="choices whose name contains this")
    parser.add_argument("--seconds", type=float, default=1e9, help="after which no further choice is begun")
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="(default: kernels/_tuned.py)")
    options = parser.parse_args(argv)
    if not options.list and (PLACE == "cpu" or (TINY and not INTERPRETED)):
        print(
            "tune: no GPU here; --list needs none, STEERFAST_BENCH=tiny TRITON_INTERPRET=1 rehearses", file=sys.stderr
        )
        return 2
    torch.manual_seed(0)
    device = device_class(0) if PLACE == "cuda" else "rehearsal"
    with Chooser(TABLE.get(device, {})).installed() as chooser, torch.no_grad():
        knobs = discover(chooser, CASES, options.only)
        say(knobs, options.only)
        if options.list:
            return 0
        sf.use_backend("triton")
        chosen = tune_all(chooser, knobs, options.seconds)
    if chosen and not (TINY and options.out == FILE):
        write_table(options.out, device, chosen)
    print(f"{device}: {len(chosen)} of {len(knobs)} choices changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
