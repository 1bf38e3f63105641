"""What backups are made of: places that keep objects whole, and records cut into pieces and put back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.core.errors import CorruptError, InputError, NotFoundError
from millrace.core.types import Event, MetricPoint, Run
from millrace.store import backup_filling, backup_marker, backup_rows, backup_versions
from millrace.store.backup_objects import ObjectPlace
from millrace.store.backup_place import FolderPlace, Place, Stored, open_place
from millrace.store.backup_rows import POINTS, Points, named_rows_of, pieces, rows_of, snapshot
from millrace.store.backup_versions import Stretch
from millrace.store.object_store import RemoteOptions
from millrace.store.records_sql import SqlRecords
from millrace.store.transfer import records_digest
from millrace.testing.postgres import STORES  # fmt: skip
from millrace.testing.postgres import open_place as open_records_at

pytestmark = pytest.mark.xdist_group("postgres")


# --------------------------------------------------------------------------- places


@pytest.fixture(params=["folder", "objects"])
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    if request.param == "folder":
        made: Place = FolderPlace(tmp_path / "to")
    else:
        made = ObjectPlace("memory:///", RemoteOptions(part_bytes=5 << 20))
    yield made
    made.close()


def read(place: Place, name: str) -> bytes:
    with place.open(name) as file:
        return file.read()


def test_objects_come_back_and_are_replaced_and_removed(place: Place) -> None:
    large = [os.urandom(1_000_003) for _ in range(13)]  # more than one part of an upload
    assert place.put("blobs/ab/cd", large) == 13 * 1_000_003
    assert read(place, "blobs/ab/cd") == b"".join(large)
    assert place.put("blobs/ab/cd", [b"new"]) == 3
    assert place.put("blobs/00/empty", []) == 0
    assert read(place, "blobs/00/empty") == b""
    place.put("manifests/ab", [b"m"])
    assert sorted(place.list("blobs")) == [Stored("blobs/00/empty", 0), Stored("blobs/ab/cd", 3)]
    place.remove("blobs/ab/cd")
    place.remove("blobs/ab/cd")
    assert [one.name for one in place.list("blobs")] == ["blobs/00/empty"]
    with pytest.raises(NotFoundError):
        read(place, "blobs/ab/cd")


def test_an_object_is_whole_or_not_there(place: Place) -> None:
    def broken(size: int) -> Iterator[bytes]:
        yield b"x" * size
        raise ZeroDivisionError

    place.put("blobs/ab/kept", [b"kept"])
    for name, size in (("blobs/ab/new", 5), ("blobs/ab/kept", 5), ("blobs/ab/large", 12 << 20)):
        with pytest.raises(ZeroDivisionError):
            place.put(name, broken(size))
    assert list(place.list("blobs")) == [Stored("blobs/ab/kept", 4)]
    assert read(place, "blobs/ab/kept") == b"kept"


@pytest.mark.parametrize(
    "name", ["../x", "blobs/../x", "/etc/passwd", "blobs//x", "", ".hidden", "blobs/.x", "a\0b", "A", "blobs/%2e%2e/x"]
)
def test_names_that_lead_elsewhere_are_refused(place: Place, name: str) -> None:
    with pytest.raises(InputError, match="not the name"):
        place.put(name, [b"x"])
    with pytest.raises(InputError, match="not the name"):
        read(place, name)
    with pytest.raises(InputError, match="not the name"):
        place.remove(name)


def test_no_link_in_the_destination_is_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "cd").write_bytes(b"secret")
    place = FolderPlace(tmp_path / "to")
    place.put("blobs/aa/cd", [b"x"])
    (tmp_path / "to/blobs/aa/link").symlink_to(outside / "cd")
    (tmp_path / "to/blobs/bb").symlink_to(outside)
    (tmp_path / "to/chunks").symlink_to(outside)
    for name in ("blobs/aa/link", "blobs/bb/cd"):
        with pytest.raises(CorruptError, match="symbolic link"):
            read(place, name)
    for name in ("blobs/bb/new", "chunks/new"):
        with pytest.raises(CorruptError, match="symbolic link"):
            place.put(name, [b"x"])
    for prefix in ("blobs", "chunks"):
        with pytest.raises(CorruptError, match="symbolic link"):
            list(place.list(prefix))
    with pytest.raises(CorruptError, match="symbolic link"):
        place.remove("blobs/bb/cd")
    place.put("blobs/aa/link", [b"own"])  # replaces the link, writes through none
    assert {one.name for one in outside.iterdir()} == {"cd"}
    assert (outside / "cd").read_bytes() == b"secret"


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "to")
    place.put("blobs/aa/cd", [b"x"])
    os.mkfifo(tmp_path / "to/blobs/aa/pipe")
    with pytest.raises(CorruptError, match="not a file"):
        read(place, "blobs/aa/pipe")


def test_what_a_killed_process_left_does_not_count_and_goes(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "to")
    place.put("blobs/aa/cd", [b"x"])
    old, young = (tmp_path / f"to/blobs/aa/.writing-{name}" for name in ("old", "young"))
    old.write_bytes(b"half")
    young.write_bytes(b"half")
    os.utime(old, (1, 1))
    assert list(place.list("blobs")) == [Stored("blobs/aa/cd", 1)]
    assert (old.exists(), young.exists()) == (False, True)


def test_a_place_is_an_absolute_folder_or_a_url(tmp_path: Path) -> None:
    assert open_place(f"file://{tmp_path}/a%20b").url == f"{tmp_path}/a b"
    for text in ("to", "./to", "", "ftp://host/x", "s3://key:secret@bucket"):
        with pytest.raises(InputError):
            open_place(text)


def test_a_home_that_is_being_restored_says_so(tmp_path: Path) -> None:
    backup_marker.write(tmp_path, backup_marker.Restoring(source="/srv/backups", backup="ab"))
    assert backup_marker.read(tmp_path) == backup_marker.Restoring(source="/srv/backups", backup="ab")
    (tmp_path / backup_marker.NAME).write_bytes(b"{")
    assert backup_marker.read(tmp_path) == backup_marker.Restoring(source="", backup="")
    backup_marker.remove(tmp_path)
    assert backup_marker.read(tmp_path) is None


# --------------------------------------------------------------------------- cutting

ROWS = st.lists(st.text("abcdef", min_size=3, max_size=8), unique=True, max_size=120).map(sorted)


def cut_small(rows: list[list[Any]], monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Payloads, with bounds that a small example reaches."""
    monkeypatch.setattr(backup_rows, "SMALLEST_BYTES", 40)
    monkeypatch.setattr(backup_rows, "LARGEST_BYTES", 400)
    return [
        backup_rows.piece_of("t", one).payload or b"" for one in backup_rows.cut((1,), [["t", *row] for row in rows])
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(keys=ROWS, values=st.lists(st.none() | st.floats(allow_nan=False) | st.binary() | st.text(), min_size=1))
def test_pieces_hold_every_row_once_in_order(
    monkeypatch: pytest.MonkeyPatch, keys: list[str], values: list[Any]
) -> None:
    rows = [[key, values[number % len(values)]] for number, key in enumerate(keys)]
    with monkeypatch.context() as patch:
        payloads = cut_small(rows, patch)
    assert [row for payload in payloads for row in rows_of(payload, "t")] == [tuple(row) for row in rows]
    digest = backup_rows.RecordsDigest()
    whole = backup_rows.RecordsDigest()
    for payload in payloads:
        digest.add(payload)
    whole.add(b"12345" + b"".join(msgspec.msgpack.encode(["t", *row]) for row in rows))
    assert digest.text() == whole.text()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data(), change=st.sampled_from(["change", "add", "remove"]))
