"""Activations by Ray Data: workers collect parts of one cache; a part that is started again goes on where it stopped.

    python benchmarks/ray_collect.py corpus.txt rows 2 8    # two workers, eight parts, into a folder that all workers see
    steerfast sae train --rows rows/resid_post-8 --out sae

Needs `pip install "ray[data]"`.
"""

import os
import sys
from typing import Any

import ray

PLACES = [("resid_post", 8), ("mlp_out", 8)]


class Collector:
    def __init__(self, text: str, out: str, parts: int) -> None:
        from steerfast.models import demo
        from steerfast.sae.documents import read_documents

        self.given = (*demo.load(), list(read_documents(text)), PLACES, out)
        self.parts = parts

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from steerfast.sae.cache import CacheConfig, cache_places

        for number in batch["id"]:
            cache_places(*self.given, CacheConfig(part=(int(number) + 1, self.parts)))
        return {**batch, "pid": [os.getpid()] * len(batch["id"])}


if __name__ == "__main__":
    text, out, workers, parts = *map(os.path.abspath, sys.argv[1:3]), *map(int, sys.argv[3:5])
    # one more, for the task that makes the numbers of the parts
    ray.init(num_cpus=workers + 1)
    todo = ray.data.range(parts, override_num_blocks=parts)
    # a worker takes its next part when it is done with one: the first that is up would take them all otherwise
    pool = ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=1)
    again = {"max_restarts": -1, "max_task_retries": -1}
    given = [text, out, parts]
    print(todo.map_batches(Collector, batch_size=1, compute=pool, fn_constructor_args=given, **again).take_all())
