"""Training of SAEs: the step, the stream of rows, the cache, checkpoints, a real model."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import steerfast as sf
from steerfast.place import Origin
from steerfast.sae import cache as cache_module
from steerfast.sae.cache import ActivationCache, cache_activations, pack, real_tokens
from steerfast.sae.evaluate import evaluate_sae
from steerfast.sae.model import SAE
from steerfast.sae.training.checkpoints import Checkpoints
from steerfast.sae.training.config import TrainConfig, TrainReport
from steerfast.sae.training.distributed import Alone
from steerfast.sae.training.rows import Whole, fingerprint_of, stream
from steerfast.sae.training.selection import Encoder, top
from steerfast.sae.training.train import train_sae
from steerfast.sae.training.trainer import Trainer

D, F, K = 40, 96, 5


def rows(n: int, d: int = D, sparse: int = 3, seed: int = 0) -> Tensor:
    """Rows that a dictionary of 48 directions explains, `sparse` at a time, and an offset."""
    dice = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(48, d, generator=torch.Generator().manual_seed(9)), dim=1)
    which = torch.rand(n, 48, generator=dice).topk(sparse, dim=1).indices
    weights = torch.zeros(n, 48).scatter_(1, which, 1 + 2 * torch.rand(n, sparse, generator=dice))
    return weights @ directions + 0.02 * torch.randn(n, d, generator=dice) + 4


CONFIG = TrainConfig(features=F, k=K, tokens=6000, batch=200, lr=5e-3, dead_after=1500, aux_k=8)


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("screened", [False, True])
@pytest.mark.parametrize("features", [96, 97])  # with and without groups of features
def test_top_is_exact(features: int, screened: bool) -> None:
    x, w, b = torch.randn(31, D), torch.randn(features, D), torch.randn(features)
    values, indices = top(Encoder(x, w, b), K, screened=screened)
    expected = torch.addmm(b.double(), x.double(), w.double().T).topk(K)
    found = values.sort(1, descending=True).values
    assert torch.allclose(found.double(), expected.values.clamp(min=0), rtol=1e-5, atol=1e-5)
    assert torch.equal(indices.sort(1).values, expected.indices.sort(1).values)


def test_candidates_in_bfloat16_that_are_too_close_are_done_again() -> None:
    """Rows whose best features differ by less than bfloat16 can tell: only float32 orders them."""
    x = torch.randn(8, D)
    w = torch.randn(1, D).repeat(256, 1) + 1e-5 * torch.randn(256, D)
    encoder = Encoder(x, w, torch.zeros(256))
    assert torch.equal(
        top(encoder, 3, screened=True)[1].sort(1).values, top(encoder, 3, screened=False)[1].sort(1).values
    )


def test_decoder_rows_keep_length_one_and_the_scale_folds_away() -> None:
    x = rows(3000) * 50
    trainer = Trainer(CONFIG, [x], Alone())
    for step in range(5):
        trainer.train_on(x[200 * step : 200 * (step + 1)])
    assert torch.allclose(trainer.weights["w_dec"].norm(dim=1), torch.ones(F), atol=1e-6)
    sae = trainer.sae(Origin())
    (scale,) = trainer.scales
    centred = x[:50].double() / scale - trainer.weights["b_dec"].double()
    pre = centred @ trainer.weights["w_enc"].double().T + trainer.weights["b_enc"].double()
    best = pre.topk(K, dim=1)
    latents = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    expected = (latents @ trainer.weights["w_dec"].double() + trainer.weights["b_dec"].double()) * scale
    assert (sae(x[:50]) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_schedules() -> None:
    config = TrainConfig(features=64, k=4, k_start=20, tokens=1000, batch=10, lr=1.0, warmup=0.1, decay=0.5)
    assert config.steps == 100
    assert [config.lr_at(step) for step in (0, 9, 40, 75, 99)] == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.02])
    assert [config.k_at(step) for step in (0, 5, 10, 99)] == [20, 12, 4, 4]


def test_training_finds_the_dictionary() -> None:
    reports: list[TrainReport] = []
    config = TrainConfig(features=F, k=3, tokens=120_000, batch=400, lr=5e-3, dead_after=5000, k_start=8, aux_k=16)
    sae = train_sae(rows(20_000), config, progress=reports.append, checkpoint_every=100)
    held_out = rows(2000, seed=1)
    error = (sae(held_out) - held_out).square().sum() / (held_out - held_out.mean(0)).square().sum()
    assert error < 0.05, f"FVU {error:.3f}"
    truth = torch.nn.functional.normalize(torch.randn(48, D, generator=torch.Generator().manual_seed(9)), dim=1)
    best = (truth @ sae.w_dec.T).amax(1)
    assert (best > 0.95).float().mean() > 0.9
    assert reports[-1].step == config.steps == 300
    assert reports[0].fvu > 1.5 * reports[-1].fvu
    assert "tokens/s" in str(reports[-1])


def test_dead_latents_come_back() -> None:
    """Latents that a bias keeps out of every top-k stay dead without AuxK, and take up their work with it."""
    x, last = rows(4000), {}
    for aux_k in (0, 16):
        config = TrainConfig(features=48, k=3, tokens=80_000, batch=400, lr=5e-3, dead_after=2000, aux_k=aux_k)
        trainer = Trainer(config, [x], Alone())
        trainer.weights["b_enc"][::2] = -3.0
        batches = stream(Whole(x), 400, 0, 0)
        for step in range(200):
            if step == 190:
                trainer.report(1.0)
            trainer.train_on(next(batches))
        last[aux_k] = trainer.report(1.0)
    assert last[0].dead > 0.4
    assert last[16].dead < 0.25
    assert last[16].fvu < 0.7 * last[0].fvu


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    sae = train_sae(rows(2000), TrainConfig(features=F, k=K, tokens=4000, batch=200, tied=True))
    assert torch.equal(sae.w_enc, sae.w_dec)
    sae.save(tmp_path)
    assert torch.equal(SAE.load(tmp_path).w_enc, sae.w_enc)


# --- the order of the rows --------------------------------------------------------------------------------------------


class Shards:
    """Rows 0, 1, 2, … in shards of unequal length, which count how often they are read."""

    counts = (7, 3, 11, 5, 9, 4, 8, 6, 10, 2, 12)

    def __init__(self) -> None:
        self.reads = 0

    def read(self, shard: int) -> Tensor:
        self.reads += 1
        start = sum(self.counts[:shard])
        return torch.arange(start, start + self.counts[shard], dtype=torch.float32)[:, None]


def test_every_epoch_has_every_row_once_in_another_order() -> None:
    data = Shards()
    total = sum(data.counts)
    batches = stream(data, 7, seed=5, step=0)
    seen = torch.cat([next(batches) for _ in range(2 * total)]).flatten()
    epochs = seen[: 14 * total].view(14, total)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(total, dtype=torch.float32))
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("step", [1, 9, 10, 11, 12, 25])
def test_the_stream_goes_on_anywhere(step: int) -> None:
    whole = stream(Shards(), 7, seed=5, step=0)
    expected = [next(whole) for _ in range(step + 4)][step:]
    data = Shards()
    found = stream(data, 7, seed=5, step=step)
    assert all(torch.equal(next(found), batch) for batch in expected)
    assert data.reads <= 3 * len(data.counts)  # the groups before it are not read


# --- checkpoints ------------------------------------------------------------------------------------------------------


def equal(a: SAE, b: SAE) -> bool:
    return all(torch.equal(value, b.tensors()[name]) for name, value in a.tensors().items())


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    x = rows(1500)
    straight = train_sae(x, CONFIG)

    class Interrupted(Exception):
        pass

    def stop(report: TrainReport) -> None:
        if report.step == 14:
            raise Interrupted

    with pytest.raises(Interrupted):
        train_sae(x, CONFIG, tmp_path, checkpoint_every=7, progress=stop)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint-00000014"]
    assert equal(train_sae(x, CONFIG, tmp_path, checkpoint_every=11), straight)
    assert equal(train_sae(x, CONFIG, tmp_path), straight)  # a finished run comes back from its last checkpoint


KILLED = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_sae_training as here
here.train_sae(here.rows(1500), here.changed(tokens=10**9), {folder!r}, checkpoint_every=1)
"""


