"""The state of a training run, and its step on hand-written sparse gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from steerfast.place import Origin
from steerfast.sae.model import SAE

from .config import TrainConfig, TrainReport
from .distributed import Alone
from .rows import Rows, finite

_ROWS_AT_A_TIME = 1 << 24  # elements of the dense pre-activations at once: 64 MB
_SAMPLE = 1 << 13  # rows that give the scale and the first decoder bias
_MEDIAN_STEPS = 20


class Trainer:
    """The state of a training run, and its step. `train_sae` drives it."""

    def __init__(self, config: TrainConfig, data: Rows, split: Alone) -> None:
        self.config, self.split, self.step = config, split, 0
        sample = finite(data.read(0)[:_SAMPLE].float(), 0)
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
        """One step on this replica's rows of a batch, (n, d)."""
        config, split, weights = self.config, self.split, self.weights
        rows = len(batch) * split.replicas
        x = batch.to(weights["b_dec"].device, torch.float32) / self.scale
        w_enc = weights.get("w_enc", weights["w_dec"])
        centred = x - weights["b_dec"]
        values, indices = _top(centred, w_enc, weights["b_enc"], min(config.k_at(self.step), len(w_enc)))
        values = torch.where(split.cut(values, config.k_at(self.step)), values, 0)
        gradients, error = sparse_gradients(centred, values, indices, w_enc, weights["w_dec"], split, rows)
        self._count(x, rows, error, indices[values > 0])
        dead = (self.silent > config.dead_after).nonzero().flatten()
        if config.aux_k and config.aux_weight:
            self._revive(gradients, centred, error, dead, rows)
        self._descend(gradients)
        self.step += 1

    def report(self, tokens_per_second: float) -> TrainReport:
        """How training stands; the sums of the error begin anew."""
        error, variance = self.split.sum_over_data(self.sums.clone()).tolist()
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

    def _count(self, x: Tensor, rows: int, error: Tensor, active: Tensor) -> None:
        """Which latents were active, and the sums of the report."""
        fired = torch.zeros_like(self.silent).index_fill_(0, active.long(), 1)
        self.split.sum_over_data(fired)
        self.silent += rows
        self.silent[fired > 0] = 0
        wide = x.double()
        mean = self.split.sum_over_data(wide.sum(0)) / rows
        self.sums += torch.stack([error.double().square().sum(), (wide - mean).square().sum()])

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
