"""An SAE trained by several processes over gloo: what one process trains, for every kind, whatever their number."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_sae_train_objectives import config_of, data_of
from test_sae_training import equal

import steerfast as sf
from steerfast.sae.training.config import TrainConfig, TrainReport
from steerfast.sae.training.distributed import Alone
from steerfast.sae.training.objectives import OBJECTIVES, Objective, TopK, Transcode

EVERY = 5


class Stop(Exception):
    """Leaves a run in the middle."""


def case(objective: Objective) -> TrainConfig:
    """20 steps with AuxK at work; few enough that rounding does not grow."""
    return config_of(objective, tokens=4000, dead_after=400, lr=1e-3)


def trained(
    objective: Objective, split: Alone | None, folder: Path | None = None, stop: int = 0
) -> tuple[sf.SAE, list[float]]:
    """The SAE and the FVU at every fifth step; with `stop`, `Stop` is raised after that step."""
    data, curve = data_of(objective, 1500), []

    def progress(report: TrainReport) -> None:
        curve.append(report.fvu)
        if report.step == stop:
            raise Stop(curve)

    source = data if isinstance(objective, Transcode) else data[0]
    sae = sf.sae.train_sae(source, case(objective), folder, split=split, checkpoint_every=EVERY, progress=progress)
    return sae, curve


def together(world: int, program: str, folder: Path) -> list[subprocess.Popen[str]]:
    """Processes that run the same program; its names are those of this module and `split`, `rank`, `folder`."""
    start = f"""
import os, sys, torch
import torch.distributed as dist
from pathlib import Path
torch.set_num_threads(1)
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_sae_train_together import *
from steerfast.sae.training.distributed import Mesh, mesh_of
rank, folder = int(sys.argv[1]), Path({str(folder)!r})
dist.init_process_group("gloo", init_method=f"file://{{folder}}/meet-{world}", rank=rank, world_size={world})
"""
    end = """
sys.stdout.flush()
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # threads of gloo may abort a process that ends by itself (torch 2.13)
"""
    return [
        subprocess.Popen([sys.executable, "-c", start + program + end, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]


def ended(processes: list[subprocess.Popen[str]], seconds: float = 600) -> list[str]:
    """What they wrote to stderr, when all have ended."""
    try:
        return [process.communicate(timeout=seconds)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def went_well(processes: list[subprocess.Popen[str]]) -> None:
    """All have ended by themselves."""
    for process, said in zip(processes, ended(processes), strict=True):
        assert process.returncode == 0, said[-3000:]


FOUR = """
split = mesh_of(2, "cpu")
for objective in OBJECTIVES:
    sae, curve = trained(objective, split)
    sae.save(folder / f"{objective.kind}-{rank}")
    if rank == 0:
        (folder / f"{objective.kind}.json").write_text(json.dumps(curve))
for objective in (OBJECTIVES[0], OBJECTIVES[2]):
    try:
        trained(objective, split, folder / f"run-{objective.kind}", stop=10)
    except Stop:
        pass
"""

TWO = """
from torch.distributed.device_mesh import init_device_mesh
splits = [Mesh(init_device_mesh("cpu", (2,), mesh_dim_names=(name,))) for name in ("replica", "feature")]
for objective, split in zip((OBJECTIVES[0], OBJECTIVES[2]), splits):
    sae, curve = trained(objective, split, folder / f"run-{objective.kind}")
    if rank == 0:
        sae.save(folder / f"resumed-{objective.kind}")
        (folder / f"resumed-{objective.kind}.json").write_text(json.dumps(curve))
