"""A host: many models at one address, loaded beside the old ones, each failing alone; ends with its parent."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from millrace.formats.bundle import open_bundle
from millrace.serve.hosting import HostConfig, HostedModel, HostProcess, ModelState
from millrace.serve.service import HttpLimits
from millrace.serve.telemetry import TelemetryFrame
from millrace.store.leases import process_start

ROW = {"instances": [[1.0] * 64]}


class Hosting:
    """A host and what it says."""

    def __init__(self, **place: Any) -> None:
        self.states: queue.Queue[ModelState] = queue.Queue()
        self.frames: queue.Queue[tuple[str, TelemetryFrame]] = queue.Queue()
        self.process = HostProcess(
            HostConfig(telemetry_interval_s=0.1, **place), lambda name, frame: self.frames.put((name, frame)),
            self.states.put,
        )  # fmt: skip
        self.port = self.process.wait_ready()

    def apply(self, *models: HostedModel) -> dict[str, ModelState]:
        """What became of each."""
        self.process.apply(models)
        told = [self.states.get(timeout=30) for _ in models]
        return {state.endpoint: state for state in told}

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers or {})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), dict(answer.headers)
        finally:
            connection.close()


@pytest.fixture
def hosting() -> Iterator[Hosting]:
    made = Hosting()
    yield made
    assert made.process.stop() == 0


def model_of(bundle: Path, endpoint: str, **changes: Any) -> HostedModel:
    opened = open_bundle(bundle, signature=None, verifier=None, expected_digest=None)
    model = HostedModel(
        endpoint=endpoint, bundle_dir=str(bundle), digest=opened.digest, version="1", variant="fp32",
        reference=opened.reference or None,
    )  # fmt: skip
    return msgspec.structs.replace(model, **changes)


def test_nobodys_model_is_unknown_before_the_host_is_told(hosting: Hosting) -> None:
    status, answer, headers = hosting.call("POST", "/v1/models/digits:predict", ROW)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert "just starting" in answer["error"]
    assert hosting.call("GET", "/v2/health/ready")[0] == 503
    assert hosting.call("GET", "/v2/health/live")[0] == 200
    hosting.process.apply([])
    deadline = time.monotonic() + 10
    while hosting.call("GET", "/v2/health/ready")[0] != 200:
        assert time.monotonic() < deadline
    assert hosting.call("POST", "/v1/models/digits:predict", ROW)[0] == 404


def test_models_come_change_and_go(hosting: Hosting, digits_bundle: Path) -> None:
    one, two = model_of(digits_bundle, "one"), model_of(digits_bundle, "two", version="7")
    assert all(state.error is None for state in hosting.apply(one, two).values())
    assert hosting.call("GET", "/v1/models")[1] == {"models": ["one", "two"]}
    assert hosting.call("GET", "/v2/models/two")[1]["versions"] == ["7"]
    assert hosting.call("POST", "/v1/models/one:predict", ROW)[0] == 200
    name, frame = hosting.frames.get(timeout=10)
    while not frame.rows:  # a frame may come between a request's status and its row
        name, frame = hosting.frames.get(timeout=10)
    assert (name, frame.rows) == ("one", 1)
    assert hosting.apply(msgspec.structs.replace(two, version="8"))["two"].version == "8"
    assert hosting.call("GET", "/v2/models/two")[1]["versions"] == ["8"]
    assert hosting.call("POST", "/v1/models/one:predict", ROW)[0] == 404


def test_a_model_that_cannot_be_loaded_fails_alone_and_says_why(hosting: Hosting, digits_bundle: Path) -> None:
    good, bad = model_of(digits_bundle, "good"), model_of(digits_bundle, "bad", digest="sha256:" + "0" * 64)
    states = hosting.apply(bad, good)
    assert states["good"].error is None
    assert states["bad"].error is not None
    status, answer, headers = hosting.call("POST", "/v1/models/bad:predict", ROW)
    assert (status, headers["Retry-After"]) == (503, "1")
    assert states["bad"].error["message"] in answer["error"]
    assert hosting.call("POST", "/v1/models/good:predict", ROW)[0] == 200
    assert hosting.call("GET", "/v2/health/ready")[0] == 200
    # What cannot be loaded does not take the place of what is served.
    assert hosting.apply(msgspec.structs.replace(good, version="2", digest=bad.digest))["good"].error is not None
    assert hosting.call("GET", "/v2/models/good")[1]["versions"] == ["1"]
    assert hosting.call("POST", "/v1/models/bad:predict", ROW)[0] == 404


def answers(client: ssl.SSLSocket, requests: bytes, count: int) -> list[bytes]:
    """The status of each answer; none where the server hangs up."""
    data = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        client.sendall(requests)
        while data.count(b"HTTP/1.1 ") < count and (more := client.recv(1 << 16)):
            data += more
    return [part.split()[0] for part in data.split(b"HTTP/1.1 ")[1:]]


def test_certificates_of_clients_their_rate_and_the_bound_of_queues(tmp_path: Path, digits_bundle: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    for name in ("localhost", "lee"):
        authority.issue_cert(name, common_name=name).private_key_and_cert_chain_pem.write_to_path(
            str(tmp_path / f"{name}.pem")
        )
    hosting = Hosting(
        tls_cert=str(tmp_path / "localhost.pem"), tls_client_ca=str(tmp_path / "ca.pem"), queue_s=1e-9,
        limits=HttpLimits(client_rate=0.01, client_burst=2), access_log=str(tmp_path / "access.jsonl"),
    )  # fmt: skip
    assert hosting.apply(model_of(digits_bundle, "one"))["one"].error is None
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    body = json.dumps(ROW).encode()
    request = (
        b"POST /v1/models/one:predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    raw = partial(socket.create_connection, ("127.0.0.1", hosting.port), timeout=10)
    try:
        with context.wrap_socket(raw(), server_hostname="localhost") as nobody:
            assert answers(nobody, request, 1) == []
        context.load_cert_chain(str(tmp_path / "lee.pem"))
        with context.wrap_socket(raw(), server_hostname="localhost") as lee:
            statuses = [answers(lee, request * 3, 3), answers(lee, request, 1), answers(lee, request, 1)]
    finally:
        assert hosting.process.stop() == 0
    assert statuses == [[b"200", b"503", b"503"], [b"200"], [b"429"]]  # two would wait; the third is one too many
    lines = [json.loads(line) for line in (tmp_path / "access.jsonl").read_text().splitlines()]
    assert [line["client"].partition(",")[0] for line in lines] == ["CN=lee"] * 5


PARENT = """
import sys, time
from millrace.serve.hosting import HostConfig, HostProcess
process = HostProcess(HostConfig(), lambda *_: None, lambda *_: None)
print(process.wait_ready(), process.pid, flush=True)
time.sleep(60)
"""


def test_a_host_ends_with_its_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    _, pid = map(int, parent.stdout.readline().split())
    assert process_start(pid) is not None
    os.kill(parent.pid, signal.SIGKILL)
    parent.communicate()
    deadline = time.monotonic() + 20
    while process_start(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_revisions_share_requests_by_key_and_a_switch_under_load_drops_none(
    hosting: Hosting, digits_bundle: Path
) -> None:
    first = model_of(digits_bundle, "digits")
    second = msgspec.structs.replace(first, version="2")

    def answered_by(key: str) -> str:
        body = {"inputs": [{"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": [1.0] * 64}]}
        status, found, _ = hosting.call("POST", "/v2/models/digits/infer", body, {"X-Routing-Key": key})
        assert status == 200, found
        return found["model_version"]

    hosting.apply(first, second)
    found = {key: answered_by(key) for key in map(str, range(60))}
    assert {*found.values()} == {"1", "2"}
    assert found == {key: answered_by(key) for key in found}
    assert hosting.call("GET", "/v2/models/digits")[1]["versions"] == ["1", "2"]
    assert hosting.call("GET", "/v2/models/digits/versions/2/ready")[0] == 200
    stats = hosting.call("GET", "/v2/models/digits/stats")[1]["model_stats"]
    assert {one["version"]: one["inference_count"] > 0 for one in stats} == {"1": True, "2": True}

    seen: set[str] = set()
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            seen.add(answered_by("x"))

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(load) for _ in range(4)]
        for number in range(3, 8):
            hosting.apply(msgspec.structs.replace(first, version=str(number)))
        stop.set()
        for caller in callers:
            caller.result()
    assert answered_by("x") == "7"
    assert len(seen) >= 3
