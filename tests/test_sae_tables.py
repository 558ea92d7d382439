"""Rows of Parquet and Arrow files and of Hugging Face data sets: the same rows whatever holds them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as arrow
import pytest
import torch
from pyarrow import parquet

import steerfast as sf
from steerfast.sae import tables
from steerfast.sae.tables import TableRows

D = 24
ROWS = torch.randn(600, D, generator=torch.Generator().manual_seed(0)).numpy()
CONFIG = sf.sae.TrainConfig(features=48, k=4, tokens=1200, batch=100)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "SHARD_ROWS", 100)


def fixed(rows: np.ndarray) -> Any:
    return arrow.FixedSizeListArray.from_arrays(arrow.array(rows.ravel()), D)


def lists(rows: np.ndarray) -> Any:
    return arrow.array(rows.tolist(), arrow.list_(arrow.float32()))


def contexts(rows: np.ndarray) -> Any:
    """Vectors of contexts of 7, 5, 7, 5, … tokens."""
    parts, at = [], 0
    while at < len(rows):
        size = 7 if len(parts) % 2 == 0 else 5
        parts.append(rows[at : at + size].tolist())
        at += size
    return arrow.array(parts, arrow.list_(arrow.list_(arrow.float32())))


def half(rows: np.ndarray) -> Any:
    return arrow.FixedSizeListArray.from_arrays(arrow.array(rows.astype(np.float16).ravel()), D)


KINDS = {"fixed": fixed, "lists": lists, "contexts": contexts, "half": half}


def write(file: Path, column: Any, format: str, per_group: int = 20) -> None:
    table = arrow.table({"text": arrow.array(["a"] * len(column)), "acts": column})
    if format == "parquet":
        parquet.write_table(table, file.with_suffix(".parquet"), row_group_size=per_group)
        return
    open_writer = arrow.ipc.new_stream if format == "stream" else arrow.ipc.new_file
    with arrow.OSFile(str(file.with_suffix(".arrow")), "wb") as sink, open_writer(sink, table.schema) as writer:
        writer.write_table(table, per_group)


def all_rows(source: Any) -> torch.Tensor:
    parts = [source.read(shard) for shard in range(len(source.counts))]
    assert [len(part) for part in parts] == list(source.counts)
    return torch.cat(parts).float()


@pytest.mark.parametrize("format", ["parquet", "file", "stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_the_same_whatever_holds_them(kind: str, format: str, tmp_path: Path) -> None:
    for number, part in enumerate(np.split(ROWS, 3)):
        write(tmp_path / f"part-{number}", KINDS[kind](part), format)
    source = TableRows(tmp_path)
    expected = torch.from_numpy(ROWS.astype(np.float16) if kind == "half" else ROWS).float()
    assert torch.equal(all_rows(source), expected)
    assert (len(source), source.d) == (600, D)
    assert min(source.counts) >= 12
    assert max(source.counts) < 100 + 20 * 7
    assert source.read(0).dtype == (torch.float16 if kind == "half" else torch.float32)


def test_counts_come_from_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Parquet no row group is read before `read`, but one row that tells the width."""
    write(tmp_path / "a", contexts(ROWS), "parquet")
    real, read = parquet.ParquetFile.read_row_groups, []
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_groups", lambda self, *a, **k: read.append(a[0]) or real(self, *a, **k)
    )
    source = TableRows(tmp_path, column="acts")
    assert (sum(source.counts), read) == (600, [])
    source.read(1)
    assert len(read) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_may_have_the_name_of_a_hook(kind: str, tmp_path: Path) -> None:
    """`blocks.1.hook_resid_post`, as SAELens writes them: no path into a column "blocks", which may stand there, too."""
    rows, others = KINDS[kind](ROWS), lists(np.zeros((600, 2), np.float32))
    name, count = "blocks.1.hook_resid_post", len(rows)
    about = arrow.array([{"a": 1, "b": {"c": "", "d": [1]}}] * count)
    columns = {"about": about, "blocks": others[:count], "blocks.1": others[:count], name: rows}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet", row_group_size=20)
    assert torch.equal(
        all_rows(TableRows(tmp_path, name)), torch.from_numpy(np.float16(ROWS) if kind == "half" else ROWS).float()
    )
    assert not all_rows(TableRows(tmp_path, "blocks")).any()


@pytest.mark.parametrize("format", ["parquet", "stream"])
def test_an_address_of_fsspec(format: str, tmp_path: Path) -> None:
    write(tmp_path / "a", contexts(ROWS), format)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path), "/bucket/rows", recursive=True)
    try:
        source = TableRows("memory://bucket/rows")
        assert torch.equal(all_rows(source), torch.from_numpy(ROWS))
    finally:
        memory.rm("/bucket", recursive=True)
    with pytest.raises(FileNotFoundError, match="memory://bucket/rows does not exist"):
        TableRows("memory://bucket/rows")
    with pytest.raises(ValueError, match="is no path or address that fsspec knows"):
        TableRows("nothing://bucket/rows")


