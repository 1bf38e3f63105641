"""The server's process: load and self-test, listen, say ready, serve, drain."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import uvloop

from millrace.core.extras import version_of
from millrace.core.ports import Runtime
from millrace.core.types import Struct
from millrace.formats.signature import Signature
from millrace.serve.admission import Admission
from millrace.serve.batching import Batcher, calibrate
from millrace.serve.catalog import Catalog
from millrace.serve.dataplane import CheckedInfer, DataPlane, ModelInfo, sample_of
from millrace.serve.http import Connection
from millrace.serve.listen import BACKLOG, bind
from millrace.serve.revisions import Directory, Revision
from millrace.serve.service import HttpLimits, Service
from millrace.serve.telemetry import Collector, TelemetryFrame, TelemetryWriter, difference
from millrace.stats.histogram import layout_from_reference

_log = logging.getLogger(__name__)
DISTRIBUTION = "millrace-ai"
_HANDSHAKE_S = 10.0


class ServerConfig(Struct, frozen=True, kw_only=True):
    """What the server is told. Plain data: it crosses a process border as JSON.

    `max_batch` and `queue` as in the spec's `serve`; `reference` is the bundle's profile, without it no
    telemetry is collected; `parent_pid`: drain when that process is no longer the parent.
    """

    name: str
    version: str
    variant: str = "fp32"
    host: str = "127.0.0.1"
    port: int = 8080
    max_batch: int = 64
    queue: int = 1024
    runners: int = 1
    allowed_hosts: list[str] = []
    limits: HttpLimits = HttpLimits()
    hold_s: float = 0.05
    drain_s: float = 10.0
    telemetry_interval_s: float = 0.5
    reference: dict[str, Any] | None = None
    parent_pid: int | None = None


@runtime_checkable
class SupportsSamples(Protocol):
    """A runtime that has a real row to calibrate with."""

    def sample(self) -> Mapping[str, np.ndarray]:
        """Tensors of one row."""
        ...


@runtime_checkable
class SupportsMixing(Protocol):
    """A runtime that knows whether rows of one call influence one another."""

    @property
    def mixes_rows(self) -> bool:
        """True: requests of different people must not share a call."""
        ...


def run_server(config: ServerConfig, runtime: Runtime, signature: Signature, telemetry_fd: int | None = None) -> int:
    """Serve until SIGTERM or SIGINT; blocks.

    One line goes to stdout when requests are welcome: `{"ready": true, "port": n}`.

    Args:
        config: See `ServerConfig`.
        runtime: Loaded here unless it is ready already: its own self-test decides.
        signature: What the model reads and answers.
        telemetry_fd: Write end of a pipe for `TelemetryFrame`s.

    Returns:
        0 after a graceful drain, 1 when requests were cut off.

    Raises:
        InputError: The host is not loopback.
        UnavailableError: The port is busy.
        CorruptError: The model failed its self-test.
    """
    listener = bind(config.host, config.port)

    async def serve() -> int:
        serving = Serving(
            config.limits, config.allowed_hosts, drain_s=config.drain_s,
            telemetry_interval_s=config.telemetry_interval_s, parent_pid=config.parent_pid,
        )  # fmt: skip
        plane = build_plane(config, runtime, signature, asyncio.get_running_loop())
        serving.directory.put(config.name, [Revision(plane)])
        serving.directory.is_told = True
        if telemetry_fd is not None:
            serving.pumps[plane] = TelemetryPump(plane, TelemetryWriter(telemetry_fd))
        return await serving.run(listener)

    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if not runtime.is_ready:
            runtime.load()
        gc.freeze()  # what start-up made stays: not to be looked through again and again
        return runner.run(serve())


def build_plane(
    config: ServerConfig, runtime: Runtime, signature: Signature, loop: asyncio.AbstractEventLoop
) -> DataPlane:
    """The data plane of a loaded runtime, calibrated; from any thread.

    Args:
        config: Name, version, batch and queue of the model.
        runtime: Loaded.
        signature: What it reads and answers.
        loop: Where requests are answered.
    """
    infer = CheckedInfer(runtime, signature)
    mixes = isinstance(runtime, SupportsMixing) and runtime.mixes_rows
    max_batch = 1 if mixes else config.max_batch
    golden = runtime.sample() if isinstance(runtime, SupportsSamples) else None
    cost = calibrate(infer, sample_of(signature, golden), max_batch)
    admission = Admission(config.queue, hold_s=config.hold_s)
    admission.seconds_per_request = cost.predict_s(max_batch) / max_batch
    batcher = Batcher(infer, cost, max_batch, loop.call_soon, loop.call_soon_threadsafe, config.runners)
    collector = None if config.reference is None else Collector(layout_from_reference(config.reference))
    info = ModelInfo(name=config.name, version=config.version, variant=config.variant)
    return DataPlane(info, runtime, signature, admission, batcher, collector)


class Serving:
    """Accepts, ticks and drains over whatever its directory holds; made inside the running loop.

    Args:
        limits: Of a connection.
        allowed_hosts: Besides the loopback ones.
        drain_s: How long requests in flight may take once told to stop.
        telemetry_interval_s: How often pumps send.
        parent_pid: Stop when that process is no longer the parent.
        tls: With the server's certificate; None speaks plain HTTP.
    """

    def __init__(
        self, limits: HttpLimits, allowed_hosts: Iterable[str], *, drain_s: float, telemetry_interval_s: float,
        parent_pid: int | None, tls: ssl.SSLContext | None = None,
    ) -> None:  # fmt: skip
        self.directory = Directory()
        self.catalog = Catalog(self.directory, version_of(DISTRIBUTION), limits.max_body_bytes)
        self.service = self.catalog.service = Service(self.catalog.handle, limits, frozenset(allowed_hosts))
        self.service.refused = self.catalog.count_refused
        self._tls: dict[str, Any] = {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": _HANDSHAKE_S}
        self.stop = asyncio.Event()
        self.pumps: dict[DataPlane, TelemetryPump] = {}
        self._drain_s, self._telemetry_interval_s, self._parent_pid = drain_s, telemetry_interval_s, parent_pid

    async def run(self, listener: socket.socket) -> int:
        """Serve until told to stop."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        spare = listener.dup()  # keeps the backlog alive while the server stops accepting
        server = await loop.create_server(lambda: Connection(self.service), sock=listener, backlog=BACKLOG, **self._tls)
        print(json.dumps({"ready": True, "port": spare.getsockname()[1]}), flush=True)
        ticker = asyncio.create_task(self._tick())
        await self.stop.wait()
        self.service.is_draining = True
        for plane in self.planes:
            plane.admission.is_draining = True
        await self._accept_rest(server, spare)
        is_clean = await self._finish_in_flight()
        ticker.cancel()
        for plane in self.planes:
            plane.batcher.close(wait_s=5.0 if is_clean else 0.0)
        self.service.abort()
        for pump in self.pumps.values():
            pump.finish()
        for plane in self.planes:
            plane.runtime.unload()
        return 0 if is_clean else 1

    @property
    def planes(self) -> list[DataPlane]:
        """Everything that is loaded."""
        return [plane for endpoint in self.directory for plane in endpoint.planes]

    async def _accept_rest(self, server: asyncio.AbstractServer, spare: socket.socket) -> None:
        """Take who is in the backlog: closing it would reset clients that have sent already."""
        loop = asyncio.get_running_loop()
        server.close()
        coming = []
        with spare:
            while True:
                try:
                    client, _ = spare.accept()
                except OSError:
                    break
                client.setblocking(False)
                coming.append(loop.connect_accepted_socket(lambda: Connection(self.service), client, **self._tls))
        await asyncio.gather(*coming, return_exceptions=True)  # whose handshake fails was nobody

    async def _finish_in_flight(self) -> bool:
        """Wait for the answers; False when the time is up first."""
        deadline = time.monotonic() + self._drain_s
        while self.service.connections and time.monotonic() < deadline:
            self.service.sweep()
            await asyncio.sleep(0.01)
        lost = self.service.in_flight
        if lost:
            _log.error("%d requests were not answered within %g s of draining", lost, self._drain_s)
        return not lost

    async def _tick(self) -> None:
        """Time-outs, telemetry, and whether the parent still lives."""
        interval_s = min(self.service.sweep_interval_s(), self._telemetry_interval_s)
        next_telemetry_s = 0.0
        while True:
            await asyncio.sleep(interval_s)
            self.service.sweep()
            if self._parent_pid is not None and os.getppid() != self._parent_pid:
                self.stop.set()
            if self.service.now_s >= next_telemetry_s:
                next_telemetry_s = self.service.now_s + self._telemetry_interval_s * 0.9
                if not all([pump.send() for pump in self.pumps.values()]):
                    self.stop.set()


class TelemetryPump:
    """Sends what is new to the parent.

    Args:
        plane: Whose counters and histograms.
        writer: Where to; several pumps may share it.
    """

    def __init__(self, plane: DataPlane, writer: TelemetryWriter) -> None:
        self._plane = plane
        self._writer = writer
        self._sent: dict[str, float] = {}

    def send(self) -> bool:
        """Send a frame if something is new; False when nobody reads any more."""
        try:
            self._writer.advance()
            if self._writer.has_room:
                self._send_new()
        except BrokenPipeError:
            return False
        return not self._writer.is_orphaned

    def _send_new(self) -> None:
        counters = self._plane.metrics.counters()
        if counters == self._sent:
            return
        taken = self._plane.collector.take() if self._plane.collector is not None else None
        rows = taken.rows if taken is not None else 0
        frame = TelemetryFrame(
            endpoint=self._plane.info.name,
            version=self._plane.info.version,
            rows=rows,
            histograms=taken.to_dict() if taken is not None and rows else None,
            counters=difference(counters, self._sent),
        )
        self._sent = counters
        self._writer.send(frame)

    def finish(self) -> None:
        """Send the last frame and wait until it is out."""
        if self._writer.flush() and self.send():
            self._writer.flush()
