"""Several processes on one home, and processes that are killed with kill -9."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from millrace.core.types import Lease, Run, Step
from millrace.security.chain import verify
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import open_records

PRELUDE = """
import sys
from pathlib import Path
import msgspec
from millrace.core.types import Event, Lease, MetricPoint, Run, Step
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import open_records
home, name = Path(sys.argv[1]), sys.argv[2]
records = open_records(home / "records.db")
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
blobs = LocalBlobs(home / "blobs")
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


def start(home: Path, program: str, name: str = "w") -> subprocess.Popen[str]:
    """Run a program on a home."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + program, str(home), name],
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


def test_four_processes_create_and_write_one_home(tmp_path: Path) -> None:
    """The home does not exist before: they also race to create it."""
    processes = [start(tmp_path, WRITER, f"p{number}") for number in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    records = open_records(tmp_path / "records.db")
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


def test_nothing_acknowledged_is_lost_by_a_kill(tmp_path: Path) -> None:
    for round in range(3):
        home = tmp_path / str(round)
        acknowledged = killed_after(start(home, ENDLESS_WRITER), lines=8 + 7 * round)
        records = open_records(home / "records.db")
        found = [step.id for step in records.find(Step, order="id")]
        assert found == [f"{number:06}" for number in range(len(found))]
        assert len(acknowledged) <= len(found) <= len(acknowledged) + 1  # at most the one in flight more
        records.seal()
        assert len(records.events()) == len(found)  # a step and its event are one
        assert verify(records.links(), head=records.head()).broken is None
        records.put(Run(id="r"))  # no lock was left
        records.close()


def test_a_killed_blob_writer_leaves_whole_blobs_only(tmp_path: Path) -> None:
    acknowledged = killed_after(start(tmp_path, ENDLESS_BLOBS), lines=10)
    from_disk = LocalBlobs(tmp_path / "blobs")
    found = [artifact.digest for artifact in from_disk.list()]
    assert set(acknowledged) <= set(found)
    assert len(found) <= len(acknowledged) + 1
    for digest in found:
        assert len(from_disk.read(digest)) == 200_000


def test_points_older_than_a_second_survive_a_kill(tmp_path: Path) -> None:
    killed_after(start(tmp_path, LOGS_AND_HANGS), lines=1)
    records = open_records(tmp_path / "records.db")
    assert [point.step for point in records.metrics("r")] == list(range(1000))
    records.close()


def test_no_point_is_lost_by_an_exit_without_close(tmp_path: Path) -> None:
    process = start(tmp_path, LOGS_AND_EXITS)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    records = open_records(tmp_path / "records.db")
    assert len(records.metrics("r")) == 1000
    records.close()


def test_a_forked_child_does_not_write_the_parents_points(tmp_path: Path) -> None:
    program = LOGS_AND_EXITS + "\nimport os\nif os.fork() == 0:\n    records.close()\n    os._exit(0)\nos.wait()\n"
    process = start(tmp_path, program)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    records = open_records(tmp_path / "records.db")
    assert len(records.metrics("r")) == 1000
    records.close()
