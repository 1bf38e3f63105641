"""What is Postgres' own: URLs and passwords, lost connections, crashes of the server, the writer lock."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import DiskFullError, InputError, MillraceError, UnavailableError
from millrace.core.types import Event, MetricPoint, Run, Step
from millrace.security.chain import verify
from millrace.store import postgres
from millrace.store.database import Connection
from millrace.store.postgres import numbered, open_records, safe_name
from millrace.store.records_sql import SqlRecords
from millrace.testing.postgres import PostgresServer, new_records_url, shared_server

WRITER = """
import sys, time
from millrace.core.errors import ConflictError, UnavailableError
from millrace.core.types import Event, Step
from millrace.store.postgres import open_records
records, number = open_records(sys.argv[1]), 0
while True:
    try:
        with records.transaction() as transaction:
            transaction.put(Step(id=f"{number:06}", run_id="r", name="n", stage="n"), expect_version=0)
            transaction.append(Event(at=1.0, actor="a", verb="step", subject="run:r"))
        if number % 5 == 0:
            records.seal()
    except UnavailableError as error:
        time.sleep(0.02)
        continue
    except ConflictError:  # it was written although the answer was lost
        pass
    print(number, flush=True)
    number += 1
"""


@pytest.fixture
def records() -> Iterator[SqlRecords]:
    opened = open_records(new_records_url())
    yield opened
    opened.close()


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    """A server of the test's own, which it may crash; fsync is on."""
    if PostgresServer.find() is None:
        pytest.skip("no PostgreSQL server is installed")
    with PostgresServer(durable=True) as started:
        yield started


# ---- statements


@given(st.lists(st.sampled_from(["?", "a", "'it''s ?'", '"b?"', "%s", " ", "'%'", "$"]), max_size=8))
def test_only_marks_outside_quotes_are_numbered(parts: list[str]) -> None:
    found = numbered(" ".join(parts)).decode().split(" ")
    number = 0
    for part, given_back in zip(" ".join(parts).split(" "), found, strict=True):
        number += part == "?"
        assert given_back == (f"${number}" if part == "?" else part)


def test_percent_signs_and_marks_in_texts_are_left_alone(records: SqlRecords) -> None:
    def ask(connection: Connection) -> object:
        return connection.execute("SELECT '50% ?', 'a' LIKE '%', CAST(? AS text), 7 % 4", ["%s ? $1"]).fetchone()

    assert records.read(ask) == ("50% ?", True, "%s ? $1", 3)


def test_bodies_are_kept_byte_for_byte(records: SqlRecords) -> None:
    records.put(Run(id="r", facts={"b": 1, "a": [1e-7, 1.0], "é": "\x00"}))
    with records.writing() as connection:
        (body,) = connection.execute("SELECT body FROM runs").fetchone()
    assert '"facts":{"b":1,"a":[1e-7,1.0],"é":"\\u0000"}' in body


