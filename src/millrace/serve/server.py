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
import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
import uvloop

from millrace.core import extras
from millrace.core.errors import InputError
from millrace.core.extras import version_of
from millrace.core.ports import Runtime
from millrace.core.spec import Cache, Capture
from millrace.core.types import Struct
from millrace.formats.signature import Signature
from millrace.serve.access import Guard
from millrace.serve.access_log import AccessLog, LoggedExchange
from millrace.serve.admission import QUEUE_S, Admission
from millrace.serve.batching import Batcher
from millrace.serve.cache import CachedPlane
from millrace.serve.calibrate import Cost, calibrate
from millrace.serve.capture import Recorder, folder_of
from millrace.serve.catalog import Catalog
from millrace.serve.dataplane import CheckedInfer, DataPlane, ModelInfo, sample_of
from millrace.serve.http import Connection
from millrace.serve.layouts import Layout, cores
from millrace.serve.listen import BACKLOG, bind
from millrace.serve.peers import Peers
from millrace.serve.pump import TelemetryPump
from millrace.serve.racing import BUDGET_S, Calibration
from millrace.serve.revisions import Directory, Revision
from millrace.serve.service import HttpLimits, Service
from millrace.serve.telemetry import Collector, TelemetryWriter
from millrace.serve.tls import read_tokens, server_context
from millrace.serve.tracing import TracedExchange
from millrace.serve.trials import SupportsLayouts
from millrace.serve.tuning import IDLE_S, Calibrations, Tuner, rows_of
from millrace.stats.histogram import layout_from_reference

_log = logging.getLogger(__name__)
DISTRIBUTION = "millrace-ai"
_HANDSHAKE_S = 10.0
_ACCEPT_PAUSE_S = 1.0
FIRST_CALLS_S = 0.1  # a batch takes no longer until the model has been measured


class ServerConfig(Struct, frozen=True, kw_only=True):
    """What the server is told. Plain data: it crosses a process border as JSON.

    `max_batch`, `queue`, `queue_s` and `slo_p99_ms` as in the spec's `serve`; `calibrations`: a folder where those
    of models are kept; `tune_s`: of measurements while nobody asked for `idle_s`, 0: none; `reference` is the
    bundle's profile, without it no telemetry is collected; `captures`: the folder below which requests are
    kept; `access_log` and `trace_share` as of `Serving.observe`; `tls_…` as of `tls.server_context`; `token_file`:
    every request must bring one of its tokens; `listen_fd`: a listening socket that was inherited, and is shared with
    the other processes of a group, whose counts are found in the folder `peers`; `parent_pid`: drain when that process
    is no longer the parent.
    """

    name: str
    version: str
    variant: str = "fp32"
    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int | None = None
    max_batch: int = 64
    queue: int = 1024
    queue_s: float = QUEUE_S
    runners: int = 1
    slo_p99_ms: float | None = None
    calibrations: str = ""
    tune_s: float = BUDGET_S
    idle_s: float = IDLE_S
    allowed_hosts: list[str] = []
    limits: HttpLimits = HttpLimits()
    hold_s: float = 0.05
    drain_s: float = 10.0
    telemetry_interval_s: float = 0.5
    reference: dict[str, Any] | None = None
    cache: Cache = Cache()
    capture: Capture = Capture()
    captures: str = ""
    access_log: str = ""
    trace_share: float = 0.0
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    token_file: str = ""
    listen_fd: int = -1
    peers: str = ""
    parent_pid: int | None = None

    @property
    def is_guarded(self) -> bool:
        """Whether everybody is asked who they are, and nothing travels in the open."""
        return bool(self.tls_cert) and bool(self.tls_client_ca or self.token_file)


class SupportsGrpc(Protocol):
    """`serve.grpc.listener.GrpcServer`, which is imported only where it is wanted."""

    port: int

    async def start(self) -> None:
        """Accept calls; once is enough."""
        ...

    async def stop(self, drain_s: float) -> bool:
        """No new calls; whether those in flight were answered in time."""
        ...


@runtime_checkable
class SupportsSamples(Protocol):
    """A runtime that has a real row to calibrate with."""

    def sample(self) -> Mapping[str, np.ndarray]:
        """Tensors of one row."""
        ...


@runtime_checkable
class SupportsExamples(Protocol):
    """A runtime that knows the rows that its model was tested with."""

    def examples(self) -> Mapping[str, np.ndarray]:
        """Their tensors."""
        ...


