"""Steering and reading inside vLLM, as a plugin that vLLM itself loads: compile, CUDA graphs and continuous batching stay on.

    STEERFAST_PLANS=plans vllm serve MODEL

serves every plan of the folder `plans` (each a folder written by `plan.save`) to requests that name it:

    SamplingParams(extra_args={"steer": ["polite"], "steer_strength": [1.5], "steer_positions": "generated"})
    {"vllm_xargs": {"steer": ["polite", "terse"], "steer_strength": [1.5, 0.5]}, ...}

    STEERFAST_PROBES=probes vllm serve MODEL

lets requests read the probes of the folder `probes` (each a folder written by `probe.save`), and end where one crosses a limit:

    {"vllm_xargs": {"steer_read": ["toxic"], "steer_abort": "toxic>0.9"}, ...}

Each request of a batch has its own plans, strengths and positions. What cannot be followed is refused with the reason:
HTTP 400, or a ValueError. `docs/vllm.md` says the rest. Importing this module imports nothing of vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Put steering into this process's vLLM; vLLM calls it in each of its processes (entry point vllm.general_plugins).

    Raises:
        RuntimeError: a vLLM that lacks what steering builds on, or that neither we nor `steerfast check` have tested.
    """
    from . import counters, roster, seams

    counters.share()
    roster.begin()
    seams.patch()
