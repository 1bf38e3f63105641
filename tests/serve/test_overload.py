"""Overload: what is refused, when, how late, and that what was let in is answered in time."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.serve.access import Caller, Guard
from millrace.serve.admission import LEARN_S, LONGEST_S, MARGIN, Admission, Pacer, Refusal
from millrace.serve.batching import Cost
from millrace.serve.clients import Client, Clients
from millrace.serve.service import HttpLimits
from millrace.testing.serving import INFER, PREDICT, Doubler, InProcessServer, request, responses

S = 1_000_000_000
SLOW = Cost(base_s=0.0, per_row_s=0.01)  # runs on a thread


def body(*values: float) -> bytes:
    return json.dumps({"instances": [{"a": value, "b": 0} for value in values]}).encode()


def predict(*values: float, headers: bytes = b"") -> bytes:
    return request(PREDICT, body(*values), headers)


def slow(runtime: Doubler, delay_s: float = 0.01) -> Doubler:
    """Takes a while for every row."""
    runtime.before = lambda rows: time.sleep(delay_s * rows)
    return runtime


def make(queue_s: float = 1.0, cost_s: float = 0.1, **more: Any) -> Admission:
    admission = Admission(queue_s=queue_s, **more)
    admission.seconds_per_row = cost_s
    return admission


# ---------------------------------------------------------------------- the bound


def test_the_queue_is_bounded_in_predicted_seconds() -> None:
    """A tenth of a second per row, one second: nobody is let in behind ten rows."""
    admission = make()
    assert admission.admit(1, rows=9) is None
    assert admission.admit(1, rows=500) is None  # behind 0.9 s: what it takes itself is its own affair
    refusal = admission.admit(1)
    assert refusal is not None
    assert (refusal.status, refusal.retry_after_s) == (503, 30)
    assert "509 rows wait, predicted to take 51 s; want at most 1 s" in refusal.message
    admission.release(1, rows=500)
    assert admission.admit(1) is None
    refusal = admission.admit(1)
    assert refusal is not None
    assert refusal.retry_after_s == 1


@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 30)), max_size=80),
    queue_s=st.floats(0.05, 5), cost_s=st.floats(0.001, 1),
)  # fmt: skip
def test_nobody_waits_behind_more_than_the_bound(steps: list[tuple[bool, int]], queue_s: float, cost_s: float) -> None:
    admission = make(queue_s, cost_s)
    held: list[int] = []
    for is_arrival, rows in steps:
        before_s = admission.wait_s
        if is_arrival and admission.admit(1, rows=rows) is None:
            assert before_s <= max(queue_s, cost_s) + 1e-9  # a row may itself be slower than the bound
            held.append(rows)
        elif not is_arrival and held:
            admission.release(1, rows=held.pop(0))
        assert admission.rows == sum(held)
        assert admission.waiting == len(held)


def test_what_is_measured_corrects_the_calibration() -> None:
    """Rows that take ten times as long: a tenth of them are let in; and as many as before when that has passed."""
    admission = make(cost_s=0.01)
    assert admission.max_rows == 100
    now_ns = 0
    for _ in range(20):
        admission.count(0, 50)
        admission.release(0, 1, 10)
        admission.learn(10, now_ns, now_ns + S)
        admission.release(0, 0, 40)
        now_ns += S
        admission.rows = 50
    assert admission.seconds_per_row == pytest.approx(0.1 * MARGIN, rel=0.01)
    assert admission.max_rows == 8
    for _ in range(16):
        admission.learn(100, now_ns, now_ns + S)
        now_ns += S
    assert admission.max_rows > 70


def test_one_call_that_hung_does_not_close_the_queue_for_good() -> None:
    admission = make(cost_s=0.01)
    admission.count(0, 1)
    admission.release(0)
    admission.learn(1, 0, 60 * S)
    assert admission.max_rows == 50
    for second in range(100, 112):
        assert admission.admit(0) is None
        admission.release(0)
        admission.learn(1, second * S, second * S + 10_000_000)
    assert admission.max_rows > 90


def test_a_few_quick_rows_prove_nothing() -> None:
    admission = make(cost_s=0.001)
    admission.count(0, 1)
    admission.release(0)
    admission.learn(1, 0, int(LEARN_S * S / 2))  # alone a row takes longer than its share of a batch
    assert admission.seconds_per_row == 0.001


def test_accepted_requests_are_answered_within_the_bound_and_one_call() -> None:
    """The calibration is ten times too good: still nobody waits much longer than the bound."""

    async def main() -> None:
        runtime = slow(Doubler())
        admission = make(queue_s=0.2, cost_s=0.001, hold_s=0.005)
        server = InProcessServer(runtime, admission=admission, cost=SLOW, max_batch=1)
        waits: list[tuple[float, float]] = []
        statuses: Counter[int] = Counter()
        end_s = time.perf_counter() + 1.2

        async def client(number: int) -> None:
            connection, transport = server.connect()
            while time.perf_counter() < end_s:
                transport.data = b""
                began_s = time.perf_counter()
                connection.data_received(predict(float(number)))
                while not transport.data:
                    await asyncio.sleep(0.001)
                ((status, _, answer),) = responses(transport.data)
                statuses[status] += 1
                if status == 200:
                    assert json.loads(answer) == {"predictions": [{"value": 2.0 * number}]}
                    waits.append((began_s, time.perf_counter() - began_s))

        await asyncio.gather(*[client(number) for number in range(60)])
        await server.settle()
        assert set(statuses) == {200, 503}
        late = [took for began, took in waits if began > end_s - 0.6]  # once it has learned how slow a row is
        assert np.percentile(late, 99) < 0.2 + 0.15
        assert statuses[200] > 60
        assert (admission.waiting, admission.rows, admission.waiting_bytes) == (0, 0, 0)

    asyncio.run(main())


# ---------------------------------------------------------------------- before the body


def test_a_refusal_comes_before_the_body_is_parsed() -> None:
    """Rubbish is refused for the queue, not for what it is; with room it is judged."""

    async def main() -> None:
        server = InProcessServer(Doubler(), admission=make(hold_s=0.001))
        for target in (INFER, PREDICT):
            assert [one[0] for one in await server.ask(request(target, b"\xff rubbish"))] == [400]
        connection, transport = server.connect()
        server.plane.admission.count(0, 10)
        for target in (INFER, PREDICT):
            connection.data_received(request(target, b"\xff rubbish"))
            await asyncio.sleep(0.02)
        for status, headers, answer in responses(transport.data):
            assert status == 503
            assert int(headers[b"Retry-After"]) >= 1
            assert "the queue is full" in json.loads(answer)["error"]
        assert len(responses(transport.data)) == 2

    asyncio.run(main())


@pytest.mark.parametrize("head", [b"Content-Length: 50000000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_a_large_body_is_refused_by_its_head(head: bytes) -> None:
    """At once after the pause, without 100 Continue, and what the client sends meanwhile is kept nowhere."""

    async def main() -> None:
        server = InProcessServer(Doubler(), admission=make())
        connection, transport = server.connect()
        server.plane.admission.count(0, 10)
        start_s = time.perf_counter()
        connection.data_received(
            b"POST " + PREDICT + b" HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n" + head + b"\r\n"
        )
        assert transport.is_paused
        assert transport.data == b""
        for _ in range(100):
            connection.data_received(b"10000\r\n" + bytes(1 << 16))
        while not transport.data:
            await asyncio.sleep(0.002)
        assert time.perf_counter() - start_s > 0.04
        ((status, headers, _),) = responses(transport.data)
        assert (status, headers[b"Connection"], headers[b"Retry-After"]) == (503, b"close", b"1")
        assert connection._chunks == []

    asyncio.run(main())


def test_a_large_body_with_room_is_read_and_answered() -> None:
    async def main() -> None:
        server = InProcessServer(Doubler())
        values = [float(number) for number in range(5000)]
        data = predict(*values)
        assert len(data) > 1 << 16
        connection, transport = server.connect()
        for start in range(0, len(data), 40_000):
            connection.data_received(data[start : start + 40_000])
        await server.settle()
        ((status, _, answer),) = responses(transport.data)
        assert status == 200
        assert [row["value"] for row in json.loads(answer)["predictions"]] == [2 * value for value in values]

    asyncio.run(main())


# ---------------------------------------------------------------------- pace


def test_refusals_leave_one_after_the_other_and_not_too_many_are_held() -> None:
    async def main() -> None:
        pacer = Pacer(per_s=500, limit=20)
        sent: list[float] = []
        begun_s = time.perf_counter()
        taken = [pacer.hold(lambda: sent.append(time.perf_counter() - begun_s), 0.02) for _ in range(25)]
        assert taken == [True] * 20 + [False] * 5
        while len(pacer):
            await asyncio.sleep(0.002)
        assert len(sent) == 20
        assert sent == sorted(sent)
        assert sent[0] >= 0.018
        assert sent[-1] >= 0.02 + 19 / 500 - 0.003
        assert pacer.hold(lambda: sent.append(0.0), 0.0)
        await asyncio.sleep(0.01)
        assert len(sent) == 21

    asyncio.run(main())


def test_refusals_of_large_bodies_leave_more_slowly_but_none_is_held_for_ever() -> None:
    async def main() -> None:
        pacer = Pacer(per_s=1000, bytes_per_s=1e6)
        loop = asyncio.get_running_loop()
        for _ in range(3):
            pacer.hold(lambda: None, 0.0, 100_000)
        assert pacer._held[-1][0] - loop.time() == pytest.approx(0.2, abs=0.02), "a tenth of a second each"
        for _ in range(100):
            pacer.hold(lambda: None, 0.0, 100_000)
        assert pacer._held[-1][0] - loop.time() <= LONGEST_S + 0.1
        dues = [due for due, _ in pacer._held]
        assert dues == sorted(dues)

    asyncio.run(main())


def test_a_refused_connection_is_not_read_and_too_many_are_cut_off() -> None:
    async def main() -> None:
        server = InProcessServer(Doubler(), admission=make(hold_s=0.03))
        server.service.pacer.limit = 3
        server.plane.admission.count(0, 10)
        clients = [server.connect() for _ in range(5)]
        for connection, _ in clients:
            connection.data_received(predict(1.0))
        assert [transport.is_paused for _, transport in clients[:3]] == [True] * 3
        for _, transport in clients[3:]:
            ((status, headers, _),) = responses(transport.data)
            assert (status, headers[b"Connection"]) == (503, b"close")
        clients[0][0].connection_lost(None)  # who goes away meanwhile disturbs nobody
        await asyncio.sleep(0.08)
        assert clients[0][1].data == b""
        for _, transport in clients[1:3]:
            assert not transport.is_paused
            ((status, headers, _),) = responses(transport.data)
            assert (status, b"Connection" in headers) == (503, False)

    asyncio.run(main())


# ---------------------------------------------------------------------- clients


def test_a_clients_rate_is_bounded_and_its_own() -> None:
    async def main() -> None:
        limits = HttpLimits(client_rate=10.0, client_burst=3)
        server = InProcessServer(Doubler(), admission=make(hold_s=0.001), limits=limits)
        statuses: dict[str, list[int]] = {"10.0.0.1": [], "10.0.0.2": []}
        for peer, seen in statuses.items():
            for number in range(5):  # on new connections: that changes nothing
                ((status, headers, answer),) = await server.ask(predict(float(number)), peer)
                seen.append(status)
                if status == 429:
                    assert int(headers[b"Retry-After"]) == 1
                    assert f"{peer} sends more than its 10 requests a second" in json.loads(answer)["error"]
        for seen in statuses.values():
            assert seen[:3] == [200] * 3
            assert 429 in seen
        await asyncio.sleep(0.15)
        assert (await server.ask(predict(1.0), "10.0.0.1"))[0][0] == 200

    asyncio.run(main())


@given(st.lists(st.floats(0, 2), max_size=60), st.floats(0.5, 20), st.integers(1, 10))
def test_a_bucket_lets_through_its_burst_and_its_rate(gaps: list[float], rate: float, burst: int) -> None:
    client = Client("a", rate, burst)
    now_s = taken = 0.0
    for gap in gaps:
        now_s += gap
        if client.wait_s(now_s) == 0:
            client.take(now_s)
            taken += 1
        assert taken <= burst + rate * now_s + 1e-6


def test_one_client_does_not_take_the_whole_queue_by_many_connections() -> None:
    admission = make(client_share=0.5)  # ten rows in all
    greedy, modest = Client("token:a"), Client("token:b")
    for _ in range(5):
        assert admission.admit(1, client=greedy) is None
    refusal = admission.admit(1, client=greedy)
    assert refusal is not None
    assert refusal.status == 429
    assert "token:a alone has 5 requests of 5 rows waiting: want at most 50% of the queue" in refusal.message
    assert admission.admit(1, client=modest) is None
    admission.release(1)
    admission.release_client(greedy, 1)
    assert admission.admit(1, client=greedy) is None
    shared = Client("127.0.0.1", has_share=False)
    assert [admission.admit(1, client=shared) is None for _ in range(6)] == [True] * 4 + [False] * 2


def test_a_client_is_a_tokens_principal_where_tokens_are_asked_for() -> None:
    """By two addresses and many connections it is the same; what it holds is counted out again."""

    async def main() -> None:
        runtime = slow(Doubler(), 0.02)
        limits = HttpLimits(client_rate=1000.0)
        admission = make(queue_s=0.4, cost_s=0.1, hold_s=0.001)
        server = InProcessServer(runtime, admission=admission, limits=limits, cost=SLOW, max_batch=1)
        guard = Guard()
        callers = [
            Caller(digest=hashlib.sha256(secret).hexdigest(), who=f"token:{who}", where=("p",))
            for who, secret in (("ann", b"one"), ("ann", b"two"), ("bob", b"three"))
        ]
        guard.serve({"m": "p"})
        guard.believe(callers)
        server.service.ask_guard(guard)
        opened = []
        for peer, secret in (("10.0.0.1", b"one"), ("10.0.0.2", b"two"), ("10.0.0.3", b"one"), ("10.0.0.3", b"three")):
            connection, transport = server.connect(peer)
            connection.data_received(predict(1.0, headers=b"Authorization: Bearer %s\r\n" % secret))
            opened.append((connection, transport))
        await server.settle()
        seen = [(status, answer) for _, transport in opened for status, _, answer in responses(transport.data)]
        assert [status for status, _ in seen] == [200, 200, 429, 200]
        assert b"token:ann alone has 2 requests" in seen[2][1]
        assert admission.held == {}
        (connection, _), *_ = opened
        connection.data_received(predict(1.0, headers=b"Authorization: Bearer one\r\n"))
        assert len(admission.held) == 1
        connection.connection_lost(None)  # cancelled: its place is free at once
        assert admission.held == {}
        await server.settle()

    asyncio.run(main())


def test_a_forwarded_address_is_believed_of_a_trusted_proxy_alone() -> None:
    async def main() -> None:
        limits = HttpLimits(client_rate=0.001, client_burst=1)
        server = InProcessServer(Doubler(), admission=make(hold_s=0.0), limits=limits)
        server.service.proxies = ("10.0.0.0/8",)

        async def status(peer: str, forwarded: bytes) -> int:
            header = b"X-Forwarded-For: " + forwarded + b"\r\n"
            return (await server.ask(predict(1.0, headers=header), peer))[0][0]

        assert [await status("10.0.0.1", b"6.6.6.%d, 192.0.2.1" % part) for part in range(2)] == [200, 429]
        assert await status("10.0.0.2", b"192.0.2.2, 10.0.0.9") == 200
        assert await status("10.0.0.1", b"2001:db8::1") == 200
        assert await status("10.0.0.1", b"2001:db8::2") == 429  # one customer has a whole /64
        server.service.proxies = ("10.0.0.1/32",)
        assert [await status("127.0.0.1", b"192.0.2.%d" % part) for part in (10, 11)] == [200, 429]

    asyncio.run(main())


def test_memory_for_clients_is_bounded_and_who_is_there_is_not_forgotten() -> None:
    clients = Clients(rate=1.0, burst=1.0, limit=50)
    here = clients.find("here")
    here.take(time.monotonic())
    for number in range(500):
        clients.of_address(f"10.0.{number // 250}.{number % 250}")
    assert len(clients) == 51
    assert clients.find("here") is here


def test_without_quotas_nobody_is_counted() -> None:
    async def main() -> None:
        server = InProcessServer(Doubler())
        assert server.service.clients is None
        answers = [await server.ask(predict(float(number))) for number in range(50)]
        assert {one[0][0] for one in answers} == {200}
        assert server.plane.admission.held == {}

    asyncio.run(main())


# ---------------------------------------------------------------------- connections


def test_too_many_connections_close_those_that_have_been_idle_longest() -> None:
    async def main() -> None:
        runtime = slow(Doubler(), 0.03)
        limits = HttpLimits(max_connections=4)
        server = InProcessServer(runtime, limits=limits, cost=SLOW)
        busy, idle = server.connect(), [server.connect() for _ in range(3)]
        busy[0].data_received(predict(3.0))
        for age, (connection, _) in enumerate(idle):
            connection._idle_since_s -= 100 - age
        late = server.connect()
        assert [transport.is_closed for _, transport in (busy, *idle, late)] == [False, True, False, False, False]
        assert len(server.service.connections) == 4
        for connection, _ in (*idle[1:], late):
            connection.data_received(predict(4.0))
        ((status, headers, answer),) = responses(server.connect()[1].data)
        assert (status, headers[b"Connection"]) == (503, b"close")
        assert "the server has 4 connections" in json.loads(answer)["error"]
        await server.settle()
        for _, transport in (busy, *idle[1:], late):
            assert responses(transport.data)[0][0] == 200
        assert len(server.service.connections) == 4

    asyncio.run(main())


# ---------------------------------------------------------------------- clocks


@pytest.mark.parametrize("jump_s", [-90_000.0, 90_000.0])
def test_a_jump_of_the_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    """Time-outs, deadlines, quotas, what was told of tokens: all by a clock that does not jump."""

    async def main() -> None:
        limits = HttpLimits(client_rate=50.0, client_burst=3)
        server = InProcessServer(Doubler(), limits=limits, admission=make(hold_s=0.001))
        guard = Guard()
        guard.serve({"m": "p"})
        guard.believe([Caller(digest=hashlib.sha256(b"one").hexdigest(), who="token:a", where=("p",))])
        server.service.ask_guard(guard)
        token = b"Authorization: Bearer one\r\n"
        connection, transport = server.connect()
        connection.data_received(predict(1.0, headers=token))
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        server.service.sweep()
        connection.data_received(predict(1.0, headers=token + b"X-Request-Timeout-Ms: 5000\r\n"))
        connection.data_received(predict(1.0, headers=token + b"X-New: head\r\n"))
        server.service.sweep()
        await server.settle()
        assert [one[0] for one in responses(transport.data)] == [200, 200, 200]
        connection.data_received(predict(1.0, headers=token))
        await server.settle()
        assert responses(transport.data)[-1][0] == 429
        assert not transport.is_closed
        assert server.plane.metrics.latency.sum < 5.0

    asyncio.run(main())


def test_a_refusal_says_when_to_come_back() -> None:
    assert Refusal(status=503, message="", retry_after_s=7).headers == b"Retry-After: 7\r\n"
    assert Refusal(status=504, message="").headers == b""
