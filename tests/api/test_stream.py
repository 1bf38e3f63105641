"""Server-sent events: what happens arrives, in order, and a cut line goes on where it stood."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import httpx_sse
import pytest

from millrace.api.routes import PREFIX
from millrace.client.http import HttpTransport
from millrace.core.errors import NotFoundError
from millrace.testing.server import RunningServer


def events(url: str, last: int | None = None) -> Iterator[httpx_sse.ServerSentEvent]:
    headers = {} if last is None else {"Last-Event-ID": str(last)}
    with httpx.stream("GET", url, headers=headers, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield from httpx_sse.EventSource(answer).iter_sse()


def test_events_arrive_as_they_are_sealed_and_are_resumed(server: RunningServer, transport: HttpTransport) -> None:
    run = transport.call("run.track", {"name": "watched"})
    url = f"{server.url}{PREFIX}/events/stream"
    seen = []
    for event in events(url):
        seen.append((int(event.id), event.json()["verb"], event.json()["subject"]))
        if len(seen) == 1:
            transport.call("run.end", {"run": run.id})
        if event.json()["verb"] == "run.end":
            break
    numbers = [number for number, _, _ in seen]
    assert numbers == list(range(1, len(numbers) + 1))
    resumed = next(events(url, last=numbers[-1] - 1))
    assert int(resumed.id) == numbers[-1]


def test_the_stream_of_a_run_ends_with_it(transport: HttpTransport) -> None:
    run = transport.call("run.track", {"name": "short"})
    ending = threading.Timer(0.5, lambda: transport.call("run.end", {"run": run.id}))
    ending.start()
    verbs = [event.verb for event in transport.stream("event.watch", {"run": run.id})]
    ending.join()
    # The last event is sealed just before or after the run's last look.
    assert verbs in (["run.track"], ["run.track", "run.end"])


def test_what_is_wrong_is_said_before_the_stream_begins(server: RunningServer, transport: HttpTransport) -> None:
    with pytest.raises(NotFoundError):
        next(transport.stream("run.tail", {"run": "nothing"}))
    answer = httpx.get(f"{server.url}{PREFIX}/events/stream", headers={"Last-Event-ID": "first"})
    assert answer.status_code == 400


def test_readers_that_go_away_leave_nothing_behind(server: RunningServer) -> None:
    url = f"{server.url}{PREFIX}/events/stream"
    for _ in range(210):  # more than may be open at once
        with httpx.stream("GET", url, timeout=5) as answer:
            assert answer.status_code in (200, 503)
            if answer.status_code == 503:
                break
    assert httpx.get(f"{server.url}/readyz").status_code == 200
