"""The kinds of SAE in training: each loss against its paper's, written down dense in float64; what they end in; their files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sae_training import rows
from torch import Tensor

import steerfast as sf
from steerfast.place import Origin
from steerfast.sae.formats import save_saelens, save_sparsify
from steerfast.sae.training.config import TrainConfig, TrainReport
from steerfast.sae.training.distributed import Alone
from steerfast.sae.training.objectives import (
    OBJECTIVES,
    BatchTopK,
    JumpReLU,
    Matryoshka,
    Objective,
    TopK,
    Transcode,
)
from steerfast.sae.training.trainer import Trainer

D, OUT, F, K, N = 40, 24, 96, 5, 64
WIDE = JumpReLU(sparsity=0.3, bandwidth=0.05)  # a window that some latents are in
CASES = [*OBJECTIVES, WIDE, Matryoshka((8, 30, 31)), Transcode(WIDE, skip=True), Transcode(Matryoshka())]
IDS = [f"{index}-{objective.kind}" for index, objective in enumerate(CASES)]


def config_of(objective: Objective, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        features=F, k=K, tokens=6000, batch=200, lr=5e-3, dead_after=1500, aux_k=8, objective=objective
    )
    return replace(config, **changes)


def data_of(objective: Objective, n: int, seed: int = 0) -> tuple[Tensor, ...]:
    x = rows(n, seed=seed)
    if not isinstance(objective, Transcode):
        return (x,)
    return x, 3 * torch.relu(x - 4) @ torch.randn(D, OUT, generator=torch.Generator().manual_seed(5)) - 7


# --- the losses of the papers -----------------------------------------------------------------------------------------


class StraightThrough(torch.autograd.Function):
    """JumpReLU and the step function with the pseudo-derivatives of arXiv:2407.14435, equations 11 and 12."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, width: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, theta)
        ctx.width = width
        on = (h > theta).to(h.dtype)
        return h * on, on

    @staticmethod
    def backward(ctx: Any, g_f: Tensor, g_on: Tensor) -> tuple[Tensor, Tensor, None]:
        h, theta = ctx.saved_tensors
        window = (((h - theta) / ctx.width).abs() < 0.5).to(h.dtype) / ctx.width
        return g_f * (h > theta), (-window * (theta * g_f + g_on)).sum(0), None


def latents_of(
    objective: Objective, h: Tensor, weights: dict[str, Tensor], width: int, target: int
) -> tuple[Tensor, Tensor]:
    """f, and what the objective adds to the loss."""
    if isinstance(objective, JumpReLU):
        f, on = StraightThrough.apply(h, weights["log_threshold"].exp(), objective.bandwidth * width**0.5)
        return f, objective.sparsity * target * (on.sum(1).mean() / K - 1) ** 2
    if isinstance(objective, TopK):
        least = h.topk(K, dim=1).values[:, -1:]
    else:
        least = h.flatten().topk(K * len(h)).values[-1]
    return torch.where(h >= least, h, 0).relu(), h.new_zeros(())


