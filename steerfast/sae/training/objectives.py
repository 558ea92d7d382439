"""The kinds of SAE that can be trained, one object each: which latents are active, and what the loss adds to ‖x̂ - x‖².

The rest of a step is the same for all, see `steerfast.sae.training.train`. `OBJECTIVES` lists them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from steerfast._checks import finite_number, whole_numbers

from .distributed import Alone
from .selection import Encoder, Latents, above, best_of_batch, best_of_rows

_SLOWEST = 0.01  # share of a new batch in the running threshold
State = dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """A batch as an objective sees it.

    Attributes:
        encoder: Its rows as the encoder takes them, and the encoder of this process's features.
        k: Latents per row at this step.
        target: d of the rows that are reconstructed.
        rows: n, the rows of all replicas.
        split: How the training is split.
    """

    encoder: Encoder
    k: int
    target: int
    rows: int
    split: Alone

    @property
    def width(self) -> int:
        """d of the rows that are read."""
        return self.encoder.centred.shape[1]


@dataclass(frozen=True)
class Objective:
    """What a kind of SAE decides: an instance is passed as `TrainConfig.objective`.

    Attributes:
        kind: Its name on the command line and in a fingerprint.
    """

    kind: str = field(default="", init=False)

    def weights(self, batch: Batch) -> State:
        """Parameters of its own, trained by Adam, (F,) each; from the first rows, the same in every replica."""
        return {}

    def buffers(self, device: torch.device) -> State:
        """State that is not trained, the same in every process."""
        return {}

    def select(self, batch: Batch, state: State) -> Latents:
        """The active latents; with value 0 those that only `shape` looks at."""
        raise NotImplementedError

    def ends(self, features: int) -> tuple[int, ...]:
        """Where the prefixes end that each have to reconstruct the row; the last one is all features."""
        return (features,)

    def shape(self, batch: Batch, latents: Latents, pull: Tensor, state: State) -> State:
        """Gradients of its own parameters. `pull` is ∂‖x̂ - x‖²/∂f of each latent, (m,)."""
        return {}

    def selection(self, k: int, state: State, features: int, scale: float) -> dict[str, Any]:
        """k or threshold of the finished SAE, for activations in units of the rows, `scale` times those of training."""
        raise NotImplementedError


@dataclass(frozen=True)
class TopK(Objective):
    """The k largest positive pre-activations of each row.

    Reference:
        Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093).

    Example:
        >>> sf.sae.TrainConfig(features=512, k=8, tokens=100_000).objective.kind
        'topk'
    """

    kind: str = field(default="topk", init=False)

    def select(self, batch: Batch, state: State) -> Latents:
        """k entries a row."""
        mine = min(batch.k, len(batch.encoder.w_enc))
        found = best_of_rows(batch.encoder, mine)
        kept = batch.split.cut(found.values.view(-1, mine), batch.k).flatten()
        return Latents(found.rows, found.features, torch.where(kept, found.values, 0), found.count)

    def selection(self, k: int, state: State, features: int, scale: float) -> dict[str, Any]:
        """k."""
        return {"k": k}


@dataclass(frozen=True)
class BatchTopK(Objective):
    """The n·k largest positive pre-activations of a batch of n rows: k a row on average.

    The finished SAE has one threshold, the running mean of the least active latent of a batch.

    Reference:
        Bussmann, Leask and Nanda 2024, BatchTopK sparse autoencoders (arXiv:2412.06410).
    """

    kind: str = field(default="batchtopk", init=False)

    def buffers(self, device: torch.device) -> State:
        """The running mean, and of how many batches it is."""
        return {"least": torch.zeros(2, dtype=torch.float64, device=device)}

    def select(self, batch: Batch, state: State) -> Latents:
        """The best of the batch; the running threshold moves."""
        found, least = best_of_batch(batch.encoder, batch.rows * batch.k, batch.split)
        if least:
            mean = state["least"]
            mean[1] += 1
            mean[0] += max(1 / float(mean[1]), _SLOWEST) * (least - float(mean[0]))
        return found

    def selection(self, k: int, state: State, features: int, scale: float) -> dict[str, Any]:
        """The threshold."""
        return {
            "threshold": torch.full((features,), float(state["least"][0]) * scale, device="cpu", dtype=torch.float32)
        }


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """BatchTopK whose first features reconstruct by themselves: Σ over prefixes m of ‖x̂_m - x‖².

    Args:
        prefixes: How many features each prefix has, ascending; all features are always the last one. The default, (), stands for
            1/16, 1/8, 1/4 and 1/2 of the features.

    Raises:
        TypeError, ValueError: the numbers are not whole, or not ascending from 1.

    Reference:
        Bussmann et al. 2025, Learning multi-level features with Matryoshka sparse autoencoders (arXiv:2503.17547).
    """

    prefixes: tuple[int, ...] = ()
    kind: str = field(default="matryoshka", init=False)

    def __post_init__(self) -> None:
        found = tuple(whole_numbers("Matryoshka", "prefixes", self.prefixes, 0)) if len(self.prefixes) else ()
        if list(found) != sorted(set(found)) or (found and found[0] < 1):
            raise ValueError(f"Matryoshka: prefixes are {found}; expected ascending numbers of features, from 1")
        object.__setattr__(self, "prefixes", found)

    def ends(self, features: int) -> tuple[int, ...]:
        """The prefixes and all features.

        Raises:
            ValueError: a prefix has all the features, or more.
        """
        if self.prefixes and self.prefixes[-1] >= features:
            raise ValueError(f"Matryoshka: a prefix has {self.prefixes[-1]} of {features} features; expected fewer")
        parts = self.prefixes or tuple(
            part for part in (features // 16, features // 8, features // 4, features // 2) if part
        )
        return (*sorted(set(parts)), features)


@dataclass(frozen=True)
class JumpReLU(Objective):
    """f = h·[h > θ] with a trained θ per feature; a penalty holds the mean number of active latents at k.

        loss = ‖x̂ - x‖² + λ·d·(L0/k - 1)²,  ∂f/∂θ ≈ -(θ/ε)·[|h - θ| < ε/2],  ∂[h > θ]/∂θ ≈ -(1/ε)·[|h - θ| < ε/2]

    with L0 the mean over the batch and d the width of x̂. θ is trained by its logarithm, and begins where the first
    rows have k active latents.

    Args:
        sparsity: λ, in units of the rows' variance.
        bandwidth: ε, in units of the rows' typical length.

    Raises:
        TypeError, ValueError: a number is not finite, or not positive.

    Reference:
        Rajamanoharan et al. 2024, Jumping ahead (arXiv:2407.14435), with the loss of its appendix for a desired sparsity.
    """

    sparsity: float = 1.0
    bandwidth: float = 0.001
    kind: str = field(default="jumprelu", init=False)

    def __post_init__(self) -> None:
        for name in ("sparsity", "bandwidth"):
            object.__setattr__(self, name, number := finite_number("JumpReLU", name, getattr(self, name)))
            if number <= 0:
                raise ValueError(f"JumpReLU: {name} is {number}; expected > 0")

    def weights(self, batch: Batch) -> State:
        """log θ, the same for all features at first."""
        split, count = batch.split, batch.rows * batch.k
        values = best_of_batch(batch.encoder, count, Alone())[0].values
        first = max(float(split.largest(values, count * split.replicas)), self._width(batch))
        return {"log_threshold": torch.full_like(batch.encoder.b_enc, first).log_()}

    def select(self, batch: Batch, state: State) -> Latents:
        """Those above θ, and with value 0 those whose θ could move below them."""
        theta = state["log_threshold"].exp()
        found = above(batch.encoder, (theta - self._width(batch) / 2).clamp(min=0))
        active = found.values > theta[found.features]
        return Latents(found.rows, found.features, torch.where(active, found.values, 0), found.count)

    def shape(self, batch: Batch, latents: Latents, pull: Tensor, state: State) -> State:
        """∂loss/∂log θ by the straight-through estimator."""
        width, theta = self._width(batch), state["log_threshold"].exp()
        here = theta[latents.features]
        h = torch.where(latents.values > 0, latents.values, here)  # the others are in the window: `select` looked
        near = (h - here).abs() < width / 2
        active = batch.split.sum_over_data(batch.split.sum_over_features((latents.values > 0).sum()))
        share = active.double() / (batch.rows * batch.k) - 1
        per_latent = 2 * self.sparsity * batch.target * share / batch.k / batch.rows
        moved = torch.where(near, -(here * pull + per_latent) / width, 0)
        return {"log_threshold": torch.zeros_like(theta).index_add_(0, latents.features, moved) * theta}

    def selection(self, k: int, state: State, features: int, scale: float) -> dict[str, Any]:
        """θ."""
        return {"threshold": state["log_threshold"].exp() * scale}

    def _width(self, batch: Batch) -> float:
        """ε for rows of mean square 1, whose typical length is √d."""
        return self.bandwidth * sqrt(batch.width)


@dataclass(frozen=True)
class Transcode(Objective):
    """A transcoder: reads rows of one place and reconstructs those of another, with the selection of another objective.

        y ≈ W_decᵀf + b_dec (+ W_skip·x),  loss = ‖ŷ - y‖²

    Args:
        inner: Which latents are active.
        skip: Whether there is a W_skip.

    Raises:
        TypeError: inner is no other objective.

    Reference:
        Dunefsky et al. 2024 (arXiv:2406.11944); with a skip connection Paulo et al. 2025 (arXiv:2501.18823).
    """

    inner: Objective = field(default_factory=TopK)
    skip: bool = False
    kind: str = field(default="transcoder", init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Objective) or isinstance(self.inner, Transcode):
            raise TypeError(f"Transcode: inner is {self.inner!r}; expected another objective, such as TopK()")

    def weights(self, batch: Batch) -> State:
        """Those of the inner objective."""
        return self.inner.weights(batch)

    def buffers(self, device: torch.device) -> State:
        """Those of the inner objective."""
        return self.inner.buffers(device)

    def select(self, batch: Batch, state: State) -> Latents:
        """As the inner objective."""
        return self.inner.select(batch, state)

    def ends(self, features: int) -> tuple[int, ...]:
        """As the inner objective."""
        return self.inner.ends(features)

    def shape(self, batch: Batch, latents: Latents, pull: Tensor, state: State) -> State:
        """As the inner objective."""
        return self.inner.shape(batch, latents, pull, state)

    def selection(self, k: int, state: State, features: int, scale: float) -> dict[str, Any]:
        """As the inner objective."""
        return self.inner.selection(k, state, features, scale)


OBJECTIVES: tuple[Objective, ...] = (TopK(), BatchTopK(), JumpReLU(), Matryoshka(), Transcode())
