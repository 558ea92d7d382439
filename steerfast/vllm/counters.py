"""Counters per plan and a histogram of scores per probe, in the engine's /metrics.

Requests are counted where they enter and scores where they leave, tokens and waiting requests in the scheduler, which is
another process. Each process writes files of its own, in the form of prometheus_client, whose collector adds them up: no locks
between processes, no messages. Where several API servers share a port, vLLM keeps its metrics the same way, and ours lie beside
them.
"""

from __future__ import annotations

import atexit
import functools
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

FOLDER = "STEERFAST_COUNTERS"
OF_SEVERAL_SERVERS = "PROMETHEUS_MULTIPROC_DIR"
FIELDS = {
    "requests": ("counter", "Requests that named this plan and were accepted."),
    "tokens": (
        "counter",
        "Tokens of ended requests that this plan edited, in this request or in one that shares its prefix.",
    ),
    "refused": ("counter", "Requests that were refused with a reason; the plan is empty where none was recognised."),
    "waiting": ("gauge", "Requests that wait for a slot for this plan."),
    "slots": ("gauge", "Slots held by requests in flight, all plans together."),
    "captured": ("counter", "Rows of the stream that were written into shards."),
    "capture_dropped": (
        "counter",
        "Rows of the stream that were asked for and not written: no room, or a client hung up.",
    ),
    "scores_written": ("counter", "Scores that were written into the operator's file."),
    "scores_dropped": ("counter", "Scores that were not, because the file could not follow."),
}
WITHOUT_PLAN = frozenset({"captured", "capture_dropped", "scores_written", "scores_dropped"})
"""What is counted under the empty name alone."""
SCORE = "steerfast:score"
_SCORES = "Scores of the tokens that ended requests have read, by probe."
BOUNDS = (
    -100.0,
    -30.0,
    -10.0,
    -3.0,
    -1.0,
    -0.3,
    0.0,
    *(i / 10 for i in range(1, 11)),
    3.0,
    10.0,
    30.0,
    100.0,
    math.inf,
)
"""Upper ends of the histogram of scores, the same for every probe: tenths for what is a probability or a cosine."""


def share() -> None:
    """Name the folder of the counters in the environment, for this process and those that it starts."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="steerfast-counters-")
        atexit.register(_remove, os.environ[FOLDER], os.getpid())


class Counters:
    """What is counted, by plan.

    Args:
        plans: Names of all plans, the same in every process.
        probes: Names of all probes with one number per token.
    """

    def __init__(self, plans: Sequence[str], probes: Sequence[str] = ()) -> None:
        self._plans = ("", *plans)
        self._probes = tuple(probes)

    def add(self, field: str, plan: str, amount: float = 1.0) -> None:
        """Count something; an unknown plan counts under the empty name."""
        key = _key(field, plan if plan in self._plans else "")
        with _writing:
            file = _file(FIELDS[field][0])
            file.write_value(key, file.read_value(key)[0] + amount, 0.0)

    def observe(self, probe: str, scores: np.ndarray) -> None:
        """The scores of the tokens of one request that were read, float32 (tokens,); NaN is left out."""
        scores = scores[~np.isnan(scores)].astype(np.float64)
        at = np.searchsorted(BOUNDS, scores)
        counts = {BOUNDS[i]: count for i, count in enumerate(np.bincount(at, minlength=len(BOUNDS)).tolist()) if count}
        with _writing:
            file = _file("histogram")
            for key, amount in [*((_bucket(probe, end), n) for end, n in counts.items()), (_sum(probe), scores.sum())]:
                file.write_value(key, file.read_value(key)[0] + float(amount), 0.0)

    def total(self) -> dict[str, dict[str, float]]:
        """field -> plan -> count, over all processes."""
        total = {field: dict.fromkeys(self._plans, 0.0) for field in FIELDS}
        for metric in _collector().collect():
            owner, _, field = metric.name.partition(":")
            if owner == "steerfast" and field in FIELDS:
                total[field] |= {sample.labels["plan"]: sample.value for sample in metric.samples}
        return total

    def publish(self) -> None:
        """Show the counters in this process's /metrics, those of plans that no request has named yet as zero."""
        from prometheus_client import REGISTRY  # type: ignore[import-not-found]  # comes with vLLM

        global _published
        for field in FIELDS:
            for plan in ("",) if field in WITHOUT_PLAN else self._plans:
                self.add(field, plan, 0.0)
        for probe in self._probes:
            self._begin(probe)
        if _published is not None:
            REGISTRY.unregister(_published)
            _published = None
        if OF_SEVERAL_SERVERS not in os.environ:  # otherwise whoever is asked reads all files of that folder
            _published = _collector()
            REGISTRY.register(_published)

    @staticmethod
    def _begin(probe: str) -> None:
        """Every bucket of a probe is there before anything was read."""
        with _writing:
            file = _file("histogram")
            for key in [*(_bucket(probe, end) for end in BOUNDS), _sum(probe)]:
                file.write_value(key, file.read_value(key)[0], 0.0)


_published: Any = None
_writing = threading.Lock()


def _folder() -> str:
    return os.environ.get(OF_SEVERAL_SERVERS) or os.environ[FOLDER]


def _collector() -> Any:
    from prometheus_client.multiprocess import MultiProcessCollector  # type: ignore[import-not-found]

    return MultiProcessCollector(None, _folder())


def _file(kind: str) -> Any:
    return _open(f"{_folder()}/{'gauge_sum' if kind == 'gauge' else kind}_steerfast{os.getpid()}.db")


@functools.cache
def _open(path: str) -> Any:
    from prometheus_client.mmap_dict import MmapedDict  # type: ignore[import-not-found]

    return MmapedDict(path)


@functools.cache
def _key(field: str, plan: str) -> str:
    from prometheus_client.mmap_dict import mmap_key

    kind, text = FIELDS[field]
    name = f"steerfast:{field}"
    return str(mmap_key(name, f"{name}_total" if kind == "counter" else name, ["plan"], [plan], text))


@functools.cache
def _bucket(probe: str, end: float) -> str:
    from prometheus_client.mmap_dict import mmap_key
    from prometheus_client.utils import floatToGoString  # type: ignore[import-not-found]

    return str(mmap_key(SCORE, f"{SCORE}_bucket", ["probe", "le"], [probe, floatToGoString(end)], _SCORES))


@functools.cache
def _sum(probe: str) -> str:
    from prometheus_client.mmap_dict import mmap_key

    return str(mmap_key(SCORE, f"{SCORE}_sum", ["probe"], [probe], _SCORES))


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
