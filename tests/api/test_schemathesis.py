"""What the OpenAPI document promises, tried with generated requests: no answer is a 5xx."""

from __future__ import annotations

import warnings
from pathlib import Path

import httpx
import pytest

from millrace.testing.server import RunningServer

schemathesis = pytest.importorskip("schemathesis")
pytestmark = pytest.mark.slow
STREAMS_OF_EVENTS = ("event.watch",)  # answers for ever: tests/api/test_stream.py
LOCAL_WORK = ("endpoint.serve",)  # serves until it is stopped


def test_no_generated_request_gets_a_server_error(tmp_path: Path) -> None:
    with RunningServer(tmp_path / "home") as server:
        document = httpx.get(f"{server.url}/openapi.json").json()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schema = schemathesis.openapi.from_dict(document)
            schema.config.update(base_url=server.url)
            failures = []
            tried = 0
            for result in schema.get_all_operations():
                operation = result.ok()
                if operation.definition.raw["operationId"] in (*STREAMS_OF_EVENTS, *LOCAL_WORK):
                    continue
                for case in examples(operation):
                    tried += 1
                    answer = case.call(timeout=30)
                    if answer.status_code >= 500:
                        failures.append((operation.label, answer.status_code, answer.text[:300]))
        assert tried > 100
        assert failures == [], failures
        assert httpx.get(f"{server.url}/readyz").status_code == 200


def examples(operation):  # type: ignore[no-untyped-def]
    """A handful of generated cases of an operation, the same every time."""
    from hypothesis import HealthCheck, Phase, given, seed, settings

    found = []

    @seed(1)
    @settings(
        max_examples=12, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=operation.as_strategy())
    def collect(case) -> None:  # type: ignore[no-untyped-def]
        found.append(case)

    collect()
    return found