# ---- URLs and passwords


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("postgresql://db/records", "postgresql://db/records"),
        ("postgresql://ann:secret@db:5433/records", "postgresql://ann@db:5433/records"),
        ("postgresql://ann@one:1,two:2/r?password=secret", "postgresql://ann@one:1,two:2/r"),
        ("postgresql:///r?host=/run/pg&user=ann&password=secret", "postgresql://ann@/run/pg/r"),
        ("postgres://ann:se%63ret@one,two/r?sslpassword=secret", "postgresql://ann@one,two/r"),
    ],
)
def test_the_name_of_a_database_has_no_password(url: str, name: str) -> None:
    assert safe_name(url) == name


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://millrace:TOPSECRET@127.0.0.1:1/records",
        "postgresql://millrace:TOPSECRET@no-such-host.invalid/records",
        "postgresql://millrace:TOPSECRET%zz@127.0.0.1:1/records",
        "postgresql://millrace:TOPSECRET@127.0.0.1:not-a-port/records",
        "postgresql://127.0.0.1:1/records?password=TOPSECRET&nonsense=1",
        "mysql://millrace:TOPSECRET@127.0.0.1/records",
        "SERVER/no_such_database",
    ],
)
def test_no_error_and_no_log_shows_the_password(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    if url.startswith("SERVER"):
        url = shared_server().url("no_such_database").replace("millrace@", "millrace:TOPSECRET@")
    with pytest.raises((InputError, UnavailableError)) as caught:
        open_records(url)
    shown = "".join(traceback.format_exception(caught.value)) + caught.value.hint + caplog.text
    assert "TOPSECRET" not in shown
    assert "records" in shown


# ---- lost connections


def test_a_restart_between_calls_goes_unseen(server: PostgresServer) -> None:
    records = open_records(server.create_database())
    records.put(Run(id="before"))
    for how in (signal.SIGINT, signal.SIGQUIT):
        server.stop(how)
        server.start()
        assert records.get(Run, "before") is not None
        server.stop(how)
        server.start()
        records.append_metrics([MetricPoint("before", "loss", 0, 1.0, 0.0)])
        records.put(Run(id=how.name))
    assert len(records.find(Run)) == 3
    assert len(records.metrics("before")) == 2
    records.close()


def test_a_server_that_is_away_is_unavailable_and_points_wait(server: PostgresServer) -> None:
    records = open_records(server.create_database())
    server.stop()
    records.append_metrics([MetricPoint("r", "loss", 0, 1.0, 0.0)])
    for call in (lambda: records.get(Run, "r"), lambda: records.put(Run(id="r")), records.flush):
        with pytest.raises(UnavailableError, match="cannot be reached"):
            call()
    server.start()
    assert len(records.metrics("r")) == 1
    records.close()


def test_a_crash_in_mid_transaction_undoes_all_of_it(server: PostgresServer) -> None:
    records = open_records(server.create_database())
    kept = records.put(Run(id="kept"))

    def change(crash: str) -> None:
        with records.transaction() as transaction:
            transaction.put(Run(id="kept", name="changed"))
            transaction.append(Event(at=1.0, actor="a", verb="v", subject="s"))
            server.kill() if crash == "kill" else server.stop(signal.SIGQUIT)
            transaction.put(Run(id="other"))

    for crash in ("kill", "quit"):
        with pytest.raises(UnavailableError, match="nothing of this change was written"):
            change(crash)
        server.start()
        assert records.find(Run) == [kept]
        assert records.seal() == 0
    records.close()


def test_acknowledged_writes_survive_crashes_of_the_server(server: PostgresServer) -> None:
    url = server.create_database()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer:
        acknowledged = []
        for crash in (server.kill, lambda: server.stop(signal.SIGQUIT), server.kill):
            acknowledged += [int(writer.stdout.readline()) for _ in range(40)]
            crash()
            server.start()
        acknowledged += [int(writer.stdout.readline()) for _ in range(40)]
        writer.kill()
        acknowledged += [int(line) for line in writer.stdout.read().splitlines()]
    records = open_records(url)
    found = [step.id for step in records.find(Step, order="id")]
    assert acknowledged == list(range(len(acknowledged)))
    assert found == [f"{number:06}" for number in range(len(found))]
    assert len(acknowledged) <= len(found) <= len(acknowledged) + 1
    records.seal()
    assert [event.seq for event in records.events()] == list(range(1, len(found) + 1))
    assert verify(records.links(), head=records.head()).broken is None
    records.close()


class Cutter:
    """Passes bytes between a client and the server; cuts the line once a COMMIT has been answered."""

    def __init__(self, port: int) -> None:
        self.listener, self.target = socket.create_server(("127.0.0.1", 0)), port
        self.port = self.listener.getsockname()[1]
        self.armed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            threading.Thread(target=self._pass_on, args=(client, server), daemon=True).start()

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        with client, server:
            while data := client.recv(65536):
                server.sendall(data)
                answer = server.recv(65536)  # each request is one message with one answer, small ones here
                if not answer or (b"COMMIT\0" in data and self.armed.is_set()):
                    return
                client.sendall(answer)


def test_a_commit_without_an_answer_is_in_doubt_and_says_so(records: SqlRecords) -> None:
    name = records._database.name.rpartition("/")[2]
    cutter = Cutter(shared_server().port)
    far = open_records(f"postgresql://millrace@127.0.0.1:{cutter.port}/{name}?sslmode=disable&gssencmode=disable")
    far.put(Run(id="a"))
    cutter.armed.set()
    with pytest.raises(UnavailableError, match="in doubt") as caught:
        far.put(Run(id="b"))
    assert caught.value.details == {"in_doubt": True}
    assert records.get(Run, "b") is not None  # it was written in truth, and the message did not deny it
    cutter.armed.clear()
    assert far.put(Run(id="b")).version == 2
    far.close()
    cutter.listener.close()


# ---- the writer lock


def test_a_writer_waits_for_another_and_says_when_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_SESSION", postgres._SESSION.replace("30s", "50ms"))
    url = new_records_url()
    one, two = open_records(url), open_records(url)
    with one.transaction() as transaction:
        transaction.put(Run(id="r"))
        assert two.find(Run) == []  # readers do not wait
        with pytest.raises(UnavailableError, match="writer lock"):
            two.put(Run(id="s"))
    assert two.put(Run(id="s")).version == 1
    one.close()
    two.close()


def test_a_writer_that_sleeps_loses_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "_SESSION", postgres._SESSION.replace("60s", "50ms"))
    url = new_records_url()
    one, two = open_records(url), open_records(url)

    def sleep_inside() -> None:
        with one.transaction() as transaction:
            transaction.put(Run(id="r"))
            assert two.put(Run(id="s")).version == 1  # waits until the server has ended the sleeper's session
            transaction.put(Run(id="t"))

    with pytest.raises(UnavailableError, match="lost the writer lock"):
        sleep_inside()
    assert [run.id for run in one.find(Run)] == ["s"]
    one.close()
    two.close()


