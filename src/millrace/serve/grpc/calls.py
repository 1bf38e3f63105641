"""gRPC over streams of HTTP/2: messages and their lengths, answers, and what becomes of a call that nobody awaits."""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, cast

from millrace.core.errors import InputError
from millrace.serve.access_log import GONE, Ended, fields_of
from millrace.serve.batching import Job
from millrace.serve.dataplane import ModelInfo
from millrace.serve.exchange import Abortable
from millrace.serve.grpc import frames
from millrace.serve.grpc.frames import literal
from millrace.serve.grpc.heads import GRPC_CODES, CallHead, Failed
from millrace.serve.grpc.http2 import Connection, Stream
from millrace.serve.inference import decompress
from millrace.serve.service import Service
from millrace.serve.tracing import HEADER as TRACE_HEADER
from millrace.serve.tracing import Trace, begin_trace

_OK_HEAD = b"\x88\x0f\x10\x10application/grpc"  # `:status: 200` and the type, from the static table
_OK_END = literal(b"grpc-status", b"0")
_ENCODINGS = literal(b"grpc-accept-encoding", b"identity,deflate,gzip")
_OPENING = struct.Struct(f">IBI{len(_OK_HEAD)}sIBIBI")
_CLOSING = struct.Struct(f">IBI{len(_OK_END)}s")
_HEADERS_WORD, _END_WORD = len(_OK_HEAD) << 8 | frames.HEADERS, len(_OK_END) << 8 | frames.HEADERS
_END_FLAGS = frames.END_HEADERS | frames.END_STREAM
_LEAD_BYTES = 5  # before each message: whether it is compressed, and its length
_LARGE_BYTES = 64 << 10  # of a message that is judged by its beginning
_MAX_STREAMED = 64  # requests of one stream that wait or run at once
_HELD = 4  # times the largest message: what one connection may leave incomplete


class Calls(Protocol):
    """Answers messages."""

    def early(self, call: Call, beginning: bytes, size: int) -> bool:
        """Whether a large message was refused by its beginning."""
        ...

    def call(self, call: Call, message: bytes) -> None:
        """Answer the message of a call."""
        ...

    def infer(self, request: Request, message: bytes) -> None:
        """Answer a message of a stream."""
        ...


