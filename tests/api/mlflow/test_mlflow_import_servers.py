"""`millrace import mlflow` of servers, of real stores, and after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from millrace.client.http import HttpTransport
from millrace.core.errors import NotFoundError
from millrace.core.types import ArtifactFile, Run
from millrace.testing.postgres import new_records_url
from millrace.testing.server import RunningServer
from millrace.wiring import open_dispatcher

sys.path.insert(0, str(Path(__file__).parent))

from import_stores import (
    API,
    FIRST,
    START_MS,
    Reader,
    bring,
    version_files,
    write,
    write_database,
    write_run,
    write_store,
)

STORY = Path(__file__).with_name("stories") / "make_store.py"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_store(tmp_path / "mlruns")


@pytest.fixture
def other_home(api: Any, tmp_path: Path, empty_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A second empty home on the same kind of store."""
    shutil.copytree(empty_home, tmp_path / "other")
    if "MILLRACE_RECORDS_URL" in os.environ:
        monkeypatch.setenv("MILLRACE_RECORDS_URL", new_records_url())
    return tmp_path / "other"


def test_a_kill_in_the_middle_is_made_up_for(api: Any, store: Path, other_home: Path) -> None:
    for index in range(60):
        run = write_run(store / "77" / f"{index:032x}", run_name=f"run {index}")
        write(run / "metrics/loss", "".join(f"{START_MS + i} {i} {i}\n" for i in range(200)))
        write(run / "artifacts/a.txt", f"file {index}")
    command = [
        sys.executable,
        "-m",
        "millrace",
        "--home",
        str(other_home),
        "--embedded",
        "import",
        "mlflow",
        str(store),
    ]
    watcher = open_dispatcher(str(other_home))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(watcher.services.records.find(Run)) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 5 <= len(watcher.services.records.find(Run)) <= 63
    watcher.close()
    again = type(api)(other_home)
    try:
        counts, _ = bring(again, store)
        assert counts.get("runs", 0) + counts.get("runs here already", 0) == 63
        bring(api, store)
        assert Reader(again.http).everything() == Reader(api.http).everything()
    finally:
        again.close()


# --------------------------------------------------------------------------- servers


def test_a_server_is_read_by_its_api(api: Any, store: Path, other_home: Path) -> None:
    """From one home to another, over the wire."""
    bring(api, store)
    other = type(api)(other_home)
    try:
        counts, problems = bring(other, str(api.http.base_url).rstrip("/"))
        assert len(problems) == 1, problems
        assert (counts["runs"], counts["files"], counts["points"]) == (3, 4, 24)
        assert Reader(other.http).everything() == Reader(api.http).everything()
        assert version_files(other, "net", 3) == version_files(api, "net", 3)
        assert version_files(other, "copy", 1) == version_files(api, "net", 1)
        counts, _ = bring(other, str(api.http.base_url).rstrip("/"))
        assert (counts["runs here already"], counts["versions here already"]) == (3, 4)
    finally:
        other.close()


def test_a_running_server_does_it_when_it_is_asked(store: Path, tmp_path: Path) -> None:
    with RunningServer(tmp_path / "home") as server:
        transport = HttpTransport(server.url)
        try:
            events = list(transport.stream("system.import_mlflow", {"source": str(store)}))
            assert (events[-1].kind, events[-1].counts["runs"]) == ("done", 3)
            with pytest.raises(NotFoundError, match="there is no folder"):
                list(transport.stream("system.import_mlflow", {"source": str(tmp_path / "absent")}))
        finally:
            transport.close()
        with httpx.Client(base_url=server.url) as http:
            assert set(Reader(http).everything()["experiments"]) == {"Default", "a b/c", "gone"}


# --------------------------------------------------------------------------- the real MLflow


