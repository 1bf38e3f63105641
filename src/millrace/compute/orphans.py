"""Notes about living workers, so that those whose driver has died can be ended, and only those."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec

from millrace.compute.processes import has_mark, host_id, kill_session, send_signal, session_members, start_time
from millrace.core.types import Struct

MARK_VARIABLE = "MILLRACE_FORK_SERVER"


class WorkerNote(Struct, frozen=True, kw_only=True):
    """One living worker: `home/scratch/workers/<pid>.json`."""

    host: str
    pid: int
    started: str
    driver: int
    driver_started: str
    mark: str
    step_id: str = ""


def note_worker(home: Path, pid: int, mark: str, step_id: str) -> Path:
    """Write down that a worker of this process lives.

    Args:
        home: The home.
        pid: The worker.
        mark: `NAME=value` in the environment of its fork server; whatever it starts inherits it.
        step_id: The step that it works on.

    Returns:
        The note; remove it when the worker has ended.
    """
    note = WorkerNote(
        host=host_id(), pid=pid, started=start_time(pid), driver=os.getpid(),
        driver_started=start_time(os.getpid()), mark=mark, step_id=step_id,
    )  # fmt: skip
    path = _folder(home) / f"{pid}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_bytes(msgspec.json.encode(note))
    part.rename(path)
    return path


def clean_orphans(home: Path) -> list[int]:
    """End the workers of a home that are proven to have lost their driver, with what they have started.

    Proven means: the note is of this boot and this namespace of process ids, the driver of the note is gone
    (no process with its id and start time), and the worker is the one of the note (id and start time). Of a
    worker that is gone, processes left in its session end too, if they carry its mark.

    Args:
        home: The home.

    Returns:
        The process ids that were killed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     clean_orphans(Path(folder))
        []
    """
    killed: list[int] = []
    for path in sorted(_folder(home).glob("*.json")):
        try:
            note = msgspec.json.decode(path.read_bytes(), type=WorkerNote)
        except FileNotFoundError:  # its driver was quicker
            continue
        except msgspec.DecodeError:
            path.unlink(missing_ok=True)  # names no process, so it proves nothing
            continue
        if note.host == host_id() and not _is_driven(note):
            killed.extend(_end(note))
            path.unlink(missing_ok=True)
        elif _is_of_another_boot(note):
            path.unlink(missing_ok=True)
    return killed


def kill_leftovers(pid: int, mark: str) -> list[int]:
    """End what a worker that is gone has left in its session; the mark proves that it is the worker's."""
    left = [member for member in session_members(pid) if member != pid and has_mark(member, mark)]
    return [member for member in left if send_signal(member, "", signal.SIGKILL)]


def _folder(home: Path) -> Path:
    return home / "scratch" / "workers"


def _is_driven(note: WorkerNote) -> bool:
    """Where start times are unknown the driver counts as living: nothing is proven."""
    return note.driver_started == "" or start_time(note.driver) == note.driver_started


def _is_of_another_boot(note: WorkerNote) -> bool:
    """The same boot with another namespace may be a container that lives."""
    return note.host.partition("/")[0] != host_id().partition("/")[0]


def _end(note: WorkerNote) -> list[int]:
    if note.started and start_time(note.pid) == note.started:
        kill_session(note.pid, note.started)
        return [note.pid]
    return kill_leftovers(note.pid, note.mark)
