"""Migrations lead to exactly the schema, and back; other files are refused or left alone."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from millrace.core.errors import SchemaVersionError
from millrace.core.types import RECORD_TYPES, Run
from millrace.store import layout, migrate
from millrace.store.records_sql import open_records
from millrace.store.schema import METADATA, RECORD_TABLES


def definitions(path: Path) -> dict[str, str]:
    """Every table and index with its SQL, white space aside."""
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: re.sub(r"\s+", " ", sql) for name, sql in rows if name != "alembic_version"}


def test_the_constant_names_the_newest_migration() -> None:
    assert migrate.newest_revision() == layout.HEAD


def test_migrating_up_gives_the_schema_and_down_takes_it_away(tmp_path: Path) -> None:
    created, migrated = tmp_path / "created.db", tmp_path / "migrated.db"
    migrate.create(created)
    migrate.upgrade(migrated)
    assert definitions(migrated) == definitions(created)
    assert len(definitions(created)) > 20
    engine = create_engine(f"sqlite:///{migrated}", poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, METADATA) == []
    migrate.downgrade(migrated)
    assert set(definitions(migrated)) - {"sqlite_sequence"} == set()
    assert migrate.current(migrated) is None


def test_every_column_mirrors_a_field() -> None:
    for kind, table in RECORD_TABLES.items():
        names = {column.name for column in table.columns} - {"body"}
        assert names <= set(RECORD_TYPES[kind].__struct_fields__)
    assert set(RECORD_TABLES) == set(RECORD_TYPES)


def test_a_home_that_was_migrated_works(tmp_path: Path) -> None:
    migrate.upgrade(tmp_path / "records.db")
    records = open_records(tmp_path / "records.db")
    assert records.put(Run(id="r")).version == 1
    records.close()


def test_an_older_schema_is_migrated_and_a_copy_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision that is known and not the head: stands in for what the next release will meet."""
    path = tmp_path / "records.db"
    records = open_records(path)
    records.put(Run(id="r"))
    records.close()
    monkeypatch.setattr("millrace.store.records_sql.HEAD", "0002")
    monkeypatch.setattr(layout, "HEAD", "0002")
    records = open_records(path)
    assert records.get(Run, "r") is not None
    records.close()
    with closing(sqlite3.connect(tmp_path / "records.db.before-0002")) as copy:
        assert copy.execute("SELECT id FROM runs").fetchall() == [("r",)]


def test_a_newer_schema_is_refused_with_advice(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    open_records(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = path.read_bytes()
    with pytest.raises(SchemaVersionError, match="'9999'") as caught:
        open_records(path)
    assert "install" in caught.value.hint
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir() if "before" in one.name) == []


def test_another_programs_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE customers (id)")
    with pytest.raises(SchemaVersionError, match="customers"):
        open_records(path)


def test_an_empty_file_becomes_a_home(tmp_path: Path) -> None:
    """What a creation that was killed in an older version, or a `touch`, leaves."""
    (tmp_path / "records.db").touch()
    (tmp_path / "records.db.new").write_bytes(b"half")
    records = open_records(tmp_path / "records.db")
    assert records.find(Run) == []
    records.close()
    assert not (tmp_path / "records.db.new").exists()


def test_a_failed_migration_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.db"

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("millrace.store.migrate.MigrationContext.stamp", fail)
    with pytest.raises(ZeroDivisionError):
        migrate.create(path)
    assert definitions(path) == {}
