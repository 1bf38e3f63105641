"""Bytes in and out without holding a file in memory: received, hashed and written at the same time."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO, cast

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse

from millrace.api.bodies import NEVER_A_PAGE
from millrace.core.errors import InputError, MillraceError
from millrace.core.ports import Blobs
from millrace.core.types import Artifact

PART_BYTES = 1 << 20
PARTS_AHEAD = 8  # received and not yet written: 8 MiB per upload at most
SEND_BYTES = 4 << 20


class LargeFileResponse(FileResponse):
    """A file in large pieces: each piece costs a hop to a thread."""

    chunk_size = SEND_BYTES


def send_file(path: Path, name: str) -> FileResponse:
    """A file as a download: never shown by a browser as a page of this server."""
    return LargeFileResponse(path, filename=name, media_type="application/octet-stream", headers=NEVER_A_PAGE)


async def receive_blob(request: Request, blobs: Blobs) -> Artifact:
    """Store a request's body as a blob while it arrives. What the client calls it does not count.

    Raises:
        InputError: The client went away before the end; nothing is stored.
        DiskFullError: No space; nothing is stored.
    """
    pipe = _Pipe(asyncio.get_running_loop())
    storing = asyncio.ensure_future(run_in_threadpool(blobs.put, cast(BinaryIO, pipe)))
    storing.add_done_callback(lambda _: pipe.stop())
    try:
        async for part in _parts(request):
            if not await pipe.push(part):
                break
    except ClientDisconnect:
        pipe.fail(InputError("the client went away before the end of the file"))
    except BaseException:
        pipe.fail(InputError("the upload was cancelled"))
        raise
    else:
        await pipe.push(b"")
    return await storing


async def _parts(request: Request) -> AsyncIterator[bytes]:
    """The body in parts of about one MiB."""
    waiting: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        waiting.append(chunk)
        size += len(chunk)
        if size >= PART_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    if size:
        yield b"".join(waiting)


class _Pipe:
    """Hands parts from the event loop to one reading thread; at most `PARTS_AHEAD` wait. An empty part is the end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: queue.SimpleQueue[bytes | MillraceError] = queue.SimpleQueue()
        self._free = asyncio.Semaphore(PARTS_AHEAD)
        self._stopped = False
        self._rest = memoryview(b"")
        self._ended = False

    async def push(self, part: bytes) -> bool:
        """Hand a part over, waiting for room; False when nobody reads any more."""
        await self._free.acquire()
        if self._stopped:
            return False
        self._queue.put(part)
        return True

    def fail(self, error: MillraceError) -> None:
        """Let the reader fail."""
        self._queue.put(error)

    def stop(self) -> None:
        """The reader has gone: let the writer go on, to see it."""
        self._stopped = True
        self._free.release()

    def read(self, size: int = -1) -> bytes | memoryview:
        """Called by the thread: up to `size` bytes, b"" at the end."""
        if not self._rest and not self._ended:
            part = self._queue.get()
            if isinstance(part, MillraceError):
                raise part
            self._loop.call_soon_threadsafe(self._free.release)
            self._ended = not part
            self._rest = memoryview(part)
        if size < 0 or size >= len(self._rest):
            taken, self._rest = self._rest, memoryview(b"")
            return taken if taken else b""
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken
