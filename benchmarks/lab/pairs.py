"""Pairs: ours meets each baseline in rounds, in random order; outputs are checked first. And what follows from the rounds.

A pair is a burst of calls of ours and one of a baseline, one right after the other. What disturbs a machine disturbs both, so
their ratio is steadier than their times. A round is a few pairs with each baseline. Pairs that met a slow core are left out
where enough others did not. One baseline, "again", is ours a second time: what its ratio differs from 1 is the noise.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor

from .case import Case, Compiled, Function, Inputs, NotHere
from .clock import Clock, Effort, Pair, Peaks, Runner
from .memory import give_back, last_cache
from .rows import Row

OURS, AGAIN = "ours", "again"
MOST_SETS = 32
LEAST_ROTATION = 256 << 20  # bytes of rotating inputs on a GPU: more than any L2 of today
# A row keeps of each round, by name: its seconds, those of ours in the pairs with it, whether these were at full speed.
KINDS = "times", "beside", "calm"
LEAST_CALM = 10
SHARE = 8  # a round is pairs with a baseline for this part of the time that the slowest takes, or for six bursts if that is more
RESAMPLES = 2000


_now = time.perf_counter


class Race:
    """One case under measurement: answers are checked, then ours is paired with each baseline; `row` is what is known.

    Args:
        case: What is measured.
        clock: On which clock.
        peaks: Of the machine, measured in the same run.
        effort: How long.
    """

    def __init__(self, case: Case, clock: Clock, peaks: Peaks, effort: Effort) -> None:
        self.row: Row = {
            "case": case.name, "status": "red", "clock": clock.name, "bytes": case.bytes, "operations": case.operations,
            "floor": peaks.floor(case), "copy": peaks.copy, "product": peaks.product,
            "times": {}, "beside": {}, "calm": {}, "errors": {}, "missing": {}, "uncaptured": {},
        }  # fmt: skip
        self.effort = effort
        self._clock = clock
        self._runners: dict[str, Runner] = {}
        sets = _sets(case, clock, effort)
        judge = case.judge(sets[0])
        if self._allow(OURS, case.ours, sets[0], judge, 1.0):
            self.row["status"] = "ok"
            makers = {OURS: lambda: case.ours, AGAIN: lambda: case.ours, **case.peers, **case.yardsticks}
            for name, maker in makers.items():
                self._admit(name, maker, sets, judge if name in case.peers else None, case)
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # what lives now is not looked at before every round

    def _admit(
        self,
        name: str,
        maker: Callable[[], Function],
        sets: Sequence[Inputs],
        judge: Callable[[Any], float] | None,
        case: Case,
    ) -> None:
        """Check an answer and warm its function up. A baseline that cannot is named with the reason; ours must."""
        try:
            if isinstance(maker, Compiled) and not self.effort.compile:
                raise NotHere("this run compiles nothing")
            function = maker()
            if judge is None or self._allow(name, function, sets[0], judge, case.slack):
                self._runners[name] = runner = self._clock.prepare(function, sets, self.effort, case.captured)
                if runner.uncaptured:
                    self.row["uncaptured"][name] = runner.uncaptured
                for kind in KINDS:
                    self.row[kind][name] = []
        except NotHere as reason:
            self.row["missing"][name] = str(reason)
        except ModuleNotFoundError as error:
            self.row["missing"][name] = f"{error.name} is not installed"
        except Exception as error:
            if name in (OURS, AGAIN):
                raise
            self.row["missing"][name] = f"failed: {type(error).__name__}: {error}"[:300]

    def _allow(
        self, name: str, function: Function, inputs: Inputs, judge: Callable[[Any], float], allowed: float
    ) -> bool:
        share = judge(function(*inputs))
        self.row["errors"][name] = share
        if share <= allowed:  # false for NaN
            return True
        self.row["missing"][name] = f"red: its error is {share:.3g} of what is allowed, at most {allowed:g}"
        return False

    @property
    def red(self) -> bool:
        """Whether our own answer is wrong, so that nothing may be timed."""
        return self.row["status"] == "red"

    def run(self) -> None:
        """Rounds until the effort is made, to half a round; of earlier ones the row knows nothing afterwards."""
        begin = _now()
        self._keep(0)
        if self._clock.device == "cpu":
            give_back()  # what the calls allocate lies elsewhere in every visit, so its place averages out
        if self.effort.seconds > 0:
            self.round()  # the first finds caches and clocks cold
            if _now() - begin < self.effort.seconds / 4:
                self._keep(0)
        while (done := len(self.row["times"][OURS])) < self.effort.least or (
            self._undisturbed() < self.effort.rounds and (_now() - begin) * (1 + 0.5 / done) < self.effort.seconds
        ):
            self.round()

    def round(self) -> None:
        """Pairs of ours with every baseline, in random order: their means, of the calm ones alone where there are any."""
        met: dict[str, list[Pair]] = {name: [] for name in self._runners if name != OURS}
        order = [name for name in met for _ in range(self._often(name))]
        gc.collect()
        gc.disable()
        try:
            for name in random.sample(order, len(order)):
                met[name].append(self._clock.pair(self._runners[OURS], self._runners[name], self.effort))
        finally:
            gc.enable()
        met[OURS] = [Pair(pair.ours, pair.ours, pair.calm) for every in met.values() for pair in every]
        try:
            for name, every in met.items():
                calm = [pair for pair in every if pair.calm]
                self.row["times"][name].append(_mean(pair.baseline for pair in calm or every))
                self.row["beside"][name].append(_mean(pair.ours for pair in calm or every))
                self.row["calm"][name].append(bool(calm))
        finally:
            self._keep(min(len(taken) for kind in KINDS for taken in self.row[kind].values()))  # no half of a round

    def _often(self, name: str) -> int:
        """Pairs with a baseline in a round: as many as its share of the round holds, one at least."""
        lasting = {each: self._lasting(each) for each in self._runners}
        share = max(6 * self.effort.burst, max(lasting.values()) / SHARE)
        return max(1, round(share / lasting[name])) if lasting[name] else 1

    def _lasting(self, name: str) -> float:
        """Seconds of a pair with a baseline, about."""
        return sum(self._runners[one].lasting(self.effort.burst) for one in (OURS, name))

    def _undisturbed(self) -> int:
        """Rounds in which every baseline had a calm pair."""
        return sum(map(all, zip(*self.row["calm"].values(), strict=True)))

    def _keep(self, count: int) -> None:
        """Of the rounds so far, the first ones."""
        for kind in KINDS:
            for taken in self.row[kind].values():
                del taken[count:]


def _mean(seconds: Iterable[float]) -> float:
    """In five figures: enough for a row."""
    return float(f"{statistics.fmean(seconds):.5g}")


def _counted(row: Row, *names: str) -> tuple[Sequence[int], bool]:
    """The rounds that count for these names, and whether they are calm: ten or more that are, otherwise all."""
    every = range(len(row["times"][names[0]]))
    if "calm" not in row:
        return every, True
    calm = [i for i in every if all(row["calm"][name][i] for name in names)]
    enough = len(calm) >= min(LEAST_CALM, len(every))
    return (calm if enough else every), enough


def is_calm(row: Row, *names: str) -> bool:
    """Whether what counts of these names was measured at the core's full speed, as far as the row knows."""
    return _counted(row, *names)[1]


