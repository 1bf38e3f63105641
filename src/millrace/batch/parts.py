"""How files are cut into parts: by rows, the same way whenever and wherever it is done."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from millrace.batch.rows import CountedLines, Span, csv_reader, suffix_of, whole
from millrace.core.errors import InputError
from millrace.core.types import Struct

PART_ROWS = 1 << 18
_ENDS_BYTES = 1 << 20
_MAX_LINE = 1 << 26


class Source(Struct, frozen=True, kw_only=True):
    """An input file and what tells whether it is still the same: its size, its time, the digest of both its ends."""

    path: str
    size_bytes: int
    changed_ns: int
    digest: str


class Part(Struct, frozen=True, kw_only=True):
    """Rows that are answered by one file. `size_bytes`: what they are of the whole input, for the progress."""

    name: str
    source: int
    span: Span
    size_bytes: float


def find_sources(patterns: Iterable[str]) -> list[Source]:
    """The files that are meant, sorted by their paths within each pattern; each once.

    Args:
        patterns: Files, folders (what can be read in them), or globs such as `data/*.parquet`.

    Raises:
        InputError: A pattern fits no file, or a file is of no kind that can be read.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        paths = _matches(pattern)
        if not paths:
            raise InputError(f"{pattern} fits no file", hint="check the path of --input; quote a glob")
        found.update(dict.fromkeys(str(path) for path in paths))
    sources: list[Source] = []
    for name in found:
        path = Path(name)
        suffix_of(path)
        state = path.stat()
        sources.append(
            Source(path=name, size_bytes=state.st_size, changed_ns=state.st_mtime_ns, digest=_digest_of_ends(path))
        )
    return sources


def _matches(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_dir():
        return sorted(one for one in path.iterdir() if one.is_file() and _can_read(one))
    if path.exists() or not any(sign in pattern for sign in "*?["):
        return [path]
    root = Path(path.anchor) if path.is_absolute() else Path()
    relative = path.relative_to(path.anchor) if path.is_absolute() else path
    return sorted(one for one in root.glob(str(relative)) if one.is_file())


def _can_read(path: Path) -> bool:
    try:
        return bool(suffix_of(path)) and not path.name.startswith((".", "_"))
    except InputError:
        return False


def _digest_of_ends(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_ENDS_BYTES))
        file.seek(max(0, path.stat().st_size - _ENDS_BYTES))
        digest.update(file.read(_ENDS_BYTES))
    return digest.hexdigest()


def cut(sources: list[Source], part_rows: int, identity: str, suffix: str) -> Iterator[Part]:
    """The parts of all files, in order; a file is read once, and never held.

    Args:
        sources: The files.
        part_rows: How many rows a part has; the last of a file has fewer.
        identity: What is done with them; part of the names.
        suffix: Of the names.

    Raises:
        InputError: A file cannot be read.
    """
    index = 0
    for place, source in enumerate(sources):
        path = Path(source.path)
        all_of_it = whole(path)
        size = max(all_of_it.end - all_of_it.start, 1)
        for span in _spans(path, all_of_it, part_rows):
            key = f"{identity} {path.name} {source.size_bytes} {source.digest} {span.first} {span.rows}"
            name = f"part-{index:05d}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.{suffix}"
            share = (span.end - span.start) / size
            yield Part(name=name, source=place, span=span, size_bytes=share * source.size_bytes)
            index += 1


def _spans(path: Path, all_of_it: Span, part_rows: int) -> Iterator[Span]:
    suffix = suffix_of(path)
    if suffix == ".parquet":
        for start in range(0, all_of_it.end, part_rows):
            end = min(start + part_rows, all_of_it.end)
            yield Span(path=str(path), start=start, end=end, first=start + 1, rows=end - start)
        return
    start, first = all_of_it.start, 1
    with path.open("rb") as file:
        while start < all_of_it.end:
            file.seek(start)
            if suffix in (".csv", ".tsv"):
                size, rows = _plain_csv(file, part_rows, path) or _any_csv(path, start, all_of_it.end, part_rows)
            else:
                size, rows = _json_lines(file, part_rows, path)
            if rows:
                yield Span(path=str(path), start=start, end=start + size, first=first, rows=rows)
            start, first = start + size, first + rows


def _lines(file: io.BufferedReader, path: Path) -> Iterator[bytes]:
    while line := file.readline(_MAX_LINE):
        if len(line) == _MAX_LINE:
            raise InputError(
                f"{path.name}: has a line of more than {_MAX_LINE >> 20} MiB", hint="is it a text of rows?"
            )
        yield line


def _json_lines(file: io.BufferedReader, part_rows: int, path: Path) -> tuple[int, int]:
    """How many bytes the next rows take, and how many rows there are."""
    size = rows = 0
    for line in _lines(file, path):
        size += len(line)
        rows += bool(line.strip())
        if rows == part_rows:
            break
    return size, rows


def _plain_csv(file: io.BufferedReader, part_rows: int, path: Path) -> tuple[int, int] | None:
    """As `_json_lines`; None where a line may not be a record: quotes, and carriage returns alone."""
    size = rows = 0
    for line in _lines(file, path):
        text = line.rstrip(b"\r\n")
        if b'"' in text or b"\r" in text:
            return None
        size += len(line)
        rows += bool(text)
        if rows == part_rows:
            break
    return size, rows


def _any_csv(path: Path, start: int, end: int, part_rows: int) -> tuple[int, int]:
    """As `_json_lines`, with the records read as such: slower."""
    file = path.open("rb")
    file.seek(start)
    lines = CountedLines(file)
    rows = 0
    try:
        for record in csv_reader(lines, path):
            rows += bool(record)
            if rows == part_rows:
                break
        else:
            return end - start, rows
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path.name}: cannot be read as UTF-8 CSV: {error}") from error
    finally:
        lines.close()
    return lines.size_bytes, rows
