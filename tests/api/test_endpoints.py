"""Deployed endpoints: what is wanted is served, follows its alias without a failed request, and comes back."""

from __future__ import annotations

import csv
import http.client
import json
import os
import signal
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
from millrace.core.errors import NotFoundError
from millrace.core.types import Endpoint
from millrace.store.leases import process_start
from millrace.testing.graphs import write_scaler
from millrace.testing.server import RunningServer

pytestmark = pytest.mark.xdist_group("endpoints")


def until(check: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Team:
    """A server, a client of it, and what the tests ask of both."""

    def __init__(self, home: Path, *arguments: str) -> None:
        self.home = home
        home.parent.mkdir(parents=True, exist_ok=True)
        self.server = RunningServer(home, arguments=arguments).start()
        self.transport = HttpTransport(self.server.url)

    def close(self) -> None:
        self.transport.close()
        self.server.stop()

    def register(self, name: str, *factors: float) -> None:
        for factor in factors:
            path = write_scaler(self.home.parent / f"{name}-{factor}.onnx", factor)
            self.transport.call("model.register", {"path": str(path), "name": name})

    def deploy(self, model: str, endpoint: str, state: str = "ready", **more: object) -> Endpoint:
        self.transport.call("endpoint.deploy", {"model": model, "endpoint": endpoint, **more})
        return self.expect(endpoint, lambda one: one.state == state, f"{endpoint} is {state}")

    def show(self, endpoint: str) -> Endpoint:
        return self.transport.call("endpoint.get", {"name": endpoint})

    def expect(self, endpoint: str, check: Callable[[Endpoint], bool], what: str, timeout_s: float = 30.0) -> Endpoint:
        seen: list[Endpoint] = []

        def is_so() -> bool:
            seen.append(self.show(endpoint))
            return check(seen[-1])

        try:
            until(is_so, what, timeout_s)
        except AssertionError as error:
            raise AssertionError(f"{what}: {seen[-1]}") from error
        return seen[-1]

    def promote(self, model: str) -> None:
        self.transport.call("model.promote", {"model": model})


def infer(connection: http.client.HTTPConnection, name: str) -> tuple[int, float | str]:
    """The status, and the factor that the model has, or what is wrong."""
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 1.0]}
    connection.request("POST", f"/v2/models/{name}/infer", json.dumps({"inputs": [tensor]}))
    answer = connection.getresponse()
    body = answer.read()
    return answer.status, json.loads(body)["outputs"][0]["data"][0] if answer.status == 200 else body.decode()


def ask(url: str, name: str) -> tuple[int, float | str]:
    """The same on a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        return infer(connection, name)
    finally:
        connection.close()


class Hammer(threading.Thread):
    """A client that asks without a pause; keeps what it got, and how often the line was cut."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(daemon=True)
        self._netloc, self._name = urlsplit(url).netloc, name
        self._stop_asking = threading.Event()
        self.statuses: list[int] = []
        self.factors: list[float | str] = []
        self.cuts = 0

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._netloc, timeout=20)
        while not self._stop_asking.is_set():
            try:
                status, factor = infer(connection, self._name)
            except (OSError, http.client.HTTPException):
                connection.close()
                self.cuts += 1
                time.sleep(0.02)
                continue
            self.statuses.append(status)
            self.factors.append(factor)
        connection.close()

    def finish(self) -> Hammer:
        self._stop_asking.set()
        self.join(30)
        return self


