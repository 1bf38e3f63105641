"""What the records ask of a database: so little that SQLite and Postgres both are it.

Statements are written once, with `?` for a parameter. What the two cannot both say (a function of JSON, a
`VACUUM`) is chosen by `Connection.dialect`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Protocol, TypeVar

T = TypeVar("T")
Dialect = Literal["sqlite", "postgres"]
MAX_INT64 = 2**63 - 1
WRITER_LOCK = 0x6D696C6C72616365  # "millrace"; Postgres' advisory locks are per database


class Cursor(Protocol):
    """The answer to one statement."""

    @property
    def rowcount(self) -> int:
        """How many rows were changed."""
        ...

    def fetchone(self) -> Any:
        """The next row as a tuple, or None."""
        ...

    def fetchall(self) -> list[Any]:
        """All further rows, as tuples."""
        ...


class Connection(Protocol):
    """One connection, used by one thread at a time."""

    dialect: ClassVar[Dialect]  # which SQL it speaks

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Cursor:
        """Run a statement, `?` for each parameter; text, int, float, bytes and None."""
        ...

    def executemany(self, sql: str, rows: Iterable[Sequence[Any]], /) -> object:
        """Run an `INSERT … VALUES (?, …)` or an `UPDATE` once for each row."""
        ...

    def insert_rows(self, table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Insert many new rows, by the quickest way that the database has."""
        ...


class Database(Protocol):
    """Where the connections come from. `read` is thread-safe; the rest is called by one thread at a time."""

    @property
    def name(self) -> str:
        """How messages call it; never with a password."""
        ...

    def translated(self) -> AbstractContextManager[None]:
        """The driver's errors as ours inside the block."""
        ...

    def read(self, question: Callable[[Connection], T]) -> T:
        """Ask a question that changes nothing; it may be asked twice."""
        ...

    def begin(self) -> Connection:
        """Begin the one write transaction of the whole database: others wait, in other processes too."""
        ...

    def commit(self) -> None:
        """Make it durable."""
        ...

    def rollback(self) -> None:
        """Undo it; does nothing when none is open."""
        ...

    def before_erasing(self, connection: Connection) -> None:
        """Inside a transaction whose deletions must not leave bytes behind."""
        ...

    def after_erasing(self) -> None:
        """After it."""
        ...

    def close(self) -> None:
        """Let go of every connection."""
        ...


def within_int64(number: int | None) -> int:
    """A `LIMIT` or `OFFSET` that both databases take: none or a negative one is the largest number.

    Example:
        >>> within_int64(5), within_int64(None) == within_int64(-1) == within_int64(2**70) == 2**63 - 1
        (5, True)
    """
    return MAX_INT64 if number is None or not 0 <= number <= MAX_INT64 else number
