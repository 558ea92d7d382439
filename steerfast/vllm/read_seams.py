"""Where scores travel through vLLM: with what a step has sampled, with a request's outputs, and in what is answered.

| seam | what is added |
|---|---|
| worker: what `sample_tokens` returns | the rows of the step, on the `ModelRunnerOutput` itself |
| engine core: `Scheduler.update_from_output` | they go into the outputs of their requests, as `kv_transfer_params` |
| engine core: `Scheduler._update_request_with_output` | a request that has crossed a limit ends, and its new token is dropped |
| front end: `RequestState.make_request_output` | they are collected; with the last output the answer takes their place |
| front end: `RequestOutput.add` | outputs of several samples that are merged before somebody takes them keep every answer |
| API server: the generators of streams | these, one by one; the answer and an end without tokens, where a release omits them |
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import numpy as np

from .reading import Taken
from .scores import ANSWERED, CROSSED, Answer, Desk, ProbeScores, Reading
from .seam_table import ANSWER, CHAT, COMPLETION, OUTPUT, RESPONSES, SCHEDULER, STATE, STATUS, STREAMS
from .wrapping import resolve, wrap

ANSWER_FIELD = "kv_transfer_params"
"""The field of outputs and answers that both releases let through."""

Observe = Callable[[str, np.ndarray], object]
Tell = Callable[[str, int, list[ProbeScores]], object]


def patch(observe: Observe, tell: Tell) -> None:
    """Let scores through. Called in every process; a second time does nothing.

    Args:
        observe: Called where a request ends, with a probe's name and the scores that were read.
        tell: Called there with the request's name, its prompt's length in tokens, and all that it has read.
    """
    wrap(resolve(SCHEDULER), "update_from_output", _update)
    wrap(resolve(STATE), "make_request_output", partial(_make_output, (observe, tell)))
    wrap(resolve(ANSWER), "add", _merge)


def patch_streams() -> None:
    """Put the answer of each sample into streams, and the end of a request in its prompt, where a release does neither."""
    for generator, response in STREAMS.items():
        owner, _, method = generator.rpartition(".")
        wrap(resolve(owner), method, _stream_apart if ANSWER_FIELD in resolve(response).model_fields else _stream)


def unanswered(request: Any) -> str:
    """Why the answer to a request over HTTP has no place for scores; "" if it has one."""
    kind = f"{type(request).__module__}:{type(request).__qualname__}"
    if kind not in (CHAT, COMPLETION, RESPONSES):
        return "the answer of this route has no place for scores; use /v1/completions or /v1/chat/completions"
    prompt = getattr(request, "prompt", None)
    if isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int):
        return f"{len(prompt)} prompts share one answer, which has a place for the scores of one; send them one by one"
    return ""


# --- worker ------------------------------------------------------------------------------------------------------------


def with_scores(result: Any, taken: Taken) -> Any:
    """What a step has sampled, with what its requests have read."""
    get = getattr(result, "get_output", None)
    if get is None:
        if result is not None and result.req_ids:  # all steps that sampled nothing share one empty output
            result.steerfast = taken.rows()
        return result

    def get_output() -> Any:
        output = get()
        output.steerfast = taken.rows()
        return output

    result.get_output = get_output  # of this one step
    return result


# --- engine core -------------------------------------------------------------------------------------------------------


def _update(
    original: Callable[..., Any], scheduler: Any, scheduler_output: Any, model_runner_output: Any, *args: Any
) -> Any:
    found = getattr(model_runner_output, "steerfast", None)
    if found is None:
        return original(scheduler, scheduler_output, model_runner_output, *args)
    desk: Desk = scheduler.steerfast_desk
    if desk.put_aside(found):
        with desk.open() as left:
            outputs = original(scheduler, scheduler_output, model_runner_output, *args)
            if left:
                _send(desk, outputs)
        return outputs
    readings: dict[str, Reading] = {}
    drafts = scheduler_output.scheduled_spec_decode_tokens
    sampled: dict[str, int] = {}  # of requests with drafts: how many tokens they have got
    for rows in found:
        name, first, scores = rows
        request = scheduler.requests.get(name)
        if request is None or request.is_finished():
            continue
        reading = readings[name] = desk.readings[name] = _reading(scheduler, request)
        # Where a step's tokens will be sampled anew, its scores are of tokens that the text will not have.
        if not (request.num_stale_output_tokens and request.drop_stale_output):
            ids = request.all_token_ids
            if name in drafts:
                # What counts of a step are its tokens before the drafts, of which the last may still be the prompt's, and of the
                # drafts one fewer than were sampled; its scores begin where something is read.
                new = _sampled(name, model_runner_output)
                taken_back = len(drafts[name]) - max(len(new) - 1, 0)
                scores, ids, sampled[name] = scores[: max(len(scores) - taken_back, 0)], [*ids, *new], len(new)
            if reading.limits:
                crossed = request.steerfast_crossed = reading.crossed(first, scores, ids, request.num_prompt_tokens)
                if crossed is not None:
                    scores = scores[: crossed[1] + 1 - first]
                    sampled.pop(name, None)
            desk.note((name, first, scores))
        if request.sampling_params.stop:
            desk.hasty.add(name)
    limited = [name for name, reading in readings.items() if reading.limits]
    if not limited and desk.hasty.isdisjoint(readings):
        desk.follow(found, {name: scheduler.requests[name] for name in readings})
    with desk.open(), _ending() if limited else nullcontext():
        outputs = original(scheduler, scheduler_output, model_runner_output, *args)
        _end_unfinished(scheduler, limited, outputs)
        _cut(desk, outputs, sampled)
        _send(desk, outputs)
    return outputs


def _cut(desk: Desk, outputs: dict[int, Any], sampled: Mapping[str, int]) -> None:
    """What stops a text may stand before the last of its accepted drafts: these leave no score."""
    if not sampled:
        return
    for sent in outputs.values():
        for output in sent.outputs:
            if (count := sampled.get(output.request_id)) is not None:
                columns = desk.readings[output.request_id].columns
                desk.cut(output.request_id, count - len(output.new_token_ids), columns)


def _send(desk: Desk, outputs: dict[int, Any]) -> None:
    """Give the outputs of requests that end, or that the front end may end, what these have read."""
    for sent in outputs.values():
        for output in sent.outputs:
            reading = desk.readings.get(output.request_id)
            if reading is None or (output.finish_reason is None and output.request_id not in desk.hasty):
                continue
            message = desk.message(output.request_id, reading)
            if message is not None:
                output.kv_transfer_params = {**(output.kv_transfer_params or {}), ANSWERED: message}


def _sampled(name: str, output: Any) -> list[int]:
    """What a step has sampled for a request: the drafts that were accepted, and one more."""
    return output.sampled_token_ids[output.req_id_to_index[name]] if output.sampled_token_ids else []


def tokens_run(request: Any) -> int:
    """How many tokens of a request that ends have run: neither drafts that its text does not have, nor its last token."""
    ran = min(request.num_computed_tokens, request.num_tokens)
    crossed = getattr(request, "steerfast_crossed", None)
    return ran if crossed or not request.num_output_tokens else min(ran, request.num_tokens - 1)


def _reading(scheduler: Any, request: Any) -> Reading:
    """What a request reads, looked up once."""
    if not hasattr(request, "steerfast_reading"):
        request.steerfast_reading = scheduler.steerfast.reading(request.sampling_params)
    return request.steerfast_reading


@contextmanager
def _ending() -> Iterator[None]:
    """A request that has crossed a limit ends with the token that crossed it: what that has produced comes after it.

    Before it come the drafts that were accepted up to there, unless one of them ends the text.

    The method is called for every request of every step; where none has limits it is vLLM's own.
    """
    owner = resolve(SCHEDULER)
    original = owner._update_request_with_output

    def end_crossed(scheduler: Any, request: Any, new_token_ids: list[int], *args: Any, **kwargs: Any) -> Any:
        crossed = getattr(request, "steerfast_crossed", None)
        if crossed is None:
            return original(scheduler, request, new_token_ids, *args, **kwargs)
        limit, position = crossed
        kept = new_token_ids[: max(position + 1 - request.num_tokens, 0)]
        if kept:
            kept, stopped = original(scheduler, request, kept, *args, **kwargs)
            if stopped:
                return kept, True
        request.status, request.stop_reason = resolve(STATUS).FINISHED_STOPPED, f"{CROSSED}{limit}"
        return kept, True

    owner._update_request_with_output = end_crossed
    try:
        yield
    finally:
        owner._update_request_with_output = original


def _end_unfinished(scheduler: Any, names: list[str], outputs: dict[int, Any]) -> None:
    """Requests that have crossed a limit before their prompt's end, where nothing is sampled yet."""
    for name in names:
        request = scheduler.requests.get(name)
        crossed = None if request is None else getattr(request, "steerfast_crossed", None)
        if request is None or crossed is None or request.is_finished():
            continue
        request.stop_reason = f"{CROSSED}{crossed[0]}"
        scheduler.finish_requests(name, resolve(STATUS).FINISHED_STOPPED)
        output = resolve(OUTPUT)(
            request_id=name,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            stop_reason=request.stop_reason,
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        if request.client_index in outputs:
            outputs[request.client_index].outputs.append(output)
        else:
            outputs[request.client_index] = resolve(f"{OUTPUT}s")(outputs=[output])


# --- front end ---------------------------------------------------------------------------------------------------------


def _make_output(
    told: tuple[Observe, Tell], original: Callable[..., Any], state: Any, *args: Any, **kwargs: Any
) -> Any:
    given = args[_CARRIED] if len(args) > _CARRIED else kwargs.get(ANSWER_FIELD)
    message: dict[str, Any] = (given or {}).get(ANSWERED) or {}
    answer: Answer | None = getattr(state, "steerfast", None)
    if not message and answer is None:
        return original(state, *args, **kwargs)
    if answer is None:
        answer = state.steerfast = Answer(message["reading"])
    answer.add(message.get("rows", ()))
    rest = {name: value for name, value in (given or {}).items() if name != ANSWERED}
    if (args[_ENDED] if len(args) > _ENDED else kwargs["finish_reason"]) is not None:
        reason = args[_WHY] if len(args) > _WHY else kwargs["stop_reason"]
        rest[ANSWERED] = _finish(told, state, answer, str(reason).startswith(CROSSED))
    if len(args) > _CARRIED:
        args = (*args[:_CARRIED], rest or None, *args[_CARRIED + 1 :])
    else:
        kwargs[ANSWER_FIELD] = rest or None
    output = original(state, *args, **kwargs)
    if ANSWERED in rest and state.parent_req is not None and output is not None:
        output.steerfast = {state.request_index: rest[ANSWERED]}
    return output


_ENDED, _WHY, _CARRIED = 2, 3, 4  # of what make_request_output takes


def _merge(original: Callable[..., None], output: Any, following: Any, *args: Any, **kwargs: Any) -> None:
    found = _answers(output) | _answers(following)
    original(output, following, *args, **kwargs)
    if found:
        output.steerfast = found
        each = [found[index] for index in sorted(found)]
        output.kv_transfer_params = {
            **(output.kv_transfer_params or {}),
            ANSWERED: each if len(each) > 1 else each[0],
        }


def _answers(output: Any) -> dict[int, Any]:
    """What those of several samples have read that end with an output."""
    return getattr(output, "steerfast", {})


def _finish(told: tuple[Observe, Tell], state: Any, answer: Answer, crossed: bool) -> Any:
    """What a request has read; of several samples that are answered together a list, one for each."""
    prompt = state.prompt_token_ids if state.prompt_token_ids is not None else [0] * state.prompt_len
    found, scores = answer.finish([*prompt, *state.detokenizer.output_token_ids], len(prompt), crossed)
    observe, tell = told
    for name, values in scores.items():
        observe(name, values)
    tell(state.external_req_id, len(prompt), answer.found)
    parent = state.parent_req
    if parent is None or state.output_kind.name != "FINAL_ONLY":
        return found
    samples = vars(parent).setdefault("steerfast", {})
    samples[state.request_index] = found
    return [samples[index] for index in sorted(samples)]


# --- API server --------------------------------------------------------------------------------------------------------


class _NoTokens(list[int]):
    """The tokens of a request that has ended before its first: 0.32 streams no reason beside what is false."""

    def __bool__(self) -> bool:
        return True


async def _apart(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """What a stream is made of, where several samples have been merged and one has ended one output for each of them."""
    async for result in results:
        output = result[1] if isinstance(result, tuple) else result
        found = _answers(output)
        if not found or len(output.outputs) < 2:
            yield result
            continue
        for sample in output.outputs:
            one = copy(output)
            one.outputs = [sample]
            one.kv_transfer_params = {ANSWERED: found[sample.index]} if sample.index in found else None
            yield (result[0], one) if isinstance(result, tuple) else one


def _through(
    see: Callable[[AsyncIterator[Any]], AsyncIterator[Any]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of which those that give results give what `see` makes of them."""

    def seen(value: Any) -> Any:
        return see(value) if hasattr(value, "__aiter__") else value

    return tuple(map(seen, args)), {name: seen(value) for name, value in kwargs.items()}


async def _stream_apart(
    original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    args, kwargs = _through(_apart, args, kwargs)
    async for line in original(serving, request, *args, **kwargs):
        yield line


async def _stream(
    original: Callable[..., Any], serving: Any, request: Any, *args: Any, **kwargs: Any
) -> AsyncIterator[str]:
    """The chunks of a stream; the first that says why it ended, once the scores are there, carries them."""
    found: list[dict[str, Any]] = []

    async def watched(results: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for result in _apart(results):
            output = result[1] if isinstance(result, tuple) else result
            if output.kv_transfer_params is not None:
                found.append(output.kv_transfer_params)
            for sample in output.outputs:
                if sample.finish_reason is not None and not sample.token_ids:
                    sample.token_ids = _NoTokens()
            yield result

    args, kwargs = _through(watched, args, kwargs)
    async for line in original(serving, request, *args, **kwargs):
        yield _with_answer(line, found) if found and '"finish_reason":"' in line else line


def _with_answer(line: str, found: list[dict[str, Any]]) -> str:
    chunk = json.loads(line.removeprefix("data: "))
    chunk[ANSWER_FIELD] = found.pop(0)
    return f"data: {json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"
