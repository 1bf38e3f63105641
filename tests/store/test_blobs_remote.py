"""RemoteBlobs: the conformance suite over memory, files and a quick S3, and what is the remote store's own."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import subprocess
import sys
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import obstore
import pytest

from millrace.core.errors import CorruptError, InputError, NotFoundError
from millrace.core.ids import new_id
from millrace.core.ports import Blobs
from millrace.store import object_store
from millrace.store.blobs_local import LocalBlobs
from millrace.store.blobs_remote import RemoteBlobs
from millrace.store.object_store import RemoteOptions
from millrace.testing.blobs import BlobAgeConformance, BlobDiscardConformance, BlobsConformance, contents, make_folder
from millrace.testing.moto_server import MotoServer

BUCKET = "blobs"
LARGE = 20 << 20  # three parts
PRELUDE = """
import os, sys
from pathlib import Path
from millrace.store.blobs_remote import RemoteBlobs, RemoteOptions
url, cache, endpoint = sys.argv[1:]
config = {"endpoint": endpoint, "access_key_id": "any", "secret_access_key": "any", "region": "us-east-1"}
blobs = RemoteBlobs(url, Path(cache), RemoteOptions(config=config))
"""


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MotoServer]:
    """One quick S3 with a bucket."""
    server = MotoServer(tmp_path_factory.mktemp("moto")).start()
    client(server).create_bucket(Bucket=BUCKET)
    yield server
    server.stop()


def client(server: MotoServer):
    """Somebody else's client, to look behind ours."""
    return boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        region_name=server.region,
        aws_access_key_id=server.access_key,
        aws_secret_access_key=server.secret_key,
    )


def options(server: MotoServer, **changes: object) -> RemoteOptions:
    """How to reach it."""
    config = {
        "endpoint": server.endpoint,
        "region": server.region,
        "access_key_id": server.access_key,
        "secret_access_key": server.secret_key,
    }
    return RemoteOptions(config=config, **changes)  # type: ignore[arg-type]


@pytest.fixture
def remote(moto: MotoServer, tmp_path: Path) -> RemoteBlobs:
    """Empty blobs on S3."""
    return RemoteBlobs(f"s3://{BUCKET}/{new_id()}", tmp_path / "cache", options(moto))


def key_of(digest: str) -> str:
    """Where a blob is."""
    return f"sha256/{digest[7:9]}/{digest[9:]}"


