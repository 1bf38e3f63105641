"""Blobs over HTTP: raw bytes both ways, never whole in memory."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from millrace.api import bodies
from millrace.api.routes import PREFIX
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import CorruptError, DiskFullError, UnavailableError
from millrace.core.operations.blobs import GET_BLOB, PUT_BLOB


def blob_routes(dispatcher: Dispatcher) -> list[Route]:
    """Upload and download."""

    async def put(request: Request) -> Response:
        await run_in_threadpool(dispatcher.check, PUT_BLOB.name, "blob:default")
        folder = dispatcher.services.home / "scratch" / "incoming"
        path = await receive(request, folder)
        try:
            stored = await run_in_threadpool(dispatcher.call, PUT_BLOB.name, {"path": str(path)})
        finally:
            path.unlink(missing_ok=True)
        return bodies.answer(request, stored)

    async def get(request: Request) -> Response:
        digest = request.path_params["digest"]
        parts = await run_in_threadpool(dispatcher.stream, GET_BLOB.name, {"digest": digest})
        headers = {"ETag": f'"{digest}"', **bodies.NEVER_A_PAGE}
        return StreamingResponse(parts, media_type="application/octet-stream", headers=headers)

    put.__name__, get.__name__ = PUT_BLOB.name, GET_BLOB.name
    return [
        Route(PREFIX + PUT_BLOB.path, put, methods=["POST"]),
        Route(PREFIX + GET_BLOB.path, get, methods=["GET"]),
    ]


def _write(file: BinaryIO, data: bytes) -> None:
    """All of it, or an error that says that the disk is full."""
    try:
        while data:
            data = data[file.write(data) :]
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFullError("the disk is full, the upload was not stored") from error
        raise UnavailableError(f"the upload cannot be written: {error.strerror}") from error


async def receive(request: Request, folder: Path) -> Path:
    """The request's body as a new temporary file.

    Raises:
        CorruptError: The client ended before all that it had announced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=folder)
    size = 0
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            async for part in request.stream():
                size += len(part)
                await run_in_threadpool(_write, file, part)
        declared = request.headers.get("content-length")
        if declared is not None and declared.isdigit() and int(declared) != size:
            raise CorruptError(f"the upload ended after {size} of {declared} bytes", hint="send it again")
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)
