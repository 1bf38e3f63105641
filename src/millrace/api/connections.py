"""Connections that cost little: a head within some time and size, a body that goes on, no answer inside another one.

uvicorn closes connections that are idle between requests. One on which a request has begun, or none ever does, it
keeps for ever (CWE-400, "slow-loris"), and a head may have any size.
"""

from __future__ import annotations

from asyncio import TimerHandle, Transport
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from millrace.core.errors import InputError

HEAD_BYTES = 64 << 10
HEADERS = 128
STALL_BYTES = 1024  # of a body, at least so much has to come in every `stall_s`
LINGER_S = 2.0  # a client that still sends can read why it was refused
_WAITING, _HEAD, _BODY = "waiting", "head", "body"


class _Refused(Exception):
    """Stops the parser in one of its callbacks; never leaves this module."""


class Connection(HttpToolsProtocol):
    """One client of the API. What is wrong with a request ends its connection, after the answers before it.

    `head_s` is how long a head may take, and how long a connection may say nothing at first; `stall_s` see
    `STALL_BYTES`, not counted while the server itself does not read.
    """

    head_s = 10.0
    stall_s = 30.0

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._part = _WAITING
        self._head_bytes = self._header_bytes = 0
        self._received = self._received_before = 0
        self._timer: TimerHandle | None = None
        self._timed = ""  # what the timer is for
        self._refusal: tuple[int, str] = (400, "this is not HTTP/1.1")
        self._is_refused = False

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse, and see whether it goes on well."""
        if self._is_refused:
            return
        was_in_head = self._part == _HEAD
        self._received += len(data)
        super().data_received(data)
        if was_in_head and self._part == _HEAD:  # the parser keeps what is no whole header yet
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(431, f"the head of a request has at most {HEAD_BYTES} bytes")
        self._watch()

    # ------------------------------------------------------------------ parsing

    def on_message_begin(self) -> None:
        """httptools: a request line begins."""
        self._part, self._head_bytes, self._header_bytes = _HEAD, 0, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """httptools: (a part of) the target."""
        super().on_url(url)
        if len(self.url) > HEAD_BYTES:
            self._refusal = 414, f"a target has at most {HEAD_BYTES} bytes"
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools: one header, or a trailer."""
        if self._part == _BODY:
            return  # a trailer is not what the request was let in with
        super().on_header(name, value)
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > HEAD_BYTES or len(self.headers) > HEADERS:
            self._refusal = 431, f"a request has at most {HEADERS} headers, in {HEAD_BYTES} bytes"
            raise _Refused

    def on_headers_complete(self) -> None:
        """httptools: the request can be answered."""
        self._part = _BODY
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """httptools: the request is whole."""
        self._part = _WAITING
        super().on_message_complete()

    # ------------------------------------------------------------------ time

    def _watch(self) -> None:
        """Have the timer that the present state wants, and no other."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        part = self._part
        if part == _WAITING and (is_answering or self.timeout_keep_alive_task is not None):
            part = ""  # it is our turn, or uvicorn's own timer runs
        if self._is_refused or part == self._timed:
            return
        self._stop_timer()
        if part:
            self._start_timer(part)

    def _start_timer(self, part: str) -> None:
        self._timed, self._received_before = part, self._received
        self._timer = self.loop.call_later(self.stall_s if part == _BODY else self.head_s, self._late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timed = None, ""

    def _late(self) -> None:
        part, self._timer, self._timed = self._timed, None, ""
        if self.transport.is_closing():
            return
        if part == _WAITING:
            self.transport.close()
        elif part == _HEAD:
            self._refuse(408, f"want the head of a request within {self.head_s:g} s")
        elif not self.flow.read_paused and self._received - self._received_before < STALL_BYTES:
            self._refuse(408, f"want at least {STALL_BYTES} bytes of a body every {self.stall_s:g} s")
        else:
            self._start_timer(part)

    # ------------------------------------------------------------------ refusing

    def _refuse(self, status: int, message: str) -> None:
        self._refusal = status, message
        self.send_400_response(message)

    def send_400_response(self, msg: str) -> None:
        """Refuse what came last, and read nothing more; a whole request before it is still answered."""
        self._is_refused = True
        self._stop_timer()
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            self._say_why()
        elif self._part != _BODY:
            cycle.keep_alive = False  # the last whole request: its answer is the end
        elif cycle.response_started or self.pipeline:
            self.transport.abort()
        else:
            cycle.disconnected = True  # whoever waits for the rest of the body is told
            cycle.message_event.set()
            self._say_why()

    def _unsupported_upgrade_warning(self) -> None:
        """What follows is no HTTP/1.1 (h2c and WebSocket smuggling): the request is answered, the rest not read."""
        self._is_refused = True
        self._stop_timer()
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def _say_why(self) -> None:
        status, message = self._refusal
        body = msgspec.json.encode(
            {"title": InputError.code, "status": status, "detail": message, "code": InputError.code}
        )
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/problem+json\r\n"
        self.transport.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()  # closing with unread input would reset the connection, and destroy the answer
            self._timer = self.loop.call_later(LINGER_S, self.transport.abort)
        else:
            self.transport.close()


def connections(head_s: float, stall_s: float) -> type[Connection]:
    """The kind of connections with these times.

    Args:
        head_s: Seconds for a head.
        stall_s: Seconds in which some of a body has to come.

    Example:
        >>> connections(1.0, 2.0).head_s
        1.0
    """
    return type("TimedConnection", (Connection,), {"head_s": head_s, "stall_s": stall_s})
