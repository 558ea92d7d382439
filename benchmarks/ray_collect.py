"""Activations by Ray Data: workers collect parts of one cache, and a worker that is killed is replaced by one that goes on.

    python benchmarks/ray_collect.py corpus.txt rows --workers 2 --parts 8
    steerfast sae train --rows rows/resid_post-8 --out sae

Needs `pip install "ray[data]"`; the folder must be one that all workers see. A part goes on where its last worker stopped.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import ray

PLACES = [("resid_post", 8), ("mlp_out", 8)]


class Collector:
    def __init__(self, text: str, out: str, parts: int) -> None:
        from steerfast.models import demo
        from steerfast.sae.training.corpus import read_texts

        self.model, self.tokenizer = demo.load()
        self.texts, self.out, self.parts = read_texts(text), out, parts

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        from steerfast.sae.cache import CacheConfig, cache_places

        for part in batch["id"]:
            config = CacheConfig(part=(int(part) + 1, self.parts))
            cache_places(self.model, self.tokenizer, self.texts, PLACES, self.out, config)
        return {**batch, "pid": [os.getpid()] * len(batch["id"])}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--parts", type=int, default=8)
    args = parser.parse_args()
    ray.init(num_cpus=args.workers)
    again = {"max_restarts": -1, "max_task_retries": -1}
    todo = ray.data.range(args.parts, override_num_blocks=args.parts)
    given = [os.path.abspath(args.text), os.path.abspath(args.out), args.parts]
    done = todo.map_batches(Collector, batch_size=1, concurrency=args.workers, fn_constructor_args=given, **again)
    print(done.take_all())