class Call(Stream):
    """One message, and one as its answer.

    Args:
        connection: Whose.
        id: Of its stream.
        head: Its headers.
        calls: Answers it.
    """

    __slots__ = (
        "_calls", "_is_deaf", "_is_packed", "_parts", "_size", "_want", "began_ns", "info", "is_answered", "job",
        "received_bytes", "request_id", "trace", "waiting",
    )  # fmt: skip

    def __init__(self, connection: Connection, id: int, head: CallHead, calls: Calls) -> None:
        super().__init__(connection, id, head)
        self._calls = calls
        self._parts: list[bytes] = []
        self._size, self._want = 0, -1
        self._is_packed = self._is_deaf = self.is_answered = False
        self.began_ns = time.perf_counter_ns()
        self.received_bytes = 0
        self.waiting: Abortable | None = None  # told when the client goes away before the answer
        self.job: Job | None = None
        self.info: ModelInfo | None = None
        self.request_id = ""
        self.trace = begin_trace(head.headers, connection.service.trace_share) if head.is_traced else None

    @property
    def call_head(self) -> CallHead:
        """Its headers."""
        return cast(CallHead, self.head)

    def received(self, data: bytes) -> None:
        """Collect the message; once it is whole, have it answered."""
        if self._is_deaf:
            return
        head = self.call_head
        if head.failed is not None or head.refusal:
            self._refuse_head(head)
            return
        try:
            if self._want >= 0:
                self._add(data)
            elif not self._read_lead(data):
                return
            if not self.has_ended:
                return
            if self._size != self._want:
                raise Failed(400, f"want one message of {self._want} bytes, got {self._size}")
            parts, self._parts = self._parts, []
            self.connection.held_bytes -= self._size
            self.since_s = 0.0
            message = parts[0] if len(parts) == 1 else b"".join(parts)
            if self._is_packed:
                message = unpacked(message, head, self.connection.service)
        except Failed as failed:
            self.fail(failed)
            return
        self._is_deaf = True
        self._calls.call(self, message)

    def _read_lead(self, data: bytes) -> bool:
        """What stands before the message; False: not all of it has come."""
        if self._parts:
            data = self._parts.pop() + data
        if len(data) < _LEAD_BYTES:
            if self.has_ended:
                raise Failed(400, "the call ends before its message")
            self._parts.append(data)
            return False
        self._want = length_of(data, self.call_head, self.connection.service)
        self._is_packed = data[0] == 1
        self._add(data[_LEAD_BYTES:])
        if not self.has_ended and self._want > _LARGE_BYTES and self._calls.early(self, self._parts[0], self._want):
            self._is_deaf = True
            self._drop()
            return False
        return True

    def _add(self, data: bytes) -> None:
        if data or not self._parts:
            self._parts.append(data)
        self._size += len(data)
        self.received_bytes = self._size
        connection = self.connection
        connection.held_bytes += len(data)
        if self._size > self._want:
            raise Failed(400, f"want one message of {self._want} bytes, got more")
        if connection.held_bytes > _HELD * connection.service.limits.max_body_bytes:
            raise Failed(413, "the connection has too many bytes of messages that are not whole")

    def _drop(self) -> None:
        if self._want >= 0 and self._parts:
            self.connection.held_bytes -= self._size
        self._parts = []

    def _refuse_head(self, head: CallHead) -> None:
        self._is_deaf = True
        if head.failed is not None:
            self.fail(head.failed)
        else:
            self.is_answered = True
            self.connection.service.refused(head.refusal)
            self.connection.send_headers(self, literal(b":status", b"%d" % head.refusal), is_last=True)
            log_end(self, head.refusal, 0)

    def expire(self) -> None:
        """The message did not come."""
        limit_s = self.connection.service.limits.body_timeout_s
        self.fail(Failed(504, f"want the whole request within {limit_s:g} s"))

    def abandon(self) -> None:
        """The client is gone."""
        self._drop()
        self._is_deaf = True
        if self.is_answered:
            return
        self.is_answered = True
        log_end(self, GONE, 0)
        if self.waiting is not None:
            self.waiting.abort()
            self.waiting = None

    def reply(self, message: bytes) -> None:
        """Answer."""
        if self.is_answered:
            return
        self.is_answered = True
        self.waiting = None
        connection, id, size = self.connection, self.id, len(message) + _LEAD_BYTES
        if self.trace is None and size <= connection.window and size <= self.window and size <= connection.frame_bytes:
            connection.window -= size
            opening = _OPENING.pack(
                _HEADERS_WORD, frames.END_HEADERS, id, _OK_HEAD, size << 8, 0, id, 0, size - _LEAD_BYTES
            )
            connection.send_whole(
                self, b"%b%b%b" % (opening, message, _CLOSING.pack(_END_WORD, _END_FLAGS, id, _OK_END))
            )
        else:
            connection.send_headers(self, head_of(self.trace))
            connection.send_data(self, led(message))
            connection.send_trailers(self, _OK_END)
        if connection.service.access_log is not None:
            log_end(self, 200, size)

    def fail(self, failed: Failed) -> None:
        """End with an error."""
        if self.is_answered:
            return
        self.is_answered = self._is_deaf = True
        self.waiting = None
        self._drop()
        if self.info is None:
            self.connection.service.refused(failed.status)
        encodings = _ENCODINGS if failed.status == 501 else b""
        self.connection.send_headers(self, head_of(self.trace) + encodings + failed.trailers, is_last=True)
        log_end(self, failed.status, 0)


