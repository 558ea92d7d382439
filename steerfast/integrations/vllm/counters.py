"""Counters per plan, in the engine's /metrics.

Requests are counted where they enter, tokens and waiting requests in the scheduler, which is another process. Each
process writes a small file of its own, and whoever is asked for metrics adds the files up: no locks, no messages.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = "STEERFAST_COUNTERS"
FIELDS = {
    "requests": ("counter", "Requests that named this plan and were accepted."),
    "tokens": (
        "counter",
        "Tokens of ended requests that this plan edited, in this request or in one that shares its prefix.",
    ),
    "refused": ("counter", "Requests that were refused with a reason; the plan is empty where none was recognised."),
    "waiting": ("gauge", "Requests that wait for a slot for this plan."),
}


def share() -> None:
    """Name the folder of the counters in the environment, for this process and those that it starts."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="steerfast-counters-")
        atexit.register(_remove, os.environ[FOLDER], os.getpid())


class Counters:
    """What this process has counted, by plan.

    Args:
        plans: Names of all plans, the same in every process.
    """

    def __init__(self, plans: Sequence[str]) -> None:
        self._line = {name: i for i, name in enumerate(["", *plans])}
        self._table: np.ndarray | None = None
        self._owner = -1

    def add(self, field: str, plan: str, amount: float = 1.0) -> None:
        """Count something; an unknown plan counts under the empty name."""
        if self._owner != os.getpid():  # a fork counts for itself
            self._owner = os.getpid()
            path = Path(os.environ[FOLDER]) / f"{self._owner}"
            self._table = np.memmap(path, dtype=np.float64, mode="w+", shape=(len(self._line), len(FIELDS)))
        assert self._table is not None
        self._table[self._line.get(plan, 0), list(FIELDS).index(field)] += amount

    def total(self) -> dict[str, dict[str, float]]:
        """field -> plan -> count, over all processes."""
        shape = len(self._line), len(FIELDS)
        total = np.zeros(shape)
        for path in Path(os.environ[FOLDER]).iterdir():
            table = np.fromfile(path, dtype=np.float64)
            if table.size == total.size:
                total += table.reshape(shape)
        names = list(self._line)
        return {field: dict(zip(names, total[:, column].tolist(), strict=True)) for column, field in enumerate(FIELDS)}

    def collect(self) -> Iterator[Any]:
        """The counters as Prometheus asks for them."""
        from prometheus_client.core import (  # type: ignore[import-not-found]  # comes with vLLM
            CounterMetricFamily,
            GaugeMetricFamily,
        )

        for field, by_plan in self.total().items():
            kind, text = FIELDS[field]
            family = (CounterMetricFamily if kind == "counter" else GaugeMetricFamily)(
                f"steerfast:{field}", text, labels=["plan"]
            )
            for plan, count in by_plan.items():
                family.add_metric([plan], count)
            yield family


def publish(counters: Counters) -> None:
    """Show the counters in this process's /metrics; those of an earlier engine in this process go."""
    from prometheus_client import REGISTRY  # type: ignore[import-not-found]

    global _published
    if _published is not None:
        REGISTRY.unregister(_published)
    REGISTRY.register(counters)
    _published = counters


_published: Counters | None = None


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
