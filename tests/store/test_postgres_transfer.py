"""Copies of records between databases: everything, verified, or nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from sqlalchemy import Table
from sqlalchemy.dialects.sqlite import dialect as sqlite

from millrace.core.errors import CorruptError, InputError
from millrace.core.types import RECORD_TYPES, Event, Lease, MetricPoint, Record, Run
from millrace.security.chain import verify
from millrace.store import transfer
from millrace.store.records_sql import SqlRecords
from millrace.store.schema import METADATA
from millrace.store.transfer import copy_records, records_digest
from millrace.testing.postgres import STORES, open_place

WAYS = [("sqlite", "postgres"), ("postgres", "sqlite"), ("postgres", "postgres"), ("sqlite", "sqlite")]


@pytest.fixture(params=WAYS, ids="-".join)
def sides(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[SqlRecords, SqlRecords]]:
    """Filled records, and empty ones to copy into."""
    source, target = (open_place(STORES[kind](tmp_path / str(number))) for number, kind in enumerate(request.param))
    fill(source)
    yield source, target
    source.close()
    target.close()


def fill(records: SqlRecords) -> None:
    """Some of everything: more runs than a batch, every kind, events (sealed, erased, unsealed), points."""
    with records.transaction() as transaction:
        for number in range(transfer.BATCH_ROWS + 3):
            transaction.put(
                Run(id=f"é{number}", name="a\U0001f600", facts={"b": 1, "a": "\x00"}, created_at=0.1 + number)
            )
        for kind in RECORD_TYPES.values():
            transaction.put(any_record(kind))
        for number in range(7):
            transaction.append(
                Event(at=number / 3, actor="u1", verb="v", subject="run:1", detail={"n": number, "z": "é"})
            )
    records.seal(fence=3)
    id = records.events()[2].id
    assert id is not None
    records.erase_detail(id)
    with records.transaction() as transaction:
        transaction.append(Event(at=9.0, actor="u1", verb="unsealed", subject="run:1"))
    values = (math.nan, math.inf, -math.inf, 5e-324, -0.0, 0.1, 1e308)
    records.append_metrics([MetricPoint("r", "loss", n - 2**62, value, 100.0 + n) for n, value in enumerate(values)])
    records.flush()
    for table in METADATA.sorted_tables:
        fill_table(records, table)


def fill_table(records: SqlRecords, table: Table) -> None:
    """A row in a table that `fill` has not reached: the schema may have grown."""
    values = {"TEXT": "é", "INTEGER": 2**60, "FLOAT": 0.1, "JSON": "{}", "BLOB": b"\x00", "BOOLEAN": True}
    with records.writing() as connection:
        if connection.execute(f"SELECT 1 FROM {table.name} LIMIT 1").fetchone() is None:
            row = [values[column.type.compile(dialect=sqlite())] for column in table.columns]
            connection.insert_rows(table.name, [column.name for column in table.columns], [row])


def any_record(kind: type[Record]) -> Record:
    """A record with something in each field that it must have."""
    wanted = {}
    for field in msgspec.structs.fields(kind):
        if field.required:
            text = str(field.type)
            wanted[field.name] = (
                ["x"] if "tuple" in text else [{"x": 1}] if "list" in text else {"x": 1} if "dict" in text
                else 7 if "int" in text else 0.5 if "float" in text else {"digest": "d", "size_bytes": 1} if "Artifact" in text
                else msgspec.inspect.type_info(field.type).values[0] if "Literal" in text else "x"
            )  # fmt: skip
    return msgspec.convert(wanted, kind)


def test_everything_arrives(sides: tuple[SqlRecords, SqlRecords]) -> None:
    source, target = sides
    seen: list[tuple[str, int]] = []
    before = records_digest(source)
    copied = copy_records(source, target, lambda table, rows: seen.append((table, rows)))
    assert copied.digest == before == records_digest(source) == records_digest(target)
    assert set(copied.rows) == {table.name for table in METADATA.sorted_tables}  # `fill` leaves no table out
    assert copied.rows["runs"] == transfer.BATCH_ROWS + 4
    assert [rows for table, rows in seen if table == "runs"] == [transfer.BATCH_ROWS, transfer.BATCH_ROWS + 4]
    for kind in RECORD_TYPES.values():
        assert target.find(kind) == source.find(kind)
    assert target.events() == source.events()
    assert target.links() == source.links()
    assert target.metrics("r") == source.metrics("r") or repr(target.metrics("r")) == repr(source.metrics("r"))


def test_the_copy_goes_on_where_the_source_stood(sides: tuple[SqlRecords, SqlRecords]) -> None:
    source, target = sides
    copy_records(source, target)
    with target.transaction() as transaction:
        transaction.append(Event(at=10.0, actor="u2", verb="v", subject="run:1"))
    target.append_metrics([MetricPoint("r", "loss", 99, 1.0, 0.0)])
    assert target.seal(fence=3) == 2
    assert [event.seq for event in target.events()] == list(range(1, 10))
    assert verify(target.links(), head=target.head()).broken is None
    assert target.metrics("r")[-1].step == 99
    lease = target.get(Lease, "x")
    assert lease is not None
    assert target.put(lease, lease.version).version == 2


def test_any_difference_changes_the_digest(sides: tuple[SqlRecords, SqlRecords]) -> None:
    source, _ = sides
    digests = {records_digest(source)}
    for statement in (
        "UPDATE metrics SET step = 1 WHERE at = 100.0",
        "UPDATE event_details SET detail = '{}' WHERE event_id = 1",
        "UPDATE runs SET body = '{}' WHERE id = 'é1'",
        "DELETE FROM meta WHERE key = 'chain_head'",
    ):
        with source.writing() as connection:
            assert connection.execute(statement).rowcount == 1
        digests.add(records_digest(source))
    assert len(digests) == 5


def test_a_target_with_rows_is_refused(sides: tuple[SqlRecords, SqlRecords]) -> None:
    source, target = sides
    target.put(Lease(id="one"))
    before = records_digest(target)
    with pytest.raises(InputError, match="not empty: it has rows in the table leases"):
        copy_records(source, target)
    with pytest.raises(InputError, match="into themselves"):
        copy_records(source, source)
    assert records_digest(target) == before


def test_a_failed_copy_leaves_the_target_empty(
    sides: tuple[SqlRecords, SqlRecords], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = sides
    empty = records_digest(target)

    def fail(table: str, _: int) -> None:
        if table == "metrics":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        copy_records(source, target, fail)
    assert records_digest(target) == empty
    true_batches = transfer.batches

    def forgetful(connection: object):
        """The second walk, over the target, misses a row: as if the disk had."""
        for table, rows in true_batches(connection):  # type: ignore[arg-type]
            yield table, rows[1:] if table.name == "metrics" and calls else rows
        calls.append(1)

    calls: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "batches", forgetful)
        with pytest.raises(CorruptError, match="nothing was kept"):
            copy_records(source, target)
    assert records_digest(target) == empty
    assert copy_records(source, target).digest == records_digest(source)
