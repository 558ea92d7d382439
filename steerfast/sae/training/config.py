"""The settings of a training run, and its reports."""

from __future__ import annotations

from dataclasses import dataclass, field

from steerfast._checks import finite_number, seed_number, whole_number
from steerfast.place import Place

from .objectives import Objective, TopK, Transcode


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained.

    Attributes:
        features: F.
        k: Latents per row: of each (Top-K), on average (BatchTopK, Matryoshka), or aimed at (JumpReLU).
        tokens: Rows seen in all; the data is repeated, in another order, as often as that takes.
        batch: Rows of a step.
        lr: Learning rate of Adam at its height.
        warmup, decay: Shares of the steps in which it rises from 0 and, at the end, falls to 0, both linearly.
        k_start: Latents per row at the beginning, falling to k linearly within the share `k_anneal` of the steps; None: k.
        k_anneal: See `k_start`.
        tied: W_enc = W_dec all along; otherwise only at the beginning.
        dead_after: Rows after which a latent that was not active counts as dead.
        aux_k: Dead latents per row that work on the error that is left; 0: none.
        aux_weight: α.
        seed: Of the decoder's first rows and of the order of the data.
        objective: The kind of SAE: `TopK()`, `BatchTopK()`, `JumpReLU()`, `Matryoshka()` or `Transcode()`.

    Raises:
        TypeError, ValueError: a number is out of range.

    Example:
        >>> TrainConfig(features=512, k=8, tokens=100_000).steps
        49
    """

    features: int = 8192
    k: int = 32
    tokens: int = 10_000_000
    batch: int = 2048
    lr: float = 8e-4
    warmup: float = 0.02
    decay: float = 0.25
    k_start: int | None = None
    k_anneal: float = 0.1
    tied: bool = False
    dead_after: int = 250_000
    aux_k: int = 256
    aux_weight: float = 1 / 32
    seed: int = 0
    objective: Objective = field(default_factory=TopK)

    def __post_init__(self) -> None:
        if not isinstance(self.objective, Objective):
            raise TypeError(f"TrainConfig: objective is {self.objective!r}; expected one such as sf.sae.TopK()")
        if self.tied and isinstance(self.objective, Transcode):
            raise ValueError("TrainConfig: tied is set, and a transcoder reads and writes two places; leave tied away")
        for name in ("features", "k", "tokens", "batch", "dead_after"):
            self._whole(name, 1)
        self._whole("aux_k", 0)
        object.__setattr__(self, "seed", seed_number("TrainConfig", self.seed))
        if self.k > self.features:
            raise ValueError(f"TrainConfig: k is {self.k}; expected 1 to features = {self.features}")
        if self.k_start is not None:
            self._whole("k_start", self.k)
            if self.k_start > self.features:
                raise ValueError(f"TrainConfig: k_start is {self.k_start}; expected k to features = {self.features}")
        if self.tokens < self.batch:
            raise ValueError(f"TrainConfig: tokens is {self.tokens}; expected at least one batch, {self.batch}")
        for name in ("lr", "warmup", "decay", "k_anneal", "aux_weight"):
            object.__setattr__(self, name, number := finite_number("TrainConfig", name, getattr(self, name)))
            if number < 0:
                raise ValueError(f"TrainConfig: {name} is {number}; expected >= 0")
        if self.lr == 0 or self.warmup + self.decay > 1 or self.k_anneal > 1:
            raise ValueError(
                f"TrainConfig: lr {self.lr}, warmup {self.warmup}, decay {self.decay}, k_anneal {self.k_anneal}; "
                "expected lr > 0, warmup + decay <= 1 and k_anneal <= 1"
            )

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.tokens // self.batch + (self.tokens % self.batch > 0)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = (step + 1) / max(1.0, self.warmup * self.steps)
        fall = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.lr * min(1.0, rise, fall)

    def k_at(self, step: int) -> int:
        """Latents per row in a step."""
        if self.k_start is None:
            return self.k
        left = max(0.0, 1 - step / max(1.0, self.k_anneal * self.steps))
        return self.k + round(left * (self.k_start - self.k))

    def _whole(self, name: str, least: int) -> None:
        object.__setattr__(self, name, whole_number("TrainConfig", name, getattr(self, name), least))


@dataclass(frozen=True)
class TrainReport:
    """How training stands; passed to `progress`.

    Attributes:
        step, steps: Steps done, and in all.
        fvu: ‖x̂ - x‖² / ‖x - mean‖² over the rows since the last report.
        dead: Share of latents that were not active within the last `dead_after` rows.
        tokens_per_second: Wall clock, since the last report.
        place: Of which SAE, where several are trained at once.
    """

    step: int
    steps: int
    fvu: float
    dead: float
    tokens_per_second: float
    place: Place | None = None

    def __str__(self) -> str:
        where = "" if self.place is None else f"{self.place[0]} of layer {self.place[1]}  "
        return (
            f"{where}step {self.step}/{self.steps}  FVU {self.fvu:.4f}  dead {self.dead:.1%}  "
            f"{self.tokens_per_second:.0f} tokens/s"
        )
