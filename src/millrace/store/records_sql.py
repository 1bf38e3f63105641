"""Records in SQL, on SQLite here and on Postgres through `store.postgres`.

Several threads and processes, every write durable when it returns.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from millrace.core.clock import Clock, SystemClock
from millrace.core.errors import DiskFullError, SchemaVersionError, UnavailableError
from millrace.core.search import FoundRun, RunQuery, RunValues
from millrace.core.types import Event, MetricPoint, Record
from millrace.store import metric_buffer, queries, sealing, search_sql, tracking_sql
from millrace.store.database import Connection, Database
from millrace.store.layout import HEAD
from millrace.store.metric_buffer import MetricBuffer
from millrace.store.sealing import SealedLink
from millrace.store.sqlite import SqliteDatabase, connect, refuse_network_filesystem, translated

R = TypeVar("R", bound=Record)
T = TypeVar("T")
_ERASE_AT_ONCE = 500  # parameters of a statement
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def open_records(path: Path, clock: Clock | None = None) -> SqlRecords:
    """Open the records of a home; a new file is created at the newest schema, an older one migrated.

    Args:
        path: The database file, `records.db` in the home; its folder is created.
        clock: Where `created_at` of a record without one comes from.

    Raises:
        SchemaVersionError: A newer Millrace wrote this file.
        InputError: The folder lies on a network filesystem.
        CorruptError: The file is not a database, or damaged.

    Example:
        >>> import tempfile
        >>> from millrace.core.types import Run
        >>> with tempfile.TemporaryDirectory() as home:
        ...     records = open_records(Path(home) / "records.db")
        ...     run = records.put(Run(id="r1", name="first"))
        ...     records.get(Run, "r1").name, run.version
        ...     records.close()
        ('first', 1)
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_network_filesystem(path.parent)
    if not path.exists() or _revision(path) != HEAD:
        _bring_to_head(path)
    return SqlRecords(SqliteDatabase(path), clock or SystemClock())


class SqlTransaction:
    """Implements `core.ports.Transaction`; ends with the `with` block that made it."""

    def __init__(self, connection: Connection, clock: Clock) -> None:
        self._open: Connection | None = connection
        self._clock = clock

    @property
    def connection(self) -> Connection:
        """For the statements of other modules of the store."""
        if self._open is None:
            raise RuntimeError("this transaction has ended")
        return self._open

    def get(self, record_type: type[R], id: str) -> R | None:
        """The record inside this transaction, or None."""
        return queries.get(self.connection, record_type, id)

    def find(self, record_type: type[R], where: Mapping[str, Any] | None = None) -> list[R]:
        """Records whose fields equal `where`, inside this transaction, oldest first."""
        return queries.find(self.connection, record_type, where)

    def put(self, record: R, expect_version: int | None = None) -> R:
        """Insert or replace; a `created_at` of 0 becomes now on insertion."""
        return queries.put(self.connection, record, expect_version, self._clock.now())

    def delete(self, record_type: type[Record], id: str) -> bool:
        """Remove a record, and with a run its points, parameters and tags."""
        return queries.delete(self.connection, record_type, id)

    def log(
        self,
        run_id: str,
        *,
        points: Sequence[MetricPoint] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        removed_tags: Sequence[str] = (),
        replace_params: bool = False,
    ) -> None:
        """Record points, parameters and tags of a run."""
        tracking_sql.log(
            self.connection, run_id, points=points, params=params, tags=tags, removed_tags=removed_tags,
            replace_params=replace_params,
        )  # fmt: skip

    def append(self, event: Event) -> None:
        """Add an event, unsealed."""
        sealing.append(self.connection, event)

    def end(self) -> None:
        """No more calls."""
        self._open = None


