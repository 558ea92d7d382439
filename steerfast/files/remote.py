"""Folders of files behind any path that fsspec knows, a local one among them, and what identifies them unread."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from importlib import import_module
from typing import Any

_ENDS = 1 << 12  # bytes at each end of a file that are hashed: headers, footers, and some of the content


class Folder:
    """The files of a folder, or one file; local, or behind an address such as s3://bucket/rows.

    Args:
        path: A path, or an address of a protocol that fsspec knows.
        owner: The public function that reads, for its messages.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ImportError: the protocol needs a package that is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], owner: str) -> None:
        fsspec = import_module("fsspec")  # slow to import, and seldom needed
        name = os.path.expanduser(os.fspath(path))
        try:
            self.system, self.root = fsspec.core.url_to_fs(name)
        except ImportError as error:
            raise ImportError(f"{owner}: {name} cannot be reached ({error})") from error
        except ValueError as error:
            raise ValueError(f"{owner}: {name} is no path or address that fsspec knows ({error})") from error
        self.name, self.owner = name, owner
        if not self.system.exists(self.root):
            raise FileNotFoundError(f"{owner}: {name} does not exist; give a folder, or one of its files")

    def files(self, *suffixes: str) -> list[str]:
        """The files with one of the endings, in the order of their names; hidden ones are left out."""
        found = [self.root] if self.system.isfile(self.root) else self.system.find(self.root)
        return sorted(file for file in found if file.endswith(suffixes) and not os.path.basename(file).startswith("."))

    def open(self, file: str) -> Any:
        """A file, opened for reading."""
        return self.system.open(file, "rb")

    def local(self, file: str) -> str:
        """A local file with the content: itself, or a copy that is kept while the process lives."""
        if "file" in (self.system.protocol, *self.system.protocol):
            return file
        return str(import_module("fsspec").filesystem("simplecache", fs=self.system).open(file).name)

    def stamp(self, file: str) -> tuple[str, int, str]:
        """What identifies a file: its name in the folder, its bytes, and a hash of its ends."""
        size = int(self.system.size(file))
        with self.open(file) as opened:
            ends = opened.read(_ENDS)
            opened.seek(max(0, size - _ENDS))
            ends += opened.read(_ENDS)
        return os.path.relpath(file, self.root), size, hashlib.sha256(ends).hexdigest()


def digest(about: Any) -> str:
    """SHA-256 of what JSON can say."""
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def safetensors_header(opened: Any, size: int, where: str) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, by tensor, and where its data begin.

    Args:
        opened: The file, at its beginning.
        size: Its bytes.
        where: Its name, for messages.

    Raises:
        ValueError: it is none, or is not whole.
    """
    try:
        (length,) = struct.unpack("<Q", opened.read(8))
        if length > size:
            raise ValueError(f"a header of {length} bytes in {size}")
        header = json.loads(opened.read(length))
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        end = 8 + length + max((about["data_offsets"][1] for about in tensors.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where} is no safetensors file, or is not whole ({error}); make it again") from error
    if end != size:
        raise ValueError(f"{where} has {size} bytes, its header says {end}; it is not whole: make it again")
    return tensors, 8 + length
