"""The state of a training run, and its step on hand-written sparse gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from steerfast.place import Origin, Place
from steerfast.sae.model import SAE
from steerfast.sae.transcoder import Transcoder

from .config import TrainConfig, TrainReport
from .distributed import Alone
from .gradients import ByFeature, Pulled, blocks, pulled
from .objectives import Batch, Transcode
from .selection import Encoder, Latents

SAMPLE = 1 << 13
"""First rows, which give the scale and the first decoder bias."""
_MEDIAN_STEPS = 20
_WHOLE = ("b_dec", "w_skip")  # weights that do not belong to features


class Trainer:
    """The state of a training run, and its step. `train_sae` drives it.

    Args:
        config: See `TrainConfig`.
        sample: The first rows, float32: those that are read and, for a transcoder, those that are written.
        split: How the run is split.

    Attributes:
        weights: Parameters, those of features only for the features of this process.
        moments: exp_avg and exp_avg_sq of Adam, by parameter.
        buffers: What the objective keeps beside them.
        scales: Of what is read and what is written: a row is divided by it.
        silent: Rows since a latent was last active, int64 (F,).
    """

    def __init__(self, config: TrainConfig, sample: Sequence[Tensor], split: Alone) -> None:
        self.config, self.split, self.step = config, split, 0
        self.transcodes = isinstance(config.objective, Transcode)
        sample = [rows[:SAMPLE].float() for rows in sample]
        self.device = sample[0].device
        self.scales = tuple(_scale(rows) for rows in sample)
        centres = [geometric_median(rows) / scale for rows, scale in zip(sample, self.scales, strict=True)]
        self.ends = local_ends(config, split)
        self.weights = self._first_weights(centres)
        self.buffers = config.objective.buffers(self.device)
        if self.transcodes:
            self.buffers["centre"] = centres[0]
        self.weights |= self._own_weights(sample[0], centres[0])
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}
        self.silent = torch.zeros(len(self.weights["b_enc"]), dtype=torch.int64, device=self.device)
        # squared error and variance since the last report
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def train_on(self, *batch: Tensor) -> None:
        """One step on a replica's rows of a batch, (n, d); of a transcoder, on what was read and on what was written."""
        config, split, weights = self.config, self.split, self.weights
        rows = len(batch[0]) * split.replicas
        read, target = self._rows(batch)
        step = Batch(self._encoder(read), config.k_at(self.step), target.shape[1], rows, split)
        latents = config.objective.select(step, self.weights | self.buffers)
        found = pulled(latents, target, weights["w_dec"], self.ends, rows, split)
        self._count(target, found.error, latents, rows)
        d_pre = torch.where(latents.values > 0, found.values, 0)
        gradients = config.objective.shape(step, latents, found.values, self.weights | self.buffers)
        gradients |= self._biases(latents, found, d_pre, read)
        self._descend(gradients, latents, found, d_pre, read, self._revived(read, found.error, rows))
        self.step += 1

    def report(self, tokens_per_second: float, place: Place | None = None) -> TrainReport:
        """How training stands; the sums of the error begin anew."""
        error, variance = self.split.sum_over_data(self.sums.clone()).tolist()
        if not error < float("inf"):
            raise ValueError(
                f"train_sae: the error is {error} at step {self.step}, training diverged; lower lr ({self.config.lr}) and "
                "go on from the last checkpoint, or begin anew"
            )
        self.sums.zero_()
        dead = self.split.all_features((self.silent > self.config.dead_after).float()).mean().item()
        return TrainReport(self.step, self.config.steps, error / max(variance, 1e-30), dead, tokens_per_second, place)

    def sae(self, origin: Origin, reads: Origin | None = None) -> SAE:
        """The SAE on rows as they come: scales and what is subtracted folded into weights and biases. It ends the training: the
        moments are let go, so that the weights may be copied.
        """
        self.moments.clear()
        full = {n: w if n in _WHOLE else self.split.all_features(w) for n, w in self.weights.items()}
        read, written = self.scales[0], self.scales[-1]
        centre = self.buffers.get("centre", full["b_dec"])
        w_enc, w_dec = full.get("w_enc", full["w_dec"]), full["w_dec"].clone()
        b_enc = (written * (full["b_enc"].double() - w_enc.double() @ centre.double())).float()
        tensors: dict[str, Any] = {
            "w_enc": w_enc * (written / read),
            "w_dec": w_dec,
            "b_enc": b_enc,
            "b_dec": full["b_dec"] * written,
        }
        chosen = self.config.objective.selection(self.config.k, full | self.buffers, len(w_enc), written)
        if not self.transcodes:
            return SAE(**tensors, **chosen, origin=origin)
        if "w_skip" in full:
            skip = full["w_skip"]
            tensors["b_dec"] = (written * (full["b_dec"].double() - skip.double() @ centre.double())).float()
            tensors["w_skip"] = skip * (written / read)
        return Transcoder(**tensors, **chosen, origin=origin, reads=reads or Origin())

    def state(self) -> dict[str, Tensor]:
        """All tensors that a checkpoint holds, over the memory of this trainer."""
        found: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            average, square = self.moments[name]
            mine = {name: weight, f"{name}.exp_avg": average, f"{name}.exp_avg_sq": square}
            found |= {key: self.split.stored(value, name not in _WHOLE) for key, value in mine.items()}
        found |= {name: self.split.stored(value, False) for name, value in self.buffers.items()}
        return {**found, "silent": self.split.stored(self.silent, True)}

    def _first_weights(self, centres: Sequence[Tensor]) -> dict[str, Tensor]:
        """Decoder rows of length 1; the encoder equals them, or is as random where it reads another place."""
        config, dice = self.config, torch.Generator("cpu").manual_seed(self.config.seed)
        first, last = self.split.features(config.features)
        widths = [len(centre) for centre in centres]
        whole = [_random_rows(config.features, width, dice) for width in widths[-1 - self.transcodes :]]
        rows = [
            one.to(self.device) if self.split.world == 1 else one[first:last].clone().to(self.device) for one in whole
        ]
        weights = {
            "w_dec": rows[-1],
            "b_enc": torch.zeros(last - first, device=self.device, dtype=torch.float32),
            "b_dec": centres[-1],
        }
        if not config.tied:
            weights["w_enc"] = rows[0] if self.transcodes else rows[0].clone()
        if isinstance(config.objective, Transcode) and config.objective.skip:
            weights["w_skip"] = torch.zeros(widths[-1], widths[0], device=self.device, dtype=torch.float32)
        return weights

    def _own_weights(self, sample: Tensor, centre: Tensor) -> dict[str, Tensor]:
        """Those of the objective, from the first rows."""
        read = (sample / self.scales[0]).sub_(centre)
        target = len(self.weights["b_dec"])
        return self.config.objective.weights(
            Batch(self._encoder(read), self.config.k_at(0), target, len(read), self.split)
        )

    def _encoder(self, read: Tensor) -> Encoder:
        return Encoder(read, self.weights.get("w_enc", self.weights["w_dec"]), self.weights["b_enc"])

    def _rows(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the encoder reads and what the decoder has to make, (n, d) each."""
        dtype = self.weights["b_dec"].dtype
        shares = [part.to(self.device, dtype) for part in batch]
        scaled = [rows / scale for rows, scale in zip(shares, self.scales, strict=True)]
        target = scaled[-1].sub_(self.weights["b_dec"])
        if not self.transcodes:
            return target, target
        read = scaled[0].sub_(self.buffers["centre"])
        if "w_skip" in self.weights:
            target = target.addmm_(read, self.weights["w_skip"].T, alpha=-1)
        return read, target

    def _count(self, target: Tensor, error: Tensor, latents: Latents, rows: int) -> None:
        """Which latents were active, and the sums of the report."""
        fired = torch.zeros_like(self.silent).index_fill_(0, latents.features[latents.values > 0], 1)
        self.split.sum_over_data(fired)
        self.silent += rows
        self.silent[fired > 0] = 0
        mean = self.split.sum_over_data(target.sum(0)) / rows
        squares = torch.linalg.vector_norm(error).double().square(), (target - mean).square_().sum().double()
        self.sums += torch.stack(squares)

    def _biases(self, latents: Latents, found: Pulled, d_pre: Tensor, read: Tensor) -> dict[str, Tensor]:
        """Gradients of what is no dictionary. b_dec is a bias of the output and, subtracted, of an SAE's input."""
        b_enc = torch.zeros_like(self.weights["b_enc"]).index_add_(0, latents.features, d_pre)
        gradients = {"b_enc": b_enc, "b_dec": found.pulls[0].sum(0)}
        if not self.transcodes:
            gradients["b_dec"] -= self.split.sum_over_features(b_enc @ self._encoder(read).w_enc)
        if "w_skip" in self.weights:
            gradients["w_skip"] = found.pulls[0].T @ read
        return gradients

    def _revived(self, read: Tensor, error: Tensor, rows: int) -> dict[str, Tensor]:
        """Gradients of α·‖ê - (x - x̂)‖² for the dead latents, by dense products over these few; "dead" says which."""
        config, split = self.config, self.split
        mine = self.silent > config.dead_after
        total = int(split.all_features(mine.long()).sum()) if config.aux_k and config.aux_weight else 0
        if not total:
            return {}
        dead, encoder = mine.nonzero().flatten(), self._encoder(read)
        w_enc, w_dec = encoder.w_enc[dead], self.weights["w_dec"][dead]
        pre = torch.addmm(encoder.b_enc[dead], read, w_enc.T)
        k = min(config.aux_k, total)
        values, places = pre.topk(min(k, len(dead)), dim=1)
        wide = torch.nn.functional.pad(values, (0, k - values.shape[1]), value=-torch.inf)  # every process brings k
        chosen = split.cut(wide, k)[:, : values.shape[1]]
        latents = torch.zeros_like(pre).scatter_(1, places, torch.where(chosen, values.clamp(min=0), 0))
        g = split.sum_over_features(latents @ w_dec).add_(error).mul_(2 * config.aux_weight / rows)  # ê - (x - x̂)
        d_pre = (g @ w_dec.T).mul_(latents > 0)
        return {"dead": dead, "w_dec": latents.T @ g, "w_enc": d_pre.T @ read, "b_enc": d_pre.sum(0)}

    def _descend(
        self,
        gradients: dict[str, Tensor],
        latents: Latents,
        found: Pulled,
        d_pre: Tensor,
        read: Tensor,
        revived: dict[str, Tensor],
    ) -> None:
        """One step of Adam, with decoder rows of length 1 before and after it; a block of features at a time."""
        if revived:
            gradients["b_enc"].index_add_(0, revived["dead"], revived["b_enc"])
        sums = ByFeature(latents, len(self.silent))
        values, d_values = sums.order(latents.values), sums.order(d_pre)
        widest = max(read.shape[1], found.error.shape[1])
        for prefix, first, last in blocks(self.ends, widest):
            w_dec = sums.sums(values, found.pulls[prefix], first, last)
            w_enc = sums.sums(d_values, read, first, last)
            if revived:
                low, high = torch.searchsorted(
                    revived["dead"], torch.tensor([first, last], device=self.device)
                ).tolist()
                inside = revived["dead"][low:high] - first
                w_dec.index_add_(0, inside, revived["w_dec"][low:high])
                w_enc.index_add_(0, inside, revived["w_enc"][low:high])
            if self.config.tied:
                w_dec += w_enc
            else:
                self._adam("w_enc", w_enc, first, last)
            self._adam("w_dec", w_dec, first, last)
        for name, gradient in gradients.items():
            self._adam(name, gradient, 0, len(gradient))

    def _adam(self, name: str, gradient: Tensor, first: int, last: int) -> None:
        """One step of Adam for some rows of a weight."""
        gradient = self.split.sum_over_data(gradient)
        weight, (average, square) = self.weights[name][first:last], (part[first:last] for part in self.moments[name])
        if name == "w_dec":
            gradient.addcmul_(torch.linalg.vecdot(gradient, weight)[:, None], weight, value=-1)
        step = torch.full((), float(self.step), device=self.device, dtype=torch.float32)  # adam counts it up
        adam(
            [weight], [gradient], [average], [square], [], [step], fused=True, amsgrad=False, maximize=False,
            beta1=0.9, beta2=0.999, lr=self.config.lr_at(self.step), weight_decay=0.0, eps=1e-8,
        )  # fmt: skip
        if name == "w_dec":
            weight /= torch.linalg.vector_norm(weight, dim=1, keepdim=True)


def local_ends(config: TrainConfig, split: Alone) -> tuple[int, ...]:
    """Where the objective's prefixes end among the features of this process."""
    first, last = split.features(config.features)
    return tuple(min(max(end, first), last) - first for end in config.objective.ends(config.features))


def geometric_median(rows: Tensor) -> Tensor:
    """The point with the least sum of distances to the rows (Weiszfeld): outliers of enormous norm do not move it."""
    centre = rows.mean(0)
    for _ in range(_MEDIAN_STEPS):
        weight = 1 / torch.linalg.vector_norm(rows - centre, dim=1).clamp(min=1e-6)
        centre = (weight / weight.sum()) @ rows
    return centre


def _scale(rows: Tensor) -> float:
    """What makes rows of mean square 1."""
    scale = float((rows - rows.mean(0)).square_().mean().sqrt())
    if scale == 0:
        raise ValueError(f"train_sae: the first {len(rows)} rows are equal; there is nothing to learn")
    if not scale < float("inf"):
        raise ValueError(
            "train_sae: the squares of the first rows exceed what float32 holds; check what made them, or divide them"
        )
    return scale


def _random_rows(count: int, width: int, dice: torch.Generator) -> Tensor:
    rows = torch.randn(count, width, generator=dice, device="cpu", dtype=torch.float32)
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True))