@runtime_checkable
class SupportsIsolation(Protocol):
    """A runtime whose code is a user's, in a process of its own."""

    @property
    def is_isolated(self) -> bool:
        """True: a call may hang, and is never made on the event loop."""
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
    listener = listener_of(config.host, config.port, config.is_guarded, config.listen_fd)

    async def serve() -> int:
        serving = open_serving(config, [config.name])
        plane = build_plane(config, runtime, signature, asyncio.get_running_loop())
        serving.directory.put(config.name, [Revision(plane)])
        serving.directory.is_told = True
        if telemetry_fd is not None:
            serving.pumps[plane] = TelemetryPump(plane, TelemetryWriter(telemetry_fd))
        return await serving.run(listener, config.listen_fd >= 0)

    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if not runtime.is_ready:
            runtime.load()
        gc.freeze()  # what start-up made stays: not to be looked through again and again
        return runner.run(serve())


def listener_of(host: str, port: int, is_guarded: bool, listen_fd: int) -> socket.socket:
    """The socket that was inherited, or a new one; as of `listen.bind`."""
    return bind(host, port, is_guarded=is_guarded) if listen_fd < 0 else socket.socket(fileno=listen_fd)


def open_serving(config: ServerConfig, names: Iterable[str]) -> Serving:
    """What serves models as a configuration says; inside the running loop.

    Args:
        config: See `ServerConfig`.
        names: Of the models.

    Raises:
        InputError: A certificate, the tokens or the access log cannot be used.
    """
    serving = Serving(
        config.limits, config.allowed_hosts, drain_s=config.drain_s, telemetry_interval_s=config.telemetry_interval_s,
        parent_pid=config.parent_pid, tls=server_context(config.tls_cert, config.tls_key, config.tls_client_ca),
    )  # fmt: skip
    if config.token_file:
        guard = Guard(serving.catalog.shared)
        guard.serve(dict.fromkeys(names, "default"))
        guard.believe(read_tokens(config.token_file), for_s=float("inf"))
        serving.service.ask_guard(guard)
    serving.observe(config.access_log, config.trace_share)
    if config.peers:
        serving.join(Path(config.peers))
    if config.grpc_port is not None:
        is_shared = config.listen_fd >= 0
        if is_shared and not config.grpc_port:
            raise InputError("several processes want one port for gRPC, got 0", hint="name it: --grpc-port 8081")
        certificate = (config.tls_cert, config.tls_key, config.tls_client_ca)
        serving.speak_grpc(config.host, config.grpc_port, certificate, config.is_guarded, is_shared)
    return serving


