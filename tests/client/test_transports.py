"""The same verbs, the same answers: in process, through the home's server, through one far away."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import boto3
import httpx
import msgspec
import pytest

from millrace.client import sdk
from millrace.client.http import HttpTransport
from millrace.client.remote import RemoteTransport
from millrace.core.errors import ConflictError, CorruptError, InputError, MillraceError, NotFoundError
from millrace.core.ports import Transport
from millrace.core.types import MetricPoint, Run, Step
from millrace.testing.moto_server import MotoServer
from millrace.testing.server import RunningServer
from millrace.wiring import open_services, open_transport


@pytest.fixture(scope="module", params=["in process", "http", "remote"])
def transport(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transport]:
    home = tmp_path_factory.mktemp("transport") / "home"
    with ExitStack() as stack:
        if request.param == "in process":
            opened: Any = open_transport(str(home))
        else:
            server = stack.enter_context(RunningServer(home))
            opened = (HttpTransport if request.param == "http" else RemoteTransport)(server.url)
        stack.callback(opened.close)
        yield opened


def test_a_script_is_tracked_from_start_to_end(transport: Transport, tmp_path: Path) -> None:
    run = transport.call("run.track", {"name": "script", "params": {"lr": 0.1}})
    points = [MetricPoint(run.id, "loss", step, 1.0 / (step + 1), 1.5 + step) for step in range(10)]
    transport.call("run.log", {"run": run.id, "points": points, "params": {"depth": 3}, "tags": {"who": "me"}})
    assert transport.call("run.metrics", {"run": run.id}) == points
    (tmp_path / "weights.bin").write_bytes(b"\x00\x01" * 5000)
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "note.txt").write_text("hello")
    for name in ("weights.bin", "folder"):
        step = transport.call("run.artifact", {"run": run.id, "name": name, "path": str(tmp_path / name)})
    assert {name: artifact.size_bytes for name, artifact in step.outputs.items()}["weights.bin"] == 10_000
    listing = transport.call("tree.get", {"digest": step.outputs["folder"].digest})
    assert [entry.path for entry in listing] == ["deep/note.txt"]
    ended = transport.call("run.end", {"run": run.id, "state": "succeeded"})
    assert ended.state == "succeeded"
    assert transport.call("run.get", {"run": run.id}).run == ended


@pytest.mark.parametrize(
    ("operation", "body", "error", "text"),
    [
        ("run.get", {"run": "nothing"}, NotFoundError, "no run with the id 'nothing'"),
        ("run.list", {"limt": 1}, InputError, "limt"),
        ("run.fly", {}, NotFoundError, r"no operation 'run\.fly'"),
        ("model.get", {"model": "salt"}, NotFoundError, "there is no model 'salt'"),
        ("model.register", {"path": "/nothing.onnx"}, NotFoundError, "/nothing.onnx"),
        ("run.submit", {"spec_path": "/nothing/millrace.yaml"}, NotFoundError, "millrace.yaml"),
        (
            "tree.put",
            {"entries": [{"path": "../a", "digest": "sha256:" + "0" * 64, "size_bytes": 0}]},
            NotFoundError,
            "not stored",
        ),
    ],
)
def test_errors_are_the_same(
    transport: Transport, operation: str, body: dict[str, Any], error: type[MillraceError], text: str
) -> None:
    with pytest.raises(error, match=text) as caught:
        transport.call(operation, body)
    assert caught.value.message
    assert not isinstance(caught.value, ConflictError)


def test_what_was_written_is_an_event(transport: Transport) -> None:
    run = transport.call("run.track", {"name": "seen"})
    transport.call("run.end", {"run": run.id, "state": "failed"})
    close_and_wait = getattr(transport, "services", None)
    if close_and_wait is not None:
        close_and_wait.records.seal()
    verbs: list[str] = []
    for event in transport.stream("event.watch", {}):
        if event.subject == f"run:{run.id}":
            verbs.append(event.verb)
            if event.verb == "run.end":
                break
    assert verbs == ["run.track", "run.end"]


def test_a_report_of_a_far_server_is_its_page_and_a_copy_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a path of the server's machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "report.html").write_text("a file of the server")
    with closing(open_services(str(tmp_path / "home"))) as services:
        services.records.put(Run(id="r", state="succeeded", spec_path=str(tmp_path / "millrace.yaml")))
        facts = {"rows": 5}
        services.records.put(Step(id="r/data", run_id="r", name="data", stage="own", state="succeeded", facts=facts))
    with RunningServer(tmp_path / "home") as server, closing(RemoteTransport(server.url)) as client:
        report = sdk.Run(client, "r").report
        assert report.url == client.call("run.get", {"run": "r"}).report_path == f"{server.url}/runs/r/report"
        path = report.path
        assert path is not None
        assert path.is_relative_to(tmp_path / "cache")
        assert path.read_text() == httpx.get(report.url).text
        assert "<h2>Reproduce</h2>" in path.read_text()
        with pytest.raises(NotFoundError, match="answers 404"):
            client.fetch_page(f"{server.url}/runs/nothing/report")


def test_a_number_in_a_path_is_one(transport: Transport) -> None:
    for name in ("version.update", "version.delete"):
        with pytest.raises(NotFoundError, match="salt"):
            transport.call(name, {"name": "salt", "number": 3})


class OutOfReach(RemoteTransport):
    """A client whose network leads to the server and not to the object store."""

    def call(self, operation: str, body: Any) -> Any:
        answer = super().call(operation, body)
        if operation == "blob.presign":
            answer = msgspec.structs.replace(answer, url="http://127.0.0.1:9/blobs")
        return answer


def test_large_files_go_past_the_server_into_its_object_store(tmp_path: Path) -> None:
    """By a presigned address; through the server where the store cannot be reached, or refuses."""
    moto = MotoServer(tmp_path / "moto").start()
    try:
        secrets = {"aws_access_key_id": moto.access_key, "aws_secret_access_key": moto.secret_key}
        boto3.client("s3", endpoint_url=moto.endpoint, region_name=moto.region, **secrets).create_bucket(Bucket="blobs")
        environment = {
            "MILLRACE_BLOBS_URL": "s3://blobs/home", "AWS_ENDPOINT_URL": moto.endpoint, "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": moto.region, "AWS_ACCESS_KEY_ID": moto.access_key, "AWS_SECRET_ACCESS_KEY": moto.secret_key,
        }  # fmt: skip
        with (
            RunningServer(tmp_path / "home", environment=environment) as server,
            closing(RemoteTransport(server.url)) as client,
            closing(OutOfReach(server.url)) as confined,
        ):
            files = [tmp_path / f"weights{index}.bin" for index in range(2)]
            for file in files:
                file.write_bytes(os.urandom(17 << 20))

            def passed() -> int:
                text = httpx.get(f"{server.url}/metrics").text
                counts = re.findall(r"requests_total{[^}]*blob.put[^}]*} ([0-9.]+)", text)
                return int(sum(map(float, counts)))

            stored = client.upload(files[0])
            assert passed() == 0
            client.download(stored.digest, tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == files[0].read_bytes()
            with pytest.raises(NotFoundError):
                client.call("blob.confirm", {"digest": "sha256:" + "1" * 64, "size_bytes": 3})
            with pytest.raises(InputError):
                client.call("blob.presign", {"digest": "../1", "size_bytes": 3})
            place = client.call("blob.presign", {"digest": stored.digest, "size_bytes": 1})
            httpx.put(place.url, content=b"other bytes", headers=place.headers)
            with pytest.raises(CorruptError):
                client.call("blob.confirm", {"digest": stored.digest, "size_bytes": 1})
            client.download(stored.digest, tmp_path / "back")  # what was there is still what it was
            assert confined.upload(files[1]).size_bytes == 17 << 20
            assert passed() == 1
    finally:
        moto.stop()