"""


def test_four_processes_train_what_one_does_and_two_go_on(tmp_path: Path) -> None:
    """2 replicas × 2 parts of the features; then 2 replicas, or 2 parts, go on from checkpoints of the four."""
    went_well(together(4, FOUR, tmp_path))
    for objective in OBJECTIVES:
        found = [sf.SAE.load(tmp_path / f"{objective.kind}-{rank}") for rank in range(4)]
        assert all(equal(found[0], other) for other in found[1:])
        alone, curve = trained(objective, None)
        for name, value in alone.tensors().items():
            assert torch.allclose(found[0].tensors()[name], value, rtol=1e-3, atol=2e-3), (objective.kind, name)
        assert json.loads((tmp_path / f"{objective.kind}.json").read_text()) == pytest.approx(curve, rel=1e-3)
    for objective in (OBJECTIVES[0], OBJECTIVES[2]):
        (folder,) = (tmp_path / f"run-{objective.kind}").iterdir()
        assert folder.name == "checkpoint-00000010"
        # each part of the features once, by one of the replicas that hold it
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        assert size < 1.2 * 3 * 4 * (2 * 96 * 40 + 96 + 40) + 4 * 4000
    # a lost file is not made up for by what the weights were at first
    lost = next((tmp_path / "run-topk").glob("*/*.safetensors"))
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=f"lacks {lost.name}"):
        trained(TopK(), None, tmp_path / "run-topk")
    lost.write_bytes(content)
    went_well(together(2, TWO, tmp_path))
    for objective in (OBJECTIVES[0], OBJECTIVES[2]):
        alone, curve = trained(objective, None)
        assert json.loads((tmp_path / f"resumed-{objective.kind}.json").read_text()) == pytest.approx(
            curve[2:], rel=1e-3
        )
        # one process goes on from what two have written
        last, _ = trained(objective, None, tmp_path / f"run-{objective.kind}")
        for name, value in alone.tensors().items():
            assert torch.allclose(last.tensors()[name], value, rtol=1e-3, atol=2e-3), (objective.kind, name)


LEFT = """
split = mesh_of(2, "cpu")
def leave(report):
    if report.step == 10 and rank == 1:
        os._exit(7)
config = case(TopK())
sf.sae.train_sae(data_of(TopK(), 1500)[0], config, folder / "run", split=split, checkpoint_every=EVERY, progress=leave)
"""


def test_a_worker_that_leaves_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    said = ended(together(2, LEFT, tmp_path))
    assert "RuntimeError: train_sae: another process of the run has left or cannot be reached" in said[0]
    kept = [file.parent.name for file in (tmp_path / "run").glob("*/run.json")]
    assert kept in (["checkpoint-00000005"], ["checkpoint-00000010"])
    sae, _ = trained(TopK(), None, tmp_path / "run")
    alone, _ = trained(TopK(), None)
    for name, value in alone.tensors().items():
        assert torch.allclose(sae.tensors()[name], value, rtol=1e-3, atol=2e-3), name


MESHES = """
import pytest
from torch.distributed.device_mesh import init_device_mesh
with pytest.raises(ValueError, match="expected 'replica', 'feature', or both"):
    Mesh(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
with pytest.raises(TypeError, match="expected a DeviceMesh"):
    Mesh(2)
with pytest.raises(ValueError, match="do not divide into groups of 3"):
    mesh_of(3, "cpu")
x = data_of(TopK(), 1500)[0]
with pytest.raises(ValueError, match="97 features do not divide by 2 processes"):
    sf.sae.train_sae(x, config_of(TopK(), features=97), split=mesh_of(2, "cpu"))
with pytest.raises(ValueError, match="a batch of 201 rows does not divide by 2 replicas"):
    sf.sae.train_sae(x, config_of(TopK(), batch=201), split=mesh_of(1, "cpu"))
with pytest.raises(ValueError, match="processes have different rows or settings"):
    sf.sae.train_sae(data_of(TopK(), 1500, seed=rank)[0], config_of(TopK()), split=mesh_of(1, "cpu"))
with pytest.raises(ValueError, match="processes have different checkpoints, of the steps -1 and 20"):
    sf.sae.train_sae(x, config_of(TopK()), folder / ("shared" if rank else "own"), split=mesh_of(2, "cpu"))
"""


def test_meshes_that_do_not_fit(tmp_path: Path) -> None:
    train = case(TopK())
    sf.sae.train_sae(data_of(TopK(), 1500)[0], train, tmp_path / "own")
    went_well(together(2, MESHES, tmp_path))
