"""A spec's source as one table: rows of all files, with the file and the row each came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from millrace.core import extras
from millrace.core.errors import DataError
from millrace.core.spec import Data
from millrace.data.builtin import PREFIX, builtin_of
from millrace.data.images import PIXELS, image_rows, read_folders, read_idx, read_npz
from millrace.data.source_files import display_name, format_of, resolve_files
from millrace.data.tables import READERS, Reading

FILE = "__millrace_file"  # index into Table.files
ROW = "__millrace_row"  # counts from 1 after the header
SPLIT = "__millrace_split"  # only where the source itself is split
HIDDEN = (FILE, ROW, SPLIT)
_NOTES = 4


@dataclass(frozen=True)
class Table:
    """Rows as read: user's columns and the hidden FILE, ROW and perhaps SPLIT."""

    frame: pl.DataFrame
    files: list[str]
    image: list[int] | None = None  # shape, where the source itself is of images
    pixel_dtype: str | None = None
    warnings: list[str] = field(default_factory=list)
    unnamed: frozenset[str] = frozenset()  # columns that got their name here: no features unless the spec says so

    def place(self, file: int, row: int) -> str:
        """Where a row stands, for messages: `rows.csv row 7`."""
        return f"{self.files[file]} row {row}"


def read_source(data: Data, project_dir: Path) -> Table:
    """Read every file of the source.

    Args:
        data: The spec's section; its source may be a built-in set.
        project_dir: The folder that relative paths start from.

    Returns:
        All rows in the order of the files.

    Raises:
        DataError: A file is missing, unreadable or differs from the others; names file and row.

    Example:
        >>> read_source(Data(source="nowhere.csv", label="y"), Path("."))
        Traceback (most recent call last):
        millrace.core.errors.DataError: data source 'nowhere.csv' does not exist
    """
    builtin = builtin_of(data.source)
    if builtin is not None:
        frame = extras.load("millrace.data.builtin_rows:read_builtin")(builtin)
        return Table(_with_place(frame, 0, frame.height), [f"{PREFIX}{builtin}"])
    files = resolve_files(data, project_dir)
    names = [display_name(path, project_dir) for path in files]
    kind = _kind(data, files, names)
    if kind in READERS:
        return _read_tables(kind, files, names, data)
    if kind == "npz":
        parts = [part for path, name in zip(files, names, strict=True) for part in read_npz(path, name)]
    else:
        parts = read_idx(files, names, data) if kind == "idx" else read_folders(files, names, data)
    rows = image_rows(parts, names[0], data, SPLIT)
    if data.label == PIXELS and rows.shape:
        raise DataError("data.label may not be 'pixels' where the source is of images", hint="call it label")
    frame = _with_place(rows.frame, 0, rows.frame.height)
    return Table(
        frame,
        names if kind != "images" else [data.source if isinstance(data.source, str) else names[0]],
        rows.shape,
        rows.dtype,
    )


def _kind(data: Data, files: list[Path], names: list[str]) -> str:
    if data.format != "auto":
        return data.format
    kinds = {format_of(path): name for path, name in zip(files, names, strict=True)}
    if None in kinds:
        raise DataError(
            f"{kinds[None]} has no known format: want .csv, .parquet, .jsonl, .npz, IDX or images",
            hint="set data.format",
            details={"file": kinds[None]},
        )
    if len(kinds) > 1:
        raise DataError(f"the source mixes formats: {', '.join(f'{name} is {kind}' for kind, name in kinds.items())}")
    return next(str(kind) for kind in kinds)


def _with_place(frame: pl.DataFrame, file: int, rows: int) -> pl.DataFrame:
    return frame.with_columns(
        pl.lit(file, dtype=pl.UInt32).alias(FILE),
        pl.int_range(1, rows + 1, dtype=pl.UInt32).alias(ROW),
    )


def _read_tables(kind: str, files: list[Path], names: list[str], data: Data) -> Table:
    readings = [READERS[kind](path, name, data) for path, name in zip(files, names, strict=True)]
    frames = [reading.frame for reading in readings]
    warnings = _notes(readings, names)
    first = frames[0]
    for name, frame in zip(names[1:], frames[1:], strict=True):
        missing = [column for column in first.columns if column not in frame.columns]
        extra = [column for column in frame.columns if column not in first.columns]
        if kind != "jsonl" and (missing or extra):
            raise DataError(
                f"{name} has other columns than {names[0]}: missing {missing or 'none'}, extra {extra or 'none'}",
                hint="all files of a source need the same columns",
                details={"file": name, "row": 0},
            )
    for column, dtype in first.schema.items():
        if dtype == pl.String and kind == "parquet" and first[column].null_count() == first.height:
            warnings.append(f"{column} has no values of a type that can be used")
    placed = [_with_place(frame, index, frame.height) for index, frame in enumerate(_same_types(frames))]
    unnamed = frozenset(column for reading in readings for column in reading.unnamed)
    return Table(pl.concat(placed, how="diagonal"), names, warnings=warnings, unnamed=unnamed)


def _notes(readings: list[Reading], names: list[str]) -> list[str]:
    """What was settled in the files' text; of many files the first few are named."""
    notes = [f"{name}: {note}" for name, reading in zip(names, readings, strict=True) for note in reading.notes]
    more = len(notes) - _NOTES
    return [*notes[:_NOTES], f"{more} more notes of this kind on other files"] if more > 0 else notes


def _same_types(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    types: dict[str, set[pl.DataType]] = {}
    for frame in frames:
        for column, dtype in frame.schema.items():
            if frame[column].null_count() < frame.height:
                types.setdefault(column, set()).add(dtype)
    target = {column: _joint(kinds) for column, kinds in types.items() if len(kinds) > 1}
    target |= {column: next(iter(kinds)) for column, kinds in types.items() if len(kinds) == 1}
    return [
        frame.with_columns(
            [pl.col(c).cast(t) for c, t in target.items() if c in frame.columns and frame.schema[c] != t]
        )
        for frame in frames
    ]


def _joint(kinds: set[pl.DataType]) -> pl.DataType:
    return pl.Float64() if all(kind.is_numeric() for kind in kinds) else pl.String()
