"""Which files a spec's `data.source` means, and their digests. Light: planning imports this."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable
from pathlib import Path

from millrace.core.errors import DataError
from millrace.core.spec import Data
from millrace.data.builtin import builtin_of, bundled_files

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_SUFFIXES = {
    "csv": (".csv", ".tsv", ".txt", ".data"),
    "parquet": (".parquet", ".pq"),
    "jsonl": (".jsonl", ".ndjson"),
    "npz": (".npz",),
    "images": IMAGE_SUFFIXES,
}
_CHUNK_BYTES = 1 << 20


def format_of(path: Path) -> str | None:
    """The format that a file's name tells: csv, parquet, jsonl, npz, idx, images, or None.

    Example:
        >>> format_of(Path("t10k-images-idx3-ubyte.gz")), format_of(Path("rows.CSV.gz")), format_of(Path("a.xls"))
        ('idx', 'csv', None)
    """
    name = path.name.lower().removesuffix(".gz")
    if "-ubyte" in name or ".idx" in name:
        return "idx"
    for kind, suffixes in _SUFFIXES.items():
        if name.endswith(suffixes):
            return kind
    return None


def labels_path(images: Path) -> Path:
    """The labels file that belongs to an IDX images file, by its name.

    Example:
        >>> labels_path(Path("train-images-idx3-ubyte.gz")).name
        'train-labels-idx1-ubyte.gz'
    """
    return images.with_name(images.name.replace("images", "labels").replace("idx3", "idx1"))


def resolve_files(data: Data, project_dir: Path) -> list[Path]:
    """Every file of the source, in a fixed order: as listed, and sorted within a glob or a folder.

    Args:
        data: The spec's section.
        project_dir: The folder that relative paths and globs start from.

    Returns:
        Existing files, each once. An IDX images file brings its labels file along.

    Raises:
        DataError: A named file does not exist, or a glob or folder holds nothing that can be read.

    Example:
        >>> resolve_files(Data(source="nowhere.csv", label="y"), Path("."))
        Traceback (most recent call last):
        millrace.core.errors.DataError: data source 'nowhere.csv' does not exist
    """
    patterns = [data.source] if isinstance(data.source, str) else list(data.source)
    if not patterns:
        raise DataError("data.source names no file: want a file, a folder, a glob or a list of them, got []")
    found: dict[Path, None] = {}
    for pattern in patterns:
        for path in _expand(pattern, project_dir, data.format):
            found[path] = None
    return list(found)


def _expand(pattern: str, project_dir: Path, wanted: str) -> list[Path]:
    path = project_dir / pattern
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _readable(sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p, path)), wanted)
    elif glob.has_magic(pattern):
        files = [p for p in sorted(Path(name) for name in glob.glob(str(path), recursive=True)) if p.is_file()]
    else:
        raise DataError(
            f"data source {pattern!r} does not exist",
            hint=_nearby(path, project_dir),
            details={"file": pattern},
        )
    if not files:
        raise DataError(
            f"data source {pattern!r} holds no file that can be read",
            hint="want CSV, Parquet, JSONL, .npz, IDX or image files there",
            details={"file": pattern},
        )
    return list(_with_labels(files, wanted))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _readable(files: list[Path], wanted: str) -> list[Path]:
    """A folder may hold a licence or a note beside its data: only what has a known format counts."""
    formats = {path: format_of(path) for path in files}
    if wanted != "auto":
        return [path for path in files if formats[path] == wanted]
    return [
        path for path in files if formats[path] is not None and path.name.lower() not in ("readme.txt", "license.txt")
    ]


def _with_labels(files: Iterable[Path], wanted: str) -> Iterable[Path]:
    for path in files:
        yield path
        if (format_of(path) if wanted == "auto" else wanted) != "idx" or "images" not in path.name:
            continue
        labels = labels_path(path)
        if not labels.is_file():
            raise DataError(
                f"the labels of {path.name} are missing: want {labels.name} beside it",
                hint="put both IDX files into one folder",
                details={"file": labels.name},
            )
        yield labels


def _nearby(path: Path, project_dir: Path) -> str:
    folder = path.parent if path.parent.is_dir() else project_dir
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and format_of(p)) if folder.is_dir() else []
    return f"{folder} holds {', '.join(names[:8])}" if names else f"put the file there: {path}"


def display_name(path: Path, project_dir: Path) -> str:
    """A file's name for people and records: relative to the project where it lies inside.

    Example:
        >>> display_name(Path("/a/b/c.csv"), Path("/a"))
        'b/c.csv'
    """
    return path.relative_to(project_dir).as_posix() if path.is_relative_to(project_dir) else path.as_posix()


def file_digest(path: Path) -> str:
    """`sha256:…` of a file's bytes, read in pieces.

    Raises:
        DataError: The file cannot be read.

    Example:
        >>> file_digest(Path("/dev/null"))[:14]
        'sha256:e3b0c44'
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while piece := stream.read(_CHUNK_BYTES):
                digest.update(piece)
    except OSError as error:
        raise DataError(f"{path.name} cannot be read: {error.strerror}", details={"file": str(path)}) from error
    return "sha256:" + digest.hexdigest()


def source_digests(data: Data, project_dir: Path) -> dict[str, str]:
    """The digest of every source file by name: what enters the data step's cache key.

    Raises:
        DataError: A file is missing or cannot be read; the message names it.

    Example:
        >>> source_digests(Data(source="nowhere.csv", label="y"), Path("."))
        Traceback (most recent call last):
        millrace.core.errors.DataError: data source 'nowhere.csv' does not exist
    """
    builtin = builtin_of(data.source)
    if builtin is not None:
        return {f"{data.source} {path.name}": file_digest(path) for path in bundled_files(builtin)}
    return {display_name(path, project_dir): file_digest(path) for path in resolve_files(data, project_dir)}
