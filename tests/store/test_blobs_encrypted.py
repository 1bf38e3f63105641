"""EncryptedBlobs: the conformance suites over files and over a quick S3, and what is encryption's own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import msgspec
import obstore
import pytest

from millrace.core.errors import ConflictError, CorruptError, NotFoundError
from millrace.core.ids import digest_bytes, new_id
from millrace.core.ports import Blobs
from millrace.core.types import DataKey
from millrace.security.keyring import Keyring
from millrace.store.blobs_encrypted import EncryptedBlobs
from millrace.store.blobs_local import LocalBlobs
from millrace.store.blobs_remote import RemoteBlobs
from millrace.store.object_store import RemoteOptions
from millrace.store.records_sql import SqlRecords, open_records
from millrace.testing.blobs import BlobAgeConformance, BlobDiscardConformance, BlobsConformance, make_folder
from millrace.testing.moto_server import MotoServer

BUCKET = "sealed"
WRITER = """
import sys
from pathlib import Path
from millrace.security.keyring import Keyring
from millrace.store.blobs_encrypted import EncryptedBlobs
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import open_records
home = Path(sys.argv[1])
records = open_records(home / "records.db")
blobs = EncryptedBlobs(LocalBlobs(home / "blobs"), records, Keyring(home), home / "cache")
for number in range(30):
    blobs.put(b"the same bytes, number %d" % number)
