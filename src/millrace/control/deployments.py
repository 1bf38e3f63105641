"""Deployed endpoints: what is wanted is written by people, what is served is made to match by the loop."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from typing import Any

import msgspec

from millrace.control.dispatch import handles
from millrace.control.endpoints import sections_of
from millrace.control.models import open_version, resolve_model
from millrace.control.services import Services
from millrace.control.watching import Watch
from millrace.core.errors import ConflictError, InputError, MillraceError, NotFoundError
from millrace.core.operations import live as ops
from millrace.core.refs import Ref
from millrace.core.types import Alias, Endpoint, Lease, ModelVersion
from millrace.formats.bundle import open_bundle
from millrace.serve.hosting import HostConfig, HostedModel, HostProcess, ModelState
from millrace.serve.telemetry import TelemetryFrame

WANTED, STARTING, READY, FAILED, STOPPED = "wanted", "starting", "ready", "failed", "stopped"
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 30.0
CRASHES_OF_A_LOOP = 5
SHARED = ""  # the key of the process that hosts all endpoints but isolated ones
log = logging.getLogger(__name__)


@handles(ops.DEPLOY_ENDPOINT)
def deploy_endpoint(services: Services, body: ops.DeployRequest) -> Endpoint:
    """Write what is wanted; a server's loop serves it within a second."""
    ref = Ref.parse(body.model, kind="model")
    Ref.parse(body.endpoint, kind="endpoint")
    version = resolve_model(services, body.model)
    if version.format != "bundle":
        raise InputError(
            f"{version.name} v{version.number} is kept as it was logged and is never loaded",
            hint="register an ONNX file: `millrace models register model.onnx`",
        )
    variant = body.variant or version.chosen_variant
    bundle = open_bundle(
        open_version(services, version), signature=None, verifier=None, expected_digest=version.bundle.digest
    )
    bundle.model_path(variant)
    alias = ref.at if ref.number is None else None
    with services.records.transaction() as transaction:
        old = transaction.get(Endpoint, body.endpoint)
        if old is not None and not old.is_managed and old.state == READY:
            raise ConflictError(
                f"the endpoint {body.endpoint!r} is served by process {old.pid}",
                hint="stop that `millrace serve`, or choose another name",
            )
        return transaction.put(
            Endpoint(
                id=body.endpoint, name=body.endpoint, created_at=old.created_at if old else 0.0, model=version.name,
                alias=alias or (None if ref.number is not None else "champion"), number=version.number,
                variant=body.variant or "", state=WANTED, is_managed=True, is_isolated=body.isolate,
                threads=body.threads, facts=old.facts if old else {}, url=old.url if old and old.is_managed else None,
            )
        )  # fmt: skip


@handles(ops.DELETE_ENDPOINT)
def delete_endpoint(services: Services, body: ops.NameRequest) -> Endpoint:
    """Forget it; the loop stops serving it."""
    with services.records.transaction() as transaction:
        endpoint = transaction.get(Endpoint, body.name)
        if endpoint is None:
            raise NotFoundError(f"there is no endpoint {body.name!r} in {services.home}", hint="`millrace endpoints`")
        if not endpoint.is_managed and endpoint.state == READY:
            raise ConflictError(f"the endpoint {body.name!r} is served by process {endpoint.pid}", hint="stop that one")
        transaction.delete(Endpoint, body.name)
    return endpoint


class Host:
    """A serving process with the endpoints that it hosts, restarted when it dies."""

    def __init__(self, key: str, port: int) -> None:
        self.key, self.port = key, port
        self.process: HostProcess | None = None
        self.applied: dict[str, HostedModel] = {}
        self.began = 0.0
        self.crashes = 0
        self.due_at = 0.0

    @property
    def is_in_crash_loop(self) -> bool:
        """It died so often, so soon, that something is wrong with what it serves."""
        return self.crashes >= CRASHES_OF_A_LOOP

    def note_death(self) -> None:
        """Plan the restart: later each time, as long as it keeps dying early."""
        now = time.monotonic()
        self.crashes = 1 if now - self.began > STEADY_S else self.crashes + 1
        self.due_at = now + BACKOFF_S[min(self.crashes, len(BACKOFF_S) - 1)]
        self.process, self.applied = None, {}


