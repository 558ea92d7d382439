"""Checkpoints of a training run, whole or not there, that any number of processes can go on from."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future as Written

from steerfast.files.claim import Claim
from steerfast.files.replace import replace_file

from .distributed import Alone, together
from .trainer import Trainer

SCHEMA = 3
_WHOLE = "run.json"
_NAME = re.compile(r"checkpoint-(\d{8,})")


class Checkpoints:
    """The checkpoints of a run in a directory: checkpoint-STEP with safetensors files and, once these are whole, run.json, which
    names them.

    `torch.distributed.checkpoint` writes them, each process its part, once. From a GPU it happens beside the training, from a
    copy in host memory. On a CPU, where a copy would double what training holds, the system's file cache takes them between two
    steps from where they lie, and only the disk is waited for beside the training. The checkpoint before it is removed only when
    a new one is whole; so at any moment one complete checkpoint exists.
    """

    def __init__(self, directory: Path, fingerprint: str, split: Alone) -> None:
        self.directory, self.fingerprint, self.split = directory, fingerprint, split
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._claim: Claim | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def save(self, trainers: Sequence[Trainer]) -> None:
        """Write the state of trainers on a CPU, or begin to, on a GPU, when the checkpoint before it is written; older ones are
        removed when it is whole.

        Raises:
            OSError: this one or the one before it cannot be written; the last whole one is still there.
        """
        self.finish()
        step = trainers[0].step
        folder = self._folder(step)
        header = {"schema": SCHEMA, "run": self.fingerprint, "step": step, "scales": [list(t.scales) for t in trainers]}
        how: dict[str, Any] = {"process_group": self.split.group, "no_dist": self.split.group is None}
        how["storage_writer"] = _InPlace(str(folder), save_distributed=True)
        written: Any = None
        with _named(folder):
            if trainers[0].device.type == "cpu":
                save(_state(trainers), **how)
            else:
                written = async_save(_state(trainers), **how)
        self._writing = self._writer.submit(self._complete, written, folder, header)

    def finish(self) -> None:
        """Return when the last checkpoint is whole.

        Raises:
            OSError: it could not be written; the one before it is still there.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Let another run have the directory."""
        if self._claim is not None:
            self._claim.close()

    def load(self, trainers: Sequence[Trainer]) -> None:
        """Claim the directory, and bring trainers to the last whole checkpoint; without any, leave them.

        Raises:
            ValueError: the checkpoint is of another run, or damaged; another run is at work in the directory; processes see
                different directories.
        """
        if self.split.rank == 0:
            try:
                self._claim = Claim(self.directory)
            except BlockingIOError:
                raise ValueError(
                    f"train_sae: another run is at work in {self.directory}; wait for its end, or choose another directory"
                ) from None
        if old := next(self.directory.glob("checkpoint-*.safetensors"), None):
            raise ValueError(
                f"train_sae: {old} is a checkpoint of an older version, which this one does not go on from; choose another "
                "directory, or remove it and begin anew"
            )
        step = self.split.agreed(
            max((number for number, folder in self._folders() if (folder / _WHOLE).exists()), default=-1),
            "checkpoints, of the steps {} and {}; give all of them one directory, on a file system that they share",
        )
        folder = self._folder(step)
        header = self._header(folder) if step >= 0 else {}
        self._remove_others(step)
        self.split.wait()  # before anybody writes a new one
        if step < 0:
            return
        try:
            with together():
                load(
                    _state(trainers),
                    storage_reader=HuggingFaceStorageReader(str(folder)),
                    process_group=self.split.group,
                    no_dist=self.split.group is None,
                )
        except CheckpointException as error:
            raise ValueError(f"train_sae: {folder} is damaged ({_reason(error)}); remove it and begin anew") from error
        for trainer, scales in zip(trainers, header["scales"], strict=True):
            trainer.step, trainer.scales = step, tuple(scales)

    def _header(self, folder: Path) -> dict[str, Any]:
        try:
            header: dict[str, Any] = json.loads((folder / _WHOLE).read_text(encoding="utf-8"))
            run = header["run"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"train_sae: {folder / _WHOLE} is damaged ({error}); remove {folder}") from error
        if header.get("schema") != SCHEMA:
            raise ValueError(
                f"train_sae: {folder} is of schema {header.get('schema')}, this version goes on from {SCHEMA}; choose another "
                "directory, or remove it and begin anew"
            )
        if run != self.fingerprint:
            raise ValueError(
                f"train_sae: {self.directory} holds the checkpoint of another run ({_differs(run, self.fingerprint)}); "
                "choose another directory, or the same data and configuration"
            )
        # what a file that is gone would give keeps the numbers of the beginning, unnoticed
        if gone := [name for name in header["files"] if not (folder / name).exists()]:
            raise ValueError(f"train_sae: {folder} lacks {', '.join(gone)}; bring back all of its files, or remove it")
        return header

    def _complete(self, written: Future[Any] | None, folder: Path, header: dict[str, Any]) -> None:
        """In the writer's thread: wait for the files, then say that they are whole and remove what is older."""
        with _named(folder):
            if written is not None:
                written.result()
            if self.split.rank == 0:
                files = sorted(folder.glob("*.safetensors"))
                for file in files:
                    _reach_disk(file)
                header["files"] = [file.name for file in files]
                replace_file(folder / _WHOLE, json.dumps(header, indent=2).encode())
                _reach_disk(folder / _WHOLE)  # before anything older goes
                self._remove_others(header["step"])

    def _remove_others(self, step: int) -> None:
        """Remove the checkpoints of all other steps; one process does it for all."""
        if self.split.rank == 0:
            for number, folder in self._folders():
                if number != step:
                    (folder / _WHOLE).unlink(missing_ok=True)
                    shutil.rmtree(folder)

    def _folders(self) -> list[tuple[int, Path]]:
        """Folders by the step in their name, which has eight digits at least: others, such as checkpoint-500, are not ours."""
        found = [(_NAME.fullmatch(folder.name), folder) for folder in self.directory.iterdir()]
        return [(int(name[1]), folder) for name, folder in found if name]

    def _folder(self, step: int) -> Path:
        return self.directory / f"checkpoint-{step:08d}"


class _InPlace(HuggingFaceStorageWriter):
    """Writes tensors from where they lie; the class of torch makes the bytes of a whole file beforehand, twice."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Written[list[WriteResult]]:
        """One file of what this process writes."""
        tensors, offsets, results = {}, {}, []
        for item in plan.items:
            name, tensor, about = item.index.fqn, planner.resolve_data(item), item.tensor_data
            if not isinstance(tensor, Tensor) or about is None:
                raise TypeError(f"checkpoint: {name} is a {type(tensor).__name__}; expected a tensor")
            tensors[name], offsets[name] = tensor, {"saved_offsets": list(about.chunk.offsets)}
            results.append(WriteResult(item.index, tensor.nbytes, None))
        if tensors:
            file = Path(self.path) / f"shard-{plan.storage_data['shard_index']:05d}.safetensors"
            save_file(tensors, file, {"format": "pt", "DCP_SHARDING_INFO": json.dumps(offsets)})
        written: Written[list[WriteResult]] = Written()
        written.set_result(results)
        return written


def _state(trainers: Sequence[Trainer]) -> dict[str, Tensor]:
    return {
        f"{number}.{name}": value for number, trainer in enumerate(trainers) for name, value in trainer.state().items()
    }


def _reach_disk(file: Path) -> None:
    """Return when a file of this or another process is on the disk, so that a machine that stops does not lose it."""
    with open(file, "r+b") as written:  # Windows flushes only what is open for writing
        os.fsync(written.fileno())


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """What keeps a checkpoint from being written names it."""
    try:
        with together():
            yield
    except (OSError, CheckpointException) as error:
        raise OSError(
            f"train_sae: {folder} cannot be written ({_reason(error)}); the checkpoint before it stays valid"
        ) from error


def _differs(there: str, here: str) -> str:
    """In what two runs differ, by their fingerprints; the first four of it."""
    try:
        old, new = (dict(_leaves("", json.loads(text))) for text in (there, here))
    except (TypeError, ValueError):
        return f"{_short(there)} there"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    found = [f"{name} {_short(old.get(name))} there, {_short(new.get(name))} here" for name in names[:4]]
    return "; ".join(found + [f"and {len(names) - 4} more"] * (len(names) > 4))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a tree of dicts and short lists holds, each with its path; several runs' fingerprints are a list of texts."""
    if isinstance(value, str) and value.startswith("{"):
        value = json.loads(value)
    if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], str | dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _leaves(f"{name}.{key}" if name else str(key), inner)
    else:
        yield name, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _reason(error: BaseException) -> str:
    """What went wrong, without the stack of every process that a failure of `torch.distributed.checkpoint` carries."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"process {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return str(error)