def times(row: Row, name: str) -> list[float]:
    """Round by round, the seconds that count of ours or of a baseline."""
    return [row["times"][name][i] for i in _counted(row, name)[0]]


def pairs(row: Row, name: str, base: str) -> list[tuple[float, float]]:
    """Round by round, the seconds of two names that count, those of the second as if it had been paired with the first.

    Both were paired with ours; so they are scaled by what ours took in the pairs with the one over that with the other.
    """
    taken, ours = list(zip(row["times"][name], row["times"][base], strict=True)), row.get("beside")
    rounds, _ = _counted(row, name, base)
    return [(taken[i][0], taken[i][1] * (ours[name][i] / ours[base][i] if ours else 1.0)) for i in rounds]


def paired(row: Row, name: str, base: str) -> list[float]:
    """Round by round, the time of one name over that of another."""
    return [a / b for a, b in pairs(row, name, base)]


def _sets(case: Case, clock: Clock, effort: Effort) -> list[Inputs]:
    """Sets of inputs that together exceed the last cache twice over, at most 32; small ones stay in it, as in a model."""
    first = case.fresh()
    size = sum(value.numel() * value.element_size() for value in first if isinstance(value, Tensor))
    rotation = LEAST_ROTATION if clock.device == "cuda" else 2 * last_cache()
    count = 1 if effort.seconds == 0 else min(MOST_SETS, max(2, -(-rotation // max(size, 1))))
    place = _anywhere if clock.device == "cpu" else lambda value: value
    return [(*map(place, inputs), *case.fixed) for inputs in (first, *(case.fresh() for _ in range(count - 1)))]


def _anywhere(value: Any) -> Any:
    """A copy of a tensor that begins anywhere in a page.

    A core mistakes a load for one of a store just before where their places in their pages agree. Left to the allocator, large
    tensors all lie in one such place or in another, and the ratio of a pair was seen to differ by a tenth between runs.
    """
    if not isinstance(value, Tensor):
        return value
    page, line = 4096 // value.element_size(), 64 // value.element_size()
    begin = random.randrange(0, page, line)
    return value.new_empty(page + value.numel())[begin : begin + value.numel()].view(value.shape).copy_(value)


def interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """The median and its bootstrap interval; always the same for the same values."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = (1 - confidence) / 2
    return statistics.median(values), medians[int(tail * RESAMPLES)], medians[int((1 - tail) * RESAMPLES) - 1]
