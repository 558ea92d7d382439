"""What steering builds on in vLLM: every seam, each form of it that is known, and the releases in which that form was seen.

A seam is a definition in vLLM's sources, written `module:Class.method`, `module:Class`, `module:function` or `module`. A release
that has another form of one is not started; its form is added here once `seams.py` follows it, too.
"""

from __future__ import annotations

from typing import NamedTuple

RELEASES = ("0.32.0", "0.33.0")
"""Releases on which steering was tested, every one of them seen in a form of every seam."""


class Form(NamedTuple):
    """One form of a definition.

    Attributes:
        takes: Arguments that we read, in their order; the first comes first, others may stand between and behind.
        names: What has to stand in it. Of a function: names that it reads, calls or passes. Of a class: its fields, methods and
            attributes. Of a module: what it defines or imports.
        seen: The releases that have this form.
        at: Where it stands, if not where the seam's name says.
    """

    takes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    seen: tuple[str, ...] = RELEASES
    at: str = ""


PROCESSOR = "vllm.v1.engine.input_processor:InputProcessor"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
OUTPUT = "vllm.v1.engine:EngineCoreOutput"
ANSWER = "vllm.outputs:RequestOutput"
STATUS = "vllm.v1.request:RequestStatus"
STATE = "vllm.v1.engine.output_processor:RequestState"
ENGINE = "vllm.v1.engine.async_llm:AsyncLLM"
MANAGER = "vllm.v1.engine.utils:CoreEngineProcManager"
WRAPPER = "vllm.v1.worker.worker_base:WorkerWrapperBase"
HASHES = "vllm.v1.core.kv_cache_utils"
POOL = "vllm.v1.core.block_pool"
KEYS = "generate_block_hash_extra_keys"
V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
STREAM = "vllm.sequence:IntermediateTensors"
_MESSAGES = "vllm.entrypoints.anthropic"

CHAT = "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest"
COMPLETION = "vllm.entrypoints.openai.completion.protocol:CompletionRequest"
RESPONSES = "vllm.entrypoints.openai.responses.protocol:ResponsesRequest"

REQUESTS = {
    CHAT: True,
    COMPLETION: True,
    RESPONSES: False,
    "vllm.entrypoints.speech_to_text.transcription.protocol:TranscriptionRequest": True,
    "vllm.entrypoints.speech_to_text.translation.protocol:TranslationRequest": True,
}
"""Every class of requests over HTTP that makes sampling parameters, and whether it also makes those of a beam search."""

BEAMS = "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin"

STREAMS = {
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.chat_completion_stream_generator": (
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionStreamResponse"
    ),
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion.completion_stream_generator": (
        "vllm.entrypoints.openai.completion.protocol:CompletionStreamResponse"
    ),
}
"""What makes the chunks of a stream, and what a chunk is; 0.33 puts `kv_transfer_params` into the last one itself."""

SERVER = "vllm.entrypoints.launchers.app"

RUNNERS = {
    V1: ("_update_states", "sample_tokens", "_dummy_run", "_prepare_inputs"),
    V2: ("finish_requests", "add_requests", "sample_tokens", "_dummy_run", "prepare_inputs"),
}
"""The methods of a runner that steering wraps; the last one tells the generations apart, whatever class a platform has."""

_IN = ("sampling_params", "prompt_token_ids", "prompt_embeds", "cache_salt")

