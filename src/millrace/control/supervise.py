"""The parent of a served model: restarts it, turns its telemetry into windows, signals and alerts."""

from __future__ import annotations

import queue
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from millrace.control.endpoints import calibrations_of, captures_of
from millrace.control.interrupts import calling_on_signals
from millrace.control.models import open_version
from millrace.control.seen import process_facts
from millrace.control.served import Wanted, wanted_models
from millrace.control.services import Services
from millrace.control.watching import Watch
from millrace.core.addresses import is_loopback
from millrace.core.errors import InputError, StageError, from_dict
from millrace.core.operations.live import ServeEvent, ServeRequest
from millrace.core.spec import Cache, Capture, Monitor, Serve
from millrace.core.types import Endpoint
from millrace.core.units import parse_size
from millrace.serve.child import ChildConfig
from millrace.serve.layouts import Layout
from millrace.serve.process import CHILD_COMMAND, ServerProcess
from millrace.serve.server import ServerConfig
from millrace.serve.service import HttpLimits
from millrace.serve.telemetry import TelemetryFrame

SectionType = TypeVar("SectionType", Cache, Capture)
POLL_S = 0.25
READY_S = 60.0
LOAD_S = 600.0  # a user's code may load for minutes
MAX_CRASHES = 5
CRASH_WINDOW_S = 60.0
BACKOFF_S = (0.1, 0.5, 1.0, 2.0, 4.0)


class Supervisor:
    """What one command serves: a child, and what its telemetry means."""

    def __init__(
        self, services: Services, wanted: list[Wanted], body: ServeRequest, serve: Serve, monitor: Monitor
    ) -> None:
        self._services, self._wanted = services, wanted
        self._config = config_of(services.home, wanted, body, serve)
        self._frames: queue.Queue[TelemetryFrame] = queue.Queue()
        self._watches = {
            (one.model.name, one.model.version): Watch(services, one.model.name, one.version, one.reference, monitor)
            for one in wanted if one.version is not None
        }  # fmt: skip
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
        if self._child is not None and not self._child.port:
            self._child.kill()  # it loads still, maybe for long: nobody is served yet

    def _start(self) -> ServeEvent:
        child = ServerProcess(self._config, self._frames.put)
        self._child = child
        port = child.wait_ready(LOAD_S if self._config.models else READY_S)
        # A restart comes back at the same address.
        server = msgspec.structs.replace(self._config.server, port=port)
        if server.grpc_port is not None:
            server = msgspec.structs.replace(server, grpc_port=child.grpc_port)
        self._config = msgspec.structs.replace(self._config, server=server)
        url = f"{'https' if server.tls_cert else 'http'}://{server.host}:{port}"
        self._write_endpoints("ready", url, child.pid)
        first = self._wanted[0].model
        names = [f"{one.model.name} v{one.model.version} ({one.model.variant})" for one in self._wanted]
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        facts: dict[str, Any] = {"model": first.name, "pid": child.pid}
        where = url
        if server.grpc_port is not None:
            facts["grpc_port"] = server.grpc_port
            where = f"{url}, gRPC at {server.host}:{server.grpc_port}"
        return ServeEvent(kind="ready", text=f"{shown} on {where}", url=url, facts=facts)

    def _write_endpoints(self, state: str, url: str | None, pid: int | None) -> None:
        """What is served first under each name; its other versions are reached by their numbers."""
        for one in self._wanted:
            if one.model.weight > 0:
                self._write_endpoint(one, state, url, pid)

    def _write_endpoint(self, one: Wanted, state: str, url: str | None, pid: int | None) -> None:
        name = one.model.name
        with self._services.records.transaction() as transaction:
            old = transaction.get(Endpoint, name)
            created_at = old.created_at if old else self._services.clock.now()
            facts = {**(old.facts if old else {}), **(process_facts(pid) if pid else {})}
            endpoint = Endpoint(
                id=name, created_at=created_at, version=old.version if old else 0, name=name, model=name,
                number=int(one.model.version), variant=one.model.variant, state=state, url=url, pid=pid,
                alias=old.alias if old else None, facts=facts, text="",
            )  # fmt: skip
            transaction.put(endpoint)

    def _turn(self) -> Iterator[ServeEvent]:
        """One poll: a frame, an old window, a dead child."""
        try:
            frame = self._frames.get(timeout=POLL_S)
        except queue.Empty:
            for watch in self._watches.values():
                yield from watch.tick()
        else:
            yield from self._take(frame)
        child = self._child
        if child is not None and child.exit_code is not None and not self._is_stopping:
            yield self._restart(child.exit_code)

    def _drain_frames(self) -> Iterator[ServeEvent]:
        while not self._frames.empty():
            yield from self._take(self._frames.get())

    def _take(self, frame: TelemetryFrame) -> list[ServeEvent]:
        watch = self._watches.get((frame.endpoint, frame.version))
        return watch.take(frame) if watch is not None else []

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
        for one in self._wanted:
            if one.version is not None:
                open_version(self._services, one.version)  # its key may have been revoked since
        started = self._start()
        return ServeEvent(kind="restart", text=f"the server died with code {code}; {started.text}", url=started.url)

    def _stop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.stop()
        self._write_endpoints("stopped", None, None)


