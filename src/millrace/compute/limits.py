"""Limits of one work: wall time, heartbeat, memory by watchdog, memory by cgroup where one is delegated."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from millrace.compute.processes import children_of, memory_of, shared_memory_of
from millrace.core.errors import StageError, StepMemoryError, StepTimeoutError
from millrace.core.ports import Capacity, Work
from millrace.core.units import format_duration, format_size

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
)
_CGROUPS = Path("/sys/fs/cgroup")
_DELEGATED = ("user.delegate", "trusted.delegate")  # systemd marks what it hands over so


def thread_environment(threads: int) -> dict[str, str]:
    """Variables that hold the usual libraries to so many threads.

    Example:
        >>> thread_environment(2)["OMP_NUM_THREADS"]
        '2'
    """
    return dict.fromkeys(THREAD_VARIABLES, str(threads))


def machine_capacity() -> Capacity:
    """Processors this process may use, memory that is free (or its cgroup's limit), devices by their files.

    Example:
        >>> machine_capacity().cpus >= 1
        True
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = ["cpu"]
    if Path("/dev/nvidia0").exists():
        devices.append("cuda")
    if sys.platform == "darwin" and os.uname().machine == "arm64":
        devices.append("mps")
    return Capacity(cpus=cpus, memory_bytes=min(_free_memory(), _own_limit()), devices=tuple(devices))


def oom_kills() -> int:
    """How many processes the kernel has killed for lack of memory since boot; 0 where it does not say.

    Example:
        >>> oom_kills() >= 0
        True
    """
    return _named_number(Path("/proc/vmstat"), "oom_kill")


@dataclass
class Watch:
    """Watches one work; the caller asks `check` again and again, and kills on its answer.

    Args:
        work: Its limits and its name.
        heartbeat_timeout_s: Silence of the worker that counts as a hang.
        started_at: Monotonic seconds at which the work began.
    """

    work: Work
    heartbeat_timeout_s: float
    started_at: float = field(default_factory=time.monotonic)
    peak_bytes: int = 0
    beat_at: float = 0.0

    def __post_init__(self) -> None:
        self.beat_at = max(self.beat_at, self.started_at)

    def beat(self, rss_bytes: int = 0, now: float | None = None) -> None:
        """The worker has been heard."""
        self.beat_at = time.monotonic() if now is None else now
        self.peak_bytes = max(self.peak_bytes, rss_bytes)

    def check(self, pid: int, now: float | None = None) -> StageError | None:
        """The limit that the work has broken, as its error, or None.

        Example:
            >>> work = Work(step_id="s", run_id="r", name="fit", implementation="m:f", spec=b"{}", wall_time_s=2.0)
            >>> str(Watch(work, 60.0, started_at=100.0).check(0, now=103.0))
            'step fit ran longer than its limit of 2.0 s (limits.wall_time)'
        """
        moment = time.monotonic() if now is None else now
        name, wall_time_s = self.work.name, self.work.wall_time_s
        if wall_time_s is not None and moment - self.started_at > wall_time_s:
            return StepTimeoutError(
                f"step {name} ran longer than its limit of {format_duration(wall_time_s)} (limits.wall_time)",
                hint="raise limits.wall_time, or make the step shorter; its last checkpoint is kept",
                details={"wall_time_s": wall_time_s, "log": self.work.log_path},
            )
        if moment - self.beat_at > self.heartbeat_timeout_s:
            return StepTimeoutError(
                f"step {name} hangs: its interpreter has not answered for {format_duration(self.heartbeat_timeout_s)}",
                hint="native code holds Python's lock; see the log, or raise the setting heartbeat_timeout_s",
                details={"heartbeat_timeout_s": self.heartbeat_timeout_s, "log": self.work.log_path},
            )
        return self._check_memory(pid)

    def memory_error(self, cause: str) -> StepMemoryError:
        """The error of a work that had too little memory, with its peak and its limit."""
        limit = self.work.memory_limit_bytes
        rule = "no limits.memory was set" if limit is None else f"its limit is {format_size(limit)} (limits.memory)"
        return StepMemoryError(
            f"step {self.work.name} {cause}: it reached {format_size(self.peak_bytes)}; {rule}",
            details={"peak_bytes": self.peak_bytes, "limit_bytes": limit, "log": self.work.log_path},
        )

    def _check_memory(self, pid: int) -> StepMemoryError | None:
        limit = self.work.memory_limit_bytes
        if limit is None:
            return None
        tree = [pid, *children_of(pid)]
        used = memory_of(tree)
        if used > limit and len(tree) > 1:
            used = shared_memory_of(tree) or used
        self.peak_bytes = max(self.peak_bytes, used)
        return self.memory_error("used too much memory") if used > limit else None


class MemoryCgroup:
    """A control group with a hard memory limit for one worker; the kernel kills what goes past it.

    Args:
        folder: The group's folder; it exists.
        version: 1 or 2.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self.folder, self.version = folder, version

    @classmethod
    def create(cls, parent: Path, name: str, limit_bytes: int) -> MemoryCgroup | None:
        """A new group below a delegated one, or None when the kernel or the rights do not allow it."""
        version = 2 if (parent / "cgroup.controllers").exists() else 1
        folder = parent / name
        try:
            folder.mkdir()
        except OSError:
            return None
        group = cls(folder, version)
        try:
            if version == 2:
                (folder / "memory.max").write_text(str(limit_bytes))
                (folder / "memory.oom.group").write_text("1")
            else:
                (folder / "memory.limit_in_bytes").write_text(str(limit_bytes))
        except OSError:  # the memory controller is not handed down
            group.remove()
            return None
        return group

    def add(self, pid: int) -> bool:
        """Put a process, and all that it will start, into the group."""
        try:
            (self.folder / "cgroup.procs").write_text(str(pid))
        except OSError:
            return False
        return True

    def kills(self) -> int:
        """How many processes of the group the kernel has killed for lack of memory."""
        return _named_number(self.folder / ("memory.events" if self.version == 2 else "memory.oom_control"), "oom_kill")

    def remove(self) -> None:
        """Remove the empty group; one that still has processes stays."""
        try:
            self.folder.rmdir()
        except OSError:
            return


def delegated_cgroup() -> Path | None:
    """The group of this process, if systemd has handed it over (cgroup v2, `Delegate=yes`), else None.

    A group that was not handed over is somebody else's: to make groups in it, even as root, would break
    the rule of the single writer (systemd, "Control Group APIs and Delegation").

    Example:
        >>> delegated_cgroup() is None or delegated_cgroup().is_dir()
        True
    """
    folder = _own_cgroup()
    if folder is None or not hasattr(os, "listxattr"):
        return None
    try:
        is_ours = any(name in _DELEGATED for name in os.listxattr(folder)) and os.access(folder, os.W_OK)
    except OSError:
        return None
    return folder if is_ours else None


def _own_cgroup() -> Path | None:
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    path = next((line[3:] for line in lines if line.startswith("0::")), None)
    folder = None if path is None else _CGROUPS / path.lstrip("/")
    return folder if folder is not None and (folder / "cgroup.controllers").exists() else None


def _free_memory() -> int:
    available = _named_number(Path("/proc/meminfo"), "MemAvailable:") * 1024
    return available or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _own_limit() -> int:
    folder = _own_cgroup()
    try:
        return int((folder / "memory.max").read_text()) if folder is not None else sys.maxsize
    except (OSError, ValueError):  # the root group has no such file; "max" is no limit
        return sys.maxsize


def _named_number(path: Path, name: str) -> int:
    """The number after a name in a file of `name number` lines; 0 when it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(words[1]) for line in lines if len(words := line.split()) > 1 and words[0] == name), 0)
