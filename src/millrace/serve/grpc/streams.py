"""Streams of HTTP/2 and what is written of them, as far as both windows allow."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from millrace.serve.grpc import frames
from millrace.serve.grpc.frames import HEAD, frame
from millrace.serve.service import Head

if TYPE_CHECKING:
    from millrace.serve.grpc.http2 import Connection

STREAM_WINDOW = 4 << 20


class Stream:
    """One stream. A transport of calls derives its own.

    Args:
        connection: Whose.
        id: Its number.
        head: Its headers.
    """

    __slots__ = ("connection", "has_ended", "head", "id", "left", "since_s", "trailers", "unsent", "window")

    def __init__(self, connection: Connection, id: int, head: Head) -> None:
        self.connection, self.id, self.head = connection, id, head
        self.window = connection.first_window  # what may be sent
        self.left = STREAM_WINDOW  # what may be received
        self.has_ended = False  # the client has sent all
        self.since_s = connection.service.now_s  # when what it sends began; 0: it is whole
        self.unsent: deque[memoryview] | None = None
        self.trailers = b""  # to be sent after `unsent`; empty: more will come

    @property
    def is_hungry(self) -> bool:
        """Whether more may be received."""
        return True

    @property
    def is_busy(self) -> bool:
        """Whether an answer is owed."""
        return True

    def drain(self) -> None:
        """The server stops: end if nothing is owed."""

    def received(self, data: bytes) -> None:
        """A part of what it carries, perhaps empty; `has_ended` tells whether it was the last."""
        raise NotImplementedError  # pragma: no cover - every transport has its own

    def drained(self) -> None:
        """All that waited for a window is written."""

    def expire(self) -> None:
        """What it carries has been incomplete for too long."""
        raise NotImplementedError  # pragma: no cover - every transport has its own

    def abandon(self) -> None:
        """Nobody will read an answer."""
        raise NotImplementedError  # pragma: no cover - every transport has its own


class Sender(asyncio.Protocol):
    """What a connection writes. All of a turn of the loop leaves at once."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.streams: dict[int, Stream] = {}
        self.first_window = frames.FIRST_WINDOW  # of a new stream
        self.window = frames.FIRST_WINDOW  # what may be sent
        self.frame_bytes = frames.SMALLEST_FRAME  # of a frame that may be sent
        self.blocked: dict[int, Stream] = {}  # wait for a window
        self.moved_s = 0.0  # when something was written last, of those that wait
        self._out: list[bytes | memoryview] = []

    def finished(self, stream: Stream) -> None:
        """The last of a stream is written."""
        raise NotImplementedError  # pragma: no cover - a connection knows what follows

    def write(self, data: bytes | memoryview) -> None:
        """Let that leave at the end of this turn."""
        if not self._out:
            asyncio.get_running_loop().call_soon(self.flush)
        self._out.append(data)

    def flush(self) -> None:
        """Let all leave now."""
        out, self._out = self._out, []
        if out and not self.transport.is_closing():
            self.transport.write(b"".join(out))

    def send_headers(self, stream: Stream, block: bytes, *, is_last: bool = False) -> None:
        """Write a header block; the last one ends the stream."""
        self.write(frame(frames.HEADERS, frames.END_HEADERS | (frames.END_STREAM if is_last else 0), stream.id, block))
        if is_last:
            self.finished(stream)

    def send_whole(self, stream: Stream, data: bytes) -> None:
        """Write the rendered frames of a whole answer, whose payload the windows have been asked for."""
        self.write(data)
        self.finished(stream)

    def send_data(self, stream: Stream, data: bytes) -> None:
        """Write data, as soon and as far as the windows allow."""
        if stream.unsent is None:
            stream.unsent = deque()
        stream.unsent.append(memoryview(data))
        self.pump(stream)

    def send_trailers(self, stream: Stream, block: bytes) -> None:
        """End the stream after its data."""
        if stream.unsent:
            stream.trailers = block
        else:
            self.send_headers(stream, block, is_last=True)

    def pump_all(self) -> None:
        """Write what the windows allow, of all that wait."""
        for stream in list(self.blocked.values()):
            self.pump(stream)

    def pump(self, stream: Stream) -> None:
        """Write what the windows allow."""
        unsent = stream.unsent
        while unsent:
            data = unsent[0]
            room = min(self.window, stream.window, self.frame_bytes)
            if room <= 0:
                if stream.id not in self.blocked:
                    self.blocked[stream.id] = stream
                    self.moved_s = time.monotonic()
                return
            size = min(room, len(data))
            self.window -= size
            stream.window -= size
            self.write(HEAD.pack(size << 8, 0, stream.id))
            self.write(data[:size])
            self.moved_s = time.monotonic()
            if size == len(data):
                unsent.popleft()
            else:
                unsent[0] = data[size:]
        was_blocked = self.blocked.pop(stream.id, None) is not None
        if stream.trailers:
            self.send_headers(stream, stream.trailers, is_last=True)
        elif was_blocked:
            stream.drained()
