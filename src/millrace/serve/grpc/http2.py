"""HTTP/2 on a uvloop protocol: streams, both windows, floods and time-outs. What a stream carries is its own affair."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import cast

from millrace.serve.grpc import frames
from millrace.serve.grpc.frames import HEAD, HEAD_BYTES, Code, ConnectionEnds, HeaderReader, StreamEnds, frame
from millrace.serve.grpc.streams import STREAM_WINDOW, Sender, Stream
from millrace.serve.service import Head, Service
from millrace.serve.tls import subject_of

MAX_STREAMS = 256
_FRAME_BYTES = 256 << 10  # of a frame from a client
_WINDOW = 16 << 20  # of what a client sends on all its streams
_MAX_FRAGMENTS = 64  # of a header block
_MAX_NUISANCES = 1000  # what costs work and brings none, within a sweep's interval
_LINGER_S = 2.0


class Connection(Sender):
    """One client. What is written in a turn of the loop leaves at once.

    Args:
        service: What all connections share, those of HTTP too.
        read_head: Makes a head of a header list, once for as long as the client repeats it.
        make_stream: For each request.
    """

    def __init__(
        self, service: Service, read_head: Callable[[list[tuple[bytes, bytes]]], Head],
        make_stream: Callable[[Connection, int, Head], Stream],
    ) -> None:  # fmt: skip
        super().__init__()
        self.service, self._read_head, self._make_stream = service, read_head, make_stream
        self.held_bytes = 0  # of messages that are not whole yet
        self._left = _WINDOW  # what may be received
        self._headers = HeaderReader(service.limits.max_head_bytes)
        self._rest = b""
        self._is_begun = self._is_greeted = False  # the preface has come; SETTINGS too
        self._last_id = 0
        self._fragments: list[bytes] = []  # of a header block without its end
        self._fragments_of = self._fragments_flags = 0
        self._cut: set[int] = set()  # streams that ended here before the client's end
        self._nuisances = 0
        self._is_ending = False  # nothing more is read
        self._is_going = False  # no new streams
        self._idle_since_s = self.moved_s = self._came_s = time.monotonic()
        self._head = Head(b"", b"", {}, service.handler)
        self._peer: str | None = None
        self._subject: str | None = None

    # ------------------------------------------------------------------ transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass
        if not self.service.make_room():
            self._is_ending = True
            self.transport.write(frames.settings({}) + frame(frames.GOAWAY, 0, 0, bytes(7) + b"\x0b"))
            self.transport.close()
            return
        self.service.connections.add(self)
        self.write(frames.settings({
            frames.MAX_CONCURRENT_STREAMS: MAX_STREAMS, frames.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
            frames.MAX_FRAME_SIZE: _FRAME_BYTES, frames.MAX_HEADER_LIST_SIZE: self.service.limits.max_head_bytes,
        }))  # fmt: skip
        self._grow(0, _WINDOW - frames.FIRST_WINDOW)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone: what waits for it is told."""
        self.service.connections.discard(self)
        self._is_ending = True
        self._abandon()

    def _abandon(self) -> None:
        streams, self.streams = self.streams, {}
        self.blocked.clear()
        for stream in streams.values():
            stream.abandon()

    def pause_writing(self) -> None:
        """The client reads too slowly: nothing more is read from it."""
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self.moved_s = time.monotonic()
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def eof_received(self) -> bool:
        """The client sends no more: keep the connection until its answers are out."""
        whole = any(stream.has_ended for stream in self.streams.values())
        self._is_going = True
        return whole and not self._is_ending

    @property
    def head(self) -> Head:
        """The head of the last request."""
        return self._head

    @property
    def peer(self) -> str:
        """The client's address."""
        if self._peer is None:
            peer = self.transport.get_extra_info("peername")
            self._peer = str(peer[0]) if peer else "unknown"
        return self._peer

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

    @property
    def is_busy(self) -> bool:
        """Whether a request has begun and is not answered."""
        return any(stream.is_busy for stream in self.streams.values())

    def close(self) -> None:
        """Close it; nothing of it waits."""
        self._end(Code.NO_ERROR, "")

    def abort(self) -> None:
        """Cut it."""
        self.transport.abort()

    def drain(self) -> None:
        """Take no new streams, and end after the last answer."""
        if self._is_going or self._is_ending:
            return
        self._is_going = True
        self._go_away(Code.NO_ERROR, "")
        if not self.streams:
            self._end(Code.NO_ERROR, "", is_told=True)

    def check_time(self, now_s: float) -> None:
        """Close or refuse what has taken too long."""
        limits = self.service.limits
        self._nuisances >>= 1
        if self.service.is_draining:
            self.drain()
            for stream in list(self.streams.values()):
                stream.drain()
        if self._is_ending:
            if now_s - self._idle_since_s > _LINGER_S:
                self.transport.abort()
        elif not self._is_greeted:
            if now_s - self._came_s > limits.head_timeout_s:
                self._end(Code.SETTINGS_TIMEOUT, f"want SETTINGS within {limits.head_timeout_s:g} s")
        elif self._fragments_of and now_s - self._came_s > limits.head_timeout_s:
            self._end(Code.ENHANCE_YOUR_CALM, f"want a whole header block within {limits.head_timeout_s:g} s")
        elif not self.streams:
            if now_s - self._idle_since_s > limits.idle_timeout_s:
                self._end(Code.NO_ERROR, "")
        else:
            self._check_streams(now_s, limits.body_timeout_s)

    def _check_streams(self, now_s: float, limit_s: float) -> None:
        is_stuck = self.blocked or self.transport.get_write_buffer_size()
        if is_stuck and now_s - self.moved_s > limit_s:
            self.transport.abort()
            return
        for stream in [one for one in self.streams.values() if one.since_s and now_s - one.since_s > limit_s]:
            stream.expire()

    # ------------------------------------------------------------------ reading

    def data_received(self, data: bytes) -> None:
        """Parse; whole messages are handled from within."""
        if self._is_ending:
            return
        if self._rest:
            data = self._rest + data
        try:
            at = 0 if self._is_begun else self._begin(data)
            at = self._parse(data, at) if self._is_begun else at
        except ConnectionEnds as ending:
            self._end(ending.code, ending.message)
            return
        self._rest = data[at:]

    def _begin(self, data: bytes) -> int:
        """Check the preface as far as it has come; where the frames begin."""
        if data[: len(frames.PREFACE)] != frames.PREFACE[: len(data)]:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "want HTTP/2 with prior knowledge: its preface is missing")
        self._is_begun = len(data) >= len(frames.PREFACE)
        return len(frames.PREFACE) if self._is_begun else 0

    def _parse(self, data: bytes, at: int) -> int:
        """Handle whole frames; where the first one that is not begins."""
        end, unpack, handlers = len(data), HEAD.unpack_from, _HANDLERS
        while end - at >= HEAD_BYTES and not self._is_ending:
            word, flags, stream = unpack(data, at)
            kind, stop = word & 0xFF, at + HEAD_BYTES + (word >> 8)
            if word >> 8 > _FRAME_BYTES:
                raise ConnectionEnds(Code.FRAME_SIZE_ERROR, f"want frames of at most {_FRAME_BYTES} bytes")
            if stop > end:
                break
            if self._fragments_of and kind != frames.CONTINUATION:
                raise ConnectionEnds(Code.PROTOCOL_ERROR, "want the rest of a header block, got another frame")
            if not self._is_greeted and kind != frames.SETTINGS:
                raise ConnectionEnds(Code.PROTOCOL_ERROR, "want SETTINGS first")
            stream &= frames.MAX_WINDOW
            if kind < len(handlers):
                try:
                    handlers[kind](self, flags, stream, data[at + HEAD_BYTES : stop])
                except StreamEnds as ending:
                    self.reset(stream, ending.code)
            at = stop
        return at

    def _nuisance(self) -> None:
        self._nuisances += 1
        if self._nuisances > _MAX_NUISANCES:
            raise ConnectionEnds(Code.ENHANCE_YOUR_CALM, "too many frames or calls that come to nothing")

    def _is_gone(self, stream: int, name: str) -> None:
        """A frame of a stream that is not open: allowed where it has been."""
        if not stream or stream > self._last_id or not stream & 1:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, f"{name} of a stream that nobody has opened")

    def _on_data(self, flags: int, id: int, payload: bytes) -> None:
        size = len(payload)
        self._left -= size
        if self._left < _WINDOW >> 1:
            if self._left < 0:
                raise ConnectionEnds(Code.FLOW_CONTROL_ERROR, "more data than the connection's window")
            self._grow(0, _WINDOW - self._left)
            self._left = _WINDOW
        stream = self.streams.get(id)
        if stream is None or stream.has_ended:
            self._overlook(flags, id)
            return
        if flags & frames.PADDED:
            payload = frames.unpadded(flags, payload)
        stream.left -= size
        if flags & frames.END_STREAM:
            stream.has_ended = True
        elif not payload:
            self._nuisance()
        if stream.left < 0:
            raise StreamEnds(Code.FLOW_CONTROL_ERROR)
        stream.received(payload)
        if stream.left < STREAM_WINDOW >> 1 and id in self.streams:
            self.feed(stream)

    def _overlook(self, flags: int, id: int) -> None:
        """Data of a stream that takes none: allowed where the client cannot know yet."""
        self._is_gone(id, "DATA")
        if id not in self._cut:
            raise ConnectionEnds(Code.STREAM_CLOSED, "DATA of a stream that has ended")
        if flags & frames.END_STREAM:
            self._cut.discard(id)

    def feed(self, stream: Stream) -> None:
        """Let the client send on, if the stream can take it."""
        if stream.left < STREAM_WINDOW >> 1 and not stream.has_ended and stream.is_hungry:
            self._grow(stream.id, STREAM_WINDOW - stream.left)
            stream.left = STREAM_WINDOW

    def _grow(self, id: int, size: int) -> None:
        self.write(frame(frames.WINDOW_UPDATE, 0, id, size.to_bytes(4, "big")))

    def _on_headers(self, flags: int, id: int, payload: bytes) -> None:
        if flags & (frames.PADDED | frames.HAS_PRIORITY):
            payload = frames.unpadded(flags, payload)
            if flags & frames.HAS_PRIORITY:
                if len(payload) < 5:
                    raise ConnectionEnds(Code.FRAME_SIZE_ERROR, "HEADERS: its priority is cut off")
                payload = payload[5:]
        if flags & frames.END_HEADERS:
            self._on_block(id, flags, payload)
        else:
            self._fragments, self._fragments_of, self._fragments_flags = [payload], id or -1, flags
            self._came_s = time.monotonic()

    def _on_continuation(self, flags: int, id: int, payload: bytes) -> None:
        if id != self._fragments_of:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "CONTINUATION of no header block")
        fragments = self._fragments
        fragments.append(payload)
        limit = self.service.limits.max_head_bytes
        if len(fragments) > _MAX_FRAGMENTS or sum(map(len, fragments)) > limit:
            raise ConnectionEnds(Code.ENHANCE_YOUR_CALM, f"want a header block of at most {limit} bytes")
        if flags & frames.END_HEADERS:
            self._fragments, self._fragments_of = [], 0
            self._on_block(id, self._fragments_flags, b"".join(fragments))

    def _on_block(self, id: int, flags: int, block: bytes) -> None:
        """A whole header block: a new stream, or the end of one."""
        if id > self._last_id and id & 1:
            self._last_id = id
            head = self._headers.known.get(block)
            if head is None:
                head = self._head = self._read_head(self._headers.read(block))
                self._headers.keep(block, head)
            self._open(id, flags, head)
            return
        stream = self.streams.get(id)
        if stream is None and id not in self._cut:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "want streams with odd numbers that rise")
        self._headers.read(block)  # trailers
        if stream is None:
            self._cut.discard(id)
        elif stream.has_ended:
            raise ConnectionEnds(Code.STREAM_CLOSED, "HEADERS of a stream that has ended")
        elif not flags & frames.END_STREAM:
            raise StreamEnds(Code.PROTOCOL_ERROR)
        else:
            stream.has_ended = True
            stream.received(b"")

    def _open(self, id: int, flags: int, head: Head) -> None:
        if len(self.streams) >= MAX_STREAMS or self._is_going:
            if not flags & frames.END_STREAM:
                self._cut.add(id)
            if not self._is_going:
                self._nuisance()
            self.write(frame(frames.RST_STREAM, 0, id, Code.REFUSED_STREAM.to_bytes(4, "big")))
            return
        stream = self.streams[id] = self._make_stream(self, id, head)
        if flags & frames.END_STREAM:
            stream.has_ended = True
            stream.received(b"")

    def _on_priority(self, flags: int, id: int, payload: bytes) -> None:
        self._nuisance()
        if not id:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "PRIORITY of no stream")
        if len(payload) != 5:
            raise StreamEnds(Code.FRAME_SIZE_ERROR)

    def _on_reset(self, flags: int, id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionEnds(Code.FRAME_SIZE_ERROR, "RST_STREAM: want 4 bytes")
        self._is_gone(id, "RST_STREAM")
        self._cut.discard(id)
        stream = self.streams.pop(id, None)
        if stream is not None:
            self.blocked.pop(id, None)
            stream.abandon()
            self._note_end()
            self._nuisance()

    def _on_settings(self, flags: int, id: int, payload: bytes) -> None:
        if id:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "SETTINGS of a stream")
        if flags & frames.ACK:
            if payload:
                raise ConnectionEnds(Code.FRAME_SIZE_ERROR, "SETTINGS: want no payload in its ACK")
            return
        self._nuisance()
        for name, value in frames.read_settings(payload):
            if name == frames.INITIAL_WINDOW_SIZE:
                change = value - self.first_window
                self.first_window = value
                for stream in self.streams.values():
                    stream.window += change
                    if stream.window > frames.MAX_WINDOW:
                        raise ConnectionEnds(Code.FLOW_CONTROL_ERROR, "a stream's window is too large")
            elif name == frames.MAX_FRAME_SIZE:
                self.frame_bytes = min(value, _FRAME_BYTES)
        self._is_greeted = True
        self.write(frame(frames.SETTINGS, frames.ACK, 0))
        self.pump_all()

    def _on_push(self, flags: int, id: int, payload: bytes) -> None:
        raise ConnectionEnds(Code.PROTOCOL_ERROR, "PUSH_PROMISE of a client")

    def _on_ping(self, flags: int, id: int, payload: bytes) -> None:
        if id:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "PING of a stream")
        if len(payload) != 8:
            raise ConnectionEnds(Code.FRAME_SIZE_ERROR, "PING: want 8 bytes")
        if not flags & frames.ACK:
            self._nuisance()
            self.write(frame(frames.PING, frames.ACK, 0, payload))

    def _on_go_away(self, flags: int, id: int, payload: bytes) -> None:
        if id:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "GOAWAY of a stream")
        self._is_going = True
        if not self.streams:
            self._end(Code.NO_ERROR, "", is_told=True)

    def _on_window_update(self, flags: int, id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise ConnectionEnds(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE: want 4 bytes")
        size = int.from_bytes(payload, "big") & frames.MAX_WINDOW
        if not id:
            self.window += size
            if not size or self.window > frames.MAX_WINDOW:
                code = Code.FLOW_CONTROL_ERROR if size else Code.PROTOCOL_ERROR
                raise ConnectionEnds(code, "WINDOW_UPDATE: want a window of 1 to 2^31 - 1")
            if self.blocked:
                self.pump_all()
            return
        stream = self.streams.get(id)
        if stream is None:
            self._is_gone(id, "WINDOW_UPDATE")
            return
        stream.window += size
        if not size or stream.window > frames.MAX_WINDOW:
            raise StreamEnds(Code.FLOW_CONTROL_ERROR if size else Code.PROTOCOL_ERROR)
        if id in self.blocked:
            self.pump(stream)

    def reset(self, id: int, code: Code) -> None:
        """End a stream at once."""
        self.write(frame(frames.RST_STREAM, 0, id, code.to_bytes(4, "big")))
        self._nuisance()
        self.blocked.pop(id, None)
        stream = self.streams.pop(id, None)
        if stream is None or not stream.has_ended:
            self._note_cut(id)
        if stream is not None:
            stream.abandon()
            self._note_end()

    def finished(self, stream: Stream) -> None:
        """The last of a stream is written."""
        self.streams.pop(stream.id, None)
        if not stream.has_ended:
            self.write(frame(frames.RST_STREAM, 0, stream.id, bytes(4)))
            self._note_cut(stream.id)
        self._note_end()

    def _note_cut(self, id: int) -> None:
        """What the client sends of it until it has heard of its end is overlooked."""
        self._cut.add(id)
        if len(self._cut) > 4 * MAX_STREAMS:
            self._cut.discard(min(self._cut))

    def _note_end(self) -> None:
        if not self.streams:
            self._idle_since_s = self.service.now_s
            if self._is_going:
                self._end(Code.NO_ERROR, "", is_told=True)

    def _go_away(self, code: Code, message: str) -> None:
        payload = self._last_id.to_bytes(4, "big") + code.to_bytes(4, "big") + message.encode()
        self.write(frame(frames.GOAWAY, 0, 0, payload))

    def _end(self, code: Code, message: str, *, is_told: bool = False) -> None:
        """Say why, and close after the client had a chance to read it."""
        if self._is_ending:
            return
        self._is_ending = True
        self._rest = b""
        if not is_told:
            self._go_away(code, message)
        self.flush()
        self._abandon()
        self._idle_since_s = time.monotonic()
        if code is not Code.NO_ERROR and self.transport.can_write_eof():
            self.transport.write_eof()  # closing with unread input would reset the connection
        else:
            self.transport.close()


_HANDLERS: tuple[Callable[[Connection, int, int, bytes], None], ...] = (
    Connection._on_data, Connection._on_headers, Connection._on_priority, Connection._on_reset,
    Connection._on_settings, Connection._on_push, Connection._on_ping, Connection._on_go_away,
    Connection._on_window_update, Connection._on_continuation,
)  # fmt: skip
