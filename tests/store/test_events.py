"""Sealing: no gaps, no duplicates, a chain that an independent verifier accepts."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from millrace.core.errors import InputError
from millrace.core.types import Event
from millrace.security.chain import verify
from millrace.store import sealing
from millrace.store.records_sql import SqlRecords
from millrace.testing.postgres import STORES, open_place


@pytest.fixture(params=STORES)
def place(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return STORES[request.param](tmp_path)


@pytest.fixture
def records(place: str):
    opened = open_place(place)
    yield opened
    opened.close()


def append(records: SqlRecords, count: int, **fields: object) -> None:
    """Append events in one transaction."""
    with records.transaction() as transaction:
        for number in range(count):
            values = {"at": number, "actor": "u1", "verb": "run.started", "subject": "run:1", "detail": {"n": number}}
            transaction.append(Event(**(values | fields)))  # type: ignore[arg-type]


def change(records: SqlRecords, statement: str) -> None:
    """Tamper."""
    with records.writing() as connection:
        assert connection.execute(statement).rowcount > 0


def test_the_verifier_accepts_what_the_sealer_made(records: SqlRecords) -> None:
    append(records, 5)
    records.seal()
    append(records, 5, detail={"text": "é\x00😀", "nested": [1.5, None, {"b": 1, "a": 2}]})
    records.seal()
    checked = verify(records.links(), head=records.head())
    assert (checked.seq, checked.broken, checked.erased) == (10, None, 0)
    assert checked.chain == records.events()[-1].chain


def test_a_check_can_go_on_where_it_stopped(records: SqlRecords) -> None:
    append(records, 7)
    records.seal()
    first = verify(records.links(limit=3))
    rest = verify(records.links(since=first.seq), since=(first.seq, first.chain), head=records.head())
    assert (rest.seq, rest.broken) == (7, None)


def test_an_erased_detail_leaves_a_chain_that_verifies(records: SqlRecords, tmp_path: Path) -> None:
    append(records, 1, detail={"email": "somebody@example.org"})
    append(records, 2)
    records.seal()
    on_sqlite = (tmp_path / "records.db").exists()
    assert not on_sqlite or any(b"somebody@example.org" in one.read_bytes() for one in tmp_path.iterdir())
    id = records.events()[0].id
    assert id is not None
    assert records.erase_detail(id)
    assert not records.erase_detail(id)
    checked = verify(records.links(), head=records.head())
    assert (checked.seq, checked.broken, checked.erased) == (3, None, 1)
    assert records.events()[0].detail == {}
    assert not any(b"somebody@example.org" in one.read_bytes() for one in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("statement", "seq", "problem"),
    [
        ("UPDATE events SET actor = 'somebody' WHERE seq = 3", 3, "altered"),
        ("UPDATE events SET at = at + 1 WHERE seq = 1", 1, "altered"),
        (f"UPDATE events SET chain = '{'0' * 64}' WHERE seq = 5", 5, "altered"),
        ("UPDATE event_details SET detail = '{\"n\":9}' WHERE event_id = 2", 2, "detail"),
        ("DELETE FROM events WHERE seq = 4", 4, "missing"),
        ("DELETE FROM events WHERE seq = 1", 1, "missing"),
        ("DELETE FROM events WHERE seq > 4", 4, "cut"),
    ],
)
def test_tampering_is_found_where_it_was_done(records: SqlRecords, statement: str, seq: int, problem: str) -> None:
    append(records, 6)
    records.seal()
    change(records, statement)
    broken = verify(records.links(), head=records.head()).broken
    assert broken is not None
    assert (broken.seq, broken.problem) == (seq, problem)


def test_a_cut_tail_is_still_found_after_more_events(records: SqlRecords) -> None:
    append(records, 4)
    records.seal()
    change(records, "DELETE FROM events WHERE seq = 4")
    append(records, 1)
    records.seal()
    broken = verify(records.links(), head=records.head()).broken
    assert broken is not None
    assert (broken.seq, broken.problem) == (4, "missing")


def test_concurrent_sealers_and_writers_leave_no_gap(place: str) -> None:
    open_place(place).close()
    sealed: list[int] = []

    def work(number: int) -> None:
        records = open_place(place)
        for _ in range(10):
            append(records, 2, subject=f"run:{number}")
            sealed.append(records.seal())
        records.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = open_place(place)
    assert records.seal() == 0
    assert sum(sealed) == 80
    found = records.events()
    assert [event.seq for event in found] == list(range(1, 81))
    assert {len([e for e in found if e.subject == f"run:{number}"]) for number in range(4)} == {20}
    assert verify(records.links(), head=records.head()).broken is None
    records.close()


def test_many_events_are_sealed_in_batches(records: SqlRecords, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "SEAL_BATCH", 3)
    append(records, 10)
    assert records.seal() == 10
    assert verify(records.links(), head=records.head()).seq == 10


def test_a_detail_that_is_no_json_is_refused(records: SqlRecords) -> None:
    with pytest.raises(InputError, match=r"run\.started"):
        append(records, 1, detail={"x": object()})
    assert records.seal() == 0
