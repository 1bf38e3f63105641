"""CSV, Parquet and JSON-lines files as Polars frames; every refusal names the file and the row."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from millrace.core.errors import DataError
from millrace.core.spec import Data
from millrace.data.csv_layout import EMPTY_HINT, CsvLayout, check_names, layout_of

LARGEST_UNPACKED_BYTES = 1 << 30  # of any compressed file; a large one may become MOST_TIMES its size
MOST_TIMES = 100
_PART_BYTES = 1 << 20
_MIN_BLOCK_BYTES = 1 << 20
_MAX_BLOCK_BYTES = (1 << 31) - 64
_ROW_ERROR = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+)")
_JSON_INTEGER_LIMIT = 2**53
_NO_ROWS_HINT = "is this the right file, and was it written to its end?"


def read_bytes(path: Path, name: str) -> bytes:
    """A file's bytes; `.gz` files are unpacked, up to `most_unpacked` bytes.

    Raises:
        DataError: The file cannot be read, is not a whole gzip file, or is a bomb.

    Example:
        >>> read_bytes(Path("/dev/null"), "null")
        b''
    """
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as stream:
                return _unpacked(stream, most_unpacked(path.stat().st_size), name)
        return path.read_bytes()
    except EOFError as error:
        raise DataError(f"{name} is cut off: the gzip file ends early", hint="fetch or copy the file again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name} is not a gzip file: {error}", hint="fetch it again, or rename it") from error
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}", details={"file": name}) from error


def most_unpacked(packed_bytes: int) -> int:
    """How many bytes a compressed file may become: tables and pixels are not smaller by more than that.

    Example:
        >>> most_unpacked(1000) >> 30, most_unpacked(1 << 30) >> 30
        (1, 100)
    """
    return max(LARGEST_UNPACKED_BYTES, MOST_TIMES * packed_bytes)


def _unpacked(stream: gzip.GzipFile, most_bytes: int, name: str) -> bytes:
    parts: list[bytes] = []
    size = 0
    while part := stream.read(_PART_BYTES):
        size += len(part)
        if size > most_bytes:
            raise DataError(
                f"{name} unpacks to more than {most_bytes} bytes", hint="unpack it yourself if you trust it"
            )
        parts.append(part)
    return b"".join(parts)


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


class Reading(NamedTuple):
    """One file as a table; `unnamed` columns got a name here, `notes` say what was settled for the user."""

    frame: pl.DataFrame
    unnamed: list[str] = []
    notes: list[str] = []


def read_csv(path: Path, name: str, data: Data) -> Reading:
    """Every cell as trimmed text; a row must have as many cells as the header.

    Args:
        path: The file, `.gz` too; separated by commas, semicolons, tabs or bars (seen in the header).
        name: How to call it in messages.
        data: The section with the encoding.

    Returns:
        One String column for each name in the header, no nulls; a first column without a name is called `index`.

    Raises:
        DataError: Empty, header only, ragged (names the row), wrong encoding, cut off, repeated names.

    Example:
        >>> read_csv(Path("/dev/null"), "null.csv", Data(source="x", label="y"))
        Traceback (most recent call last):
        millrace.core.errors.DataError: null.csv is empty: want a header and rows
    """
    text = decode_text(read_bytes(path, name), name, data.encoding)
    layout = layout_of(text, name)
    check_names(layout.header, name)
    text = text if text.endswith("\n") else text + "\n"  # Arrow calls a single line without its end empty
    table = _parse_csv(text.encode("utf-8", "surrogatepass"), name, layout)
    frame = pl.DataFrame(pl.from_arrow(table)).slice(1)
    if frame.height == 0:
        raise DataError(f"{name} has a header but no rows", hint=EMPTY_HINT, details={"file": name, "row": 0})
    frame.columns = layout.header
    return Reading(frame.with_columns(pl.all().str.strip_chars()), layout.unnamed, layout.notes)


def _parse_csv(raw: bytes, name: str, layout: CsvLayout) -> pa.Table:
    # All text, and the header as the first record: names with line breaks and repeated names stay whole.
    columns = {f"f{index}": pa.large_string() for index in range(len(layout.header))}
    block = min(max(_MIN_BLOCK_BYTES, len(raw) + 1), _MAX_BLOCK_BYTES)  # one block: a cell may have any length
    try:
        return pyarrow.csv.read_csv(
            pa.BufferReader(raw),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, autogenerate_column_names=True, block_size=block),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=layout.delimiter,
                quote_char='"' if layout.is_quoted else False,
                newlines_in_values=layout.is_quoted,
            ),
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


def read_parquet(path: Path, name: str, data: Data) -> Reading:
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
        raise DataError(f"{name} has columns but no rows", hint=_NO_ROWS_HINT, details={"file": name, "row": 0})
    return Reading(simplify(pl.DataFrame(pl.from_arrow(table))))


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


def read_jsonl(path: Path, name: str, data: Data) -> Reading:
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
        raise DataError(
            f"{name} is empty: want one JSON object in each line", hint=_NO_ROWS_HINT, details={"file": name}
        )
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
    return Reading(pl.DataFrame([_json_column(column, values) for column, values in columns.items()]))


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


READERS: dict[str, Callable[[Path, str, Data], Reading]] = {
    "csv": read_csv,
    "parquet": read_parquet,
    "jsonl": read_jsonl,
}