SEAMS: dict[str, tuple[Form, ...]] = {
    # front end
    f"{PROCESSOR}.__init__": (Form(("vllm_config",)),),
    f"{PROCESSOR}.process_inputs": (
        Form(("request_id", "prompt", "params", "resumable"), ("EngineCoreRequest", *_IN)),
    ),
    "vllm.v1.engine:EngineCoreRequest": (Form(names=_IN),),
    "vllm.sampling_params:SamplingParams": (
        Form(names=("extra_args", "skip_reading_prefix_cache", "max_tokens", "n", "stop")),
    ),
    f"{STATE}.make_request_output": (
        Form(
            ("new_token_ids", "pooling_output", "finish_reason", "stop_reason", "kv_transfer_params"),
            ("finish_reason",),
        ),
    ),
    STATE: (
        Form(
            names=(
                "detokenizer",
                "output_kind",
                "parent_req",
                "prompt_len",
                "prompt_token_ids",
                "request_index",
                "external_req_id",
            ),
        ),
    ),
    OUTPUT: (
        Form(
            names=(
                "request_id",
                "new_token_ids",
                "finish_reason",
                "stop_reason",
                "events",
                "trace_headers",
                "kv_transfer_params",
            ),
        ),
    ),
    f"{ANSWER}.__init__": (Form(names=("kv_transfer_params", "outputs")),),
    f"{ANSWER}.add": (Form(("next_output",), ("kv_transfer_params",)),),
    "vllm.pooling_params:PoolingParams": (Form(names=("extra_kwargs",)),),
    "vllm.exceptions:VLLMValidationError.__init__": (Form(("message", "parameter")),),
    f"{ENGINE}.generate": (Form(("prompt", "sampling_params")),),
    MANAGER: (Form(names=("_request_shutdown_timeout",)),),
    f"{MANAGER}.shutdown": (Form(("timeout",)),),
    # API server
    **{f"{request}": (Form(names=("vllm_xargs",)),) for request in REQUESTS},
    **{f"{request}.to_sampling_params": (Form(names=("vllm_xargs", "extra_args")),) for request in REQUESTS},
    **{f"{request}.to_beam_search_params": (Form(),) for request, searches in REQUESTS.items() if searches},
    **{generator: (Form(("request", "result_generator")),) for generator in STREAMS},
    **{response: (Form(),) for response in STREAMS.values()},
    SERVER: (Form(names=("init_entrypoints_middleware",)),),
    f"{SERVER}:build_app": (Form(names=("init_entrypoints_middleware",)),),
    "vllm.entrypoints.serve.middleware.register:init_entrypoints_middleware": (Form(("args", "app")),),
    f"{_MESSAGES}.protocol:AnthropicMessagesRequest": (Form(names=("vllm_xargs",)),),
    f"{_MESSAGES}.serving:AnthropicServingMessages._build_base_request": (
        Form(names=("ChatCompletionRequest", "vllm_xargs")),
    ),
    f"{BEAMS}.beam_search": (Form(names=("llm_engine", "input_processor")),),
    # engine core
    f"{SCHEDULER}.__init__": (Form(("vllm_config",)),),
    f"{SCHEDULER}.schedule": (Form(names=("_handle_blocked_waiting_request", "finished_req_ids", "SchedulerOutput")),),
    f"{SCHEDULER}._handle_blocked_waiting_request": (Form(("request",)),),
    f"{SCHEDULER}.finish_requests": (Form(names=("_free_request",)),),
    f"{SCHEDULER}._free_request": (Form(("request",)),),
    f"{SCHEDULER}.update_from_output": (
        Form(("scheduler_output", "model_runner_output"), ("requests", "kv_transfer_params", "drop_stale_output")),
    ),
    f"{SCHEDULER}._update_request_with_output": (Form(("request", "new_token_ids"), ("stopped",)),),
    f"{HASHES}:{KEYS}": (Form(("request", "start_token_idx", "end_token_idx"), ("cache_salt",)),),
    f"{HASHES}:get_request_block_hasher": (Form(names=(KEYS,)),),
    POOL: (Form(names=(KEYS,)),),
    f"{OUTPUT}s": (Form(names=("outputs",)),),
    STATUS: (Form(names=("FINISHED_STOPPED", "FINISHED_ABORTED")),),
    "vllm.v1.outputs:ModelRunnerOutput": (Form(names=("req_ids", "req_id_to_index", "sampled_token_ids")),),
    "vllm.v1.outputs:AsyncModelRunnerOutput.get_output": (Form(),),
    "vllm.v1.request:Request": (
        Form(
            names=(
                "request_id",
                "sampling_params",
                "cache_salt",
                "all_token_ids",
                "num_computed_tokens",
                "num_prompt_tokens",
                "num_output_tokens",
                "num_tokens",
                "num_stale_output_tokens",
                "drop_stale_output",
                "skip_reading_prefix_cache",
                "is_finished",
                "get_finished_reason",
                "take_events",
                "stop_reason",
                "trace_headers",
                "client_index",
                "status",
            ),
        ),
    ),
    # worker
    WRAPPER: (Form(names=("vllm_config", "worker")),),
    f"{WRAPPER}.init_device": (Form(names=("worker",)),),
    f"{WRAPPER}.shutdown": (Form(names=("worker",)),),
    "vllm.v1.worker.gpu_worker:Worker.load_model": (Form(names=("_maybe_get_memory_pool_context", "load_model")),),
    "vllm.v1.worker.worker_base:WorkerBase.__init__": (Form(("vllm_config", "local_rank", "rank"), ("rank",)),),
    "vllm.v1.core.sched.output:SchedulerOutput": (
        Form(
            names=(
                "scheduled_new_reqs",
                "scheduled_cached_reqs",
                "num_scheduled_tokens",
                "scheduled_spec_decode_tokens",
                "finished_req_ids",
                "preempted_req_ids",
                "total_num_scheduled_tokens",
            ),
        ),
    ),
    "vllm.v1.core.sched.output:NewRequestData": (
        Form(names=("req_id", "prompt_len", "prompt_token_ids", "num_computed_tokens", "sampling_params")),
    ),
    "vllm.v1.core.sched.output:CachedRequestData": (Form(names=("req_ids", "num_computed_tokens")),),
    V1: (
        Form(
            names=(
                "device",
                "input_batch",
                "query_start_loc",
                "positions",
                "input_ids",
                "max_num_tokens",
                "model",
                "model_memory_usage",
            )
        ),
    ),
    f"{V1}.execute_model": (
        Form(("scheduler_output", "intermediate_tensors"), names=("_update_states", "_prepare_inputs")),
    ),
    f"{V1}.sample_tokens": (Form(("grammar_output",), ("ModelRunnerOutput",)),),
    f"{V1}._dummy_run": (Form(("num_tokens",)),),
    f"{V1}._update_states": (Form(("scheduler_output",)),),
    f"{V1}._prepare_inputs": (Form(("scheduler_output",), ("query_start_loc", "positions", "input_ids")),),
    "vllm.v1.worker.gpu_input_batch:InputBatch": (Form(names=("req_ids",)),),
    V2: (Form(names=("device", "max_num_tokens", "model", "model_memory_usage")),),
    f"{V2}.execute_model": (
        Form(("scheduler_output", "intermediate_tensors"), names=("finish_requests", "add_requests", "prepare_inputs")),
    ),
    f"{V2}.sample_tokens": (Form(("grammar_output",), ("ModelRunnerOutput",)),),
    f"{V2}._dummy_run": (Form(("num_tokens",)),),
    f"{V2}.finish_requests": (Form(("scheduler_output",)),),
    f"{V2}.add_requests": (Form(("scheduler_output",)),),
    f"{V2}.prepare_inputs": (Form(("scheduler_output",), ("InputBatch",)),),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        Form(names=("req_ids", "query_start_loc", "positions", "num_tokens", "input_ids")),
    ),
    STREAM: (Form(names=("tensors",)),),
    "vllm.lora.layers.base_linear:BaseLinearLayerWithLoRA": (Form(names=("base_layer",)),),
    # the model's forward, and what an engine is told
    "vllm.forward_context": (Form(names=("get_forward_context",)),),
    "vllm.forward_context:ForwardContext": (Form(names=("no_compile_layers",)),),
    "vllm.forward_context:create_forward_context": (Form(names=("no_compile_layers", "static_forward_context")),),
    "vllm.config.compilation:CompilationConfig": (
        Form(names=("static_forward_context", "max_cudagraph_capture_size")),
    ),
    "vllm.config.vllm:VllmConfig": (
        Form(
            names=(
                "additional_config",
                "model_config",
                "parallel_config",
                "scheduler_config",
                "compilation_config",
                "speculative_config",
                "kv_transfer_config",
            ),
        ),
    ),
    "vllm.config.vllm:VllmConfig.compute_hash": (Form(names=("additional_config",)),),
    "vllm.config.model:ModelConfig": (
        Form(
            names=(
                "dtype",
                "get_head_size",
                "get_hidden_size",
                "get_num_attention_heads",
                "get_total_num_hidden_layers",
                "max_model_len",
            )
        ),
    ),
    "vllm.config.speculative:SpeculativeConfig": (Form(names=("num_speculative_tokens",)),),
    "vllm.config.scheduler:SchedulerConfig": (Form(names=("max_num_batched_tokens",)),),
    "vllm.config.parallel:ParallelConfig": (
        Form(
            names=(
                "use_sequence_parallel_moe",
                "enable_expert_parallel",
                "enable_hc_sp",
                "use_ubatching",
                "prefill_context_parallel_size",
                "decode_context_parallel_size",
                "pipeline_parallel_size",
                "data_parallel_index",
            ),
        ),
    ),
}
