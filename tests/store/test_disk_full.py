"""A disk that is really full: a small tmpfs. Clear errors, nothing half-written, goes on after."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from millrace.core.clock import FakeClock
from millrace.core.errors import DiskFullError
from millrace.core.types import Event, MetricPoint, Run, Step
from millrace.security.chain import verify
from millrace.store.blobs_local import LocalBlobs
from millrace.store.leases import acquire, renew
from millrace.store.metric_buffer import FLUSH_EVERY_S
from millrace.store.records_sql import open_records

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root"),
]


@pytest.fixture
def disk(tmp_path: Path):
    """A disk of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount: {done.stderr}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, leave_bytes: int = 0) -> Path:
    """Fill the disk up to `leave_bytes`."""
    filler = disk / "filler"
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler.write_bytes(b"x" * (free - leave_bytes))
    return filler


def files(folder: Path) -> set[str]:
    """Every file below a folder."""
    return {str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file()}


def test_a_blob_write(disk: Path, tmp_path: Path) -> None:
    blobs = LocalBlobs(disk / "blobs")
    kept = blobs.put(b"kept")
    filler = fill(disk, leave_bytes=100_000)
    before = files(disk)
    big = tmp_path / "big"
    big.write_bytes(os.urandom(300_000))
    for source in (big.read_bytes(), big):
        with pytest.raises(DiskFullError, match="disk is full"):
            blobs.put(source)
        assert files(disk) == before
    assert blobs.read(kept.digest) == b"kept"
    filler.unlink()
    assert blobs.read(blobs.put(big).digest) == big.read_bytes()


def test_a_tree(disk: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / str(number)).write_bytes(os.urandom(100_000))
    stored = LocalBlobs(tmp_path / "blobs")
    tree = stored.put_tree(tmp_path / "in")
    filler = fill(disk, leave_bytes=250_000)
    with pytest.raises(DiskFullError):
        stored.materialize(tree.digest, disk / "out")
    assert files(disk) == {"filler"}
    filler.unlink()
    assert len(files(stored.materialize(tree.digest, disk / "out"))) == 4


def test_a_journal_commit(disk: Path) -> None:
    records = open_records(disk / "records.db")
    for number in range(3):
        records.put(Step(id=f"kept{number}", run_id="r", name="n", stage="n"))
    filler = fill(disk, leave_bytes=60_000)
    written = 0

    def write_until_full() -> None:
        nonlocal written
        while True:
            with records.transaction() as transaction:
                transaction.put(Run(id=f"{written:03}", spec_text="x" * 5000), expect_version=0)
                transaction.append(Event(at=1.0, actor="a", verb="run", subject="run:1"))
            written += 1

    with pytest.raises(DiskFullError, match="disk is full"):
        write_until_full()
    assert 0 < written < 30
    assert len(records.find(Run)) == written  # what was acknowledged, readable while the disk is full
    filler.unlink()
    assert records.put(Run(id=f"{written:03}"), expect_version=0).version == 1
    records.seal()
    assert len(records.events()) == written
    assert verify(records.links(), head=records.head()).broken is None
    records.close()
    again = open_records(disk / "records.db")
    assert (len(again.find(Run)), len(again.find(Step))) == (written + 1, 3)
    assert again.read(lambda db: db.execute("PRAGMA integrity_check").fetchone()) == ("ok",)
    again.close()


def test_metric_points_wait_for_space(disk: Path) -> None:
    records = open_records(disk / "records.db")
    filler = fill(disk)
    points = [MetricPoint("r", "loss", number, 1.0, 0.0) for number in range(2000)]
    records.append_metrics(points)
    with pytest.raises(DiskFullError):
        records.metrics("r")

    def log_until_refused() -> None:
        while True:
            records.append_metrics([MetricPoint("other", "loss", 0, 1.0, 0.0)])
            threading.Event().wait(0.02)

    with pytest.raises(DiskFullError):  # whoever logs is told, not only a thread
        log_until_refused()
    filler.unlink()
    assert records.metrics("r") == points
    threading.Event().wait(2 * FLUSH_EVERY_S)
    records.append_metrics([MetricPoint("r", "loss", 2000, 1.0, 0.0)])  # and not told for ever
    assert len(records.metrics("r")) == 2001
    records.close()


def test_creating_a_home(disk: Path) -> None:
    filler = fill(disk, leave_bytes=30_000)
    with pytest.raises(DiskFullError):
        open_records(disk / "records.db")
    assert files(disk) - {"filler", "records.lock"} == set()
    filler.unlink()
    records = open_records(disk / "records.db")
    assert records.put(Run(id="r")).version == 1
    records.close()


def test_a_lease_is_kept_over_a_full_disk(disk: Path) -> None:
    records, clock = open_records(disk / "records.db"), FakeClock()
    lease = acquire(records, "run/1", clock, 10.0)
    assert lease is not None
    filler = fill(disk)

    def renew_until_full() -> None:
        while renew(records, lease, clock, 10.0) is not None:
            clock.sleep(1.0)

    with pytest.raises(DiskFullError):
        renew_until_full()
    filler.unlink()
    assert renew(records, lease, clock, 10.0) is not None
    records.close()
