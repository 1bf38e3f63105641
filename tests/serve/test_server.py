"""The server as a process: ready, drain, overload, ports, correctness under concurrency."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from millrace.core.addresses import loopback_address
from millrace.core.errors import CorruptError, InputError, MillraceError, NotFoundError, StageError, UnavailableError
from millrace.core.errors import from_dict as error_from
from millrace.formats.session import open_session
from millrace.serve.child import ChildConfig
from millrace.serve.listen import bind, holder_of
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig

FAKE = Path(__file__).with_name("runtimes.py")


@contextmanager
def fake_server(
    delay_s: float = 0.0, fails_test: bool = False, **server: Any
) -> Iterator[tuple[subprocess.Popen, int]]:
    """The real server around a runtime of `runtimes.py`."""
    config = {
        "server": {"name": "m", "version": "1", "port": 0, **server},
        "delay_s": delay_s,
        "fails_test": fails_test,
    }
    process = subprocess.Popen([sys.executable, str(FAKE), json.dumps(config)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        ready = json.loads(process.stdout.readline())
        if not ready["ready"]:
            raise error_from(ready["error"])
        yield process, ready["port"]
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


def predict(connection: http.client.HTTPConnection, value: float) -> tuple[int, Any, http.client.HTTPResponse]:
    connection.request("POST", "/v1/models/m:predict", json.dumps({"instances": [{"x": value}]}))
    response = connection.getresponse()
    return response.status, json.loads(response.read()), response


def test_thousands_of_distinct_requests_get_their_own_answers(digits: Any, digits_bundle: Path) -> None:
    """Rows of different requests share calls; none may get another one's answer."""
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 17, (3000, 64)).astype(np.float32)
    expected = open_session(digits_bundle / "model.onnx").run({"pixels": pixels})["probabilities"]
    cuts = np.sort(rng.choice(np.arange(1, 3000), 1999, replace=False))
    parts = np.split(np.arange(3000), cuts)

    def client(worker: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", digits.port, timeout=30)
        wrong = 0
        for part in parts[worker::32]:
            tensor = {"name": "pixels", "shape": [len(part), 64], "datatype": "FP32"}
            head = json.dumps({"inputs": [{**tensor, "parameters": {"binary_data_size": len(part) * 256}}]}).encode()
            headers = {"Inference-Header-Content-Length": str(len(head))}
            connection.request("POST", "/v2/models/digits/infer", head + pixels[part].tobytes(), headers)
            answer = json.loads(connection.getresponse().read())["outputs"][0]["data"]
            wrong += not np.allclose(np.reshape(answer, (len(part), 10)), expected[part], rtol=1e-4, atol=1e-6)
        connection.close()
        return wrong

    with ThreadPoolExecutor(32) as pool:
        assert sum(pool.map(client, range(32))) == 0


def test_a_drain_under_load_loses_nothing() -> None:
    """Clients keep asking while SIGTERM comes: every request that was sent is answered."""
    with fake_server(delay_s=0.002) as (process, port):
        answered, lost = Counter(), []
        begun = threading.Barrier(9)

        def client(worker: int) -> None:
            begun.wait()
            for number in range(100_000):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
                try:
                    connection.connect()
                except OSError:
                    return  # the door is closed: nothing was sent
                try:
                    keeps = True
                    while keeps:
                        status, value, response = predict(connection, float(number))
                        keeps = response.headers.get("Connection") != "close"
                        answered[status, value["predictions"][0]["value"] == number + 1] += 1
                except (OSError, http.client.HTTPException) as error:
                    lost.append(repr(error))
                    return
                finally:
                    connection.close()

        threads = [threading.Thread(target=client, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        begun.wait()
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(30)
        assert lost == []
        assert set(answered) == {(200, True)}
        assert answered[200, True] > 50
        assert process.wait(20) == 0


def test_a_request_in_flight_is_finished_and_readiness_ends_first() -> None:
    with fake_server(delay_s=0.5) as (process, port):
        slow = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        idle.connect()
        slow.request("POST", "/v1/models/m:predict", json.dumps({"instances": [{"x": 1}]}))
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        idle.request("GET", "/v2/health/ready")
        answer = idle.getresponse()
        assert (answer.status, json.loads(answer.read())) == (503, {"ready": False})
        response = slow.getresponse()
        assert json.loads(response.read()) == {"predictions": [{"value": 2.0}]}
        assert response.headers["Connection"] == "close"
        assert process.wait(20) == 0
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        slow.close()
        idle.close()


def test_a_drain_does_not_wait_for_ever() -> None:
    with fake_server(delay_s=2.0, drain_s=0.2) as (process, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/v1/models/m:predict", json.dumps({"instances": [{"x": 1}]}))
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1
        connection.close()


def test_overload_is_refused_with_retry_after_and_passes() -> None:
    with fake_server(delay_s=0.05, queue=4, max_batch=1, hold_s=0.02) as (_, port):

        def one(value: int) -> tuple[int, Any, Any]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            status, body, response = predict(connection, value)
            connection.close()
            return status, body, response.headers.get("Retry-After")

        with ThreadPoolExecutor(24) as pool:
            results = list(pool.map(one, range(24)))
        counts = Counter(status for status, _, _ in results)
        assert set(counts) == {200, 503}
        assert counts[200] >= 4
        for value, (status, body, retry_after) in enumerate(results):
            if status == 200:
                assert body == {"predictions": [{"value": value + 1.0}]}
            else:
                assert "queue is full" in body["error"]
                assert int(retry_after) >= 1
        assert one(7)[:2] == (200, {"predictions": [{"value": 8.0}]})  # it recovers
        status, text = get(port, "/metrics")
        assert status == 200
        assert f'route="predict",code="503"}} {counts[503]}' in text


def test_one_connection_that_takes_too_much_gets_429() -> None:
    with fake_server(delay_s=0.1, queue=8, max_batch=1) as (_, port):
        body = json.dumps({"instances": [{"x": 1}]}).encode()
        request = b"POST /v1/models/m:predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (
            len(body),
            body,
        )
        with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
            client.sendall(request * 7)
            answers = b""
            while answers.count(b"HTTP/1.1 ") < 7 or not answers.endswith(b"}"):
                answers += client.recv(1 << 16)
        assert answers.count(b"HTTP/1.1 429") == 3
        assert answers.count(b"HTTP/1.1 200") == 4
        assert answers.index(b"HTTP/1.1 200") < answers.index(b"HTTP/1.1 429")


def get(port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text


def test_a_client_that_goes_away_frees_its_place() -> None:
    with fake_server(delay_s=0.2, queue=3, max_batch=1) as (_, port):
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("POST", "/v1/models/m:predict", json.dumps({"instances": [{"x": 1}]}))
            connection.close()
        deadline = time.monotonic() + 20
        while 'millrace_queue_requests{model="m",version="1"} 0' not in get(port, "/metrics")[1]:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_failed_self_test_is_never_ready() -> None:
    with pytest.raises(CorruptError, match="self-test failed"), fake_server(fails_test=True):
        pass


def test_a_server_dies_with_its_parent(digits_bundle: Path, tmp_path: Path) -> None:
    """The parent is killed without a word: the child notices and ends."""
    program = f"""
import json, os, sys, time
from pathlib import Path
import msgspec
from millrace.serve.child import ChildConfig
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig
config = ChildConfig(bundle_dir={str(digits_bundle)!r}, server=ServerConfig(name="d", version="1", port=0))
process = ServerProcess(config)
process.wait_ready()
print(process.pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.com", "::", ""])
def test_a_non_loopback_bind_is_refused(host: str) -> None:
    with pytest.raises(InputError, match="loopback") as refused:
        bind(host, 0)
    assert "no authentication" in refused.value.hint


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "localhost", "::1", "[::1]"])
def test_loopback_is_bound(host: str) -> None:
    assert loopback_address(host)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
def test_a_busy_port_names_who_holds_it(digits_bundle: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        found = holder_of(port)
        assert found is not None
        assert found[0] == os.getpid()
        server = ServerConfig(name="digits", version="1", port=port)
        process = ServerProcess(ChildConfig(bundle_dir=str(digits_bundle), server=server))
        with pytest.raises(UnavailableError, match=f"port {port} is busy: process {os.getpid()} holds it"):
            process.wait_ready()


def test_what_the_child_reports_is_raised_here(tmp_path: Path, digits_bundle: Path) -> None:
    def start(**changes: Any) -> MillraceError:
        server = msgspec.convert({"name": "d", "version": "1", "port": 0, **changes.pop("server", {})}, ServerConfig)
        process = ServerProcess(ChildConfig(**{"bundle_dir": str(digits_bundle), "server": server, **changes}))
        with pytest.raises(MillraceError) as raised:
            process.wait_ready()
        assert process.exit_code == 1
        return raised.value

    assert isinstance(start(bundle_dir=str(tmp_path)), NotFoundError)
    assert isinstance(start(digest="sha256:00"), CorruptError)
    assert isinstance(start(server={"variant": "int4"}), NotFoundError)
    assert isinstance(start(server={"host": "0.0.0.0"}), InputError)


def test_a_child_that_says_nothing(digits_bundle: Path) -> None:
    config = ChildConfig(bundle_dir=str(digits_bundle), server=ServerConfig(name="d", version="1", port=0))
    hosts = [f"host-{number}.example" for number in range(20_000)]  # more than a pipe holds
    large = msgspec.structs.replace(config, server=msgspec.structs.replace(config.server, allowed_hosts=hosts))
    dead = ServerProcess(config, command=[sys.executable, "-c", "import sys; sys.exit(3)"])
    with pytest.raises(StageError, match="ended with code 3"):
        dead.wait_ready()
    deaf = ServerProcess(large, command=[sys.executable, "-c", "import sys; sys.exit(4)"])
    with pytest.raises(StageError, match="code 4 before it had read its configuration"):
        deaf.wait_ready()
    mute = ServerProcess(config, command=[sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(UnavailableError, match="not ready within"):
        mute.wait_ready(timeout_s=0.3)
