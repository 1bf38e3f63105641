"""HTTP/1.1 on a uvloop protocol with httptools: requests, the order of answers, nothing about models."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import cast

import httptools

from millrace.core.addresses import is_loopback, is_within
from millrace.serve.clients import FORWARDED, Client, forwarded_for
from millrace.serve.exchange import Exchange
from millrace.serve.service import Head, Service
from millrace.serve.tls import subject_of
from millrace.serve.tracing import HEADER as TRACE_HEADER
from millrace.serve.tracing import TracedExchange

_LINGER_S = 2.0
_HOLD_S = 0.05
_LARGE_BYTES = 64 << 10  # of a body whose request is judged by its head first
_log = logging.getLogger(__name__)
_SINGLE_HEADERS = frozenset(
    {
        b"host",
        b"content-length",
        b"transfer-encoding",
        b"content-encoding",
        b"inference-header-content-length",
        b"authorization",
        b"x-request-timeout-ms",
    }
)


class _Refused(Exception):
    """Raised in a parser's callback to stop the parsing; never leaves this module."""

    def __init__(
        self, status: int, message: str, headers: bytes = b"", hold_s: float = 0.0, size_bytes: int = 0
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = headers
        self.hold_s = hold_s
        self.size_bytes = size_bytes


class Connection(asyncio.Protocol):
    """One client. Requests are handled as they are complete; answers leave in the order of requests.

    Clients repeat their request heads byte for byte, so a head that was parsed and allowed once is looked
    up the next time: half of what parsing a small request costs.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self.queue: deque[Exchange] = deque()  # not answered, in the order of requests
        self._head = Head(b"", b"", {}, service.handler)  # of the last request
        self._max_pipelined = service.limits.max_pipelined
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._chunks: list[bytes] = []
        self._head_bytes = 0
        self._header_bytes = 0
        self._is_counting = False
        self._begun = 0  # messages in the data being parsed
        self._body_bytes = 0
        self._in_message = False
        self._in_head = True
        self._keep_alive = True
        self._began_s = 0.0  # when the message in progress began; 0: none
        self._idle_since_s = time.monotonic()
        self._is_closing = False  # nothing more is read
        self._has_unread = False  # a request was refused before its end
        self._is_write_paused = False
        self._is_read_paused = False
        self._holds = 0
        self._exchange_type = service.exchange_type or Exchange
        self._peer: Client | None = None
        self._subject: str | None = None
        self._is_proxied = False

    # ------------------------------------------------------------------ transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        service = self.service
        if not service.make_room():
            self._refuse(
                503, f"the server has {len(service.connections)} connections: want less", b"Retry-After: 1\r\n"
            )
            self.transport.close()
            return
        service.connections.add(self)
        if service.proxies and not _is_of_proxy(self.transport, service.proxies):
            self.transport.abort()  # tokens would travel in the open
        elif service.clients is not None:
            peer = _peer_of(self.transport)
            self._peer = service.clients.of_address(peer)
            self._is_proxied = is_within(peer, service.proxies)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: what waits for it is told."""
        self.service.connections.discard(self)
        self._is_closing = True
        self._abandon()

    def _abandon(self) -> None:
        """Nobody will read the answers."""
        for exchange in self.queue:
            exchange.abandon()
        self.queue.clear()

    def pause_writing(self) -> None:
        """The client reads too slowly: nothing more is read from it."""
        self._is_write_paused = True
        self._update_reading()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._is_write_paused = False
        self._update_reading()

    @property
    def head(self) -> Head:
        """The head of the last request."""
        return self._head

    @property
    def peer(self) -> str:
        """The client's address."""
        return _peer_of(self.transport)

    @property
    def subject(self) -> str:
        """Whose certificate the client has shown; empty: it has shown none."""
        if self._subject is None:
            self._subject = subject_of(self.transport.get_extra_info("peercert"))
        return self._subject

    @property
    def idle_since_s(self) -> float:
        """When its last answer was written."""
        return self._idle_since_s

    def client_of(self, head: Head) -> Client | None:
        """Whose request it is: of a token's principal, or of an address; None where nobody counts."""
        service, clients = self.service, self.service.clients
        if clients is None:
            return None
        if service.guard is not None:
            if head.client is None:
                head.client = clients.find(service.guard.who(head.headers))
            return head.client
        forwarded = head.headers.get(FORWARDED) if self._is_proxied else None
        if forwarded is None:
            return self._peer
        return clients.of_address(forwarded_for(forwarded, _peer_of(self.transport), service.proxies))

    def hold(self) -> None:
        """Read nothing from this client until `release`: a refusal is being held back."""
        self._holds += 1
        self._update_reading()

    def release(self) -> None:
        """The inverse of `hold`."""
        self._holds -= 1
        self._update_reading()

    def _update_reading(self) -> None:
        pause = self._is_write_paused or self._holds > 0 or len(self.queue) >= self._max_pipelined
        if pause != self._is_read_paused and not self.transport.is_closing():
            self._is_read_paused = pause
            (self.transport.pause_reading if pause else self.transport.resume_reading)()

    def eof_received(self) -> bool:
        """The client sends no more: keep the connection until its answers are out."""
        if self._in_message and not self._is_closing:
            self._refuse(400, "the request ends in the middle")
        self._is_closing = True
        return bool(self.queue)

    # ------------------------------------------------------------------ reading

    def data_received(self, data: bytes) -> None:
        """Parse; complete requests go to the handler from within."""
        if self._is_closing:
            return
        if not self._in_message:
            head = self._head
            if len(data) != head.size_bytes or not data.startswith(head.raw):
                head = self.service.known(data)
            if head is not None:  # exactly one request whose head was parsed before: nothing to parse
                guard = self.service.guard
                denial = None if guard is None else guard.check(head.target, head.headers)
                if denial is not None:
                    self._refuse(*denial)
                    return
                self._head = head
                exchange = self._exchange_type(self, head, data, len(head.raw), True)
                self.queue.append(exchange)
                head.route(exchange)
                if len(self.queue) >= self._max_pipelined:
                    self._update_reading()
                return
        self._parse(data)
        if len(self.queue) >= self._max_pipelined:
            self._update_reading()

    def _parse(self, data: bytes) -> None:
        self._begun = 0
        was_in_message = self._in_message
        was_in_head = was_in_message and self._in_head
        self._is_counting = len(data) > self.service.limits.max_head_bytes  # less cannot hold a head too large
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._close_after_last()  # what follows is not HTTP/1.1; the request itself was answered
            return
        except httptools.HttpParserError as error:
            self._refuse_after(error)
            return
        if self._in_message:
            self._note_unfinished(len(data), was_in_head)
        elif self._begun == 1 and not was_in_message and not self._is_closing:
            self.service.remember(data, self._head)

    def _note_unfinished(self, size_bytes: int, was_in_head: bool) -> None:
        """A message goes on: since when, and how much of a head the parser keeps inside."""
        if not self._began_s:
            self._began_s = time.monotonic()
        if self._in_head and was_in_head:
            self._head_bytes += size_bytes
            if self._head_bytes > self.service.limits.max_head_bytes:
                self._refuse(431, self._head_too_large())

    def on_message_begin(self) -> None:
        """httptools: a request line begins."""
        self._begun += 1
        self._target = b""
        self._headers = {}
        self._chunks = []
        self._body_bytes = 0
        self._head_bytes = 0
        self._header_bytes = 0
        self._in_message = True
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """httptools: (a part of) the target."""
        self._target += url
        if len(self._target) > self.service.limits.max_head_bytes:
            raise _Refused(414, f"want a target of at most {self.service.limits.max_head_bytes} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools: one header."""
        if not self._in_head:
            return  # a trailer
        if self._is_counting:
            self._header_bytes += len(name) + len(value) + 4
            if self._header_bytes > self.service.limits.max_head_bytes:
                raise _Refused(431, self._head_too_large())
        name = name.lower()
        if name in self._headers and name in _SINGLE_HEADERS:
            raise _Refused(400, f"header {name.decode('latin-1')} is given twice")
        self._headers[name] = value

    def on_headers_complete(self) -> None:
        """httptools: decide before the body is read."""
        self._in_head = False
        headers = self._headers
        host = headers.get(b"host")
        is_old = self._parser.get_http_version() == "1.0"
        if host is None:
            if not is_old:
                raise _Refused(400, "header Host is missing")
        elif not self.service.allows(host):
            shown = host[:80].decode("latin-1")
            raise _Refused(403, f"Host {shown!r} is not served here: want 127.0.0.1 or localhost")
        origin = headers.get(b"origin")
        if origin is not None and not self.service.allows(origin.partition(b"://")[2]):
            raise _Refused(403, f"Origin {origin[:80].decode('latin-1')!r} may not call this server")
        guard = self.service.guard
        denial = None if guard is None else guard.check(self._target, headers)
        if denial is not None:
            raise _Refused(*denial)
        self._keep_alive = not is_old and self._parser.should_keep_alive()
        length = headers.get(b"content-length")
        size_bytes = 0 if length is None else int(length)
        if size_bytes > self.service.limits.max_body_bytes:
            raise _Refused(413, self._too_large())
        coding = headers.get(b"transfer-encoding")
        if coding is not None and (is_old or coding.lower() != b"chunked"):  # a proxy may read it in another way
            raise _Refused(400, "want Transfer-Encoding: chunked alone, in HTTP/1.1")
        if size_bytes > _LARGE_BYTES or coding is not None:
            self._decide_early(size_bytes)
        if headers.get(b"expect", b"").lower() == b"100-continue" and not self.queue:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _decide_early(self, size_bytes: int) -> None:
        """Refuse a large body before it is read, where there is no room for it anyway."""
        head = Head(self._parser.get_method(), self._target, self._headers, self.service.handler)
        refusal = self.service.early(self._target, size_bytes, len(self.queue), self.client_of(head))
        if refusal is not None:
            raise _Refused(refusal.status, refusal.message, refusal.headers, _HOLD_S, size_bytes)

    def _head_too_large(self) -> str:
        return f"want a request head of at most {self.service.limits.max_head_bytes} bytes"

    def _too_large(self) -> str:
        return f"want a body of at most {self.service.limits.max_body_bytes} bytes"

    def on_body(self, body: bytes) -> None:
        """httptools: a part of the body."""
        self._chunks.append(body)
        self._body_bytes += len(body)
        if self._body_bytes > self.service.limits.max_body_bytes:
            raise _Refused(413, self._too_large())

    def on_message_complete(self) -> None:
        """httptools: hand the request over."""
        self._in_message = False
        self._began_s = 0.0
        if self._is_closing:
            return
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._head = Head(self._parser.get_method(), self._target, self._headers, self.service.handler)
        kind = self._exchange_type
        if kind is Exchange and TRACE_HEADER in self._headers:
            kind = TracedExchange
        exchange = kind(self, self._head, body, 0, self._keep_alive)
        self._chunks = []
        self.queue.append(exchange)
        if not self._keep_alive:
            self._is_closing = True
        self.service.handler(exchange)

    # ------------------------------------------------------------------ answering

    @property
    def is_busy(self) -> bool:
        """Whether a request has begun and is not answered."""
        return bool(self.queue) or self._in_message

    def send_answered(self) -> None:
        """Write the answers whose turn it is."""
        queue = self.queue
        was_full = len(queue) >= self._max_pipelined
        while queue and (response := queue[0].response) is not None:
            exchange = queue.popleft()
            self.transport.write(response)
            if not exchange.keep_alive:
                self._finish()
                return
        if not queue:
            self._idle_since_s = self.service.now_s
            if self._is_closing:
                self._finish()
                return
        if was_full:
            self._update_reading()

    def _finish(self) -> None:
        """The last answer is written: close, after the client had a chance to read it."""
        self._abandon()
        self._in_message = False
        self._is_closing = True
        if self.transport.is_closing():
            return
        # Closing with unread input would reset the connection and may destroy the answer.
        if self.transport.can_write_eof():
            self.transport.write_eof()
        elif not self._has_unread:
            self.transport.close()
            return
        self._is_read_paused = False
        self.transport.resume_reading()
        self._began_s = 0.0
        self._idle_since_s = time.monotonic()

    def _close_after_last(self) -> None:
        self._is_closing = True
        if self.queue:
            self.queue[-1].keep_alive = False
        else:
            self._finish()

    def _refuse_after(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if isinstance(cause, _Refused):
            self._refuse(cause.status, cause.message, cause.headers, cause.hold_s, cause.size_bytes)
        elif isinstance(error, httptools.HttpParserCallbackError):
            _log.error("a request handler failed", exc_info=cause)  # our own bug: this client, not the server
            self._refuse(500, "internal error; the server's log says more")
        else:
            self._refuse(400, f"malformed HTTP: {error}")

    def _refuse(
        self, status: int, message: str, headers: bytes = b"", hold_s: float = 0.0, size_bytes: int = 0
    ) -> None:  # fmt: skip
        """Answer what cannot be parsed, after the answers before it, and close."""
        if self._is_closing:
            return  # after the last request: nobody is to be told
        target = self._target if self._in_message else b""
        self._is_closing = self._has_unread = True
        self._in_message = False
        self._chunks = []
        self.service.refused(status)
        exchange = self._exchange_type(self, Head(b"", target, {}, self.service.handler), b"", 0, False)
        self.queue.append(exchange)

        def send() -> None:
            if hold_s:
                self.release()
            exchange.reply_error(status, message, headers)

        if hold_s and self.service.pacer.hold(send, hold_s, size_bytes):
            self.hold()
        else:
            exchange.reply_error(status, message, headers)

    def close(self) -> None:
        """Close it; nothing of it waits."""
        self.transport.close()

    def abort(self) -> None:
        """Cut the connection."""
        self.transport.abort()

    def check_time(self, now_s: float) -> None:
        """Close or refuse what has taken too long."""
        limits = self.service.limits
        if self._is_closing:
            if not self.queue and now_s - self._idle_since_s > _LINGER_S:
                self.transport.abort()
        elif self._in_message and self._began_s:
            took_s = now_s - self._began_s
            if self._in_head and took_s > limits.head_timeout_s:
                self._refuse(408, f"want the request's head within {limits.head_timeout_s:g} s")
            elif took_s > limits.body_timeout_s:
                self._refuse(408, f"want the whole request within {limits.body_timeout_s:g} s")
        elif not self.queue:
            limit_s = 0.5 if self.service.is_draining else limits.idle_timeout_s
            if now_s - self._idle_since_s > limit_s:
                self.transport.close()


def _peer_of(transport: asyncio.Transport) -> str:
    peer = transport.get_extra_info("peername")
    return str(peer[0]) if peer else "unknown"


def _is_of_proxy(transport: asyncio.Transport, proxies: tuple[str, ...]) -> bool:
    """Whether the peer is a proxy that ends TLS, or this machine itself."""
    peer, here = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
    if not peer or not here:
        return False
    return is_within(peer[0], proxies) or is_loopback(peer[0]) or peer[0] == here[0]
