"""A denied attempt is an event, whichever door it came through: derived routes, MLflow's, the pages."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from millrace.api.app import build_app
from millrace.control.dispatch import Dispatcher
from millrace.core.operations import Operation
from millrace.core.operations.table import OPERATIONS
from millrace.core.principals import Grant, Principal
from millrace.wiring import open_dispatcher

ROLE = "annotator"  # labels, and looks at nothing else
EVE = Principal(id="token:eve", grants=(Grant(role=ROLE),))
DERIVED = [  # what it may not do anywhere; of version.update the number in the path is refused before that, as text
    one
    for one in OPERATIONS.values()
    if not one.is_raw and not EVE.where(one.name, one.is_write) and one.name != "version.update"
]
PAGES = {
    "/": "run.list", "/runs": "run.list", "/runs/x": "run.get", "/models": "model.list", "/models/digits": "model.get",
"/compare?runs=a,b": "run.list", "/endpoints/digits": "endpoint.get",
    "/events": "event.list", "/runs/x/report": "run.get", "/pages/data/curves?runs=x&metric=loss": "run.metrics",
}  # fmt: skip
MLFLOW: tuple[tuple[str, str, dict[str, Any], str], ...] = (
    ("GET", "runs/get?run_id=x", {}, "run.get"),
    ("POST", "runs/create", {"experiment_id": "0"}, "run.track"),
    ("POST", "runs/search", {"experiment_ids": ["0"]}, "run.list"),
    ("POST", "runs/log-metric", {"run_id": "x", "key": "k", "value": 1.0, "timestamp": 1, "step": 0}, "run.log"),
    ("POST", "runs/delete", {"run_id": "x"}, "run.delete"),
    ("POST", "experiments/create", {"name": "mine"}, "project.create"),
    ("GET", "experiments/get?experiment_id=0", {}, "project.list"),
)


class Door:
    """An application that wants a token, asked by who may do nothing; and the events that came of it."""

    def __init__(self, app: Starlette, dispatcher: Dispatcher, token: str) -> None:
        self._app, self._dispatcher = app, dispatcher
        self._headers = {"Authorization": f"Bearer {token}"}

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, list[tuple[str, str, str]]]:
        """The status, and (verb, actor, outcome) of the new events."""
        records = self._dispatcher.services.records
        records.seal()
        before = max((event.seq or 0 for event in records.events(limit=100_000)), default=0)

        async def asked() -> int:
            transport = httpx.ASGITransport(self._app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                answer = await client.request(method, path, json=body, headers=self._headers)
                return answer.status_code

        status = asyncio.run(asked())
        records.seal()
        found = records.events(since=before)
        return status, [(event.verb, event.actor, event.detail["outcome"]) for event in found]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    dispatcher = open_dispatcher(str(Path(tmp_path_factory.mktemp("denied")) / "home"))
    made = dispatcher.call("token.create", {"name": "eve", "scope": ROLE})
    yield Door(build_app(dispatcher, wants_token=True), dispatcher, made.secret)
    dispatcher.close()


@pytest.mark.parametrize("operation", DERIVED, ids=lambda one: one.name)
def test_a_denied_operation_is_an_event(door: Door, operation: Operation) -> None:
    body = dict(operation.example)
    path = operation.path
    for name in list(body):
        if f"{{{name}}}" in path:
            path = path.replace(f"{{{name}}}", str(body.pop(name)))
    if operation.method in ("POST", "PUT", "PATCH"):
        status, events = door.ask(operation.method, f"/api/v1{path}", body)
    else:
        query = "&".join(f"{name}={value}" for name, value in body.items())
        status, events = door.ask(operation.method, f"/api/v1{path}?{query}")
    assert (status, events) == (403, [(operation.name, EVE.id, "auth.denied")])


@pytest.mark.parametrize("path", PAGES)
def test_a_denied_page_is_an_event(door: Door, path: str) -> None:
    assert door.ask("GET", path) == (403, [(PAGES[path], EVE.id, "auth.denied")])


@pytest.mark.parametrize(("method", "path", "body", "operation"), MLFLOW, ids=lambda one: str(one)[:24])
def test_a_denied_call_of_mlflow_is_an_event(
    door: Door, method: str, path: str, body: dict[str, Any], operation: str
) -> None:
    status, events = door.ask(method, f"/api/2.0/mlflow/{path}", body or None)
    assert (status, [(actor, outcome) for _, actor, outcome in events]) == (403, [(EVE.id, "auth.denied")])
    assert OPERATIONS[events[0][0]].name.partition(".")[0] == operation.partition(".")[0]
