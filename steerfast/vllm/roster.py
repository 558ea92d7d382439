"""What an engine's folders held when its first process read them: the others serve the same, or do not start.

An engine is several processes, each of which reads the folders of plans and probes for itself, some of them a minute later. The
first one writes down what it has found, beside the counters that all of them share. What is added later is left out, and where
something has changed or gone the engine stops: a front end and a worker that know different plans would steer wrongly.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

from .counters import FOLDER


def begin() -> None:
    """An engine starts in this process, which vLLM has not started itself: what earlier ones have found holds no longer."""
    if multiprocessing.parent_process() is None:
        for variable in ("STEERFAST_PLANS", "STEERFAST_PROBES"):
            if os.environ.get(variable):
                _record(Path(os.environ[variable])).unlink(missing_ok=True)


class Roster:
    """The folders below a directory that all processes of an engine serve.

    Args:
        variable: The environment variable that names the directory, for messages.
        root: The directory.
        file: What a folder must hold to be one of them.

    Raises:
        ValueError: another process of this engine has found something else.
    """

    def __init__(self, variable: str, root: Path, file: str) -> None:
        self._variable, self._root, self._file = variable, root, file
        found = {path.name: self._state(path) for path in sorted(root.iterdir()) if (path / file).is_file()}
        self._known = found if FOLDER not in os.environ else _first(_record(root), found)
        self.folders = [root / name for name in self._known]
        """In the order of their names."""
        for folder in self.folders:
            self.check(folder)

    def check(self, folder: Path) -> None:
        """Once more, behind what was read of it.

        Raises:
            ValueError: it is not what the engine's first process has found.
        """
        if self._state(folder) != self._known[folder.name]:
            what = "has changed" if (folder / self._file).is_file() else "has gone"
            raise ValueError(
                f"{self._variable}: {folder.name!r} in {str(self._root)!r} {what} while the engine was starting, and not all of "
                "its processes have read the same; start it again, and leave the folder as it is until it runs"
            )

    def _state(self, folder: Path) -> str:
        """What tells two states of a folder apart without reading its tensors, whose hash stands in the text."""
        digest = hashlib.sha256()
        try:
            for file in sorted(path for path in folder.iterdir() if path.is_file()):
                about = file.stat()
                digest.update(f"{file.name} {about.st_size} {about.st_mtime_ns}\n".encode())
            digest.update((folder / self._file).read_bytes())
        except OSError:
            return ""
        return digest.hexdigest()


def _record(root: Path) -> Path:
    return Path(os.environ[FOLDER]) / f"roster-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:24]}.json"


def _first(record: Path, found: dict[str, str]) -> dict[str, str]:
    """What the first process has written down; it is this one if nobody else has."""
    with tempfile.NamedTemporaryFile("w", dir=record.parent) as file:
        json.dump(found, file)
        file.flush()
        try:
            os.link(file.name, record)  # whole or not at all, and never over another's
        except FileExistsError:
            known: dict[str, str] = json.loads(record.read_bytes())
            return known
    return found
