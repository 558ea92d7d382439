"""The documents of a corpus, one after another: a file of text, JSON lines or Parquet, or a folder of them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from steerfast.files.text import lines_of

_LINES = (".jsonl", ".ndjson")
_KINDS = (".txt", ".md", *_LINES, ".parquet")
_GIVE = "give a file of text, .jsonl or .parquet, or a folder"


def read_documents(path: str | os.PathLike[str], *, key: str = "text", title: str | None = None) -> Iterator[str]:
    r"""Yield the documents of a corpus, in the order of its files.

    Args:
        path: A UTF-8 text file, JSON lines (.jsonl, .ndjson: strings, or objects), Parquet (needs pyarrow), or a folder, whose
            files of these kinds are read in the order of their names.
        key: Where an object of JSON lines keeps its text; the column of a Parquet file.
        title: For text: a regular expression that matches the first line of each document, such as "^ = [^=].* = $" for WikiText;
            None: documents are what empty lines separate, so that the paragraphs of an article are documents of their own.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: no document is in it; a file is not what its name says; the expression is none.
        ImportError: a Parquet file, and pyarrow is not installed.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("corpus.txt").write_text("= A =\nOne.\n\nTwo.\n= B =\nThree.\n")
        >>> list(sf.sae.read_documents("corpus.txt", title="^= "))
        ['= A =\nOne.\n\nTwo.', '= B =\nThree.']
    """
    place = Path(path).expanduser()
    if not place.exists():
        raise FileNotFoundError(f"documents: {place} does not exist; {_GIVE}")
    first = _pattern(title)
    files = sorted(file for file in place.rglob("*") if file.suffix in _KINDS) if place.is_dir() else [place]
    if not files:
        raise ValueError(f"documents: {place} has no file that ends in {', '.join(_KINDS)}")
    return _documents(place, files, key, first)


def _documents(place: Path, files: list[Path], key: str, first: re.Pattern[str] | None) -> Iterator[str]:
    empty = True
    for file in files:
        if file.suffix in _LINES:
            found = _json_lines(file, key)
        else:
            found = _parquet(file, key) if file.suffix == ".parquet" else _text(file, first)
        for document in found:
            if document.strip():
                empty = False
                yield document.strip()
    if empty:
        raise ValueError(f"documents: {place} holds no text; give a corpus with content")


def _pattern(title: str | None) -> re.Pattern[str] | None:
    try:
        return None if title is None else re.compile(title)
    except re.error as error:
        raise ValueError(f"documents: title {title!r} is no regular expression ({error})") from None


def _text(file: Path, first: re.Pattern[str] | None) -> Iterator[str]:
    lines: list[str] = []
    for line in lines_of("documents", file, _GIVE):
        begins = not line.strip() if first is None else first.search(line) is not None
        if begins:
            yield "\n".join(lines)
            lines = []
        lines.append(line)
    yield "\n".join(lines)


def _json_lines(file: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(lines_of("documents", file, _GIVE), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"documents: line {number} of {file} is no JSON ({error})") from None
        yield _field(record, key, f"line {number} of {file}")


def _field(record: Any, key: str, where: str) -> str:
    text = record.get(key) if isinstance(record, dict) else record
    if not isinstance(text, str):
        there = (
            f"its keys are {', '.join(map(repr, record))}"
            if isinstance(record, dict)
            else f"it is {type(record).__name__}"
        )
        raise ValueError(f"documents: {where} has no text under {key!r}; {there}: name another key")
    return text


def _parquet(file: Path, key: str) -> Iterator[str]:
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError(f"documents: reading {file} needs pyarrow; pip install pyarrow") from None
    try:
        table = parquet.ParquetFile(file)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"documents: {file} is no Parquet file ({error})") from None
    if key not in table.schema_arrow.names:
        raise ValueError(
            f"documents: {file} has no column {key!r}, but {', '.join(table.schema_arrow.names)}: name another key"
        )
    for batch in table.iter_batches(columns=[key], batch_size=256):
        for text in batch.column(0).to_pylist():
            if text is not None:
                yield _field(text, key, f"a row of {file}")
