"""`server.json`: how commands in a folder find the server of its home."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from millrace.core.types import Struct

NAME = "server.json"
TOKEN_NAME = "local.token"  # for commands in the home's folder: who can read it could read the records as well


class ServerFile(Struct, frozen=True, kw_only=True):
    """A running server. Boot id, pid and start time prove whether its process still lives."""

    url: str
    pid: int
    boot_id: str
    process_started: str
    version: str
    started_at: float
    ca_file: str = ""  # of a server with a certificate of its own: the certificate


def write(home: Path, server: ServerFile) -> None:
    """Write it so that readers see all of it or nothing."""
    new = home / f"{NAME}.{os.getpid()}"
    new.write_bytes(msgspec.json.format(msgspec.json.encode(server)))
    os.replace(new, home / NAME)


def read(home: Path) -> ServerFile | None:
    """What the file says; None where there is none or it cannot be read: it is only a hint, made anew by `up`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     (Path(folder) / NAME).write_text("{")
        ...     read(Path(folder)) is None
        1
        True
    """
    try:
        return msgspec.json.decode((home / NAME).read_bytes(), type=ServerFile)
    except (OSError, msgspec.MsgspecError):
        return None


def remove(home: Path, pid: int) -> None:
    """Remove the file if it is this process's own."""
    server = read(home)
    if server is not None and server.pid == pid:
        (home / NAME).unlink(missing_ok=True)
