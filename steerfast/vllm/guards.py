"""What stops an engine before it steers wrongly: another vLLM than steering knows, tokens that are split or reordered."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from . import record
from .seam_table import RELEASES, RUNNERS, SEAMS, V1
from .sources import forms

_ADVICE = f"install vLLM {' or '.join(reversed(RELEASES))}, or leave steerfast out with VLLM_PLUGINS"


def check_engine(version: str, root: Path) -> None:
    """Stop beside a vLLM that has not what we build on, or that nobody has tried.

    Its sources are read, not its number: the number only says whether we have tested it ourselves.

    Args:
        version: As vLLM states it.
        root: Its folder `vllm`.

    Raises:
        RuntimeError: a seam has a form that is not known, which the message names; or the release was tested neither by us nor
            by `steerfast check` on this machine.
    """
    _, differs = forms(root)
    if differs:
        more = f" (and {len(differs) - 1} more such places)" if len(differs) > 1 else ""
        raise RuntimeError(f"steerfast: vLLM {version} {differs[0]}{more}: steering builds on that; {_ADVICE}")
    if version.partition("+")[0] not in RELEASES and not record.passed(version):
        raise RuntimeError(
            f"steerfast: vLLM {version} has all that steering builds on, but was not tested; run `steerfast check MODEL --engine "
            f"vllm` once, which tests it on this machine and remembers that it passed; or {_ADVICE}"
        )


def check_runner(runner: Any) -> bool:
    """Stop beside a model runner that is of no known generation, whatever platform it comes from.

    Returns:
        Whether it is of generation V1.

    Raises:
        RuntimeError: a method or an argument is missing; the message names it.
    """
    name = type(runner).__name__
    kinds = [kind for kind, methods in RUNNERS.items() if hasattr(runner, methods[-1])]
    if len(kinds) != 1:
        raise RuntimeError(f"steerfast: {name} is no model runner that steering knows; {_ADVICE}")
    for method in RUNNERS[kinds[0]]:
        if not hasattr(runner, method):
            raise RuntimeError(f"steerfast: {name} of this vLLM has no {method}, which steering needs; {_ADVICE}")
        taken = inspect.signature(getattr(runner, method)).parameters
        if not any(set(form.takes) <= set(taken) for form in SEAMS[f"{kinds[0]}.{method}"]):
            has = ", ".join(taken) or "nothing"
            raise RuntimeError(
                f"steerfast: {name}.{method} of this vLLM takes {has}, not what steering needs; {_ADVICE}"
            )
    if kinds[0] == V1 and not hasattr(getattr(runner, "input_ids", None), "gpu"):
        raise RuntimeError(f"steerfast: {name} of this vLLM has no input_ids.gpu; {_ADVICE}")
    return kinds[0] == V1


def overlooks_experts() -> bool:
    """Whether this vLLM's experts overlook which of them a worker has: those for CPUs read beyond their weights (vLLM 0.32)."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def check_parallelism(config: Any, *, capturing: bool = False) -> None:
    """Stop where tokens are split or reordered, which a table with one row per token cannot follow, and where it is unproven.

    Args:
        config: vLLM's.
        capturing: Whether requests may have the stream written down, whole or not at all.

    Raises:
        ValueError: capturing from a pipeline; sequence parallelism, expert parallelism on a CPU or over several engines,
            dual-batch overlap or context parallelism is on; the message names it.
    """
    parallel = config.parallel_config
    on = {
        "sequence parallelism of experts (--enable-expert-parallel with data parallelism)": parallel.use_sequence_parallel_moe,
        "sequence parallelism of hyper-connections (--enable-hc-sp)": parallel.enable_hc_sp,
        "expert parallelism with data parallelism (--enable-expert-parallel --data-parallel-size)": (
            parallel.enable_expert_parallel and parallel.data_parallel_size > 1
        ),
        "expert parallelism on a CPU (--enable-expert-parallel)": parallel.enable_expert_parallel
        and overlooks_experts(),
        "dual-batch overlap (--enable-dbo, --ubatch-size)": parallel.use_ubatching,
        "prefill context parallelism (--prefill-context-parallel-size)": parallel.prefill_context_parallel_size > 1,
        "decode context parallelism (--decode-context-parallel-size)": parallel.decode_context_parallel_size > 1,
    }
    if capturing and parallel.pipeline_parallel_size > 1:
        raise ValueError(
            "steerfast: STEERFAST_CAPTURE cannot be combined with pipeline parallelism (--pipeline-parallel-size), whose stages "
            "would each write a part of a request; leave one of them out"
        )
    for name, used in on.items():
        if used:
            raise ValueError(
                f"steerfast: {name} cannot be combined with steering; turn it off, or start without steerfast"
            )