class StreamedCall(Stream):
    """Many messages; their answers leave in the order of the messages. One that fails does not end the stream.

    Args:
        connection: Whose.
        id: Of its stream.
        head: Its headers.
        calls: Answers the messages.
    """

    __slots__ = ("_buffer", "_calls", "_is_begun", "_is_over", "_is_reading", "_queue", "trace")

    def __init__(self, connection: Connection, id: int, head: CallHead, calls: Calls) -> None:
        super().__init__(connection, id, head)
        self._calls = calls
        self._buffer = bytearray()
        self._queue: deque[Streamed] = deque()
        self._is_begun = self._is_over = self._is_reading = False
        self.since_s = 0.0
        self.trace = begin_trace(head.headers, connection.service.trace_share) if head.is_traced else None

    @property
    def call_head(self) -> CallHead:
        """Its headers."""
        return cast(CallHead, self.head)

    @property
    def is_hungry(self) -> bool:
        """Whether another message may come."""
        return len(self._queue) < _MAX_STREAMED and len(self.unsent or ()) < _MAX_STREAMED

    @property
    def is_busy(self) -> bool:
        """Whether a message is not answered."""
        return bool(self._queue or self._buffer or self.unsent)

    def drain(self) -> None:
        """End once nothing is to be answered: the client may go on elsewhere."""
        if not self.is_busy and not self._is_over:
            self._finish(Failed(503, "the server stops"))

    def drained(self) -> None:
        """The client has taken its answers: go on."""
        if not self._is_over:
            self.connection.feed(self)
            self._read()

    def received(self, data: bytes) -> None:
        """Have whole messages answered."""
        if self._is_over:
            return
        if self.call_head.failed is not None:
            self._finish(self.call_head.failed)
            return
        self._buffer += data
        self.connection.held_bytes += len(data)
        if self.connection.held_bytes > _HELD * self.connection.service.limits.max_body_bytes:
            self._finish(Failed(413, "the connection has too many bytes of messages that are not whole"))
            return
        self._read()

    def _read(self) -> None:
        if self._is_reading or self._is_over:  # an answer that came at once
            return
        self._is_reading = True
        try:
            while self.is_hungry and (message := self._next()) is not None:
                streamed = Streamed(self, len(message))
                self._queue.append(streamed)
                self._calls.infer(streamed, message)
        except Failed as failed:
            self._finish(failed)
            return
        finally:
            self._is_reading = False
        self.since_s = self.connection.service.now_s if self._buffer and self.is_hungry else 0.0
        if self.has_ended and not self._queue and (self.is_hungry or not self._buffer):
            self._finish(Failed(400, "the stream ends in the middle of a message") if self._buffer else None)

    def _next(self) -> bytes | None:
        """The next whole message."""
        buffer, head, service = self._buffer, self.call_head, self.connection.service
        if len(buffer) < _LEAD_BYTES:
            return None
        end = _LEAD_BYTES + length_of(buffer, head, service)
        if len(buffer) < end:
            return None
        message, is_packed = bytes(memoryview(buffer)[_LEAD_BYTES:end]), buffer[0] == 1
        del buffer[:end]
        self.connection.held_bytes -= end
        return unpacked(message, head, service) if is_packed else message

    def send_answered(self) -> None:
        """Write the answers whose turn it is."""
        queue, connection = self._queue, self.connection
        while queue and not self._is_over and (response := queue[0].response) is not None:
            queue.popleft()
            if not self._is_begun:
                self._is_begun = True
                connection.send_headers(self, head_of(self.trace))
            connection.send_data(self, led(response))
        self.drained()

    def _finish(self, failed: Failed | None) -> None:
        """End with the answers that are out."""
        self._drop()
        block = _OK_END if failed is None else failed.trailers
        if not self._is_begun:
            block = head_of(self.trace) + (_ENCODINGS if failed is not None and failed.status == 501 else b"") + block
        self.connection.send_trailers(self, block)

    def _drop(self) -> None:
        self._is_over = True
        self.connection.held_bytes -= len(self._buffer)
        self._buffer = bytearray()
        queue, self._queue = self._queue, deque()
        for one in queue:
            one.abandon()

    def expire(self) -> None:
        """A message did not come."""
        limit_s = self.connection.service.limits.body_timeout_s
        self._finish(Failed(504, f"want a whole message within {limit_s:g} s"))

    def abandon(self) -> None:
        """The client is gone."""
        if not self._is_over:
            self._drop()


