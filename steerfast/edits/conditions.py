"""Conditions: interventions that act only where the stream resembles a direction (conditional activation steering).

`When` decides once per request, at its last prompt token, and holds that decision for every token from there on;
`WhenToken` decides for every token anew. A condition reads the stream as it arrives at its layer, before the edits there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steerfast._checks import check_stream, direction_rows, finite_number, flag, one_of, whole_number
from steerfast.ops.slots import Slot
from steerfast.ops.stream import similarity

from .base import Directions, Intervention, Program, as_tensor, intervention_type, orthonormal, row_strengths, set_field

SIMILARITIES = ("projection", "tanh")


@dataclass(frozen=True, eq=False)
class Condition:
    """Whether a row resembles a direction: similarity(x, W) > θ, or < θ; neither side holds exactly at θ.

    "projection", the paper's: |cos(x, proj_W x)| = ‖Wx‖/‖x‖, between 0 and 1. "tanh", the released code's:
    cos(x, tanh(WᵀWx)), between -1 and 1; it depends on the size of x and on all of its entries.

    Args:
        direction: One condition vector (d,), or m independent ones (m, d), of any length; W is an orthonormal basis.
        threshold: θ, within the range of the similarity.
        above: Act where the similarity is above θ; False: where it is below. A row exactly at θ is not acted on.
        similarity: "projection" or "tanh".

    Raises:
        TypeError, ValueError: not finite, zero or dependent rows, θ outside the range, an unknown similarity.

    Reference:
        Lee et al. 2024, Programming Refusal with Conditional Activation Steering (arXiv:2409.05907).

    Example:
        >>> import torch, steerfast as sf
        >>> sf.Condition(torch.tensor([2.0, 0.0]), threshold=0.5)(torch.tensor([[3.0, 1.0], [0.0, 1.0]]))
        tensor([ True, False])
    """

    direction: Directions
    threshold: float
    above: bool = True
    similarity: str = "projection"

    def __post_init__(self) -> None:
        rows = direction_rows("Condition", "direction", self.direction)
        set_field(self, "direction", orthonormal("Condition", "direction", rows))
        one_of("Condition", "similarity", self.similarity, SIMILARITIES)
        flag("Condition", "above", self.above)
        set_field(self, "threshold", finite_number("Condition", "threshold", self.threshold))
        low = 0.0 if self.similarity == "projection" else -1.0
        if not low <= self.threshold <= 1.0:
            raise ValueError(
                f"Condition: threshold is {self.threshold}; a similarity of kind {self.similarity!r} lies between {low:g} and 1"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """bool (...): which rows of x (..., d) meet the condition; a row with NaN meets none."""
        found = similarity(x, as_tensor(self.direction).to(x.device), self.similarity)
        return found > self.threshold if self.above else found < self.threshold


@dataclass(frozen=True, eq=False, repr=False)
class When(Intervention):
    """Steer a request if its last prompt token meets a condition, from that token on.

    The decision is made once, where the prompt ends, and held for the last prompt token and every generated one; earlier
    prompt tokens, which come before the decision, are never edited. `Steering.decisions` shows what was decided.

    Args:
        condition: What to look for.
        then: The intervention, at the layer where this object stands in a plan.
        layer: Where the condition is read (resid_post): that layer or an earlier one; None: where the intervention
            stands, at its site.

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
        if self.layer is not None:
            set_field(self, "layer", whole_number(owner, "layer", self.layer))
        width = as_tensor(self.condition.direction).shape[-1]
        if width != self.then.width:
            raise ValueError(f"{owner}: the condition has width {width} and the intervention {self.then.width}")

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
        _check_read(owner, read, (*x.shape[:-2], x.shape[-1]))
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
        inner = {f"then.{name}": value for name, value in self.then.tensors().items()}
        return {"direction": as_tensor(self.condition.direction), **inner}

    def numbers(self) -> dict[str, Any]:
        names = ("threshold", "above", "similarity")
        return {
            "condition": {name: getattr(self.condition, name) for name in names},
            "then": {"type": type(self.then).__name__, "numbers": self.then.numbers()},
            "layer": self.layer,
        }

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], numbers: dict[str, Any]) -> When:
        """The inverse of `tensors` and `numbers`; everything is validated anew."""
        inner = {name.removeprefix("then."): value for name, value in tensors.items() if name.startswith("then.")}
        then = intervention_type("Plan.load", numbers["then"]["type"]).restore(inner, numbers["then"]["numbers"])
        return cls(Condition(tensors["direction"], **numbers["condition"]), then, numbers["layer"])

    def __repr__(self) -> str:
        side, where = ">" if self.condition.above else "<", "" if self.layer is None else f" at layer {self.layer}"
        return f"{type(self).__name__}(similarity {side} {self.condition.threshold}{where}, {self.then!r})"


@dataclass(frozen=True, eq=False, repr=False)
class WhenToken(When):
    """Steer each token that meets a condition, decided anew for every token.

    Args:
        condition: What to look for.
        then: The intervention, at the layer where this object stands in a plan.
        layer: Where the condition is read (resid_post): that layer or an earlier one; None: where the intervention
            stands, at its site.

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
                the edits there. None: x itself, of a condition that is read where the intervention stands.

        Returns:
            A new tensor (..., d), as `Intervention.apply` returns it.

        Raises:
            TypeError, ValueError: as `Intervention.apply`; `read` has another shape, or is not given although the condition
                names the layer that it is read at.

        Example:
            >>> import torch, steerfast as sf
            >>> edit = sf.WhenToken(sf.Condition(torch.tensor([1.0, 0.0]), 0.5), sf.Add(torch.tensor([0.0, 1.0])))
            >>> edit.apply(torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
            tensor([[3., 1.],
                    [0., 3.]])
        """
        owner = f"{type(self).__name__}.apply"
        check_stream(owner, x)
        if read is None and self.layer is not None:
            raise ValueError(f"{owner}: the condition is read at layer {self.layer}; give read=, the stream there")
        read = x if read is None else read
        _check_read(owner, read, tuple(x.shape))
        return self._apply_where(self.condition(read), x, strength)


def _check_read(owner: str, read: Tensor, shape: tuple[int, ...]) -> None:
    if not isinstance(read, Tensor) or tuple(read.shape) != shape:
        got = f"shape {tuple(read.shape)}" if isinstance(read, Tensor) else f"type {type(read).__name__}"
        raise ValueError(f"{owner}: read has {got}; expected a tensor of shape {shape}, beside x")
