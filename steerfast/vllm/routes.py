"""The server's routes: fields of steering that a route would not read are refused, never dropped in silence."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from .fields import PROBES, steer_fields

MESSAGES = "/v1/messages"
BATCH = "/v1/chat/completions/batch"
READERS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    MESSAGES,
    BATCH,
    "/invocations",
)
"""Routes whose requests carry `vllm_xargs` to the engine, where they are read; so do their /render twins."""

BESIDE = "stands beside vllm_xargs; put it inside"

Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


def stray(path: str, body: bytes) -> str | None:
    """Why a request to this route cannot be followed, or None. A body that is no JSON object is left to the server."""
    route = path.removesuffix("/render")
    if b'"steer' not in body or (route.endswith(READERS) and not route.endswith((MESSAGES, BATCH))):
        return None
    try:
        fields = json.loads(body)
    except ValueError:
        return None
    if not isinstance(fields, dict):
        return None
    beside = steer_fields(fields)
    inside = fields.get("vllm_xargs")
    within = steer_fields(inside if isinstance(inside, dict) else None)
    if route.endswith((MESSAGES, BATCH)):  # makes chat requests of its own, into which only vllm_xargs go
        if beside:
            return f"steer: {next(iter(beside))[:80]} {BESIDE}"
        reads = [name for name in within if name in PROBES]
        if not reads or (route.endswith(MESSAGES) and not fields.get("stream")):
            return None
        return f"steer: {reads[0]}: the answer of this route has no place for scores; send it to one of {', '.join(READERS[:2])}"
    found = beside or within
    if not found:
        return None
    return f"steer: {next(iter(found))[:80]} is not read by {path[:80]}; send the request to one of {', '.join(READERS[:4])}"


class Strays:
    """ASGI middleware: HTTP 400 for what `stray` finds.

    Args:
        app: What is served.
        refused: Called with the reason of every refusal.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], refused: Callable[[str], object]) -> None:
        self.app, self.refused = app, refused

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Read the whole body of a JSON request, then hand it on as it came."""
        kind = dict(scope.get("headers", ())).get(b"content-type", b"")
        if scope["type"] != "http" or scope["method"] != "POST" or not kind.startswith(b"application/json"):
            await self.app(scope, receive, send)
            return
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        reason = stray(scope["path"], b"".join(message.get("body", b"") for message in messages))
        if reason is None:
            replay = iter(messages)

            async def again() -> dict[str, Any]:
                return next(replay, None) or await receive()

            await self.app(scope, again, send)
            return
        self.refused(reason)
        error = {"message": reason, "type": "BadRequestError", "param": "steer", "code": 400}
        body = json.dumps({"error": error}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 400, "headers": headers})
        await send({"type": "http.response.body", "body": body})
