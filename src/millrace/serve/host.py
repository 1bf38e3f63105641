"""The child of `serve.hosting`: `python -m millrace.serve.host` serves whatever its stdin says."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from millrace.core.errors import InputError, MillraceError
from millrace.serve.access import Guard
from millrace.serve.dataplane import DataPlane
from millrace.serve.hosting import HostConfig, Hosted, HostedModel, ModelState
from millrace.serve.pump import TelemetryPump
from millrace.serve.revisions import Revision
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.server import ServerConfig, Serving, build_plane, listener_of
from millrace.serve.shadow import Shadows
from millrace.serve.telemetry import TelemetryWriter
from millrace.serve.tls import server_context

MAX_LINE_BYTES = 64 << 20  # reference profiles travel with the models
RETIRE_S = 30.0
TELL_S = 1.0


def say(message: dict[str, Any]) -> None:
    """One line to the parent."""
    sys.stdout.buffer.write(msgspec.json.encode(message, enc_hook=str) + b"\n")
    sys.stdout.buffer.flush()


class Host:
    """Loads and unloads; made inside the running loop."""

    def __init__(self, config: HostConfig, serving: Serving) -> None:
        self._config, self._serving, self._directory = config, serving, serving.directory
        self._writer = TelemetryWriter(config.telemetry_fd)
        self._shadows = Shadows()
        self._loaded: dict[str, dict[str, tuple[HostedModel, DataPlane]]] = {}  # by endpoint and version
        self._wanted: asyncio.Queue[list[HostedModel]] = asyncio.Queue()

    async def follow(self, lines: asyncio.StreamReader) -> None:
        """Believe at once, apply in order; the end of the lines is the end of the parent."""
        guard = self._serving.service.guard
        applying = asyncio.create_task(self._apply_all())
        while line := await lines.readline():
            told = msgspec.json.decode(line, type=Hosted)
            if told.callers is not None and guard is not None:
                guard.believe(told.callers)
            if told.models is not None:
                self._wanted.put_nowait(told.models)
        applying.cancel()
        self._serving.stop.set()

    async def _apply_all(self) -> None:
        while True:
            await self._apply(await self._wanted.get())
            self._serving.welcome.set()

    async def _apply(self, models: list[HostedModel]) -> None:
        wanted: dict[str, list[HostedModel]] = {}
        for model in models:
            wanted.setdefault(model.endpoint, []).append(model)
        if (guard := self._serving.service.guard) is not None:
            guard.serve({model.endpoint: model.project for model in models})
        for name in {*self._directory.excused(), *self._loaded} - wanted.keys():
            self._retire(self._directory.remove(name))
            self._loaded.pop(name, None)
        for name in wanted.keys() - self._loaded.keys():
            self._directory.excuse(name, "it is being loaded")
        self._directory.is_told = True
        for name, revisions in wanted.items():
            await self._apply_revisions(name, revisions)

    async def _apply_revisions(self, name: str, wanted: list[HostedModel]) -> None:
        """Load what is new, then let it take the place of what is not wanted; where nothing is, that stays."""
        loaded = self._loaded.setdefault(name, {})
        serving: dict[str, tuple[HostedModel, DataPlane]] = {}
        errors: dict[str, dict[str, Any] | None] = {}
        for model in wanted:
            before = loaded.get(model.version)
            try:
                plane = before[1] if before and _is_same(before[0], model) else await self._load(model)
            except MillraceError as error:
                errors[model.version] = error.to_dict()
                if before is not None:
                    serving[model.version] = before
            else:
                errors[model.version] = None
                serving[model.version] = (model, plane)
        revisions = [Revision(plane, model.weight, model.is_shadow) for model, plane in serving.values()]
        if any(one.weight > 0 and not one.is_shadow for one in revisions):
            self._loaded[name] = serving
            self._shadows.mirror(revisions)
            self._retire(self._directory.put(name, revisions))
        elif not loaded:
            del self._loaded[name]
            self._directory.excuse(name, next(error["message"] for error in errors.values() if error))
        for version, error in errors.items():
            say(msgspec.to_builtins(ModelState(endpoint=name, version=version, error=error), enc_hook=str))

    async def _load(self, model: HostedModel) -> DataPlane:
        """Load, self-test and calibrate in a thread."""
        queued = msgspec.structs.replace(model, queue_s=self._config.queue_s or model.queue_s)
        plane = await asyncio.to_thread(_plane_of, queued, asyncio.get_running_loop())
        self._serving.pumps[plane] = TelemetryPump(plane, self._writer)
        return plane

    def _retire(self, planes: list[DataPlane]) -> None:
        """Let the old ones answer what they have taken, then free them."""
        for plane in planes:
            asyncio.get_running_loop().create_task(self._drain(plane))

    async def _drain(self, plane: DataPlane) -> None:
        waited_s = 0.0
        while plane.admission.waiting and waited_s < RETIRE_S:
            await asyncio.sleep(0.05)
            waited_s += 0.05
        self._serving.pumps.pop(plane).send()
        await asyncio.to_thread(plane.close, wait_s=1.0)
        plane.runtime.unload()


def _is_same(one: HostedModel, other: HostedModel) -> bool:
    """Whether they differ in nothing but their share of the requests."""
    return msgspec.structs.replace(one, weight=other.weight, is_shadow=other.is_shadow) == other


def _plane_of(model: HostedModel, loop: asyncio.AbstractEventLoop) -> DataPlane:
    runtime = OnnxRuntime(
        Path(model.bundle_dir), model.variant, threads=model.threads, expected_digest=model.digest
    )  # fmt: skip
    runtime.load()
    config = ServerConfig(
        name=model.endpoint, version=model.version, variant=model.variant, max_batch=model.max_batch,
        queue=model.queue, queue_s=model.queue_s,
        reference=model.reference, slo_p99_ms=model.slo_p99_ms, calibrations=model.calibrations,
        cache=model.cache, capture=model.capture, captures=model.captures,
    )  # fmt: skip
    return build_plane(config, runtime, runtime.bundle.signature, loop)


async def _serve(config: HostConfig, lines_of: Callable[[], Any]) -> int:
    tls = server_context(config.tls_cert, config.tls_key, config.tls_client_ca)
    serving = Serving(
        config.limits, config.allowed_hosts, drain_s=config.drain_s,
        telemetry_interval_s=config.telemetry_interval_s, parent_pid=config.parent_pid, tls=tls,
    )  # fmt: skip
    service = serving.service
    serving.observe(config.access_log, config.trace_share)
    if config.wants_token:
        service.ask_guard(Guard(serving.catalog.shared))
    service.proxies = tuple(config.proxies)
    is_asked = config.wants_token or bool(config.tls_client_ca)
    is_guarded = is_asked and (tls is not None or (config.wants_token and bool(config.proxies)))
    listener = listener_of(config.host, config.port, is_guarded, config.listen_fd)
    if config.peers:
        serving.join(Path(config.peers))
    if config.is_patient:
        serving.welcome.clear()
    if config.grpc_port is not None:
        certificate = (config.tls_cert, config.tls_key, config.tls_client_ca)
        is_shared = config.listen_fd >= 0
        serving.speak_grpc(config.host, config.grpc_port, certificate, is_asked and tls is not None, is_shared)
    lines = await lines_of()
    tasks = [asyncio.create_task(Host(config, serving).follow(lines))]
    if service.guard is not None:
        tasks.append(asyncio.create_task(_tell_denied(service.guard)))
    try:
        with listener:
            return await serving.run(listener, config.listen_fd >= 0)
    finally:
        for task in tasks:
            task.cancel()


async def _tell_denied(guard: Guard) -> None:
    while True:
        await asyncio.sleep(TELL_S)
        for denied in guard.take_denied(time.monotonic()):
            say(msgspec.to_builtins(denied))


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    return reader


def main() -> int:
    """The command; 1 on a failure, which is reported on stdout."""
    try:
        config = msgspec.json.decode(sys.stdin.buffer.readline(), type=HostConfig)
    except msgspec.MsgspecError as error:
        say({"failed": InputError(f"the host's configuration cannot be read: {error}").to_dict()})
        return 2
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_serve(config, _stdin))
    except MillraceError as error:
        say({"failed": error.to_dict()})
        return 1


if __name__ == "__main__":
    sys.exit(main())
