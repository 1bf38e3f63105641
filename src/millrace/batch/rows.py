"""Rows of files as a model's tensors, chunk by chunk: CSV, JSON lines, Parquet. No file is held as a whole."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from millrace.core import extras
from millrace.core.errors import InputError, MillraceError
from millrace.core.types import Struct
from millrace.formats.rows import MISSING, encode_rows, read_cell
from millrace.formats.signature import Signature, TensorSpec

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CHUNK_ROWS = 1024
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
_MAX_CELL = 1 << 24
_BLOCK = 1 << 16
Row = dict[str, Any]


class Span(Struct, frozen=True, kw_only=True):
    """Rows of a file that lie side by side.

    `start` and `end`: bytes of a text (a CSV's header is outside), rows from 0 of a Parquet file. `first`: the
    number of its first row, from 1.
    """

    path: str
    start: int
    end: int
    first: int = 1
    rows: int = 0


class Rejection(Struct, frozen=True, kw_only=True):
    """A row that has no answer, and why."""

    file: str
    row: int
    message: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tensors of rows, and the rows' numbers in their file, from 1."""

    tensors: dict[str, np.ndarray]
    numbers: np.ndarray
    rejected: list[Rejection]


def suffix_of(path: Path) -> str:
    """What kind of file it is.

    Raises:
        InputError: It is none that can be read, or there is none.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path.name}: want a file that ends in {', '.join(sorted(SUFFIXES))}")
    if not path.is_file():
        raise InputError(f"{path} does not exist", hint="check the path of --input")
    return suffix


def whole(path: Path) -> Span:
    """A file from its first row to its last.

    Raises:
        InputError: It cannot be read.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return Span(path=str(path), start=0, end=_open_parquet(path).metadata.num_rows)
    start = csv_header(path)[1] if suffix in (".csv", ".tsv") else 0
    return Span(path=str(path), start=start, end=path.stat().st_size)


def read_chunks(signature: Signature, span: Span, *, skips: bool = False) -> Iterator[Chunk]:
    """The rows of a span as tensors.

    Args:
        signature: What the model wants; columns that it does not read are dropped.
        span: Which rows.
        skips: Whether a bad row is left out and told of; otherwise it is an error.

    Raises:
        InputError: A column is missing, a row is bad, or the file cannot be read: names file and row.
    """
    path = Path(span.path)
    suffix = suffix_of(path)
    if suffix == ".parquet":
        return _parquet_chunks(signature, span, path, skips)
    if suffix in (".csv", ".tsv"):
        return _csv_chunks(signature, span, path, skips)
    return _json_chunks(signature, span, path, skips)


def json_rows(path: Path) -> Iterator[Row]:
    """Rows as JSON has them, of a model that is not at hand: a CSV's cell is a number where it reads as one.

    Raises:
        InputError: The file cannot be read.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        try:
            for batch in _open_parquet(path).iter_batches(CHUNK_ROWS, use_threads=False):
                yield from batch.to_pylist()
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        return
    if suffix in (".jsonl", ".ndjson"):
        with path.open("rb") as file:
            for number, line in enumerate((line for line in file if line.strip()), start=1):
                row = _json_row(line)
                if isinstance(row, InputError):
                    raise InputError(f"{path.name} row {number}: {row.message}")
                yield row
        return
    header = csv_header(path)[0]
    number = TensorSpec(name="", dtype="float64", shape=[-1, 1])
    with io.TextIOWrapper(_open_bytes(whole(path)), encoding="utf-8", newline="") as text:
        try:
            for cells in csv_reader(text, path):
                yield {name: read_cell(cell, number) for name, cell in zip(header, cells, strict=False)}
        except (UnicodeDecodeError, csv.Error) as error:
            raise _refused(path, error) from error


def check_columns(signature: Signature, path: Path) -> None:
    """Refuse a file that lacks a column, before anything is read of it; JSON lines say so at their first row.

    Raises:
        InputError: Names the columns.
    """
    suffix = suffix_of(path)
    if suffix == ".parquet":
        _columns(signature, path, _open_parquet(path).schema_arrow.names)
    elif suffix in (".csv", ".tsv"):
        _columns(signature, path, csv_header(path)[0])


def _columns(signature: Signature, path: Path, header: Iterable[str]) -> dict[str, TensorSpec]:
    """The tensor of each column that the model reads."""
    wanted = {column: spec for spec in signature.inputs for column in spec.columns}
    present = set(header)
    missing = [column for column in wanted if column not in present]
    if missing:
        shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        raise InputError(f"{path.name}: lacks {len(missing)} of {len(wanted)} columns that the model reads: {shown}")
    if not wanted:
        names = ", ".join(spec.name for spec in signature.inputs)
        raise InputError(f"the model's inputs ({names}) have no column names: send tensors to a server instead")
    return wanted


def _encode(signature: Signature, rows: Sequence[Any], numbers: Sequence[int], name: str, skips: bool) -> Chunk:
    """Rows one by one where it must be: the bad one is named, or left out. A row may be an InputError of its own."""
    if not any(isinstance(row, InputError) for row in rows):
        with contextlib.suppress(InputError):  # which row it was, and whether others go on, is found below
            return Chunk(encode_rows(signature, rows), np.array(numbers, np.int64), [])
    good: list[Any] = []
    kept: list[int] = []
    rejected: list[Rejection] = []
    for number, row in zip(numbers, rows, strict=True):
        try:
            if isinstance(row, InputError):
                raise row
            encode_rows(signature, [row])
        except InputError as error:
            field = error.message.removeprefix("instances[0]").removeprefix(".").lstrip(":").strip()
            if not skips:
                raise InputError(f"{name} row {number}: {field}", hint=error.hint) from error
            rejected.append(Rejection(file=name, row=number, message=field))
        else:
            good.append(row)
            kept.append(number)
    try:
        tensors = encode_rows(signature, good) if good else {}
    except InputError as error:  # each is right by itself, and they do not fit together
        raise InputError(f"{name} rows {kept[0]} to {kept[-1]}: {error.message}", hint=error.hint) from error
    return Chunk(tensors, np.array(kept, np.int64), rejected)


# ---------------------------------------------------------------------- texts


class _Window(io.RawIOBase):
    """The bytes of a file between two places."""

    def __init__(self, path: Path, start: int, end: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._file.seek(start)
        self._left = end - start

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer)[: self._left]
        count = self._file.readinto(view) or 0
        self._left -= count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_bytes(span: Span) -> io.BufferedReader:
    return io.BufferedReader(_Window(Path(span.path), span.start, span.end), _BLOCK)


class CountedLines:
    """Lines of a text file from some byte on, and how many bytes they took.

    Args:
        file: Its bytes.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        self.size_bytes = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._text)
        self.size_bytes += len(line.encode())
        return line

    def close(self) -> None:
        """Close the file."""
        self._text.close()


