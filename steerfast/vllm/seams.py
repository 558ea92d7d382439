"""Where steering enters vLLM: seven places, of whose every seam (`seam_table.py`) the form is checked before one is touched.

| seam | what is added |
|---|---|
| front end: `InputProcessor.__init__`, `process_inputs` | reads and refuses, salts the prefix cache |
| API server: `to_sampling_params`, `to_beam_search_params` of the requests | HTTP 400 before a stream begins |
| API server: `init_entrypoints_middleware` | HTTP 400 where a route would drop the fields |
| engine core: `Scheduler.__init__`, `_handle_blocked_waiting_request`, `_free_request` | requests wait until slots are free |
| worker: `WorkerWrapperBase.init_device` | refuses what splits or reorders tokens; follows the runner it has built |
| worker: `load_model`, on the instance | hooks the model, outside of the memory that sleep mode discards |
| worker: that runner's own methods, on the instance | writes the row table of each step; of a pipeline: hands on what was read |
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from steerfast.files.shelf import Shelf
from steerfast.probes.probe import Probe

from . import capture_seams, counters, read_seams, roster
from .capture import Capture, CaptureSettings, check_capture, read_capture
from .edits import CONTEXT, find_places_with
from .fields import CAPTURES, PROBES, short, steer_fields
from .gating import gates_read
from .guards import check_engine, check_parallelism, check_runner
from .plans import Chains, Library, load, with_columns
from .probes import ProbeLibrary, load_probes
from .routes import BESIDE, Strays
from .runner import TRAVELLING, Steered, allocated
from .scores import Desk, ProbeScores, Reading, check_read, read_probes
from .seam_table import PROCESSOR, REQUESTS, SCHEDULER, SERVER, STREAM, WRAPPER
from .sink import ScoreSink, open_sink
from .slots import Admission
from .wire import Part, check_prompt, read, salt
from .wrapping import resolve, wrap


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
    wrap(wrapper, "init_device", _init_device)
    read_seams.patch(_observe, _tell)
    capture_seams.patch(_check_early)


# --- front end ---------------------------------------------------------------------------------------------------------


class Served:
    """What the processes of one engine know: its plans, its probes, its default, its counters."""

    def __init__(self, config: Any) -> None:
        model, directory = config.model_config, os.environ.get("STEERFAST_PLANS")
        self.layers = model.get_total_num_hidden_layers()
        self.library = Library()
        self.chains: dict[str, Chains] = {}
        width, heads = model.get_hidden_size(), _head_width(config)
        saes = Shelf("Plan.load or Probe.load")  # one for both, so that who reads and who edits share an encode
        if directory:
            self.library, self.chains = load(directory, width, self.layers, model.dtype, heads=heads, saes=saes)
            self.library = with_columns(self.library, os.environ.get("STEERFAST_COLUMNS"))
        self.probes = ProbeLibrary()
        self.loaded: dict[str, Probe] = {}
        if probes := os.environ.get("STEERFAST_PROBES"):
            self.probes, self.loaded = load_probes(probes, width, self.layers, self.library, heads=heads, saes=saes)
        edited = {place for chains in self.chains.values() for place in chains}
        batch = config.scheduler_config.max_num_batched_tokens
        self.captures: CaptureSettings | None = CaptureSettings.read(
            (self.layers, width, model.dtype.itemsize), batch, edited, self.library.entered
        )
        self.longest = model.max_model_len
        self.unread = _unread(config)
        self.sink: ScoreSink | None = None
        """Where the front end writes scores."""
        single = [name for name, one in self.probes.probes.items() if one.names is None and not one.pairs]
        self.counters = counters.Counters(sorted([*self.library.plans, *self.library.refused]), single)
        text = os.environ.get("STEERFAST_DEFAULT")
        self.default: tuple[Part, ...] = ()
        self.default_reading: Reading | None = None
        if text:
            try:
                given = json.loads(text)
                self.default = read(given, self.library)
                if any(name in CAPTURES for name in steer_fields(given)):
                    raise ValueError("steer: steer_capture is asked for by each request")
                self.default_reading = self._reading(given)
            except ValueError as error:
                raise ValueError(f"STEERFAST_DEFAULT: {text!r} is no JSON of a request's fields: {error}") from None

    @property
    def slots(self) -> int:
        """How many slots every bank has."""
        given = os.environ.get("STEERFAST_SLOTS")
        if given is None:
            return max(self.library.slots, self.library.least)
        if not given.isdecimal() or int(given) < self.library.least:
            raise ValueError(
                f"STEERFAST_SLOTS is {given!r}; expected a whole number of at least {self.library.least}, so that any request "
                "finds room (a row for each of a prompt's first tokens takes one each)"
            )
        return int(given)

    def parts(self, sampling_params: Any) -> tuple[Part, ...]:
        """What a request that the front end has accepted asks for."""
        return () if sampling_params is None else read(sampling_params.extra_args, self.library, self.default)

    def reading(self, sampling_params: Any) -> Reading | None:
        """What a request that the front end has accepted reads."""
        return None if sampling_params is None else self._reading(sampling_params.extra_args)

    def capture(self, sampling_params: Any) -> Capture | None:
        """What a request that the front end has accepted has captured."""
        return None if sampling_params is None else self._capture(sampling_params.extra_args)

    def _capture(self, given: Any) -> Capture | None:
        capture = read_capture(given, self.captures)
        if capture is not None and self.unread:
            raise ValueError(f"steer: nothing can be captured with {self.unread}; leave steer_capture out")
        return capture

    def _reading(self, given: Any) -> Reading | None:
        reading = read_probes(given, self.probes, self.default_reading)
        if reading is not None and self.unread:
            raise ValueError(f"steer: probes cannot be read with {self.unread}; leave steer_read out")
        return reading

    def _followed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        told = next((part.positions for part in parts if part.selector.remembers), None)
        if told is not None and self.unread:
            raise ValueError(
                f"steer: {short(told)} must know the tokens before each one, and not all of them are seen with {self.unread}; "
                "leave after: and between: out"
            )
        return parts

    def accept(self, given: Any) -> tuple[tuple[Part, ...], Reading | None, Capture | None]:
        """What a request asks for: plans, what it reads, and what it has captured.

        Raises:
            VLLMValidationError: it cannot be followed; also a ValueError.
        """
        try:
            return self._followed(read(given, self.library, self.default)), self._reading(given), self._capture(given)
        except ValueError as error:
            raise self.refusal(str(error), given) from None

    def check(self, asked: Any, ids: Any, length: int, params: Any) -> None:
        """Refuse what only a request's prompt shows.

        Args:
            asked: What `accept` has returned.
            ids: The prompt; None if it is given as embeddings.
            length: Its tokens.
            params: The request's sampling parameters.

        Raises:
            VLLMValidationError: it cannot be followed; also a ValueError.
        """
        parts, reading, capture = asked
        try:
            check_prompt(parts, ids, length)
            if reading is not None:
                check_read(reading, ids, length)
            if capture is not None and self.captures is not None:
                most = length + (params.max_tokens or self.longest - length)
                check_capture(capture, self.captures, ids, (length, most), params.n)
        except ValueError as error:
            raise self.refusal(str(error), params.extra_args) from None

    def refusal(self, text: str, given: Any) -> Exception:
        """The exception that becomes HTTP 400 in the server and is a ValueError in Python."""
        named = steer_fields(given).get("steer")
        first = named if isinstance(named, str) else named[0] if isinstance(named, (list, tuple)) and named else ""
        self.counters.add("refused", first if isinstance(first, str) else "")
        return _refused_type()(text, parameter="steer")


def _head_width(config: Any) -> int:
    """What the attention's output projection reads; 0 where each of several devices has some of the heads."""
    model, parallel = config.model_config, config.parallel_config
    if parallel.tensor_parallel_size > 1:
        return 0
    size = getattr(model.hf_text_config, "v_head_dim", None) or model.get_head_size()
    return int(model.get_num_attention_heads(parallel) * size)


