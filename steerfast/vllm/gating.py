"""Conditions inside an engine: what a probe finds opens and shuts slots, decided on the device, one state per request.

Every condition of every plan is known at start and is a gate with a number, whose probe has a column in the table of scores. The
op of the place that it reads decides for each token of the batch whether it is open; the op of the place where the slot acts
takes it out of the row table where it is shut. What a request has decided before (its last prompt token, hysteresis) is a row of
its own in buffers that never move, wherever the request stands in a batch. A request with gates takes no tokens from the prefix
cache, so that a preempted one decides everything anew, as before.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steerfast._positions import EVER
from steerfast.edits.conditions import Condition, When
from steerfast.place import Place
from steerfast.probes.probe import Probe

from .plans import Chains, gate_place
from .probes import GATE, ServedProbe

ROWS = 1 << 14
"""Requests with gates that can be in flight, preempted ones among them."""


_NOWHERE: frozenset[tuple[str, bool]] = frozenset()


@dataclass(frozen=True, eq=False)
class Gate:
    """One condition of a plan.

    Attributes:
        when: The intervention with its condition.
        acts: The place where it acts, and the number of its slot within the plan.
        read: Where its probe is read.
        after: After the edits there.
    """

    when: When
    acts: tuple[str, int]
    read: Place
    after: bool

    @property
    def where(self) -> tuple[str, bool]:
        """Its place by name, and when."""
        return f"{self.read.site}.{self.read.layer}", self.after


class Group:
    """The gates that one place decides at one time.

    Args:
        gates: Number and gate.
        columns: Of the table of scores, by number.
        device: Of the stream.
    """

    def __init__(self, gates: Sequence[tuple[int, Gate]], columns: Mapping[int, int], device: torch.device) -> None:
        def sent(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        conditions: list[Condition] = [gate.when.condition for _, gate in gates]
        self.numbers = sent([number for number, _ in gates], torch.int64)
        self.columns = sent([columns[number] for number, _ in gates], torch.int64)
        signs = [1.0 if one.above else -1.0 for one in conditions]
        self.sign = sent(signs, torch.float32)
        self.level = sent([sign * one.threshold for sign, one in zip(signs, conditions, strict=True)], torch.float32)
        ends = [one.threshold if one.release is None else one.release for one in conditions]
        self.release = sent([sign * end for sign, end in zip(signs, ends, strict=True)], torch.float32)
        self.latches = any(not gate.when.per_token for _, gate in gates)
        self.each = sent([gate.when.per_token for _, gate in gates], torch.bool)
        self.held = sent([one.release is not None for one in conditions], torch.bool)
        self.holds = any(one.release is not None for one in conditions)


class Gates:
    """All conditions of a model's plans on one device.

    Args:
        chains: What each plan does, by name.
        entered: As in `Library`.
        layers: Of the model.
        room: Slots of every bank, and tokens that a batch can have.
        device: Where the model runs.
    """

    def __init__(
        self,
        chains: Mapping[str, Chains],
        entered: Collection[int],
        layers: int,
        room: tuple[int, int],
        device: torch.device,
    ) -> None:
        self._gates, self._of = _gates(chains, layers, entered)
        self._layers, self._device = layers, device
        slots, tokens = room
        count = len(self._gates)
        self._gate_of = {
            gate.acts[0]: torch.zeros(slots + 1, dtype=torch.int64, device=device) for gate in self._gates
        }  # place -> slot + 1 -> number of the gate + 1
        rows, tokens = (ROWS, tokens) if count else (0, 0)
        self._latch = torch.zeros(rows, count, dtype=torch.bool, device=device)
        self._state = torch.zeros(rows, 1, count, dtype=torch.bool, device=device)  # behind a request's last tokens
        self._end = torch.full((rows,), EVER, dtype=torch.int64, device=device)  # of each row: its last prompt token
        self._open = torch.ones(tokens, count + 1, dtype=torch.bool, device=device)
        self._row, self._position, self._first = (
            torch.zeros(tokens, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._final = torch.zeros(tokens, dtype=torch.bool, device=device)  # a request's last tokens of the step
        self._count = torch.arange(tokens, device=device)
        self._groups: dict[tuple[str, bool], Group] = {}
        self._free = list(range(rows - 1, 0, -1))  # row 0 takes what belongs to no request
        self._requests: dict[str, tuple[int, Set[tuple[str, bool]]]] = {}
        self._reached = 0
        self._batch: list[tuple[int, Set[tuple[str, bool]]] | None] | None = None  # that decoded last
        self._always = device.type != "cpu"
        self.active = self._always and count > 0
        """Whether a request of the running step has gates; on a GPU, whose graph may be captured, always."""

    def __len__(self) -> int:
        """Requests in flight that have gates."""
        return len(self._requests)

    @property
    def probes(self) -> dict[str, Probe]:
        """What the gates look at, by a name that no folder has."""
        return {_name(number): gate.when.condition.probe for number, gate in enumerate(self._gates)}

    def served(self, column: int) -> dict[str, ServedProbe]:
        """Their places and columns, the first of which is `column`."""
        where: dict[tuple[str, bool], list[tuple[int, Gate]]] = {}
        for number, gate in enumerate(self._gates):
            where.setdefault(gate.where, []).append((number, gate))
        columns = {number: column + number for number in range(len(self._gates))}
        self._groups = {place: Group(gates, columns, self._device) for place, gates in where.items()}
        return {
            _name(number): ServedProbe(_name(number), gate.read, gate.after, column + number, 1)
            for number, gate in enumerate(self._gates)
        }

    def remember(self, tokens: int) -> None:
        """Keep the state behind each of a request's last tokens, so that a step may take back all but one of these."""
        rows, _, count = self._state.shape
        self._state = self._state.new_zeros(rows, tokens, count)

    def keep(self, places: Collection[tuple[str, int]]) -> None:
        """Of all places this stage of a pipeline has these: what others read is decided there, and received."""
        names = {f"{site}.{layer}" for site, layer in places}
        self._groups = {where: group for where, group in self._groups.items() if where[0] in names}

    def load(self, plan: str, place: str, number: int, slot: int) -> None:
        """The slot `number` of a plan stands in a slot of a place's bank now."""
        if place in self._gate_of:
            self._gate_of[place][slot + 1] = self._of.get(plan, {}).get((place, number), -1) + 1

    def unload(self, slot: int) -> None:
        """A slot is empty in all banks."""
        for gates in self._gate_of.values():
            gates[slot + 1] = 0

    def start(self, request: str, prompt: int, plans: Iterable[str]) -> None:
        """A request arrives that some of these plans hold gates for."""
        numbers = [number for plan in plans for number in self._of.get(plan, {}).values()]
        if not numbers:
            return
        if not self._free:
            raise RuntimeError(f"steerfast: more than {ROWS - 1} requests with conditions are in flight")
        row = self._free.pop()
        self._requests[request] = row, self._groups.keys() & {self._gates[number].where for number in numbers}
        self._latch[row] = self._state[row] = False
        self._end[row] = prompt - 1

    def end(self, request: str) -> None:
        """A request has left; nothing happens if it had no gates."""
        row, _ = self._requests.pop(request, (0, None))
        if row:
            self._free.append(row)

    def begin(
        self, requests: Iterable[str], starts: Tensor, positions: Tensor, tokens: int
    ) -> frozenset[tuple[str, bool]]:
        """A step begins; arguments as of `RowTable.fill`. Returns the places that its gates read."""
        found = [self._requests.get(request) for request in requests] if self._requests else []
        read = _NOWHERE.union(*(one[1] for one in found if one is not None)) if found else _NOWHERE
        if not any(found):
            if self._reached:
                self._row[: self._reached].zero_()
            self._reached, self.active, self._batch = 0, self._always and bool(self._gates), None
            return read
        if tokens == len(found) and found == self._batch:  # it decodes, as in the step before
            self._position[:tokens] = positions[:tokens]
            return read
        self._batch = found if tokens == len(found) else None
        index = self._send([0 if one is None else one[0] for one in found])
        bounds = starts[: len(found) + 1].to(torch.int64)
        here = self._count[:tokens]
        owner = torch.searchsorted(bounds[1:], here, right=True).clamp_(max=len(found) - 1)
        self._row[:tokens], self._position[:tokens] = index[owner], positions[:tokens]
        self._row[tokens : self._reached].zero_()
        self._first[:tokens] = bounds[owner]
        self._final[:tokens] = here >= bounds[owner + 1] - self._state.shape[1]
        self._reached, self.active = tokens, True
        return read

    def judge(self, scores: Tensor, place: str, after: bool) -> None:
        """Decide the gates of a place from the scores (n, columns) that its probes have just written.

        Scores and levels of those that look below are taken with the other sign.
        """
        group = self._groups.get((place, after)) if self.active else None
        if group is None:
            return
        count = len(scores)
        score = scores[:, group.columns] * group.sign
        on = score > group.level
        each = self._hysteresis(group, score, on) if group.holds else on
        if not group.latches:
            self._open[:count].index_copy_(1, group.numbers + 1, each)
            return
        row, position = self._row[:count], self._position[:count]
        ends = self._end[row]
        last = torch.where(position == ends, row, 0)
        self._latch[last[:, None], group.numbers] = on
        latched = self._latch[row[:, None], group.numbers] & (position >= ends)[:, None]
        self._open[:count].index_copy_(1, group.numbers + 1, torch.where(group.each, each, latched))

    def hand_on(self) -> Tensor | None:
        """What has been decided for the tokens of the step that has run, bool (tokens, gates + 1), for a later stage."""
        return self._open[: self._reached] if self._reached else None

    def receive(self, decisions: Tensor) -> None:
        """What earlier stages have decided in a step, before it runs here."""
        self._open[: len(decisions)] = decisions

    def close(self, rows: Tensor, place: str) -> Tensor:
        """The row table (n, P) of a place without the slots whose gate is shut; rows itself where none is."""
        gates = self._gate_of.get(place) if self.active else None
        if gates is None:
            return rows
        if not self._always:  # NumPy's small calls cost a tenth
            slots = rows.numpy()
            acts = np.take_along_axis(self._open.numpy()[: len(slots)], gates.numpy()[slots + 1], 1)
            return torch.from_numpy(np.where(acts, slots, np.int32(-1)))
        return torch.where(self._open[: len(rows)].gather(1, gates[rows.long() + 1]), rows, -1)

    def decided(self, plans: Iterable[str], token: int) -> dict[str, bool]:
        """What the gates of these plans say of a token of the batch that has run, by plan, place and slot within the plan."""
        found = {f"{plan}/{place}/{slot}": n for plan in plans for (place, slot), n in self._of.get(plan, {}).items()}
        return {name: bool(self._open[token, number + 1]) for name, number in found.items()}

    def _hysteresis(self, group: Group, score: Tensor, on: Tensor) -> Tensor:
        """As `held` of conditions, for tokens of many requests side by side; where a gate has no release, `on`."""
        count = len(score)
        row, first = self._row[:count], self._first[:count]
        off = score < group.release
        order = 2 * (self._count[:count] + 1)[:, None]
        latest = torch.where(on | off, order + on.long(), 0).cummax(0).values
        position, begun, kept = self._position[:count], self._position[first], self._state.shape[1]
        before = self._state[row[:, None], (begun[:, None] - 1) % kept, group.numbers] & (begun > 0)[:, None]
        found = torch.where(latest >= 2 * (first + 1)[:, None], latest % 2 == 1, before)
        mine = torch.where(self._final[:count], row, 0)[:, None]
        self._state[mine, position[:, None] % kept, group.numbers] = found
        return torch.where(group.held, found, on)

    def _send(self, values: Sequence[int]) -> Tensor:
        host = torch.from_numpy(np.asarray(values, dtype=np.int64))
        return host.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else host


def gates_read(chains: Mapping[str, Chains], layers: int, entered: Collection[int]) -> set[Place]:
    """The places that conditions of these plans read."""
    return {gate.read for gate in _gates(chains, layers, entered)[0]}


def _gates(
    chains: Mapping[str, Chains], layers: int, entered: Collection[int]
) -> tuple[list[Gate], dict[str, dict[tuple[str, int], int]]]:
    """Every gate, and the number of each: plan -> (place, slot within the plan) -> number."""
    found: list[Gate] = []
    of: dict[str, dict[tuple[str, int], int]] = {}
    for name, plan in chains.items():
        for place, chain in plan.items():
            for slot, edit in chain.items():
                if isinstance(edit, When):
                    acts = f"{place.site}.{place.layer}", slot
                    of.setdefault(name, {})[acts] = len(found)
                    found.append(Gate(edit, acts, *gate_place(edit, place, layers, entered)))
    return found, of


def _name(number: int) -> str:
    return f"{GATE}{number}"
