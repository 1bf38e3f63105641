"""MLflow's protocol: server CPU for each client call, and MiB/s of artifacts, beside MLflow's own server.

Run: `python benchmarks/mlflow_server.py [--mlflow PYTHON] [--rounds N]`. PYTHON is an interpreter that has `mlflow`
installed; without it only Millrace is measured. CPU is that of the whole process tree, over many calls of one
keep-alive connection, so that it does not depend on how quick the client is.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

API, FILES = "/api/2.0/mlflow", "/api/2.0/mlflow-artifacts/artifacts"
SERVER = """
import sys, uvicorn
from starlette.applications import Starlette
from millrace.api.mlflow.routes import mlflow_routes
from millrace.control.dispatch import Dispatcher
from millrace.wiring import open_services
app = Starlette(routes=mlflow_routes(Dispatcher(open_services(sys.argv[1]))))
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="warning", access_log=False)
"""
RUNS, MIB = 5000, 1 << 20
AIMS = {
    "log_metric": 1.0,
    "log_batch 1000": 10.0,
    "create run": 1.5,
    "create version": 2.0,
    "read by alias": 1.0,
    "search 100 of 5000": 20.0,
    "three-clause filter": 20.0,
    "order by a metric": 15.0,
    "list 1000": 100.0,
}


class Client:
    """Raw requests on one connection to one server."""

    def __init__(self, port: int, process: psutil.Process) -> None:
        self.process = process
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer of a call that must succeed."""
        if method == "GET" and body:
            path, body = f"{path}?{urllib.parse.urlencode(body)}", None
        data = None if body is None else json.dumps(body).encode()
        status, answer = self.send(method, path, data, "application/json")
        if status != 200:
            raise RuntimeError(f"{method} {path}: {status} {answer[:300]!r}")
        return json.loads(answer) if answer else {}

    def send(self, method: str, path: str, data: bytes | None, kind: str) -> tuple[int, bytes]:
        """Status and bytes."""
        self._connection.request(method, path, data, {"Content-Type": kind})
        response = self._connection.getresponse()
        return response.status, response.read()

    def cpu_s(self) -> float:
        """CPU seconds of the server's process tree."""
        tree = [self.process, *self.process.children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in tree)

    def per_call_ms(self, calls: int, act: Callable[[int], Any]) -> float:
        """Server CPU per call, in milliseconds."""
        for _ in range(min(calls, 20)):
            act(0)
        before = self.cpu_s()
        for index in range(1, calls + 1):
            act(index)
        return (self.cpu_s() - before) / calls * 1000


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, folder: Path) -> Iterator[Client]:
    """A server in a session of its own, ended with all it started."""
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=folder)
        try:
            client = Client(port, psutil.Process(server.pid))
            deadline = time.monotonic() + 120
            while True:
                try:
                    client.send("GET", "/health", None, "text/plain")
                    break
                except OSError:
                    if time.monotonic() > deadline or server.poll() is not None:
                        raise RuntimeError((folder / "server.log").read_text()[-2000:]) from None
                    client = Client(port, psutil.Process(server.pid))
                    time.sleep(0.2)
            yield client
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def measure(client: Client, calls: int, bulk: int) -> dict[str, float]:
    """Every row of the table; `calls` of the quick ones, `bulk` of the slow ones."""
    found: dict[str, float] = {}
    experiment = client.call("POST", f"{API}/experiments/create", {"name": "bench"})["experiment_id"]
    new_run = {"experiment_id": experiment, "start_time": 1, "tags": [{"key": "a", "value": "b"}]}
    run = client.call("POST", f"{API}/runs/create", new_run)["run"]["info"]["run_id"]
    found["create run"] = client.per_call_ms(calls, lambda _: client.call("POST", f"{API}/runs/create", new_run))
    found["log_metric"] = client.per_call_ms(calls, lambda index: client.call(
        "POST", f"{API}/runs/log-metric", {"run_id": run, "key": "m", "value": index, "timestamp": 1, "step": index}
    ))  # fmt: skip
    found["log_batch 1000"] = client.per_call_ms(bulk, lambda index: client.call("POST", f"{API}/runs/log-batch", {
        "run_id": run,
        "metrics": [{"key": f"k{n % 10}", "value": n, "timestamp": index, "step": n} for n in range(1000)],
    }))  # fmt: skip
    client.call("POST", f"{API}/registered-models/create", {"name": "net"})
    version = {"name": "net", "source": "s3://bucket/model", "run_id": run}
    found["create version"] = client.per_call_ms(
        bulk, lambda _: client.call("POST", f"{API}/model-versions/create", version)
    )
    client.call("POST", f"{API}/registered-models/alias", {"name": "net", "alias": "best", "version": "1"})
    alias = {"name": "net", "alias": "best"}
    found["read by alias"] = client.per_call_ms(
        calls, lambda _: client.call("GET", f"{API}/registered-models/alias", alias)
    )
    found.update(artifacts(client, experiment, run))
    found.update(searches(client, bulk))
    return found


