"""Bring a home's schema up, or down, with Alembic. Called under the home's exclusive lock.

Imports SQLAlchemy and Alembic (0.4 s), so `records_sql` loads it only when a schema is not at its head.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from millrace.core.errors import SchemaVersionError
from millrace.store import layout
from millrace.store.schema import METADATA


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


def create(path: Path) -> None:
    """Create all tables in a new file at the newest revision, in one transaction.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     create(Path(folder) / "records.db")
        ...     current(Path(folder) / "records.db")
        '0001'
    """

    def work(connection: Connection) -> None:
        METADATA.create_all(connection)
        MigrationContext.configure(connection).stamp(_scripts(), layout.HEAD)

    _in_transaction(path, work)


def upgrade(path: Path, revision: str = "head") -> None:
    """Migrate up; before that, a copy is kept beside the file as `<name>.before-<revision>`.

    Raises:
        SchemaVersionError: The file's revision is not among the shipped migrations.
    """
    found, scripts = current(path), _scripts()
    known = {script.revision for script in scripts.walk_revisions()}
    if found is not None and found not in known:
        raise newer_schema(path, found)
    if found is not None:
        _copy(path, path.with_name(f"{path.name}.before-{layout.HEAD}"))
    _migrate(path, scripts, lambda revisions, _: scripts._upgrade_revs(revision, revisions))


def downgrade(path: Path, revision: str = "base") -> None:
    """Migrate down to a revision; `base` drops everything."""
    scripts = _scripts()
    _migrate(path, scripts, lambda revisions, _: scripts._downgrade_revs(revision, revisions))


def current(path: Path) -> str | None:
    """The revision that the file is stamped with, or None."""
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    with engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def newer_schema(path: Path, found: str) -> SchemaVersionError:
    """The refusal of a home whose schema this version does not know."""
    return SchemaVersionError(
        f"{path} has schema {found!r}, which this Millrace does not know (its newest is {layout.HEAD!r})",
        details={"found": found, "known": layout.HEAD},
    )


def _migrate(path: Path, scripts: ScriptDirectory, steps: Callable[[Any, MigrationContext], Any]) -> None:
    def work(connection: Connection) -> None:
        with EnvironmentContext(Config(), scripts, fn=steps) as environment:
            environment.configure(connection=connection, target_metadata=METADATA, render_as_batch=True)
            environment.run_migrations()

    _in_transaction(path, work)


def _in_transaction(path: Path, work: Callable[[Connection], None]) -> None:
    """Run schema changes so that a kill or an error leaves all of them or none; errors are sqlite3's.

    pysqlite commits before each DDL statement unless it is told not to begin transactions itself.
    """
    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA synchronous=FULL")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            work(connection)
            connection.exec_driver_sql("COMMIT")
        except DBAPIError as error:  # SQLite rolls back by itself when the connection closes
            raise error.orig or error from error


def _copy(source: Path, target: Path) -> None:
    with sqlite3.connect(source) as old, sqlite3.connect(target) as new:
        old.backup(new)
    old.close()
    new.close()