def build_plane(
    config: ServerConfig, runtime: Runtime, signature: Signature, loop: asyncio.AbstractEventLoop
) -> DataPlane:
    """The data plane of a loaded runtime: calibrated before, or quickly now; from any thread.

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
    sample = sample_of(signature, golden)
    tuned = runtime if isinstance(runtime, SupportsLayouts) and not runtime.is_fixed else None
    kept = Calibrations(Path(config.calibrations) if config.calibrations else None)
    stored = None if tuned is None else kept.get(tuned, max_batch)
    known = None if stored is None else stored.cost_of(Layout())
    cost = calibrate(infer, sample, max_batch) if known is None else known
    if isinstance(runtime, SupportsIsolation) and runtime.is_isolated:
        cost = msgspec.structs.replace(cost, may_hang=True)
    if tuned is not None and cost.best_rows is None:  # slow: nobody knows yet whether larger calls pay
        cost = msgspec.structs.replace(cost, best_rows=cost.rows_within(FIRST_CALLS_S))
    slo_s = None if config.slo_p99_ms is None else config.slo_p99_ms / 1e3
    rows = rows_of(cost, max_batch, slo_s)
    callers = 1 if cost.is_inline else config.runners if tuned is None else max(config.runners, cores())
    admission = Admission(
        config.queue, hold_s=config.hold_s, queue_s=config.queue_s, client_share=config.limits.client_share
    )
    admission.seconds_per_row = cost.predict_s(rows) / rows / callers
    batcher = Batcher(infer, cost, rows, loop.call_soon, loop.call_soon_threadsafe, callers)
    collector = Collector(layout_from_reference(config.reference)) if config.reference else None
    info = ModelInfo(name=config.name, version=config.version, variant=config.variant)
    parts = (info, runtime, signature, admission, batcher, collector)
    plane = CachedPlane(config.cache, *parts) if config.cache.entries else DataPlane(*parts)
    if config.capture.share > 0 and config.captures:
        folder = folder_of(Path(config.captures), config.name)
        plane.recorder = Recorder(config.capture, folder, signature, config.version)
    plane.sample = golden
    plane.examples = runtime.examples() if isinstance(runtime, SupportsExamples) else golden or {}
    plane.reference = config.reference or {}
    plane.calibration = _as_started(runtime, cost, callers)
    if tuned is not None:
        tuner = plane.tuner = Tuner(
            plane, tuned, sample, max_batch, kept, loop, slo_s=slo_s, idle_s=config.idle_s, budget_s=config.tune_s
        )
        if stored is not None:
            tuner.adopt_stored(stored)
        elif callers > 1:
            tuner.adopt_sound(cost)
    return plane


def _as_started(runtime: Runtime, cost: Cost, callers: int) -> Calibration:
    threads = runtime.threads if isinstance(runtime, SupportsLayouts) else 1
    is_fixed = isinstance(runtime, SupportsLayouts) and runtime.is_fixed
    return Calibration(
        shallow=Layout(threads=threads), deep=Layout(threads=threads, callers=callers), shallow_cost=cost,
        deep_cost=cost, source="fixed" if is_fixed else "start",
    )  # fmt: skip


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
        self.service.early = self.catalog.refuse_early
        self._tls: dict[str, Any] = {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": _HANDSHAKE_S}
        self.stop = asyncio.Event()
        self.welcome = asyncio.Event()  # a socket that others share is left to them before
        self.welcome.set()
        self.pumps: dict[DataPlane, TelemetryPump] = {}
        self._drain_s, self._telemetry_interval_s, self._parent_pid = drain_s, telemetry_interval_s, parent_pid
        self.grpc: SupportsGrpc | None = None
        self._coming: set[asyncio.Task[Any]] = set()  # connections that are being taken
        self._opening: asyncio.Task[None] | None = None

    def join(self, folder: Path) -> None:
        """Add up what is counted with the other processes of a group; before `run`.

        Args:
            folder: Where they find each other.
        """
        self.catalog.peers = Peers(folder, self.catalog.snapshot)

    def observe(self, access_log: str, trace_share: float) -> None:
        """Write a line for each request, and begin traces; before `run`.

        Args:
            access_log: A file, `-` for the standard error, or empty: none.
            trace_share: Of the requests that bring no trace, those for which one begins.

        Raises:
            InputError: The log cannot be opened.
        """
        service = self.service
        service.trace_share = trace_share
        if access_log:
            service.access_log, service.exchange_type = AccessLog(access_log), LoggedExchange
        elif trace_share > 0:
            service.exchange_type = TracedExchange

    def speak_grpc(
        self, host: str, port: int, certificate: tuple[str, str, str], is_guarded: bool, is_shared: bool = False
    ) -> None:
        """Answer gRPC besides, at a port of its own; before `run`.

        Args:
            host: An address that `listen.bind` allows.
            port: 0 takes a free one.
            certificate: Files of the certificate, its key and the clients' authority; empty: none.
            is_guarded: Whether every request is asked who sends it, and none travels in the open.
            is_shared: Other processes listen at the same port.

        Raises:
            ExtraMissingError: What it needs is not installed.
            InputError: The host is not loopback, or the certificate cannot be used.
            UnavailableError: The port is busy.
        """
        extras.require([("hpack", "grpc"), ("google.protobuf", "grpc")], "serving gRPC")
        server = extras.load("millrace.serve.grpc.listener:GrpcServer")
        self.grpc = server(
            self.catalog, host, port, certificate=certificate, is_guarded=is_guarded, is_shared=is_shared
        )

    async def run(self, listener: socket.socket, is_shared: bool = False) -> int:
        """Serve until told to stop.

        Args:
            listener: Bound and listening.
            is_shared: Other processes take connections from it too.
        """
        loop = asyncio.get_running_loop()
        # of the one product of `CheckedInfer`: what follows tells what it means
        warnings.filterwarnings("ignore", "overflow encountered in dot", RuntimeWarning)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop.set)
        spare = listener.dup()  # keeps the backlog alive while the server stops accepting
        server = await self._begin(listener, spare, is_shared)
        ticker = asyncio.create_task(self._tick())
        await self.stop.wait()
        self.service.is_draining = True
        for plane in self.planes:
            plane.admission.is_draining = True
        ending = None if self.grpc is None else asyncio.create_task(self.grpc.stop(self._drain_s))
        await self._accept_rest(server, spare)
        is_clean = await self._finish_in_flight()
        is_clean = is_clean and (ending is None or await ending)
        ticker.cancel()
        for plane in self.planes:
            plane.close(wait_s=5.0 if is_clean else 0.0)
        self.service.abort()
        if self.service.access_log is not None:
            self.service.access_log.close()
        for pump in self.pumps.values():
            pump.finish()
        if self.catalog.peers is not None:
            self.catalog.peers.stop()
        for plane in self.planes:
            plane.runtime.unload()
        return 0 if is_clean else 1

    async def _begin(
        self, listener: socket.socket, spare: socket.socket, is_shared: bool
    ) -> asyncio.AbstractServer | None:
        """Take connections, and say so; None where `spare` is watched for them."""
        loop, server = asyncio.get_running_loop(), None
        if is_shared:
            self._opening = asyncio.create_task(self._open(spare))
        else:
            make = partial(Connection, self.service)
            server = await loop.create_server(make, sock=listener, backlog=BACKLOG, **self._tls)
        if self.catalog.peers is not None:
            await self.catalog.peers.start()
        ready: dict[str, Any] = {"ready": True, "port": spare.getsockname()[1]}
        if self.grpc is not None:
            if self.welcome.is_set():
                await self.grpc.start()
            ready["grpc_port"] = self.grpc.port
        print(json.dumps(ready), flush=True)
        return server

    async def _open(self, listener: socket.socket) -> None:
        await self.welcome.wait()
        self._accept_again(listener)
        if self.grpc is not None:
            await self.grpc.start()

    @property
    def planes(self) -> list[DataPlane]:
        """Everything that is loaded."""
        return [plane for endpoint in self.directory for plane in endpoint.planes]

    def _accept(self, listener: socket.socket) -> bool:
        """Take one connection, so that the other processes get theirs; whether there was one."""
        try:
            client, _ = listener.accept()
        except BlockingIOError:  # another process was quicker
            return False
        except OSError as error:  # no descriptors or no memory left: not to be asked again at once
            loop = asyncio.get_running_loop()
            loop.remove_reader(listener)
            loop.call_later(_ACCEPT_PAUSE_S, self._accept_again, listener)
            _log.error("no connection is taken for %g s: %s", _ACCEPT_PAUSE_S, error)
            return False
        client.setblocking(False)
        connect = asyncio.get_running_loop().connect_accepted_socket(
            partial(Connection, self.service), client, **self._tls
        )  # fmt: skip
        task = asyncio.ensure_future(connect)
        self._coming.add(task)
        task.add_done_callback(self._taken)
        return True

    def _accept_again(self, listener: socket.socket) -> None:
        if not self.stop.is_set():
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _taken(self, task: asyncio.Task[Any]) -> None:
        self._coming.discard(task)
        if not task.cancelled():
            task.exception()  # whose handshake fails was nobody

    async def _accept_rest(self, server: asyncio.AbstractServer | None, spare: socket.socket) -> None:
        """Take who is in the backlog: closing it would reset clients that have sent already."""
        if server is None:
            asyncio.get_running_loop().remove_reader(spare)
        else:
            server.close()
        with spare:
            while self.welcome.is_set() and self._accept(spare):
                pass
        await asyncio.gather(*self._coming, return_exceptions=True)

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

    def _tune(self) -> None:
        """While nobody asks for anything, one model at a time is measured."""
        planes, now_s = self.planes, time.monotonic()
        is_quiet = self.service.in_flight == 0
        is_measured = any(plane.tuner.is_running for plane in planes if plane.tuner is not None)
        for plane in planes:
            if plane.tuner is not None:
                plane.tuner.tick(now_s, is_quiet and (not is_measured or plane.tuner.is_running))
                is_measured = is_measured or plane.tuner.is_running

    async def _tick(self) -> None:
        """Time-outs, telemetry, and whether the parent still lives."""
        interval_s = min(self.service.sweep_interval_s(), self._telemetry_interval_s)
        next_telemetry_s = 0.0
        while True:
            await asyncio.sleep(interval_s)
            self.service.sweep()
            self._tune()
            if self._parent_pid is not None and os.getppid() != self._parent_pid:
                self.stop.set()
            if self.service.now_s >= next_telemetry_s:
                next_telemetry_s = self.service.now_s + self._telemetry_interval_s * 0.9
                if not all([pump.send() for pump in self.pumps.values()]):
                    self.stop.set()
                if self.catalog.peers is not None:
                    self.catalog.peers.keep()
