"""A home behind MLflow's routes: served by a thread of the test, or by a process to unmodified clients."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette

from millrace.api.mlflow.routes import mlflow_routes
from millrace.testing.postgres import new_records_url
from millrace.wiring import open_dispatcher, open_services

collect_ignore_glob = ["stories/*", "differences*.py", "serving.py"]  # scripts, run by tests
API = "/api/2.0/mlflow"
SERVING = Path(__file__).with_name("serving.py")


class Api:
    """MLflow's routes over a home, served by a thread."""

    def __init__(self, home: Path) -> None:
        self.dispatcher = open_dispatcher(str(home))
        self.services = self.dispatcher.services
        app = Starlette(routes=mlflow_routes(self.dispatcher))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False, lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self._listener.getsockname()[1]}", timeout=60)

    def close(self) -> None:
        """Stop the thread, close the home."""
        self.http.close()
        self._server.should_exit = True
        self._thread.join()
        self._listener.close()
        self.dispatcher.close()

    def post(self, path: str, /, **body: Any) -> Any:
        """The answer of a POST that must succeed."""
        return self.call("POST", path, body)

    def get(self, path: str, /, **query: Any) -> Any:
        """The answer of a GET that must succeed."""
        return self.call("GET", path, query)

    def call(self, method: str, path: str, fields: dict[str, Any]) -> Any:
        """The answer of a call that must succeed."""
        response = self.send(method, path, fields)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, method: str, path: str, /, **fields: Any) -> tuple[int, str]:
        """Status and error code of a call that must not succeed; the message is for people."""
        response = self.send(method, path, fields)
        body = response.json()
        assert set(body) == {"error_code", "message"}, body
        assert body["message"]
        assert "Traceback" not in body["message"]
        return response.status_code, body["error_code"]

    def send(self, method: str, path: str, fields: dict[str, Any]) -> Any:
        """Any call."""
        if method == "GET":
            return self.http.get(API + path, params=fields)
        return self.http.request(method, API + path, json=fields)

    def experiment(self, name: str = "one") -> str:
        """A new experiment's id."""
        return self.post("/experiments/create", name=name)["experiment_id"]

    def run(self, experiment: str, **fields: Any) -> str:
        """A new run's id."""
        body = {"experiment_id": experiment, "start_time": 1_700_000_000_000, "user_id": "ann", **fields}
        return self.post("/runs/create", **body)["run"]["info"]["run_id"]

    def search(self, experiment: str, **fields: Any) -> list[str]:
        """Ids of the runs that are found."""
        found = self.post("/runs/search", experiment_ids=[experiment], **fields)
        return [run["info"]["run_id"] for run in found.get("runs", [])]


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with empty records, to be copied: making them anew takes a quarter of a second."""
    home = tmp_path_factory.mktemp("empty") / "home"
    services = open_services(str(home))
    services.records.seal()
    services.close()
    return home


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def api(
    request: pytest.FixtureRequest, tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Api]:
    """An empty home, on either store of records."""
    shutil.copytree(empty_home, tmp_path / "home")
    if request.param == "postgres":
        monkeypatch.setenv("MILLRACE_RECORDS_URL", new_records_url())
    made = Api(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def server_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of its own process on a free port, with an empty home on either store of records."""
    environment = dict(os.environ)
    if request.param == "postgres":
        environment["MILLRACE_RECORDS_URL"] = new_records_url()
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with (folder / "log").open("wb") as log:
        command = [sys.executable, str(SERVING), str(folder / "home"), str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, server, folder / "log")
            yield url
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)


@pytest.fixture
def wait_for() -> Callable[..., None]:
    """Waits until a server answers."""
    return _wait_for


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path, timeout_s: float = 120.0) -> None:
    """Until the server answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        else:
            return
