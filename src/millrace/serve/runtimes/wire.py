"""Tensors between the server and a model's own process: a length, a JSON head, raw buffers. Nothing is unpickled."""

from __future__ import annotations

import math
import socket
import struct
import time
from collections.abc import Mapping
from typing import Any, Literal

import msgspec
import numpy as np
import orjson

from millrace.core.errors import CorruptError
from millrace.core.types import Struct
from millrace.formats.signature import Dtype

MAX_HEAD_BYTES = 16 << 20
MAX_TENSOR_BYTES = 2 << 30
_LENGTH = struct.Struct(">I")


class TensorHead(Struct, frozen=True, kw_only=True):
    """What the next `size_bytes` bytes are; texts travel as one JSON list."""

    name: str
    dtype: Dtype
    shape: list[int]
    size_bytes: int


class Message(Struct, frozen=True, kw_only=True):
    """The head of a message; `body` is what its kind needs, `tensors` follow it."""

    kind: Literal["order", "ready", "call", "answer", "error"]
    body: dict[str, Any] = {}
    tensors: list[TensorHead] = []


def send(sock: socket.socket, kind: str, body: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Send a message, whole.

    Args:
        sock: Blocking, or with a time-out for each part.
        kind: See `Message`.
        body: Plain data.
        tensors: Of the dtypes that a signature may name.

    Raises:
        OSError: The other side is gone, or takes nothing within the socket's time-out.
    """
    heads: list[TensorHead] = []
    buffers: list[bytes | memoryview] = []
    for name, values in tensors.items():
        is_text = values.dtype == object
        data = orjson.dumps(values.reshape(-1).tolist()) if is_text else _buffer(values)
        dtype: Any = "string" if is_text else values.dtype.name
        heads.append(TensorHead(name=name, dtype=dtype, shape=list(values.shape), size_bytes=len(data)))
        buffers.append(data)
    head = msgspec.json.encode({"kind": kind, "body": body, "tensors": heads})
    sock.sendall(_LENGTH.pack(len(head)) + head)
    for data in buffers:
        sock.sendall(data)


def _buffer(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def receive(sock: socket.socket, deadline_s: float | None = None) -> tuple[Message, dict[str, np.ndarray]]:
    """The next message.

    Args:
        sock: A stream.
        deadline_s: On `time.monotonic`; None waits for ever.

    Raises:
        EOFError: The other side is gone.
        TimeoutError: The deadline has passed.
        CorruptError: It is no message.
    """
    (length,) = _LENGTH.unpack(_read(sock, _LENGTH.size, deadline_s))
    if length > MAX_HEAD_BYTES:
        raise CorruptError(f"a message's head: want at most {MAX_HEAD_BYTES} bytes, got {length}")
    try:
        message = msgspec.json.decode(_read(sock, length, deadline_s), type=Message)
    except msgspec.MsgspecError as error:
        raise CorruptError(f"a message cannot be read: {error}") from error
    return message, {head.name: _tensor(head, sock, deadline_s) for head in message.tensors}


def _tensor(head: TensorHead, sock: socket.socket, deadline_s: float | None) -> np.ndarray:
    count = math.prod(head.shape)
    is_text = head.dtype == "string"
    if (
        min(head.shape, default=0) < 0
        or not 0 <= head.size_bytes <= MAX_TENSOR_BYTES
        or (not is_text and head.size_bytes != count * np.dtype(head.dtype).itemsize)
    ):
        raise CorruptError(f"tensor {head.name!r}: {head.size_bytes} bytes are not {head.dtype} {head.shape}")
    data = _read(sock, head.size_bytes, deadline_s)
    if not is_text:
        return np.frombuffer(data, dtype=head.dtype).reshape(head.shape)
    texts = orjson.loads(data)
    if not isinstance(texts, list) or len(texts) != count:
        raise CorruptError(f"tensor {head.name!r}: the texts are not of shape {head.shape}")
    values = np.empty(count, dtype=object)
    values[:] = texts
    return values.reshape(head.shape)


def _read(sock: socket.socket, size: int, deadline_s: float | None) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        if deadline_s is not None:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            sock.settimeout(left_s)
        taken = sock.recv_into(view[at:])
        if not taken:
            raise EOFError
        at += taken
    return data