def dense_loss(
    objective: Objective, weights: dict[str, Tensor], batch: tuple[Tensor, ...], centre: Tensor, dead: Tensor
) -> Tensor:
    """Σ over prefixes of ‖ŷ - y‖², the objective's own term, and AuxK, with dense matrices."""
    inner = objective.inner if isinstance(objective, Transcode) else objective
    read = batch[0] - (centre if isinstance(objective, Transcode) else weights["b_dec"])
    h = read @ weights["w_enc"].T + weights["b_enc"]
    f, added = latents_of(inner, h, weights, read.shape[1], batch[-1].shape[1])
    base = weights["b_dec"] + (read @ weights["w_skip"].T if "w_skip" in weights else 0)
    ends = [F]
    if isinstance(inner, Matryoshka):
        ends = [*(inner.prefixes or (F // 16, F // 8, F // 4, F // 2)), F]
    errors = [f[:, :end] @ weights["w_dec"][:end] + base - batch[-1] for end in ends]
    # the error that the dead latents work on is a constant to them, and so is the input of their encoder to b_dec
    aux = read.detach() @ weights["w_enc"][dead].T + weights["b_enc"][dead]
    best = aux.topk(min(8, int(dead.sum())), dim=1)
    second = torch.zeros_like(aux).scatter(1, best.indices, best.values.relu()) @ weights["w_dec"][dead]
    second = second + errors[-1].detach()
    return sum(e.square().sum() for e in errors) / len(read) + added + second.square().sum() / 32 / len(read)


@pytest.mark.parametrize("objective", CASES, ids=IDS)
def test_the_gradient_is_that_of_the_papers_loss(objective: Objective) -> None:
    trainer = Trainer(config_of(objective), data_of(objective, 500), Alone())
    dice = torch.Generator().manual_seed(1)
    for name, value in trainer.weights.items():
        if name == "w_skip":
            value = torch.randn(value.shape, generator=dice) / 10
        trainer.weights[name] = value.double() + 0.02 * torch.randn(value.shape, generator=dice)
    trainer.buffers = {name: value.double() for name, value in trainer.buffers.items()}
    trainer.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in trainer.weights.items()}
    dead = torch.zeros(F, dtype=torch.bool)
    dead[::7] = True
    trainer.weights["b_enc"][dead] -= 1  # seldom active, so that they stay dead
    trainer.silent = torch.where(dead, 10**9, 0)
    batch = tuple(x.double() for x in data_of(objective, N, seed=3))
    scaled = tuple(x / scale for x, scale in zip(batch, trainer.scales, strict=True))
    leaves = {name: value.clone().requires_grad_() for name, value in trainer.weights.items()}
    # a latent that is active now is not dead any more
    active, counted = torch.zeros(F, dtype=torch.bool), trainer._count

    def count(target: Tensor, error: Tensor, latents: Any, n: int) -> None:
        counted(target, error, latents, n)
        active.copy_(trainer.silent == 0)

    found = {name: torch.zeros_like(value) for name, value in trainer.weights.items()}
    trainer._count = count  # type: ignore[method-assign]
    trainer._adam = lambda name, gradient, first, last: found[name][first:last].copy_(gradient)  # type: ignore[method-assign, assignment, return-value]
    trainer.train_on(*batch)
    centre = trainer.buffers.get("centre", torch.zeros(()))
    loss = dense_loss(objective, leaves, scaled, centre, dead & ~active)
    expected = torch.autograd.grad(loss, list(leaves.values()))
    assert bool((dead & ~active).any())
    for name, want in zip(leaves, expected, strict=True):
        assert float(want.norm()) > 0, name
        assert torch.allclose(found[name], want, rtol=1e-9, atol=1e-11), name


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=[one.kind for one in OBJECTIVES])
def test_autocast_around_a_run_changes_nothing(objective: Objective) -> None:
    """It is for the model that gives the rows."""
    data = data_of(objective, 2000)
    config = config_of(objective, k=3, tokens=4000, batch=400, dead_after=500, aux_k=16)
    source = data if isinstance(objective, Transcode) else data[0]
    alone = sf.sae.train_sae(source, config).tensors()
    with torch.autocast("cpu", torch.bfloat16):
        found = sf.sae.train_sae(source, config).tensors()
    assert all(torch.equal(value, found[name]) for name, value in alone.items())


@pytest.mark.parametrize("objective", OBJECTIVES, ids=[one.kind for one in OBJECTIVES])
def test_every_kind_learns_and_its_file_says_what_it_learnt(objective: Objective, tmp_path: Path) -> None:
    reports: list[TrainReport] = []
    config = config_of(objective, k=3, tokens=100_000, batch=400, dead_after=5000, k_start=8, aux_k=16)
    data = data_of(objective, 20_000)
    source = data if isinstance(objective, Transcode) else data[0]
    sae = sf.sae.train_sae(source, config, progress=reports.append, checkpoint_every=50)
    held_out = data_of(objective, 2000, seed=1)
    y = held_out[-1]
    fvu = float((sae(held_out[0]) - y).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu < (0.6 if isinstance(objective, Transcode) else 0.12)
    assert fvu == pytest.approx(reports[-1].fvu, rel=0.35), "the finished SAE does what it did in training"
    active = float((sae.encode(held_out[0]) > 0).sum(1).float().mean())
    assert active == pytest.approx(3, rel=0.35)
    again = sf.SAE.load(sae.save(tmp_path / "ours"))
    assert all(torch.equal(value, again.tensors()[name]) for name, value in sae.tensors().items())
    if isinstance(objective, Transcode):
        with pytest.raises(ValueError, match="reads and writes rows of one width"):
            save_sparsify(sae, tmp_path / "layers.3")
    elif sae.k is not None:
        sparsified = sf.SAE.load(save_sparsify(sae, tmp_path / "layers.3"))
        assert type(sparsified) is type(sae)
        assert torch.allclose(sparsified(held_out[0]), sae(held_out[0]), rtol=1e-4, atol=1e-3)
    else:
        with pytest.raises(ValueError, match="sparsify has Top-K SAEs"):
            save_sparsify(sae, tmp_path / "layers.3")
    if isinstance(objective, Transcode):
        with pytest.raises(ValueError, match="no Top-K transcoder"):
            save_saelens(sae, tmp_path / "saelens")
    else:
        theirs = sf.SAE.load(save_saelens(sae, tmp_path / "saelens"))
        assert torch.equal(theirs.encode(held_out[0]), sae.encode(held_out[0]))


def test_sparsify_has_transcoders_of_one_width(tmp_path: Path) -> None:
    x, y = (rows(1000, seed=seed) for seed in (0, 1))
    sae = sf.sae.train_sae((x, y), config_of(Transcode(skip=True), tokens=1000))
    sparsified = sf.SAE.load(save_sparsify(sae, tmp_path / "layers.3"))
    assert type(sparsified) is type(sae)
    assert torch.allclose(sparsified(x), sae(x), rtol=1e-4, atol=1e-3)


def test_a_transcoder_folds_both_scales() -> None:
    objective = Transcode(BatchTopK(), skip=True)
    reads, writes = data_of(objective, 2000)
    config = config_of(objective, tokens=2000)  # before rounding grows
    transcoder = sf.sae.train_sae((reads, writes), config, origin=Origin(place=("mlp_out", 1)))
    assert isinstance(transcoder, sf.sae.Transcoder)
    assert (transcoder.d, transcoder.d_out, transcoder.place) == (D, OUT, ("mlp_out", 1))
    other = sf.sae.train_sae((reads * 50, writes * 1e-2), config)
    found, expected = other(reads * 50) * 100, transcoder(reads)
    assert float((found - expected).norm()) < 0.02 * float((expected - expected.mean(0)).norm())


def test_matryoshka_reconstructs_with_its_first_features() -> None:
    x, errors = rows(20_000), {}
    for objective in (BatchTopK(), Matryoshka((12,))):
        sae = sf.sae.train_sae(x, config_of(objective, k=3, tokens=100_000, batch=400))
        f = sae.encode(x[:2000])
        f[:, 12:] = 0
        errors[objective.kind] = float((sae.decode(f) - x[:2000]).square().sum())
    assert errors["matryoshka"] < 0.8 * errors["batchtopk"]


def test_several_saes_on_one_stream_are_what_each_would_be_alone(tmp_path: Path) -> None:
    x, y = rows(1500), data_of(Transcode(), 1500)[1]
    configs = [config_of(TopK()), config_of(BatchTopK(), k=4)]
    source = sf.sae.SideBySide([x, y])

    class Stop(Exception):
        pass

    def stop(report: TrainReport) -> None:
        if report.step == 20:
            raise Stop

    with pytest.raises(Stop):
        sf.sae.train_saes(source, configs, tmp_path, checkpoint_every=10, progress=stop)
    both = sf.sae.train_saes(source, configs, tmp_path, checkpoint_every=10)
    for sae, alone, config in zip(both, (x, y), configs, strict=True):
        expected = sf.sae.train_sae(alone, config)
        assert all(torch.equal(value, expected.tensors()[name]) for name, value in sae.tensors().items())


# --- bad input --------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    x = rows(500)
    with pytest.raises(TypeError, match="expected a pair"):
        sf.sae.train_sae(x, config_of(Transcode()))
    with pytest.raises(TypeError, match="expected one source"):
        sf.sae.train_sae((x, x), config_of(TopK()))
    with pytest.raises(ValueError, match="expected the same rows"):
        sf.sae.train_sae((x, x[:400]), config_of(Transcode()))
    with pytest.raises(ValueError, match="transcoder reads and writes two places"):
        config_of(Transcode(), tied=True)
    with pytest.raises(TypeError, match="expected another objective"):
        Transcode(Transcode())
    with pytest.raises(TypeError, match="objective is 'topk'"):
        config_of("topk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected ascending"):
        Matryoshka((8, 8))
    with pytest.raises(ValueError, match="a prefix has 96 of 96 features"):
        sf.sae.train_sae(x, config_of(Matryoshka((96,))))
    with pytest.raises(ValueError, match=r"bandwidth is 0\.0"):
        JumpReLU(bandwidth=0)
    with pytest.raises(ValueError, match="sources is empty"):
        sf.sae.SideBySide([])
    with pytest.raises(TypeError, match="source must be a tensor"):
        sf.sae.SideBySide([x, "rows"])  # type: ignore[list-item]
    source = sf.sae.SideBySide([x, x])
    with pytest.raises(ValueError, match="1 configurations for a source of 2 places"):
        sf.sae.train_saes(source, [config_of(TopK())])
    with pytest.raises(ValueError, match="differ in tokens, batch or seed"):
        sf.sae.train_saes(source, [config_of(TopK()), config_of(TopK(), seed=2)])
