"""Answers for a file of rows: `millrace predict digits --input rows.csv`."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from millrace.core import extras
from millrace.core.errors import InputError, MillraceError
from millrace.formats.bundle import Bundle
from millrace.formats.rows import decode_answers, encode_rows
from millrace.formats.session import open_session
from millrace.formats.signature import Signature, TensorSpec

CHUNK_ROWS = 1024
MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"})
_TRUE, _FALSE = frozenset({"true", "yes"}), frozenset({"false", "no"})
_MAX_CELL = 1 << 24
Row = dict[str, Any]


def predict_file(bundle: Bundle, variant: str, path: Path, threads: int = 1) -> Iterator[dict[str, Any]]:
    """Answers for the rows of a file, in their order, chunk by chunk.

    Args:
        bundle: Verified.
        variant: Which of its graphs.
        path: `.csv`, `.tsv`, `.jsonl` or `.parquet`; columns that the model does not read are dropped.
        threads: Of one call.

    Yields:
        `{"label": …, "probabilities": {…}}` or `{"value": …}` per row.

    Raises:
        InputError: The file cannot be read, lacks a column, or has a bad cell: names file and row.
    """
    session = open_session(bundle.model(variant), threads=threads)
    rows = read_rows(bundle.signature, path)
    first = 1
    while chunk := list(islice(rows, CHUNK_ROWS)):
        tensors = _encode(bundle.signature, chunk, path, first)
        yield from decode_answers(bundle.signature, session.run(tensors))
        first += len(chunk)
    if first == 1:
        raise InputError(f"{path.name}: has no rows")


def _encode(signature: Signature, rows: list[Row], path: Path, first: int) -> dict[str, Any]:
    try:
        return encode_rows(signature, rows)
    except InputError:
        for index, row in enumerate(rows):
            try:
                encode_rows(signature, [row])
            except InputError as error:
                field = error.message.removeprefix("instances[0]").removeprefix(".").lstrip(":").strip()
                raise InputError(f"{path.name} row {first + index}: {field}", hint=error.hint) from error
        raise


def read_rows(signature: Signature, path: Path) -> Iterator[Row]:
    """Rows of a file with the columns that the model reads.

    Raises:
        InputError: There is no such file, its kind is unknown, or a column is missing.
    """
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".ndjson": _read_jsonl}
    readers[".parquet"] = _read_parquet
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError(f"{path.name}: want a file that ends in {', '.join(sorted(readers))}")
    if not path.is_file():
        raise InputError(f"{path} does not exist", hint="check the path of --input")
    return reader(signature, path)


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


# ---------------------------------------------------------------------- CSV


def _read_csv(signature: Signature, path: Path) -> Iterator[Row]:
    csv.field_size_limit(min(sys.maxsize, _MAX_CELL))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(reader, None)
            if header is None:
                raise InputError(f"{path.name}: is empty")
            wanted = _columns(signature, path, header)
            places = [(header.index(column), column, spec) for column, spec in wanted.items()]
            for number, cells in enumerate(reader, start=1):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise InputError(f"{path.name} row {number}: has {len(cells)} cells, the header has {len(header)}")
                yield {column: _cell(cells[k], spec) for k, column, spec in places}
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name}: cannot be read as UTF-8 CSV: {error}") from error


def _cell(text: str, spec: TensorSpec) -> Any:
    """A CSV cell as JSON would have it; what is no number stays a text and is named later.

    Example:
        >>> number = TensorSpec(name="numbers", dtype="float32", shape=[-1, 1])
        >>> [_cell(text, number) for text in ("1.5", " 2 ", "NA", "true", "x")]
        [1.5, 2.0, None, 1.0, 'x']
    """
    if spec.dtype == "string":
        return None if text in MISSING else text
    text = text.strip()
    if text in MISSING:
        return None
    try:
        number = float(text)
    except ValueError:
        lower = text.lower()
        return 1.0 if lower in _TRUE else 0.0 if lower in _FALSE else text
    return number if math.isfinite(number) else text


# ---------------------------------------------------------------------- JSON lines, Parquet


def _read_jsonl(signature: Signature, path: Path) -> Iterator[Row]:
    tensors = [spec.name for spec in signature.inputs]
    with path.open("rb") as file:
        for number, line in enumerate((line for line in file if line.strip()), start=1):
            try:
                row = msgspec.json.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise InputError(f"{path.name} row {number}: is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise InputError(f"{path.name} row {number}: want an object by column, got {str(row)[:40]}")
            if number == 1 and not all(name in row for name in tensors):
                _columns(signature, path, row)
            yield row


def _read_parquet(signature: Signature, path: Path) -> Iterator[Row]:
    extras.require([("pyarrow", "data")], f"reading {path.name}")
    parquet = extras.load("pyarrow.parquet:ParquetFile")
    try:
        file = parquet(path)
        wanted = list(_columns(signature, path, file.schema_arrow.names))
        for batch in file.iter_batches(CHUNK_ROWS, columns=wanted, use_threads=False):
            yield from batch.to_pylist()
    except MillraceError:
        raise
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise InputError(f"{path.name}: cannot be read as Parquet: {str(error)[:160]}") from error
