"""A client of gRPC in process: frames of HTTP/2 made by hand, handed to the real protocol, and its answers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import hpack
import numpy as np

from millrace.serve.batching import Cost
from millrace.serve.grpc import frames
from millrace.serve.grpc.frames import DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PREFACE, RST_STREAM, Code, frame
from millrace.serve.grpc.messages import message_type
from millrace.serve.grpc.service import NAME, Inferences
from millrace.testing.serving import Doubler, InProcessServer, Recorder

Request, Response = message_type("ModelInferRequest"), message_type("ModelInferResponse")
INFER, STREAM = f"/{NAME}/ModelInfer", f"/{NAME}/ModelStreamInfer"
GREETING = PREFACE + frames.settings({})
OK, INVALID, EXPIRED, NOT_FOUND, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 3, 4, 5, 8, 12, 13, 14


def tensor_request(values: list[float], **fields: Any) -> bytes:
    """A request for the sums of pairs, as `Doubler` answers it."""
    request = Request(model_name="m", raw_input_contents=[np.array(values, np.float32).tobytes()], **fields)
    request.inputs.add(name="x", datatype="FP32", shape=[len(values) // 2, 2])
    return request.SerializeToString()


def led(message: bytes, flag: int = 0) -> bytes:
    """A message with what gRPC puts before it.

    Example:
        >>> led(b"a", flag=1)
        b'\\x01\\x00\\x00\\x00\\x01a'
    """
    return bytes([flag]) + len(message).to_bytes(4, "big") + message


def number(value: int) -> bytes:
    """Four bytes.

    Example:
        >>> number(9)
        b'\\x00\\x00\\x00\\t'
    """
    return value.to_bytes(4, "big")


class Wire(Recorder):
    """Keeps what is written; nothing of it waits."""

    def get_write_buffer_size(self) -> int:
        """Nothing."""
        return 0


class Answer:
    """What has come on one stream."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, str]] = []
        self.data = b""
        self.reset: int | None = None
        self.is_whole = False

    @property
    def status(self) -> int:
        """gRPC's code."""
        return int(self.blocks[-1]["grpc-status"])

    @property
    def values(self) -> list[float]:
        """The answer's numbers.

        Raises:
            AssertionError: It is none, or has not come to its end.
        """
        assert self.is_whole
        assert self.status == OK, self.blocks
        (raw,) = Response.FromString(self.data[5:]).raw_output_contents
        return np.frombuffer(raw, np.float32).tolist()


class Client:
    """A connection of a client to a server in process.

    Args:
        site: The server.
        greeting: What is sent first.
    """

    def __init__(self, site: Site, greeting: bytes = GREETING) -> None:
        self.site, self.encoder, self.decoder = site, hpack.Encoder(), hpack.Decoder()
        self.connection, self.wire = site.inferences.connect(), Wire()
        self.connection.connection_made(self.wire)
        self.answers: dict[int, Answer] = {}
        self.others: list[tuple[int, int, int, bytes]] = []
        self._read_to = 0
        if greeting:
            self.send(greeting)

    def send(self, *parts: bytes) -> None:
        """Hand bytes over, unless the connection was closed."""
        if not self.wire.is_closed:
            self.connection.data_received(b"".join(parts))

    def block(self, path: str = INFER, **extra: str) -> bytes:
        """The header block of a call; `extra` are more headers, with underscores."""
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers",
                  "content-type": "application/grpc"}  # fmt: skip
        fields |= {name.replace("_", "-"): value for name, value in extra.items()}
        return self.encoder.encode(list(fields.items()), huffman=False)

    def call(self, id: int, message: bytes, path: str = INFER, **extra: str) -> bytes:
        """The frames of a whole call."""
        return frame(HEADERS, END_HEADERS, id, self.block(path, **extra)) + frame(DATA, END_STREAM, id, led(message))

    def read(self) -> None:
        """Take apart what has come."""
        data = self.wire.data
        while self._read_to < len(data):
            word, flags, id = frames.HEAD.unpack_from(data, self._read_to)
            start = self._read_to + frames.HEAD_BYTES
            self._read_to = start + (word >> 8)
            assert self._read_to <= len(data)
            kind, payload = word & 0xFF, data[start : self._read_to]
            if kind not in (DATA, HEADERS, RST_STREAM):
                self.others.append((kind, flags, id, payload))
                continue
            answer = self.answers.setdefault(id, Answer())
            if kind == RST_STREAM:
                answer.reset = int.from_bytes(payload, "big")
            elif kind == HEADERS:
                answer.blocks.append({str(name): str(value) for name, value in self.decoder.decode(payload)})
            else:
                answer.data += payload
            answer.is_whole = answer.is_whole or (kind != RST_STREAM and bool(flags & END_STREAM))

    async def settle(self) -> Client:
        """Until nothing waits; what has come is read."""
        await self.site.server.settle()
        for _ in range(4):
            await asyncio.sleep(0)
        self.read()
        return self

    def of(self, kind: int) -> list[bytes]:
        """The payloads of frames that are no answers."""
        return [payload for one, _, _, payload in self.others if one == kind]

    @property
    def end(self) -> Code | None:
        """Why the connection ended."""
        told = self.of(GOAWAY)
        return Code(int.from_bytes(told[-1][4:8], "big")) if told else None


class Site:
    """A server in process; arguments as of `InProcessServer`."""

    def __init__(self, **server: Any) -> None:
        self.runtime = Doubler()
        self.server = InProcessServer(self.runtime, **server)
        self.inferences = Inferences(self.server.catalog)


def slow_site(delay_s: float = 0.02, **server: Any) -> Site:
    """One row per call, each `delay_s`."""
    site = Site(cost=Cost(base_s=0.0, per_row_s=delay_s), max_batch=1, **server)
    site.runtime.before = lambda rows: time.sleep(delay_s)
    return site
