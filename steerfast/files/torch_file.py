"""Reading what torch.save wrote without running any of it."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def read_torch_file(path: Path, allowed: Iterable[tuple[type, str]] = ()) -> Any:
    """Return the object in a torch file, with its tensors on the CPU.

    Args:
        path: the file, of PyTorch 1.6 or newer (a zip archive).
        allowed: (class, full name): a class of ours that takes the place of the one that the file names.

    Raises:
        ValueError: not a torch file, damaged, with sizes that the file cannot hold, or with anything but tensors,
            containers, numbers, texts and the allowed classes.
    """
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(list(allowed)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a hostile file provokes in the reader is one thing to the user
        # what its reader objects to, without its advice to read the file unsafely
        reason = " ".join(str(error).rpartition("WeightsUnpickler error:")[2].partition("Please file")[0].split())[:300]
        raise ValueError(
            f"{path} cannot be read safely as a torch file of tensors: {reason}; if you trust where it comes from, have its "
            "own library write safetensors"
        ) from None


def as_vector(value: Any, what: str, path: Path) -> Tensor:
    """One vector (d,) of a torch file in float32; leading dimensions of size 1 are dropped."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{path}: {what} is a {type(value).__name__}; expected a tensor (d,)")
    if not value.is_floating_point() or value.layout != torch.strided:
        raise ValueError(f"{path}: {what} has dtype {value.dtype}, layout {value.layout}; expected dense floats")
    if value.numel() * value.element_size() > path.stat().st_size:
        raise ValueError(f"{path}: {what} has shape {tuple(value.shape)}, more than the file holds; it is damaged")
    if value.dim() == 0 or value.numel() != value.shape[-1]:
        raise ValueError(f"{path}: {what} has shape {tuple(value.shape)}; expected (d,)")
    return value.detach().flatten().float()


def _check_archive(path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from None
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "data.pkl" not in names:
        raise ValueError(f"{path} is a zip archive, but none that torch.save wrote")
    if "constants.pkl" in names:
        raise ValueError(f"{path} is a TorchScript program, not a file of tensors")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError(f"{path} is a compressed archive; torch.save writes none")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise ValueError(f"{path} declares contents larger than the file; it is damaged")
