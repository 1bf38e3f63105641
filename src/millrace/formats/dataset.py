"""A dataset on disk: `manifest.json` and Parquet parts of every split, read as tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from millrace.core.errors import CorruptError, InputError
from millrace.formats.signature import TensorSpec

MANIFEST = "manifest.json"
PIXELS_COLUMN = "pixels"
SplitName = Literal["train", "validation", "test"]


class ColumnSchema(msgspec.Struct, frozen=True, kw_only=True):
    """One column; statistics are of the training rows only.

    `mean` and `sd` (population) are of numbers, booleans and pixels; `categories` is sorted;
    `missing` counts training rows without a value; `fill` is what `fill_missing` has put there.
    """

    name: str
    type: str
    role: str
    categories: list[str] = []
    mean: float | None = None
    sd: float | None = None
    missing: int = 0
    fill: float | str | None = None


class PartEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One Parquet part; `path` is relative to the dataset's folder."""

    path: str
    rows: int
    digest: str
    size_bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a dataset is.

    `image_columns` are the names of the pixels in the order of the tensor. `pixel_storage` says
    whether they are Parquet columns of their own, or one binary column `pixels` of `pixel_dtype`.
    `classes` are in the order of the class index, as text.
    """

    columns: list[ColumnSchema]
    task: Literal["classification", "regression"]
    label: str
    classes: list[str] = []
    label_type: Literal["string", "integer", "number", "boolean"] = "string"
    image: list[int] | None = None
    image_columns: list[str] = []
    pixel_storage: Literal["columns", "binary"] = "columns"
    pixel_dtype: str = "float32"
    splits: dict[str, list[PartEntry]] = {}
    rows: dict[str, int] = {}
    content_digest: str = ""

    def features(self, *types: str) -> list[str]:
        """Feature columns of these types, in the order of the dataset.

        Example:
            >>> columns = [ColumnSchema(name="a", type="number", role="feature")]
            >>> Manifest(columns=columns, task="regression", label="y").features("number")
            ['a']
        """
        return [column.name for column in self.columns if column.role == "feature" and column.type in types]


def tensors(manifest: Manifest) -> list[TensorSpec]:
    """A model's inputs: one image, or numbers and categories.

    Example:
        >>> columns = [ColumnSchema(name="a", type="number", role="feature")]
        >>> [spec.name for spec in tensors(Manifest(columns=columns, task="regression", label="y"))]
        ['numbers']
    """
    if manifest.image is not None:
        width = len(manifest.image_columns)
        return [
            TensorSpec(
                name="pixels",
                dtype="float32",
                shape=[-1, width],
                semantic="image",
                columns=manifest.image_columns,
                image=manifest.image,
            )
        ]
    numbers, categories = manifest.features("number", "boolean"), manifest.features("category")
    found = []
    if numbers:
        found.append(
            TensorSpec(name="numbers", dtype="float32", shape=[-1, len(numbers)], semantic="number", columns=numbers)
        )
    if categories:
        found.append(
            TensorSpec(
                name="categories",
                dtype="string",
                shape=[-1, len(categories)],
                semantic="category",
                columns=categories,
            )
        )
    return found


class DatasetReader:
    """Reads a dataset's folder. Nothing is cached; not for several threads at once.

    Args:
        folder: A materialised dataset tree.
        manifest: Its manifest.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest

    def signature_inputs(self) -> list[TensorSpec]:
        """The tensors that `arrays` gives, for a model's signature."""
        return tensors(self.manifest)

    def arrays(self, split: str) -> dict[str, np.ndarray]:
        """A split's input tensors by name, in the order of its rows.

        Args:
            split: train, validation or test.

        Returns:
            `pixels` float32 [rows, height*width*channels] of raw values, or `numbers` float32
            [rows, columns] (missing: NaN) and `categories` object (str) [rows, columns] (missing: "").

        Raises:
            CorruptError: A part is missing, or is not what the manifest says.
            InputError: There is no such split.
        """
        return {spec.name: self._tensor(spec, split) for spec in self.signature_inputs()}

    def _tensor(self, spec: TensorSpec, split: str) -> np.ndarray:
        if spec.semantic == "image" and self.manifest.pixel_storage == "binary":
            return self._pixels(split)
        table = self.table(split, spec.columns)
        if spec.dtype == "string":
            result = np.empty((table.num_rows, len(spec.columns)), dtype=object)
            for index, column in enumerate(spec.columns):
                result[:, index] = ["" if value is None else value for value in table.column(column).to_pylist()]
            return result
        numbers = np.empty((table.num_rows, len(spec.columns)), dtype=np.float32)
        for index, column in enumerate(spec.columns):
            numbers[:, index] = _floats(table.column(column))
        return numbers

    def _pixels(self, split: str) -> np.ndarray:
        column = self.table(split, [PIXELS_COLUMN]).column(PIXELS_COLUMN)
        width = len(self.manifest.image_columns)
        raw = b"".join(column.to_pylist())
        pixels = np.frombuffer(raw, dtype=np.dtype(self.manifest.pixel_dtype).newbyteorder("<"))
        if pixels.size != len(column) * width:
            raise CorruptError(f"dataset split {split} has {pixels.size} pixels: want {len(column)} rows of {width}")
        return pixels.reshape(len(column), width).astype(np.float32)

    def labels(self, split: str) -> np.ndarray:
        """A split's answers: int64 [rows] class indices, or float32 [rows] values.

        Raises:
            CorruptError: A label is none of the manifest's classes.
        """
        column = self.table(split, [self.manifest.label]).column(self.manifest.label)
        if self.manifest.task == "regression":
            return _floats(column).astype(np.float32)
        names = pa.array(self.manifest.classes, type=pa.string())
        found = pc.call_function("index_in", [column.cast(pa.string())], pc.SetLookupOptions(value_set=names))
        if found.null_count:
            raise CorruptError(f"dataset split {split} has labels that are none of the manifest's classes")
        return found.to_numpy().astype(np.int64)

    def rows(self, split: str, indices: list[int] | np.ndarray) -> list[dict[str, Any]]:
        """Original records of some rows, for reports: plain values, an image as a list of numbers.

        Args:
            split: train, validation or test.
            indices: Row numbers in the split, from 0.
        """
        table = self.table(split, None).take(pa.array(np.asarray(indices, dtype=np.int64)))
        return [self._record(record) for record in table.to_pylist()]

    def _record(self, record: dict[str, Any]) -> dict[str, Any]:
        pixels = record.get(PIXELS_COLUMN)
        if isinstance(pixels, bytes):
            dtype = np.dtype(self.manifest.pixel_dtype).newbyteorder("<")
            record = {**record, PIXELS_COLUMN: np.frombuffer(pixels, dtype=dtype).tolist()}
        return {name: value.isoformat() if hasattr(value, "isoformat") else value for name, value in record.items()}

    def table(self, split: str, columns: list[str] | None) -> pa.Table:
        """A split's rows as an Arrow table; None: every column.

        Raises:
            CorruptError: A part is missing, or is not what the manifest says.
            InputError: There is no such split.
        """
        parts = self.manifest.splits.get(split)
        if parts is None:
            raise InputError(f"dataset has no split {split!r}: want one of {', '.join(self.manifest.splits)}")
        tables = [self._part(part, columns) for part in parts]
        return pa.concat_tables(tables).combine_chunks()

    def _part(self, part: PartEntry, columns: list[str] | None) -> pa.Table:
        try:
            table = pq.read_table(self.folder / part.path, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise CorruptError(f"dataset part {part.path} cannot be read: {str(error)[:160]}") from error
        if table.num_rows != part.rows or (columns is not None and set(columns) - set(table.column_names)):
            raise CorruptError(f"dataset part {part.path} is not what the manifest says: {table.num_rows} rows")
        return table


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    numbers = (
        column.cast(pa.float64()) if not pa.types.is_boolean(column.type) else column.cast(pa.int8()).cast(pa.float64())
    )
    return pc.fill_null(numbers, float("nan")).to_numpy()


def open_dataset(folder: Path) -> DatasetReader:
    """Open a dataset's folder.

    Raises:
        CorruptError: There is no manifest, or it is not one.

    Example:
        >>> open_dataset(Path("/nowhere"))
        Traceback (most recent call last):
        millrace.core.errors.CorruptError: dataset /nowhere has no manifest.json
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptError(f"dataset {folder} has no {MANIFEST}")
    try:
        return DatasetReader(folder, msgspec.json.decode(path.read_bytes(), type=Manifest))
    except msgspec.MsgspecError as error:
        raise CorruptError(f"dataset {folder} has a {MANIFEST} that is not one: {error}") from error
