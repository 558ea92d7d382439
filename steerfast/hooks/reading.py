"""Reading: probes look at the stream while a model runs. `read` attaches them and returns a handle beside `steer`'s.

To the passes of the model a reading is one more plan, whose edits change nothing and note what they see, so that positions,
padding, batches and caches mean what they mean in `steer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from steerfast._checks import finite_number, flag
from steerfast.plan import Plan, Positions
from steerfast.probes.given import as_probe
from steerfast.probes.probe import Probe

from .attachment import Attachment
from .controller import LOCK, Controller, controller_of
from .fixed import FixedProbe, FixedText
from .positions import Table
from .records import Recorder, Scores
from .steer import prompt_lengths


def read(
    model: nn.Module,
    probes: Mapping[str, Any] | Any,
    positions: Positions = "all",
    prompt_length: int | Sequence[int] | None = None,
    *,
    special: Any = None,
) -> Reading:
    """Read a model's stream with probes until the returned handle is removed, or for a `with` block.

    A probe sees the stream before the edits of its own place, those of all handles, unless it says `after=True`. The model
    computes what it would without it, bit for bit.

    Args:
        model: A transformers causal language model, or its decoder.
        probes: Name -> probe; or one probe, whose name is then "probe". A `Direction`, a `Barrier` or an `SAE` that knows its
            place is a probe, too.
        positions: Which tokens are read, as in `Plan`; padding never is, nor what follows the end of a row.
        prompt_length: As in `steer`.
        special: As in `Plan`.

    Returns:
        A handle: `scores()`, `handle[name]`, `criterion(...)`, `remove()`, and a context manager.

    Raises:
        TypeError, ValueError: no probe, one without a place, one that does not fit the model, or that a prepared model was not
            prepared for; nothing has been attached.
        RuntimeError: the model is already compiled and was not prepared.

    Example:
        >>> with sf.read(model, {"refusal": sf.probes.LinearProbe(v, place=14)}) as reading:  # doctest: +SKIP
        ...     model.generate(**inputs)
        >>> reading["refusal"].max()  # doctest: +SKIP
    """
    named = {
        name: as_probe("read", probe)
        for name, probe in (probes if isinstance(probes, Mapping) else {"probe": probes}).items()
    }
    _check_named(named)
    with LOCK:
        controller = controller_of(model, "read")
        plans = {after: _plan(controller, named, after, positions, special) for after in (False, True)}
        lengths = prompt_lengths(prompt_length, "read")
        given = {after: plan for after, plan in plans.items() if plan is not None}
        for plan in given.values():
            controller.check(plan, "read")
        controller.check_positions(list(given.values()), lengths)
        attachments = [
            Attachment([plan], False, [1.0], lengths, reads="after" if after else "before")
            for after, plan in given.items()
        ]
        fixed = controller.passes.fixed
        source = _Recorded(controller, attachments) if fixed is None else _Prepared(controller, fixed.text, attachments)
        return Reading(source, named)


class _Recorded:
    """What a model that is not prepared has recorded."""

    def __init__(self, controller: Controller, attachments: list[Attachment]) -> None:
        self.controller, self.attached = controller, attachments
        self._of = {
            name: (recorder, one)
            for one in attachments
            for recorder in one.recorders
            if isinstance(recorder, Recorder)
            for name in recorder.probes
        }

    def scores(self, name: str) -> Scores | None:
        """What a probe has read of the latest text; None: no text has run."""
        recorder, one = self._of[name]
        log = self.controller.passes.latest.text
        if log is None or not log.reads(recorder):
            return None
        log.settle()
        table = Table(log.prompt, [one.layer(log.prompt.batch)], log.device)
        named = (table.rows >= 0).any(2).repeat_interleave(log.batch // log.prompt.batch, 0)
        return log.scores(recorder, name, named)

    def crossed(self, name: str, threshold: float, above: bool, rows: int) -> Tensor:
        """bool (rows,): which rows of the running batch hold a token beyond a threshold."""
        log = self.controller.passes.latest.text
        if log is None or log.batch != rows:
            raise RuntimeError("read: this criterion belongs to a handle that does not read this generate")
        log.settle()
        return log.crossed(self._of[name][0], name, threshold, above)


class _Prepared:
    """What the graph of a prepared model has written into its buffers."""

    def __init__(self, controller: Controller, text: FixedText, attachments: list[Attachment]) -> None:
        self.controller, self._text = controller, text
        # generate announces its prompts while something is attached; the graph reads what it was prepared for anyway
        self.attached = [replace(one, plans=[None]) for one in attachments[:1]]
        self._of: dict[str, tuple[FixedProbe, Attachment, tuple[int, int]]] = {}
        mark = text.mark()
        for one in attachments:
            one.slots = [(0,)]
            for plan in one.plans:
                for place, chain in () if plan is None else plan.edits.items():
                    for recorder in chain:
                        probes = recorder.probes if isinstance(recorder, Recorder) else {}
                        self._of |= {
                            name: (text.find(probe, place, "read"), one, mark) for name, probe in probes.items()
                        }

    def scores(self, name: str) -> Scores | None:
        """As `_Recorded.scores`."""
        return self._text.scores(*self._of[name])

    def crossed(self, name: str, threshold: float, above: bool, rows: int) -> Tensor:
        """As `_Recorded.crossed`."""
        return self._text.crossed(*self._of[name], threshold, above)[:rows]


class Reading:
    """A removable handle of one `read` call, and a context manager."""

    def __init__(self, source: _Recorded | _Prepared, probes: dict[str, Probe]) -> None:
        self._source = source
        self.probes = probes
        self._kept: dict[str, Scores | ValueError | None] | None = None  # once it is removed
        done: list[Attachment] = []
        try:
            for one in source.attached:
                one.handle = self
                source.controller.attach(one)
                done.append(one)
        except BaseException:
            for one in done:
                source.controller.detach(one)
            raise

    def __getitem__(self, name: str) -> Scores:
        """What one probe has read of the latest text.

        Raises:
            KeyError: no probe has this name.
            RuntimeError: the model has not run since.
        """
        if name not in self.probes:
            raise KeyError(f"read: there is no probe {name!r}; there are {', '.join(self.probes)}")
        found = self._look(name) if self._kept is None else self._kept.get(name)
        if found is None:
            raise RuntimeError("read: the model has not run while this handle was there, so nothing was read")
        if isinstance(found, ValueError):
            raise found
        return found

    def _look(self, name: str) -> Scores | ValueError | None:
        try:
            return self._source.scores(name)
        except ValueError as reason:
            return reason

    def scores(self) -> dict[str, Scores]:
        """What each probe has read of the latest text: all rows of the batch that ran last."""
        return {name: self[name] for name in self.probes}

    def criterion(self, name: str, threshold: float, above: bool = True) -> Any:
        """A stopping criterion for `generate` that ends a row when one of its tokens is scored above (or below) a threshold.

        The token that the crossing stream has produced is the row's last; `Scores.values` show where the crossing was.

        Args:
            name: A probe with one number per token.
            threshold: Where a row ends, strictly beyond it.
            above: Whether above it; False: below.

        Raises:
            KeyError, TypeError, ValueError: no such probe, several numbers per token, or a threshold that is no finite number.

        Example:
            >>> with sf.read(model, probes) as reading:  # doctest: +SKIP
            ...     model.generate(**inputs, stopping_criteria=[reading.criterion("toxic", 0.9)])
        """
        from transformers import StoppingCriteria

        if name not in self.probes:
            raise KeyError(f"read: there is no probe {name!r}; there are {', '.join(self.probes)}")
        if not self.probes[name].single:
            raise ValueError(
                f"read: {name!r} has several numbers per token; name a probe with one, such as one feature"
            )
        limit = finite_number("read", "threshold", threshold)
        flag("read", "above", above)
        source = self._source

        class Crossed(StoppingCriteria):
            """Ends a row whose probe has crossed its threshold."""

            def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
                return source.crossed(name, limit, above, input_ids.shape[0]).to(input_ids.device)

        return Crossed()

    def remove(self) -> None:
        """Detach: no hook remains, and `generate` is restored. What was read stays. Safe to call twice."""
        if self._kept is not None:
            return
        with LOCK:
            self._kept = {}
            try:
                self._kept |= {name: self._look(name) for name in self.probes}
            finally:  # what was read may not come, as where Ctrl-C is pressed: the model is itself again
                for one in self._source.attached:
                    self._source.controller.detach(one)

    def __enter__(self) -> Reading:
        if self._kept is not None:
            raise RuntimeError("read: this handle has been removed; call read again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _check_named(probes: Mapping[str, Probe]) -> None:
    if not probes:
        raise ValueError("read: no probe is given; pass one, or a dict of name -> probe")
    for name, probe in probes.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"read: {name!r} names a probe; expected a text")
        if probe.place is None:
            raise ValueError(
                f"read: {name!r} does not say where it is read; make it with place=, a layer or (site, layer)"
            )


def _plan(
    controller: Controller, probes: Mapping[str, Probe], after: bool, positions: Positions, special: Any
) -> Plan | None:
    """The plan of a reading: a recorder at every place; None: no probe is read there."""
    places: dict[tuple[str, int], dict[str, Probe]] = {}
    for name, probe in probes.items():
        if probe.after != after or probe.place is None:
            continue
        site, layer = probe.place.site, controller.layers.resolve(probe.place.layer, "read")
        width = controller.layers.point(layer, site, "read").width
        if probe.width != width:
            raise ValueError(f"read: {name!r} has width {probe.width}; {site} {layer} of this model has {width}")
        places.setdefault((site, layer), {})[name] = probe
    if not places:
        return None
    edits = {place: Recorder(here, controller.passes) for place, here in places.items()}
    return Plan(edits, positions, special=special)
