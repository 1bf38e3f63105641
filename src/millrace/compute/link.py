"""The line between a driver and a worker: length-prefixed MessagePack frames over a socket pair."""

from __future__ import annotations

import socket
import struct
import threading

import msgspec

from millrace.core.ports import Frame

_LENGTH = struct.Struct(">I")
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Frame)


class WorkerLink:
    """A worker's end. Thread-safe."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, frame: Frame) -> None:
        """Send one frame; a driver that is gone is not an error here: the watcher ends this process."""
        payload = _encoder.encode(frame)
        with self._lock:
            try:
                self._connection.sendall(_LENGTH.pack(len(payload)) + payload)
            except OSError:
                return

    def wait_for_close(self) -> None:
        """Return when the driver has closed its end."""
        try:
            while self._connection.recv(4096):
                continue
        except OSError:
            return


def receive(connection: socket.socket) -> Frame | None:
    """The next frame, or None when the worker's end is closed.

    Args:
        connection: The driver's end.
    """
    header = _exactly(connection, _LENGTH.size)
    if header is None:
        return None
    payload = _exactly(connection, _LENGTH.unpack(header)[0])
    return None if payload is None else _decoder.decode(payload)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < size:
        try:
            part = connection.recv(size - len(parts))
        except OSError:
            return None
        if not part:
            return None
        parts += part
    return bytes(parts)
