"""The same verbs, the same answers: in process, through the home's server, through one far away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from millrace.client.http import HttpTransport
from millrace.client.remote import RemoteTransport
from millrace.core.errors import ConflictError, InputError, MillraceError, NotFoundError
from millrace.core.ports import Transport
from millrace.core.types import MetricPoint
from millrace.testing.server import RunningServer
from millrace.wiring import open_transport


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
            break
    assert verbs == ["run.end"]
