"""Continuous batching of transformers: several requests in one row, and nothing that tells them apart."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steerfast.plan import needs_prompt

from .attachment import Attachment
from .positions import Pass

GRAPHS = (
    "steer: continuous batching records CUDA graphs, which would not follow a plan; pass "
    "continuous_batching_config=ContinuousBatchingConfig(use_cuda_graph=False), and destroy a cached manager first"
)


SHARED = (
    "steer: this manager of continuous batching was made before the model was steered, and gives a request the keys and values "
    "that another has computed for the same tokens, under whatever plan; make another while the plan is active, or pass "
    "continuous_batching_config=ContinuousBatchingConfig(allow_block_sharing=False)"
)


def pass_for_all(
    attachments: Sequence[Attachment], gated: bool, inputs: Mapping[str, Any], tokens: Tensor, last: Pass
) -> Pass:
    """A pass over (1, tokens) of all requests: everybody is steered alike. `last` is returned while nothing changes."""
    check_paged(attachments, gated)
    if any(getattr(value, "use_prefix_sharing", False) is True for value in inputs.values()):
        raise RuntimeError(SHARED)
    if tokens.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(GRAPHS)
    owners = tuple((slot, one.strengths[0]) for one in attachments for slot in one.slots[0] if one.strengths[0] != 0.0)
    return last if last.owners == owners else Pass(owners)


def check_paged(attachments: Sequence[Attachment], gated: bool) -> None:
    """Refuse what continuous batching cannot follow."""
    for one in attachments:
        if one.reads:
            raise ValueError(
                "read: continuous batching mixes requests in one row and does not say whose token is whose; use generate"
            )
        if one.per_row:
            raise ValueError(
                "steer: continuous batching mixes requests in one row and does not say whose token is whose, so a "
                "plan per row cannot be followed; give one plan for all requests, or use generate"
            )
        plan = next(p for p in one.plans if p is not None)
        if (what := needs_prompt(plan)) or plan.positions != "all":
            what = what or f"positions={plan.positions!r}"
            raise ValueError(
                f"steer: {what} needs to know where each prompt ends or which token it looks at, and "
                "continuous batching shows requests mixed; use positions='all', or generate"
            )
    if gated:
        raise ValueError(
            "steer: a condition needs to know which request a token belongs to, which continuous batching does not "
            "show; use generate"
        )


def new_manager(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], on_cuda: bool) -> Any:
    """What the model's own entry makes, whose requests share no keys and values; one that a plan could not follow is refused."""
    if cached_manager(model) is not None:
        raise RuntimeError(
            "steer: a cached manager of continuous batching keeps keys and values of requests that ran under another "
            "plan; call model.destroy_cached_continuous_batching_manager() first"
        )
    kind: Any = type(model)
    manager = kind.init_continuous_batching(model, *args, **kwargs)
    if on_cuda and _uses_graphs(manager):
        raise RuntimeError(GRAPHS)
    config = getattr(manager, "continuous_batching_config", None)
    if getattr(config, "allow_block_sharing", False):  # a strength may change, and the manager outlive the plan
        manager.continuous_batching_config = copy.copy(config)
        manager.continuous_batching_config.allow_block_sharing = False
    return manager


def cached_manager(model: nn.Module) -> Any:
    """The manager that generate_batch(persistent_manager=True) has left on a model."""
    return vars(model).get("_cached_continuous_batching_manager")


def _uses_graphs(manager: Any) -> bool:
    """Whether a manager of continuous batching may record CUDA graphs; one that has not decided yet may."""
    config = getattr(manager, "continuous_batching_config", manager)
    used = getattr(config, "use_cuda_graph", None)
    return any(used) if isinstance(used, tuple) else used is not False
