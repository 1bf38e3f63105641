"""Conformance suite for the port `Blobs`: subclass it, give `open` and `damage`, run it with pytest.

Example:
    >>> class TestMyBlobs(BlobsConformance):
    ...     def open(self, place):
    ...         return MyBlobs(place)
    ...     def damage(self, blobs, digest):
    ...         blobs.flip_a_bit(digest)
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from pathlib import Path

import pytest

from millrace.core.errors import ConflictError, CorruptError, InputError, NotFoundError
from millrace.core.ids import digest_bytes
from millrace.core.ports import Blobs
from millrace.core.types import TREE_MEDIA_TYPE, TreeEntry
from millrace.store.blob_abilities import SupportsAge

CLOCK_STEP_S = 1.1  # S3 tells whole seconds
ABSENT = "sha256:" + "0" * 64
FILES = {"a.txt": b"alpha", "deep/er/b.bin": bytes(range(256)) * 40, "empty": b""}


def make_folder(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """A folder with files."""
    for name, data in (FILES if files is None else files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(one.relative_to(folder)): one.read_bytes() for one in folder.rglob("*") if one.is_file()}


class BlobsConformance:
    """What every implementation of `Blobs` must do."""

    def open(self, place: Path) -> Blobs:
        """Open the blobs that live at a place; another call opens the same ones once more."""
        raise NotImplementedError("a conformance suite is subclassed")

    def damage(self, blobs: Blobs, digest: str) -> None:
        """Flip one bit of a stored blob behind the implementation's back."""
        raise NotImplementedError("a conformance suite is subclassed")

    @pytest.fixture
    def blobs(self, tmp_path: Path) -> Blobs:
        """Empty blobs."""
        return self.open(tmp_path / "store")

    @pytest.mark.parametrize("size", [0, 1, 100_000, 3 << 20])
    def test_bytes_streams_and_files_are_the_same(self, blobs: Blobs, tmp_path: Path, size: int) -> None:
        data = os.urandom(size)
        (tmp_path / "file").write_bytes(data)
        first = blobs.put(data, "text/plain")
        assert first.digest == "sha256:" + hashlib.sha256(data).hexdigest()
        assert (first.size_bytes, first.media_type) == (size, "text/plain")
        assert blobs.put(io.BytesIO(data)).digest == blobs.put(tmp_path / "file").digest == first.digest
        assert blobs.read(first.digest) == data
        assert blobs.path(first.digest).read_bytes() == data
        with blobs.open(first.digest) as file:
            assert b"".join(iter(lambda: file.read(1000), b"")) == data
        assert [(one.digest, one.size_bytes) for one in blobs.list()] == [(first.digest, size)]

    def test_an_absent_blob(self, blobs: Blobs) -> None:
        assert not blobs.exists(ABSENT)
        assert not blobs.delete(ABSENT)
        for ask in (blobs.read, blobs.path, blobs.open, blobs.tree):
            with pytest.raises(NotFoundError, match="sha256:000"):
                ask(ABSENT)

    @pytest.mark.parametrize(
        "digest", ["", "sha256:", "sha256:../../etc/passwd", "md5:" + "0" * 64, ABSENT + "0", ABSENT + "\n"]
    )
    def test_what_is_no_digest_is_refused(self, blobs: Blobs, digest: str) -> None:
        for ask in (blobs.read, blobs.path, blobs.exists, blobs.delete):
            with pytest.raises(InputError, match="digest"):
                ask(digest)

    def test_delete(self, blobs: Blobs) -> None:
        digest = blobs.put(b"x").digest
        assert blobs.exists(digest)
        assert blobs.delete(digest)
        assert not blobs.exists(digest)
        assert list(blobs.list()) == []
        assert blobs.put(b"x").digest == digest
        assert blobs.read(digest) == b"x"

    def test_a_file_is_read_only(self, blobs: Blobs) -> None:
        assert blobs.path(blobs.put(b"x").digest).stat().st_mode & 0o777 == 0o444

    def test_a_flipped_bit_is_refused_with_the_name(self, blobs: Blobs) -> None:
        digest = blobs.put(b"some bytes").digest
        assert blobs.path(digest).exists()  # verified once: damage after that must show too
        self.damage(blobs, digest)
        for ask in (blobs.read, blobs.path, lambda one: blobs.open(one).read()):
            with pytest.raises(CorruptError, match=digest):
                ask(digest)

    def test_putting_the_bytes_again_heals(self, blobs: Blobs, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"some bytes")
        for source in (b"some bytes", tmp_path / "file", io.BytesIO(b"some bytes")):
            digest = blobs.put(b"some bytes").digest
            self.damage(blobs, digest)
            assert blobs.put(source).digest == digest
            assert blobs.read(digest) == b"some bytes"

    def test_a_damaged_file_of_a_tree_stops_materialize(self, blobs: Blobs, tmp_path: Path) -> None:
        tree = blobs.put_tree(make_folder(tmp_path / "in"))
        victim = blobs.tree(tree.digest)[1].digest
        self.damage(blobs, victim)
        with pytest.raises(CorruptError, match=victim):
            blobs.materialize(tree.digest, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_threads_put_the_same_bytes(self, blobs: Blobs) -> None:
        data = os.urandom(50_000)
        found: list[str] = []
        threads = [threading.Thread(target=lambda: found.append(blobs.put(io.BytesIO(data)).digest)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [digest_bytes(data)] * 8
        assert len(list(blobs.list())) == 1

    # ---- trees

    def test_a_tree_comes_back(self, blobs: Blobs, tmp_path: Path) -> None:
        tree = blobs.put_tree(make_folder(tmp_path / "in"))
        assert tree.media_type == TREE_MEDIA_TYPE
        entries = blobs.tree(tree.digest)
        assert [(one.path, one.size_bytes) for one in entries] == [(n, len(d)) for n, d in sorted(FILES.items())]
        assert [one.digest for one in entries] == [digest_bytes(data) for _, data in sorted(FILES.items())]
        out = blobs.materialize(tree.digest, tmp_path / "new/out")
        assert out == tmp_path / "new/out"
        assert contents(out) == FILES
        assert {one.stat().st_mode & 0o777 for one in out.rglob("*") if one.is_file()} == {0o444}
        assert [one.name for one in out.parent.iterdir()] == ["out"]

    def test_equal_folders_have_equal_digests(self, blobs: Blobs, tmp_path: Path) -> None:
        other = make_folder(tmp_path / "two", dict(reversed(FILES.items())))
        (other / "no files in here").mkdir()
        assert blobs.put_tree(make_folder(tmp_path / "one")) == blobs.put_tree(other)
        (other / "a.txt").write_bytes(b"Alpha")
        assert blobs.put_tree(tmp_path / "one") != blobs.put_tree(other)

    def test_materialize_twice_is_idempotent(self, blobs: Blobs, tmp_path: Path) -> None:
        tree = blobs.put_tree(make_folder(tmp_path / "in"))
        out = blobs.materialize(tree.digest, tmp_path / "out")
        before = (out / "a.txt").stat().st_mtime_ns
        assert blobs.materialize(tree.digest, out) == out
        assert (out / "a.txt").stat().st_mtime_ns == before

    @pytest.mark.parametrize("change", ["missing", "extra", "altered", "file"])
    def test_a_folder_with_something_else_is_not_touched(self, blobs: Blobs, tmp_path: Path, change: str) -> None:
        tree = blobs.put_tree(make_folder(tmp_path / "in"))
        out = tmp_path / "out"
        if change == "file":
            out.write_bytes(b"mine")
        else:
            make_folder(out)
            {
                "missing": lambda: (out / "a.txt").unlink(),
                "extra": lambda: (out / "mine").touch(),
                "altered": lambda: (out / "a.txt").write_bytes(b"ALPHA"),
            }[change]()
        before = contents(out) if out.is_dir() else out.read_bytes()
        with pytest.raises(ConflictError, match="something else"):
            blobs.materialize(tree.digest, out)
        assert (contents(out) if out.is_dir() else out.read_bytes()) == before

    def test_an_empty_folder_is_filled(self, blobs: Blobs, tmp_path: Path) -> None:
        tree = blobs.put_tree(make_folder(tmp_path / "in"))
        (tmp_path / "out").mkdir()
        assert contents(blobs.materialize(tree.digest, tmp_path / "out")) == FILES

    def test_an_empty_tree(self, blobs: Blobs, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        tree = blobs.put_tree(tmp_path / "in")
        assert blobs.tree(tree.digest) == []
        assert contents(blobs.materialize(tree.digest, tmp_path / "out")) == {}
        blobs.materialize(tree.digest, tmp_path / "out")

    @pytest.mark.parametrize("what", ["file", "folder", "dangling"])
    def test_links_are_refused(self, blobs: Blobs, tmp_path: Path, what: str) -> None:
        folder = make_folder(tmp_path / "in")
        (folder / "link").symlink_to({"file": "a.txt", "folder": "deep", "dangling": "/nowhere"}[what])
        with pytest.raises(InputError, match="link"):
            blobs.put_tree(folder)

    def test_a_folder_that_is_not_there_is_refused(self, blobs: Blobs, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="folder"):
            blobs.put_tree(tmp_path / "nowhere")
        with pytest.raises(InputError, match="nowhere"):
            blobs.put(tmp_path / "nowhere")

    @pytest.mark.parametrize(
        "paths",
        [["../x"], ["/x"], ["a/../../x"], ["a//b"], ["."], [""], ["b", "a"], ["a", "a"], ["a", "a/b"], ["a\\b"]],
    )
    def test_a_listing_that_leads_elsewhere_is_refused(self, blobs: Blobs, tmp_path: Path, paths: list[str]) -> None:
        blob = blobs.put(b"evil")
        entries = [TreeEntry(path=path, digest=blob.digest, size_bytes=4) for path in paths]
        listing = blobs.put(_plain_json(entries), TREE_MEDIA_TYPE)
        with pytest.raises(CorruptError, match=listing.digest):
            blobs.materialize(listing.digest, tmp_path / "in/out")
        assert not (tmp_path / "in").exists()

    @pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b'[{"path": 1}]', b"\xff", b"[" * 100_000])
    def test_what_is_no_listing_is_refused(self, blobs: Blobs, data: bytes) -> None:
        digest = blobs.put(data).digest
        with pytest.raises(CorruptError, match=digest):
            blobs.tree(digest)


def _plain_json(entries: list[TreeEntry]) -> bytes:
    rows = (f'{{"path":"{e.path}","digest":"{e.digest}","size_bytes":{e.size_bytes}}}' for e in entries)
    return f"[{','.join(rows)}]".replace("\\", "\\\\").encode()


class BlobAgeConformance:
    """What blobs that garbage collection asks for their age must do; mixed into a class of `BlobsConformance`."""

    def test_age(self, blobs: Blobs) -> None:
        assert isinstance(blobs, SupportsAge)
        before = time.time()
        digest = blobs.put(b"some bytes").digest
        first = blobs.modified_at(digest)
        assert before - CLOCK_STEP_S <= first <= time.time() + CLOCK_STEP_S
        time.sleep(CLOCK_STEP_S)  # stores count in whole seconds
        blobs.touch(digest)
        assert blobs.modified_at(digest) > first

    def test_putting_the_bytes_again_makes_it_young(self, blobs: Blobs, tmp_path: Path) -> None:
        assert isinstance(blobs, SupportsAge)
        (tmp_path / "file").write_bytes(b"some bytes")
        age = blobs.modified_at(blobs.put(b"some bytes").digest)
        time.sleep(CLOCK_STEP_S)
        digest = blobs.put(tmp_path / "file").digest
        assert blobs.modified_at(digest) > age
        assert blobs.read(digest) == b"some bytes"
        assert len(list(blobs.list())) == 1

    def test_an_absent_blob_has_no_age(self, blobs: Blobs) -> None:
        assert isinstance(blobs, SupportsAge)
        for ask in (blobs.modified_at, blobs.touch):
            with pytest.raises(NotFoundError, match="sha256:000"):
                ask(ABSENT)
        digest = blobs.put(b"x").digest
        blobs.touch(digest)
        assert blobs.delete(digest)
        with pytest.raises(NotFoundError, match=digest):
            blobs.modified_at(digest)
        assert list(blobs.list()) == []


class BlobDiscardConformance:
    """Putting aside: what a collector takes away comes back to whoever asks; mixed into `BlobsConformance`."""

    def test_what_is_put_aside_comes_back_to_whoever_asks(self, blobs: Blobs, tmp_path: Path) -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / "source/a").write_bytes(b"in a tree")
        tree = blobs.put_tree(tmp_path / "source")
        for number, ask in enumerate((blobs.read, blobs.exists, blobs.path, blobs.modified_at, blobs.touch)):
            digest = blobs.put(b"bytes %d" % number).digest
            assert blobs.discard(digest)
            assert digest not in {one.digest for one in blobs.list()}
            assert digest in {one.digest for one, _ in blobs.discarded()}
            ask(digest)
            assert digest in {one.digest for one in blobs.list()}
            assert digest not in {one.digest for one, _ in blobs.discarded()}
        for entry in [*blobs.tree(tree.digest)]:
            blobs.discard(entry.digest)
        blobs.discard(tree.digest)
        assert (blobs.materialize(tree.digest, tmp_path / "out") / "a").read_bytes() == b"in a tree"

    def test_putting_the_bytes_again_brings_them_back(self, blobs: Blobs) -> None:
        digest = blobs.put(b"again").digest
        blobs.discard(digest)
        assert blobs.put(b"again").digest == digest
        blobs.purge(digest)
        assert blobs.read(digest) == b"again"

    def test_only_what_lies_aside_is_purged(self, blobs: Blobs) -> None:
        digest = blobs.put(b"to go").digest
        assert not blobs.purge(digest)
        assert blobs.read(digest) == b"to go"
        assert blobs.discard(digest)
        ((artifact, since),) = [(one, at) for one, at in blobs.discarded() if one.digest == digest]
        assert artifact.size_bytes == 5
        assert abs(since - time.time()) < 60 + CLOCK_STEP_S
        assert blobs.purge(digest)
        assert not blobs.purge(digest)
        assert not blobs.exists(digest)
        assert not blobs.discard(digest)
        with pytest.raises(NotFoundError):
            blobs.read(digest)

    def test_deleting_what_lies_aside_deletes_it(self, blobs: Blobs) -> None:
        digest = blobs.put(b"x").digest
        blobs.discard(digest)
        assert blobs.delete(digest)
        assert not blobs.exists(digest)
