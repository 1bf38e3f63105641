"""A host: many models at one address, loaded beside the old ones, each failing alone; ends with its parent."""

from __future__ import annotations

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millrace.formats.bundle import open_bundle
from millrace.serve.hosting import HostConfig, HostedModel, HostProcess, ModelState
from millrace.serve.telemetry import TelemetryFrame
from millrace.store.leases import process_start

ROW = {"instances": [[1.0] * 64]}


class Hosting:
    """A host and what it says."""

    def __init__(self) -> None:
        self.states: queue.Queue[ModelState] = queue.Queue()
        self.frames: queue.Queue[tuple[str, TelemetryFrame]] = queue.Queue()
        self.process = HostProcess(
            HostConfig(telemetry_interval_s=0.1), lambda name, frame: self.frames.put((name, frame)), self.states.put
        )
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
