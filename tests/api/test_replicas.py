"""Replicas: killed and drained ones under load, as many as load needs, none while nobody asks."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import onnx
import pytest
from onnx import TensorProto, helper

from millrace.api.supervisor import UpConfig, check_tls
from millrace.cli.render import render_endpoints
from millrace.client.http import HttpTransport
from millrace.core.errors import InputError, MillraceError
from millrace.core.types import Endpoint
from millrace.store.leases import process_start
from millrace.testing.graphs import write_scaler
from millrace.testing.server import RunningServer

pytestmark = pytest.mark.xdist_group("replicas")
EAGER = {
    "MILLRACE_SCALE_TO_ZERO_S": "1.0", "MILLRACE_SCALE_DOWN_S": "1.0", "MILLRACE_SCALE_WINDOW_S": "0.5",
    "MILLRACE_SCALE_IN_FLIGHT": "2",
}  # fmt: skip
BODY = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 1.0]}]})


def write_slow_scaler(path: Path, factor: float, rounds: int = 10_000) -> Path:
    """y = x * factor, and a loop besides that takes some 10 ms a call."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["still"]),
            helper.make_node("Add", ["sum_in", "one"], ["sum_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("round", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_in", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum_out", TensorProto.FLOAT, [1]),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["rounds", "", "zero"], ["sum"], body=body),
            helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
            helper.make_node("Mul", ["x", "factor"], ["scaled"]),
            helper.make_node("Add", ["scaled", "nothing"], ["y"]),
        ],
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 2])],
        [
            helper.make_tensor("rounds", TensorProto.INT64, [], [rounds]),
            helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]),
            helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
            helper.make_tensor("factor", TensorProto.FLOAT, [1], [factor]),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


class Team:
    """A server whose endpoints follow their load within seconds, and a client of it."""

    def __init__(self, home: Path) -> None:
        self.server = RunningServer(home, environment=EAGER, arguments=("--serving-processes", "2")).start()
        self.transport = HttpTransport(self.server.url)
        for factor in (2.0, 3.0):
            path = write_scaler(home.parent / f"scaler-{factor}.onnx", factor)
            self.transport.call("model.register", {"path": str(path), "name": "scaler"})
        path = write_slow_scaler(home.parent / "slow.onnx", 5.0)
        self.transport.call("model.register", {"path": str(path), "name": "slow"})

    def close(self) -> None:
        self.transport.close()
        assert self.server.stop() == 0

    def deploy(self, model: str, endpoint: str, **more: object) -> Endpoint:
        self.transport.call("endpoint.deploy", {"model": model, "endpoint": endpoint, **more})
        return self.expect(endpoint, lambda one: one.state == "ready" and one.replicas > 0, "it is served")

    def expect(self, endpoint: str, check: Callable[[Endpoint], bool], what: str) -> Endpoint:
        deadline = time.monotonic() + 30
        while not check(one := self.transport.call("endpoint.get", {"name": endpoint})):
            assert time.monotonic() < deadline, f"{what}: {one}"
            time.sleep(0.02)
        return one


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    made = Team(tmp_path_factory.mktemp("replicas") / "home")
    yield made
    made.close()


@pytest.fixture
def pair(team: Team) -> Endpoint:
    """An endpoint with two replicas."""
    team.deploy("scaler@1", "pair", min_replicas=2)
    return team.expect("pair", lambda one: one.replicas == 2, "both serve")


