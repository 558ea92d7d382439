"""Host time and memory that steering takes inside vLLM, without the engine: microseconds of CPU time, medians.

    python benchmarks/vllm_host.py --out benchmarks/results

Wanted: 100 µs a step with 64 steered requests, 1 µs when nobody steers or reads, and at most twice a vector's size (in float32,
as a plan holds it) in memory. The edits of 30 layers of width 576 in bfloat16 are shown beside it; on a GPU they are
kernels and no host time.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lab.rows import append_row, circumstances

import steerfast as sf
from steerfast.vllm import read_seams, seams
from steerfast.vllm.counters import Counters
from steerfast.vllm.edits import EditedPlace, Places
from steerfast.vllm.plans import Library, ServedPlan
from steerfast.vllm.probes import ProbeLibrary, ServedProbe
from steerfast.vllm.reading import Readers, Wanted
from steerfast.vllm.slots import Admission
from steerfast.vllm.table import EVER, Owner, RowTable
from steerfast.vllm.wire import read
from steerfast.vllm.worker_seams import Follower
from steerfast.vllm.wrapping import wrap

REQUESTS, WIDTH, LAYERS, CALLS = 64, 576, 30, 500
NAMES = [f"cmpl-{i:032x}-0-{i:08x}" for i in range(REQUESTS)]
TURNED = NAMES[1:] + NAMES[:1]
STARTS, POSITIONS = torch.arange(REQUESTS + 1, dtype=torch.int32), torch.full((2048,), 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory for the raw rows")
    args = parser.parse_args()
    torch.set_num_threads(1)
    memory = {"per_vector": memory_per_vector()}
    print(f"  memory of a vector over its size {memory['per_vector']:.2f}")
    found: dict[str, float] = {}
    for steered in (0, 16, 64):
        made = table(steered)
        found[f"steered_{steered}_goes_on"] = show(
            f"table, {steered} of {REQUESTS} steered, the batch goes on", partial(fill, made, NAMES)
        )
    for path in ("host", "device"):
        made = table(REQUESTS, path)
        found[f"{path}_goes_on"] = show(f"table, 64 steered, it goes on, {path}'s path", partial(fill, made, NAMES))
        turns = cycle([TURNED, NAMES])
        found[f"{path}_changed"] = show(
            f"table, 64 steered, it has changed, {path}'s path", lambda made=made, turns=turns: fill(made, next(turns))
        )
    found |= nobody()
    found["steered_64"] = max(found["host_changed"], found["device_changed"])
    found["waiting_64"] = show(f"scheduler, {REQUESTS} requests that wait for a slot, looked at once", look_at(queue()))
    found |= reading()
    for steered in (0, 64):
        places = layers(table(steered))
        stream, hidden = torch.randn(REQUESTS, WIDTH).bfloat16(), torch.randn(REQUESTS, WIDTH).bfloat16()
        with torch.inference_mode():
            found[f"edits_{steered}"] = show(
                f"edits of {LAYERS} layers, {steered} steered, as many vectors", partial(edit, places, stream, hidden)
            )
    if args.out is not None:
        run = {**circumstances("cpu"), "quick": False}
        for case, values in (("vllm host time", found), ("vllm memory", memory)):
            row = {"case": case, "suite": "engines", "status": "ok", "values": values, "run": run}
            append_row(args.out / f"{run['date'][:10]}-cpu-vllm-host.jsonl", row)


def memory_per_vector(count: int = 2000, width: int = 4096) -> float:
    """By how much memory rises where `count` vectors are loaded, over their size in float32."""
    before = resident()
    place = EditedPlace(
        [sf.Add(torch.zeros(width) + 1) for _ in range(count)], count, width, torch.bfloat16, torch.device("cpu")
    )
    for slot in range(count):
        place.load(slot, sf.Add(torch.zeros(width) + slot + 1))
    place.seal()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free but kept is not taken
    return (resident() - before) / (4.0 * count * width)


def resident() -> int:
    """Bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def table(steered: int, path: str = "host") -> RowTable:
    made = RowTable(2048, torch.device("cpu"))
    made._write = made._on_host if path == "host" else made._on_device
    for i in range(steered):
        made.put(NAMES[i], [Owner(i, 1.0 + i / 100, 0, EVER)])
    fill(made, NAMES)
    return made


def fill(made: RowTable, names: list[str]) -> None:
    made.fill(names, STARTS, POSITIONS, REQUESTS)


def queue() -> tuple[Any, list[Any]]:
    """A scheduler all of whose slots one request holds, and further ones with plans of their own."""
    library = Library({f"{i}": ServedPlan(f"{i}", f"{i}", (0,) * 4, "all") for i in range(REQUESTS + 1)})
    served = SimpleNamespace(parts=lambda params: read(params, library), counters=SimpleNamespace(add=lambda *_: None))
    scheduler = SimpleNamespace(steerfast=served, steerfast_slots=Admission(4))
    asked = [SimpleNamespace(request_id=f"{i}", sampling_params={"steer": f"{i}"}) for i in range(REQUESTS + 1)]
    assert seams._admit(lambda *_: True, scheduler, asked[-1])
    return scheduler, asked[:-1]


def look_at(waiting: tuple[Any, list[Any]]) -> Callable[[], object]:
    scheduler, asked = waiting
    return lambda: [seams._admit(lambda *_: True, scheduler, request) for request in asked]


def edit(places: Places, stream: torch.Tensor, hidden: torch.Tensor) -> None:
    for name in places.places:
        places.edit_(stream, hidden, name)