@pytest.fixture(scope="module", params=["file store", "database", "database file"])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A store that an unmodified MLflow filled: what to import, and the URL of an MLflow server that shows it."""
    python = os.environ.get("MILLRACE_MLFLOW_PYTHON")
    if not python:
        pytest.skip("set MILLRACE_MLFLOW_PYTHON to an interpreter that has MLflow")
    folder = tmp_path_factory.mktemp("real")
    environment = {**os.environ, "MLFLOW_ALLOW_FILE_STORE": "true", "MLFLOW_DISABLE_TELEMETRY": "true",
                   "GIT_PYTHON_REFRESH": "quiet", "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false"}  # fmt: skip
    is_files = request.param == "file store"
    backend = str(folder / "mlruns") if is_files else f"sqlite:///{folder}/mlflow.db"
    if is_files:
        tell(python, f"file://{folder}/mlruns", folder, environment)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [python, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
               "--backend-store-uri", backend, "--artifacts-destination", str(folder / "mlartifacts")]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment, start_new_session=True)
    try:
        wait_until_up(url, server, folder / "log")
        if not is_files:
            tell(python, url, folder, environment)
        yield (url if request.param == "database" else backend), url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)


def tell(python: str, uri: str, folder: Path, environment: dict[str, str]) -> None:
    """Fill a store."""
    command = [python, str(STORY), uri]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]


def wait_until_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_a_database_is_read_as_its_folder_would_be(api: Any, store: Path, other_home: Path, tmp_path: Path) -> None:
    bring(api, store)
    for meta in store.rglob("meta.yaml"):  # in a database's store they are not there
        meta.unlink()
    database = write_database(tmp_path / "mlflow.db")
    before = database.read_bytes()
    other = type(api)(other_home)
    try:
        counts, problems = bring(other, f"sqlite:///{database}")
        assert problems == ["files of version 4 of model 'net': none are here; its source is s3://elsewhere/model"]
        assert (counts["runs"], counts["files"], counts["points"], counts["aliases"]) == (3, 4, 24, 1)
        assert Reader(other.http).everything() == Reader(api.http).everything()
        for name, number in (("net", 1), ("net", 3), ("copy", 1)):
            assert version_files(other, name, number) == version_files(api, name, number)
        made = other.post("/model-versions/create", name="net", source="s3://x/y")["model_version"]["version"]
        assert made == "6"  # 5 was deleted there: its number is not used again
        counts, _ = bring(other, database)  # the bare path will do
        assert (counts["runs here already"], counts["versions here already"]) == (3, 4)
    finally:
        other.close()
    assert database.read_bytes() == before
    assert sorted(one.name for one in tmp_path.glob("mlflow.db*")) == ["mlflow.db"]


def test_a_database_from_elsewhere_names_what_it_cannot_reach(api: Any, store: Path, tmp_path: Path) -> None:
    """Its files come with --artifacts; what is outside of the folders is not opened, whatever it says."""
    database = write_database(tmp_path / "mlflow.db").rename(tmp_path / "copy.db")
    store.rename(tmp_path / "kept")
    write(tmp_path / "secret/key", "secret")
    (tmp_path / "kept/link").symlink_to(tmp_path / "secret")
    places = {"1" * 32: f"{tmp_path}/secret", "2" * 32: f"{tmp_path}/kept/../secret", "3" * 32: f"{tmp_path}/kept/link",
              "4" * 32: "mlflow-artifacts:/../secret", "5" * 32: "s3://a/b"}  # fmt: skip
    with sqlite3.connect(database) as rows:
        for run, place in places.items():
            values = (run, "", "ann", "FINISHED", START_MS, None, "active", place, 77)
            rows.execute(f"INSERT INTO runs VALUES ({', '.join('?' * 9)})", values)
        rows.execute("INSERT INTO runs SELECT 'f', '', '', 'ODD', 0, 0, '', '', 77")
        rows.execute(f"INSERT INTO metrics VALUES ('bad', 1.0, 'never', '{FIRST}', 0, 0)")
        rows.execute("INSERT INTO experiments VALUES (9, 'theirs', '', 'active', 0, 0, 'team')")
        rows.execute("DROP TABLE logged_model_metrics")
    rows.close()
    _, problems = bring(api, database, dry_run=False)
    assert [one for one in problems if FIRST in one and "--artifacts" in one]
    counts, problems = bring(api, database, artifacts=str(tmp_path / "kept"))
    assert counts["runs completed"] >= 1
    for part in (*places, "run f of", "'ODD'", "metric 'bad'", "in another workspace"):
        assert [one for one in problems if part in one], (part, problems)
    found = Reader(api.http).everything()["experiments"]
    assert found["a b/c"]["runs"][FIRST]["files"]["model/MLmodel"] == b"flavors: {}\n"
    assert [found["a b/c"]["runs"][run]["files"] for run in places] == [{}] * 5
    assert "theirs" not in found


def test_files_that_a_server_does_not_give_are_named(api: Any, store: Path, other_home: Path) -> None:
    """And fetched by the next import: the run was not complete."""
    bring(api, store)
    digest = api.services.records.get(ArtifactFile, f"{FIRST}/model/MLmodel").artifact.digest
    content = api.services.blobs.read(digest)
    api.services.blobs.delete(digest)
    other = type(api)(other_home)
    url = str(api.http.base_url).rstrip("/")
    try:
        _, problems = bring(other, url)
        assert [one for one in problems if "model/MLmodel" in one], problems
        assert set(Reader(other.http).everything()["experiments"]["a b/c"]["runs"][FIRST]["files"]) == {
            "model/model.pkl", "empty.txt"
        }  # fmt: skip
        api.services.blobs.put(content)
        counts, _ = bring(other, url)
        assert (counts["runs completed"], counts["files"]) == (1, 1)
        assert Reader(other.http).everything() == Reader(api.http).everything()
        assert version_files(other, "net", 1) == version_files(api, "net", 1)
    finally:
        other.close()


class Odd(BaseHTTPRequestHandler):
    """Answers that no MLflow gives."""

    ANSWERS: ClassVar[dict[str, str]] = {
        "/experiments/search": '{"experiments": [{"experiment_id": "1", "name": "a\\u0000b"}]}',
        "/runs/search": '{"runs": [{}, {"info": {"run_id": "x", "status": "ODD"}}, {"info": {"run_id": "'
        + FIRST
        + '", "status": '
        '"FINISHED"}, "data": {"metrics": [{"key": "m"}]}}]}',
        "/metrics/get-history": '{"metrics": [{"value": "x"}, {"value": 1.5, "timestamp": -1}, {"value": 1.5}]}',
        "/artifacts/list": '{"files": [{"path": "../a"}, {"path": "b", "is_dir": true}, {"path": "c"}]}',
        "/logged-models/search": '{"models": [{"info": 3}]}',
        "/registered-models/search": '{"registered_models": [{"no": 1}, {"name": "m"}]}',
        "/model-versions/search": '{"model_versions": [{"version": "x"}, {}]}',
    }

    def do_GET(self) -> None:
        body = self.ANSWERS.get(self.path.partition("?")[0].removeprefix(API))
        self.send_response(200 if body else 500)
        self.end_headers()
        self.wfile.write((body or "no").encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def test_odd_answers_are_named(api: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Odd) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            counts, problems = bring(api, f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()
    assert (counts["runs"], counts["points"], counts["models"]) == (1, 1, 1)
    for part in ("NUL", "a run of", "'ODD'", "a point of", "'../a'", "file /get-artifact", "a logged model", "a registered",
                 "a version of"):  # fmt: skip
        assert [one for one in problems if part in one], (part, problems)
    assert not api.services.records.find(ArtifactFile)


@pytest.mark.slow
def test_a_real_store_is_the_same_here(api: Any, real: tuple[str, str]) -> None:
    source, url = real
    counts, problems = bring(api, source)
    assert problems == []
    assert (counts["runs"], counts["logged models"], counts["versions"]) == (5, 1, 4)
    with httpx.Client(base_url=url, timeout=60) as http:
        theirs = Reader(http).everything()
    ours = Reader(api.http).everything()
    assert ours["models"] == theirs["models"]
    assert set(ours["experiments"]) == set(theirs["experiments"])
    if source.startswith("sqlite:"):  # MLflow's server leaves out of its answers which models a run has read
        (reader,) = [run for run in ours["experiments"]["vision"]["runs"].values() if run["inputs"][1]]
        reader["inputs"] = ([], [])
    for name, experiment in theirs["experiments"].items():
        assert ours["experiments"][name] == experiment
    assert "python_model.pkl" in version_files(api, "echo", 1)
    echo = api.get("/model-versions/get", name="echo", version="1")["model_version"]
    assert echo["source"] == f"models:/{echo['model_id']}"  # MLflow's own answer may leave the id out
    assert version_files(api, "copied", 1) == version_files(api, "echo", 1)
    assert version_files(api, "plain", 3) == {"a b.txt": b"hello"}
    again, _ = bring(api, source)
    assert again["runs here already"] == 4
    assert again["runs completed"] == 1  # the one that still runs