def ask(url: str, name: str) -> tuple[int, float]:
    """The status, and the factor of the model that answered, on a connection of its own."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    try:
        connection.request("POST", f"/v2/models/{name}/infer", BODY)
        answer = connection.getresponse()
        document = json.loads(answer.read())
        return answer.status, document["outputs"][0]["data"][0] if answer.status == 200 else 0.0
    finally:
        connection.close()


class Clients:
    """Threads that ask on ever new connections; what they got, and when those asked who were cut off."""

    def __init__(self, url: str, name: str) -> None:
        self.found: Counter[tuple[int, float]] = Counter()
        self.cut_s: list[float] = []
        self._url, self._name = url, name
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.004):  # the processes under test need the cores too
            began_s = time.monotonic()
            try:
                self.found[ask(self._url, self._name)] += 1
            except (OSError, http.client.HTTPException):
                self.cut_s.append(began_s)

    def until(self, count: int) -> None:
        deadline = time.monotonic() + 30
        while self.found.total() < count:
            assert time.monotonic() < deadline, self.found
            time.sleep(0.01)


@contextmanager
def load(url: str, name: str, threads: int = 3) -> Iterator[Clients]:
    clients = Clients(url, name)
    running = [threading.Thread(target=clients.run) for _ in range(threads)]
    for one in running:
        one.start()
    try:
        yield clients
    finally:
        clients.stop.set()
        for one in running:
            one.join()


def test_a_killed_replica_under_load_costs_what_it_had_taken_and_comes_back(team: Team, pair: Endpoint) -> None:
    with load(pair.url, "pair") as clients:
        clients.until(50)
        killed_s = time.monotonic()
        os.kill(pair.pid, signal.SIGKILL)
        after = team.expect("pair", lambda one: one.replicas == 2 and one.pid != pair.pid, "both serve again")
        back_s = time.monotonic() - killed_s
        clients.until(clients.found.total() + 100)
    assert set(clients.found) == {(200, 2.0)}
    assert all(at < killed_s + 0.2 for at in clients.cut_s), "asked after the kill, and cut off"
    assert len(clients.cut_s) <= 3  # no more than one for each client
    assert back_s < 5.0  # under one second where there is nothing else to do
    assert (after.state, after.text, after.url) == ("ready", "", pair.url)


def test_all_replicas_follow_what_is_deployed(team: Team, pair: Endpoint) -> None:
    with load(pair.url, "pair", threads=2) as clients:
        clients.until(20)
        team.deploy("scaler@2", "pair", min_replicas=2)
        deadline = time.monotonic() + 20
        while {ask(pair.url, "pair") for _ in range(30)} != {(200, 3.0)}:
            assert time.monotonic() < deadline
    assert {status for status, _ in clients.found} == {200}
    assert not clients.cut_s


def test_a_replica_that_is_told_to_end_loses_nothing_and_so_does_one_too_many(team: Team, pair: Endpoint) -> None:
    with load(pair.url, "pair") as clients:
        clients.until(30)
        os.kill(pair.pid, signal.SIGTERM)
        team.expect("pair", lambda one: one.replicas == 2 and one.pid != pair.pid, "another one serves")
        clients.until(300)
        team.deploy("scaler@1", "pair", isolate=True)
        one = team.expect("pair", lambda one: one.replicas == 1, "one is too many")
        clients.until(clients.found.total() + 100)
    assert (set(clients.found), clients.cut_s) == ({(200, 2.0)}, [])
    assert one.url == pair.url
    assert process_start(pair.pid) is None


def test_as_many_as_the_load_needs_and_none_without_any(team: Team, capsys: pytest.CaptureFixture[str]) -> None:
    one = team.deploy("slow", "waves", min_replicas=0, max_replicas=2)
    with load(one.url, "waves", threads=6) as clients:
        two = team.expect("waves", lambda one: one.replicas == 2, "there are more")
        assert two.url == one.url
    assert set(clients.found) == {(200, 5.0)}
    assert not clients.cut_s
    none = team.expect("waves", lambda one: one.replicas == 0, "there is none")
    assert (none.state, none.pid, none.url) == ("ready", None, one.url)
    assert "the next request starts one" in none.text
    render_endpoints([none])
    assert "0/0..2" in capsys.readouterr().out
    assert "0 of 0..2" in httpx.get(f"{team.server.url}/endpoints/waves").text
    changed = team.deploy("scaler@2", "waves", min_replicas=0)  # loaded, to see whether it can be
    assert (changed.number, changed.state, changed.url) == (2, "ready", one.url)
    team.expect("waves", lambda one: one.replicas == 0, "there is none again")
    held: list[tuple[int, float]] = []
    threads = [threading.Thread(target=lambda: held.append(ask(one.url, "waves"))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held == [(200, 3.0)] * 5
    again = team.expect("waves", lambda one: one.replicas == 1, "one serves")
    assert (again.state, again.text) == ("ready", "")
    team.transport.call("endpoint.delete", {"name": "waves"})
    deadline = time.monotonic() + 20
    while True:  # it listens no more
        try:
            socket.create_connection(("127.0.0.1", urlsplit(one.url).port or 0), timeout=5).close()
        except ConnectionRefusedError:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_shared_group_has_several_processes_too(team: Team) -> None:
    first = team.deploy("scaler@1", "shared")
    second = team.deploy("scaler@2", "beside")
    assert first.url == second.url
    team.expect("shared", lambda one: one.replicas == 2, "both serve it")
    team.expect("beside", lambda one: one.replicas == 2, "both serve it")
    assert [ask(first.url, "shared") for _ in range(20)] == [(200, 2.0)] * 20
    text = httpx.get(f"{first.url}/metrics").text
    rows = [line for line in text.splitlines() if line.startswith('millrace_rows_total{model="shared"')]
    assert sum(float(line.split()[-1]) for line in rows) == 20
    with load(first.url, "beside", threads=2) as clients:
        clients.until(20)
        os.kill(first.pid, signal.SIGKILL)
        team.expect("beside", lambda one: one.replicas == 2 and one.pid != first.pid, "both serve again")
    assert set(clients.found) == {(200, 3.0)}


@pytest.mark.parametrize(
    ("least", "most", "why"),
    [(3, 2, "want the least not above the most, got 3..2"), (65, None, "min_replicas"), (0, 0, "max_replicas")],
)
def test_what_makes_no_sense_is_refused(team: Team, least: int, most: int | None, why: str) -> None:
    body = {"model": "scaler@1", "endpoint": "odd", "min_replicas": least, "max_replicas": most}
    with pytest.raises(MillraceError, match=why) as caught:
        team.transport.call("endpoint.deploy", body)
    assert isinstance(caught.value, InputError)


def test_grpc_wants_one_process_at_its_port() -> None:
    with pytest.raises(InputError, match="gRPC wants one serving process, got 2"):
        check_tls(UpConfig(home="", serving_processes=2, grpc_port=7072))
