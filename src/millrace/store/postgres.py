"""Records on PostgreSQL: the same statements as on SQLite, for several hosts at once.

One writer at a time in the whole database, as on SQLite: each write transaction first takes the same
advisory lock. What a handler reads inside its transaction therefore still holds when it commits, without
retries, and the order of event ids is the order of commits. Readers wait for nobody.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import queue
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import psycopg
from psycopg import RawCursor, conninfo
from psycopg.pq import TransactionStatus
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import TextLoader

from millrace.core.clock import Clock, SystemClock
from millrace.core.errors import InputError, SchemaVersionError, UnavailableError
from millrace.store.database import WRITER_LOCK, Connection, Cursor, Dialect
from millrace.store.layout import HEAD
from millrace.store.postgres_errors import as_millrace_error
from millrace.store.records_sql import SqlRecords

T = TypeVar("T")
log = logging.getLogger(__name__)
READERS = 4
OLDEST_SERVER = 130000
DEFAULTS: dict[str, Any] = {  # what the URL itself says wins
    "application_name": "millrace",
    "connect_timeout": 10,
    "target_session_attrs": "read-write",  # of several hosts in the URL: the primary
    "keepalives_idle": 15,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
# A writer that waits longer than SQLite's would gives up; one that sleeps inside its transaction (a
# stopped process, a host that is gone) loses it, so that it cannot keep everybody else waiting.
_SESSION = """
SET lock_timeout = '30s';
SET idle_in_transaction_session_timeout = '60s';
SET client_encoding = 'UTF8';
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off';
SELECT current_setting('server_encoding'), current_setting('fsync')
"""
_BEGIN = f"BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE; SELECT pg_advisory_xact_lock({WRITER_LOCK})".encode()
_TOKEN = re.compile(r"""'(?:[^']|'')*'|"[^"]*"|\?""")


def open_records(url: str, clock: Clock | None = None) -> SqlRecords:
    """Open the records of a database; an empty one is created at the newest schema, an older one migrated.

    Args:
        url: `postgresql://user:password@host:port/database?sslmode=verify-full`, as libpq takes it: several
            hosts may be named, and the password may come from `PGPASSWORD` or `~/.pgpass` instead.
        clock: Where `created_at` of a record without one comes from.

    Raises:
        InputError: This is no such URL, or the server is too old or does not store UTF-8.
        UnavailableError: The server does not answer or does not let us in.
        SchemaVersionError: A newer Millrace, or another program, wrote this database.

    Example:
        >>> open_records("mysql://localhost/records")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: the URL of the records must begin with postgresql://
    """
    database = PostgresDatabase(url)
    try:
        with database.translated():
            found = database.read(_revision)
            if found != HEAD:
                # by name: 0.4 s of SQLAlchemy and Alembic that no opening of a current schema pays
                migrate = importlib.import_module("millrace.store.migrate")
                migrate.upgrade(url) if found else migrate.create(url)
    except BaseException:
        database.close()
        raise
    return SqlRecords(database, clock or SystemClock())


@lru_cache(maxsize=1024)
def numbered(sql: str) -> bytes:
    """`?` becomes `$1`, `$2` … except inside quotes.

    Example:
        >>> numbered("SELECT '50% of ?', \\"a?\\" FROM t WHERE a = ? AND b IN (?, ?)")
        b'SELECT \\'50% of ?\\', "a?" FROM t WHERE a = $1 AND b IN ($2, $3)'
    """
    numbers = itertools.count(1)
    return _TOKEN.sub(lambda found: f"${next(numbers)}" if found[0] == "?" else found[0], sql).encode()


