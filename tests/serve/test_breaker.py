"""The circuit breaker: opens for a model that only fails, never for what clients do, and closes by itself."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.core.errors import StageError, UnavailableError
from millrace.serve.admission import Admission
from millrace.serve.batching import Cost
from millrace.serve.breaker import OPEN_MAX_S, Breaker
from millrace.testing.serving import INFER, PREDICT, Doubler, InProcessServer, request, responses


def predict(value: float = 1.0) -> bytes:
    return request(PREDICT, json.dumps({"instances": [{"a": value, "b": 0}]}).encode())


def make(runtime: Doubler, open_s: float = 0.05, threshold: int = 3, **more: Any) -> InProcessServer:
    server = InProcessServer(runtime, admission=Admission(hold_s=0.001), **more)
    server.plane.breaker = Breaker(threshold, open_s)
    return server


def gauge(server: InProcessServer) -> int:
    text = "".join(server.catalog.snapshot().endpoints.values())
    (line,) = [line for line in text.splitlines() if line.startswith("millrace_breaker_open{")]
    return int(line.split()[-1])


INLINE, THREAD = Cost(base_s=1e-6, per_row_s=1e-9), Cost(base_s=0.001, per_row_s=0.0)


@pytest.mark.parametrize("cost", [INLINE, THREAD])
def test_a_model_that_only_fails_is_not_asked_until_it_works_again(cost: Cost) -> None:
    async def main() -> None:
        runtime = Doubler()
        server = make(runtime, cost=cost)
        calls: list[int] = []
        runtime.before = calls.append
        runtime.failure = StageError("the worker died")
        for _ in range(3):
            assert (await server.ask(predict()))[0][0] == 500
        await server.settle()
        asked = len(calls)
        assert asked == 4  # the fourth was a row of its own
        assert (server.plane.breaker.is_open, gauge(server)) == (True, 1)
        ((_, _, answer),) = await server.ask(b"GET /v2/models/m/stats HTTP/1.1\r\nHost: localhost\r\n\r\n")
        stated = json.loads(answer)["model_stats"][0]["millrace"]["breaker"]
        assert stated == {"is_open": True, "failures": 4, "opened": 1}
        for target in (INFER, PREDICT):  # before the body is looked at
            ((status, headers, answer),) = await server.ask(request(target, b"\xff"))
            assert (status, headers[b"Retry-After"]) == (503, b"1")
            assert "only failed: it is not asked until it works again" in json.loads(answer)["error"]
        assert len(calls) == asked
        await asyncio.sleep(0.07)
        await server.settle()
        assert len(calls) == asked + 1  # tried again, in vain
        assert (await server.ask(predict()))[0][0] == 503
        runtime.failure = None
        await asyncio.sleep(0.15)
        await server.settle()
        assert (server.plane.breaker.is_open, gauge(server), server.plane.breaker.opened) == (False, 0, 1)
        ((status, _, answer),) = await server.ask(predict(4.0))
        assert (status, json.loads(answer)) == (200, {"predictions": [{"value": 8.0}]})
        assert server.plane.admission.waiting == server.plane.admission.rows == 0

    asyncio.run(main())


def test_what_clients_do_wrong_never_opens_it() -> None:
    """Broken bodies, values that are not finite, deadlines, full queues, hanging up: any number of them."""

    async def main() -> None:
        server = make(Doubler(), threshold=1)
        for _ in range(20):
            assert (await server.ask(request(PREDICT, b"{")))[0][0] == 400
            assert (await server.ask(request(PREDICT, b'{"instances": [{"a": "x", "b": 1}]}')))[0][0] == 400
            infinite = b'{"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1e39, 1]}]}'
            assert (await server.ask(request(INFER, infinite)))[0][0] == 400
            connection, _ = server.connect()
            connection.data_received(predict())
            connection.connection_lost(None)
        assert (server.plane.breaker.is_open, server.plane.breaker.failures) == (False, 0)

    asyncio.run(main())


def test_an_input_that_breaks_the_graph_shuts_nobody_else_out() -> None:
    """Sent again and again it fails alone: the model's own row proves at once that the model works."""

    async def main() -> None:
        runtime = Doubler()
        server = make(runtime, open_s=5.0)
        real = runtime.infer

        def infer(tensors: Any) -> Any:
            if (tensors["x"][:, 0] == 13).any():
                raise StageError("the graph failed on these tensors")
            return real(tensors)

        server.plane.batcher._infer = infer
        for number in range(30):
            poison, _ = server.connect()
            other, transport = server.connect()
            poison.data_received(predict(13.0))
            if number % 3 == 0:  # in the same batch
                other.data_received(predict(2.0))
            await server.settle()
            if number % 3 != 0:
                other.data_received(predict(2.0))
                await server.settle()
            assert json.loads(responses(transport.data)[0][2]) == {"predictions": [{"value": 4.0}]}
        assert not server.plane.breaker.is_open

    asyncio.run(main())


