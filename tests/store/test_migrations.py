"""Migrations lead to exactly the schema, and back; other files are refused or left alone."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Text
from sqlalchemy.dialects.postgresql import dialect as postgresql

from millrace.core.errors import SchemaVersionError
from millrace.core.types import RECORD_TYPES, Run
from millrace.store import layout, migrate, postgres
from millrace.store.records_sql import open_records
from millrace.store.schema import METADATA, RECORD_TABLES
from millrace.testing.postgres import STORES, new_records_url, shared_server

OLD_RUN = (
    "INSERT INTO runs (id, project, created_at, version, name, state, spec_path, body)"
    """ VALUES ('r', 'default', 0.0, 1, 'old', 'pending', '', '{"id":"r","version":1,"name":"old"}')"""
)


def definitions(target: Path | str) -> dict[str, str]:
    """Every table and index with its SQL, white space aside."""
    return _definitions(target) if isinstance(target, Path) else _postgres_definitions(target)


def _postgres_definitions(url: str) -> dict[str, str]:
    """Columns (in Postgres a migration cannot choose their order), indexes and constraints."""
    with psycopg.connect(url) as connection:
        rows = connection.execute(
            "SELECT table_name || '.' || column_name, concat_ws(' ', data_type, collation_name, is_nullable, column_default)"
            " FROM information_schema.columns WHERE table_schema = 'public' AND table_name != 'alembic_version'"
            " UNION ALL SELECT indexname, indexdef FROM pg_indexes"
            " WHERE schemaname = 'public' AND tablename != 'alembic_version'"
            " UNION ALL SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint"
            " WHERE connamespace = 'public'::regnamespace AND conname NOT LIKE 'alembic%'"
        ).fetchall()
    return dict(rows)


def _definitions(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {name: re.sub(r"\s+", " ", sql.replace('"', "")) for name, sql in rows if name != "alembic_version"}


def test_the_constant_names_the_newest_migration() -> None:
    assert migrate.newest_revision() == layout.HEAD


@pytest.mark.parametrize("store", STORES)
def test_migrating_up_gives_the_schema_and_down_takes_it_away(tmp_path: Path, store: str) -> None:
    created: Path | str = tmp_path / "created.db"
    migrated: Path | str = tmp_path / "migrated.db"
    if store == "postgres":
        created, migrated = shared_server().create_database(), shared_server().create_database()
    migrate.create(created)
    migrate.upgrade(migrated)
    assert definitions(migrated) == definitions(created)
    assert len(definitions(created)) > 20
    with migrate.engine(migrated).connect() as connection:
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


def test_columns_mean_the_same_on_both_databases() -> None:
    """Types are those of `store.columns`: text by code point, whole numbers of 64 bits, JSON as text."""
    for table in METADATA.sorted_tables:
        assert table.primary_key.columns  # `store.transfer` walks along it
        for column in table.columns:
            name = column.type.compile(dialect=postgresql())
            assert name in ('TEXT COLLATE "C"', "BIGINT", "FLOAT", "JSON", "BYTEA", "BOOLEAN"), (
                f"{table.name}.{column.name}"
            )
            assert isinstance(column.type, Text) == name.startswith("TEXT")


def test_a_home_that_was_migrated_works(tmp_path: Path) -> None:
    migrate.upgrade(tmp_path / "records.db")
    records = open_records(tmp_path / "records.db")
    assert records.put(Run(id="r")).version == 1
    records.close()


def test_an_older_schema_is_migrated_and_a_copy_kept(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    migrate.upgrade(path, "0001")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(OLD_RUN)
    records = open_records(path)
    assert records.get(Run, "r") == Run(id="r", version=1, name="old")
    records.close()
    with closing(sqlite3.connect(tmp_path / f"records.db.before-{layout.HEAD}")) as copy:
        assert copy.execute("SELECT id FROM runs").fetchall() == [("r",)]


def test_an_older_schema_on_postgres_is_migrated() -> None:
    url = shared_server().create_database()
    migrate.upgrade(url, "0001")
    with psycopg.connect(url) as connection:
        connection.execute(OLD_RUN)
    records = postgres.open_records(url)
    assert records.get(Run, "r") == Run(id="r", version=1, name="old")
    records.close()
    assert migrate.current(url) == layout.HEAD


def test_a_newer_schema_on_postgres_is_refused_with_advice() -> None:
    url = new_records_url()
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(SchemaVersionError, match="'9999'") as caught:
        postgres.open_records(url)
    assert "install" in caught.value.hint
    assert migrate.current(url) == "9999"


def test_another_programs_postgres_database_is_refused() -> None:
    url = shared_server().create_database()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE customers (id int)")
    with pytest.raises(SchemaVersionError, match="customers"):
        postgres.open_records(url)
    assert migrate.current(url) is None


def test_a_failed_migration_changes_nothing_on_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    url = shared_server().create_database()

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("millrace.store.migrate.MigrationContext.stamp", fail)
        with pytest.raises(ZeroDivisionError):
            postgres.open_records(url)
    assert definitions(url) == {}
    postgres.open_records(url).close()


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
