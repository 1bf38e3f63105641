"""What a step on another machine needs of the blobs: fetched from the server, kept here, sent back."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, TypeVar

from millrace.client.remote import RemoteTransport
from millrace.core.errors import CorruptError, UnavailableError
from millrace.core.ports import Blobs
from millrace.core.types import Artifact

PAUSE_S = 0.5
T = TypeVar("T")


class FarBlobs:
    """Implements `core.ports.StepBlobs` over a server, with a store on this machine between. Thread-safe.

    Both ways bytes are named by their digest, so that what a broken line has cut is simply sent again.

    Args:
        server: Where the blobs are.
        local: Where they are kept here.
        patience_s: How long a server that cannot be reached is asked again.
    """

    def __init__(self, server: RemoteTransport, local: Blobs, patience_s: float) -> None:
        self._server, self._local, self._patience_s = server, local, patience_s

    def path(self, digest: str) -> Path:
        """A verified read-only file.

        Raises:
            DeniedError: The token is not for this blob.
        """
        if not self._local.exists(digest):
            with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
                file = Path(folder) / "blob"
                self._patiently(lambda: self._server.download(digest, file))
                self._local.put(file)
        return self._local.path(digest)

    def put(self, source: BinaryIO | bytes | Path, media_type: str = "application/octet-stream") -> Artifact:
        """Store bytes here and there."""
        artifact = self._local.put(source, media_type)
        self._send(artifact.digest)
        return artifact

    def put_tree(self, folder: Path) -> Artifact:
        """Store a folder here and there."""
        artifact = self._local.put_tree(folder)
        entries = self._local.tree(artifact.digest)
        for digest in {entry.digest for entry in entries}:
            self._send(digest)
        stored = self._patiently(lambda: self._server.call("tree.put", {"entries": entries}))
        if stored.digest != artifact.digest:
            raise CorruptError(f"the listing of {folder} is {artifact.digest} here and {stored.digest} at the server")
        return artifact

    def materialize(self, digest: str, folder: Path) -> Path:
        """A tree's files in a new folder, read-only."""
        self.path(digest)
        for entry in self._local.tree(digest):
            self.path(entry.digest)
        return self._local.materialize(digest, folder)

    def _send(self, digest: str) -> None:
        self._patiently(lambda: self._server.upload(self._local.path(digest)))

    def _patiently(self, ask: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return ask()
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(PAUSE_S)
