"""The dataset tree, its manifest and the facts, from clean and split rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import polars as pl

from millrace.core.errors import DataError
from millrace.core.facts import ColumnFacts, DataFacts
from millrace.data.clean import samples
from millrace.data.images import PIXELS
from millrace.data.profile import histogram, profile_column, profile_pixels
from millrace.data.roles import Clean
from millrace.data.rules import Fill
from millrace.data.sources import Table
from millrace.data.split import NAMES
from millrace.data.write import content_digest, write_manifest, write_parts
from millrace.formats.dataset import ColumnSchema, Manifest

_ROWS_PROFILED = 20_000  # of an image column: its pixels are many


def write_dataset(folder: Path, clean: Clean, places: np.ndarray, table: Table) -> tuple[Manifest, pl.DataFrame]:
    """Fill what is to be filled from the training rows; write every split and the manifest.

    Args:
        folder: A new folder.
        clean: Kept rows.
        places: int8 [rows], from `split_table`.
        table: The source.

    Returns:
        The manifest, and all kept rows as they were written.
    """
    frame, place = clean.frame.select(clean.columns), pl.Series(places)
    train = frame.filter(place == 0)
    fills = {name: _fill_value(train[name], fill) for name, fill in clean.fills.items()}
    frame = frame.with_columns([_filled(name, value, frame.schema[name]) for name, value in fills.items()])
    splits = {name: frame.filter(place == index) for index, name in enumerate(NAMES)}
    parts = {name: write_parts(folder, name, rows) for name, rows in splits.items()}
    write_parts(folder, "rejected", clean.rejected)
    pixels = clean.plan.pixels
    if table.pixel_dtype is not None and table.image is not None:
        width = math.prod(table.image)
        pixels = [f"p{index:0{len(str(width - 1))}d}" for index in range(width)]
    manifest = Manifest(
        columns=_schema(splits["train"], clean, fills, pixels, table),
        task=clean.label.task,
        label=clean.label_column,
        classes=clean.label.classes,
        label_type=clean.label.label_type,
        image=clean.plan.shape,
        image_columns=pixels,
        pixel_storage="binary" if table.pixel_dtype else "columns",
        pixel_dtype=table.pixel_dtype or "float32",
        splits=parts,
        rows={name: rows.height for name, rows in splits.items()},
        content_digest=content_digest(splits),
    )
    write_manifest(folder, manifest)
    return manifest, frame


def _fill_value(train: pl.Series, fill: Fill) -> float | str:
    """The value for a column's missing cells, from its training rows.

    Raises:
        DataError: The strategy does not fit the column, or the training rows have no value.
    """
    is_number = train.dtype.is_numeric() or train.dtype == pl.Boolean
    if fill.strategy == "value":
        if is_number == isinstance(fill.value, str):
            kind = "numbers" if is_number else "text"
            raise DataError(f"data.clean: fill_missing puts {fill.value!r} into {train.name!r}, which holds {kind}")
        return fill.value  # type: ignore[return-value]
    present = train.drop_nulls()
    if present.is_empty():
        raise DataError(f"data.clean: fill_missing has no value of {train.name!r} in the training rows to go by")
    if fill.strategy == "mode" or not is_number:
        commonest = present.mode().sort()[0]
        return float(commonest) if is_number else str(commonest)
    numbers = present.cast(pl.Float64)
    return float(numbers.mean() if fill.strategy == "mean" else numbers.median())  # type: ignore[arg-type]


def _filled(name: str, value: float | str, dtype: pl.DataType) -> pl.Expr:
    if dtype == pl.Boolean:
        return pl.col(name).fill_null(bool(round(float(value))))
    if dtype == pl.Int64 and isinstance(value, float) and value.is_integer():
        return pl.col(name).fill_null(int(value))
    return pl.col(name).cast(pl.Float64).fill_null(value) if dtype.is_numeric() else pl.col(name).fill_null(value)


def _schema(
    train: pl.DataFrame, clean: Clean, fills: dict[str, float | str], pixels: list[str], table: Table
) -> list[ColumnSchema]:
    columns = []
    for name, role in clean.roles.items():
        kind = clean.shown_type(name)
        if train.schema[name] == pl.Binary:
            columns += _pixel_schema(train[name], pixels, str(table.pixel_dtype))
            continue
        facts = profile_column(train[name], kind, role)
        categories = kind == "category" and role == "feature"
        columns.append(
            ColumnSchema(
                name=name,
                type=kind,
                role=role,
                categories=train[name].drop_nulls().unique().sort().to_list() if categories else [],
                mean=facts.mean,
                sd=facts.sd,
                missing=facts.missing,
                fill=fills.get(name),
            )
        )
    return columns


def _pixel_schema(values: pl.Series, pixels: list[str], dtype: str) -> list[ColumnSchema]:
    matrix = pixel_matrix(values, dtype)
    mean = matrix.mean(axis=0, dtype=np.float64)
    # In two passes over row blocks: a float64 copy of all pixels would not fit where the bytes do.
    square = sum(((block - mean) ** 2).sum(axis=0) for block in np.array_split(matrix, max(1, len(matrix) // 4096)))
    sd = np.sqrt(square / max(1, len(matrix)))
    return [
        ColumnSchema(name=name, type="image", role="feature", mean=float(mean[index]), sd=float(sd[index]))
        for index, name in enumerate(pixels)
    ]


def pixel_matrix(values: pl.Series, dtype: str) -> np.ndarray:
    """A column of raw pixel bytes as [rows, values].

    Example:
        >>> pixel_matrix(pl.Series([b"ab", b"cd"]), "uint8").tolist()
        [[97, 98], [99, 100]]
    """
    flat = np.frombuffer(b"".join(values.to_list()), dtype=np.dtype(dtype).newbyteorder("<"))
    return flat.reshape(len(values), -1)


def make_facts(
    table: Table, clean: Clean, manifest: Manifest, kept: pl.DataFrame, split_warnings: list[str]
) -> DataFacts:
    """What the step reports."""
    label, classes = kept[clean.label_column], {}
    if clean.label.task == "classification":
        counted = dict(label.cast(pl.String).value_counts().iter_rows())
        classes = {name: counted[name] for name in clean.label.classes}
    return DataFacts(
        rows_in=table.frame.height,
        rows_kept=kept.height,
        rejected=clean.rejected.height,
        rejected_by_reason=clean.counts,
        split=manifest.rows,
        task=clean.label.task,
        label=clean.label_column,
        classes=classes,
        label_histogram=histogram(label) if clean.label.task == "regression" else {},
        columns=[_facts(kept[name], clean.shown_type(name), role, table) for name, role in clean.roles.items()],
        image=clean.plan.shape,
        samples=samples(clean.rejected),
        warnings=[*clean.warnings, *split_warnings],
        files=table.files,
        content_digest=manifest.content_digest,
    )


def _facts(values: pl.Series, kind: str, role: str, table: Table) -> ColumnFacts:
    if values.dtype == pl.Binary:
        return profile_pixels(pixel_matrix(values.head(_ROWS_PROFILED), str(table.pixel_dtype)), PIXELS)
    return profile_column(values, kind, role)