class PostgresConnection:
    """Implements `store.database.Connection` over one of psycopg's."""

    dialect: ClassVar[Dialect] = "postgres"

    def __init__(self, raw: psycopg.Connection[Any]) -> None:
        self.raw = raw

    @property
    def is_lost(self) -> bool:
        """Whether the server, or we, have closed it."""
        return self.raw.closed

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """Run a statement; psycopg prepares it on the server once it has come five times."""
        return self.raw.execute(numbered(sql), parameters or None)

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> None:
        """Run a statement for each row, without waiting for each answer."""
        with self.raw.cursor() as cursor:
            cursor.executemany(numbered(sql), rows)

    def insert_rows(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Insert many new rows with COPY (2 µs a row; `executemany` takes 12)."""
        with (
            self.raw.cursor() as cursor,
            cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN".encode()) as copy,
        ):
            for row in rows:
                copy.write_row(row)


class PostgresDatabase:
    """Implements `store.database.Database`: one connection writes, up to `READERS` read, made when needed.

    A connection that was lost (the server was restarted) is replaced: a question is asked once more; a
    transaction begins anew only as long as nothing was done in it.
    """

    def __init__(self, url: str) -> None:
        self._parameters = _parsed(url)
        self.name = safe_name(url)
        self._writer: PostgresConnection | None = None
        self._is_warned = False
        self._readers: queue.LifoQueue[PostgresConnection | None] = queue.LifoQueue()
        for _ in range(READERS):
            self._readers.put(None)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """psycopg's errors as ours; what would be a bug of ours passes through."""
        try:
            yield
        except psycopg.Error as error:
            known = as_millrace_error(error, self.name)
            if known is None:
                raise
            raise known from error

    def read(self, question: Callable[[Connection], T]) -> T:
        """Ask on a free connection; waits for one."""
        reader = self._readers.get()
        try:
            for is_last in (False, True):
                if reader is None or reader.is_lost:
                    reader = self._connect()
                try:
                    return question(reader)
                except psycopg.Error:
                    if is_last or not reader.is_lost:
                        raise
            raise AssertionError("the second time returns or raises")
        finally:
            self._readers.put(reader)

    def begin(self) -> Connection:
        """Begin and wait for the writer lock: one round trip."""
        for is_last in (False, True):
            writer = self._writer
            if writer is None or writer.is_lost:
                writer = self._writer = self._connect()
            try:
                writer.raw.execute(_BEGIN)
            except psycopg.Error:
                if is_last or not writer.is_lost:
                    raise
            else:
                break
        assert self._writer is not None
        return self._writer

    def commit(self) -> None:
        """Make the transaction durable.

        Raises:
            UnavailableError: The connection was lost before the answer: `details["in_doubt"]` is true. Metric
                points that went with it are written again: in doubt they come twice rather than never.
        """
        assert self._writer is not None
        try:
            done = self._writer.raw.execute("COMMIT")
        except psycopg.Error as error:
            if not self._writer.is_lost:
                raise
            raise UnavailableError(
                f"{self.name}: the connection was lost while a change was being committed: in doubt is whether "
                "it was written, all of it or nothing",
                hint="read the record again before you repeat the change",
                details={"in_doubt": True},
            ) from error
        if done.statusmessage != "COMMIT":  # Postgres answers ROLLBACK, which is no error to it
            raise RuntimeError("a statement of this transaction failed and went on unseen: nothing was written")

    def rollback(self) -> None:
        """Undo the open transaction; the server does it by itself for a connection that is gone."""
        writer = self._writer
        if writer is None or writer.raw.info.transaction_status == TransactionStatus.IDLE:
            return
        try:
            writer.raw.execute("ROLLBACK")
        except psycopg.Error:
            writer.raw.close()

    def before_erasing(self, connection: Connection) -> None:
        """Nothing: Postgres marks rows first and forgets them in `after_erasing`."""

    def after_erasing(self) -> None:
        """Remove the dead rows from the table. The server's log and its archives keep them until they age out."""
        assert self._writer is not None
        self._writer.raw.execute("VACUUM event_details")

    def close(self) -> None:
        """Close every connection; waits for questions that are being answered."""
        if self._writer is not None:
            self._writer.raw.close()
        readers = [self._readers.get() for _ in range(READERS)]
        for reader in readers:
            if reader is not None:
                reader.raw.close()
            self._readers.put(None)

    def _connect(self) -> PostgresConnection:
        raw = connect(self._parameters)
        try:
            cursor = raw.execute(_SESSION)
            cursor.set_result(-1)
            encoding, fsync = cursor.fetchone() or ("", "")
            if encoding != "UTF8" or raw.info.server_version < OLDEST_SERVER:
                raise InputError(
                    f"{self.name} has the encoding {encoding} on server version {raw.info.server_version}; "
                    f"the records need UTF8 and {OLDEST_SERVER} or newer",
                    hint="create the database with ENCODING 'UTF8' on a supported PostgreSQL",
                )
            if fsync != "on" and not self._is_warned:
                self._is_warned = True
                log.warning("%s runs with fsync=off: a crash of its machine can damage or lose records", self.name)
        except BaseException:
            raw.close()
            raise
        return PostgresConnection(raw)


def connect(parameters: dict[str, Any]) -> psycopg.Connection[Any]:
    """A connection in autocommit mode (transactions are ours) whose JSON stays text.

    Raises:
        psycopg.OperationalError: As libpq says it; without a password.
    """
    raw = psycopg.connect(**{**DEFAULTS, **parameters}, autocommit=True, cursor_factory=RawCursor)
    raw.adapters.register_loader("json", TextLoader)
    raw.adapters.register_dumper(int, Int8Dumper)  # one type for all sizes: one prepared statement
    return raw


def safe_name(url: str) -> str:
    """The URL without its password and options, for people to read.

    Example:
        >>> safe_name("postgres://ann:s3cret@db.example:5433/records?sslmode=require&password=x")
        'postgresql://ann@db.example:5433/records'
    """
    given = _parsed(url)
    user = f"{given['user']}@" if given.get("user") else ""
    hosts = str(given.get("host") or given.get("hostaddr") or "").split(",")
    ports = str(given.get("port") or "").split(",")
    if len(ports) < len(hosts):
        ports = ports[:1] * len(hosts)
    places = ",".join(host + (f":{port}" if port else "") for host, port in zip(hosts, ports, strict=False))
    return f"postgresql://{user}{places}/{given.get('dbname', '')}"


def _parsed(url: str) -> dict[str, Any]:
    if not url.startswith(("postgresql://", "postgres://")):
        raise InputError("the URL of the records must begin with postgresql://")
    with suppress(psycopg.Error):  # libpq's words may repeat the URL, and with it the password
        return conninfo.conninfo_to_dict(url)
    raise InputError(
        "the URL of the records is not one that libpq can read (it is not shown: it may hold a password)",
        hint="write postgresql://user@host:5432/database, with special characters percent-encoded",
    )


def _revision(connection: Connection) -> str | None:
    """The stamped revision, None of an empty schema.

    Raises:
        SchemaVersionError: Another program's tables are in the way.
    """
    rows = connection.execute(
        "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema() ORDER BY table_name"
    ).fetchall()
    tables = [name for (name,) in rows]
    if "alembic_version" in tables:
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else row[0]
    if tables:
        raise SchemaVersionError(
            f"the database is not one of Millrace: it has the tables {', '.join(tables[:10])}",
            hint="create a database of its own for Millrace (`createdb millrace`) and name it in the URL",
        )
    return None
