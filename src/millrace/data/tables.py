"""CSV, Parquet and JSON-lines files as Polars frames; every refusal names the file and the row."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from millrace.core.errors import DataError
from millrace.core.spec import Data

_DELIMITERS = ",;\t|"
_MIN_BLOCK_BYTES = 1 << 20
_MAX_BLOCK_BYTES = (1 << 31) - 64
_ROW_ERROR = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_JSON_INTEGER_LIMIT = 2**53


def read_bytes(path: Path, name: str) -> bytes:
    """A file's bytes; `.gz` files are unpacked.

    Raises:
        DataError: The file cannot be read, or is not a whole gzip file.

    Example:
        >>> read_bytes(Path("/dev/null"), "null")
        b''
    """
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as stream:
                return stream.read()
        return path.read_bytes()
    except EOFError as error:
        raise DataError(f"{name} is cut off: the gzip file ends early", hint="fetch or copy the file again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} is not a gzip file: {error}", hint="fetch it again, or rename it") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}", details={"file": name}) from error


def decode_text(raw: bytes, name: str, encoding: str) -> str:
    """The file's text without a byte-order mark.

    Raises:
        DataError: The bytes are not in this encoding (names the row), or there is no such encoding.

    Example:
        >>> decode_text(b"a,b\\nx,\\xe9\\n", "t.csv", "utf-8")
        Traceback (most recent call last):
        millrace.core.errors.DataError: t.csv is not utf-8: byte 0xe9 in line 2 (row 1)
    """
    try:
        codec = codecs.lookup(encoding)
        return raw.decode(codec.name).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        place = f"line {line} (row {line - 1})" if line > 1 else "line 1 (the header)"
        raise DataError(
            f"{name} is not {encoding}: byte 0x{raw[error.start]:02x} in {place}",
            hint="set data.encoding, for example cp1252 or latin-1",
            details={"file": name, "row": line - 1, "problem": "encoding"},
        ) from error
    except (LookupError, UnicodeError) as error:
        raise DataError(
            f"{name} cannot be decoded: data.encoding {encoding!r}: {error}",
            hint="set data.encoding to utf-8, cp1252, latin-1 or another that Python knows",
            details={"file": name, "problem": "encoding"},
        ) from error


def _delimiter(name: str, header: str) -> str:
    if name.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    bare = re.sub(r'"[^"]*"', "", header)
    return max(_DELIMITERS, key=lambda mark: (bare.count(mark), -_DELIMITERS.index(mark)))


def _header(text: str, name: str) -> tuple[list[str], str]:
    start = next((match.group() for match in re.finditer(r"[^\r\n]+", text)), "")
    if not start.strip():
        raise DataError(f"{name} is empty: want a header and rows", details={"file": name})
    delimiter = _delimiter(name, start)
    limit = csv.field_size_limit(_MAX_BLOCK_BYTES)
    try:
        records = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        header = next(record for record in records if record)
    except csv.Error as error:
        raise DataError(f"{name} has an unreadable header: {error}", details={"file": name, "row": 0}) from error
    finally:
        csv.field_size_limit(limit)
    return [cell.strip() for cell in header], delimiter


def _check_quotes(text: str, name: str, delimiter: str) -> None:
    """An open quote would swallow the rest of the file as one cell: Arrow says nothing of it."""
    if text.count('"') % 2 == 0:
        return
    row = 0
    limit = csv.field_size_limit(_MAX_BLOCK_BYTES)
    try:
        for _ in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True):
            row += 1
    except csv.Error as error:
        raise DataError(
            f"{name} row {row} opens a quote that is not closed ({error})",
            hint='close the quote; a quote inside a quoted cell is written twice: ""',
            details={"file": name, "row": row},
        ) from error
    finally:
        csv.field_size_limit(limit)


def check_names(names: list[str], name: str) -> None:
    """Refuse empty, repeated, case-colliding and reserved column names.

    Raises:
        DataError: Names the file and the columns.

    Example:
        >>> check_names(["Age", "age"], "t.csv")
        Traceback (most recent call last):
        millrace.core.errors.DataError: t.csv has columns 'Age' and 'age' (1 and 2) that differ only in case
    """
    seen: dict[str, int] = {}
    for index, column in enumerate(names):
        details = {"file": name, "row": 0, "column": column}
        if not column:
            raise DataError(f"{name} has a column without a name: column {index + 1} of its header", details=details)
        if column.startswith("__millrace"):
            raise DataError(f"{name} has a column {column!r}: names from '__millrace' on are reserved", details=details)
        other = seen.setdefault(column.casefold(), index)
        if other == index:
            continue
        pair = f"{other + 1} and {index + 1}"
        if names[other] == column:
            raise DataError(f"{name} has two columns named {column!r} ({pair})", hint="rename one", details=details)
        raise DataError(
            f"{name} has columns {names[other]!r} and {column!r} ({pair}) that differ only in case",
            hint="rename one",
            details=details,
        )


def read_csv(path: Path, name: str, data: Data) -> pl.DataFrame:
    """Every cell as trimmed text; a row must have as many cells as the header.

    Args:
        path: The file, `.gz` too; separated by commas, semicolons, tabs or bars (seen in the header).
        name: How to call it in messages.
        data: The section with the encoding.

    Returns:
        One String column for each name in the header, no nulls.

    Raises:
        DataError: Empty, header only, ragged (names the row), wrong encoding, cut off, repeated names.

    Example:
        >>> read_csv(Path("/dev/null"), "null.csv", Data(source="x", label="y"))
        Traceback (most recent call last):
        millrace.core.errors.DataError: null.csv is empty: want a header and rows
    """
    text = decode_text(read_bytes(path, name), name, data.encoding)
    header, delimiter = _header(text, name)
    check_names(header, name)
    _check_quotes(text, name, delimiter)
    text = text if text.endswith("\n") else text + "\n"  # Arrow calls a single line without its end empty
    table = _parse_csv(text.encode("utf-8", "surrogatepass"), name, delimiter, len(header))
    frame = pl.DataFrame(pl.from_arrow(table)).slice(1)
    if frame.height == 0:
        raise DataError(f"{name} has a header but no rows", details={"file": name, "row": 0})
    frame.columns = header
    return frame.with_columns(pl.all().str.strip_chars())


def _parse_csv(raw: bytes, name: str, delimiter: str, width: int) -> pa.Table:
    # All text, and the header as the first record: names with line breaks and repeated names stay whole.
    columns = {f"f{index}": pa.large_string() for index in range(width)}
    block = min(max(_MIN_BLOCK_BYTES, len(raw) + 1), _MAX_BLOCK_BYTES)  # one block: a cell may have any length
    try:
        return pyarrow.csv.read_csv(
            pa.BufferReader(raw),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, autogenerate_column_names=True, block_size=block),
            parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=pyarrow.csv.ConvertOptions(column_types=columns, strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        ragged = _ROW_ERROR.search(str(error))
        if ragged is None:
            raise DataError(f"{name} is not a CSV file: {str(error)[:200]}", details={"file": name}) from error
        row = int(ragged[1]) - 1
        raise DataError(
            f"{name} row {row} has {ragged[3]} cells where the header has {ragged[2]}",
            hint="correct the row: a cell that holds the delimiter or a line break needs quotes",
            details={"file": name, "row": row},
        ) from error


def read_parquet(path: Path, name: str, data: Data) -> pl.DataFrame:
    """A Parquet file with its own types, made few: integers, floats, booleans, text, date-times.

    Raises:
        DataError: It is not a Parquet file, is damaged, or has no rows.

    Example:
        >>> read_parquet(Path("/dev/null"), "null.parquet", Data(source="x", label="y"))
        Traceback (most recent call last):
        millrace.core.errors.DataError: null.parquet is not a Parquet file
    """
    try:
        table = pyarrow.parquet.read_table(path, use_threads=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise DataError(
            f"{name} is not a Parquet file",
            hint=f"write it again, or set data.format ({str(error)[:120]})",
            details={"file": name},
        ) from error
    check_names(table.column_names, name)
    if table.num_rows == 0:
        raise DataError(f"{name} has columns but no rows", details={"file": name, "row": 0})
    return simplify(pl.DataFrame(pl.from_arrow(table)))


def simplify(frame: pl.DataFrame) -> pl.DataFrame:
    """The few types that the rest of the room knows; lists, structs and bytes become typed nulls.

    Example:
        >>> simplify(pl.DataFrame({"a": pl.Series([1, 2], dtype=pl.Int8)})).dtypes
        [Int64]
    """
    return frame.with_columns([_simple(pl.col(name), kind).alias(name) for name, kind in frame.schema.items()])


def _simple(column: pl.Expr, kind: pl.DataType) -> pl.Expr:
    if kind in (pl.UInt64, pl.Int128) or kind.is_float() or kind.is_decimal():
        return column.cast(pl.Float64)
    if kind.is_integer():
        return column.cast(pl.Int64)
    if isinstance(kind, pl.Datetime):
        naive = column.dt.convert_time_zone("UTC").dt.replace_time_zone(None) if kind.time_zone else column
        return naive.dt.cast_time_unit("us")
    if kind == pl.Date:
        return column.cast(pl.Datetime("us"))
    if kind == pl.Boolean:
        return column
    if kind.is_nested() or kind in (pl.Binary, pl.Object, pl.Null):
        return pl.lit(None, dtype=pl.String)
    return column.cast(pl.String).str.strip_chars()


def read_jsonl(path: Path, name: str, data: Data) -> pl.DataFrame:
    """One JSON object in each line; columns in the order of their first appearance.

    Raises:
        DataError: A line is not an object of plain values; names the row.

    Example:
        >>> read_jsonl(Path("/dev/null"), "null.jsonl", Data(source="x", label="y"))
        Traceback (most recent call last):
        millrace.core.errors.DataError: null.jsonl is empty: want one JSON object in each line
    """
    text = decode_text(read_bytes(path, name), name, data.encoding)
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise DataError(f"{name} is empty: want one JSON object in each line", details={"file": name})
    decoder = msgspec.json.Decoder()
    records = [_json_record(line, decoder, name, row) for row, line in enumerate(lines, start=1)]
    names = list(dict.fromkeys(key.strip() for record in records for key in record))
    check_names(names, name)
    if not names:
        raise DataError(f"{name} row 1 is an object without keys", details={"file": name, "row": 1})
    columns = {column: [] for column in names}
    for record in records:
        values = {key.strip(): value for key, value in record.items()}
        for column in names:
            columns[column].append(values.get(column))
    return pl.DataFrame([_json_column(column, values) for column, values in columns.items()])


def _json_record(line: str, decoder: msgspec.json.Decoder[Any], name: str, row: int) -> dict[str, Any]:
    try:
        record = decoder.decode(line)
    except (msgspec.DecodeError, RecursionError, UnicodeEncodeError) as error:
        raise DataError(f"{name} row {row} is not JSON: {error}", details={"file": name, "row": row}) from error
    if not isinstance(record, dict):
        raise DataError(
            f"{name} row {row}: want a JSON object, got {type(record).__name__}", details={"file": name, "row": row}
        )
    for key, value in record.items():
        if isinstance(value, dict | list):
            raise DataError(
                f"{name} row {row}: {key!r} holds a {'mapping' if isinstance(value, dict) else 'list'}: want one value",
                hint="flatten the records first",
                details={"file": name, "row": row, "column": key},
            )
    return record


def _json_column(name: str, values: list[Any]) -> pl.Series:
    present = {type(value) for value in values if value is not None}
    if present == {bool}:
        return pl.Series(name, values, dtype=pl.Boolean)
    if present == {int} and all(value is None or abs(value) < _JSON_INTEGER_LIMIT for value in values):
        return pl.Series(name, values, dtype=pl.Int64)
    if present == {float}:
        return pl.Series(name, values, dtype=pl.Float64)
    return pl.Series(name, [_json_text(value) for value in values], dtype=pl.String)


def _json_text(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip().encode("utf-8", "replace").decode("utf-8")
    return str(value).lower() if isinstance(value, bool) else str(value)


READERS: dict[str, Callable[[Path, str, Data], pl.DataFrame]] = {
    "csv": read_csv,
    "parquet": read_parquet,
    "jsonl": read_jsonl,
}
