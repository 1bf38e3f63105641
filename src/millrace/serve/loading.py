"""Loading and unloading over HTTP, at Triton's paths; and requests that wait for their model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from millrace.core.errors import ConflictError, MillraceError, NotFoundError
from millrace.serve.access import PREFIX, Guard, model_of, path_of
from millrace.serve.exchange import Exchange
from millrace.serve.revisions import Directory

_SOON = b"Retry-After: 1\r\n"
Failed = Callable[[Exchange, int, str, bytes], None]


class Repository(Protocol):
    """Models that are loaded and unloaded while their server runs. For the event loop's thread."""

    def awaits(self, name: str) -> bool:
        """Whether a request for inference loads it: it is known here, and neither loaded nor unloaded on request."""
        ...

    async def ensure(self, name: str) -> None:
        """Wait until it is loaded.

        Raises:
            MillraceError: It cannot be.
        """
        ...

    async def load(self, name: str) -> None:
        """Load it, or load it anew; NotFoundError, CapacityError and whatever is wrong with the model."""
        ...

    async def unload(self, name: str) -> None:
        """Serve it no longer, until it is loaded on request; NotFoundError, ConflictError while it is loaded."""
        ...

    def index(self) -> list[dict[str, str]]:
        """Of every version that is known: name, version, state (READY, LOADING, UNAVAILABLE), reason."""
        ...


class FixedModels:
    """The repository of a server whose models somebody else decides: all of them are loaded.

    Args:
        directory: What is served.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def awaits(self, name: str) -> bool:
        """Nothing is loaded by a request."""
        return False

    async def ensure(self, name: str) -> None:
        """It is served, or it is not."""
        self._directory.find(name)

    async def load(self, name: str) -> None:
        """What is served is loaded."""
        self._directory.find(name)

    async def unload(self, name: str) -> None:
        """Refuse."""
        self._directory.find(name)
        raise ConflictError(
            f"model {name!r} is not unloaded on request: what this server serves is decided where it was started",
            hint="`millrace endpoints delete` ends an endpoint; `millrace serve` with several models has a repository",
        )

    def index(self) -> list[dict[str, str]]:
        """Of every version that is served: name, version, state, reason."""
        return [
            {"name": plane.info.name, "version": plane.info.version,
             "state": "READY" if plane.is_ready else "UNAVAILABLE", "reason": ""}
            for endpoint in self._directory for plane in endpoint.planes
        ]  # fmt: skip


class _Waiting:
    """A request whose model is being loaded."""

    is_gone = False

    def abort(self) -> None:
        """The client is gone."""
        self.is_gone = True


class Loading:
    """Answers `load` and `unload`, and keeps requests for inference until their model is loaded.

    Args:
        repository: Decides.
        failed: Answers with a status, a message and headers.
    """

    def __init__(self, repository: Repository, failed: Failed) -> None:
        self.repository, self._failed = repository, failed
        self._tasks: set[asyncio.Task[None]] = set()

    def route(self, path: bytes, exchange: Exchange, guard: Guard | None) -> Callable[[Exchange], None] | None:
        """What a path below `PREFIX` means; None: nothing, or nothing that whoever asks may see."""
        name, _, verb = path.removeprefix(PREFIX).partition(b"/")
        if not name or verb not in (b"load", b"unload"):
            return None
        text = name.decode("utf-8", "replace")
        if guard is not None and not guard.sees(exchange.head.headers, text):
            return None
        change = self.repository.load if verb == b"load" else self.repository.unload
        return lambda exchange: self._wait(
            exchange, text, change(text), lambda: exchange.reply_json(200, {"name": text})
        )  # fmt: skip

    def hold(self, exchange: Exchange, handle: Callable[[Exchange], None]) -> bool:
        """Keep a request for inference until its model is loaded, then handle it; whether that will be."""
        path = path_of(exchange.head.target)
        name = model_of(path).decode("utf-8", "replace")
        verb = path.rpartition(b":" if path.startswith(b"/v1/") else b"/")[2]
        is_inference = exchange.head.method == b"POST" and verb in (b"infer", b"predict")
        if not is_inference or not self.repository.awaits(name):
            return False
        self._wait(exchange, name, self.repository.ensure(name), lambda: handle(exchange))
        return True

    def _wait(
        self, exchange: Exchange, name: str, work: Coroutine[Any, Any, None], then: Callable[[], None]
    ) -> None:  # fmt: skip
        waiting = exchange.waiting = _Waiting()

        async def answer() -> None:
            error: MillraceError | None = None
            try:
                await work
            except MillraceError as caught:
                error = caught
            if waiting.is_gone:
                return
            exchange.waiting = None
            if error is None:
                then()
            elif isinstance(error, ConflictError):
                self._failed(exchange, 409, error.message, b"")
            elif isinstance(error, NotFoundError) and all(row["name"] != name for row in self.repository.index()):
                self._failed(exchange, 404, error.message, b"")
            else:
                self._failed(exchange, 503, error.message, _SOON)

        task = asyncio.get_running_loop().create_task(answer())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
