"""The access log: one JSON object a line for each request. A slow or full disk costs lines, never answers."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from typing import Any, NamedTuple, Protocol

import orjson

from millrace.core.errors import InputError
from millrace.core.redaction import SHOWN
from millrace.serve.access import model_of, path_of
from millrace.serve.batching import Job
from millrace.serve.dataplane import ModelInfo
from millrace.serve.inference import HttpJob
from millrace.serve.service import Head, Service
from millrace.serve.tracing import Trace, TracedExchange

GONE = 499  # the client hung up before its answer
MAX_BUFFER_BYTES = 4 << 20
_GATHER_S = 0.1
_MAX_SHOWN = 500  # characters of what a client chose
_log = logging.getLogger(__name__)


class AccessLog:
    """Appends lines to a file from a thread of its own. `write` is for the event loop's thread, and never blocks.

    The file is opened anew when another one stands in its place: after `logrotate` nothing needs to be told.

    Args:
        path: Made where it is absent, readable by its owner alone; `-`: the standard error.

    Raises:
        InputError: It cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.dropped = 0
        self._lines: list[bytes] = []
        self._size_bytes = 0
        self._second, self._shown_second = -1, ""
        self._is_torn = False  # the file ends in the middle of a line
        self._is_closed = False
        self._has_failed = False
        self._wake = threading.Event()
        self._fd = -1
        try:
            self._fd = self._open()
        except OSError as error:
            raise InputError(f"the access log {path} cannot be opened: {error.strerror}") from None
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def write(self, fields: dict[str, Any]) -> None:
        """Queue a line; dropped and counted where the disk has fallen behind."""
        line = orjson.dumps(fields, option=orjson.OPT_APPEND_NEWLINE)
        if self._size_bytes + len(line) > MAX_BUFFER_BYTES:
            self.dropped += 1
            return
        self._size_bytes += len(line)
        self._lines.append(line)
        if not self._wake.is_set():
            self._wake.set()

    def now(self) -> str:
        """The time in UTC; of each second all but the milliseconds is written once."""
        at_s = time.time()
        second = int(at_s)
        if second != self._second:
            self._second, self._shown_second = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._shown_second}.{int((at_s - second) * 1000):03d}Z"

    def close(self) -> None:
        """Write what is left; a disk that does not answer within two seconds is left behind."""
        self._is_closed = True
        self._wake.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        while not self._is_closed:
            self._wake.wait()
            if not self._is_closed:
                time.sleep(_GATHER_S)
            self._wake.clear()
            lines, self._lines = self._lines, []  # one step each: the loop's thread only appends
            self._flush(lines)
        self._flush(self._lines)

    def _flush(self, lines: list[bytes]) -> None:
        if not lines:
            return
        data = b"".join(lines)
        self._size_bytes -= len(data)
        head = b"\n" if self._is_torn else b""
        written = 0
        try:
            self._follow()
            while written < len(head) + len(data):
                written += os.write(self._fd, (head + data)[written:])
        except OSError as error:
            self._note_failure(error, lines, max(0, written - len(head)))
            self._is_torn = written > 0 or self._is_torn
            return
        self._is_torn = self._has_failed = False

    def _note_failure(self, error: OSError, lines: list[bytes], written: int) -> None:
        for line in lines:
            written -= len(line)
            self.dropped += written < 0
        if not self._has_failed:
            self._has_failed = True
            _log.error("the access log %s cannot be written: %s; lines are dropped and counted", self.path, error)

    def _open(self) -> int:
        if self.path == "-":
            return sys.stderr.fileno()
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _follow(self) -> None:
        """Open the file anew when it was moved away."""
        if self.path == "-":
            return
        with contextlib.suppress(FileNotFoundError):  # moved away: a new one is made
            if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                return
        fd = self._open()
        os.close(self._fd)
        self._fd, self._is_torn = fd, False