FULL = """
import resource, signal, sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_sae_training as here
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def fill(report):
    if report.step == 5:
        while here._last_step(here.Path({folder!r})) < 5: pass
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
here.train_sae(here.rows(1500), here.CONFIG, {folder!r}, checkpoint_every=5, progress=fill)
"""


def changed(**changes: int) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def test_a_run_killed_at_any_moment_goes_on(tmp_path: Path) -> None:
    """SIGKILL, wherever it strikes: one whole checkpoint is there, and its state is that of an undisturbed run."""
    program = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    last = -1
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", program])
        try:
            deadline = time.monotonic() + 60
            while _last_step(tmp_path) <= last + 3:
                assert process.poll() is None, "the run ended by itself"
                assert time.monotonic() < deadline, "no checkpoint in a minute"
                time.sleep(0.01)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        last = _last_step(tmp_path)

    x, config = rows(1500), changed(tokens=10**9)
    resumed = Trainer(config, [x], Alone())
    Checkpoints(tmp_path, fingerprint_of(config, Whole(x)), Alone()).load([resumed])
    assert resumed.step == last
    straight = Trainer(config, [x], Alone())
    batches = stream(Whole(x), config.batch, config.seed, 0)
    while straight.step < last:
        straight.train_on(next(batches))
    for name, value in resumed.state().items():
        assert torch.equal(value, straight.state()[name]), name


