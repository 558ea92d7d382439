"""Checkpoints of a training run, whole or not there."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save

from steerfast.files.replace import replace_file

from .distributed import Alone
from .trainer import Trainer

SCHEMA = 1


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
