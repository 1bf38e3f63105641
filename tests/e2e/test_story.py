"""One story, everywhere: embedded, on a server beside, on one far away, on two servers while one is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest
from typing_by_hand import command, environment

from millrace.testing.graphs import write_scaler
from millrace.testing.moto_server import MotoServer
from millrace.testing.postgres import PostgresServer, new_records_url
from millrace.testing.radosgw import Radosgw, missing_programs
from millrace.testing.server import RunningServer

SPEC = """project: iris
data: {source: "builtin:iris", label: species}
train: {model: linear}
compress: {batch_sizes: [1]}
"""
OTHER_SPLIT = ("--set", "data.split.test=0.3")  # other training rows: another model
SCRIPT = """import millrace
with millrace.track("by hand", params={"lr": 0.1}) as tracker:
    for step in range(50):
        tracker.log_metric("loss", 1.0 / (step + 1), step)
    tracker.set_tags({"who": "me"})
    open("notes.txt", "w").write("what I found")
    tracker.log_artifact("notes.txt")
"""
EVENTS = """import millrace
print(*[event.verb for event in millrace.connect().call("event.list", since=0, limit=1000)])
"""
FLOWER = {"sepal_length": 5.1, "sepal_width": 3.5, "petal_length": 1.4, "petal_width": 0.2}


class Place:
    """A folder with a spec, and commands typed in it; `moment` is called between the chapters of a story."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder, self.variables = folder, variables
        self.moment: Callable[[str], None] = lambda chapter: None
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "millrace.yaml").write_text(SPEC)

    def environment(self) -> dict[str, str]:
        return {**environment(), "XDG_CACHE_HOME": str(self.folder.parent / "cache"), **self.variables}

    def type(self, *arguments: str) -> str:
        done = subprocess.run(
            command(*arguments), cwd=self.folder, env=self.environment(), capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return done.stdout

    def ask(self, *arguments: str) -> Any:
        return json.loads(self.type(*arguments, "--json"))

    def run_script(self, text: str) -> str:
        (self.folder / "script.py").write_text(text)
        return subprocess.run(
            [sys.executable, "script.py"], cwd=self.folder, env=self.environment(), check=True, timeout=60,
            stdout=subprocess.PIPE, text=True,
        ).stdout  # fmt: skip


def ask_http(url: str, model: str) -> tuple[str, str]:
    """The label of a flower and the version that answered, over HTTP."""
    body = json.dumps({"instances": [FLOWER]}).encode()
    with urllib.request.urlopen(f"{url}/v1/models/{model}:predict", body, timeout=10) as answer:
        label = json.loads(answer.read())["predictions"][0]["label"]
    with urllib.request.urlopen(f"{url}/v2/models/{model}", timeout=10) as answer:
        return label, json.loads(answer.read())["versions"][0]


def until(check: Callable[[], bool], what: str, timeout_s: float = 40.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


class ServedByCommand:
    """Where there is no server: `millrace serve` in the foreground, started anew when the model changes."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def deploy(self) -> None:
        """Nothing is kept: see `expect`."""

    def expect(self, version: str) -> None:
        process = subprocess.Popen(
            command("serve", "iris", "--port", "0", "--json"), cwd=self._place.folder,
            env=self._place.environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        try:
            lines = iter(process.stdout)
            url = next(line for line in lines if '"url"' in line).split('"')[3]
            assert ask_http(url, "iris") == ("setosa", version)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
        assert process.returncode == 0


class ServedByServer:
    """`millrace deploy`: the endpoint follows the alias by itself."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def deploy(self) -> None:
        assert "ready: iris v1 at http://" in self._place.type("deploy", "iris@champion", "--endpoint", "flowers")

    def expect(self, version: str) -> None:
        def is_served() -> bool:
            endpoint = self._place.ask("endpoints", "show", "flowers")
            if endpoint["state"] != "ready" or str(endpoint["number"]) != version:
                return False
            try:
                return ask_http(endpoint["url"], "flowers") == ("setosa", version)
            except OSError:  # the server that served it was killed a moment ago
                return False

        until(is_served, f"the endpoint serves version {version}")


def tell(place: Place, serving: ServedByCommand | ServedByServer) -> None:
    """The story."""
    place.type("run")
    place.moment("run")
    place.run_script(SCRIPT)
    place.moment("script")
    tracked = next(run for run in place.ask("runs") if run["name"] == "by hand")
    view = place.ask("runs", "show", tracked["id"])
    assert (view["run"]["state"], view["values"]["params"]["lr"], view["values"]["tags"]["who"]) == (
        "succeeded", "0.1", "me",
    )  # fmt: skip
    assert view["values"]["metrics"]["loss"][2] == 49
    write_scaler(place.folder / "own.onnx")
    place.type("models", "register", "own.onnx", "--name", "doubler")
    place.moment("register")
    models = {(model["name"], model["version"]) for model in place.ask("models")}
    assert models == {("iris", 1), ("doubler", 1)}
    serving.deploy()
    place.moment("deploy")
    serving.expect("1")
    (place.folder / "rows.csv").write_text(",".join(FLOWER) + "\n" + ",".join(map(str, FLOWER.values())) + "\n")
    assert place.ask("predict", "iris", "--input", "rows.csv")[0]["label"] == "setosa"
    place.type("run", *OTHER_SPLIT)
    place.moment("second run")
    place.type("models", "promote", "iris@2")
    serving.expect("2")
    place.moment("promote")
    place.type("models", "rollback", "iris")
    serving.expect("1")
    place.moment("rollback")
    collected = place.ask("system", "gc", "--apply")
    assert collected["applied"]
    serving.expect("1")
    assert place.ask("predict", "iris", "--input", "rows.csv")[0]["label"] == "setosa"
    place.type("models", "export", "iris@2", "--to", "out")
    assert (place.folder / "out" / "model.onnx").is_file()
    verbs = set(place.run_script(EVENTS).split())
    assert {"run.submit", "run.track", "run.end", "model.register", "model.promote", "model.rollback"} <= verbs


@pytest.mark.rotating(1, "stories")
def test_embedded(tmp_path: Path) -> None:
    place = Place(tmp_path / "work")
    tell(place, ServedByCommand(place))


@pytest.mark.rotating(1, "stories")
def test_on_a_server_that_commands_find_beside_the_spec(tmp_path: Path) -> None:
    place = Place(tmp_path / "work")
    with RunningServer(place.folder / ".millrace"):
        tell(place, ServedByServer(place))


@pytest.mark.rotating(1, "stories")
def test_on_a_server_elsewhere(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "server") as server:
        place = Place(tmp_path / "work", MILLRACE_URL=server.url)
        tell(place, ServedByServer(place))
    assert not (place.folder / ".millrace").exists(), "nothing is kept here"


# --------------------------------------------------------------------------- two servers, one of them killed


@pytest.fixture
def s3(service: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that lead to a new bucket."""
    with ExitStack() as stack:
        if service == "moto":
            server: MotoServer | Radosgw = MotoServer(tmp_path / "moto")
        else:
            if missing_programs():
                pytest.skip("radosgw is not installed")
            server = Radosgw(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rgw"))))
        server.start()
        stack.callback(server.stop)
        boto3.client(
            "s3", endpoint_url=server.endpoint, region_name=server.region, aws_access_key_id=server.access_key,
            aws_secret_access_key=server.secret_key,
        ).create_bucket(Bucket="story")  # fmt: skip
        yield {
            "MILLRACE_BLOBS_URL": "s3://story/blobs", "AWS_ENDPOINT_URL": server.endpoint, "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": server.region, "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
        }  # fmt: skip


@pytest.mark.xdist_group("postgres")
@pytest.mark.rotating(1, "stories")
@pytest.mark.skipif(PostgresServer.find() is None, reason="no PostgreSQL server is installed")
@pytest.mark.parametrize(
    ("service", "chapter"),
    [("moto", "deploy"), pytest.param("radosgw", "second run", marks=[pytest.mark.slow, pytest.mark.services])],
)
def test_on_two_servers_while_one_is_killed(tmp_path: Path, s3: dict[str, str], chapter: str) -> None:
    variables = {"MILLRACE_RECORDS_URL": new_records_url(), **s3}
    with (
        RunningServer(tmp_path / "one", environment=variables) as one,  # it leads
        RunningServer(tmp_path / "two", environment=variables) as two,
    ):
        place = Place(tmp_path / "work", MILLRACE_URL=one.url)

        def kill(reached: str) -> None:
            if reached == chapter:
                for pid in (one.pid, *one.children().values()):
                    os.kill(pid, signal.SIGKILL)
                one.kill()
                place.variables["MILLRACE_URL"] = two.url
                until(lambda: "leads" in two.log.read_text(), "the other one leads")

        place.moment = kill
        tell(place, ServedByServer(place))
        assert place.ask("status")["runs"] == 3
