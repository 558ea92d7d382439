"""Training of SAEs: the step, the stream of rows, the cache, checkpoints, a real model."""

from __future__ import annotations

import copy
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import steerfast as sf
from steerfast.files import claim
from steerfast.files.claim import Claim
from steerfast.place import Origin
from steerfast.sae import contexts as contexts_module
from steerfast.sae import evaluate as evaluate_module
from steerfast.sae import place_reader
from steerfast.sae.cache import ActivationCache, CacheConfig, cache_activations, cache_places
from steerfast.sae.contexts import Contexts, packed
from steerfast.sae.evaluate import evaluate_sae
from steerfast.sae.model import SAE
from steerfast.sae.training import checkpoints, selection
from steerfast.sae.training.checkpoints import Checkpoints
from steerfast.sae.training.config import TrainConfig, TrainReport
from steerfast.sae.training.distributed import Alone
from steerfast.sae.training.rows import Whole, beginning, fingerprint_of, stream
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


@pytest.mark.parametrize(
    "features", [192, 200]
)  # the last block of 40 features: whole, and too short for all candidates
def test_candidates_of_several_blocks_of_features(features: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_WEIGHTS", 40 * D)
    x, w, b = torch.randn(31, D), torch.randn(features, D), torch.randn(features)
    values, indices = top(Encoder(x, w, b), K, screened=True)
    expected = torch.addmm(b.double(), x.double(), w.double().T).topk(K)
    assert torch.equal(indices.sort(1).values, expected.indices.sort(1).values)
    assert torch.allclose(values.sort(1, descending=True).values.double(), expected.values, rtol=1e-5, atol=1e-5)


def test_a_row_of_nan_stays_one_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the last row: training that diverged is seen, and no other row's features are taken for its own."""
    monkeypatch.setattr(selection, "_WEIGHTS", 40 * D)
    x, w, b = torch.randn(31, D), torch.randn(192, D), torch.randn(192)
    clean = top(Encoder(x[:-1], w, b), K, screened=True)[0]
    x[-1] = torch.nan
    values, indices = top(Encoder(x, w, b), K, screened=True)
    assert values[-1].isnan().all()
    assert len(set(indices[-1].tolist())) == K
    torch.testing.assert_close(values[:-1].sort(1).values, clean.sort(1).values)


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
    """Rows 0, 1, 2, … in shards, by default of unequal length, which note what is read and in which thread."""

    fingerprint: ClassVar[dict[str, str]] = {"rows": "0, 1, 2, …"}

    def __init__(self, counts: tuple[int, ...] = (7, 3, 11, 5, 9, 4, 8, 6, 10, 2, 12)) -> None:
        self.counts = counts
        self.reads: list[int] = []
        self.threads: set[str] = set()

    def read(self, shard: int) -> Tensor:
        self.reads.append(shard)
        self.threads.add(threading.current_thread().name)
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
    assert len(data.reads) <= 3 * len(data.counts)  # the groups before it are not read


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
def test_replicas_share_an_epoch_and_read_only_their_shards(replicas: int) -> None:
    total, seen = sum(Shards().counts), []
    for replica in range(replicas):
        data = Shards()
        first, last = replica * total // replicas, (replica + 1) * total // replicas
        batches = stream(data, replicas, 5, 0, steps=last - first, replica=(replica, replicas))
        seen += [int(batch) for batch in batches]  # a row of each batch
        assert len(set(data.reads)) == len(data.reads)
        others = sum(data.counts[shard] for shard in data.reads) - (last - first)
        assert others < 2 * max(data.counts)  # of the two shards at the ends
    assert sorted(seen) == list(range(total))


def test_replicas_of_a_tensor_have_the_batches_of_one_process() -> None:
    x = torch.arange(100.0)[:, None]
    parts = [stream(Whole(x), 20, 3, 2, replica=(i, 2)) for i in range(2)]
    whole = stream(Whole(x), 20, 3, 2)
    for _ in range(12):
        batch = next(whole)
        for i in range(2):
            assert torch.equal(next(parts[i]), batch[i::2])


def test_two_replicas_read_half_of_equal_shards() -> None:
    """16 shards, two replicas, one epoch: 8 reads each, and none beside them."""
    for replica in range(2):
        data = Shards((10,) * 16)
        assert len(list(stream(data, 20, 3, 0, steps=8, replica=(replica, 2)))) == 8
        assert len(data.reads) == 8


def test_two_shards_are_read_ahead_in_a_thread() -> None:
    data = Shards((10,) * 40)
    batches = stream(data, 10, 3, 0)
    next(batches)
    deadline = time.monotonic() + 10
    while len(data.reads) < 8 + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(data.reads) == 8 + 2  # a group, and two of the next
    assert data.threads == {"steerfast-rows_0"}
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("steerfast-rows")]
    data.ahead = 0  # type: ignore[attr-defined]
    data.threads.clear()
    next(stream(data, 10, 3, 0))
    assert data.threads == {threading.current_thread().name}


