"""Whether the rows that a soak's requests have captured are the stream that transformers has there, each of them once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from vllm_truth import CLOSE, chosen

Point = tuple[str, int, bool, str]
"""Site, layer, whether behind the edits there, and dtype."""


class Row(NamedTuple):
    """A row that was captured: where, at which position of which token, and what."""

    point: Point
    position: int
    token: int
    stream: Tensor


Rows = list[Row]


def captured(folder: Path) -> dict[str, Rows]:
    """All rows below a folder, by the name of their request; those of further engines stand in folders of their own."""
    import steerfast as sf
    from steerfast.sae.growing import contexts_of

    found: dict[str, Rows] = {}
    for manifest in sorted(folder.rglob("cache.json")):
        site, layer, edits, dtype = manifest.parent.name.split(".")
        point = site, int(layer), edits == "after", dtype
        cache = sf.sae.ActivationCache.open(manifest.parent)
        for shard in range(len(cache.counts)):
            tokens, where = cache.contexts(shard)
            about, length = contexts_of(manifest.parent, shard), tokens.shape[1]
            for at, stream in zip(where.tolist(), cache.read(shard), strict=True):
                name, first = about[at // length]
                row = Row(point, first + at % length, int(tokens[at // length, at % length]), stream)
                found.setdefault(name, []).append(row)
    return found


def not_as_asked(
    xargs: Mapping[str, Any],
    prompt: int,
    ids: list[int],
    answer: Mapping[str, Any] | None,
    rows: Rows,
    streams: Mapping[tuple[str, int, bool], Tensor],
    counts: dict[str, float],
    words: Sequence[str] = (),
) -> list[str]:
    """What is missing, too much or another row than the stream of a text `ids` that `words` may have stopped, in words."""
    wanted = _points(xargs)
    wrong = [f"captured {row.point}; asked for {wanted}" for row in rows if row.point not in wanted]
    where = chosen(xargs.get("steer_capture_positions", "all"), prompt, ids)
    end = len(ids) if answer is None else prompt + len(answer["tokens"])
    must = {*np.nonzero(where[: end - 1])[0].tolist()}
    may = must | ({end - 1} if where[end - 1] else set())  # run only where the engine was a step ahead
    whole = answer is not None and answer["tokens"]  # an end in the prompt leaves out its further chunks
    # A stop text is found in the front end, whose engine may have gone on: those rows are kept.
    stopped = end if answer is not None and answer["stop"] in words else None
    for point in wanted:
        mine = [row for row in rows if row.point == point and (stopped is None or row.position < stopped)]
        positions = [row.position for row in mine]
        if len(positions) > len({*positions}) or not {*positions} <= may or (whole and not must <= {*positions}):
            wrong.append(f"{point}: captured positions {positions} for {sorted(must)}")
            continue
        for row in mine:
            counts["rows"] += 1
            right = streams[point[:3]][row.position]
            near = (CLOSE if point[3] == "float32" else 2**-7) * max(1.0, float(right.abs().max()))
            if row.token != ids[row.position] or not (row.stream.float() - right).abs().max() < near:
                error = float((row.stream.float() - right).abs().max())
                wrong.append(f"{point}: position {row.position} of token {row.token} is off by {error:g}")
    return wrong


def _points(xargs: Mapping[str, Any]) -> list[Point]:
    after, dtype = xargs.get("steer_capture_edits") == "after", xargs.get("steer_capture_dtype", "")
    found = []
    for place in xargs.get("steer_capture", []):
        site, _, layer = str(place).rpartition(".")
        found.append((site or "resid_post", int(layer), after, dtype))
    return found
