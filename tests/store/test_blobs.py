"""LocalBlobs: the conformance suite and what is the disk's own."""

from __future__ import annotations

import os
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
