"""Files of answers: Parquet with typed columns, CSV, JSON lines."""

from __future__ import annotations

import csv
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import orjson

from millrace.core import extras
from millrace.core.csv_cells import safe_cell
from millrace.core.errors import DiskFullError, InputError, UnavailableError
from millrace.formats.rows import answer_arrays, answer_labels, decode_answers
from millrace.formats.signature import Signature

FORMATS = ("parquet", "csv", "jsonl")
_GROUP_ROWS = 1 << 16
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@contextmanager
def disk_faults(place: Path) -> Iterator[None]:
    """What the disk says while answers are written, as errors that a person can act on.

    Raises:
        DiskFullError: It is full.
        UnavailableError: It refuses for another reason.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(f"the disk of {place} is full") from error
        reason = error.strerror or str(error)
        raise UnavailableError(
            f"{error.filename or place}: {reason}", hint="check the path and its permissions"
        ) from error


class Writer(Protocol):
    """Writes answers in the order of the rows; a context that closes the file."""

    def write(self, numbers: np.ndarray, outputs: dict[str, np.ndarray]) -> None:
        """The rows' numbers, and what the model gave for them."""
        ...

    def __enter__(self) -> Writer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_writer(kind: str, path: Path, signature: Signature, *, has_numbers: bool) -> Writer:
    """A new file of answers.

    Args:
        kind: One of `FORMATS`.
        path: Where.
        signature: What the answers mean.
        has_numbers: Whether the rows' numbers stand in a first column `row`.

    Raises:
        InputError: There is no such format.
        ExtraMissingError: Parquet needs the extra `data`.
    """
    check_format(kind)
    made: dict[str, Any] = {"parquet": ParquetWriter, "csv": CsvWriter, "jsonl": JsonWriter}
    return made[kind](path, signature, has_numbers)


def check_format(kind: str) -> None:
    """Refuse a format that cannot be written.

    Raises:
        InputError: There is no such format.
        ExtraMissingError: Parquet needs the extra `data`.
    """
    if kind not in FORMATS:
        raise InputError(f"want a format of {', '.join(FORMATS)}, got {kind[:40]!r}")
    if kind == "parquet":
        extras.require([("pyarrow", "data")], "writing Parquet (--format csv and --format jsonl need nothing)")


class _TextWriter:
    """What CSV and JSON lines have in common."""

    def __init__(self, path: Path, signature: Signature, has_numbers: bool) -> None:
        self._file = path.open("wb")
        self._signature, self._has_numbers = signature, has_numbers

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class JsonWriter(_TextWriter):
    """One object a line."""

    def write(self, numbers: np.ndarray, outputs: dict[str, np.ndarray]) -> None:
        """Add rows."""
        answers = decode_answers(self._signature, outputs)
        if self._has_numbers:
            answers = [{"row": number, **answer} for number, answer in zip(numbers.tolist(), answers, strict=True)]
        self._file.write(b"".join([orjson.dumps(answer) + b"\n" for answer in answers]))


class CsvWriter(_TextWriter):
    """`label` and a column for each class, or `value`; no cell is a spreadsheet's formula."""

    def __init__(self, path: Path, signature: Signature, has_numbers: bool) -> None:
        super().__init__(path, signature, has_numbers)
        self._text = _Utf8(self._file)
        self._csv = csv.writer(self._text)
        names = [f"probability_{name}" for name in signature.classes]
        columns = ["value"] if signature.task == "regression" else ["label", *names]
        self._csv.writerow([safe_cell(name) for name in (["row"] if has_numbers else []) + columns])

    def write(self, numbers: np.ndarray, outputs: dict[str, np.ndarray]) -> None:
        """Add rows."""
        best, values = answer_arrays(self._signature, outputs)
        shown = _decimals(values.reshape(len(numbers), -1))
        if best is not None:
            labels = [safe_cell(label) for label in answer_labels(self._signature)]
            shown = [[labels[winner], *row] for winner, row in zip(best.tolist(), shown, strict=True)]
        if self._has_numbers:
            shown = [[number, *row] for number, row in zip(numbers.tolist(), shown, strict=True)]
        self._csv.writerows(shown)


class _Utf8:
    """What `csv` writes to: UTF-8 into a file of bytes."""

    def __init__(self, file: Any) -> None:
        self._write = file.write

    def write(self, text: str) -> int:
        return self._write(text.encode())


def _decimals(values: np.ndarray) -> list[list[Any]]:
    return orjson.loads(orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY))


class ParquetWriter:
    """Typed columns: `label` with the label column's type and a float for each class, or `value`."""

    def __init__(self, path: Path, signature: Signature, has_numbers: bool) -> None:
        self._arrow = arrow = extras.load("importlib:import_module")("pyarrow")
        self._signature, self._has_numbers = signature, has_numbers
        fields: list[Any] = [arrow.field("row", arrow.int64())] if has_numbers else []
        self._labels: Any = None
        if signature.task == "regression":
            fields.append(arrow.field("value", arrow.float32()))
        else:
            kind = _label_type(arrow, signature)
            self._labels = arrow.array(answer_labels(signature), kind)
            fields.append(arrow.field("label", kind))
            fields += [arrow.field(f"probability_{name}", arrow.float32()) for name in signature.classes]
        self._schema = arrow.schema(fields)
        self._file: Any = extras.load("pyarrow.parquet:ParquetWriter")(path, self._schema, compression="zstd")
        self._pending: list[Any] = []
        self._rows = 0

    def __enter__(self) -> ParquetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._flush()
        self._file.close()

    def write(self, numbers: np.ndarray, outputs: dict[str, np.ndarray]) -> None:
        """Add rows."""
        best, values = answer_arrays(self._signature, outputs)
        columns = list(np.ascontiguousarray(values.reshape(len(numbers), -1).T))
        arrays = [self._arrow.array(column) for column in columns]
        if best is not None:
            arrays.insert(0, self._labels.take(self._arrow.array(best)))
        if self._has_numbers:
            arrays.insert(0, self._arrow.array(numbers))
        self._pending.append(self._arrow.record_batch(arrays, schema=self._schema))
        self._rows += len(numbers)
        if self._rows >= _GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._file.write_table(self._arrow.Table.from_batches(self._pending).combine_chunks())
        self._pending, self._rows = [], 0


def _label_type(arrow: Any, signature: Signature) -> Any:
    labels = answer_labels(signature)
    if labels and signature.label_type != "string" and not any(isinstance(label, str) for label in labels):
        return {"integer": arrow.int64(), "number": arrow.float64(), "boolean": arrow.bool_()}[signature.label_type]
    return arrow.string()
