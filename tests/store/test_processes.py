"""Several processes on the same records, on both databases, and processes that are killed with kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from millrace.core.types import Lease, Run, Step
from millrace.security.chain import verify
from millrace.store.blobs_local import LocalBlobs
from millrace.testing.postgres import STORES, open_place, shared_server

PRELUDE = """
import sys
from pathlib import Path
import msgspec
from millrace.core.types import Event, Lease, MetricPoint, Run, Step
from millrace.store.blobs_local import LocalBlobs
from millrace.testing.postgres import open_place
place, name = sys.argv[1:]
records = open_place(place)
"""
WRITER = """
for number in range(25):
    with records.transaction() as transaction:
        transaction.put(Step(id=f"{name}-{number}", run_id=name, name="n", stage="n"), expect_version=0)
        transaction.append(Event(at=1.0, actor=name, verb="step", subject=f"run:{name}"))
        counter = transaction.get(Lease, "counter") or Lease(id="counter")
        transaction.put(msgspec.structs.replace(counter, token=counter.token + 1), counter.version)
    records.seal()
    records.append_metrics([MetricPoint(name, "loss", number, 1.0, 0.0)])
records.close()
"""
ENDLESS_WRITER = """
number = 0
while True:
    with records.transaction() as transaction:
        transaction.put(Step(id=f"{number:06}", run_id="r", name="n", stage="n"), expect_version=0)
        transaction.append(Event(at=1.0, actor="a", verb="step", subject="run:r"))
    print(number, flush=True)
    number += 1
    if number % 5 == 0:
        records.seal()
"""
ENDLESS_BLOBS = """
import os
blobs = LocalBlobs(Path(place).parent / "blobs")
number = 0
while True:
    print(blobs.put(os.urandom(200_000)).digest, flush=True)
"""
LOGS_AND_HANGS = """
import time
records.append_metrics([MetricPoint("r", "loss", number, 1.0, 0.0) for number in range(1000)])
time.sleep(1.0)
print("logged", flush=True)
time.sleep(600)
"""
LOGS_AND_EXITS = """
records.append_metrics([MetricPoint("r", "loss", number, 1.0, 0.0) for number in range(1000)])
"""


EMPTY = {**STORES, "postgres": lambda _: shared_server().create_database()}  # not even a schema


@pytest.fixture(params=STORES)
def place(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return STORES[request.param](tmp_path)


def start(place: str, program: str, name: str = "w") -> subprocess.Popen[str]:
    """Run a program on records."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + program, place, name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_after(process: subprocess.Popen[str], lines: int) -> list[str]:
    """What a process acknowledged until it was killed, at least `lines`."""
    assert process.stdout is not None
    with process:
        seen = [process.stdout.readline().strip() for _ in range(lines)]
        os.kill(process.pid, signal.SIGKILL)
        rest = process.stdout.read()  # communicate() would lose what readline() has buffered
    assert process.returncode == -signal.SIGKILL
    return [line for line in (*seen, *rest.splitlines()) if line]


@pytest.mark.parametrize("store", EMPTY)
def test_four_processes_create_and_write_one_home(tmp_path: Path, store: str) -> None:
    """The home does not exist before: they also race to create it."""
    place = EMPTY[store](tmp_path)
    processes = [start(place, WRITER, f"p{number}") for number in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    records = open_place(place)
    assert len(records.find(Step)) == 100
    counter = records.get(Lease, "counter")
    assert counter is not None
    assert (counter.token, counter.version) == (100, 100)
    records.seal()
    assert [event.seq for event in records.events()] == list(range(1, 101))
    assert verify(records.links(), head=records.head()).broken is None
    for number in range(4):
        assert [point.step for point in records.metrics(f"p{number}")] == list(range(25))
    records.close()


@pytest.mark.parametrize("store", STORES)
def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path, store: str) -> None:
    for round in range(3):
        place = STORES[store](tmp_path / str(round))
        acknowledged = killed_after(start(place, ENDLESS_WRITER), lines=8 + 7 * round)
        records = open_place(place)
        found = [step.id for step in records.find(Step, order="id")]
        assert found == [f"{number:06}" for number in range(len(found))]
        assert len(acknowledged) <= len(found) <= len(acknowledged) + 1  # at most the one in flight more
        records.seal()
        assert len(records.events()) == len(found)  # a step and its event are one
        assert verify(records.links(), head=records.head()).broken is None
        records.put(Run(id="r"))  # no lock was left
        records.close()


def test_a_killed_blob_writer_leaves_whole_blobs_only(tmp_path: Path) -> None:
    acknowledged = killed_after(start(str(tmp_path / "records.db"), ENDLESS_BLOBS), lines=10)
    from_disk = LocalBlobs(tmp_path / "blobs")
    found = [artifact.digest for artifact in from_disk.list()]
    assert set(acknowledged) <= set(found)
    assert len(found) <= len(acknowledged) + 1
    for digest in found:
        assert len(from_disk.read(digest)) == 200_000


def test_points_older_than_a_second_survive_a_kill(place: str) -> None:
    killed_after(start(place, LOGS_AND_HANGS), lines=1)
    records = open_place(place)
    assert [point.step for point in records.metrics("r")] == list(range(1000))
    records.close()


def test_no_point_is_lost_by_an_exit_without_close(place: str) -> None:
    process = start(place, LOGS_AND_EXITS)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    records = open_place(place)
    assert len(records.metrics("r")) == 1000
    records.close()


def test_a_forked_child_does_not_write_the_parents_points(place: str) -> None:
    program = LOGS_AND_EXITS + "\nimport os\nif os.fork() == 0:\n    records.close()\n    os._exit(0)\nos.wait()\n"
    process = start(place, program)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    records = open_place(place)
    assert len(records.metrics("r")) == 1000
    records.close()


def test_a_forked_child_is_told_to_open_them_again(place: str) -> None:
    program = """
import os
from millrace.core.errors import UnavailableError
records.put(Run(id="parent"))
if os.fork() == 0:
    for call in (lambda: records.get(Run, "parent"), lambda: records.put(Run(id="child"))):
        try:
            call()
        except UnavailableError as error:
            assert "forked" in error.message
        else:
            os._exit(1)
    own = open_place(place)
    own.put(Run(id="own"))
    own.close()
    os._exit(0)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
records.put(Run(id="still"))
"""
    process = start(place, program)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    records = open_place(place)
    assert [run.id for run in records.find(Run)] == ["parent", "own", "still"]
    records.close()
