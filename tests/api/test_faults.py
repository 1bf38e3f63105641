"""Whatever is killed: every acknowledged write is there afterwards, no step is done twice, no event is missing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from millrace.client.http import HttpTransport
from millrace.client.remote import RemoteTransport
from millrace.core.errors import DiskFullError, MillraceError, UnavailableError
from millrace.core.types import Lease, Run
from millrace.security.chain import verify
from millrace.store.leases import process_start
from millrace.store.records_sql import SqlRecords
from millrace.testing.postgres import PostgresServer, open_place
from millrace.testing.radosgw import Radosgw, missing_programs
from millrace.testing.server import RunningServer

pytestmark = pytest.mark.xdist_group("faults")


def until(check: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Writer(threading.Thread):
    """Writes without a pause and notes what was acknowledged; what was refused it counts and goes on."""

    def __init__(self, write: Callable[[int], str]) -> None:
        super().__init__(daemon=True)
        self._write = write
        self._ending = threading.Event()
        self.acknowledged: list[str] = []
        self.refused: list[MillraceError] = []

    def run(self) -> None:
        number = 0
        while not self._ending.is_set():
            number += 1
            try:
                self.acknowledged.append(self._write(number))
            except MillraceError as error:
                self.refused.append(error)
                time.sleep(0.02)

    def finish(self) -> list[str]:
        self._ending.set()
        self.join(60)
        return self.acknowledged

    def goes_on(self) -> None:
        """Wait until further writes are acknowledged."""
        seen = len(self.acknowledged)
        until(lambda: len(self.acknowledged) > seen + 5, f"writes are acknowledged again: {self.refused[-1:]}")


def assert_nothing_is_lost(records: SqlRecords, acknowledged: list[str]) -> None:
    """All runs are there, each with its sealed event, in a chain that holds."""
    assert set(acknowledged) <= {run.id for run in records.find(Run)}
    until(lambda: len(records.events(0, limit=100_000)) >= len(acknowledged), "every write has its sealed event")
    links = records.links(limit=100_000)
    checked = verify(links, head=records.head())
    assert (checked.broken, checked.seq) == (None, len(links))


# --------------------------------------------------------------------------- the server's own processes


def test_a_server_that_is_killed_again_and_again_under_a_writer(tmp_path: Path) -> None:
    server = RunningServer(tmp_path / "home").start()
    port = server.url.rpartition(":")[2]
    transport = HttpTransport(server.url)
    writer = Writer(lambda number: transport.call("run.track", {"name": f"n{number}"}).id)
    writer.start()
    for _ in range(3):
        time.sleep(0.3)
        children = list(server.children().values())
        server.kill()
        for pid in children:
            os.kill(pid, signal.SIGKILL)
        for pid in children:
            until(lambda pid=pid: process_start(pid) is None, "its children end with it")
        server = RunningServer(tmp_path / "home", arguments=("--port", port)).start()
        writer.goes_on()
    acknowledged = writer.finish()
    transport.close()
    server.stop()
    records = open_place(str(tmp_path / "home" / "records.db"))
    assert_nothing_is_lost(records, acknowledged)
    records.close()


STEPS = """import os, time
from pathlib import Path

def note(ctx, name):
    with open(Path(os.environ["MARKS"]) / name, "a") as file:
        file.write("begun\\n")
    for _ in range(20):
        time.sleep(0.05)
    path = ctx.scratch / "done.txt"
    path.write_text(name)
    ctx.output("done", path)

def first(ctx):
    note(ctx, "first")

def second(ctx):
    note(ctx, "second")

def third(ctx):
    note(ctx, "third")