def test_an_unavailable_runtime_is_a_503() -> None:
    async def main() -> None:
        runtime = Doubler()
        server = make(runtime)
        runtime.failure = UnavailableError("the runtime is starting again")
        ((status, headers, answer),) = await server.ask(predict())
        assert (status, headers[b"Retry-After"]) == (503, b"1")
        assert json.loads(answer) == {"error": "the runtime is starting again"}

    asyncio.run(main())


def test_a_closed_plane_tries_no_more() -> None:
    async def main() -> None:
        runtime = Doubler()
        server = make(runtime, open_s=0.02)
        calls: list[int] = []
        runtime.before = calls.append
        runtime.failure = StageError("gone")
        for _ in range(3):
            await server.ask(predict())
        await server.settle()
        server.plane.close(1.0)
        asked = len(calls)
        await asyncio.sleep(0.06)
        assert len(calls) == asked

    asyncio.run(main())


@given(st.lists(st.sampled_from(["good", "bad", "trial good", "trial bad"]), max_size=60), st.integers(1, 5))
def test_it_opens_after_failures_in_a_row_alone(steps: list[str], threshold: int) -> None:
    breaker = Breaker(threshold, open_s=1.0)
    in_a_row, now_s, waits = 0, 0.0, []
    for step in steps:
        now_s += 1.0
        if step.startswith("trial"):
            if breaker.is_open:
                wait_s = breaker.tried(step == "trial good", now_s)
                if step == "trial good":
                    assert (wait_s, breaker.is_open) == (0.0, False)
                    in_a_row, waits = 0, []
                else:
                    waits.append(wait_s)
                    assert breaker.is_open
                    assert wait_s == min(OPEN_MAX_S, 2.0 ** (len(waits) - 1))
                    assert 1 <= breaker.retry_after_s(now_s) <= OPEN_MAX_S
            continue
        was_open = breaker.is_open
        if step == "good":
            in_a_row = 0
            breaker.succeeded()
        else:
            in_a_row += 1
            opened = breaker.failed()
            assert opened == (in_a_row >= threshold and not was_open)
        assert breaker.is_open == (was_open or in_a_row >= threshold)


def test_metrics_and_clocks_agree_on_open_time() -> None:
    breaker = Breaker(1, 2.0)
    assert breaker.failed()
    now_s = time.monotonic()
    assert breaker.tried(False, now_s) == 2.0
    assert breaker.retry_after_s(now_s + 0.5) == 2
    assert breaker.retry_after_s(now_s + 50) == 1


def test_what_only_looks_at_answers_is_dropped_when_it_fails() -> None:
    def fails(*_: Any) -> None:
        raise ValueError("it cannot take that")

    async def main() -> None:
        server = make(Doubler())
        plane = server.plane
        plane.mirror = fails
        for _ in range(2):
            assert (await server.ask(predict()))[0][0] == 200
        assert plane.mirror is None
        assert not plane.breaker.is_open

    asyncio.run(main())
