"""RemoteBlobs on a real S3 service, radosgw: it checks signatures, and can be killed."""

from __future__ import annotations

import os
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import obstore
import pytest

from millrace.core.errors import DeniedError, UnavailableError
from millrace.core.ids import digest_bytes, new_id
from millrace.core.ports import Blobs
from millrace.store.blobs_remote import RemoteBlobs
from millrace.store.object_store import RemoteOptions
from millrace.testing.blobs import BlobAgeConformance, BlobDiscardConformance, BlobsConformance
from millrace.testing.radosgw import Radosgw, missing_programs

BUCKET = "blobs"
pytestmark = [
    pytest.mark.services,
    pytest.mark.xdist_group("radosgw"),
    pytest.mark.skipif(bool(missing_programs()), reason="radosgw, ceph-mon and ceph-osd are not installed"),
]


@pytest.fixture(scope="module")
def gateway() -> Iterator[Radosgw]:
    """One service with a bucket; its folder has a short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="rgw") as folder:
        server = Radosgw(Path(folder)).start()
        try:
            boto3.client(
                "s3",
                endpoint_url=server.endpoint,
                region_name=server.region,
                aws_access_key_id=server.access_key,
                aws_secret_access_key=server.secret_key,
            ).create_bucket(Bucket=BUCKET)
            yield server
        finally:
            server.stop()


def connect(gateway: Radosgw, cache: Path, url: str = "", secret: str = "", key: str = "") -> RemoteBlobs:
    """Blobs on it."""
    config = {
        "endpoint": gateway.endpoint,
        "region": gateway.region,
        "access_key_id": key or gateway.access_key,
        "secret_access_key": secret or gateway.secret_key,
    }
    return RemoteBlobs(
        url or f"s3://{BUCKET}/{new_id()}",
        cache,
        RemoteOptions(config=config, max_retries=3, deadline_s=10.0, request_timeout_s=10.0),
    )


class TestRadosgw(BlobsConformance, BlobAgeConformance, BlobDiscardConformance):
    """The suites."""

    @pytest.fixture(autouse=True)
    def server(self, gateway: Radosgw) -> None:
        self.gateway = gateway

    def open(self, place: Path) -> RemoteBlobs:
        return connect(self.gateway, place / "cache")

    def damage(self, blobs: Blobs, digest: str) -> None:
        assert isinstance(blobs, RemoteBlobs)
        store, key = blobs._objects._store, f"sha256/{digest[7:9]}/{digest[9:]}"
        data = bytearray(obstore.get(store, key).bytes())
        data[len(data) // 2] ^= 1
        obstore.put(store, key, bytes(data))
        blobs._cache.forget(digest)


@pytest.mark.parametrize("wrong", [{"secret": "not-the-secret"}, {"key": "AKNOBODY"}])
def test_wrong_credentials_are_refused(gateway: Radosgw, tmp_path: Path, wrong: dict[str, str]) -> None:
    right = connect(gateway, tmp_path / "right")
    digest = right.put(b"some bytes").digest
    blobs = connect(gateway, tmp_path / "cache", right.url, **wrong)
    for ask in (
        lambda: blobs.put(b"other"),
        lambda: blobs.read(digest),
        lambda: blobs.path(digest),
        lambda: blobs.exists(digest),
        lambda: blobs.delete(digest),
        lambda: list(blobs.list()),
    ):
        with pytest.raises(DeniedError, match="refuses these credentials") as caught:
            ask()
        assert not any(value in str(caught.value) for value in wrong.values())
    assert right.exists(digest)


def test_a_large_blob_in_parts(gateway: Radosgw, tmp_path: Path) -> None:
    blobs = connect(gateway, tmp_path / "cache")
    (tmp_path / "file").write_bytes(os.urandom(17 << 20))
    digest = blobs.put(tmp_path / "file").digest
    tag = obstore.head(blobs._objects._store, f"sha256/{digest[7:9]}/{digest[9:]}")["e_tag"]
    assert str(tag).strip('"').endswith("-3")
    other = connect(gateway, tmp_path / "other", blobs.url)
    assert other.put(tmp_path / "file").digest == digest
    assert other.path(digest).read_bytes() == (tmp_path / "file").read_bytes()


def test_a_presigned_upload(gateway: Radosgw, tmp_path: Path) -> None:
    blobs = connect(gateway, tmp_path / "cache")
    digest = digest_bytes(b"some bytes")
    signed = blobs.presign_put(digest, 10, 60)
    tampered = signed.url.replace(digest[9:], digest_bytes(b"other")[9:])
    with pytest.raises(urllib.error.HTTPError, match="403"):
        send(tampered, signed.headers)
    send(signed.url, signed.headers)
    assert not blobs.exists(digest)
    assert blobs.confirm(digest, 10).digest == digest
    with urllib.request.urlopen(blobs.presign_get(digest, 60).url, timeout=30) as answer:
        assert answer.read() == b"some bytes"


def send(url: str, headers: dict[str, str]) -> None:
    """PUT without credentials."""
    request = urllib.request.Request(url, b"some bytes", headers, method="PUT")
    with urllib.request.urlopen(request, timeout=30) as answer:
        answer.read()


def test_a_killed_service(gateway: Radosgw, tmp_path: Path) -> None:
    """SIGKILL while writers write: what was acknowledged is there afterwards, and work goes on by itself."""
    blobs = connect(gateway, tmp_path / "cache")
    acknowledged: list[str] = []
    failed: list[UnavailableError] = []

    def write() -> None:
        while not failed:
            try:
                acknowledged.append(blobs.put(os.urandom(200_000)).digest)
            except UnavailableError as error:
                failed.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    while len(acknowledged) < 5:
        writer.join(0.01)
    gateway.kill()
    writer.join()
    try:
        with pytest.raises(UnavailableError):
            blobs.read(acknowledged[0])
    finally:
        gateway.start_gateway()
    for digest in acknowledged:
        assert len(blobs.read(digest)) == 200_000
    assert {one.digest for one in blobs.list()} >= set(acknowledged)