class Parts:
    """Tensors as shards."""

    def __init__(self, *parts: Tensor) -> None:
        self.parts, self.counts = parts, tuple(map(len, parts))
        self.fingerprint: dict[str, Any] = {}

    def read(self, shard: int) -> Tensor:
        return self.parts[shard]


def test_shards_of_two_dtypes_are_not_rounded() -> None:
    """70,000 is infinite in float16."""
    narrow, wide = torch.ones(5, 2, dtype=torch.float16), torch.full((5, 2), 7e4)
    for seed in range(4):
        found = next(stream(Parts(narrow, wide, 2 * narrow, 2 * wide), 20, seed, 0))
        assert found[:, 0].unique().tolist() == [1, 2, 70000, 140000]


def test_the_first_rows_may_lie_in_many_shards() -> None:
    """Scale and first bias are those of the rows, however little the first shards hold."""
    x = rows(1500)
    source = Parts(x[:0], x[:1], x[1:40], x[40:70], x[70:])
    assert torch.equal(beginning(source, 41), x[:41])
    assert torch.equal(beginning(source, 9999), x)
    last: list[float] = []
    for data in (source, x):
        train_sae(data, CONFIG, progress=lambda report: last.append(report.fvu))
    assert last[0] == pytest.approx(last[1], rel=0.05)  # in another order


def test_shards_that_are_not_what_their_source_says() -> None:
    class Narrow(Shards):
        def read(self, shard: int) -> Tensor:
            return super().read(shard).expand(-1, 2 if shard == 3 else 1)

    class Short(Shards):
        def read(self, shard: int) -> Tensor:
            return super().read(shard)[: 5 if shard == 6 else None]

    with pytest.raises(ValueError, match=r"rows of shard \d+ have width .* are they of different models\?"):
        next(stream(Narrow((5,) * 8), 40, 0, 0))
    with pytest.raises(ValueError, match=r"shard 6 has shape \(5, 1\).* expected floating \(8, d\)"):
        list(stream(Short(), 7, 0, 0, steps=11))
    with pytest.raises(ValueError, match="a batch of 7 rows does not divide by 2 replicas"):
        next(stream(Shards(), 7, 0, 0, replica=(0, 2)))
    with pytest.raises(ValueError, match="the source has 2 rows for 3 replicas"):
        next(stream(Shards((1, 1)), 6, 0, 0, replica=(0, 3)))


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of the process from /proc")
def test_a_checkpoint_needs_no_memory_of_its_own(tmp_path: Path) -> None:
    """The process grows by less than a fifth of what is written; one copy of the state would be all of it."""
    trainer = Trainer(changed(features=16384, k=4), [rows(500, 256)], Alone())
    for average, square in trainer.moments.values():  # zeros that were never written take no memory
        average.fill_(1), square.fill_(1)
    size = sum(value.nbytes for value in trainer.state().values())
    folder = Checkpoints(tmp_path, "run", Alone())
    with most_memory() as most:
        folder.save([trainer])
        folder.finish()
    assert sum(file.stat().st_size for file in tmp_path.glob("*/*.safetensors")) > size > 90e6
    assert most() < size / 5


