"""Clean-up: a worker is killed only when it is proven to be one, and to be driven by nobody."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from millrace.compute.orphans import WorkerNote, clean_orphans, note_worker
from millrace.compute.processes import host_id, start_time

MARK = "MILLRACE_FORK_SERVER=test-mark"


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a session, as a worker does."""
    name, _, value = MARK.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True,
        env={**os.environ, name: value},
    )  # fmt: skip
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def write(home: Path, pid: int, **changes: object) -> Path:
    """The note of a worker whose driver has died."""
    fields = {
        "host": host_id(), "pid": pid, "started": start_time(pid), "driver": 2**22 + 1, "driver_started": "7",
        "mark": MARK, **changes,
    }  # fmt: skip
    path = home / "scratch" / "workers" / f"{pid}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode(WorkerNote(**fields)))
    return path


def test_an_orphan_is_killed(tmp_path: Path, worker: subprocess.Popen[bytes]) -> None:
    note = write(tmp_path, worker.pid)
    assert clean_orphans(tmp_path) == [worker.pid]
    assert worker.wait() == -9
    assert not note.exists()
    assert clean_orphans(tmp_path) == []


def test_a_worker_of_this_driver_is_kept(tmp_path: Path, worker: subprocess.Popen[bytes]) -> None:
    note = note_worker(tmp_path, worker.pid, MARK, "step")
    assert clean_orphans(tmp_path) == []
    assert worker.poll() is None
    assert msgspec.json.decode(note.read_bytes(), type=WorkerNote).driver == os.getpid()


@pytest.mark.parametrize(
    ("changes", "is_kept"),
    [
        ({"started": "1"}, False),  # the id is another process's now
        ({"driver": os.getpid(), "driver_started": start_time(os.getpid())}, True),
        ({"host": "another-boot/pid:[1]"}, False),
        ({"host": host_id().partition("/")[0] + "/pid:[1]"}, True),  # a container on this machine
        ({"driver_started": ""}, True),  # a system that does not say
    ],
)
def test_what_is_not_proven_is_not_killed(
    tmp_path: Path, worker: subprocess.Popen[bytes], changes: dict[str, object], is_kept: bool
) -> None:
    note = write(tmp_path, worker.pid, **changes)
    assert clean_orphans(tmp_path) == []
    assert worker.poll() is None
    assert note.exists() == is_kept


def test_a_driver_whose_id_was_used_again_is_gone(tmp_path: Path, worker: subprocess.Popen[bytes]) -> None:
    write(tmp_path, worker.pid, driver=os.getpid(), driver_started="1")
    assert clean_orphans(tmp_path) == [worker.pid]


@pytest.mark.parametrize("data", [b"", b"{", b'{"pid": 1}', b"[]", b"\xff\xfe"])
def test_a_note_that_is_none_proves_nothing(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "scratch" / "workers" / "1.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    assert clean_orphans(tmp_path) == []
    assert not path.exists()


@pytest.mark.parametrize("is_marked", [True, False])
def test_what_a_dead_worker_left_is_killed_if_it_is_marked(tmp_path: Path, is_marked: bool) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
    )
    name, _, value = MARK.partition("=")
    leader = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True,
        env={**os.environ, name: value if is_marked else "another"},
    )  # fmt: skip
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    leader.stdout.close()
    leader.wait()
    write(tmp_path, leader.pid, started="7")
    try:
        assert clean_orphans(tmp_path) == ([child] if is_marked else [])
    finally:
        if not is_marked:
            assert start_time(child) != ""
            os.kill(child, 9)
