"""LocalBlobs: the conformance suite and what is the disk's own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from millrace.core.errors import UnavailableError
from millrace.core.ports import Blobs
from millrace.store import blobs_local, trees
from millrace.store.blobs_local import LocalBlobs
from millrace.testing.blobs import FILES, BlobsConformance, contents, make_folder


def flip_a_bit(file: Path) -> None:
    """What a failing disk does; the time of the last change moves as a later write would move it."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.chmod(0o644)
    file.write_bytes(data)
    file.chmod(0o444)
    os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))


class TestLocalBlobs(BlobsConformance):
    """The suite that every implementation passes."""

    def open(self, place: Path) -> LocalBlobs:
        return LocalBlobs(place)

    def damage(self, blobs: Blobs, digest: str) -> None:
        assert isinstance(blobs, LocalBlobs)
        flip_a_bit(blobs._place(digest))


def test_the_place_on_disk(tmp_path: Path) -> None:
    digest = LocalBlobs(tmp_path).put(b"").digest
    assert (tmp_path / "sha256/e3" / digest[9:]).is_file()
    assert list((tmp_path / "temp").iterdir()) == []


def test_a_second_path_does_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = LocalBlobs(tmp_path)
    digest = blobs.put(b"abc").digest
    blobs.path(digest)

    def refuse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(blobs_local, "_hash", refuse)
    blobs.path(digest)
    with pytest.raises(AssertionError, match="read again"):
        LocalBlobs(tmp_path).path(digest)


def test_a_stream_that_fails_leaves_nothing(tmp_path: Path) -> None:
    class Failing:
        def __init__(self) -> None:
            self.left = 3

        def read(self, size: int) -> bytes:
            self.left -= 1
            if not self.left:
                raise ZeroDivisionError
            return b"x" * size

    blobs = LocalBlobs(tmp_path)
    with pytest.raises(ZeroDivisionError):
        blobs.put(Failing())  # type: ignore[arg-type]
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


def test_what_a_killed_process_left_is_removed_when_old(tmp_path: Path) -> None:
    LocalBlobs(tmp_path)
    old, young = tmp_path / "temp/old", tmp_path / "temp/young"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (0, time.time() - 2 * blobs_local.STALE_TEMP_S))
    LocalBlobs(tmp_path)
    assert (old.exists(), young.exists()) == (False, True)


def test_files_are_hard_links_and_copies_where_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = LocalBlobs(tmp_path / "store")
    tree = blobs.put_tree(make_folder(tmp_path / "in"))
    linked = blobs.materialize(tree.digest, tmp_path / "linked")
    assert (linked / "a.txt").stat().st_nlink == 2

    def no_links(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(trees.os, "link", no_links)
    copied = blobs.materialize(tree.digest, tmp_path / "copied")
    assert contents(copied) == FILES
    assert (copied / "a.txt").stat().st_nlink == 1
    assert (copied / "a.txt").stat().st_mode & 0o777 == 0o444
    assert blobs.materialize(tree.digest, copied) == copied


def test_a_quicker_process_wins_quietly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process makes the folder between the first look and the rename."""
    blobs = LocalBlobs(tmp_path / "store")
    tree = blobs.put_tree(make_folder(tmp_path / "in"))
    out, rename = tmp_path / "out", os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(trees.os, "rename", rename)
        LocalBlobs(tmp_path / "store").materialize(tree.digest, out)
        rename(source, target)

    monkeypatch.setattr(trees.os, "rename", late)
    assert contents(blobs.materialize(tree.digest, out)) == FILES
    assert sorted(one.name for one in tmp_path.iterdir()) == ["in", "out", "store"]


def test_a_disk_that_fails_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = LocalBlobs(tmp_path)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(blobs_local.os, "fsync", fail)
    with pytest.raises(UnavailableError, match="Input/output error"):
        blobs.put(b"x")
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


WRITER = """
import sys
from pathlib import Path
from millrace.core.types import Run
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import open_records

home, parts = map(Path, sys.argv[1:])
records, blobs = open_records(home / "records.db"), LocalBlobs(home / "blobs")
(home / "begin").open("w")
artifact = blobs.put_tree(parts)
with records.transaction() as transaction:
    transaction.put(Run(id="a" * 32, project="p", tags={"dataset": artifact.digest}), expect_version=0)
(home / "end").open("w")
"""
CALLS = "fsync,fdatasync,rename,renameat,renameat2,openat,write,pwrite64"


def system_calls(tmp_path: Path) -> list[tuple[str, list[str]]]:
    """What a writer of two parts and their record asks of the kernel: (call, paths), in order."""
    tracer = shutil.which("strace")
    if tracer is None:
        pytest.skip("there is no strace here")
    home, parts, log = tmp_path / "home", tmp_path / "parts", tmp_path / "calls"
    for folder in (home, parts):
        folder.mkdir()
    for name in ("a", "b"):
        (parts / f"{name}.parquet").write_bytes(f"rows of {name}".encode())
    command = [tracer, "-f", "-y", "-e", f"trace={CALLS}", "-o", str(log), sys.executable, "-c", WRITER, home, parts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "ptrace" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    text = log.read_text(errors="replace")
    assert "unfinished" not in text
    lines = [line.split(maxsplit=1)[1] for line in text.splitlines() if " = -1 " not in line]
    begin, end = (next(i for i, line in enumerate(lines) if f"{home}/{name}" in line) for name in ("begin", "end"))
    calls = []
    for line in lines[begin + 1 : end]:
        name, _, arguments = line.partition("(")
        # -y shows a descriptor's path as 3</path>; what the writer only reads is of no interest.
        paths = re.findall(rf"[<\"]({re.escape(str(home))}[^>\"]*)[>\"]", arguments)
        if paths and name != "openat":
            calls.append((name, paths))
    return calls


def test_the_order_of_durability(tmp_path: Path) -> None:
    """Each file: written, fsync, rename, fsync of its folder; all of them before the record is written."""
    calls = system_calls(tmp_path)
    files, home = f"{tmp_path}/home/blobs/sha256", f"{tmp_path}/home"
    renames = [(at, paths) for at, (name, paths) in enumerate(calls) if name.startswith("rename")]
    blobs = [place for place in Path(files).rglob("*") if place.is_file()]
    assert len(blobs) == 3, "two parts and their listing"
    assert sorted(target for _, (_, target) in renames) == sorted(map(str, blobs))
    assert len({target for _, (_, target) in renames}) == len(renames)
    durable = []
    for at, (temp, target) in renames:
        about_temp = [(i, name) for i, (name, paths) in enumerate(calls[:at]) if temp in paths]
        assert [name for _, name in about_temp][-2:] == ["write", "fsync"], "nothing is written after its fsync"
        parent = str(Path(target).parent)
        made = [i for i, call in enumerate(calls[:at]) if call == ("fsync", [files])]
        assert made, f"the name of the new folder {parent} is durable before something is in it"
        synced = [i for i, call in enumerate(calls) if i > at and call == ("fsync", [parent])]
        assert synced, "the new name is durable"
        durable.append(synced[0])
    listing = max(renames)[1][1]
    assert b"a.parquet" in Path(listing).read_bytes(), "the parts are durable before what names them"
    writes = [i for i, (name, paths) in enumerate(calls) if name == "pwrite64" and f"{home}/records.db" in paths[0]]
    assert writes, "the record goes into the write-ahead log"
    assert max(durable) < min(writes)
    assert any(name in ("fsync", "fdatasync") and "records.db-wal" in paths[0] for name, paths in calls[max(writes) :])