def _refused(path: Path, error: Exception) -> InputError:
    return InputError(f"{path.name}: cannot be read as UTF-8 CSV: {error}")


def csv_reader(lines: Iterable[str], path: Path) -> Any:
    """A reader of records."""
    csv.field_size_limit(min(sys.maxsize, _MAX_CELL))
    return csv.reader(lines, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")


def csv_header(path: Path) -> tuple[list[str], int]:
    """The columns' names, and at which byte the first row begins.

    Raises:
        InputError: The file is empty, or no UTF-8 CSV.
    """
    lines = CountedLines(_open_bytes(Span(path=str(path), start=0, end=path.stat().st_size)))
    try:
        header = next(csv_reader(lines, path), None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise _refused(path, error) from error
    finally:
        lines.close()
    if header is None:
        raise InputError(f"{path.name}: is empty")
    if header and header[0].startswith("\ufeff"):  # as spreadsheets write it
        header[0] = header[0].removeprefix("\ufeff").strip('"')
    return header, lines.size_bytes


def _csv_chunks(signature: Signature, span: Span, path: Path, skips: bool) -> Iterator[Chunk]:
    header = csv_header(path)[0]
    wanted = _columns(signature, path, header)
    places = {column: header.index(column) for column in wanted}
    parse = _Cells(signature, places)
    number = span.first
    with io.TextIOWrapper(_open_bytes(span), encoding="utf-8", newline="") as text:
        reader = csv_reader(text, path)
        while True:
            try:
                records = list(islice(reader, CHUNK_ROWS))
            except (UnicodeDecodeError, csv.Error) as error:
                raise _refused(path, error) from error
            if not records:
                return
            records = [cells for cells in records if cells]
            numbers = range(number, number + len(records))
            number += len(records)
            if not records:
                continue
            tensors = parse(records) if all(len(cells) == len(header) for cells in records) else None
            if tensors is not None:
                yield Chunk(tensors, np.arange(numbers.start, numbers.stop), [])
                continue
            rows = [_record(cells, header, places, wanted) for cells in records]
            yield _encode(signature, rows, numbers, path.name, skips)


def _record(
    cells: list[str], header: list[str], places: dict[str, int], wanted: dict[str, TensorSpec]
) -> Row | InputError:
    if len(cells) != len(header):
        return InputError(f"has {len(cells)} cells, the header has {len(header)}")
    return {column: read_cell(cells[place], wanted[column]) for column, place in places.items()}


class _Cells:
    """Cells as tensors, all rows of a column at once.

    Args:
        signature: What the model wants.
        places: In which cell each column is.
    """

    def __init__(self, signature: Signature, places: dict[str, int]) -> None:
        self._specs = [(spec, _picker([places[column] for column in spec.columns])) for spec in signature.inputs]

    def __call__(self, records: list[list[str]]) -> dict[str, np.ndarray] | None:
        """None where a cell is to be looked at by itself."""
        found: dict[str, np.ndarray] = {}
        for spec, pick in self._specs:
            cells = chain.from_iterable(map(pick, records))
            shape = (len(records), len(spec.columns))
            if spec.dtype == "string":
                texts = np.empty(shape[0] * shape[1], dtype=object)
                texts[:] = ["" if cell in MISSING else cell for cell in cells]
                found[spec.name] = texts.reshape(shape)
                continue
            if spec.dtype not in ("float32", "float64"):
                return None
            read = float if spec.semantic == "image" else _number
            try:
                numbers = np.fromiter(map(read, cells), np.float64, count=shape[0] * shape[1])
            except ValueError:
                return None
            with np.errstate(over="ignore"):
                values = numbers.astype(spec.dtype).reshape(shape)
            if np.isinf(values).any() or (spec.semantic == "image" and np.isnan(values).any()):
                return None
            found[spec.name] = values
        return found


def _picker(places: list[int]) -> Callable[[list[str]], Sequence[str]]:
    if len(places) == 1:
        return lambda cells: (cells[places[0]],)
    if places == list(range(places[0], places[0] + len(places))):
        return operator.itemgetter(slice(places[0], places[0] + len(places)))
    return operator.itemgetter(*places)


def _number(text: str) -> float:
    if text in MISSING:
        return math.nan
    value = float(text)
    if value != value:
        raise ValueError(text)  # a spelling of "not a number" that is none of ours
    return value


def _json_chunks(signature: Signature, span: Span, path: Path, skips: bool) -> Iterator[Chunk]:
    number = span.first
    with _open_bytes(span) as file:
        lines = (line for line in file if line.strip())
        while chunk := list(islice(lines, CHUNK_ROWS)):
            rows = [_json_row(line) for line in chunk]
            names = {spec.name for spec in signature.inputs}
            if number == 1 and not skips and isinstance(rows[0], dict) and not names <= set(rows[0]):
                _columns(signature, path, rows[0])
            yield _encode(signature, rows, range(number, number + len(rows)), path.name, skips)
            number += len(rows)


def _json_row(line: bytes) -> Row | InputError:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return InputError(f"is not JSON: {error}")
    return row if isinstance(row, dict) else InputError(f"want an object by column, got {str(row)[:40]}")


# ---------------------------------------------------------------------- Parquet


def _open_parquet(path: Path) -> Any:
    extras.require([("pyarrow", "data")], f"reading {path.name}")
    try:
        return extras.load("pyarrow.parquet:ParquetFile")(path, buffer_size=_BLOCK, pre_buffer=False)
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path.name}: cannot be read as Parquet: {str(error)[:160]}")


def _parquet_chunks(signature: Signature, span: Span, path: Path, skips: bool) -> Iterator[Chunk]:
    file = _open_parquet(path)
    wanted = list(_columns(signature, path, file.schema_arrow.names))
    try:
        for start, batch in _batches(file, wanted, span):
            numbers = range(start + 1, start + 1 + batch.num_rows)
            tensors = _batch_tensors(signature, batch)
            if tensors is not None:
                yield Chunk(tensors, np.arange(numbers.start, numbers.stop), [])
            else:
                yield _encode(signature, batch.to_pylist(), numbers, path.name, skips)
    except MillraceError:
        raise
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _batches(file: Any, columns: list[str], span: Span) -> Iterator[tuple[int, Any]]:
    """Batches of the span's rows, each with the number of its first from 0; only its row groups are read."""
    groups: list[int] = []
    at, base = 0, 0
    for index in range(file.metadata.num_row_groups):
        end = at + file.metadata.row_group(index).num_rows
        if at < span.end and end > span.start:
            base = at if not groups else base
            groups.append(index)
        at = end
    if not groups:
        return
    for batch in file.iter_batches(CHUNK_ROWS, row_groups=groups, columns=columns, use_threads=False):
        low, high = max(span.start - base, 0), min(span.end - base, batch.num_rows)
        if high <= 0:
            return
        if low < high:
            yield base + low, batch.slice(low, high - low)
        base += batch.num_rows


def _batch_tensors(signature: Signature, batch: Any) -> dict[str, np.ndarray] | None:
    """Whole columns as tensors; None where a value is to be looked at by itself."""
    found: dict[str, np.ndarray] = {}
    for spec in signature.inputs:
        values = np.empty((batch.num_rows, len(spec.columns)), spec.array_dtype)
        for place, name in enumerate(spec.columns):
            column = batch.column(name)
            kind = str(column.type)
            if spec.dtype == "string" and kind in ("string", "large_string"):
                values[:, place] = ["" if text is None else text for text in column.to_pylist()]
            elif spec.dtype in ("float32", "float64") and (kind in _ARROW_NUMBERS or kind == "bool"):
                if column.null_count and kind == "bool":
                    return None
                with np.errstate(over="ignore"):
                    values[:, place] = column.to_numpy(zero_copy_only=False)
            else:
                return None
        if spec.dtype != "string" and (np.isinf(values).any() or (spec.semantic == "image" and np.isnan(values).any())):
            return None
        found[spec.name] = values
    return found


_ARROW_NUMBERS = frozenset({
    "float", "double", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
})  # fmt: skip
