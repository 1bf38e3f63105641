"""`millrace up`: start, stop, what dies comes back, nothing acknowledged is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
import trustme

from millrace.client.http import HttpTransport
from millrace.core import server_file
from millrace.core.errors import MillraceError
from millrace.testing.server import RunningServer
from millrace.wiring import open_transport


@contextmanager
def talking_to(server: RunningServer) -> Iterator[HttpTransport]:
    transport = HttpTransport(server.url)
    yield transport
    transport.close()


pytestmark = pytest.mark.xdist_group("up")


def run_command(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "millrace", "--home", str(home), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def until(check: object, what: str, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def has_other_children(server: RunningServer, before: set[int]) -> bool:
    now = set(server.children().values())
    return len(now) == len(before) and now != before


def test_commands_find_the_server_and_the_home_is_whole_after_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with RunningServer(home) as server:
        found = open_transport(str(home))
        assert isinstance(found, HttpTransport)
        assert found.url == server.url
        run = found.call("run.track", {"name": "kept"})
        found.close()
        assert "kept" in run_command(home, "runs").stdout
    assert server_file.read(home) is None
    assert run_command(home, "runs", "show", run.id).returncode == 0
    embedded = open_transport(str(home))
    assert [event.verb for event in embedded.call("event.list", {})] == ["run.track"]
    embedded.close()


def test_a_second_server_on_the_home_is_told_who_holds_it(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "home") as server:
        refused = run_command(tmp_path / "home", "up", "--port", "0")
        assert refused.returncode == 4
        assert f"process {server.pid} at {server.url}" in refused.stderr
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert server_file.read(tmp_path / "home") is not None


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1"])
def test_what_others_can_reach_wants_a_certificate(tmp_path: Path, host: str) -> None:
    refused = run_command(tmp_path / "home", "up", "--port", "0", "--host", host)
    assert refused.returncode == 6
    assert "tokens must not travel in the open" in refused.stderr
    assert not (tmp_path / "home").exists(), "a refusal leaves nothing"


def test_a_certificate_that_does_not_work_is_refused(tmp_path: Path) -> None:
    one, other = (trustme.CA().issue_cert("localhost") for _ in range(2))
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    one.cert_chain_pems[0].write_to_path(certificate)
    other.private_key_pem.write_to_path(key)
    for arguments in (("--tls-cert", certificate, "--tls-key", key), ("--tls-cert", str(tmp_path / "none.pem"))):
        refused = run_command(tmp_path / "home", "up", "--port", "0", *arguments)
        assert refused.returncode == 2
        assert "cannot be used" in refused.stderr
    other.private_key_and_cert_chain_pem.write_to_path(certificate)
    refused = run_command(tmp_path / "home", "up", "--port", "0", "--host", "0.0.0.0", "--tls-cert", certificate)
    assert refused.returncode == 2
    assert "which name do clients use" in refused.stderr


def test_a_busy_port_is_named(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "one") as server:
        port = server.url.rpartition(":")[2]
        refused = run_command(tmp_path / "two", "up", "--port", port)
        assert refused.returncode == 10
        assert f"port {port}" in refused.stderr


def test_what_keeps_a_server_from_starting_keeps_its_exit_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By it the unit of systemd knows that trying again does not help."""
    trustme.CA().issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "one.pem"))
    (tmp_path / "password").write_text("short")
    monkeypatch.setenv("MILLRACE_OWNER_PASSWORD_FILE", str(tmp_path / "password"))
    reached = ("--host", "0.0.0.0", "--name", "localhost", "--tls-cert", str(tmp_path / "one.pem"))
    refused = run_command(tmp_path / "home", "up", "--port", "0", *reached)
    assert refused.returncode == 2
    assert "owner_password_file" in refused.stderr


@pytest.mark.parametrize("role", ["loop", "api 0"])
def test_what_is_killed_comes_back_and_keeps_every_acknowledged_write(tmp_path: Path, role: str) -> None:
    with RunningServer(tmp_path / "home", workers=2) as server, talking_to(server) as transport:
        acknowledged: list[str] = []
        stopping = threading.Event()

        def write() -> None:
            while not stopping.is_set():
                try:
                    acknowledged.append(transport.call("run.track", {"name": "written"}).id)
                except MillraceError:
                    continue  # not acknowledged: the process died with it

        writer = threading.Thread(target=write)
        writer.start()
        for _ in range(2):
            time.sleep(0.3)
            before = server.children()
            os.kill(before[role], signal.SIGKILL)
            until(partial(has_other_children, server, set(before.values())), "the child came back")
        time.sleep(0.3)
        stopping.set()
        writer.join()
        kept = {run.id for run in transport.call("run.list", {"limit": 100_000})}
        assert len(acknowledged) > 20
        assert set(acknowledged) <= kept
        until(lambda: len(transport.call("event.list", {"limit": 1000, "since": 0})) >= min(len(acknowledged), 1000),
              "every write has its sealed event")  # fmt: skip


def test_a_killed_server_leaves_nothing_and_starts_again(tmp_path: Path) -> None:
    home = tmp_path / "home"
    server = RunningServer(home).start()
    with talking_to(server) as transport:
        run = transport.call("run.track", {"name": "before"})
    children = list(server.children().values())
    server.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "its children end with it")
    embedded = open_transport(str(home))  # server.json names a dead process
    assert not isinstance(embedded, HttpTransport)
    assert [one.id for one in embedded.call("run.list", {})] == [run.id]
    embedded.close()
    with RunningServer(home) as again, talking_to(again) as transport:
        assert [one.id for one in transport.call("run.list", {})] == [run.id]


def test_a_corrupt_server_file_is_no_server(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / server_file.NAME).write_bytes(b"\x00{not json")
    assert run_command(home, "runs").returncode == 0
    with RunningServer(home) as server:
        assert server_file.read(home) is not None
        assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_the_url_may_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with RunningServer(tmp_path / "home") as server, talking_to(server) as transport:
        transport.call("run.track", {"name": "far"})
        monkeypatch.setenv("MILLRACE_URL", server.url)
        assert "far" in run_command(tmp_path / "elsewhere", "runs").stdout
    refused = run_command(tmp_path / "elsewhere", "runs")
    assert refused.returncode == 10
    assert "cannot be reached" in refused.stderr