"""
SPEC = """project: own
steps:
- {name: first, uses: "steps.py:first"}
- {name: second, uses: "steps.py:second", needs: [first]}
- {name: third, uses: "steps.py:third", needs: [second]}
"""


@pytest.mark.parametrize("victim", ["driver", "server"])
def test_a_run_whose_process_is_killed_goes_on_and_repeats_no_finished_step(tmp_path: Path, victim: str) -> None:
    project, marks = tmp_path / "project", tmp_path / "marks"
    project.mkdir()
    marks.mkdir()
    (project / "steps.py").write_text(STEPS)
    (project / "millrace.yaml").write_text(SPEC)
    home = tmp_path / "home"
    server = RunningServer(home, environment={"MARKS": str(marks)}).start()
    try:
        transport = HttpTransport(server.url)
        run = transport.call("run.submit", {"spec_path": str(project / "millrace.yaml")}).run
        until(lambda: (marks / "second").exists(), "the second step runs")
        if victim == "driver":
            records = open_place(str(home / "records.db"))
            lease = records.get(Lease, f"run/{run.id}")
            records.close()
            assert lease is not None
            os.kill(lease.pid, signal.SIGKILL)
        else:
            server.kill()
            until(lambda: (marks / "third").exists(), "the run goes on without the server")
            transport.close()
            server.start()
            transport = HttpTransport(server.url)
        until(
            lambda: transport.call("run.get", {"run": run.id}).run.state not in ("pending", "running"), "the run ends"
        )
        view = transport.call("run.get", {"run": run.id})
        transport.close()
    finally:
        server.stop()
    begun = {name: len((marks / name).read_text().splitlines()) for name in ("first", "second", "third")}
    assert {step.name: step.state for step in view.steps} == dict.fromkeys(begun, "succeeded"), view.run.error
    assert begun == {"first": 1, "second": 1 if victim == "server" else 2, "third": 1}


# --------------------------------------------------------------------------- the database


@pytest.mark.skipif(PostgresServer.find() is None, reason="no PostgreSQL server is installed")
def test_postgres_is_killed_under_a_writer_and_comes_back(tmp_path: Path) -> None:
    with PostgresServer(durable=True) as database:
        url = database.create_database()
        with RunningServer(tmp_path / "home", environment={"MILLRACE_RECORDS_URL": url}) as server:
            transport = HttpTransport(server.url)
            loop = server.children()["loop"]
            writer = Writer(lambda number: transport.call("run.track", {"name": f"n{number}"}).id)
            writer.start()
            for _ in range(2):
                time.sleep(0.5)
                database.kill()
                until(lambda: writer.refused, "what cannot be written is refused")
                assert httpx.get(f"{server.url}/readyz").status_code == 503
                assert httpx.get(f"{server.url}/healthz").status_code == 200
                database.start()
                writer.goes_on()
            acknowledged = writer.finish()
            assert {type(error) for error in writer.refused} == {UnavailableError}
            assert server.children()["loop"] == loop, "the loop waited for the database"
            records = open_place(url)
            assert_nothing_is_lost(records, acknowledged)
            records.close()
            transport.close()


# --------------------------------------------------------------------------- the object store


@pytest.fixture
def gateway() -> Iterator[Radosgw]:
    if missing_programs():
        pytest.skip("radosgw, ceph-mon and ceph-osd are not installed")
    with tempfile.TemporaryDirectory(prefix="rgw") as folder:
        server = Radosgw(Path(folder)).start()
        boto3.client(
            "s3", endpoint_url=server.endpoint, region_name=server.region, aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
        ).create_bucket(Bucket="faults")  # fmt: skip
        yield server
        server.stop()


@pytest.mark.services
def test_s3_is_killed_under_a_writer_of_artifacts_and_comes_back(tmp_path: Path, gateway: Radosgw) -> None:
    variables = {
        "MILLRACE_BLOBS_URL": "s3://faults/blobs", "AWS_ENDPOINT_URL": gateway.endpoint, "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": gateway.region, "AWS_ACCESS_KEY_ID": gateway.access_key,
        "AWS_SECRET_ACCESS_KEY": gateway.secret_key,
    }  # fmt: skip
    with RunningServer(tmp_path / "home", environment=variables) as server:
        transport = RemoteTransport(server.url)
        run = transport.call("run.track", {"name": "artifacts"})

        def write(number: int) -> str:
            path = tmp_path / "artifact"
            path.write_bytes(os.urandom(200_000))
            return transport.upload(path).digest

        writer = Writer(write)
        writer.start()
        for _ in range(2):
            time.sleep(0.5)
            gateway.kill()
            time.sleep(1.0)
            transport.call("run.log", {"run": run.id, "tags": {"while": "away"}})  # what needs no blobs goes on
            gateway.start_gateway()
            writer.goes_on()
        for digest in writer.finish():
            transport.download(digest, tmp_path / "back")
        transport.close()


# --------------------------------------------------------------------------- the disk


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(filler: Path) -> None:
    """Write until there is no space."""
    written = 1
    with filler.open("wb", buffering=0) as file:
        while written:
            try:
                written = file.write(b"x" * 100_000)
            except OSError as error:
                assert error.errno == errno.ENOSPC  # noqa: PT017 - the end of the loop
                return


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_is_said_and_survived(disk: Path, tmp_path: Path) -> None:
    home = disk  # its log is beside it: on the other disk
    with RunningServer(home) as server:
        transport = RemoteTransport(server.url)
        children = server.children()

        def write(number: int) -> str:
            body: dict[str, Any] = {"name": f"n{number}", "params": {"text": "x" * 20_000}}
            return transport.call("run.track", body).id

        writer = Writer(write)
        writer.start()
        writer.goes_on()
        filler = disk / "filler"
        fill(filler)
        until(lambda: len(writer.refused) > 20, "the disk is full")
        assert {type(error) for error in writer.refused} == {DiskFullError}
        large = tmp_path / "large"
        large.write_bytes(os.urandom(1_000_000))
        with pytest.raises(DiskFullError):
            transport.upload(large)
        answer = httpx.post(f"{server.url}/api/v1/blobs", content=large.read_bytes())
        assert answer.status_code == 507
        assert answer.json()["code"] == "capacity.disk_full"
        assert transport.call("run.list", {"limit": 5}), "reading goes on"
        filler.unlink()
        writer.goes_on()
        acknowledged = writer.finish()
        transport.upload(large)
        assert server.children() == children, server.log.read_text()
        transport.close()
        assert not list((home / "scratch").rglob("tmp*")), "nothing half-written is left"
    records = open_place(str(home / "records.db"))
    assert_nothing_is_lost(records, acknowledged)
    records.close()


# --------------------------------------------------------------------------- a restart in the middle of something


def test_a_stream_goes_on_over_a_restart(tmp_path: Path) -> None:
    server = RunningServer(tmp_path / "home").start()
    port = server.url.rpartition(":")[2]
    transport = HttpTransport(server.url)
    first = transport.call("run.track", {"name": "before"}).id
    seen: list[tuple[int, str]] = []

    def watch() -> None:
        for event in HttpTransport(server.url).stream("event.watch", {}):
            seen.append((event.seq, event.verb))
            if event.verb == "run.end":
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    until(lambda: seen, "the first event arrives")
    assert server.stop() == 0
    again = RunningServer(tmp_path / "home", arguments=("--port", port)).start()
    try:
        transport.call("run.track", {"name": "after"})
        transport.call("run.end", {"run": first})
        watching.join(30)
        assert not watching.is_alive()
    finally:
        again.stop()
        transport.close()
    assert [number for number, _ in seen] == [1, 2, 3]
    assert [verb for _, verb in seen] == ["run.track", "run.track", "run.end"]


def test_an_upload_that_runs_when_the_server_is_stopped_is_finished(tmp_path: Path) -> None:
    server = RunningServer(tmp_path / "home").start()
    begun = threading.Event()

    def parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b"y" * 10_000
            begun.set()
            time.sleep(0.1)

    answers: list[httpx.Response] = []

    def upload() -> None:
        answers.append(httpx.post(f"{server.url}/api/v1/blobs", content=parts(), timeout=30))

    uploading = threading.Thread(target=upload)
    uploading.start()
    begun.wait(10)
    assert server.stop() == 0
    uploading.join(30)
    assert answers[0].status_code == 200
    digest = answers[0].json()["digest"]
    with RunningServer(tmp_path / "home") as again:
        assert httpx.get(f"{again.url}/api/v1/blobs/{digest}").content == b"y" * 200_000


def test_an_upload_that_takes_too_long_is_cut_and_leaves_nothing(tmp_path: Path) -> None:
    server = RunningServer(tmp_path / "home").start()
    begun, ending = threading.Event(), threading.Event()

    def parts() -> Iterator[bytes]:
        while not ending.is_set():
            yield b"y" * 10_000
            begun.set()
            time.sleep(0.1)

    outcome: list[str] = []

    def upload() -> None:
        try:
            httpx.post(f"{server.url}/api/v1/blobs", content=parts(), timeout=30)
        except httpx.TransportError as error:
            outcome.append(type(error).__name__)

    uploading = threading.Thread(target=upload)
    uploading.start()
    begun.wait(10)
    server.stop()
    ending.set()
    uploading.join(30)
    assert outcome, "the line was cut"
    assert not [path for path in (tmp_path / "home" / "blobs").rglob("*") if path.is_file()]
    with RunningServer(tmp_path / "home") as again:
        assert httpx.get(f"{again.url}/readyz").status_code == 200
