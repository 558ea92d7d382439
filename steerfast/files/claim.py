"""A folder that one process at a time writes: the claim ends with the process, however that ends."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Claim:
    """A claim on a folder, or on what a name in it stands for, until it is closed or the process ends.

    It is a lock of `flock` on the file `folder/name`, which is there as long, and stays where the process was killed. A process
    that was forked meanwhile shares it. Where the system (Windows) or the file system has no such locks, nothing is locked.

    Args:
        folder: It exists.
        name: Of the file.

    Raises:
        BlockingIOError: it is claimed already, by another process or in this one.
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self._file, self._held = folder / name, -1
        if fcntl is None:
            return
        while True:
            self._held = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                if self._lock():
                    return
            except OSError:
                os.close(self._held)
                raise
            os.close(self._held)  # of a file that its holder has just removed

    def close(self) -> None:
        """Let others have it."""
        if self._held >= 0:
            with suppress(OSError):  # what stays of it claims nothing: no reason to lose what the holder has made
                self._file.unlink()
            os.close(self._held)
            self._held = -1

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self) -> bool:
        """Lock the file, and tell whether it is still the one of that name."""
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return True
        try:
            return os.path.samestat(os.fstat(self._held), os.stat(self._file))
        except FileNotFoundError:
            return False
