"""Rows: what a run keeps, one JSON object a line, with what its numbers depend on. `results.py` reads them."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import steerfast

Row = dict[str, Any]
PACKAGES = (
    "steerfast", "torch", "triton", "transformers", "vllm", "sae-lens", "eai-sparsify", "steering-vectors", "repeng",
    "torchdiffeq", "hotwire-vllm",
)  # fmt: skip


def circumstances(place: str) -> dict[str, Any]:
    """What numbers depend on: device, driver, versions, commit, date; nothing that names the machine."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = getattr(sys.modules.get(package), "__version__", None)
    root = Path(steerfast.__file__).resolve().parent  # of what is measured: an installed package may lie in another's
    ours = _ask("git", "ls-files", "--error-unmatch", "__init__.py", cwd=root)
    measuring = ".", "../kernels", "../benchmarks/lab"
    status = _ask("git", "status", "--porcelain", "--untracked-files=no", "--", *measuring, cwd=root)
    gpu = torch.cuda.is_available() and place == "cuda"
    return {
        "place": place,
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", cwd=root) if gpu else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name, version in versions.items() if version},
        "commit": _ask("git", "rev-parse", "HEAD", cwd=root) if ours else os.environ.get("STEERFAST_COMMIT"),
        "changed": status != "" if ours else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _ask(*command: str, cwd: Path) -> str | None:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """Its name, family and model (a virtual one is named after its whole series), and what its instructions were held to."""
    text = info.read_text() if (info := Path("/proc/cpuinfo")).is_file() else ""
    said = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.+?)\s*$", text, re.MULTILINE))
    name = said.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in said and "model" in said:
        name += f" (family {said['cpu family']} model {said['model']})"
    held = [os.environ[limit] for limit in ("ATEN_CPU_CAPABILITY", "NUMBA_CPU_NAME") if os.environ.get(limit)]
    return f"{name} held to {', '.join(held)}" if held else name


def file_of(folder: Path, origin: dict[str, Any]) -> Path:
    """Where the rows of a run with these circumstances go: a file for each day, place and device."""
    device = "-".join("".join(c if c.isalnum() else " " for c in origin["device"]).lower().split())
    return folder / f"{origin['series'][:10]}-{origin['place']}-{device}.jsonl"


def append_row(file: Path, row: Row) -> None:
    """Append a row to a file of one JSON object a line; where the disk is full the file stays as it was.

    Raises:
        OSError: the row could not be written whole.
    """
    text = (json.dumps(row, separators=(",", ":"), default=_number) + "\n").encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab", buffering=0) as out:
        before = out.tell()
        written = 0
        try:
            written = out.write(text)
            os.fsync(out.fileno())
        finally:
            if 0 < written < len(text):
                os.ftruncate(out.fileno(), before)
    if written < len(text):
        raise OSError(errno.ENOSPC, "the disk is full", str(file))


def _number(value: Any) -> float:
    return float(value)
