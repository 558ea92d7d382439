"""Training of a Top-K SAE on activations: Adam on hand-written sparse gradients, with exact resume.

    c = (x - b_dec)/s,  f = top-k of relu(W_enc c + b_enc),  ĉ = W_decᵀ f,  loss = ‖ĉ - c‖² + α·‖ê - (c - ĉ)‖²

where ê is what the best latents among the dead ones make of the error that is left (AuxK), and s makes rows of mean square 1.
Decoder rows have length 1. Only k of F latents have a gradient in a row, so none of the products behind the encoder is dense:
with one bag of rows per feature, `embedding_bag` sums Σ weight·row without an (n, k, d) tensor, in a fixed order. One step
costs the dense product c·W_encᵀ and about as much again for everything else.

Nothing is drawn at random once training runs: the order of the rows follows from seed and step, so a run that is killed and
goes on from its checkpoint gives the same bits as one that was not.

Reference: Gao et al. 2024, Scaling and evaluating sparse autoencoders (arXiv:2406.04093).
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import embedding_bag

from steerfast._checks import finite_number
from steerfast._files import replace_file

from .cache import ActivationCache, ActivationStream
from .distributed import Alone
from .model import SAE, Origin

SCHEMA = 1
_MIXED_SHARDS = 8  # read and shuffled together
_ROWS_AT_A_TIME = 1 << 24  # elements of the dense pre-activations at once: 64 MB
_SAMPLE = 1 << 13  # rows that give the scale and the first decoder bias
_MEDIAN_STEPS = 20


class Rows(Protocol):
    """What can be trained on: rows of activations in shards of known length, such as an `ActivationCache`."""

    @property
    def counts(self) -> Sequence[int]:
        """Rows of each shard."""

    def read(self, shard: int) -> Tensor:
        """The rows of one shard, (rows, d), floating."""


@dataclass(frozen=True)
class TrainConfig:
    """How an SAE is trained.

    Attributes:
        features: F.
        k: Latents per row.
        tokens: Rows seen in all; the data is repeated, in another order, as often as that takes.
        batch: Rows of a step.
        lr: Learning rate of Adam at its height.
        warmup, decay: Shares of the steps in which it rises from 0 and, at the end, falls to 0, both linearly.
        k_start: Latents per row at the beginning, falling to k linearly within the share `k_anneal` of the steps; None: k.
        k_anneal: See `k_start`.
        tied: W_enc = W_dec all along; otherwise only at the beginning.
        dead_after: Rows after which a latent that was in no top-k counts as dead.
        aux_k: Dead latents per row that work on the error that is left; 0: none.
        aux_weight: α.
        seed: Of the decoder's first rows and of the order of the data.

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

    def __post_init__(self) -> None:
        for name in ("features", "k", "tokens", "batch", "dead_after"):
            self._whole(name, 1)
        for name in ("aux_k", "seed"):
            self._whole(name, 0)
        if self.k > self.features:
            raise ValueError(f"TrainConfig: k is {self.k}; expected 1 to features = {self.features}")
        if self.k_start is not None:
            self._whole("k_start", self.k)
            if self.k_start > self.features:
                raise ValueError(f"TrainConfig: k_start is {self.k_start}; expected k to features = {self.features}")
        if self.tokens < self.batch:
            raise ValueError(f"TrainConfig: tokens is {self.tokens}; expected at least one batch, {self.batch}")
        for name in ("lr", "warmup", "decay", "k_anneal", "aux_weight"):
            if finite_number("TrainConfig", name, getattr(self, name)) < 0:
                raise ValueError(f"TrainConfig: {name} is {getattr(self, name)}; expected >= 0")
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
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"TrainConfig: {name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"TrainConfig: {name} is {value}; expected >= {least}")


@dataclass(frozen=True)
class TrainReport:
    """How training stands; passed to `progress`.

    Attributes:
        step, steps: Steps done, and in all.
        fvu: ‖x̂ - x‖² / ‖x - mean‖² over the rows since the last report.
        dead: Share of latents that were in no top-k within the last `dead_after` rows.
        tokens_per_second: Wall clock, since the last report.
    """

    step: int
    steps: int
    fvu: float
    dead: float
    tokens_per_second: float

    def __str__(self) -> str:
        return (
            f"step {self.step}/{self.steps}  FVU {self.fvu:.4f}  dead {self.dead:.1%}  "
            f"{self.tokens_per_second:.0f} tokens/s"
        )


