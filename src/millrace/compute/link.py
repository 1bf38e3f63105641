"""The line between a driver and a worker: length-prefixed MessagePack over a socket pair."""

from __future__ import annotations

import socket
import struct
import threading

import msgspec

from millrace.core.ports import HeartbeatFrame, MetricsFrame, OutputFrame, ProgressFrame, Struct, Work, WorkResult

MAX_MESSAGE_BYTES = 256 << 20  # more is a broken line, not a frame
_LENGTH = struct.Struct(">I")


class Order(Struct, frozen=True, kw_only=True, tag="order"):
    """Driver → worker, once: what to do and in which surroundings.

    The fork server may be older than a change of the driver's environment or import path.
    """

    entry: str
    work: Work
    environment: dict[str, str] = {}
    import_path: list[str] = []
    secrets: dict[str, str] = {}

    def __repr__(self) -> str:
        """Without values."""
        return f"Order(work={self.work.name!r})"


class Cancel(Struct, frozen=True, kw_only=True, tag="cancel"):
    """Driver → worker: the same as SIGTERM, for a main thread that is busy in native code."""


Message = (
    Order | Cancel | ProgressFrame | MetricsFrame | OutputFrame | HeartbeatFrame | WorkResult
)  # every message of the line, in either direction


class Channel:
    """One end of the line. `send` may be called from several threads; one thread receives.

    Example:
        >>> ours, theirs = (Channel(end) for end in socket.socketpair())
        >>> ours.send(ProgressFrame(done=1.0, total=2.0))
        True
        >>> theirs.receive()
        ProgressFrame(done=1.0, total=2.0, text='')
        >>> ours.close()
        >>> theirs.receive() is None
        True
        >>> theirs.close()
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Message)

    def send(self, message: Message) -> bool:
        """Send one message whole; False when the other end is gone.

        Raises:
            TypeError: The message holds something that is not plain data.
        """
        with self._lock:
            payload = self._encoder.encode(message)
            try:
                self._connection.sendall(_LENGTH.pack(len(payload)) + payload)
            except OSError:  # closed by either side, or the process at the other end was killed
                return False
        return True

    def receive(self) -> Message | None:
        """The next message, or None when the other end is closed.

        Raises:
            ValueError: The bytes are not a message (`msgspec.DecodeError` is one).
        """
        header = self._exactly(_LENGTH.size)
        if header is None:
            return None
        size = _LENGTH.unpack(header)[0]
        if size > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of at most {MAX_MESSAGE_BYTES} bytes was expected, its header says {size}")
        payload = self._exactly(size)
        return None if payload is None else self._decoder.decode(payload)

    def shutdown(self) -> None:
        """End the line in both directions: a `receive` that waits returns None. Idempotent."""
        try:
            self._connection.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end was first
            return

    def close(self) -> None:
        """Let go of the socket."""
        self._connection.close()

    def _exactly(self, size: int) -> bytes | None:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._connection.recv(min(size - len(parts), 1 << 20))
            except OSError:  # reset by a process that was killed
                return None
            if not part:
                return None
            parts += part
        return bytes(parts)
