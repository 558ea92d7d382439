"""Conditions: interventions that act only where a probe's score is on one side of a threshold (conditional steering).

`When` decides once per request, at its last prompt token, and holds that decision for every token from there on;
`WhenToken` decides for every token anew. A condition reads the stream as it arrives at its place, before the edits
there unless its probe says `after`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steerfast._checks import (
    Directions,
    check_stream,
    direction_rows,
    finite_number,
    flag,
    one_of,
    set_field,
    whole_number,
)
from steerfast.ops.slots import Slot
from steerfast.place import Origin, Place
from steerfast.probes.given import as_probe
from steerfast.probes.probe import Probe
from steerfast.probes.rows import SIMILARITIES, SimilarityProbe

from .base import Intervention, Program, intervention_type, row_strengths
from .fitted import ConditionInfo


@dataclass(frozen=True, eq=False, init=False)
class Condition:
    """Whether a row's score is above a threshold, or below it; neither side holds exactly at θ.

    The score is what a probe reads: of a direction the similarity to it (`SimilarityProbe`), or the probability, the feature,
    the h of another probe that gives one number per row.

    Args:
        probe: What is looked at: a condition vector (d,), or m independent ones (m, d), read where the edit stands unless a
            layer is named; or a probe, read at its own place if it has one.
        threshold: θ, within the range of the probe's scores where they have one (a similarity, a probability).
        above: Act where the score is above θ; False: where it is below. A row exactly at θ is not acted on.
        similarity: Of a direction: "projection", the paper's |cos(x, proj_W x)|, between 0 and 1; "tanh", the released
            code's cos(x, tanh(WᵀWx)), between -1 and 1.
        release: Hysteresis over the tokens of a request, for `WhenToken`: once met it stays met until the score is below this
            number (above=False: above it). On the other side of θ than where it acts, or θ itself; None: none.
        info: How it was fitted: what `fit_condition` knows.

    Raises:
        TypeError, ValueError: not finite, zero or dependent rows, an unknown similarity, a probe that gives several numbers
            per row, θ or release outside the range, release on the wrong side.

    Reference:
        Lee et al. 2024, Programming Refusal with Conditional Activation Steering (arXiv:2409.05907).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Condition(torch.tensor([2.0, 0.0]), threshold=0.5)(torch.tensor([[3.0, 1.0], [0.0, 1.0]]))
        tensor([ True, False])
        >>> positive = sf.probes.LinearProbe(torch.tensor([1.0, 0.0]))
        >>> sf.Condition(positive, 2.0, release=1.0)(torch.tensor([[3.0, 0.0], [1.5, 0.0], [0.5, 0.0], [1.5, 0.0]]))
        tensor([ True,  True, False, False])
    """

    probe: Probe
    threshold: float
    above: bool
    release: float | None
    info: ConditionInfo | None

    def __init__(
        self,
        probe: Directions | Probe,
        threshold: float,
        above: bool = True,
        similarity: str | None = None,
        release: float | None = None,
        info: ConditionInfo | None = None,
    ) -> None:
        set_field(self, "probe", _probe(probe, similarity))
        set_field(self, "above", flag("Condition", "above", above))
        set_field(self, "threshold", self._score("threshold", threshold))
        set_field(self, "release", None if release is None else self._score("release", release))
        set_field(self, "info", info)
        if self.release is not None and (self.release > self.threshold if above else self.release < self.threshold):
            side = "<= threshold with above=True" if above else ">= threshold with above=False"
            raise ValueError(
                f"Condition: release is {self.release} and threshold {self.threshold}; expected release {side}"
            )

    def _score(self, name: str, value: float) -> float:
        number, (low, high) = finite_number("Condition", name, value), self.probe.bounds
        if not low <= number <= high:
            kind = f" of kind {self.probe.kind!r}" if isinstance(self.probe, SimilarityProbe) else ""
            what = f"a similarity{kind}" if kind else f"the score of a {type(self.probe).__name__}"
            raise ValueError(f"Condition: {name} is {number}; {what} lies between {low:g} and {high:g}")
        return number

    @property
    def width(self) -> int:
        """d, the width of what it reads."""
        return self.probe.width

    def __call__(self, x: Tensor) -> Tensor:
        """bool (...): which rows of x (..., d) meet the condition; a row with NaN meets none.

        With `release`, x is (..., tokens, d), and its tokens are one sequence that begins shut.
        """
        score = self.probe(x)
        return self.decide(score) if score.dim() else self.decide(score[None])[0]

    def decide(self, score: Tensor, before: Tensor | None = None, counts: Tensor | None = None) -> Tensor:
        """Which tokens meet the condition, from the scores of its probe.

        Without `release` each token decides for itself, and a NaN meets nothing; `before` and `counts` are not looked at.
        With it a request is open from the token whose score passes the threshold on, until one passes `release`; NaN changes
        nothing.

        Args:
            score: float32 (..., tokens), in the order of the tokens.
            before: bool (...), whether each request was open before these tokens; None: shut.
            counts: bool (..., tokens): which of them are tokens of the request. The others (padding) neither open nor
                close, and have the state before them. None: all are.

        Returns:
            bool (..., tokens); its last column is the `before` of the next tokens. `torch.compile` traces it.
        """
        on = score > self.threshold if self.above else score < self.threshold
        if self.release is None:
            return on
        off = score < self.release if self.above else score > self.release
        return held(on, off, before, counts)

    def tensors(self) -> dict[str, Tensor]:
        """Those of the probe."""
        return self.probe.tensors()

    def numbers(self) -> dict[str, Any]:
        """All else, ready for JSON; an SAE by its name."""
        known = {} if self.info is None else {"info": self.info.numbers()}
        rest = {"threshold": self.threshold, "above": self.above, "release": self.release}
        return {"probe": self.probe.described(), **rest, **known}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Condition:
        """The inverse of `tensors` and `numbers`, with the SAE in place of its name; everything is validated anew."""
        rest = dict(numbers)
        if "probe" not in rest:  # in a plan of schema 1 or 2
            return cls(tensors["direction"], **rest)
        probe = Probe.from_description("Plan.load", rest.pop("probe"), tensors)
        info = rest.pop("info", None)
        return cls(probe, **rest, info=None if info is None else ConditionInfo.restore(info))

    def __repr__(self) -> str:
        return f"Condition({self.words})"

    @property
    def words(self) -> str:
        """The comparison in short, such as "similarity > 0.3"."""
        score = repr(self.probe)
        if isinstance(self.probe, SimilarityProbe):
            score = "similarity" if self.probe.place is None else f"similarity at {self.probe.place}"
        held = "" if self.release is None else f" until {'<' if self.above else '>'} {self.release}"
        return f"{score} {'>' if self.above else '<'} {self.threshold}{held}"


def held(on: Tensor, off: Tensor, before: Tensor | None, counts: Tensor | None) -> Tensor:
    """A state token by token: it opens with `on`, shuts with `off`, and stays as it is with neither.

    Args:
        on: bool (..., tokens).
        off: bool (..., tokens), never where `on` is.
        before: As in `Condition.decide`.
        counts: As there.

    Returns:
        bool (..., tokens).
    """
    changes = on | off if counts is None else (on | off) & counts
    first = torch.zeros_like(on[..., :1]) if before is None else before[..., None]
    if on.shape[-1] == 1:  # decoding: nothing to look back at
        return torch.where(changes, on, first)
    # the latest change, as twice its token's number, from 1, and whether it opens
    order = 2 * torch.arange(1, on.shape[-1] + 1, device=on.device)
    latest = torch.where(changes, order + on.long(), 0).cummax(-1).values
    return torch.where(latest == 0, first, latest % 2 == 1)


@dataclass(frozen=True, eq=False, repr=False)
class When(Intervention):
    """Steer a request if its last prompt token meets a condition, from that token on.

    The decision is made once, where the prompt ends, and held for the last prompt token and every generated one; earlier
    prompt tokens, which come before the decision, are never edited. `Steering.decisions` shows what was decided.

    Args:
        condition: What to look for.
        then: The intervention, at the layer where this object stands in a plan.
        layer: Where the condition is read (resid_post): that layer or an earlier one; None: at the place of its probe, and
            without one where the intervention stands, at its site.

    Raises:
        TypeError, ValueError: not a condition and an intervention of one width, or conditions inside each other.

    Reference:
        Lee et al. 2024, Programming Refusal with Conditional Activation Steering (arXiv:2409.05907).

    Example:
        >>> import torch, steerfast as sf
        >>> refuse = sf.Add(torch.tensor([0.0, 1.0]), strength=4.0)
        >>> sf.When(sf.Condition(torch.tensor([1.0, 0.0]), 0.3), refuse, layer=7)
        When(similarity > 0.3 at layer 7, Add(vector: 2, strength=4.0, keep_norm=False))
    """

    condition: Condition
    then: Intervention
    layer: int | None = None

    per_token: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        if not isinstance(self.condition, Condition):
            raise TypeError(f"{owner}: condition must be a Condition; got {type(self.condition).__name__}")
        if not isinstance(self.then, Intervention):
            raise TypeError(f"{owner}: then must be an intervention such as Add; got {type(self.then).__name__}")
        if isinstance(self.then, When):
            raise ValueError(f"{owner}: a condition inside a condition; put both on the layer as a list instead")
        if self.then.by_token:
            raise ValueError(
                f"{owner}: {self.then!r} adds a row of its own to each of a prompt's first tokens, and a condition cannot "
                "hold it back; put it into the plan as it is"
            )
        if self.condition.release is not None and not self.per_token:
            raise ValueError(
                f"{owner}: release is {self.condition.release}, and {owner} decides once per request; use WhenToken, or leave "
                "release out"
            )
        if self.layer is not None:
            set_field(self, "layer", whole_number(owner, "layer", self.layer))
        if self.reads is None and self.condition.width != self.then.width:
            raise ValueError(
                f"{owner}: the condition has width {self.condition.width} and the intervention {self.then.width}"
            )

    @property
    def reads(self) -> Place | None:
        """Where the condition is read: at `layer`, else at the place of its probe; None: where the intervention stands."""
        return self.condition.probe.place if self.layer is None else Place("resid_post", self.layer)

    @property
    def width(self) -> int:
        """d, the width of the stream that it edits."""
        return self.then.width

    @property
    def everywhere(self) -> bool:
        """Whether the intervention is meant for any place."""
        return self.then.everywhere

    @property
    def trained(self) -> tuple[str, ...]:
        """The fields of the intervention that require a gradient."""
        return tuple(f"then.{name}" for name in self.then.trained)

    def slot(self) -> Slot:
        return self.then.slot()

    def program(self, device: torch.device) -> Program | None:
        return self.then.program(device)

    def apply(self, x: Tensor, strength: Tensor | float = 1.0, read: Tensor | None = None) -> Tensor:
        """Edit activations as in a steered model, where the condition is met; other rows are returned bit for bit.

        Args:
            x: Activations (..., tokens, d) of requests, from their last prompt token on; one request (tokens, d) too.
            strength: As in `Intervention.apply`.
            read: What the condition looks at, (..., d): the stream at the last prompt token of each request, where the
                condition is read, before the edits there.

        Returns:
            A new tensor (..., tokens, d), as `Intervention.apply` returns it.

        Raises:
            TypeError, ValueError: as `Intervention.apply`; `read` is not given, or has another shape.

        Example:
            >>> import torch, steerfast as sf
            >>> w = torch.tensor([1.0, 0.0])
            >>> edit, x = sf.When(sf.Condition(w, 0.5), sf.Add(torch.tensor([0.0, 1.0]))), torch.zeros(2, 2)
            >>> edit.apply(x, read=torch.tensor([3.0, 1.0]))
            tensor([[0., 1.],
                    [0., 1.]])
        """
        owner = f"{type(self).__name__}.apply"
        check_stream(owner, x)
        if read is None:
            raise ValueError(
                f"{owner}: one token decides for a whole request; give read=, the stream (..., d) at the last prompt token"
            )
        if x.dim() < 2:
            raise ValueError(f"{owner}: x has shape {tuple(x.shape)}; expected (..., tokens, d)")
        _check_read(owner, read, (*x.shape[:-2], self.condition.width))
        return self._apply_where(self.condition(read)[..., None].expand(x.shape[:-1]), x, strength)

    def _apply_where(self, meets: Tensor, x: Tensor, strength: Tensor | float) -> Tensor:
        """The edit of those rows of x that meet the condition, bool (...)."""
        owner = f"{type(self).__name__}.apply"
        if isinstance(strength, Tensor):
            weights = row_strengths(owner, strength, x).view(meets.shape)
        else:
            weights = x.new_tensor(finite_number(owner, "strength", strength), dtype=torch.float32)
        return self.then.apply(x, torch.where(meets.to(x.device), weights, 0))

    def tensors(self) -> dict[str, Tensor]:
        parts = {"probe.": self.condition.tensors(), "then.": self.then.tensors()}
        return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}

    def numbers(self) -> dict[str, Any]:
        return {
            "condition": self.condition.numbers(),
            "then": {"type": type(self.then).__name__, "numbers": self.then.numbers(), **self.then.known()},
            "layer": self.layer,
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> When:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        parts: dict[str, dict[str, Tensor]] = {"probe": {}, "then": {}, "": {}}
        for name, value in tensors.items():
            owner, _, leaf = name.partition(".") if "." in name else ("", "", name)
            parts[owner][leaf] = value
        given = numbers["then"]
        then = intervention_type("Plan.load", given["type"]).restore(parts["then"], given["numbers"]).with_known(given)
        return cls(Condition.restore(parts["probe"] or parts[""], numbers["condition"]), then, numbers["layer"])

    def __repr__(self) -> str:
        where = "" if self.layer is None else f" at layer {self.layer}"
        return f"{type(self).__name__}({self.condition.words}{where}, {self.then!r})"


@dataclass(frozen=True, eq=False, repr=False)
class WhenToken(When):
    """Steer each token that meets a condition, decided anew for every token.

    Args:
        condition: What to look for.
        then: The intervention, at the layer where this object stands in a plan.
        layer: Where the condition is read (resid_post): that layer or an earlier one; None: at the place of its probe, and
            without one where the intervention stands, at its site.

    Raises:
        TypeError, ValueError: not a condition and an intervention of one width, or conditions inside each other.

    Reference:
        Lee et al. 2024, Programming Refusal with Conditional Activation Steering (arXiv:2409.05907), token by token.

    Example:
        >>> import torch, steerfast as sf
        >>> sf.WhenToken(sf.Condition(torch.tensor([1.0, 0.0]), 0.3, above=False), sf.Ablate(torch.tensor([0.0, 1.0])))
        WhenToken(similarity < 0.3, Ablate(direction: 1×2, keep_norm=False))
    """

    per_token: ClassVar[bool] = True

    def apply(self, x: Tensor, strength: Tensor | float = 1.0, read: Tensor | None = None) -> Tensor:
        """Edit the rows that meet the condition as in a steered model; other rows are returned bit for bit.

        Args:
            x: Activations, (..., d).
            strength: As in `Intervention.apply`.
            read: What the condition looks at, row by row, of the shape of x: the stream where the condition is read, before
                the edits there. None: x itself, of a condition that is read where the intervention stands. With a
                condition's `release`, (..., tokens, d) from the first token of each request on.

        Returns:
            A new tensor (..., d), as `Intervention.apply` returns it.

        Raises:
            TypeError, ValueError: as `Intervention.apply`; `read` has another shape, or is not given although the condition
                names the place that it is read at.

        Example:
            >>> import torch, steerfast as sf
            >>> edit = sf.WhenToken(sf.Condition(torch.tensor([1.0, 0.0]), 0.5), sf.Add(torch.tensor([0.0, 1.0])))
            >>> edit.apply(torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
            tensor([[3., 1.],
                    [0., 3.]])
        """
        owner = f"{type(self).__name__}.apply"
        check_stream(owner, x)
        if read is None and self.reads is not None:
            raise ValueError(f"{owner}: the condition is read at {self.reads}; give read=, the stream there")
        read = x if read is None else read
        _check_read(owner, read, (*x.shape[:-1], self.condition.width))
        return self._apply_where(self.condition(read), x, strength)


def _probe(given: Any, similarity: str | None) -> Probe:
    """What a condition looks at: a probe as it is, a direction by its similarity, which is read nowhere yet."""
    if isinstance(given, Probe) or (
        isinstance(getattr(given, "origin", None), Origin) and not hasattr(given, "vector")
    ):
        if similarity is not None:
            raise ValueError(
                f"Condition: similarity is {similarity!r} beside {type(given).__name__}; it is for a direction: "
                "leave it out"
            )
        probe = as_probe("Condition", given)
        if not probe.single:
            raise ValueError(
                f"Condition: {probe!r} gives several numbers per row; name one, such as "
                "sf.probes.FeatureProbe(sae, 123), or a LinearProbe of one direction"
            )
        return probe
    kind = one_of("Condition", "similarity", "projection" if similarity is None else similarity, SIMILARITIES)
    direction_rows("Condition", "direction", given)
    return SimilarityProbe(given, kind).at(None)


def _check_read(owner: str, read: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(read, Tensor) or tuple(read.shape) != shape:
        got = f"shape {tuple(read.shape)}" if isinstance(read, Tensor) else f"type {type(read).__name__}"
        raise ValueError(f"{owner}: read has {got}; expected a tensor of shape {shape}, beside x")
