"""Several processes at one port: shared out, added up, started again, drained."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import msgspec
import pytest

from millrace.core.errors import UnavailableError
from millrace.serve.processes import wait_before

PATH = "/v1/models/digits:predict"
BODY = json.dumps({"instances": [[1.0] * 64]}).encode()


def members_of(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def predict(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", PATH, BODY)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    finally:
        connection.close()


def open_group(bundle: Path, kit: ModuleType, **server: Any) -> Any:
    return kit.Live(msgspec.structs.replace(kit.child_config(bundle, tune_s=0.0, **server), processes=2))


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        return holder.getsockname()[1]


@pytest.fixture(scope="module")
def group(digits_bundle: Path, kit: ModuleType) -> Iterator[Any]:
    live = open_group(digits_bundle, kit, grpc_port=free_port())
    yield live
    assert live.process.stop() == 0


def test_both_take_connections_and_the_parent_counts_each_request_once(group: Any) -> None:
    first = len(group.frames)
    assert [predict(group.port) for _ in range(60)] == [200] * 60
    deadline = time.monotonic() + 10
    while True:
        frames = group.frames[first:]
        if (rows := sum(frame.counters.get("rows", 0) for frame in frames)) >= 60 or time.monotonic() > deadline:
            break
        time.sleep(0.05)
    assert rows == 60
    assert len(members_of(group.process.pid)) == 2
    assert len([frame for frame in frames if frame.counters.get("rows", 0)]) >= 2


def test_where_grpc_is_answered_is_told(group: Any) -> None:
    assert group.process.grpc_port > 0
    with grpc.insecure_channel(f"127.0.0.1:{group.process.grpc_port}") as channel:
        live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")(b"", timeout=10)
    assert live == b"\x08\x01"


def test_metrics_and_statistics_are_of_all_processes(group: Any) -> None:
    def counted() -> tuple[float, int]:
        _, text = group.call("GET", "/metrics")
        rows = next(line for line in text.splitlines() if line.startswith("millrace_rows_total"))
        return float(rows.split()[-1]), group.call("GET", "/v2/models/digits/stats")[1]["model_stats"][0][
            "inference_count"
        ]

    before = counted()
    assert [predict(group.port) for _ in range(40)] == [200] * 40
    assert {counted() for _ in range(6)} == {(before[0] + 40, before[1] + 40)}


def test_sigterm_of_one_loses_nothing(group: Any) -> None:
    before = members_of(group.process.pid)
    found: Counter[int] = Counter()

    def ask() -> None:
        for _ in range(100):
            found[predict(group.port)] += 1

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:
        client.start()
    os.kill(before[0], signal.SIGTERM)
    for client in clients:
        client.join()
    assert found == {200: 300}
    until_all_serve(group)
    assert before[0] not in members_of(group.process.pid)
    _, text = group.call("GET", "/metrics")  # what the one that is gone had answered counts on
    rows = next(line for line in text.splitlines() if line.startswith("millrace_rows_total"))
    assert float(rows.split()[-1]) >= 300


def test_without_descriptors_it_waits_and_takes_connections_again(group: Any) -> None:
    pids = members_of(group.process.pid)
    before = [resource.prlimit(pid, resource.RLIMIT_NOFILE) for pid in pids]
    for pid in pids:
        room = len(list(Path(f"/proc/{pid}/fd").iterdir())) + 5
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (room, before[0][1]))
    many = [socket.create_connection(("127.0.0.1", group.port)) for _ in range(40)]
    used = [cpu_s(pid) for pid in pids]
    time.sleep(0.5)
    assert max(cpu_s(pid) - start for pid, start in zip(pids, used, strict=True)) < 0.3
    for client in many:
        client.close()
    assert predict(group.port) == 200
    for pid, limits in zip(pids, before, strict=True):
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_kill_of_one_under_load(group: Any) -> None:
    found: Counter[str] = Counter()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            try:
                found[str(predict(group.port))] += 1
            except (OSError, http.client.HTTPException):
                found["cut"] += 1  # its process died with its connection

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    before = members_of(group.process.pid)
    os.kill(before[0], signal.SIGKILL)
    time.sleep(0.1)
    found.clear()  # whoever was on it has been cut by now: from here on nobody may be
    until_all_serve(group)
    stop.set()
    for client in clients:
        client.join()
    assert before[0] not in members_of(group.process.pid)
    assert set(found) == {"200"}, found


def until_all_serve(group: Any) -> None:
    """Until the two processes of a group, and no other, add up their metrics."""
    deadline = time.monotonic() + 15
    while True:
        _, text = group.call("GET", "/metrics")
        limit = next(line for line in text.splitlines() if line.startswith("millrace_queue_limit"))
        if float(limit.split()[-1]) == 2 * 1024 and len(members_of(group.process.pid)) == 2:
            return
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_sigterm_under_hundreds_of_new_connections_loses_none(digits_bundle: Path, kit: ModuleType) -> None:
    live = open_group(digits_bundle, kit)
    request = b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (
        PATH.encode(), len(BODY), BODY,
    )  # fmt: skip
    clients = []
    for number in range(400):
        client = socket.create_connection(("127.0.0.1", live.port), timeout=20)
        client.sendall(request)
        clients.append(client)
        if number == 300:
            os.kill(live.process.pid, signal.SIGTERM)
            break
    answers = []
    for client in clients:
        with client:
            answers.append(client.makefile("rb").readline()[:12])
    assert set(answers) == {b"HTTP/1.1 200"}, Counter(answers)
    assert live.process.wait(20) == 0


def test_ends_with_its_parent_and_never_outlives_it(digits_bundle: Path, kit: ModuleType) -> None:
    live = open_group(digits_bundle, kit)
    members = members_of(live.process.pid)
    live.process.kill()
    live.process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in members) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in members if Path(f"/proc/{pid}").exists()]


def test_a_busy_port_is_refused(digits_bundle: Path, kit: ModuleType) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(UnavailableError, match="is busy"):
        kit.Live(msgspec.structs.replace(kit.child_config(digits_bundle, port=other.getsockname()[1]), processes=2))


def test_who_dies_again_and_again_waits_longer() -> None:
    waits = [wait_before(crashes) for crashes in range(1, 20)]
    assert waits == sorted(waits)
    assert (waits[0], waits[-1]) == (0.0, 10.0)
