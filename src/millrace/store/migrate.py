"""Bring a schema up, or down, with Alembic. Called under the home's exclusive lock; on Postgres takes one.

A target is the path of a SQLite file, or the URL of a Postgres database.

Imports SQLAlchemy and Alembic (0.4 s), so it is loaded only when a schema is not at its head.
"""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from millrace.core.errors import SchemaVersionError
from millrace.store import layout
from millrace.store.database import WRITER_LOCK
from millrace.store.schema import METADATA

Target = Path | str


def _scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
    return ScriptDirectory.from_config(config)


def newest_revision() -> str | None:
    """The head of the shipped migrations.

    Example:
        >>> newest_revision() == layout.HEAD
        True
    """
    return _scripts().get_current_head()


def create(target: Target) -> None:
    """Create all tables at the newest revision, in one transaction; does nothing where somebody just did.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     create(Path(folder) / "records.db")
        ...     current(Path(folder) / "records.db")
        '0005'
    """

    def work(connection: Connection) -> None:
        context = MigrationContext.configure(connection)
        if context.get_current_revision() is None:
            METADATA.create_all(connection)
            context.stamp(_scripts(), layout.HEAD)

    _in_transaction(target, work)


def upgrade(target: Target, revision: str = "head") -> None:
    """Migrate up; before that, a copy of a file is kept beside it as `<name>.before-<revision>`.

    Raises:
        SchemaVersionError: The schema's revision is not among the shipped migrations.
    """
    found, scripts = current(target), _scripts()
    known = {script.revision for script in scripts.walk_revisions()}
    if found is not None and found not in known:
        raise newer_schema(target, found)
    if found is not None and isinstance(target, Path):
        _copy(target, target.with_name(f"{target.name}.before-{layout.HEAD}"))
    _migrate(target, scripts, lambda revisions, _: scripts._upgrade_revs(revision, revisions))


def downgrade(target: Target, revision: str = "base") -> None:
    """Migrate down to a revision; `base` drops everything."""
    scripts = _scripts()
    _migrate(target, scripts, lambda revisions, _: scripts._downgrade_revs(revision, revisions))


def current(target: Target) -> str | None:
    """The revision that a schema is stamped with, or None."""
    with _connected(target) as connection:
        return MigrationContext.configure(connection).get_current_revision()


def engine(target: Target) -> Engine:
    """Connections for SQLAlchemy, each closed after use, in autocommit mode; a password stays in the driver."""
    if isinstance(target, Path):
        return create_engine(f"sqlite:///{target}", poolclass=NullPool, isolation_level="AUTOCOMMIT")
    return create_engine(
        "postgresql+psycopg://",
        # by name: a SQLite home needs no psycopg
        creator=lambda: importlib.import_module("psycopg").connect(target),
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
    )


def newer_schema(target: Target, found: str) -> SchemaVersionError:
    """The refusal of a home whose schema this version does not know."""
    name = target if isinstance(target, Path) else "the database"
    return SchemaVersionError(
        f"{name} has schema {found!r}, which this Millrace does not know (its newest is {layout.HEAD!r})",
        details={"found": found, "known": layout.HEAD},
    )


def _migrate(target: Target, scripts: ScriptDirectory, steps: Callable[[Any, MigrationContext], Any]) -> None:
    def work(connection: Connection) -> None:
        with EnvironmentContext(Config(), scripts, fn=steps) as environment:
            environment.configure(connection=connection, target_metadata=METADATA, render_as_batch=True)
            environment.run_migrations()

    _in_transaction(target, work)


def _in_transaction(target: Target, work: Callable[[Connection], None]) -> None:
    """Run schema changes so that a kill or an error leaves all of them or none; errors are the driver's.

    pysqlite commits before each DDL statement unless it is told not to begin transactions itself.
    """
    opening = ("PRAGMA synchronous=FULL", "BEGIN IMMEDIATE")
    if not isinstance(target, Path):
        opening = ("BEGIN", f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")  # one at a time, and nobody writes
    with _connected(target) as connection:  # both roll back by themselves when the connection closes
        for statement in opening:
            connection.exec_driver_sql(statement)
        work(connection)
        connection.exec_driver_sql("COMMIT")


@contextmanager
def _connected(target: Target) -> Iterator[Connection]:
    """A connection whose errors are the driver's own."""
    try:
        with engine(target).connect() as connection:
            yield connection
    except DBAPIError as error:
        raise error.orig or error from error


def _copy(source: Path, target: Path) -> None:
    with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
        old.backup(new)
    old.close()
    new.close()
