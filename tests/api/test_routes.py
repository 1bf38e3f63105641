"""Every operation has its route; requests, answers and errors travel in both forms."""

from __future__ import annotations

import math

import httpx
import msgspec
import pytest

from millrace.api.openapi import document
from millrace.api.routes import PREFIX
from millrace.client.http import HttpTransport
from millrace.core.errors import InputError, NotFoundError, UnavailableError
from millrace.core.operations.table import OPERATIONS
from millrace.core.types import MetricPoint
from millrace.testing.server import RunningServer


def test_the_document_describes_every_operation_and_is_served(server: RunningServer) -> None:
    served = httpx.get(f"{server.url}/openapi.json").json()
    assert served["openapi"] == "3.1.0"
    described = {one["operationId"]: one for methods in served["paths"].values() for one in methods.values()}
    assert set(described) == set(OPERATIONS)
    assert served == msgspec.json.decode(msgspec.json.encode(document(OPERATIONS.values())))


def test_examples_are_requests_that_the_operation_takes() -> None:
    for operation in OPERATIONS.values():
        msgspec.convert(operation.example, operation.request)


def test_no_two_operations_share_a_route() -> None:
    routes = [(one.method, one.path) for one in OPERATIONS.values()]
    assert len(routes) == len(set(routes))


def test_health_readiness_and_metrics(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz").json() == {"status": "ready"}
    httpx.get(f"{server.url}{PREFIX}/runs")
    text = httpx.get(f"{server.url}/metrics").text
    assert 'millrace_api_requests_total{route="run.list",status="200"}' in text
    assert 'millrace_api_request_seconds_count{route="run.list"}' in text


def test_numbers_that_json_lacks_reach_our_own_client(transport: HttpTransport) -> None:
    run = transport.call("run.track", {"name": "numbers"})
    points = [MetricPoint(run.id, "loss", step, value, 1.0) for step, value in enumerate((0.5, math.nan, math.inf))]
    transport.call("run.log", {"run": run.id, "points": points})
    values = [point.value for point in transport.call("run.metrics", {"run": run.id})]
    assert values[0] == 0.5
    assert math.isnan(values[1])
    assert values[2] == math.inf


def test_queries_carry_numbers_and_booleans(server: RunningServer, transport: HttpTransport) -> None:
    transport.call("run.track", {"name": "one"})
    transport.call("run.track", {"name": "two"})
    assert len(httpx.get(f"{server.url}{PREFIX}/runs", params={"limit": "1"}).json()) == 1
    assert [run.name for run in transport.call("run.list", {"limit": 1})] == ["two"]


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "code"),
    [
        ("GET", "/runs?limit=three", None, 400, "input.invalid"),
        ("GET", "/runs?limit=1&limit=2", None, 400, "input.invalid"),
        ("GET", "/runs?colour=red", None, 400, "input.invalid"),
        ("GET", "/runs/nothing", None, 404, "ref.not_found"),
        ("GET", "/nothing", None, 404, "ref.not_found"),
        ("DELETE", "/runs", None, 405, "input.invalid"),
        ("POST", "/runs/track", b"[1]", 400, "input.invalid"),
        ("POST", "/runs/track", b'"text"', 400, "input.invalid"),
        ("POST", "/runs/track", b'{"name": NaN}', 400, "input.invalid"),
        ("POST", "/runs/track", b'{"name": ', 400, "input.invalid"),
        ("POST", "/runs/track", b"\xff\xfe", 400, "input.invalid"),
        ("POST", "/runs/track", b'{"a":' * 100_000, 400, "input.invalid"),
        ("POST", "/runs/track", b'{"params":' + b"[" * 100_000, 400, "input.invalid"),
        ("POST", "/runs/track", b'{"name": "' + b"x" * (33 << 20) + b'"}', 413, "input.too_large"),
        ("POST", "/models/compress", b'{"path": "/nothing.onnx", "data": "a.csv", "label": "y"}', 404, "ref.not_found"),
    ],
)
def test_bad_requests_are_problem_documents(
    server: RunningServer, method: str, path: str, content: bytes | None, status: int, code: str
) -> None:
    answer = httpx.request(method, f"{server.url}{PREFIX}{path}", content=content, timeout=30)
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["detail"]
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_foreign_hosts_and_origins_are_refused(server: RunningServer, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{server.url}{PREFIX}/runs/track", headers=headers, json={"name": "stranger"})
    assert answer.status_code == 403


def test_errors_keep_their_type_on_the_way(transport: HttpTransport) -> None:
    with pytest.raises(NotFoundError, match="no run with the id 'nothing'"):
        transport.call("run.get", {"run": "nothing"})
    with pytest.raises(InputError, match="limt"):
        transport.call("run.list", {"limt": 1})


def test_a_server_that_is_not_there_is_named() -> None:
    transport = HttpTransport("http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        transport.call("run.list", {})
    transport.close()
    with pytest.raises(InputError, match="http://"):
        HttpTransport("file:///etc/passwd")