def train_sae(
    source: Rows | Tensor,
    config: TrainConfig,
    directory: str | os.PathLike[str] | None = None,
    *,
    split: Alone | None = None,
    origin: Origin | None = None,
    checkpoint_every: int = 250,
    progress: Callable[[TrainReport], None] | None = None,
) -> SAE:
    """Train a Top-K SAE; with a directory, a run that was interrupted goes on from its last checkpoint.

        loss = ‖x̂ - x‖² + α·‖ê - (x - x̂)‖², ê from the best of the dead latents

    Args:
        source: Rows of activations: an `ActivationCache`, an `ActivationStream`, or a tensor (n, d).
        config: See `TrainConfig`.
        directory: For checkpoints, each written whole or not at all; the newest is kept. None: no checkpoints.
        split: `SplitData()` or `SplitFeatures()` when several processes train one SAE; None: one process.
        origin: Where the SAE belongs; None: what a cache or stream says.
        checkpoint_every: Steps between checkpoints and between reports.
        progress: Called with a `TrainReport` at every checkpoint.

    Returns:
        The SAE, float32, on the device of the rows; in every process.

    Raises:
        ValueError: NaN or Inf in the rows; k > F; the directory holds checkpoints of another run; training diverged.
        OSError: a checkpoint cannot be written; the one before it stays valid.

    Reference:
        Gao et al. 2024 (arXiv:2406.04093).

    Example:
        >>> import torch, steerfast as sf
        >>> x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
        >>> sf.train_sae(x, sf.TrainConfig(features=64, k=4, tokens=20_000, batch=512)).features
        64
    """
    if not isinstance(source, Tensor) and not hasattr(source, "counts"):
        raise TypeError(
            f"train_sae: source must be an ActivationCache, an ActivationStream or a tensor (n, d); got {type(source).__name__}"
        )
    data: Rows = _Whole(source) if isinstance(source, Tensor) else source
    split = split or Alone()
    if not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise ValueError(f"train_sae: checkpoint_every is {checkpoint_every!r}; expected a whole number >= 1")
    if sum(data.counts) < 2:
        raise ValueError(f"train_sae: source has {sum(data.counts)} rows; expected 2 at least")
    if origin is None:
        origin = _origin(data)
    folder = None if directory is None else Checkpoints(Path(directory), _fingerprint(config, data), split)
    trainer = Trainer(config, data, split)
    if folder is not None:
        folder.load(trainer)
    batches = stream(data, config.batch, config.seed, trainer.step)
    clock, seen = time.perf_counter(), trainer.step
    while trainer.step < config.steps:
        trainer.train_on(next(batches))
        if trainer.step % checkpoint_every and trainer.step < config.steps:
            continue
        report = trainer.report((trainer.step - seen) * config.batch / (time.perf_counter() - clock))
        if folder is not None:
            folder.save(trainer)
        if progress is not None:
            progress(report)
        clock, seen = time.perf_counter(), trainer.step
    return trainer.sae(origin)


