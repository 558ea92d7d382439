"""The requests of a soak, one drawn like the other whatever the engine's form, and how they are sent."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from typing import Any

from vllm_soak_forms import CAPTURED, COLUMNS, WAVES, Form
from vllm_truth import PIECES, POSITIONS, TO_CAPTURE, Truth
from vllm_truth_plans import WORDS

POOL = [
    [5 + (7 * i + 3 * j * j) % 120 for j in range(40 + i)] for i in range(20)
]  # prompts that come again: prefix cache, and n-grams to look up
LONGEST = 100  # tokens of a prompt
STEERS = {"steer", "steer_strength", "steer_positions"}
FATES = {"finish": 75, "hang up": 10, "give up": 10, "refuse": 5}
BAD = [
    {"steer": "nobody"}, {"steer": "plan1", "steer_strength": "x"}, {"steer_x": 1}, {"steer_read": "nobody"},
    {"steer_read": "lean", "steer_read_positions": "90"}, {"steer_abort": "lean>much"}, {"steer_abort": "several>1"},
    {"steer_read_what": "tokens"}, {"steer_read": "top"}, {"steer_read": "lean", "steer_read_positions": "special"},
    {"steer": ["long", "long here"]}, {"steer": "by token", "steer_positions": "last"}, {"steer_capture": "mlp_out.2"},
    {"steer": "plan0", "steer_positions": "0 | 2 | 4 | 6 | 8"}, {"steer_capture": 1, "steer_capture_positions": "after:ids:7"},
]  # fmt: skip


class Refused(Exception):
    """An answer with another status or length than was asked for."""


def draw(
    rng: random.Random, number: int, truth: Truth, form: Form, answered: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """A request. What it asks for beside its fate is drawn one thing after the other.

    Some send an answer back as the next turn's prompt, asking for the same plans as before or for others.
    """
    fate = rng.choices([*FATES], [*FATES.values()])[0]
    fresh = [rng.randrange(5, WORDS) for _ in range(rng.randint(1, 60))]
    prompt = rng.choice([fresh, rng.choice(POOL)])
    xargs = {**_steer(rng, truth), **_read(rng, truth)} if fate != "refuse" else rng.choice(BAD)
    before = rng.choice(answered[-20:]) if answered and rng.random() < 0.2 else None
    if before is not None:
        prompt = [*before["prompt"], *before["answer"]["tokens"]][:LONGEST]
        if fate != "refuse" and rng.random() < 0.5:
            xargs = {name: before["vllm_xargs"][name] for name in before["vllm_xargs"].keys() & STEERS}
    most = rng.randint(1, 24)
    if form.captures and fate != "refuse" and rng.random() < 0.2:
        xargs |= _capture(rng, len(prompt), most)
    mixed = number % WAVES == WAVES - 1 or not form.drafts
    return {
        "request_id": f"soak-{number}",
        "prompt": prompt,
        "max_tokens": most,
        "vllm_xargs": xargs,
        "fate": fate,
        "adapted": form.adapts and rng.random() < (0.4 if before is None else 0.2 + 0.6 * before["adapted"]),
        "temperature": 1.0 if mixed and rng.random() < 0.1 else 0.0,
        "likeliest": not (mixed and form.drafts),  # where it is greedy
        "patience": rng.uniform(0.0, 0.6),
        "streams": fate == "hang up" or rng.random() < 0.3,
        "reads_until": rng.randint(1, 12),  # chunks, before it hangs up
        "stop_token_ids": rng.sample(range(5, WORDS), 3) if rng.random() < 0.1 else [],
        "stop": [f"w{rng.randrange(100, WORDS)}" for _ in range(3)] if rng.random() < 0.1 else [],
    }


def _steer(rng: random.Random, truth: Truth) -> dict[str, Any]:
    names = rng.sample([*truth.plans], rng.choice([0, 1, 1, 1, 2, 3]))
    if {"gated1", "gated15"} <= {*names}:  # one content, one slot: a trace cannot tell them apart
        names.remove("gated15")
    while sum(truth.plans[name].columns for name in names) > COLUMNS:
        names.pop()
    if not names:
        return {}
    strengths = [rng.choice([1.0, round(rng.uniform(-2, 2), 3)]) for _ in names]
    found: dict[str, Any] = {"steer": names, "steer_strength": strengths}
    columns = sum(truth.plans[name].columns for name in names)
    fitting = [where for where in POSITIONS if columns * PIECES.get(where, 1) <= COLUMNS]
    if all(truth.plans[name].takes_positions for name in names) and rng.random() < 0.8:
        found["steer_positions"] = rng.choice(fitting)
    return found


def _read(rng: random.Random, truth: Truth) -> dict[str, Any]:
    names = rng.sample([*truth.probes], rng.choice([0, 1, 1, 2, 4]))
    found: dict[str, Any] = {"steer_read": names} if names else {}
    if rng.random() < 0.3:
        single = rng.sample([name for name, look in truth.probes.items() if look.single], rng.randint(1, 2))
        shares = [rng.choice([rng.uniform(0.8, 1.0), rng.uniform(0.98, 1.0)]) for _ in single]
        above = [rng.random() < 0.5 for _ in single]
        found["steer_abort"] = [
            f"{name}>{truth.level(name, share)}" if up else f"{name}<{truth.level(name, 1 - share)}"
            for name, share, up in zip(single, shares, above, strict=True)
        ]
    if found:
        found["steer_read_positions"] = rng.choice([*POSITIONS])
        found["steer_read_what"] = rng.choice(["tokens", "tokens" if "top" in names else "request"])
    return found


def _capture(rng: random.Random, prompt: int, most: int) -> dict[str, Any]:
    named = [where for where in TO_CAPTURE if (prompt > 1 or ":6" not in where) and (most > 1 or where != "generated")]
    places = rng.sample(CAPTURED, rng.randint(1, 2))
    return {
        "steer_capture": [int(place) if place.isdecimal() else place for place in places],
        "steer_capture_positions": rng.choice(named),
        "steer_capture_edits": rng.choice(["before", "after"]),
        "steer_capture_dtype": rng.choice(["float32", "bfloat16"]),
    }


async def send(http: Any, request: dict[str, Any]) -> dict[str, Any] | None:
    """The answer: tokens, why it ended, what was read; None where there is none to wait for."""
    fate = request["fate"]
    fields = ("request_id", "prompt", "max_tokens", "vllm_xargs", "stop_token_ids", "stop", "temperature")
    body = {key: request[key] for key in fields} | {"stream": request["streams"] and fate != "refuse"}
    body |= {"model": "adapted" if request["adapted"] else "m", "ignore_eos": True, "return_token_ids": True}
    asking = _streamed(http, body, request) if body["stream"] else _posted(http, body, request)
    if fate != "give up":
        return await asking
    try:
        return await asyncio.wait_for(asking, request["patience"])
    except asyncio.TimeoutError:
        return None


async def _posted(http: Any, body: dict[str, Any], request: dict[str, Any]) -> dict[str, Any] | None:
    answer = await http.post("/v1/completions", json=body)
    if answer.status_code != (400 if request["fate"] == "refuse" else 200):
        raise Refused(answer.text)
    if request["fate"] == "refuse":
        return None
    (choice,) = answer.json()["choices"]
    return _answer(choice["token_ids"], choice, answer.json())


async def _streamed(http: Any, body: dict[str, Any], request: dict[str, Any]) -> dict[str, Any] | None:
    tokens: list[int] = []
    chunks = 0
    async with http.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise Refused((await answer.aread()).decode())
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, chunks = json.loads(line.removeprefix("data: ")), chunks + 1
            if "error" in chunk:
                raise Refused(line)
            (choice,) = chunk["choices"]
            tokens += choice.get("token_ids") or []
            if choice["finish_reason"] is not None:
                return _answer(tokens, choice, chunk)
            if request["fate"] == "hang up" and chunks >= request["reads_until"]:
                return None
    raise Refused("the stream ended without a reason")


def _answer(tokens: list[int], choice: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    read = (answer.get("kv_transfer_params") or {}).get("steerfast")
    return {"tokens": tokens, "why": choice["finish_reason"], "stop": choice.get("stop_reason"), "read": read}