class Peer(Protocol):
    """Who is at the other end."""

    service: Service

    @property
    def peer(self) -> str:
        """Its address."""
        ...

    @property
    def subject(self) -> str:
        """Whose certificate it has shown; empty: it has shown none."""
        ...


class Ended(NamedTuple):
    """What is known of a request once it has ended."""

    status: int
    received_bytes: int
    sent_bytes: int
    began_ns: int
    trace: Trace | None
    job: Job | None = None
    route: str = ""
    info: ModelInfo | None = None


def fields_of(log: AccessLog, connection: Peer, head: Head, ended: Ended) -> dict[str, Any]:
    """A line of the log.

    Args:
        log: Tells the time.
        connection: Whose request it was.
        head: The request's.
        ended: The rest.
    """
    now_ns = time.perf_counter_ns()
    trace, guard = ended.trace, connection.service.guard
    path, _, query = head.target.partition(b"?")
    fields: dict[str, Any] = {
        "time": log.now(),
        "client": connection.subject or connection.peer,
        "method": _shown(head.method),
        "path": _shown(path),
        "status": ended.status,
        "received_bytes": ended.received_bytes,
        "sent_bytes": ended.sent_bytes,
        "seconds": _seconds(now_ns - ended.began_ns),
    }
    if connection.subject:
        fields["address"] = connection.peer
    if query:
        fields["query"] = shown_query(query)
    if ended.info is not None:
        fields |= {"route": ended.route, "model": ended.info.name, "version": ended.info.version}
        if ended.job is not None:
            fields |= _split(ended.job, now_ns)
    elif name := model_of(path_of(head.target)):
        fields["model"] = _shown(name)
    if trace is not None:
        fields |= {"trace_id": trace.trace_id, "span_id": trace.span_id}
        if trace.parent_id:
            fields["parent_id"] = trace.parent_id
    if guard is not None and (who := guard.who(head.headers)):
        fields["principal"] = who
    return fields


class LoggedExchange(TracedExchange):
    """An exchange whose end is a line of the log."""

    __slots__ = ()

    def send(self, response: bytes) -> None:
        """Answer, then log."""
        job = self.waiting
        super().send(response)
        self._log(int(response[9:12]), len(response), job if isinstance(job, HttpJob) else None)

    def abandon(self) -> None:
        """The client is gone: that is logged too."""
        job = self.waiting
        if self.response is None:
            self._log(GONE, 0, job if isinstance(job, HttpJob) else None)
        super().abandon()

    def _log(self, status: int, sent_bytes: int, job: HttpJob | None) -> None:
        log = self.connection.service.access_log
        if log is None:
            return
        ended = Ended(status, len(self.data) - self.body_at, sent_bytes, self.began_ns, self.trace)
        if job is not None:
            ended = ended._replace(job=job, route=job.route, info=job.inference.plane.info)
        log.write(fields_of(log, self.connection, self.head, ended))


def _split(job: Job, now_ns: int) -> dict[str, Any]:
    """Where the time went, of a request that a call has answered."""
    shared = getattr(job, "shared", None)
    fields: dict[str, Any] = {"rows": job.rows}
    if job.error is not None or shared is None:
        return fields
    if not job.rows:
        return fields
    if not shared.end_ns:
        return fields | {"cached": True}
    return fields | {
        "queue_s": _seconds(shared.start_ns - job.enqueued_ns),
        "compute_s": _seconds(shared.end_ns - shared.start_ns),
        "serialize_s": _seconds(now_ns - shared.end_ns),
    }


def _seconds(ns: int) -> float:
    return round(ns * 1e-9, 7)


def _shown(data: bytes) -> str:
    return data[:_MAX_SHOWN].decode("utf-8", "replace")


def shown_query(query: bytes) -> str:
    """A query's names without its values.

    Example:
        >>> shown_query(b"token=abc&debug")
        'token=***&debug'
    """
    parts = query[:_MAX_SHOWN].split(b"&")
    return "&".join(f"{_shown(part.partition(b'=')[0])}={SHOWN}" if b"=" in part else _shown(part) for part in parts)
