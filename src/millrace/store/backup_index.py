"""What this home remembers of its last backup to a destination, so that less is read the next time.

Only a memory: without it, or when the records are no longer the ones that it is of, everything is read.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec

from millrace.core.types import Struct
from millrace.store.backup_rows import Points, chain_at
from millrace.store.backup_versions import Stretch
from millrace.store.blobs_local import disk_errors
from millrace.store.database import Connection
from millrace.store.layout import HEAD


class Index(Struct, frozen=True, kw_only=True):
    """`seq` and `chain`: the head of the event chain then. Pieces of points by bucket, of records by table; files of
    trees by digest.
    """

    seq: int = 0
    chain: str = ""
    schema: str = HEAD
    points: dict[int, Points] = {}
    stretches: dict[str, list[Stretch]] = {}
    trees: dict[str, list[str]] = {}


def index_path(home: Path, url: str) -> Path:
    """Where a home keeps what it remembers of a destination.

    Example:
        >>> index_path(Path("/home"), "/srv/backups").parent
        PosixPath('/home/cache/backup')
    """
    return home / "cache" / "backup" / f"{hashlib.sha256(url.encode()).hexdigest()[:32]}.msgpack"


def read_index(path: Path, connection: Connection, *, is_full: bool) -> Index:
    """What is remembered, if it is of these records: if their chain of events has the head of then in it.

    Args:
        path: See `index_path`.
        connection: A snapshot of the records.
        is_full: Remember no pieces: all rows are to be read.
    """
    try:
        found = msgspec.msgpack.decode(path.read_bytes(), type=Index)
    except (OSError, msgspec.MsgspecError):
        return Index()
    is_same = found.schema == HEAD and found.seq > 0 and chain_at(connection, found.seq) == found.chain
    return found if is_same and not is_full else Index(trees=found.trees)


def write_index(path: Path, index: Index) -> None:
    """Remember."""
    temp = path.with_suffix(f".{os.getpid()}")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temp.write_bytes(msgspec.msgpack.encode(index))
        os.replace(temp, path)
