"""Files that are written whole or not at all, and whether they can be."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path

_LOCK = threading.Lock()


def replace_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name beside it, then rename it; a folder that is missing is made."""
    replace_files(path.parent, {path.name: content})


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files of a folder, which is made if need be, by name: all of them, or, if that fails, none.

    All are written under temporary names before the first is renamed, so a full disk changes nothing; if a rename fails,
    the old files come back. Threads write one after another, so that files of two of them are never mixed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _LOCK:
        _replace(folder, contents)


def no_folder(folder: Path) -> str | None:
    """Why nothing can be written into a folder, in words, before it is tried; None: it is there, or can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        return f"{there} is a file; give a folder, which need not exist"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} may not be written into; give another folder"


def no_file(file: Path) -> str | None:
    """Why a file cannot be written, as `no_folder`."""
    return f"{file} is a folder; give a file" if os.path.isdir(file) else no_folder(file.parent)


def _replace(folder: Path, contents: Mapping[str, bytes]) -> None:
    temporary = {folder / name: folder / f".{name}.{os.getpid()}" for name in contents}
    try:
        for path, (wanted, content) in zip(temporary.values(), contents.items(), strict=True):
            _write(path, content, folder / wanted)
        _rename(temporary)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def _write(path: Path, content: bytes, wanted: Path) -> None:
    """Write under the temporary name; what goes wrong names the file that was wanted."""
    try:
        path.write_bytes(content)
    except OSError as error:
        if error.errno is None:  # it says all that it knows in words
            raise
        raise OSError(error.errno, error.strerror, str(wanted)) from error


def _rename(temporary: Mapping[Path, Path]) -> None:
    """Bring files from their temporary names to their own, in order; the rename of the last one decides."""
    *first, last = temporary
    aside: dict[Path, Path] = {}
    placed: list[Path] = []
    try:
        for path in first:
            if path.is_file():
                os.replace(path, path.with_name(f".{path.name}.old.{os.getpid()}"))
                aside[path] = path.with_name(f".{path.name}.old.{os.getpid()}")
            os.replace(temporary[path], path)
            placed.append(path)
        os.replace(temporary[last], last)
    except BaseException:
        for path in placed:
            path.unlink(missing_ok=True)
        for path, old in aside.items():
            os.replace(old, path)
        raise
    for old in aside.values():
        old.unlink()
