"""What probes have read: the scores of one text, token by token, in buffers on the device of the stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerfast.edits.base import Intervention, Program
from steerfast.probes.probe import Probe

from .bookkeeping import bookkeeping, is_mapped, settled
from .prompts import Prompt
from .recomputing import THREADS, backward_pass

NEVER = 1 << 62
"""The position of what has not come."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What one probe has read of the latest text.

    Attributes:
        values: float32 (batch, tokens), or (batch, tokens, m) of a probe with m numbers per token; NaN where nothing was read.
        read: bool (batch, tokens): which tokens were read. Padding never is, nor what follows the end of a row.
        names: What the m numbers are called; None: there is one, or they are the selected features of `indices`.
        indices: int32 (batch, tokens, k), the features that an SAE has selected, -1 where nothing was read; None: another probe.
        unseen: bool (batch,): rows with tokens that were to be read and ran before, into the cache that the text began with.
    """

    values: Tensor
    read: Tensor
    names: tuple[str, ...] | None = None
    indices: Tensor | None = None
    unseen: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool, device="cpu"))

    def max(self) -> Tensor:
        """Per request, the largest score of its tokens: float32 (batch,) or (batch, m); NaN where nothing was read.

        Raises:
            ValueError: a token that was to be read ran before, or the probe selects features, which differ from token to token.
        """
        read = self._whole("max")
        found = torch.where(read, self.values, -torch.inf).amax(1)
        return torch.where(read.any(1), found, torch.nan)

    def mean(self) -> Tensor:
        """Per request, the mean over its tokens, shaped and refused as `max`."""
        read = self._whole("mean")
        return torch.where(read, self.values, 0).sum(1) / read.sum(1)

    def last(self) -> Tensor:
        """Per request, the score of its last token that was read, shaped and refused as `max`; also of selected features.

        Their indices are `indices` at the same token, which `last_token` names.
        """
        self._check_seen("last")
        rows, at = torch.arange(len(self.values), device="cpu"), self.last_token()
        found = self.values[rows, at.clamp(min=0)]
        return torch.where((at >= 0).view(-1, *[1] * (found.dim() - 1)), found, torch.nan)

    def last_token(self) -> Tensor:
        """int64 (batch,): the position of each row's last token that was read, -1 where nothing was."""
        if not self.read.shape[1]:
            return torch.full((len(self.read),), -1, dtype=torch.int64, device="cpu")
        return torch.where(self.read, torch.arange(self.read.shape[1], device="cpu"), -1).amax(1)

    def _whole(self, name: str) -> Tensor:
        self._check_seen(name)
        if self.indices is not None:
            raise ValueError(
                f"Scores.{name}: the probe selects other features for every token; read those of interest by FeatureProbe"
            )
        return self.read.view(*self.read.shape, *[1] * (self.values.dim() - 2))

    def _check_seen(self, name: str) -> None:
        if bool(self.unseen.any()):
            raise ValueError(
                f"Scores.{name}: tokens of rows {self.unseen.nonzero().flatten().tolist()} that were to be read lie in the cache "
                "that the text began with, and ran before: run the prompt while reading, or read positions='generated'"
            )


@dataclass(frozen=True, eq=False, repr=False)
class Recorder(Intervention, listed=False):
    """The probes of one handle at one place: an edit that changes nothing and notes what it sees.

    Attributes:
        probes: By the name that the user gave.
        passes: Of the model.
    """

    probes: Mapping[str, Probe] = field(default_factory=dict)
    passes: Any = None

    @property
    def width(self) -> int:
        """d, the width of the stream that it reads."""
        return next(iter(self.probes.values())).width

    def program(self, device: torch.device) -> Program:
        """What runs in the place of an edit."""
        programs = {name: probe.program(device) for name, probe in self.probes.items()}

        def run(x: Tensor, scale: Tensor | float) -> Tensor:
            if backward_pass() != THREADS.own.task:  # a part of a pass runs again, and was read the first time
                return x
            if is_mapped(x):
                raise RuntimeError("read: torch.vmap maps over the stream; read a batch instead")
            call = self.passes.threads.call
            for name, program in programs.items():
                call.log.write(self, name, call.scored(self.probes[name], program, x), scale)
            return x

        return run

    def __repr__(self) -> str:
        return f"{', '.join(self.probes)} of read"