class Trainer:
    """The state of a training run, and its step. `train_sae` drives it."""

    def __init__(self, config: TrainConfig, data: Rows, split: Alone) -> None:
        self.config, self.split, self.step = config, split, 0
        sample = _finite(data.read(0)[:_SAMPLE].float(), 0)
        d, device = sample.shape[1], sample.device
        centre = geometric_median(sample)
        self.scale = float(((sample - sample.mean(0)).square().mean()).sqrt())
        if self.scale == 0:
            raise ValueError("train_sae: all rows of the first shard are equal; there is nothing to learn")
        noise = torch.randn(config.features, d, generator=torch.Generator().manual_seed(config.seed))
        first, last = split.features(config.features)
        w = torch.nn.functional.normalize(noise[first:last], dim=1).to(device)
        self.weights = {
            "w_dec": w,
            "b_enc": torch.zeros(last - first, device=device),
            "b_dec": centre / self.scale,
        }
        if not config.tied:
            self.weights["w_enc"] = w.clone()
        self.adam = torch.optim.Adam(list(self.weights.values()), lr=config.lr, fused=True)
        for value in self.weights.values():  # made now, so that a checkpoint always holds them
            moments = {name: torch.zeros_like(value) for name in ("exp_avg", "exp_avg_sq")}
            self.adam.state[value] = {"step": torch.zeros((), device=device), **moments}
        self.silent = torch.zeros(last - first, dtype=torch.int64, device=device)  # rows since a latent was last active
        self.sums = torch.zeros(
            2, dtype=torch.float64, device=device
        )  # squared error and variance since the last report

    def train_on(self, batch: Tensor) -> None:
        """One step on a batch of rows, (n, d)."""
        config, split, weights = self.config, self.split, self.weights
        x = split.share(batch).to(weights["b_dec"].device, torch.float32) / self.scale
        w_enc = weights.get("w_enc", weights["w_dec"])
        centred = x - weights["b_dec"]
        values, indices = _top(centred, w_enc, weights["b_enc"], min(config.k_at(self.step), len(w_enc)))
        values = torch.where(split.cut(values, config.k_at(self.step)), values, 0)
        gradients, error = sparse_gradients(centred, values, indices, w_enc, weights["w_dec"], split, len(batch))
        self._count(batch, error, indices[values > 0])
        dead = (self.silent > config.dead_after).nonzero().flatten()
        if config.aux_k and config.aux_weight:
            self._revive(gradients, centred, error, dead, len(batch))
        self._descend(gradients)
        self.step += 1

    def report(self, tokens_per_second: float) -> TrainReport:
        """How training stands; the sums of the error begin anew."""
        error, variance = self.split.sum_over_data(self.sums[:1].clone()).item(), self.sums[1].item()
        if not error < float("inf"):
            raise ValueError(
                f"train_sae: the error is {error} at step {self.step}, training diverged; lower lr ({self.config.lr}) and "
                "go on from the last checkpoint, or begin anew"
            )
        self.sums.zero_()
        dead = self.split.all_features((self.silent > self.config.dead_after).float()).mean().item()
        return TrainReport(self.step, self.config.steps, error / max(variance, 1e-30), dead, tokens_per_second)

    def sae(self, origin: Origin) -> SAE:
        """The SAE on rows as they come: the scale and the subtracted b_dec folded into the biases."""
        full = {name: self.split.all_features(self.weights[name]) for name in ("w_dec", "b_enc")}
        w_enc = self.split.all_features(self.weights.get("w_enc", self.weights["w_dec"])).clone()
        b_dec = self.weights["b_dec"] * self.scale
        b_enc = (full["b_enc"].double() * self.scale - w_enc.double() @ b_dec.double()).float()
        return SAE(w_enc, full["w_dec"].clone(), b_enc, b_dec, k=self.config.k, origin=origin)

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint holds besides the step."""
        moments = {
            f"{name}.{moment}": value
            for name, weight in self.weights.items()
            for moment, value in self.adam.state[weight].items()
        }
        return {**self.weights, **moments, "silent": self.silent, "sums": self.sums}

    def restore(self, state: dict[str, Tensor], step: int, scale: float) -> None:
        """Take over what `state` returned."""
        for name, value in self.state().items():
            value.copy_(state[name])
        self.step, self.scale = step, scale

    def _count(self, batch: Tensor, error: Tensor, active: Tensor) -> None:
        """Which latents were active, and the sums of the report."""
        fired = torch.zeros_like(self.silent).index_fill_(0, active.long(), 1)
        self.split.sum_over_data(fired)
        self.silent += len(batch)
        self.silent[fired > 0] = 0
        wide = batch.to(self.sums.device, torch.float64) / self.scale
        self.sums += torch.stack([error.double().square().sum(), (wide - wide.mean(0)).square().sum()])

    def _revive(self, gradients: dict[str, Tensor], centred: Tensor, error: Tensor, dead: Tensor, rows: int) -> None:
        """Add the gradients of α·‖ê - (c - ĉ)‖² for the dead latents, with dense products over these few."""
        config, split, weights = self.config, self.split, self.weights
        total = int(split.all_features((self.silent > config.dead_after).long()).sum())
        if not total:
            return
        w_enc, w_dec = weights.get("w_enc", weights["w_dec"])[dead], weights["w_dec"][dead]
        pre = torch.addmm(weights["b_enc"][dead], centred, w_enc.T)
        k = min(config.aux_k, total)
        values, places = pre.topk(min(k, len(dead)), dim=1)
        wide = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)  # every process brings k
        chosen = split.cut(wide, k)[:, : values.shape[1]]
        latents = torch.zeros_like(pre).scatter_(1, places, torch.where(chosen, values.clamp(min=0), 0))
        rest = split.sum_over_features(latents @ w_dec).add_(error)  # ê - (c - ĉ)
        g = rest.mul_(2 * config.aux_weight / rows)
        d_pre = (g @ w_dec.T).mul_(latents > 0)
        gradients["w_dec"].index_add_(0, dead, latents.T @ g)
        gradients["w_enc"].index_add_(0, dead, d_pre.T @ centred)
        gradients["b_enc"].index_add_(0, dead, d_pre.sum(0))

    def _descend(self, gradients: dict[str, Tensor]) -> None:
        """One step of Adam, with decoder rows of length 1 before and after it."""
        weights, split = self.weights, self.split
        gradients = {name: split.sum_over_data(value) for name, value in gradients.items()}
        if "w_enc" not in weights:
            gradients["w_dec"] += gradients.pop("w_enc")
        w_dec = weights["w_dec"]
        along = torch.linalg.vecdot(gradients["w_dec"], w_dec)[:, None]
        gradients["w_dec"].addcmul_(along, w_dec, value=-1)
        for name, value in gradients.items():
            weights[name].grad = value
        self.adam.param_groups[0]["lr"] = self.config.lr_at(self.step)
        self.adam.step()
        w_dec /= torch.linalg.vector_norm(w_dec, dim=1, keepdim=True)


def sparse_gradients(
    centred: Tensor, values: Tensor, indices: Tensor, w_enc: Tensor, w_dec: Tensor, split: Alone, rows: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of Σ‖W_decᵀf - c‖²/rows by weight, and the error ĉ - c, (n, d); f = values at indices, (n, k).

    Products with the (n, F) matrix of latents are sums over bags: of k decoder rows per row of the batch, and of the batch's rows
    per latent. `b_dec` is a bias of the output and, subtracted, of the input.
    """
    features, k = len(w_enc), values.shape[1]
    with torch.enable_grad():
        leaf = values.detach().requires_grad_()
        out = embedding_bag(indices, w_dec, per_sample_weights=leaf, mode="sum")
    error = split.sum_over_features(out.detach().clone()).sub_(centred)
    g = error * (2 / rows)
    d_values = torch.where(values > 0, torch.autograd.grad(out, leaf, g)[0], 0)
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=features).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends[:-1]]).int()
    tokens = (order // k).int()

    def by_feature(weights: Tensor, of: Tensor) -> Tensor:
        return embedding_bag(tokens, of, offsets, per_sample_weights=weights.flatten()[order], mode="sum")

    b_enc = torch.zeros_like(w_enc[:, 0]).index_add_(0, flat, d_values.flatten())
    gradients = {
        "w_dec": by_feature(values, g),
        "w_enc": by_feature(d_values, centred),
        "b_enc": b_enc,
        "b_dec": g.sum(0) - split.sum_over_features(b_enc @ w_enc),
    }
    return gradients, error


def geometric_median(rows: Tensor) -> Tensor:
    """The point with the least sum of distances to the rows (Weiszfeld): outliers of enormous norm do not move it."""
    centre = rows.mean(0)
    for _ in range(_MEDIAN_STEPS):
        weight = 1 / torch.linalg.vector_norm(rows - centre, dim=1).clamp(min=1e-6)
        centre = (weight / weight.sum()) @ rows
    return centre


def stream(data: Rows, batch: int, seed: int, step: int) -> Iterator[Tensor]:
    """Batches without end, from number `step` on: the shards in random order, eight at a time read and shuffled together.

    What comes at a step depends on seed and step alone; groups before it are skipped without being read.
    """
    start, row, pieces, held = step * batch, 0, [], 0
    for epoch in count():
        dice = torch.Generator().manual_seed(1_000_003 * seed + epoch)
        for group in torch.randperm(len(data.counts), generator=dice).split(_MIXED_SHARDS):
            size = sum(data.counts[shard] for shard in group.tolist())
            order = torch.randperm(size, generator=dice)
            if row + size > start:
                rows = torch.cat([_finite(data.read(shard), shard) for shard in group.tolist()])
                order = order[max(0, start - row) :]
                for piece in order.to(rows.device).split(batch):
                    pieces.append(rows[piece])
                    held += len(piece)
                    if held >= batch:
                        joined = torch.cat(pieces)
                        yield joined[:batch]
                        pieces, held = [joined[batch:]], held - batch
            row += size


class Checkpoints:
    """The checkpoints of a run in a directory, one file per process: checkpoint-STEP-RANKofWORLD.safetensors.

    A file is renamed into place when it is whole, and the one before it is removed only when those of all processes are
    there; so at any moment one complete set of a step exists.
    """

    def __init__(self, directory: Path, fingerprint: str, split: Alone) -> None:
        self.directory, self.fingerprint, self.split = directory, fingerprint, split
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, trainer: Trainer) -> None:
        """Write the state, then remove what is older."""
        header = {
            "schema": str(SCHEMA),
            "run": self.fingerprint,
            "step": str(trainer.step),
            "scale": repr(trainer.scale),
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in trainer.state().items()}
        replace_file(self._file(trainer.step), save(tensors, header))
        self.split.wait()
        for step in self._steps():
            if step < trainer.step:
                self._file(step).unlink(missing_ok=True)

    def load(self, trainer: Trainer) -> None:
        """Bring a trainer to the last step of which every process has a file; without any, leave it.

        Raises:
            ValueError: the checkpoint is of another run, or damaged.
        """
        whole = [step for step in self._steps() if all(self._file(step, r).exists() for r in range(self.split.world))]
        self.split.wait()  # before anybody removes a file
        if not whole:
            return
        file = self._file(max(whole))
        try:
            with safe_open(file, "pt") as content:
                header = content.metadata()
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 - not a dict
        except Exception as error:
            raise ValueError(f"train_sae: {file} is damaged ({error}); remove it and begin anew") from error
        if header.get("run") != self.fingerprint:
            raise ValueError(
                f"train_sae: {self.directory} holds the checkpoint of another run ({header.get('run')}; this one is "
                f"{self.fingerprint}); choose another directory, or the same data and configuration"
            )
        trainer.restore(tensors, int(header["step"]), float(header["scale"]))

    def _file(self, step: int, rank: int | None = None) -> Path:
        rank = self.split.rank if rank is None else rank
        return self.directory / f"checkpoint-{step:08d}-{rank}of{self.split.world}.safetensors"

    def _steps(self) -> list[int]:
        mine = self.directory.glob(f"checkpoint-*-{self.split.rank}of{self.split.world}.safetensors")
        return sorted(int(file.name.split("-")[1]) for file in mine)