@contextmanager
def most_memory() -> Iterator[Callable[[], int]]:
    """How far the process's own memory grew at most inside the block, in bytes, asked every millisecond."""

    def now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(now())

    begin, seen, done = now(), [0], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: max(seen) - begin
    finally:
        done.set()
        thread.join()


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
    with pytest.raises(ValueError, match=r"another run \(config\.k 5 there, 4 here; config\.seed 0 there, 1 here\)"):
        train_sae(rows(1500), changed(seed=1, k=4), tmp_path)
    with pytest.raises(ValueError, match="another run"):
        train_sae(rows(1400), CONFIG, tmp_path)
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        train_sae(rows(1500), CONFIG, tmp_path)
    (file.parent / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        train_sae(rows(1500), CONFIG, tmp_path)


def test_two_runs_into_one_directory(tmp_path: Path) -> None:
    """The second is refused while the first is at work, and nothing of the first is lost."""
    refused = []

    def meanwhile(report: TrainReport) -> None:
        if report.step == 10:
            for config in (CONFIG, changed(k=3)):
                with pytest.raises(ValueError, match=f"another run is at work in {tmp_path}; wait for its end"):
                    train_sae(rows(1500), config, tmp_path)
                refused.append(config)

    sae = train_sae(rows(1500), CONFIG, tmp_path, checkpoint_every=5, progress=meanwhile)
    assert len(refused) == 2
    assert equal(sae, train_sae(rows(1500), CONFIG))
    assert equal(sae, train_sae(rows(1500), CONFIG, tmp_path))


def test_a_claim_costs_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system without locks has no file either, which it could not remove; a file that cannot be removed is left."""
    with Claim(tmp_path), monkeypatch.context() as patch:
        patch.setattr(claim, "fcntl", None)
        with Claim(tmp_path, ".other"):
            assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    held = Claim(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError("read-only")))
        held.close()
    Claim(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_what_is_older_goes_when_the_new_one_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that says a checkpoint is whole, too: a machine that stops at any moment has one."""
    reached: list[str] = []
    monkeypatch.setattr(checkpoints, "_reach_disk", lambda file: reached.append(file.name))
    monkeypatch.setattr(checkpoints.Checkpoints, "_remove_others", lambda self, step: reached.append("removed"))
    folder = tmp_path / "checkpoint-00000001"
    folder.mkdir()
    (folder / "shard-00000.safetensors").write_bytes(b"")
    checkpoints.Checkpoints(tmp_path, "", Alone())._complete(None, folder, {"step": 1})
    assert reached == ["shard-00000.safetensors", "run.json", "removed"]


def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from steerfast.files.claim import Claim\n"
    hold += "held = Claim(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError):
            Claim(tmp_path)
        Claim(tmp_path, ".other").close()
        process.kill()
    Claim(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_folders_of_others_stay(tmp_path: Path) -> None:
    """Trainers of language models keep theirs in checkpoint-500, too."""
    others = [tmp_path / name for name in ("checkpoint-500", "checkpoint-best")]
    for other in others:
        other.mkdir()
        (other / "run.json").write_text("{}")
    train_sae(rows(1500), CONFIG, tmp_path)
    assert all((other / "run.json").read_text() == "{}" for other in others)


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
    with pytest.raises(ValueError, match="the first 500 rows are equal"):
        train_sae(torch.ones(500, 4), CONFIG)
    with pytest.raises(ValueError, match="the squares of the first rows exceed what float32 holds"):
        train_sae(1e60 * rows(500).double(), CONFIG)


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
    assert torch.equal(tokens, Contexts(tokenizer, TEXTS, 32)[:])
    ids = tokens.flatten()[positions.long()]
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert len(ids) == int(Contexts(tokenizer, TEXTS, 32).real(tokens).sum()) == len(cache)
    with torch.no_grad():
        states = model(tokens.long(), output_hidden_states=True).hidden_states[4]
    assert torch.allclose(cache.read(0), states.reshape(-1, 576)[positions.long()], rtol=1e-4, atol=1e-3)


@pytest.mark.model
def test_a_collection_goes_on_where_it_stopped(smollm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = smollm
    monkeypatch.setattr(place_reader, "SHARD_TOKENS", 64)
    arguments = (model, tokenizer, TEXTS, ("resid_post", 1))
    whole = cache_activations(*arguments, tmp_path / "whole", context=32)
    assert len(whole.counts) > 3

    class Interrupted(Exception):
        pass

    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            with pytest.raises(ValueError, match=r"another process collects into .*part; wait for its end"):
                cache_activations(*arguments, tmp_path / "part", context=32)
            raise Interrupted

    with pytest.raises(Interrupted):
        cache_activations(*arguments, tmp_path / "part", context=32, progress=stop)
    with pytest.raises(ValueError, match=f"lacks {len(whole.counts) - 2} of {len(whole.counts)} shards"):
        ActivationCache.open(tmp_path / "part")
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "part").glob("*.safetensors")}
    for name in (
        ".00002.safetensors.999",
        ".mine.safetensors.999",
    ):  # what a kill in the middle of a write leaves, and not
        (tmp_path / "part" / name).touch()
    part = cache_activations(*arguments, tmp_path / "part", context=32)
    assert {name: (tmp_path / "part" / name).stat().st_mtime_ns for name in before} == before
    assert [file.name for file in (tmp_path / "part").glob(".*.safetensors.*")] == [".mine.safetensors.999"]
    assert part.counts == whole.counts == ActivationCache.open(tmp_path / "part").counts
    for shard in range(len(whole.counts)):
        assert torch.equal(part.read(shard), whole.read(shard))
    with pytest.raises(ValueError, match="layer 1 there, 2 here"):
        cache_activations(model, tokenizer, TEXTS, ("resid_post", 2), tmp_path / "part", context=32)
    (tmp_path / "part" / "00001.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"damaged .* run the collection again, it makes this shard anew"):
        ActivationCache.open(tmp_path / "part").read(1)
    (tmp_path / "part" / "00000.safetensors").unlink()
    with pytest.raises(ValueError, match="is gone; run the collection again, it makes this shard anew"):
        ActivationCache.open(tmp_path / "part")
    said[:] = ["", ""]
    mended = cache_activations(*arguments, tmp_path / "part", context=32, progress=said.append)
    assert len(said) == 4  # two shards were made, no more
    assert mended.counts == whole.counts
    assert all(torch.equal(mended.read(shard), whole.read(shard)) for shard in range(len(whole.counts)))


@pytest.mark.model
def test_several_places_in_one_forward_and_in_parts(smollm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cache is the one of its place alone, bit for bit, whether made at once, in parts, or going on."""
    model, tokenizer = smollm
    monkeypatch.setattr(place_reader, "SHARD_TOKENS", 64)
    places = [("resid_post", 2), ("resid_pre", 0), ("mlp_out", 2), ("attn_out", 1)]
    forwards: list[int] = []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: forwards.append(1))
    alone = {
        place: cache_activations(model, tokenizer, TEXTS, place, tmp_path / "alone" / str(i), context=32)
        for i, place in enumerate(places)
    }
    shards = alone[places[0]].info.shards
    assert shards > 3
    once = len(forwards) // len(places)
    forwards.clear()
    found = cache_places(model, tokenizer, TEXTS, places, tmp_path / "together", CacheConfig(context=32))
    assert len(forwards) == once
    for part in (2, 3, 1):
        with pytest.raises((ValueError, FileNotFoundError)):
            ActivationCache.open(tmp_path / "parts" / "mlp_out-2")
        cache_places(model, tokenizer, TEXTS, places, tmp_path / "parts", CacheConfig(context=32, part=(part, 3)))
    handle.remove()
    for place in places:
        for folder in (found[place], tmp_path / "parts" / found[place].name):
            cache = ActivationCache.open(folder)
            assert (cache.info, cache.counts) == (alone[place].info, alone[place].counts)
            for shard in range(shards):
                assert torch.equal(cache.read(shard), alone[place].read(shard))
    (tmp_path / "parts" / "mlp_out-2" / "cache.2of3.json").unlink()
    with pytest.raises(ValueError, match=r"lacks \d of \d+ shards \(there are parts 1 of 3, 3 of 3\)"):
        ActivationCache.open(tmp_path / "parts" / "mlp_out-2")
    with pytest.raises(ValueError, match="context 32 there, 16 here"):
        cache_places(model, tokenizer, TEXTS, places, tmp_path / "parts", CacheConfig(context=16, part=(2, 3)))
    for wrong, message in (([places[0]] * 2, "named twice"), ([], "no place is named")):
        with pytest.raises(ValueError, match=message):
            cache_places(model, tokenizer, TEXTS, wrong, tmp_path / "wrong")
    with pytest.raises(ValueError, match="part is 4 of 3"):
        CacheConfig(part=(4, 3))


@pytest.mark.model
def test_a_full_disk_leaves_the_shards_that_were_written(
    smollm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = smollm
    monkeypatch.setattr(place_reader, "SHARD_TOKENS", 64)
    whole = cache_activations(model, tokenizer, TEXTS, ("resid_post", 0), tmp_path / "whole", context=32)
    write, budget = Path.write_bytes, [2 * (whole.directory / "00000.safetensors").stat().st_size + 5000]

    def write_some(self: Path, content: bytes) -> int:
        written = write(self, content[: budget[0]])
        budget[0] -= written
        if written < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
        return written

    places = [("resid_post", 0), ("resid_pre", 0)]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_some)
        with pytest.raises(OSError, match="No space left"):
            cache_places(model, tokenizer, TEXTS, places, tmp_path / "some", CacheConfig(context=32))
    folder = tmp_path / "some" / "resid_post-0"
    assert sorted(file.name for file in folder.iterdir()) == ["00000.safetensors", "cache.json"]
    cache_places(model, tokenizer, TEXTS, places, tmp_path / "some", CacheConfig(context=32))
    found = ActivationCache.open(folder)
    assert all(torch.equal(found.read(i), whole.read(i)) for i in range(whole.info.shards))


@pytest.mark.model
def test_a_shard_of_another_collection_is_refused(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    cache = cache_activations(model, tokenizer, TEXTS, ("resid_post", 0), tmp_path / "a", context=32)
    other = cache_activations(model, tokenizer, TEXTS[:8], ("resid_post", 0), tmp_path / "b", context=32)
    (other.directory / "00000.safetensors").replace(cache.directory / "00000.safetensors")
    with pytest.raises(ValueError, match="it is of another collection"):
        cache.read(0)
    whole = (cache.directory / "00000.safetensors").read_bytes()
    (cache.directory / "00000.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged"):
        cache.read(0)


class Numbered:
    """A tokenizer whose texts are numbers of tokens: token 7, 8, 9, … as many as the text says."""

    bos_token_id, eos_token_id = 1, 2
    all_special_ids = (1, 2)

    def __call__(self, text: object, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list]:
        if isinstance(text, list):
            return {"input_ids": [list(range(7, 7 + int(one))) for one in text]}
        return {"input_ids": list(range(7, 8))}


def test_packing_holds_no_more_than_a_window() -> None:
    """Contexts of the joined texts, and texts asked for only as they are needed."""
    sizes, asked = [5, 3, 40, 1, 1, 700, 2] * 400, []

    def texts() -> Iterator[str]:
        for size in sizes:
            asked.append(size)
            yield str(size)

    blocks, found = packed(Numbered(), texts(), 16), []
    found.append(next(blocks))
    assert len(asked) == 512
    found += blocks
    joined = [token for size in sizes for token in [*range(7, 7 + size), 2]]
    contexts = torch.tensor(np.concatenate(found))
    assert contexts[:, 0].eq(1).all()
    assert contexts[:, 1:].flatten().tolist() == joined[: 15 * len(contexts)]
    assert len(joined) - 15 * len(contexts) < 15


def test_packed_texts_lie_in_a_file_where_they_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["900"] * 600
    small = Contexts(Numbered(), texts, 16)
    monkeypatch.setattr(contexts_module, "_IN_MEMORY", 1000)
    large = Contexts(Numbered(), texts, 16, tmp_path)
    assert not list(tmp_path.iterdir())  # it has no name
    assert (len(large), large.digest) == (len(small), small.digest)
    for part in (slice(None), slice(3, 7), slice(len(small) - 1, None), slice(5, 5)):
        assert torch.equal(large[part], small[part])
    assert large[3:7].shape == (4, 16)
    assert torch.equal(large.real(large[:4])[:, 1:], large[:4][:, 1:] != 2)


@pytest.mark.model
def test_evaluation_reads_texts_as_it_needs_them(smollm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums over parts are the numbers of all rows at once; texts beyond the tokens asked for are left alone."""
    model, tokenizer = smollm
    sae = SAE(torch.randn(64, 576), 0.1 * torch.randn(64, 576), k=8, origin=Origin(place=("resid_post", 2)))
    asked: list[int] = []

    def texts() -> Iterator[str]:
        for number in range(10**9):
            asked.append(number)
            yield TEXTS[number % 20]

    once = evaluate_sae(sae, model, tokenizer, texts(), context=32, tokens=1200, loss_tokens=64)
    assert len(asked) <= 1024
    monkeypatch.setattr(evaluate_module, "_MEDIAN_ROWS", 200)
    monkeypatch.setattr(evaluate_module, "_ENCODED", 70)
    parts = evaluate_sae(sae, model, tokenizer, texts(), context=32, tokens=1200, loss_tokens=64)
    assert parts.tokens == once.tokens
    for name in ("variance_explained", "dead", "active"):
        assert getattr(parts, name) == pytest.approx(getattr(once, name), rel=1e-9), name
    assert 0.9 < once.typical < 1
    assert parts.typical == pytest.approx(once.typical, abs=0.02)  # the median is that of the first rows
    kept = Contexts(tokenizer, TEXTS * 5, 32)[: 1200 // 32]
    rows = torch.cat([model(ids[None].long(), output_hidden_states=True).hidden_states[3][0] for ids in kept])[
        Contexts(tokenizer, TEXTS * 5, 32).real(kept).flatten()
    ].double()
    wanted = 1 - float((sae(rows.float()).double() - rows).square().sum() / (rows - rows.mean(0)).square().sum())
    assert once.variance_explained == pytest.approx(wanted, rel=1e-4)


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
    with pytest.raises(ValueError, match="context is 0"):
        evaluate_sae(sae, model, tokenizer, TEXTS, context=0, tokens=100)
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
def test_a_tokenizer_of_another_model(smollm, tmp_path: Path) -> None:
    model, tokenizer = smollm
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["lighthouse"])
    with pytest.raises(ValueError, match="beyond the vocabulary of LlamaForCausalLM; is the tokenizer another"):
        cache_activations(model, other, TEXTS, ("resid_post", 0), tmp_path, context=32)


@pytest.mark.model
def test_two_places_of_one_layer_side_by_side(smollm) -> None:
    model, tokenizer = smollm
    places = [("mlp_out", 1), ("resid_pre", 0), ("resid_post", 1)]
    both = sf.sae.PlacesStream(model, tokenizer, TEXTS, places, context=32)
    alone = [sf.sae.ActivationStream(model, tokenizer, TEXTS, place, context=32) for place in places]
    assert both.counts == alone[0].counts
    assert both.origins == tuple(one.origin for one in alone)
    assert both.widths == (576, 576, 576)
    assert torch.equal(both.read(0), torch.cat([one.read(0) for one in alone], dim=1))


@pytest.mark.model
def test_rows_of_other_weights_are_of_another_model(smollm, tmp_path: Path) -> None:
    """A finetune has the class, the width and the tokens of its base, and other rows."""
    model, tokenizer = smollm
    place, options = ("resid_post", 0), {"context": 32}
    cache = cache_activations(model, tokenizer, TEXTS, place, tmp_path / "base", **options)
    base = sf.sae.ActivationStream(model, tokenizer, TEXTS, place, **options)
    assert cache.info.weights == base.info.weights
    norm = model.model.norm.weight
    try:
        with torch.no_grad():
            norm.mul_(2)
        tuned = sf.sae.ActivationStream(model, tokenizer, TEXTS, place, **options)
        with pytest.raises(ValueError, match="base holds another cache \\(weights"):
            cache_activations(model, tokenizer, TEXTS, place, tmp_path / "base", **options)
        parts = cache_activations(model, tokenizer, TEXTS, place, tmp_path / "tuned", **options)
    finally:
        with torch.no_grad():
            norm.div_(2)
    with pytest.raises(ValueError, match="from models with different weights"):
        sf.sae.SideBySide([cache, parts])
    assert fingerprint_of(CONFIG, tuned) != fingerprint_of(CONFIG, base)
    assert place_reader.weights_digest(torch.nn.Linear(2, 2, device="meta")) == ""  # not at hand


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
        sae = SAE(torch.eye(576), torch.eye(576), k=1, origin=Origin(place=("resid_post", 0)))
        with pytest.raises(ValueError, match="activations are NaN or Inf in the contexts 0 to 3"):
            evaluate_sae(sae, model, tokenizer, TEXTS, context=32)
    finally:
        with torch.no_grad():
            weight[3, 5] = kept
    assert [file.name for file in tmp_path.iterdir()] == ["cache.json"]


@pytest.mark.model
def test_texts_that_do_not_work(smollm) -> None:
    tokenizer = smollm[1]
    with pytest.raises(ValueError, match="expected 31 at least"):
        Contexts(tokenizer, ["Hello."], 32)
    with pytest.raises(TypeError, match="put it into a list"):
        Contexts(tokenizer, "Hello.", 32)
    with pytest.raises(ValueError, match="context is 4"):
        Contexts(tokenizer, TEXTS, 4)
