"""A worker that holds secrets: no core dump, no look into its memory, and a log in which the values are `***`."""

from __future__ import annotations

import ctypes
import os
import resource
import select
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from millrace.core.redaction import RedactedStream, Redactor

_PR_SET_DUMPABLE = 4
_LOOK_S = 0.2
_END_S = 2.0
_PART_BYTES = 64 << 10
_DESCRIPTORS = 65_536


def harden() -> None:
    """No core file of this process or of what it starts; no other process of this user may read its memory.

    The second holds on Linux, until another program is executed: a script's own process is protected by the first.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


class FilteredLog:
    """A pipe into a log, with a process of its own in between that hides values.

    A process, not a thread: native code may print more than a pipe holds while it keeps Python's lock, and what
    a crashing step has printed last must arrive.

    Args:
        path: The log; appended to.
        secrets: What to hide, by name.
    """

    def __init__(self, path: Path, secrets: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.raw = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)  # for what holds no values
        reader, self.input = os.pipe()
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _filter(reader, self.raw, parent, Redactor(secrets.values()).stream())
        os.close(reader)

    def finish(self) -> None:
        """Wait until everything printed is in the log; not for what the step has left running."""
        os.close(self.input)
        nothing = os.open(os.devnull, os.O_WRONLY)
        for target in (1, 2):
            os.dup2(nothing, target)
        os.close(nothing)
        descriptor = os.pidfd_open(self._pid) if hasattr(os, "pidfd_open") else -1
        if descriptor >= 0:
            select.select([descriptor], [], [], _END_S)
            os.close(descriptor)
        else:
            os.waitpid(self._pid, 0)


def _filter(reader: int, log: int, parent: int, stream: RedactedStream) -> NoReturn:
    """Runs in a session of its own, so that it outlives the killing of the worker's long enough to write the rest."""
    os.setsid()
    first, second = sorted((reader, log))  # all others are closed: the line to the driver must end with the worker
    for low, high in ((3, first), (first + 1, second), (second + 1, _DESCRIPTORS)):
        os.closerange(low, high)
    try:
        while True:
            ready, _, _ = select.select([reader], [], [], _LOOK_S)
            if not ready:
                if os.getppid() != parent:  # whoever else holds the pipe is not a step any more
                    break
                continue
            data = os.read(reader, _PART_BYTES)
            if not data:
                break
            _write(log, stream.feed(data))
        _write(log, stream.end())
    finally:
        os._exit(0)


def _write(log: int, data: bytes) -> None:
    while data:
        data = data[os.write(log, data) :]
