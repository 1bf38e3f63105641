"""Server-sent events: a handler's sequence as `text/event-stream`, resumable by `Last-Event-ID`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse

from millrace.api.bodies import encode_json
from millrace.api.guards import is_still_let
from millrace.core.errors import CapacityError, MillraceError
from millrace.core.operations import Operation

MAX_STREAMS = 200  # each has a thread while it lasts
PING_EVERY_S = 10.0
AGAIN_S = 10.0  # who listens is asked for again who they are
_QUEUED = 256
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Streams:
    """The open streams of one API process.

    Args:
        is_stopping: Says that the process shuts down: streams end, and clients resume elsewhere.
    """

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        self._is_stopping = is_stopping
        self._open = threading.BoundedSemaphore(MAX_STREAMS)

    def respond(self, operation: Operation, items: Iterator[Any]) -> Response:
        """Send `items` as they come. An item None only keeps the line warm.

        Raises:
            CapacityError: Too many streams are open.
        """
        if not self._open.acquire(blocking=False):
            raise CapacityError(f"{MAX_STREAMS} streams are open in this process, the most it takes")
        relay = _Relay(items, asyncio.get_running_loop(), self._open.release)
        body = self._events(operation, relay)
        return StreamingResponse(body, media_type="text/event-stream", headers=_HEADERS)

    async def _events(self, operation: Operation, relay: _Relay) -> AsyncIterator[bytes]:
        quiet_s, loop = 0.0, asyncio.get_running_loop()
        asked_at = loop.time()
        try:
            yield b": open\n\n"
            while not self._is_stopping():
                if loop.time() - asked_at >= AGAIN_S:
                    asked_at = loop.time()
                    if not await is_still_let():
                        return  # a client comes again, and is told why not
                try:
                    kind, item = await asyncio.wait_for(relay.queue.get(), 0.5)
                except TimeoutError:
                    quiet_s += 0.5
                    if quiet_s >= PING_EVERY_S:
                        quiet_s = 0.0
                        yield b": ping\n\n"
                    continue
                quiet_s = 0.0
                yield frame(operation, kind, item)
                if kind in ("error", "end"):
                    return
        finally:
            relay.stop()


class _Relay:
    """Runs a blocking sequence in a thread of its own and hands its items to the event loop."""

    def __init__(self, items: Iterator[Any], loop: asyncio.AbstractEventLoop, done: Callable[[], None]) -> None:
        self.queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue(_QUEUED)
        self._items, self._loop, self._done = items, loop, done
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="stream", daemon=True).start()

    def stop(self) -> None:
        """The reader has gone: end after the item that is being waited for."""
        self._stopped.set()

    def _run(self) -> None:
        try:
            for item in self._items:
                if self._stopped.is_set():
                    return
                if item is not None:
                    self._put("item", item)
            self._put("end", None)
        except MillraceError as error:
            self._put("error", error)
        finally:
            close = getattr(self._items, "close", None)
            if close is not None:
                close()
            self._done()

    def _put(self, kind: str, item: Any) -> None:
        if self._loop.is_closed():
            return
        waiting = asyncio.run_coroutine_threadsafe(self.queue.put((kind, item)), self._loop)
        while not self._stopped.is_set():
            try:
                waiting.result(timeout=0.5)
            except TimeoutError:
                continue
            return
        waiting.cancel()


def frame(operation: Operation, kind: str, item: Any) -> bytes:
    """One event; its id is the item's cursor, where the operation has one.

    Example:
        >>> from millrace.core.operations.table import OPERATIONS
        >>> frame(OPERATIONS["run.drive"], "end", None)
        b'event: end\\ndata: {}\\n\\n'
    """
    if kind == "end":
        return b"event: end\ndata: {}\n\n"
    if kind == "error":
        return b"event: error\ndata: " + msgspec.json.encode(item.to_dict(), enc_hook=str) + b"\n\n"
    cursor = getattr(item, operation.cursor_field) if operation.cursor_field else None
    head = b"" if cursor is None else b"id: %d\n" % cursor
    return head + b"data: " + encode_json(item) + b"\n\n"
