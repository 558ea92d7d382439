"""A folder that one process at a time writes: the claim ends with the process, however that ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Claim:
    """A claim on a folder, or on what a name in it stands for, until it is closed or the process ends.

    It is a lock of `flock` on the file `folder/name`, which is there as long, and stays where the process was killed. Where the
    system or the file system has no locks, nothing is locked.

    Args:
        folder: It exists.
        name: Of the file.

    Raises:
        BlockingIOError: it is claimed already, by another process or in this one.
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, name: str = ".lock") -> None:
        self._file = folder / name
        self._held = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not self._lock():  # the file that was locked is one that its holder has just removed
                os.close(self._held)
                self._held = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            os.close(self._held)
            raise

    def close(self) -> None:
        """Let others have it."""
        if self._held >= 0:
            self._file.unlink(missing_ok=True)
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
        if fcntl is None:
            return True
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
