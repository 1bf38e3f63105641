"""Deadlines: what cannot be answered in time is not begun, and the answer says 504; what runs is not interrupted."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.serve.admission import Admission
from millrace.serve.batching import Cost
from millrace.testing.serving import INFER, PREDICT, Doubler, InProcessServer, request, responses

SLOW = Cost(base_s=0.0, per_row_s=0.02)


def predict(value: float, headers: bytes = b"") -> bytes:
    return request(PREDICT, json.dumps({"instances": [{"a": value, "b": 0}]}).encode(), headers)


def infer(value: float, headers: bytes = b"", binary: bool = True, **parameters: Any) -> bytes:
    tensor: dict[str, Any] = {"name": "x", "shape": [1, 2], "datatype": "FP32"}
    if not binary:
        return request(INFER, json.dumps({"inputs": [{**tensor, "data": [value, 0]}], "parameters": parameters}).encode(), headers)  # fmt: skip
    tensor["parameters"] = {"binary_data_size": 8}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": False, **parameters}}).encode()
    length = b"Inference-Header-Content-Length: %d\r\n" % len(head)
    return request(INFER, head + np.array([value, 0], np.float32).tobytes(), length + headers)


def slow_server(delay_s: float = 0.02, **admission: Any) -> tuple[InProcessServer, Doubler]:
    """One row per call, each `delay_s`."""
    runtime = Doubler()
    runtime.before = lambda rows: time.sleep(delay_s)
    queue = Admission(hold_s=0.001, **admission)
    return InProcessServer(runtime, admission=queue, cost=SLOW, max_batch=1), runtime


FORMS = {
    "header": lambda value, ms: predict(value, b"X-Request-Timeout-Ms: %d\r\n" % ms),
    "header, binary": lambda value, ms: infer(value, b"X-Request-Timeout-Ms: %d\r\n" % ms),
    "parameter": lambda value, ms: infer(value, timeout=ms * 1000),
    "parameter, json": lambda value, ms: infer(value, binary=False, timeout=ms * 1000),
    "both": lambda value, ms: infer(value, b"X-Request-Timeout-Ms: 60000\r\n", timeout=ms * 1000),
}


@pytest.mark.parametrize("form", FORMS)
def test_what_is_predicted_to_be_late_is_refused_at_once(form: str) -> None:
    """Behind a fifth of a second of work, with 100 ms to go: 504, and the model never sees it."""

    async def main() -> None:
        server, runtime = slow_server()
        connection, transport = server.connect()
        for value in range(10):
            connection.data_received(predict(float(value)))
        late, answers = server.connect()
        start_s = time.perf_counter()
        late.data_received(FORMS[form](50.0, 100))
        while not answers.data:
            await asyncio.sleep(0.001)
        assert time.perf_counter() - start_s < 0.19
        ((status, headers, answer),) = responses(answers.data)
        assert (status, b"Retry-After" in headers) == (504, False)
        assert "after the deadline" in json.loads(answer)["error"]
        patient, in_time = server.connect()
        patient.data_received(FORMS[form](60.0, 5000))
        await server.settle()
        assert responses(in_time.data)[0][0] == 200
        assert runtime.rows == 11
        assert [one[0] for one in responses(transport.data)] == [200] * 10
        assert server.plane.metrics.late == 1
        assert "millrace_late_total" in "".join(server.catalog.snapshot().endpoints.values())

    asyncio.run(main())


def test_what_becomes_late_in_the_queue_is_dropped_before_it_runs() -> None:
    """Calls take five times as long as predicted: whose time passes meanwhile is told so, unrun."""

    async def main() -> None:
        server, runtime = slow_server(0.1)
        connections = [server.connect() for _ in range(6)]
        for number, (connection, _) in enumerate(connections):
            connection.data_received(predict(float(number), b"X-Request-Timeout-Ms: 150\r\n"))
        await server.settle()
        seen = [responses(transport.data)[0] for _, transport in connections]
        statuses = [status for status, _, _ in seen]
        assert statuses[0] == 200
        assert statuses[3:] == [504] * 3
        assert set(statuses) == {200, 504}
        assert runtime.rows == statuses.count(200)
        for number, (status, _, answer) in enumerate(seen):
            if status == 200:
                assert json.loads(answer) == {"predictions": [{"value": 2.0 * number}]}
            else:
                assert "the deadline would have passed before the answer: it waited 0." in json.loads(answer)["error"]
        admission, metrics = server.plane.admission, server.plane.metrics
        assert (admission.waiting, admission.rows, admission.waiting_bytes) == (0, 0, 0)
        assert (metrics.late, metrics.failures) == (statuses.count(504), 0)
        assert metrics.requests["predict", 504] == statuses.count(504)

    asyncio.run(main())


def test_a_call_that_runs_is_not_interrupted() -> None:
    """Its deadline passes while the model works: the answer comes all the same."""

    async def main() -> None:
        server, _ = slow_server(0.3)
        ((status, _, _),) = await server.ask(predict(1.0, b"X-Request-Timeout-Ms: 200\r\n"))
        assert status == 200

    asyncio.run(main())


def test_a_deadline_is_kept_inline_and_when_the_head_is_known() -> None:
    async def main() -> None:
        runtime = Doubler()
        server = InProcessServer(runtime)
        connection, transport = server.connect()
        data = infer(4.0, b"X-Request-Timeout-Ms: 200\r\n")
        for _ in range(3):  # the second and third are looked up
            connection.data_received(data)
            await server.settle()
        assert [one[0] for one in responses(transport.data)] == [200] * 3
        runtime.before = lambda rows: time.sleep(0.05)
        other, answers = server.connect()
        other.data_received(infer(5.0))
        await asyncio.sleep(0)
        connection.data_received(data)  # waits for the loop while the call runs, then for nothing
        other.data_received(infer(6.0))
        connection.data_received(data)
        time.sleep(0.22)
        await server.settle()
        assert [one[0] for one in responses(transport.data)][3:] == [504, 504]
        assert [one[0] for one in responses(answers.data)] == [200, 200]

    asyncio.run(main())


@pytest.mark.parametrize("given_ms", [b"0", b"-5", b"1.5", b"ten", b"", b"86400001", b"9" * 40, b"\xff"])
def test_a_wrong_header_is_named(given_ms: bytes) -> None:
    async def main() -> None:
        server = InProcessServer(Doubler())
        for make in (infer, predict):
            ((status, _, answer),) = await server.ask(make(1.0, b"X-Request-Timeout-Ms: " + given_ms + b"\r\n"))
            assert status == 400
            assert "X-Request-Timeout-Ms: want whole milliseconds" in json.loads(answer)["error"]

    asyncio.run(main())


@pytest.mark.parametrize("given_us", [-1, 1.5, "5", True, [1], 2**63, {"a": 1}])
def test_a_wrong_parameter_is_named(given_us: Any) -> None:
    async def main() -> None:
        server = InProcessServer(Doubler())
        for binary in (True, False):
            ((status, _, answer),) = await server.ask(infer(1.0, binary=binary, timeout=given_us))
            assert status == 400
            assert "parameters.timeout: want whole microseconds" in json.loads(answer)["error"]
        for none in (0, 10**9):
            assert (await server.ask(infer(1.0, timeout=none)))[0][0] == 200

    asyncio.run(main())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 999)), min_size=1, max_size=12), st.booleans())
def test_every_request_is_answered_once_with_its_own_or_a_504(asked: list[tuple[int, int]], is_slow: bool) -> None:
    async def main() -> None:
        runtime = Doubler()
        runtime.before = lambda rows: time.sleep(0.004)
        cost = Cost(base_s=0.002, per_row_s=0.0) if is_slow else Cost(base_s=1e-6, per_row_s=0.0)
        server = InProcessServer(runtime, admission=Admission(hold_s=0.0), cost=cost, max_batch=3)
        opened = [server.connect() for _ in asked]
        for (connection, _), (ms, value) in zip(opened, asked, strict=True):
            connection.data_received(infer(float(value), b"X-Request-Timeout-Ms: %d\r\n" % ms))
        await server.settle()
        answered = 0
        for (_, transport), (_, value) in zip(opened, asked, strict=True):
            ((status, _, answer),) = responses(transport.data)
            if status == 200:
                answered += 1
                assert json.loads(answer)["outputs"][0]["data"] == [2.0 * value]
            else:
                assert status == 504
        assert runtime.rows == answered
        assert server.plane.metrics.late == len(asked) - answered

    asyncio.run(main())


def test_who_hangs_up_before_the_deadline_is_not_run_and_not_counted_late() -> None:
    async def main() -> None:
        server, runtime = slow_server(0.05)
        first, _ = server.connect()
        first.data_received(predict(1.0))
        leaver, left = server.connect()
        leaver.data_received(predict(2.0, b"X-Request-Timeout-Ms: 5000\r\n"))
        leaver.connection_lost(None)
        await server.settle()
        await asyncio.sleep(0.02)
        assert runtime.rows == 1
        assert left.data == b""
        assert server.plane.metrics.late == 0

    asyncio.run(main())
