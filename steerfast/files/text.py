r"""Text files that people write: UTF-8, with or without a byte order mark, whose lines end with \n or \r\n and nowhere else."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from pathlib import Path


def lines_of(owner: str, file: str | os.PathLike[str], hint: str) -> Iterator[str]:
    """Yield the lines of a text file without their ends, one after another; nothing else is left out of them.

    Args:
        owner: The function or option that reads, for its messages.
        file: Of UTF-8, in a folder or the user's home (~).
        hint: What to give where it does not exist.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{owner}: {path} does not exist; {hint}")
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as opened:
            for line in opened:
                yield line.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{owner}: {path} is not UTF-8 ({error}); save it as UTF-8") from None


def text_of(owner: str, file: str | os.PathLike[str], hint: str) -> str:
    r"""The text of a file, whose lines end with \n, as `lines_of` reads them; of the last one no end is kept."""
    return "\n".join(lines_of(owner, file, hint))


def rows_of(owner: str, file: str | os.PathLike[str], hint: str) -> list[dict[str, str]]:
    """The rows of a CSV file under its header, by column; "" is what a row lacks.

    Raises:
        FileNotFoundError, ValueError: as `lines_of`, or it is no CSV.
    """
    text = text_of(owner, file, hint)
    try:
        return list(csv.DictReader(io.StringIO(text), restval=""))
    except csv.Error as error:
        raise ValueError(f"{owner}: {Path(file).expanduser()} is no CSV ({error})") from None