def test_one_changed_row_leaves_nearly_all_pieces_as_they_were(
    monkeypatch: pytest.MonkeyPatch, data: st.DataObject, change: str
) -> None:
    rows: list[list[Any]] = [[f"{number * 7919 % 10_007:05}", "v" * (number % 9)] for number in range(1500)]
    rows.sort()
    after = list(rows)
    where = data.draw(st.integers(0, len(rows) - 1))
    if change == "change":
        after[where] = [rows[where][0], data.draw(st.text(max_size=20))]
    elif change == "add":
        after.insert(where + 1, [rows[where][0] + "x", "new"])
    else:
        del after[where]
    with monkeypatch.context() as patch:
        before_pieces, after_pieces = set(cut_small(rows, patch)), set(cut_small(after, patch))
    assert len(before_pieces) > 50
    assert len(after_pieces - before_pieces) <= 12  # cuts fall in step again soon


# --------------------------------------------------------------------------- rows of real databases


def fill(records: SqlRecords, count: int = 700) -> None:
    with records.transaction() as transaction:
        for number in range(count):
            transaction.put(
                Run(id=f"é{number:05}", name="a\U0001f600", facts={"x": "y" * 300}, created_at=number + 0.1)
            )
            transaction.append(Event(at=number / 3, actor="u", verb="v", subject="run:1", detail={"n": number}))
    records.seal()
    records.append_metrics([MetricPoint("é00001", "loss", step, float("nan"), -0.0) for step in range(POINTS + 10)])
    records.flush()