def _unread(config: Any) -> str:
    """What keeps an engine from reading: tokens that have no activations here."""
    return "keys and values from elsewhere (kv_transfer_config)" if config.kv_transfer_config is not None else ""


@functools.cache
def _refused_type() -> Any:
    from vllm.exceptions import VLLMValidationError

    return type("Refused", (VLLMValidationError, ValueError), {"__doc__": "A request that steering cannot follow."})


_served: Served | None = None  # of the engine that this process has built last


def _read_library(original: Callable[..., None], processor: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    global _served
    original(processor, vllm_config, *args, **kwargs)
    roster.begin()
    _served = processor.steerfast = Served(vllm_config)
    _served.chains, _served.loaded = {}, {}  # the workers have their own
    count = _served.counters.add
    _served.sink = open_sink(lambda name, n: count(name, "", n), _logger().warning)
    for name, searches in REQUESTS.items():
        request = resolve(name)
        wrap(request, "to_sampling_params", _to_sampling_params)
        if searches:
            wrap(request, "to_beam_search_params", _to_beam_search_params)
    server = sys.modules.get(SERVER)
    if server is not None:  # where there is no server, there are no routes
        wrap(server, "init_entrypoints_middleware", _init_middleware)
        read_seams.patch_streams()
    _served.counters.publish()
    for name, reason in _served.library.refused.items():
        _logger().warning("steerfast: the plan %r is refused: %s", name, reason)
    for name, reason in _served.probes.refused.items():
        _logger().warning("steerfast: the probe %r is refused: %s", name, reason)


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
    if request.sampling_params is None or not (parts or reading or capture):
        return request
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
    return original(request, *args, **kwargs)


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


# --- worker ------------------------------------------------------------------------------------------------------------


def _init_device(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    config = wrapper.vllm_config
    served = Served(config)
    if not (served.chains or served.loaded or served.captures):
        return original(wrapper, *args, **kwargs)
    check_parallelism(config, capturing=served.captures is not None)
    result = original(wrapper, *args, **kwargs)
    _follow(wrapper.worker, config, served)
    return result


def _follow(worker: Any, config: Any, served: Served) -> None:
    """Wrap the methods of one runner: V1 keeps its batch's order in `input_batch`, V2 returns it from `prepare_inputs`."""
    runner = worker.model_runner
    first_generation = check_runner(runner)
    if not isinstance(config.additional_config, dict):
        raise RuntimeError(
            "steerfast: additional_config is no dict, so the compile cache cannot be keyed; leave it out"
        )
    visited = {place for chains in served.chains.values() for place in chains}
    visited |= {one.place for one in served.probes.probes.values()}
    visited |= gates_read(served.chains, served.layers, served.library.entered)
    count = served.counters.add
    taker = capture_seams.Taker(served.captures, served.capture, lambda name, n: count(name, "", n), _logger().warning)
    runner.steerfast_taker = taker
    visited.update(taker.places)
    config.additional_config["steerfast"] = sorted(f"{site}.{layer}" for site, layer in visited)
    steered: list[Steered] = []  # one, once the model is loaded

    def load_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)  # what is allocated behind it is not discarded in sleep mode
        before = allocated(runner.device)
        tokens = max(runner.max_num_tokens, config.compilation_config.max_cudagraph_capture_size or 0)
        plans, probes = (served.library, served.chains), (served.probes, served.loaded)
        now = Steered(runner.model, served.layers, *plans, served.slots, tokens, *probes)
        if config.speculative_config is not None:
            now.expect_drafts(config.speculative_config.num_speculative_tokens)
        steered[:] = [now]
        runner.steerfast = now
        ranks = worker.rank, config.parallel_config.data_parallel_index
        taker.attach(now, runner.model, ranks, tokens)
        config.compilation_config.static_forward_context[CONTEXT] = now.places
        if more := allocated(runner.device) - before:
            runner.model_memory_usage += more  # or the cache of keys and values would take that room
        return result

    def begin(scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            reading = served.reading(new.sampling_params)
            wanted = None if reading is None else reading.wanted(new.prompt_len)
            steered[0].start(new.req_id, new.prompt_len, served.parts(new.sampling_params), wanted)
        taker.begin(scheduler_output)

    def update_states(original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.finished_req_ids:
            steered[0].end(scheduler_output.finished_req_ids)
            taker.end(scheduler_output)
        if scheduler_output.scheduled_new_reqs or taker.busy:
            begin(scheduler_output)
        return original(scheduler_output, *args, **kwargs)

    def prepare_v1(original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(scheduler_output, *args, **kwargs)
        if steered[0].busy or taker.busy:
            tokens, starts = scheduler_output.total_num_scheduled_tokens, runner.query_start_loc.gpu
            batch = runner.input_batch.req_ids, starts, runner.positions, tokens, runner.input_ids.gpu
            if steered[0].busy:
                steered[0].step(*batch)
            taker.step(*batch)
        return result

    def finish_requests(original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        steered[0].end(scheduler_output.finished_req_ids)
        steered[0].end(scheduler_output.preempted_req_ids or ())
        taker.end(scheduler_output)
        return original(scheduler_output, *args, **kwargs)

    def add_requests(original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        begin(scheduler_output)
        return original(scheduler_output, *args, **kwargs)

    def prepare_v2(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        batch = made.req_ids, made.query_start_loc, made.positions, made.num_tokens, made.input_ids
        if steered[0].busy:
            steered[0].step(*batch)
        taker.step(*batch)
        return made

    def sample_tokens(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        taken = steered[0].take() if steered[0].busy else None
        if taker.busy:
            taker.take()
        return result if taken is None else read_seams.with_scores(result, taken)

    def execute_model(original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(original).bind(scheduler_output, *args, **kwargs)
        given = call.arguments.get("intermediate_tensors")
        if given is not None and steered[0].travels:
            parts = {name: part for name, part in given.tensors.items() if name in TRAVELLING}
            steered[0].receive(parts)
            rest = {name: part for name, part in given.tensors.items() if name not in parts}
            call.arguments["intermediate_tensors"] = resolve(STREAM)(rest)
        result = original(*call.args, **call.kwargs)
        if isinstance(result, resolve(STREAM)) and steered[0].busy and steered[0].travels:
            return resolve(STREAM)({**result.tensors, **steered[0].hand_on()})
        return result

    added: dict[str, Callable[..., Any]] = {"sample_tokens": sample_tokens}
    if config.parallel_config.pipeline_parallel_size > 1:
        added["execute_model"] = execute_model
    if first_generation:
        added |= {"_update_states": update_states, "_prepare_inputs": prepare_v1}
    else:
        added |= {"finish_requests": finish_requests, "add_requests": add_requests, "prepare_inputs": prepare_v2}
    for name, addition in added.items():
        setattr(runner, name, functools.partial(addition, getattr(runner, name)))
    worker.load_model = functools.partial(load_model, worker.load_model)


def _logger() -> Any:
    from vllm.logger import init_logger

    return init_logger("vllm.steerfast")