class Log:
    """What the probes of a model have read of one text.

    Args:
        prompt: Of that text.
        batch: Rows of its passes.
        device: Where the stream is.
        ends: The tokens that end a row, and the one that pads rows that have ended, as generate has announced them.
    """

    def __init__(
        self, prompt: Prompt, batch: int, device: torch.device, ends: tuple[tuple[int, ...], int | None]
    ) -> None:
        self.prompt, self.batch, self.device = prompt, batch, device
        self.reached = 0
        self.cache: Any = lambda: None  # a weak reference to what holds its keys and values
        self._since: dict[Intervention, int] = {}  # position of the first token that ran before each recorder
        self._ends = ends
        self._ids = torch.full((batch, 0), -1, dtype=torch.int64, device=device)
        self._stopped = torch.full((batch,), NEVER, dtype=torch.int64, device=device)
        self._read: dict[Recorder, Tensor] = {}
        self._found: dict[tuple[Recorder, str], tuple[Tensor, ...]] = {}
        self._start: int | Tensor = 0
        self._tokens = 0

    def follows(self, prompt: Prompt, start: int | Tensor, batch: int) -> bool:
        """Whether a pass goes on with this text."""
        goes_on = prompt.is_text_of(self.prompt) and self.batch == batch
        return goes_on and (isinstance(start, Tensor) or start > 0)

    def reads(self, recorder: Recorder) -> bool:
        """Whether a pass of this text has begun since a recorder came."""
        return recorder in self._since

    @bookkeeping
    def begin(self, start: int | Tensor, tokens: int, ids: Tensor | None, recorders: Sequence[Intervention]) -> None:
        """A pass over positions [start, start + tokens) of every row begins."""
        self._start, self._tokens = start, tokens
        if isinstance(start, Tensor) and not self.reached:
            self.reached = int(start)  # of a static cache once a text
        behind = start + tokens if isinstance(start, int) else self.reached + tokens
        self._forget(behind)  # of tokens that were taken back, as rejected drafts are
        self.reached = behind
        for recorder in recorders:
            if recorder not in self._since:
                self._since[recorder] = start if isinstance(start, int) else self.reached - tokens
        if ids is not None and ids.shape[1] == tokens:
            self._ids = self._put(self._ids, ids.to(self.device, torch.int64), -1)

    @bookkeeping
    def write(self, recorder: Recorder, name: str, found: tuple[Tensor, ...], scale: Tensor | float) -> None:
        """What a probe has found in this pass, one number or several for each of its tokens; scale 0: not to be read."""
        here = (self.batch, self._tokens)
        read = (
            scale.view(here) != 0
            if isinstance(scale, Tensor)
            else torch.ones(here, dtype=torch.bool, device=self.device)
        )
        read = read.to(self.device)
        kept = self._read.get(recorder)
        empty = torch.zeros(self.batch, 0, dtype=torch.bool, device=self.device) if kept is None else kept
        self._read[recorder] = self._put(empty, read, False)
        before = self._found.get((recorder, name))
        parts = []
        for number, part in enumerate(found):
            part = part.reshape(*here, -1).to(self.device)
            blank = -1 if number else torch.nan
            part = torch.where(read[..., None], part, blank)
            parts.append(self._put(part[:, :0] if before is None else before[number], part, blank))
        self._found[recorder, name] = tuple(parts)

    @bookkeeping
    def settle(self) -> None:
        """Forget the tokens that have been taken out of the cache behind this text since its last pass."""
        cache = self.cache()
        held = None if cache is None else cache.get_seq_length()
        if isinstance(held, int) and 0 < held < self.reached:  # 0: it was emptied for another text
            self._forget(held)
            self.reached = held

    def _forget(self, start: int) -> None:
        """Nothing is known of positions from `start` on."""
        if start >= self.reached:
            return
        self._ids[:, start:] = -1
        for read in self._read.values():
            read[:, start:] = False
        for parts in self._found.values():
            for number, part in enumerate(parts):
                part[:, start:] = -1 if number else torch.nan

    def _put(self, buffer: Tensor, part: Tensor, blank: float) -> Tensor:
        """The buffer (batch, room, …) with `part` at the positions of this pass; it grows as a text does."""
        room = buffer.shape[1]
        if room < self.reached:
            more = buffer.new_full((self.batch, max(self.reached, 2 * room, 64) - room, *buffer.shape[2:]), blank)
            buffer = torch.cat([buffer, more], 1)
        if isinstance(self._start, int):
            buffer[:, self._start : self._start + self._tokens] = part
        else:
            at = self._start.to(self.device).reshape(1) + torch.arange(self._tokens, device=self.device)
            buffer.index_copy_(1, at, part)
        return buffer

    @bookkeeping
    def scores(self, recorder: Recorder, name: str, named: Tensor) -> Scores:
        """What a probe has read.

        Args:
            recorder: Of its handle and place.
            name: Its name there.
            named: bool (batch, P + 1): which positions of each prompt, and all later ones, the handle reads.

        Raises:
            ValueError: rows may have ended, and the passes do not show where.
        """
        probe, count, starts = recorder.probes[name], self.reached, self.prompt.starts
        ids = _cut(self._ids, count, -1).cpu()
        if self.batch > 1 and self._ends[0] and starts is not None and bool((ids[:, int(starts.max()) :] < 0).any()):
            raise ValueError(
                "read: passes of this generate did not show their ids (embeddings came instead, or nobody read then), so where "
                "its rows have ended cannot be said; generate one row at a time, or with eos_token_id=None"
            )
        read = self._read.get(recorder)
        read = torch.zeros(self.batch, count, dtype=torch.bool) if read is None else _cut(read, count, False).cpu()
        read &= ~over(ids, self.prompt, self._ends, self._stopped.cpu())
        found = [_cut(part, count, 0).cpu() for part in self._found.get((recorder, name), ())]
        unseen = named[:, : self._since[recorder]].any(1)
        return scores_of(probe, found, read, unseen)

    @bookkeeping
    def crossed(self, recorder: Recorder, name: str, threshold: float, above: bool) -> Tensor:
        """bool (batch,), on the device: which rows hold a token beyond a threshold; these end here."""
        found = self._found.get((recorder, name))
        if found is None:
            return torch.zeros(self.batch, dtype=torch.bool, device=self.device)
        values = found[0][..., 0]
        rows = (values > threshold if above else values < threshold).any(1)
        self._stopped = torch.where(rows, self._stopped.clamp(max=self.reached), self._stopped)
        return rows