def test_training_on_a_table_and_going_on(tmp_path: Path) -> None:
    """What a tensor of the same shards trains; other contents of the same size do not continue a run."""
    write(tmp_path / "rows", fixed(ROWS), "parquet")
    source = TableRows(tmp_path)
    first = sf.sae.train_sae(source, CONFIG, tmp_path / "run")
    again = sf.sae.train_sae(TableRows(tmp_path), CONFIG, tmp_path / "run")
    assert torch.equal(first.w_enc, again.w_enc)
    write(tmp_path / "rows", fixed(np.flip(ROWS, 0).copy()), "parquet")
    with pytest.raises(ValueError, match="another run"):
        sf.sae.train_sae(TableRows(tmp_path), CONFIG, tmp_path / "run")


def test_a_data_set_of_hugging_face(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    context = ROWS.reshape(-1, 6, D)
    kinds = {
        "vectors": (datasets.Sequence(datasets.Value("float32"), length=D), ROWS.tolist()),
        "lists": (datasets.Sequence(datasets.Value("float32")), ROWS.tolist()),
        "matrices": (datasets.Array2D((6, D), "float32"), context.tolist()),
    }
    for name, (feature, values) in kinds.items():
        features = datasets.Features({"acts": feature, "n": datasets.Value("int64")})
        data = datasets.Dataset.from_dict({"acts": values, "n": range(len(values))}, features=features)
        source = TableRows(data)
        assert torch.equal(all_rows(source), torch.from_numpy(ROWS)), name
        assert len(source.counts) >= 6
        back = data.select(range(len(data) - 1, -1, -1))
        mixed = torch.from_numpy(np.flip(np.array(values, dtype=np.float32), 0).reshape(-1, D).copy())
        assert torch.equal(all_rows(TableRows(back)), mixed), name
        assert TableRows(back).fingerprint != source.fingerprint
        data.save_to_disk(tmp_path / name)
        assert torch.equal(all_rows(TableRows(tmp_path / name, "acts")), torch.from_numpy(ROWS)), name
    with pytest.raises(TypeError, match="load it without streaming"):
        TableRows(data.to_iterable_dataset())
    with pytest.raises((TypeError, FileNotFoundError)):
        TableRows(datasets.DatasetDict({"train": data}))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        TableRows(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no file that ends in"):
        TableRows(tmp_path)
    write(tmp_path / "a", fixed(ROWS), "parquet")
    with pytest.raises(ValueError, match=r"hold vectors of floats are 'acts'; 'text' is none of them"):
        TableRows(tmp_path, "text")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"a\.parquet is damaged"):
        TableRows(tmp_path)
    (tmp_path / "a.parquet").write_bytes(whole)
    source = TableRows(tmp_path)
    (tmp_path / "a.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        source.read(3)
    narrow = arrow.array(ROWS[:, :8].tolist(), arrow.list_(arrow.float32()))
    write(tmp_path / "a", lists(ROWS), "parquet")
    write(tmp_path / "b", narrow, "parquet")
    with pytest.raises(ValueError, match="has rows of width 8, those before 24; of different models"):
        TableRows(tmp_path)
    (tmp_path / "b.parquet").unlink()
    ragged = arrow.array([*ROWS[:50].tolist(), [1.0] * 20, [2.0] * 28], arrow.list_(arrow.float32()))
    write(tmp_path / "a", ragged, "parquet", 100)
    with pytest.raises(ValueError, match=r"vectors of the lengths \[24, 20, 28\]"):
        TableRows(tmp_path).read(0)
    write(tmp_path / "a", arrow.array([*ROWS[:5].tolist(), None], arrow.list_(arrow.float32())), "parquet")
    with pytest.raises(ValueError, match="no whole rows of width 24"):
        TableRows(tmp_path)
    two = arrow.table({"a": fixed(ROWS), "b": fixed(ROWS)})
    parquet.write_table(two, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="'a', 'b'; name a column"):
        TableRows(tmp_path)


def test_files_without_rows(tmp_path: Path) -> None:
    write(tmp_path / "a", lists(ROWS[:0]), "parquet")
    with pytest.raises(ValueError, match="the source holds no rows"):
        TableRows(tmp_path)
    write(tmp_path / "b", lists(ROWS[:250]), "parquet", 100)
    source = TableRows(tmp_path)
    assert source.counts == (100, 100, 50)
    assert np.array_equal(torch.cat([source.read(i) for i in range(3)]).numpy(), ROWS[:250])


def test_rows_that_are_not_finite(tmp_path: Path) -> None:
    bad = ROWS.copy()
    bad[345, 3] = np.nan
    write(tmp_path / "a", fixed(bad), "parquet", 100)
    with pytest.raises(ValueError, match="row 45 of shard 3 holds NaN or Inf"):
        sf.sae.train_sae(TableRows(tmp_path), CONFIG)


def test_without_pyarrow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "steerfast\[parquet\]"'):
        TableRows(tmp_path)
