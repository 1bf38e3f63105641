"""How calls share the processors: threads in a call, calls at once, and which of two ways suits what waits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from millrace.core.types import Struct
from millrace.serve.calibrate import Cost, Infer

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_MAX, _MEMORY_NOW = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
_MEMINFO = Path("/proc/meminfo")


class Layout(Struct, frozen=True, kw_only=True):
    """`callers` calls at once of a session with `threads` threads; `is_spinning`: they wait for work busily.

    Several callers share one session: its weights are in memory once.

    Example:
        >>> str(Layout(threads=2, is_spinning=True)), str(Layout(callers=4))
        ('1 call x 2 threads, spinning', '4 calls x 1 thread')
    """

    threads: int = 1
    callers: int = 1
    is_spinning: bool = False

    def __str__(self) -> str:
        calls, threads = "call" if self.callers == 1 else "calls", "thread" if self.threads == 1 else "threads"
        spinning = ", spinning" if self.is_spinning else ""
        return f"{self.callers} {calls} x {self.threads} {threads}{spinning}"


def layouts_of(cores: int) -> list[Layout]:
    """What is worth trying on so many processors: one call by all of them or by half, and one call on each.

    Example:
        >>> [str(layout) for layout in layouts_of(2)]
        ['1 call x 1 thread', '2 calls x 1 thread', '1 call x 2 threads', '1 call x 2 threads, spinning']
        >>> len(layouts_of(1)), len(layouts_of(8))
        (1, 8)
    """
    found = [Layout()]
    if cores > 1:
        found.append(Layout(callers=cores))
    sizes = [cores // 2, cores] if cores >= 4 else [cores] if cores > 1 else []
    for threads in sizes:
        for is_spinning in (False, True):
            found.append(Layout(threads=threads, is_spinning=is_spinning))
            if threads < cores:
                found.append(Layout(threads=threads, callers=cores // threads, is_spinning=is_spinning))
    return found


class Plan(NamedTuple):
    """A layout in use: what is called, by how many at once, and how many rows a call has at most."""

    infer: Infer
    cost: Cost
    rows: int
    callers: int = 1

    def limit(self, waiting: int) -> int:
        """Rows of the next call, so that no caller idles while another takes all that waits."""
        return self.rows if self.callers == 1 else max(1, min(self.rows, -(-waiting // self.callers)))


class Switch:
    """Which of two plans the next call follows: the quicker one, or under a deep queue the one that does more.

    It turns deep when more jobs wait or run than `deep` runs at once, and back when no call runs and few
    wait. Not for several threads at once.

    Args:
        shallow: Answers one request soonest.
        deep: Answers the most in a second; may be the same.

    Example:
        >>> def infer(tensors, /): return {}
        >>> cost = Cost(base_s=0.0, per_row_s=0.01)
        >>> one, two = Plan(infer, cost, 1), Plan(infer, cost, 1, callers=2)
        >>> switch = Switch(one, two)
        >>> switch.next(waiting=1, busy=0) is one, switch.next(waiting=1, busy=1) is None
        (True, True)
        >>> switch.next(waiting=2, busy=1) is two, switch.next(waiting=1, busy=1) is two
        (True, True)
        >>> switch.next(waiting=1, busy=0) is one
        True
    """

    __slots__ = ("_down", "_up", "deep", "is_deep", "shallow")

    def __init__(self, shallow: Plan, deep: Plan) -> None:
        self.shallow, self.deep = shallow, deep
        self.is_deep = False
        self._up, self._down = deep.callers + 1, max(1, deep.callers // 2)

    @property
    def callers(self) -> int:
        """Calls at once at most."""
        return max(self.shallow.callers, self.deep.callers)

    def next(self, waiting: int, busy: int) -> Plan | None:
        """The plan of a call that would begin now; None when it has to wait for one that runs.

        Args:
            waiting: Jobs that no call has taken.
            busy: Calls that run.
        """
        depth = waiting + busy
        if self.is_deep:
            self.is_deep = busy > 0 or depth > self._down
        else:
            self.is_deep = depth >= self._up
        plan = self.deep if self.is_deep else self.shallow
        return plan if busy < plan.callers else None


def cores() -> int:
    """Processors that this process may use: by its affinity and its control group.

    Example:
        >>> cores() >= 1
        True
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, _quota(_CPU_MAX) or allowed))


def _quota(path: Path) -> int:
    """Whole processors of a control group's quota; 0: none is set."""
    try:
        quota, period = path.read_text().split()
        return 0 if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        return 0


def free_bytes() -> int:
    """Memory that may still be taken: of the machine and of the control group.

    Example:
        >>> free_bytes() > 0
        True
    """
    free = _group_free(_MEMORY_MAX, _MEMORY_NOW)
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return min(free, int(lines["MemAvailable"].split()[0]) << 10)
    except (OSError, ValueError, KeyError):
        return free


def _group_free(limit: Path, now: Path) -> int:
    try:
        return max(0, int(limit.read_text()) - int(now.read_text()))
    except (OSError, ValueError):  # no group, or "max"
        return 1 << 62