def scores_of(probe: Probe, parts: Sequence[Tensor], read: Tensor, unseen: Tensor) -> Scores:
    """What a probe has found, where it was read.

    Args:
        probe: Of it.
        parts: The tensors that it returns, (batch, tokens, m) each; []: it never ran.
        read: bool (batch, tokens).
        unseen: bool (batch,), as in `Scores`.
    """
    if not parts:
        width = 0 if probe.pairs else 1 if probe.single else len(probe.names or ())
        kinds = [torch.float32, torch.int32][: 1 + probe.pairs]
        parts = [torch.zeros(*read.shape, width, dtype=kind, device="cpu") for kind in kinds]
    values = torch.where(read[..., None], parts[0], torch.nan)
    indices = torch.where(read[..., None], parts[1], -1) if probe.pairs else None
    return Scores(values[..., 0] if probe.single else values, read, probe.names or None, indices, unseen)


def over(ids: Tensor, prompt: Prompt, ends: tuple[tuple[int, ...], int | None], stopped: Tensor) -> Tensor:
    """bool (batch, tokens): positions at and behind the token that has ended a row, which only its batch-mates run.

    Args:
        ids: int64 (batch, tokens) of the text.
        prompt: Of it, before its rows were repeated.
        ends: The tokens that end a row, and the one that pads rows that have ended.
        stopped: int64 (batch,): where a criterion of ours wanted a row to end, with the token at that position.
    """
    (eos, pad), starts = ends, prompt.starts
    if starts is None or not eos:  # rows are filled up only where a token can end them
        return torch.zeros_like(ids, dtype=torch.bool)
    here = torch.arange(ids.shape[1], device="cpu")
    first = starts.repeat_interleave(len(ids) // prompt.batch)[:, None]
    ended = (torch.isin(ids, torch.tensor(eos, dtype=torch.int64, device="cpu")) & (here >= first)).cumsum(1) > 0
    if pad is None or len(ids) == 1:
        return ended
    padded = ((ids == pad) & (here > first)).flip(1).cummin(1).values.flip(1)  # to the end of the row
    if pad not in eos:
        return ended | padded | torch.nn.functional.pad(padded[:, 1:], (0, 1))  # whatever has ended the row
    behind = here > stopped[:, None]
    return ended | ((here >= stopped[:, None]) & (padded | ~behind).all(1, keepdim=True))


def _cut(buffer: Tensor, count: int, blank: float) -> Tensor:
    """The first `count` positions of a buffer."""
    missing = count - buffer.shape[1]
    if missing <= 0:
        return buffer[:, :count]
    return torch.cat([buffer, buffer.new_full((buffer.shape[0], missing, *buffer.shape[2:]), blank)], 1)


class Scored:
    """What probes have found in the stream of one pass, so that whoever asks next for the same has it for nothing."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def clear(self) -> None:
        """Another pass begins."""
        self._found.clear()

    def __call__(self, probe: Probe, program: Any, x: Tensor) -> tuple[Tensor, ...]:
        """The numbers of a probe on the stream x, without a gradient; several tensors where it says what it has selected."""
        known = self._found.get(id(probe))
        if known is None or known[0] is not x:
            with torch.no_grad():
                found = program(settled(x))
            known = self._found[id(probe)] = x, found if isinstance(found, tuple) else (found,)
        return known[1]
