"""The one door: every verb has a handler, requests are checked, writes are audited, bugs stay inside."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.control import dispatch
from millrace.control.dispatch import Dispatcher, handler_names
from millrace.core.errors import InputError, MillraceError, NotFoundError
from millrace.core.operations.table import OPERATIONS
from millrace.core.types import Event
from millrace.wiring import open_services, open_transport


@pytest.fixture
def transport(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_transport(str(tmp_path / "home"))
    yield opened
    opened.close()


def events_of(folder: Path) -> list[Event]:
    """The sealed events of the home: closing the transport seals them."""
    services = open_services(str(folder / "home"))
    services.records.seal()
    found = services.records.events()
    services.close()
    return found


@pytest.mark.usefixtures("transport")
def test_every_operation_has_a_documented_handler_and_nothing_else_has() -> None:
    assert handler_names() == set(OPERATIONS)
    undocumented = [name for name, handler in dispatch._HANDLERS.items() if not inspect.getdoc(handler)]
    assert undocumented == []


def test_a_second_handler_is_refused(transport: Dispatcher) -> None:
    with pytest.raises(ValueError, match=r"run\.list has a handler already"):
        dispatch.handles(OPERATIONS["run.list"])(lambda services, body: None)


@pytest.mark.parametrize(
    ("operation", "body", "message"),
    [
        ("run.list", {"limt": 3}, "limt"),
        ("run.list", {"limit": "three"}, r"limit"),
        ("model.get", {}, "model"),
    ],
)
def test_a_request_of_another_shape_is_named(
    transport: Dispatcher, operation: str, body: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        transport.call(operation, body)
    assert operation in caught.value.message
    assert caught.value.hint


def test_an_unknown_operation_is_not_found(transport: Dispatcher) -> None:
    with pytest.raises(NotFoundError, match=r"no operation 'run\.fly'"):
        transport.call("run.fly", {})


def test_writes_are_events_and_reads_are_not(transport: Dispatcher, tmp_path: Path) -> None:
    run = transport.call("run.track", {"name": "script"})
    transport.call("run.list", {})
    transport.call("run.get", {"run": run.id})
    transport.call("system.status", {})
    transport.call("run.log", {"run": run.id, "params": {"lr": 0.1}})
    transport.call("run.end", {"run": run.id, "state": "succeeded"})
    found = events_of(tmp_path)
    assert [event.verb for event in found] == ["run.track", "run.end"]
    assert {event.detail["outcome"] for event in found} == {"ok"}
    assert found[1].subject == f"run:{run.id}"
    assert {event.actor for event in found} == {dispatch.local_principal()}


def test_a_write_that_fails_is_an_event_too(transport: Dispatcher, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        transport.call("run.end", {"run": "nothing", "state": "failed"})
    (event,) = events_of(tmp_path)
    assert (event.verb, event.subject, event.detail["outcome"]) == ("run.end", "run:nothing", "ref.not_found")


def broken(services: object, body: object) -> Any:
    raise ZeroDivisionError("a bug")


def broken_late(services: object, body: object) -> Iterator[int]:
    yield 1
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("handler", [broken, broken_late])
def test_a_bug_is_one_line_and_its_traceback_is_in_a_file(
    transport: Dispatcher, monkeypatch: pytest.MonkeyPatch, handler: dispatch.Handler
) -> None:
    monkeypatch.setitem(dispatch._HANDLERS, "system.du", handler)
    with pytest.raises(MillraceError, match=r"system\.du failed .* ZeroDivisionError: a bug") as caught:
        list(transport.stream("system.du", {}))
    assert caught.value.code == "internal"
    assert "Traceback" not in caught.value.message
    assert "in broken" in Path(caught.value.details["log"]).read_text()
