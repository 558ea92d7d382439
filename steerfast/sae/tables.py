"""Rows of activations in Parquet and Arrow files and in Hugging Face data sets, read with pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from steerfast.files.remote import Folder, digest
from steerfast.place import Origin

SHARD_ROWS = 32768
"""Neighbouring row groups, record batches or examples make a shard of so many rows at least."""


@dataclass(frozen=True)
class _Shard:
    """Some neighbouring pieces of a column.

    Attributes:
        chunks: Reads them, as arrays of pyarrow.
        leaves: Numbers in them.
        where: For messages.
    """

    chunks: Callable[[], list[Any]]
    leaves: int
    where: str


class TableRows:
    """A column of activations in Parquet or Arrow files, or in a data set of Hugging Face.

    A value of the column is a vector (d,), or the vectors of a context, (tokens, d). Nothing but metadata is read before `read`:
    of Parquet the footers, of Arrow files and data sets, which are mapped into memory, the offsets of their lists.

    Args:
        source: A .parquet or .arrow file or a folder of them, as a path or an address that fsspec knows (s3://…), among them
            what `Dataset.save_to_disk` wrote; or a `datasets.Dataset`.
        column: The column's name; None: the only one with vectors.
        origin: Where the rows were read.

    Attributes:
        counts: Rows of each shard.
        d: Width of a row.

    Raises:
        ImportError: pyarrow is not installed.
        FileNotFoundError: there is nothing at the path, or no such file in it.
        TypeError: a data set that can only be run through (streaming), or one with splits.
        ValueError: no such column, or it holds no vectors of one width; a file is damaged.

    Example:
        >>> rows = sf.sae.TableRows("activations", column="resid_post")  # doctest: +SKIP
        >>> sf.sae.train_sae(rows, config)  # doctest: +SKIP
    """

    def __init__(self, source: Any, column: str | None = None, origin: Origin | None = None) -> None:
        _arrow()
        self.origin, self._column, self.d = origin or Origin(), column, 0
        self._about, self._shards = list[Any](), list[_Shard]()
        if hasattr(source, "features"):
            self._data_set(source)
        else:
            self._folder(Folder(source, "TableRows"))
        if not self._shards:
            raise ValueError("TableRows: the source holds no rows; give activations")
        for shard in self._shards:
            if shard.leaves % self.d:
                raise ValueError(
                    f"TableRows: {shard.where} hold {shard.leaves} numbers, no whole rows of width {self.d}; are they of "
                    "another model, or is a value empty?"
                )
        self.counts: Sequence[int] = tuple(shard.leaves // self.d for shard in self._shards)

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What identifies the rows: the column, their number, and a hash of names, sizes and ends of the files."""
        return {"column": self._column, "rows": len(self), "d": self.d, "sha256": digest(self._about)}

    def read(self, shard: int) -> Tensor:
        """The rows of one shard, (rows, d), in their stored dtype.

        Raises:
            ValueError: a file is damaged or was changed, or the column holds empty values or vectors of another width.
        """
        wanted = self._shards[shard]
        try:
            rows = [_matrix(part, self.d, wanted.where) for part in wanted.chunks()]
        except (OSError, _arrow().ArrowException) as error:
            raise ValueError(f"TableRows: {wanted.where} cannot be read ({error}); make the file again") from error
        return torch.from_numpy(np.concatenate(rows))

    def _folder(self, folder: Folder) -> None:
        files = folder.files(".parquet", ".arrow")
        if not files:
            raise FileNotFoundError(f"TableRows: {folder.name} has no file that ends in .parquet or .arrow")
        for file in files:
            read = self._parquet if file.endswith(".parquet") else self._arrow_file
            try:
                self._shards += read(folder, file)
            except (OSError, _arrow().ArrowException) as error:
                raise ValueError(f"TableRows: {file} is damaged ({error}); make it again") from error
            self._about.append(folder.stamp(file))

    def _parquet(self, folder: Folder, file: str) -> Iterator[_Shard]:
        parquet = import_module("pyarrow.parquet")

        def groups(first: int, last: int) -> list[Any]:
            with folder.open(file) as opened:
                wanted = list(range(first, last))
                return list(parquet.ParquetFile(opened).read_row_groups(wanted, columns=[column]).column(column).chunks)

        with folder.open(file) as opened:
            table = parquet.ParquetFile(opened)
            column = self._chosen(table.schema_arrow, file)
            leaf = sum(
                _leaves(field.type) for field in takewhile(lambda field: field.name != column, table.schema_arrow)
            )
            groups_about = map(table.metadata.row_group, range(table.num_row_groups))
            counts = [group.column(leaf).num_values for group in groups_about]
            if not any(counts):
                return
            self._check(next(table.iter_batches(1, columns=[column])).column(column), file)
        for first, last, leaves in _grouped(counts, SHARD_ROWS * self.d):
            yield _Shard(partial(groups, first, last), leaves, f"row groups {first} to {last - 1} of {file}")

    def _arrow_file(self, folder: Folder, file: str) -> Iterator[_Shard]:
        arrow, ipc = _arrow(), import_module("pyarrow.ipc")
        mapped = arrow.memory_map(folder.local(file))
        try:
            reader = ipc.open_file(mapped)
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except arrow.ArrowInvalid:  # a stream, as data sets are kept
            mapped.seek(0)
            reader = ipc.open_stream(mapped)
            batches = list(reader)
        column = self._chosen(reader.schema, file)
        chunks = [batch.column(column) for batch in batches if batch.num_rows]
        for chunk in chunks:
            self._check(chunk, file)
        for first, last, leaves in _grouped([len(_numbers(chunk)) for chunk in chunks], SHARD_ROWS * self.d):
            yield _Shard(partial(list, chunks[first:last]), leaves, f"record batches {first} to {last - 1} of {file}")

    def _data_set(self, data: Any) -> None:
        if not hasattr(data, "_fingerprint"):
            raise TypeError(
                f"TableRows: {type(data).__name__} is no data set with rows by number; load it without streaming, and name its "
                "split, such as data['train']"
            )
        column = self._chosen(data.features.arrow_schema, "the data set")
        table = data.select_columns([column]).with_format("arrow")
        self._about.append(data._fingerprint)
        if len(data) == 0:
            return

        def examples(first: int, last: int) -> list[Any]:
            return list(table[first:last].column(0).chunks)

        (one,) = examples(0, 1)
        self._check(one, "the data set")
        step = max(1, SHARD_ROWS * self.d // len(_numbers(one)))
        for first in range(0, len(table), step):
            last = min(first + step, len(table))
            chunks = partial(examples, first, last)
            vectors = len(_numbers(one)) == self.d and _depth(one.type) == 1
            leaves = (last - first) * self.d if vectors else sum(len(_numbers(part)) for part in chunks())
            self._shards.append(_Shard(chunks, leaves, f"examples {first} to {last - 1} of the data set"))

    def _chosen(self, schema: Any, where: str) -> str:
        """The column, which is there and holds vectors."""
        found = [field.name for field in schema if _depth(field.type) in (1, 2)]
        if self._column is None and len(found) == 1:
            self._column = str(found[0])
        if self._column is None or self._column not in found:
            named = "name a column" if self._column is None else f"{self._column!r} is none of them"
            there = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"TableRows: the columns of {where} that hold vectors of floats are {there}; {named}")
        return self._column

    def _check(self, chunk: Any, where: str) -> None:
        """The width of the first vector is that of all sources."""
        width = _width(chunk, where)
        if self.d not in (0, width):
            raise ValueError(
                f"TableRows: {where} has rows of width {width}, those before {self.d}; of different models?"
            )
        self.d = width


def _arrow() -> Any:
    try:
        return import_module("pyarrow")
    except ImportError:
        raise ImportError('TableRows: needs pyarrow; pip install "steerfast[parquet]"') from None


def _storage(kind: Any) -> Any:
    """A type without what a library calls it."""
    return kind.storage_type if hasattr(kind, "storage_type") else kind


def _depth(kind: Any) -> int:
    """How many lists lie around the floats of a type; 0 where it holds anything else."""
    types, depth = _arrow().types, 0
    kind = _storage(kind)
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind, depth = _storage(kind.value_type), depth + 1
    return depth if types.is_floating(kind) else 0


def _bare(array: Any) -> Any:
    return array.storage if hasattr(array, "storage") else array


def _lists(array: Any) -> Any:
    """The innermost lists of an array: one for each vector."""
    array = _bare(array)
    for _ in range(_depth(array.type) - 1):
        array = _bare(array.flatten())
    return array


def _numbers(array: Any) -> Any:
    """The floats of an array, in order; nothing is copied."""
    return _lists(array).flatten()


def _width(array: Any, where: str) -> int:
    lists = _lists(array)
    width = len(lists[0]) if len(lists) and lists[0].is_valid else 0
    if width == 0:
        raise ValueError(f"TableRows: the first value of {where} is empty; expected vectors, one for each token")
    return width


def _matrix(array: Any, d: int, where: str) -> NDArray[Any]:
    """The rows of an array, (rows, d)."""
    lists = _lists(array)
    numbers = lists.flatten()
    if numbers.null_count or len(numbers) != d * len(lists):
        raise ValueError(
            f"TableRows: {where} have {len(lists)} vectors with {len(numbers)} numbers, {numbers.null_count} of them empty; "
            f"expected vectors of width {d}"
        )
    lengths = import_module("pyarrow.compute").list_value_length(lists)
    if not all(length.as_py() == d for length in lengths.unique()):
        raise ValueError(f"TableRows: {where} have vectors of the lengths {lengths.unique().to_pylist()}; expected {d}")
    return np.array(numbers.to_numpy(zero_copy_only=False)).reshape(-1, d)


def _leaves(kind: Any) -> int:
    """How many columns of numbers, texts and the like a Parquet file keeps of a type."""
    kind = _storage(kind)
    return sum(_leaves(kind.field(i).type) for i in range(kind.num_fields)) or 1


def _grouped(counts: Sequence[int], least: int) -> Iterator[tuple[int, int, int]]:
    """Runs of neighbours that hold `least` together, the last one perhaps less: (first, last exclusive, sum)."""
    first, total = 0, 0
    for number, count in enumerate(counts):
        total += count
        if total >= least or (number == len(counts) - 1 and total):
            yield first, number + 1, total
            first, total = number + 1, 0
