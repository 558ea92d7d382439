"""CPU time that an engine's steps spend in what steering and reading add: host functions and ops, apart from vLLM's own.

Everything that the plugin puts around a method of vLLM is timed without that method, the op of every place with what it costs to
call it from the graph, and an SAE's encode apart from the rest of its op. The clock is that of the thread, which stands still
while other work has the core; what reading it takes is measured first and subtracted.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

_now = time.thread_time_ns
HOST, OP, ENCODE, THEIRS = "host", "op", "encode", "theirs"


class Clock:
    """Nanoseconds by kind of what runs: `HOST`, `OP`, within it `ENCODE`, and `THEIRS`; a change of kind ends what was before."""

    def __init__(self) -> None:
        self._kinds = [THEIRS]
        self._last = _now()
        self.spent = dict.fromkeys((HOST, OP, ENCODE, THEIRS), 0.0)
        self.calls = dict.fromkeys(self.spent, 0)
        self.steps: list[dict[str, float]] = []
        addition = functools.partial(self.around(lambda original: original()), _nothing)
        self._bias = {
            HOST: statistics.median(self._taken(HOST, addition) for _ in range(200)),
            OP: statistics.median(self._taken(OP, self.timed(OP, _nothing)) for _ in range(200)),
            THEIRS: 0.0,
        }
        self._bias[ENCODE] = self._bias[OP]

    def _taken(self, kind: str, call: Callable[[], Any]) -> float:
        """What looking at the clock takes around what does nothing."""
        call()
        self.reset()
        call()
        return self.spent[kind]

    def reset(self) -> None:
        """Forget what was spent."""
        self._last = _now()
        for kind in self.spent:
            self.spent[kind], self.calls[kind] = 0.0, 0

    def _turn(self) -> None:
        now = _now()
        self.spent[self._kinds[-1]] += now - self._last
        self._last = now

    def timed(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The call, what it takes counted as this kind, but for what is of another kind within it."""

        @functools.wraps(call)  # whose arguments are looked at
        def run(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._kinds.append(kind)
            self.calls[kind] += 1
            try:
                return call(*args, **kwargs)
            finally:
                self._turn()
                self._kinds.pop()

        return run

    def around(self, addition: Callable[..., Any]) -> Callable[..., Any]:
        """An addition to a method, whose first argument is that method: of it the addition alone."""

        theirs: dict[Any, Any] = {}  # one, or one a runner

        def run(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if original not in theirs:
                theirs[original] = self.timed(THEIRS, original)
            return addition(theirs[original], *args, **kwargs)

        return self.timed(HOST, run)

    def seconds(self, kind: str) -> float:
        """What was spent on a kind, without what it takes to look at the clock."""
        return 1e-9 * (self.spent[kind] - self._bias[kind] * self.calls[kind])

    def step(self, original: Callable[[], Any]) -> Callable[[], Any]:
        """An engine's step, of which it writes down what was spent on what."""

        def run() -> Any:
            self.reset()
            result = original()
            self._turn()
            if not self.calls[OP] and result:
                raise RuntimeError("vllm_clock: the graph calls the op by another name")
            self.steps.append({kind: self.seconds(kind) for kind in self.spent})
            return result

        return run


def _nothing() -> None: ...


def before_vllm() -> Clock:
    """A clock around all that the plugin will put around methods of classes, and around encodes."""
    from steerfast import ops
    from steerfast.vllm import read_seams, seams

    clock = Clock()
    for module in (seams, read_seams):
        wrap = module.wrap
        module.wrap = lambda owner, name, addition, wrap=wrap: wrap(owner, name, clock.around(addition))  # type: ignore[misc,attr-defined]
    ops.sae_encode = clock.timed(ENCODE, ops.sae_encode)  # type: ignore[assignment]
    return clock


def around_engine(clock: Clock, llm: Any) -> None:
    """The same around the methods of its runner and around the op as its compiled graph calls it, and its steps told apart."""
    engine = llm.llm_engine
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    for name, held in list(vars(runner).items()):
        if isinstance(held, functools.partial) and held.func.__module__ == "steerfast.vllm.seams":
            setattr(runner, name, functools.partial(clock.around(held.func), *held.args))
    packet = torch.ops.steerfast.engine_edit_
    packet.default = clock.timed(OP, packet.default)
    engine.step = clock.step(engine.step)