def config_of(home: Path, wanted: list[Wanted], body: ServeRequest, serve: Serve) -> ChildConfig:
    """What the child is told: one bundle, or several models and paths."""
    first = wanted[0].model
    server = ServerConfig(
        name=first.name, version=first.version, variant=first.variant, host=body.host,
        port=serve.port if body.port is None else body.port, max_batch=serve.max_batch, queue=serve.queue,
        queue_s=serve.queue_s if body.queue_s is None else body.queue_s,
        limits=HttpLimits(client_rate=serve.client_rate if body.client_rate is None else body.client_rate),
        reference=wanted[0].reference or None, calibrations=str(calibrations_of(home)),
        cache=_changed(serve.cache, entries=body.cache), capture=_changed(serve.capture, share=body.capture),
        captures=str(captures_of(home)), grpc_port=body.grpc_port, access_log=body.access_log or "",
        trace_share=body.trace or 0.0,
        tls_cert=_absolute(body.tls_cert), tls_key=_absolute(body.tls_key),
        tls_client_ca=_absolute(body.tls_client_ca), token_file=_absolute(body.token_file),
        allowed_hosts=[*body.allowed_host, *([] if is_loopback(body.host) else [body.host])],
        slo_p99_ms=serve.slo_p99_ms if body.slo_p99_ms is None else body.slo_p99_ms,
    )  # fmt: skip
    if len(wanted) == 1 and first.source == "bundle" and body.memory_budget is None and not body.all:
        return ChildConfig(
            bundle_dir=first.path, digest=first.digest, threads=first.threads, server=server,
            wants_explanation=body.explain, processes=body.processes,
        )  # fmt: skip
    if body.processes > 1:
        raise InputError("--processes is for one model of the registry", hint="serve it alone, without --all")
    if body.explain:
        raise InputError(
            "--explain is about one model of the registry", hint="millrace serve MODEL --explain, without other paths"
        )
    return ChildConfig(
        models=[one.model for one in wanted],
        preload=[] if body.all else list(dict.fromkeys(one.model.name for one in wanted)),
        memory_budget_bytes=None if body.memory_budget is None else parse_size(body.memory_budget),
        server=msgspec.structs.replace(server, reference=None),
    )


def _absolute(path: str | None) -> str:
    return str(Path(path).absolute()) if path else ""


def _changed(section: SectionType, **changes: Any) -> SectionType:
    """A section of the spec with what the request says otherwise."""
    return msgspec.structs.replace(section, **{name: value for name, value in changes.items() if value is not None})


def supervise(services: Services, body: ServeRequest, serve: Serve, monitor: Monitor) -> Iterator[ServeEvent | None]:
    """Serve what a request names until Ctrl-C.

    Raises:
        InputError: Nothing is named, or a path is no model.
        NotFoundError: No such model, or no such file.
        ConflictError: An endpoint of that name is kept by the server.
        UnavailableError: The port is busy; says who holds it.
        CorruptError: The bundle is not what was signed.
        UntrustedError: No trusted key signed it.
    """
    wanted = wanted_models(services, body, serve)
    if body.explain:
        return _explain(config_of(services.home, wanted, body, serve))
    return Supervisor(services, wanted, body, serve, monitor).run()


def _explain(config: ChildConfig) -> Iterator[ServeEvent]:
    """How the model is called best here, measured in a process of its own.

    Raises:
        MillraceError: It cannot be loaded, or fails.
    """
    done = subprocess.run(CHILD_COMMAND, input=msgspec.json.encode(config), stdout=subprocess.PIPE, check=False)
    said = msgspec.json.decode(done.stdout or b"{}")
    if "error" in said:
        raise from_dict(said["error"])
    if done.returncode or not said:
        raise StageError(f"the measurement ended with code {done.returncode}", hint="its log is above")
    found = said["calibration"]
    how = f"alone {_named(found['shallow'])}, many {_named(found['deep'])}"
    text = f"{config.server.name} v{config.server.version} ({config.server.variant}): {how}; {said['rows']} rows a call"
    yield ServeEvent(kind="calibration", text=text, facts=said)


def _named(layout: dict[str, Any]) -> str:
    return str(msgspec.convert(layout, Layout))