class SqlRecords:
    """Implements `core.ports.Records` on a database. Made by `open_records`, here or in `store.postgres`."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._pid = os.getpid()
        self._write_lock = threading.Lock()
        self._writing_thread: int | None = None
        self._buffer = MetricBuffer(self.flush)
        self._closing = self._gone = False
        atexit.register(self.close)

    def get(self, record_type: type[R], id: str) -> R | None:
        """The newest committed record, or None."""
        return self.read(lambda connection: queries.get(connection, record_type, id))

    def find(
        self,
        record_type: type[R],
        where: Mapping[str, Any] | None = None,
        order: str = "created_at",
        limit: int | None = None,
        offset: int = 0,
    ) -> list[R]:
        """Records whose fields equal `where`; ties by id, in the direction of the order."""
        return self.read(lambda connection: queries.find(connection, record_type, where, order, limit, offset))

    def put(self, record: R, expect_version: int | None = None) -> R:
        """One put in a transaction of its own."""
        with self.transaction() as transaction:
            return transaction.put(record, expect_version)

    @contextmanager
    def transaction(self) -> Iterator[SqlTransaction]:
        """A write transaction; waiting metric points become durable with it.

        Raises:
            DiskFullError: Nothing was written.
            UnavailableError: Another process held the lock for half a minute.
        """
        with self.writing() as connection:
            transaction = SqlTransaction(connection, self._clock)
            try:
                yield transaction
            finally:
                transaction.end()

    def events(self, since: int = 0, subject: str | None = None, limit: int = 1000) -> list[Event]:
        """Sealed events with `seq` > since, in order."""
        found = self.read(lambda connection: sealing.links(connection, since, subject, limit))
        return [sealing.as_event(id, link) for id, link in found]

    def seal(self, fence: int = 0) -> int:
        """Seal every unsealed event. Returns how many.

        Raises:
            ConflictError: A sealer with a newer fence has taken over.
        """
        total = 0
        while self.read(sealing.has_unsealed):
            with self.writing() as connection:
                total += sealing.seal_batch(connection, fence)
        return total

    def append_metrics(self, points: Sequence[MetricPoint]) -> None:
        """Append points; durable together with the next transaction or within one second."""
        self._check_open()
        self._buffer.append(points)

    def metrics(self, run_id: str, name: str | None = None, since: int = 0, limit: int = 100_000) -> list[MetricPoint]:
        """Points of a run in the order of arrival; those that wait in this process are written first."""
        self.flush()
        return self.read(lambda connection: metric_buffer.read(connection, run_id, name, since, limit))

    def search_runs(self, query: RunQuery) -> list[FoundRun]:
        """The page of runs that fit; points that wait in this process are written first."""
        self.flush()
        return self.read(lambda connection: search_sql.search_runs(connection, query))

    def run_values(self, run_ids: Sequence[str]) -> dict[str, RunValues]:
        """The values of runs; points that wait in this process are written first."""
        self.flush()
        return self.read(lambda connection: tracking_sql.run_values(connection, run_ids))

    def metric_history(
        self, run_id: str, name: str, limit: int | None = None, after: tuple[float, int, int] | None = None
    ) -> list[tuple[MetricPoint, tuple[float, int, int]]]:
        """Points of one metric by (time, step, row), each with the cursor that goes on after it."""
        self.flush()
        return self.read(lambda connection: tracking_sql.metric_history(connection, run_id, name, limit, after))

    def links(self, since: int = 0, limit: int = 1000) -> list[SealedLink]:
        """Sealed events as `security.chain.verify` wants them."""
        return [link for _, link in self.read(lambda connection: sealing.links(connection, since, None, limit))]

    def head(self) -> tuple[int, str]:
        """The last sealed seq and chain digest, (0, 64 zeros) before the first."""
        return self.read(sealing.head)

    def erase_detail(self, event_id: int) -> bool:
        """Erase an event's detail and salt for good; the chain still verifies. False: there was none."""
        with self.writing() as connection:
            self._database.before_erasing(connection)
            erased = connection.execute("DELETE FROM event_details WHERE event_id = ?", (event_id,)).rowcount > 0
        with self._write_lock, self._database.translated():
            self._database.after_erasing()
        return erased

    @contextmanager
    def erasing(self) -> Iterator[None]:
        """What transactions inside overwrite or delete is also gone from the files, when this ends."""
        with self.writing() as connection:
            self._database.before_erasing(connection)
        try:
            yield
        finally:
            with self._write_lock, self._database.translated():
                self._database.after_erasing()

    def erase_details(self, event_ids: Sequence[int], event: Event) -> None:
        """Erase details and salts of many events, and say so by another event, all in one transaction."""
        with self.writing() as connection:
            self._database.before_erasing(connection)
            for first in range(0, len(event_ids), _ERASE_AT_ONCE):
                some = event_ids[first : first + _ERASE_AT_ONCE]
                marks = ", ".join("?" * len(some))
                connection.execute(f"DELETE FROM event_details WHERE event_id IN ({marks})", some)
            sealing.append(connection, event)
        with self._write_lock, self._database.translated():
            self._database.after_erasing()

    def close(self) -> None:
        """Flush and let go of the files; does nothing the second time, or in a forked child."""
        if self._closing or os.getpid() != self._pid:
            return
        self._closing = True
        atexit.unregister(self.close)
        self._buffer.stop()
        try:
            self.flush()
        finally:
            with self._write_lock:
                self._gone = True
                self._database.close()

    def read(self, question: Callable[[Connection], T]) -> T:
        """Ask something in SQL that changes nothing: the newest committed state, not an open transaction's.

        Args:
            question: Called with a connection; once more if the connection was lost.
        """

        def asked(connection: Connection) -> T:
            self._check_open()  # again: it may have waited for its turn
            return question(connection)

        self._check_open()
        with self._database.translated():
            return self._database.read(asked)

    def _check_open(self) -> None:
        if self._gone:
            raise UnavailableError(f"the records {self._database.name} are closed", hint="open them again")
        if os.getpid() != self._pid:  # connections and locks are the parent's
            raise UnavailableError(
                f"the records {self._database.name} were opened before this process was forked",
                hint="open them again in the new process",
            )

    def flush(self) -> None:
        """Make waiting metric points durable now."""
        inside = self._writing_thread == threading.get_ident()  # then the open transaction takes them along
        if not inside and not self._buffer.is_empty:
            with self.writing():
                pass

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A write transaction in SQL; waiting metric points become durable with it. See `transaction`."""
        self._check_open()
        if self._writing_thread == threading.get_ident():
            raise RuntimeError("a transaction inside a transaction would wait for itself: use the open one")
        with self._write_lock, self._database.translated():
            self._check_open()
            self._writing_thread = threading.get_ident()
            rows: list[metric_buffer.Row] = []
            try:
                connection = self._database.begin()
                yield connection
                rows = self._buffer.write(connection)
                self._database.commit()
            except BaseException:
                self._database.rollback()
                self._buffer.restore(rows)
                raise
            finally:
                self._writing_thread = None


def _revision(path: Path) -> str | None:
    """The stamped revision by plain SQL: opening a current home must not import Alembic.

    Raises:
        SchemaVersionError: The file is some other program's database.
    """
    connection = connect(path)
    try:
        with translated(path):
            tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if "alembic_version" in tables:
                row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
                return None if row is None else row[0]
    finally:
        connection.close()
    if tables - {"sqlite_sequence"}:
        raise SchemaVersionError(
            f"{path} is a database, but not one of Millrace: it has the tables {', '.join(sorted(tables))}",
            hint="choose another folder with MILLRACE_HOME",
        )
    return None


def _bring_to_head(path: Path) -> None:
    """Create or migrate under an exclusive lock, so that several first commands at once do it once."""
    with _lock_file(path.with_name("records.lock")), translated(path):
        found = _revision(path) if path.exists() else None
        if found == HEAD:
            return
        # by name, as stages are: 0.4 s of SQLAlchemy and Alembic that no opening of a current home pays
        migrate = importlib.import_module("millrace.store.migrate")
        if found is None:
            _create(path, migrate.create)
        else:
            migrate.upgrade(path)


@contextmanager
def _lock_file(path: Path) -> Iterator[None]:
    """Hold an exclusive lock that the kernel lets go of with the process."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(f"{path}: the disk is full, the records could not be created") from error
        raise UnavailableError(f"{path} cannot be created: {error}", hint="check the folder's permissions") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _create(path: Path, create: Callable[[Path], None]) -> None:
    """A new file appears complete or not at all: made beside its place, then renamed."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    try:
        create(new)
        connection = connect(new)
        try:
            with translated(path):
                connection.execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
        os.replace(new, path)
    finally:
        for leftover in (new, Path(f"{new}-journal"), Path(f"{new}-wal"), Path(f"{new}-shm")):
            leftover.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
