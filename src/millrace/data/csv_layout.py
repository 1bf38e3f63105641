"""How a CSV file is laid out, seen in its text: the delimiter, whether quotes quote, the names of the header."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import NamedTuple

from millrace.core.errors import DataError
from millrace.data.naming import short

INDEX = "index"  # the name of a first column that has none
EMPTY_HINT = "want a header line and rows below it; is this the right file, and was it written to its end?"
_DELIMITERS = ",;\t|"
_NOT_IN_PROSE = "\t|"  # a text hardly holds these: such files often have no quoting at all
_MAX_CELL = (1 << 31) - 64
_LINE = re.compile(r"[^\r\n]+")


class CsvLayout(NamedTuple):
    """What the text tells; `notes` say what was settled for the user."""

    header: list[str]
    delimiter: str
    is_quoted: bool
    unnamed: list[str]  # names that were made up
    notes: list[str]


def layout_of(text: str, name: str) -> CsvLayout:
    """Read the header and settle the quoting.

    A first column without a name is a row's number, as pandas writes it: it gets one.

    Args:
        text: The whole file.
        name: How to call it in messages.

    Raises:
        DataError: Empty, an unreadable header, or a quote that is not closed.

    Example:
        >>> layout_of('a\\tb\\nx\\t"oh\\n', "t.tsv").notes
        ['1 row holds quotes that belong to the text: read without quoting']
    """
    first = next((match.group() for match in _LINE.finditer(text)), "")
    if not first.strip():
        raise DataError(f"{name} is empty: want a header and rows", hint=EMPTY_HINT, details={"file": name})
    delimiter = _delimiter(name, first)
    is_quoted, notes = True, []
    plain = _rows_with_plain_quotes(text, first, delimiter)
    if plain:
        is_quoted = False
        held = "row holds" if plain == 1 else "rows hold"
        notes.append(f"{plain} {held} quotes that belong to the text: read without quoting")
    else:
        _check_quotes(text, name, delimiter)
    header = [cell.strip() for cell in (_quoted_header(text, name, delimiter) if is_quoted else first.split(delimiter))]
    unnamed = []
    if len(header) > 1 and not header[0]:
        header[0] = _free_name(header)
        unnamed.append(header[0])
        notes.append(f"the first column has no name: called {header[0]!r}, a feature only if data.types names it")
    return CsvLayout(header, delimiter, is_quoted, unnamed, notes)


def _delimiter(name: str, header: str) -> str:
    if name.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    bare = re.sub(r'"[^"]*"', "", header)
    return max(_DELIMITERS, key=lambda mark: (bare.count(mark), -_DELIMITERS.index(mark)))


def _free_name(header: list[str]) -> str:
    taken = {column.casefold() for column in header}
    tries = (INDEX, *(f"{INDEX}_{number}" for number in range(2, len(header) + 3)))
    return next(one for one in tries if one not in taken)


def _rows_with_plain_quotes(text: str, header: str, delimiter: str) -> int:
    """How many rows hold quotes, where quotes cannot mean quoting; 0 where they may.

    They cannot when every line by itself has as many cells as the header, and reading them as quoting
    fails or swallows cells.
    """
    if delimiter not in _NOT_IN_PROSE or '"' in header or '"' not in text:
        return 0
    width = header.count(delimiter)
    if width == 0:
        return 0
    lines = held = 0
    for match in _LINE.finditer(text):
        line = match.group()
        if line.count(delimiter) != width:
            return 0
        lines += 1
        held += '"' in line
    try:
        records = sum(len(record) == width + 1 for record in _records(text, delimiter, strict=True))
    except csv.Error:
        return held
    return held if records < lines else 0


def _records(text: str, delimiter: str, *, strict: bool) -> Iterator[list[str]]:
    """Records as Python's reader sees them, cells of any length."""
    limit = csv.field_size_limit(_MAX_CELL)
    try:
        yield from csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict)
    finally:
        csv.field_size_limit(limit)


def _quoted_header(text: str, name: str, delimiter: str) -> list[str]:
    try:
        return next(record for record in _records(text, delimiter, strict=False) if record)
    except csv.Error as error:
        raise DataError(f"{name} has an unreadable header: {error}", details={"file": name, "row": 0}) from error


def _check_quotes(text: str, name: str, delimiter: str) -> None:
    """An open quote would swallow the rest of the file as one cell: Arrow says nothing of it."""
    if text.count('"') % 2 == 0:
        return
    row = 0
    try:
        for _ in _records(text, delimiter, strict=True):
            row += 1
    except csv.Error as error:
        plain = "; quotes are text where every line has as many cells as the header"
        raise DataError(
            f"{name} row {row} opens a quote that is not closed ({error})",
            hint='close the quote; a quote inside a quoted cell is written twice: ""'
            + (plain if delimiter in _NOT_IN_PROSE else ""),
            details={"file": name, "row": row},
        ) from error


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
        shown = short(column)
        details = {"file": name, "row": 0, "column": column[:200]}
        if not column:
            raise DataError(
                f"{name} has a column without a name: column {index + 1} of its header",
                hint="name it in the header; only a first column may go without",
                details=details,
            )
        if column.startswith("__millrace"):
            raise DataError(
                f"{name} has a column {shown}: names from '__millrace' on are reserved",
                hint="rename it",
                details=details,
            )
        other = seen.setdefault(column.casefold(), index)
        if other == index:
            continue
        pair = f"{other + 1} and {index + 1}"
        if names[other] == column:
            raise DataError(f"{name} has two columns named {shown} ({pair})", hint="rename one", details=details)
        raise DataError(
            f"{name} has columns {short(names[other])} and {shown} ({pair}) that differ only in case",
            hint="rename one",
            details=details,
        )
