"""One request and the place of its answer."""

from __future__ import annotations

import functools
from http import HTTPStatus
from typing import TYPE_CHECKING, Protocol

import orjson

from millrace.serve.service import Head

if TYPE_CHECKING:
    from millrace.serve.http import Connection

JSON_TYPE = b"application/json"


class Abortable(Protocol):
    """What works on an answer."""

    def abort(self) -> None:
        """The client has gone away."""
        ...


class Exchange:
    """One request and the place of its answer: the handler calls a `reply` once, now or later.

    Args:
        connection: Whose request it is.
        head: Parsed.
        data: The body, or the request as it came, with its head before the body.
        body_at: Where in it the body begins.
        keep_alive: Whether the connection outlives the answer.
    """

    __slots__ = ("body_at", "connection", "data", "head", "keep_alive", "response", "waiting")

    def __init__(self, connection: Connection, head: Head, data: bytes, body_at: int, keep_alive: bool) -> None:
        self.connection = connection
        self.head = head
        self.data = data
        self.body_at = body_at
        self.keep_alive = keep_alive
        self.response: bytes | None = None
        self.waiting: Abortable | None = None  # told when the client goes away before the answer

    def abandon(self) -> None:
        """The client has gone away."""
        if self.waiting is not None:
            self.waiting.abort()
            self.waiting = None

    @property
    def body(self) -> bytes:
        """The request's body."""
        return self.data[self.body_at :] if self.body_at else self.data

    def reply(self, status: int, body: bytes, content_type: bytes = JSON_TYPE, headers: bytes = b"") -> None:
        """Answer; `headers` are whole lines, each with its CRLF."""
        head = b"%sContent-Length: %d\r\n%s" % (_status_line(status, content_type), len(body), headers)
        self.reply_raw(head, b"" if self.head.method == b"HEAD" else body)

    def reply_json(self, status: int, value: object, headers: bytes = b"") -> None:
        """Answer with a JSON document."""
        self.reply(status, orjson.dumps(value), headers=headers)

    def reply_error(self, status: int, message: str, headers: bytes = b"") -> None:
        """Answer with the one shape of an error."""
        self.reply_json(status, {"error": message}, headers)

    def reply_raw(self, head: bytes, body: bytes) -> None:
        """Answer with a rendered head (status line and headers, no empty line) and a body."""
        service = self.connection.service
        if self.keep_alive and not service.is_draining:
            self.send(b"%s%s\r\n%s" % (head, service.date_line, body))
        else:
            self.keep_alive = False
            self.send(b"%s%sConnection: close\r\n\r\n%s" % (head, service.date_line, body))

    def send(self, response: bytes) -> None:
        """Answer with a whole response, which must have `Connection: close` unless `keep_alive`."""
        self.response = response
        self.waiting = None  # no cycle is left: an exchange lives as long as it is used
        self.connection.send_answered()


@functools.lru_cache(maxsize=64)
def _status_line(status: int, content_type: bytes) -> bytes:
    return b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\n" % (status, HTTPStatus(status).phrase.encode(), content_type)