class Streamed:
    """One message of a stream, and the place of its answer.

    Args:
        stream: Whose.
        received_bytes: Of the message.
    """

    __slots__ = (
        "began_ns", "connection", "head", "info", "job", "received_bytes", "request_id", "response", "stream", "trace",
        "waiting",
    )  # fmt: skip

    def __init__(self, stream: StreamedCall, received_bytes: int) -> None:
        self.stream, self.connection, self.head, self.trace = stream, stream.connection, stream.head, stream.trace
        self.began_ns = time.perf_counter_ns()
        self.received_bytes = received_bytes
        self.waiting: Abortable | None = None
        self.job: Job | None = None
        self.info: ModelInfo | None = None
        self.request_id = ""
        self.response: bytes | None = None  # its turn may not have come

    @property
    def call_head(self) -> CallHead:
        """The headers of its stream."""
        return self.stream.call_head

    def reply(self, message: bytes) -> None:
        """Answer."""
        self._end(200, b"\x12" + varint(len(message)) + message)

    def fail(self, failed: Failed) -> None:
        """Answer with an error, and the request's id."""
        if self.info is None:
            self.connection.service.refused(failed.status)
        text, id = failed.message.encode(), self.request_id.encode()
        response = b"\x1a" + varint(len(id)) + id if id else b""
        self._end(
            failed.status, b"\x0a" + varint(len(text)) + text + b"\x12" + varint(len(response)) + response
        )  # fmt: skip

    def _end(self, status: int, response: bytes) -> None:
        if self.response is not None:
            return
        self.waiting = None
        self.response = response
        log_end(self, status, len(response))
        self.stream.send_answered()

    def abandon(self) -> None:
        """Nobody will read the answer."""
        if self.response is not None:
            return
        self.response = b""
        log_end(self, GONE, 0)
        if self.waiting is not None:
            self.waiting.abort()
            self.waiting = None


Request = Call | Streamed
Make = Callable[[Connection, int, CallHead], Stream]


def length_of(lead: bytes | bytearray, head: CallHead, service: Service) -> int:
    """How long the message is that `lead` begins.

    Raises:
        Failed: It is too large, or compressed though the headers do not say how.
    """
    size = int.from_bytes(lead[1:_LEAD_BYTES], "big")
    if lead[0] > 1 or (lead[0] and head.encoding == "identity"):
        raise Failed(500, f"the message's flag is {lead[0]}: want 0, or 1 with grpc-encoding")
    limit = service.limits.max_body_bytes
    if size > limit:
        raise Failed(413, f"want a message of at most {limit} bytes, got {size}")
    return size


def unpacked(message: bytes, head: CallHead, service: Service) -> bytes:
    """A compressed message; never more than a message may have.

    Raises:
        Failed: It is damaged, or too large.
    """
    try:
        return decompress(message, head.encoding, service.limits.max_body_bytes)
    except InputError as error:
        raise Failed(413 if "at most" in error.message else 400, error.message) from None


def led(message: bytes) -> bytes:
    """A message with what stands before it.

    Example:
        >>> led(b"ab")
        b'\\x00\\x00\\x00\\x00\\x02ab'
    """
    return b"\0" + len(message).to_bytes(4, "big") + message


def varint(value: int) -> bytes:
    """A number as protobuf writes it.

    Example:
        >>> varint(1), varint(300)
        (b'\\x01', b'\\xac\\x02')
    """
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def head_of(trace: Trace | None) -> bytes:
    """The headers of an answer."""
    return _OK_HEAD if trace is None else _OK_HEAD + literal(TRACE_HEADER, trace.header)


def log_end(request: Request, status: int, sent_bytes: int) -> None:
    """Write the access log's line."""
    connection = request.connection
    log = connection.service.access_log
    if log is None:
        return
    ended = Ended(
        status=status, received_bytes=request.received_bytes, sent_bytes=sent_bytes, began_ns=request.began_ns,
        trace=request.trace, job=request.job, route="infer" if request.job is not None else "", info=request.info,
    )  # fmt: skip
    request.job = None  # no cycle is left
    log.write({**fields_of(log, connection, request.head, ended), "grpc_status": GRPC_CODES.get(status, 13)})