class Reconciler:
    """Makes what is served match what is wanted. Used by the leader's loop only; not thread-safe.

    Args:
        services: The home.
        port: Where the shared process listens; 0 takes a free port and keeps it.
    """

    def __init__(self, services: Services, port: int = 0) -> None:
        self._services = services
        self._hosts: dict[str, Host] = {SHARED: Host(SHARED, port)}
        self._watches: dict[str, tuple[int, Watch]] = {}
        self._frames: queue.Queue[tuple[str, TelemetryFrame]] = queue.Queue()
        self._states: queue.Queue[tuple[str, ModelState]] = queue.Queue()
        self._models: dict[str, HostedModel] = {}
        self._versions: dict[str, ModelVersion] = {}

    def __call__(self, lease: Lease) -> None:
        """One round."""
        endpoints = [one for one in self._services.records.find(Endpoint) if one.is_managed]
        wanted: dict[str, dict[str, HostedModel]] = {SHARED: {}}
        for endpoint in endpoints:
            model = self._model_of(endpoint)
            if model is not None:
                wanted.setdefault(endpoint.name if endpoint.is_isolated else SHARED, {})[endpoint.name] = model
        fresh = {endpoint.name for endpoint in endpoints if endpoint.state in (WANTED, STOPPED)}
        for key in {*self._hosts, *wanted}:
            self._keep(self._hosts.setdefault(key, Host(key, 0)), wanted.get(key, {}), fresh)
        self._drain(self._states, self._take_state)
        self._drain(self._frames, self._take_frame)
        for name, (_, watch) in self._watches.items():
            self._log(name, watch.tick())

    def close(self) -> None:
        """Drain and stop every serving process."""
        for host in self._hosts.values():
            if host.process is not None:
                host.process.stop()
                host.process = None
        for endpoint in self._services.records.find(Endpoint):
            if endpoint.is_managed and endpoint.state == READY:
                self._write(endpoint.name, state=STOPPED, pid=None, text="the server was stopped")

    # ------------------------------------------------------------------ wanted

    def _model_of(self, endpoint: Endpoint) -> HostedModel | None:
        """What an endpoint wants served now: with an alias, whatever that points to."""
        try:
            return self._hosted(endpoint)
        except MillraceError as error:  # a deleted version, a corrupt bundle: this endpoint's trouble alone
            if (endpoint.state, endpoint.text) != (FAILED, error.message):
                self._write(endpoint.name, state=FAILED, text=error.message, url=None, pid=None)
            return None

    def _hosted(self, endpoint: Endpoint) -> HostedModel:
        number = endpoint.number
        if endpoint.alias is not None:
            alias = self._services.records.get(Alias, f"{endpoint.model}/{endpoint.alias}")
            number = alias.number if alias is not None else number
        known = self._models.get(endpoint.name)
        same = (f"{number}", endpoint.variant, endpoint.threads)
        if known is not None and (known.version, known.asked_variant, known.threads) == same:
            return known
        version = resolve_model(self._services, f"{endpoint.model}@{number}")
        folder = open_version(self._services, version)
        bundle = open_bundle(folder, signature=None, verifier=None, expected_digest=version.bundle.digest)
        serve, monitor = sections_of(self._services.home)
        model = HostedModel(
            endpoint=endpoint.name, bundle_dir=str(folder), digest=version.bundle.digest, version=str(number),
            variant=endpoint.variant or version.chosen_variant, asked_variant=endpoint.variant,
            threads=endpoint.threads, max_batch=serve.max_batch, queue=serve.queue,
            reference=bundle.reference or None,
        )  # fmt: skip
        self._models[endpoint.name] = model
        self._versions[endpoint.name] = version
        self._watches[endpoint.name] = (
            version.number, Watch(self._services, endpoint.name, version, bundle.reference, monitor)
        )  # fmt: skip
        return model

    # ------------------------------------------------------------------ served

    def _keep(self, host: Host, wanted: dict[str, HostedModel], fresh: set[str]) -> None:
        """Start, restart, feed or stop one process. `fresh`: endpoints that were deployed since the last round."""
        process = host.process
        if process is not None and process.exit_code is not None:
            log.warning("the serving process %s ended with %s", host.key or "of all endpoints", process.exit_code)
            process.wait()
            host.note_death()
            for name in wanted:
                self._say_died(host, name)
            process = None
        if not wanted:
            if process is not None:
                process.stop()
                host.process, host.applied = None, {}
            return
        if process is None:
            if time.monotonic() < host.due_at:
                return
            process = self._start(host, wanted)
        if process is not None and (wanted != host.applied or fresh & {*wanted}):
            for name in fresh & {*wanted}:
                self._write(name, state=STARTING, text="")
            process.apply(list(wanted.values()))
            host.applied = dict(wanted)

    def _start(self, host: Host, wanted: dict[str, HostedModel]) -> HostProcess | None:
        host.began = time.monotonic()
        process = HostProcess(
            HostConfig(port=host.port),
            on_frame=lambda name, frame: self._frames.put((name, frame)),
            on_state=lambda state: self._states.put((host.key, state)),
        )
        try:
            host.port = process.wait_ready()
        except MillraceError as error:
            host.note_death()
            for name in wanted:
                self._write(name, state=FAILED, text=error.message, url=None, pid=None)
            return None
        host.process = process
        return process

    def _say_died(self, host: Host, name: str) -> None:
        text = "the serving process died; it is started again"
        if host.is_in_crash_loop:
            text = f"the serving process died {host.crashes} times in a row; tried again every {BACKOFF_S[-1]:.0f} s"
        self._write(name, state=FAILED if host.is_in_crash_loop else STARTING, text=text, url=None, pid=None)

    # ------------------------------------------------------------------ seen

    def _take_state(self, item: tuple[str, ModelState]) -> None:
        key, state = item
        host = self._hosts.get(key)
        if host is None or host.process is None or state.endpoint not in host.applied:
            return
        if state.error is not None:
            message = state.error["message"]
            self._write(state.endpoint, state=FAILED, text=message, url=None, pid=None)
            return
        version = self._versions[state.endpoint]
        self._write(
            state.endpoint, state=READY, text="", url=f"http://127.0.0.1:{host.port}", pid=host.process.pid,
            number=version.number,
        )  # fmt: skip

    def _take_frame(self, item: tuple[str, TelemetryFrame]) -> None:
        name, frame = item
        found = self._watches.get(name)
        if found is not None:
            self._log(name, found[1].take(frame))

    def _write(self, name: str, **changes: Any) -> None:
        with self._services.records.transaction() as transaction:
            endpoint = transaction.get(Endpoint, name)
            if endpoint is not None and endpoint.is_managed:
                changed = msgspec.structs.replace(endpoint, **changes)
                if changed != endpoint:
                    transaction.put(changed, expect_version=endpoint.version)

    @staticmethod
    def _drain(items: queue.Queue[Any], take: Callable[[Any], None]) -> None:
        while not items.empty():
            take(items.get())

    @staticmethod
    def _log(name: str, events: list[ops.ServeEvent]) -> None:
        for event in events:
            log.warning("%s: %s", name, event.text)
