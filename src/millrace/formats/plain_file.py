"""Reading a file once: what is looked at afterwards is these bytes, whatever becomes of the file."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_plain(path: Path, most_bytes: int | None = None, *, follow: bool = True) -> bytes:
    """The bytes of a regular file. A pipe, a device or a folder is refused at once: nothing waits.

    Args:
        path: The file.
        most_bytes: What is larger is refused before it is read.
        follow: Whether it may be a symbolic link.

    Raises:
        OSError: There is none, or it cannot be read.
        ValueError: It is no regular file, is too large, or changed while it was read.

    Example:
        >>> read_plain(Path("/dev/zero"))
        Traceback (most recent call last):
        ValueError: it is no regular file
    """
    link = 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | link)
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is no regular file")
        if most_bytes is not None and state.st_size > most_bytes:
            raise ValueError(f"it has {state.st_size} bytes; want at most {most_bytes}")
        data = file.read(state.st_size + 1)
    if len(data) != state.st_size:
        raise ValueError("it changed while it was read")
    return data