@pytest.fixture(params=["sqlite", "postgres"])
def records(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SqlRecords]:
    opened = open_records_at(STORES[request.param](tmp_path / "one"))
    yield opened
    opened.close()


@pytest.mark.parametrize("other", ["sqlite", "postgres"])
def test_the_pieces_put_back_anywhere_are_the_same_records(records: SqlRecords, other: str, tmp_path: Path) -> None:
    fill(records)
    digest = backup_rows.RecordsDigest()
    with snapshot(records) as connection:
        found = list(pieces(connection))
    for piece in found:
        assert piece.payload is not None
        digest.add(piece.payload)
    assert digest.text() == records_digest(records)
    assert len([piece for piece in found if piece.table == "runs"]) > 2
    target = open_records_at(STORES[other](tmp_path / "two"))
    with target.writing() as into:
        assert backup_filling.is_empty(into)
        for piece in found:
            columns = backup_rows.columns()[piece.table]
            backup_filling.insert(into, piece.table, columns, named_rows_of(piece.payload or b"", piece.table))
        backup_filling.go_on_counting(into)
        assert not backup_filling.is_empty(into)
    assert records_digest(target) == digest.text()
    with target.transaction() as transaction:
        transaction.append(Event(at=1.0, actor="u", verb="v", subject="run:1"))
    assert target.seal() == 1  # it goes on counting
    target.close()


def test_a_snapshot_does_not_see_what_is_written_meanwhile_and_makes_nobody_wait(records: SqlRecords) -> None:
    fill(records)
    before = records_digest(records)
    digest = backup_rows.RecordsDigest()
    with snapshot(records) as connection:
        written = threading.Thread(target=lambda: [records.put(Run(id=f"new{n}")) for n in range(20)])
        written.start()
        written.join(20)
        assert not written.is_alive()
        for piece in pieces(connection):
            records.put(Run(id="é00003", name="changed"))
            digest.add(piece.payload or b"")
    assert digest.text() == before
    assert records_digest(records) != before


def test_points_that_cannot_have_changed_are_not_read_again(records: SqlRecords) -> None:
    fill(records, 3)
    known: dict[int, Points] = {}

    def points() -> list[backup_rows.Piece]:
        with snapshot(records) as connection:
            found = [one for one in pieces(connection, known=known.get) if one.table == "metrics"]
        known.update({one.bucket: one.points for one in found if one.points is not None and one.bucket is not None})
        return found

    first = points()
    assert [one.payload is None for one in first] == [False, False]
    assert first[0].points is not None
    assert first[1].points is None  # others may still be added to it
    second = points()
    assert [(one.payload is None, one.digest) for one in second] == [(True, first[0].digest), (False, first[1].digest)]
    records.append_metrics([MetricPoint("é00002", "loss", step, 1.0, 1.0) for step in range(POINTS)])
    records.flush()
    assert [one.payload is None for one in points()] == [True, False, False]
    assert [one.payload is None for one in points()] == [True, True, False]
    with records.transaction() as transaction:
        transaction.delete(Run, "é00001")
    after = points()
    assert all(one.payload is not None for one in after)
    assert sum(one.rows for one in after) == POINTS


VERSIONS = st.dictionaries(st.text("abc", min_size=1, max_size=4), st.integers(1, 3), max_size=25)


