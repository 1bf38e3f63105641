"""Datasets read as tensors, and the memory-mapped cache that training reads."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import CorruptError, InputError
from millrace.formats.dataset import ColumnSchema, Manifest, PartEntry, open_dataset
from millrace.formats.feed import open_feed


def make(folder: Path, tables: list[pa.Table], **fields) -> Path:
    (folder / "train").mkdir(parents=True)
    parts = []
    for index, table in enumerate(tables):
        path = f"train/part-{index:05d}.parquet"
        pq.write_table(table, folder / path)
        parts.append(PartEntry(path=path, rows=table.num_rows, digest="sha256:0", size_bytes=1))
    manifest = Manifest(label="y", splits={"train": parts}, **fields)
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    return folder


COLUMNS = [
    ColumnSchema(name="n", type="number", role="feature"),
    ColumnSchema(name="c", type="category", role="feature", categories=["u", "v"]),
    ColumnSchema(name="b", type="boolean", role="feature"),
    ColumnSchema(name="who", type="category", role="id"),
    ColumnSchema(name="y", type="category", role="label"),
]


def mixed(folder: Path) -> Path:
    first = pa.table({"n": [1.5, None], "c": ["u", None], "b": [True, None], "who": ["x", "z"], "y": ["no", "yes"]})
    second = pa.table({"n": [2.0], "c": ["v"], "b": [False], "who": ["w"], "y": ["yes"]})
    return make(folder, [first, second], columns=COLUMNS, task="classification", classes=["no", "yes"])


def test_mixed_columns_as_tensors(tmp_path):
    reader = open_dataset(mixed(tmp_path / "d"))
    arrays = reader.arrays("train")
    np.testing.assert_array_equal(arrays["numbers"], np.array([[1.5, 1], [np.nan, np.nan], [2, 0]], dtype=np.float32))
    assert arrays["categories"].tolist() == [["u"], [""], ["v"]]
    assert reader.labels("train").tolist() == [0, 1, 1]
    assert reader.rows("train", [2])[0] == {"n": 2.0, "c": "v", "b": False, "who": "w", "y": "yes"}
    assert [(spec.name, spec.dtype, spec.columns) for spec in reader.signature_inputs()] == [
        ("numbers", "float32", ["n", "b"]),
        ("categories", "string", ["c"]),
    ]


def test_boolean_labels(tmp_path):
    table = pa.table({"n": [1.0, 2.0], "y": [True, False]})
    folder = make(tmp_path / "d", [table], columns=COLUMNS[:1], task="classification", classes=["false", "true"])
    assert open_dataset(folder).labels("train").tolist() == [1, 0]


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.binary(min_size=6, max_size=6), min_size=1, max_size=20))
def test_binary_pixels_come_back(tmp_path_factory, rows):
    table = pa.table({"pixels": rows, "y": [0] * len(rows)})
    folder = make(
        tmp_path_factory.mktemp("d") / "d",
        [table],
        columns=[ColumnSchema(name="y", type="category", role="label")],
        task="classification",
        classes=["0"],
        image=[2, 3],
        image_columns=[f"p{i}" for i in range(6)],
        pixel_storage="binary",
        pixel_dtype="uint8",
    )
    reader = open_dataset(folder)
    assert reader.arrays("train")["pixels"].tolist() == [list(map(float, row)) for row in rows]
    assert reader.signature_inputs()[0].image == [2, 3]
    assert reader.rows("train", [0])[0]["pixels"] == list(rows[0])


def test_what_is_not_there(tmp_path):
    folder = mixed(tmp_path / "d")
    reader = open_dataset(folder)
    with pytest.raises(InputError, match="no split 'tset'"):
        reader.arrays("tset")
    (folder / "train" / "part-00001.parquet").unlink()
    with pytest.raises(CorruptError, match="part-00001"):
        reader.arrays("train")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(CorruptError, match="not one"):
        open_dataset(folder)


def test_rows_and_labels_that_do_not_match(tmp_path):
    folder = mixed(tmp_path / "d")
    pq.write_table(pa.table({"n": [1.0]}), folder / "train" / "part-00000.parquet")
    with pytest.raises(CorruptError, match="part-00000"):
        open_dataset(folder).arrays("train")
    table = pa.table({"n": [1.0], "y": ["maybe"]})
    other = make(tmp_path / "e", [table], columns=COLUMNS[:1], task="classification", classes=["no", "yes"])
    with pytest.raises(CorruptError, match="none of the manifest's classes"):
        open_dataset(other).labels("train")


def test_feed_equals_the_reader_and_is_made_once(tmp_path):
    folder, cache = mixed(tmp_path / "d"), tmp_path / "cache"
    reader, feed = open_dataset(folder), open_feed(folder, "train", cache)
    assert feed.rows == 3
    assert isinstance(feed.arrays["numbers"], np.memmap)
    np.testing.assert_array_equal(feed.arrays["numbers"], reader.arrays("train")["numbers"])
    assert feed.arrays["categories"].tolist() == reader.arrays("train")["categories"].tolist()
    assert feed.labels.tolist() == reader.labels("train").tolist()
    made = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    open_feed(folder, "train", cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == made
    assert len(list(cache.iterdir())) == 1


def test_feed_that_is_damaged_names_what_to_delete(tmp_path):
    folder, cache = mixed(tmp_path / "d"), tmp_path / "cache"
    open_feed(folder, "train", cache)
    next(cache.rglob("numbers.npy")).write_bytes(b"x")
    with pytest.raises(CorruptError) as caught:
        open_feed(folder, "train", cache)
    assert "delete" in caught.value.hint
