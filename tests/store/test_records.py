"""SqlRecords on both databases: the conformance suite, a dict as model; and what is SQLite's own."""

from __future__ import annotations

import importlib.util
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.clock import FakeClock
from millrace.core.errors import ConflictError, CorruptError, InputError, UnavailableError
from millrace.core.types import MetricPoint, Run, Step
from millrace.store import sqlite
from millrace.store.database import Connection
from millrace.store.records_sql import SqlRecords, open_records
from millrace.testing.postgres import STORES, open_place
from millrace.testing.records import RecordsConformance


class TestSqlRecords(RecordsConformance):
    """The suite that every implementation passes."""

    def open(self, place: Path) -> SqlRecords:
        return open_records(place / "records.db", FakeClock())


class TestPostgresRecords(RecordsConformance):
    """The same on Postgres."""

    @pytest.fixture(autouse=True)
    def places(self) -> None:
        """A database for each folder that the suite opens."""
        self.urls: dict[Path, str] = {}

    def open(self, place: Path) -> SqlRecords:
        if place not in self.urls:
            self.urls[place] = STORES["postgres"](place)
        return open_place(self.urls[place], FakeClock())


@pytest.fixture(params=STORES)
def records(tmp_path: Path, request: pytest.FixtureRequest):
    opened = open_place(STORES[request.param](tmp_path), FakeClock(50.0))
    yield opened
    opened.close()


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=4)
NAMES = st.sampled_from(["a", "b", "", "é", "5"])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "name": NAMES,
    "state": st.sampled_from(["pending", "running", "failed"]),
    "spec_path": TEXT,
    "project": NAMES,
    "created_at": st.sampled_from([1.0, 2.0, 3.5]),
    "started_at": st.none() | st.sampled_from([1.0, 2.0]),
    "tags": st.dictionaries(NAMES, NAMES, max_size=1),
}
PUT = st.tuples(st.just("put"), st.sampled_from("xyz"), st.none() | st.integers(0, 3), st.fixed_dictionaries(FIELDS))
DELETE = st.tuples(st.just("delete"), st.sampled_from("xyz"))
FIND = st.tuples(
    st.just("find"),
    st.fixed_dictionaries({}, optional={k: v | st.lists(v, max_size=3) for k, v in FIELDS.items()}),
    st.sampled_from([*FIELDS, "id", "version"]).flatmap(lambda name: st.sampled_from([name, "-" + name])),
    st.none() | st.integers(0, 3),
    st.integers(0, 2),
)


def model_put(model: dict[str, Run], run: Run, expected: int | None) -> Run | None:
    """What put must do to a dict; None is a conflict."""
    stored = model[run.id].version if run.id in model else 0
    if expected is not None and expected != stored:
        return None
    model[run.id] = msgspec.structs.replace(run, version=stored + 1)
    return model[run.id]


def model_find(model: dict[str, Run], where: dict[str, Any], order: str, limit: int | None, offset: int) -> list[Run]:
    """What find must give, by plain Python."""

    def fits(run: Run) -> bool:
        return all(
            getattr(run, name) in want if isinstance(want, list) else getattr(run, name) == want
            for name, want in where.items()
        )

    def key(run: Run) -> tuple[Any, ...]:
        value = getattr(run, order.removeprefix("-"))
        if isinstance(value, dict):
            value = msgspec.json.encode(value, order="deterministic")
        return (value is not None, value if value is not None else 0, run.id)

    kept = sorted((run for run in model.values() if fits(run)), key=key, reverse=order.startswith("-"))
    return kept[offset:] if limit is None else kept[offset : offset + limit]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=st.lists(PUT | PUT | DELETE | FIND, max_size=15))
def test_records_behave_like_a_dict(records: SqlRecords, actions: list[tuple[Any, ...]]) -> None:
    with records.transaction() as transaction:
        for id in "xyz":
            transaction.delete(Run, id)
    model: dict[str, Run] = {}
    for action in actions:
        if action[0] == "put":
            run = Run(id=action[1], **action[3])
            wanted = model_put(model, run, action[2])
            if wanted is None:
                with pytest.raises(ConflictError):
                    records.put(run, action[2])
            else:
                assert records.put(run, action[2]) == wanted
        elif action[0] == "delete":
            with records.transaction() as transaction:
                assert transaction.delete(Run, action[1]) == (model.pop(action[1], None) is not None)
        else:
            _, where, order, limit, offset = action
            assert records.find(Run, where, order, limit, offset) == model_find(model, where, order, limit, offset)
    for id in "xyz":
        assert records.get(Run, id) == model.get(id)


