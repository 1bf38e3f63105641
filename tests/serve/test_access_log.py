"""The access log and trace context: one whole line for each request, whatever clients, disks and rotation do."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import InputError
from millrace.serve.access_log import MAX_BUFFER_BYTES, AccessLog, shown_query
from millrace.serve.tracing import begin_trace, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PREDICT = "/v1/models/prices:predict"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines() if line]


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 10
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def ask(live: Any, target: str, marker: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
    """A request with a marker in its path's query, so that its line is found."""
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    data = None if body is None else json.dumps(body)
    connection.request("POST" if data else "GET", f"{target}?{marker}", data, headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response


def line_of(live: Any, marker: str) -> dict[str, Any]:
    def find() -> list[dict[str, Any]]:
        return [one for one in lines_of(live.folder / "access.jsonl") if one.get("query", "").startswith(marker)]

    found = until(find)
    assert len(found) == 1
    return found[0]


def row(age: float) -> dict[str, Any]:
    return {"instances": [{"age": age, "income": 2.5, "plan": "a"}]}


def test_a_line_says_what_was_asked_and_where_the_time_went(observed: Any) -> None:
    ask(observed, PREDICT, "first=1", row(101))
    line = line_of(observed, "first=")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    times = [line.pop(name) for name in ("seconds", "queue_s", "compute_s", "serialize_s")]
    assert all(0 <= one < 5 for one in times)
    assert times[0] >= times[2]
    assert line.pop("sent_bytes") > 100
    assert line.pop("received_bytes") == len(json.dumps(row(101)))
    assert line == {
        "client": "127.0.0.1", "method": "POST", "path": PREDICT, "query": "first=***", "status": 200,
        "route": "predict", "model": "prices", "version": "3", "rows": 1,
    }  # fmt: skip
    ask(observed, PREDICT, "again", row(101))
    assert line_of(observed, "again")["cached"] is True
    ask(observed, PREDICT, "wrong", {"instances": 1})
    assert (line_of(observed, "wrong")["status"], line_of(observed, "wrong")["model"]) == (400, "prices")
    ask(observed, "/v2/models/none", "missing")
    assert (line_of(observed, "missing")["status"], line_of(observed, "missing")["method"]) == (404, "GET")


def test_secrets_are_never_written(observed: Any) -> None:
    ask(observed, PREDICT, "token=hunter2&key", row(102), Authorization="Bearer hunter3", Cookie="session=hunter4")
    line_of(observed, "token=")
    assert b"hunter" not in (observed.folder / "access.jsonl").read_bytes()
    assert (observed.folder / "access.jsonl").stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_parsed_is_logged_and_stays_on_one_line(observed: Any) -> None:
    before = len(lines_of(observed.folder / "access.jsonl"))
    hostile = [b"GET /%0a%22%7d?bad%0aline HTTP/1.1\r\nHost: localhost\r\n\r\n", b"rubbish\r\n\r\n",
               b'GET /\xff\xfe"}{\x1b[2J HTTP/1.1\r\nHost: localhost\r\n\r\n', b"GET / HTTP/1.1\r\n\r\n"]  # fmt: skip
    for data in hostile:
        with socket.create_connection(("127.0.0.1", observed.port), timeout=10) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while client.recv(65536):
                pass
    found = until(lambda: len(lines_of(observed.folder / "access.jsonl")) == before + len(hostile) and True)
    assert found
    last = lines_of(observed.folder / "access.jsonl")[before:]
    assert [one["status"] for one in last] == [404, 400, 400, 400]


def test_a_client_that_hangs_up_is_logged(observed: Any) -> None:
    rows = json.dumps({"instances": [{"age": at, "income": 1, "plan": "b"} for at in range(40_000)]}).encode()
    with socket.create_connection(("127.0.0.1", observed.port), timeout=10) as client:
        head = b"POST %s?gone HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % (PREDICT.encode(), len(rows))
        client.sendall(head + rows)
    assert line_of(observed, "gone")["status"] in (200, 499)  # whichever was first


def test_a_trace_is_continued(observed: Any) -> None:
    response = ask(observed, PREDICT, "traced", row(103), traceparent=f"00-{TRACE}-{SPAN}-01")
    version, trace, span, flags = response.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    line = line_of(observed, "traced")
    assert (line["trace_id"], line["parent_id"], line["span_id"]) == (TRACE, SPAN, span)
    assert span != SPAN


def test_a_trace_is_continued_where_nothing_is_logged(table: Any) -> None:
    for value, is_valid in ((f"00-{TRACE}-{SPAN}-00", True), ("rubbish", False)):
        response = ask(table, PREDICT, "x", row(1), traceparent=value)
        assert (response.status, "traceparent" in response.headers) == (200, is_valid)
    assert "traceparent" not in ask(table, PREDICT, "x", row(1)).headers


@pytest.mark.parametrize(
    "value",
    [
        "", "00", f"00-{TRACE}-{SPAN}", f"ff-{TRACE}-{SPAN}-01", f"00-{TRACE.upper()}-{SPAN}-01", f"00-{TRACE}-{SPAN}-01-x",
        f"00-{'0' * 32}-{SPAN}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}-1", f" 00-{TRACE}-{SPAN}-01",
        f"01-{TRACE}-{SPAN}-01-{'x' * 600}",
    ],
)  # fmt: skip
def test_what_is_no_traceparent_restarts_the_trace(value: str) -> None:
    assert parse_traceparent(value.encode()) is None
    begun = begin_trace({b"traceparent": value.encode()}, 1.0)
    assert begun is not None
    assert begun.parent_id == ""
    assert parse_traceparent(begun.header) == (begun.trace_id, begun.span_id, 1)


def test_a_newer_version_is_understood_and_a_share_begins_traces() -> None:
    assert parse_traceparent(f"cc-{TRACE}-{SPAN}-09-what-ever".encode()) == (TRACE, SPAN, 1)
    assert begin_trace({}, 0.0) is None
    begun = sum(begin_trace({}, 0.25) is not None for _ in range(4000))
    assert 800 < begun < 1200


@settings(deadline=None, max_examples=50)
@given(st.binary(max_size=700))
def test_a_query_never_shows_a_value(query: bytes) -> None:
    shown = shown_query(b"a=SECRETVALUE&" + query)
    assert "SECRETVALUE" not in shown
    assert shown.startswith("a=***")


# ---------------------------------------------------------------------- disks


@contextmanager
def opened(path: str) -> Iterator[AccessLog]:
    log = AccessLog(path)
    yield log
    log.close()


def test_a_log_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with opened(str(path)) as log:
        log.write({"n": 1})
        until(lambda: path.stat().st_size)
        path.rename(tmp_path / "log.1")
        log.write({"n": 2})
        until(lambda: path.exists() and path.stat().st_size)
        with path.open("r+b") as file:
            file.truncate()  # as logrotate's copytruncate does
        log.write({"n": 3})
        until(lambda: path.stat().st_size)
    assert lines_of(tmp_path / "log.1") == [{"n": 1}]
    assert lines_of(path) == [{"n": 3}]


def test_a_full_disk_costs_lines_and_nothing_else() -> None:
    with opened("/dev/full") as log:
        for number in range(100):
            log.write({"n": number})
        until(lambda: log.dropped == 100)


def test_a_disk_that_has_room_again_gets_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(str(path)) as log:
        resource.setrlimit(resource.RLIMIT_FSIZE, (25, hard))  # the kernel refuses what is beyond
        try:
            for number in (1, 2, 3, 4):
                log.write({"number": number})  # 13 bytes each: the second line is torn
            until(lambda: log.dropped == 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.write({"number": 5})
        until(lambda: b"5" in path.read_bytes())
    lines = path.read_bytes().splitlines()
    assert [lines[0], lines[-1]] == [b'{"number":1}', b'{"number":5}']
    assert len(lines) == 3  # what was torn is a line of its own


def test_a_disk_that_falls_behind_costs_lines_not_memory(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with opened(str(fifo)) as log:
        for _ in range(9000):
            log.write({"filling": "x" * 1000})
        assert log.dropped > 1000
        assert sum(map(len, log._lines)) <= MAX_BUFFER_BYTES
        os.close(reader)


def test_a_log_that_cannot_be_opened_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the access log .*/none/log cannot be opened: No such file"):
        AccessLog(str(tmp_path / "none" / "log"))