def test_the_next_number_is_given_once(records: SqlRecords) -> None:
    """What handlers do: read the largest number inside the transaction and write the next one."""
    url = shared_server().url(records._database.name.rpartition("/")[2])

    def add() -> None:
        own = open_records(url)
        for _ in range(10):
            with own.transaction() as transaction:
                number = len(transaction.find(Run))
                transaction.put(Run(id=f"run-{number}"), expect_version=0)
        own.close()

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(records.find(Run)) == 40


def test_readers_never_miss_an_event_that_is_committed_late(records: SqlRecords) -> None:
    """A seal that comes while a transaction with an event is open waits for it: no seq is passed over."""
    url = shared_server().url(records._database.name.rpartition("/")[2])
    other, sealed = open_records(url), threading.Event()

    def seal() -> None:
        other.seal()
        sealed.set()

    records.put(Run(id="r"))
    with records.transaction() as transaction:
        transaction.append(Event(at=1.0, actor="early", verb="v", subject="s"))
        other_writer = threading.Thread(target=lambda: append(other, "late"))
        other_writer.start()
        time.sleep(0.05)
        assert other_writer.is_alive()
    other_writer.join()
    seal()
    assert [event.actor for event in records.events()] == ["early", "late"]
    assert [event.id for event in records.events()] == sorted(event.id or 0 for event in records.events())
    other.close()


def append(records: SqlRecords, actor: str) -> None:
    """One event in a transaction of its own."""
    with records.transaction() as transaction:
        transaction.append(Event(at=1.0, actor=actor, verb="v", subject="s"))


def test_an_error_that_was_swallowed_inside_a_transaction_is_not_lost(records: SqlRecords) -> None:
    def swallow() -> None:
        with records.writing() as connection:
            connection.execute("INSERT INTO meta (key, value) VALUES ('a', 'b')")
            with pytest.raises(psycopg.Error):
                connection.execute("SELECT no_such_column FROM meta")

    with pytest.raises(RuntimeError, match="nothing was written"):
        swallow()
    assert records.put(Run(id="r")).version == 1


def test_many_threads_read_at_once(records: SqlRecords) -> None:
    records.put(Run(id="r"))
    failures: list[MillraceError] = []

    def read() -> None:
        try:
            for _ in range(50):
                assert records.get(Run, "r") is not None
        except MillraceError as error:
            failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert records._database._readers.qsize() == postgres.READERS  # type: ignore[attr-defined]


def test_writes_are_durable_even_where_the_server_would_not_wait() -> None:
    server = shared_server()
    url = new_records_url()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {url.rpartition('/')[2]} SET synchronous_commit = off".encode())
    records = open_records(url)
    assert server.port
    with records.writing() as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
    records.close()


def fill(records: SqlRecords) -> None:
    """A transaction of 20 MB."""
    with records.transaction() as transaction:
        for number in range(100):
            transaction.put(Run(id=f"{number}", spec_text=os.urandom(100_000).hex()))


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_of_the_server(tmp_path: Path) -> None:
    server = shared_server()
    place = server.folder / "small"
    place.mkdir()
    owner = server.folder.stat()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr}")
    try:
        os.chown(place, owner.st_uid, owner.st_gid)
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(f"CREATE TABLESPACE small LOCATION '{place}'".encode())
            connection.execute(b"CREATE DATABASE small TEMPLATE template0 TABLESPACE small")
        records = open_records(server.url("small"))
        records.put(Run(id="kept"))
        filler = place / "filler"
        filler.write_bytes(b"x" * (os.statvfs(place).f_bavail * 4096 - 8192))
        with pytest.raises(DiskFullError, match="nothing of this change"):
            fill(records)
        assert [run.id for run in records.find(Run)] == ["kept"]
        filler.unlink()
        records.put(Run(id="again"))
        records.close()
        with psycopg.connect(server.url(), autocommit=True) as connection:
            connection.execute(b"DROP DATABASE small")
            connection.execute(b"DROP TABLESPACE small")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