records.close()
"""


def over(inner: Blobs, home: Path) -> EncryptedBlobs:
    """Encrypted blobs with records and keys in a folder."""
    home.mkdir(parents=True, exist_ok=True)
    return EncryptedBlobs(inner, open_records(home / "records.db"), Keyring(home), home / "cache" / "plain")


def records_of(blobs: EncryptedBlobs) -> SqlRecords:
    assert isinstance(blobs._records, SqlRecords)
    return blobs._records


def stored_of(blobs: EncryptedBlobs, digest: str) -> str:
    key = records_of(blobs).get(DataKey, digest)
    assert key is not None
    return key.stored


def flip(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


class _Closing:
    """Records that a test has opened are closed."""

    opened: list[EncryptedBlobs]

    @pytest.fixture(autouse=True)
    def closing(self) -> Iterator[None]:
        self.opened = []
        yield
        for blobs in self.opened:
            blobs.close()
            records_of(blobs).close()

    def keep(self, blobs: EncryptedBlobs) -> EncryptedBlobs:
        self.opened.append(blobs)
        return blobs


class TestOverFiles(_Closing, BlobsConformance, BlobAgeConformance, BlobDiscardConformance):
    """The suites over files. What is damaged is the ciphertext: a plain copy in the cache is another file."""

    def open(self, place: Path) -> EncryptedBlobs:
        return self.keep(over(LocalBlobs(place / "blobs"), place))

    def damage(self, blobs: Blobs, digest: str) -> None:
        assert isinstance(blobs, EncryptedBlobs)
        assert isinstance(blobs.inner, LocalBlobs)
        file = blobs.inner._place(stored_of(blobs, digest))
        file.chmod(0o644)
        file.write_bytes(flip(file.read_bytes()))
        os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
        blobs._cache.forget(digest)


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoServer]:
    """One quick S3 with a bucket."""
    server = MotoServer(tmp_path_factory.mktemp("moto")).start()
    boto3.client(
        "s3", endpoint_url=server.endpoint, region_name=server.region, aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    ).create_bucket(Bucket=BUCKET)  # fmt: skip
    yield server
    server.stop()


class TestOverS3(_Closing, BlobsConformance, BlobAgeConformance, BlobDiscardConformance):
    """The suites over S3."""

    @pytest.fixture(autouse=True)
    def server(self, moto: MotoServer) -> None:
        self.config = {
            "endpoint": moto.endpoint, "region": moto.region, "access_key_id": moto.access_key,
            "secret_access_key": moto.secret_key,
        }  # fmt: skip

    def open(self, place: Path) -> EncryptedBlobs:
        inner = RemoteBlobs(f"s3://{BUCKET}/{new_id()}", place / "objects", RemoteOptions(config=self.config))
        return self.keep(over(inner, place))

    def damage(self, blobs: Blobs, digest: str) -> None:
        assert isinstance(blobs, EncryptedBlobs)
        assert isinstance(blobs.inner, RemoteBlobs)
        stored = stored_of(blobs, digest)
        store, key = blobs.inner._objects._store, f"sha256/{stored[7:9]}/{stored[9:]}"
        obstore.put(store, key, flip(bytes(obstore.get(store, key).bytes())))
        blobs.inner._cache.forget(stored)
        blobs._cache.forget(digest)


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[EncryptedBlobs]:
    opened = over(LocalBlobs(tmp_path / "blobs"), tmp_path)
    yield opened
    opened.close()
    records_of(opened).close()


def files_with(folder: Path, data: bytes) -> list[Path]:
    return [one for one in folder.rglob("*") if one.is_file() and data in one.read_bytes()]


def test_no_plain_byte_lies_below(blobs: EncryptedBlobs, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/file").write_bytes(b"canary of a file")
    blobs.put_tree(tmp_path / "source")
    (tmp_path / "source/file").unlink()
    blobs.put(io.BytesIO(b"canary of a stream" * 100_000))
    blobs.put(b"canary in memory")
    assert files_with(tmp_path, b"canary") == []


def test_plain_copies_are_for_the_owner_only(blobs: EncryptedBlobs, tmp_path: Path) -> None:
    path = blobs.path(blobs.put(b"x").digest)
    folder = tmp_path / "cache" / "plain"
    assert path.is_relative_to(folder)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_the_cache_of_plain_copies_is_bounded(tmp_path: Path) -> None:
    records = open_records(tmp_path / "records.db")
    small = EncryptedBlobs(LocalBlobs(tmp_path / "blobs"), records, Keyring(tmp_path), tmp_path / "plain", 250_000)
    small._cache._grace_s = 0.0
    digests = [small.put(os.urandom(100_000)).digest for _ in range(6)]
    for digest in digests:
        small.path(digest)
        small._cache.close()  # lets go of what it has handed out
    held = sum(one.stat().st_size for one in (tmp_path / "plain").rglob("*") if one.is_file())
    assert held <= 300_000
    assert small.path(digests[0]).stat().st_size == 100_000
    small.close()
    records.close()


def test_equal_bytes_in_two_homes_are_not_equal_below(tmp_path: Path) -> None:
    stored = set()
    for name in ("one", "two"):
        opened = over(LocalBlobs(tmp_path / name / "blobs"), tmp_path / name)
        stored.add(stored_of(opened, opened.put(b"the same").digest))
        records_of(opened).close()
    assert len(stored) == 2


def test_processes_that_put_the_same_bytes_keep_one_key_of_each(tmp_path: Path) -> None:
    open_records(tmp_path / "records.db").close()
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)]) for _ in range(2)]
    assert [one.wait(120) for one in writers] == [0, 0]
    opened = over(LocalBlobs(tmp_path / "blobs"), tmp_path)
    keys = records_of(opened).find(DataKey)
    assert len(keys) == 30
    assert {one.digest for one in opened.inner.list()} == {key.stored for key in keys}
    assert all(opened.read(key.id).startswith(b"the same bytes") for key in keys)
    records_of(opened).close()


def test_blobs_from_before_are_read_and_encrypted_when_put_again(tmp_path: Path) -> None:
    plain = LocalBlobs(tmp_path / "blobs")
    tree = plain.put_tree(make_folder(tmp_path / "in"))
    old = plain.put(b"from before").digest
    opened = over(plain, tmp_path)
    assert opened.read(old) == b"from before"
    assert opened.path(old).read_bytes() == b"from before"
    assert opened.exists(old)
    assert (opened.materialize(tree.digest, tmp_path / "out") / "a.txt").read_bytes() == b"alpha"
    assert opened.put(b"from before").digest == old
    assert not plain.exists(old)
    assert opened.read(old) == b"from before"
    assert [one.digest for one in opened.list()].count(old) == 1
    assert opened.delete(old)
    assert not opened.exists(old)
    records_of(opened).close()


def test_ciphertext_that_is_put_as_a_blob_takes_nothing_away(blobs: EncryptedBlobs) -> None:
    """Somebody keeps a copy of the store in itself."""
    digest = blobs.put(b"first").digest
    stored = stored_of(blobs, digest)
    copy = blobs.put(blobs.inner.read(stored)).digest
    assert copy == stored
    assert blobs.read(digest) == b"first"
    assert blobs.delete(copy)
    assert not blobs.discard(stored)
    assert not blobs.delete(stored)
    assert blobs.read(digest) == b"first"


def test_a_reader_seeks_where_the_store_below_does(tmp_path: Path) -> None:
    data = os.urandom(700_000)
    opened = over(RemoteBlobs("memory:///", tmp_path / "objects"), tmp_path)
    with opened.open(opened.put(data).digest) as file:
        for place in (699_990, 5, 300_000):
            assert file.seek(place) == place
            assert file.read(100) == data[place : place + 100]
    records_of(opened).close()


def test_records_that_are_swapped_do_not_show_one_blob_as_another(blobs: EncryptedBlobs) -> None:
    first, second = (blobs.put(data).digest for data in (b"innocent", b"criminal"))
    records = records_of(blobs)
    one, other = records.get(DataKey, first), records.get(DataKey, second)
    assert one is not None
    assert other is not None
    records.put(msgspec.structs.replace(one, stored=other.stored, wrapped=other.wrapped))
    with pytest.raises(CorruptError):
        blobs.read(first)
    records.put(msgspec.structs.replace(one, stored=other.stored))
    with pytest.raises(CorruptError, match=first):
        blobs.read(first)


def test_erased_is_said_and_nothing_is_left(blobs: EncryptedBlobs, tmp_path: Path) -> None:
    digest, other = blobs.put(b"canary of somebody").digest, blobs.put(b"another's").digest
    path, stored = blobs.path(digest), stored_of(blobs, digest)
    assert blobs.erase([digest, digest]) == (1, 18)
    assert not path.exists()
    assert not blobs.exists(digest)
    assert not blobs.inner.exists(stored)
    for ask in (blobs.read, blobs.open, blobs.path, blobs.modified_at, blobs.touch):
        with pytest.raises(NotFoundError, match="erased"):
            ask(digest)
    assert digest not in {one.digest for one in blobs.list()}
    assert blobs.erase([digest]) == (0, 0)
    assert files_with(tmp_path, b"canary") == []
    assert blobs.read(other) == b"another's"
    assert blobs.put(b"canary of somebody").digest == digest  # whoever has the bytes may keep them again
    assert blobs.read(digest) == b"canary of somebody"


def test_bytes_of_two_people_are_refused(blobs: EncryptedBlobs) -> None:
    digest = blobs.put(b"theirs").digest
    assert blobs.mark([digest, digest], "ada") == 1
    assert blobs.mark([digest], "ada") == 0
    with pytest.raises(ConflictError, match="somebody else"):
        blobs.mark([digest], "bob")
    assert blobs.mark([blobs.put(b"").digest], "ada") == 0  # nothing is nobody's


def test_what_was_purged_leaves_no_key(blobs: EncryptedBlobs) -> None:
    digest = blobs.put(b"garbage").digest
    assert blobs.discard(digest)
    assert blobs.purge(digest)
    assert records_of(blobs).get(DataKey, digest) is None
    assert list(blobs.inner.list()) == []


def test_ciphertext_of_a_killed_writer_is_listed_so_that_it_is_collected(blobs: EncryptedBlobs) -> None:
    orphan = blobs.inner.put(b"ciphertext whose key was never written").digest
    assert [one.digest for one in blobs.list()] == [orphan]
    assert blobs.discard(orphan)
    assert blobs.purge(orphan)


def test_a_changed_file_counts_as_it_was_when_it_was_read(blobs: EncryptedBlobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"now")
    assert blobs.put(tmp_path / "file").digest == digest_bytes(b"now")
    (tmp_path / "file").write_bytes(b"then")
    assert blobs.read(blobs.put(tmp_path / "file").digest) == b"then"