def layers(made: RowTable) -> Places:
    edits = [sf.Add(torch.randn(WIDTH)) for _ in range(REQUESTS)]
    found = {f"{i}": EditedPlace(edits, REQUESTS, WIDTH, torch.bfloat16, torch.device("cpu")) for i in range(LAYERS)}
    for place in found.values():
        for slot, edit in enumerate(edits):
            place.load(slot, edit)
    return Places(found, made)


class Runner:
    """A model runner of which nothing is left but what steering asks of it."""

    input_ids, positions = SimpleNamespace(gpu=POSITIONS), POSITIONS
    query_start_loc, input_batch = SimpleNamespace(gpu=STARTS), SimpleNamespace(req_ids=NAMES)
    max_num_tokens, model, device = 64, torch.nn.Linear(2, 2), torch.device("cpu")

    def _update_states(self, scheduler_output: Any) -> None: ...
    def _prepare_inputs(self, scheduler_output: Any) -> None: ...
    def sample_tokens(self, grammar_output: Any) -> None: ...
    def _dummy_run(self, num_tokens: int) -> None: ...


class Worker:
    """What has a runner, and loads its model."""

    rank = 0

    def __init__(self) -> None:
        self.model_runner = Runner()

    def load_model(self) -> None: ...


def scheduler_class() -> Any:
    """A scheduler, and what makes outputs of its results; new each time, since a class can be wrapped once."""

    class Scheduler:
        def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None: ...

        def make_request_output(self, *args: Any) -> None: ...

    return Scheduler


def nobody() -> dict[str, float]:
    """What a step costs in which nobody steers or reads, over the same methods without steering around them."""
    workers, schedulers = (Worker(), Worker()), (scheduler_class(), scheduler_class())
    served = SimpleNamespace(
        library=Library(), chains={}, probes=ProbeLibrary(), loaded={}, layers=1, slots=4, captures=None, capture=None,
        counters=Counters([], []),
    )  # fmt: skip
    graph = SimpleNamespace(max_cudagraph_capture_size=0, static_forward_context={})
    parallel = SimpleNamespace(pipeline_parallel_size=1, data_parallel_index=0)
    config = SimpleNamespace(
        additional_config={}, compilation_config=graph, parallel_config=parallel, speculative_config=None
    )
    Follower(workers[0], config, served).attach()  # type: ignore[arg-type]
    wrap(schedulers[0], "update_from_output", read_seams._update)
    wrap(schedulers[0], "make_request_output", partial(read_seams._make_output, lambda *_: None))
    workers[0].load_model()
    output = SimpleNamespace(finished_req_ids=set(), scheduled_new_reqs=[], total_num_scheduled_tokens=REQUESTS)

    def step(number: int) -> Callable[[], None]:
        runner, scheduler = workers[number].model_runner, schedulers[number]()

        def once() -> None:
            runner._update_states(output)
            runner._prepare_inputs(output)
            runner.sample_tokens(None)
            scheduler.update_from_output(output, None)

        return once

    def answers(number: int) -> Callable[[], None]:
        state = schedulers[number]()
        return lambda: [state.make_request_output([5], None, None, None, None) for _ in range(REQUESTS)] and None

    return {
        "idle": over("a step that nobody steers or reads in", step(0), step(1)),
        "idle_front_end": over(f"{REQUESTS} outputs that nobody reads, in the front end", answers(0), answers(1)),
    }


def over(name: str, call: Callable[[], object], bare: Callable[[], object], often: int = 50) -> float:
    """By how much a call takes longer than another, in turns."""

    def taken(what: Callable[[], object]) -> float:
        start = time.process_time()
        for _ in range(often):
            what()
        return (time.process_time() - start) / often

    low, middle, high = statistics.quantiles(taken(call) - taken(bare) for _ in range(CALLS))
    print(f"  {name:<64} {1e6 * middle:8.2f} µs  [{1e6 * low:.2f}, {1e6 * high:.2f}]")
    return middle


def reading() -> dict[str, float]:
    """A step that nobody reads in, with 30 probes loaded, and one in which all requests read one of them or all."""
    loaded = {f"{i}": sf.probes.LogisticProbe(torch.randn(WIDTH), place=i) for i in range(LAYERS)}
    served = {name: ServedProbe(name, probe.place, False, i, 1) for i, (name, probe) in enumerate(loaded.items())}
    stream, hidden = torch.randn(REQUESTS, WIDTH).bfloat16(), torch.randn(REQUESTS, WIDTH).bfloat16()
    found: dict[str, float] = {}
    for count in (0, 1, LAYERS):
        made = Readers(served, loaded, 2048, torch.device("cpu"))
        places = Places({}, RowTable(2048, torch.device("cpu")), made)
        for name in NAMES if count else ():
            made.start(name, Wanted(tuple(served.values())[:count], 0))

        def host(made: Readers = made) -> None:
            made.begin(NAMES, STARTS, POSITIONS, REQUESTS)
            taken = made.take()
            if taken is not None:
                taken.rows()

        def ops(made: Readers = made, places: Places = places) -> None:
            made.begin(NAMES, STARTS, POSITIONS, REQUESTS)
            for i in range(LAYERS):
                places.edit_(stream, hidden, f"resid_post.{i}")

        with torch.inference_mode():
            ops()  # what a step reads when it has run is there
            found[f"read_{count}_host"] = show(f"scores, {REQUESTS} requests read {count} probes, host", host)
            found[f"read_{count}_ops"] = show(f"scores, {REQUESTS} requests read {count} probes, {LAYERS} places", ops)
    return found


def show(name: str, call: Callable[[], object]) -> float:
    taken = []
    for _ in range(CALLS):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    low, middle, high = statistics.quantiles(taken)
    print(f"  {name:<64} {1e6 * middle:8.1f} µs  [{1e6 * low:.1f}, {1e6 * high:.1f}]")
    return middle


if __name__ == "__main__":
    main()
