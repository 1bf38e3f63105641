"""A home that is being restored says so in a file, and is not opened before that has ended. Light."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from millrace.core.errors import ConflictError
from millrace.core.types import Struct
from millrace.store.blobs_local import disk_errors, sync_folder

NAME = "restoring.json"


class Restoring(Struct, frozen=True, kw_only=True):
    """What is being restored, and from where."""

    source: str
    backup: str


def read(home: Path) -> Restoring | None:
    """What a home is being restored from, or None; a file that says nothing names nothing.

    Example:
        >>> read(Path("/no/such/home")) is None
        True
    """
    try:
        data = (home / NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return msgspec.json.decode(data, type=Restoring)
    except msgspec.MsgspecError:
        return Restoring(source="", backup="")


def write(home: Path, restoring: Restoring) -> None:
    """Mark a home, durably, before anything is written into it."""
    temp = home / f".{NAME}"
    with disk_errors(home):
        with temp.open("wb") as file:
            file.write(msgspec.json.encode(restoring))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, home / NAME)
        sync_folder(home)


def remove(home: Path) -> None:
    """The home is whole."""
    (home / NAME).unlink(missing_ok=True)
    sync_folder(home)


def refuse_unfinished(home: Path) -> None:
    """Do not believe a home that is half restored.

    Raises:
        ConflictError: It is.
    """
    found = read(home)
    if found is not None:
        source = found.source or "FROM"
        raise ConflictError(
            f"{home} is being restored from {source}, which has not ended: it is not whole",
            hint=f"`millrace system restore {source}` goes on where it stopped; or remove the folder and begin again",
        )
