"""The parent of a served model: restarts it, turns its telemetry into windows, signals and alerts."""

from __future__ import annotations

import queue
from collections.abc import Iterator

import msgspec

from millrace.control.interrupts import calling_on_signals
from millrace.control.models import open_version
from millrace.control.seen import process_facts
from millrace.control.services import Services
from millrace.control.watching import Watch
from millrace.core.errors import StageError
from millrace.core.operations.live import ServeEvent, ServeRequest
from millrace.core.spec import Monitor, Serve
from millrace.core.types import Endpoint, ModelVersion
from millrace.formats.bundle import open_bundle
from millrace.serve.child import ChildConfig
from millrace.serve.process import ServerProcess
from millrace.serve.server import ServerConfig
from millrace.serve.telemetry import TelemetryFrame

POLL_S = 0.25
MAX_CRASHES = 5
CRASH_WINDOW_S = 60.0
BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 4.0)


class Supervisor:
    """One endpoint in this process: a child that serves, and what its telemetry means."""

    def __init__(
        self, services: Services, version: ModelVersion, body: ServeRequest, serve: Serve, monitor: Monitor
    ) -> None:
        self._services, self._version = services, version
        self._variant = body.variant or (version.chosen_variant if serve.variant == "chosen" else serve.variant)
        self._folder = open_version(services, version)
        bundle = open_bundle(self._folder, signature=None, verifier=None, expected_digest=version.bundle.digest)
        bundle.model_path(self._variant)
        self._config = ChildConfig(
            bundle_dir=str(self._folder),
            digest=version.bundle.digest,
            threads=body.threads or serve.threads,
            server=ServerConfig(
                name=version.name, version=str(version.number), variant=self._variant, host=body.host,
                port=serve.port if body.port is None else body.port, max_batch=serve.max_batch, queue=serve.queue,
                reference=bundle.reference or None,
            ),
        )  # fmt: skip
        self._frames: queue.Queue[TelemetryFrame] = queue.Queue()
        self._watch = Watch(services, version.name, version, bundle.reference, monitor)
        self._crashes: list[float] = []
        self._child: ServerProcess | None = None
        self._is_stopping = False

    def run(self) -> Iterator[ServeEvent | None]:
        """Events until Ctrl-C; the child drains before this returns."""
        try:
            with calling_on_signals(self._on_signal):
                yield from self._serve()
                yield ServeEvent(kind="stopping", text="draining: no new requests, those in flight are answered")
        finally:
            self._stop()
        yield from self._drain_frames()
        yield ServeEvent(kind="stopped", text="every request was answered")

    def _serve(self) -> Iterator[ServeEvent | None]:
        try:
            yield self._start()
            while not self._is_stopping:
                yield from self._turn()
                if self._services.drives_apart:
                    yield None  # a server notices at the next item that its client has gone
        except StageError:
            if not self._is_stopping:  # Ctrl-C on a terminal reaches the child as well, also while it starts
                raise

    def _on_signal(self, number: int, frame: object) -> None:
        """Once: drain and stop. Twice: leave at once."""
        if self._is_stopping:
            raise KeyboardInterrupt
        self._is_stopping = True

    def _start(self) -> ServeEvent:
        child = ServerProcess(self._config, self._frames.put)
        self._child = child
        port = child.wait_ready()
        # A restart comes back at the same address.
        server = msgspec.structs.replace(self._config.server, port=port)
        self._config = msgspec.structs.replace(self._config, server=server)
        url = f"http://{server.host}:{port}"
        self._write_endpoint("ready", url, child.pid)
        name = f"{self._version.name} v{self._version.number} ({self._variant})"
        return ServeEvent(
            kind="ready", text=f"{name} on {url}", url=url, facts={"model": self._version.name, "pid": child.pid}
        )

    def _write_endpoint(self, state: str, url: str | None, pid: int | None) -> None:
        name = self._version.name
        with self._services.records.transaction() as transaction:
            old = transaction.get(Endpoint, name)
            created_at = old.created_at if old else self._services.clock.now()
            facts = {**(old.facts if old else {}), **(process_facts(pid) if pid else {})}
            endpoint = Endpoint(
                id=name, created_at=created_at, version=old.version if old else 0, name=name, model=name,
                number=self._version.number, variant=self._variant, state=state, url=url, pid=pid,
                alias=old.alias if old else None, facts=facts, text="",
            )  # fmt: skip
            transaction.put(endpoint)

    def _turn(self) -> Iterator[ServeEvent]:
        """One poll: a frame, an old window, a dead child."""
        try:
            frame = self._frames.get(timeout=POLL_S)
        except queue.Empty:
            yield from self._watch.tick()
        else:
            yield from self._watch.take(frame)
        child = self._child
        if child is not None and child.exit_code is not None and not self._is_stopping:
            yield self._restart(child.exit_code)

    def _drain_frames(self) -> Iterator[ServeEvent]:
        while not self._frames.empty():
            yield from self._watch.take(self._frames.get())

    def _restart(self, code: int) -> ServeEvent:
        """Start the child again, later each time.

        Raises:
            StageError: It has died too often: something is wrong that a restart does not mend.
            UntrustedError: The key that signed it counts no more.
        """
        now = self._services.clock.monotonic()
        self._crashes = [at for at in self._crashes if now - at < CRASH_WINDOW_S] + [now]
        if len(self._crashes) > MAX_CRASHES:
            raise StageError(f"the server died {len(self._crashes)} times within a minute, last with code {code}")
        if self._child is not None:
            self._child.wait()
        self._services.clock.sleep(BACKOFF_S[len(self._crashes) - 1])
        open_version(self._services, self._version)  # its key may have been revoked since
        started = self._start()
        return ServeEvent(kind="restart", text=f"the server died with code {code}; {started.text}", url=started.url)

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.stop()
        self._write_endpoint("stopped", None, None)


def supervise(
    services: Services, version: ModelVersion, body: ServeRequest, serve: Serve, monitor: Monitor
) -> Iterator[ServeEvent | None]:
    """Serve a version until Ctrl-C.

    Raises:
        UnavailableError: The port is busy; says who holds it.
        CorruptError: The bundle is not what was signed.
        UntrustedError: No trusted key signed it.
    """
    return Supervisor(services, version, body, serve, monitor).run()
