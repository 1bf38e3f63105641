"""Backups: bytes that an incremental one reads and writes, and how fast a restore is against a plain copy.

.venv/bin/python benchmarks/backup.py [RUNS [MEGABYTES [FOLDER]]]

A home of RUNS runs (20,000), each with a spec of 0.5 kB, a step, 5 parameters, 5 tags and 20 points, and MEGABYTES
(2,000) of blobs of 1 to 16 MB: the proportions of 100,000 runs with 10 GB. Then 1 % of it changes: new runs with
their blobs. Bytes are those that the process asked the kernel for (`/proc/self/io`: rchar, wchar), each backup in a
process of its own, against the bytes of the home. Aim: at most 2 % each.

The restore is compared, in the same run and on the same disk, with `cp -r` of the home's files and a sync. Aim: 0.5
of its speed. One warm round of both, then three of each by turns; the medians count.
"""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from millrace.control.backup_checking import check_backup, chosen
from millrace.control.backup_making import Options, make_backup
from millrace.control.backup_restoring import Target, restore_backup
from millrace.control.backup_seal import BackupKey
from millrace.core.clock import SystemClock
from millrace.core.ids import new_id
from millrace.core.types import Artifact, ArtifactFile, Event, MetricPoint, Run, Step
from millrace.store.backup_place import FolderPlace
from millrace.store.backup_vault import Vault
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import open_records
from millrace.wiring import open_services

SPEC = "train:\n  epochs: 5\n" * 28
POINTS = 20
BATCH = 500
ROUNDS = 3


def fill(home: Path, runs: int, size_bytes: int, seed: int) -> None:
    """Add runs and blobs."""
    chance = random.Random(seed)
    services = open_services(str(home))
    artifacts: list[Artifact] = []
    while size_bytes > 0:
        size = min(chance.randrange(1 << 20, 16 << 20), size_bytes)
        artifacts.append(services.blobs.put(os.urandom(size)))
        size_bytes -= size
    for first in range(0, runs, BATCH):
        with services.records.transaction() as transaction:
            for number in range(first, min(first + BATCH, runs)):
                run = Run(id=new_id(), name=f"run {number}", state="succeeded", spec_text=SPEC, started_at=1.0)
                transaction.put(run, expect_version=0)
                transaction.put(Step(id=f"{run.id}/train", run_id=run.id, name="train", stage="train"))
                transaction.append(Event(at=1.0, actor="u", verb="run.submit", subject=f"run:{run.id}"))
                transaction.log(
                    run.id,
                    points=[MetricPoint(run.id, "loss", step, chance.random(), float(step)) for step in range(POINTS)],
                    params={f"param{one}": str(chance.random()) for one in range(5)},
                    tags={f"tag{one}": "team" for one in range(5)},
                )
                if number < len(artifacts):
                    file = ArtifactFile(id=f"{run.id}/w", owner=run.id, path="w", artifact=artifacts[number])
                    transaction.put(file)
    services.close()


def size_of(folder: Path) -> int:
    """Bytes of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def vault(to: Path, key: str) -> Vault:
    """The destination."""
    return Vault(FolderPlace(to), BackupKey(bytes(32)) if key else None)


def io_bytes() -> tuple[int, int]:
    """Bytes that this process has read and written."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def back_up_here(home: Path, to: Path, key: str) -> None:
    """One backup; prints the bytes read and written, and the seconds."""
    services = open_services(str(home))
    _ = services.records.find(Run, limit=1)
    read, written = io_bytes()
    began = time.perf_counter()
    make_backup(services, vault(to, key), Options())
    took = time.perf_counter() - began
    after = io_bytes()
    services.close()
    print(after[0] - read, after[1] - written, took)


def back_up(home: Path, to: Path, key: str) -> tuple[int, int, float]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--back-up", str(home), str(to), key]
    read, written, took = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return int(read), int(written), float(took)


def restore(to: Path, new: Path, key: str) -> float:
    """Seconds of a restore, until all of it is on the disk."""
    began = time.perf_counter()
    target = Target(new, lambda: open_records(new / "records.db"), LocalBlobs(new / "blobs"))
    source = vault(to, key)
    restore_backup(source, source.manifest(chosen(source, None))[0], target, SystemClock())
    os.sync()
    return time.perf_counter() - began


def copy(home: Path, new: Path) -> float:
    """Seconds of a plain copy, until all of it is on the disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(home), str(new)], check=True)
    os.sync()
    return time.perf_counter() - began


def measure(folder: Path, home: Path, key: str, runs: int, size_bytes: int, seed: int) -> None:
    """One destination, plain or encrypted."""
    to, new = folder / f"to-{key or 'plain'}", folder / "new"
    name = "encrypted" if key else "plain"
    whole = size_of(home / "blobs") + (home / "records.db").stat().st_size
    read, written, took = back_up(home, to, key)
    print(f"{name}: first backup: read {read / whole:.3f}, written {written / whole:.3f} of the home, {took:.1f} s")
    fill(home, runs // 100, size_bytes // 100, seed)
    read, written, took = back_up(home, to, key)
    print(f"{name}: 1 % changed: read {read / whole:.4f}, written {written / whole:.4f} of the home, {took:.1f} s")
    copies, restores = [], []
    for number in range(ROUNDS + 1):
        seconds = copy(home, new)
        shutil.rmtree(new)
        again = restore(to, new, key)
        shutil.rmtree(new)
        if number:
            copies.append(seconds)
            restores.append(again)
    copied, restored = statistics.median(copies), statistics.median(restores)
    print(f"{name}: cp -r {copied:.2f} s, restore {restored:.2f} s: {copied / restored:.2f} of a plain copy's speed")
    began = time.perf_counter()
    source, services = vault(to, key), open_services(str(home))
    checked = check_backup(source, chosen(source, None), services.signer)
    services.close()
    took = time.perf_counter() - began
    print(f"{name}: verify {took:.1f} s, {len(checked.problems)} problems in {checked.objects} objects")


def main() -> None:
    """Build a home and measure."""
    if sys.argv[1:2] == ["--back-up"]:
        back_up_here(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
        return
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 20_000
    size_bytes = int(sys.argv[2] if len(sys.argv) > 2 else 2000) * 1_000_000
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as name:
        folder = Path(name)
        fill(folder / "home", runs, size_bytes, seed=0)
        records = (folder / "home/records.db").stat().st_size
        print(f"home: {runs} runs, records {records / 1e6:.0f} MB, blobs {size_of(folder / 'home/blobs') / 1e6:.0f} MB")
        measure(folder, folder / "home", "", runs, size_bytes, seed=1)
        measure(folder, folder / "home", "key", runs, size_bytes, seed=2)


if __name__ == "__main__":
    main()
