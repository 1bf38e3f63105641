"""Writes a dataset tree: the same rows give the same bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import polars as pl
import pyarrow.parquet as pq

from millrace.core.ids import digest_bytes
from millrace.data.source_files import file_digest
from millrace.formats.dataset import MANIFEST, Manifest, PartEntry

_PART_ROWS = 100_000
_GROUP_ROWS = 20_000


def write_parts(folder: Path, name: str, frame: pl.DataFrame) -> list[PartEntry]:
    """Write a split as Parquet parts of at most 100,000 rows; one empty part when there are no rows.

    Args:
        folder: The dataset's folder.
        name: The split, a folder below it.
        frame: Its rows.

    Returns:
        The parts, in order.
    """
    (folder / name).mkdir(parents=True)
    parts = []
    for index, start in enumerate(range(0, max(1, frame.height), _PART_ROWS)):
        rows = frame.slice(start, _PART_ROWS)
        path = folder / name / f"part-{index:05d}.parquet"
        # Every option that shapes the bytes is fixed here, whatever the library's defaults become.
        pq.write_table(
            rows.to_arrow(compat_level=pl.CompatLevel.oldest()),
            path,
            row_group_size=_GROUP_ROWS,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            write_statistics=True,
            store_schema=False,
        )
        entry = PartEntry(
            path=f"{name}/{path.name}", rows=rows.height, digest=file_digest(path), size_bytes=path.stat().st_size
        )
        parts.append(entry)
    return parts


def write_manifest(folder: Path, manifest: Manifest) -> str:
    """Write `manifest.json`, readable and with sorted keys; its digest."""
    data = msgspec.json.format(msgspec.json.encode(manifest, order="sorted"), indent=1)
    (folder / MANIFEST).write_bytes(data)
    return digest_bytes(data)


def content_digest(splits: dict[str, pl.DataFrame]) -> str:
    """A digest of the rows in order, by their values: no library's file format enters.

    Example:
        >>> rows = pl.DataFrame({"a": [1, None], "b": ["x", "y"]})
        >>> content_digest({"train": rows}) == content_digest({"train": rows.reverse()})
        False
    """
    digest = hashlib.sha256()
    for split, frame in splits.items():
        digest.update(f"{split} {frame.height}\n".encode())
        for name in frame.columns:
            values = frame[name]
            digest.update(f"{len(name)} {name} {values.dtype}\n".encode())
            _update(digest, values)
    return "sha256:" + digest.hexdigest()


def _update(digest: hashlib._Hash, values: pl.Series) -> None:
    digest.update(np.packbits(values.is_null().to_numpy()).tobytes())
    if values.dtype in (pl.String, pl.Binary):
        pieces = [value.encode() if isinstance(value, str) else value or b"" for value in values]
        digest.update(np.array([len(piece) for piece in pieces], dtype="<i8").tobytes())
        digest.update(b"".join(pieces))
        return
    numbers = values.to_physical().fill_null(0) if values.dtype != pl.Boolean else values.fill_null(False)
    kind = "<f8" if values.dtype.is_float() else "<i8"
    digest.update(numbers.to_numpy().astype(kind).tobytes())
