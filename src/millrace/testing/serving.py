"""Everything of a model server but its sockets: bytes are handed over and answers read in process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.admission import Admission
from millrace.serve.batching import Batcher, Cost
from millrace.serve.catalog import Catalog
from millrace.serve.dataplane import CheckedInfer, DataPlane, ModelInfo
from millrace.serve.http import Connection
from millrace.serve.revisions import Directory, Revision
from millrace.serve.service import HttpLimits, Service

MODEL = "m"
INFER, PREDICT = b"/v2/models/m/infer", b"/v1/models/m:predict"
INLINE = Cost(base_s=1e-6, per_row_s=1e-9)
SIGNATURE = Signature(
    task="regression",
    inputs=[TensorSpec(name="x", dtype="float32", shape=[-1, 2], columns=["a", "b"])],
    outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1])],
    label="y",
)


class Recorder(asyncio.Transport):
    """Keeps what is written.

    Args:
        peer: The client's address.
    """

    def __init__(self, peer: str = "127.0.0.1") -> None:
        super().__init__()
        self.peer = peer
        self.data = b""
        self.is_closed = False
        self.is_paused = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """The address."""
        return (self.peer, 40000) if name in ("peername", "sockname") else default

    def write(self, data: Any) -> None:
        """Kept."""
        self.data += data

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self.is_closed

    def can_write_eof(self) -> bool:
        """No half-open state."""
        return False

    def close(self) -> None:
        """Noted."""
        self.is_closed = True

    def abort(self) -> None:
        """Noted."""
        self.is_closed = True

    def pause_reading(self) -> None:
        """Noted: bytes are handed over all the same, as those that a loop has read already."""
        self.is_paused = True

    def resume_reading(self) -> None:
        """The inverse."""
        self.is_paused = False


class Doubler:
    """A runtime: twice the sum of each row. `failure` is raised instead, `before` is called first."""

    def __init__(self) -> None:
        self.is_ready = True
        self.failure: Exception | None = None
        self.before: Callable[[int], None] = lambda rows: None
        self.rows = 0

    def load(self) -> None:
        """Ready."""

    def infer(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        self.before(len(tensors["x"]))
        if self.failure is not None:
            raise self.failure
        self.rows += len(tensors["x"])
        with np.errstate(over="ignore"):
            return {"value": 2 * tensors["x"].sum(axis=1, keepdims=True)}

    def unload(self) -> None:
        """Nothing to free."""


class InProcessServer:
    """The real protocol, data plane and batcher; to be made inside a running loop.

    Args:
        runtime: What answers.
        signature: Its tensors.
        admission: The queue.
        limits: Of connections and clients.
        cost: The calibration: inline unless it says that a row is slow.
        max_batch: Rows in one call.
        name: Of the model.
    """

    def __init__(
        self, runtime: Any, signature: Signature = SIGNATURE, *, admission: Admission | None = None,
        limits: HttpLimits | None = None, cost: Cost = INLINE, max_batch: int = 16, name: str = MODEL,
    ) -> None:  # fmt: skip
        loop = asyncio.get_running_loop()
        batcher = Batcher(
            CheckedInfer(runtime, signature), cost, max_batch, loop.call_soon, loop.call_soon_threadsafe
        )  # fmt: skip
        queue = admission or Admission()
        queue.seconds_per_row = queue.seconds_per_row or cost.predict_s(max_batch) / max_batch
        self.plane = DataPlane(ModelInfo(name=name, version="1"), runtime, signature, queue, batcher)
        self.directory = Directory()
        limits = limits or HttpLimits()
        self.catalog = Catalog(self.directory, "1", limits.max_body_bytes)
        self.service = self.catalog.service = Service(self.catalog.handle, limits)
        self.service.refused = self.catalog.count_refused
        self.service.early = self.catalog.refuse_early
        self.directory.put(name, [Revision(self.plane)])
        self.directory.is_told = True

    def connect(self, peer: str = "127.0.0.1") -> tuple[Connection, Recorder]:
        """A client."""
        connection, transport = Connection(self.service), Recorder(peer)
        connection.connection_made(transport)
        return connection, transport

    async def settle(self) -> None:
        """Until nothing waits, runs or is held back."""
        while self.plane.admission.waiting or len(self.plane.batcher) or len(self.service.pacer):
            await asyncio.sleep(0)

    async def ask(self, data: bytes, peer: str = "127.0.0.1") -> list[tuple[int, dict[bytes, bytes], bytes]]:
        """The answers to bytes on a connection of their own."""
        connection, transport = self.connect(peer)
        connection.data_received(data)
        await self.settle()
        connection.connection_lost(None)
        return responses(transport.data)


def request(target: bytes, body: bytes, headers: bytes = b"") -> bytes:
    """A POST; `headers` are whole lines."""
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n%s\r\n"
    return head % (target, len(body), headers) + body


def responses(data: bytes) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    """Status, headers and body of each response.

    Raises:
        ValueError: The bytes are no whole responses.

    Example:
        >>> responses(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nhi")
        [(200, {b'Content-Length': b'2'}, b'hi')]
    """
    found: list[tuple[int, dict[bytes, bytes], bytes]] = []
    while data:
        head, end, rest = data.partition(b"\r\n\r\n")
        line, *lines = head.split(b"\r\n")
        if not end or not line.startswith(b"HTTP/1.1 "):
            raise ValueError(f"no response: {data[:80]!r}")
        if line == b"HTTP/1.1 100 Continue":
            data = rest
            continue
        headers = dict(one.split(b": ", 1) for one in lines)
        size = int(headers[b"Content-Length"])
        if len(rest) < size:
            raise ValueError(f"a response is cut off: {data[:80]!r}")
        found.append((int(line.split()[1]), headers, rest[:size]))
        data = rest[size:]
    return found
