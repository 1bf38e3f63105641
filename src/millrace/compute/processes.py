"""What the kernel says of processes: who they are, who their children are, how to end them and only them.

A process id alone proves nothing, for it is used again. Here a process is (host, pid, start time).
Linux has all of this in /proc; elsewhere start times are empty and nothing is ever proven.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PROC = Path("/proc")


def host_id() -> str:
    """This boot of this machine, and this namespace of process ids; "" where nothing is known.

    Example:
        >>> host_id() == host_id()
        True
    """
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def start_time(pid: int) -> str:
    """When a living process began, in clock ticks since boot; "" when it is gone, a zombie, or not to be known.

    Example:
        >>> start_time(os.getpid()) != "", start_time(2**30)
        (True, '')
    """
    fields = _stat(pid)
    return fields[19] if fields and fields[0] not in "ZX" else ""


def children_of(pid: int) -> list[int]:
    """Every descendant of a process, nearest first; quick, for it reads only their own files.

    Example:
        >>> children_of(2**30)
        []
    """
    found: list[int] = []
    pending = [pid]
    while pending:
        parent = pending.pop()
        for path in _PROC.glob(f"{parent}/task/*/children"):
            try:
                new = [int(child) for child in path.read_text().split()]
            except OSError:  # the thread has just ended
                continue
            found.extend(new)
            pending.extend(new)
    return found


def session_members(session: int) -> list[int]:
    """Every living process of a session: also those whose parent has ended.

    Example:
        >>> os.getpid() in session_members(os.getsid(0))
        True
    """
    members = []
    for entry in os.scandir(_PROC) if _PROC.is_dir() else ():
        if entry.name.isdigit():
            fields = _stat(int(entry.name))
            if fields and int(fields[3]) == session and fields[0] not in "ZX":
                members.append(int(entry.name))
    return members


def has_mark(pid: int, mark: str) -> bool:
    """Whether a process, or the one it was forked from, was started with `mark` in its environment."""
    try:
        return mark.encode() in (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:
        return False


def memory_of(pids: Iterable[int]) -> int:
    """Bytes that processes hold and the kernel cannot take back: anonymous and shared memory.

    Mapped files do not count: the pages of a memory-mapped training cache are given back under pressure.
    What forked processes share counts for each; see `shared_memory_of`.

    Example:
        >>> memory_of([os.getpid()]) > 0
        True
    """
    return sum(_sum_fields(f"{pid}/status", ("RssAnon:", "RssShmem:")) for pid in pids)


def shared_memory_of(pids: Iterable[int]) -> int:
    """The same with shared pages divided among their owners; exact for a tree, but slow (milliseconds).

    Example:
        >>> 0 < shared_memory_of([os.getpid()]) <= memory_of([os.getpid()]) + (1 << 20)
        True
    """
    return sum(_sum_fields(f"{pid}/smaps_rollup", ("Pss_Anon:", "Pss_Shmem:")) for pid in pids)


def send_signal(pid: int, started: str, number: int) -> bool:
    """Signal one process if it still is the one that began at `started`; False when it is gone."""
    if started and start_time(pid) != started:
        return False
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def kill_session(pid: int, started: str) -> None:
    """SIGKILL a worker that leads its session, with all that it has started; nothing if it is gone."""
    if started and start_time(pid) != started:
        return
    for process in {*children_of(pid), *session_members(pid)} - {pid}:
        send_signal(process, "", signal.SIGKILL)
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # it has not made its group yet, or it is a zombie (macOS)
        send_signal(pid, started, signal.SIGKILL)


def die_with_parent(number: int, parent: int) -> None:
    """Ask the kernel for a signal when the parent's *thread* that started this process ends (Linux).

    Args:
        number: The signal.
        parent: The expected parent's id; when it has died before this call, the signal comes at once.
    """
    if sys.platform != "linux":
        return
    _libc().prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


@functools.cache
def _libc() -> ctypes.CDLL:
    """Opened once, in the fork server; its workers inherit it."""
    return ctypes.CDLL(None)


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third (state) on; empty when the process is gone."""
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (OSError, UnicodeDecodeError):
        return []


def _sum_fields(path: str, names: tuple[str, ...]) -> int:
    try:
        lines = (_PROC / path).read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))
