"""CPU time that an engine's steps spend in what steering and reading add: host functions and ops, apart from vLLM's own.

Everything that the plugin puts around a method of vLLM is timed without that method, the op of every place with what it costs to
call it from the graph, and an SAE's encode apart from the rest of its op. A step as a whole is timed by the clock of its thread,
which stands still while other work has the core; reading that clock takes a microsecond, as long as what is timed, so within the
step it is the processor's counter, of whose readings the few that other work comes between are far from the median. What
reading it takes is measured and subtracted, for the op in its place, where nothing is in a cache.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_now = time.perf_counter_ns
HOST, OP, ENCODE, THEIRS = "host", "op", "encode", "theirs"


class Clock:
    """Nanoseconds of each call by kind: `HOST`, `OP`, within it `ENCODE`; what a host function calls of vLLM's is not its own."""

    def __init__(self) -> None:
        self._spent: dict[str, list[int]] = {kind: [] for kind in (HOST, OP, ENCODE)}
        self.steps: list[dict[str, float]] = []
        self._bias = dict.fromkeys(self._spent, 0.0)
        self._leaves_out = False  # additions: what is left is what it takes to look at the clock around them

    def calibrate(self, idle: Callable[[], Any]) -> None:
        """Measure what looking at the clock takes in its places, in steps in which nobody steers or reads."""
        self._leaves_out = True
        idle()
        self._leaves_out = False
        steps, self.steps = self.steps[2:-1], []
        self._bias = {kind: statistics.median(step[f"{kind} a call"] for step in steps) for kind in self._spent}
        self._bias[ENCODE] = self._bias[OP]

    def timed(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, what it takes counted as this kind."""
        note = self._spent[kind].append

        @functools.wraps(call)  # whose arguments are looked at
        def run(*args: Any) -> Any:
            begun = _now()
            result = None if self._leaves_out else call(*args)
            note(_now() - begun)
            return result

        return run

    def around(self, addition: Callable[..., Any]) -> Callable[..., Any]:
        """An addition to a method, whose first argument is that method: of it the addition alone."""
        note = self._spent[HOST].append

        def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            theirs = 0

            @functools.wraps(original)  # whose arguments are looked at
            def inner(*args: Any, **kwargs: Any) -> Any:
                nonlocal theirs
                begun = _now()
                result = original(*args, **kwargs)
                theirs = _now() - begun
                return result

            if self._leaves_out:
                begun = _now()
                result = inner(*args, **kwargs)
            else:
                begun = _now()
                result = addition(inner, *args, **kwargs)
            note(_now() - begun - theirs)
            return result

        return run

    def seconds(self, kind: str) -> float:
        """What was spent on a kind, without what it takes to look at the clock."""
        return 1e-9 * (sum(self._spent[kind]) - self._bias[kind] * len(self._spent[kind]))

    def step(self, original: Callable[[], Any]) -> Callable[[], Any]:
        """An engine's step, of which it writes down what was spent on what."""

        def run() -> Any:
            for spent in self._spent.values():
                spent.clear()
            begun = time.thread_time()
            result = original()
            whole = time.thread_time() - begun
            if not self._spent[OP] and result:
                raise RuntimeError("vllm_clock: the op is called by another name")
            step = {kind: self.seconds(kind) for kind in self._spent}
            step[OP] -= step[ENCODE]
            step[THEIRS] = whole - sum(step.values())
            if self._leaves_out:
                step |= {f"{kind} a call": sum(all) / max(len(all), 1) for kind, all in self._spent.items()}
            self.steps.append(step)
            return result

        return run


def before_vllm() -> Clock:
    """A clock around all that the plugin will put around methods of classes, and around encodes."""
    from steerfast import ops
    from steerfast.vllm import capture_seams, read_seams, seams

    clock = Clock()
    for module in (seams, read_seams, capture_seams):
        wrap = module.wrap
        module.wrap = lambda owner, name, addition, wrap=wrap: wrap(owner, name, clock.around(addition))  # type: ignore[misc,attr-defined]
    ops.sae_encode = clock.timed(ENCODE, ops.sae_encode)  # type: ignore[assignment]
    return clock


def around_engine(clock: Clock, llm: Any, idle: Callable[[], Any]) -> None:
    """The same around the methods of its runner, around the op as hooks and the graph call it, and its steps told apart.

    `idle` runs a few steps in which nobody steers or reads.
    """
    from steerfast.vllm import worker_seams

    engine = llm.llm_engine
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    partials = {name: held for name, held in vars(runner).items() if isinstance(held, functools.partial)}
    added = {name: held for name, held in partials.items() if held.func.__module__ == worker_seams.__name__}
    if not added:
        raise RuntimeError("vllm_clock: nothing of the plugin stands in front of the runner's methods")
    for name, held in added.items():
        setattr(runner, name, functools.partial(clock.around(held.func), *held.args))
    packet = torch.ops.steerfast.engine_edit_
    packet.default = clock.timed(OP, packet.default)
    engine.step = clock.step(engine.step)
    clock.calibrate(idle)