@given(before=VERSIONS, after=VERSIONS, cuts=st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_what_is_kept_and_what_is_read_are_the_table_and_nothing_changed_is_kept(
    before: dict[str, int], after: dict[str, int], cuts: list[int]
) -> None:
    rows, known, at = sorted(before.items()), [], 0
    while at < len(rows):
        some = rows[at : at + cuts[len(known) % len(cuts)]]
        versions = backup_versions.digest_of(some)
        known.append(
            Stretch(first=some[0][0], last=some[-1][0], rows=len(some), versions=versions, digest="", size_bytes=1)
        )
        at += len(some)
    found = sorted(after.items())
    covered: list[tuple[str, int]] = []
    for one in backup_versions.stretches(found, known):
        first, last = (one.first, one.last) if isinstance(one, Stretch) else one
        part = [row for row in found if first <= row[0] <= last]
        assert part
        covered += part
        if isinstance(one, Stretch):
            assert all(before[id] == version for id, version in part)
            assert len(part) == one.rows
    assert covered == found
    if before == after:
        assert [*backup_versions.stretches(found, known)] == known


def test_records_and_events_that_have_not_changed_are_not_read_again(records: SqlRecords) -> None:
    fill(records, 3000)
    known: dict[str, list[Stretch]] = {}

    def read() -> dict[str, int]:
        """Rows that were read, by table; the pieces together are always all there is."""
        digest = backup_rows.RecordsDigest()
        rows: dict[str, int] = {}
        with snapshot(records) as connection:
            found = list(pieces(connection, stretches=known))
        known.clear()
        for piece in found:
            if piece.payload is not None:
                payloads[piece.digest] = piece.payload
                rows[piece.table] = rows.get(piece.table, 0) + piece.rows
            if piece.stretch is not None and piece.size_bytes >= backup_rows.SMALLEST_BYTES:
                known.setdefault(piece.table, []).append(piece.stretch)
            digest.add(payloads[piece.digest])
        assert digest.text() == records_digest(records)
        return rows

    payloads: dict[str, bytes] = {}
    backup_versions.prepare(records)
    backup_versions.prepare(records)
    first = read()
    assert (first["runs"], first["events"]) == (3000, 3000)
    again = read()
    assert 0 < again["runs"] < 600  # the last piece, to which others may still be added
    assert 0 < again["events"] < 1500
    records.put(Run(id="é01500", name="changed"))
    records.put(Run(id="a new one before all others"))
    with records.transaction() as transaction:
        transaction.delete(Run, "é00700")
        transaction.append(Event(at=1.0, actor="u", verb="unsealed", subject="run:1"))
    changed = read()
    assert again["runs"] < changed["runs"] < 2000
    assert changed["events"] == again["events"] + 1
    records.seal()
    assert read()["events"] == changed["events"]  # what had not been sealed is read again
    with records.writing() as connection:
        connection.execute("DELETE FROM events WHERE id < 10")
    assert read()["events"] > 2900  # nothing is believed behind a gap


def test_points_of_runs_that_are_no_records_are_always_read(records: SqlRecords) -> None:
    records.append_metrics([MetricPoint("nobody", "loss", step, 1.0, 1.0) for step in range(POINTS + 1)])
    records.flush()
    with snapshot(records) as connection:
        first = [one for one in pieces(connection) if one.table == "metrics"]
        known = {0: first[0].points}
        again = [one for one in pieces(connection, known=known.get) if one.table == "metrics"]
    assert first == again
    assert all(one.payload is not None for one in again)


def test_rows_that_do_not_fit_are_refused(records: SqlRecords) -> None:
    columns = backup_rows.columns()["meta"]
    for name, named, rows in (
        ("meta; DROP TABLE runs", columns, [("meta", "a", "b")]),
        ("meta", ("key",), [("meta", "a")]),
        ("meta", columns, [("meta", "a", "b", "c")]),
    ):
        with records.writing() as into, pytest.raises(CorruptError, match="does not fit"):
            backup_filling.insert(into, name, named, rows)
    for payload in (b"", b"\xc1", b"\x91\x90", msgspec.msgpack.encode([["other", 1]]), b"\xdd\xff\xff\xff\xff"):
        with pytest.raises(CorruptError):
            rows_of(payload, "meta")