def flip_a_bit(blobs: Blobs, digest: str) -> None:
    """Damage the stored object; what is cached is another store's matter."""
    assert isinstance(blobs, RemoteBlobs)
    store, key = blobs._objects._store, key_of(digest)
    data = bytearray(obstore.get(store, key).bytes())
    data[len(data) // 2] ^= 1
    obstore.put(store, key, bytes(data))
    blobs._cache.forget(digest)


class TestMemory(BlobsConformance, BlobAgeConformance, BlobDiscardConformance):
    """In memory."""

    def open(self, place: Path) -> RemoteBlobs:
        return RemoteBlobs("memory:///", place / "cache")

    def damage(self, blobs: Blobs, digest: str) -> None:
        flip_a_bit(blobs, digest)


class TestFiles(BlobsConformance, BlobAgeConformance, BlobDiscardConformance):
    """In a folder, for example a mounted share."""

    def open(self, place: Path) -> RemoteBlobs:
        return RemoteBlobs(f"file://{place}/objects", place / "cache")

    def damage(self, blobs: Blobs, digest: str) -> None:
        flip_a_bit(blobs, digest)


class TestS3(BlobsConformance, BlobAgeConformance, BlobDiscardConformance):
    """On S3."""

    @pytest.fixture(autouse=True)
    def server(self, moto: MotoServer) -> None:
        self.moto = moto

    def open(self, place: Path) -> RemoteBlobs:
        return RemoteBlobs(f"s3://{BUCKET}/{new_id()}", place / "cache", options(self.moto))

    def damage(self, blobs: Blobs, digest: str) -> None:
        flip_a_bit(blobs, digest)


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_a_large_blob_goes_in_parts_and_comes_back(
    remote: RemoteBlobs, moto: MotoServer, tmp_path: Path, kind: str
) -> None:
    data = os.urandom(LARGE)
    (tmp_path / "file").write_bytes(data)
    stored = remote.put(tmp_path / "file" if kind == "file" else io.BytesIO(data))
    assert stored.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    prefix = remote.url.rpartition("/")[2]
    tag = client(moto).head_object(Bucket=BUCKET, Key=f"{prefix}/{key_of(stored.digest)}")["ETag"]
    assert tag.strip('"').endswith("-3")
    other = RemoteBlobs(remote.url, tmp_path / "other", options(moto))
    assert other.read(stored.digest) == data
    assert other.path(stored.digest).read_bytes() == data
    spooled = [one for one in (tmp_path / "cache").rglob("*") if one.is_file()]
    assert len(spooled) == (0 if kind == "file" else 1)


def test_a_large_blob_is_sent_once(
    remote: RemoteBlobs, moto: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(os.urandom(LARGE))
    digest = remote.put(tmp_path / "file").digest

    def refuse(*_: object) -> None:
        raise AssertionError("sent or read again")

    other = RemoteBlobs(remote.url, tmp_path / "other", options(moto))  # it must not know what the first one verified
    monkeypatch.setattr(other._objects, "put_parts", refuse)
    monkeypatch.setattr(other._objects, "range", refuse)
    assert other.put(tmp_path / "file").digest == digest


def test_a_large_damaged_blob_is_healed(remote: RemoteBlobs, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(os.urandom(LARGE))
    digest = remote.put(tmp_path / "file").digest
    flip_a_bit(remote, digest)
    with pytest.raises(CorruptError, match=digest):
        remote.path(digest)
    assert remote.put(tmp_path / "file").digest == digest
    assert remote.read(digest) == (tmp_path / "file").read_bytes()


def test_a_file_that_changes_while_it_is_sent(
    remote: RemoteBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first digest never becomes visible; what counts is what was read in the end."""
    file, send = tmp_path / "file", remote._objects.put_parts
    file.write_bytes(os.urandom(LARGE))
    first = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()

    def late(*arguments: object) -> None:
        if not changed:
            changed.append(file.write_bytes(os.urandom(LARGE)))
        send(*arguments)  # type: ignore[arg-type]

    changed: list[int] = []
    monkeypatch.setattr(remote._objects, "put_parts", late)
    stored = remote.put(file)
    assert stored.digest == "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest() != first
    assert [one.digest for one in remote.list()] == [stored.digest]
    assert remote.read(stored.digest) == file.read_bytes()


def test_a_stream_that_fails_leaves_nothing(remote: RemoteBlobs, tmp_path: Path) -> None:
    class Failing(io.RawIOBase):
        left = 12

        def read(self, size: int = -1) -> bytes:
            self.left -= 1
            if not self.left:
                raise ZeroDivisionError
            return b"x" * min(size, 1 << 20)

    with pytest.raises(ZeroDivisionError):
        remote.put(Failing())  # type: ignore[arg-type]
    assert list(remote.list()) == []
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == []


def test_sixteen_creators_of_one_blob(remote: RemoteBlobs, moto: MotoServer, tmp_path: Path) -> None:
    data = os.urandom(100_000)
    found: list[str] = []
    gate = threading.Barrier(16)

    def create(number: int) -> None:
        blobs = RemoteBlobs(remote.url, tmp_path / f"cache{number}", options(moto))
        gate.wait()
        found.append(blobs.put(data).digest)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16
    assert [one.digest for one in remote.list()] == [found[0]]
    assert remote.read(found[0]) == data


def test_several_processes_put_the_same_large_blobs(remote: RemoteBlobs, moto: MotoServer, tmp_path: Path) -> None:
    files = [tmp_path / f"file{number}" for number in range(2)]
    for file in files:
        file.write_bytes(os.urandom(9 << 20))
    program = PRELUDE + f"print(*[blobs.put(Path(file)).digest for file in {[str(file) for file in files]}])"
    arguments = [sys.executable, "-c", program, remote.url, str(tmp_path / "cache"), moto.endpoint]
    writers = [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = [writer.communicate(timeout=150)[0].split() for writer in writers]
    wanted = ["sha256:" + hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert found == [wanted] * 3
    assert sorted(one.digest for one in remote.list()) == sorted(wanted)
    assert [remote.read(digest) for digest in wanted] == [file.read_bytes() for file in files]


def test_an_uploader_killed_in_the_middle_leaves_nothing_visible(
    remote: RemoteBlobs, moto: MotoServer, tmp_path: Path
) -> None:
    """It hangs while its parts are sent; SIGKILL; no object, and the next one puts the same bytes."""
    (tmp_path / "file").write_bytes(os.urandom(LARGE))
    hang = PRELUDE + (
        "import time\n"
        "from millrace.store import blobs_remote\n"
        "def hanging(file, digest, part):\n"
        "    yield file.read(part)\n"
        "    yield file.read(part)\n"
        "    print('sent', flush=True)\n"
        "    time.sleep(600)\n"
        "blobs_remote.parts_of = hanging\n"
        f"blobs.put(Path({str(tmp_path / 'file')!r}))\n"
    )
    command = [sys.executable, "-c", hang, remote.url, str(tmp_path / "other"), moto.endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sent\n"
        process.send_signal(signal.SIGKILL)
    assert list(remote.list()) == []
    uploads = client(moto).list_multipart_uploads(Bucket=BUCKET)
    assert len(uploads["Uploads"]) == 1  # what a lifecycle rule removes
    digest = remote.put(tmp_path / "file").digest
    assert remote.read(digest) == (tmp_path / "file").read_bytes()


def test_a_fork_of_a_user_is_told_so(remote: RemoteBlobs, moto: MotoServer, tmp_path: Path) -> None:
    """The client's threads do not survive a fork: an error, where it would hang."""
    program = PRELUDE + (
        "from millrace.core.errors import UnavailableError\n"
        "digest = blobs.put(b'x').digest\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        blobs.exists(digest)\n"
        "    except UnavailableError as error:\n"
        "        print(error.hint, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(blobs.exists(digest))\n"
    )
    command = [sys.executable, "-c", program, remote.url, str(tmp_path / "other"), moto.endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split("\n")[:2] == ["start the process with spawn", "True"]


# ---------------------------------------------------------------- reading


def test_a_reader_seeks(remote: RemoteBlobs) -> None:
    data = os.urandom(3 << 20)
    with remote.open(remote.put(data).digest) as file:
        assert file.seekable()
        assert file.seek(-10, os.SEEK_END) == len(data) - 10
        assert file.read() == data[-10:]
        file.seek(1_000_000)
        assert (file.read(5), file.tell()) == (data[1_000_000:1_000_005], 1_000_005)
        file.seek(0)
        assert file.read() == data


def test_a_tree_is_downloaded_once(remote: RemoteBlobs, moto: MotoServer, tmp_path: Path) -> None:
    tree = remote.put_tree(make_folder(tmp_path / "in"))
    other = RemoteBlobs(remote.url, tmp_path / "other", options(moto))
    folder = other.materialize(tree.digest, tmp_path / "out")
    assert (folder / "a.txt").stat().st_nlink == 2
    for entry in other.tree(tree.digest):
        other.delete(entry.digest)
    assert contents(other.materialize(tree.digest, folder)) == contents(tmp_path / "in")


def test_a_cached_copy_that_was_damaged_is_fetched_again(remote: RemoteBlobs) -> None:
    digest = remote.put(b"some bytes").digest
    cached = remote.path(digest)
    cached.chmod(0o644)
    cached.write_bytes(b"SOME BYTES")
    assert remote.path(digest).read_bytes() == b"some bytes"
    assert remote.read(digest) == b"some bytes"


def test_the_layout_is_that_of_a_folder(tmp_path: Path) -> None:
    """Objects in a folder can be read by LocalBlobs: `sha256/ab/…`."""
    remote = RemoteBlobs(f"file://{tmp_path}/objects", tmp_path / "cache")
    digest = remote.put(b"some bytes").digest
    assert LocalBlobs(tmp_path / "objects").read(digest) == b"some bytes"


# ---------------------------------------------------------------- presigned


def send(url: str, data: bytes | None, method: str, headers: dict[str, str]) -> bytes:
    """What somebody without credentials does."""
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=30) as answer:
        return answer.read()


def test_a_presigned_blob_counts_once_confirmed(remote: RemoteBlobs) -> None:
    data = os.urandom(300_000)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    with pytest.raises(NotFoundError, match=digest):
        remote.confirm(digest, len(data))
    signed = remote.presign_put(digest, len(data), 60)
    send(signed.url, data, signed.method, signed.headers)
    assert not remote.exists(digest)
    artifact = remote.confirm(digest, len(data))
    assert (artifact.digest, artifact.size_bytes) == (digest, len(data))
    assert remote.confirm(digest, len(data)) == artifact
    assert remote.read(digest) == data
    assert send(remote.presign_get(digest, 60).url, None, "GET", {}) == data
    assert [meta["path"] for batch in obstore.list(remote._objects._store, "incoming") for meta in batch] == []


@pytest.mark.parametrize("sent", [b"SOME BYTES", b"some", b""])
def test_something_else_sent_is_refused_and_removed(remote: RemoteBlobs, sent: bytes) -> None:
    digest = "sha256:" + hashlib.sha256(b"some bytes").hexdigest()
    signed = remote.presign_put(digest, 10, 60)
    send(signed.url, sent, signed.method, signed.headers)
    with pytest.raises(CorruptError, match=digest):
        remote.confirm(digest, 10)
    assert not remote.exists(digest)
    with pytest.raises(NotFoundError):
        remote.confirm(digest, 10)


def test_the_url_used_again_between_verification_and_copy(remote: RemoteBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = "sha256:" + hashlib.sha256(b"some bytes").hexdigest()
    signed = remote.presign_put(digest, 10, 60)
    send(signed.url, b"some bytes", signed.method, signed.headers)
    copy = remote._objects.copy

    def late(source: str, target: str) -> None:
        send(signed.url, b"evil bytes", signed.method, signed.headers)
        copy(source, target)

    monkeypatch.setattr(remote._objects, "copy", late)
    with pytest.raises(CorruptError, match=digest):
        remote.confirm(digest, 10)
    assert not remote.exists(digest)


def test_what_cannot_be_signed(remote: RemoteBlobs, tmp_path: Path) -> None:
    digest = "sha256:" + "0" * 64
    for refused in (lambda: remote.presign_put(digest, 6 << 30, 60), lambda: remote.presign_get(digest, 0)):
        with pytest.raises(InputError, match="got"):
            refused()
    with pytest.raises(InputError, match="cannot sign"):
        RemoteBlobs("memory:///", tmp_path / "memory").presign_get(digest, 60)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize("url", ["s3://bucket/p", "gs://bucket/p", "az://container/p"])
def test_every_store_opens_without_a_request(url: str, tmp_path: Path) -> None:
    config = {"account_name": "a", "account_key": "YQ=="} if url.startswith("az") else {}
    assert RemoteBlobs(url, tmp_path, RemoteOptions(config=config)).url == url


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("ftp://x/y", "want the URL"),
        ("/tmp/x", "want the URL"),
        ("s3:///p", "no bucket"),
        ("s3://a:b@c/d", "credentials"),
    ],
)
def test_a_url_that_is_refused(url: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says) as caught:
        RemoteBlobs(url, tmp_path)
    assert "a:b" not in str(caught.value)


def test_plain_http_to_another_host_is_refused(tmp_path: Path) -> None:
    config = {"endpoint": "http://192.0.2.1:9000"}
    with pytest.raises(InputError, match="plain HTTP"):
        object_store.open_store("s3://b", RemoteOptions(config=config), {})
    with pytest.raises(InputError, match="plain HTTP"):
        object_store.open_store("s3://b", RemoteOptions(), {"AWS_ENDPOINT_URL": "http://192.0.2.1:9000"})
    object_store.open_store("s3://b", RemoteOptions(config=config, allow_http=True), {})


def test_the_environment_names_the_store(moto: MotoServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    blobs = RemoteBlobs(f"s3://{BUCKET}/{new_id()}", tmp_path)
    assert blobs.read(blobs.put(b"x").digest) == b"x"


def test_an_absent_bucket_is_said_by_everything(moto: MotoServer, tmp_path: Path) -> None:
    digest = "sha256:" + "0" * 64
    (tmp_path / "file").write_bytes(os.urandom(9 << 20))
    for ask in (
        lambda blobs: blobs.put(b"x"),
        lambda blobs: blobs.put(tmp_path / "file"),
        lambda blobs: blobs.exists(digest),
        lambda blobs: blobs.read(digest),
        lambda blobs: blobs.path(digest),
        lambda blobs: list(blobs.list()),
    ):
        with pytest.raises(NotFoundError, match="the bucket of s3://nowhere/p does not exist") as caught:
            ask(RemoteBlobs("s3://nowhere/p", tmp_path / "cache", options(moto)))
        assert "create it" in caught.value.hint


def test_secrets_are_never_shown(moto: MotoServer, tmp_path: Path) -> None:
    config = {**options(moto).config, "secret_access_key": "hush-hush", "no_such_key": "x"}
    with pytest.raises(InputError, match="no_such_key") as caught:
        RemoteBlobs("s3://b", tmp_path, RemoteOptions(config=config))
    shown = "".join(traceback.format_exception(caught.value)) + repr(RemoteOptions(config=config))
    assert "hush-hush" not in shown