def artifacts(client: Client, experiment: str, run: str) -> dict[str, float]:
    """MiB/s of a file of 32 MiB, up and down; the median of five."""
    up, down = [], []
    for index in range(5):
        data = os.urandom(32 * MIB)
        path = f"{FILES}/{experiment}/{run}/artifacts/big{index}"
        began = time.perf_counter()
        assert client.send("PUT", path, data, "application/octet-stream")[0] == 200
        middle = time.perf_counter()
        status, answer = client.send("GET", path, None, "text/plain")
        ended = time.perf_counter()
        assert status == 200
        assert answer == data
        up.append(32 / (middle - began))
        down.append(32 / (ended - middle))
    return {"artifact up MiB/s": statistics.median(up), "artifact down MiB/s": statistics.median(down)}


def searches(client: Client, bulk: int) -> dict[str, float]:
    """Searches among 5,000 runs with 4 metrics, 4 parameters and 2 tags each."""
    experiment = client.call("POST", f"{API}/experiments/create", {"name": "many"})["experiment_id"]
    for index in range(RUNS):
        new_run = {
            "experiment_id": experiment,
            "start_time": index,
            "tags": [{"key": "team", "value": f"t{index % 7}"}],
        }
        run = client.call("POST", f"{API}/runs/create", new_run)["run"]["info"]["run_id"]
        client.call("POST", f"{API}/runs/log-batch", {
            "run_id": run,
            "metrics": [{"key": f"m{n}", "value": (index * 7919 % 1000) / 1000, "timestamp": 1} for n in range(4)],
            "params": [{"key": f"p{n}", "value": str(index % 10)} for n in range(4)],
        })  # fmt: skip
    filters = {
        "search 100 of 5000": {"max_results": 100},
        "three-clause filter": {
            "max_results": 100,
            "filter": "metrics.m0 > 0.5 and params.p0 = '3' and tags.team = 't1'",
        },
        "order by a metric": {"max_results": 100, "order_by": ["metrics.m0 DESC"]},
        "list 1000": {"max_results": 1000},
    }
    found = {}
    for name, more in filters.items():
        body = {"experiment_ids": [experiment], **more}
        found[name] = client.per_call_ms(max(3, bulk // 4), lambda _: client.call("POST", f"{API}/runs/search", body))  # noqa: B023
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mlflow", default=os.environ.get("MILLRACE_MLFLOW_PYTHON"), help="a Python with mlflow")
    parser.add_argument("--calls", type=int, default=300)
    parser.add_argument("--bulk", type=int, default=20)
    arguments = parser.parse_args()
    columns: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [sys.executable, "-c", SERVER, f"{folder}/home", str(port)]
        with running(command, port, Path(folder)) as client:
            columns["millrace"] = measure(client, arguments.calls, arguments.bulk)
    if arguments.mlflow:
        with tempfile.TemporaryDirectory() as folder:
            port = free_port()
            command = [arguments.mlflow, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/m.db",
                       "--artifacts-destination", f"{folder}/files", "--port", str(port), "--workers", "1"]  # fmt: skip
            with running(command, port, Path(folder)) as client:
                columns["mlflow"] = measure(client, arguments.calls, arguments.bulk)
    print(f"{'server CPU ms per call':<24} {'millrace':>9} {'mlflow':>9} {'ratio':>7} {'aim':>7}")
    for name, ours in columns["millrace"].items():
        theirs = columns.get("mlflow", {}).get(name)
        aim = AIMS.get(name, 400.0 if "up" in name else 600.0)
        other = (
            f"{theirs:>9.1f} {(theirs / ours if name in AIMS else ours / theirs):>7.1f}"
            if theirs
            else f"{'-':>9} {'-':>7}"
        )
        print(f"{name:<24} {ours:>9.2f} {other} {aim:>7.1f}")


if __name__ == "__main__":
    main()
