"""The network in between: cut, paused and slow, from client to server and from server to database."""

from __future__ import annotations

import hashlib
import os
import selectors
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from millrace.client.http import HttpTransport
from millrace.client.remote import RemoteTransport
from millrace.core.errors import MillraceError, UnavailableError
from millrace.core.types import Run
from millrace.security.chain import verify
from millrace.testing.postgres import PostgresServer, new_records_url, open_place
from millrace.testing.server import RunningServer

pytestmark = pytest.mark.xdist_group("postgres")


def until(check: Callable[[], object], what: str, timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Line:
    """A TCP proxy: bytes pass, wait, or trickle; `cut` ends every connection, and refuses new ones until `mend`.

    Args:
        target: Host and port behind it.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._flowing, self._ended = threading.Event(), threading.Event()
        self._flowing.set()
        self.is_cut = False
        self.delay_s, self.chunk_bytes = 0.0, 1 << 16
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def pause(self) -> None:
        self._flowing.clear()

    def resume(self) -> None:
        self._flowing.set()

    def cut(self) -> None:
        self.is_cut = True
        with self._lock:
            cut, self._sockets = self._sockets, set()
        for one in cut:
            _end(one)

    def mend(self) -> None:
        self.is_cut = False

    def close(self) -> None:
        self._ended.set()
        self._flowing.set()
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.is_cut:
                client.close()
                continue
            threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self._target)
        except OSError:
            client.close()
            return
        with self._lock:
            self._sockets |= {client, server}
        with client, server, selectors.DefaultSelector() as ready:
            ready.register(client, selectors.EVENT_READ, server)
            ready.register(server, selectors.EVENT_READ, client)
            while not self._ended.is_set() and not self.is_cut:
                for key, _ in ready.select(0.2):
                    if not self._pass_on(key.fileobj, key.data):  # type: ignore[arg-type]
                        return

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> bool:
        self._flowing.wait()
        try:
            data = source.recv(self.chunk_bytes)
            time.sleep(self.delay_s)
            sink.sendall(data)
        except OSError:
            return False
        return bool(data)


def _end(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)
    except OSError:
        one.close()


@contextmanager
def line_to(url: str) -> Iterator[Line]:
    parsed = urlsplit(url)
    line = Line((parsed.hostname or "", parsed.port or 0))
    yield line
    line.close()


# --------------------------------------------------------------------------- from client to server


@pytest.fixture
def line(server: RunningServer) -> Iterator[Line]:
    with line_to(server.url) as line:
        yield line


@pytest.fixture
def through(line: Line) -> Iterator[RemoteTransport]:
    """A client at the far end of the line."""
    transport = RemoteTransport(f"http://127.0.0.1:{line.port}")
    yield transport
    transport.close()


def test_a_paused_line_delays_and_loses_nothing(line: Line, through: RemoteTransport) -> None:
    through.call("run.track", {"name": "warm"})
    line.pause()
    threading.Timer(1.0, line.resume).start()
    run = through.call("run.track", {"name": "late"})
    assert through.call("run.get", {"run": run.id}).run.name == "late"


def test_a_cut_line_is_said_and_no_write_is_sent_twice(
    line: Line, through: RemoteTransport, transport: HttpTransport
) -> None:
    acknowledged, refused = [], []
    ending = threading.Event()

    def cut_again_and_again() -> None:
        for _ in range(8):
            time.sleep(0.15)
            line.cut()
            time.sleep(0.02)
            line.mend()
        ending.set()

    threading.Thread(target=cut_again_and_again).start()
    number = 0
    while not ending.is_set():
        number += 1
        try:
            acknowledged.append(through.call("run.track", {"name": f"cut-{number}"}).id)
        except UnavailableError as error:
            refused.append(error.message)
    runs = [run for run in transport.call("run.list", {"limit": 100_000}) if run.name.startswith("cut-")]
    assert set(acknowledged) <= {run.id for run in runs}
    assert len({run.name for run in runs}) == len(runs), "what may have arrived is not sent again"
    assert refused
    assert all("cannot be reached" in message for message in refused)


def test_a_stream_goes_on_over_cuts(line: Line, through: RemoteTransport, transport: HttpTransport) -> None:
    seen: list[int] = []
    last = transport.call("run.track", {"name": "streamed"}).id

    def watch() -> None:
        for event in through.stream("event.watch", {}):
            seen.append(event.seq)
            if event.subject == f"run:{last}" and event.verb == "run.end":
                return

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    for number in range(6):
        until(lambda number=number: len(seen) > number, "events arrive")
        line.cut()
        transport.call("run.track", {"name": "meanwhile"})
        line.mend()
    transport.call("run.end", {"run": last})
    watching.join(40)
    assert not watching.is_alive()
    assert seen == list(range(1, len(seen) + 1)), "no event twice, none missing"


def test_a_slow_line_takes_longer_and_the_bytes_are_whole(line: Line, through: RemoteTransport, tmp_path: Path) -> None:
    line.delay_s, line.chunk_bytes = 0.02, 16_384
    path = tmp_path / "bytes"
    path.write_bytes(os.urandom(1_000_000))
    stored = through.upload(path)
    assert stored.digest == "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    through.download(stored.digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


def test_an_upload_that_is_cut_leaves_nothing(
    server: RunningServer, line: Line, through: RemoteTransport, tmp_path: Path
) -> None:
    line.delay_s, line.chunk_bytes = 0.02, 16_384
    path = tmp_path / "bytes"
    path.write_bytes(os.urandom(2_000_000))
    threading.Timer(0.4, line.cut).start()
    with pytest.raises(UnavailableError):
        through.upload(path)
    until(lambda: not any((server.home / "scratch" / "incoming").iterdir()), "the part that came is removed")
    digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    assert httpx.get(f"{server.url}/api/v1/blobs/{digest}").status_code == 404
    line.mend()
    line.delay_s = 0.0
    assert through.upload(path).digest == digest


def test_a_download_that_is_cut_leaves_no_file(line: Line, through: RemoteTransport, tmp_path: Path) -> None:
    path = tmp_path / "bytes"
    path.write_bytes(os.urandom(2_000_000))
    stored = through.upload(path)
    line.delay_s, line.chunk_bytes = 0.02, 16_384
    threading.Timer(0.4, line.cut).start()
    with pytest.raises(MillraceError):
        through.download(stored.digest, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    line.mend()
    line.delay_s, line.chunk_bytes = 0.0, 1 << 16
    through.download(stored.digest, tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == path.read_bytes()


# --------------------------------------------------------------------------- from server to database


@pytest.mark.skipif(PostgresServer.find() is None, reason="no PostgreSQL server is installed")
@pytest.mark.parametrize("fault", ["cut", "pause", "slow"])
def test_the_line_to_postgres_fails_under_a_writer(tmp_path: Path, fault: str) -> None:
    url = new_records_url()
    with line_to(url) as line:
        far = url.replace(f":{urlsplit(url).port}/", f":{line.port}/")
        with RunningServer(tmp_path / "home", environment={"MILLRACE_RECORDS_URL": far}) as server:
            transport = HttpTransport(server.url)
            acknowledged: list[str] = []
            refused: list[MillraceError] = []
            ending = threading.Event()

            def write() -> None:
                while not ending.is_set():
                    try:
                        acknowledged.append(transport.call("run.track", {"name": "written"}).id)
                    except MillraceError as error:
                        refused.append(error)
                        time.sleep(0.02)

            writer = threading.Thread(target=write)
            writer.start()
            until(lambda: len(acknowledged) > 5, "writes are acknowledged")
            if fault == "cut":
                line.cut()
                until(lambda: refused, "what cannot be written is refused")
                line.mend()
            elif fault == "pause":
                line.pause()
                time.sleep(3.0)
                line.resume()
            else:
                line.delay_s = 0.01
            before = len(acknowledged)
            until(lambda: len(acknowledged) > before + 10, f"it recovers: {refused[-1:]}")
            line.delay_s = 0.0
            ending.set()
            writer.join(30)
            transport.close()
            assert {type(error) for error in refused} <= {UnavailableError}
            records = open_place(url)
            assert set(acknowledged) <= {run.id for run in records.find(Run)}
            until(lambda: len(records.events(0, limit=100_000)) >= len(acknowledged), "every event is sealed")
            links = records.links(limit=100_000)
            assert verify(links, head=records.head()).broken is None
            records.close()


# --------------------------------------------------------------------------- a network that is really down

DOWN = """
import subprocess, sys, threading, time
from pathlib import Path
from millrace.client.http import HttpTransport
from millrace.core.errors import MillraceError
from millrace.core.types import Run
from millrace.testing.postgres import PostgresServer, open_place
from millrace.testing.server import RunningServer

def switch(state):
    subprocess.run(["ip", "link", "set", "lo", state], check=True)

switch("up")
acknowledged, ending = [], threading.Event()
with PostgresServer(durable=False) as database:
    url = database.create_database()
    with RunningServer(Path(sys.argv[1]), environment={"MILLRACE_RECORDS_URL": url}) as server:
        transport = HttpTransport(server.url)

        def write():
            while not ending.is_set():
                try:
                    acknowledged.append(transport.call("run.track", {"name": "written"}).id)
                except MillraceError:
                    time.sleep(0.02)

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(2):
            before = len(acknowledged)
            while len(acknowledged) < before + 10:
                time.sleep(0.02)
            switch("down")
            time.sleep(1.5)
            silent = len(acknowledged)
            time.sleep(0.5)
            assert len(acknowledged) == silent, "nothing passes"
            switch("up")
        before = len(acknowledged)
        while len(acknowledged) < before + 10:
            time.sleep(0.02)
        ending.set()
        writer.join()
        transport.close()
    records = open_place(url)
    assert set(acknowledged) <= {run.id for run in records.find(Run)}
    assert len(records.events(0, limit=100_000)) >= len(acknowledged)
    records.close()
print("whole", len(acknowledged))
"""


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
@pytest.mark.skipif(PostgresServer.find() is None, reason="no PostgreSQL server is installed")
def test_a_network_namespace_whose_link_goes_down_and_comes_back(tmp_path: Path) -> None:
    if subprocess.run(["unshare", "-n", "ip", "link"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no network namespaces here")
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", DOWN, str(tmp_path / "home")], capture_output=True, text=True,
        timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("whole")
