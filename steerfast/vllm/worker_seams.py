"""Where a worker meets steering: what is added to the methods of its runner, on the instance.

V1 keeps its batch's order in `input_batch`, V2 returns it from `prepare_inputs`.

| method | what is added |
|---|---|
| the worker's `load_model` | hooks the model |
| V1 `_update_states`; V2 `finish_requests`, `add_requests` | who has come, who has gone |
| V1 `_prepare_inputs`; V2 `prepare_inputs` | writes the row table of the step |
| `sample_tokens` | what was read goes along with what was sampled |
| `_dummy_run` | empties the row table: its tokens are nobody's |
| `execute_model`, of a pipeline | what was read travels with the stream |
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import capture_seams, read_seams
from .edits import CONTEXT
from .gating import gates_read
from .guards import check_parallelism, check_runner
from .runner import TRAVELLING, Steered, allocated
from .seam_table import STREAM
from .served import Served
from .wrapping import logger, resolve


def init_device(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """`WorkerWrapperBase.init_device`: refuses what splits or reorders tokens, and follows the runner that it has built.

    Raises:
        RuntimeError: this engine cannot be steered; the message says what to do.
    """
    config = wrapper.vllm_config
    served = Served(config)
    if not (served.chains or served.loaded or served.captures):
        return original(wrapper, *args, **kwargs)
    check_parallelism(config, capturing=served.captures is not None)
    result = original(wrapper, *args, **kwargs)
    Follower(wrapper.worker, config, served).attach()
    return result


class Follower:
    """Follows one runner, step by step.

    Args:
        worker: The worker, its device ready and its model not loaded.
        config: vLLM's.
        served: What this engine knows.

    Raises:
        RuntimeError: a runner of another kind, or a compile cache that cannot be keyed.
    """

    steered: Steered  # once the model is loaded

    def __init__(self, worker: Any, config: Any, served: Served) -> None:
        self.worker, self.runner, self.config, self.served = worker, worker.model_runner, config, served
        self.first_generation = check_runner(self.runner)
        if not isinstance(config.additional_config, dict):
            raise RuntimeError(
                "steerfast: additional_config is no dict, so the compile cache cannot be keyed; leave it out"
            )
        count = served.counters.add
        self.taker = self.runner.steerfast_taker = capture_seams.Taker(
            served.captures, served.capture, lambda name, n: count(name, "", n), logger().warning
        )
        visited = {place for chains in served.chains.values() for place in chains}
        visited |= {one.place for one in served.probes.probes.values()}
        visited |= gates_read(served.chains, served.layers, served.library.entered)
        visited.update(self.taker.places)
        config.additional_config["steerfast"] = sorted(f"{site}.{layer}" for site, layer in visited)

    def attach(self) -> None:
        """Put what is added in front of the methods."""
        added: dict[str, Callable[..., Any]] = {"sample_tokens": self._sample_tokens, "_dummy_run": self._dummy_run}
        if self.config.parallel_config.pipeline_parallel_size > 1:
            added["execute_model"] = self._execute_model
        if self.first_generation:
            added |= {"_update_states": self._update_states, "_prepare_inputs": self._prepare_v1}
        else:
            added |= {
                "finish_requests": self._finish_requests,
                "add_requests": self._add_requests,
                "prepare_inputs": self._prepare_v2,
            }
        for name, addition in added.items():
            setattr(self.runner, name, functools.partial(addition, getattr(self.runner, name)))
        self.worker.load_model = functools.partial(self._load_model, self.worker.load_model)

    def _load_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)  # what is allocated behind it is not discarded in sleep mode
        config, runner, served = self.config, self.runner, self.served
        before = allocated(runner.device)
        tokens = max(runner.max_num_tokens, config.compilation_config.max_cudagraph_capture_size or 0)
        plans, probes = (served.library, served.chains), (served.probes, served.loaded)
        self.steered = runner.steerfast = Steered(runner.model, served.layers, *plans, served.slots, tokens, *probes)
        if config.speculative_config is not None:
            self.steered.expect_drafts(config.speculative_config.num_speculative_tokens)
        ranks = self.worker.rank, config.parallel_config.data_parallel_index
        self.taker.attach(self.steered, runner.model, ranks, tokens)
        config.compilation_config.static_forward_context[CONTEXT] = self.steered.places
        if more := allocated(runner.device) - before:
            runner.model_memory_usage += more  # or the cache of keys and values would take that room
        return result

    # --- who has come, who has gone

    def _begin(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            reading = self.served.reading(new.sampling_params)
            wanted = None if reading is None else reading.wanted(new.prompt_len)
            self.steered.start(new.req_id, new.prompt_len, self.served.parts(new.sampling_params), wanted)
        self.taker.begin(scheduler_output)

    def _update_states(self, original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.finished_req_ids:
            self.steered.end(scheduler_output.finished_req_ids)
            self.taker.end(scheduler_output)
        if scheduler_output.scheduled_new_reqs or self.taker.busy:
            self._begin(scheduler_output)
        return original(scheduler_output, *args, **kwargs)

    def _finish_requests(self, original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self.steered.end(scheduler_output.finished_req_ids)
        self.steered.end(scheduler_output.preempted_req_ids or ())
        self.taker.end(scheduler_output)
        return original(scheduler_output, *args, **kwargs)

    def _add_requests(self, original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        self._begin(scheduler_output)
        return original(scheduler_output, *args, **kwargs)

    # --- a step

    def _prepare_v1(self, original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(scheduler_output, *args, **kwargs)
        if self.steered.busy or self.taker.busy:
            runner, tokens = self.runner, scheduler_output.total_num_scheduled_tokens
            starts = runner.query_start_loc.gpu
            batch = runner.input_batch.req_ids, starts, runner.positions, tokens, runner.input_ids.gpu
            if self.steered.busy:
                self.steered.step(*batch)
            self.taker.step(*batch)
        return result

    def _prepare_v2(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        batch = made.req_ids, made.query_start_loc, made.positions, made.num_tokens, made.input_ids
        if self.steered.busy:
            self.steered.step(*batch)
        self.taker.step(*batch)
        return made

    def _sample_tokens(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        taken = self.steered.take() if self.steered.busy else None
        if self.taker.busy:
            self.taker.take()
        return result if taken is None else read_seams.with_scores(result, taken)

    @torch.inference_mode()
    def _dummy_run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A pass beside other engines that have work: what the last step said of its tokens is true of no other."""
        nothing = torch.empty(0, dtype=torch.int64)
        if self.steered.busy:
            self.steered.step((), nothing, nothing, 0, nothing)
        self.taker.step((), nothing, nothing, 0, nothing)
        return original(*args, **kwargs)

    def _execute_model(self, original: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        steered, stream = self.steered, resolve(STREAM)
        call = inspect.signature(original).bind(scheduler_output, *args, **kwargs)
        given = call.arguments.get("intermediate_tensors")
        if given is not None and steered.travels:
            parts = {name: part for name, part in given.tensors.items() if name in TRAVELLING}
            steered.receive(parts)
            rest = {name: part for name, part in given.tensors.items() if name not in parts}
            call.arguments["intermediate_tensors"] = stream(rest)
        result = original(*call.args, **call.kwargs)
        if isinstance(result, stream) and steered.busy and steered.travels:
            return stream({**result.tensors, **steered.hand_on()})
        return result
