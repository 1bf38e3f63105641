"""SQLite as we use it: WAL, synchronous=FULL, waits instead of 'database is locked', our errors."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from millrace.core.errors import CorruptError, DiskFullError, InputError, MillraceError, UnavailableError
from millrace.store.database import Connection, Dialect

T = TypeVar("T")
BUSY_TIMEOUT_S = 30.0
# 9p and virtiofs are absent on purpose: they are how sandboxes mount a local disk.
NETWORK_FILESYSTEMS = frozenset(
    (
        "nfs", "nfs4", "cifs", "smb2", "smb3", "smbfs", "ncpfs", "afs", "ceph", "glusterfs", "fuse.glusterfs", "lustre",
        "beegfs", "gpfs", "ocfs2", "gfs2", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.juicefs",
        "davfs", "fuse.davfs2",
    )
)  # fmt: skip
MAPPED_BYTES = 2**31 - 2**16  # the most that SQLite maps; only reads go through it
_CORRUPT = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
_CLOSED = frozenset({sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH})


class SqliteConnection(sqlite3.Connection):
    """SQLite's own connection with the name of its dialect."""

    dialect: ClassVar[Dialect] = "sqlite"

    def insert_rows(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Insert many new rows with one prepared statement."""
        marks = ", ".join("?" * len(columns))
        self.executemany(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", rows)


def connect(path: Path, timeout_s: float = BUSY_TIMEOUT_S) -> SqliteConnection:
    """A connection in autocommit mode (transactions are ours), usable from any thread under a lock."""
    with translated(path):
        connection = sqlite3.connect(
            path,
            timeout=timeout_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=512,
            factory=SqliteConnection,
        )
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("PRAGMA foreign_keys=ON")
    return connection


class SqliteDatabase:
    """Implements `store.database.Database`: one connection writes and one reads.

    WAL lets them not wait for each other.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer, self._reader = connect(path), connect(path)
        # Searches look up rows all over a file larger than SQLite's cache: without a system call each, twice as quick.
        self._reader.execute(f"PRAGMA mmap_size={MAPPED_BYTES}")
        self._read_lock = threading.Lock()

    @property
    def name(self) -> str:
        """The file."""
        return str(self.path)

    def translated(self) -> AbstractContextManager[None]:
        """SQLite's errors as ours."""
        return translated(self.path)

    def read(self, question: Callable[[Connection], T]) -> T:
        """Ask on the connection that only reads."""
        with self._read_lock:
            return question(self._reader)

    def begin(self) -> Connection:
        """BEGIN IMMEDIATE on the connection that writes."""
        begin(self._writer)
        return self._writer

    def commit(self) -> None:
        """COMMIT: fsync'd when it returns."""
        self._writer.execute("COMMIT")

    def rollback(self) -> None:
        """ROLLBACK, if a transaction is open: some errors end it by themselves."""
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK")

    def before_erasing(self, connection: Connection) -> None:
        """Have what is deleted overwritten with zeros."""
        connection.execute("PRAGMA secure_delete=ON")

    def after_erasing(self) -> None:
        """The old page also stands in the log: empty it."""
        self._writer.execute("PRAGMA secure_delete=OFF")
        self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Close both."""
        with self._read_lock:
            self._writer.close()
            self._reader.close()


def begin(connection: sqlite3.Connection, timeout_s: float = BUSY_TIMEOUT_S) -> None:
    """BEGIN IMMEDIATE, repeated while another process writes.

    SQLite's own busy handler is not asked in a few cases (recovery of a WAL, a change of journal mode),
    so the wait is repeated here until the time is up.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        else:
            return


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another process holds the lock that was needed."""
    return (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in _BUSY


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours; what would be a bug of ours passes through."""
    try:
        yield
    except sqlite3.Error as error:
        known = as_millrace_error(error, path)
        if known is None:
            raise
        raise known from error


def as_millrace_error(error: sqlite3.Error, path: Path) -> MillraceError | None:
    """The error of the tree that says what happened, or None when the statement itself was wrong.

    Example:
        >>> error = sqlite3.OperationalError("database or disk is full")
        >>> error.sqlite_errorcode = sqlite3.SQLITE_FULL
        >>> as_millrace_error(error, Path("records.db")).code
        'capacity.disk_full'
    """
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _is_full(path)):
        return DiskFullError(f"{path}: the disk is full, nothing of this change was written")
    if code in _CORRUPT:
        return CorruptError(
            f"{path} is damaged: {error}",
            hint="restore it from a backup; `sqlite3 records.db .recover` saves what is readable",
        )
    if code in _BUSY:
        return UnavailableError(
            f"{path} was locked by another process for {BUSY_TIMEOUT_S:.0f} s",
            hint="see who holds it with `fuser` on the file; a stopped process keeps its lock",
        )
    if code in _CLOSED:
        return UnavailableError(f"{path} cannot be opened for writing: {error}", hint="check the folder's permissions")
    if code == sqlite3.SQLITE_IOERR:
        return UnavailableError(f"{path}: the disk reports an error: {error}", hint="check the disk, then try again")
    return None


def _is_full(path: Path) -> bool:
    """Some calls (growing the shared-memory file) report a full disk as an input/output error."""
    try:
        state = os.statvfs(path.parent)
    except OSError:
        return False
    return state.f_bavail * state.f_frsize < 64 * 1024


def refuse_network_filesystem(folder: Path, mounts: str | None = None) -> None:
    """Refuse a folder where SQLite's locks and shared memory do not work.

    Args:
        folder: The folder of the database.
        mounts: The text of `/proc/mounts`; read when absent (no check where there is none).

    Raises:
        InputError: The folder lies on a network filesystem.

    Example:
        >>> refuse_network_filesystem(Path("/srv/x"), "h:/e /srv nfs4 rw 0 0")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: the records cannot lie in /srv/x: it is on nfs4, and several ...
    """
    if mounts is None:
        table = Path("/proc/mounts")
        mounts = table.read_text(errors="replace") if table.exists() else ""
    kind = filesystem_of(folder, mounts)
    if kind in NETWORK_FILESYSTEMS:
        raise InputError(
            f"the records cannot lie in {folder}: it is on {kind}, and several processes on one SQLite file need "
            "the locks and the shared memory of a local disk",
            hint="set MILLRACE_HOME to a folder on a local disk",
        )


def filesystem_of(folder: Path, mounts: str) -> str:
    """The type of the filesystem that holds a folder: the longest mount point that contains it.

    Example:
        >>> filesystem_of(Path("/srv/a b/home"), "/dev/sda / ext4 rw 0 0\\nh:/e /srv/a\\\\040b nfs4 rw 0 0")
        'nfs4'
    """
    resolved, best, found = folder.resolve(), -1, ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = Path(fields[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        if (point == resolved or point in resolved.parents) and len(point.parts) >= best:
            best, found = len(point.parts), fields[2]
    return found
