"""Limits: each is noticed when it is broken, not before, and says its rule and what was found."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.compute import limits
from millrace.compute.limits import MemoryCgroup, Watch, machine_capacity, thread_environment
from millrace.compute.processes import (
    children_of,
    host_id,
    kill_session,
    memory_of,
    send_signal,
    session_members,
    shared_memory_of,
    start_time,
)
from millrace.core.errors import StepMemoryError, StepTimeoutError
from millrace.core.ports import Work

MB = 1_000_000


def work(**fields: object) -> Work:
    return Work(step_id="1", run_id="r", name="fit", implementation="m:f", spec=b"{}", log_path="fit.log", **fields)


@given(st.floats(0.01, 1e6), st.floats(0, 2e6))
def test_wall_time_is_exact(wall_time_s: float, elapsed_s: float) -> None:
    watch = Watch(work(wall_time_s=wall_time_s), 1e9, started_at=0.0)
    error = watch.check(os.getpid(), now=elapsed_s)
    assert isinstance(error, StepTimeoutError) == (elapsed_s > wall_time_s)


def test_silence_is_a_hang_until_the_next_beat() -> None:
    watch = Watch(work(), 60.0, started_at=100.0)
    assert watch.check(0, now=159.0) is None
    watch.beat(5, now=159.0)
    assert watch.check(0, now=218.0) is None
    error = watch.check(0, now=220.0)
    assert isinstance(error, StepTimeoutError)
    assert "has not answered for 1 min 0 s" in error.message
    assert error.details["log"] == "fit.log"


def test_memory_of_the_tree_counts() -> None:
    code = "import sys\nheld = bytearray(b'x' * 60_000_000)\nprint('ready', flush=True)\nsys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        assert children_of(os.getpid()).count(child.pid) == 1
        alone = memory_of([child.pid])
        assert 60 * MB < alone < 120 * MB
        ours = shared_memory_of([os.getpid(), *children_of(os.getpid())])
        enough = Watch(work(memory_limit_bytes=ours + 50 * MB), 60.0)
        assert enough.check(os.getpid()) is None
        little = Watch(work(memory_limit_bytes=ours - 50 * MB), 60.0)
        error = little.check(os.getpid())
        assert isinstance(error, StepMemoryError)
        assert error.details["limit_bytes"] == ours - 50 * MB
        assert error.details["peak_bytes"] == little.peak_bytes > ours - 50 * MB
    finally:
        child.communicate(b"")


def test_mapped_files_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "cache.npy"
    path.write_bytes(b"x" * 64 * MB)
    before = memory_of([os.getpid()])
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        touched = sum(view[place] for place in range(0, len(view), 4096))
        assert touched > 0
        assert memory_of([os.getpid()]) - before < 32 * MB


def test_capacity_and_threads() -> None:
    capacity = machine_capacity()
    assert capacity.cpus == len(os.sched_getaffinity(0))
    assert 0 < capacity.memory_bytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + 1
    assert set(thread_environment(3).values()) == {"3"}


def as_cgroup(folder: Path, version: int) -> Path:
    """A folder with the files that the kernel would give (the kernel's part cannot be had without rights)."""
    folder.mkdir()
    if version == 2:
        (folder / "cgroup.controllers").write_text("memory")
    return folder


@pytest.mark.parametrize(
    ("version", "limit_file", "event_file"),
    [(2, "memory.max", "memory.events"), (1, "memory.limit_in_bytes", "memory.oom_control")],
)
def test_a_cgroup_is_limited_and_its_kills_are_read(
    tmp_path: Path, version: int, limit_file: str, event_file: str
) -> None:
    group = MemoryCgroup.create(as_cgroup(tmp_path / "own", version), "millrace-7", 123 * MB)
    assert group is not None
    assert group.version == version
    assert (group.folder / limit_file).read_text() == str(123 * MB)
    assert group.add(4711)
    assert (group.folder / "cgroup.procs").read_text() == "4711"
    assert group.kills() == 0
    (group.folder / event_file).write_text("oom 3\noom_kill 2\n")
    assert group.kills() == 2
    group.remove()
    assert group.folder.exists(), "a group with something in it stays"


def test_no_cgroup_where_none_can_be_made(tmp_path: Path) -> None:
    assert MemoryCgroup.create(tmp_path / "absent", "millrace-7", MB) is None
    own = as_cgroup(tmp_path / "own", 1)
    (own / "millrace-7").mkdir()
    assert MemoryCgroup.create(own, "millrace-7", MB) is None, "it is somebody else's"


def test_a_group_that_was_not_delegated_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = as_cgroup(tmp_path / "own", 2)
    monkeypatch.setattr(limits, "_own_cgroup", lambda: own)
    assert limits.delegated_cgroup() is None
    monkeypatch.setattr(os, "listxattr", lambda path: ["user.delegate"])
    assert limits.delegated_cgroup() == own


def test_processes_are_who_they_were() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    started = start_time(child.pid)
    assert started.isdigit()
    assert int(started) >= int(start_time(os.getpid()))
    assert session_members(child.pid) == [child.pid]
    assert send_signal(child.pid, "1", 9) is False, "another process with this id"
    kill_session(child.pid, "1")
    assert start_time(child.pid) == started
    kill_session(child.pid, started)
    assert child.wait() == -9
    assert start_time(child.pid) == ""
    kill_session(child.pid, started)
    assert "/pid:[" in host_id()
    assert child.stdin is not None
    child.stdin.close()