@contextmanager
def hammered(url: str, name: str, clients: int = 2) -> Iterator[list[Hammer]]:
    hammers = [Hammer(url, name) for _ in range(clients)]
    for one in hammers:
        one.start()
    yield hammers
    for one in hammers:
        one.finish()


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A server with one model of three versions, and another one."""
    made = Team(tmp_path_factory.mktemp("endpoints") / "home")
    made.register("scaler", 2.0, 3.0, 5.0)
    made.register("other", 7.0)
    yield made
    made.close()


def test_what_was_answered_is_counted_and_goes_on_after_a_restart(team: Team) -> None:
    one = team.deploy("scaler@1", "counted", isolate=True)
    assert [ask(one.url, "counted")[0] for _ in range(3)] == [200] * 3

    def counted(rows: int) -> Endpoint:
        return team.expect("counted", lambda one: one.facts.get("traffic", {}).get("rows") == rows, f"{rows} rows")

    first = counted(3).facts["traffic"]
    assert first["status_2xx"] == 3
    assert 0 < first["latency_s"] < 60
    assert first["since"] <= first["until"]
    os.kill(one.pid, signal.SIGKILL)
    again = team.expect("counted", lambda found: found.state == "ready" and found.pid != one.pid, "served again")
    assert ask(again.url, "counted")[0] == 200
    assert counted(4).facts["traffic"]["since"] == first["since"]
    page = httpx.get(f"{team.server.url}/endpoints/counted").text
    assert "rows predicted" in page
    assert "No traffic" not in page


def test_many_endpoints_at_one_address_and_one_apart(team: Team) -> None:
    shared = [team.deploy(f"scaler@{number}", f"many-{number}") for number in (1, 2, 3)]
    apart = team.deploy("scaler@2", "apart", isolate=True)
    assert len({one.url for one in shared}) == len({one.pid for one in shared}) == 1
    assert (apart.url, apart.pid) != (shared[0].url, shared[0].pid)
    assert [ask(shared[0].url, one.name)[1] for one in shared] == [2.0, 3.0, 5.0]
    assert ask(apart.url, "apart") == (200, 3.0)
    assert ask(shared[0].url, "apart")[0] == 404
    team.transport.call("endpoint.delete", {"name": "many-2"})
    until(lambda: ask(shared[0].url, "many-2")[0] == 404, "a deleted endpoint is served no longer")
    assert ask(shared[0].url, "many-3") == (200, 5.0)
    team.transport.call("endpoint.delete", {"name": "apart"})
    until(lambda: process_start(apart.pid) is None, "its process has gone with the endpoint")
    with pytest.raises(NotFoundError):
        team.show("apart")


def test_an_endpoint_follows_its_alias_and_no_request_fails(team: Team) -> None:
    team.promote("scaler@1")
    endpoint = team.deploy("scaler@champion", "followed")
    with hammered(endpoint.url, "followed") as hammers:
        for number in (2, 3, 1, 3, 2, 1):
            team.promote(f"scaler@{number}")
            team.expect("followed", lambda one, n=number: (one.number, one.state) == (n, "ready"), "it follows")
    for one in hammers:
        assert set(one.statuses) == {200}
        assert one.cuts == 0
        assert set(one.factors) == {2.0, 3.0, 5.0}


def test_deployed_anew_with_another_model_of_the_same_number(team: Team) -> None:
    first = team.deploy("scaler@1", "changed")
    with hammered(first.url, "changed") as hammers:
        second = team.deploy("other@1", "changed")
        until(lambda: ask(second.url, "changed") == (200, 7.0), "the new model answers")
    assert {status for one in hammers for status in one.statuses} == {200}
    assert (second.model, second.url) == ("other", first.url)


def test_a_corrupt_version_is_said_and_the_one_before_is_served_on(team: Team) -> None:
    team.register("fragile", 2.0)
    endpoint = team.deploy("fragile@champion", "fragile")
    team.deploy("other@1", "beside")
    team.transport.call("model.register", {"path": str(write_scaler(team.home.parent / "f.onnx", 9.0)),
                                           "name": "fragile", "alias": None})  # fmt: skip
    version = team.transport.call("model.get", {"model": "fragile@2"}).version
    entries = team.transport.call("tree.get", {"digest": version.bundle.digest})
    digest = next(entry.digest for entry in entries if entry.path == "model.onnx").partition(":")[2]
    (blob,) = [path for path in (team.home / "blobs").rglob("*") if path.is_file() and digest[2:] in path.name]
    blob.chmod(0o644)
    blob.write_bytes(b"\x00" * blob.stat().st_size)
    team.promote("fragile@2")
    failed = team.expect("fragile", lambda one: one.state == "failed", "the corrupt version fails")
    assert digest[:12] in failed.text
    assert "fragile v1 is still served" in failed.text
    assert ask(endpoint.url, "fragile") == (200, 2.0)
    assert (team.show("beside").state, ask(endpoint.url, "beside")) == ("ready", (200, 7.0))
    team.promote("fragile@1")
    team.expect("fragile", lambda one: (one.state, one.text) == ("ready", ""), "back at a version that is whole")


def test_a_deleted_version_fails_its_own_endpoint(team: Team) -> None:
    team.register("doomed", 4.0)
    endpoint = team.deploy("doomed@1", "doomed")
    team.deploy("other@1", "survivor")
    team.transport.call("model.delete", {"name": "doomed"})
    failed = team.expect("doomed", lambda one: one.state == "failed", "what is deleted is not served")
    assert "no model 'doomed'" in failed.text
    until(lambda: ask(endpoint.url, "doomed")[0] == 404, "and no longer answers")
    assert ask(endpoint.url, "survivor") == (200, 7.0)


def test_a_child_that_keeps_dying_is_started_ever_later_and_it_is_said(team: Team) -> None:
    team.deploy("other@1", "steady")
    endpoint = team.deploy("scaler@1", "dying", isolate=True)
    texts = set()
    deadline = time.monotonic() + 60
    while endpoint.state != "failed":
        assert time.monotonic() < deadline, texts
        if endpoint.pid is not None and Path(f"/proc/{endpoint.pid}").exists():
            os.kill(endpoint.pid, signal.SIGKILL)
        endpoint = team.show("dying")
        texts.add(endpoint.text)
        time.sleep(0.02)
    assert "the serving process died; it is started again" in texts
    assert "died 5 times in a row" in endpoint.text
    steady = team.show("steady")
    assert (steady.state, ask(steady.url, "steady")) == ("ready", (200, 7.0))
    again = team.deploy("scaler@2", "dying", isolate=True)  # somebody mends it: at once
    assert ask(again.url, "dying") == (200, 3.0)


def test_a_killed_leader_is_replaced_and_serves_at_the_same_address(team: Team) -> None:
    before = team.deploy("scaler@1", "kept")
    leader = team.server.children()["loop"]
    with hammered(before.url, "kept", clients=1) as hammers:
        time.sleep(0.3)
        os.kill(leader, signal.SIGKILL)
        after = team.expect(
            "kept", lambda one: one.state == "ready" and one.pid != before.pid, "it is served again"
        )  # fmt: skip
        until(lambda: ask(after.url, "kept") == (200, 2.0), "and answers")
        time.sleep(0.2)
    assert after.url == before.url
    assert set(hammers[0].statuses) <= {200, 503}
    until(lambda: process_start(before.pid) is None, "the process of the dead leader has drained")


def test_a_stopped_server_drains_says_so_and_serves_again_at_the_same_address(tmp_path: Path) -> None:
    team = Team(tmp_path / "home")
    try:
        team.register("scaler", 2.0)
        before = team.deploy("scaler@1", "kept")
        with hammered(before.url, "kept") as hammers:
            time.sleep(0.3)
            assert team.server.stop() == 0
            seen = [len(one.statuses) for one in hammers]
        assert min(seen) > 10
        assert {status for one in hammers for status in one.statuses} <= {200, 503}
        assert not Path(f"/proc/{before.pid}").exists()
        shown = subprocess.run(
            [sys.executable, "-m", "millrace", "--home", str(team.home), "endpoints", "show", "kept", "--json"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        stopped = json.loads(shown.stdout)
        assert (stopped["state"], stopped["text"]) == ("stopped", "the server was stopped")
        team.transport.close()
        team.server.start()
        team.transport = HttpTransport(team.server.url)
        after = team.expect("kept", lambda one: one.state == "ready", "it is served again")
        assert after.url == before.url
        assert ask(after.url, "kept") == (200, 2.0)
    finally:
        team.close()


def test_inverted_digits_at_an_endpoint_raise_an_alert(tmp_path: Path) -> None:
    team = Team(tmp_path / "work" / ".millrace")
    try:
        folder = tmp_path / "work"
        for arguments in (("init", "digits", "."), ("run", "--set", "train.epochs=1")):
            done = subprocess.run(
                [sys.executable, "-m", "millrace", *arguments], cwd=folder, capture_output=True, text=True, timeout=90,
                check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
        endpoint = team.deploy("digits@champion", "digits")
        with (folder / "digits.csv").open() as file:
            rows = [[row[f"p{pixel:02}"] for pixel in range(64)] for row in csv.DictReader(file)]
        images = [[float(value) for value in row] for row in rows if all(value.isdigit() for value in row)]
        connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=20)
        for start in range(0, 1000, 50):
            inverted = [[16.0 - value for value in image] for image in images[start : start + 50]]
            connection.request("POST", "/v1/models/digits:predict", json.dumps({"instances": inverted}))
            answer = connection.getresponse()
            assert answer.status == 200, answer.read()
            answer.read()
        connection.close()
        until(lambda: team.transport.call("alert.list", {"state": "open"}), "the drift is seen")
        (alert,) = team.transport.call("alert.list", {"state": "open"})
        assert (alert.endpoint, alert.model, alert.number) == ("digits", "digits", 1)
        assert alert.score > alert.threshold
        shown = subprocess.run(
            [sys.executable, "-m", "millrace", "alerts"], cwd=folder, capture_output=True, text=True, check=True
        )
        assert "digits" in shown.stdout
    finally:
        team.close()
