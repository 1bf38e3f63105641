"""The child with several models, loaded when they are wanted; imported only there: being ready soon matters."""

from __future__ import annotations

import asyncio

import uvloop

from millrace.serve.child import ChildConfig
from millrace.serve.dataplane import DataPlane
from millrace.serve.listen import bind
from millrace.serve.opening import open_plane
from millrace.serve.pump import TelemetryPump
from millrace.serve.repository import ModelRepository
from millrace.serve.server import open_serving
from millrace.serve.telemetry import TelemetryWriter


def serve_models(config: ChildConfig) -> int:
    """Serve several models, loaded when they are wanted, until SIGTERM; blocks.

    Args:
        config: With `models`; `server` is for all of them.

    Returns:
        0 after a graceful drain, 1 when requests were cut off.

    Raises:
        MillraceError: One that is to be loaded first cannot be, the host is not loopback, or the port is busy.
    """
    listener = bind(config.server.host, config.server.port, is_guarded=config.server.is_guarded)

    async def serve() -> int:
        server, loop = config.server, asyncio.get_running_loop()
        serving = open_serving(server, {model.name for model in config.models})
        writer = TelemetryWriter(config.telemetry_fd) if config.telemetry_fd is not None else None

        def loaded(plane: DataPlane) -> None:
            if writer is not None:
                serving.pumps[plane] = TelemetryPump(plane, writer)

        def retired(plane: DataPlane) -> None:
            if plane in serving.pumps:
                serving.pumps.pop(plane).send()

        repository = ModelRepository(
            serving.directory, config.models, lambda model: open_plane(model, server, loop),
            config.memory_budget_bytes, loaded=loaded, retired=retired,
        )  # fmt: skip
        for name in config.preload:
            if not repository.memory() or repository.has_room(name):
                await repository.load(name)
        serving.catalog.serve_repository(repository)
        serving.directory.is_told = True
        return await serving.run(listener)

    with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve())