def test_the_file_is_wal_and_fully_synchronous(tmp_path: Path) -> None:
    open_records(tmp_path / "records.db").close()
    database = sqlite.SqliteDatabase(tmp_path / "records.db")
    for connection in (database._writer, database._reader):
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    database.close()


def test_created_at_is_filled_on_insertion(records: SqlRecords) -> None:
    assert records.put(Run(id="r")).created_at == 50.0
    assert records.put(Run(id="s", created_at=7.0)).created_at == 7.0


def test_find_uses_the_index(records: SqlRecords) -> None:
    def plan(connection: Connection) -> str:
        explain = "EXPLAIN QUERY PLAN" if connection.dialect == "sqlite" else "EXPLAIN"
        return str(connection.execute(f"{explain} SELECT body FROM steps WHERE cache_key = 'x'").fetchall())

    assert "ix_steps_cache_key" in records.read(plan)


def test_a_transaction_inside_a_transaction_says_so(records: SqlRecords) -> None:
    with records.transaction() as transaction:
        with pytest.raises(RuntimeError, match="inside a transaction"):
            records.put(Run(id="r"))
        records.append_metrics([MetricPoint("r", "loss", 0, 1.0, 0.0)])
        assert records.metrics("r") == []  # goes with the open transaction
    assert len(records.metrics("r")) == 1
    with pytest.raises(RuntimeError, match="has ended"):
        transaction.get(Run, "r")


def test_after_close_calls_say_so(records: SqlRecords) -> None:
    records.close()
    for call in (
        lambda: records.get(Run, "r"),
        lambda: records.put(Run(id="r")),
        lambda: records.append_metrics([]),
    ):
        with pytest.raises(UnavailableError, match="closed"):
            call()


def test_a_damaged_body_names_the_record(records: SqlRecords) -> None:
    records.put(Step(id="s1", run_id="r", name="n", stage="n"))
    with records.writing() as connection:
        connection.execute("UPDATE steps SET body = '{\"id\": 5}'")
    with pytest.raises(CorruptError, match="'s1' in table steps"):
        records.get(Step, "s1")


def test_unknown_fields_of_stored_records_are_ignored(records: SqlRecords) -> None:
    run = records.put(Run(id="r"))
    with records.writing() as connection:
        connection.execute("UPDATE runs SET body = ?", ['{"id":"r","created_at":50.0,"version":1,"later":1}'])
    assert records.get(Run, "r") == run


@pytest.mark.parametrize("first_damaged_page", [1, 20])
def test_a_damaged_file_is_corrupt(tmp_path: Path, first_damaged_page: int) -> None:
    path = tmp_path / "records.db"
    records = open_records(path)
    for number in range(200):
        records.put(Run(id=f"{number:04}", spec_text="x" * 1000))
    records.close()
    data = bytearray(path.read_bytes())
    start = 4096 * first_damaged_page
    data[start:] = b"\xa5" * (len(data) - start)
    path.write_bytes(data)

    def read() -> None:
        damaged = open_records(path)
        try:
            damaged.find(Run)
        finally:
            damaged.close()

    with pytest.raises(CorruptError, match="damaged"):
        read()


def test_what_is_no_database_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "records.db").write_bytes(b"label,pixel\n" * 1000)
    with pytest.raises(CorruptError, match=r"records\.db is damaged"):
        open_records(tmp_path / "records.db")


def test_a_lock_that_never_ends_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "records.db"
    open_records(path).close()
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(sqlite.connect, "__defaults__", (0.01,))
    monkeypatch.setattr(sqlite.begin, "__defaults__", (0.02,))
    records = open_records(path)
    with pytest.raises(UnavailableError, match="locked by another process"):
        records.put(Run(id="r"))
    blocker.execute("COMMIT")
    blocker.close()
    assert records.put(Run(id="r")).version == 1
    records.close()


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_network_filesystems_are_refused(tmp_path: Path, kind: str) -> None:
    mounts = f"/dev/a / ext4 rw 0 0\nhost:/x {tmp_path} {kind} rw 0 0\n"
    with pytest.raises(InputError, match=kind):
        sqlite.refuse_network_filesystem(tmp_path / "home", mounts)
    sqlite.refuse_network_filesystem(tmp_path.parent, mounts)


def test_opening_a_current_home_imports_no_sqlalchemy(tmp_path: Path) -> None:
    open_records(tmp_path / "records.db").close()
    code = (
        "import sys; from pathlib import Path; from millrace.store.records_sql import open_records; "
        f"open_records(Path({str(tmp_path / 'records.db')!r})).close(); "
        "sys.exit('sqlalchemy' in sys.modules or 'alembic' in sys.modules)"
    )
    assert importlib.util.find_spec("sqlalchemy") is not None
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