class _Whole:
    """A tensor of rows as a source of one shard."""

    def __init__(self, rows: Tensor) -> None:
        if rows.dim() != 2 or not rows.is_floating_point():
            raise ValueError(
                f"train_sae: source has shape {tuple(rows.shape)} and dtype {rows.dtype}; expected floating (n, d)"
            )
        self.rows, self.counts = rows, (len(rows),)

    def read(self, shard: int) -> Tensor:
        return self.rows


def _top(centred: Tensor, w_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of relu(W_enc c + b_enc), unsorted: values (n, k), int64 indices (n, k).

    A dense product, a part of the batch at a time. The k best lie in the k groups of the largest maxima; finding these first
    takes a third of the time of one topk over all.
    """
    features = len(w_enc)
    groups = next((g for g in (8, 4, 2) if features % g == 0 and features // g >= 4 * k), 1)
    values, indices = [], []
    for part in centred.split(max(1, _ROWS_AT_A_TIME // features)):
        pre = torch.addmm(b_enc, part, w_enc.T).view(len(part), groups, -1)
        if groups == 1:
            best, place = pre[:, 0].topk(k, sorted=False)
        else:
            column = pre.amax(1).topk(k, sorted=False).indices  # (n, k)
            inside = pre.gather(2, column[:, None].expand(-1, groups, -1)).flatten(1)  # (n, groups·k)
            best, place = inside.topk(k, sorted=False)
            place = place // k * (features // groups) + column.gather(1, place % k)
        values.append(best.clamp_(min=0))
        indices.append(place)
    return torch.cat(values), torch.cat(indices)


def _finite(rows: Tensor, shard: int) -> Tensor:
    if not bool(rows.isfinite().all()):
        where = int((~rows.isfinite()).any(1).nonzero()[0])
        raise ValueError(
            f"train_sae: row {where} of shard {shard} holds NaN or Inf; expected finite activations: check what made them"
        )
    return rows


def _digest(rows: Tensor) -> str:
    """A hash of 64 rows spread over all, enough to tell data sets apart."""
    some = rows[:: max(1, len(rows) // 64)][:64].detach().cpu().double().contiguous()
    return hashlib.sha256(some.numpy().tobytes()).hexdigest()


def _origin(data: Rows) -> Origin:
    if isinstance(data, (ActivationCache, ActivationStream)):
        info = data.info
        return Origin(place=(info.site, info.layer), model=info.model)
    return Origin()


def _fingerprint(config: TrainConfig, data: Rows) -> str:
    """What must be equal for a run to go on: the configuration and the data."""
    if isinstance(data, (ActivationCache, ActivationStream)):
        about = asdict(data.info)
    else:
        about = {"rows": list(data.counts), "sample": [_digest(data.read(shard)) for shard in range(len(data.counts))]}
    return json.dumps({"config": asdict(config), "data": about}, sort_keys=True)
