"""Where captures meet vLLM: what a worker does at every step, and how it learns that a request was hung up.

| seam | what is added |
|---|---|
| front end: `AsyncLLM.generate` | what only the prompt shows is refused before a stream begins |
| front end: `CoreEngineProcManager.shutdown` | an engine that stops has time to write |
| engine core: `Scheduler.schedule` | of each request that has ended how many tokens, and the last, on the `SchedulerOutput` |
| worker: the runner's own methods (`worker_seams.py`) | rows are reserved before a step, collected behind it |
| worker: `WorkerWrapperBase.shutdown` | what has ended is written |
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from steerfast._positions import EVER
from steerfast.files.claim import Claim
from steerfast.place import Place

from .capture import FOLDER, Capture, CaptureSettings
from .capturing import Captures, Ring
from .collecting import Begin, Collector, End
from .runner import Steered
from .seam_table import ENGINE, MANAGER, SCHEDULER, STATUS, WRAPPER
from .wrapping import resolve, wrap

Check = Callable[[Any, Any], object]
GRACE = 15.0
"""Seconds that an engine is given at most to write what has ended, where vLLM would kill it at once."""


def patch(check: Check) -> None:
    """Let captures through. Called in every process; a second time does nothing.

    Args:
        check: Called with what a request's prompt is and with its sampling parameters, before anything is generated.
    """

    def generate(
        original: Callable[..., Any], engine: Any, prompt: Any, sampling_params: Any, *args: Any, **more: Any
    ) -> Any:
        check(prompt, sampling_params)
        return original(engine, prompt, sampling_params, *args, **more)

    wrap(resolve(ENGINE), "generate", generate)
    wrap(resolve(MANAGER), "shutdown", _stop)
    wrap(resolve(SCHEDULER), "schedule", _schedule)
    wrap(resolve(WRAPPER), "shutdown", _shutdown)


def _stop(original: Callable[..., Any], manager: Any, timeout: float | None = None) -> Any:
    """Stop the processes of an engine. A server that lets no request end leaves them no time at all, not even to write."""
    at_once = timeout == 0 and manager._request_shutdown_timeout == 0
    return original(manager, timeout=GRACE if at_once and os.environ.get(FOLDER) else timeout)


# --- engine core -------------------------------------------------------------------------------------------------------

_ended: dict[str, tuple[int, int]] = {}
"""What has ended in this process and was not told to a worker yet: how many tokens it has, and the last of them; 0: nobody waits
for its rows."""


def note_end(request: Any) -> None:
    """A request leaves the scheduler: remember whether somebody has waited for its end.

    A stop text is found in the front end, which then aborts the request, as it does where a client hangs up.
    """
    params = request.sampling_params
    if "steer_capture" in (getattr(params, "extra_args", None) or {}):
        awaited = request.status is not resolve(STATUS).FINISHED_ABORTED or bool(params.stop)
        _ended[request.request_id] = (request.num_tokens, request.all_token_ids[-1]) if awaited else (0, -1)


def _schedule(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    output = original(scheduler, *args, **kwargs)
    if _ended:
        output.steerfast = {name: _ended.pop(name) for name in output.finished_req_ids & _ended.keys()}
    return output


# --- worker ------------------------------------------------------------------------------------------------------------


class Taker:
    """What one worker does for captures; nothing without settings.

    Args:
        settings: What the operator allows; None: nothing is captured.
        read: What a request that the front end has accepted asks for.
        count: Called with a counter's name and an amount.
        say: Called with a line for the log.
    """

    def __init__(
        self,
        settings: CaptureSettings | None,
        read: Callable[[Any], Capture | None],
        count: Callable[[str, float], object],
        say: Callable[[str], object],
    ) -> None:
        self._settings, self._read, self._count, self._say = settings, read, count, say
        self._captures: Captures | None = None
        self.busy = False
        """Whether rows may be captured in this engine."""
        self._scheduled: Any = None
        self._lock: Claim | None = None
        self.collector: Collector | None = None
        """The thread that writes; of the first worker alone, since all of them see the same stream."""

    @property
    def places(self) -> list[Place]:
        """Where a hook is needed."""
        return [] if self._settings is None else sorted({place for place, _ in self._settings.points})

    def attach(self, steered: Steered, model: Any, ranks: tuple[int, int], tokens: int) -> None:
        """The model is loaded.

        Args:
            steered: Its steering.
            model: vLLM's model.
            ranks: Of the worker in its engine, and of the engine among those of one server.
            tokens: How many tokens a batch can have, padding included.

        Raises:
            ValueError: another server writes into the folder.
        """
        self.close()
        settings = self._settings
        if settings is None:
            return
        steered.look_at(model, settings.layers, self.places)
        if ranks[0]:
            return
        settings = settings.below(f"engine{ranks[1]}") if ranks[1] else settings
        settings.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _claimed(settings.folder)
        for unfinished in settings.folder.rglob(".*.safetensors.*"):
            unfinished.unlink()  # of a server that was killed while it wrote
        points = [(f"{place.site}.{place.layer}", after) for place, after in settings.points]
        first = next(model.parameters())
        ring = Ring(settings.rows, settings.width, steered.dtype, first.device)
        self._captures = steered.places.captures = Captures(points, ring, tokens)
        self.busy = True
        self.collector = Collector(settings, points, ring, type(model).__name__, self._count, self._say)
        atexit.register(self._leave, os.getpid())

    def begin(self, scheduler_output: Any) -> None:
        """Before a step: its new requests."""
        self._scheduled = scheduler_output
        if self._captures is None or self.collector is None:
            return
        for new in scheduler_output.scheduled_new_reqs:
            capture = self._read(new.sampling_params)
            if capture is not None and new.req_id not in self._captures:  # one that was preempted may come anew
                places = [(f"{point.place.site}.{point.place.layer}", point.after) for point in capture.points]
                self._captures.start(new.req_id, places, capture.pieces(new.prompt_len))
                self.collector.put(Begin(new.req_id, capture, new.prompt_token_ids))

    def end(self, scheduler_output: Any) -> None:
        """Before a step: the requests that have ended."""
        if not self._captures or self.collector is None:
            return
        kept = getattr(scheduler_output, "steerfast", {})
        for name in scheduler_output.finished_req_ids:
            if name in self._captures:
                self._captures.end(name)
                self.collector.put(End(name, *kept.get(name, (EVER, -1))))

    def step(self, requests: Iterable[str], starts: Tensor, positions: Tensor, tokens: int, ids: Tensor) -> None:
        """A batch is about to run."""
        if self._captures is None or self.collector is None:
            return
        self._captures.begin(requests, (starts, positions, tokens, ids), self._announced(), self.collector.full)

    def take(self) -> None:
        """A batch has run."""
        step = None if self._captures is None else self._captures.take()
        if step is not None and self.collector is not None:
            self.collector.put(step)

    def close(self) -> None:
        """Write what has ended."""
        atexit.unregister(self._leave)
        if self.collector is not None:
            for name in [name for name in _ended if self._captures is not None and name in self._captures]:
                self.collector.put(End(name, *_ended.pop(name)))  # it was told to nobody: the engine has not run since
            self.collector.close()
        if self._lock is not None:
            self._lock.close()
        self._captures = self.collector = self._lock = None
        self.busy = False

    def _leave(self, process: int) -> None:
        """An engine inside a script is shut down by nobody; what was forked from that process has no part in it."""
        if os.getpid() == process:
            self.close()

    def _announced(self) -> dict[str, tuple[int, int]]:
        """Of the requests of this step that capture: their first position and their number of tokens."""
        if not self._captures:
            return {}
        output = self._scheduled
        counts, cached = output.num_scheduled_tokens, output.scheduled_cached_reqs
        firsts = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        firsts |= zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        return {name: (firsts[name], count) for name, count in counts.items() if name in self._captures}


def _shutdown(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    runner = getattr(getattr(wrapper, "worker", None), "model_runner", None)
    taker = getattr(runner, "steerfast_taker", None)
    if taker is not None:
        with _undisturbed():
            taker.close()
    return original(wrapper, *args, **kwargs)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals that end a process do not: vLLM has put its handlers down by now, and its server sends one after a Ctrl-C, too."""
    here = threading.current_thread() is threading.main_thread()
    held = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)} if here else {}
    for one in held:
        signal.signal(one, signal.SIG_IGN)
    try:
        yield
    finally:
        for one, handler in held.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)


def _claimed(folder: Any) -> Claim:
    try:
        return Claim(folder)
    except BlockingIOError:
        raise ValueError(
            f"STEERFAST_CAPTURE: {str(folder)!r} is written by another server; name a folder of its own for each"
        ) from None
