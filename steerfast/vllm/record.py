"""The record that a passed `steerfast check --engine vllm` leaves: which engine it was, and which sources of ours."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from pathlib import Path

from steerfast.files.replace import replace_file
from steerfast.models.demo import cache_dir


def passed(version: str) -> bool:
    """Whether this vLLM has passed with today's sources of ours, or is being checked: then the record lies among the plans.

    A record that is damaged, or about another engine or other sources, is none.
    """
    plans = os.environ.get("STEERFAST_PLANS")
    return any(_read(folder, version) for folder in (_folder(), *([Path(plans)] if plans else [])))


def write(version: str, folder: Path | None = None) -> Path:
    """Leave the record, whole or not at all.

    Args:
        version: Of the engine, as it states it itself.
        folder: Where to; by default in the user's cache.

    Returns:
        The file.

    Raises:
        OSError: it cannot be written there.
    """
    file = (folder or _folder()) / _name(version)
    replace_file(file, json.dumps(_content(version), indent=1).encode())
    return file


def _folder() -> Path:
    return cache_dir() / "vllm-checks"


def _name(version: str) -> str:
    return f"checked-{version}.json"


def _content(version: str) -> dict[str, object]:
    return {"schema": 1, "engine": version, "plugin": _plugin()}


def _read(folder: Path, version: str) -> bool:
    try:
        return json.loads((folder / _name(version)).read_bytes()) == _content(version)
    except (OSError, ValueError):
        return False


@functools.cache
def _plugin() -> str:
    """SHA-256 of every source file of ours that an engine can run, kernels included."""
    digest = hashlib.sha256()
    for package in ("steerfast", "steerfast_kernels"):
        spec = importlib.util.find_spec(package)
        for root in map(Path, spec.submodule_search_locations or ()) if spec is not None else ():
            for file in sorted(root.rglob("*.py")):
                content = file.read_bytes()
                digest.update(f"{package}/{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()
