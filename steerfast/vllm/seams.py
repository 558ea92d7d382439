"""Where steering enters vLLM: nine places, of whose every seam (`seam_table.py`) the form is checked before one is touched.

| seam | what is added |
|---|---|
| front end: `InputProcessor.__init__`, `process_inputs` | reads and refuses, salts the prefix cache |
| API server: `to_sampling_params`, `to_beam_search_params` of the requests | HTTP 400 before a stream begins |
| Python: `LLM.beam_search` | refuses, too |
| API server: `init_entrypoints_middleware` | HTTP 400 where a route would drop the fields |
| engine core: `generate_block_hash_extra_keys` | keys and values are shared as far as the same acts on them |
| engine core: `Scheduler.__init__`, `_handle_blocked_waiting_request`, `_free_request` | requests wait until slots are free |
| worker: `WorkerWrapperBase.init_device` | refuses what splits or reorders tokens; follows the runner it has built |
| worker: `load_model` and that runner's own methods, on the instance | `worker_seams.py` |
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from . import capture_seams, read_seams, roster, worker_seams
from .edits import find_places_with
from .fields import PROBES, short, steer_fields
from .guards import check_engine
from .routes import BESIDE, Strays
from .scores import Desk, ProbeScores
from .seam_table import BEAMS, HASHES, KEYS, POOL, PROCESSOR, REQUESTS, SCHEDULER, SERVER, WRAPPER
from .served import Served
from .sink import open_sink
from .slots import Admission
from .wire import SALT, Part, key_of, salt
from .wrapping import logger, resolve, spare_llvmlite, wrap


def patch() -> None:
    """Put steering in front of vLLM's own methods. Called in every process that vLLM starts; a second time does nothing.

    Raises:
        RuntimeError: this vLLM has not what steering builds on, or was not tested; the message says what to do.
    """
    import vllm

    check_engine(vllm.__version__, Path(vllm.__file__).parent)
    from vllm.forward_context import get_forward_context

    find_places_with(lambda: get_forward_context().no_compile_layers)
    processor, scheduler, wrapper = resolve(PROCESSOR), resolve(SCHEDULER), resolve(WRAPPER)
    wrap(processor, "__init__", _read_library)
    wrap(processor, "process_inputs", _process_inputs)
    wrap(scheduler, "__init__", _count_slots)
    wrap(scheduler, "_handle_blocked_waiting_request", _admit)
    wrap(scheduler, "_free_request", _free)
    wrap(wrapper, "init_device", worker_seams.init_device)
    read_seams.patch(_observe, _tell)
    capture_seams.patch(_check_early)
    for name in (HASHES, POOL):
        wrap(importlib.import_module(name), KEYS, _block_keys)
    spare_llvmlite()


# --- front end ---------------------------------------------------------------------------------------------------------


_served: Served | None = None  # of the engine that this process has built last


def _read_library(original: Callable[..., None], processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    global _served
    original(processor, vllm_config, *args, **kwargs)
    roster.begin()
    _served = processor.steerfast = Served(vllm_config)
    _served.chains, _served.loaded = {}, {}  # the workers have their own
    count = _served.counters.add
    _served.sink = open_sink(lambda name, n: count(name, "", n), logger().warning)
    for name, searches in REQUESTS.items():
        request = resolve(name)
        wrap(request, "to_sampling_params", _to_sampling_params)
        if searches:
            wrap(request, "to_beam_search_params", _to_beam_search_params)
    if BEAMS.partition(":")[0] in sys.modules:  # an `LLM` of Python
        wrap(resolve(BEAMS), "beam_search", _beam_search)
    server = sys.modules.get(SERVER)
    if server is not None:  # where there is no server, there are no routes
        wrap(server, "init_entrypoints_middleware", _init_middleware)
        read_seams.patch_streams()
    _served.counters.publish()
    spare_llvmlite()  # a plan that was read may have loaded it
    for name, reason in _served.library.refused.items():
        logger().warning("steerfast: the plan %r is refused: %s", name, reason)
    for name, reason in _served.probes.refused.items():
        logger().warning("steerfast: the probe %r is refused: %s", name, reason)


def _process_inputs(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    served: Served = processor.steerfast
    call = inspect.signature(original).bind(processor, *args, **kwargs).arguments
    params = call["params"]
    given = getattr(params, "extra_args", None)
    if steer_fields(getattr(params, "extra_kwargs", None)):
        raise served.refusal("steer: pooling requests cannot be steered; leave the fields out", None)
    parts, reading, capture = served.accept(given)
    if (parts or reading or capture) and call.get("resumable"):
        raise served.refusal("steer: a request whose prompt is still to grow cannot be steered; send it whole", given)
    request = original(processor, *args, **kwargs)
    if not parts and (request.cache_salt or "").startswith(SALT):  # a user's own is not taken for one of ours
        request.cache_salt = salt(request.cache_salt, (), 0)
    if not (parts or reading or capture):
        return request
    if request.sampling_params is None:
        raise served.refusal(
            "steer: pooling requests cannot be steered, as STEERFAST_DEFAULT says; start this engine without it", None
        )
    ids, embeds = request.prompt_token_ids, getattr(request, "prompt_embeds", None)
    length = len(ids) if ids is not None else 0 if embeds is None else len(embeds)
    shown = ids if embeds is None else None
    served.check((parts, reading, capture), shown, length, request.sampling_params)
    if parts:
        request.cache_salt = salt(request.cache_salt, parts, length)
    # What opens a span, or a gate, must have been seen.
    watched = any(part.served.gated or part.selector.remembers for part in parts)
    # What is cached has no activations. A prompt's last token is never taken from there, unless the request was preempted.
    first = min(one.first(length) for one in (reading, capture) if one is not None) if reading or capture else length
    if watched or first < length - 1:
        request.sampling_params.skip_reading_prefix_cache = True
    for name in {part.served.name for part in parts}:
        served.counters.add("requests", name)
    return request


def _observe(probe: str, scores: np.ndarray) -> None:
    if _served is not None:
        _served.counters.observe(probe, scores)


def _tell(request: str, prompt: int, found: list[ProbeScores]) -> None:
    if _served is not None and _served.sink is not None:
        _served.sink.put(request, prompt, found)


def _check_early(prompt: Any, params: Any) -> None:
    """Refuse before a stream begins what only the prompt shows, where it is given as tokens, those of its images included."""
    whole = isinstance(prompt, dict) and not prompt.get("multi_modal_data")
    ids = prompt.get("prompt_token_ids") if whole else None
    given = getattr(params, "extra_args", None)
    if _served is None or ids is None or not steer_fields(given):
        return
    _served.check(_served.accept(given), ids, len(ids), params)


def _check_request(request: Any) -> None:
    """Refuse before a stream begins what `process_inputs` would refuse later."""
    if _served is None:
        return
    stray = steer_fields(getattr(request, "model_extra", None))
    if stray:
        raise _served.refusal(f"steer: {next(iter(stray))[:80]} {BESIDE}", None)
    _served.accept(request.vllm_xargs)
    reads = [name for name in steer_fields(request.vllm_xargs) if name in PROBES]
    reason = read_seams.unanswered(request) if reads else ""
    if reason:
        raise _served.refusal(f"steer: {short(reads[0])}: {reason}", None)


def _init_middleware(original: Callable[..., Any], args: Any, app: Any, *others: Any) -> None:
    original(args, app, *others)
    app.add_middleware(Strays, refused=lambda reason: _served and _served.refusal(reason, None))


def _to_sampling_params(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    _check_request(request)
    return original(request, *args, **kwargs)


def _to_beam_search_params(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    _check_request(request)
    if _served is not None and steer_fields(request.vllm_xargs):
        raise _served.refusal(
            "steer: beam search drops the fields of a request; sample instead, or use STEERFAST_DEFAULT",
            request.vllm_xargs,
        )
    if _served is not None:
        _served.check_beams()
    return original(request, *args, **kwargs)


def _beam_search(original: Callable[..., Any], llm: Any, *args: Any, **kwargs: Any) -> Any:
    llm.llm_engine.input_processor.steerfast.check_beams()
    return original(llm, *args, **kwargs)


# --- engine core -------------------------------------------------------------------------------------------------------


def _count_slots(original: Callable[..., None], scheduler: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(scheduler, vllm_config, *args, **kwargs)
    scheduler.steerfast = Served(vllm_config)
    scheduler.steerfast.chains, scheduler.steerfast.loaded = {}, {}
    scheduler.steerfast_desk = Desk()
    scheduler.steerfast_slots = Admission(scheduler.steerfast.slots)


def _parts(scheduler: Any, request: Any) -> tuple[Part, ...]:
    """What a request asks for, read once: a request that waits is looked at in every step."""
    if not hasattr(request, "steerfast"):
        request.steerfast = scheduler.steerfast.parts(request.sampling_params)
    return request.steerfast


def _block_keys(
    original: Callable[..., tuple[tuple[Any, ...] | None, int]], request: Any, start: int, stop: int, *args: Any
) -> tuple[tuple[Any, ...] | None, int]:
    """`generate_block_hash_extra_keys`: a block is known by its tokens, what acts on them, and the blocks before it."""
    keys, images = original(request, start, stop, *args)
    whole = request.cache_salt
    if not (whole or "").startswith(SALT):
        return keys, images
    given, acting = key_of(whole, start, stop)
    found = [key for key in keys or () if key != ("cache_salt", whole)]
    found += [("cache_salt", given)] * bool(start == 0 and given) + [("steerfast", acting)] * (acting is not None)
    return tuple(found) or None, images


def _admit(original: Callable[..., bool], scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> bool:
    if not original(scheduler, request, *args, **kwargs):
        return False
    parts = _parts(scheduler, request)
    if not parts:
        return True
    admission: Admission = scheduler.steerfast_slots
    waiting, free = admission.waiting, admission.free
    admitted = admission.admit(request.request_id, (part.served for part in parts))
    count = scheduler.steerfast.counters.add
    if admission.waiting != waiting:
        count("waiting", parts[0].served.name, admission.waiting - waiting)
    if admission.free != free:
        count("slots", "", free - admission.free)
    return admitted


def _free(original: Callable[..., Any], scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    parts = _parts(scheduler, request)
    scheduler.steerfast_desk.end(request.request_id)
    capture_seams.note_end(request)
    if parts:
        admission: Admission = scheduler.steerfast_slots
        waiting, free = admission.waiting, admission.free
        admission.release(request.request_id)
        count = scheduler.steerfast.counters.add
        if admission.waiting != waiting:
            count("waiting", parts[0].served.name, admission.waiting - waiting)
        if admission.free != free:
            count("slots", "", free - admission.free)
        for part in parts:
            tokens = part.count(request.all_token_ids, read_seams.tokens_run(request), request.num_prompt_tokens)
            if part.strength != 0.0 and tokens > 0:
                count("tokens", part.served.name, tokens)
    return original(scheduler, request, *args, **kwargs)
