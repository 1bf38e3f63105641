"""Whatever is sent, the answer is a refusal in MLflow's form and never a traceback."""

from __future__ import annotations

import http.client
import json
from contextlib import closing
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.api.mlflow.errors import STATUSES, explained
from millrace.api.mlflow.routes import CALLS
from millrace.core.errors import all_errors
from millrace.core.operations.table import OPERATIONS

API = "/api/2.0/mlflow"


def refused(answer: httpx.Response) -> tuple[int, str]:
    body = answer.json()
    assert set(body) == {"error_code", "message"}
    assert "Traceback" not in body["message"]
    return answer.status_code, body["error_code"]


@pytest.mark.parametrize(
    "body",
    [
        b"[]", b'"text"', b"5", b"null", b"{", b"[" * 100_000, b'{"tags":' * 100_000, b"\xff\xfe", b'{"start_time": NaN}',
        b'{"experiment_id": {"a": 1}}', b'{"start_time": "soon"}', b'{"tags": 5}', b'{"tags": [5]}', b'{"start_time": 1e400}',
        b'{"experiment_id": "0", "start_time": 99999999999999999999}', b'{"experiment_id": 5}',
    ],
    ids=range(16),
)  # fmt: skip
def test_bodies_that_are_no_request(api: Any, body: bytes) -> None:
    answer = api.http.post(f"{API}/runs/create", content=body, headers={"Content-Type": "application/json"})
    assert refused(answer) == (400, "INVALID_PARAMETER_VALUE")


def test_a_body_must_say_that_it_is_json(api: Any) -> None:
    body = json.dumps({"name": "x"}).encode()
    for kind in ("application/x-www-form-urlencoded", "text/plain", "multipart/form-data"):
        answer = api.http.post(f"{API}/experiments/create", content=body, headers={"Content-Type": kind})
        assert refused(answer) == (400, "INVALID_PARAMETER_VALUE")
    kind = "application/json; charset=utf-8"
    assert api.http.post(f"{API}/experiments/create", content=body, headers={"Content-Type": kind}).is_success


def test_a_body_of_100_mb_is_refused_before_it_is_read(api: Any) -> None:
    with closing(http.client.HTTPConnection(api.http.base_url.host, api.http.base_url.port, timeout=60)) as connection:
        connection.putrequest("POST", f"{API}/runs/log-batch")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(100 << 20))
        connection.endheaders()
        connection.send(b"[")
        response = connection.getresponse()
        body = json.loads(response.read())
    assert (response.status, body["error_code"]) == (413, "INVALID_PARAMETER_VALUE")


def test_what_is_not_spoken(api: Any) -> None:
    for method, path in (("GET", f"{API}/nope"), ("POST", "/api/3.0/mlflow/traces"), ("DELETE", f"{API}/runs/create")):
        assert refused(api.http.request(method, path)) == (404, "ENDPOINT_NOT_FOUND")
    assert api.http.get("/health").text == "OK"
    assert api.http.get("/version").text.count(".") == 2
    info = api.http.get("/api/3.0/mlflow/server-info").json()
    assert (info["multipart_uploads_enabled"], info["workspaces_enabled"]) == (True, False)


def test_a_bug_is_an_internal_error_without_a_traceback(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(api.services.records, "search_runs", broken)
    answer = api.http.post(f"{API}/runs/search", json={"experiment_ids": ["0"]})
    assert refused(answer) == (500, "INTERNAL_ERROR")


def test_every_route_names_an_operation_and_every_error_has_a_code() -> None:
    assert {call.operation for call in CALLS} <= set(OPERATIONS)
    assert len({(call.method, call.path) for call in CALLS}) == len(CALLS)
    for error in all_errors():
        status, code = explained(error("x"))
        assert 400 <= status < 600
        assert code in STATUSES


JUNK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8)
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = sorted({field.name for call in CALLS for field in msgspec.structs.fields(call.request)})


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.sampled_from([call for call in CALLS if "{" not in call.path]),
    st.dictionaries(st.sampled_from(FIELDS), JUNK, max_size=5),
)
def test_no_request_makes_the_server_fail(api: Any, call: Any, body: dict[str, Any]) -> None:
    if call.method == "GET":
        answer = api.http.get(API + call.path, params={name: json.dumps(value) for name, value in body.items()})
    else:
        answer = api.http.request(call.method, API + call.path, json=body)
    assert answer.status_code < 500, answer.text
    assert answer.status_code == 200 or refused(answer)
