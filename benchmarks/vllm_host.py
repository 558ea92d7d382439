"""Host time that steering adds to a step of vLLM, without the engine: microseconds of CPU time, medians.

    python benchmarks/vllm_host.py

Wanted: 100 µs with 64 steered requests, 15 µs when nobody is steered. The edits of 30 layers of width 576 in bfloat16 are
shown beside it; on a GPU they are kernels and no host time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

import steerfast as sf
from steerfast.integrations.vllm.edits import Place, Places
from steerfast.integrations.vllm.table import EVER, Owner, RowTable

REQUESTS, WIDTH, LAYERS, CALLS = 64, 576, 30, 500
NAMES = [f"cmpl-{i:032x}-0-{i:08x}" for i in range(REQUESTS)]
TURNED = NAMES[1:] + NAMES[:1]
STARTS, POSITIONS = torch.arange(REQUESTS + 1, dtype=torch.int32), torch.full((2048,), 50)


def main() -> None:
    torch.set_num_threads(1)
    for steered in (0, 16, 64):
        made = table(steered)
        show(f"table, {steered} of {REQUESTS} steered, the batch goes on", partial(fill, made, NAMES))
    for path in ("host", "device"):
        made = table(REQUESTS)
        made._write = made._on_host if path == "host" else made._on_device
        show(f"table, {REQUESTS} steered, the batch has changed, {path}'s path", partial(turn, made))
    for steered in (0, 64):
        places = layers(table(steered))
        stream, hidden = torch.randn(REQUESTS, WIDTH).bfloat16(), torch.randn(REQUESTS, WIDTH).bfloat16()
        with torch.inference_mode():
            show(f"edits of {LAYERS} layers, {steered} steered, as many vectors", partial(edit, places, stream, hidden))


def table(steered: int) -> RowTable:
    made = RowTable(2048, torch.device("cpu"))
    for i in range(steered):
        made.put(NAMES[i], [Owner(i, 1.0 + i / 100, 0, EVER)])
    fill(made, NAMES)
    return made


def fill(made: RowTable, names: list[str]) -> None:
    made.fill(names, STARTS, POSITIONS, REQUESTS)


def turn(made: RowTable) -> None:
    fill(made, TURNED if made.rows[0, 0] == 0 else NAMES)


def edit(places: Places, stream: torch.Tensor, hidden: torch.Tensor) -> None:
    for name in places.places:
        places.edit_(stream, hidden, name)


def layers(made: RowTable) -> Places:
    edits = [sf.Add(torch.randn(WIDTH)) for _ in range(REQUESTS)]
    found = {f"{i}": Place(edits, REQUESTS, WIDTH, torch.bfloat16, torch.device("cpu")) for i in range(LAYERS)}
    for place in found.values():
        for slot, edit in enumerate(edits):
            place.load(slot, edit)
    return Places(found, made)


def show(name: str, call: Callable[[], object]) -> None:
    taken = []
    for _ in range(CALLS):
        start = time.process_time()
        call()
        taken.append(time.process_time() - start)
    low, middle, high = statistics.quantiles(taken)
    print(f"  {name:<64} {1e6 * middle:8.1f} µs  [{1e6 * low:.1f}, {1e6 * high:.1f}]")


if __name__ == "__main__":
    main()
