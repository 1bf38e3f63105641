"""The child of `serve.hosting`: `python -m millrace.serve.host` serves whatever its stdin says."""

from __future__ import annotations

import asyncio
import ssl
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from millrace.core.errors import InputError, MillraceError
from millrace.core.extras import version_of
from millrace.serve.access import Guard
from millrace.serve.catalog import Catalog
from millrace.serve.dataplane import DataPlane
from millrace.serve.hosting import HostConfig, Hosted, HostedModel, ModelState
from millrace.serve.listen import bind
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.serve.server import DISTRIBUTION, ServerConfig, Serving, TelemetryPump, build_plane
from millrace.serve.service import Service
from millrace.serve.telemetry import TelemetryWriter

MAX_LINE_BYTES = 64 << 20  # reference profiles travel with the models
RETIRE_S = 30.0
TELL_S = 1.0


def say(message: dict[str, Any]) -> None:
    """One line to the parent."""
    sys.stdout.buffer.write(msgspec.json.encode(message, enc_hook=str) + b"\n")
    sys.stdout.buffer.flush()


class Host:
    """Loads and unloads; made inside the running loop."""

    def __init__(self, config: HostConfig, serving: Serving, catalog: Catalog) -> None:
        self._config, self._serving, self._catalog = config, serving, catalog
        self._writer = TelemetryWriter(config.telemetry_fd)
        self._loaded: dict[str, HostedModel] = {}
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

    async def _apply(self, models: list[HostedModel]) -> None:
        wanted = {model.endpoint: model for model in models}
        if (guard := self._serving.service.guard) is not None:
            guard.serve({model.endpoint: model.project for model in models})
        for name in self._catalog.excused():
            if name not in wanted:
                self._catalog.remove(name)
        for name in wanted.keys() - self._loaded.keys():
            self._catalog.excuse(name, "it is being loaded")
        self._catalog.is_told = True
        for name in [name for name in self._loaded if name not in wanted]:
            self._retire(self._catalog.remove(name))
            del self._loaded[name], self._serving.planes[name], self._serving.pumps[name]
        for model in models:
            error = None
            if self._loaded.get(model.endpoint) != model:
                error = await self._load(model)
                if error is not None and model.endpoint not in self._loaded:
                    self._catalog.excuse(model.endpoint, error["message"])
            state = ModelState(endpoint=model.endpoint, version=model.version, error=error)
            say(msgspec.to_builtins(state, enc_hook=str))

    async def _load(self, model: HostedModel) -> dict[str, Any] | None:
        """Load, self-test and calibrate in a thread; then take the place of the version before. What failed."""
        loop = asyncio.get_running_loop()
        try:
            plane = await asyncio.to_thread(_plane_of, model, loop)
        except MillraceError as error:
            return error.to_dict()
        pump = self._serving.pumps.pop(model.endpoint, None)
        if pump is not None:
            pump.send()
        self._retire(self._catalog.put(plane))
        self._loaded[model.endpoint] = model
        self._serving.planes[model.endpoint] = plane
        self._serving.pumps[model.endpoint] = TelemetryPump(plane, self._writer)
        return None

    def _retire(self, plane: DataPlane | None) -> None:
        """Let the old one answer what it has taken, then free it."""
        if plane is not None:
            asyncio.get_running_loop().create_task(_drain(plane))


async def _drain(plane: DataPlane) -> None:
    waited_s = 0.0
    while plane.admission.waiting and waited_s < RETIRE_S:
        await asyncio.sleep(0.05)
        waited_s += 0.05
    await asyncio.to_thread(plane.batcher.close, wait_s=1.0)
    plane.runtime.unload()


def _plane_of(model: HostedModel, loop: asyncio.AbstractEventLoop) -> DataPlane:
    runtime = OnnxRuntime(
        Path(model.bundle_dir), model.variant, threads=model.threads, expected_digest=model.digest
    )  # fmt: skip
    runtime.load()
    config = ServerConfig(
        name=model.endpoint, version=model.version, variant=model.variant, max_batch=model.max_batch,
        queue=model.queue, reference=model.reference,
    )  # fmt: skip
    return build_plane(config, runtime, runtime.bundle.signature, loop)


async def _serve(config: HostConfig, lines_of: Callable[[], Any]) -> int:
    catalog = Catalog(version_of(DISTRIBUTION), config.limits.max_body_bytes)
    service = Service(catalog.handle, config.limits, frozenset(config.allowed_hosts))
    service.refused = catalog.count_refused
    catalog.service = service
    service.guard = Guard(catalog.shared) if config.wants_token else None
    service.proxies = tuple(config.proxies)
    tls = _tls(config)
    serving = Serving(
        service, drain_s=config.drain_s, telemetry_interval_s=config.telemetry_interval_s,
        parent_pid=config.parent_pid, tls=tls,
    )  # fmt: skip
    is_guarded = config.wants_token and (tls is not None or bool(config.proxies))
    listener = bind(config.host, config.port, is_guarded=is_guarded)
    lines = await lines_of()
    tasks = [asyncio.create_task(Host(config, serving, catalog).follow(lines))]
    if service.guard is not None:
        tasks.append(asyncio.create_task(_tell_denied(service.guard)))
    try:
        with listener:
            return await serving.run(listener)
    finally:
        for task in tasks:
            task.cancel()


def _tls(config: HostConfig) -> ssl.SSLContext | None:
    if not config.tls_cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_cert, config.tls_key or None)
    except (OSError, ssl.SSLError) as error:
        raise InputError(f"the certificate {config.tls_cert} cannot be used: {error}") from None
    return context


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