def _last_step(folder: Path) -> int:
    return max((int(file.parent.name.split("-")[1]) for file in folder.glob("checkpoint-*/run.json")), default=-1)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the kernel refuses the write in the middle, as a full disk does."""
    program = FULL.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "OSError: train_sae" in done.stderr, done.stderr
    assert "checkpoint-00000010 cannot be written" in done.stderr
    assert "the checkpoint before it stays valid" in done.stderr
    assert _last_step(tmp_path) == 5
    assert equal(train_sae(rows(1500), CONFIG, tmp_path), train_sae(rows(1500), CONFIG))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train_sae(rows(1500), CONFIG, tmp_path)
    with pytest.raises(ValueError, match="another run"):
        train_sae(rows(1500), changed(seed=1), tmp_path)
    with pytest.raises(ValueError, match="another run"):
        train_sae(rows(1400), CONFIG, tmp_path)
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        train_sae(rows(1500), CONFIG, tmp_path)
    (file.parent / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        train_sae(rows(1500), CONFIG, tmp_path)


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000002-0of1.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="of an older version"):
        train_sae(rows(1500), CONFIG, tmp_path)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite(bad: float) -> None:
    x = rows(1500)
    x[1234, 5] = bad
    with pytest.raises(ValueError, match="row 1234 of shard 0 holds NaN or Inf"):
        train_sae(x, CONFIG)


def test_other_rows_do_not_continue_a_run(tmp_path: Path) -> None:
    rows = torch.randn(256, 16)
    config = TrainConfig(features=32, k=4, tokens=512, batch=64)
    train_sae(rows, config, tmp_path)
    with pytest.raises(ValueError, match="another run"):
        train_sae(rows * 7 + 3, config, tmp_path)
    with pytest.raises(TypeError, match="source is list; expected one source"):
        train_sae([1.0], config, tmp_path)  # type: ignore[arg-type]


def test_divergence_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="diverged"):
        train_sae(rows(1500), TrainConfig(features=F, k=K, tokens=6000, batch=200, lr=1e30), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 97}, "k is 97; expected 1 to features = 96"),
        ({"k": 0}, "k is 0"),
        ({"k_start": 3}, "k_start is 3"),
        ({"k_start": 200}, "k_start is 200"),
        ({"tokens": 10}, "at least one batch"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"warmup": 0.9, "decay": 0.9}, "warmup"),
    ],
)
def test_a_bad_configuration(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"features": F, "k": K, "tokens": 6000, "batch": 200, **change})  # type: ignore[arg-type]


def test_a_configuration_of_the_wrong_type() -> None:
    with pytest.raises(TypeError, match="features must be a whole number"):
        TrainConfig(features=8192.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected floating"):
        train_sae(torch.zeros(4, 4, 4), CONFIG)
    with pytest.raises(ValueError, match="all rows of the first shard are equal"):
        train_sae(torch.ones(500, 4), CONFIG)


# --- a real model -----------------------------------------------------------------------------------------------------

TEXTS = [
    "The old lighthouse stood at the end of the pier, and nobody had climbed its stairs since the storm of 1953.",
    "Water boils at a lower temperature on a mountain, because the pressure of the air is lower there.",
    "She opened the letter slowly, read it twice, and put it back into the drawer without a word.",
    "A prime number has exactly two divisors; there are infinitely many of them, as Euclid proved.",
] * 5


@pytest.mark.model
def test_the_cache_holds_what_the_model_computes(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    hooks = [len(module._forward_hooks) for module in model.modules()]
    cache = cache_activations(model, tokenizer, TEXTS, ("resid_post", 3), tmp_path, context=32, dtype=torch.float32)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    tokens, positions = cache.contexts(0)
    assert tokens[:, 0].tolist() == [tokenizer.bos_token_id] * len(tokens)
    assert torch.equal(tokens, pack(tokenizer, TEXTS, 32))
    ids = tokens.flatten()[positions.long()]
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert len(ids) == int(real_tokens(tokenizer, tokens).sum()) == len(cache)
    with torch.no_grad():
        states = model(tokens.long(), output_hidden_states=True).hidden_states[4]
    assert torch.allclose(cache.read(0), states.reshape(-1, 576)[positions.long()], rtol=1e-4, atol=1e-3)


@pytest.mark.model
def test_a_collection_goes_on_where_it_stopped(smollm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = smollm
    monkeypatch.setattr(cache_module, "SHARD_TOKENS", 64)
    arguments = (model, tokenizer, TEXTS, ("resid_post", 1))
    whole = cache_activations(*arguments, tmp_path / "whole", context=32)
    assert len(whole.counts) > 3

    class Interrupted(Exception):
        pass

    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        cache_activations(*arguments, tmp_path / "part", context=32, progress=stop)
    with pytest.raises(ValueError, match=f"lacks {len(whole.counts) - 2} of {len(whole.counts)} shards"):
        ActivationCache.open(tmp_path / "part")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "part").glob("*.safetensors")}
    part = cache_activations(*arguments, tmp_path / "part", context=32)
    assert {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in before} == before
    assert part.counts == whole.counts == ActivationCache.open(tmp_path / "part").counts
    for shard in range(len(whole.counts)):
        assert torch.equal(part.read(shard), whole.read(shard))
    with pytest.raises(ValueError, match="layer 1 there, 2 here"):
        cache_activations(model, tokenizer, TEXTS, ("resid_post", 2), tmp_path / "part", context=32)
    (tmp_path / "part" / "00001.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match="damaged"):
        ActivationCache.open(tmp_path / "part").read(1)


@pytest.mark.model
def test_train_and_evaluate_on_a_real_model(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    cache = cache_activations(model, tokenizer, TEXTS, ("resid_post", 2), tmp_path, context=32)
    config = TrainConfig(features=256, k=16, tokens=40_000, batch=256, lr=3e-3)
    sae = sf.sae.train_sae(cache, config)
    assert sae.place == ("resid_post", 2)
    found = evaluate_sae(sae, model, tokenizer, TEXTS, context=32, loss_tokens=100)
    assert found.variance_explained > 0.8
    assert found.active <= 16
    assert found.loss < found.loss_reconstructed < found.loss_zeroed
    assert found.loss_recovered > 0.6
    identity = SAE(
        torch.eye(576).repeat(2, 1) * _signs(), torch.eye(576).repeat(2, 1) * _signs(), k=576, origin=sae.origin
    )
    perfect = evaluate_sae(identity, model, tokenizer, TEXTS, context=32, loss_tokens=100)
    assert perfect.variance_explained == pytest.approx(1, abs=1e-6)
    assert perfect.loss_recovered == pytest.approx(1, abs=1e-3)
    assert perfect.loss_zeroed == pytest.approx(found.loss_zeroed)
    with pytest.raises(ValueError, match="does not know the place that it reads"):
        evaluate_sae(SAE(torch.eye(576), torch.eye(576), k=1), model, tokenizer, TEXTS)


def _signs() -> Tensor:
    return torch.cat([torch.ones(576, 1), -torch.ones(576, 1)])


@pytest.mark.model
def test_a_stream_trains_what_a_cache_trains(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    place, config = ("resid_post", 0), TrainConfig(features=64, k=4, tokens=2000, batch=100)
    cache = cache_activations(model, tokenizer, TEXTS, place, tmp_path, context=32, dtype=torch.float32)
    stream = sf.sae.ActivationStream(model, tokenizer, TEXTS, place, context=32)
    assert stream.counts == cache.counts
    assert all(torch.equal(a, b) for a, b in zip(stream.contexts(0), cache.contexts(0), strict=True))
    assert equal(train_sae(stream, config), train_sae(cache, config))
    assert train_sae(stream, config).origin == Origin(type(model).__name__, place)


@pytest.mark.model
def test_activations_that_are_not_finite(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    weight = model.model.layers[0].mlp.down_proj.weight
    kept = weight[3, 5].item()
    try:
        with torch.no_grad():
            weight[3, 5] = float("nan")
        with pytest.raises(ValueError, match="row 0 of shard 0 is NaN or Inf"):
            cache_activations(model, tokenizer, TEXTS, ("resid_post", 0), tmp_path, context=32)
    finally:
        with torch.no_grad():
            weight[3, 5] = kept
    assert [file.name for file in tmp_path.iterdir()] == ["cache.json"]


@pytest.mark.model
def test_texts_that_do_not_work(smollm) -> None:
    tokenizer = smollm[1]
    with pytest.raises(ValueError, match="expected 31 at least"):
        pack(tokenizer, ["Hello."], 32)
    with pytest.raises(TypeError, match="put it into a list"):
        pack(tokenizer, "Hello.", 32)
    with pytest.raises(ValueError, match="context is 4"):
        pack(tokenizer, TEXTS, 4)
